"""The laws that need real processes: kills, stops, exits, and a host that leaves."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest
from processes import (
    BACKENDS,
    CRASHES,
    EXIT_SECS,
    GRACE_SECS,
    Call,
    Job,
    StartJob,
    until,
)
from rank_process import STORE_TIMEOUT_SECS

pytestmark = pytest.mark.processes

DEADLINE_SECS = 0.7
# How long a host waits for peers that do not answer, before it exits as others do.
HOST_EXIT_SECS = 3.0 + EXIT_SECS

# As the interpreter ends it, or as a shell reports it.
INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)

over_both = pytest.mark.parametrize("own_store", [False, True], ids=["shared store", "own store"])


def time_out(job: Job, number: int, waiting: Sequence[Call], *, missing: int) -> str:
    """Rank ``number`` enters x with a deadline; it and those that wait learn of it in time.

    :return: what all of them were told
    """
    first = job.ranks[number].start("cross", name="x", timeout_secs=DEADLINE_SECS)
    errors = [call.error("BarrierTimeoutError") for call in (first, *waiting)]
    for error in errors:
        assert (error["name"], error["sequence"], error["in_doubt"]) == ("x", 0, False)
        assert (error["missing_ranks"], error["timeout_secs"]) == ([missing], DEADLINE_SECS)
        assert error["ended"] < errors[0]["began"] + DEADLINE_SECS + GRACE_SECS
    (text,) = {str(error["text"]) for error in errors}
    return text


@over_both
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_repeated_crossings_of_several_names(
    start_job: StartJob, size: int, own_store: bool
) -> None:
    """Each name counts for itself, all agree on who came last, and no keys stay (law 10)."""
    job = start_job(size, own_store=own_store, lanes=3)
    store = job.store
    names = ("", "save", "save0")
    for sequence in range(10):
        calls = {name: job.starts(range(size), name=name) for name in names}
        for name in names:
            results = [call.released() for call in calls[name]]
            assert [(r["name"], r["sequence"]) for r in results] == [(name, sequence)] * size
            # Who waited for nobody may not know who came last; who was it knows.
            (last,) = {r["last_rank"] for r in results} - {None}
            assert 0 <= last < size
    # Off the path of the crossings, the last rank to leave a phase clears it away.
    until(lambda: not any("/phase/" in key for key in store.list_keys()))
    job.ends()


@over_both
def test_nobody_is_released_before_the_last_has_entered(
    start_job: StartJob, own_store: bool
) -> None:
    """By one clock for all processes, whoever comes late and by how much (law 1)."""
    job = start_job(4, own_store=own_store)
    chance = random.Random(4)
    held = 0

    def crossed(calls: list[Call]) -> list[dict[str, Any]]:
        results = [call.released() for call in calls]
        assert max(r["entered"] for r in results) <= min(r["released"] for r in results)
        return results

    for _ in range(20):
        crossed([rank.start("cross", sleep=chance.uniform(0, 0.02)) for rank in job.ranks])
    for held in range(4):
        others = [rank for rank in range(4) if rank != held]
        waiting = job.starts(others, name="held")
        job.entered(*others, name="held", sequence=held)
        assert not any(call.answered for call in waiting)
        results = crossed([*waiting, job.ranks[held].start("cross", name="held")])
        # Who waited for less than 10 ms may not have asked.
        assert {result["last_rank"] for result in results} <= {held, None}
        assert results[-1]["last_rank"] == held
    job.ends()


@over_both
@pytest.mark.parametrize("missing", [0, 2])
def test_a_deadline_names_the_rank_that_never_entered(
    start_job: StartJob, missing: int, own_store: bool
) -> None:
    """On every rank, whatever its own deadline, the late one too; the next crossing works."""
    job = start_job(4, own_store=own_store)
    first, *others = (rank for rank in range(4) if rank != missing)
    waiting = job.starts(others, name="x", timeout_secs=15)
    job.entered(*others, name="x")
    text = time_out(job, first, waiting, missing=missing)
    error = job.ranks[missing].start("cross", name="x").error("BarrierTimeoutError")
    assert error["ended"] < error["began"] + GRACE_SECS
    assert (error["text"], error["missing_ranks"]) == (text, [missing])
    assert {result["sequence"] for result in job.crosses("x")} == {1}
    job.ends()


@over_both
@pytest.mark.parametrize("entered", [True, False], ids=["waiting", "before entering"])
def test_a_rank_that_is_killed(start_job: StartJob, entered: bool, own_store: bool) -> None:
    """One that had entered is not missing, one that had not is; the others go on (law 5, 6)."""
    job = start_job(4, own_store=own_store)
    if entered:
        job.starts([2], name="x")
        job.entered(2, name="x")
    killed = job.ranks[2].signal(signal.SIGKILL)
    assert job.ranks[2].exit(killed + EXIT_SECS) == -signal.SIGKILL
    others = [1] if entered else [1, 3]
    waiting = job.starts(others, name="x", timeout_secs=15)
    job.entered(*others, name="x")
    time_out(job, 0, waiting, missing=3 if entered else 2)
    if not own_store:
        # Where rank 0 is the host, it waits for the dead; that is a test's of its own.
        job.ends()


@over_both
@pytest.mark.parametrize("entered", [True, False], ids=["waiting", "before entering"])
def test_a_rank_that_is_stopped_past_all_deadlines(
    start_job: StartJob, entered: bool, own_store: bool
) -> None:
    """When it goes on it learns the verdict that its peers learnt meanwhile (law 2)."""
    job = start_job(3, own_store=own_store)
    stopped, peer = job.ranks[1], job.ranks[2]
    if entered:
        call = stopped.start("cross", name="x", timeout_secs=1.5)
        job.entered(1, name="x")
        stopped.stop()
        text = time_out(job, 0, [], missing=2)
        time.sleep(max(0.0, call.started + 1.6 - time.monotonic()))
    else:
        stopped.stop()
        call = stopped.start("cross", name="x")
        waiting = [peer.start("cross", name="x", timeout_secs=15)]
        job.entered(2, name="x")
        text = time_out(job, 0, waiting, missing=1)
    stopped.signal(signal.SIGCONT)
    error = call.error("BarrierTimeoutError")
    assert error["text"] == text
    assert (error["missing_ranks"], error["timeout_secs"]) == ([1 + entered], DEADLINE_SECS)
    if entered:
        assert peer.start("cross", name="x").error("BarrierTimeoutError")["text"] == text
    assert {result["sequence"] for result in job.crosses("x")} == {1}
    job.ends()


def test_the_host_of_the_store_is_killed(start_job: StartJob) -> None:
    """Who waits is told at once that nobody can know, and exits as ever (laws 5 and 8)."""
    job = start_job(4, own_store=True, lanes=2)
    waiting = job.starts([1, 2], name="x", timeout_secs=15)
    waiting += job.starts([1, 2], name="y", timeout_secs=None)
    job.entered(1, 2, name="x")
    job.entered(1, 2, name="y")
    killed = job.ranks[0].signal(signal.SIGKILL)
    for call in waiting:
        error = call.error("BarrierConnectionError")
        assert error["in_doubt"]
        assert error["ended"] < killed + 2
    assert job.ranks[0].exit(killed + EXIT_SECS) == -signal.SIGKILL
    late = job.ranks[3].start("cross", name="x", timeout_secs=0.5)
    assert not late.error("BarrierConnectionError")["in_doubt"]
    job.ends(quietly=False)


def test_the_host_of_the_store_is_stopped(start_job: StartJob) -> None:
    """Who waits for it is in doubt at its deadline; it goes on as if nothing had been."""
    job = start_job(4, own_store=True, lanes=2)
    host = job.ranks[0]
    patient = job.starts([0], name="x", timeout_secs=15)
    waiting = job.starts([1, 2], name="x", timeout_secs=DEADLINE_SECS)
    patient += job.starts([1, 2], name="y", timeout_secs=None)
    job.entered(0, 1, 2, name="x")
    job.entered(1, 2, name="y")
    host.stop()
    late = job.ranks[3].start("cross", name="z", timeout_secs=DEADLINE_SECS)
    # This one has to open a connection first.
    opens = job.ranks[1].start("cross", name="z", timeout_secs=DEADLINE_SECS)
    for call in (*waiting, late, opens):
        error = call.error("BarrierConnectionError")
        assert DEADLINE_SECS <= error["ended"] - error["began"] < DEADLINE_SECS + GRACE_SECS
        assert error["in_doubt"] == (call is not opens)
    goes_on = host.signal(signal.SIGCONT)
    error = patient[0].error("BarrierTimeoutError")
    assert (error["missing_ranks"], error["timeout_secs"]) == ([3], DEADLINE_SECS)
    assert error["ended"] < goes_on + GRACE_SECS
    assert job.ranks[3].start("cross", name="x").error("BarrierTimeoutError")
    # Who has no deadline waits on, and is released when all have come.
    for call in (*job.starts([0, 3], name="y"), *patient[1:]):
        call.released()
    assert {result["sequence"] for result in job.crosses("x")} == {1}
    job.ends(quietly=False)


def test_the_last_one_is_struck_as_it_arrives(start_job: StartJob) -> None:
    """At whatever point of its arrival, in sixteen phases at once: each has one verdict (law 2)."""
    job = start_job(3, own_store=False, lanes=17)
    victim = job.ranks[2]
    for round_, blow in enumerate((signal.SIGSTOP, signal.SIGSTOP, signal.SIGKILL)):
        names = [f"{round_} {number}" for number in range(16)]
        waiting = {
            name: job.starts([0, 1], name=name, timeout_secs=DEADLINE_SECS) for name in names
        }
        for name in names:
            job.entered(0, 1, name=name)
        # Where it stands in this one tells how far it has come in the others.
        mark = f"mark {round_}"
        order = [*names[: 8 * round_], mark, *names[8 * round_ :]]
        calls = {name: victim.start("cross", name=name, timeout_secs=1.0) for name in order}
        job.entered(2, name=mark)
        victim.strike(blow)
        verdicts = {}
        for name in names:
            answers = [call.answer() for call in waiting[name]]
            (verdicts[name],) = {answer.get("error", "released") for answer in answers}
            for answer in answers:
                assert answer["ended"] - answer["began"] < DEADLINE_SECS + GRACE_SECS
                assert answer.get("missing_ranks", [2]) == [2]
        assert set(verdicts.values()) <= {"released", "BarrierTimeoutError"}
        if blow == signal.SIGSTOP:
            victim.signal(signal.SIGCONT)
            for name in names:
                assert calls[name].answer().get("error", "released") == verdicts[name]
    job.ends()


@over_both
@pytest.mark.parametrize("leader", [0, 1])
def test_a_commit(start_job: StartJob, leader: int, own_store: bool) -> None:
    """The leader alone publishes, with what all brought, and all get what it returns."""
    job = start_job(3, own_store=own_store)

    def commit(publish: str) -> list[Call]:
        return [
            rank.start("commit", publish=publish, payload=f"p{rank.number}", leader=leader)
            for rank in job.ranks
        ]

    for _ in range(3):
        assert [call.released()["value"] for call in commit("join")] == ["p0+p1+p2"] * 3
    calls = commit("fail")
    errors = [
        call.error("OSError" if call.rank.number == leader else "BrokenBarrierError")
        for call in calls
    ]
    assert errors.pop(leader)["text"] == "disk full"
    for error in errors:
        assert error["rank"] == leader
        assert "OSError: disk full" in error["reason"]
        assert not error["in_doubt"]
    for rank in job.ranks:
        published = {"event": "publishing", "payloads": {"0": "p0", "1": "p1", "2": "p2"}}
        assert rank.events == ([published] * 4 if rank.number == leader else [])
    job.ends()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize(
    ("own_store", "leader"),
    [(False, 1), (True, 1), (True, 0)],
    ids=["shared store", "own store", "host of the store"],
)
def test_a_leader_that_is_struck_inside_publish(
    start_job: StartJob, own_store: bool, leader: int, blow: signal.Signals
) -> None:
    """Its peers cannot know whether it has published, and say so; it knows that it has not."""
    job = start_job(3, own_store=own_store)
    arguments = {"publish": "hang", "payload": "", "leader": leader}
    victim, *peers = (job.ranks[leader], *(r for r in job.ranks if r.number != leader))
    deadlines = (1.0, 1.5)
    calls = [
        peer.start("commit", timeout_secs=secs, **arguments)
        for peer, secs in zip(peers, deadlines, strict=True)
    ]
    leads = victim.start("commit", timeout_secs=1.2, **arguments)
    assert victim.event()["event"] == "publishing"
    began = victim.strike(blow)
    for call, secs in zip(calls, deadlines, strict=True):
        error = call.error("BarrierTimeoutError" if leader else "BarrierConnectionError")
        assert error["in_doubt"]
        if leader:
            assert (error["timeout_secs"], error["missing_ranks"]) == (secs, [])
        if not leader and blow == signal.SIGKILL:
            assert error["ended"] < began + GRACE_SECS
        else:
            assert secs <= error["ended"] - error["began"] < secs + GRACE_SECS
    if blow == signal.SIGSTOP:
        goes_on = victim.signal(signal.SIGCONT)
        # It may have been stopped when its event loop had worked out how long to sleep, and was
        # about to: then it would sleep that long now. Whatever wakes it has it look at the clock.
        victim.start("connect")
        error = leads.error("BarrierTimeoutError")
        assert (error["timeout_secs"], error["in_doubt"]) == (1.2, False)
        assert error["ended"] < goes_on + GRACE_SECS
        assert {result["sequence"] for result in job.crosses()} == {1}
    # A host waits for the dead, for a while.
    job.ends(HOST_EXIT_SECS, quietly=leader != 0)


@pytest.mark.parametrize("leaver", [0, 1], ids=["host", "peer"])
@pytest.mark.parametrize("managed", [True, False], ids=["closed", "not closed"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["interrupted", "exits", "raises", "ends"])
def test_exits_are_prompt(
    start_job: StartJob, how: str, backend: str, managed: bool, leaver: int
) -> None:
    """However a rank ends while it waits, its peer is told in time and nothing crashes (law 8)."""
    backends = BACKENDS if BACKENDS[leaver] == backend else BACKENDS[::-1]
    job = start_job(3, own_store=True, managed=managed, backends=backends)
    rank, peer = job.ranks[leaver], job.ranks[1 - leaver]
    waiting = peer.start("cross", name="x", timeout_secs=None)
    rank.start({"interrupted": "here_cross", "raises": "here_raise"}.get(how, "cross"), name="x")
    job.entered(0, 1, name="x")
    if how == "interrupted":
        told = rank.signal(signal.SIGINT)
    else:
        told = rank.start({"exits": "here_exit", "raises": "go", "ends": "end"}[how]).started
    code = rank.exit(told + EXIT_SECS)
    codes = {"exits": (3,), "raises": (1,), "ends": (0,), "interrupted": INTERRUPTED}
    assert code in codes[how], rank.stderr
    assert not any(crash in rank.stderr for crash in CRASHES), rank.stderr
    assert ("LookupError: the rest" in rank.stderr) == (how == "raises")
    assert ("KeyboardInterrupt" in rank.stderr) == (how == "interrupted")
    if how in ("exits", "ends"):
        assert not rank.stderr
    error = waiting.error("BrokenBarrierError")
    assert error["rank"] == leaver
    assert error["ended"] < told + GRACE_SECS
    # A host that was not closed waits for its peers for a moment only.
    job.ends(quietly=managed)


@pytest.mark.parametrize("held_up", ["stopped", "blocked"])
def test_the_host_leaves_last(start_job: StartJob, held_up: str) -> None:
    """Rank 0 ends right after a release; no peer, however late, sees a lost store (law 13)."""
    for _ in range(5):
        job = start_job(4, own_store=True)
        host, *peers = job.ranks
        waiting = job.starts([1, 2, 3])
        job.entered(1, 2, 3)
        for peer in peers:
            if held_up == "stopped":
                peer.stop()
            else:
                peer.start("here_block", secs=0.4)
                assert peer.event() == {"event": "blocked"}
        released = host.start("cross").released()
        ended = host.start("end").started
        if held_up == "stopped":
            # Long enough for a host that would not wait to be gone.
            time.sleep(0.3)
            for peer in peers:
                peer.signal(signal.SIGCONT)
        for call in waiting:
            result = call.released()
            assert (result["sequence"], result["last_rank"]) == (0, released["last_rank"])
        assert host.exit(ended + HOST_EXIT_SECS) == 0
        job.ends()


def test_a_store_that_is_passed_in_stays_its_owners(start_job: StartJob) -> None:
    """While a phase waits, its owner's calls take no longer; nothing of it is changed (law 12)."""
    job = start_job(2, own_store=False)
    guest, peer = job.ranks
    store = job.store
    store.set("own", "value")

    def others() -> set[str]:
        return {key for key in store.list_keys() if not key.startswith("async_barriers/")}

    before = others()
    waiting = guest.start("cross", name="x", timeout_secs=None)
    job.entered(0, name="x")
    for count in (1, 2):
        if count == 2:
            peer.do("cross", name="x")
            waiting.released()
        used = guest.do("use_store", key="theirs")
        assert used["secs"] < 1
        assert (used["found"], used["count"]) == ("theirs", count)
        assert used["timeout"] == STORE_TIMEOUT_SECS
    assert store.get("own") == b"value"
    assert others() - before == {"theirs", "theirs/count"}
    job.ends()
