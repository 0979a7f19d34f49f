"""All variants that are measured: our barriers, and what a user would write instead.

All ranks of one world talk to one server, which has its own process.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import anyio.to_thread
import torch.distributed as dist
import trio
import uvloop
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.checkpoint._experimental.barriers import TCPStoreBarrier as TorchBarrier
from torch.distributed.elastic.utils import store as store_util

from async_barriers import Barrier, StoreBarrier

HOST = "127.0.0.1"
TIMEOUT_SECS = 60
_TIMEOUT = timedelta(seconds=TIMEOUT_SECS)
WARM_UP = 3
PAYLOAD = b"m" * 200
PUBLISHED = b"checkpoint"

Cross = Callable[[], object]


async def _publish(payloads: Mapping[int, bytes]) -> bytes:
    return PUBLISHED


async def _phase(barrier: Barrier, number: int) -> None:
    async with barrier.phase(f"phase-{number}"):
        pass


# The ways in which a program uses a barrier.
USES: dict[str, Callable[[Barrier, int], Awaitable[object]]] = {
    "same name": lambda barrier, number: barrier.execute_barrier("checkpoint"),
    "new name": lambda barrier, number: barrier.execute_barrier(f"step-{number}"),
    "two names": lambda barrier, number: barrier.execute_barrier(("model", "state")[number % 2]),
    "phase": _phase,
    "step": lambda barrier, number: barrier.execute_barrier("step", step=number),
    "commit": lambda barrier, number: barrier.commit(
        _publish, payload=PAYLOAD, name=f"commit-{number}"
    ),
    "commit step": lambda barrier, number: barrier.commit(
        _publish, payload=PAYLOAD, name="commit", step=number
    ),
}
LOOPS = ["asyncio", "uvloop", "trio"]
STORES = ["bare", "prefix"]


def is_commit(use: str) -> bool:
    """Whether it publishes, and is compared with what publishes."""
    return use.startswith("commit")


@dataclass(frozen=True)
class Variant:
    """One way to cross; alternatives know the uses "barrier" and "commit", and no other loop."""

    who: str
    use: str
    store: str = "bare"
    loop: str = "blocking"

    def __str__(self) -> str:
        return f"{self.who} {self.use}, {self.store}, {self.loop}"


@dataclass(frozen=True)
class Burst:
    """Sequential crossings on one rank."""

    secs: float
    cpu_secs: float


def make_torch(rank: int, size: int, port: int, prefix: str = "benchmark") -> Cross:
    """torch's own TCPStoreBarrier."""
    # It makes its key from its rank, and rank 0 would host.
    return TorchBarrier(
        rank + 1, size, prefix, TIMEOUT_SECS, True, port, HOST, TIMEOUT_SECS
    ).execute_barrier


def make_tc(rank: int, size: int, port: int) -> Cross:
    """torch_checkpointing's TCPStoreBarrier."""
    from torch_checkpointing.barriers import TCPStoreBarrier, TCPStoreBarrierConfig
    from torch_checkpointing.types import RankInfo

    barrier = TCPStoreBarrier(
        TCPStoreBarrierConfig(TIMEOUT_SECS, True, port, HOST),
        RankInfo(rank + 1, size, rank + 1, size),
    )
    return lambda: barrier.execute_barrier(TIMEOUT_SECS)


def make_linear(rank: int, size: int, port: int) -> Cross:
    """torchsnapshot's LinearBarrier: arrive and depart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchsnapshot.dist_store import LinearBarrier
    store = make_store(port)
    sequence = itertools.count()

    def cross() -> None:
        # A used prefix passes at once, so each crossing has its own.
        barrier = LinearBarrier(f"linear{next(sequence)}", store, rank, size, 0)
        barrier.arrive(_TIMEOUT)
        barrier.depart(_TIMEOUT)

    return cross


def make_gloo(rank: int, size: int, port: int) -> Cross:
    """A process group's barrier."""
    dist.init_process_group("gloo", store=make_store(port), rank=rank, world_size=size)
    return dist.barrier


def make_floor(rank: int, size: int, port: int) -> Cross:
    """One round trip and no safety: the least that a store can do."""
    # torch's stubs lack half of the stores' methods.
    store: Any = make_store(port)
    sequence = itertools.count()
    return lambda: store.barrier(f"floor{next(sequence)}", size, _TIMEOUT)


def make_elastic(size: int, store: Any) -> Cross:
    """torch's barrier over a given store, such as a process group's."""
    sequence = itertools.count()
    return lambda: store_util.barrier(store, size, f"elastic{next(sequence)}")


def make_commit(rank: int, size: int, store: Any, barrier: Cross) -> Cross:
    """An atomic publish as a user would write it.

    It leaves its keys in the store, as torch's barrier does; to delete them would take longer.
    """
    sequence = itertools.count()

    def commit() -> bytes:
        step = next(sequence)
        store.set(f"payload-{step}-{rank}", PAYLOAD)
        barrier()
        if rank == 0:
            store.multi_get([f"payload-{step}-{peer}" for peer in range(size)])
            store.set(f"result-{step}", PUBLISHED)
        published: bytes = store.get(f"result-{step}")
        return published

    return commit


