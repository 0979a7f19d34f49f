"""DistBarrier: a barrier over the collectives of a process group."""

from __future__ import annotations

import contextlib
import logging
from typing import ClassVar

import anyio
import torch.distributed as dist

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
    reason_of,
)
from ._calls import Calls, or_inf
from ._collectives import Word
from ._config import register_barrier
from ._errors import (
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    describe,
)
from ._values import BarrierResult
from ._worker import Promise

logger: logging.Logger = logging.getLogger(__name__)


@register_barrier
class DistBarrier(Barrier):
    """A barrier that is one collective of a process group.

    A collective cannot be called back. So calls on one barrier run one at a time, in the
    order of the calls, and after a deadline, a cancellation or a lost peer the barrier is
    broken for good on this rank: use a `StoreBarrier` where you need to go on. All names share
    one order of calls; ``name`` appears in messages only. An abort, or a phase whose body
    failed, reaches the peers when all of them have entered, not before.

    Every rank has to build its barriers in the same order, and to make the same calls in the
    same order. With no group given, the barrier makes itself a gloo group over all ranks,
    known to nobody else: it does not meet the training's collectives, whatever backend the
    default group has. A group that is given is used as it is, with whatever else runs on it,
    and by one barrier at a time.

    :param process_group: the group to use; None for a gloo group over all ranks of the
        default group, which every rank makes when it connects
    :param timeout_secs: the deadline of connecting and of each crossing, in seconds; None
        for none
    :raises TypeError, ValueError: an argument is not what is allowed

    `BarrierResult.last_rank` is the rank that came last by the ranks' own clocks: as right
    as those agree. `BarrierTimeoutError.missing_ranks` comes from the group's store, where each
    rank notes its arrivals; if that does not answer it is empty, and the message says so.
    """

    barrier_type: ClassVar[str] = "dist_barrier"

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
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
        # Of a leader whose publish runs.
        self._publishing: anyio.CancelScope | None = None

    async def connect(self) -> None:
        """Make the group, which every rank has to do; the first crossing does it otherwise.

        :raises BarrierConnectionError: there is no default group, or the new one did not come
            about within ``timeout_secs``; the message names who had not connected
        :raises BrokenBarrierError, BarrierClosedError: the barrier is of no more use

        **Cancellation:** nothing was entered and nothing is broken; connecting again is safe.
        """
        await self._calls.connect(self._timeout_secs)

    async def execute_barrier(
        self, name: str = "", *, timeout_secs: Timeout = CONFIGURED
    ) -> BarrierResult:
        started = anyio.current_time()
        timeout = self._checked_timeout(timeout_secs)
        sequence, last_rank = await self._calls.run(name, timeout, self._calls.group.cross)
        return BarrierResult(name, sequence, anyio.current_time() - started, last_rank)

    async def abort(self, reason: str, name: str = "") -> None:
        """Enter the next call and break it for all ranks; waits until they have entered.

        Peers get `BrokenBarrierError` with this rank and ``reason``, in a `commit` too, and the
        barrier goes on to work.

        :raises: as `execute_barrier`, except that an abort is no error

        **Cancellation:** the barrier is broken for good; peers may learn of the abort or not.
        """
        logger.warning("%s aborted on this rank: %s", describe(name, self._calls.sequence), reason)
        await self._calls.run(name, self._timeout_secs, lambda: self._calls.group.abort(reason))

    async def _fail(self, reason: str, name: str) -> None:
        # The body's own exception is on its way. Peers learn of it when they enter, however long
        # that takes; we need not wait for it.
        with contextlib.suppress(BarrierError):
            await self._calls.try_for(UNDO_SECS, name, lambda: self._calls.group.abort(reason))

    async def commit(
        self,
        publish: Publish,
        *,
        payload: bytes = b"",
        name: str = "",
        timeout_secs: Timeout = CONFIGURED,
        leader: int = 0,
    ) -> bytes:
        timeout = self._checked_timeout(timeout_secs)
        brought = checked_blob("payload", payload)
        self._calls.check(name)
        check_world(leader, self._calls.meeting.size)
        if self._calls.meeting.rank == leader:
            return await self._lead(publish, name, timeout, brought)
        sequence, (published, message) = await self._calls.run(
            name, timeout, lambda: self._calls.group.follow(brought, leader)
        )
        if not published:
            raise BrokenBarrierError(name, sequence, leader, message.decode())
        return message

    async def _lead(
        self, publish: Publish, name: str, timeout: float | None, payload: bytes
    ) -> bytes:
        group = self._calls.group
        deadline = anyio.current_time() + or_inf(timeout)
        gathered: Promise[dict[int, bytes]] = Promise()
        # Told to the peers by the group's thread. Not awaited: what the leader knows does not
        # depend on who hears it. The next call queues up behind it.
        word: Promise[Word] = Promise()
        try:
            try:
                sequence, payloads = await self._calls.run(
                    name, timeout, lambda: group.lead(payload, gathered, word), gathered
                )
            except BarrierError as exc:
                # The leader knows that it has not published.
                exc.in_doubt = False
                raise
            with anyio.CancelScope(deadline=deadline) as self._publishing:
                published = await publish(payloads)
            if self._publishing.cancelled_caught:
                self._calls.check(name)
                self._calls.break_for_good(f"a commit timed out after {timeout:g} s")
                raise BarrierTimeoutError(name, sequence, (), or_inf(timeout))
        except BaseException as exc:
            word.settle((False, f"publish failed: {reason_of(exc)}".encode()))
            if not isinstance(exc, Exception):
                self._calls.break_for_good(f"a commit ended early ({reason_of(exc)})")
            raise
        finally:
            self._publishing = None
        try:
            result = checked_blob("publish's result", published)
        except (TypeError, ValueError):
            # Published it is, and peers may rely on that.
            word.settle((True, b""))
            raise
        word.settle((True, result))
        return result

    async def aclose(self) -> None:
        if self._publishing is not None:
            self._publishing.cancel()
        await self._calls.aclose()

    def _checked_timeout(self, timeout_secs: Timeout) -> float | None:
        if isinstance(timeout_secs, Configured):
            return self._timeout_secs
        return check_timeout("timeout_secs", timeout_secs)
