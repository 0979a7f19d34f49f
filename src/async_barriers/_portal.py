"""An event loop in a thread of ours, for callers that cannot await.

anyio's blocking portal is not used: its thread is no daemon, so that one call which never
returns would keep the interpreter from exiting, and it knows no interrupted caller.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError
from typing import Any, Generic, TypeVar

import anyio

from ._waiting import poster
from ._worker import Promise, Worker, end_at_exit

T = TypeVar("T")

# A call that is cancelled undoes what it did, which takes UNDO_SECS at most, and says so.
_CANCELLED_SECS = 0.9
_THREAD_GONE_SECS = 0.5


class PortalClosed(Exception):
    """There is no event loop that could make the call."""


class Portal:
    """Makes calls on an event loop of its own, which starts with the first; thread-safe.

    :param last: the last call of all, when the portal is closed
    """

    def __init__(self, last: Callable[[], Awaitable[object]]) -> None:
        self._last = last
        self._patience_secs: float | None = None
        # Reentrant: a collection of garbage may close a portal wherever a thread is.
        self._lock = threading.RLock()
        self._process: int | None = None
        self._closing = False
        self._calls: set[_Call[Any]] = set()
        self._inbox: deque[_Call[Any]] = deque()
        self._post: Callable[[Callable[[], object]], object] | None = None
        self._roused: anyio.Event
        self._parted: Promise[None] = Promise()
        self._worker = Worker()

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Make a call, and block until it has ended.

        An exception that is raised in the waiting thread, such as a KeyboardInterrupt, cancels
        the call; it goes on when that has taken effect, or after 0.9 s.

        :raises PortalClosed: it is closed, or this process was forked from the one it works in
        """
        call = _Call(function)
        try:
            self._submit(call)
            return call.promise.result(None)
        except BaseException:
            if not call.promise.done() and self._cancel(call):
                call.promise.wait(_CANCELLED_SECS)
            raise
        finally:
            # Its error has a traceback that leads here.
            del call

    def close(self) -> None:
        """Make the last call, block until it has ended, and end the loop and its thread.

        An exception in the waiting thread ends the waiting, not the closing.
        """
        if self._foreign:
            return
        with self._lock:
            if not self._closing:
                self._start()
                self.retire()
        self._parted.result(None)
        self._worker.ended.wait(_THREAD_GONE_SECS)
        self._worker.join(_THREAD_GONE_SECS)

    def retire(self) -> None:
        """Close without waiting for it; where no call was made, make no last one."""
        if self._foreign:
            return
        with self._lock:
            if self._closing:
                return
            self._closing = True
            if self._process is None:
                self._parted.settle()
            self._rouse()
            self._worker.retire(_nothing)

    def end(self, deadline: float) -> None:
        """Leave before the interpreter does; see `_worker.end_at_exit`."""
        # Half of it, as what the last call leaves undone has to end as well.
        self._patience_secs = max(0.0, deadline - time.monotonic()) / 2
        self.retire()
        self._worker.ended.wait(deadline - time.monotonic())

    @property
    def _foreign(self) -> bool:
        """Whether its thread stayed behind in the process that this one was forked from."""
        return self._process not in (None, os.getpid())

    def _submit(self, call: _Call[Any]) -> None:
        if self._foreign:
            raise PortalClosed("its thread is in the process that this one was forked from")
        with self._lock:
            if self._closing:
                raise PortalClosed("its event loop has ended")
            self._start()
            self._calls.add(call)
            self._inbox.append(call)
            self._rouse()

    def _cancel(self, call: _Call[Any]) -> bool:
        """Cancel it, if it was submitted."""
        with self._lock:
            call.unwanted = True
            if self._post is not None:
                self._post(call.cancel)
            return call in self._calls

    def _start(self) -> None:
        if self._process is None:
            self._process = os.getpid()
            self._worker.submit(self._run)
            end_at_exit(self)

    def _rouse(self) -> None:
        """Have the loop look at what there is to do. The lock is held."""
        if self._post is not None:
            self._post(lambda: self._roused.set())

    # -- in the thread -----------------------------------------------------------------

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            anyio.run(self._main)
        except BaseException as exc:
            failure = exc
        with self._lock:
            if not self._closing:
                self._closing = True
                self._worker.retire(_nothing)
            unanswered, self._calls = self._calls, set()
        for promise in [self._parted, *(call.promise for call in unanswered)]:
            promise.settle(error=failure or PortalClosed("its event loop has ended"))

    async def _main(self) -> None:
        async with anyio.create_task_group() as calls:
            while True:
                self._roused = anyio.Event()
                with self._lock:
                    self._post = self._post or poster()
                while self._inbox:
                    calls.start_soon(self._make, self._inbox.popleft())
                if self._closing:
                    break
                await self._roused.wait()
            try:
                with anyio.move_on_after(self._patience_secs):
                    await self._last()
            except Exception as exc:
                self._parted.settle(error=exc)
            finally:
                with self._lock:
                    self._post = None
                # Those that the last call did not end.
                calls.cancel_scope.cancel()
        self._parted.settle()

    async def _make(self, call: _Call[Any]) -> None:
        await call.make()
        with self._lock:
            self._calls.discard(call)


class _Call(Generic[T]):
    """One call, and what came of it."""

    def __init__(self, function: Callable[[], Awaitable[T]]) -> None:
        self.promise: Promise[T] = Promise()
        self.unwanted = False
        self._function = function
        self._scope: anyio.CancelScope | None = None

    async def make(self) -> None:
        with anyio.CancelScope() as self._scope:
            if self.unwanted:
                self._scope.cancel()
            try:
                self.promise.settle(await self._function())
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as exc:
                self.promise.settle(error=exc)
        self.promise.settle(error=CancelledError())

    def cancel(self) -> None:
        """On the loop: cancel it, if it has begun; it sees for itself otherwise."""
        if self._scope is not None:
            self._scope.cancel()


def _nothing() -> None:
    pass
