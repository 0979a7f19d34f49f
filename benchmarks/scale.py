"""Hundreds of ranks on one machine: crossing time, and what each costs the store's server.

    python benchmarks/scale.py --sizes 64,256,1024 --only ours,torch

The server has a process of its own, the ranks share some processes. On one machine all ranks
share its cores, so the crossing time says little about a cluster; what the server spends on
each rank is what a cluster has to wait for, too, as one server serves all.
"""

from __future__ import annotations

import argparse
import time
from statistics import linear_regression
from typing import Any

import results
from fleet import Fleet
from many_ranks import ManyRanks
from proxy import Server
from results import shown, spread, table

PROCESSES = 8
PREDICTED = (1024, 10_000, 100_000)
# Of a data centre's network, from a rank to the server and back.
NETWORK_SECS = 200e-6
ROUND_TRIPS = 3


def main() -> None:
    args = parse_arguments()
    report = results.Report("Many ranks on one store")
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        found = measure(size, args.only, args.rounds, args.burst_secs)
        for kind, values in found.items():
            rows.append({"kind": kind, "size": size} | {k: spread(v) for k, v in values.items()})
        results.progress(f"{size} ranks")
    head = ["", "ranks", "ms per crossing", "server CPU us per rank", "ranks' CPU us per rank"]
    report.say(table(head, map(as_texts, rows)))
    fits = [fit(kind, [row for row in rows if row["kind"] == kind]) for kind in args.only]
    for line in fits:
        told = ", ".join(f"{n:,} ranks {secs:.2g} s" for n, secs in line["predicted_secs"].items())
        slope = line["server_cpu_secs_per_rank"] * 1e6
        report.say(f"{line['kind']}: {slope:.1f} us of the server for each rank; on paper: {told}")
    if args.save:
        report.save("scale", {"rows": rows, "fits": fits})


def measure(
    size: int, kinds: list[str], rounds: int, burst_secs: float
) -> dict[str, dict[str, list[float]]]:
    """All kinds at one size, each with a server of its own, in turns."""
    processes = min(PROCESSES, size)
    worlds = [World(kind, size, processes) for kind in kinds]
    found: dict[str, dict[str, list[float]]] = {
        kind: {"wall_secs": [], "server_cpu_secs_per_rank": [], "rank_cpu_secs_per_rank": []}
        for kind in kinds
    }
    try:
        counts = [world.crossings_in(burst_secs) for world in worlds]
        for _ in range(rounds):
            for world, count in zip(worlds, counts, strict=True):
                for field, value in world.burst(count).items():
                    found[world.kind][field].append(value)
    finally:
        for world in worlds:
            world.close()
    return found


class World:
    """The ranks of one kind, and their server."""

    def __init__(self, kind: str, size: int, processes: int) -> None:
        self.kind = kind
        self._size = size
        self._server = Fleet(1, Server)
        port = self._server.ask("port")[0]

        def part(number: int) -> ManyRanks:
            ports = dict.fromkeys(range(number, size, processes), port)
            return ManyRanks(number, kind, size, ports, timeout_secs=None, warn_after_secs=None)

        self._ranks = Fleet(processes, part)

    def crossings_in(self, secs: float) -> int:
        self._ranks.ask("cross", 2)
        took = spread(self._ranks.ask("cross", 3))["median"] / 3
        return max(3, min(500, round(secs / took)))

    def burst(self, count: int) -> dict[str, float]:
        # What the burst before left for the clean-up is not this one's.
        time.sleep(0.2)
        before = self._server.ask("cpu_secs")[0], sum(self._ranks.ask("cpu_secs"))
        wall = spread(self._ranks.ask("cross", count))["median"]
        time.sleep(0.2)
        after = self._server.ask("cpu_secs")[0], sum(self._ranks.ask("cpu_secs"))
        return {
            "wall_secs": wall / count,
            "server_cpu_secs_per_rank": (after[0] - before[0]) / count / self._size,
            "rank_cpu_secs_per_rank": (after[1] - before[1]) / count / self._size,
        }

    def close(self) -> None:
        self._ranks.__exit__(None, None, None)
        self._server.__exit__(None, None, None)


def fit(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The server's time for a crossing as a straight line; and what follows from it on paper."""
    sizes = [row["size"] for row in rows]
    secs = [row["size"] * row["server_cpu_secs_per_rank"]["median"] for row in rows]
    if len(sizes) > 1:
        slope, start = linear_regression(sizes, secs)
    else:
        slope, start = secs[0] / sizes[0], 0.0
    return {
        "kind": kind,
        "server_cpu_secs_per_rank": slope,
        "server_cpu_secs": start,
        "predicted_secs": {n: ROUND_TRIPS * NETWORK_SECS + start + n * slope for n in PREDICTED},
    }


def as_texts(row: dict[str, Any]) -> list[str]:
    return [
        row["kind"],
        str(row["size"]),
        shown(row["wall_secs"], 1e-3, 2),
        shown(row["server_cpu_secs_per_rank"], 1e-6, 1),
        shown(row["rank_cpu_secs_per_rank"], 1e-6, 1),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=results.numbers, default=[64, 256, 1024])
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=["ours", "torch", "floor"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst-secs", type=float, default=0.8, help="per kind and round")
    parser.add_argument("--save", action="store_true", help="write results/scale.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
