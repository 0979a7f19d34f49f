"""How an asyncio event loop listens to a connection, from one phase of a series to the next."""

from __future__ import annotations

import asyncio
import os
import socket

from ._connection import Connection
from ._series import Series


class Ear:
    """Goes on with what is said in a series on one connection, when something comes.

    It stays with the loop between two phases, as coming and going takes as long as a trip to the
    store. What comes when no phase waits is for somebody else, in a thread; then it goes, until it
    comes again. A connection that is closed shuts its socket down, which is heard as well.

    :ivar copy: of the connection's socket, closed as it goes or is dropped, so that what the loop
        listens on is never another's
    :ivar listens: whether it has come, and not gone
    """

    copy: socket.socket
    listens: bool = False

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: Connection) -> None:
        self._loop = loop
        self._connection = connection

    def come(self, series: Series) -> bool:
        """Hear what comes in ``series``; False if the loop cannot listen."""
        try:
            copy = self._connection.overhear()
        except OSError:
            return False  # No more files can be opened, or it is closed.
        try:
            # Without a function of ours in between.
            self._loop.add_reader(copy.fileno(), series.hear, self)
        except (OSError, ValueError, NotImplementedError):
            # The other side hung up, or the loop is one that knows no descriptors.
            copy.close()
            return False
        # uvloop makes it non-blocking, and with it all its copies, c10d's own among them.
        os.set_blocking(copy.fileno(), True)
        self.copy, self.listens = copy, True
        return True

    def go(self) -> None:
        """Hear no more."""
        self.listens = False
        self._loop.remove_reader(self.copy.fileno())
        self.copy.close()
