"""Barriers for the configuration of `torch.distributed.checkpoint._experimental`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ._config import BARRIER_REGISTRY, BarrierConfig
from .blocking import BlockingBarrier

__all__ = ["register_in_torch"]


def register_in_torch() -> None:
    """Make our barriers known to torch's ``BarrierConfig`` and ``make_sync_checkpointer``. ::

        register_in_torch()
        config = CheckpointerConfig(
            barrier_config=BarrierConfig("async_barriers.tcp_store", {"global_rank": rank, ...})
        )
        checkpointer = make_sync_checkpointer(config)

    Each type of our ``BARRIER_REGISTRY`` is one of torch's, behind ``async_barriers.``, with the
    same arguments; what torch builds is a `BlockingBarrier`. torch's own types stay as they are.
    May be called again, as after `register_barrier`.

    :raises ImportError: this version of torch has no such configuration
    """
    theirs = importlib.import_module("torch.distributed.checkpoint._experimental.barriers")
    for barrier_type in BARRIER_REGISTRY:
        name = f"async_barriers.{barrier_type}"
        theirs.BARRIER_REGISTRY[name] = functools.partial(_built, barrier_type)


def _built(barrier_type: str, /, **barrier_args: Any) -> BlockingBarrier:
    return BlockingBarrier(BarrierConfig(barrier_type, barrier_args))
