"""Calls a user's ``publish``: a coroutine function here, a plain one in a thread of ours."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ._barrier import Publish
from ._errors import BarrierError, out_of_threads
from ._store.event_loop import Loop
from ._store.waiting import told
from ._store.worker import Promise, in_own_thread, runs_users_code

T = TypeVar("T")


class Publishing:
    """One call of ``publish``.

    :param about: names the phase, for an error
    :ivar in_thread: it runs in a thread, which cannot be cancelled, and may yet publish
    :ivar raised: the exception that it ended in
    """

    raised: BaseException | None = None

    def __init__(self, publish: Publish, loop: Loop, about: Callable[[], str]) -> None:
        self.in_thread: bool = False
        self._publish = publish
        self._loop = loop
        self._about = about

    async def call(self, payloads: Mapping[int, bytes]) -> Any:
        """Run it, and return its result; None stands for no bytes.

        **Cancellation:** reaches a coroutine; a thread goes on by itself.
        """
        returned: Any
        try:
            if is_async(self._publish):
                returned = self._publish(payloads)
            else:
                returned = await self._called_in_thread(payloads)
            result = await returned if inspect.isawaitable(returned) else returned
        except BaseException as exc:
            self.raised = exc
            raise
        return b"" if result is None else result

    def out_of_time(self, rank: int) -> str:
        """Why the deadline of the leader, ``rank``, ends the commit."""
        how = "in a thread, and may yet publish" if self.in_thread else "and was stopped"
        return f"rank {rank} was still publishing, {how}"

    async def _called_in_thread(self, payloads: Mapping[int, bytes]) -> Any:
        try:
            called = begun_in_thread("publish", self._publish, payloads)
        except RuntimeError as exc:
            raise BarrierError(
                f"{self._about()}: publish needs a thread, and none can be started "
                + out_of_threads(exc)
            ) from exc
        self.in_thread = True
        await told(self._loop, called)
        self.in_thread = False
        return called.result()


def begun_in_thread(name: str, function: Callable[..., T], *args: Any) -> Promise[T]:
    """Call a user's function in a thread of ours, in its caller's context, as asyncio.to_thread
    does.

    :raises RuntimeError: no thread can be started
    """
    context = contextvars.copy_context()

    def call() -> T:
        runs_users_code()
        return context.run(function, *args)

    return in_own_thread(name, call)


def is_async(function: object) -> bool:
    """Whether calling it gives a coroutine, as far as can be told without calling it."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  (that of an object)
    )
