"""How long a crossing takes: ours and the alternatives, side by side in the same processes.

    python benchmarks/crossing.py --sizes 2,8,32 --rounds 7 --only ours-asyncio,torch-thread

Each round runs a short burst of sequential crossings of each variant, in a random order.
"""

from __future__ import annotations

import argparse
import functools
import random
from dataclasses import dataclass, field
from typing import Any

import results
from fleet import Fleet, free_port
from results import shown, spread, table
from variants import Burst, Crossers

VARIANTS = [
    *("ours-asyncio", "ours-uvloop", "ours-trio"),
    *("torch-blocking", "torch-thread", "torch-thread-uvloop"),
    *("tc-blocking", "tc-thread", "tc-thread-uvloop"),
    *("linear-blocking", "linear-thread", "linear-thread-uvloop"),
    *("gloo-blocking", "gloo-thread", "gloo-thread-uvloop"),
    *("floor-blocking", "floor-thread"),
]
PRODUCTS = ["asyncio", "uvloop", "trio", "torch", "tc", "linear", "gloo", "floor"]
# (ours, how alternatives are awaited there, at most so much of the best of those, and of
# torch's blocking barrier)
GOALS = (("ours-asyncio", "-thread", 0.8, 1.8), ("ours-uvloop", "-thread-uvloop", 0.7, 1.4))
# Not safe (see docs/design.md), so nothing that a user would pick.
FLOOR = "floor"


@dataclass
class Measured:
    """One variant at one size; each list has a value per round, in seconds per crossing."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "wall_secs": spread(self.wall),
            "cpu_secs_all_ranks": spread(self.cpu),
            "rounds": {"wall_secs": self.wall, "cpu_secs_all_ranks": self.cpu},
        }


def main() -> None:
    args = parse_arguments()
    report = results.Report("Crossing latency")
    measured: dict[int, dict[str, Measured]] = {}
    skipped: dict[str, str] = {}
    ratios: dict[int, list[dict[str, Any]]] = {}
    for size in args.sizes:
        found, lacking = measure(size, args.only, args.rounds, args.burst_secs)
        measured[size] = found
        skipped |= lacking
        ratios[size] = compare(found)
        report.say(described(size, found, ratios[size]))
    for variant, why in skipped.items():
        report.say(f"skipped {variant}: {why}")
    if args.save:
        sizes = {
            str(size): {
                "variants": {name: m.summary() for name, m in found.items()},
                "ratios": ratios[size],
            }
            for size, found in measured.items()
        }
        report.save("crossing", {"sizes": sizes, "skipped": skipped})


def measure(
    size: int, variants: list[str], rounds: int, burst_secs: float
) -> tuple[dict[str, Measured], dict[str, str]]:
    """All variants at one size; and which cannot be had, and why."""
    ports = {product: free_port() for product in PRODUCTS}
    with Fleet(size, functools.partial(Crossers, size=size, ports=ports)) as fleet:
        skipped = {v: why for v in variants if (why := fleet.ask("make", v)[0]) is not None}
        left = [variant for variant in variants if variant not in skipped]
        counts = {v: crossings_in(burst_secs, fleet.ask("burst", v, 5), 5) for v in left}
        measured = {variant: Measured() for variant in left}
        for _ in range(rounds):
            for variant in random.sample(left, len(left)):
                count = counts[variant]
                bursts: list[Burst] = fleet.ask("burst", variant, count)
                measured[variant].wall.append(spread(b.secs for b in bursts)["median"] / count)
                measured[variant].cpu.append(sum(b.cpu_secs for b in bursts) / count)
        fleet.ask("close")
    return measured, skipped


def crossings_in(secs: float, bursts: list[Burst], count: int) -> int:
    """How many crossings to make in ``secs``, going by a burst of ``count``."""
    took = spread(burst.secs for burst in bursts)["median"] / count
    return max(8, min(2000, round(secs / took)))


def compare(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Ours as a share of the best alternative and of torch's; round by round."""
    found = []
    for ours, how, of_best, of_blocking in GOALS:
        if ours not in measured:
            continue
        awaited = [v for v in measured if v.endswith(how) and not v.startswith(FLOOR)]
        awaited.sort(key=lambda v: spread(measured[v].wall)["median"])
        for other, goal in [(v, of_best) for v in awaited[:1]] + [("torch-blocking", of_blocking)]:
            if other in measured:
                pairs = zip(measured[ours].wall, measured[other].wall, strict=True)
                share = spread(mine / theirs for mine, theirs in pairs)
                found.append({"ours": ours, "of": other, "goal": goal, **share})
    return found


def described(size: int, measured: dict[str, Measured], ratios: list[dict[str, Any]]) -> str:
    rows = []
    for variant, found in measured.items():
        wall, cpu = spread(found.wall), spread(found.cpu)
        extremes = f"{wall['min'] * 1e6:.0f}..{wall['max'] * 1e6:.0f}"
        rows.append([variant, shown(wall, 1e-6), extremes, shown(cpu, 1e-6)])
    head = [f"{size} processes", "us per crossing (quartiles)", "extremes", "CPU us, all ranks"]
    lines = [table(head, rows)]
    for ratio in ratios:
        verdict = "reached" if ratio["median"] <= ratio["goal"] else "MISSED"
        lines.append(
            f"{ratio['ours']} of {ratio['of']}: {shown(ratio, digits=2)}, "
            f"goal {ratio['goal']}: {verdict}"
        )
    return "\n".join([*lines, ""])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--sizes", type=results.numbers, default=[2, 8, 32], help="processes: 2,8,32"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--burst-secs", type=float, default=0.12, help="per variant and round")
    parser.add_argument("--only", type=names, default=VARIANTS, help="variants, comma-separated")
    parser.add_argument("--save", action="store_true", help="write results/crossing.json")
    return parser.parse_args()


def names(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(VARIANTS):
        raise argparse.ArgumentTypeError(f"{unknown} not among {', '.join(VARIANTS)}")
    return chosen


if __name__ == "__main__":
    main()
