"""The event loop of trio."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
from typing import Any

from .asyncio_loop import asyncio_loop
from .event_loop import Callback, Timer

logger = logging.getLogger(__name__)


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
            logger.exception("a callback failed")

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
