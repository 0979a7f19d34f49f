"""Departing from phases that are over; the last rank to depart deletes the keys."""

from __future__ import annotations

from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeVar

from .._protocol import phase as phases
from .._protocol.count import GATHER
from .._protocol.payloads import SMALL_BYTES
from .._protocol.phase import Forgotten
from .._protocol.store import Add, CompareSet, Delete
from .._protocol.verdict import Broken, Released
from .._store.sources import Connection
from .phases import Phase, Turns
from .pool import Pool, nothing

T = TypeVar("T")

# So many broken phases a rank names as it leaves, the latest of them.
_MOST_UNFINISHED = 64


class Departing(Pool):
    """Forgets phases that nobody on this rank waits for."""

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

    def _depart(self, phase: Phase, connection: Connection) -> None:
        """Count this rank out, with the next message; the last rank deletes the keys."""
        turns = self.turns
        if phase.early and turns is not None and turns.membership is phase.membership:
            turns.tried_early.append((phase.entry, connection))
            if turns.complete:
                self._clear_early(turns)
        if phase.early or isinstance(phase.error, Forgotten):
            return
        if not isinstance(phase.verdict, Released):
            # Before it is known which rank was the first: this one may leave before the answer.
            latest = phase.membership.own.latest(phase.name)
            self.unfinished[phase.entry.keys.path] = latest
            if len(self.unfinished) > _MOST_UNFINISHED:
                del self.unfinished[next(iter(self.unfinished))]
        departed = partial(self._departed, phase, connection)
        connection.outbox.append(([Add(phase.entry.keys.departed, 1)], departed))
        if phase.large and not (phase.entry.kind == GATHER and isinstance(phase.verdict, Released)):
            own = phase.entry.keys.payload(self.rank)
            connection.outbox.append(([Delete(own)], nothing))
        if phase.step is not None and isinstance(phase.verdict, Released):
            # All ranks are past the earlier steps.
            latest = phase.membership.own.latest(phase.name)
            connection.outbox.append(([Delete(latest)], nothing))

    def _departed(self, phase: Phase, connection: Connection, answers: list[Any]) -> None:
        if answers[0] != 1:
            self.unfinished.pop(phase.entry.keys.path, None)
        if answers[0] >= phase.entry.world_size:
            self.unfinished.pop(phase.entry.keys.path, None)
            broken = not isinstance(phase.verdict, Released)
            large: list[int] = []
            if phase.entry.kind == GATHER and not broken:
                large = [r for r, p in (phase.brought or {}).items() if len(p) > SMALL_BYTES]
            spent = phases.spent(phase.entry, broken=broken, large=large)
            if connection.lost is not None and self._idle:
                # The messages of the lost connection go out on this one; see `_stand`.
                connection = self._idle[-1]
            connection.outbox.append((spent, nothing))
            if phase.step is not None and broken:
                self._forget_latest(phase, phase.step, connection)
            self._tidy_soon()

    def _forget_latest(self, phase: Phase, step: int, connection: Connection) -> None:
        """All have learned that this step was broken, and refuse those before it by themselves."""
        latest = phase.membership.own.latest(phase.name)

        def emptied(answers: list[Any]) -> None:
            # At once, since a later step may be written there.
            if answers[0] == b"":
                connection.call(Delete(latest))

        empty = CompareSet(latest, b"%d" % step, b"")
        connection.outbox.append(([empty], emptied))

    def _clear_early(self, turns: Turns) -> None:
        """Delete the phases that were tried too early, each on its own connection or a spare one.

        This is safe once all have joined: until then, other ranks read there how they ended.
        """
        spares = [c for c in (*self._idle, self._bell) if c is not None and c.lost is None]
        for entry, connection in turns.tried_early if spares else ():
            on = connection if connection.lost is None else spares[0]
            on.outbox.append((phases.spent(entry, broken=True), nothing))
            self._tidy_soon()
        turns.tried_early.clear()

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
