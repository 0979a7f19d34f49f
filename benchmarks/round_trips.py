"""How many round trips, messages and bytes a crossing takes: counted, not timed.

    python benchmarks/round_trips.py --sizes 2,8,64 --only ours,torch

Each rank talks to a real TCPStore through its own proxy, which counts. The proxy delays each reply.
So when a crossing returns on a rank, the replies until then are those of its critical path: the
requests of the clean-up have no reply yet.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import results
from fleet import Fleet
from many_ranks import KINDS, ManyRanks
from proxy import Proxy, Server, Traffic, difference
from results import table

GOALS = {"critical": 3, "all": 6}
CROSSINGS = 3
# Ranks of the alternatives; theirs are constant, or grow in an obvious way.
MOST = 64
# The store is slow on purpose: no rank is to report, or to give up.
PATIENT: dict[str, Any] = {
    "timeout_secs": None,
    "warn_after_secs": None,
    "timeout_barrier_init_secs": 60.0,
}


def main() -> None:
    args = parse_arguments()
    report = results.Report("Round trips, messages and bytes, per rank and crossing")
    rows = []
    for kind in args.only:
        for size in args.sizes:
            if kind != "ours" and size > MOST:
                continue
            rows.append(count(kind, size))
            results.progress(f"{kind} at {size} ranks")
    head = [
        "",
        "ranks",
        "critical",
        "in all",
        "requests",
        "bytes sent",
        "received",
        "requests by kind",
    ]
    report.say(table(head, map(as_texts, rows)))
    verdicts = list(judge([row for row in rows if row["kind"] == "ours"]))
    report.say("\n".join(verdicts))
    if args.save:
        report.save("round_trips", {"rows": rows, "verdicts": verdicts})


def count(kind: str, size: int) -> dict[str, Any]:
    """One kind of barrier at one world size."""
    traffic = Traffic(size)
    # The alternatives clean nothing up.
    delay_secs = 0.02 + 0.001 * size if kind == "ours" else 0.0
    still_secs = 0.1 + 3 * delay_secs
    with Fleet(1, Server) as server:
        port = server.ask("port")[0]
        with Fleet(1, functools.partial(Proxy, server_port=port, traffic=traffic)) as proxy:
            ports = dict(enumerate(proxy.ask("ports")[0]))
            world = functools.partial(
                ManyRanks, kind=kind, size=size, ports=ports, traffic=traffic, **PATIENT
            )
            with Fleet(1, world) as ranks:
                ranks.ask("cross", 2)
                traffic.settled(still_secs)
                proxy.ask("hold_back", delay_secs)
                before = traffic.settled(still_secs)
                kinds = Counter(proxy.ask("requests")[0])
                critical: list[dict[str, int]] = []
                whole: list[dict[str, int]] = []
                for _ in range(CROSSINGS):
                    returned = ranks.ask("traffic_of_crossing")[0]
                    after = traffic.settled(still_secs)
                    critical += [difference(returned[rank], before[rank]) for rank in range(size)]
                    whole += [difference(after[rank], before[rank]) for rank in range(size)]
                    before = after
                kinds = Counter(proxy.ask("requests")[0]) - kinds
    return {
        "kind": kind,
        "size": size,
        "critical": summary(critical),
        "all": summary(whole),
        "requests": {name: number / size / CROSSINGS for name, number in kinds.items()},
    }


def summary(counts: list[dict[str, int]]) -> dict[str, Any]:
    """For each field, the mean over ranks and crossings, and the highest value of one rank."""
    return {
        field: {
            "mean": sum(of[field] for of in counts) / len(counts),
            "max": max(of[field] for of in counts),
        }
        for field in Traffic.FIELDS
    }


def as_texts(row: dict[str, Any]) -> list[str]:
    every = row["all"]
    kinds = sorted(row["requests"].items(), key=lambda item: -item[1])
    return [
        row["kind"],
        str(row["size"]),
        *(
            f"{row[part]['round_trips']['mean']:.2f} ({row[part]['round_trips']['max']})"
            for part in ("critical", "all")
        ),
        *(f"{every[field]['mean']:.1f}" for field in ("requests", "bytes_sent", "bytes_received")),
        ", ".join(f"{number:.2f} {name}" for name, number in kinds),
    ]


def judge(ours: list[dict[str, Any]]) -> Iterable[str]:
    """Our counts against the goals."""
    for part, goal in GOALS.items():
        most = {row["size"]: row[part]["round_trips"]["max"] for row in ours}
        if most:
            verdict = "reached" if max(most.values()) <= goal else "MISSED"
            span = f"{min(most.values())} to {max(most.values())}"
            yield (
                f"round trips of ours, {part}: {span} on the busiest rank over sizes "
                f"{min(most)} to {max(most)}, goal {goal}: {verdict}"
            )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=results.numbers, default=[2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--only", type=lambda text: text.split(","), default=KINDS)
    parser.add_argument("--save", action="store_true", help="write results/round_trips.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
