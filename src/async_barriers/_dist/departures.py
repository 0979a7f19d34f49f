"""Ranks that have left a DistBarrier or given it up, and how a waiting rank notices them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from .._errors import BarrierConnectionError, in_one_line
from .._store.worker import Promise

# A waiting rank looks whether others have left: first after so long, then at least so often.
_LOOK_SECS, _LOOK_SECS_AT_MOST = 1.0, 10.0
# How long to wait for the store if it only explains an error.
MOMENT_SECS = 0.3


class Gone(NamedTuple):
    """A rank that has given up, or left.

    :ivar entered: the last call that it has entered or will
    :ivar served: the last call in which it takes part to the end
    """

    rank: int
    entered: int
    served: int
    reason: str

    def encode(self) -> bytes:
        return f"{self.rank} {self.entered} {self.served} {in_one_line(self.reason)}\n".encode()


def decode(log: bytes) -> list[Gone]:
    """The last note of each rank about itself, in the order of the ranks' first notes."""
    found: dict[int, Gone] = {}
    for line in log.decode(errors="replace").splitlines():
        rank, entered, served, reason = line.split(" ", 3)
        found[int(rank)] = Gone(int(rank), int(entered), int(served), reason)
    return list(found.values())


class Departed(Exception):
    """A rank that has to take part in a collective has left, or had given up before."""

    def __init__(self, gone: Gone) -> None:
        super().__init__(gone.reason)
        self.gone = gone


class Lookout:
    """Looks now and then whether a rank still waits for something that can come.

    :param ask: asks which ranks are gone
    :param hopeless: whether it cannot come without such a rank
    """

    def __init__(
        self, ask: Callable[[], Promise[list[Gone]]], hopeless: Callable[[Gone], bool]
    ) -> None:
        self._ask = ask
        self._hopeless = hopeless
        self._pause = _LOOK_SECS
        self._next = time.monotonic() + _LOOK_SECS
        self._asked: Promise[list[Gone]] | None = None

    def look(self) -> None:
        """Does not block.

        :raises Departed: it cannot come without a rank that has left
        """
        asked = self._asked
        if asked is not None and asked.done():
            self._asked = None
            self._judge(asked)
        if self._asked is None and time.monotonic() >= self._next:
            self._pause = min(2 * self._pause, _LOOK_SECS_AT_MOST)
            self._next = time.monotonic() + self._pause
            self._asked = self._ask()

    def look_now(self) -> None:
        """As `look`, but blocks for a moment, since something else has failed already."""
        asked = self._ask()
        if asked.wait(MOMENT_SECS):
            self._judge(asked)

    def _judge(self, asked: Promise[list[Gone]]) -> None:
        try:
            found = asked.result()
        except BarrierConnectionError:
            return  # A failure here only costs the names.
        for gone in found:
            if self._hopeless(gone):
                raise Departed(gone)
