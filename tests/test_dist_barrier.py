"""DistBarrier: a world of one in this process, worlds of three in processes of their own.

The processes' default group is of a backend that fails whoever touches it; see dist_rank.py.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import anyio
import pytest
import torch
import torch.distributed as dist
from processes import CRASHES, EXIT_SECS, GRACE_SECS, Call, Job, StartJob, until
from rank_process import STORE_TIMEOUT_SECS
from stores import MemoryStore
from worlds import Tasks

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierTimeoutError,
    BrokenBarrierError,
    DistBarrier,
    StoreBarrier,
    _attendance,
)
from async_barriers._attendance import Attendance
from async_barriers._barrier import UNDO_SECS
from async_barriers._collectives import Collectives
from async_barriers._meeting import Meeting
from async_barriers._waiting import outcome

pytestmark = pytest.mark.anyio

# Law 7; twice that where three processes share two processors with other tests.
PULSE_SECS = 0.1
DEADLINE_SECS = 0.5


@contextmanager
def default_group(store: dist.Store) -> Iterator[None]:
    """An initialised default group with one rank, this process."""
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """A default group over the simplest store."""
    with default_group(dist.HashStore()):
        yield


async def test_it_needs_a_default_group_or_one_given() -> None:
    """Without an initialised default group, connecting says what to call."""
    async with anyio.create_task_group():
        barrier = DistBarrier()
        with pytest.raises(BarrierConnectionError, match=r"init_process_group\(\) first"):
            await barrier.connect()
        with pytest.raises(BarrierConnectionError, match="init_process_group"):
            await barrier.execute_barrier()
        # The body's own error is not hidden by that.
        with pytest.raises(KeyError, match="body"):
            async with barrier.phase():
                raise KeyError("body")
        await barrier.aclose()


async def test_connecting_over_a_store_that_is_lost_fails_at_once() -> None:
    """The group cannot come about, and the barrier is of no more use."""
    store = MemoryStore()
    with default_group(store):
        barrier = DistBarrier()
        store.data.lose()
        with pytest.raises(BarrierConnectionError, match="the store was lost"):
            await barrier.connect()
        with pytest.raises(BrokenBarrierError, match="the store was lost"):
            await barrier.connect()
        await barrier.aclose()


@pytest.mark.parametrize(("group", "timeout_secs"), [("world", 1), (-100, 1), (None, 0)])
def test_bad_arguments_are_refused_when_it_is_built(group: Any, timeout_secs: float) -> None:
    """What is no group, such as torch's mark for "not a member", is refused at once."""
    with pytest.raises((TypeError, ValueError), match=r"process_group must|timeout_secs is 0"):
        DistBarrier(group, timeout_secs=timeout_secs)


@pytest.mark.usefixtures("world_of_one")
async def test_crossings_are_counted_in_call_order() -> None:
    """All names share one order of calls."""
    async with DistBarrier(timeout_secs=10) as barrier:
        first = await barrier.execute_barrier("a")
        second = await barrier.execute_barrier("b", timeout_secs=None)
        assert (first.name, first.sequence, first.last_rank) == ("a", 0, 0)
        assert (second.name, second.sequence) == ("b", 1)
        with pytest.raises(TypeError, match="name must be a string"):
            await barrier.execute_barrier(3)  # type: ignore[arg-type]


@pytest.mark.usefixtures("world_of_one")
async def test_a_group_that_is_given_is_used_and_left_alone() -> None:
    """Closing destroys the group only if the barrier made it."""
    group = dist.new_group(backend="gloo")
    async with DistBarrier(group) as barrier:
        await barrier.execute_barrier()
    assert dist.get_rank(group) == 0
    await barrier.aclose()
    with pytest.raises(BarrierClosedError, match="DistBarrier is closed"):
        await barrier.execute_barrier()


@pytest.mark.usefixtures("world_of_one")
async def test_closing_after_the_default_group_is_no_error() -> None:
    """Whoever tears torch down first leaves nothing for us to destroy."""
    barrier = DistBarrier()
    await barrier.connect()
    dist.destroy_process_group()
    await barrier.aclose()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.usefixtures("world_of_one")
