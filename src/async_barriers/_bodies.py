"""Bodies of ``async with`` that end in a crossing or in a commit."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import anyio

from ._checks import checked_blob
from ._reasons import reason_of

T = TypeVar("T")


class Committing:
    """This rank's part in a commit, inside `Barrier.committing`.

    :ivar payload: what this rank brings, such as its manifest; set it in the body. It is ``b""``
        until you set it
    """

    def __init__(self) -> None:
        self.payload: bytes = b""
        self._result: bytes | None = None

    @property
    def result(self) -> bytes:
        """What ``publish`` returned on the leader; available after the body of ``async with``.

        :raises RuntimeError: the commit was not released, or not yet
        """
        if self._result is None:
            raise RuntimeError("there is no result: the commit was not released, or not yet")
        return self._result


class Breakable(Protocol):
    """A barrier whose next turn can be used up by breaking it, with a reason."""

    async def _fail(self, reason: str, name: str, step: int | None = None) -> None: ...
    def _fail_soon(self, reason: str, name: str, step: int | None = None) -> None: ...


class Body(AbstractAsyncContextManager[T], Generic[T]):
    """Crosses after a body that succeeds, and breaks the phase after one that does not.

    :param value: what the body gets
    :param cross: enters and waits for the verdict
    """

    def __init__(
        self,
        value: T,
        cross: Callable[[], Awaitable[object]],
        barrier: Breakable,
        name: str,
        step: int | None,
    ) -> None:
        self._value = value
        self._cross = cross
        self._barrier = barrier
        self._turn = name, step

    async def __aenter__(self) -> T:
        return self._value

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            await self._cross()
        elif isinstance(exc, GeneratorExit):
            # Nothing may be awaited here: its loop may be gone. The break goes on by itself.
            self._barrier._fail_soon(reason_of(exc), *self._turn)
        else:
            await _tell(exc, self._barrier, *self._turn)


async def checked(
    barrier: Breakable, payload: bytes, name: str, step: int | None, *breaking: type[Exception]
) -> bytes:
    """Check this rank's payload; one that is wrong in a ``breaking`` way breaks the phase.

    The size of a payload depends on a rank's data, so its peers may be waiting already.
    """
    try:
        return checked_blob("payload", payload)
    except breaking as exc:
        await _tell(exc, barrier, name, step)
        raise


async def _tell(exc: BaseException, barrier: Breakable, name: str, step: int | None) -> None:
    """Break a phase for its peers because of ``exc``, also where this task is cancelled."""
    with anyio.CancelScope(shield=True):
        await barrier._fail(reason_of(exc), name, step)


async def close(closing: Coroutine[Any, Any, None], exc: BaseException | None) -> None:
    """Close something, after ``exc`` ended its body.

    A coroutine that is thrown away can await nothing more. It begins to close, and that goes on by
    itself.
    """
    if not isinstance(exc, GeneratorExit):
        await closing
        return
    # If no loop runs here, or no task, it leaves with its loop, or at exit.
    with contextlib.suppress(StopIteration, RuntimeError):
        closing.send(None)
    closing.close()
