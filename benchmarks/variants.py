"""Everything that is measured: our barriers and what a user would pick instead.

Each variant is one rank's way to cross one barrier, made in the rank's process. Rank 0 hosts
the store wherever there is one.
"""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import trio
import uvloop
from torch.distributed import TCPStore
from torch.distributed.checkpoint._experimental.barriers import TCPStoreBarrier as TorchBarrier

from async_barriers import TCPStoreBarrier

HOST = "127.0.0.1"
TIMEOUT_SECS = 60
_TIMEOUT = timedelta(seconds=TIMEOUT_SECS)
WARM_UP = 3

Cross = Callable[[], object]


@dataclass(frozen=True)
class Burst:
    """Sequential crossings of one barrier on one rank."""

    secs: float
    cpu_secs: float


class Loops:
    """The event loops of one process, which outlive the bursts."""

    def __init__(self) -> None:
        self._runners: dict[str, asyncio.Runner] = {}

    def run(self, kind: str, function: Callable[[], Awaitable[Any]]) -> Any:
        if kind == "trio":
            return trio.run(function)
        if kind not in self._runners:
            factory = uvloop.new_event_loop if kind == "uvloop" else None
            self._runners[kind] = asyncio.Runner(loop_factory=factory)

        async def call() -> Any:
            return await function()

        return self._runners[kind].run(call())


class Crossers:
    """One rank's barriers of one world, made as they are asked for; see `fleet.Fleet`."""

    def __init__(self, rank: int, size: int, ports: dict[str, int]) -> None:
        logging.disable(logging.INFO)
        self._rank = rank
        self._size = size
        self._ports = ports
        self._loops = Loops()
        self._blocking: dict[str, Cross] = {}
        self._ours: dict[str, TCPStoreBarrier] = {}

    def make(self, variant: str) -> str | None:
        """Connect; why not, if it cannot be had."""
        try:
            self.burst(variant, 1)
        except ImportError as exc:
            return f"{type(exc).__name__}: {exc}"
        return None

    def burst(self, variant: str, crossings: int) -> Burst:
        """Cross so often, after a few crossings that do not count."""
        product, _, how = variant.partition("-")
        if product == "ours":
            burst: Burst = self._loops.run(how, lambda: self._burst_of_ours(how, crossings))
            return burst
        if product not in self._blocking:
            make: Callable[[], Cross] = getattr(self, f"_make_{product}")
            self._blocking[product] = make()
        cross = self._blocking[product]
        if how == "blocking":
            return _burst_of_blocking(cross, crossings)
        kind = "uvloop" if how == "thread-uvloop" else "asyncio"
        in_thread: Burst = self._loops.run(kind, lambda: _burst_in_thread(cross, crossings))
        return in_thread

    def close(self) -> None:
        for how, barrier in self._ours.items():
            self._loops.run(how, barrier.aclose)

    async def _burst_of_ours(self, how: str, crossings: int) -> Burst:
        if how not in self._ours:
            self._ours[how] = TCPStoreBarrier(
                self._rank,
                self._size,
                "benchmark",
                TIMEOUT_SECS,
                True,
                self._ports[how],
                HOST,
                TIMEOUT_SECS,
            )
        cross = self._ours[how].execute_barrier
        for _ in range(WARM_UP):
            await cross()
        clock = _Clock()
        for _ in range(crossings):
            await cross()
        return clock.read()

    def _make_torch(self) -> Cross:
        return TorchBarrier(
            self._rank,
            self._size,
            "benchmark",
            TIMEOUT_SECS,
            True,
            self._ports["torch"],
            HOST,
            TIMEOUT_SECS,
        ).execute_barrier

    def _make_tc(self) -> Cross:
        from torch_checkpointing.barriers import TCPStoreBarrier, TCPStoreBarrierConfig
        from torch_checkpointing.types import RankInfo

        config = TCPStoreBarrierConfig(TIMEOUT_SECS, True, self._ports["tc"], HOST)
        info = RankInfo(self._rank, self._size, self._rank, self._size)
        barrier = config.create_barrier(info)
        assert isinstance(barrier, TCPStoreBarrier)
        return lambda: barrier.execute_barrier(TIMEOUT_SECS)

    def _make_linear(self) -> Cross:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchsnapshot.dist_store import LinearBarrier
        store = self._store("linear")
        sequence = 0

        def cross() -> None:
            nonlocal sequence
            sequence += 1
            # A used prefix passes at once, so each crossing has its own.
            barrier = LinearBarrier(f"benchmark{sequence}", store, self._rank, self._size, 0)
            barrier.arrive(_TIMEOUT)
            barrier.depart(_TIMEOUT)

        return cross

    def _make_gloo(self) -> Cross:
        dist.init_process_group(
            "gloo", store=self._store("gloo"), rank=self._rank, world_size=self._size
        )
        return dist.barrier

    def _make_floor(self) -> Cross:
        # torch's stubs lack half of the stores' methods.
        store: Any = self._store("floor")
        sequence = 0

        def cross() -> None:
            nonlocal sequence
            sequence += 1
            store.barrier(f"benchmark{sequence}", self._size, _TIMEOUT)

        return cross

    def _store(self, product: str) -> TCPStore:
        return TCPStore(
            HOST, self._ports[product], self._size, is_master=self._rank == 0, timeout=_TIMEOUT
        )


class _Clock:
    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> Burst:
        return Burst(time.perf_counter() - self._began[0], time.process_time() - self._began[1])


def _burst_of_blocking(cross: Cross, crossings: int) -> Burst:
    for _ in range(WARM_UP):
        cross()
    clock = _Clock()
    for _ in range(crossings):
        cross()
    return clock.read()


async def _burst_in_thread(cross: Cross, crossings: int) -> Burst:
    for _ in range(WARM_UP):
        await asyncio.to_thread(cross)
    clock = _Clock()
    for _ in range(crossings):
        await asyncio.to_thread(cross)
    return clock.read()
