"""How late ranks are told of a deadline that is the same for all: 1,024 ranks and one missing.

    python benchmarks/deadlines.py --sizes 256,1024 --rounds 5

The last rank never comes, and all others' deadlines pass in one instant. The time runs from there
to the error on each of them; it is to be 1 s at most. All ranks share the cores of one machine, as
they do not in a cluster, and the server has a process of its own. A commit's payloads have 200
bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import results
from fleet import Fleet
from many_ranks import ManyRanks
from proxy import Server
from results import shown, spread, table
from scale import PROCESSES, allow_sockets

from async_barriers import BarrierConnectionError, BarrierTimeoutError, StoreBarrier

USES = ("execute_barrier", "commit", "all_gather")
# Time for all to enter, for each rank.
ENTER_SECS = 0.004
GOAL_SECS = 1.0
_PAYLOAD = b"p" * 200


class Waiting(ManyRanks):
    """All ranks of one process but the missing one; see `fleet.Fleet`."""

    def __init__(self, number: int, size: int, port: int) -> None:
        ports = dict.fromkeys(range(number, size, PROCESSES), port)
        super().__init__(number, "ours", size, ports, warn_after_secs=None)
        self._missing = size - 1
        ranks = zip(ports, self._barriers, strict=True)
        self._waiting = [barrier for rank, barrier in ranks if rank != self._missing]

    def wait_until(self, use: str, name: str, at: float) -> list[float]:
        """Enter the phase with a deadline ``at``, by `time.monotonic`; how late each was told."""

        async def told() -> list[float]:
            told = (self._told(barrier, use, name, at) for barrier in self._waiting)
            return await asyncio.gather(*told)

        return self._runner.run(told())

    async def _told(self, barrier: StoreBarrier, use: str, name: str, at: float) -> float:
        calls: dict[str, Callable[..., Awaitable[object]]] = {
            "execute_barrier": barrier.execute_barrier,
            "commit": functools.partial(barrier.commit, publish=lambda _: None, payload=_PAYLOAD),
            "all_gather": functools.partial(barrier.all_gather, _PAYLOAD),
        }
        named: tuple[int, ...] = ()
        try:
            await calls[use](name=name, timeout_secs=at - time.monotonic())
        except BarrierTimeoutError as exc:
            named = exc.missing_ranks
        except BarrierConnectionError:
            # The store did not answer in time.
            return math.inf
        if named != (self._missing,):
            raise AssertionError(f"{named} were named, not {self._missing}")
        return time.monotonic() - at


def main() -> None:
    args = parse_arguments()
    allow_sockets()
    report = results.Report("How late ranks are told of one deadline, of which one rank is missing")
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        rows += measure(size, args.rounds)
        results.progress(f"{size} ranks")
    head = ["", "ranks", "median rank, ms", "last rank, ms", "worst of all, ms"]
    report.say(table(head, map(as_texts, rows)))
    worst = max(row["last"]["max"] for row in rows)
    verdict = "reached" if worst <= GOAL_SECS else "MISSED"
    report.say(f"the last rank was told {worst:.2f} s late, goal {GOAL_SECS:g}: {verdict}")
    if args.save:
        report.save("deadlines", {"rows": rows})


def measure(size: int, rounds: int) -> list[dict[str, Any]]:
    """All uses at one size, in turns."""
    every: dict[str, list[list[float]]] = {use: [] for use in USES}
    with Fleet(1, Server) as server:
        program = functools.partial(Waiting, size=size, port=server.ask("port")[0])
        with Fleet(PROCESSES, program) as ranks:
            ranks.ask("cross", 2)
            for number in range(rounds):
                for use in USES:
                    at = time.monotonic() + 0.5 + ENTER_SECS * size
                    told = ranks.ask("wait_until", use, f"{use}{number}", at)
                    every[use].append([late for some in told for late in some])
    return [
        {
            "use": use,
            "size": size,
            "each": spread(late for some in found for late in some),
            "last": spread(max(some) for some in found),
        }
        for use, found in every.items()
    ]


def as_texts(row: dict[str, Any]) -> list[str]:
    each, last = row["each"], row["last"]
    return [
        row["use"], str(row["size"]), shown(each, 1e-3), shown(last, 1e-3),
        f"{last['max'] * 1e3:.0f}",
    ]  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=results.numbers, default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write results/deadlines.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
