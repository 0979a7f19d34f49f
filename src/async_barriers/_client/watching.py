"""How a waiting rank watches missing ranks: reports, and ranks that make no progress."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import _progress
from .._errors import BarrierConnectionError, BarrierError
from .._protocol.heard import Heard
from .._store.event_loop import Loop
from .._store.future import Effort
from .._store.waiting import settled
from .._values import BarrierProgress, MissingRank
from .phases import Phase
from .session import Session

# How long ranks have to answer, before a deadline, or after one that is too short for that.
ASK_SECS = 0.3
_AFTER_SECS = 0.1
# How long after its own deadline a call may wait for answers.
_LATE_SECS = 0.9
# How long before a deadline to ask: the findings have to be there when it breaks the phase.
LEAD_SECS, LEAD_SHARE = 0.4, 0.6
# How often ranks look for progress, and how many of those that have entered do.
_STALL_SECS, _STALL_SHARE = 1.0, 0.25
_WATCHERS = 4
# How long to wait for an answer of the store.
_GIVEN_UP_SECS = 3.0


class Watch(NamedTuple):
    """A user's settings for reports and progress.

    :ivar warn_secs: the time between reports; infinite for none
    :ivar stalled_secs: how long a missing rank may show no progress; infinite for any time
    :ivar first_secs: the time of the first look or report
    :ivar global_ranks: the ranks in the job, for a subgroup's barrier
    """

    warn_secs: float
    stalled_secs: float
    on_progress: Callable[[BarrierProgress], object] | None
    global_ranks: Sequence[int] | None
    first_secs: float

    def with_stalled(self, stalled_secs: float | None) -> Watch:
        """The settings of one call that gives its own."""
        stalled = math.inf if stalled_secs is None else stalled_secs
        first_secs = min(self.warn_secs, _period(stalled))
        return self._replace(stalled_secs=stalled, first_secs=first_secs)


def watching_for(
    warn_secs: float | None,
    stalled_secs: float | None,
    on_progress: Callable[[BarrierProgress], object] | None,
    global_ranks: Sequence[int] | None,
) -> Watch:
    warn = math.inf if warn_secs is None else warn_secs
    return Watch(warn, math.inf, on_progress, global_ranks, warn).with_stalled(stalled_secs)


def _period(stalled_secs: float) -> float:
    if stalled_secs == math.inf:
        return math.inf
    return min(_STALL_SECS, stalled_secs * _STALL_SHARE)


class Found(NamedTuple):
    """The findings of asking from ``since`` to ``at``, by the loop's clock."""

    missing: tuple[int, ...]
    heard: dict[int, Heard]
    since: float
    at: float

    def known(self, ranks: Sequence[int]) -> tuple[MissingRank, ...]:
        return tuple(self.heard[rank].rank for rank in ranks if rank in self.heard)


