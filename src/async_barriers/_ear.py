"""How an asyncio event loop listens to a connection, from one meeting to the next."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

from ._dialogue import Dialogue


class Ear:
    """Goes on with the dialogues that are held on one connection, when something comes.

    It stays with the loop in between, as coming and going takes as long as a trip to the store.
    What comes meanwhile is for somebody else, in a thread; then it goes, until the next dialogue. A
    connection that is closed shuts its socket down, which is heard as well.

    :param connection: a descriptor of the ear's own, closed when it is dropped, so that what the
        loop listens on is never another's
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
        self._loop = loop
        self._connection = connection
        self._listens = False
        self._dialogue: Dialogue | None = None
        self._ended: Callable[[], object] = _ignore

    def listen(self) -> None:
        """Come, or stay.

        :raises OSError, ValueError, NotImplementedError: the loop cannot listen
        """
        if not self._listens:
            descriptor = self._connection.fileno()
            self._loop.add_reader(descriptor, self._hear)
            # uvloop makes it non-blocking, and with it all its copies, c10d's own among them.
            os.set_blocking(descriptor, True)
            self._listens = True

    def hold(self, dialogue: Dialogue, ended: Callable[[], object]) -> None:
        """Begin, and go on until `Dialogue.hear` says that this was all; then call ``ended``."""
        self._dialogue = dialogue
        self._ended = ended
        if dialogue.begin(self._connection):
            self._tell()

    def _hear(self) -> None:
        dialogue = self._dialogue
        if dialogue is None:
            self._listens = False
            self._loop.remove_reader(self._connection.fileno())
            if self._hung_up():
                self._connection.close()
        elif dialogue.hear(self._connection):
            self._tell()

    def _hung_up(self) -> bool:
        try:
            return not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _tell(self) -> None:
        ended, self._dialogue, self._ended = self._ended, None, _ignore
        ended()


def _ignore() -> None:
    """Nobody waits."""
