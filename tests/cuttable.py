"""A way to a port that a test can cut, as when a network fails.

It forwards what clients send on loopback, in one thread for all ways. It needs no privileges.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Literal

# ``hold``: nothing passes until the way is healed, and then everything does, as with TCP when
# packets were dropped. ``hole``: nothing passes any more, and healing resets the connections that
# were open. ``reset``: connections are reset, and new ones too until the way is healed.
Cut = Literal["hold", "hole", "reset"]
_CHUNK = 1 << 16
_RESET = b"\1\0\0\0\0\0\0\0"  # struct linger: on, 0 s, so that closing sends RST


class Ways:
    """The thread that forwards, for any number of ways."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._orders: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._bell, self._rung = socket.socketpair()
        self._rung.setblocking(False)
        self._selector.register(self._rung, selectors.EVENT_READ, self._obey)
        self._ways: list[Way] = []
        self._open = True
        self._thread = threading.Thread(target=self._forward, name="ways", daemon=True)
        self._thread.start()

    def to(self, port: int) -> Way:
        """A new way to ``port``."""
        way = Way(self, port)
        self._ways.append(way)
        return way

    def close(self) -> None:
        """Reset the open connections, and end the thread."""
        for way in self._ways:
            way.close()
        self.order(lambda: setattr(self, "_open", False))
        self._thread.join()
        self._selector.close()
        for end in (self._bell, self._rung):
            end.close()

    def order(self, what: Callable[[], None]) -> None:
        """Run ``what`` in the thread, and wait for it: only the thread touches connections."""
        done = threading.Event()
        with self._lock:
            self._orders += [what, done.set]
        self._bell.send(b"!")
        done.wait()

    def watch(self, end: socket.socket, events: int, then: Callable[[], None]) -> None:
        """Call ``then`` in the thread when ``end`` is ready; no ``events`` ends that."""
        watched = end in self._selector.get_map()
        if events and watched:
            self._selector.modify(end, events, then)
        elif events:
            self._selector.register(end, events, then)
        elif watched:
            self._selector.unregister(end)

    def _obey(self) -> None:
        self._rung.recv(_CHUNK)
        with self._lock:
            orders, self._orders = self._orders, []
        for order in orders:
            order()

    def _forward(self) -> None:
        while self._open:
            for key, _ in self._selector.select():
                # An earlier callback of this round may have closed it.
                end = key.fileobj
                assert isinstance(end, socket.socket)
                if end.fileno() >= 0 and end in self._selector.get_map():
                    key.data()


class Way:
    """One way, with a port of its own."""

    def __init__(self, ways: Ways, upstream: int) -> None:
        self._ways = ways
        self.upstream = upstream
        self._pairs: set[_Pair] = set()
        self._cut: Cut | None = None
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        ways.order(lambda: ways.watch(self._listener, selectors.EVENT_READ, self._accept))

    def cut(self, how: Cut) -> None:
        """Let nothing pass from now on."""

        def do() -> None:
            self._cut = how
            for pair in list(self._pairs):
                if how == "reset":
                    pair.reset()
                else:
                    pair.pause()

        self._ways.order(do)

    def heal(self) -> None:
        """Let everything pass again."""

        def do() -> None:
            was, self._cut = self._cut, None
            for pair in list(self._pairs):
                if was == "hole":
                    pair.reset()
                else:
                    pair.resume()

        self._ways.order(do)

    def close(self) -> None:
        """Reset the open connections, and stop listening."""

        def do() -> None:
            self._ways.watch(self._listener, 0, self._accept)
            self._listener.close()
            for pair in list(self._pairs):
                pair.reset()

        self._ways.order(do)

    def _accept(self) -> None:
        client = self._listener.accept()[0]
        if self._cut == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.close()
            return
        try:
            server = socket.create_connection(("127.0.0.1", self.upstream))
        except OSError:
            client.close()
            return
        pair = _Pair(self._ways, client, server, self._pairs.discard)
        self._pairs.add(pair)
        if self._cut is None:
            pair.resume()


class _Pair:
    """Both ends of one connection."""

    def __init__(
        self,
        ways: Ways,
        client: socket.socket,
        server: socket.socket,
        gone: Callable[[_Pair], None],
    ) -> None:
        self._ways = ways
        self._ends = (client, server)
        self._gone = gone
        # Bytes that were read from one end, and that the other has not taken yet.
        self._unsent = {client: b"", server: b""}
        self._open = True
        for end in self._ends:
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def resume(self) -> None:
        client, server = self._ends
        for end in self._ends:
            if self._unsent[end]:
                # Nothing else passes until these bytes are sent: c10d's messages are small.
                self._ways.watch(end, selectors.EVENT_WRITE, partial(self._send_rest, end))
                return
        self._ways.watch(client, selectors.EVENT_READ, lambda: self._pass_on(client, server))
        self._ways.watch(server, selectors.EVENT_READ, lambda: self._pass_on(server, client))

    def pause(self) -> None:
        for end in self._ends:
            self._ways.watch(end, 0, self.reset)

    def reset(self) -> None:
        for end in self._ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close()

    def close(self) -> None:
        self.pause()
        self._open = False
        for end in self._ends:
            end.close()
        self._gone(self)

    def _pass_on(self, end: socket.socket, other: socket.socket) -> None:
        try:
            chunk = end.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            # Nothing here needs half-open connections.
            self.close()
            return
        self._unsent[other] = chunk
        if self._send(other):
            self.pause()
            self.resume()

    def _send_rest(self, end: socket.socket) -> None:
        if not self._send(end) and self._open:
            self.pause()
            self.resume()

    def _send(self, end: socket.socket) -> bool:
        """Send the bytes that were read; return whether some are left."""
        try:
            sent = end.send(self._unsent[end])
        except BlockingIOError:
            sent = 0
        except OSError:
            self.reset()
            return False
        self._unsent[end] = self._unsent[end][sent:]
        return bool(self._unsent[end])
