"""What the facts of all ranks mean, what to do about it, and how to print that."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from .._errors import (
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    plural_ranks,
)
from .measure import Facts

_SLOW_CONNECT_SECS = 1.0
_SLOW_TRIP_SECS = 0.01
_SLOW_LOOP_SECS = 0.05
# A straggler is last in most phases, and the others notice.
_OFTEN_LAST = 0.6
_LONG_WAIT_SECS = 0.005


@dataclass(frozen=True)
class Finding:
    """Something to know, and what to do about it."""

    what: str
    remedy: str


@dataclass
class Report:
    """What the doctor says; with a problem the exit status is 1, with notes alone it is 0."""

    ranks: list[Facts] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> str:
        return json.dumps({"ok": self.ok, **asdict(self)})

    def as_text(self) -> str:
        lines = ["async_barriers doctor"]
        if self.ranks:
            lines += ["", *_table(self.ranks), ""]
            lines.append(", ".join(f"{k} {v}" for k, v in self.ranks[0].versions.items()))
        for title, findings in (("PROBLEM", self.problems), ("note", self.notes)):
            for finding in findings:
                lines += ["", f"{title}: {finding.what}", f"    {finding.remedy}"]
        lines += ["", "All is well." if self.ok else "Something is wrong; see above."]
        return "\n".join(lines)


def of_facts(ranks: Sequence[Facts]) -> Report:
    """What to say when every rank answered."""
    report = Report(list(ranks))
    report.problems.extend(_disagreements(ranks))
    report.notes.extend(_slowness(ranks))
    return report


def of_error(error: BarrierError | ValueError, seen: str = "") -> Report:
    """What to say when the ranks did not get so far; ``seen`` is what a probe of the port saw."""
    if isinstance(error, BarrierTimeoutError) and error.missing_ranks:
        remedy = (
            f"look at the output of {plural_ranks(error.missing_ranks)}: did it start, with the "
            "same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and does it run the doctor too? If it "
            "is slow to start, give a longer --timeout-secs"
        )
    elif isinstance(error, BarrierConnectionError):
        remedy = (
            f"{seen}: MASTER_ADDR and MASTER_PORT must name the machine and port of rank 0's "
            "store, on every rank; rank 0 must be up, no firewall between, no other program there"
        )
    elif isinstance(error, ValueError):
        remedy = "start it as `torchrun ... -m async_barriers doctor`, or without any of these set"
    else:
        remedy = "see the output of the rank that is named, and that all ranks were started alike"
    return Report(problems=[Finding(str(error), remedy)])


def _disagreements(ranks: Sequence[Facts]) -> Iterable[Finding]:
    for what in ranks[0].versions:
        yield from _differ(
            f"version of {what}",
            [facts.versions[what] for facts in ranks],
            "install the same versions on all ranks: peers of another version may write to the "
            "store what this one does not understand",
        )
    yield from _differ(
        "world size",
        [str(facts.world_size) for facts in ranks],
        "start all ranks with the same WORLD_SIZE",
    )
    yield from _differ(
        "generation",
        [str(facts.generation) for facts in ranks],
        "a rank joined again meanwhile: see whether one restarts, or two processes share a RANK",
    )


def _differ(what: str, values: Sequence[str], remedy: str) -> Iterable[Finding]:
    if len(set(values)) > 1:
        having = "; ".join(
            f"{value} on {plural_ranks(tuple(r for r, v in enumerate(values) if v == value))}"
            for value in sorted(set(values))
        )
        yield Finding(f"the ranks differ in the {what}: {having}", remedy)


def _slowness(ranks: Sequence[Facts]) -> Iterable[Finding]:
    slow = tuple(f.rank for f in ranks if f.connect_secs > _SLOW_CONNECT_SECS)
    if slow:
        yield Finding(
            f"{plural_ranks(slow)} took longer than {_SLOW_CONNECT_SECS:g} s to open a connection",
            "c10d looks up its peer's host name; where the resolver is slow, set "
            'RES_OPTIONS="timeout:1 attempts:1", or put the hosts into /etc/hosts',
        )
    slow = tuple(f.rank for f in ranks if f.round_trip.median > _SLOW_TRIP_SECS)
    if slow:
        yield Finding(
            f"a round trip to the store takes {plural_ranks(slow)} more than "
            f"{_SLOW_TRIP_SECS * 1e3:g} ms",
            "see the network between there and rank 0's machine, and that machine's load",
        )
    slow = tuple(f.rank for f in ranks if f.loop_lag.p99 > _SLOW_LOOP_SECS)
    if slow:
        yield Finding(
            f"the event loop of {plural_ranks(slow)} was held up for more than "
            f"{_SLOW_LOOP_SECS * 1e3:g} ms",
            "that machine has fewer free cores than processes that want one",
        )
    crossings = sum(ranks[0].last_ranks.values())
    for rank, times in ranks[0].last_ranks.items():
        others = [f.crossing.median for f in ranks if f.rank != rank]
        if times > _OFTEN_LAST * crossings and min(others, default=0.0) > _LONG_WAIT_SECS:
            yield Finding(
                f"rank {rank} was the last in {times} of {crossings} crossings, and every other "
                f"rank waited {min(others) * 1e3:.1f} ms for it or longer, half of the time",
                f"see what slows rank {rank} down: its machine's load, its network",
            )


_HEAD = (
    ("", "rank"),
    ("", "host"),
    ("connect", "ms"),
    ("store round trip", "median ms"),
    ("", "p99 ms"),
    ("crossing", "median ms"),
    ("", "p99 ms"),
    ("loop lag", "p99 ms"),
    ("came last", "of all"),
)


def _table(ranks: Sequence[Facts]) -> list[str]:
    crossings = sum(ranks[0].last_ranks.values()) or 1
    rows: list[tuple[str, ...]] = [*zip(*_HEAD, strict=True)]
    for facts in ranks:
        secs = (
            facts.connect_secs,
            facts.round_trip.median,
            facts.round_trip.p99,
            facts.crossing.median,
            facts.crossing.p99,
            facts.loop_lag.p99,
        )
        rows.append(
            (
                str(facts.rank),
                facts.host,
                *(f"{value * 1e3:.2f}" for value in secs),
                f"{ranks[0].last_ranks.get(facts.rank, 0) / crossings:.0%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
