"""`Barrier`: what every barrier can do, whatever is underneath."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from enum import Enum
from types import TracebackType
from typing import Any, ClassVar, Final, TypeVar

from ._bodies import Body, Committing, tell
from ._reasons import reason_of
from ._values import BarrierResult

T = TypeVar("T")
BarrierT = TypeVar("BarrierT", bound="Barrier")
Publish = Callable[[Mapping[int, bytes]], Awaitable[bytes | None] | bytes | None]

# c10d drops a connection that brings more than 8 MiB; half of it is a round figure.
MAX_PAYLOAD_BYTES = 4 * 1024 * 1024


class Configured(Enum):
    """Stands for "the timeout the barrier was built with", since None means "no deadline"."""

    TIMEOUT = "as configured"

    def __repr__(self) -> str:
        return "..."  # what a signature shows


CONFIGURED: Final = Configured.TIMEOUT
Timeout = float | None | Configured


class Barrier(abc.ABC):
    """Lets the ranks of one training job wait for each other without blocking an event loop.

    One crossing is a *phase*. Its name and its step, or this rank's count of crossings of that
    name, identify it. A phase ends in one verdict, released or broken, the same for all ranks. It
    works on asyncio and trio. A barrier belongs to one event loop at a time.
    """

    barrier_type: ClassVar[str]

    @abc.abstractmethod
    async def execute_barrier(
        self, name: str = "", *, step: int | None = None, timeout_secs: Timeout = CONFIGURED
    ) -> BarrierResult:
        """Enter the next phase of ``name`` and wait until every rank has entered.

        :param name: phases of different names are independent
        :param step: 0 or more; the phase is then that of ``name`` and this step. Ranks that come
            for different steps never meet. A step is decided once: a rank that comes for it when it
            or a later one is decided gets `BrokenBarrierError` at once. Without a step, the n-th
            call of a name meets the n-th of the other ranks. That is enough only where all ranks
            call, fail and restart together.
        :param timeout_secs: the deadline in seconds from now; None for no deadline
        :raises BarrierTimeoutError: a deadline, of this rank or another, broke the phase
        :raises BrokenBarrierError: another rank gave up, or this barrier can no longer be used
        :raises BarrierConnectionError: the store was lost or never reached
        :raises BarrierClosedError: the barrier is closed

        **Cancellation:** breaks the phase for all ranks, unless it was decided before, and returns
        within 1 s. The turn is used up: the next call enters the next phase.
        """

    async def connect(self) -> None:  # noqa: B027  (a barrier may have nothing to connect to)
        """Reach the store, but not the peers. Without this call the first crossing connects.

        :raises BarrierConnectionError: the store was not reached in time

        **Cancellation:** nothing is entered and nothing breaks. Connecting again is safe.
        """

    async def commit(
        self,
        publish: Publish,
        *,
        payload: bytes = b"",
        name: str = "",
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        leader: int = 0,
    ) -> bytes:
        """Publish a checkpoint once every rank has finished its part, or not at all.

        Raises what `execute_barrier` raises. If ``publish`` raises, the leader gets its exception
        and the others get `BrokenBarrierError`. If it returns anything but bytes or None, all ranks
        get the same `BrokenBarrierError`, in doubt, since it may have published.

        :param publish: called on the leader alone, with the payloads of all ranks, when all have
            entered. Every rank gets what it returns (``b""`` for None). It is a coroutine function,
            or a plain one, which runs in a thread of the library's. A thread outlives its
            cancellation, so the last step of a plain function must do no harm if it comes late.
        :param payload: what this rank brings, such as its manifest; 4 MiB at most
        :param step: as in `execute_barrier`; with it, payloads of different steps are never
            published together
        :param leader: the rank that publishes; all ranks must name the same
        :raises ValueError: ``payload`` is too large; the commit is broken, and the other ranks get
            `BrokenBarrierError` with that reason
        :raises TypeError: ``publish`` is not callable, or ``payload`` is no bytes; nothing was
            entered

        **Cancellation and deadlines:** as `execute_barrier` until all have entered. From then on
        only the leader settles the phase. Another rank that stops waiting breaks nothing; its
        deadline raises `BarrierTimeoutError` with ``in_doubt = True``. The leader's own deadline or
        cancellation cancels ``publish`` and breaks the phase.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot commit")

    async def all_gather(
        self,
        payload: bytes,
        *,
        name: str = "",
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
    ) -> tuple[bytes, ...]:
        """Enter with a payload, and get the payloads of all ranks, in rank order, on every rank.

        Use it for small values. Each rank receives the payloads of all. With n ranks that bring b
        bytes each, the store sends n * n * b bytes, and 8 n * n more: 256 KiB for 64 ranks with 56
        bytes, but 4 GiB with 1 MiB each. If one rank decides, use `commit`: there the leader alone
        receives them. Raises what `execute_barrier` raises.

        :param payload: 4 MiB at most, and may be empty
        :raises ValueError: ``payload`` is too large; the phase is broken, and the other ranks get
            `BrokenBarrierError` with that reason
        :raises TypeError: ``payload`` is no bytes; nothing was entered

        **Cancellation:** as `execute_barrier`.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot gather")

    async def abort(self, reason: str, name: str = "", *, step: int | None = None) -> bool:
        """Break this rank's current phase of ``name``, or else its next one without entering.

        Peers get `BrokenBarrierError` with this rank and ``reason``.

        :param step: break the phase of this step instead
        :return: True if this call broke it; False if it was decided before

        **Cancellation:** the break goes on, and reaches the peers if the store can be reached.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot abort")

    def report(self, doing: str) -> None:  # noqa: B027  (nor anybody to tell)
        """Say what this rank is doing, such as ``"uploaded 3 of 8 GB"``. It is not awaited.

        Peers that wait for this rank show the text in reports and errors. A new text is progress
        (``stalled_after_secs``). It returns at once, from any thread, and does no I/O: the text is
        kept until a peer asks. You may call it a thousand times a second.

        :param doing: shown in one line of at most 200 characters
        :raises TypeError: it is no string
        """

    async def aclose(self) -> None:  # noqa: B027  (nor anything to close)
        """Break the phases this rank still awaits, tell the peers that it leaves, and disconnect.

        Peers that wait for this rank, or enter a phase later, get `BrokenBarrierError` at once,
        until it joins again. Idempotent. **Cancellation:** closing goes on without its caller.
        """

    def phase(
        self, name: str = "", *, step: int | None = None, timeout_secs: Timeout = CONFIGURED
    ) -> AbstractAsyncContextManager[None]:
        """Enter the next phase of ``name`` when the body of ``async with`` has succeeded.

        The phase breaks if the body raises, is cancelled, or is left by a generator that is closed.
        Peers get that as the reason, and do not wait for work that will not come. The exception
        goes on.

        :param step: as in `execute_barrier`
        :param timeout_secs: limits the wait after the body; the body itself has no deadline
        """

        async def cross() -> None:
            await self.execute_barrier(name, **_given(step), timeout_secs=timeout_secs)

        return self._body(None, cross, name, step)

    def committing(
        self,
        publish: Publish,
        *,
        name: str = "",
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        leader: int = 0,
    ) -> AbstractAsyncContextManager[Committing]:
        """Do this rank's part in the body of ``async with``, then `commit` it: one crossing. ::

            async with barrier.committing(publish, name="saved", step=step) as part:
                part.payload = await upload()
            part.result  # what publish returned, on every rank

        Nothing is published unless every rank's body has succeeded. The commit breaks if a body
        raises, is cancelled, or is left by a generator that is closed. Peers get that as the
        reason, and the exception goes on. The same holds for a payload that is too large or no
        bytes: it raises ValueError or TypeError here, after the body. Other errors are those of
        `commit`. A wrong argument is refused before the body runs.

        :param publish: as in `commit`, and so are ``name``, ``step`` and ``leader``
        :param timeout_secs: limits the wait after the body, and publishing; the body itself has no
            deadline

        **Cancellation:** in the body, it breaks the commit for all ranks; after it, as `commit`.
        """
        check_publish(publish)
        part = Committing()

        async def cross() -> None:
            brought = await self._checked(part.payload, name, step, TypeError, ValueError)
            part._result = await self.commit(
                publish,
                payload=brought,
                name=name,
                **_given(step),
                timeout_secs=timeout_secs,
                leader=leader,
            )

        return self._body(part, cross, name, step)

    def _body(
        self, value: T, cross: Callable[[], Awaitable[None]], name: str, step: int | None
    ) -> Body[T]:
        return Body(
            value,
            cross,
            lambda reason: self._fail(reason, name, step),
            lambda reason: self._fail_soon(reason, name, step),
        )

    async def _checked(
        self, payload: bytes, name: str, step: int | None, *breaking: type[Exception]
    ) -> bytes:
        """What this rank brings; one that is wrong in a ``breaking`` way breaks the phase.

        How large a payload is depends on a rank's data, so that its peers may be waiting already.
        """
        try:
            return checked_blob("payload", payload)
        except breaking as exc:
            await tell(exc, lambda reason: self._fail(reason, name, step))
            raise

    async def _fail(self, reason: str, name: str, step: int | None = None) -> None:
        """Use up this rank's next turn of ``name`` by breaking it."""
        # The body's own exception is on its way; a barrier that cannot abort must not hide it.
        with contextlib.suppress(NotImplementedError):
            await self.abort(reason, name, **_given(step))

    def _fail_soon(  # noqa: B027  (one that cannot abort has nothing to do)
        self, reason: str, name: str, step: int | None = None
    ) -> None:
        """As `_fail`, where nothing can be awaited."""

    async def _leave(self, reason: str) -> None:
        """Close, and tell peers why."""
        await self.aclose()

    async def __aenter__(self: BarrierT) -> BarrierT:
        try:
            await self.connect()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None or isinstance(exc, GeneratorExit):
            await self.aclose()
        else:
            await self._leave(f"it closed its barrier: {reason_of(exc)}")


