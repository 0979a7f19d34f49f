"""How a coroutine crosses one phase: deadline, cancellation, progress, errors.

A coroutine that stops waiting breaks the phase. The break goes on without it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import anyio

from .._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    describe,
    plural_ranks,
)
from .._missing import had_not_entered, told
from .._protocol.count import EXECUTE, GATHER
from .._protocol.verdict import Broken, Released
from .._reasons import reason_of
from .._store.waiting import settled
from .attempt import Attempt
from .phases import Phase
from .session import Session
from .state import UNDO_SECS
from .watching import LEAD_SECS, LEAD_SHARE, Watch, Watching

# When to ask again which ranks have not joined, if the store did not tell.
_ASK_AGAIN_SECS = 0.2
# How long a cancelled call waits: law 8 leaves two seconds in all, and closing takes some of them.
_CANCELLED_SECS = 0.5


class Crossing(Attempt):
    """One rank's way through one phase, on the event loop."""

    _ask_at = math.inf
    _watching: Watching | None = None
    _lost_until = math.inf
    _lead_secs = 0.0
    _publishes = _stops = False
    waited_secs = 0.0
    brought: tuple[bytes, ...] = ()

    def __init__(
        self,
        session: Session,
        name: str,
        step: int | None,
        timeout_secs: float | None,
        watch: Watch,
        kind: int = EXECUTE,
        leader: int = -1,
    ) -> None:
        loop = session.use()
        self.loop = loop
        self.session = session
        self.name = name
        self.step = step
        self.kind = kind
        self.leader = leader
        self.started = loop.now()
        self.timeout_secs = timeout_secs
        self.watch = watch
        self.deadline, self._watch_at = math.inf, self.started + watch.first_secs
        if timeout_secs is not None:
            self.deadline = self.started + timeout_secs
            self._lead_secs = min(LEAD_SECS, LEAD_SHARE * timeout_secs)
            self._watch_at = min(self._watch_at, self.deadline - self._lead_secs)

    async def decided(self, payload: bytes = b"") -> Released | None:
        """Enter, and wait for the release; None if this rank is to publish a commit.

        :raises BarrierError: as `Barrier.execute_barrier`
        """
        session = self.session
        try:
            if not session.stands:
                try:
                    await self.ready()
                except BrokenBarrierError as exc:
                    await self._after_a_rank_left(exc)
            phase = session.begin(self.name, self.step, self.kind, self.leader, self._hold)
            phase.rejoined = self._rejoined
            session.enter(phase, payload)
            await self._wait(phase)
            if phase.to_publish:
                self._publishes = True
                return None
            verdict = phase.verdict
            if isinstance(verdict, Broken) and verdict.missing and not verdict.known:
                known = await self._watches(phase).after_deadline(verdict.missing)
                phase.verdict = replace(verdict, known=known)
            released = self.accept(phase)
            if self.kind == GATHER:
                self.brought = await self._fetched(phase)
            self.was_released()
            return released
        except BaseException as exc:
            await self._ended_by(exc)
            raise
        finally:
            if self._watching is not None:
                self._watching.stop()
            if (begun := self.phase) is not None and not self._publishes:
                if not (begun.decided or self._stops):
                    # A signal handler raised before `_stopped` could begin.
                    await self._stopped(InterruptedError("its call was interrupted"))
                session.forget(begun)

    def was_released(self) -> None:
        """Count this crossing as released."""
        phase, tally = self.phase, self.session.tally
        secs = self.waited_secs = self.loop.now() - self.started
        tally.released += 1
        tally.released_at = self.started + secs
        tally.waited_secs += secs
        if secs > tally.waited_secs_at_most:
            tally.waited_secs_at_most = secs
        tally.came_last_just_now = phase is not None and phase.last
        tally.came_last += tally.came_last_just_now

    def _hold(self, phase: Phase) -> None:
        phase.waiter = self.loop.waiter()
        phase.since = self.started
        self.phase = phase

    async def _after_a_rank_left(self, exc: BrokenBarrierError) -> None:
        """Raise the phase's own error: a rank may have broken it before that other rank left."""
        session, closed_by = self.session, self.session.closed_by
        if session.turns is None or closed_by is None or session.why_not is not None:
            raise exc  # The store has gone with it, most likely.
        phase = session.begin(self.name, self.step, self.kind, self.leader, self._hold)
        await self._undone(phase, session.give_up(phase, closed_by.reason, by=closed_by.rank))
        if not phase.decided:
            if session.host_left:
                raise exc  # No store will ever say more.
            # Another reason may stand there, which its peers have learned.
            raise self._lost(phase, phase.lost) from exc
        self.accept(phase)

    def accept(self, phase: Phase) -> Released:
        """Return the release, or raise the error that the verdict means."""
        error, verdict = phase.error, phase.verdict
        if isinstance(error, BarrierConnectionError):
            raise self._lost(phase, error, in_doubt=error.in_doubt)
        if error is not None:
            raise error
        if isinstance(verdict, Released):
            return verdict
        assert verdict is not None
        if verdict.timeout_secs is not None:
            detail, known = verdict.reason, verdict.known
            if verdict.missing and not detail:
                detail = had_not_entered(verdict.missing, known, self.watch.global_ranks)
            of = phase.name, phase.sequence, verdict.missing, verdict.timeout_secs
            raise BarrierTimeoutError(*of, detail=detail, in_doubt=verdict.in_doubt, missing=known)
        if self.session.closing and verdict.rank == self.session.rank:
            raise BarrierClosedError(describe(phase.name, phase.sequence, self.session.prefix))
        raise BrokenBarrierError(
            phase.name, phase.sequence, verdict.rank, verdict.reason, in_doubt=verdict.in_doubt
        )

    async def _wait(self, phase: Phase) -> None:
        """Wait until it is decided, or until this rank, as the leader of a commit, can publish."""
        waiter = phase.waiter
        assert waiter is not None
        if phase.early:
            # At this time it asks which ranks have not joined again.
            self._ask_at = self.started + self.session.init_secs
        until = min(self.deadline, self._watch_at, self._ask_at)
        while True:
            await waiter.wait(until)
            if phase.is_settled():
                return
            if self.loop.now() >= self.deadline:
                return await self._time_out(phase)
            until = min(await self._look(phase), self.deadline, self._watch_at, self._ask_at)
            if phase.is_settled():
                return

    async def _look(self, phase: Phase) -> float:
        """Do what is due while it waits; return when to look again, at the latest."""
        session, now = self.session, self.loop.now()
        if phase.lost is None:
            self._lost_until = math.inf
        else:
            self._lost_until = min(self._lost_until, now + UNDO_SECS)
            if now >= self._lost_until:
                session.worry(phase)
                raise self._lost(phase, phase.lost)
        if now >= self._ask_at:
            absent = await self._not_joined() if phase.early else ()
            self._ask_at = math.inf if absent is not None else self.loop.now() + _ASK_AGAIN_SECS
            if absent and phase.early and not phase.decided:
                await self._miss(phase, absent)
        if now >= self._watch_at or self._watching is not None:
            watching = self._watches(phase)
            self._watch_at = watching.look()
            if watching.stalled and not (phase.decided or phase.giving_up):
                await self._stall(phase, watching)
        return self._lost_until

    def _watches(self, phase: Phase) -> Watching:
        if self._watching is None:
            self._watching = Watching(
                self.session, self.loop, phase, self.watch, self.started, self.deadline,
                self._lead_secs,
            )  # fmt: skip
        return self._watching

    async def _stall(self, phase: Phase, watching: Watching) -> None:
        """Break the phase, since missing ranks make no progress."""
        found, secs = watching.found, self.watch.stalled_secs
        assert found is not None
        who = told(found.known(watching.stalled), self.watch.global_ranks)
        effort = self.session.give_up(
            phase,
            f"{plural_ranks(watching.stalled)} made no progress ({who}): had neither entered nor "
            "reported anything new; look for a hang there, or allow a longer stalled_after_secs",
            secs,
            known=found.known(found.missing),
            final=False,
        )
        watching.stalled = ()
        await self._give_up_or_doubt(phase, effort)
        # If all ranks have entered meanwhile, it waits on.

    async def _ended_by(self, exc: BaseException) -> None:
        try:
            await self._stopped(exc)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as another:
            # A signal handler raised while the phase was being broken.
            await self._stopped(another)
            raise
        finally:
            self.failed(exc)

    async def _stopped(self, exc: BaseException) -> None:
        """Break the phase, since ``exc`` ended the waiting; ``exc`` goes on."""
        phase, session, self._stops = self.phase, self.session, True
        if phase is None or phase.decided or isinstance(exc, BarrierError):
            return
        # The turn is used up, even if the rank has not entered.
        session.hold(phase)
        effort = session.give_up(phase, reason_of(exc))
        # A coroutine that is thrown away cannot wait; the break goes on without it.
        if not isinstance(exc, GeneratorExit):
            await self._undone(phase, effort, _CANCELLED_SECS)

    async def _time_out(self, phase: Phase) -> None:
        assert self.timeout_secs is not None
        watching = self._watches(phase)
        known = watching.known_at_deadline()
        effort = self.session.give_up(phase, "", self.timeout_secs, known=known)
        await self._give_up_or_doubt(phase, effort)
        if not phase.decided:
            detail = (
                f"all ranks had entered and rank {phase.entry.leader} was publishing, or died "
                "meanwhile; look there whether it has published"
            )
            of = phase.name, phase.sequence, (), self.timeout_secs
            raise BarrierTimeoutError(*of, detail=detail, in_doubt=True)

    async def _miss(self, phase: Phase, absent: tuple[int, ...]) -> None:
        effort = self.session.give_up(
            phase,
            f"{plural_ranks(absent)} did not join again after a restart; start them again, or "
            "allow a longer timeout_barrier_init_secs",
            self.session.init_secs,
            absent,
        )
        await self._give_up_or_doubt(phase, effort)
        # If all ranks have entered meanwhile, and the leader publishes, it waits on.

    async def _fetched(self, phase: Phase) -> tuple[bytes, ...]:
        """The payloads of all ranks, in their order."""
        fetching = self.session.start(self.session.payloads(phase))
        until = self.deadline + UNDO_SECS
        if not await settled(self.loop, fetching, until) or fetching.error is not None:
            raise self._lost(phase, fetching.error)
        return tuple(fetching.result()[rank] for rank in range(phase.entry.world_size))
