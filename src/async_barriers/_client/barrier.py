"""The calls of a barrier over a store, on the event loop."""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import anyio

from .._barrier import Barrier, Publish
from .._checks import (
    CONFIGURED,
    Configured,
    Timeout,
    check_call_timeout,
    check_publish,
    check_run_id,
    check_step,
    check_timeout,
    check_world,
)
from .._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BrokenBarrierError,
    describe,
)
from .._protocol.count import COMMIT, GATHER, MAX_RANKS
from .._protocol.keys import Keys, check_name, check_prefix
from .._protocol.membership import Closed
from .._publish import is_async
from .._store.loops import loop_here
from .._store.sources import Beside, PassedIn, Source, StoreAt
from .._store.waiting import settled, told, until_done
from .._store.worker import Promise
from .._values import BarrierProgress, BarrierResult, BarrierStatistics, CommitRecord
from .asking import became
from .attempt import LEAST_SECS
from .crossing import Crossing
from .phases import Phase
from .publication import Publication
from .session import Session
from .state import PEERS_SECS, UNDO_SECS
from .tally import GAVE_UP
from .watching import Watch, watching_for

_CLOSED = "it closed its barrier"
# How long closing waits for a publish to heed its cancellation, even if the caller is cancelled.
_STOP_SECS = 0.4
# How long closing waits for a companion's thread.
_COMPANION_SECS = 2.0

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
        run_id: str | None = None,
        stalled_after_secs: float | None = None,
        global_ranks: Sequence[int] | None = None,
    ) -> None:
        check_world(rank, world_size)
        if world_size > MAX_RANKS:
            raise ValueError(f"world size is {world_size}; at most {MAX_RANKS} ranks can meet")
        check_prefix(prefix)
        init_secs = check_timeout("timeout_barrier_init_secs", timeout_barrier_init_secs)
        if init_secs is None:
            raise TypeError("timeout_barrier_init_secs must be a number of seconds, not None")
        if on_progress is not None and not callable(on_progress):
            raise TypeError(f"on_progress must be callable or None, not {on_progress!r}")
        if is_async(on_progress):
            raise TypeError(f"on_progress is not awaited: {on_progress!r} is a coroutine function")
        check_run_id(run_id)
        self.prefix = prefix
        self._source = source
        self._keys = Keys(prefix, source.namespace)
        self._session = Session(
            source, prefix, rank, world_size, init_secs=init_secs, run_id=run_id
        )
        self._timeout_secs = check_timeout("timeout_secs", timeout_secs)
        self._watch = watching_for(
            check_timeout("warn_after_secs", warn_after_secs),
            check_timeout("stalled_after_secs", stalled_after_secs),
            on_progress,
            global_ranks,
        )
        self._closed = False
        # Objects with a thread and a barrier of their own, which end with this barrier.
        self._companions: dict[str, Companion] = {}
        weakref.finalize(self, _retire_all, self._companions).atexit = False
        self._session.on_left = partial(_tell_all, self._companions)
        # The name of most calls is the same as before.
        self._checked_name = ""
        # A barrier that is dropped without aclose() leaves, too.
        weakref.finalize(self, _abandon, self._session).atexit = False

    def __repr__(self) -> str:
        session = self._session
        state = "closed" if self._closed else "connected" if session.stands else "not connected"
        return (
            f"<{type(self).__name__} {session.prefix!r}, rank {session.rank} of "
            f"{session.world_size}, {state}>"
        )

    # -- the API -----------------------------------------------------------------------

    async def connect(self) -> None:
        self._check_call("", None, CONFIGURED)
        session, crossing = self._session, Crossing(self._session, "", None, None, self._watch)
        until = crossing.started + session.init_secs
        while True:
            try:
                return await crossing.ready()
            except BrokenBarrierError:
                if session.closed_by is None:
                    raise
                if session.why_not is None:
                    # The store was reached. A call that waits for the rank that left says so.
                    return
                if crossing.loop.now() >= until:
                    raise

    async def execute_barrier(
        self,
        name: str = "",
        *,
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        stalled_after_secs: Timeout = CONFIGURED,
    ) -> BarrierResult:
        timeout = self._check_call(name, step, timeout_secs)
        watch = self._watch_of(stalled_after_secs)
        crossing = Crossing(self._session, name, step, timeout, watch)
        released = await crossing.decided()
        assert released is not None
        assert crossing.phase is not None
        return BarrierResult(
            name, crossing.phase.sequence, crossing.waited_secs, released.last_rank
        )

    async def commit(
        self,
        publish: Publish,
        *,
        payload: bytes = b"",
        name: str = "",
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        stalled_after_secs: Timeout = CONFIGURED,
        leader: int = 0,
    ) -> bytes:
        timeout = self._check_call(name, step, timeout_secs)
        watch = self._watch_of(stalled_after_secs)
        check_publish(publish)
        check_world(leader, self._session.world_size)
        brought = await self._checked(payload, name, step, ValueError)
        crossing = Crossing(self._session, name, step, timeout, watch, COMMIT, leader)
        try:
            try:
                released = await crossing.decided(brought)
            finally:
                if crossing.phase is not None:
                    self._session.outcomes.remember(crossing.phase)
            if released is not None:
                return released.result
            assert crossing.phase is not None
            return await self._publish(crossing, crossing.phase, publish)
        finally:
            # A signal handler may raise before it publishes, and the others must not wait for that.
            if crossing.phase is not None and not crossing.phase.abandoned:
                self._session.forget(crossing.phase)

    async def all_gather(
        self,
        payload: bytes,
        *,
        name: str = "",
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        stalled_after_secs: Timeout = CONFIGURED,
    ) -> tuple[bytes, ...]:
        timeout = self._check_call(name, step, timeout_secs)
        watch = self._watch_of(stalled_after_secs)
        brought = await self._checked(payload, name, step, ValueError)
        crossing = Crossing(self._session, name, step, timeout, watch, GATHER)
        await crossing.decided(brought)
        return crossing.brought

    async def abort(self, reason: str, name: str = "", *, step: int | None = None) -> bool:
        self._check_call(name, step, CONFIGURED)
        if not isinstance(reason, str):
            raise TypeError(f"reason must be a string, not {reason!r}")
        session = self._session
        crossing = Crossing(session, name, step, None, self._watch)
        phase = session.awaited(name, step)
        if phase is not None and phase.publishing is not None:
            publishing = phase.publishing
            publishing.stop(reason)
            await settled(crossing.loop, publishing.settled, math.inf)
            return bool(publishing.stopped)
        if phase is None:
            while not session.stands:
                await crossing.ready()
            if step is not None and session.too_late(name, step):
                passed = session.start(session.break_passed(name, step, reason))
                await settled(crossing.loop, passed, crossing.started + session.init_secs)
                return passed.done and passed.error is None and passed.result()
            phase = session.begin(name, step)
        broke = await self._break(crossing, phase, reason, session.init_secs)
        publishing = phase.publishing
        if publishing is not None:
            # It began to publish in the same instant.
            publishing.stop(reason)
            await settled(crossing.loop, publishing.settled, math.inf)
            return bool(publishing.stopped)
        return broke

    def report(self, doing: str) -> None:
        self._session.said.say(doing)

    async def outcome(self, name: str, sequence: int) -> CommitRecord | None:
        self._check_call(name, sequence, CONFIGURED)
        return await became(self._session, name, sequence)

    def statistics(self) -> BarrierStatistics:
        return self._session.tally.statistics()

    async def aclose(self) -> None:
        await self._leave(_CLOSED)

    async def _leave(self, reason: str) -> None:
        session = self._session
        self._closed = True
        if session.foreign:
            return
        try:
            await self._end_companions(reason)
        except BaseException:
            # Leaving goes on by itself.
            session.leave(reason)
            raise
        if session.loop is None:
            session.leave(reason)
            return
        if session.busy_elsewhere:
            # Which ends the calls that are under way there.
            session.loop.post(partial(session.leave, reason))
            return
        loop = session.use()
        began = loop.now()
        try:
            await self._stop_publishing()
            leaving = session.leave(reason, loop.now() - began)
            # A host gives its peers a moment to hear their verdicts; the rest is short.
            await settled(loop, leaving, loop.now() + PEERS_SECS + UNDO_SECS)
        except BaseException as exc:
            # Leaving goes on by itself, and a cancelled caller waits for most of it. A coroutine
            # that is thrown away cannot wait.
            leaving = session.leave(reason, loop.now() - began)
            if not isinstance(exc, GeneratorExit):
                with anyio.CancelScope(shield=True):
                    await until_done(loop, leaving, UNDO_SECS)
            raise

    async def _end_companions(self, reason: str) -> None:
        companions = list(self._companions.values())
        for companion in companions:
            companion.retire(reason)
        for companion in companions:
            if (ended := companion.ended) is not None:
                loop = loop_here(None)
                await told(loop, ended, loop.now() + _COMPANION_SECS)

    def beside(self, what: str) -> CrossingBarrier:
        """Another barrier of this rank at the same store, independent of it."""
        session = self._session
        warn_secs = None if self._watch.warn_secs == math.inf else self._watch.warn_secs
        assert isinstance(self._source, PassedIn | StoreAt)
        return CrossingBarrier(
            Beside(self._source, what), session.rank, session.world_size, self.prefix,
            session.init_secs, self._timeout_secs, warn_secs, None, session.run_id, None,
            self._watch.global_ranks,
        )  # fmt: skip

    async def _stop_publishing(self) -> None:
        # A phase that was published must not be declared broken, so publish has to end first.
        publications = [p.publishing for p in self._session.open if p.publishing is not None]
        for publication in publications:
            publication.stop(_CLOSED, closing=True)
        # A publish that heeds its cancellation ends soon, so a cancelled caller waits for it, too.
        loop = self._session.running
        deadline = loop.now() + PEERS_SECS
        for publication in publications:
            with anyio.CancelScope(shield=True):
                until = min(deadline, loop.now() + _STOP_SECS)
                await settled(loop, publication.settled, until)
            await settled(loop, publication.settled, deadline)

    async def _fail(self, reason: str, name: str, step: int | None = None) -> None:
        session = self._session
        if self._closed:
            # Leaving has told the peers already.
            return
        owes = True
        try:
            crossing = Crossing(session, name, step, UNDO_SECS, self._watch)
            if not session.stands:
                await crossing.ready()
            phase = session.begin(name, step)
            owes = False
            until = crossing.started + session.patience_secs
            await self._break(crossing, phase, reason, max(LEAST_SECS, until - crossing.loop.now()))
        except BarrierError as exc:
            # The caller's own exception is being raised, and matters more than this one.
            what = describe(name, None, session.prefix)
            logger.warning("%s could not be broken for its peers: %s", what, exc)
            owes = owes and not isinstance(exc, BrokenBarrierError)
        finally:
            if owes and not self._closed:
                session.owe_turn(name, step, reason)

    def _fail_soon(self, reason: str, name: str, step: int | None = None) -> None:
        session = self._session
        if self._closed or session.foreign:
            return
        loop = session.loop
        if loop is None or not session.stands:
            session.owe_turn(name, step, reason)
            return
        with contextlib.suppress(BarrierError, RuntimeError):
            phase = session.begin(name, step)
            session.give_up(phase, reason)
            session.forget(phase)
            session.tally.broke(GAVE_UP)

    # -- parts of the calls ------------------------------------------------------------

    def _check_call(self, name: str, step: int | None, timeout_secs: Timeout) -> float | None:
        if name is not self._checked_name:
            check_name(self._keys, name)
            self._checked_name = name
        if step is not None:
            check_step(step)
        if self._closed:
            raise BarrierClosedError(describe(self._session.prefix))
        if isinstance(timeout_secs, Configured):
            return self._timeout_secs
        return check_call_timeout(timeout_secs)

    def _check_body(
        self,
        name: str,
        step: int | None,
        timeout_secs: Timeout,
        stalled_after_secs: Timeout,
        leader: int = 0,
    ) -> None:
        self._check_call(name, step, timeout_secs)
        self._watch_of(stalled_after_secs)
        check_world(leader, self._session.world_size)

    def _watch_of(self, stalled_after_secs: Timeout) -> Watch:
        if isinstance(stalled_after_secs, Configured):
            return self._watch
        return self._watch.with_stalled(check_timeout("stalled_after_secs", stalled_after_secs))

    async def _break(
        self, crossing: Crossing, phase: Phase, reason: str, within_secs: float
    ) -> bool:
        session, loop = self._session, crossing.loop
        giving_up = session.give_up(phase, reason)
        try:
            if not await settled(loop, giving_up, loop.now() + within_secs):
                session.worry(phase)
                raise BarrierConnectionError(
                    f"{describe(phase.name, phase.sequence, session.prefix)}: the store did not "
                    "answer in time; its peers are told as soon as it does"
                )
            broke = giving_up.result()
            if broke and phase.waiter is None:
                session.tally.broke(GAVE_UP)
            return broke
        finally:
            # Another call of this rank may still await it, as when only the leader may settle it.
            if phase.waiter is None:
                session.forget(phase)

    async def _publish(self, crossing: Crossing, phase: Phase, publish: Publish) -> bytes:
        session = self._session
        publication = phase.publishing = Publication(crossing, phase)
        try:
            if self._closed:
                # Closing tells the peers.
                phase.abandoned = True
                raise BarrierClosedError(describe(phase.name, phase.sequence, session.prefix))
            result = await publication.run(publish)
            crossing.was_released()
            return result
        except BaseException as exc:
            crossing.failed(exc)
            raise
        finally:
            phase.publishing = None
            publication.settled.resolve(None)


class Companion(Protocol):
    """Something with a thread of its own that ends with a barrier."""

    @property
    def ended(self) -> Promise[None] | None: ...
    def retire(self, reason: str | None = None) -> None: ...
    def peer_left(self, closed: Closed) -> None: ...


def _retire_all(companions: dict[str, Companion]) -> None:
    for companion in companions.values():
        companion.retire()


def _tell_all(companions: dict[str, Companion], closed: Closed) -> None:
    for companion in list(companions.values()):  # Another thread may build one just now.
        companion.peer_left(closed)


def _abandon(session: Session) -> None:
    """Leave for a barrier that was dropped, in whatever thread this runs."""
    if session.foreign or session.closing:
        return
    loop = session.loop
    if loop is not None and loop.here():
        session.leave(_CLOSED)
    elif loop is not None and not loop.ended:
        loop.post(lambda: session.leave(_CLOSED))
    else:
        session.end_with_loop()
