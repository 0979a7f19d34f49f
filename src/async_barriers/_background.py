"""Blocking calls of a `Saver`, in threads that neither its program nor its exit waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import anyio

from ._publish import begun_in_thread, is_async
from ._store.event_loop import Loop
from ._store.loops import loop_here
from ._store.waiting import told

T = TypeVar("T")


class Background:
    """Runs blocking calls, a few at a time.

    Not in anyio's threads: those keep the process alive as long as a call that hangs.
    """

    def __init__(self, threads: int = 8) -> None:
        self._free = anyio.Semaphore(threads)
        self._loop: Loop | None = None

    async def run(self, call: Callable[..., T], *args: Any) -> T:
        """Call it in a thread.

        **Cancellation:** returns at once; the thread goes on, and its result is dropped.
        """
        async with self._free:
            self._loop = loop_here(self._loop)
            called = begun_in_thread("saver", call, *args)
            await told(self._loop, called)
            return called.result()

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
                # asyncio's own cancellation cancels the task group, too.
                with anyio.CancelScope(shield=True):
                    await self.run(call, *args)
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
