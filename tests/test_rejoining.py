"""Processes that come back while their peers live on, on a store that survived (law 11)."""

from __future__ import annotations

import os
import time
from signal import SIGCONT, SIGKILL
from typing import Any

import pytest
from processes import EXIT_SECS, GRACE_SECS, Call, Job, StartJob, until

pytestmark = pytest.mark.processes

INIT_SECS = 1.5
# Two processors that end four interpreters at once take their time for that alone.
ENDS_SECS = 2 * EXIT_SECS


def comes_back(job: Job, *numbers: int) -> float:
    """Kill ranks and start them anew; when all of them had joined."""
    for number in numbers:
        job.ranks[number].strike(SIGKILL)
    job.come_back(*numbers)
    return time.monotonic()


def are_told(calls: list[Call], *culprits: int, joined: float) -> list[dict[str, Any]]:
    """Those who wait hear at once that a rank joined again, and which."""
    errors = [call.error("BrokenBarrierError") for call in calls]
    for error in errors:
        assert error["rank"] in culprits
        assert "joined again" in error["reason"]
        assert error["ended"] < joined + GRACE_SECS
    return errors


def test_a_rank_that_comes_back(start_job: StartJob) -> None:
    """Its peers are told, alone it is told who lacks, and with all back it works as before."""
    job = start_job(4, own_store=False, lanes=2, given={"timeout_barrier_init_secs": INIT_SECS})
    waiting = job.starts([1, 2, 3], name="x", timeout_secs=None)
    job.entered(1, 2, 3, name="x")
    # One that had entered: its arrival is history.
    joined = comes_back(job, 2)
    are_told([waiting[0], waiting[2]], 2, joined=joined)
    alone = job.ranks[2].start("cross", name="x").error("BarrierTimeoutError")
    assert (alone["missing_ranks"], alone["timeout_secs"]) == ([0, 1, 3], INIT_SECS)
    assert "did not join again" in alone["text"]
    assert alone["ended"] < alone["began"] + INIT_SECS + GRACE_SECS
    job.all_join(1)
    # Who was not waiting learns what became of the phase that the newcomer gave up.
    for call in job.starts([0, 1, 3], name="x"):
        assert call.error("BarrierTimeoutError")["missing_ranks"] == [0, 1, 3]
    assert {result["sequence"] for result in job.crosses("x")} == {1}
    assert {result["sequence"] for result in job.crosses("y")} == {0}
    job.ends(ENDS_SECS)


def test_one_that_comes_back_three_times(start_job: StartJob) -> None:
    """None of its lives makes up for the peer that slept through all of them."""
    job = start_job(3, own_store=False)
    busy = job.ranks[1]
    busy.stop()
    for generation in range(3):
        waiting = job.starts([0, 2], name="x", timeout_secs=None)
        job.entered(0, 2, name="x", generation=generation)
        are_told(waiting[:1], 2, joined=comes_back(job, 2))
    waiting = job.starts([0, 2], name="x", timeout_secs=None)
    job.entered(0, 2, name="x", generation=3)
    busy.signal(SIGCONT)
    job.all_join(3)
    assert not any(call.answered for call in waiting)
    waiting.append(busy.start("cross", name="x"))
    results = [call.released() for call in waiting]
    assert {result["sequence"] for result in results} == {0}
    assert results[-1]["entered"] <= min(result["released"] for result in results)
    job.crosses("x")
    job.ends(ENDS_SECS)


def test_two_that_come_back_at_once(start_job: StartJob) -> None:
    """Whoever of them joins first: it is one generation, and one error for those who wait."""
    job = start_job(4, own_store=False)
    for generation in range(3):
        waiting = job.starts([0, 1, 3], name="x", timeout_secs=None)
        job.entered(0, 1, 3, name="x", generation=generation)
        errors = are_told([waiting[0], waiting[2]], 1, 2, joined=comes_back(job, 1, 2))
        assert errors[0]["text"] == errors[1]["text"]
        job.all_join(generation + 1)
    for sequence in range(2):
        assert {result["sequence"] for result in job.crosses("x")} == {sequence}
    job.ends(ENDS_SECS)


def test_a_restart_inside_a_commit(start_job: StartJob) -> None:
    """If the leader comes back, nobody knows whether it had published; of a peer it is known."""
    job = start_job(3, own_store=False)
    commit: dict[str, Any] = {"payload": "p", "leader": 1, "timeout_secs": None}
    calls = [rank.start("commit", publish="hang", **commit) for rank in job.ranks]
    assert job.ranks[1].event()["event"] == "publishing"
    errors = are_told([calls[0], calls[2]], 1, joined=comes_back(job, 1))
    assert all(error["in_doubt"] for error in errors)
    job.all_join(1)
    calls = [rank.start("commit", publish="wait", **commit) for rank in job.ranks]
    assert job.ranks[1].event()["event"] == "publishing"
    comes_back(job, 2)
    # From the last arrival on, nothing but the leader's word counts.
    job.ranks[1].do("give_word")
    assert [call.released()["value"] for call in calls[:2]] == ["p+p+p"] * 2
    job.all_join(2)
    job.crosses()
    job.ends(ENDS_SECS)


def test_two_processes_with_the_same_rank(start_job: StartJob) -> None:
    """The later one stays, the other one is refused, and neither makes up for who is missing."""
    job = start_job(3, own_store=False)
    first = job.ranks[0]
    waiting = job.starts([0, 1], name="x", timeout_secs=None)
    job.entered(0, 1, name="x")
    job.come_back(0)
    errors = are_told(waiting, 0, joined=time.monotonic())
    assert "two processes share its number" in errors[0]["text"]
    job.all_join(1)
    waiting = job.starts([0, 1], name="x", timeout_secs=None)
    job.entered(0, 1, name="x", generation=1)
    for _ in range(3):
        error = first.start("cross", name="x").error("BrokenBarrierError")
        assert "look for two processes with this rank" in error["text"]
        assert error["rank"] == 0
    assert not any(call.answered for call in waiting)
    last = job.ranks[2].start("cross", name="x").released()
    assert {call.released()["sequence"] for call in waiting} == {last["sequence"]} == {0}
    told = first.start("end").started
    assert first.exit(told + EXIT_SECS) == 0
    job.ends(ENDS_SECS)


def test_a_barrier_that_is_built_anew_a_hundred_times(start_job: StartJob) -> None:
    """In the same processes; keys, threads and descriptors stay as many as they were."""
    job = start_job(2, own_store=False)

    def used() -> list[int]:
        counts = [job.store.num_keys()]
        for rank in job.ranks:
            counts += [len(os.listdir(f"/proc/{rank.pid}/{kind}")) for kind in ("task", "fd")]
        return counts

    few: list[int] = []
    for number in range(100):
        for do in ("close", "build_anew"):
            for call in job.starts(range(2), do):
                call.released()
        assert {result["sequence"] for result in job.crosses("x")} == {0}
        if number == 19:
            few = used()
    until(lambda: all(now <= then + 1 for now, then in zip(used(), few, strict=True)))
    job.ends(ENDS_SECS)
