"""Calls a user's ``publish``: a coroutine function here, a plain one in a thread of ours."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ._barrier import Publish
from ._errors import BarrierError, out_of_threads
from ._store.loops import Loop
from ._store.promises import told
from ._store.worker import in_own_thread


class Publishing:
    """One call of ``publish``.

    :param about: names the phase, for an error
    :ivar in_thread: it runs in a thread, which cannot be cancelled, and may yet publish
    """

    def __init__(self, publish: Publish, loop: Loop, about: Callable[[], str]) -> None:
        self.in_thread: bool = False
        self._publish = publish
        self._loop = loop
        self._about = about

    async def call(self, payloads: Mapping[int, bytes]) -> Any:
        """Run it, and return its result.

        **Cancellation:** reaches a coroutine; a thread goes on by itself.
        """
        returned: Any
        if is_async(self._publish):
            returned = self._publish(payloads)
        else:
            returned = await self._called_in_thread(payloads)
        return await returned if inspect.isawaitable(returned) else returned

    async def _called_in_thread(self, payloads: Mapping[int, bytes]) -> Any:
        # As `asyncio.to_thread` does.
        context = contextvars.copy_context()
        try:
            called = in_own_thread(
                "publish", functools.partial(context.run, self._publish, payloads)
            )
        except RuntimeError as exc:
            raise BarrierError(
                f"{self._about()}: publish needs a thread, and none can be started "
                + out_of_threads(exc)
            ) from exc
        self.in_thread = True
        await told(self._loop, called)
        self.in_thread = False
        return called.result()


def is_async(function: object) -> bool:
    """Whether calling it gives a coroutine, as far as can be told without calling it."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  (that of an object)
    )
