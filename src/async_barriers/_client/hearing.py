"""How a rank that waits in a phase, or its leader, learns the verdict."""

from __future__ import annotations

import contextlib
from typing import Any

from .._errors import BarrierConnectionError, BarrierError, describe
from .._protocol import breaking as breaks
from .._protocol import commit as commits
from .._protocol import membership as members
from .._protocol import phase as phases
from .._protocol.count import COMMIT, Count
from .._protocol.membership import Membership
from .._protocol.phase import Forgotten
from .._protocol.presence import encode_answer
from .._protocol.store import Delete, Read, Request
from .._protocol.verdict import Broken, Released, number
from .._store.sources import Connection
from .early import Early
from .phases import Phase

# A rank that waited for less did not wait for anybody.
WAITED_SECS = 0.01


class Hearing(Early):
    """Looks at a phase when this rank is woken."""

    def _woken(self, phase: Phase) -> None:
        entry, connection = phase.entry, phase.connection
        if phase.decided or phase.giving_up or connection is None:
            return
        if entry.kind != COMMIT:
            if self._now() - phase.since < WAITED_SECS:
                self.settle(phase, Released())
            else:
                self.start(self._confirm(phase, connection))
        elif entry.leads:
            self.start(self._collect(phase, connection))
        else:
            self.start(self._hear(phase))

    async def _confirm(self, phase: Phase, connection: Connection) -> None:
        """After a long wait: ask which rank came last, and whether its arrival woke this one."""
        with contextlib.suppress(BarrierConnectionError):
            confirmed = await phases.confirm(connection, phase.entry)
            if confirmed is not None:
                self.settle(phase, confirmed)
                return
        await self._woken_by_others(phase, connection)

    async def _look(self, phase: Phase, connection: Connection, *, came_late: bool = False) -> None:
        """See what was decided.

        :param came_late: it was broken already when this rank entered
        """
        if phase.decided or phase not in self.open:
            return  # Its keys may be deleted already.
        with contextlib.suppress(BarrierConnectionError):
            entry = phase.entry
            store = members.RollReader(connection, phase.membership)
            look = phases.look(store if phase.early else connection, entry)
            judged = await self._using(phase, look)
            turns = phase.turns
            if turns is self.turns and store.complete:
                # This rank may not have heard its bell yet.
                await self._all_joined(turns, connection)
            # A phase that began too early may have another number by now.
            if phase.entry is not entry or phase.decided or phase.giving_up:
                return
            if turns is self.turns and came_late and phase.early and not phase.full:
                # An attempt before all have joined does not count, so no rank is out of step: this
                # call waits with the ranks that are still there.
                self._move_on(phase, turns, connection, enters=True)
            elif not isinstance(judged, Count):
                self.settle(phase, judged)
            elif judged.full(*entry.world):
                self._all_in(phase)

    async def _woken_by_others(self, phase: Phase, connection: Connection) -> None:
        """The phase is broken, or something else wrote the key that this rank waits for."""
        await self._look(phase, connection)
        # Another phase may use the connection by now, and waits for its own key there.
        in_use = phase in self.open and phase.connection is connection
        waits_on = in_use and (connection.waits or phase.alone)
        if waits_on and connection.lost is None and not (phase.decided or phase.giving_up):
            connection.call(Delete([phase.entry.awaited]), wait=phase.entry.awaited)
            # The real write may have come just before the key was deleted.
            await self._look(phase, connection)

    async def _collect(self, phase: Phase, connection: Connection, *log: bytes | None) -> None:
        """The leader of a commit hears that all are in: read their payloads.

        :param log: if it has been read
        """
        with contextlib.suppress(BarrierConnectionError):
            try:
                collect = commits.collected if log else commits.collect
                brought = await self._using(phase, collect(connection, phase.entry, *log))
            except BarrierConnectionError:
                raise
            except BarrierError:
                # The publication asks again, and raises this error.
                self._all_in(phase)
                return
            if isinstance(brought, Broken):
                await self.settle_commit(phase, brought)
                return
            if phase.decided or phase.full:
                return
            if brought is not None:
                phase.brought = brought
                self._all_in(phase)
            elif connection.waits and not phase.giving_up:
                await self._woken_by_others(phase, connection)

    async def _hear(self, phase: Phase) -> None:
        connection = phase.connection
        assert connection is not None
        try:
            judged = await commits.hear(connection, phase.entry)
        except ValueError as exc:
            error = BarrierConnectionError(
                f"{describe(phase.name, phase.sequence, self.prefix)}: the verdict of this "
                f"commit was overwritten ({exc})", in_doubt=True,
            )  # fmt: skip
            self.settle(phase, error=error)
            return
        except BarrierConnectionError:
            return
        if judged is not None:
            self.settle(phase, judged)
        elif connection.lost is None and not phase.decided:
            await self._woken_by_others(phase, connection)

    def _all_in(self, phase: Phase) -> None:
        """All are in a commit: its leader goes on, and the others wait for its verdict."""
        if not phase.full and not phase.decided:
            phase.full = True
            connection = phase.connection
            if phase.differs and connection is not None:
                # The count is full and cannot be broken, but nothing will be published either.
                self.start(self._collect(phase, connection))
            # A call that ends without the verdict needs its connection back.
            hears = not (phase.entry.leads or phase.quits)
            if hears and connection is not None and connection.lost is None and connection.waits:
                self.start(self._hear(phase))
            phase.wake()

    def _wait_alone(self, phase: Phase) -> None:
        """Wait for the verdict on the phase's own key, since the bell is not heard any more."""
        connection = phase.connection
        if connection is not None and not connection.waits and not phase.entry.leads:
            phase.alone = True
            connection.call(wait=phase.entry.awaited)

    async def ask(self, *requests: Request) -> list[Any]:
        """The store's answers, over the connection that listens."""
        if self._bell is None:
            raise BarrierConnectionError("there is no connection to the store")
        return await self._bell.call(*requests)

    async def ask_missing(self, phase: Phase) -> tuple[int, ...] | None:
        if (bell := self._bell) is None:
            return None
        return await self._using(phase, breaks.survey(bell, phase.entry))

    async def ask_not_joined(self) -> tuple[int, ...]:
        bell, membership = self._bell, self.membership
        if bell is None or membership is None:
            return ()
        return await members.not_joined(bell, membership)

    async def _answer_still(self, bell: Connection, over: Membership) -> None:
        """Answer ranks that ask, although this one has not joined again yet."""
        own = over.own
        with contextlib.suppress(BarrierConnectionError):
            take = Delete([own.bell(self.rank)]), Read(own.asked(self.rank))
            (asked,) = await bell.call(*take, wait=own.bell(self.rank))
            await self._answer(bell, over, asked)

    async def _answer(self, bell: Connection, own: Membership, asked: bytes | None) -> None:
        """Answer the ranks that ask whether this one lives."""
        if asked:
            said = encode_answer(self.rank, self.said.answer)
            await members.answer(bell, own, asked, said)

    async def _see(self, bell: Connection, phase: Phase, arrived: bool, news: list[Any]) -> None:
        """:param news: its count, why it broke, and the latest step of its name that did"""
        if phase.decided:
            return
        entry, (value, reason, latest) = phase.entry, news
        try:
            judged = await self._using(
                phase, phases.judge(bell, entry, value, reason, entered=arrived)
            )
        except Forgotten as exc:
            self._doubtful = True
            self.settle(phase, error=exc)
            return
        if phase.entry is not entry:
            return
        if not isinstance(judged, Count):
            self.settle(phase, judged)
        elif judged.full(*phase.entry.world):
            self._all_in(phase)
        elif (later := number(latest)) is not None:
            await self._past(phase, later)
