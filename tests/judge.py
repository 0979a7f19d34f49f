"""Judges by the logs of ranks and a driver whether the laws hold; uses nothing of the library.

A log is a line of JSON per event; lines may come in any order, and the last one of a process
that was killed may be cut. ``t`` is the monotonic clock, which is one for all processes.

The driver logs ``soak`` (size, init_secs), and what it did to ``rank``: ``stop`` and
``continue``, ``cut`` and ``healed`` (its way to the store), ``kill``, ``usurp`` (it started another
``life`` for a rank whose process lives); and ``late`` if the machine itself stood still from
``since`` on. ``rank`` is None if it was done to all.

A rank (``rank``, and ``life``, one per process) logs

* ``joined`` a ``generation``, and ``joining`` before it tries; ``ended`` when its program is over;
* ``call``, before: a number, what it will ``do``, the ``name`` (and the ``step``, or None), and
  ``within`` how many seconds (None: no deadline) it has to return;
* ``enter`` or ``forgo``, before the store hears of it: in which ``generation`` and ``sequence``
  the call takes part, and whether it enters or only breaks the phase. An attempt before all have
  joined again has a number below 0; it is logged again when it counts;
* ``cancel`` and ``fail``, before that is done to a call; ``publishing`` before its publish runs;
* ``exit``: how the call ended, as ``outcome``: released (with ``detail``), broken (``detail``;
  ``blamed``, or ``missing`` and ``timeout_secs``; ``passed``, a later step that was decided),
  done (it has no verdict), cancelled, failed, closed, lost, refused, or foreign (an error that
  must not escape); with ``in_doubt``.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

# Laws 4, 5 and 8 allow one second; the slack is for a machine that runs many processes.
LAW_SECS = 1.0
SLACK_SECS = 0.5
# A rank that was cut off a moment ago is joining again.
RECOVERY_SECS = 2.0
# If a cancelled call takes longer than this to end, the store may not have its break.
HEARD_SECS = 0.7
EXIT_SECS = 2.0

Event = dict[str, Any]
Phase = tuple[str, int, int]
Window = tuple[float, float]


@dataclass(frozen=True)
class Violation:
    """What breaks a law; law 0 stands for what no program may do."""

    law: int
    text: str

    def __str__(self) -> str:
        return f"law {self.law}: {self.text}"


@dataclass(eq=False)
class Call:
    """One call of one rank."""

    rank: int
    life: int
    number: int
    do: str
    name: str
    step: int | None
    began: float
    within: float | None
    phase: Phase | None = None
    entered: float | None = None
    stopped: float | None = None
    """When it was cancelled, or its body failed."""
    published: float | None = None
    ended: float | None = None
    exit: Event = field(default_factory=dict)

    def __str__(self) -> str:
        where = (
            ""
            if self.phase is None
            else f" {self.name!r} #{self.phase[2]} of generation {self.phase[1]}"
        )
        return f"{self.do}{where} of rank {self.rank} (life {self.life}, call {self.number})"

    @property
    def outcome(self) -> str | None:
        return self.exit.get("outcome")

    @property
    def learned(self) -> str | None:
        """The verdict that it claims to know."""
        if self.outcome in ("released", "broken") and not self.exit["in_doubt"]:
            return str(self.outcome)
        if self.entered is not None and self.outcome in ("lost", "closed"):
            # It would have to say "in doubt" if its peers could have been released.
            return None if self.exit["in_doubt"] else "broken"
        return None


class Record:
    """The contents of all lines."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.size = 0
        self.init_secs = 0.0
        self.calls: dict[tuple[int, int, int], Call] = {}
        self.phases: dict[Phase, list[Call]] = defaultdict(list)
        self.joining: dict[int | None, list[float]] = defaultdict(list)
        self.joined: list[tuple[int, float, int]] = []
        """Generation, when, and who."""
        self.lives: set[tuple[int, int]] = set()
        """All that joined."""
        self.usurpers: set[tuple[int, int]] = set()
        self.stopped: dict[int | None, list[Call]] = defaultdict(list)
        self.left: dict[int | None, list[Call]] = defaultdict(list)
        """Calls that were cancelled or failed, or only broke a phase; and those that may
        break phases that other calls await."""
        self.leavings: list[tuple[int, float, int]] = []
        """In which generation, when, and who."""
        self._generations: dict[tuple[int, int], int] = {}
        self.ends: dict[tuple[int, int], float] = {}
        self.stops: dict[int | None, list[Window]] = defaultdict(list)
        self.cuts: dict[int | None, list[Window]] = defaultdict(list)
        self.last = 0.0
        opened: dict[tuple[str, int | None], float] = {}
        for event in sorted(_parsed(lines), key=lambda event: float(event["t"])):
            self.last = event["t"]
            if "life" in event and "call" in event:
                self._rank_says(event)
            else:
                self._happened(event, opened)
        for (what, rank), since in opened.items():
            (self.stops if what == "stop" else self.cuts)[rank].append((since, self.last))
        for call in self.calls.values():
            if call.phase is not None:
                self.phases[call.phase].append(call)
            if call.stopped is not None or (call.phase is not None and call.entered is None):
                self.stopped[call.rank].append(call)
            if call.do in ("close", "abort"):
                self.left[call.rank].append(call)

    def _happened(self, event: Event, opened: dict[tuple[str, int | None], float]) -> None:
        what, rank, t = event["event"], event.get("rank"), event["t"]
        if what == "soak":
            self.size, self.init_secs = event["size"], event["init_secs"]
        elif what in ("stop", "cut"):
            opened.setdefault((what, rank), t)
        elif what in ("continue", "healed"):
            began = "stop" if what == "continue" else "cut"
            windows = self.stops if began == "stop" else self.cuts
            if (began, rank) in opened:
                windows[rank].append((opened.pop((began, rank)), t))
        elif what == "late":
            self.stops[None].append((event["since"], t))
        elif what in ("kill", "ended"):
            self.ends.setdefault((event["rank"], event["life"]), t)
        elif what == "joining":
            self.joining[rank].append(t)
        elif what == "joined":
            self.joined.append((event["generation"], t, event["rank"]))
            self.lives.add((event["rank"], event["life"]))
            self._generations[event["rank"], event["life"]] = event["generation"]
        elif what == "usurp":
            self.usurpers.add((event["rank"], event["life"]))

    def _rank_says(self, event: Event) -> None:
        what, t = event["event"], event["t"]
        key = (event["rank"], event["life"], event["call"])
        if what == "call":
            of = event["do"], event["name"], event.get("step")
            self.calls[key] = Call(*key, *of, t, event["within"])
            return
        call = self.calls[key]
        if what in ("enter", "forgo"):
            call.phase = (call.name, event["generation"], event["sequence"])
            self._generations[call.rank, call.life] = event["generation"]
            call.entered = t if what == "enter" else None
        elif what in ("cancel", "fail"):
            call.stopped = call.stopped or t
        elif what == "publishing":
            call.published = t
        elif what == "exit":
            call.ended, call.exit = t, event
            generation = self._generations.get((call.rank, call.life))
            if call.do == "close" and generation is not None:
                self.leavings.append((generation, t, call.rank))

    def end_of(self, call: Call) -> float:
        """When it returned; if it never did, the end of its process or of the log."""
        if call.ended is not None:
            return call.ended
        return self.ends.get((call.rank, call.life), self.last)

    def stood(self, rank: int, since: float, until: float) -> float:
        """How long ``rank`` could do nothing between ``since`` and ``until``."""
        windows = sorted(self.stops.get(rank, []) + self.stops.get(None, []))
        total, reached = 0.0, since
        for began, ended in windows:
            total += max(0.0, min(ended, until) - max(began, reached))
            reached = max(reached, ended)
        return total

    def cut_off(self, rank: int, since: float, until: float) -> bool:
        """Whether ``rank`` may have had no way to the store between ``since`` and ``until``."""
        windows = self.cuts.get(rank, []) + self.cuts.get(None, [])
        return any(a < until and b + RECOVERY_SECS > since for a, b in windows)

    def hampered(self, rank: int, since: float, until: float) -> bool:
        """Whether a break may have been kept from the store between ``since`` and ``until``."""
        return self.cut_off(rank, since, until) or self.stood(rank, since, until) > 0


