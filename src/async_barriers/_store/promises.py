"""Waits on an event loop for the result of a thread."""

from __future__ import annotations

import math
from typing import Any

from .loops import Loop
from .worker import Promise


async def told(loop: Loop, promise: Promise[Any], until: float = math.inf) -> bool:
    """In a task of the loop: wait for ``promise``, until the loop's clock says ``until``.

    True if it is settled.

    **Cancellation:** the call behind the promise goes on.
    """
    if promise.done():
        return True
    waiter = loop.waiter()
    promise.when_settled(lambda: loop.post(waiter.wake))
    await waiter.wait(until)
    return promise.done()
