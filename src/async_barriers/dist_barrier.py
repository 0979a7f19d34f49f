"""DistBarrier: a barrier over the collectives of a process group."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from typing import ClassVar, TypeVar

import anyio
import torch.distributed as dist
from anyio.lowlevel import current_token

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
from ._collectives import Collectives, DifferentLeaders
from ._config import register_barrier
from ._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    describe,
)
from ._values import BarrierResult
from ._worker import outcome

T = TypeVar("T")

UNKNOWN_RANK = -1

logger: logging.Logger = logging.getLogger(__name__)


@register_barrier
class DistBarrier(Barrier):
    """A barrier that is one collective of a process group.

    A collective cannot be called back. So calls on one barrier run one at a time, in the
    order of the calls, and after a deadline, a cancellation or a lost peer the barrier is
    broken for good on this rank: use a `StoreBarrier` where you need to go on. All names share
    one order of calls; ``name`` appears in messages only. An abort, or a phase whose body
    failed, reaches the peers when all of them have entered, not before.

    :param process_group: the group to use; None for a gloo group over all ranks of the
        default group, which every rank makes when it connects
    :param timeout_secs: the deadline of connecting and of each crossing, in seconds; None
        for none
    :raises TypeError, ValueError: an argument is not what is allowed

    `BarrierResult.last_rank` is -1: a collective does not tell who came last.
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
        self._group = Collectives(process_group)
        self._turn: anyio.Lock | None = None
        self._loop: object = None
        self._sequence = 0
        self._unusable: str | None = None
        self._closed = False

    async def connect(self) -> None:
        self._check_usable("", self._sequence)
        with anyio.move_on_after(_or_inf(self._timeout_secs)):
            await outcome(self._group.submit(self._group.connect))
            return
        self._unusable = "its group never came about"
        raise BarrierConnectionError(
            f"no gloo group came about within {self._timeout_secs:g} s; has every rank of the "
            "default group connected its DistBarrier?"
        )

    async def execute_barrier(
        self, name: str = "", *, timeout_secs: Timeout = CONFIGURED
    ) -> BarrierResult:
        started = anyio.current_time()
        sequence = await self._cross(name, self._checked_timeout(timeout_secs), abort=False)
        return BarrierResult(name, sequence, anyio.current_time() - started, UNKNOWN_RANK)

    async def abort(self, reason: str, name: str = "") -> None:
        logger.warning("%s aborted on this rank: %s", describe(name, self._sequence), reason)
        # Entering is the only way to tell anyone; and that we aborted is no news to us.
        with contextlib.suppress(BrokenBarrierError):
            await self._cross(name, self._timeout_secs, abort=True)

    async def _fail(self, reason: str, name: str) -> None:
        # Peers learn of it when they enter, however long that takes; we need not wait for it.
        with anyio.move_on_after(UNDO_SECS), contextlib.suppress(BarrierError):
            await self.abort(reason, name)

    async def commit(
        self,
        publish: Publish,
        *,
        payload: bytes = b"",
        name: str = "",
        timeout_secs: Timeout = CONFIGURED,
        leader: int = 0,
    ) -> bytes:
        group = self._group
        timeout = self._checked_timeout(timeout_secs)
        brought = checked_blob("payload", payload)
        published: bytes | None = None
        failure: Exception | None = None

        async def gather_and_publish(sequence: int) -> bytes:
            nonlocal published, failure
            check_world(leader, group.size)
            try:
                payloads = await outcome(group.submit(lambda: group.gather(brought, leader)))
            except DifferentLeaders as exc:
                raise BrokenBarrierError(name, sequence, None, str(exc)) from exc
            if group.rank != leader:
                released, message = await outcome(group.submit(lambda: group.hear(leader)))
                if not released:
                    raise BrokenBarrierError(name, sequence, leader, message.decode())
                return message
            try:
                published = await publish(payloads) or b""
            except BaseException as exc:
                self._tell(False, f"publish failed: {reason_of(exc)}".encode())
                if not isinstance(exc, Exception):
                    raise
                failure = exc
                return b""
            try:
                published = checked_blob("publish's result", published)
            except (TypeError, ValueError) as exc:
                # Published it is, and peers may rely on that.
                failure, published = exc, b""
            self._tell(True, published)
            return published

        try:
            result = await self._run(name, timeout, gather_and_publish)
        except BarrierTimeoutError as exc:
            # The leader knows what became of it.
            exc.in_doubt = not (group.connected and group.rank == leader)
            raise
        if failure is not None:
            raise failure
        return result

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        group = self._group
        if self._unusable is not None or (self._turn and self._turn.locked()):
            group.give_up()
        group.retire()
        with anyio.move_on_after(UNDO_SECS, shield=True):
            await outcome(group.ended)
        group.give_up()

    def _tell(self, released: bool, message: bytes) -> None:
        # Not awaited: what the leader knows does not depend on who hears it. The next call
        # queues up behind it.
        self._group.submit(lambda: self._group.tell(released, message))

    async def _cross(self, name: str, timeout: float | None, *, abort: bool) -> int:
        group = self._group

        async def collect(sequence: int) -> int:
            rank = await outcome(group.submit(lambda: group.cross(abort)))
            if rank is not None:
                raise BrokenBarrierError(
                    name, sequence, rank, "it gave the phase up; its own log says why"
                )
            return sequence

        return await self._run(name, timeout, collect)

    async def _run(
        self, name: str, timeout: float | None, collect: Callable[[int], Awaitable[T]]
    ) -> T:
        """One call after the other; one that ends early is the last."""
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, not {name!r}")
        sequence = self._sequence
        self._check_usable(name, sequence)
        self._sequence += 1
        try:
            with anyio.move_on_after(_or_inf(timeout)):
                async with self._one_at_a_time():
                    self._check_usable(name, sequence)
                    await outcome(self._group.submit(self._group.connect))
                    return await collect(sequence)
        except (BrokenBarrierError, BarrierClosedError):
            raise
        except BarrierConnectionError as exc:
            if self._closed:
                raise BarrierClosedError(describe(name, sequence)) from exc
            self._unusable = self._unusable or str(exc)
            exc.in_doubt = self._group.connected
            raise
        except BaseException as exc:
            self._unusable = self._unusable or f"a call ended early ({reason_of(exc)})"
            raise
        self._unusable = self._unusable or f"a call timed out after {timeout:g} s"
        raise BarrierTimeoutError(
            name,
            sequence,
            (),
            _or_inf(timeout),
            detail="a collective cannot tell who is missing; a StoreBarrier can",
            in_doubt=True,
        )

    def _one_at_a_time(self) -> anyio.Lock:
        # A lock belongs to the event loop that made it; the barrier may outlive that.
        loop = current_token()
        if self._turn is None or loop != self._loop:
            self._loop, self._turn = loop, anyio.Lock()
        return self._turn

    def _checked_timeout(self, timeout_secs: Timeout) -> float | None:
        if isinstance(timeout_secs, Configured):
            return self._timeout_secs
        return check_timeout("timeout_secs", timeout_secs)

    def _check_usable(self, name: str, sequence: int) -> None:
        if self._closed:
            raise BarrierClosedError("this DistBarrier")
        if self._unusable is not None:
            raise BrokenBarrierError(
                name,
                sequence,
                None,
                f"this DistBarrier is of no more use: {self._unusable}, and a collective cannot "
                "be called back; build a new one on every rank, or use a StoreBarrier, which "
                "outlives deadlines and cancellations",
            )


def _or_inf(timeout_secs: float | None) -> float:
    return math.inf if timeout_secs is None else timeout_secs
