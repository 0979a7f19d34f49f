"""Which event loop runs here. Only this module tells them apart."""

from __future__ import annotations

import contextlib
import importlib
import sys

import anyio

from .._errors import BarrierConnectionError, told_by
from .asyncio_loop import AsyncioLoop, asyncio_loop
from .event_loop import Loop
from .trio_loop import trio_loop

# Loaded now, since anyio would load it on its first use: that blocks the loop, and may come when a
# rank gives up, with no descriptor left to read a module.
with contextlib.suppress(ImportError):
    importlib.import_module("anyio._backends._asyncio")


def loop_here(before: Loop | None) -> Loop:
    """The event loop that runs here; ``before``, if that is the same one.

    :raises RuntimeError: there is none
    :raises BarrierConnectionError: it cannot be used
    """
    if before is not None and before.here():
        return before
    here: Loop | None = None
    try:
        if (loop := asyncio_loop()) is not None:
            here = AsyncioLoop(loop)
        elif "trio" in sys.modules:
            here = trio_loop()
        if here is not None:
            # Makes anyio load its module for trio; see the top of this module.
            anyio.get_cancelled_exc_class()
            return here
    except OSError as exc:
        raise BarrierConnectionError(
            f"this event loop cannot be used ({told_by(exc)}); has the process no descriptors left "
            "(ulimit -n)?"
        ) from exc
    raise RuntimeError("no event loop runs here: await this in a task of asyncio or trio")
