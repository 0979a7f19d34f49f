"""How an awaited phase delays the event loop: lag of a 1 ms ticker, against an idle loop.

python benchmarks/event_loop.py --phases 1,16,64 --secs 10
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
from typing import Any

import results
from fleet import Fleet
from pending import Pending
from proxy import Server
from results import table

ROUNDS = 2


def main() -> None:
    args = parse_arguments()
    report = results.Report(f"Lag of a 1 ms ticker, {args.secs:g} s for each row")
    conditions = [("idle", 0), ("torch-blocking", 1)]
    conditions += [(kind, n) for n in args.phases for kind in ("ours", "torch-thread")]
    late: dict[tuple[str, int], list[float]] = {condition: [] for condition in conditions}
    with Fleet(1, Server) as server:
        program = functools.partial(Pending, port=server.ask("port")[0])
        with Fleet(2, program) as ranks:
            ranks.ask("connect", max(args.phases))
            for _ in range(ROUNDS):
                for kind, phases in random.sample(conditions, len(conditions)):
                    late[kind, phases] += measure(ranks, kind, phases, args.secs / ROUNDS)
                    results.progress(f"{kind}, {phases} phases")
            ranks.ask("close")
    rows = [{"kind": kind, "phases": n, **summary(late[kind, n])} for kind, n in conditions]
    head = ["", "phases", "ticks", "median us", "p99 us", "p99.9 us", "worst ms"]
    report.say(table(head, map(as_texts, rows)))
    if args.save:
        report.save("event_loop", {"rows": rows})


def measure(ranks: Fleet, kind: str, phases: int, secs: float) -> list[float]:
    """How late each tick was on rank 0, while rank 1 keeps the phases pending."""
    ranks.start("lags", kind, phases, secs, ranks=[0])
    ranks.ask("enter", kind, phases, secs, ranks=[1])
    late: list[float] = ranks.answer(0)
    return late


def summary(late: list[float]) -> dict[str, Any]:
    shares = statistics.quantiles(late, n=1000, method="inclusive") if len(late) > 1 else late * 999
    return {
        "ticks": len(late),
        "median_secs": statistics.median(late),
        "p99_secs": shares[989],
        "p999_secs": shares[998],
        "worst_secs": max(late),
    }


def as_texts(row: dict[str, Any]) -> list[str]:
    micros = [f"{row[field] * 1e6:.0f}" for field in ("median_secs", "p99_secs", "p999_secs")]
    worst = f"{row['worst_secs'] * 1e3:.1f}"
    return [row["kind"], str(row["phases"]), str(row["ticks"]), *micros, worst]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--phases", type=results.numbers, default=[1, 16, 64])
    parser.add_argument("--secs", type=float, default=10.0, help="per row, in two rounds")
    parser.add_argument("--save", action="store_true", help="write results/event_loop.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
