"""The end of a socket on which answers will still come."""

from __future__ import annotations

import socket

from .event_loop import Loop

# How many bytes to read at once.
MOST_READ = 1 << 18
LINGER_SECS = 2.0


class Linger:
    """Reads from a socket until the server closes it as well, or for a moment."""

    def __init__(self, sock: socket.socket, loop: Loop) -> None:
        self._socket = sock
        self._loop = loop
        loop.watch_readable(sock, self._read)
        self._timer = loop.call_at(loop.now() + LINGER_SECS, self._close)
        self._not_at_end = loop.at_end(self._close)

    def _read(self) -> None:
        try:
            if self._socket.recv(MOST_READ):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._close()

    def _close(self) -> None:
        self._timer.cancel()
        self._not_at_end()
        self._loop.unwatch(self._socket)
        self._socket.close()
