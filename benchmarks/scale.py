"""Hundreds of ranks on one machine: crossing time, and what each costs the store's server.

    python benchmarks/scale.py --sizes 256,1024 --only ours,torch

The server has a process of its own, the ranks share some processes. Each crossing has a new
name. All ranks share the cores of one machine, so the crossing time says little about a cluster.
The server's time for each rank says more: in a cluster, too, one server serves all ranks.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from statistics import linear_regression
from typing import Any

import results
from fleet import Fleet
from many_ranks import KINDS, ManyRanks
from proxy import Server
from results import shown, spread, table

PROCESSES = 8
PREDICTED = (1024, 10_000, 100_000)
# The round trip of a data centre's network, from a rank to the server.
NETWORK_SECS = 200e-6
ROUND_TRIPS = 3
# The goal, as a share of torch's time in the same round.
GOALS = {"wall_secs": 1.0, "server_cpu_secs_per_rank": 1.1}
TITLES = {
    "wall_secs": "ms per crossing",
    "server_cpu_secs_per_rank": "server CPU us per rank",
    "rank_cpu_secs_per_rank": "ranks' CPU us per rank",
    "bytes_received_per_rank": "bytes received per rank",
}
UNITS = {"wall_secs": (1e-3, 2), "bytes_received_per_rank": (1.0, 1)}


def main() -> None:
    args = parse_arguments()
    allow_sockets()
    report = results.Report("Many ranks on one store, a new name per crossing")
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for size in args.sizes:
        found = measure(size, args.only, args.rounds, args.burst_secs)
        for kind, values in found.items():
            rows.append({"kind": kind, "size": size} | {k: spread(v) for k, v in values.items()})
        ratios += compare(size, found)
        results.progress(f"{size} ranks")
    report.say(table(["", "ranks", *TITLES.values()], map(as_texts, rows)))
    for ratio in ratios:
        verdict = "reached" if ratio["median"] <= ratio["goal"] else "MISSED"
        report.say(
            f"{TITLES[ratio['field']]} at {ratio['size']} ranks, of torch's: "
            f"{shown(ratio, digits=2)}, goal {ratio['goal']}: {verdict}"
        )
    report.say(growth([row for row in rows if row["kind"] == "ours"]))
    fits = [fit(kind, [row for row in rows if row["kind"] == kind]) for kind in args.only]
    for line in fits:
        told = ", ".join(f"{n:,} ranks {secs:.2g} s" for n, secs in line["predicted_secs"].items())
        slope = line["server_cpu_secs_per_rank"] * 1e6
        report.say(f"{line['kind']}: {slope:.1f} us of the server for each rank; on paper: {told}")
    if args.save:
        report.save("scale", {"rows": rows, "ratios": ratios, "fits": fits})


def allow_sockets() -> None:
    """Allow as many as possible: all ranks connect to one server."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def measure(
    size: int, kinds: list[str], rounds: int, burst_secs: float
) -> dict[str, dict[str, list[float]]]:
    """All kinds at one size, each with a server of its own, in turns."""
    processes = min(PROCESSES, size)
    found: dict[str, dict[str, list[float]]] = {
        kind: {field: [] for field in TITLES} for kind in kinds
    }
    worlds: list[World] = []
    try:
        for kind in kinds:
            worlds.append(World(kind, size, processes))
        counts = [world.crossings_in(burst_secs) for world in worlds]
        for _ in range(rounds):
            for world, count in zip(worlds, counts, strict=True):
                for field, value in world.burst(count).items():
                    found[world.kind][field].append(value)
    finally:
        for world in worlds:
            world.close()
    return found


def compare(size: int, found: dict[str, dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    """Ours as a share of torch's, round by round."""
    if "ours" in found and "torch" in found:
        for field, goal in GOALS.items():
            pairs = zip(found["ours"][field], found["torch"][field], strict=True)
            share = spread(ours / theirs for ours, theirs in pairs)
            yield {"size": size, "field": field, "goal": goal, **share}


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
        before = self._spent()
        wall = spread(self._ranks.ask("cross", count))["median"]
        server, ranks, sent = (b - a for a, b in zip(before, self._spent(), strict=True))
        return {
            "wall_secs": wall / count,
            "server_cpu_secs_per_rank": server / count / self._size,
            "rank_cpu_secs_per_rank": ranks / count / self._size,
            "bytes_received_per_rank": sent / count / self._size,
        }

    def _spent(self) -> tuple[float, float, float]:
        # The clean-up counts for the burst that left it.
        time.sleep(0.2)
        server = self._server
        ranks = sum(self._ranks.ask("cpu_secs"))
        return server.ask("cpu_secs")[0], ranks, server.ask("bytes_sent")[0]

    def close(self) -> None:
        self._ranks.__exit__(None, None, None)
        self._server.__exit__(None, None, None)


def growth(ours: list[dict[str, Any]]) -> str:
    """Whether what a rank receives grows with the world."""
    received = [row["bytes_received_per_rank"]["median"] for row in ours]
    if len(received) < 2:
        return ""
    # One message more or less, for all ranks together, is no growth.
    verdict = "constant" if max(received) <= 1.1 * min(received) else "MISSED"
    return (
        f"bytes received per rank: {min(received):.1f} to {max(received):.1f} over worlds of "
        f"{ours[0]['size']} to {ours[-1]['size']} ranks, goal constant: {verdict}"
    )


def fit(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit a straight line to the server's time for a crossing; return what follows on paper."""
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
    told = [shown(row[field], *UNITS.get(field, (1e-6, 1))) for field in TITLES]
    return [row["kind"], str(row["size"]), *told]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=results.numbers, default=[256, 1024, 4096])
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=["ours", "torch"],
        help=f"some of {', '.join(KINDS)}",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst-secs", type=float, default=0.8, help="per kind and round")
    parser.add_argument("--save", action="store_true", help="write results/scale.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
