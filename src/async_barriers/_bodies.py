"""Bodies of ``async with`` that end in a crossing or in a commit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Generic, TypeVar

import anyio

from ._reasons import reason_of

T = TypeVar("T")
Fail = Callable[[str], Awaitable[None]]


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


class Body(AbstractAsyncContextManager[T], Generic[T]):
    """Crosses after a body that succeeds, and breaks the phase after one that does not.

    :param value: what the body gets
    :param cross: enters and waits for the verdict
    :param fail: uses up this rank's turn by breaking it, with a reason
    :param fail_soon: as ``fail``, where nothing can be awaited
    """

    def __init__(
        self,
        value: T,
        cross: Callable[[], Awaitable[None]],
        fail: Fail,
        fail_soon: Callable[[str], None],
    ) -> None:
        self._value = value
        self._cross = cross
        self._fail = fail
        self._fail_soon = fail_soon

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
            self._fail_soon(reason_of(exc))
        else:
            await tell(exc, self._fail)


async def tell(exc: BaseException, fail: Fail) -> None:
    """Break a phase for its peers because of ``exc``, also where this task is cancelled."""
    with anyio.CancelScope(shield=True):
        await fail(reason_of(exc))