def _parsed(lines: Iterable[str]) -> Iterator[Event]:
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            # The last line of a process that was killed. It had not done yet what this line was
            # to say: each line is written before the store hears of it.
            continue
        if isinstance(event, dict):
            yield event


def judge(lines: Iterable[str]) -> list[Violation]:
    """All that breaks laws 1 to 5 in these logs (and 8, and what no law needs to name)."""
    return judge_record(Record(lines))


def judge_record(record: Record) -> list[Violation]:
    laws = (
        safety,
        one_process_of_a_rank,
        one_verdict,
        who_gives_up_breaks,
        fail_fast,
        steps_in_order,
        bounded,
        nothing_foreign,
    )
    return [violation for law in laws for violation in law(record)]


def safety(record: Record) -> Iterator[Violation]:
    """Law 1: released only after all have entered, each rank once."""
    for calls in record.phases.values():
        by_rank: dict[int, list[Call]] = defaultdict(list)
        for call in calls:
            by_rank[call.rank].append(call)
        for twice in (found for found in by_rank.values() if len(found) > 1):
            yield Violation(1, f"{twice[0]} takes part again in {twice[1]}")
        entered = {call.rank: call.entered for call in calls if call.entered is not None}
        for call in calls:
            # Publishing counts as a release.
            passed = call.published or call.ended
            if passed is None or not (call.published or call.outcome == "released"):
                continue
            early = [r for r in range(record.size) if entered.get(r, passed + 1) > passed]
            if early:
                yield Violation(1, f"{call} was released before ranks {early} had entered")


