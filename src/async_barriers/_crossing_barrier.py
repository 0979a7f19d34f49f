"""The calls of a barrier over a store, on the event loop.

It takes a turn from the session for each of them, and has a `Crossing` wait for what comes of it.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import anyio

from ._barrier import (
    CONFIGURED,
    UNDO_SECS,
    Barrier,
    Configured,
    Publish,
    Timeout,
    check_timeout,
    check_world,
    checked_blob,
)
from ._crossing import Crossing, answer, patience_secs
from ._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BrokenBarrierError,
    describe,
)
from ._keys import Keys, check_name, check_prefix
from ._protocol import Turn
from ._publication import Publication
from ._session import Session
from ._stores import Source
from ._values import BarrierProgress, BarrierResult
from ._verdict import Gathered
from ._waiting import Waiting, outcome, waiting_here
from ._worker import Promise

T = TypeVar("T")

# How long closing waits: for the peers of a rank that hosts the store, and for the threads.
_PEERS_SECS = 3.0
_STOP_SECS = 0.4
_THREADS_SECS = 0.5
_THREAD_GONE_SECS = 0.01
# How long joining again may take on one connection, and twice as long on the next one.
_JOINS_AGAIN_SECS = 1.0

logger = logging.getLogger(__name__)


class CrossingBarrier(Barrier):
    """What StoreBarrier and TCPStoreBarrier share: all but where the store comes from."""

    def __init__(
        self,
        source: Source,
        rank: int,
        world_size: int,
        prefix: str,
        timeout_barrier_init_secs: float,
        timeout_secs: float | None,
        warn_after_secs: float | None,
        on_progress: Callable[[BarrierProgress], object] | None,
    ) -> None:
        check_world(rank, world_size)
        check_prefix(prefix)
        init_secs = check_timeout("timeout_barrier_init_secs", timeout_barrier_init_secs)
        if init_secs is None:
            raise TypeError("timeout_barrier_init_secs must be a number of seconds, not None")
        if on_progress is not None and not callable(on_progress):
            raise TypeError(f"on_progress must be callable or None, not {on_progress!r}")
        self._source = source
        self._keys = Keys(prefix)
        self._session = Session(
            source.open, self._keys, rank, world_size, init_secs=init_secs, hosts=source.hosts
        )
        self._timeout_secs = check_timeout("timeout_secs", timeout_secs)
        warn_secs = check_timeout("warn_after_secs", warn_after_secs)
        self._warn_after_secs = math.inf if warn_secs is None else warn_secs
        self._on_progress = on_progress
        self._closed = False
        # The same ones most often.
        self._waiting: Waiting | None = None
        self._checked_name = ""
        self._publishing: dict[Turn, Publication] = {}
        # A barrier that is dropped without aclose() must not leave its threads behind.
        weakref.finalize(self, _abandon, self._session).atexit = False

    # -- the API -----------------------------------------------------------------------

    async def connect(self) -> None:
        await self._ready(math.inf, "")

    async def execute_barrier(
        self, name: str = "", *, timeout_secs: Timeout = CONFIGURED
    ) -> BarrierResult:
        timeout = self._check_call(name, timeout_secs)
        waiting = self._waiting_here()
        session, started = self._session, waiting.now()
        turn = None
        if (series := session.series(name, waiting.listen)) is not None:
            # Most often, and most often that is all. If not, it becomes a turn.
            warn = self._warn_after_secs
            waiter = waiting.waiter(started + (warn if timeout is None else min(timeout, warn)))
            try:
                if series.enter(waiter):
                    await waiter.woken
                    if series.met():
                        waited_secs = waiting.now() - started
                        return BarrierResult(name, series.sequence, waited_secs, series.last_rank)
                    session.unfold(series)
                    turn = series.turn
            except BaseException as exc:
                session.unfold(series)
                if series.turn is not None:
                    await self._crossing(waiting, started, timeout).stopped(series.turn, exc)
                raise
            finally:
                waiter.leave()
        crossing = self._crossing(waiting, started, timeout)
        # Most often there is nothing to wait for.
        turn = turn or session.take_turn(name) or await self._take_turn(name, crossing.deadline)
        verdict = await crossing.decided(turn)
        return BarrierResult(name, turn.sequence, crossing.waited_secs, verdict.last_rank)

    def phase(
        self, name: str = "", *, timeout_secs: Timeout = CONFIGURED
    ) -> AbstractAsyncContextManager[None]:
        # What is wrong with the call is said before the body runs, not after.
        self._check_call(name, timeout_secs)
        return super().phase(name, timeout_secs=timeout_secs)

    async def commit(
        self,
        publish: Publish,
        *,
        payload: bytes = b"",
        name: str = "",
        timeout_secs: Timeout = CONFIGURED,
        leader: int = 0,
    ) -> bytes:
        timeout = self._check_call(name, timeout_secs)
        waiting = self._waiting_here()
        crossing = self._crossing(waiting, waiting.now(), timeout)
        check_world(leader, self._session.world_size)
        brought = checked_blob("payload", payload)
        turn = await self._take_turn(name, crossing.deadline, leader)
        verdict = await crossing.decided(turn, brought)
        if isinstance(verdict, Gathered):
            return await self._publish(crossing, publish, verdict)
        return verdict.result

    async def abort(self, reason: str, name: str = "") -> None:
        self._check_call(name, CONFIGURED)
        if not isinstance(reason, str):
            raise TypeError(f"reason must be a string, not {reason!r}")
        turn = self._session.open_turn(name)
        if turn is None:
            return await self._break(await self._take_turn(name), reason, self._init_secs)
        if turn not in self._publishing:
            await _require(self._session.turns.give_up(turn, reason), self._init_secs, turn)
        # Also where it began to publish in the same instant.
        if (publication := self._publishing.get(turn)) is not None:
            publication.stop(reason)
            await publication.settled.wait()

    async def part(self, name: str) -> None:
        """Before closing: break the next phase of ``name`` for peers that would wait in it.

        Where that takes joining (again) first, nobody is told.
        """
        if (turn := self._session.take_turn(name)) is not None:
            await answer(self._session.turns.give_up(turn, "it closed its barrier"), shield=False)
            self._session.turns.forget(turn)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        session = self._session
        said: Promise[None] | None = None
        try:
            try:
                await self._stop_publishing()
            finally:
                # Said even where the waiting is cancelled.
                said = session.farewell() if session.has_a_say else None
            if said is not None:
                with anyio.move_on_after(_PEERS_SECS if session.hosts else patience_secs(session)):
                    await outcome(said)
        except BarrierConnectionError as exc:
            logger.debug("%s closed without its store: %s", describe(self._keys.prefix), exc)
        finally:
            lanes = session.retire()
            session.stop_connecting()
            if session.silent and not (said is not None and said.done()):
                session.abandon()
            with anyio.move_on_after(_THREADS_SECS, shield=True):
                for lane in lanes:
                    await outcome(lane.ended)
                    lane.join(_THREAD_GONE_SECS)
            session.abandon()
            self._source.let_go()

    async def _stop_publishing(self) -> None:
        # What was published must not be declared broken: publish itself has to end first.
        publications = list(self._publishing.values())
        for publication in publications:
            publication.stop("it closed its barrier", closing=True)
        # One that heeds its cancellation is settled soon, also for a caller who is cancelled.
        for within_secs, shield in ((_STOP_SECS, True), (_PEERS_SECS - _STOP_SECS, False)):
            with anyio.move_on_after(within_secs, shield=shield):
                for publication in publications:
                    await publication.settled.wait()

    async def _fail(self, reason: str, name: str) -> None:
        session = self._session
        deadline = anyio.current_time() + UNDO_SECS
        turn: Turn | None = None
        try:
            self._check_call(name, CONFIGURED)
            turn = await self._take_turn(name, deadline)
            return await self._break(turn, reason, deadline - anyio.current_time())
        except BarrierError as exc:
            why = str(exc)
        # The caller's own exception is on its way, and matters more than this one.
        logger.warning("%s could not be broken for its peers: %s", describe(name), why)
        if turn is None and not (self._closed or session.replaced):
            session.owe_turn(name, reason)

    # -- taking a turn -----------------------------------------------------------------

    @property
    def _init_secs(self) -> float:
        return self._session.init_secs

    def _check_call(self, name: str, timeout_secs: Timeout) -> float | None:
        if name is not self._checked_name:
            check_name(self._keys, name)
            self._checked_name = name
        if self._closed:
            raise BarrierClosedError(describe(self._keys.prefix))
        if isinstance(timeout_secs, Configured):
            return self._timeout_secs
        return check_timeout("timeout_secs", timeout_secs)

    async def _ready(self, within_secs: float, name: str) -> None:
        """Join, or join again where the generation ended or the store was lost."""
        session = self._session
        within_secs = max(0.0, min(within_secs, self._init_secs))
        deadline = anyio.current_time() + within_secs
        patience = _JOINS_AGAIN_SECS if session.joined_before else math.inf
        try:
            while (remaining := deadline - anyio.current_time()) > 0:
                with anyio.move_on_after(min(remaining, patience)):
                    await outcome(session.join())
                    if session.stands or session.replaced or self._closed:
                        break
                    # What it joined is over already.
                    continue
                # The network may be well again, and the connection still not.
                session.doubt_joining()
                patience *= 2
        except BarrierConnectionError:
            if not self._closed:
                raise
        finally:
            session.doubt_joining()
        if self._closed:
            raise BarrierClosedError(describe(self._keys.prefix))
        if session.replaced:
            raise BrokenBarrierError(
                name,
                session.next_sequence(name),
                session.rank,
                f"another process joined {describe(self._keys.prefix)} as rank {session.rank} and "
                "took this one's place; look for two processes with this rank, or close a barrier "
                "before you build it anew",
            )
        if not session.stands:
            raise BarrierConnectionError(
                f"rank {session.rank} did not reach the store of {describe(self._keys.prefix)} "
                f"within {within_secs:g} s; is the process that hosts it up?"
            )

    def _waiting_here(self) -> Waiting:
        waiting = waiting_here(self._waiting)
        if waiting is not self._waiting:
            self._waiting = waiting
            # The loop before may have ended, and left crossings behind that nobody throws away.
            self._session.unfold()
        return waiting

    def _crossing(self, waiting: Waiting, started: float, timeout_secs: float | None) -> Crossing:
        return Crossing(
            self._session,
            waiting,
            started,
            timeout_secs,
            self._warn_after_secs,
            self._on_progress,
        )

    async def _take_turn(
        self, name: str, deadline: float = math.inf, leader: int | None = None
    ) -> Turn:
        while (turn := self._session.take_turn(name, leader)) is None:
            await self._ready(deadline - anyio.current_time(), name)
        return turn

    async def _break(self, turn: Turn, reason: str, within_secs: float) -> None:
        try:
            await _require(self._session.turns.give_up(turn, reason), within_secs, turn)
        except BarrierConnectionError:
            # The turn is used up; peers may wait in its phase.
            self._session.start_afresh(turn, reason)
            raise
        finally:
            self._session.turns.forget(turn)

    # -- the leader's part -------------------------------------------------------------

    async def _publish(self, crossing: Crossing, publish: Publish, gathered: Gathered) -> bytes:
        turn = crossing.turn
        if self._closed:
            # Left unclaimed and unforgotten, for the farewell to break.
            raise BarrierClosedError(describe(turn.name, turn.sequence))
        if not turn.claim():
            # Another task of ours broke it in the same instant: hear what came of that.
            try:
                told = await answer(self._session.turns.hear(turn))
                return crossing.accept(told).result
            finally:
                self._session.turns.forget(turn)
        publication = self._publishing[turn] = Publication(self._session, crossing)
        try:
            return await publication.run(publish, gathered)
        finally:
            del self._publishing[turn]
            self._session.turns.forget(turn)
            publication.settled.set()


async def _require(promise: Promise[T], within_secs: float, turn: Turn) -> T:
    with anyio.move_on_after(within_secs):
        return await outcome(promise)
    raise BarrierConnectionError(
        f"{describe(turn.name, turn.sequence)}: the store did not answer within {within_secs:g} s"
    )


def _abandon(session: Session) -> None:
    if session.has_a_say and not session.closing:
        session.farewell()
    session.retire()
