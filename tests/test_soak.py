"""A short soak, and its judge: every law has a log that breaks it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soak
from judge import SLACK_SECS, judge
from processes import BACKENDS, Forge

SHARED_SECS = 7.0
HOSTED_SECS = 3.0
INIT_SECS = 3.0


class Log:
    """Writes logs as ranks 0 and 1 and the driver do."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._calls = 0
        self.driver(0.0, "soak", size=2, init_secs=INIT_SECS)
        for rank in range(2):
            self.rank(0.1, rank, "joining")
            self.rank(0.2, rank, "joined", generation=0)

    def driver(self, t: float, event: str, **facts: Any) -> None:
        self.lines.append(json.dumps({"t": t, "event": event, **facts}))

    def rank(self, t: float, rank: int, event: str, **facts: Any) -> None:
        self.driver(t, event, **{"rank": rank, "life": rank, **facts})

    def call(
        self,
        rank: int,
        began: float,
        ended: float | None,
        outcome: str = "released",
        *,
        do: str = "execute",
        step: int | None = None,
        within: float | None = 5.0,
        enters: bool = True,
        stopped: float | None = None,
        published: float | None = None,
        phase: tuple[int, int] | None = (0, 0),
        in_doubt: bool = False,
        life: int | None = None,
        **facts: Any,
    ) -> None:
        """One call of a rank in phase x, from its beginning to its end."""
        self._calls += 1
        who: dict[str, Any] = {"call": self._calls, "life": rank if life is None else life}
        self.rank(began, rank, "call", do=do, name="x", step=step, within=within, **who)
        if phase is not None:
            took = "enter" if enters else "forgo"
            self.rank(began, rank, took, generation=phase[0], sequence=phase[1], **who)
        if stopped is not None:
            self.rank(stopped, rank, "cancel", **who)
        if published is not None:
            self.rank(published, rank, "publishing", **who)
        if ended is not None:
            self.rank(ended, rank, "exit", outcome=outcome, in_doubt=in_doubt, **who, **facts)

    def violations(self) -> list[int]:
        """The laws that the judge sees broken."""
        return [violation.law for violation in judge(self.lines)]


BY_RANK_0: dict[str, Any] = {"outcome": "broken", "detail": "broken by 0: cancelled", "blamed": 0}
TIMED_OUT: dict[str, Any] = {"outcome": "broken", "detail": "timed out", "timeout_secs": 2.0}


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_log_without_fault(log: Log) -> None:
    """Released phases, broken ones, stops, cuts, kills and cut lines are all as they may be."""
    log.call(0, 1.0, 2.0, detail="released, last rank 1")
    log.call(1, 1.9, 2.0, detail="released, last rank 1")
    log.call(0, 3.0, 4.5, "cancelled", stopped=4.0, phase=(0, 1))
    log.call(1, 3.0, 4.6, phase=(0, 1), **BY_RANK_0)
    log.call(0, 5.0, 7.5, within=2.0, phase=(0, 2), **TIMED_OUT)
    log.call(1, 9.0, 9.2, phase=(0, 2), **TIMED_OUT)
    # All have entered before the leader publishes.
    log.call(0, 10.0, 10.5, do="commit", published=10.3, phase=(0, 3))
    log.call(1, 10.2, 12.0, "broken", do="commit", within=1.0, in_doubt=True, phase=(0, 3))
    # Stopped for longer than its deadline, and cut off: in doubt, as it may be.
    log.call(1, 13.0, 18.4, "lost", within=1.0, in_doubt=True, phase=(0, 4))
    log.driver(13.5, "stop", rank=1)
    log.driver(17.5, "continue", rank=1)
    log.call(0, 13.0, 14.0, phase=(0, 4))
    # Killed while it waits, and back in the next generation; its peer is told.
    log.call(1, 20.0, None, phase=(0, 5))
    log.driver(20.5, "kill", rank=1, life=1)
    log.rank(30.0, 1, "joining", life=2)
    log.rank(30.1, 1, "joined", life=2, generation=1)
    log.call(0, 20.0, 30.2, within=None, phase=(0, 5), outcome="broken", blamed=1, detail="again")
    log.lines.append('{"t": 20.6, "rank": 1, "life": 1, "event": "exi')
    assert not judge(log.lines)


