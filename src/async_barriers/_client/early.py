"""Attempts before all ranks have joined again: they do not count, and move once all have."""

from __future__ import annotations

from .._errors import BrokenBarrierError
from .._protocol.phase import Entry
from .._protocol.store import Read
from .._store.sources import Connection
from .entering import Entering
from .phases import Phase, Turns


class Early(Entering):
    """Begins to count when this rank learns, from its bell or from the roll, that all are here."""

    async def _all_joined(self, turns: Turns, bell: Connection) -> None:
        """Begin to count; the early phases that this rank awaits go on where they count."""
        interrupted: bytes | None = None
        if not turns.complete and any(phase.rejoined for phase in self.open if phase.early):
            (interrupted,) = await bell.call(Read(turns.membership.own.interrupted))
        if not turns.complete:  # Else another call was faster.
            turns.next.clear()
            turns.interrupted = (interrupted or b"").split()
            turns.complete = True
        # Again if it was complete before, since a signal handler may have raised in the middle.
        self._clear_early(turns)
        for phase in [each for each in self.open if each.turns is turns]:
            if not phase.early or phase.decided or phase.giving_up:
                continue
            if turns.interrupts(phase):
                reason = f"rank {self.rank} joined again while its peers waited in this phase"
                error = BrokenBarrierError(phase.name, phase.sequence, self.rank, reason)
                self.settle(phase, error=error)
            else:
                self._move_on(phase, turns, phase.connection, enters=True)

    def _move_on(
        self, phase: Phase, turns: Turns, connection: Connection | None, *, enters: bool
    ) -> None:
        """Give an early phase another number, and have this rank enter it there, or not."""
        turns.renumber(phase, connection)
        self._clear_early(turns)
        if enters and connection is not None and connection.lost is None:
            connection.stop_waiting()
            self._enter_on(connection, phase, phase.payload)

    async def _counts_by_now(
        self, phase: Phase, entry: Entry, connection: Connection, *, enters: bool
    ) -> bool:
        """All had joined when this rank gave up an early phase: move that, too.

        Its peers may wait there by now. They have not seen how the attempt ended, since they also
        learn from the roll that it does not count.

        :param entry: of the attempt
        :param enters: this rank enters there first, if its call is still under way
        :return: whether there is another phase to break
        """
        turns = phase.turns
        if turns is not self.turns:
            return False
        await self._all_joined(turns, connection)
        if phase.entry is not entry:
            return True
        # A later call of this name has its number by now, and meets the peers.
        late = turns is not self.turns or turns.next[phase.name] > 0
        if late or phase.verdict is not None or turns.interrupts(phase):
            return False
        quits = phase.quits or phase.decided or phase.abandoned or self.closing
        enters = enters and not quits and phase.connection is connection
        self._move_on(phase, turns, connection, enters=enters)
        return True
