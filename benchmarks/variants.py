"""Everything that is measured: our barriers and what a user would pick instead.

Each variant is one rank's way to cross one barrier. Rank 0 hosts the store, unless it is said
that it is hosted elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
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


def make_torch(rank: int, size: int, port: int, hosted: bool, prefix: str = "benchmark") -> Cross:
    """torch's own TCPStoreBarrier."""
    # Its rank makes its key, and rank 0 would host.
    number = rank if hosted else rank + 1
    return TorchBarrier(
        number, size, prefix, TIMEOUT_SECS, True, port, HOST, TIMEOUT_SECS
    ).execute_barrier


def make_tc(rank: int, size: int, port: int, hosted: bool) -> Cross:
    """torch_checkpointing's TCPStoreBarrier."""
    from torch_checkpointing.barriers import TCPStoreBarrier, TCPStoreBarrierConfig
    from torch_checkpointing.types import RankInfo

    number = rank if hosted else rank + 1
    barrier = TCPStoreBarrier(
        TCPStoreBarrierConfig(TIMEOUT_SECS, True, port, HOST),
        RankInfo(number, size, number, size),
    )
    return lambda: barrier.execute_barrier(TIMEOUT_SECS)


def make_linear(rank: int, size: int, port: int, hosted: bool) -> Cross:
    """torchsnapshot's LinearBarrier: arrive and depart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchsnapshot.dist_store import LinearBarrier
    store = _store(rank, size, port, hosted)
    sequence = itertools.count()

    def cross() -> None:
        # A used prefix passes at once, so each crossing has its own.
        barrier = LinearBarrier(f"benchmark{next(sequence)}", store, rank, size, 0)
        barrier.arrive(_TIMEOUT)
        barrier.depart(_TIMEOUT)

    return cross


def make_gloo(rank: int, size: int, port: int, hosted: bool) -> Cross:
    """A process group's barrier."""
    store = _store(rank, size, port, hosted)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return dist.barrier


def make_floor(rank: int, size: int, port: int, hosted: bool) -> Cross:
    """One server-side round trip, and no safety: the least that a store can do."""
    # torch's stubs lack half of the stores' methods.
    store: Any = _store(rank, size, port, hosted)
    sequence = itertools.count()
    return lambda: store.barrier(f"benchmark{next(sequence)}", size, _TIMEOUT)


BLOCKING: dict[str, Callable[[int, int, int, bool], Cross]] = {
    "torch": make_torch,
    "tc": make_tc,
    "linear": make_linear,
    "gloo": make_gloo,
    "floor": make_floor,
}


def _store(rank: int, size: int, port: int, hosted: bool) -> TCPStore:
    return TCPStore(HOST, port, size, is_master=hosted and rank == 0, timeout=_TIMEOUT)


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
            make = BLOCKING[product]
            self._blocking[product] = make(self._rank, self._size, self._ports[product], True)
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
