"""Blocking calls of a `Saver`, in threads that its program's other threads do not delay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from ._publish import is_async

T = TypeVar("T")


class Background:
    """Runs blocking calls. A program that has filled anyio's own limiter does not delay them."""

    def __init__(self, threads: int = 8) -> None:
        self._limiter = anyio.CapacityLimiter(threads)

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """Call it in a thread.

        **Cancellation:** returns at once; the thread goes on, and its result is dropped.
        """
        return await anyio.to_thread.run_sync(
            functools.partial(call, *args), abandon_on_cancel=True, limiter=self._limiter
        )

    async def run_any(self, call: Callable[..., Any], *args: Any) -> Any:
        """Await a coroutine function here, or call a plain function in a thread."""
        return await (call(*args) if is_async(call) else self.run(call, *args))

    async def run_to_the_end(self, call: Callable[..., object], *args: Any) -> list[BaseException]:
        """Call it in a thread, and wait for its end, also if this task is cancelled.

        :return: the cancellation that came meanwhile, if any; the caller has to raise it later

        **Cancellation:** as usual before the call has begun; after that, as above.
        """
        outcome: list[Exception | None] = []

        async def run() -> None:
            try:
                await anyio.to_thread.run_sync(
                    functools.partial(call, *args), limiter=self._limiter
                )
            except Exception as exc:
                outcome.append(exc)
            else:
                outcome.append(None)

        cancelled: list[BaseException] = []
        try:
            # The shield holds off the cancellation of anyio and trio. asyncio's own knows no
            # shield, but the task group waits for its task, which is in the shield.
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(run)
        except anyio.get_cancelled_exc_class() as exc:
            cancelled.append(exc)
            if not outcome:
                raise
        if outcome[0] is not None:
            raise outcome[0]
        return cancelled
