"""Breaking a phase, and settling a commit; both go on if the caller ends."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

from .._errors import BarrierConnectionError, BrokenBarrierError, another, in_one_line
from .._protocol import breaking as breaks
from .._protocol import commit as commits
from .._protocol import membership as members
from .._protocol.count import FEW, Count
from .._protocol.phase import Forgotten
from .._protocol.store import Read, SetMany
from .._protocol.verdict import Broken, Verdict
from .._store.future import Future
from .._store.sources import Connection
from .._store.waiting import sleep
from .._values import MissingRank
from .hearing import Hearing
from .phases import Phase, in_doubt
from .state import RETRY_SECS

logger = logging.getLogger(__name__)


class Breaking(Hearing):
    """Breaks phases, recovers from lost connections, and settles commits."""

    def give_up(
        self,
        phase: Phase,
        reason: str,
        timeout_secs: float | None = None,
        missing: tuple[int, ...] | None = None,
        by: int | None = None,
        known: tuple[MissingRank, ...] = (),
        final: bool = True,
    ) -> Future[bool]:
        """Break the phase, unless it is decided. The result says whether this call broke it.

        :param by: the rank to blame, if not this one
        :param known: what is known of the missing ranks
        :param final: the caller returns in any case; else it waits on if all ranks have entered

        It goes on by itself until the store is told, or this rank has lost its membership.
        """
        blamed = self.rank if by is None else by
        broken = Broken(blamed, reason, timeout_secs, missing or (), known=known)
        names = timeout_secs is not None and missing is None
        return self._begin_giving_up(phase, broken, names, final=final and missing is None)

    def _begin_giving_up(
        self, phase: Phase, broken: Broken, names: bool, *, final: bool = False
    ) -> Future[bool]:
        phase.giving_up = True
        phase.quits = phase.quits or (final and not names)
        return self.owe(lambda: self._give_up(phase, broken, names, final=final))

    async def _give_up(
        self, phase: Phase, broken: Broken, names: bool, *, final: bool = False
    ) -> bool:
        """As `give_up`.

        :param final: the caller returns in any case; a commit's leader then settles it as broken
        """
        entry, connection = phase.entry, phase.connection or self._bell
        # At a deadline many break it at once, and one of them rings. Where steps are given, its
        # peers have to find a note of it first.
        at_once = not names and phase.step is None
        # An exception of a signal handler may have ended the attempt before.
        again, phase.gave_up_before = phase.gave_up_before, True
        unentered = not (phase.entered_on or phase.early or names or self.world_size > FEW)
        while True:
            try:
                if connection is None or connection.lost is not None:
                    connection = None
                    connection = await self._reopen_for(phase)
                if unentered and not again:
                    judged, ours = await self._break_unentered(connection, phase, broken)
                    break
                # On the connection that it entered on, its arrival comes first. A phase that began
                # too early is deleted when all have joined.
                sure = phase.entered and connection is phase.entered_on and not phase.early
                tells = breaks.telling(phase.membership.peers, phase.entry) if at_once else ()
                entry, roll = phase.entry, members.RollReader(connection, phase.membership)
                store = roll if phase.early else connection
                judged, ours = await breaks.give_up(
                    store, entry, broken, entered=sure, names_missing=names, tells=tells
                )
                # That the others did not join again is said of the attempt, which does not count.
                moves = roll.complete and not (broken.missing and not names)
                if moves and await self._counts_by_now(phase, entry, connection, enters=names):
                    continue
                told = ours and at_once
                # The peers may not know of a break that was sent on a lost connection.
                ours = ours or (again and isinstance(judged, Broken) and judged.rank == self.rank)
                if ours and not told:
                    await self._tell_of_break(connection, phase)
                if isinstance(judged, Broken) and phase.early and phase.entered:
                    # The log may have been deleted just then, and with it this rank's own entry.
                    others = tuple(rank for rank in judged.missing if rank != self.rank)
                    judged = replace(judged, missing=others)
                break
            except Forgotten as exc:
                if (phase.early or phase.entry is not entry) and connection is not None:
                    # All have joined, and the phase was deleted between two reads.
                    continue
                phase.giving_up = False
                self.settle(phase, error=exc)
                return False
            except BarrierConnectionError as exc:
                # The requests may have arrived or not, so it asks again on another connection.
                logger.debug("rank %d gives up anew: %s", self.rank, exc)
                if self._over:
                    raise
                connection, again = None, True
                phase.lost = phase.lost if phase.waiter else another(exc)  # For `abort`.
        if isinstance(judged, Count) and final and phase.entry.leads and not phase.differs:
            # It does not publish while it gives up, and only the leader can say so.
            judged, ours = await self.settle_commit(phase, broken), True
        if self._rings and not (ours or isinstance(judged, Broken)):
            # All are in, but the last rank may have died before it woke the others.
            connection.call(SetMany(phase.membership.bells, b"all in"))
        phase.giving_up = False
        if not isinstance(judged, Count):
            self.settle(phase, judged)
        else:
            self._all_in(phase)
            phase.wake()
        if phase.abandoned:
            self.forget(phase)
        # Where calls are made in threads, one rank may write the reason and another the break.
        why = broken.rank, in_one_line(broken.reason)
        return isinstance(judged, Broken) and (judged.rank, in_one_line(judged.reason)) == why

    async def _reopen_for(self, phase: Phase) -> Connection:
        """A connection for a phase whose own was lost; all calls for the phase share it."""
        if phase.reopening is None or phase.reopening.done:
            if phase.connection is not None and phase.connection.lost is None:
                return phase.connection
            phase.reopening = self.start(self._reopen(phase))
        return await phase.reopening

    async def _reopen(self, phase: Phase) -> Connection:
        loop = self.running
        if phase.connection is not None:
            self._reset(phase.connection)
        began = self._now()
        if phase.reopened:
            await sleep(loop, RETRY_SECS)
        phase.reopened = True
        while True:
            try:
                connection = await self._open(loop, self._now() + self.init_secs)
                break
            except BarrierConnectionError:
                # Also before it raises: who asks may ask again at once, and must let the loop run.
                await sleep(loop, RETRY_SECS)
                if self._now() > began + self.init_secs or self.closing:
                    raise
        phase.connection = connection
        self.tally.reconnections += 1
        connection.on_lost = None
        if phase not in self.open:
            # The phase was forgotten meanwhile. Calls for it that are under way may still use this.
            self._put_back(connection)
        if not await members.still_holds(connection, phase.membership):
            found = await connection.call(Read(self.keys.state), Read(phase.entry.keys.count))
            if not found[0] or (phase.entered and not found[1]):
                raise Forgotten
        return connection

    async def _break_unentered(
        self, connection: Connection, phase: Phase, broken: Broken
    ) -> tuple[Verdict | Count, bool]:
        """Break a phase that this rank does not enter, and tell of it, in one message."""
        turns, note = phase.turns, phase.turns.note(phase.name, phase.step)
        tells = [*note, *breaks.telling(phase.membership.peers, phase.entry)]
        judged, ours, told = await breaks.break_unentered(connection, phase.entry, broken, tells)
        if note and not turns.take_noted(phase.name, note[0], told[0]) and ours:
            await self._tell_of_break(connection, phase)
        return judged, ours

    async def _tell_of_break(self, connection: Connection, phase: Phase) -> None:
        tells = breaks.telling(phase.membership.peers, phase.entry)
        while True:
            note = phase.turns.note(phase.name, phase.step)
            now, *_ = await connection.call(*note, *tells)
            if not note or phase.turns.take_noted(phase.name, note[0], now):
                return

    def _phase_lost(self, phase: Phase, error: BarrierConnectionError) -> None:
        if phase.decided:
            if phase.connection is not None:
                self._salvage(phase.connection)
            # A signal handler may have raised after it was decided, and before it was woken.
            phase.wake()
            return
        phase.lost = error
        if not phase.giving_up:
            self.owe(partial(self._recover, phase, error))
        phase.wake()

    async def _recover(self, phase: Phase, error: BarrierConnectionError) -> None:
        """Break the phase: its connection was lost, so this rank cannot know whether it entered."""
        if phase.decided and not phase.giving_up:
            return  # A signal handler raised after that.
        broken = Broken(self.rank, "it lost its connection to the store")
        phase.giving_up = True
        try:
            await self._give_up(phase, broken, False)
        except BarrierConnectionError as exc:
            self.settle(phase, error=in_doubt(phase, exc))
            return
        connection = phase.connection
        if phase.full and not phase.decided and connection is not None:
            connection.on_lost = partial(self._phase_lost, phase)
            connection.on_wake = partial(self._woken, phase)
            phase.lost = None
            if connection.waits and not phase.entry.leads:
                connection.call(wait=phase.entry.awaited)
        elif isinstance(phase.verdict, Broken) and phase.verdict.rank == self.rank:
            phase.error = error

    async def payloads(self, phase: Phase) -> dict[int, bytes]:
        """The payloads of all ranks, over another connection if its own is lost."""
        return await self._using(phase, self._payloads(phase))

    async def _payloads(self, phase: Phase) -> dict[int, bytes]:
        if phase.brought is not None:
            return phase.brought
        connection, again = phase.connection or self._bell, True
        if connection is None or connection.lost is not None:
            connection, again = await self._reopen_for(phase), False
        try:
            brought = await commits.collect(connection, phase.entry)
        except BarrierConnectionError:
            if connection.lost is None or not again:
                raise
            brought = await commits.collect(await self._reopen_for(phase), phase.entry)
        if brought is None:
            raise Forgotten
        if isinstance(brought, Broken):
            await self.settle_commit(phase, brought)
            raise BrokenBarrierError(phase.name, phase.sequence, brought.rank, brought.reason)
        phase.brought = brought
        return brought

    def give_word(self, phase: Phase, verdict: Verdict) -> Future[Verdict]:
        """Settle a commit as its leader; this goes on until the store has the verdict."""
        return self.owe(lambda: self.settle_commit(phase, verdict))

    async def settle_commit(self, phase: Phase, verdict: Verdict) -> Verdict:
        """As `give_word`."""
        return await self._using(phase, self._settle_commit(phase, verdict))

    async def _settle_commit(self, phase: Phase, verdict: Verdict) -> Verdict:
        # A store that hangs may have the first verdict, or take it late: there is no second one.
        verdict = phase.word = phase.word or verdict
        connection = phase.connection or self._bell
        while True:
            try:
                if connection is None or connection.lost is not None:
                    connection = await self._reopen_for(phase)
                membership, outcomes = phase.membership, self.outcomes
                record, number = await outcomes.noting(connection, phase, verdict)
                asked = [] if number and not self._rings else [Read(membership.own.threaded)]
                answers = await commits.settle(
                    connection, phase.entry, verdict, record, [*number, *asked]
                )
                if number:
                    outcomes.noted(connection, phase, answers[0], self.start)
                if asked and answers[-1] is not None:
                    await connection.call(SetMany(membership.bells, b"settled"))
                self.settle(phase, verdict)
                return verdict
            except Forgotten:
                raise
            except BarrierConnectionError:
                if self._over:
                    raise
                connection = None
