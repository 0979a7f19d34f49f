"""The bell: how a rank learns of changes in its generation, and what it then does."""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import replace
from functools import partial

from .._errors import BarrierConnectionError, BarrierError, BrokenBarrierError
from .._protocol import breaking as breaks
from .._protocol import membership as members
from .._protocol.count import Count
from .._protocol.membership import Closed, Membership, State
from .._protocol.phase import Forgotten
from .._protocol.store import Append, Read
from .._protocol.verdict import Broken
from .._store.future import Effort, Future
from .._store.sources import Connection
from .._store.waiting import sleep
from .breaking import Breaking
from .phases import Phase, in_doubt
from .state import RETRY_SECS, RETRY_SECS_AT_MOST, UNDO_SECS

logger = logging.getLogger(__name__)


class Listening(Breaking):
    """Looks around when its bell is rung."""

    _reopening: Future[None] | None = None
    _reopened_at = -math.inf
    # The look under way, whether to look again then, and whether the next one takes its bell first.
    _looking: Effort[None] | None = None
    _rung = _apart = False

    def _listen(self, bell: Connection) -> None:
        bell.on_wake = self._look_soon
        bell.on_lost = partial(self._bell_lost, bell)
        self._bell, self._looking = bell, None

    def _bell_lost(self, bell: Connection, error: BarrierConnectionError) -> None:
        if bell is not self._bell:
            return
        self._bell = None
        self._salvage(bell)
        if not bell.waits:
            # The others may be lost, too; in threads only a call tells, and is lost with them.
            for connection in self._connections():
                connection.suspect = True
            idle, self._idle = self._idle, []
            for connection in idle:
                self._put_back(connection)
            for phase in self.open:
                # It learns of nothing any more, and waits for nothing else.
                phase.lost = phase.lost or error
                phase.wake()
        reopens = self._reopening is not None and not self._reopening.done
        if not (reopens or self.closing or self.turns is None or self.closed_by is not None):
            self._reopening = self.owe(self._reopen_bell)

    async def _reopen_bell(self) -> None:
        """Listen again: a waiting rank must learn of changes."""
        loop = self.loop
        pause = RETRY_SECS
        gone_at = self._now() + self.init_secs
        while loop is not None and not self.closing and self._bell is None:
            if self._now() < self._reopened_at + RETRY_SECS_AT_MOST:
                # A store that lets it open, and then fails, is not asked without end.
                await sleep(loop, pause)
            try:
                bell = await self._open(loop, self._now() + UNDO_SECS)
            except BarrierError as exc:
                logger.debug("rank %d cannot listen: %s", self.rank, exc)
                if not self.open and self._now() >= gone_at:
                    self._doubtful = True
                    self.on_look()
                    return
                await sleep(loop, pause)
                pause = min(2 * pause, RETRY_SECS_AT_MOST)
                continue
            if self._bell is not None or self.closing or self.turns is None:
                bell.close()
                return
            self._listen(bell)
            self._reopened_at = self._now()
            self.tally.reconnections += 1
            for phase in self.open if not bell.waits else ():
                if phase.connection is not None and phase.connection.lost is None:
                    phase.lost = None
            with contextlib.suppress(BarrierConnectionError):
                await self._look_around(first=True)
            self.on_look()

    def _look_soon(self) -> None:
        """Look around, or if a look is under way, after that: in a thread they would queue."""
        if self._looking is not None and not self._looking.done:
            self._rung = True
            return
        self._looking = looking = self.start(self._look_around())
        # Last, since a signal handler may raise before, and this is called again then.
        self._rung = False
        looking.when_done(self._look_ended)

    def _look_ended(self) -> None:
        self.on_look()
        # Where the bell was told to wait no more, a look would begin a wait anew.
        if self._rung and self._bell is not None and self._bell.on_wake is not None:
            self._look_soon()

    async def _look_around(self, *, first: bool = False) -> None:
        """Take the bell, and see what it was rung for."""
        bell, turns = self._bell, self.turns
        if bell is not None and turns is None and self._before is not None and not self.closing:
            await self._answer_still(bell, self._before)
        if bell is None or turns is None:
            return
        membership = turns.membership
        rings = membership.own.bell(self.rank)
        *requests, roll = members.around(membership)
        apart, self._apart = self._apart or not bell.waits, False
        try:
            if apart:
                # What is entered after it rings again. In threads, what follows takes its time.
                await bell.call(requests.pop(0), wait=rings)
                self._bells_taken += 1
            # Each phase, with whether the store has counted this rank: the arrival is on another
            # connection, and may come after this answer.
            waiting = [(phase, phase.entry, not phase.unsure) for phase in self.open if phase.hears]
            for phase, entry, _ in waiting:
                requests += [Read(entry.keys.count), Read(entry.keys.reason)]
                if phase.step is not None:
                    requests.append(Read(phase.membership.own.latest(phase.name)))
            # The roll last: a phase that began too early counts by what is known then.
            found = await bell.call(*requests, roll, wait=None if apart else rings)
            # Not before the answer: until then, one ring may stand for several.
            self._bells_taken += not apart
            around = members.surroundings(membership, [*found[:4], found[-1]])
            if first and not await members.still_holds(bell, membership):
                around = replace(around, over=True)
            await self._answer(bell, membership, around.asked)
            if around.complete and not around.over:
                # Move the phases that were tried too early, however they ended.
                await self._all_joined(turns, bell)
            answers = iter(found[4:])
            for phase, entry, arrived in waiting:
                latest = phase.step is not None
                news = [next(answers), next(answers), next(answers) if latest else None]
                # A phase that was begun too early may have another number by now.
                if phase.entry is entry:
                    await self._see(bell, phase, arrived, news)
        except BarrierConnectionError:
            return  # Another connection opens, and looks.
        if turns is not self.turns:
            return
        if around.over:
            self._generation_over(membership, around.successor, bell)
            return
        if around.closed is not None and around.closed.rank != self.rank and not self.closing:
            self._left(membership, around.closed, bell)
        if around.host_leaves and not self.closing and not self.host_left:
            self.host_left = True
            self.start(self._drain(membership))
        looked_at = {entry for _, entry, _ in waiting}
        if not apart and any(each.entry not in looked_at for each in self.open if each.hears):
            # It may have rung for a phase that was entered after this look was put together, and
            # before it took the bell. One more look finds out, however many enter meanwhile.
            self._apart = True
            self._look_soon()

    def _generation_over(
        self, membership: Membership, successor: State | None, bell: Connection
    ) -> None:
        if self.turns is None or self.turns.membership is not membership:
            return
        self.turns = None
        self._before = membership
        if successor is not None:
            self._note_interrupted(bell, membership, successor)
        self._break_all(membership, bell, successor)
        self.start(self._answer_still(bell, membership))

    def _note_interrupted(self, bell: Connection, over: Membership, successor: State) -> None:
        """Tell a rank that joined again in which phases others waited for it; see `_all_joined`."""
        waiting = [phase for phase in self.open if phase.membership is over and phase.entered]
        names = {phase.token for phase in waiting if phase.step is None}
        if names:
            own = self.keys.generation(successor.identity)
            bell.call(Append(own.interrupted, b" ".join(names) + b"\n"))

    def _break_all(
        self, membership: Membership, store: Connection, successor: State | None
    ) -> None:
        """Break the awaited phases of a generation that is over."""
        by = None if successor is None else successor.by
        who = "another rank" if by is None else f"rank {by}"
        reason = f"{who} joined again: it was restarted, or its barrier was built again"
        if successor is not None and successor.died:
            reason = f"the process of {who} has ended"
        broken = Broken(by, reason)
        logger.info("barrier %r: %s", self.prefix, broken.reason)
        for phase in list(self.open):
            if phase.membership is membership and not phase.decided:
                self.owe(partial(self._break_for, phase, store, broken))

    def _left(self, membership: Membership, closed: Closed, bell: Connection) -> None:
        """Break the waiting phases: a rank left, so its generation releases none any more."""
        if self.closed_by is not None:
            return
        self.closed_by = closed
        self.on_left(closed)
        self.break_for_leaver(closed, bell)

    def break_for_leaver(self, closed: Closed, store: Connection | None = None) -> None:
        """Break the phases that this rank waits in: they will not be released."""
        if (store := store or self._bell) is None:
            return
        for phase in list(self.open):
            if phase.membership is self.membership and not phase.decided:
                self.owe(partial(self._break_for, phase, store, Broken(closed.rank, closed.reason)))

    async def _break_for(self, phase: Phase, store: Connection, broken: Broken) -> None:
        """Break a phase for what another rank did."""
        if phase.decided:
            return  # A signal handler may have raised after that.
        entry = phase.entry
        try:
            # If its arrival was sent on a connection that is lost, and nobody is counted, the store
            # may be a new one.
            on = phase.entered_on
            is_lost = on is not None and on.lost is not None and not phase.early
            arrived = phase.entered and (is_lost or not phase.unsure)
            giving_up = breaks.give_up(store, entry, broken, entered=arrived)
            judged, _ = await self._using(phase, giving_up)
        except Forgotten as exc:
            if phase.early or phase.entry is not entry:
                await self._break_for(phase, store, broken)
            else:
                self.settle(phase, error=exc)
            return
        except BarrierConnectionError:
            await self._break_elsewhere(phase, broken)
            return
        if phase.entry is not entry:
            # The phase got another number meanwhile.
            await self._break_for(phase, store, broken)
        elif not isinstance(judged, Count):
            self.settle(phase, judged)
        elif phase.entry.leader == broken.rank:
            # The leader may have published before it went; no other rank knows.
            of = phase.name, phase.sequence, broken.rank, broken.reason
            self.settle(phase, error=BrokenBarrierError(*of, in_doubt=True))
        else:
            self._all_in(phase)
            self._wait_alone(phase)

    async def _break_elsewhere(self, phase: Phase, broken: Broken) -> None:
        """As `_break_for`, when the bell was lost: on the phase's own connection, or a new one."""
        if phase.decided or phase.giving_up or self.closing:
            return
        try:
            connection = await self._reopen_for(phase)
        except BarrierConnectionError as exc:
            self.settle(phase, error=in_doubt(phase, exc))
        else:
            await self._break_for(phase, connection, broken)
