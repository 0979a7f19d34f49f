"""Entering a phase, and settling it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .._errors import BarrierConnectionError, BarrierError, BrokenBarrierError, told_by
from .._protocol import breaking as breaks
from .._protocol import phase as phases
from .._protocol.count import COMMIT, EXECUTE
from .._protocol.payloads import SMALL_BYTES
from .._protocol.phase import Entry
from .._protocol.store import Read, Request, Set, SetMany
from .._protocol.verdict import Broken, Released, Verdict, missing, number
from .._store.future import Future
from .._store.sources import Connection
from .departing import Departing
from .phases import Phase


class Entering(Departing):
    """Begins phases and arrives in them."""

    def begin(
        self,
        name: str,
        step: int | None = None,
        kind: int = EXECUTE,
        leader: int = -1,
        hold: Callable[[Phase], object] | None = None,
    ) -> Phase:
        """This rank's next phase of ``name``, or that of ``step``. The session must `stand`.

        :param hold: called with the phase before anything else can happen
        """
        assert self.turns is not None
        try:
            phase = self.turns.begin(name, step, kind, leader)
        except BrokenBarrierError as late:
            assert step is not None
            self.owe(partial(self.break_passed, name, step, late.reason))
            raise
        if step is not None and self.turns.had_begun(name, step):
            # Two arrivals of one rank could stand for one that is missing.
            awaits = self.awaited(name, step) is not None
            how = f"came for step {step} before, in a call that gave it up"
            if awaits:
                how = f"awaits step {step} already, in another call; a step is once"
            of = name, step, self.rank, f"rank {self.rank} {how}"
            raise BrokenBarrierError(*of, prefix=self.prefix, in_doubt=not awaits)
        if hold is not None:
            hold(phase)
        try:
            self.hold(phase)
        except BaseException:
            # Of a signal handler: no other call may have the same turn.
            self.hold(phase)
            self._begin_giving_up(phase, Broken(self.rank, "it was interrupted"), False)
            self.forget(phase)
            raise
        return phase

    def hold(self, phase: Phase) -> None:
        """Register the phase and count its turn, in case `begin` was interrupted."""
        self.open[phase] = None
        phase.turns.use(phase)

    def awaited(self, name: str, step: int | None) -> Phase | None:
        """The oldest phase of ``name``, or of its ``step``, that this rank has begun."""
        for phase in self.open:
            same = phase.name == name and (step is None or phase.step == step)
            if same and not (phase.decided or phase.giving_up):
                return phase
        return None

    def too_late(self, name: str, step: int | None) -> bool:
        """Whether ``step`` of ``name`` was decided, or an earlier call has used it up."""
        turns = self.turns
        if step is None or turns is None:
            return False
        return turns.had_begun(name, step) or turns.too_late(name, step) is not None

    async def break_passed(self, name: str, step: int, reason: str) -> bool:
        """Break a step that this rank is refused in, if others wait there; whether this broke it.

        A later step was decided, so all ranks that have yet to come are refused.
        """
        bell, turns = self._bell, self.turns
        if turns is None or turns.had_begun(name, step):
            return False
        if bell is None:
            raise BarrierConnectionError("there is no connection to the store just now")
        own, peers = turns.membership.own, turns.membership.peers
        entry = Entry(own.phase(name, f"s{step}"), self.rank, self.world_size, EXECUTE, -1)
        (log,) = await bell.call(Read(entry.keys.log))
        if log is None or self.rank not in missing(log, self.world_size):
            return False  # Without this rank it cannot be decided meanwhile, whatever its kind.
        tells = breaks.telling(peers, entry)
        broken = Broken(self.rank, reason)
        return (await breaks.give_up(bell, entry, broken, entered=True, tells=tells))[1]

    def enter(self, phase: Phase, payload: bytes = b"") -> None:
        """Enter the phase; the result wakes the phase's waiter."""
        if phase.early:
            phase.payload = payload
        if self._idle:
            self._enter_on(self._idle.pop(), phase, payload)
        else:
            self.start(self._open_and_enter(phase, payload))

    async def _open_and_enter(self, phase: Phase, payload: bytes) -> None:
        try:
            connection = await self._open(self.running, self._now() + self.init_secs)
        except BaseException as exc:
            # Else a signal handler raised it.
            error = exc if isinstance(exc, BarrierConnectionError) else None
            if not phase.decided:
                phase.lost = error or BarrierConnectionError(told_by(exc))
                broken = Broken(self.rank, "it could not reach the store")
                self._begin_giving_up(phase, broken, False)
                phase.wake()
            if error is None:
                raise
            return
        if phase.decided or phase.giving_up:
            self._put_back(connection)
        else:
            self._enter_on(connection, phase, payload)

    def _enter_on(self, connection: Connection, phase: Phase, payload: bytes) -> None:
        phase.connection = phase.entered_on = connection
        self._entries += 1
        if self._after:
            self.look_after(connection)
        connection.on_lost = partial(self._phase_lost, phase)
        connection.on_wake = partial(self._woken, phase)
        phase.large = len(payload) > SMALL_BYTES
        entry = phase.entry
        for departing, heard in connection.outbox:
            if isinstance(heard, partial) and heard.func == self._departed:
                gone = heard.args[0]
                if not gone.broken:
                    # With an entry it needs no answer.
                    departing[:] = phases.departing(gone.entry)
        taken = self._bells_taken
        if phase.step is not None and phase.turns.read_at.get(phase.name) != taken:
            # Who breaks a step rings, and whose bell is rung later looks at its open phases.
            latest = Read(phase.membership.own.latest(phase.name))
            connection.outbox.append(([latest], partial(self._seen, phase, taken)))
        requests = phases.entering(entry, payload)
        phase.entered = True
        try:
            said = connection.call(*requests, wait=entry.awaited if connection.waits else None)
        except BaseException:
            # A signal handler raised; if the connection stands, before anything was sent.
            phase.entered = connection.lost is not None
            raise
        said.when_done(partial(self._arrived, phase, entry, connection, said))

    def _arrived(
        self, phase: Phase, entry: Entry, connection: Connection, said: Future[list[Any]]
    ) -> None:
        """The store has counted this rank's arrival."""
        if phase.entry is not entry:
            return
        if said.error is not None:
            if self._rings and isinstance(phase.verdict, Released):
                # This rank may have been the last one to enter, and knows from another message.
                self.owe(partial(self._wake_again, entry, phase.membership))
            return
        count = phases.entered(entry, said.result())
        if phase.connection is not connection:
            # The phase is over for this rank; another phase may wait on this connection.
            if phase.departure is not None:
                last = not isinstance(count, Broken) and count.full(*entry.world)
                phase.departure.last = phase.departure.looks_after = last
                if last and self._rings:
                    # Another message said that all are in, and nobody has rung for that.
                    self._announce(phase, connection)
            return
        phase.counted = True
        stopping = phase.decided or phase.giving_up
        if stopping and (isinstance(count, Broken) or not count.full(*entry.world)):
            return
        # The last rank to enter wakes the others, even if it does not wait any more.
        if isinstance(count, Broken):
            phase.differs = entry.kind == COMMIT
            self._begin_giving_up(phase, count, False)
        elif count.broken:
            self.start(self._look(phase, connection, came_late=True))
        elif count.full(*entry.world):
            full = Set(entry.keys.released, b"%d" % self.rank)
            self._announced[connection] = entry, phase.membership
            phase.last = True
            if entry.kind != COMMIT:
                connection.stop_waiting()
            if entry.leads and not stopping:
                self.start(self._collect(phase, connection, *said.result()[1:]))
            elif self._rings:
                self._announce(phase, connection, full)
            else:
                connection.call(full)
            if entry.kind != COMMIT:
                self.settle(phase, Released(self.rank))

    def _seen(self, phase: Phase, bells_taken: int, found: list[Any]) -> None:
        phase.latest = number(found[0])
        if phase.latest is not None:
            self.start(self._past(phase, phase.latest))
        # Last, since a signal handler may raise before.
        phase.turns.read_at[phase.name] = bells_taken

    async def _past(self, phase: Phase, latest: int) -> None:
        """If a later step of the name is decided, this step never will be: give it up."""
        turns, step = phase.turns, phase.step
        # Also an earlier one, for other calls.
        turns.decided(phase.name, latest)
        late = None if step is None or latest <= step else turns.too_late(phase.name, step)
        if late is not None and turns is self.turns and not phase.decided:
            self._begin_giving_up(phase, Broken(self.rank, late.reason), False)

    def _announce(self, phase: Phase, connection: Connection, *requests: Request) -> None:
        """Wake the ranks that wait for the phase's key, and ring for those that use their bell."""
        membership = phase.membership
        if not connection.waits:
            # At once: this rank's loop may not run again for long.
            connection.call(*requests, SetMany(membership.bells, b"all in"))
            return
        told = connection.call(*requests, Read(membership.own.threaded))

        def ring() -> None:
            if told.error is not None:
                return
            if told.result()[0] is not None:
                connection.call(SetMany(membership.bells, b"all in"))
            elif membership is self.membership:
                # All have joined, and none of them waits for its bell alone.
                self._rings = False

        told.when_done(ring)

    def settle(
        self, phase: Phase, verdict: Verdict | None = None, *, error: BarrierError | None = None
    ) -> None:
        """Set the verdict or the error of a phase; the first one stays."""
        if not phase.decided:
            phase.verdict, phase.error, phase.decided = verdict, error, True
        # Again if it was decided before, since a signal handler may have raised in the middle.
        step, verdict = phase.step, phase.verdict
        if step is not None and verdict is not None:
            phase.turns.decided(phase.name, step, verdict)
        if phase.abandoned and not phase.giving_up:
            self.forget(phase)
        phase.wake()
