"""Barriers for the configuration of `torch.distributed.checkpoint._experimental`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ._config import BARRIER_REGISTRY, BarrierConfig
from .blocking import BlockingBarrier

__all__ = ["register_in_torch"]


def register_in_torch() -> None:
    """Register our barriers for torch's ``BarrierConfig`` and ``make_sync_checkpointer``. ::

        register_in_torch()
        config = CheckpointerConfig(
            barrier_config=BarrierConfig("async_barriers.tcp_store", {"global_rank": rank, ...})
        )
        checkpointer = make_sync_checkpointer(config)

    torch then knows each type of our ``BARRIER_REGISTRY`` by the name ``async_barriers.`` and the
    type, with the same arguments. It builds a `BlockingBarrier`. torch's own types stay as they
    are. You may call it again, for example after `register_barrier`.

    :raises ImportError: this version of torch has no such configuration
    """
    theirs = importlib.import_module("torch.distributed.checkpoint._experimental.barriers")
    for barrier_type in BARRIER_REGISTRY:
        name = f"async_barriers.{barrier_type}"
        theirs.BARRIER_REGISTRY[name] = functools.partial(_built, barrier_type)


def _built(barrier_type: str, /, **barrier_args: Any) -> BlockingBarrier:
    return BlockingBarrier(BarrierConfig(barrier_type, barrier_args))
