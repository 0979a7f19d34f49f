"""A call on its way to a phase: joining, what goes wrong on the way, and errors."""

from __future__ import annotations

from typing import Any

import anyio

from .._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    another,
    caused,
    describe,
    seconds,
    told_by,
)
from .._missing import global_rank
from .._store.event_loop import Loop
from .._store.future import Effort, Future
from .._store.waiting import settled, until_done
from .phases import Phase
from .session import Session
from .state import UNDO_SECS
from .tally import kind_of
from .watching import Watch

# How much longer a call waits for an attempt to connect, whose error says more than a timeout.
SAYS_WHY_SECS = 0.3
# How long undoing something takes at least.
LEAST_SECS = 0.1


class Attempt:
    """One call of a rank, which may not have a phase yet."""

    loop: Loop
    session: Session
    name: str
    step: int | None
    started: float
    timeout_secs: float | None
    deadline: float
    watch: Watch
    phase: Phase | None = None
    # What publish raised, which may be another barrier's error, or the user's own.
    foreign: BaseException | None = None
    _rejoined = False
    _asking: Effort[tuple[int, ...]] | None = None

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
            if not await settled(loop, joining, min(until + SAYS_WHY_SECS, deadline)):
                if (closed := session.closed_by) is not None:
                    raise self._broken(closed.rank, closed.reason)
                why = session.why_not
                raise BarrierConnectionError(
                    f"rank {session.rank} did not reach the store of {describe(session.prefix)} "
                    f"within {seconds(within_secs)}; "
                    + ("" if why is None else f"{told_by(why)}; ")
                    + "is the process that hosts it up?"
                ) from why
            error = joining.error
            if error is not None and session.closing:
                raise BarrierClosedError(describe(session.prefix))
            ours = isinstance(error, BarrierError)
            failed = error is not None and (not ours or isinstance(error, BarrierConnectionError))
            if failed and joining is begun_before and loop.now() < until:
                # Another call began this attempt, and had less time than this one, or was
                # interrupted by a signal handler.
                begun_before = None
                continue
            if error is not None:
                raise self._fresh(error)
            if loop.now() >= until and not session.stands:
                raise BarrierConnectionError(
                    f"rank {session.rank} could not join {describe(session.prefix)} within "
                    f"{seconds(within_secs)}: its peers joined again meanwhile"
                )

    async def _undone(
        self, phase: Phase, effort: Future[Any], within_secs: float = UNDO_SECS
    ) -> bool:
        """Wait for ``effort``, which undoes what a caller did. The caller may be cancelled, so the
        wait is shielded and bounded."""
        left_secs = max(LEAST_SECS, self.deadline + UNDO_SECS - self.loop.now())
        with anyio.CancelScope(shield=True):
            secs = min(left_secs, within_secs, self.session.patience_secs)
            done = await until_done(self.loop, effort, secs)
        if not done:
            self.session.worry(phase)
        return done

    async def _give_up_or_doubt(self, phase: Phase, effort: Future[Any]) -> None:
        if not await self._undone(phase, effort):
            raise self._lost(phase, phase.lost)

    async def _not_joined(self) -> tuple[int, ...] | None:
        """The ranks that have not joined; None if the store does not tell in time."""
        # In a large world, or over a slow store, one question outlasts several attempts.
        asking = self._asking = self._asking or self.session.start(self.session.ask_not_joined())
        await settled(self.loop, asking, min(self.deadline, self.loop.now() + UNDO_SECS))
        if not asking.done:
            return None
        self._asking = None
        return None if asking.error is not None else asking.result()

    def failed(self, exc: BaseException) -> None:
        """Count this crossing as failed, and put the barrier's prefix into the error."""
        session, phase = self.session, self.phase
        ours, self.foreign = exc is not self.foreign, None
        if ours and isinstance(exc, BarrierTimeoutError | BrokenBarrierError):
            exc.prefix = exc.prefix or session.prefix
            if isinstance(exc, BrokenBarrierError):
                exc.global_rank = global_rank(exc.rank, self.watch.global_ranks)
        left = session.closed_by
        why = kind_of(
            exc,
            session.rank,
            left=left is not None and getattr(exc, "rank", None) == left.rank,
            over=phase is not None and phase.membership is not session.membership,
        )
        session.tally.broke(why, self.loop.now() - self.started)

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

    def _broken(self, rank: int | None, reason: str) -> BrokenBarrierError:
        """The error of a phase that has not begun: with its step, or the number it would have."""
        turns, sequence = self.session.turns, self.step
        if sequence is None:
            sequence = 0 if turns is None else turns.next[self.name]
        return BrokenBarrierError(self.name, sequence, rank, reason, prefix=self.session.prefix)

    def _lost(
        self, phase: Phase, exc: BaseException | None = None, *, in_doubt: bool | None = None
    ) -> BarrierConnectionError:
        why = "the store did not answer" if exc is None else str(exc)
        return caused(
            None if exc is None else exc.__cause__,
            f"{describe(phase.name, phase.sequence, self.session.prefix)}: "
            f"rank {self.session.rank} waited {seconds(self.loop.now() - self.started)}, then "
            f"{why}; see whether the process that hosts the store is alive and can be reached",
            in_doubt=phase.entered if in_doubt is None else in_doubt,
        )
