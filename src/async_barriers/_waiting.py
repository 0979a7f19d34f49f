"""Waiting on an event loop for what a thread tells."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import sys
from asyncio.events import _get_running_loop
from collections.abc import Callable
from typing import TypeVar

import anyio
from anyio.lowlevel import current_token

from ._connection import Connection
from ._ear import Ear
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
    """The clock of an event loop, and how to wait there."""

    def now(self) -> float:
        """What the loop's clock says, in seconds."""
        return anyio.current_time()

    def here(self) -> bool:
        """Whether it is for the event loop that runs here."""
        return _asyncio_loop() is None

    async def settled(
        self,
        promise: Promise[T],
        deadline: float = math.inf,
        start: Callable[[], object] | None = None,
    ) -> bool:
        """Wait until ``promise`` is settled, or `now` says ``deadline``.

        True if it is settled. Cancelling stops the waiting; the call behind it goes on.

        :param start: called when all else is ready, to have a thread make the call. The thread
            wakes up within microseconds, and could not run while this one still prepares to wait.
        """
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

    def listen(self, connection: Connection) -> Ear | None:
        """How this loop listens to ``connection``, if it can."""
        return None

    def waiter(self, deadline: float) -> Waiter:
        """Who is woken when it is told, or `now` says ``deadline``; where it can `listen`.

        It has to `leave` when it is done.
        """
        raise NotImplementedError


class Waiter:
    """A task of an asyncio event loop that waits to be woken, until a deadline at most.

    :ivar woken: what it awaits
    """

    def __init__(self, waiting: AsyncioWaiting, deadline: float) -> None:
        self.woken: asyncio.Future[None] = waiting.loop.create_future()
        self._waiting = waiting
        waiting.deadlines[self] = deadline
        if deadline < waiting.rings_at:
            waiting.ring_at(deadline)

    def tell(self) -> None:
        """From any thread: wake it."""
        loop = self._waiting.loop
        try:
            if _get_running_loop() is loop:
                self.wake()
            else:
                loop.call_soon_threadsafe(self.wake)
        except RuntimeError:
            return  # The loop has ended: nobody waits any more.

    def wake(self) -> None:
        """On the loop: wake it."""
        if not self.woken.done():
            self.woken.set_result(None)

    def leave(self) -> None:
        """It waits no more."""
        del self._waiting.deadlines[self]


class AsyncioWaiting(Waiting):
    """The same on asyncio, where anyio's event and scope cost as much as a trip to the store.

    One timer serves all that wait. It is not stopped with a wait that ends early, and is there for
    the next one: crossings that take microseconds need it set once in half a minute.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        # Without a frame in between.
        self.now = loop.time  # type: ignore[method-assign]
        self.deadlines: dict[Waiter, float] = {}
        self.rings_at: float = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def here(self) -> bool:
        return _asyncio_loop() is self.loop

    async def settled(
        self,
        promise: Promise[T],
        deadline: float = math.inf,
        start: Callable[[], object] | None = None,
    ) -> bool:
        if promise.done():
            return True
        waiter = self.waiter(deadline)
        try:
            promise.when_settled(waiter.tell)
            if start is not None:
                start()
            await waiter.woken
        finally:
            waiter.leave()
        return promise.done()

    def listen(self, connection: Connection) -> Ear | None:
        return Ear(self.loop, connection)

    def waiter(self, deadline: float) -> Waiter:
        return Waiter(self, deadline)

    def ring_at(self, deadline: float) -> None:
        """Set the timer, which wakes those whose deadline it is."""
        if self._timer is not None:
            self._timer.cancel()
        self.rings_at = deadline
        self._timer = self.loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self.rings_at, self._timer = math.inf, None
        now = self.loop.time()
        later = math.inf
        for waiter, deadline in self.deadlines.items():
            if deadline <= now:
                waiter.wake()
            else:
                later = min(later, deadline)
        if later < math.inf:
            self.ring_at(later)


def _asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs a task here, if that is one of asyncio's."""
    loop = _get_running_loop()
    # trio may run as a guest inside asyncio's loop, but in none of its tasks.
    return loop if loop is not None and asyncio.current_task(loop) is not None else None


def waiting_here(before: Waiting | None) -> Waiting:
    """How to wait on the event loop that runs here; ``before``, if that was for the same one."""
    if before is not None and before.here():
        return before
    loop = _asyncio_loop()
    return Waiting() if loop is None else AsyncioWaiting(loop)


def poster() -> Callable[[Callable[[], object]], object]:
    """What schedules a function on the running event loop from any thread."""
    loop = current_token().native_token
    # trio's token has the one, asyncio's loop the other.
    post: Callable[[Callable[[], object]], object] = (
        getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon  # type: ignore[attr-defined]
    )
    return post