def test_law_1_a_release_before_all_have_entered(log: Log) -> None:
    """Also where the other one entered later, only broke it, or is in another generation."""
    log.call(0, 1.0, 2.0)
    log.call(1, 2.5, 2.6)
    log.call(0, 3.0, 4.0, phase=(0, 1))
    log.call(1, 3.0, 4.0, "done", do="abort", enters=False, phase=(0, 1))
    log.call(0, 5.0, 6.0, phase=(0, 2))
    log.call(1, 5.0, 5.5, "lost", in_doubt=True, phase=(1, 2))
    assert log.violations() == [1, 1, 1]


def test_law_1_a_rank_that_is_there_twice(log: Log) -> None:
    """Two lives of one rank never take part in the same phase."""
    log.call(0, 1.0, 2.0)
    log.call(1, 1.0, 2.0)
    log.call(1, 1.5, 2.0, life=2)
    assert log.violations() == [1]


def test_law_1_two_processes_of_a_rank(log: Log) -> None:
    """The second one is refused; it may not join."""
    log.driver(1.0, "usurp", rank=1, life=7)
    log.rank(1.1, 1, "joining", life=7)
    log.call(1, 1.1, 1.2, "refused", do="connect", phase=None, life=7, error="held by another")
    assert log.violations() == []
    log.rank(1.3, 1, "joined", life=7, generation=1)
    assert log.violations() == [1]


def test_law_11_a_rank_that_is_refused_its_own_place(log: Log) -> None:
    """Nobody else has it."""
    log.call(1, 1.1, 1.2, "refused", do="connect", phase=None, error="held by another")
    assert log.violations() == [11]


def test_law_1_publishing_before_all_have_entered(log: Log) -> None:
    """A leader that publishes is released, in a way."""
    log.call(0, 1.0, 3.0, do="commit", published=1.5)
    log.call(1, 2.0, 3.0, do="commit")
    assert log.violations() == [1]


def test_law_2_released_here_and_broken_there(log: Log) -> None:
    """Whatever broke it."""
    log.call(0, 1.0, 3.2)
    log.call(1, 1.0, 3.2, within=2.0, **TIMED_OUT)
    assert log.violations() == [2]


def test_law_2_a_lost_store_that_is_no_doubt(log: Log) -> None:
    """A rank that says it is not in doubt says that nobody was released."""
    log.call(0, 1.0, 1.5)
    log.call(1, 1.0, 1.4, "lost")
    assert log.violations() == [2]


def test_law_2_two_reasons(log: Log) -> None:
    """The same verdict has the same reason on all ranks."""
    log.call(0, 1.0, 2.0, "broken", stopped=1.5, blamed=0, detail="broken by 0")
    log.call(1, 1.0, 2.0, "broken", stopped=1.5, blamed=1, detail="broken by 1")
    assert log.violations() == [2]


def test_law_2_holds_while_there_is_a_store(log: Log) -> None:
    """A rank that comes when the store is gone with the rank that hosted it learns that it left."""
    log.call(0, 1.0, 2.0, "cancelled", stopped=1.5)
    log.call(0, 2.0, 2.1, "done", do="close", phase=None)
    log.call(1, 1.0, 2.0, "broken", blamed=0, detail="broken by 0: its task was cancelled")
    left: dict[str, Any] = {"blamed": 0, "detail": "broken by 0: it closed its barrier"}
    log.call(2, 2.5, 3.0, "broken", **left)
    assert log.violations() == [2]
    log.driver(2.1, "cut", rank=None, how="host")
    log.driver(9.0, "ended", rank=2, life=2)
    assert log.violations() == []