class Watching:
    """Asks while a rank waits in a phase; it delays no release.

    :param lead_secs: how long before ``deadline`` to ask missing ranks a last time
    :ivar stalled: the ranks that have shown no progress for too long
    """

    def __init__(
        self,
        session: Session,
        loop: Loop,
        phase: Phase,
        watch: Watch,
        started: float,
        deadline: float,
        lead_secs: float,
    ) -> None:
        self.stalled: tuple[int, ...] = ()
        self.found: Found | None = None
        self._session = session
        self._loop = loop
        self._phase = phase
        self._watch = watch
        self._started = started
        self._report_at = started + watch.warn_secs
        self._stall_at = started + _period(watch.stalled_secs)
        self._lead_secs = lead_secs
        self._deadline = deadline
        self._last_at = deadline - lead_secs if lead_secs > _AFTER_SECS else math.inf
        self._asking: Effort[Found | None] | None = None
        self._given_up_at = math.inf
        self._to_report = False
        # The time of each missing rank's last known progress, and the ranks that did not answer.
        self._progress: dict[int, float] = {}
        self._silent: set[int] = set()

    def look(self) -> float:
        """Take the answers, begin what is due; return when to look again, at the latest."""
        self._take_what_came()
        now = self._loop.now()
        due = min(self._report_at, self._stall_at, self._last_at)
        if self._asking is None and now >= due:
            self._begin(now)
        return due if self._asking is None else self._given_up_at

    def _take_what_came(self) -> None:
        asking = self._asking
        if asking is not None and (asking.done or self._loop.now() >= self._given_up_at):
            self._asking = None
            asking.stop(BarrierConnectionError("the store did not answer in time"))
            if asking.error is None and (found := asking.result()) is not None:
                self._take(found)

    def _begin(self, now: float) -> None:
        within_secs = ASK_SECS
        if now >= self._report_at:
            self._to_report = True
            self._report_at = now + self._watch.warn_secs
        if now >= self._stall_at:
            self._stall_at = now + _period(self._watch.stalled_secs)
        if now >= self._last_at:
            self._last_at = math.inf
            within_secs = min(ASK_SECS, 0.75 * self._lead_secs)
        self._given_up_at = now + _GIVEN_UP_SECS
        self._asking = self._session.start(self._ask(within_secs))
        # The phase's waiter looks then.
        self._asking.when_done(self._phase.wake)

    async def _ask(
        self, within_secs: float, missing: tuple[int, ...] | None = None
    ) -> Found | None:
        session, since = self._session, self._loop.now()
        if missing is None:
            missing = await session.ask_missing(self._phase)
        if missing is None:
            return None
        heard: dict[int, Heard] = {}
        if missing:
            with contextlib.suppress(BarrierConnectionError):
                heard = await session.presence.of(missing, within_secs)
            if self._watch.stalled_secs < math.inf:
                # A rank that has entered meanwhile has made progress.
                missing = await session.ask_missing(self._phase) or ()
        return Found(missing, heard, since, self._loop.now())

    def _take(self, found: Found) -> None:
        self.found = found
        if self._phase.decided:
            return
        if self._to_report:
            self._to_report = False
            self._report(found)
        if self._watch.stalled_secs < math.inf:
            self._judge(found)

    def _report(self, found: Found) -> None:
        phase, world_size = self._phase, self._phase.entry.world_size
        progress = BarrierProgress(
            phase.name, phase.sequence, world_size - len(found.missing), world_size,
            found.missing, found.since - self._started, found.known(found.missing),
        )  # fmt: skip
        watch = self._watch
        _progress.report(progress, watch.on_progress, self._session.prefix, watch.global_ranks)

    def _judge(self, found: Found) -> None:
        """The ranks that have shown no progress for too long.

        A rank that does not answer may have made progress until it was first asked in vain. So no
        rank is taken for stalled too early.
        """
        stalled = []
        for rank in found.missing:
            heard = found.heard.get(rank)
            if heard is not None and heard.rank.state == "alive":
                self._silent.discard(rank)
                idle = heard.idle_secs
                said_at = self._started if idle is None else found.at - idle
                self._progress[rank] = max(self._started, said_at)
            elif heard is not None and heard.rank.state == "silent" and rank not in self._silent:
                self._silent.add(rank)
                self._progress[rank] = found.at
            since = self._progress.setdefault(rank, self._started)
            if found.at - since >= self._watch.stalled_secs:
                stalled.append(rank)
        self.stalled = tuple(stalled)
        entry, absent = self._phase.entry, set(found.missing)
        before = sum(rank not in absent for rank in range(entry.rank))
        if before >= _WATCHERS:
            # The ranks before this one look; it looks in case they have died.
            self._stall_at = self._loop.now() + self._watch.stalled_secs

    def known_at_deadline(self) -> tuple[MissingRank, ...]:
        """The findings just before the deadline, for the error."""
        self._take_what_came()
        found = self.found
        if found is None or self._loop.now() - found.since > self._lead_secs + ASK_SECS:
            return ()
        return found.known(found.missing)

    async def after_deadline(self, missing: tuple[int, ...]) -> tuple[MissingRank, ...]:
        """The findings, if there was no time before, or the store was slow."""
        asking = self._asking or self._session.start(self._ask(_AFTER_SECS, missing))
        self._asking = asking
        until = min(self._loop.now() + ASK_SECS, self._deadline + _LATE_SECS)
        try:
            await settled(self._loop, asking, until)
            found = asking.result() if asking.done else self.found
        except BarrierError:
            found = self.found
        # Better what was known a moment ago than nothing.
        return () if found is None else found.known(missing)

    def stop(self) -> None:
        """End the asking: no rank waits any more."""
        if self._asking is not None:
            self._asking.stop(BarrierConnectionError("nobody waits for the answer any more"))