async def test_commit_returns_what_the_leader_publishes() -> None:
    """None stands for no bytes; whatever publish gets wrong, it has published."""
    seen: list[Mapping[int, bytes]] = []
    answer: Any = b"done"

    async def publish(payloads: Mapping[int, bytes]) -> Any:
        seen.append(payloads)
        return answer

    async with DistBarrier() as barrier:
        assert await barrier.commit(publish, payload=b"mine") == b"done"
        answer = None
        assert await barrier.commit(publish) == b""
        assert seen == [{0: b"mine"}, {0: b""}]
        answer = "text"
        with pytest.raises(TypeError, match="publish's result must be bytes, not str"):
            await barrier.commit(publish)
        with pytest.raises(ValueError, match="rank 3 is outside the world"):
            await barrier.commit(publish, leader=3)


@pytest.mark.usefixtures("world_of_one")
async def test_publish_that_raises_leaves_the_barrier_whole() -> None:
    """All ranks took part in the collectives, so the next call is in step."""

    async def fail(_: Mapping[int, bytes]) -> bytes:
        raise OSError("disk full")

    async with DistBarrier() as barrier:
        with pytest.raises(OSError, match="disk full"):
            await barrier.commit(fail)
        assert (await barrier.execute_barrier()).sequence == 1


@pytest.mark.usefixtures("world_of_one")
async def test_the_leaders_deadline_stops_publish_without_doubt() -> None:
    """The leader knows that nothing was published, and the barrier is of no more use."""
    async with DistBarrier() as barrier:
        with pytest.raises(BarrierTimeoutError, match=r"timed out after 0\.1 s") as caught:
            await barrier.commit(lambda _: anyio.sleep_forever(), timeout_secs=0.1)
        assert not caught.value.in_doubt
        with pytest.raises(BrokenBarrierError, match=r"timed out after 0.1 s.*use a StoreBarrier"):
            await barrier.execute_barrier()
        with pytest.raises(BrokenBarrierError, match="of no more use"):
            await barrier.connect()


@pytest.mark.usefixtures("world_of_one")
async def test_a_cancelled_publish_breaks_the_barrier_for_good() -> None:
    """Cancellation passes through, and later calls say what happened."""
    async with DistBarrier() as barrier:
        with anyio.move_on_after(0.1) as scope:
            await barrier.commit(lambda _: anyio.sleep_forever())
        assert scope.cancelled_caught
        with pytest.raises(BrokenBarrierError, match="its task was cancelled"):
            await barrier.execute_barrier()


@pytest.mark.usefixtures("world_of_one")
async def test_abort_takes_a_turn_in_the_collective() -> None:
    """In a world of one there is nobody else to tell, and the next call works."""
    async with DistBarrier() as barrier:
        await barrier.abort("changed my mind", "a")
        with pytest.raises(KeyError, match="body"):
            async with barrier.phase("b"):
                raise KeyError("body")
        assert (await barrier.execute_barrier()).sequence == 2


@pytest.mark.usefixtures("world_of_one")
async def test_calls_of_several_tasks_take_turns() -> None:
    """Calls run one at a time in call order; when one ends early, those behind it fail at once."""
    order: list[str] = []

    async def publish(_: Mapping[int, bytes]) -> None:
        order.append("publish begins")
        await anyio.sleep(0.05)
        order.append("publish ends")

    async with DistBarrier() as barrier, Tasks() as tasks:

        async def cross(name: str) -> int:
            sequence = (await barrier.execute_barrier(name)).sequence
            order.append(name)
            return sequence

        first = tasks.start(lambda: barrier.commit(publish))
        await anyio.wait_all_tasks_blocked()
        second = tasks.start(lambda: cross("second"))
        await anyio.wait_all_tasks_blocked()
        third = tasks.start(lambda: cross("third"))
        await first.returned()
        assert (await second.returned(), await third.returned()) == (1, 2)
        # Whose task then runs first is the event loop's to say.
        assert order[:2] == ["publish begins", "publish ends"]

        hangs = tasks.start(lambda: barrier.commit(lambda _: anyio.sleep_forever()))
        await anyio.wait_all_tasks_blocked()
        late = tasks.start(lambda: barrier.execute_barrier("late", timeout_secs=0.1))
        await anyio.wait_all_tasks_blocked()
        queued = tasks.start(lambda: barrier.execute_barrier("queued", timeout_secs=None))
        # One that gave up in the queue has entered nothing, and used up its turn for all that.
        error = await late.raised(BarrierTimeoutError)
        assert not error.in_doubt
        told = await queued.raised(BrokenBarrierError)
        assert "timed out after 0.1 s" in told.reason
        assert "StoreBarrier" in told.reason
        hangs.scope.cancel()
        await hangs.ended.wait()


