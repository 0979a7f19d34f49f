"""Calls that another thread makes, and their results."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from operator import attrgetter
from typing import Generic, TypeVar

import anyio

from ._store.worker import Promise

T = TypeVar("T")

# A cancelled call gives up its phase, which takes UNDO_SECS at most, and then ends.
CANCELLED_SECS = 0.9


class Call(Generic[T]):
    """One call, and its result."""

    def __init__(self, function: Callable[[], Awaitable[T]]) -> None:
        self.promise: Promise[T] = Promise()
        self._function = function
        self._scope: anyio.CancelScope | None = None
        self._cancelled = False

    async def make(self) -> None:
        with anyio.CancelScope() as self._scope:
            if self._cancelled:
                return
            try:
                awaitable = self._function()
                if not inspect.isawaitable(awaitable):
                    raise TypeError(f"a coroutine function is needed; this one gave {awaitable!r}")
                self.promise.settle(await awaitable)
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as exc:
                self.promise.settle(error=exc)

    def cancel(self) -> None:
        self._cancelled = True
        if self._scope is not None:
            self._scope.cancel()


class _Condition(threading.Condition):
    """A condition whose lock is taken and released in C, where no signal handler runs between."""

    __enter__ = property(attrgetter("_lock.__enter__"))
    __exit__ = property(attrgetter("_lock.__exit__"))


class Pending(Future[T]):
    """The result of a call, for a thread that goes on meanwhile.

    The loop's thread takes its lock, too, so a thread that was interrupted must not keep it.

    :param stop: cancels the call
    :param thread: the thread that makes it
    """

    def __init__(
        self, stop: Callable[[], object], promise: Promise[T], thread: Callable[[], int | None]
    ) -> None:
        super().__init__()
        self._condition = _Condition()
        self._stop = stop
        self._promise = promise
        self._thread = thread
        promise.when_settled(self._take)

    def cancel(self) -> bool:
        """Cancel the call unless it has ended; return whether it was cancelled.

        It waits until the peers were told, a second at most: they cannot be released after it.
        """
        if not self.done():
            self._stop()
            if self._thread() != threading.get_ident():
                self._promise.wait(CANCELLED_SECS)
        return super().cancel()

    def _take(self) -> None:
        # Not by raising the error: a signal handler's, raised here, is not that of the call.
        result, error = self._promise._told[0]
        if isinstance(error, CancelledError):
            super().cancel()
        if self.set_running_or_notify_cancel():
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)
