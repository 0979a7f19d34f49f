"""How an asyncio event loop listens to a connection, from one meeting to the next."""

from __future__ import annotations

import asyncio
import os
import socket

from ._series import Series


class Ear:
    """Goes on with what is said in a series on one connection, when something comes.

    It stays with the loop between two phases, as coming and going takes as long as a trip to the
    store. What comes when no phase waits is for somebody else, in a thread; then it goes, until it
    comes again. A connection that is closed shuts its socket down, which is heard as well.

    :param connection: a descriptor of the ear's own, closed when it is dropped, so that what the
        loop listens on is never another's
    :ivar series: the one that it listens for; None if it has gone
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
        self.connection = connection
        self._loop = loop
        self.series: Series | None = None

    def come(self, series: Series) -> bool:
        """Hear what comes in a series; False if the loop cannot listen."""
        if self.series is None:
            descriptor = self.connection.fileno()
            try:
                self._loop.add_reader(descriptor, self._hear)
            except (OSError, ValueError, NotImplementedError):
                # The other side hung up, or the loop is one that knows no descriptors.
                return False
            # uvloop makes it non-blocking, and with it all its copies, c10d's own among them.
            os.set_blocking(descriptor, True)
        self.series = series
        return True

    def _hear(self) -> None:
        series = self.series
        if series is None or not series.hear(self.connection):
            self._go()

    def _go(self) -> None:
        self.series = None
        self._loop.remove_reader(self.connection.fileno())
        if self._hung_up():
            self.connection.close()

    def _hung_up(self) -> bool:
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
