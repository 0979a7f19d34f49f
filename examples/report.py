"""Prints the demo's report, and checks that each checkpoint ended as it should."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from checkpointing import Saving, Verdict


@dataclass(frozen=True)
class Stop:
    """The signal to stop, as one rank learned it: at which step, from which rank, and why."""

    step: int
    rank: int | None
    reason: str | None


@dataclass
class RankLog:
    """One rank's log. All times are `time.time()`, which the ranks of one host share."""

    rank: int
    steps: list[float] = field(default_factory=list)
    """When each training step ended."""
    savings: list[Saving] = field(default_factory=list)
    preempted: float | None = None
    """When this rank got its SIGTERM."""
    stopped: Stop | None = None
    restored_step: int | None = None
    trained_accuracy: float = 0.0
    accuracy: float = 0.0
    """Of what was loaded."""
    problem: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as all ranks saw it."""

    savings: Sequence[Saving]
    steps: Sequence[float]
    timeout_secs: float

    @property
    def name(self) -> str:
        return f"step-{self.savings[0].step}"

    @property
    def verdict(self) -> Verdict:
        """The verdict of the first rank that is not in doubt."""
        known = (s.verdict for s in self.savings if s.verdict.published is not None)
        return next(known, Verdict(None))

    @property
    def unanimous(self) -> bool:
        said = {(s.verdict.published, s.verdict.culprits) for s in self.savings}
        return len(said) == 1

    @property
    def started(self) -> float:
        return min(s.started for s in self.savings)

    @property
    def settled(self) -> float:
        return max(s.settled for s in self.savings)

    @property
    def steps_meanwhile(self) -> int:
        return sum(self.started < step < self.settled for step in self.steps)

    @property
    def doomed(self) -> tuple[str, float]:
        """The reason why it is not published, and when that was decided."""
        for s in self.savings:
            if s.failed is not None and s.entered is None:
                return f"the upload of rank {s.rank} failed", s.failed
        entered = [s.entered for s in self.savings if s.entered is not None]
        deadline = min(entered) + self.timeout_secs
        if self.settled < deadline:
            return "the leader could not publish", max(entered)
        return f"the deadline, {self.timeout_secs:g} s after the first arrival", deadline


def checkpoints(logs: Sequence[RankLog], timeout_secs: float) -> list[Checkpoint]:
    by_step = zip(*(log.savings for log in logs), strict=True)
    return [Checkpoint(savings, logs[0].steps, timeout_secs) for savings in by_step]


def render(logs: Sequence[RankLog], timeout_secs: float) -> str:
    saved = checkpoints(logs, timeout_secs)
    zero = min(log.steps[0] for log in logs)
    return "\n".join([*_table(saved), *_stop(logs, zero), *_failures(saved, zero)])


def _table(saved: Sequence[Checkpoint]) -> Iterator[str]:
    yield "Seconds on the slowest rank; 'settle' is from the last arrival until all ranks knew."
    head = ("checkpoint", "staging", "upload", "commit", "settle", "last in", "steps meanwhile")
    widths = [max(len(name), 7) for name in head]
    yield (
        "  ".join(f"{name:>{width}}" for name, width in zip(head, widths, strict=True))
        + "  outcome"
    )
    for checkpoint in saved:
        savings = checkpoint.savings
        staging = [s.staged - s.started for s in savings if s.staged is not None]
        upload = [s.entered - s.staged for s in savings if s.staged and s.entered and not s.failed]
        commit = [s.settled - s.entered for s in savings if s.entered]
        last = max(savings, key=lambda s: s.entered or 0.0)
        settle, who = "-", "-"
        if checkpoint.verdict.published and last.entered is not None:
            settle, who = f"{checkpoint.settled - last.entered:.3f}", f"rank {last.rank}"
        cells = [
            checkpoint.name,
            *(f"{max(times, default=0.0):.3f}" for times in (staging, upload, commit)),
            settle,
            who,
            str(checkpoint.steps_meanwhile),
        ]
        row = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        yield f"{row}  {str(checkpoint.verdict).partition(':')[0]}"


def _stop(logs: Sequence[RankLog], zero: float) -> Iterator[str]:
    for log in logs:
        if log.preempted is not None and log.stopped is not None:
            yield (
                f"\nAt {log.preempted - zero:.3f} s rank {log.rank} got a SIGTERM. "
                f"All ranks stopped at step {log.stopped.step}, {log.steps[-1] - zero:.3f} s, "
                "and saved it."
            )


def _failures(saved: Sequence[Checkpoint], zero: float) -> Iterator[str]:
    for checkpoint in saved:
        if checkpoint.verdict.published:
            continue
        what, when = checkpoint.doomed
        yield f"\n{checkpoint.name} was not published. At {when - zero:.3f} s: {what}."
        for s in checkpoint.savings:
            heard = f"  rank {s.rank} knew {s.settled - when:.3f} s later"
            if s.entered is not None and s.entered > when:
                heard += f" ({s.settled - s.entered:.3f} s after it entered)"
            yield f"{heard}: {s.verdict}"


def check(logs: Sequence[RankLog], timeout_secs: float, faults: Mapping[int, int]) -> list[str]:
    """All differences from the plan, in which the n-th upload of rank r fails for `faults` n: r."""
    saved = checkpoints(logs, timeout_secs)
    problems = []
    for number in faults.keys() - set(range(1, len(saved) + 1)):
        problems.append(f"there was no checkpoint {number} to break")
    for number, checkpoint in enumerate(saved, start=1):
        name = checkpoint.name
        if any(s.verdict.published is None for s in checkpoint.savings):
            problems.append(f"{name}: a rank is in doubt")
        elif not checkpoint.unanimous:
            said = "; ".join(f"rank {s.rank} says {s.verdict}" for s in checkpoint.savings)
            problems.append(f"{name}: {said}")
        elif number not in faults and not checkpoint.verdict.published:
            problems.append(f"{name}: {checkpoint.verdict}")
        elif number in faults:
            problems.extend(_check_broken(checkpoint, faults[number]))
    newest = [c.savings[0].step for c in saved if c.verdict.published][-1:]
    for log in logs:
        if log.problem:
            problems.append(f"rank {log.rank}: {log.problem}")
        elif [log.restored_step] != newest:
            problems.append(f"rank {log.rank} loaded step {log.restored_step}, not {newest}")
        # A rank that stopped early has learned less.
        elif log.accuracy < (0.95 if log.stopped is None else log.trained_accuracy):
            problems.append(f"rank {log.rank}: only {log.accuracy:.1%} of the test set is right")
    return problems


def check_stop(logs: Sequence[RankLog], preempted: int) -> list[str]:
    """All differences from the plan, in which rank ``preempted`` gets a SIGTERM."""
    problems = []
    stops = {log.stopped for log in logs}
    (stopped, *others) = stops
    if others or stopped is None:
        problems.append(f"the ranks stopped differently, or not: {stops}")
    else:
        if (stopped.rank, stopped.reason) != (preempted, "SIGTERM"):
            problems.append(f"rank {preempted} got a SIGTERM, but all were told of {stopped}")
        for log in logs:
            last = log.savings[-1].step if log.savings else None
            if not len(log.steps) == last == log.restored_step == stopped.step:
                problems.append(
                    f"rank {log.rank} made {len(log.steps)} steps, saved {last} last and loaded "
                    f"{log.restored_step}; the step to stop at was {stopped.step}"
                )
    return problems


def _check_broken(checkpoint: Checkpoint, culprit: int) -> Iterator[str]:
    if checkpoint.verdict.published or checkpoint.verdict.culprits != (culprit,):
        yield f"{checkpoint.name}: {checkpoint.verdict}, but rank {culprit} was made to fail"
    if checkpoint.steps_meanwhile == 0:
        yield f"{checkpoint.name}: training stopped"
    _, when = checkpoint.doomed
    for s in checkpoint.savings:
        if s.settled - max(when, s.entered or 0.0) > 1:
            yield f"{checkpoint.name}: rank {s.rank} took more than a second to learn the verdict"
