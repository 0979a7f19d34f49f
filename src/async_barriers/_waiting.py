"""Waiting on an event loop for what a thread tells."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import sys
from collections.abc import Awaitable, Callable, Generator
from contextvars import Context
from typing import Any, TypeVar

import anyio
from anyio.lowlevel import current_token

from ._worker import Promise

T = TypeVar("T")

# anyio imports the half of it that is made for an event loop when it is first used there, and
# that would hold up the loop for some 30 ms. An anyio that has moved it does so.
for _loops in ("asyncio", "trio"):
    if _loops in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"anyio._backends._{_loops}")


async def outcome(promise: Promise[T]) -> T:
    """Wait for what it tells, without blocking the event loop.

    Cancelling stops the waiting; the call behind it goes on.
    """
    await waiting_here(None).settled(promise)
    return promise.result()


class Waiting:
    """The clock of an event loop, and how to wait there.

    :ivar now: what the loop's clock says, in seconds
    """

    def __init__(self) -> None:
        self.now: Callable[[], float] = anyio.current_time

    def settled(
        self,
        promise: Promise[T],
        deadline: float = math.inf,
        start: Callable[[], object] | None = None,
    ) -> Awaitable[bool]:
        """Wait until ``promise`` is settled, or `now` says ``deadline``.

        True if it is settled. Cancelling stops the waiting; the call behind it goes on.

        :param start: called when all else is ready, to have a thread make the call. The thread
            wakes up within microseconds, and could not run while this one still prepares to wait.
        """
        return _settled(promise, deadline, start)


async def _settled(
    promise: Promise[T], deadline: float, start: Callable[[], object] | None
) -> bool:
    if promise.done():
        return True
    done = anyio.Event()
    on_loop = poster()

    def post() -> None:
        with contextlib.suppress(RuntimeError):
            on_loop(done.set)

    promise.when_settled(post)
    if start is not None:
        start()
    with anyio.CancelScope(deadline=deadline):
        await done.wait()
    return promise.done()


class AsyncioWaiting(Waiting):
    """The same on asyncio, where anyio's event and scope cost as much as a trip to the store.

    One timer serves all that wait. It is not stopped with a wait that ends early, and is there for
    the next one: crossings that take microseconds need it set once in half a minute.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.now = loop.time
        self.deadlines: dict[_Settled, float] = {}
        self._rings_at = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def settled(
        self,
        promise: Promise[T],
        deadline: float = math.inf,
        start: Callable[[], object] | None = None,
    ) -> Awaitable[bool]:
        return _Settled(self, promise, deadline, start)

    def wake_at(self, deadline: float) -> None:
        """Wake those that wait, each at its deadline; this one was added."""
        if deadline < self._rings_at:
            self._set(deadline)

    def _set(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = deadline
        self._timer = self.loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._rings_at, self._timer = math.inf, None
        now = self.loop.time()
        later = math.inf
        for waiter, deadline in self.deadlines.items():
            if deadline <= now:
                waiter.wake()
            else:
                later = min(later, deadline)
        if later < math.inf:
            self._set(later)


class _Settled:
    """What a task of asyncio awaits until a promise is settled, or a deadline is over.

    A future would have the loop run twice: once to set it, and once more for the task that is
    woken by that. This has the task itself run next. It is what asyncio takes for a future (see
    `asyncio.isfuture`), for one task that awaits it once.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_cancelled",
        "_deadline",
        "_promise",
        "_start",
        "_waiting",
        "_wakes",
    )

    def __init__(
        self,
        waiting: AsyncioWaiting,
        promise: Promise[Any],
        deadline: float,
        start: Callable[[], object] | None,
    ) -> None:
        self._asyncio_future_blocking = False
        self._cancelled: tuple[Any, ...] | None = None
        self._waiting = waiting
        self._promise = promise
        self._deadline = deadline
        self._start = start
        # Whoever takes it out wakes the task, on whatever thread; nobody else does.
        self._wakes: list[tuple[Callable[[Any], object], Context | None]] = []

    def __await__(self) -> Generator[_Settled, None, bool]:
        promise, start, waiting = self._promise, self._start, self._waiting
        if start is None and promise.done():
            return True
        try:
            if self._deadline < math.inf:
                waiting.deadlines[self] = self._deadline
                waiting.wake_at(self._deadline)
            if start is not None:
                start()
            self._asyncio_future_blocking = True
            yield self
        finally:
            waiting.deadlines.pop(self, None)
        return promise.done()

    def wake(self) -> None:
        """Have the task go on, once; from any thread."""
        try:
            wake, context = self._wakes.pop()
            self._waiting.loop.call_soon_threadsafe(wake, self, context=context)
        except IndexError:
            return  # It does already.
        except RuntimeError:
            return  # The loop has ended: nobody waits any more.

    # -- what a task calls of it -------------------------------------------------------

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._waiting.loop

    def add_done_callback(
        self, wake: Callable[[Any], object], *, context: Context | None = None
    ) -> None:
        self._wakes.append((wake, context))
        self._promise.when_settled(self.wake)

    def result(self) -> None:
        if self._cancelled is not None:
            # Not kept here: it would know of all frames that it went through.
            raise asyncio.CancelledError(*self._cancelled)

    def cancel(self, msg: Any = None) -> bool:
        if not self._wakes:
            return False
        self._cancelled = () if msg is None else (msg,)
        self.wake()
        return True


def waiting_here(before: Waiting | None) -> Waiting:
    """How to wait on the event loop that runs here; ``before``, if that was for the same one."""
    try:
        # trio may run as a guest inside asyncio's loop, but in none of its tasks.
        loop = None if asyncio.current_task() is None else asyncio.get_running_loop()
    except RuntimeError:
        loop = None
    if loop is None:
        return Waiting()
    if isinstance(before, AsyncioWaiting) and before.loop is loop:
        return before
    return AsyncioWaiting(loop)


def poster() -> Callable[[Callable[[], object]], object]:
    """What schedules a function on the running event loop from any thread."""
    loop = current_token().native_token
    # trio's token has the one, asyncio's loop the other.
    post: Callable[[Callable[[], object]], object] = (
        getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon  # type: ignore[attr-defined]
    )
    return post
