"""The use of an event loop: sockets that are ready, timers, and waiting.

Only this module tells event loops apart. All others get callbacks, or await a `Waiter`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import socket
import sys
import threading
from asyncio.events import _get_running_loop
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

import anyio

# Loaded now, since anyio would load it on its first use: that blocks the loop, and may come when a
# rank gives up, with no descriptor left to read a module.
with contextlib.suppress(ImportError):
    importlib.import_module("anyio._backends._asyncio")

Callback = Callable[[], object]


class Timer(Protocol):
    """Something that will be called, unless it is cancelled."""

    def cancel(self) -> object: ...


class Waiter(Protocol):
    """A task that waits to be woken; for one task at a time."""

    def wake(self) -> None:
        """On the loop: make `wait` return, now or when it is called next."""
        ...

    async def wait(self, until: float) -> None:
        """Wait until it is woken, or until the loop's clock reaches ``until``."""
        ...


class Loop(Protocol):
    """An event loop. Only `post` may be called from other threads."""

    @property
    def ended(self) -> bool: ...

    @property
    def elsewhere(self) -> bool:
        """Whether another thread than this one runs it."""
        ...

    @property
    def lets_go(self) -> bool:
        """Whether another thread may call `unwatch`."""
        ...

    def now(self) -> float: ...
    def here(self) -> bool: ...
    def watch_readable(self, sock: socket.socket, callback: Callback) -> None: ...
    def watch_writable(self, sock: socket.socket, callback: Callback) -> None: ...
    def unwatch_writable(self, sock: socket.socket) -> None: ...
    def unwatch(self, sock: socket.socket) -> None: ...
    def call_at(self, when: float, callback: Callback) -> Timer: ...
    def post(self, callback: Callback) -> None:
        """Call ``callback`` soon; if it raises, call it once more."""
        ...

    def waiter(self) -> Waiter: ...
    def at_end(self, callback: Callback) -> Callback:
        """Call ``callback`` when the loop ends; the result takes that back."""
        ...


# When a timer rings again.
_AGAIN_SECS = 0.2


class AsyncioLoop:
    """asyncio, uvloop, and whatever else has their interface.

    One timer serves all waits. A wait that ends early leaves it running for the next one, so fast
    crossings set it once in half a minute.
    """

    lets_go = True

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
        self._posted: deque[Callback] = deque()
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
                posted.popleft()
                callback()
            else:
                self._called = callback
                callback()
                posted.popleft()
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
    """A task of asyncio's that waits."""

    __slots__ = ("_future", "_loop", "_woken")

    def __init__(self, loop: AsyncioLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] | None = None
        self._woken = False

    def wake(self) -> None:
        self._woken = True
        future = self._future
        if future is not None and not future.done():
            future.set_result(None)

    async def wait(self, until: float) -> None:
        if self._woken:
            self._woken = False
            return
        loop = self._loop
        self._future = loop.loop.create_future()
        loop.deadlines[self] = until
        try:
            if until < loop.rings_at:
                loop.ring_at(until)
            await self._future
        finally:
            self._woken = False
            self._future = None
            loop.deadlines.pop(self, None)