def one_process_of_a_rank(record: Record) -> Iterator[Violation]:
    """Law 1: the second living process of a rank is refused; law 11: no other process is."""
    for rank, life in sorted(record.usurpers & record.lives):
        yield Violation(1, f"rank {rank} (life {life}) joined, though another process has its rank")
    for call in record.calls.values():
        if call.outcome == "refused" and (call.rank, call.life) not in record.usurpers:
            yield Violation(11, f"{call} was refused: {call.exit['error']}")


def _left_with_its_host(record: Record, call: Call) -> bool:
    """Whether it was told of the rank that left with the store: by law 3 it is, and no store can
    tell it any more what had broken the phase before."""
    gone = [since for since, until in record.cuts[None] if until == record.last]
    left = "closed its barrier" in str(call.exit.get("detail"))
    return left and any(since < record.end_of(call) for since in gone)


def one_verdict(record: Record) -> Iterator[Violation]:
    """Law 2: all ranks that learn a verdict learn the same one."""
    for phase, calls in record.phases.items():
        told: dict[str, Call] = {}
        for call in calls:
            if call.learned is not None:
                told.setdefault(call.learned, call)
        if len(told) > 1:
            yield Violation(2, " but ".join(f"{c} was told {w}" for w, c in told.items()))
            continue
        details: dict[str, Call] = {}
        for call in calls:
            detail = call.exit.get("detail")
            if call.learned is None or detail is None or _left_with_its_host(record, call):
                continue
            details.setdefault(str(detail), call)
        # A phase that is tried too early is deleted when all have joined, and may break again then.
        if len(details) > 1 and phase[2] >= 0:
            yield Violation(2, " but ".join(f"{c} was told {w!r}" for w, c in details.items()))


def who_gives_up_breaks(record: Record) -> Iterator[Violation]:
    """Law 3: a rank that stopped waiting counts no more, and only such a rank is blamed."""
    for calls in record.phases.values():
        released = [call for call in calls if call.outcome == "released"]
        last = max((call.entered or 0.0, call.rank) for call in calls)
        for call in calls:
            if released and _gave_up(record, call) and record.end_of(call) < last[0]:
                yield Violation(3, f"{call} had given up before rank {last[1]} entered: released")
            if call.outcome == "broken" and call.learned:
                yield from _blamed(record, call, calls)


def _gave_up(record: Record, call: Call) -> bool:
    """Whether its break must have reached the store by the time it returned."""
    if call.ended is None or call.outcome == "released":
        return False
    if call.learned == "broken" or (call.entered is None and call.outcome == "done"):
        return True
    return call.outcome in ("cancelled", "failed") and (
        call.stopped is not None
        and call.ended - call.stopped < HEARD_SECS
        and not record.hampered(call.rank, call.stopped - RECOVERY_SECS, call.ended)
    )


def _blamed(record: Record, call: Call, calls: list[Call]) -> Iterator[Violation]:
    learned, began = record.end_of(call), min(c.began for c in calls)
    timeout = call.exit.get("timeout_secs")
    if timeout is not None:
        fired = any(c.within == timeout and c.began + timeout <= learned for c in calls)
        # The other deadline is for ranks that have not joined again after a restart.
        if not (fired or (timeout == record.init_secs and began + timeout <= learned)):
            yield Violation(3, f"{call} timed out after {timeout:g} s, before any deadline")
        return
    blamed = call.exit["blamed"]
    excused = (
        any(
            c.name == call.name
            and c.phase in (None, call.phase)
            and (c.stopped or began) <= learned
            for c in record.stopped[blamed]
        )
        or any(c.began <= learned and record.end_of(c) >= began for c in record.left[blamed])
        # A rank that left cannot be waited for again in that generation.
        or any(
            call.phase and (g, who) == (call.phase[1], blamed) and t <= learned
            for g, t, who in record.leavings
        )
        or any(t <= learned for t in record.joining[blamed][1:])
        # A rank that joins meanwhile finds it dead; who killed it says so a moment later.
        or (
            call.exit["detail"].endswith(f"the process of rank {blamed} has ended")
            and any(who == blamed and t <= learned + 1 for (who, _), t in record.ends.items())
        )
        or record.cut_off(blamed, began, learned)
        # All ranks that had joined again have left again, so nobody knows which one broke it.
        or (blamed is None and any(t <= learned for g, t, _ in record.joined if g))
        # It came too late; see `steps_in_order`.
        or "passed" in call.exit
    )
    if not excused:
        yield Violation(3, f"{call} blames a rank that did nothing: {call.exit['detail']}")


