"""DistBarrier: a barrier over the collectives of a process group."""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import ClassVar, Literal

import anyio
import torch.distributed as dist

from ._barrier import Barrier, Publish
from ._bodies import checked
from ._checks import (
    CONFIGURED,
    Configured,
    Timeout,
    check_call_timeout,
    check_publish,
    check_timeout,
    check_world,
)
from ._config import register_barrier
from ._dist.calls import UNDO_SECS, Calls
from ._dist.collectives import IN_DOUBT, PUBLISHED, TIMED_OUT, TIMED_OUT_IN_DOUBT
from ._dist.publication import Publication
from ._errors import BarrierError, BarrierTimeoutError, describe, in_one_line
from ._missing import had_not_entered
from ._protocol.count import MAX_RANKS
from ._protocol.verdict import unranged
from ._store.future import Future
from ._store.waiting import told, until_done
from ._values import BarrierResult

_CLOSED = "it closed its barrier"

logger: logging.Logger = logging.getLogger(__name__)


@register_barrier
class DistBarrier(Barrier):
    """A barrier that is one collective of a process group.

    A collective cannot be called back. So calls on one barrier run one at a time, in call order.
    After a deadline, a cancellation or a lost peer the barrier is broken for good on this rank; use
    a `StoreBarrier` if you need to go on. All names share one order of calls, and ``name`` appears
    in messages only. Peers learn of an abort, or of a phase whose body failed, when all have
    entered, not before. A rank that waits for one that has closed its barrier, or whose barrier is
    broken for good, is told within seconds. Its calls refuse ``stalled_after_secs``, since a rank
    cannot be asked for its progress.

    Every rank has to build its barriers in the same order, and to make the same calls in the same
    order, with the same steps. If they do not, all get `BrokenBarrierError`, and nothing is
    published. Without a group, the barrier makes its own gloo group over all ranks. Nothing else
    uses that group, so the barrier does not meet the training's collectives, whatever backend the
    default group has. A group that you give is used as it is, with whatever else runs on it, and by
    one barrier at a time.

    :param process_group: the group to use; None for a gloo group over all ranks of the default
        group, which every rank makes when it connects. -100 is what `new_group` returns on a rank
        that is not in the group, and is refused
    :param timeout_secs: the deadline of connecting and of each crossing, in seconds; None for no
        deadline
    :raises TypeError, ValueError: an argument is not allowed

    `BarrierResult.last_rank` is the rank that came last by the ranks' own clocks, to the
    millisecond, and is as right as those agree. `BarrierTimeoutError.missing_ranks` comes from the
    group's store, where each rank notes its arrivals. If the store does not answer it is empty, and
    the message says so.
    """

    barrier_type: ClassVar[str] = "dist_barrier"

    def __init__(
        self,
        process_group: dist.ProcessGroup | Literal[-100] | None = None,
        *,
        timeout_secs: float | None = 600.0,
    ) -> None:
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a ProcessGroup that this rank is in, or None, not "
                f"{process_group!r}"
            )
        self._timeout_secs = check_timeout("timeout_secs", timeout_secs)
        self._calls = Calls(process_group)
        # The commits under way that this rank leads.
        self._publications: set[Publication] = set()
        # A barrier that is dropped without aclose() must not leave its threads behind.
        weakref.finalize(self, self._calls.leave, _CLOSED).atexit = False

    async def connect(self) -> None:
        """Make the group, which every rank has to do. Without this call the first crossing does it.

        :raises BarrierConnectionError: there is no default group, or the new one did not come about
            within ``timeout_secs``; the message names the ranks that had not connected
        :raises BrokenBarrierError, BarrierClosedError: the barrier can no longer be used

        **Cancellation:** nothing is entered and nothing breaks. Connecting again is safe.
        """
        await self._calls.connect(self._timeout_secs)

    async def execute_barrier(
        self,
        name: str = "",
        *,
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        stalled_after_secs: Timeout = CONFIGURED,
    ) -> BarrierResult:
        calls = self._calls
        timeout = self._checked_timeout(timeout_secs, stalled_after_secs)
        loop = calls.use()
        started = loop.now()
        sequence, last_rank = await calls.run(
            name, step, timeout, lambda: calls.collectives.execute(step)
        )
        return BarrierResult(name, sequence, loop.now() - started, last_rank)

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
        calls = self._calls
        timeout = self._checked_timeout(timeout_secs, stalled_after_secs)
        check_publish(publish)
        calls.check(name, step)
        check_world(leader, calls.group.size, "leader")
        brought = await checked(self, payload, name, step, ValueError)
        if calls.group.rank == leader:
            publication = Publication(calls, name, step, timeout)
            self._publications.add(publication)
            try:
                return await publication.run(publish, brought)
            finally:
                self._publications.discard(publication)
        sequence, word = await calls.run(
            name, step, timeout, lambda: calls.collectives.follow(brought, step, leader)
        )
        if word.how != PUBLISHED:
            reason = word.message.decode(errors="replace")
            if word.how in (TIMED_OUT, TIMED_OUT_IN_DOUBT):
                secs, ranks, why = reason.split(" ", 2)
                missing = unranged("" if ranks == "-" else ranks)
                in_doubt = word.how == TIMED_OUT_IN_DOUBT
                if missing:
                    why = had_not_entered(missing, (), calls.group.global_ranks)
                raise BarrierTimeoutError(
                    name, sequence, missing, float(secs), detail=why, in_doubt=in_doubt
                )
            raise calls.group.broken(name, sequence, leader, reason, in_doubt=word.how == IN_DOUBT)
        return word.message

    async def all_gather(
        self,
        payload: bytes,
        *,
        name: str = "",
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        stalled_after_secs: Timeout = CONFIGURED,
    ) -> tuple[bytes, ...]:
        calls = self._calls
        calls.check_open(name, step)
        timeout = self._checked_timeout(timeout_secs, stalled_after_secs)
        brought = await checked(self, payload, name, step, ValueError)
        _, gathered = await calls.run(
            name, step, timeout, lambda: calls.collectives.all_gather(brought, step)
        )
        return gathered

    async def abort(self, reason: str, name: str = "", *, step: int | None = None) -> bool:
        """Enter the next call and break it for all ranks; waits until they have entered.

        Peers get `BrokenBarrierError` with this rank and ``reason``, also in a `commit`, and the
        barrier still works. Earlier calls of this rank run before it. It raises what
        `execute_barrier` raises, except that an abort is no error. It is never in doubt, as no rank
        is released.

        :return: True if this call broke it; False if another rank did so in the same call, or if
            this rank has come for ``step`` or a later one before

        **Cancellation:** the barrier is broken for good; peers may learn of the abort or not.
        """
        if not isinstance(reason, str):
            raise TypeError(f"reason must be a string, not {reason!r}")
        calls = self._calls
        calls.check(name, step)
        if calls.too_late(name, step) is not None:
            return False
        why = in_one_line(reason)
        logger.warning("%s aborted on this rank: %s", describe(name, calls.next(step)), why)
        try:
            _, broke = await calls.run(
                name, step, self._timeout_secs, lambda: calls.collectives.abort(why, step)
            )
        except BarrierError as exc:
            exc.in_doubt = False
            raise
        return broke

    async def _fail(self, reason: str, name: str, step: int | None = None) -> None:
        # The body raises its own exception. Peers learn of it when they enter, and this rank need
        # not wait for that.
        calls = self._calls
        with contextlib.suppress(BarrierError):
            call = calls.begin(name, step, lambda: calls.collectives.abort(reason, step))
            loop = calls.use()
            await told(loop, call.promise, loop.now() + UNDO_SECS)

    def _fail_soon(self, reason: str, name: str, step: int | None = None) -> None:
        calls = self._calls
        with contextlib.suppress(BarrierError):
            calls.begin(name, step, lambda: calls.collectives.abort(reason, step))

    async def aclose(self) -> None:
        await self._leave(_CLOSED)

    async def _leave(self, reason: str) -> None:
        calls = self._calls
        if calls.foreign or calls.closed:
            return
        for publication in self._publications:
            publication.stop()
        loop = calls.use()
        calls.leave(reason)
        ended: Future[None] = Future()
        calls.log.ended.when_settled(lambda: loop.post(lambda: ended.resolve(None)))
        # Its threads end by themselves, also if the caller is cancelled.
        with anyio.CancelScope(shield=True):
            await until_done(loop, ended, UNDO_SECS)
        calls.abandon()

    def _check_body(
        self,
        name: str,
        step: int | None,
        timeout_secs: Timeout,
        stalled_after_secs: Timeout,
        leader: int = 0,
    ) -> None:
        self._calls.check_open(name, step)
        self._checked_timeout(timeout_secs, stalled_after_secs)
        # The number of ranks is known when they have connected.
        check_world(leader, MAX_RANKS, "leader")

    def _checked_timeout(self, timeout_secs: Timeout, stalled_after_secs: Timeout) -> float | None:
        if stalled_after_secs is not CONFIGURED and stalled_after_secs is not None:
            raise ValueError(
                f"stalled_after_secs is {stalled_after_secs!r}; a DistBarrier cannot ask its peers "
                "for progress: leave it out, or use a StoreBarrier"
            )
        if isinstance(timeout_secs, Configured):
            return self._timeout_secs
        return check_call_timeout(timeout_secs)
