"""Many ranks in one process, each with its own barrier and connections, on one event loop.

Each crossing of ours has a new name, as a program that gives the step has.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from proxy import Traffic
from torch.distributed import TCPStore
from variants import BLOCKING, HOST, TIMEOUT_SECS

from async_barriers import StoreBarrier

KINDS = ["ours", "torch", "tc", "linear", "floor"]


class ManyRanks:
    """A part of a world, in one process; see `fleet.Fleet`.

    :param ports: of the ranks in this process, and the port of the store for each
    :param options: further arguments of our barriers
    """

    def __init__(
        self,
        _: int,
        kind: str,
        size: int,
        ports: Mapping[int, int],
        traffic: Traffic | None = None,
        **options: Any,
    ) -> None:
        logging.disable(logging.WARNING)
        self._size = size
        self._traffic = traffic
        self._runner = asyncio.Runner()
        self._threads = ThreadPoolExecutor(len(ports))
        self._barriers: list[StoreBarrier] = []
        self._crosses: dict[int, Callable[[], Awaitable[object]]] = {}
        if kind == "ours":
            self._make_ours(ports, options)
        else:
            self._make_blocking(kind, ports)

    def _make_ours(self, ports: Mapping[int, int], options: dict[str, Any]) -> None:
        # The barriers open their own connections from these; nothing else uses them.
        stores = {
            port: TCPStore(
                HOST, port, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_SECS)
            )
            for port in set(ports.values())
        }
        for rank, port in ports.items():
            barrier = StoreBarrier(stores[port], rank=rank, world_size=self._size, **options)
            self._barriers.append(barrier)
            self._crosses[rank] = self._of_steps(barrier)
        self._runner.run(self._connect())

    def _make_blocking(self, kind: str, ports: Mapping[int, int]) -> None:
        def make(rank: int) -> tuple[int, Callable[[], object]]:
            return rank, BLOCKING[kind](rank, self._size, ports[rank])

        with ThreadPoolExecutor(len(ports)) as makers:
            for rank, cross in makers.map(make, ports):
                self._crosses[rank] = self._in_thread(cross)

    def _of_steps(self, barrier: StoreBarrier) -> Callable[[], Awaitable[object]]:
        steps = itertools.count()
        return lambda: barrier.execute_barrier(f"step-{next(steps)}")

    def _in_thread(self, cross: Callable[[], object]) -> Callable[[], Awaitable[object]]:
        return lambda: asyncio.get_running_loop().run_in_executor(self._threads, cross)

    async def _connect(self) -> None:
        await asyncio.gather(*(barrier.connect() for barrier in self._barriers))

    def cross(self, crossings: int) -> float:
        """Have each rank cross so often, one crossing after the other; return the seconds."""

        async def burst() -> None:
            await asyncio.gather(*(several(cross) for cross in self._crosses.values()))

        async def several(cross: Callable[[], Awaitable[object]]) -> None:
            for _ in range(crossings):
                await cross()

        began = time.perf_counter()
        self._runner.run(burst())
        return time.perf_counter() - began

    def cpu_secs(self) -> float:
        """Of this process so far."""
        return time.process_time()

    def traffic_of_crossing(self) -> dict[int, dict[str, int]]:
        """Cross once; return each rank's traffic up to the return of its crossing."""
        traffic = self._traffic
        assert traffic is not None
        found: dict[int, dict[str, int]] = {}

        async def once(rank: int, cross: Callable[[], Awaitable[object]]) -> None:
            await cross()
            found[rank] = traffic.of(rank)

        async def all_of_them() -> None:
            await asyncio.gather(*(once(rank, cross) for rank, cross in self._crosses.items()))

        self._runner.run(all_of_them())
        return found

    def close(self) -> None:
        async def aclose() -> None:
            await asyncio.gather(*(barrier.aclose() for barrier in self._barriers))

        self._runner.run(aclose())