@pytest.mark.usefixtures("world_of_one")
async def test_closing_stops_a_leader_and_those_behind_it() -> None:
    """The one under way and the one in the queue are told that the barrier was closed."""
    async with Tasks() as tasks:
        barrier = DistBarrier()
        publishes = anyio.Event()

        async def publish(_: Mapping[int, bytes]) -> None:
            publishes.set()
            await anyio.sleep_forever()

        first = tasks.start(lambda: barrier.commit(publish))
        await publishes.wait()
        queued = tasks.start(barrier.execute_barrier)
        await anyio.wait_all_tasks_blocked()
        await barrier.aclose()
        for call in (first, queued):
            assert not (await call.raised(BarrierClosedError)).in_doubt


@pytest.mark.usefixtures("world_of_one")
async def test_a_verdict_is_not_lost_to_a_deadline_of_the_same_instant() -> None:
    """An event loop that wakes up late finds both, and the verdict was first (law 2)."""
    async with DistBarrier() as barrier, Tasks() as tasks:
        await barrier.execute_barrier()
        goes_on = threading.Event()
        barrier._calls.group.submit(lambda: goes_on.wait(10))
        call = tasks.start(lambda: barrier.execute_barrier(timeout_secs=0.5))
        await anyio.wait_all_tasks_blocked()
        # The collective ends, and then the deadline passes, while the loop does not run.
        goes_on.set()
        time.sleep(0.6)
        assert (await call.returned()).sequence == 1


@pytest.mark.usefixtures("world_of_one")
def test_a_barrier_may_move_to_another_event_loop() -> None:
    """One after another, in any thread, of either kind."""
    barrier = DistBarrier()
    found = [anyio.run(barrier.execute_barrier)]

    def elsewhere() -> None:
        found.append(anyio.run(barrier.execute_barrier, backend="trio"))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10)
    anyio.run(barrier.aclose)
    assert [result.sequence for result in found] == [0, 1]


