"""Blocking calls of a `Saver`, in threads that neither its program nor its exit waits for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import anyio

from ._publish import begun_in_thread, is_async
from ._store.event_loop import Loop
from ._store.loops import loop_here
from ._store.waiting import told
from ._store.worker import Promise

T = TypeVar("T")


# The calls in threads that write to a place, also those for which nobody waits any more.
_writing: dict[str, list[Promise[Any]]] = {}


def goes_on(place: str) -> bool:
    """Whether a call still writes there in this process, for any saver."""
    calls = [call for call in _writing.pop(place, ()) if not call.done()]
    if calls:
        _writing[place] = calls
    return bool(calls)


class Background:
    """Runs blocking calls, a few at a time.

    Not in anyio's threads: those keep the process alive as long as a call that hangs.
    """

    def __init__(self, threads: int = 8) -> None:
        self._threads = threads
        self._loop: Loop | None = None
        self._free: anyio.Semaphore

    def use(self) -> Loop:
        """The event loop that runs here, which it uses from now on."""
        loop = loop_here(self._loop)
        if loop is not self._loop:
            # What waited on the loop before waits no more.
            self._loop, self._free = loop, anyio.Semaphore(self._threads)
        return loop

    async def run(self, call: Callable[..., T], *args: Any, place: str = "") -> T:
        """Call it in a thread.

        :param place: it writes there; see `goes_on`

        **Cancellation:** returns at once; the thread goes on, and its result is dropped.
        """
        self.use()
        async with self._free:
            called = self.begin(call, *args)
            if place:
                _writing.setdefault(place, []).append(called)
            try:
                await self.end_of(called)
                return called.result()
            finally:
                goes_on(place)

    def begin(self, call: Callable[..., T], *args: Any) -> Promise[T]:
        """Call it in a thread, and return at once."""
        return begun_in_thread("saver", call, *args)

    async def end_of(self, called: Promise[Any]) -> None:
        """Wait for what was begun.

        **Cancellation:** returns at once; the thread goes on.
        """
        await told(self.use(), called)

    async def run_any(self, call: Callable[..., Any], *args: Any, place: str) -> Any:
        """Await a coroutine function here, or call a plain function in a thread."""
        if is_async(call):
            return await call(*args)
        result = await self.run(call, *args, place=place)
        # A plain function may return what a coroutine function gives.
        return await result if inspect.isawaitable(result) else result

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
