"""Threads for blocking calls: the only home of threads in this library.

A worker is one daemon thread that makes blocking calls one after another. It is a daemon so that a
call that never returns (c10d in a silent partition) does not keep the process alive. Before the
interpreter finalises, `_at_exit` waits for it, with a bound, also if its owner has given it up: a
daemon thread that returns from C++ into a finalising interpreter ends the process with SIGABRT.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from multiprocessing import util as multiprocessing_util
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_numbers = itertools.count()
EXIT_SECS = 1.0
# Beyond that, for threads that are about to return, and for those that may be.
_RETURNS_SECS, _HANGS_SECS = 0.3, 0.05


class Promise(Generic[T]):
    """The later result of a thread; thread-safe.

    It has no lock of its own, but a list's methods exclude each other, without a GIL by the list's
    own lock. The first to append has settled it. A thread that settles and one that asks to be
    woken meet at the list of those to wake: the second one sees what the first one did.
    """

    __slots__ = ("_told", "_wakes")

    def __init__(self) -> None:
        self._told: list[tuple[Any, BaseException | None]] = []
        self._wakes: list[Callable[[], object]] = []

    def done(self) -> bool:
        return bool(self._told)

    def result(self, within_secs: float | None = 0.0) -> T:
        """The result; raises it if it is an error. Blocks this thread until it is settled.

        :param within_secs: how long it may block; None for any time
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
        """Set the result, unless there is one, and wake all that wait for it."""
        self._told.append((result, error))
        self._wake()

    def when_settled(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called, in any thread, when it is settled, or now if it is."""
        self._wakes.append(wake)
        if self._told:
            self._wake()

    def wait(self, timeout_secs: float | None) -> bool:
        """Block this thread until it is settled, or for ``timeout_secs``; return whether it is."""
        if not self._told:
            # Written in C. Python's own Event keeps its lock if a signal handler raises in it.
            told: SimpleQueue[None] = SimpleQueue()
            wake = partial(told.put, None)
            self.when_settled(wake)
            with contextlib.suppress(Empty):
                told.get(timeout=None if timeout_secs is None else max(0.0, timeout_secs))
            with contextlib.suppress(ValueError):
                self._wakes.remove(wake)
        return self.done()

    def _wake(self) -> None:
        while True:
            # Not looked at before, which would not wait for a thread that adds one.
            try:
                wake = self._wakes.pop(0)
            except IndexError:
                return
            wake()


# The calls of a thread, each with its promise; None ends it. Its methods are written in C, and none
# is left half-way by a signal handler that raises.
_Calls = SimpleQueue[tuple[Callable[[], object], Promise[Any]] | None]


class Worker:
    """One thread, started by the first call; calls run in the order of their submission.

    A thread that cannot be started fails the calls that wait for it; the next call tries anew.
    """

    def __init__(self, name: str = "worker") -> None:
        self.ended: Promise[None] = Promise()
        self._name = name
        self._calls: _Calls = SimpleQueue()
        # The threads that have begun. If a signal handler raises as one is started, Python may let
        # it run, or not. So another one is started then; the first here works, the others end.
        self._running: list[threading.Thread] = []
        self._started = self._retired = False
        # One thread starts, and nothing is queued after the last call, also with several callers at
        # once, or a signal handler in between.
        self._queueing = threading.RLock()

    def submit(self, call: Callable[[], T], promise: Promise[T] | None = None) -> Promise[T]:
        """Queue ``call`` for the thread; the promise is settled by what it returns or raises.

        :param promise: the one to settle, unless it was before; a new one if none is given
        :raises RuntimeError: the thread was retired, or cannot be started
        """
        told: Promise[T] = promise or Promise()
        with self._queueing:
            if self._retired:
                raise RuntimeError("this thread is retired")
            if not (self._started or self._running):
                _start(self._name, self._calls, self._running, self.ended)
                self._started = True
            self._calls.put((call, told))
        return told

    def retire(self, last: Callable[[], object] | None = None) -> None:
        """End the thread after the calls already submitted and ``last``; `ended` tells when."""
        with self._queueing:
            if self._retired:
                return
            self._retired = True
            started = self._started or self._running
            if started and last is not None:
                self._calls.put((last, Promise()))
            self._calls.put(None)
        if not started:
            self.ended.settle()

    def join(self, timeout_secs: float) -> None:
        """Block until the thread is gone, which it is microseconds after `ended`."""
        for thread in self._running[:1]:
            thread.join(max(0.0, timeout_secs))

    def forget(self) -> None:
        """Hardly wait for its thread before the interpreter ends, since it hangs."""
        for thread in self._running[:1]:
            _threads.discard(thread)
            _hanging.add(thread)


def in_own_thread(name: str, call: Callable[[], T]) -> Promise[T]:
    """Make one call in a thread of its own, which ends after it, whatever happens here.

    :raises RuntimeError: the thread cannot be started
    """
    told: Promise[T] = Promise()
    calls: _Calls = SimpleQueue()
    calls.put((call, told))
    calls.put(None)
    _start(name, calls, [], Promise())
    return told


def _start(what: str, calls: _Calls, running: list[threading.Thread], ended: Promise[None]) -> None:
    """Start a thread that makes ``calls``; it notes itself in ``running``."""
    name = f"async_barriers-{what}-{next(_numbers)}"
    threading.Thread(target=_work, args=(calls, running, ended), name=name, daemon=True).start()


def _work(calls: _Calls, running: list[threading.Thread], ended: Promise[None]) -> None:
    thread = threading.current_thread()
    running.append(thread)
    if running[0] is not thread:
        return
    _threads.add(thread)
    while (queued := calls.get()) is not None:
        call, promise = queued
        try:
            promise.settle(call())
        except BaseException as exc:
            promise.settle(error=exc)
        # An idle thread must not keep the last call's objects alive.
        del queued, call, promise
    ended.settle()


def runs_users_code() -> None:
    """Note that this thread calls a user's function, which may take any time."""
    _threads.discard(threading.current_thread())
    _users.add(threading.current_thread())


def ends_by(at: float | None) -> None:
    """Note that this thread makes a call that ends by then; None if it has ended."""
    _ending.pop(threading.current_thread(), None)
    if at is not None:
        _ending[threading.current_thread()] = at


# -- before the interpreter ends ----------------------------------------------------------


class Living(Generic[T]):
    """Objects, held weakly, in the order in which they came; from any thread.

    No WeakSet, since that cannot be iterated while another thread adds to it.
    """

    def __init__(self) -> None:
        self._references: dict[weakref.ref[T], None] = {}

    def __bool__(self) -> bool:
        return bool(self._references)

    def add(self, thing: T) -> None:
        self._references[weakref.ref(thing, self._forget)] = None

    def discard(self, thing: T) -> None:
        self._forget(weakref.ref(thing))

    def latest_first(self) -> list[T]:
        """The objects that live now."""
        references = list(self._references)
        return [thing for each in reversed(references) if (thing := each()) is not None]

    def clear(self) -> None:
        self._references.clear()

    def _forget(self, reference: weakref.ref[T]) -> None:
        self._references.pop(reference, None)


_to_end_first, _to_end_at_exit = Living[Any](), Living[Any]()
_threads, _hanging, _users = (Living[threading.Thread]() for _ in range(3))
# Those in a call that ends at a known time, by `time.monotonic`, whatever happens.
_ending: dict[threading.Thread, float] = {}


def end_at_exit(owner: Any, *, first: bool = False) -> None:
    """Have ``owner.end(deadline)`` called before the interpreter finalises, the latest first.

    ``deadline`` is on the `time.monotonic` clock. The owner is held weakly.

    :param first: before all others: an event loop, before the objects that use it
    """
    if not (_to_end_first or _to_end_at_exit):
        # A process that multiprocessing forks ends without `atexit`.
        multiprocessing_util.Finalize(None, _at_exit, exitpriority=100)
    (_to_end_first if first else _to_end_at_exit).add(owner)


@atexit.register
def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_SECS
    # In the second round, the connections that the others have given up.
    for _ in range(2):
        owners = [*reversed(_to_end_first.latest_first()), *_to_end_at_exit.latest_first()]
        _to_end_first.clear()
        _to_end_at_exit.clear()
        for owner in owners:
            with contextlib.suppress(Exception):
                owner.end(deadline)
    # Also threads that were given up: one that returns from C++ later would abort the process. Of
    # those that hang for good, one may just have had its answer.
    now = time.monotonic()
    returned, hung = max(deadline, now + _RETURNS_SECS), now + _HANGS_SECS
    # Law 8 leaves two seconds, of which torch takes up to one.
    used = max(deadline - EXIT_SECS / 2, hung)
    for threads, until in ((_threads, returned), (_users, used), (_hanging, hung)):
        for thread in threads.latest_first():
            thread.join(max(0.0, until - time.monotonic()))
        threads.clear()  # This is called twice, and waits once for a thread that hangs.
    for thread, at in list(_ending.items()):
        # Others hang until the process has ended.
        if (secs := at - time.monotonic()) < EXIT_SECS:
            thread.join(max(0.0, secs) + _HANGS_SECS)


def _in_child() -> None:
    # A forked child has none of the threads, and must not end its parent's connections.
    for owner in _to_end_at_exit.latest_first():
        with contextlib.suppress(Exception):
            owner.forsake()
    for things in (_to_end_first, _to_end_at_exit, _threads, _users, _hanging, _ending):
        things.clear()


os.register_at_fork(after_in_child=_in_child)