def test_thousands_of_calls_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 2,000 calls there are as many keys and threads as after 100 (law 10)."""
    monkeypatch.setattr(_attendance, "_LOG_NOTES", 20)
    store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found: list[tuple[int, int]] = []

    async def cross() -> None:
        async with DistBarrier() as barrier:
            for calls in range(1, 2001):
                await barrier.execute_barrier("" if calls % 2 else f"unique {calls}")
                if calls in (100, 2000):
                    # What it notes in another thread is noted then.
                    await outcome(barrier._calls._attendance.missing(calls))
                    found.append((store.num_keys(), threading.active_count()))

    with default_group(store):
        before = sorted(store.list_keys())
        anyio.run(cross)
        # A thread that starts others may have been there at first.
        (few, threads), (many, threads_after) = found
        assert few == many
        assert threads_after <= threads
        assert sorted(store.list_keys()) == before


@pytest.mark.usefixtures("world_of_one")
async def test_barriers_are_numbered_as_they_are_built() -> None:
    """And again from 0 for a new default group, also those that were built before it."""
    early = [Meeting(None), Meeting(None)]
    assert [meeting.root for meeting in early] == [
        "async_barriers/dist/0/",
        "async_barriers/dist/1/",
    ]
    dist.destroy_process_group()
    with pytest.raises(BarrierConnectionError, match="init_process_group"):
        early[1].convene()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    early[1].convene()
    early[1].convene()
    assert early[1].root == "async_barriers/dist/0/"


@pytest.mark.usefixtures("world_of_one")
async def test_a_group_that_torch_does_not_know_works_without_names() -> None:
    """Such a group has no store, so a timeout says that it cannot tell who is missing."""
    group: Any = dist.ProcessGroup(0, 1)  # type: ignore[call-arg]
    gloo = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=60))
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    with pytest.raises(ValueError, match="has no store"):
        StoreBarrier.from_process_group(group)
    async with DistBarrier(group) as barrier:
        assert (await barrier.execute_barrier()).last_rank == 0
        goes_on = threading.Event()
        barrier._calls.group.submit(lambda: goes_on.wait(10))
        with pytest.raises(BarrierTimeoutError, match=r"cannot be told \(the process group has"):
            await barrier.execute_barrier(timeout_secs=0.1)
        goes_on.set()


def start(start_job: StartJob, size: int = 3, **options: Any) -> Job:
    """Ranks with a default group, each with one barrier that is not connected."""
    given = {"timeout_secs": 20.0, **options.pop("given", {})}
    options = {"default_group": "foreign", **options}
    job = start_job(size, own_store=False, lanes=0, **options)
    everywhere(job, "build", **given)
    return job


def everywhere(job: Job, do: str, **arguments: Any) -> list[dict[str, Any]]:
    """Have all ranks do it; what came of it."""
    return [call.released() for call in job.starts(range(job.size), do, **arguments)]


def errors_of(calls: Sequence[Call], kind: str) -> list[dict[str, Any]]:
    return [call.error(kind) for call in calls]


def noted(job: Job, call: int, *ranks: int, barrier: int = 0) -> None:
    """Wait until ``ranks`` have entered ``call``, counted from 1; 0 is connecting."""
    store, key = job.store, f"0//async_barriers/dist/{barrier}/log/0"
    lines = {b"%d %d" % (call, rank) for rank in ranks}
    until(lambda: store.check([key]) and lines <= set(store.get(key).splitlines()))


def quiet_exit(job: Job, *ranks: int) -> None:
    """Have ``ranks`` end: within 2 s, with 0, and nothing printed."""
    for number in ranks:
        job.ranks[number].start("end")
    by = time.monotonic() + EXIT_SECS
    for number in ranks:
        assert job.ranks[number].exit(by) == 0, job.ranks[number].stderr
        assert not job.ranks[number].stderr, job.ranks[number].stderr


@pytest.mark.processes
def test_three_ranks_stay_in_step(start_job: StartJob) -> None:
    """Crossings, commits and what goes wrong in them reach every rank, and all go on."""
    job = start(start_job)
    pulses = job.starts(range(3), "feel_pulse", secs=1.0)
    everywhere(job, "connect")
    for last in (2, 0):
        waiting = job.starts({0, 1, 2} - {last})
        noted(job, 1 if last else 2, *({0, 1, 2} - {last}))
        answers = [call.released() for call in [*waiting, job.ranks[last].start("cross")]]
        assert {answer["last_rank"] for answer in answers} == {last}

    # Whose thread comes last to a call that waits for its turn says nothing.
    for number, last in ((3, 0), (5, 1), (7, 2)):
        others = {0, 1, 2} - {last}
        queued = [call for rank in others for call in job.starts([rank, rank])]
        noted(job, number, *others)
        # What they are asked later, they do later.
        for call in job.starts(others, "facts"):
            call.released()
        queued += job.starts([last, last])
        assert {call.released()["last_rank"] for call in queued} == {last}

    def each(*calls: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Each rank makes a call of its own; what came of them."""
        started = [job.ranks[rank].start(do, **given) for rank, (do, given) in enumerate(calls)]
        return [call.answer() for call in started]

    def commits(publish: str, leader: int) -> list[tuple[str, dict[str, Any]]]:
        return [
            ("commit", {"publish": publish, "payload": payload, "leader": leader})
            for payload in ("", "one", "the longest of them")
        ]

    for answer in each(*commits("ok", 1)):
        assert answer["value"] == ",one,the longest of them"
    told = each(*commits("fail", 2))
    assert told[2]["error"] == "OSError"
    for error in told[:2]:
        assert error["rank"] == 2
        assert error["reason"] == "publish failed: it raised OSError: disk full"
    # A rank whose part failed calls no commit, and the others hear of it all the same.
    for do, reason in (("abort", "no space"), ("fail", "it raised OSError: disk full")):
        commit = commits("ok", 0)[0]
        given = {"reason": reason} if do == "abort" else {}
        told = each(commit, (do, given), ("cross", {}))
        assert told[1].get("error") == (None if do == "abort" else "OSError")
        assert [(told[rank]["rank"], told[rank]["reason"]) for rank in (0, 2)] == [(1, reason)] * 2
    for calls, named in (
        ([("cross", {}), *commits("ok", 1)[1:]], "execute_barrier() and commit(leader=1)"),
        ([commits("ok", rank)[0] for rank in range(3)], "commit(leader=0) and commit(leader=2)"),
    ):
        for error in each(*calls):
            assert (error["rank"], error["in_doubt"]) == (None, False)
            assert error["reason"] == f"the ranks made different calls, among them {named}"
    # One that failed long before the others came is not out of step either.
    job.ranks[1].start("fail").error("OSError")
    for call in job.starts((0, 2)):
        assert call.error("BrokenBarrierError")["rank"] == 1
    assert {answer["sequence"] for answer in everywhere(job, "cross")} == {15}
    assert all(pulse.released()["longest"] < PULSE_SECS for pulse in pulses)
    # A barrier over the default group's store is told it, whatever the backend.
    everywhere(job, "cross_its_store")
    for facts in everywhere(job, "facts"):
        # The default group's own, and what it was given, are as they were.
        assert (facts["touched"], facts["groups"], facts["cuda"]) == ([], 1, False)
        assert facts["timeout"] == STORE_TIMEOUT_SECS
    everywhere(job, "close")
    assert not [key for key in job.store.list_keys() if "async_barriers/dist" in key]
    quiet_exit(job, 0, 2)
    # This one has logged that it aborted.
    job.ranks[1].start("end")
    assert job.ranks[1].exit(time.monotonic() + EXIT_SECS) == 0