class TrioLoop:
    """trio, through system tasks: they outlive the caller and end with the loop."""

    lets_go = False

    def __init__(self) -> None:
        import trio

        self.trio: Any = trio
        self._token = trio.lowlevel.current_trio_token()
        self.ended = False
        self._thread = threading.get_ident()
        self._scopes: dict[tuple[int, str], Any] = {}
        self._ends: list[Callback] = []
        self._watches_end = False
        self.waiting: dict[TrioWaiter, None] = {}
        self._clock = trio.lowlevel.current_clock()

    @property
    def elsewhere(self) -> bool:
        return not self.ended and threading.get_ident() != self._thread

    def now(self) -> float:
        return float(self._clock.current_time())

    def here(self) -> bool:
        if asyncio_loop() is not None:
            return False
        try:
            return self.trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:
            return False

    def watch_readable(self, sock: socket.socket, callback: Callback) -> None:
        self._watch(sock, "read", self.trio.lowlevel.wait_readable, callback)

    def watch_writable(self, sock: socket.socket, callback: Callback) -> None:
        self._watch(sock, "write", self.trio.lowlevel.wait_writable, callback)

    def unwatch_writable(self, sock: socket.socket) -> None:
        self._unwatch(sock, "write")

    def unwatch(self, sock: socket.socket) -> None:
        self._unwatch(sock, "write")
        self._unwatch(sock, "read")
        if not self.ended and sock.fileno() >= 0:
            self.trio.lowlevel.notify_closing(sock)

    def _unwatch(self, sock: socket.socket, what: str) -> None:
        scope = self._scopes.pop((sock.fileno(), what), None)
        if scope is not None and not self.ended:
            scope.cancel()

    def _watch(self, sock: socket.socket, what: str, ready: Any, callback: Callback) -> None:
        scope = self._scopes[sock.fileno(), what] = self.trio.CancelScope()

        async def watch() -> None:
            with scope:
                while not scope.cancel_called:
                    try:
                        await ready(sock)
                    except (self.trio.ClosedResourceError, self.trio.BusyResourceError, OSError):
                        return
                    if not scope.cancel_called:
                        self._call(callback)

        self.trio.lowlevel.spawn_system_task(watch)

    def call_at(self, when: float, callback: Callback) -> Timer:
        scope = self.trio.CancelScope()

        async def wait() -> None:
            with scope:
                await self.trio.sleep_until(when)
                self._call(callback)

        self.trio.lowlevel.spawn_system_task(wait)
        return scope  # type: ignore[no-any-return]

    def post(self, callback: Callback) -> None:
        with contextlib.suppress(RuntimeError):
            self._token.run_sync_soon(lambda: self._call(callback))

    def _call(self, callback: Callback) -> None:
        """Call it. An exception of a signal handler would end all of trio here, so a task that
        waits gets it, and the callback is called once more."""
        try:
            try:
                callback()
            except BaseException:
                callback()
                raise
        except BaseException as exc:
            for waiter in self.waiting:
                waiter.fail(exc)
                return
            _logger().exception("a callback failed")

    def waiter(self) -> TrioWaiter:
        return TrioWaiter(self)

    def at_end(self, callback: Callback) -> Callback:
        self._ends.append(callback)
        if not self._watches_end:
            self._watches_end = True
            self.trio.lowlevel.spawn_system_task(self._end)
        return lambda: self._ends.remove(callback) if callback in self._ends else None

    async def _end(self) -> None:
        try:
            await self.trio.sleep_forever()
        finally:
            while self._ends:
                self._call(self._ends.pop())
            self.ended = True


class TrioWaiter:
    """A task of trio's that waits."""

    __slots__ = ("_loop", "_task", "_trio", "_woken")

    def __init__(self, loop: TrioLoop) -> None:
        self._loop = loop
        self._trio = loop.trio
        self._task: Any = None
        self._woken = False

    def wake(self) -> None:
        task, self._task = self._task, None
        if task is None:
            self._woken = True
        else:
            self._trio.lowlevel.reschedule(task)

    def fail(self, exc: BaseException) -> None:
        """Raise ``exc`` where it waits."""
        task, self._task = self._task, None
        if task is not None:
            # trio depends on this module, so it is loaded.
            outcome = sys.modules["outcome"]
            self._trio.lowlevel.reschedule(task, outcome.Error(exc))

    async def wait(self, until: float) -> None:
        if self._woken:
            self._woken = False
            return
        lowlevel = self._trio.lowlevel

        def abort(_: Any) -> Any:
            self._task = None
            return lowlevel.Abort.SUCCEEDED

        with self._trio.CancelScope(deadline=until):
            try:
                self._task = lowlevel.current_task()
                self._loop.waiting[self] = None
                await lowlevel.wait_task_rescheduled(abort)
            finally:
                self._task = None
                self._loop.waiting.pop(self, None)


def _logger() -> Any:
    import logging

    return logging.getLogger(__name__)


def asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """The asyncio loop that runs the current task, if there is one."""
    loop = _get_running_loop()
    # trio may run as a guest inside asyncio's loop, but in none of its tasks.
    return loop if loop is not None and asyncio.current_task(loop) is not None else None


def loop_here(before: Loop | None) -> Loop:
    """The event loop that runs here; ``before``, if that is the same one.

    :raises RuntimeError: there is none
    """
    if before is not None and before.here():
        return before
    here: Loop | None = None
    if (loop := asyncio_loop()) is not None:
        here = AsyncioLoop(loop)
    elif "trio" in sys.modules:
        here = TrioLoop()
    if here is not None:
        # Makes anyio load its module for trio; see the top of this module.
        anyio.get_cancelled_exc_class()
        return here
    raise RuntimeError("no event loop runs here: await this in a task of asyncio or trio")
