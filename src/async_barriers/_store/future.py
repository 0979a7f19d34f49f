"""Results that come later, and coroutines that wait for these alone, without an event loop.

The protocol is written as coroutines that await a store's answers. Any code that has an answer (an
event loop's callback, a private loop at exit, a test) resolves a `Future`, and this resumes the
coroutine. So the coroutines run on any loop, and cancelling a caller cannot stop what it began for
its peers.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from .._errors import BarrierError

T = TypeVar("T")


class Future(Generic[T]):
    """A value or an error that comes once; not thread-safe.

    A callback that raises is called once more, so each can be called twice.

    :ivar error: its error, if it failed
    """

    __slots__ = ("_callbacks", "_value", "done", "error")

    def __init__(self) -> None:
        self.done = False
        self._value: T
        self.error: BaseException | None = None
        self._callbacks: list[Callable[[], object]] = []

    def resolve(self, value: T) -> None:
        """Give it its value, unless it is done, and call the callbacks."""
        if not self.done:
            self._value = value
            self._finish()

    def fail(self, error: BaseException) -> None:
        """Give it an error, unless it is done, and call the callbacks."""
        if not self.done:
            self.error = error
            self._finish()

    def _finish(self) -> None:
        callbacks = self._callbacks
        try:
            self.done = True
            while callbacks:
                callbacks[0]()
                del callbacks[0]
        except BaseException:
            # Most likely a signal handler raised, perhaps before the callback began. So call it
            # again, and the others too; each may be called twice.
            self._finish_anyway()
            raise

    def _finish_anyway(self) -> None:
        self.done = True
        while self._callbacks:
            callback = self._callbacks.pop(0)
            try:
                callback()
            finally:
                self._finish_anyway()

    def result(self) -> T:
        """Return the value or raise the error. It must be done."""
        if self.error is not None:
            raise self.error
        return self._value

    def when_done(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` when it is done, or now if it is done already."""
        if self.done:
            callback()
        else:
            self._callbacks.append(callback)

    def __await__(self) -> Generator[Future[T], None, T]:
        if not self.done:
            yield self
        return self.result()


class Effort(Future[T]):
    """A coroutine that awaits Futures alone, and begins at once, or at `begin`."""

    __slots__ = ("_awaited", "_coroutine")

    def __init__(self, coroutine: Coroutine[Any, None, T], *, begins: bool = True) -> None:
        super().__init__()
        self._coroutine: Any = coroutine
        self._awaited: Future[Any] | None = None
        if begins:
            self._step()

    def begin(self) -> None:
        """Begin, if it has not begun."""
        if self._awaited is None and not self._coroutine.cr_running:
            self._step()

    def _step(self) -> None:
        # A callback may be called twice; the second time the coroutine awaits something else.
        if self.done or not (self._awaited is None or self._awaited.done):
            return
        try:
            try:
                self._awaited = awaited = self._coroutine.send(None)
            except StopIteration as stop:
                self.resolve(stop.value)
            except BarrierError as exc:
                self.fail(exc)
            else:
                awaited.when_done(self._step)
        except BaseException as exc:
            # A signal handler raised, or this is a bug. Those who wait must not wait for ever, and
            # the caller of this callback has to know.
            self.fail(exc)
            self._coroutine.close()
            raise

    def stop(self, error: BaseException) -> None:
        """End it where it is, with ``error``. An effort that stops itself goes on to its end."""
        if not (self.done or self._coroutine.cr_running):
            self.done = True
            self._coroutine.close()
            self.done = False
            self.fail(error)