@pytest.mark.processes
def test_a_deadline_names_who_is_missing_and_is_the_end(start_job: StartJob) -> None:
    """On every rank; later calls fail at once and name what to use; the late rank is released."""
    job = start(start_job)
    everywhere(job, "cross")
    waiting = job.starts((0, 1), name="lonely", timeout_secs=DEADLINE_SECS)
    noted(job, 2, 0, 1)
    queued = job.ranks[1].start("cross", name="queued", timeout_secs=DEADLINE_SECS / 2)
    error = queued.error("BarrierTimeoutError")
    assert (error["missing_ranks"], error["in_doubt"]) == ([2], False)
    assert error["text"].endswith("a call before it still waited for rank 2")
    for error in errors_of(waiting, "BarrierTimeoutError"):
        assert (error["missing_ranks"], error["in_doubt"], error["sequence"]) == ([2], True, 1)
        assert error["timeout_secs"] == DEADLINE_SECS
        assert "rank 2 had not entered" in error["text"]
        assert error["ended"] - error["began"] < DEADLINE_SECS + GRACE_SECS
    for do in ("cross", "connect", "fail"):
        for call in job.starts((0, 1), do):
            error = call.answer()
            assert error["error"] == ("OSError" if do == "fail" else "BrokenBarrierError")
            assert error["ended"] - error["began"] < 0.2
            assert do == "fail" or "use a StoreBarrier" in error["text"]
    # A collective cannot be called back, which is why the two are in doubt.
    job.ranks[2].do("cross")
    # Then nobody comes any more; and not before its own deadline does the rank know.
    error = job.ranks[2].start("cross", timeout_secs=DEADLINE_SECS).error("BarrierTimeoutError")
    assert error["missing_ranks"] == [0, 1]
    quiet_exit(job, 0, 1, 2)


