"""One rank of two that has phases pending while its event loop does something else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from variants import HOST, TIMEOUT_SECS, make_torch

from async_barriers import StoreBarrier

TICK_SECS = 0.001
CHUNKS, CHUNK_BYTES = 16, 64 * 1024 * 1024


class Pending:
    """Rank ``number``; the others wait for rank 1. See `fleet.Fleet`."""

    def __init__(self, number: int, port: int) -> None:
        logging.disable(logging.WARNING)
        self._rank = number
        self._port = port
        self._runner = asyncio.Runner()
        self._round = 0
        self._store = TCPStore(
            HOST, port, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_SECS)
        )
        self._ours = StoreBarrier(self._store, rank=number, world_size=2)
        self._torch: list[Callable[[], object]] = []

    def connect(self, phases: int) -> None:
        """Connect before, so that only waiting is measured."""
        self._runner.run(self._ours.connect())
        self._torch = [
            make_torch(self._rank, 2, self._port, f"benchmark{number}-") for number in range(phases)
        ]

    def enter(self, kind: str, phases: int, after_secs: float) -> None:
        """Enter as the rank that is late."""

        async def enter() -> None:
            await asyncio.sleep(after_secs)
            async with self._awaited(kind, phases):
                pass

        self._runner.run(enter())

    def lags(self, kind: str, phases: int, secs: float) -> list[float]:
        """How late a ticker was, tick by tick, while so many phases were awaited."""

        async def measure() -> list[float]:
            late: list[float] = []
            ticker = asyncio.create_task(tick(late, secs))
            # Ticks begin before any phase is entered, so that entering counts.
            await asyncio.sleep(0.05)
            async with self._awaited(kind, phases):
                await ticker
            return late

        return self._runner.run(measure())

    def stage(self, kind: str, phases: int) -> float:
        """Seconds to copy and write 1 GiB in asyncio's own threads, with phases awaited."""

        async def measure() -> float:
            source = torch.ones(CHUNK_BYTES, dtype=torch.uint8)
            folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
            with tempfile.TemporaryDirectory(dir=folder) as name:
                async with self._awaited(kind, phases):
                    # Let them be entered.
                    await asyncio.sleep(0.3)
                    began = time.perf_counter()
                    await asyncio.gather(
                        *(
                            asyncio.to_thread(stage, source, Path(name) / str(chunk))
                            for chunk in range(CHUNKS)
                        )
                    )
                    return time.perf_counter() - began

        return self._runner.run(measure())

    def close(self) -> None:
        self._runner.run(self._ours.aclose())

    @contextlib.asynccontextmanager
    async def _awaited(self, kind: str, phases: int) -> AsyncIterator[None]:
        """Phases under way while the body runs; they end when the other rank enters."""
        waits: list[Coroutine[Any, Any, object]] = []
        if kind == "ours":
            waits += [self._ours.execute_barrier(f"phase {number}") for number in range(phases)]
        elif kind == "torch-thread":
            waits += [asyncio.to_thread(cross) for cross in self._torch[:phases]]
        elif kind == "torch-blocking":
            for cross in self._torch[:phases]:
                cross()
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        try:
            yield
        finally:
            await asyncio.gather(*tasks)


async def tick(late: list[float], secs: float) -> None:
    """Sleep for a tick again and again; return how late each was."""
    began = now = time.perf_counter()
    while now - began < secs:
        await asyncio.sleep(TICK_SECS)
        before, now = now, time.perf_counter()
        late.append(now - before - TICK_SECS)


def stage(source: torch.Tensor, path: Path) -> None:
    """Copy a tensor, as staging does, and write the copy, as an upload does."""
    copy = source.clone()
    with path.open("wb") as file:
        file.write(copy.numpy().data)
    path.unlink()
