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
# How long one that does not answer is waited for, and then some.
TAKEN_FOR_DEAD_SECS = 3.0


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
    job.ranks[2].do("abort", name="x")
    job.all_join(1)
    # What it tried before they were back is nobody's but its own, and puts nobody out of step.
    for sequence in range(2):
        assert {result["sequence"] for result in job.crosses("x")} == {sequence}
    assert {result["sequence"] for result in job.crosses("y")} == {0}
    job.ends()


@pytest.mark.parametrize("do", ["cross", "commit"])
def test_one_that_waits_for_the_others_to_come_back(start_job: StartJob, do: str) -> None:
    """It crosses with them, in their first phase and with what it had brought before."""
    job = start_job(3, own_store=False, lanes=2)
    arguments: dict[str, Any] = {"name": "x"}
    if do == "commit":
        arguments |= {"publish": "join", "leader": 1}
    comes_back(job, 2)

    def start(number: int) -> Call:
        if do == "commit":
            arguments["payload"] = f"p{number}"
        return job.ranks[number].start(do, **arguments)

    calls = [start(2)]
    job.entered(2, name="x", generation=1)
    job.all_join(1, but=1)
    calls.append(start(0))
    job.entered(0, name="x", generation=1)
    assert not any(call.answered for call in calls)
    calls.append(start(1))
    answers = [call.released() for call in calls]
    if do == "commit":
        assert [answer["value"] for answer in answers] == ["p0+p1+p2"] * 3
    else:
        assert [answer["sequence"] for answer in answers] == [0] * 3
    assert {result["sequence"] for result in job.crosses("x")} == {1}
    here = job.own().root + "/phase/"
    until(lambda: not any(here in key for key in job.store.list_keys()))
    job.ends()


def test_one_that_comes_back_late_is_not_told_of_attempts(start_job: StartJob) -> None:
    """Those that tried without it, and are still there, meet it in what is their next phase."""
    job = start_job(3, own_store=False)
    for number in (1, 2):
        job.ranks[number].strike(SIGKILL)
    job.come_back(1)
    job.all_join(1, but=2)
    for call in job.starts([0, 1], name="x", timeout_secs=0.3):
        assert call.error("BarrierTimeoutError")["missing_ranks"][-1] == 2
    job.come_back(2)
    for sequence in range(2):
        assert {result["sequence"] for result in job.crosses("x")} == {sequence}
    job.ends()


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 2, 1), (1, 0, 2)])
def test_an_attempt_that_died_before_all_were_back(
    start_job: StartJob, order: tuple[int, ...]
) -> None:
    """Whoever comes back first after it is not told of those that died then."""
    job = start_job(3, own_store=False)
    for number in range(3):
        job.ranks[number].strike(SIGKILL)
    job.come_back(0, 1)
    for number in (0, 1):
        job.ranks[number].strike(SIGKILL)
    calls = []
    for number in order:
        job.come_back(number)
        calls.append(job.ranks[number].start("cross", name="x", timeout_secs=30))
    assert {call.released()["sequence"] for call in calls} == {0}
    job.ends()


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
    job.ends()


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
    job.ends()


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
    job.ends()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same machine", "another machine"])
@pytest.mark.parametrize("held_up", ["idle", "blocked", "stopped"])
def test_two_processes_with_the_same_rank(
    start_job: StartJob, held_up: str, elsewhere: bool
) -> None:
    """The second is refused while the first lives; it makes up for nobody, and harms nobody."""
    if held_up == "stopped" and elsewhere:
        pytest.skip("what is stopped on another machine cannot be told from what is dead")
    job = start_job(3, own_store=False)
    first = job.ranks[0]
    waiting = job.starts([0, 1], name="x", timeout_secs=None)
    job.entered(0, 1, name="x")
    before = job.state()
    if held_up == "blocked":
        first.start("here_block", secs=0.4)
        assert first.event() == {"event": "blocked"}
    elif held_up == "stopped":
        first.stop()
    for _ in range(2):
        job.another(0, **({"machine": "another"} if elsewhere else {})).is_refused(first)
    if held_up == "stopped":
        first.signal(SIGCONT)
    assert job.state() == before
    assert not any(call.answered for call in waiting)
    last = job.ranks[2].start("cross", name="x").released()
    assert {call.released()["sequence"] for call in waiting} == {last["sequence"]} == {0}
    job.ends()


def test_one_that_was_taken_for_dead(start_job: StartJob) -> None:
    """Stopped for longer than anybody waits, on a machine that cannot be asked: when it goes on, it
    has no part in anything, and is refused."""
    job = start_job(3, own_store=False)
    first = job.ranks[0]
    waiting = job.starts([0, 1], name="x", timeout_secs=None)
    job.entered(0, 1, name="x")
    first.stop()
    began = time.monotonic()
    job.come_back(0, machine="another")
    assert time.monotonic() < began + TAKEN_FOR_DEAD_SECS
    are_told(waiting[1:], 0, joined=time.monotonic())
    waiting[1:] = job.starts([0, 1], name="x", timeout_secs=None)
    job.entered(0, 1, name="x", generation=1)
    first.signal(SIGCONT)
    are_told(waiting[:1], 0, joined=time.monotonic())
    for _ in range(3):
        error = first.start("cross", name="x").error("BarrierError")
        assert f"is held by process {job.ranks[0].pid} on" in error["text"]
    assert not any(call.answered for call in waiting[1:])
    last = job.ranks[2].start("cross", name="x").released()
    assert {call.released()["sequence"] for call in waiting[1:]} == {last["sequence"]} == {0}
    told = first.start("end").started
    assert first.exit(told + EXIT_SECS) == 0
    job.ends()


def test_another_run_is_refused(start_job: StartJob) -> None:
    """A process of another run is no restart, also where the rank's own is gone (law 11)."""
    job = start_job(2, own_store=False, given={"run_id": "one"})
    job.ranks[0].strike(SIGKILL)
    stranger = job.another(0, given={"run_id": "two"})
    assert stranger.exit(time.monotonic() + EXIT_SECS + GRACE_SECS) == 1
    assert "of run 'two'" in stranger.stderr
    assert "those of run 'one'" in stranger.stderr
    assert job.state()["number"] == 0
    job.come_back(0)
    job.all_join(1)
    job.crosses()
    job.ends()


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
    job.ends()