@pytest.mark.processes
def test_connecting_alone_is_bounded_and_named(start_job: StartJob) -> None:
    """Whoever waits for a group that does not come about is told who did not connect."""
    job = start(start_job, given={"timeout_secs": DEADLINE_SECS})
    everywhere(job, "build", barrier="second", timeout_secs=DEADLINE_SECS)
    connecting = job.starts((0, 2), "connect")
    # The threads of these go on waiting for rank 1; but one that crosses has entered.
    held = job.starts((0, 2), "connect", barrier="second", scope="held")
    noted(job, 0, 0, 2, barrier=1)
    for call in [*job.starts((0, 2), "cancel", scope="held"), *held]:
        call.released()
    crossing = job.starts((0,), "cross", barrier="second")
    for error in errors_of(connecting, "BarrierConnectionError"):
        assert error["text"].endswith("rank 1 had not connected a DistBarrier")
        assert error["ended"] - error["began"] < DEADLINE_SECS + GRACE_SECS
    for error in errors_of(crossing, "BarrierTimeoutError"):
        # It could not have been released, whoever came.
        assert (error["missing_ranks"], error["in_doubt"]) == ([1, 2], False)
    # Closing waits for peers no longer than that.
    assert job.ranks[2].do("close", barrier="second")["secs"] < UNDO_SECS
    quiet_exit(job, 0, 1, 2)


@pytest.mark.processes
def test_cancelling_ends_the_wait_but_not_the_process(start_job: StartJob) -> None:
    """While connecting it is harmless; in a queue or a collective it is the end; see law 8."""
    job = start(start_job)

    def cancel(calls: Sequence[Call], scope: str) -> None:
        for rank in (0, 1):
            job.ranks[rank].do("cancel", scope=scope)
        now = time.monotonic()
        assert all(call.released().get("cancelled") for call in calls)
        assert all(call.released()["ended"] < now + GRACE_SECS for call in calls)

    connecting = job.starts((0, 1), "connect", scope="connecting")
    noted(job, 0, 0, 1)
    cancel(connecting, "connecting")
    everywhere(job, "connect")
    inside = job.starts((0, 1), scope="inside")
    noted(job, 1, 0, 1)
    queued = list(job.starts((0, 1), name="queued", scope="queued"))
    for rank in (0, 1):
        # What they did before this is answered has begun before.
        job.ranks[rank].do("facts")
    behind = job.starts((0, 1), name="behind")
    for rank in (0, 1):
        job.ranks[rank].do("facts")
    cancel(queued, "queued")
    for error in errors_of(behind, "BrokenBarrierError"):
        assert "its task was cancelled" in error["reason"]
    # Those ahead of the one that was cancelled are none the worse.
    job.ranks[2].do("cross")
    assert all(call.released()["last_rank"] == 2 for call in inside)
    everywhere(job, "build", barrier="second")
    everywhere(job, "cross", barrier="second")
    inside = job.starts((0, 1), barrier="second", scope="in the second")
    noted(job, 2, 0, 1, barrier=1)
    cancel(inside, "in the second")
    job.ranks[2].stop()
    quiet_exit(job, 0, 1)


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_peer_that_is_lost_inside_is_survived(start_job: StartJob, number: Any) -> None:
    """A dead one is noticed, a stopped one runs into the deadline; both leave the others whole."""
    job = start(start_job)
    everywhere(job, "cross")
    inside = job.starts((0, 2), timeout_secs=2.0 if number == signal.SIGSTOP else None)
    noted(job, 2, 0, 2)
    if number == signal.SIGKILL:
        job.ranks[2].signal(number)
        job.ranks[2].exit(time.monotonic() + EXIT_SECS)
    else:
        job.ranks[2].stop()
    late = job.ranks[1].start("cross", timeout_secs=1.5)
    for call in (inside[0], late):
        error = call.answer()
        assert error["in_doubt"]
        if number == signal.SIGKILL:
            assert error["error"] == "BarrierConnectionError"
            assert "see whether a peer died" in error["text"]
        else:
            assert (error["error"], error["missing_ranks"]) == ("BarrierTimeoutError", [])
            assert "every rank had entered, so look for one that is stopped" in error["text"]
    quiet_exit(job, 0, 1)


@pytest.mark.processes
def test_exits_with_calls_under_way_are_prompt(start_job: StartJob) -> None:
    """A barrier that was never closed is left behind at exit, stuck or connecting."""
    job = start(start_job)
    everywhere(job, "build", barrier="second")
    everywhere(job, "connect")
    inside = job.starts((0, 1))
    noted(job, 1, 0, 1)
    job.starts((0, 1), "connect", barrier="second")
    noted(job, 0, 0, 1, barrier=1)
    assert not any(call.answered for call in inside)
    for rank in (0, 1):
        job.ranks[rank].start("here_exit")
    by = time.monotonic() + EXIT_SECS
    for rank in (0, 1):
        assert job.ranks[rank].exit(by) == 3, job.ranks[rank].stderr
        assert not any(crash in job.ranks[rank].stderr for crash in CRASHES)


