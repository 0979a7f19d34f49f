"""A thread with a connection to the store of its own."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ._connection import Connection, Remains
from ._errors import BarrierConnectionError
from ._worker import Promise, Worker

T = TypeVar("T")
A = TypeVar("A")
Open = Callable[[float, threading.Event], Connection]


class Lane:
    """A thread and the connection that it alone uses, opened by the first call."""

    def __init__(self, open_connection: Open, init_secs: float) -> None:
        self._open = open_connection
        self._init_secs = init_secs
        self._connection: Connection | None = None
        self._abandoned = threading.Event()
        self._stale = False
        self.busy = False
        self._worker = Worker()
        self.ended = self._worker.ended

    def submit(self, call: Callable[[Connection], T], *, again: bool = False) -> Promise[T]:
        """Have the thread make ``call``; a lost connection is replaced for the next one.

        :param again: make it once more if a connection that was used before turns out to be
            lost; for calls that may be made twice
        """

        def run() -> T:
            self.busy = True
            try:
                used_before = self._connection is not None and not self._stale
                try:
                    return call(self._connected())
                except BarrierConnectionError:
                    self._hang_up()
                    if not (again and used_before):
                        raise
                return call(self._connected())
            finally:
                self.busy = False

        try:
            return self._worker.submit(run)
        except RuntimeError as exc:
            refused: Promise[T] = Promise()
            refused.settle(error=_given_up(exc))
            return refused

    def post(
        self,
        call: Callable[[Connection, A], Callable[[], object] | None],
        failed: Callable[[BaseException, A], object],
        about: A,
        on: Connection | None = None,
    ) -> None:
        """As `submit`, for a call that tells by itself how it went, unless it fails.

        What it returns is called last; see `Worker.post`.

        :param on: the connection that it has to go on with, where something was begun on it
        """
        try:
            self._worker.post(functools.partial(self._make, call, failed, about, on))
        except RuntimeError as exc:
            failed(_given_up(exc), about)

    def _make(
        self,
        call: Callable[[Connection, A], Callable[[], object] | None],
        failed: Callable[[BaseException, A], object],
        about: A,
        on: Connection | None,
    ) -> Callable[[], object] | None:
        self.busy = True
        try:
            return call(on or self._connected(), about)
        except BaseException as exc:
            if isinstance(exc, BarrierConnectionError):
                self._hang_up()
            failed(exc, about)
            return None
        finally:
            self.busy = False

    def _connected(self) -> Connection:
        if self._stale or (self._connection is not None and self._connection.failed):
            self._hang_up()
        if self._connection is None and not self._abandoned.is_set():
            deadline = time.monotonic() + self._init_secs
            self._stale = False
            self._connection = self._open(deadline, self._abandoned)
        # A call that was given up must not be made late: by then it may be another store
        # that answers at the same address.
        if self._connection is None or self._abandoned.is_set():
            raise _given_up(None)
        return self._connection

    @property
    def idle_connection(self) -> Connection | None:
        """The connection, for who does without the thread: if there is one, and nothing uses it."""
        connection = self._connection
        if self.busy or self._stale or connection is None or connection.failed:
            return None
        return connection

    @property
    def connected(self) -> bool:
        """Whether there is a connection, be it one that hangs."""
        return self._connection is not None

    @property
    def interruptible(self) -> bool:
        """Whether `abandon` ends a call that would not end by itself."""
        return self._connection is None or self._connection.interruptible

    def drained(self) -> Promise[None]:
        """Settled when the calls submitted so far have been made."""
        drained: Promise[None] = Promise()
        try:
            self._worker.post(drained.settle)
        except RuntimeError:
            drained.settle()
        return drained

    def join(self, timeout_secs: float) -> None:
        """Block until the thread is gone, which it is microseconds after `ended`."""
        self._worker.join(timeout_secs)

    def renew(self) -> None:
        """From any thread: replace the connection before the next call."""
        self._stale = True

    def retire(self) -> None:
        """Close after the calls already submitted."""
        self._worker.retire(self._hang_up)

    def stop_waiting(self) -> None:
        """From any thread: end a wait for a key that nobody is left to set."""
        if (connection := self._connection) is not None:
            connection.stop_waiting()

    def remains(self) -> list[Remains]:
        """From any thread: what is to be left of a connection that hangs."""
        return [] if (connection := self._connection) is None else connection.remains()

    def abandon(self) -> None:
        """From any thread: end the call under way, where that can be done, and make no other."""
        self._abandoned.set()
        if (connection := self._connection) is not None:
            connection.interrupt()

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _given_up(cause: BaseException | None) -> BarrierConnectionError:
    error = BarrierConnectionError("the connection to the store was given up")
    error.__cause__ = cause
    return error
