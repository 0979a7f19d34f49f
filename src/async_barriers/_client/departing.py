"""Departing from phases that are over, and deleting their keys when all ranks have departed."""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeVar

from .._errors import BarrierConnectionError
from .._protocol import leaving
from .._protocol import phase as phases
from .._protocol.count import GATHER
from .._protocol.keys import PhaseKeys
from .._protocol.membership import Membership
from .._protocol.phase import Forgotten
from .._protocol.store import Add, CompareSet, Delete, Read, Request
from .._protocol.verdict import Broken, number
from .._store.sources import Connection
from .._store.waiting import sleep
from .phases import Departure, Phase, Turns, nothing
from .pool import Pool
from .state import PEERS_SECS

T = TypeVar("T")

# So many phases a rank names as it leaves, the latest of them.
_MOST_UNFINISHED = 64


class Departing(Pool):
    """Forgets phases that nobody on this rank waits for."""

    # Whether this rank has departed from a phase since the outboxes were flushed.
    _departs = False
    # What this rank was when it let the host go; and when it began to write that it is gone.
    _let_go_as: Membership | None = None
    _goes_as: Membership | None = None

    def forget(self, phase: Phase) -> None:
        """Nobody on this rank waits for it any more: depart, and put its connection back.

        It waits as long as the peers have yet to be told of a break or a verdict.
        """
        unsettled = not (phase.decided or (phase.full and not phase.entry.leads))
        if phase.giving_up or phase.users or unsettled:
            phase.abandoned = True
            if unsettled and not (phase.giving_up or phase.users):
                # Its call was interrupted before it could give up.
                reason = "its call was interrupted"
                broken = Broken(self.rank, reason, in_doubt=phase.full)
                self._begin_giving_up(phase, broken, False, final=True)
            return
        if self.open.pop(phase, True) is True:
            return
        connection, phase.connection = phase.connection, None
        if connection is not None and connection.lost is None:
            connection.on_lost = None
            connection.stop_waiting()
            self._depart(phase, connection)
            self._put_back(connection)
        elif (bell := self._bell) is not None and bell.lost is None:
            self._depart(phase, bell)
            self._tidy_soon()
        elif not (phase.early or isinstance(phase.error, Forgotten)):
            self._name(Departure(phase))

    def _depart(self, phase: Phase, connection: Connection) -> None:
        """Write this rank's departure with the next message."""
        if phase.early and phase.turns is self.turns:
            phase.turns.tried_early.append((phase.entry, connection))
            self._clear_early(phase.turns)
        if phase.early or isinstance(phase.error, Forgotten):
            return
        gone = phase.departure = Departure(phase)
        self._departs = True
        if gone.looks_after:
            self._look_later(gone)
        if gone.broken:
            # Before it is known which rank was the first: this one may leave before the answer.
            self._name(gone)
        alone: list[Request] = [Add(gone.entry.keys.departed, 1)]
        connection.outbox.append((alone, partial(self._departed, gone, connection)))
        if phase.large and (gone.broken or phase.entry.kind != GATHER):
            own = phase.entry.keys.payload(self.rank)
            connection.outbox.append(([Delete([own])], nothing))
        if phase.step is not None and not gone.broken:
            self._delete_skipped(gone, connection)
        if not gone.broken and phase.latest is not None and phase.latest < (phase.step or 0):
            # All ranks are past the earlier steps.
            self._forget_latest(gone, phase.latest, connection)

    def _name(self, gone: Departure) -> None:
        """Have the last rank that leaves delete the phase; see `leaving`."""
        self.unfinished[gone.entry.keys.path] = gone.latest
        if len(self.unfinished) > _MOST_UNFINISHED:
            del self.unfinished[next(iter(self.unfinished))]

    def _delete_skipped(self, gone: Departure, connection: Connection) -> None:
        """Delete broken steps to which not all ranks came: all are past a later one.

        Past two, so that none still reads there why it broke.
        """
        passed, step = gone.turns.passed, gone.step or 0
        before, passed[gone.name] = passed.get(gone.name, 0), step
        if not self.unfinished:
            return  # Most often.
        stem = gone.entry.keys.path.removesuffix(f"{step}")
        for path in [each for each in self.unfinished if each.startswith(stem)]:
            if int(path.removeprefix(stem)) < before:
                del self.unfinished[path]
                connection.outbox.append(([Delete(PhaseKeys(path).of_broken)], nothing))

    def look_after(self, connection: Connection, *, now: bool = False) -> None:
        """Have the next message ask which phases can be deleted.

        :param now: ask about all of them, since no phase may be entered after it
        """
        for gone, due in list(self._after.items()):
            if due > self._entries and not now:
                continue
            del self._after[gone]
            if gone.turns is self.turns:
                self._look_later(gone)  # The answer may be lost.
                self._read_log(gone, connection, now)
            else:
                # A rank that was killed never departs.
                self._name(gone)

    def _read_log(self, gone: Departure, connection: Connection, now: bool) -> None:
        reads: list[Request] = [Read(gone.entry.keys.log)]
        if now:
            reads.append(Read(gone.entry.keys.departed))
        connection.outbox.append((reads, partial(self._looked, gone, connection, now)))

    def _departed(self, gone: Departure, connection: Connection, answers: list[Any]) -> None:
        """Delete the phase, if its count of departures is complete."""
        counted = answers[0] if answers else 0
        if counted > 1:
            self.unfinished.pop(gone.entry.keys.path, None)
        if counted >= gone.entry.world_size:
            self._delete(gone, connection, alone=True)
        elif counted and gone.last:
            self._read_log(gone, connection, now=True)
        elif counted == 1 and gone.broken and gone.entry.keys.path not in self.unfinished:
            passed = gone.turns.passed.get(gone.name, 0)
            if gone.step is not None and gone.step < passed:
                # `_delete_skipped` was faster, on another connection.
                self._delete(gone, connection, alone=True)

    def _added(self, gone: Departure, connection: Connection, answers: list[Any]) -> None:
        gone.adding = False
        self._departed(gone, connection, answers)

    def _look_later(self, gone: Departure) -> None:
        """Look when all others have probably sent a message more, and ever more rarely."""
        self._after[gone] = self._entries + (len(self.open) + 2) * gone.patience
        gone.patience *= 2

    def _looked(
        self, gone: Departure, connection: Connection, now: bool, answers: list[Any]
    ) -> None:
        """Delete the phase, if all have departed; else count those that did not do so alone."""
        log, alone = answers[0], (number(answers[1]) if now else None) or 0
        if log is None:
            self._after.pop(gone, None)  # Another rank has deleted it.
            return
        if gone.adding or gone.deleted:
            return  # To delete the number before it is added to, or to add to it, leaves it there.
        others = len(phases.departed(log)) - gone.added
        # What another rank added is in both.
        total = others + alone if gone.last else max(others, alone)
        if total >= gone.entry.world_size:
            self._delete(gone, connection, alone=alone > 0 or gone.added > 0)
        elif now and gone.last and others > 0:
            # Noted before it is sent: if the connection is lost, they must not be added twice.
            gone.added, gone.adding = gone.added + others, True
            add = Add(gone.entry.keys.departed, others)
            connection.outbox.append(([add], partial(self._added, gone, connection)))

    def _delete(self, gone: Departure, connection: Connection, *, alone: bool) -> None:
        gone.deleted = True
        self._after.pop(gone, None)
        self.unfinished.pop(gone.entry.keys.path, None)
        if connection.lost is not None and self._idle:
            # The messages of the lost connection go out on this one; see `_stand`.
            connection = self._idle[-1]
        spent = phases.spent(gone.entry, broken=gone.broken, alone=alone, large=gone.large)
        connection.outbox.append((spent, nothing))
        if gone.step is not None and gone.broken:
            self._forget_latest(gone, gone.step, connection)
        self._tidy_soon()

    async def _flush(self) -> None:
        if self._departs:
            self._departs = False
            usable = [each for each in self._connections() if each.lost is None]
            if usable:
                self.look_after(usable[0], now=True)
        await super()._flush()

    def _forget_latest(self, gone: Departure, step: int, connection: Connection) -> None:
        """All are past this step, and refuse those before it by themselves."""
        latest = gone.latest
        gone.turns.noted.pop(gone.name, None)

        def emptied(answers: list[Any]) -> None:
            # At once, since a later step may be written there.
            if answers[0] == b"":
                connection.call(Delete([latest]))

        empty = CompareSet(latest, b"%d" % step, b"")
        connection.outbox.append(([empty], emptied))

    def _clear_early(self, turns: Turns) -> None:
        """Delete the phases that were tried too early, each on its own connection or a spare one.

        Not before all have joined: until then, other ranks read there how they ended.
        """
        spares = [c for c in (*self._idle, self._bell) if c is not None and c.lost is None]
        if not (spares and turns.complete):
            return
        for entry, connection in turns.tried_early:
            on = connection if connection.lost is None else spares[0]
            own = Delete([entry.keys.payload(self.rank)])
            on.outbox.append(([*phases.spent(entry, broken=True), own], nothing))
            self._tidy_soon()
        turns.tried_early.clear()

    async def _drain(self, membership: Membership) -> None:
        """Let the host leave, once nothing here depends on it."""
        deadline = self._now() + PEERS_SECS
        # A decided phase, too, may have a result to fetch.
        while any(p.membership is membership for p in self.open):
            if self._now() >= deadline:
                return
            await sleep(self.running, 0.01)
        if (bell := self._bell) is None:
            return
        with contextlib.suppress(BarrierConnectionError):
            await self._flush()
            await self._end_waits()
            if membership is not self._goes_as:
                # It is not counted again, wherever this ends.
                self._let_go_as = membership
                await leaving.let_host_go(bell, membership)

    async def _using(self, phase: Phase, call: Coroutine[Any, Any, T]) -> T:
        """Make a call that may use another connection than the phase's own, and depart only after
        it: it must not write after the keys are deleted."""
        phase.users += 1
        try:
            return await call
        finally:
            phase.users -= 1
            if phase.abandoned:
                self.forget(phase)