@pytest.mark.processes
def test_a_store_that_is_lost_costs_the_names_only(start_job: StartJob) -> None:
    """Crossings go on without the store; a timeout says that it cannot tell who is missing."""
    job = start(start_job, given={"timeout_secs": DEADLINE_SECS})
    everywhere(job, "connect")
    everywhere(job, "cross")
    job.lose_store()
    everywhere(job, "cross")
    for error in errors_of(job.starts((0, 1)), "BarrierTimeoutError"):
        assert (error["missing_ranks"], error["in_doubt"]) == ([], True)
        assert "who is missing cannot be told" in error["text"]
        assert error["ended"] - error["began"] < DEADLINE_SECS + GRACE_SECS
    for rank in job.ranks:
        rank.start("end")
    by = time.monotonic() + EXIT_SECS
    for rank in job.ranks:
        assert rank.exit(by) == 0, rank.stderr
        assert not any(crash in rank.stderr for crash in CRASHES), rank.stderr


@pytest.mark.processes
def test_several_barriers_beside_the_training(start_job: StartJob) -> None:
    """Connected in any order, on all ranks or some, they disturb neither each other nor it."""
    job = start(start_job, default_group="gloo")
    training = job.starts(range(3), "train", steps=100)
    everywhere(job, "build", barrier="second")
    # The ranks take them in different orders, and meet in the same.
    first, second = ("", "second"), ("second", "")
    calls = [
        call
        for rank, order in enumerate((first, second, first))
        for barrier in order
        for call in [job.ranks[rank].start("cross", barrier=barrier, name=barrier or "first")]
    ]
    assert [call.released()["name"] for call in calls].count("second") == 3
    assert {call.released()["sequence"] for call in calls} == {0}
    assert all(call.released() for call in training)
    for call in job.starts(range(3), "build", barrier="some", members=[0, 2]):
        answer = call.answer()
        # To a rank that is not in it, torch gives no group but a mark.
        assert ("error" in answer) == (call.rank.number == 1)
    assert {call.released()["last_rank"] for call in job.starts((0, 2), barrier="some")} <= {0, 1}
    alone = job.ranks[0].start("cross", barrier="some", timeout_secs=DEADLINE_SECS)
    # Its ranks are counted in the group.
    assert alone.error("BarrierTimeoutError")["missing_ranks"] == [1]
    quiet_exit(job, 0, 1, 2)


@pytest.mark.usefixtures("world_of_one")
def test_notes_do_not_pile_up() -> None:
    """Neither in the store nor before it; and who could not note a thing names nobody."""
    store: Any = dist.distributed_c10d._get_default_store()
    attendance = Attendance(Meeting(None))

    def ours() -> list[str]:
        return [key.partition("0/")[2] for key in store.list_keys() if "async_barriers" in key]

    attendance.enter(1)
    assert attendance.missing(1).result(5) == ()
    goes_on = threading.Event()
    attendance._lane.submit(lambda _: goes_on.wait(10))
    for call in range(1, 3001):
        attendance.enter(call)
    assert attendance._lane._worker._queue.qsize() <= 2
    goes_on.set()
    assert attendance.missing(3000).result(5) == ()
    # All ranks have long entered the calls of the oldest.
    assert ours() == ["log/2"]
    assert store.get("async_barriers/dist/0/log/2") == b"3000 0\n"
    with pytest.raises(BarrierConnectionError, match="this rank's own arrival"):
        attendance.missing(3001).result(5)
    attendance.retire()
    attendance.ended.result(5)
    assert not ours()


@pytest.mark.usefixtures("world_of_one")
def test_a_group_that_was_let_go_takes_no_call() -> None:
    """What comes too late is refused, not queued for ever."""
    group = Collectives(Meeting(None), None)
    group.give_up()
    with pytest.raises(BarrierConnectionError, match="given up"):
        group.submit(group.connect).result(5)
    group.retire()
    with pytest.raises(BarrierConnectionError, match="let go"):
        group.submit(group.connect).result(5)
