"""An event loop in a thread of ours, for callers that cannot await.

It does not use anyio's blocking portal. The thread of that is no daemon, so a call that never
returns would keep the interpreter from exiting, and it cannot handle an interrupted caller.

A signal handler may raise in a calling thread at any instruction, also inside Python's own Event,
whose lock then stays taken. So there is no lock that a caller could leave taken: it appends to a
deque, wakes the loop, and waits for a queue that is written in C. The loop's thread does the rest.
"""

from __future__ import annotations

import math
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import anyio

from ._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    caused,
    of_another_process,
    out_of_threads,
    told_by,
)
from ._pending import CANCELLED_SECS, Call, Pending
from ._store.event_loop import Loop, Waiter
from ._store.loops import loop_here
from ._store.worker import Promise, end_at_exit, in_own_thread

T = TypeVar("T")

# Closing has a bound of its own, unless a user's coroutine blocks the loop.
_CLOSED_SECS = 10.0


class Portal:
    """Makes calls on an event loop of its own, which starts with the first; thread-safe.

    :param name: what messages call it
    :param last: the last call of all, when it is closed
    """

    def __init__(self, name: Callable[[], str], last: Callable[[], Awaitable[object]]) -> None:
        self._name = name
        self._last = last
        self._patience_secs: float | None = None
        self._process = os.getpid()
        self._closing = False
        self._inbox: deque[Call[Any]] = deque()
        # The threads that were started for it. Several callers may have come at once, or been
        # interrupted as they started one; the first here works, and the others end.
        self._threads: list[int] = []
        self._ended: Promise[None] = Promise()
        # Only the thread changes these.
        self._thread: int | None = None
        self._loop: Loop | None = None
        self._waiter: Waiter
        self._calls: set[Call[Any]] = set()

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Make a call, and block until it has ended.

        An exception that is raised in the waiting thread, such as a KeyboardInterrupt, cancels
        the call; the exception goes on when that has taken effect, or after 0.9 s.

        :raises BarrierClosedError: it is closed
        :raises BarrierError: this process was forked from the one it belongs to
        :raises RuntimeError: this is the loop's own thread, which would wait for itself
        """
        self._check_process()
        if threading.get_ident() == self._thread:
            raise RuntimeError(
                f"{self._name()} cannot be waited for on its own event loop; await its barrier"
            )
        call = Call(function)
        ticket = _Ticket(self, call)
        try:
            self._submit(call)
            call.promise.wait(None)
            return call.promise.result()
        except BaseException:
            if not call.promise.done():
                self.cancel(call)
                call.promise.wait(CANCELLED_SECS)
            raise
        finally:
            # Its error has a traceback that leads here.
            del call, ticket

    def start(self, function: Callable[[], Awaitable[T]]) -> Pending[T]:
        """Make a call without waiting for it; raises what `call` raises."""
        return self.begin(Call(function))

    def begin(self, call: Call[T]) -> Pending[T]:
        """As `start`; the caller may `cancel` the call, also if this was interrupted."""
        self._check_process()
        future = Pending(partial(self.cancel, call), call.promise, lambda: self._thread)
        try:
            self._submit(call)
            return future
        except BaseException:
            self.cancel(call)
            raise

    def close(self, last: Callable[[], Awaitable[object]] | None = None) -> None:
        """Make the last call, block until it has ended, and end the loop and its thread.

        An exception in the waiting thread ends the waiting, not the closing.

        :param last: in place of the last call that was given first
        """
        try:
            if not self._foreign:
                self._last = last or self._last
                self._closing = True
                self._rouse()
                if threading.get_ident() != self._thread:
                    self._ended.wait(_CLOSED_SECS)
                    if self._ended.done():
                        self._ended.result()
        finally:
            # Also if this thread was interrupted.
            self.retire()

    def retire(self) -> None:
        """Close without waiting for it; if no call was made, make no last one."""
        if not self._foreign:
            self._closing = True
            if self._threads:
                self._rouse()

    @property
    def ended(self) -> Promise[None]:
        """Settled when it was closed, and its loop has ended."""
        return self._ended

    def end(self, deadline: float) -> None:
        """Leave before the interpreter does; see `worker.end_at_exit`."""
        # Half of it, as the rest of the last call has to end as well.
        self._patience_secs = max(0.0, deadline - time.monotonic()) / 2
        self.retire()
        if self._threads and not self._foreign:
            self._ended.wait(deadline - time.monotonic())

    @property
    def _foreign(self) -> bool:
        """Whether this process was forked from the one it belongs to."""
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self._foreign:
            raise of_another_process(self._name(), self._process)

    def _submit(self, call: Call[Any]) -> None:
        if self._closing:
            raise self._closed()
        self._inbox.append(call)
        self._rouse()

    def _rouse(self) -> None:
        """Have the loop look for calls, and start its thread if there is none.

        The loop, or else a thread that ends, sees what was appended before this.
        """
        loop = self._loop
        if loop is not None:
            loop.post(self._waiter.wake)
        elif self._ended.done():
            self._refuse(self._closed)
        elif not self._threads:
            self._begin()

    def _begin(self) -> None:
        try:
            in_own_thread("loop", self._run)
        except RuntimeError as exc:
            raise BarrierConnectionError(
                f"no thread can be started for {self._name()} {out_of_threads(exc)}"
            ) from exc

    def cancel(self, call: Call[Any]) -> None:
        """Cancel the call, or prevent it if it has not begun; then it is settled."""
        try:
            self._inbox.remove(call)
        except ValueError:
            if (loop := self._loop) is not None:
                loop.post(partial(self._stop, call))
                return
        call.promise.settle(error=CancelledError())

    # -- in the thread -----------------------------------------------------------------

    def _run(self) -> None:
        thread = threading.get_ident()
        self._threads.append(thread)
        if self._threads[0] != thread:
            return
        end_at_exit(self, first=True)
        self._thread = thread
        failure: BaseException | None = None
        try:
            _probe_loop()
            failed = anyio.run(self._main)
        except BaseException as exc:
            failure = exc
        self._loop = self._thread = None
        if failure is None:
            self._ended.settle(error=failed)
            self._refuse(self._closed)
        else:
            # The next call tries anew, in another thread.
            self._threads.clear()
            self._refuse(partial(self._lost, failure))
            if self._closing:
                self._ended.settle(error=self._lost(failure))

    async def _main(self) -> BaseException | None:
        """Serve until it is closed; return what the last call raised."""
        failure: BaseException | None = None
        loop = loop_here(None)
        self._waiter = loop.waiter()
        self._loop = loop
        async with anyio.create_task_group() as calls:
            while not self._closing:
                # Popped at once: a thread that appends looks for the loop after that.
                with suppress(IndexError):
                    while True:
                        call = self._inbox.popleft()
                        self._calls.add(call)
                        calls.start_soon(self._make, call)
                        del call
                await self._waiter.wait(math.inf)
            try:
                with anyio.move_on_after(self._patience_secs):
                    await self._last()
            except Exception as exc:
                failure = exc
            # The calls that the last call did not end.
            calls.cancel_scope.cancel()
        return failure

    async def _make(self, call: Call[Any]) -> None:
        # Here it would cancel all other calls.
        with suppress(anyio.get_cancelled_exc_class()):
            await call.make()
        if not self._closing:
            call.promise.settle(error=CancelledError())
        if call.promise.done():
            self._calls.discard(call)

    def _stop(self, call: Call[Any]) -> None:
        if call in self._calls:
            call.cancel()
        else:
            call.promise.settle(error=CancelledError())

    def _refuse(self, error: Callable[[], BaseException]) -> None:
        """Fail the calls that have not begun, or have not ended."""
        for calls in (self._inbox, self._calls):
            with suppress(IndexError, KeyError):
                while True:
                    calls.pop().promise.settle(error=error())

    def _closed(self) -> BarrierClosedError:
        return BarrierClosedError(self._name())

    def _lost(self, cause: BaseException) -> BarrierConnectionError:
        return caused(cause, f"no event loop can be started for {self._name()} ({told_by(cause)})")


class _Ticket:
    """Held by a thread that waits for a call. When the ticket is dropped, so is the call."""

    def __init__(self, portal: Portal, call: Call[Any]) -> None:
        self._portal = portal
        self._call = call

    def __del__(self) -> None:
        if not self._call.promise.done():
            self._portal.cancel(self._call)


def _probe_loop() -> None:
    # An object that asyncio could only half make would complain of it on stderr.
    with selectors.DefaultSelector():
        for end in socket.socketpair():
            end.close()