def _given(step: int | None) -> dict[str, Any]:
    # A barrier that a user wrote need not know of steps.
    return {} if step is None else {"step": step}


def check_timeout(what: str, value: float | None) -> float | None:
    """Refuse what is no positive, finite number of seconds; None means none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number of seconds or None, not {value!r}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{what} is {value}; it must be positive and finite, or None")
    return float(value)


def check_call_timeout(value: float | None) -> float | None:
    """As `check_timeout`, for one call: 0 is what is decided now."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
        return 0.0
    return check_timeout("timeout_secs", value)


def check_step(step: int | None) -> int | None:
    """Refuse what is no step."""
    if step is None:
        return None
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an integer or None, not {step!r}")
    if not 0 <= step < 1 << 63:
        raise ValueError(f"step is {step}; it must be 0 or more")
    return step


def check_publish(publish: object) -> None:
    """Refuse what cannot publish, before anything is entered."""
    if not callable(publish):
        raise TypeError(
            f"publish must be a function or a coroutine function, not {type(publish).__name__}"
        )


def check_world(rank: int, world_size: int) -> None:
    """Refuse a rank outside its world."""
    for what, value in (("rank", rank), ("world size", world_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{what} must be an integer, not {value!r}")
    if world_size < 1:
        raise ValueError(f"world size is {world_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank {rank} is outside the world; with {world_size} ranks it must be "
            f"0 to {world_size - 1}"
        )


def checked_blob(what: str, value: bytes | None) -> bytes:
    """Refuse what is no bytes or too many of them; None stands for none."""
    if value is None:
        return b""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"{what} must be bytes, not {type(value).__name__}")
    # The len() of a memoryview counts its items, which may be wider than a byte.
    size = memoryview(value).nbytes
    if size > MAX_PAYLOAD_BYTES:
        raise ValueError(f"{what} has {size} bytes; at most {MAX_PAYLOAD_BYTES} are allowed")
    return bytes(value)
