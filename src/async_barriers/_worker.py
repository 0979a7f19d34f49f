"""Threads for blocking calls: the only home of threads in this library.

A worker is one daemon thread that makes blocking calls one after another. Daemon, so that
a call that never returns (c10d in a silent partition) does not keep the process alive; ended
before the interpreter finalises (see `_at_exit`), since a daemon thread that returns from
C++ into a finalising interpreter takes the process down with SIGABRT.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

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
        self._queue: SimpleQueue[Callable[[], Callable[[], object] | None] | None] = SimpleQueue()
        self.ended: Promise[None] = Promise()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._retired = False

    def submit(self, call: Callable[[], T], promise: Promise[T] | None = None) -> Promise[T]:
        """Queue ``call`` for the thread; the promise is settled by what it returns or raises.

        :param promise: the one to settle, unless it was before; a new one if none is given
        :raises RuntimeError: the thread was retired
        """
        told: Promise[T] = promise or Promise()
        self.post(lambda: _settle_by(told, call))
        return told

    def post(self, call: Callable[[], Callable[[], object] | None]) -> None:
        """Queue ``call``, which must not raise, for the thread.

        What it returns is called last, when this thread has nothing else to do: it may wake an
        event loop, and until this thread lets go of the interpreter, that could not run.

        :raises RuntimeError: the thread was retired
        """
        with self._lock:
            if self._retired:
                raise RuntimeError("this thread is retired")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_work,
                    args=(self._queue, self.ended),
                    name=f"async_barriers-{next(_numbers)}",
                    daemon=True,
                )
                _starter.start(self._thread)
            self._queue.put(call)

    def join(self, timeout_secs: float) -> None:
        """Block until the thread is gone, which it is microseconds after `ended`."""
        if self._thread is not None:
            self._thread.join(timeout_secs)

    def retire(self, last: Callable[[], None]) -> None:
        """End the thread after the calls already submitted and ``last``; `ended` tells when."""
        with self._lock:
            self._retired = True
            if self._thread is None:
                self.ended.settle()
            else:
                self._queue.put(last)
                self._queue.put(None)


def _work(
    queue: SimpleQueue[Callable[[], Callable[[], object] | None] | None], ended: Promise[None]
) -> None:
    while (call := queue.get()) is not None:
        last = call()
        # An idle thread must not keep the last call's objects alive.
        del call
        if last is not None:
            last()
        del last
    ended.settle()


def _settle_by(promise: Promise[T], call: Callable[[], T]) -> Callable[[], object]:
    try:
        promise.tell(call())
    except BaseException as exc:
        promise.tell(error=exc)
    return promise.wake


class Promise(Generic[T]):
    """What a thread will tell, at a third of a Future's cost: every crossing has one.

    It has no lock. The first one to append has told; and of a thread that tells and one that
    asks to be woken, whichever comes second sees what the other did.
    """

    __slots__ = ("_told", "_wakes")

    def __init__(self) -> None:
        self._told: list[tuple[Any, BaseException | None]] = []
        self._wakes: list[Callable[[], object]] = []

    def done(self) -> bool:
        return bool(self._told)

    def result(self, within_secs: float | None = 0.0) -> T:
        """What was told; raises it if it is an error. Blocks this thread, if it is not settled.

        :param within_secs: how long it may block; None for as long as it takes
        :raises TimeoutError: it was not settled ``within_secs``
        """
        if not self._told and not self.wait(within_secs):
            raise TimeoutError(f"nothing was told within {within_secs:g} s")
        result, error = self._told[0]
        if error is not None:
            raise error
        told: T = result
        return told

    def settle(self, result: Any = None, *, error: BaseException | None = None) -> None:
        """Tell, unless that was done, and wake whoever waits for it."""
        self.tell(result, error=error)
        self.wake()

    def tell(self, result: Any = None, *, error: BaseException | None = None) -> None:
        """The first half of `settle`."""
        self._told.append((result, error))

    def wake(self) -> None:
        """The second half of `settle`."""
        wakes = self._wakes
        while wakes:
            try:
                wake = wakes.pop(0)
            except IndexError:
                return  # another thread has called it
            wake()

    def when_settled(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called, in whatever thread, when it is settled or if it is.

        Several are called in their order: what is put back first can be had by who is woken next.
        """
        self._wakes.append(wake)
        if self._told:
            self.wake()

    def wait(self, timeout_secs: float | None) -> bool:
        """Block this thread until it is settled, or for ``timeout_secs``; whether it is."""
        told = threading.Event()
        self.when_settled(told.set)
        return told.wait(None if timeout_secs is None else max(0.0, timeout_secs))


def wait_for_all(promises: Iterable[Promise[Any]], deadline: float) -> None:
    """Block this thread until they are settled, or `time.monotonic` says ``deadline``."""
    for promise in promises:
        promise.wait(deadline - time.monotonic())


def wait_for_ends(
    ended: Sequence[Promise[None]],
    deadline: float,
    abandon: Callable[[], object],
    *,
    patient: bool = True,
) -> None:
    """Block this thread until threads have ended, or `time.monotonic` says ``deadline``.

    :param abandon: makes them end, when they have not by themselves in half of the time
    :param patient: whether they are given that half
    """
    if patient:
        wait_for_all(ended, (deadline + time.monotonic()) / 2)
    abandon()
    wait_for_all(ended, deadline)


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