def fail_fast(record: Record) -> Iterator[Violation]:
    """Law 4: a break reaches all ranks that wait or come later within a second."""
    for calls in record.phases.values():
        known = [t for call in calls if (t := _break_known(record, call)) is not None]
        if known:
            for call in calls:
                yield from _heard(record, call, min(known), "the phase was broken")
    yield from _restarts(record)
    for generation, t, rank in record.leavings:
        if not record.hampered(rank, t - RECOVERY_SECS, t):
            for phase, calls in record.phases.items():
                for call in calls:
                    if phase[1] == generation and call.do != "commit":
                        yield from _heard(record, call, t, f"rank {rank} had left")


def _break_known(record: Record, call: Call) -> float | None:
    """The latest time at which the store had the break, as far as this call shows."""
    if call.ended is None or record.hampered(call.rank, call.ended - RECOVERY_SECS, call.ended):
        return None
    told = call.outcome == "broken" and not call.exit["in_doubt"]
    stopped = call.do != "commit" and _gave_up(record, call) and call.outcome != "lost"
    return call.ended if told or stopped else None


def _restarts(record: Record) -> Iterator[Violation]:
    """Law 11: a rank that waits for a process that is gone is told when its rank joins again."""
    first: dict[int, tuple[float, int]] = {}
    for generation, t, rank in record.joined:
        if generation and not record.hampered(rank, t - RECOVERY_SECS, t):
            first[generation] = min(first.get(generation, (t, rank)), (t, rank))
    for phase, calls in record.phases.items():
        later = [found for generation, found in first.items() if generation > phase[1]]
        for call in calls:
            if later and call.do != "commit":
                t, rank = min(later)
                yield from _heard(record, call, t, f"rank {rank} had joined again")


def steps_in_order(record: Record) -> Iterator[Violation]:
    """A step is decided only before a later one is, and a rank that waits there is told at once."""
    of_name: dict[tuple[str, int], dict[int, list[Call]]] = defaultdict(dict)
    for (name, generation, step), calls in record.phases.items():
        if calls[0].step is not None:
            of_name[name, generation][step] = calls
    came: dict[str, set[int]] = defaultdict(set)
    for (name, _), steps in of_name.items():
        came[name] |= steps.keys()
        since, by = math.inf, -1
        for step, calls in sorted(steps.items(), reverse=True):
            for call in calls:
                yield from _heard(record, call, since, f"step {by} was decided")
            for call in calls:
                released = call.ended if call.outcome == "released" else None
                known = released or _break_known(record, call)
                if known is not None and known < since:
                    since, by = known, step
    for call in record.calls.values():
        passed = call.exit.get("passed")
        if passed is not None and (passed <= (call.step or 0) or passed not in came[call.name]):
            yield Violation(2, f"{call} was passed by step {passed}, for which nobody has come")


def _heard(record: Record, call: Call, since: float, what: str) -> Iterator[Violation]:
    since, end = max(call.entered or call.began, since), record.end_of(call)
    # A leader goes on publishing in a phase that nobody else can break any more.
    if call.published is not None or record.cut_off(call.rank, call.began - RECOVERY_SECS, end):
        return
    allowed = LAW_SECS + SLACK_SECS + record.stood(call.rank, since, end)
    if end - since > allowed:
        yield Violation(4, f"{call} waited on for {end - since:.2f} s after {what}")


def bounded(record: Record) -> Iterator[Violation]:
    """Law 5: a call returns within a second of its deadline, or of its cancellation."""
    for call in record.calls.values():
        end = record.end_of(call)
        if call.within is not None:
            yield from _late(record, call, call.began, call.within, end, 5)
        if call.stopped is not None:
            yield from _late(record, call, call.stopped, 0.0, end, 8)


def _late(
    record: Record, call: Call, since: float, within: float, end: float, law: int
) -> Iterator[Violation]:
    allowed = within + LAW_SECS + SLACK_SECS + record.stood(call.rank, since, end)
    if end - since > allowed:
        did = "returned" if call.ended is not None else "had not returned"
        yield Violation(law, f"{call} {did} after {end - since:.2f} s, {within:g} s were allowed")


def nothing_foreign(record: Record) -> Iterator[Violation]:
    """A call raises only the library's own errors."""
    for call in record.calls.values():
        if call.outcome == "foreign":
            yield Violation(0, f"{call} raised {call.exit['detail']}")