def test_law_3_an_arrival_that_counts_after_a_cancellation(log: Log) -> None:
    """Who had returned, cancelled, makes up for nobody who enters later."""
    log.call(0, 1.0, 1.6, "cancelled", stopped=1.5)
    log.call(1, 1.7, 1.8)
    assert log.violations() == [3]


def test_law_3_holds_while_the_store_can_be_reached(log: Log) -> None:
    """A rank that is cut off cannot take its arrival back."""
    log.call(0, 1.0, 1.6, "cancelled", stopped=1.5)
    log.call(1, 1.7, 1.8)
    log.driver(1.2, "cut", rank=0)
    log.driver(2.5, "healed", rank=0)
    assert log.violations() == []


def test_law_3_blame_without_cause(log: Log) -> None:
    """A rank that only waits is not who broke it, and no deadline fires early."""
    log.call(0, 1.0, 2.0, **BY_RANK_0)
    log.call(1, 1.0, 2.0, **BY_RANK_0)
    assert log.violations() == [3, 3]
    early = Log()
    early.call(0, 1.0, 2.5, within=2.0, **TIMED_OUT)
    assert early.violations() == [3]


def test_law_4_a_break_that_is_not_heard(log: Log) -> None:
    """Neither by one that waits, nor by one that comes later, nor by one that never returns."""
    log.call(0, 1.0, 1.6, "cancelled", stopped=1.5)
    log.call(1, 1.0, 2.7 + SLACK_SECS, **BY_RANK_0)
    log.call(0, 6.0, 6.1, "done", do="abort", enters=False, phase=(0, 1))
    log.call(1, 7.0, 8.1 + SLACK_SECS, phase=(0, 1), **BY_RANK_0)
    log.call(0, 10.0, 10.1, "done", do="abort", enters=False, phase=(0, 2))
    log.call(1, 10.0, None, within=None, phase=(0, 2))
    log.rank(12.0, 1, "ended")
    assert log.violations() == [4, 4, 4]


def test_law_4_holds_while_the_store_can_be_reached(log: Log) -> None:
    """A rank that is cut off, or stopped, may hear of it late."""
    log.call(0, 1.0, 1.6, "cancelled", stopped=1.5)
    log.call(1, 1.0, 4.0, **BY_RANK_0)
    log.driver(1.7, "stop", rank=1)
    log.driver(3.5, "continue", rank=1)
    log.call(0, 6.0, 6.6, "cancelled", stopped=6.5, phase=(0, 1))
    log.call(1, 6.0, 9.0, phase=(0, 1), **BY_RANK_0)
    log.driver(7.0, "cut", rank=1)
    log.driver(8.5, "healed", rank=1)
    assert log.violations() == []


def test_law_4_a_restart_that_is_not_heard(log: Log) -> None:
    """Who waits for a process that is gone hears of it when it joins again (law 11)."""
    log.call(0, 1.0, 4.0, within=None, outcome="broken", blamed=1, detail="again")
    log.rank(1.1, 1, "joining", life=2)
    log.rank(1.2, 1, "joined", life=2, generation=1)
    assert log.violations() == [4]


def test_law_4_a_rank_that_leaves_unheard(log: Log) -> None:
    """Whoever waits in its generation, or comes to a phase there, is told that it left (law 3)."""
    log.call(1, 1.0, 1.1, "done", do="close", phase=None)
    log.call(0, 0.5, 2.0, within=None, outcome="broken", blamed=1, detail="it closed its barrier")
    log.call(0, 3.0, 3.5, within=None, phase=(0, 1), outcome="broken", blamed=1, detail="closed")
    assert log.violations() == []
    log.call(0, 4.0, 5.1 + SLACK_SECS, within=None, phase=(0, 2), outcome="broken", blamed=1)
    log.call(0, 4.0, None, within=None, phase=(1, 0))
    assert log.violations() == [4]


