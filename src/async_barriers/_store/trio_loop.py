"""The event loop of trio."""

from __future__ import annotations

import contextlib
import logging
import math
import selectors
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from .asyncio_loop import asyncio_loop
from .event_loop import Callback, Timer
from .selector_loop import SelectorLoop

logger = logging.getLogger(__name__)


class TrioLoop(SelectorLoop):
    """trio, through one system task, which outlives its callers and ends with the loop.

    It waits for all sockets and timers. To spawn or cancel a task for each would be simpler. But if
    an exception of a signal handler comes amid that, trio keeps a task that it never runs again,
    and waits for it without end.

    :cvar of_run: the loop of each run of trio
    """

    of_run: ClassVar[dict[Any, TrioLoop]] = {}

    def __init__(self) -> None:
        import trio

        super().__init__(selectors.DefaultSelector())
        self.trio: Any = trio
        self.can_be_cancelled = lambda _: trio.lowlevel.Abort.SUCCEEDED
        self._token = trio.lowlevel.current_trio_token()
        self.ended = False
        self._thread = threading.get_ident()
        self._ends: list[Callback] = []
        # The clock's own method, which saves a call.
        self.now: Callable[[], float] = trio.lowlevel.current_clock().current_time
        # Around the task's wait; its deadline is the time for which the task is set.
        self._wait: Any = trio.CancelScope()
        self.rings_at = -math.inf
        trio.lowlevel.spawn_system_task(self._serve)
        self.of_run[self._token] = self

    @property
    def elsewhere(self) -> bool:
        return not self.ended and threading.get_ident() != self._thread

    def here(self) -> bool:
        if self.ended or asyncio_loop() is not None:
            return False
        try:
            return self.trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:
            return False

    def call_at(self, when: float, callback: Callback) -> Timer:
        timer = super().call_at(when, callback)
        self.ring_at(when)
        return timer

    def ring_at(self, when: float) -> None:
        """See to it that what is due ``when`` rings then."""
        if when < self.rings_at:
            if self.elsewhere:
                self.post(lambda: self.ring_at(when))
                return
            self._wait.deadline = when
            self.rings_at = when

    async def _serve(self) -> None:
        try:
            while True:
                try:
                    # Within it, since a handler may raise as a loop begins anew.
                    while True:
                        await self._serve_until_due()
                except (self.trio.Cancelled, GeneratorExit):
                    raise
                except BaseException as exc:
                    # A handler may have raised before the scope was left, which then still cancels.
                    with contextlib.suppress(RuntimeError):
                        self._wait.__exit__(None, None, None)
                    self._hand_over(exc)
                    # trio may still take this task for one that waits.
                    with contextlib.suppress(self.trio.ClosedResourceError):
                        self.trio.lowlevel.notify_closing(self._selector)
        finally:
            while self._ends:
                self.call(self._ends.pop())
            self.ended = True
            if self.of_run.get(self._token) is self:
                del self.of_run[self._token]
            self.close()

    async def _serve_until_due(self) -> None:
        await self.trio.lowlevel.checkpoint()
        self.serve_due(self.now())
        self.rings_at = self.next_due()
        with self.trio.CancelScope(deadline=self.rings_at) as self._wait:
            while True:
                await self.trio.lowlevel.wait_readable(self._selector)
                self.serve_ready(0)

    def post(self, callback: Callback) -> None:
        with contextlib.suppress(RuntimeError):
            self._token.run_sync_soon(lambda: self.call(callback))

    def call(self, callback: Callback) -> None:
        """Call it, and once more if an exception of a signal handler comes amid that."""
        try:
            try:
                callback()
            except BaseException:
                callback()
                raise
        except BaseException as exc:
            self._hand_over(exc)

    def _hand_over(self, exc: BaseException) -> None:
        """Raise it in a task that waits: it would end all of trio here."""
        for waiter in self.due:
            if isinstance(waiter, TrioWaiter) and waiter.fail(exc):
                return
        logger.exception("a callback failed")

    def waiter(self) -> TrioWaiter:
        return TrioWaiter(self)

    def at_end(self, callback: Callback) -> Callback:
        self._ends.append(callback)
        return lambda: self._ends.remove(callback) if callback in self._ends else None


class TrioWaiter:
    """A task of trio's that waits."""

    __slots__ = ("_loop", "_task", "_woken")

    def __init__(self, loop: TrioLoop) -> None:
        self._loop = loop
        self._task: Any = None
        self._woken = False

    def wake(self) -> None:
        self._woken = True
        if self._loop.elsewhere:
            # As the interpreter ends, another thread may close what a daemon waits for.
            self._loop.post(self._reschedule)
        elif not self._loop.ended:
            self._reschedule()

    def ring(self) -> None:
        if not self._reschedule():
            # A handler's exception left it here. Due for ever, it would keep the sockets waiting.
            self._loop.due.pop(self, None)

    def fail(self, exc: BaseException) -> bool:
        """Raise ``exc`` where it waits, if it does."""
        # trio depends on this module, so it is loaded.
        return self._reschedule(sys.modules["outcome"].Error(exc))

    def _reschedule(self, *outcome: Any) -> bool:
        task = self._task
        # trio takes this mark off as it reschedules a task, which may be done only once.
        if waits := task is not None and task.custom_sleep_data is self:
            self._loop.trio.lowlevel.reschedule(task, *outcome)
        return waits

    async def wait(self, until: float) -> None:
        if self._woken:
            self._woken = False
            return
        loop = self._loop
        loop.due[self] = until
        try:
            loop.ring_at(until)
            self._task = loop.trio.lowlevel.current_task()
            self._task.custom_sleep_data = self
            await loop.trio.lowlevel.wait_task_rescheduled(loop.can_be_cancelled)
        finally:
            self._task = None
            self._woken = False
            loop.due.pop(self, None)


def trio_loop() -> TrioLoop:
    """The loop of the trio that runs here; of all barriers that are used there.

    :raises RuntimeError: none runs
    :raises OSError: no descriptor is left
    """
    import trio

    return TrioLoop.of_run.get(trio.lowlevel.current_trio_token()) or TrioLoop()
