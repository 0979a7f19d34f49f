"""The calls of a barrier over a store, on the event loop."""

from __future__ import annotations

import contextlib
import logging
import math

from .._barrier import Publish
from .._bodies import checked
from .._checks import (
    CONFIGURED,
    Configured,
    Timeout,
    check_call_timeout,
    check_publish,
    check_step,
    check_timeout,
    check_world,
)
from .._errors import BarrierClosedError, BarrierError, BrokenBarrierError, describe, unanswered
from .._protocol.count import COMMIT, GATHER
from .._protocol.keys import check_name
from .._protocol.phase import Forgotten
from .._store.sources import Beside, PassedIn, StoreAt
from .._store.waiting import settled
from .._values import BarrierResult, CommitRecord
from .asking import became
from .attempt import LEAST_SECS
from .crossing import Crossing
from .lifetime import RankBarrier
from .phases import Phase
from .publication import Publication
from .state import UNDO_SECS
from .tally import GAVE_UP
from .watching import Watch

logger = logging.getLogger(__name__)


class CrossingBarrier(RankBarrier):
    """What StoreBarrier and TCPStoreBarrier share: all but where the store comes from."""

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
        check_world(leader, self._session.world_size, "leader")
        brought = await checked(self, payload, name, step, ValueError)
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
        brought = await checked(self, payload, name, step, ValueError)
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
                if passed.done and passed.error is None:
                    return bool(passed.result())
                if session.closing:
                    raise BarrierClosedError(describe(name, step, session.prefix))
                if isinstance(passed.error, Forgotten):
                    return False  # It was broken, and its keys were deleted.
                what = describe(name, step, session.prefix)
                raise unanswered(session.why_not or passed.error, what)
            phase = session.begin(name, step)
        broke = await self._break(crossing, phase, reason, session.init_secs)
        publishing = phase.publishing
        if publishing is not None:
            # It began to publish in the same instant.
            publishing.stop(reason)
            await settled(crossing.loop, publishing.settled, math.inf)
            return bool(publishing.stopped)
        return broke

    async def outcome(self, name: str, sequence: int) -> CommitRecord | None:
        self._check_call(name, None, CONFIGURED)
        return await became(self._session, name, sequence)

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

    async def _fail(self, reason: str, name: str, step: int | None = None) -> None:
        session = self._session
        if self._closed:
            # Leaving has told the peers already.
            return
        owes, begun = True, list[Phase]()
        try:
            crossing = Crossing(session, name, step, UNDO_SECS, self._watch)
            if not session.stands:
                await crossing.ready()
            phase = session.begin(name, step, hold=begun.append)
            until = crossing.started + session.patience_secs
            await self._break(crossing, phase, reason, max(LEAST_SECS, until - crossing.loop.now()))
        except BarrierError as exc:
            # The caller's own exception is being raised, and matters more than this one.
            what = describe(name, None, session.prefix)
            logger.warning("%s could not be broken for its peers: %s", what, exc)
            owes = not isinstance(exc, BrokenBarrierError)
        finally:
            if owes and not (begun or self._closed):
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
        check_world(leader, self._session.world_size, "leader")

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
                why, what = phase.lost, describe(phase.name, phase.sequence, session.prefix)
                session.worry(phase)
                raise unanswered(session.why_not or why, what, untold=True)
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