BLOCKING: dict[str, Callable[[int, int, int], Cross]] = {
    "torch": make_torch,
    "tc": make_tc,
    "linear": make_linear,
    "gloo": make_gloo,
    "floor": make_floor,
}


def make_store(port: int) -> TCPStore:
    return TCPStore(HOST, port, wait_for_workers=False, timeout=_TIMEOUT)


class Loops:
    """The event loops of one process. They outlive the bursts, as connections do."""

    def __init__(self) -> None:
        self._runners: dict[str, asyncio.Runner] = {}
        self._trio: trio.lowlevel.TrioToken | None = None

    def run(self, kind: str, function: Callable[[], Awaitable[Any]]) -> Any:
        async def call() -> Any:
            return await function()

        if kind == "trio":
            return trio.from_thread.run(call, trio_token=self._trio or self._start_trio())
        if kind not in self._runners:
            factory = uvloop.new_event_loop if kind == "uvloop" else None
            self._runners[kind] = asyncio.Runner(loop_factory=factory)
        return self._runners[kind].run(call())

    def _start_trio(self) -> trio.lowlevel.TrioToken:
        """Run trio in a thread: it cannot be left and entered again."""
        started = threading.Event()

        async def live() -> None:
            self._trio = trio.lowlevel.current_trio_token()
            started.set()
            await trio.sleep_forever()

        threading.Thread(target=trio.run, args=(live,), daemon=True).start()
        started.wait()
        assert self._trio is not None
        return self._trio


class Crossers:
    """One rank of one world, and all its ways to cross; see `fleet.Fleet`."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        logging.disable(logging.INFO)
        self._rank = rank
        self._size = size
        self._port = port
        bare = make_store(port)
        self._stores: dict[str, Any] = {"bare": bare, "prefix": PrefixStore("job", bare)}
        self._loops = Loops()
        self._ours: dict[tuple[str, str], StoreBarrier] = {}
        self._alternatives: dict[tuple[str, str, str], Cross] = {}
        self._numbers: dict[Variant, Iterator[int]] = defaultdict(itertools.count)

    def make(self, variant: Variant) -> str | None:
        """Connect; return the reason if that is not possible."""
        try:
            self.burst(variant, 1)
        except ImportError as exc:
            return f"{type(exc).__name__}: {exc}"
        return None

    def burst(self, variant: Variant, crossings: int) -> Burst:
        """Cross so often, after some crossings that do not count."""
        if variant.who == "ours":
            cross = self._cross_ours(variant)
        else:
            alternative = self._alternative(variant.who, variant.use, variant.store)
            if variant.loop == "blocking":
                return _burst_of_blocking(alternative, crossings)
            # As a user would on that loop.
            to_thread = anyio.to_thread.run_sync if variant.loop == "trio" else asyncio.to_thread

            def cross() -> Awaitable[object]:
                return to_thread(alternative)

        burst: Burst = self._loops.run(variant.loop, lambda: _burst(cross, crossings))
        return burst

    def close(self) -> None:
        for (_, loop), barrier in self._ours.items():
            self._loops.run(loop, barrier.aclose)

    def _cross_ours(self, variant: Variant) -> Callable[[], Awaitable[object]]:
        # One barrier for all uses, as a program has one.
        key = variant.store, variant.loop
        if key not in self._ours:
            self._ours[key] = StoreBarrier(
                self._stores[variant.store],
                rank=self._rank,
                world_size=self._size,
                prefix=variant.loop,
                timeout_secs=TIMEOUT_SECS,
            )
        barrier, use, numbers = self._ours[key], USES[variant.use], self._numbers[variant]
        return lambda: use(barrier, next(numbers))

    def _alternative(self, who: str, use: str, store: str) -> Cross:
        key = who, use, store
        if key not in self._alternatives:
            if use == "commit":
                barrier = self._alternative(who, "barrier", store)
                cross = make_commit(self._rank, self._size, self._stores[store], barrier)
            elif store == "prefix":
                cross = make_elastic(self._size, self._stores[store])
            else:
                cross = BLOCKING[who](self._rank, self._size, self._port)
            self._alternatives[key] = cross
        return self._alternatives[key]


class _Clock:
    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> Burst:
        return Burst(time.perf_counter() - self._began[0], time.process_time() - self._began[1])


async def _burst(cross: Callable[[], Awaitable[object]], crossings: int) -> Burst:
    for _ in range(WARM_UP):
        await cross()
    clock = _Clock()
    for _ in range(crossings):
        await cross()
    return clock.read()


def _burst_of_blocking(cross: Cross, crossings: int) -> Burst:
    for _ in range(WARM_UP):
        cross()
    clock = _Clock()
    for _ in range(crossings):
        cross()
    return clock.read()
