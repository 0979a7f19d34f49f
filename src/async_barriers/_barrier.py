"""`Barrier`: the calls of every barrier."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import ClassVar, TypeVar

from ._bodies import Body, Committing, checked, close
from ._checks import CONFIGURED, Timeout, check_publish, given
from ._reasons import reason_of
from ._values import BarrierResult, BarrierStatistics, CommitRecord

T = TypeVar("T")
BarrierT = TypeVar("BarrierT", bound="Barrier")
Publish = Callable[[Mapping[int, bytes]], Awaitable[bytes | None] | bytes | None]


class Barrier(abc.ABC):
    """Lets the ranks of one training job wait for each other without blocking an event loop.

    One crossing is a *phase*. Its name and its step, or this rank's count of crossings of that
    name, identify it. A phase ends in one verdict, released or broken, the same for all ranks. It
    works on asyncio and trio. A barrier belongs to one event loop at a time.
    """

    barrier_type: ClassVar[str]

    @abc.abstractmethod
    async def execute_barrier(
        self,
        name: str = "",
        *,
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        stalled_after_secs: Timeout = CONFIGURED,
    ) -> BarrierResult:
        """Enter the next phase of ``name`` and wait until every rank has entered.

        :param name: phases of different names are independent
        :param step: 0 or more; the phase is then that of ``name`` and this step. Ranks that come
            for different steps never meet. A step is decided once: a rank that comes for it when it
            or a later one is decided gets `BrokenBarrierError` at once. Without a step, the n-th
            call of a name meets the n-th of the other ranks. That is enough only where all ranks
            call, fail and restart together.
        :param timeout_secs: the deadline in seconds from now; None for no deadline
        :param stalled_after_secs: how many seconds a missing rank may show no progress, as for
            `StoreBarrier`; None for any time. Without it, what the barrier was built with holds
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
        stalled_after_secs: Timeout = CONFIGURED,
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
        stalled_after_secs: Timeout = CONFIGURED,
    ) -> tuple[bytes, ...]:
        """Enter with a payload, and get the payloads of all ranks, in rank order, on every rank.

        Use it for small values. Each rank receives the payloads of all. With n ranks that bring b
        bytes each, the store sends n * n * b bytes, up to 256 bytes each a third more, and 12 n * n
        in addition: 350 KiB for 64 ranks with 56 bytes, but 4 GiB with 1 MiB each. If one rank
        decides, use `commit`: there the leader alone receives them. Raises what `execute_barrier`
        raises.

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

    async def outcome(self, name: str, sequence: int) -> CommitRecord | None:
        """The record of a commit, for a rank that could not learn the verdict (``in_doubt``).

        The store keeps the records of the last 64 released commits of a prefix. None means that no
        leader has said that it published: the commit broke, goes on, or its leader was lost before
        it could say so. It may also be too old. The logger says which, at INFO.

        :param name: the name given at the call
        :param sequence: the step that was given, or else the error's ``sequence``. A count means
            something only to a barrier that took part; a step means the same in any process.
        :raises BarrierConnectionError: no answer within ``timeout_barrier_init_secs``
        :raises BarrierClosedError: the barrier is closed
        :raises NotImplementedError: the barrier is not over a store

        **Cancellation:** nothing is entered and nothing breaks. Asking again is safe.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no records of commits")

    def statistics(self) -> BarrierStatistics:
        """How this rank's phases ended so far, in numbers. It costs nothing, also when closed.

        You may ask from any thread.

        :raises NotImplementedError: the barrier is not over a store
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no statistics")

    async def aclose(self) -> None:  # noqa: B027  (nor anything to close)
        """Break the phases this rank still awaits, tell the peers that it leaves, and disconnect.

        Peers that wait for this rank, or enter a phase later, get `BrokenBarrierError` at once,
        until it joins again. Idempotent. **Cancellation:** closing goes on without its caller.
        """

    def phase(
        self,
        name: str = "",
        *,
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        stalled_after_secs: Timeout = CONFIGURED,
    ) -> AbstractAsyncContextManager[None]:
        """Enter the next phase of ``name`` when the body of ``async with`` has succeeded.

        The phase breaks if the body raises, is cancelled, or is left by a generator that is closed.
        Peers get that as the reason, and do not wait for work that will not come. The exception
        goes on.

        :param step: as in `execute_barrier`
        :param timeout_secs: limits the wait after the body, and so does ``stalled_after_secs``; the
            body itself has no deadline
        """
        self._check_body(name, step, timeout_secs, stalled_after_secs)
        options = given(step, stalled_after_secs)
        cross = partial(self.execute_barrier, name, timeout_secs=timeout_secs, **options)
        return self._body(Body(None, cross, self, name, step), name)

    def committing(
        self,
        publish: Publish,
        *,
        name: str = "",
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        stalled_after_secs: Timeout = CONFIGURED,
        leader: int = 0,
    ) -> AbstractAsyncContextManager[Committing]:
        """Do this rank's part in the body of ``async with``, then `commit` it: one crossing. ::

            async with barrier.committing(publish, name="saved", step=step) as part:
                part.payload = await upload()
            part.result  # what publish returned

        Nothing is published unless every rank's body has succeeded. The commit breaks if a body
        raises, is cancelled, or is left by a generator that is closed. Peers get that as the
        reason, and the exception goes on. The same holds for a payload that is too large or no
        bytes: it raises ValueError or TypeError here, after the body. Other errors are those of
        `commit`. A wrong argument is refused before the body runs.

        :param publish: as in `commit`, and so are ``name``, ``step`` and ``leader``
        :param timeout_secs: limits the wait after the body, and publishing; the body itself has no
            deadline
        :param stalled_after_secs: limits the wait after the body

        **Cancellation:** in the body, it breaks the commit for all ranks; after it, as `commit`.
        """
        self._check_body(name, step, timeout_secs, stalled_after_secs, leader)
        check_publish(publish)
        part = Committing()

        async def cross() -> None:
            brought = await checked(self, part.payload, name, step, TypeError, ValueError)
            call = partial(self.commit, publish, payload=brought, name=name, leader=leader)
            part._result = await call(timeout_secs=timeout_secs, **given(step, stalled_after_secs))

        return self._body(Body(part, cross, self, name, step), name)

    def _check_body(  # noqa: B027  (a barrier may find it out when it is called)
        self,
        name: str,
        step: int | None,
        timeout_secs: Timeout,
        stalled_after_secs: Timeout,
        leader: int = 0,
    ) -> None:
        """Refuse wrong arguments before the body of a call runs, not after."""

    def _body(self, body: Body[T], name: str) -> AbstractAsyncContextManager[T]:
        return body  # A recorded barrier draws it.

    async def _fail(self, reason: str, name: str, step: int | None = None) -> None:
        """Use up this rank's next turn of ``name`` by breaking it."""
        # The body raises its own exception; a barrier that cannot abort must not hide it.
        with contextlib.suppress(NotImplementedError):
            await self.abort(reason, name, **given(step))

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
        except BaseException as exc:
            await close(self.aclose(), exc)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None or isinstance(exc, GeneratorExit):
            await close(self.aclose(), exc)
        else:
            await self._leave(f"it closed its barrier: {reason_of(exc)}")
