"""How a coroutine crosses one phase: deadline, cancellation, progress, errors.

A coroutine that stops waiting breaks the phase. The break goes on without it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import anyio

from .._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    another,
    describe,
    plural_ranks,
    seconds,
    told_by,
)
from .._missing import had_not_entered, told
from .._protocol.count import EXECUTE, GATHER
from .._protocol.verdict import Broken, Released
from .._reasons import reason_of
from .._store.future import Future
from .._store.waiting import settled, until_done
from .phases import Phase
from .session import Session
from .state import UNDO_SECS
from .tally import kind_of
from .watching import LEAD_SECS, LEAD_SHARE, Watch, Watching

# How much longer a call waits for an attempt to connect, whose error says more than a timeout.
_SAYS_WHY_SECS = 0.3


class Crossing:
    """One rank's way through one phase, on the event loop."""

    phase: Phase | None = None
    _ask_at = math.inf
    _watching: Watching | None = None
    _lost_until = math.inf
    _lead_secs = 0.0
    _publishes = False
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
        self._rejoined = False

    @property
    def waited_secs(self) -> float:
        return self.loop.now() - self.started

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
            raise
        finally:
            if self._watching is not None:
                self._watching.stop()
            if self.phase is not None and not self._publishes:
                session.forget(self.phase)

    async def gathered(self, payload: bytes) -> tuple[bytes, ...]:
        """As `decided`; return the payloads of all ranks, in their order."""
        released = await self.decided(payload)
        assert released is not None
        return self.brought

    def was_released(self) -> None:
        """Count this crossing as released."""
        phase, tally, secs = self.phase, self.session.tally, self.waited_secs
        tally.released += 1
        tally.released_at = self.started + secs
        tally.waited_secs += secs
        if secs > tally.waited_secs_at_most:
            tally.waited_secs_at_most = secs
        tally.came_last_just_now = phase is not None and phase.last
        tally.came_last += tally.came_last_just_now

    def failed(self, exc: BaseException) -> None:
        """Count this crossing as failed, and put the barrier's prefix into the error."""
        session, phase = self.session, self.phase
        if isinstance(exc, BarrierTimeoutError | BrokenBarrierError):
            # What publish raises may be of another barrier.
            exc.prefix = exc.prefix or session.prefix
            if isinstance(exc, BrokenBarrierError) and exc.prefix == session.prefix:
                exc.global_rank = self.watch.global_rank(exc.rank)
        left = session.closed_by
        why = kind_of(
            exc,
            session.rank,
            left=left is not None and getattr(exc, "rank", None) == left.rank,
            over=phase is not None and phase.membership is not session.membership,
        )
        session.tally.broke(why, self.waited_secs)

    def _hold(self, phase: Phase) -> None:
        phase.waiter = self.loop.waiter()
        phase.since = self.started
        self.phase = phase

    async def ready(self) -> None:
        """Join; join again if the generation ended or the store was lost."""
        session, loop = self.session, self.loop
        # A peer that heard of the restart has used up its turn; a newcomer has not.
        self._rejoined = not session.has_joined
        deadline = self.deadline
        if self.timeout_secs == 0:
            # What is decided now only a store can tell that was reached.
            deadline = self.started + UNDO_SECS
        within_secs = max(0.0, min(deadline - loop.now(), session.init_secs))
        until = loop.now() + within_secs
        begun_before = session.joining
        while not session.stands:
            if session.closing:
                raise BarrierClosedError(describe(session.prefix))
            joining = session.join()
            # An attempt that runs out of time says why, if it gets a moment more.
            if not await settled(loop, joining, min(until + _SAYS_WHY_SECS, deadline)):
                if (closed := session.closed_by) is not None:
                    raise self._broken(closed.rank, closed.reason)
                why = session.why_not
                error = BarrierConnectionError(
                    f"rank {session.rank} did not reach the store of {describe(session.prefix)} "
                    f"within {seconds(within_secs)}; "
                    + ("" if why is None else f"{told_by(why)}; ")
                    + "is the process that hosts it up?"
                )
                raise error from why
            if joining.error is not None and session.closing:
                raise BarrierClosedError(describe(session.prefix))
            failed = isinstance(joining.error, BarrierConnectionError)
            if failed and joining is begun_before and loop.now() < until:
                # Another call began this attempt, with less time than this call has.
                begun_before = None
                continue
            if joining.error is not None:
                raise self._fresh(joining.error)
            if loop.now() >= until and not session.stands:
                raise BarrierConnectionError(
                    f"rank {session.rank} could not join {describe(session.prefix)} within "
                    f"{seconds(within_secs)}: its peers joined again meanwhile"
                )

    def _fresh(self, error: BaseException) -> BaseException:
        """A new error for each caller, so that its traceback does not grow with each."""
        if isinstance(error, BrokenBarrierError):
            return self._broken(error.rank, error.reason)
        if isinstance(error, BarrierConnectionError):
            # The user knows the public class, not the private subclass of this error.
            return another(error, describe(self.name, self.step, self.session.prefix))
        again: BaseException = error
        if isinstance(error, BarrierError):
            rebuild, arguments = error.__reduce__()
            again = rebuild(*arguments)
        again.__cause__ = error.__cause__
        return again

    async def _after_a_rank_left(self, exc: BrokenBarrierError) -> None:
        """Raise the phase's own error: a rank may have broken it before that other rank left."""
        session, closed_by = self.session, self.session.closed_by
        if session.turns is None or closed_by is None:
            raise exc
        phase = session.begin(self.name, self.step, self.kind, self.leader, self._hold)
        await self._undone(phase, session.give_up(phase, closed_by.reason, by=closed_by.rank))
        if not phase.decided:
            if session.host_left:
                raise exc  # No store will ever say more.
            # Another reason may stand there, which its peers have learned.
            raise self._lost(phase, phase.lost) from exc
        self.accept(phase)

    def _broken(self, rank: int | None, reason: str) -> BrokenBarrierError:
        """The error of a phase that has not begun: with its step, or the number it would have."""
        turns, sequence = self.session.turns, self.step
        if sequence is None:
            sequence = 0 if turns is None else turns.next_sequence(self.name)
        return BrokenBarrierError(self.name, sequence, rank, reason, prefix=self.session.prefix)

    def accept(self, phase: Phase) -> Released:
        """Return the release, or raise the error that the verdict means."""
        error, verdict = phase.error, phase.verdict
        if error is not None:
            raise self._explained(phase, error)
        if isinstance(verdict, Released):
            return verdict
        assert verdict is not None
        if verdict.timeout_secs is not None:
            detail, known = verdict.reason, verdict.known
            if verdict.missing and not detail:
                detail = had_not_entered(verdict.missing, known, self.watch.global_ranks)
            raise BarrierTimeoutError(
                phase.name,
                phase.sequence,
                verdict.missing,
                verdict.timeout_secs,
                detail=detail,
                in_doubt=verdict.in_doubt,
                missing=known,
            )
        if self.session.closing and verdict.rank == self.session.rank:
            raise BarrierClosedError(describe(phase.name, phase.sequence, self.session.prefix))
        raise BrokenBarrierError(
            phase.name, phase.sequence, verdict.rank, verdict.reason, in_doubt=verdict.in_doubt
        )

    def _explained(self, phase: Phase, error: BarrierError) -> BarrierError:
        if not isinstance(error, BarrierConnectionError):
            return error
        return self._lost(phase, error, in_doubt=error.in_doubt)

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
            self._ask_at = math.inf
            absent = await self._not_joined() if phase.early else ()
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

    async def _stopped(self, exc: BaseException) -> None:
        """Break the phase, since ``exc`` ended the waiting; ``exc`` goes on."""
        phase, session = self.phase, self.session
        if phase is None or phase.decided or isinstance(exc, BarrierError):
            return
        # The turn is used up, even if the rank has not entered.
        session.hold(phase)
        effort = session.give_up(phase, reason_of(exc))
        # A coroutine that is thrown away cannot wait; the break goes on without it.
        if not isinstance(exc, GeneratorExit):
            await self._undone(phase, effort)

    async def _undone(self, phase: Phase, effort: Future[Any]) -> bool:
        """Wait for ``effort``, which undoes what a caller did. The caller may be cancelled, so the
        wait is shielded and bounded."""
        with anyio.CancelScope(shield=True):
            done = await until_done(self.loop, effort, self.session.patience_secs)
        if not done:
            self.session.worry(phase)
        return done

    async def _time_out(self, phase: Phase) -> None:
        assert self.timeout_secs is not None
        watching = self._watches(phase)
        known = watching.known_at_deadline()
        effort = self.session.give_up(phase, "", self.timeout_secs, known=known)
        await self._give_up_or_doubt(phase, effort)
        if not phase.decided:
            raise BarrierTimeoutError(
                phase.name,
                phase.sequence,
                (),
                self.timeout_secs,
                detail=f"all ranks had entered and rank {phase.entry.leader} was publishing, or "
                "died meanwhile; look there whether it has published",
                in_doubt=True,
            )

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

    async def _give_up_or_doubt(self, phase: Phase, effort: Future[Any]) -> None:
        if not await self._undone(phase, effort):
            raise self._lost(phase, phase.lost)

    def _lost(
        self, phase: Phase, exc: BaseException | None = None, *, in_doubt: bool | None = None
    ) -> BarrierConnectionError:
        why = "the store did not answer" if exc is None else str(exc)
        error = BarrierConnectionError(
            f"{describe(phase.name, phase.sequence, self.session.prefix)}: "
            f"rank {self.session.rank} waited {seconds(self.waited_secs)}, then {why}; see whether "
            "the process that hosts the store is alive and can be reached",
            in_doubt=phase.entered if in_doubt is None else in_doubt,
        )
        error.__cause__ = exc.__cause__ if exc is not None else None
        return error

    async def _fetched(self, phase: Phase) -> tuple[bytes, ...]:
        """The payloads of all ranks, in their order."""
        fetching = self.session.start(self.session.payloads(phase))
        until = self.deadline + UNDO_SECS
        while not fetching.done and self.loop.now() < until:
            await settled(self.loop, fetching, until)
        if not fetching.done or fetching.error is not None:
            raise self._lost(phase, fetching.error)
        return tuple(fetching.result()[rank] for rank in range(phase.entry.world_size))

    async def _not_joined(self) -> tuple[int, ...]:
        asking = self.session.start(self.session.ask_not_joined())
        await settled(self.loop, asking, min(self.deadline, self.loop.now() + UNDO_SECS))
        if not asking.done or asking.error is not None:
            return ()
        absent: tuple[int, ...] = asking.result()
        return absent