def test_law_4_a_later_step_that_is_not_heard(log: Log) -> None:
    """A rank that waits in a step is told when a later one has broken, or was released."""
    late: dict[str, Any] = {"outcome": "broken", "detail": "too late", "blamed": 0, "passed": 6}
    log.call(0, 1.0, 3.5, step=6, within=2.0, phase=(0, 6), **TIMED_OUT)
    log.call(1, 1.0, 3.6, step=5, within=9.0, phase=(0, 5), **late)
    assert log.violations() == []
    log.call(0, 11.0, 11.5, step=8, phase=(0, 8))
    log.call(1, 11.0, 11.4, step=8, phase=(0, 8))
    log.call(1, 11.0, 12.6 + SLACK_SECS, step=7, phase=(0, 7), **late | {"passed": 8})
    assert log.violations() == [4]


def test_law_2_a_step_that_nothing_has_passed(log: Log) -> None:
    """A rank that is refused a step is told of a later one that there was."""
    late: dict[str, Any] = {"outcome": "broken", "detail": "too late", "blamed": 0}
    log.call(0, 1.0, 1.1, step=3, phase=None, passed=4, **late)
    log.call(1, 1.0, 1.1, step=4, phase=None, passed=4, **late)
    assert log.violations() == [2, 2]
    log.call(1, 0.5, 0.6, "done", do="abort", enters=False, step=4, phase=(0, 4))
    assert log.violations() == [2]


def test_law_5_a_deadline_that_is_missed(log: Log) -> None:
    """By a call that returns late, or that does not return while its process lives."""
    log.call(0, 1.0, 4.1 + SLACK_SECS, "lost", within=2.0, in_doubt=True)
    log.call(1, 1.0, None, within=2.0)
    log.rank(6.0, 1, "ended")
    assert log.violations() == [5, 5]


def test_law_5_allows_for_stops_and_no_more(log: Log) -> None:
    """A process that is stopped cannot return; being cut off is no excuse."""
    log.call(0, 1.0, 6.0, "lost", within=2.0, in_doubt=True)
    log.driver(2.0, "cut", rank=0)
    log.call(1, 1.0, 6.0, "lost", within=2.0, in_doubt=True)
    log.driver(2.0, "stop", rank=1)
    log.driver(5.0, "continue", rank=1)
    assert log.violations() == [5]


def test_a_cancelled_call_that_goes_on(log: Log) -> None:
    """Law 8, on the way."""
    log.call(0, 1.0, 3.1 + SLACK_SECS, "cancelled", stopped=2.0)
    assert log.violations() == [8]


def test_an_error_of_torch_that_escapes(log: Log) -> None:
    """What is no error of the library's is a violation, whatever it is."""
    log.call(0, 1.0, 2.0, "foreign", detail="RuntimeError()")
    assert log.violations() == [0]


@pytest.mark.processes
def test_a_short_soak(
    forge: Forge, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Ranks that are cancelled, killed, stopped, restarted and cut off keep all laws.

    They use sockets; and then some of them use sockets, and some threads.
    """
    # One that can be run again as it was; `make soak` picks others.
    seed = "7"
    total = soak.Tally()
    sockets = soak.CARRIERS[:1]
    for place, secs, by in (
        ("shared", SHARED_SECS, sockets),
        ("hosted", HOSTED_SECS, sockets),
        ("mixed", HOSTED_SECS, soak.CARRIERS),
    ):
        hosted = place == "hosted"
        total.add(soak.episode(forge, tmp_path / place, seed, secs, 4, BACKENDS, by, hosted=hosted))
    record_property("soak", f"seed {seed}: {total}")
    assert not total.violations, "\n".join(map(str, total.violations))
    assert total.outcomes["released"]
    assert total.outcomes["broken"]
