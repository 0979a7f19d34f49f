"""How a coroutine crosses one phase: deadline, cancellation, progress, errors.

It owns no thread and no key: it awaits the promise of its turn's verdict, and breaks the phase
where it stops waiting.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import TypeVar

import anyio

from . import _progress
from ._barrier import UNDO_SECS, reason_of
from ._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    describe,
    plural_ranks,
)
from ._protocol import Forgotten, Turn
from ._session import Session
from ._values import BarrierProgress
from ._verdict import Broken, Gathered, Released, Verdict
from ._waiting import Waiting, outcome
from ._worker import Promise

T = TypeVar("T")

# How long what has to be undone may take after the store has left a call unanswered: law 8 leaves
# two seconds in all.
_SILENT_SECS = 0.3

logger = logging.getLogger(__name__)


class Crossing:
    """One rank's way through one phase, on the event loop."""

    turn: Turn

    def __init__(
        self,
        session: Session,
        waiting: Waiting,
        started: float,
        timeout_secs: float | None,
        warn_after_secs: float,
        on_progress: Callable[[BarrierProgress], object] | None,
    ) -> None:
        self.started = started
        self.timeout_secs = timeout_secs
        self.deadline: float = math.inf if timeout_secs is None else started + timeout_secs
        self._report_at = started + warn_after_secs
        # When to ask who has not joined again.
        self._ask_at = math.inf if session.all_joined else started + session.init_secs
        self._waiting = waiting
        self._session = session
        self._warn_after_secs = warn_after_secs
        self._on_progress = on_progress

    @property
    def _until(self) -> float:
        """When there is something to do, at the latest."""
        return min(self.deadline, self._report_at, self._ask_at)

    @property
    def waited_secs(self) -> float:
        return self._waiting.now() - self.started

    async def decided(self, turn: Turn, payload: bytes = b"") -> Released | Gathered:
        """Enter, and wait for the verdict, or as the leader of a commit until all are in.

        A turn that was entered in a series is waited for only.
        """
        self.turn = turn
        session = self._session
        promise = session.turns.promised(turn)
        start = None if turn.entered else functools.partial(session.turns.enter, turn, payload)
        verdict: Verdict | Gathered | None = None
        try:
            try:
                if await self._waiting.settled(promise, self._until, start):
                    verdict = promise.result()
            except BaseException as exc:
                verdict = await self._stopped(exc)
            if verdict is None:
                verdict = await self._wait_on(promise)
        except BaseException:
            session.turns.forget(turn)
            raise
        if isinstance(verdict, Gathered):
            return verdict
        session.turns.forget(turn)
        return self.accept(verdict)

    def accept(self, verdict: Verdict | Gathered | None) -> Released:
        """The verdict, if it is to go on; else the error that it means."""
        session = self._session
        if isinstance(verdict, Released):
            session.all_joined = True
            return verdict
        turn = self.turn
        if verdict is None or isinstance(verdict, Gathered):
            raise self._lost()
        if verdict.timeout_secs is not None:
            raise BarrierTimeoutError(
                turn.name,
                turn.sequence,
                verdict.missing,
                verdict.timeout_secs,
                detail=verdict.reason,
            )
        if session.closing and verdict.rank == session.rank:
            raise BarrierClosedError(describe(turn.name, turn.sequence))
        raise BrokenBarrierError(turn.name, turn.sequence, verdict.rank, verdict.reason)

    async def _wait_on(self, promise: Promise[Verdict | Gathered]) -> Verdict | Gathered:
        """Wait longer than until the first of what is to be done meanwhile."""
        session, waiting = self._session, self._waiting
        absent: tuple[int, ...] = ()
        try:
            while True:
                now = waiting.now()
                if now >= self.deadline:
                    break
                if now >= self._ask_at:
                    self._ask_at = math.inf
                    absent = await self._ask(session.not_joined()) or ()
                    if absent:
                        break
                if now >= self._report_at:
                    self._report_at += self._warn_after_secs
                    await self._report()
                if await waiting.settled(promise, self._until):
                    return promise.result()
        except BaseException as exc:
            return await self._stopped(exc)
        return await (self._miss(absent, promise) if absent else self._time_out())

    async def stopped(self, turn: Turn, exc: BaseException) -> None:
        """Break the phase of a turn that was entered in a series, as ``exc`` ended the waiting."""
        self.turn = turn
        try:
            await self._stopped(exc)
        finally:
            self._session.turns.forget(turn)

    async def _stopped(self, exc: BaseException) -> Verdict:
        """Break the phase, since ``exc`` ended the waiting.

        What was decided, if that was the loss of a connection; else ``exc`` goes on.
        """
        if isinstance(exc, BarrierConnectionError):
            return await self._break_after_loss(exc)
        if not isinstance(exc, BarrierError):
            session, turn = self._session, self.turn
            broken = session.turns.give_up(turn, reason_of(exc))
            # A coroutine that is thrown away cannot wait; the break goes on without it.
            if not isinstance(exc, GeneratorExit) and await answer(broken) is None:
                session.start_afresh(turn)
        raise exc

    async def _time_out(self) -> Verdict:
        assert self.timeout_secs is not None
        turn = self.turn
        verdict = await self._decided(self._session.turns.give_up(turn, "", self.timeout_secs))
        if isinstance(verdict, Gathered):
            raise BarrierTimeoutError(
                turn.name,
                turn.sequence,
                (),
                self.timeout_secs,
                detail=f"all ranks had entered and rank {verdict.leader} was publishing, or died "
                "over it; look there for whether it published",
                in_doubt=True,
            )
        return verdict

    async def _miss(
        self, absent: tuple[int, ...], promise: Promise[Verdict | Gathered]
    ) -> Verdict | Gathered:
        init_secs = self._session.init_secs
        verdict = await self._decided(
            self._session.turns.give_up(
                self.turn,
                f"{plural_ranks(absent)} did not join again after a restart; start them again, or "
                "allow a longer timeout_barrier_init_secs",
                init_secs,
                absent,
            )
        )
        if isinstance(verdict, Gathered):
            # All came in the meantime, and the leader publishes: wait on.
            self._session.all_joined = True
            return await self._wait_on(promise)
        return verdict

    async def _break_after_loss(self, exc: BarrierConnectionError) -> Verdict:
        session, turn = self._session, self.turn
        # The store itself may be well; then the others need not wait for their deadlines.
        verdict = await self._decided(
            session.turns.give_up_lost(turn, "it lost its connection to the store"), exc
        )
        if isinstance(verdict, Gathered):
            session.lost(turn)
            raise self._lost(exc) from exc.__cause__
        if isinstance(verdict, Broken) and verdict.rank == session.rank:
            raise self._lost(exc, in_doubt=False) from exc.__cause__
        return verdict

    async def _decided(
        self, broken: Promise[Verdict | Gathered], exc: BarrierConnectionError | None = None
    ) -> Verdict | Gathered:
        """What the log says after this rank gave up, because of ``exc`` if that is why."""
        try:
            with anyio.move_on_after(UNDO_SECS, shield=True):
                return await outcome(broken)
        except Forgotten as forgotten:
            # The store answers, so that other phases have nothing to fear.
            self._session.doubt()
            raise self._lost(forgotten) from forgotten.__cause__
        except BarrierConnectionError as failed:
            logger.debug("the store does not answer: %s", failed)
        self._session.start_afresh(self.turn)
        raise self._lost(exc) from (exc and exc.__cause__)

    def _lost(
        self, exc: BarrierConnectionError | None = None, *, in_doubt: bool | None = None
    ) -> BarrierConnectionError:
        turn, waited = self.turn, self.waited_secs
        why = "the store did not answer" if exc is None else str(exc)
        return BarrierConnectionError(
            f"{describe(turn.name, turn.sequence)}: rank {turn.rank} waited {waited:.1f} s, then "
            f"{why}; see whether the process that hosts the store is alive and can be reached",
            in_doubt=turn.entered if in_doubt is None else in_doubt,
        )

    async def _report(self) -> None:
        turn = self.turn
        surveyed = await self._ask(self._session.turns.survey(turn))
        if surveyed is None:
            return
        arrived, missing = surveyed
        progress = BarrierProgress(
            turn.name, turn.sequence, arrived, turn.world_size, missing, self.waited_secs
        )
        _progress.report(progress, self._on_progress)

    async def _ask(self, promise: Promise[T]) -> T | None:
        """What the store says on the way, which must not outlast the deadline."""
        with anyio.CancelScope(deadline=self.deadline):
            return await answer(promise, shield=False)
        return None


def patience_secs(session: Session) -> float:
    """How long what has to be undone may take."""
    return _SILENT_SECS if session.silent else UNDO_SECS


async def answer(
    promise: Promise[T], *, shield: bool = True, within_secs: float = UNDO_SECS
) -> T | None:
    """What the store says ``within_secs``; None where it does not answer.

    Shielded, since it undoes what a cancelled caller did; bounded for the same reason.
    """
    try:
        with anyio.move_on_after(within_secs, shield=shield):
            return await outcome(promise)
    except BarrierConnectionError as exc:
        logger.debug("the store does not answer: %s", exc)
    return None
