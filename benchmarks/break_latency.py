"""How long until all ranks know that a rank gave up: abort, cancellation, exception.

    python benchmarks/break_latency.py --sizes 2,8,32 --rounds 15

All ranks but one wait in a phase, and the last one breaks it. The time runs on the machine's one
monotonic clock, from just before the break to the error on each of the other ranks. Of the
alternatives only torchsnapshot's LinearBarrier can tell its peers that a rank failed. With the
others, peers wait for their timeouts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import random
import time
import warnings
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import results
from fleet import Fleet
from proxy import Server
from results import shown, spread, table
from torch.distributed import TCPStore
from variants import HOST, TIMEOUT_SECS

from async_barriers import BrokenBarrierError, StoreBarrier

# The first is the use that is recommended.
WAYS = ("exception, step", "abort", "cancel", "exception", "linear")
LATE = "(comes late)"
# After so long all others wait.
SETTLE_SECS = 0.25
_TIMEOUT = timedelta(seconds=TIMEOUT_SECS)


class Breakable:
    """One rank of ``size``, the last of which breaks the phase; and of a world that lacks one.

    See `fleet.Fleet`.
    """

    def __init__(self, rank: int, size: int, port: int) -> None:
        logging.disable(logging.WARNING)
        self._rank = rank
        self._size = size
        self._breaks = rank == size - 1
        self._runner = asyncio.Runner()
        self._store = TCPStore(HOST, port, wait_for_workers=False, timeout=_TIMEOUT)
        self._barrier = StoreBarrier(self._store, rank=rank, world_size=size + 1)

    def cross(self, name: str) -> None:
        """With the missing rank."""
        self._runner.run(self._barrier.execute_barrier(name))

    def take_part(self, way: str, name: str, step: int | None) -> float:
        """The time at which the last rank began to break it; on the others, at which they knew."""
        if way == "linear":
            return self._linear(name)
        part: Callable[[str, int | None], Coroutine[Any, Any, float]] = self._wait
        if self._breaks:
            part = getattr(self, f"_{way.partition(',')[0]}")
        return self._runner.run(part(name, step))

    def come_late(self, name: str, step: int | None) -> float:
        """As the missing rank: how long it took to learn that the phase is broken."""
        began = time.monotonic()
        return self._runner.run(self._wait(name, step)) - began

    def close(self) -> None:
        self._runner.run(self._barrier.aclose())

    async def _wait(self, name: str, step: int | None) -> float:
        try:
            await self._barrier.execute_barrier(name, step=step)
        except BrokenBarrierError:
            return time.monotonic()
        raise AssertionError("released, though a rank gave up")

    async def _abort(self, name: str, step: int | None) -> float:
        await asyncio.sleep(SETTLE_SECS)
        began = time.monotonic()
        await self._barrier.abort("to see how long it takes", name, step=step)
        return began

    async def _cancel(self, name: str, step: int | None) -> float:
        waiting = asyncio.create_task(self._barrier.execute_barrier(name, step=step))
        await asyncio.sleep(SETTLE_SECS)
        began = time.monotonic()
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        return began

    async def _exception(self, name: str, step: int | None) -> float:
        began = 0.0
        with contextlib.suppress(LookupError):
            async with self._barrier.phase(name, step=step):
                await asyncio.sleep(SETTLE_SECS)
                began = time.monotonic()
                raise LookupError("to see how long it takes")
        return began

    def _linear(self, name: str) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchsnapshot.dist_store import LinearBarrier
        barrier = LinearBarrier(name, self._store, self._rank, self._size, 0)
        if self._breaks:
            time.sleep(SETTLE_SECS)
            began = time.monotonic()
            barrier.report_error("to see how long it takes")
            return began
        try:
            barrier.arrive(_TIMEOUT)
            barrier.depart(_TIMEOUT)
        except RuntimeError:
            return time.monotonic()
        raise AssertionError("released, though a rank gave up")


def main() -> None:
    args = parse_arguments()
    report = results.Report("From giving up on one rank to the error on all others")
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        rows += measure(size, args.rounds)
        results.progress(f"{size} ranks")
    head = ["", "ranks", "each: median ms", "worst", "last of a round: median ms"]
    report.say(table(head, map(as_texts, rows)))
    if args.save:
        report.save("break_latency", {"rows": rows})


def measure(size: int, rounds: int) -> list[dict[str, Any]]:
    """All ways at one size, round by round in a random order."""
    every: dict[str, list[float]] = {way: [] for way in (*WAYS, LATE)}
    last: dict[str, list[float]] = {way: [] for way in (*WAYS, LATE)}
    with Fleet(1, Server) as server:
        program = functools.partial(Breakable, size=size, port=server.ask("port")[0])
        with Fleet(size + 1, program) as ranks:
            ranks.ask("cross", "warm-up")
            for number in range(rounds):
                for way in random.sample(WAYS, len(WAYS)):
                    by_step = way.endswith("step")
                    phase = (way, number) if by_step else (f"{way}{number}", None)
                    *knew, began = ranks.ask("take_part", way, *phase, ranks=range(size))
                    every[way] += [when - began for when in knew]
                    last[way].append(max(knew) - began)
                    if way != "linear":
                        late = ranks.ask("come_late", *phase, ranks=[size])
                        every[LATE] += late
                        last[LATE] += late
            ranks.ask("close")
    return [
        {"way": way, "size": size, "each_secs": spread(every[way]), "last_secs": spread(last[way])}
        for way in every
    ]


def as_texts(row: dict[str, Any]) -> list[str]:
    each = row["each_secs"]
    worst = f"{each['max'] * 1e3:.2f}"
    return [
        row["way"],
        str(row["size"]),
        shown(each, 1e-3, 2),
        worst,
        shown(row["last_secs"], 1e-3, 2),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=results.numbers, default=[2, 8, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write results/break_latency.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
