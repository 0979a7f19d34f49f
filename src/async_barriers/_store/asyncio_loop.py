"""The event loops of asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import sys
import threading
from asyncio.events import _get_running_loop
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

from .event_loop import Callback, Timer

# When a timer rings again.
_AGAIN_SECS = 0.2


class AsyncioLoop:
    """asyncio, uvloop, and whatever else has their interface.

    One timer serves all waits. A wait that ends early leaves it running for the next one, so fast
    crossings set it once in half a minute.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        # The loop's own method, which saves a call.
        self.now = loop.time
        self.deadlines: dict[AsyncioWaiter, float] = {}
        self.rings_at = math.inf
        self._timers: tuple[asyncio.TimerHandle, ...] = ()
        self._ends: list[Callback] = []
        self._ending: AsyncGenerator[None, None] | None = None
        self._posted: list[Callback] = []
        self._called: Callback | None = None

    @property
    def ended(self) -> bool:
        return self.loop.is_closed()

    @property
    def elsewhere(self) -> bool:
        return self.loop.is_running() and threading.get_ident() != self._thread

    def here(self) -> bool:
        # trio may run as a guest inside asyncio's loop, but in none of its tasks.
        return _get_running_loop() is self.loop and (
            "trio" not in sys.modules or asyncio.current_task(self.loop) is not None
        )

    def watch_readable(self, sock: socket.socket, callback: Callback) -> None:
        # By number, since asyncio describes an object that it does not know, with two system calls.
        self.loop.add_reader(sock.fileno(), callback)

    def watch_writable(self, sock: socket.socket, callback: Callback) -> None:
        self.loop.add_writer(sock.fileno(), callback)

    def unwatch_writable(self, sock: socket.socket) -> None:
        if not self.ended and sock.fileno() >= 0:
            self.loop.remove_writer(sock.fileno())

    def unwatch(self, sock: socket.socket) -> None:
        self.unwatch_writable(sock)
        if not self.ended and sock.fileno() >= 0:
            self.loop.remove_reader(sock.fileno())

    def call_at(self, when: float, callback: Callback) -> Timer:
        return self.loop.call_at(when, callback)

    def post(self, callback: Callback) -> None:
        self._posted.append(callback)
        # A loop that has ended calls nobody. Posted twice, since a signal handler may raise as the
        # first call begins.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._call_posted)
            self.loop.call_soon_threadsafe(self._call_posted)

    def _call_posted(self) -> None:
        """Call the posted callbacks; one that is interrupted is called once more."""
        posted = self._posted
        while posted:
            callback = posted[0]
            if callback is self._called:
                del posted[0]
                callback()
            else:
                self._called = callback
                callback()
                del posted[0]
            self._called = None

    def waiter(self) -> AsyncioWaiter:
        return AsyncioWaiter(self)

    def at_end(self, callback: Callback) -> Callback:
        self._ends.append(callback)
        if self._ending is None:
            # Before it ends, the loop closes the generators that began on it. It gives no other
            # notice.
            self._ending = self._end()
            with contextlib.suppress(StopIteration):
                self._ending.asend(None).send(None)
        return lambda: self._not_at_end(callback)

    def _not_at_end(self, callback: Callback) -> None:
        if callback in self._ends:
            self._ends.remove(callback)
        if not self._ends and self._ending is not None and not self.ended:
            ending, self._ending = self._ending, None
            with contextlib.suppress(StopIteration, RuntimeError):
                ending.aclose().send(None)

    async def _end(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            while self._ends:
                self._ends.pop()()

    def ring_at(self, deadline: float) -> None:
        """Set the timer, which wakes the tasks whose deadline has come.

        It rings again soon after, since a signal handler may raise as it rings first.
        """
        set_before = self._timers
        self._timers = tuple(
            self.loop.call_at(when, self._ring) for when in (deadline, deadline + _AGAIN_SECS)
        )
        self.rings_at = deadline
        for timer in set_before:
            timer.cancel()

    def _ring(self) -> None:
        now = self.loop.time()
        later = math.inf
        for waiter, deadline in self.deadlines.items():
            if deadline <= now:
                waiter.wake()
            else:
                later = min(later, deadline)
        if later < math.inf:
            self.ring_at(later)
        else:
            self.rings_at = math.inf
            for timer in self._timers:
                timer.cancel()


class AsyncioWaiter:
    """A task of asyncio's that waits, and what it awaits in place of one of asyncio's Futures.

    A Future forgets its callback if a signal handler raises as it is resolved. The task is never
    resumed then, not even to be cancelled. This keeps it until the task runs: in a Future that is
    never resolved, which notes it in C, where no signal handler runs. ``_callbacks`` is asyncio's
    own name for what it noted; it has it for its debug output.
    """

    __slots__ = (
        "_asyncio_future_blocking", "_cancelled", "_loop", "_noted", "_times", "_tried", "_woken",
        "add_done_callback", "remove_done_callback",
    )  # fmt: skip

    def __init__(self, times: AsyncioLoop) -> None:
        self._times = times
        # By this name, asyncio asks for the loop of what a task awaits.
        self._loop = times.loop
        self._noted: Any = None
        self._cancelled: asyncio.CancelledError | None = None
        self._woken = self._tried = self._asyncio_future_blocking = False

    def wake(self) -> None:
        self._woken = True
        if (noted := self._noted) is None or not (callbacks := noted._callbacks):
            return
        resume, context = callbacks[0]
        try:
            if self._tried:
                self._loop.call_soon(self._again, noted, resume, context=context)
            else:
                self._tried = True
                self._loop.call_soon(resume, self, context=context)
        except RuntimeError:
            # A task that is left on a loop that has ended waits no more.
            if not self._loop.is_closed():
                raise

    def _again(self, noted: object, resume: Callable[[AsyncioWaiter], object]) -> None:
        # What was called before comes first: if that was noted, the task does not wait here now.
        if self._noted is noted:
            resume(self)

    async def wait(self, until: float) -> None:
        if self._woken:
            self._woken = False
            return
        times = self._times
        times.deadlines[self] = until
        try:
            if until < times.rings_at:
                times.ring_at(until)
            noted = self._noted = self._loop.create_future()
            self.add_done_callback: Any = noted.add_done_callback
            self.remove_done_callback: Any = noted.remove_done_callback
            await self
        finally:
            self._woken = self._tried = False
            self._noted = self._cancelled = None
            self.add_done_callback = self.remove_done_callback = None
            times.deadlines.pop(self, None)

    # -- as the task sees it -----------------------------------------------------------

    def __await__(self) -> Generator[AsyncioWaiter, None, None]:
        self._asyncio_future_blocking = True
        yield self

    def done(self) -> bool:
        return self._woken

    def cancel(self, msg: object = None) -> bool:
        if self._noted is None:
            return False
        first = not self._woken
        if first:
            self._cancelled = asyncio.CancelledError(*[] if msg is None else [msg])
        self.wake()
        return first

    def result(self) -> None:
        if self._cancelled is not None:
            raise self._cancelled


def asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """The asyncio loop that runs the current task, if there is one."""
    loop = _get_running_loop()
    # trio may run as a guest inside asyncio's loop, but in none of its tasks.
    return loop if loop is not None and asyncio.current_task(loop) is not None else None
