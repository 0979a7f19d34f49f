"""How long a crossing takes: every use of ours next to what a user would write instead.

    python benchmarks/crossing.py --sizes 2,8 --only "new name,commit" --loops asyncio,trio

Each round runs a short burst of sequential crossings of each, in a random order, in the same
processes and over the same server.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import results
from fleet import Fleet
from proxy import Server
from results import shown, spread, table
from variants import LOOPS, STORES, USES, Burst, Crossers, Variant, is_commit

# The goal, as a share of the best alternative's time: (of a barrier, of a commit).
GOALS = {"asyncio": (0.8, 0.7), "uvloop": (0.85, 0.75), "trio": (0.95, 0.85)}
# For comparison only: these block their thread, and the floor is not safe (see docs/design.md).
REFERENCES = [Variant("torch", "barrier"), Variant("torch", "commit"), Variant("floor", "barrier")]
OTHERS = ["tc", "linear", "gloo"]
# Time to clean up after the burst before.
PAUSE_SECS = 0.005


@dataclass
class Measured:
    """One variant at one size; each list has a value per round, in seconds per crossing."""

    wall: list[float] = field(default_factory=list)
    cpu_per_rank: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "wall_secs": spread(self.wall),
            "cpu_secs_per_rank": spread(self.cpu_per_rank),
            "rounds": {"wall_secs": self.wall, "cpu_secs_per_rank": self.cpu_per_rank},
        }


@dataclass(frozen=True)
class Ratio:
    """One use of ours, as a share of the best alternative; round by round."""

    ours: Variant
    share: dict[str, float]
    best_secs: dict[str, float]

    @property
    def goal(self) -> float:
        return GOALS[self.ours.loop][is_commit(self.ours.use)]

    @property
    def missed(self) -> bool:
        return self.share["median"] > self.goal


def main() -> None:
    args = parse_arguments()
    report = results.Report("Crossing latency: ours, and of the best alternative of the same round")
    groups = chosen(args)
    sizes: dict[int, Any] = {}
    ratios: dict[int, list[Ratio]] = {}
    skipped: dict[str, str] = {}
    for size in args.sizes:
        count = max(8, round(args.crossings * (2 / size) ** 0.5))
        measured, lacking = measure(size, groups, args.rounds, count)
        skipped |= lacking
        ratios[size] = compare(measured)
        report.say(described(size, count, measured, ratios[size]))
        sizes[size] = {
            "variants": {str(variant): found.summary() for variant, found in measured.items()},
            "ratios": [
                {**vars(ratio.ours), "goal": ratio.goal, **ratio.share} for ratio in ratios[size]
            ],
        }
    report.say(summarised(ratios))
    for variant, why in skipped.items():
        report.say(f"skipped {variant}: {why}")
    if args.save:
        report.save("crossing", {"sizes": sizes, "skipped": skipped})


def chosen(args: argparse.Namespace) -> list[list[Variant]]:
    """The variants to measure, in groups to compare."""
    groups = [REFERENCES]
    kinds = {"commit" if is_commit(use) else "barrier" for use in args.only}
    for store in args.stores:
        for loop in args.loops:
            group = [Variant("ours", use, store, loop) for use in args.only]
            group += [Variant("torch", kind, store, loop) for kind in sorted(kinds)]
            if args.all and store == "bare" and "barrier" in kinds:
                group += [Variant(other, "barrier", store, loop) for other in OTHERS]
            groups.append(group)
    return groups


def measure(
    size: int, groups: list[list[Variant]], rounds: int, count: int
) -> tuple[dict[Variant, Measured], dict[str, str]]:
    """Measure all variants at one size; also return which are not available, and why."""
    measured: dict[Variant, Measured] = {}
    skipped: dict[str, str] = {}
    with Fleet(1, Server) as server:
        port = server.ask("port")[0]
        with Fleet(size, functools.partial(Crossers, size=size, port=port)) as fleet:
            for variant in (variant for group in groups for variant in group):
                if (why := fleet.ask("make", variant)[0]) is None:
                    measured[variant] = Measured()
                else:
                    skipped[str(variant)] = why
            for number in range(rounds):
                # Variants to compare run close together, since the machine's speed changes.
                for group in random.sample(groups, len(groups)):
                    for variant in random.sample(group, len(group)):
                        if variant in measured:
                            burst(fleet, variant, count, measured[variant])
                results.progress(f"{size} processes, round {number + 1} of {rounds}")
            fleet.ask("close")
    return measured, skipped


def burst(fleet: Fleet, variant: Variant, count: int, found: Measured) -> None:
    bursts: list[Burst] = fleet.ask("burst", variant, count)
    found.wall.append(spread(each.secs for each in bursts)["median"] / count)
    found.cpu_per_rank.append(sum(each.cpu_secs for each in bursts) / count / fleet.size)
    time.sleep(PAUSE_SECS)


def compare(measured: dict[Variant, Measured]) -> list[Ratio]:
    found = []
    for ours in measured:
        rivals = [measured[other].wall for other in measured if is_alternative(other, ours)]
        if rivals:
            best = [min(walls) for walls in zip(*rivals, strict=True)]
            shares = [a / b for a, b in zip(measured[ours].wall, best, strict=True)]
            found.append(Ratio(ours, spread(shares), spread(best)))
    return found


def is_alternative(other: Variant, ours: Variant) -> bool:
    return (
        (ours.who == "ours" != other.who)
        and (other.store, other.loop) == (ours.store, ours.loop)
        and is_commit(other.use) == is_commit(ours.use)
    )


def described(size: int, count: int, measured: dict[Variant, Measured], ratios: list[Ratio]) -> str:
    head = ["us per crossing", "CPU us per rank", "us of the best", "ratio", "goal", ""]
    rows = []
    for ratio in ratios:
        ours = ratio.ours
        rows.append(
            [
                f"{ours.use}, {ours.store}, {ours.loop}",
                *in_us(measured[ours]),
                f"{ratio.best_secs['median'] * 1e6:.0f}",
                shown(ratio.share, digits=2),
                f"{ratio.goal}",
                "MISSED" if ratio.missed else "",
            ]
        )
    others = [[str(who), *in_us(of)] for who, of in measured.items() if who.who != "ours"]
    title = f"{size} processes, {count} crossings a burst"
    return f"{table([title, *head], rows)}\n\n{table(['alternatives', *head[:2]], others)}\n"


def in_us(found: Measured) -> list[str]:
    return [shown(spread(values), 1e-6) for values in (found.wall, found.cpu_per_rank)]


def summarised(ratios: dict[int, list[Ratio]]) -> str:
    """One line per use and store, one column per loop, in each the medians of all sizes."""
    every = [ratio for of_size in ratios.values() for ratio in of_size]
    cells: dict[str, dict[str, str]] = {}
    for ratio in every:
        row = cells.setdefault(f"{ratio.ours.use}, {ratio.ours.store}", {})
        told = f"{ratio.share['median']:.2f}{'!' if ratio.missed else ' '}"
        row[ratio.ours.loop] = f"{row.get(ratio.ours.loop, '')} {told}"
    loops = list(dict.fromkeys(ratio.ours.loop for ratio in every))
    head = [f"ratios at {', '.join(map(str, ratios))} processes", *loops]
    rows = [[name, *(row.get(loop, "-") for loop in loops)] for name, row in cells.items()]
    missed = sum(ratio.missed for ratio in every)
    return f"{table(head, rows)}\n{missed} of {len(every)} goals MISSED (!)"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--sizes", type=results.numbers, default=[2, 8, 32], help="processes: 2,8,32"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--crossings", type=int, default=100, help="in a burst at 2 processes; fewer at more"
    )
    parser.add_argument("--only", type=some_of(USES), default=list(USES), help="uses")
    parser.add_argument("--loops", type=some_of(LOOPS), default=LOOPS)
    parser.add_argument("--stores", type=some_of(STORES), default=STORES)
    parser.add_argument("--all", action="store_true", help=f"with {', '.join(OTHERS)}")
    parser.add_argument("--save", action="store_true", help="write results/crossing.json")
    return parser.parse_args()


def some_of(known: Any) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        some = text.split(",")
        if unknown := set(some) - set(known):
            raise argparse.ArgumentTypeError(f"{unknown} not among {', '.join(known)}")
        return some

    return names


if __name__ == "__main__":
    main()
