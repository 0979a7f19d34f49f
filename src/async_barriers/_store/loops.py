"""Which event loop runs here. Only this module tells them apart."""

from __future__ import annotations

import contextlib
import importlib
import sys

import anyio

from .asyncio_loop import AsyncioLoop, asyncio_loop
from .event_loop import Loop
from .trio_loop import TrioLoop

# Loaded now, since anyio would load it on its first use: that blocks the loop, and may come when a
# rank gives up, with no descriptor left to read a module.
with contextlib.suppress(ImportError):
    importlib.import_module("anyio._backends._asyncio")


def loop_here(before: Loop | None) -> Loop:
    """The event loop that runs here; ``before``, if that is the same one.

    :raises RuntimeError: there is none
    """
    if before is not None and before.here():
        return before
    here: Loop | None = None
    if (loop := asyncio_loop()) is not None:
        here = AsyncioLoop(loop)
    elif "trio" in sys.modules:
        here = TrioLoop()
    if here is not None:
        # Makes anyio load its module for trio; see the top of this module.
        anyio.get_cancelled_exc_class()
        return here
    raise RuntimeError("no event loop runs here: await this in a task of asyncio or trio")
