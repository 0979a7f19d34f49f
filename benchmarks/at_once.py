"""How long phases take that a rank awaits at once: ours over sockets and in threads, and torch's.

    python benchmarks/at_once.py --ranks 4 --names 1,9,32 --rounds 7

In each round every rank enters all names at once, a few times over. What is set against ours is a
`TCPStoreBarrier` of torch's per name, each in a thread of its own, as a program with an event loop
would call it.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import results
from fleet import Fleet
from proxy import Server
from results import numbers, shown, spread, table
from variants import TIMEOUT_SECS, Cross, make_store, make_torch

from async_barriers import StoreBarrier

WAYS = ["sockets", "worker threads", "torch in threads"]


class AtOnce:
    """One rank."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        logging.disable(logging.INFO)
        self._rank, self._size, self._port = rank, size, port
        self._runner = asyncio.Runner()
        self._ours: dict[str, StoreBarrier] = {}
        self._torchs: list[Cross] = []
        # It starts threads as they are needed.
        self._pool = ThreadPoolExecutor(256)

    def cross(self, way: str, names: int, times: int) -> float:
        """Seconds per crossing of all names, the first of which do not count."""
        each = self._torch if way.startswith("torch") else functools.partial(self._cross, way)
        calls = [each(name) for name in range(names)]
        return self._runner.run(_timed(calls, times))

    def close(self) -> None:
        for barrier in self._ours.values():
            self._runner.run(barrier.aclose())

    def _cross(self, way: str, name: int) -> Callable[[], Awaitable[object]]:
        if way not in self._ours:
            self._ours[way] = StoreBarrier(
                make_store(self._port),
                rank=self._rank,
                world_size=self._size,
                prefix=way,
                timeout_secs=TIMEOUT_SECS,
                worker_threads=way == "worker threads",
            )
        return functools.partial(self._ours[way].execute_barrier, f"name-{name}")

    def _torch(self, name: int) -> Callable[[], Awaitable[object]]:
        while len(self._torchs) <= name:
            prefix = f"torch-{len(self._torchs)}"
            self._torchs.append(make_torch(self._rank, self._size, self._port, prefix))
        call = self._torchs[name]
        return lambda: asyncio.get_running_loop().run_in_executor(self._pool, call)


async def _timed(calls: list[Callable[[], Awaitable[object]]], times: int) -> float:
    await _all(calls)
    began = time.perf_counter()
    for _ in range(times):
        await _all(calls)
    return (time.perf_counter() - began) / times


async def _all(calls: list[Callable[[], Awaitable[object]]]) -> None:
    await asyncio.gather(*(call() for call in calls))


def main() -> None:
    args = parse_arguments()
    report = results.Report(f"Phases awaited at once by {args.ranks} ranks, on asyncio")
    taken: dict[tuple[str, int], list[float]] = {}
    with Fleet(1, Server) as server:
        make = functools.partial(AtOnce, size=args.ranks, port=server.ask("port")[0])
        with Fleet(args.ranks, make) as fleet:
            for number in range(args.rounds):
                for names in args.names:
                    for way in random.sample(WAYS, len(WAYS)):
                        secs = fleet.ask("cross", way, names, args.times)
                        taken.setdefault((way, names), []).append(max(secs))
                results.progress(f"round {number + 1} of {args.rounds}")
            fleet.ask("close")
    found: dict[str, Any] = {}
    rows = []
    for (way, names), secs in sorted(taken.items()):
        shares = [a / b for a, b in zip(secs, taken[WAYS[-1], names], strict=True)]
        found[f"{way}, {names}"] = {"secs": spread(secs), "of_torchs": spread(shares)}
        rows.append(
            [f"{way}, {names}", shown(spread(secs), 1e-3, 2), shown(spread(shares), digits=2)]
        )
    report.say(table(["way, names at once", "ms", "of torch's"], rows))
    if args.save:
        report.save("at_once", {"ranks": args.ranks, "ways": found})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--names", type=numbers, default=[1, 9, 32], help="how many at once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--times", type=int, default=5, help="crossings of all names per round")
    parser.add_argument("--save", action="store_true", help="write results/at_once.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
