"""Waiting on an event loop for what a thread tells."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import sys
import weakref
from asyncio.events import _get_running_loop
from collections.abc import Callable
from typing import TypeVar

import anyio
from anyio.lowlevel import current_token

from ._connection import Connection
from ._dialogue import Hold
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

    def listen(self, connection: Connection) -> Hold | None:
        """How this loop holds a dialogue on ``connection``, if it can."""
        return None


class AsyncioWaiting(Waiting):
    """The same on asyncio, where anyio's event and scope cost as much as a trip to the store.

    One timer serves all that wait. It is not stopped with a wait that ends early, and is there for
    the next one: crossings that take microseconds need it set once in half a minute.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._ears: weakref.WeakKeyDictionary[Connection, Ear] = weakref.WeakKeyDictionary()
        self._deadlines: dict[asyncio.Future[None], float] = {}
        self._rings_at = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def now(self) -> float:
        return self.loop.time()

    async def settled(
        self,
        promise: Promise[T],
        deadline: float = math.inf,
        start: Callable[[], object] | None = None,
    ) -> bool:
        if promise.done():
            return True
        loop = self.loop
        waiter: asyncio.Future[None] = loop.create_future()

        def post() -> None:
            try:
                if _get_running_loop() is loop:
                    _wake(waiter)
                else:
                    loop.call_soon_threadsafe(_wake, waiter)
            except RuntimeError:
                return  # The loop has ended: nobody waits any more.

        if deadline < math.inf:
            self._deadlines[waiter] = deadline
            if deadline < self._rings_at:
                self._set(deadline)
        try:
            promise.when_settled(post)
            if start is not None:
                start()
            await waiter
        finally:
            self._deadlines.pop(waiter, None)
        return promise.done()

    def listen(self, connection: Connection) -> Hold | None:
        try:
            ear = self._ears.get(connection)
            if ear is None:
                ear = self._ears[connection] = Ear(self.loop, connection.overhear())
            ear.listen()
        except (OSError, ValueError, NotImplementedError):
            # No more files can be opened, or the other side hung up, or the loop is one that knows
            # no descriptors.
            return None
        return ear.hold

    def _set(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = deadline
        self._timer = self.loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._rings_at, self._timer = math.inf, None
        now = self.loop.time()
        later = math.inf
        for waiter, deadline in self._deadlines.items():
            if deadline <= now:
                _wake(waiter)
            else:
                later = min(later, deadline)
        if later < math.inf:
            self._set(later)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


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
