"""Judges the facts of all ranks, gives advice, and prints both."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from .._errors import plural_ranks, seconds, told_by
from .advice import advice
from .measure import Facts
from .newcomer import LookUps
from .roll import Entry, absent

_SLOW_NAMES_SECS = 0.25
_SLOW_CONNECT_SECS = 0.25
_SLOW_TRIP_SECS = 0.01
_SLOW_LOOP_SECS = 0.05
# A straggler is last in most phases, and the others notice.
_OFTEN_LAST = 0.6
_LONG_WAIT_SECS = 0.005


@dataclass(frozen=True)
class Finding:
    """A finding, and the advice about it."""

    what: str
    remedy: str


@dataclass
class Report:
    """The doctor's report on one rank; a problem means that something is wrong, a note does not.

    :ivar rank: the rank of the report; None if it is not known
    """

    ranks: list[Facts] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    rank: int | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> str:
        return json.dumps({"ok": self.ok, "host": socket.gethostname(), **asdict(self)})

    def as_text(self) -> str:
        """A table of the ranks, if they have been examined; if not, a line for each problem."""
        if not self.ranks:
            where = socket.gethostname()
            who = where if self.rank is None else f"rank {self.rank} on {where}"
            return "\n".join(
                f"{who}: PROBLEM: {found.what}. What to do: {found.remedy}."
                for found in self.problems
            )
        lines = ["async_barriers doctor", "", *_table(self.ranks), ""]
        lines.append(", ".join(f"{k} {v}" for k, v in self.ranks[0].versions.items()))
        for title, findings in (("PROBLEM", self.problems), ("note", self.notes)):
            for finding in findings:
                lines += ["", f"{title}: {finding.what}", f"    {finding.remedy}"]
        lines += ["", "All is well." if self.ok else "Something is wrong; see above."]
        return "\n".join(lines)


def of_facts(ranks: Sequence[Facts], entries: Sequence[Entry] = ()) -> Report:
    """The report if every rank answered; ``entries`` are the processes that have come by now."""
    report = Report(list(ranks))
    report.problems.extend(_of_entries(entries))
    report.problems.extend(_disagreements(ranks))
    report.notes.extend(_slowness(ranks))
    return report


def of_error(error: BaseException, look_ups: LookUps | None = None) -> Report:
    """The report if the ranks did not get so far."""
    what = str(error).rstrip(".") or told_by(error)
    return Report(problems=[Finding(what, advice(error, look_ups))])


def of_roll(entries: Sequence[Entry], waited_secs: float) -> Report:
    """The report on the processes that came; a rank that did not come is a problem, too."""
    report = Report(problems=list(_of_entries(entries)))
    missing = absent(entries)
    # If a process has a wrong rank or world size, that is the cause.
    if missing and not any("WORLD_SIZE" in found.what for found in report.problems):
        report.problems.append(
            Finding(
                f"{plural_ranks(missing)} did not come to the store within {seconds(waited_secs)}",
                f"look at the output of {plural_ranks(missing)}: did it start, with the same "
                "MASTER_ADDR and MASTER_PORT, and does it run the doctor too? If it is slow to "
                "start, give a longer --timeout-secs",
            )
        )
    return report


def _of_entries(entries: Sequence[Entry]) -> Iterable[Finding]:
    sizes = Counter(entry.world_size for entry in entries).most_common()
    if len(sizes) > 1:
        (usual, most), (_, next_most) = sizes[0], sizes[1]
        split = most == next_most
        wrong = "; ".join(
            f"rank {entry.rank} ({entry}) was started with WORLD_SIZE={entry.world_size}"
            for entry in entries
            if split or entry.world_size != usual
        )
        others = "" if split else f", the other {most} with {usual}"
        yield Finding(f"{wrong}{others}", "start all ranks with the same WORLD_SIZE")
    for rank, times in sorted(Counter(entry.rank for entry in entries).items()):
        who = [entry for entry in entries if entry.rank == rank]
        if times > 1:
            yield Finding(
                f"{times} processes are rank {rank}: {', '.join(map(str, who))}",
                "duplicate rank: give each process a RANK of its own, and each job a MASTER_PORT "
                "of its own; see whether an old process still runs",
            )
        if who[0].world_size < 1:
            yield Finding(
                f"WORLD_SIZE is {who[0].world_size} for rank {rank} ({who[0]})",
                "it is the number of ranks, 1 or more",
            )
        elif not 0 <= rank < who[0].world_size:
            yield Finding(
                f"rank {rank} ({who[0]}) is outside the world, since WORLD_SIZE is "
                f"{who[0].world_size}",
                f"its RANK must be 0 to {who[0].world_size - 1}",
            )


def _disagreements(ranks: Sequence[Facts]) -> Iterable[Finding]:
    for what in ranks[0].versions:
        yield from _differ(
            f"version of {what}",
            [facts.versions[what] for facts in ranks],
            "install the same versions on all ranks: peers of another version may write to the "
            "store what this one does not understand",
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
    remedy = (
        "the store's server and c10d's client look up the names of their peers; put all hosts "
        'into /etc/hosts, mend the resolver, or set RES_OPTIONS="timeout:1 attempts:1" on all ranks'
    )
    slow = tuple(f.rank for f in ranks if f.names_secs > _SLOW_NAMES_SECS)
    if slow:
        yield Finding(
            f"name look-ups of {plural_ranks(slow)} took up to "
            f"{seconds(max(f.names_secs for f in ranks))}",
            remedy,
        )
    slow = tuple(f.rank for f in ranks if f.connect_secs > _SLOW_CONNECT_SECS)
    if slow:
        yield Finding(
            f"{plural_ranks(slow)} took up to {seconds(max(f.connect_secs for f in ranks))} for a "
            "first connection to the store",
            remedy,
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
    ("look-ups", "ms"),
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
            facts.names_secs,
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
