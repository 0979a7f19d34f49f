"""How a rank's phases ended, in numbers; costs no message."""

from __future__ import annotations

from .._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
)
from .._values import BarrierStatistics

TIMEOUT, GAVE_UP, PEER = "timeout", "gave_up", "peer"
LEFT, RESTART, CONNECTION, CLOSED = "left", "restart", "connection", "closed"
_KINDS = (
    (BarrierTimeoutError, TIMEOUT), (BarrierConnectionError, CONNECTION),
    (BarrierClosedError, CLOSED),
)  # fmt: skip


class Tally:
    """The counts of one barrier; a released crossing adds to them itself, since that is quicker.

    :ivar came_last_just_now: whether the others waited for this rank in the latest released phase
    :ivar reconnections: how often another connection replaced a lost one
    :ivar released_at: the time of the last release, by the loop's clock; all ranks had entered
    """

    released_at: float | None = None

    def __init__(self) -> None:
        self.released = 0
        self.came_last = 0
        self.came_last_just_now = False
        self.waited_secs = 0.0
        self.waited_secs_at_most = 0.0
        self.reconnections = 0
        self._broken = dict.fromkeys((TIMEOUT, GAVE_UP, PEER, LEFT, RESTART, CONNECTION, CLOSED), 0)

    def broke(self, why: str, waited_secs: float = 0.0) -> None:
        """Count a phase that was not released, under one of the reasons above."""
        self._broken[why] += 1
        self.waited_secs += waited_secs
        self.waited_secs_at_most = max(self.waited_secs_at_most, waited_secs)

    def statistics(self) -> BarrierStatistics:
        # Another thread may ask: both values are of one moment.
        broken_by = self._broken.copy()
        return BarrierStatistics(
            self.released, sum(broken_by.values()), broken_by, self.waited_secs,
            self.waited_secs_at_most, self.came_last, self.reconnections,
        )  # fmt: skip


def kind_of(exc: BaseException, rank: int, *, left: bool, over: bool) -> str:
    """The reason under which an error counts.

    :param left: whether a rank has left the phase's generation, and is to blame
    :param over: whether that generation is over
    """
    for kind, counts_as in _KINDS:
        if isinstance(exc, kind):
            return counts_as
    if isinstance(exc, BrokenBarrierError):
        if over:
            return RESTART
        if left:
            return LEFT
        return GAVE_UP if exc.rank == rank else PEER
    return CONNECTION if isinstance(exc, BarrierError) else GAVE_UP
