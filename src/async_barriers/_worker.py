"""Threads for blocking calls: the only home of threads in this library.

A worker is one daemon thread that makes blocking calls one after another. Daemon, so that
a call that never returns (c10d in a silent partition) does not keep the process alive; ended
before the interpreter finalises (see `_at_exit`), since a daemon thread that returns from
C++ into a finalising interpreter takes the process down with SIGABRT.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue
from typing import Any, TypeVar

import anyio
from anyio.lowlevel import current_token

T = TypeVar("T")

_numbers = itertools.count()


class _Starter:
    """Starts threads without waiting for them.

    `Thread.start` returns when the new thread runs, and 64 of them that open connections at
    once let an event loop wait 170 ms for one start. So a thread that lives as long as there
    are threads to start does the waiting.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[threading.Thread] = deque()
        self._running = False

    def start(self, thread: threading.Thread) -> None:
        with self._lock:
            self._pending.append(thread)
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._run, name="async_barriers-starter", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    self._running = False
                    return
                thread = self._pending.popleft()
            thread.start()


_starter = _Starter()


class Worker:
    """One thread, started by the first call; calls run in the order of their submission."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self.ended: Future[None] = Future()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._retired = False

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queue ``call`` for the thread.

        :raises RuntimeError: the thread was retired
        """
        future: Future[T] = Future()
        with self._lock:
            if self._retired:
                raise RuntimeError("this thread is retired")
            self._queue.put((future, call))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_work,
                    args=(self._queue, self.ended),
                    name=f"async_barriers-{next(_numbers)}",
                    daemon=True,
                )
                _starter.start(self._thread)
        return future

    def join(self, timeout_secs: float) -> None:
        """Block until the thread is gone, which it is microseconds after `ended`."""
        if self._thread is not None:
            self._thread.join(timeout_secs)

    def retire(self, last: Callable[[], None]) -> None:
        """End the thread after the calls already submitted and ``last``; `ended` tells when."""
        with self._lock:
            self._retired = True
            if self._thread is None:
                settle(self.ended)
            else:
                self._queue.put((Future(), last))
                self._queue.put(None)


def _work(
    queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None], ended: Future[None]
) -> None:
    while (item := queue.get()) is not None:
        future, call = item
        try:
            result = call()
        except BaseException as exc:
            settle(future, error=exc)
        else:
            settle(future, result)
        # An idle thread must not keep the last call's objects alive.
        del item, future, call
        result = None
    ended.set_result(None)


def settle(future: Future[T], result: Any = None, *, error: BaseException | None = None) -> None:
    """Settle ``future`` unless it is settled."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


async def outcome(future: Future[T]) -> T:
    """Wait for ``future`` without blocking the event loop.

    Cancelling stops the waiting; the call behind the future goes on.
    """
    if not future.done():
        settled = anyio.Event()
        post = poster()

        def wake(_: Future[T]) -> None:
            # The loop may have ended while the call was under way: nobody waits any more.
            with contextlib.suppress(RuntimeError):
                post(settled.set)

        future.add_done_callback(wake)
        await settled.wait()
    return future.result()


def poster() -> Callable[[Callable[[], object]], object]:
    """What schedules a function on the running event loop from any thread."""
    loop = current_token().native_token
    # trio's token has the one, asyncio's loop the other.
    post: Callable[[Callable[[], object]], object] = (
        getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon  # type: ignore[attr-defined]
    )
    return post


_to_end_at_exit: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
# A forked child has none of the threads, and must not end its parent's connections.
os.register_at_fork(after_in_child=_to_end_at_exit.clear)
EXIT_SECS = 1.0


def end_at_exit(owner: Any) -> None:
    """Have ``owner.end(deadline)`` called before the interpreter finalises, the latest first.

    ``deadline`` is on the `time.monotonic` clock. The owner is held weakly.
    """
    _to_end_at_exit[next(_numbers)] = owner


@atexit.register
def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_SECS
    for _, owner in sorted(_to_end_at_exit.items(), reverse=True):
        owner.end(deadline)
