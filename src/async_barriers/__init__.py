"""Barriers that can be awaited, for asynchronous checkpointing of distributed training."""

from __future__ import annotations

from ._barrier import Barrier
from ._bodies import Committing
from ._config import BARRIER_REGISTRY, BarrierConfig, create_barrier_from_config, register_barrier
from ._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
)
from ._values import BarrierProgress, BarrierResult, BarrierStatistics, CommitRecord, MissingRank
from .dist_barrier import DistBarrier
from .observer import CommitObserver
from .step_signal import StepSignal
from .store_barrier import StoreBarrier, TCPStoreBarrier

__all__ = [
    # the barriers
    "Barrier",
    "StoreBarrier",
    "TCPStoreBarrier",
    "DistBarrier",
    # what several ranks agree on, step by step
    "StepSignal",
    # building one from configuration
    "BarrierConfig",
    "BARRIER_REGISTRY",
    "register_barrier",
    "create_barrier_from_config",
    # values
    "BarrierResult",
    "BarrierProgress",
    "MissingRank",
    "Committing",
    "BarrierStatistics",
    "CommitRecord",
    # for processes that are no ranks
    "CommitObserver",
    # errors
    "BarrierError",
    "BarrierTimeoutError",
    "BrokenBarrierError",
    "BarrierConnectionError",
    "BarrierClosedError",
]
