"""DistBarrier: a world of one in this process, worlds of three in processes of their own.

The processes' default group is of a backend that fails whoever touches it; see dist_rank.py.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch
import torch.distributed as dist
from fork_server import python
from hypothesis import given
from hypothesis import strategies as st
from processes import CRASHES, EXIT_SECS, GRACE_SECS, Call, Job, StartJob, until
from rank_process import STORE_TIMEOUT_SECS
from stores import MemoryStore, keys_of
from worlds import Tasks, library_threads_gone

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    DistBarrier,
    StoreBarrier,
)
from async_barriers._dist import arrivals, publication
from async_barriers._dist.arrivals import AGAIN_SECS, ArrivalLog
from async_barriers._dist.calls import UNDO_SECS
from async_barriers._dist.collectives import Collectives
from async_barriers._dist.departures import Gone, decode
from async_barriers._dist.fingerprint import COMMIT, Operation, pack, unpack
from async_barriers._dist.group import Group
from async_barriers._dist.publication import Publication
from async_barriers._errors import in_one_line
from async_barriers._store.loops import loop_here
from async_barriers._store.waiting import told

pytestmark = pytest.mark.anyio

# Law 7; twice that where three processes share two processors with other tests.
PULSE_SECS = 0.1
DEADLINE_SECS = 0.5
# When a rank that waits for one that has gone is told so, at the latest.
TOLD_SECS = 3.0
# Before it looks again.
AT_ONCE_SECS = 0.9


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
        with pytest.raises(BrokenBarrierError, match="publish's result must be bytes") as caught:
            await barrier.commit(publish)
        assert (caught.value.rank, caught.value.in_doubt) == (0, True)
        with pytest.raises(ValueError, match="rank 3 is outside the world"):
            await barrier.commit(publish, leader=3)


@pytest.mark.usefixtures("world_of_one")
async def test_a_step_is_the_sequence_and_is_decided_once() -> None:
    """On every call; one that is not later than the last is told so, and enters nothing."""
    async with DistBarrier(timeout_secs=10) as barrier:
        assert (await barrier.execute_barrier("a", step=7)).sequence == 7
        for step, which in ((7, "this step"), (3, "step 7, a later one,")):
            with pytest.raises(BrokenBarrierError, match=f"had come for {which} already") as caught:
                await barrier.execute_barrier("a", step=step)
            assert (caught.value.sequence, caught.value.in_doubt) == (step, False)
            assert not await barrier.abort("too late", "a", step=step)
        # Names are apart, and calls without a step are counted on.
        assert (await barrier.execute_barrier("b", step=3)).sequence == 3
        assert (await barrier.execute_barrier("a")).sequence == 2
        assert await barrier.all_gather(b"one", name="a", step=8) == (b"one",)
        assert await barrier.commit(lambda _: b"x", name="a", step=1 << 62) == b"x"
        assert await barrier.abort("no space", "b", step=4)
        with pytest.raises(KeyError, match="body"):
            async with barrier.phase("b", step=5):
                raise KeyError("body")
        with pytest.raises(BrokenBarrierError, match="had come for this step already"):
            async with barrier.phase("b", step=5):
                pass
        async with barrier.phase("b", step=6):
            pass
        with pytest.raises(ValueError, match="step is -1"):
            barrier.phase("b", step=-1)
        with pytest.raises(TypeError, match="reason must be a string"):
            await barrier.abort(3)  # type: ignore[arg-type]
        assert (await barrier.execute_barrier()).sequence == 8


@pytest.mark.usefixtures("world_of_one")
async def test_no_time_at_all_is_enough_where_all_are_in() -> None:
    """``timeout_secs=0`` is what is decided now."""
    async with DistBarrier() as barrier:
        assert (await barrier.execute_barrier(timeout_secs=0)).sequence == 0
        assert await barrier.all_gather(b"x", timeout_secs=0) == (b"x",)
        # Its thread needs a moment to begin.
        barrier._calls.collectives.submit(lambda: time.sleep(0.05))
        assert (await barrier.execute_barrier(timeout_secs=0)).sequence == 2
        with pytest.raises(ValueError, match="timeout_secs is -1"):
            await barrier.execute_barrier(timeout_secs=-1)


@pytest.mark.usefixtures("world_of_one")
async def test_no_rank_can_be_asked_for_progress() -> None:
    """What a call cannot heed is refused before anything is entered; that there is none is true."""

    def publish(payloads: Mapping[int, bytes]) -> None: ...

    async with DistBarrier() as barrier:
        calls: list[Any] = [
            barrier.execute_barrier,
            barrier.phase,
            partial(barrier.commit, publish),
            partial(barrier.committing, publish),
            partial(barrier.all_gather, b""),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="cannot ask its peers for progress"):
                await call(stalled_after_secs=5)
        assert (await barrier.execute_barrier(stalled_after_secs=None)).sequence == 0


@pytest.mark.usefixtures("world_of_one")
async def test_publish_is_checked_before_anything_is_entered() -> None:
    """What cannot be called is refused; a plain function runs in a thread, and may raise."""
    threads: list[threading.Thread] = []

    def publish(payloads: Mapping[int, bytes]) -> bytes:
        threads.append(threading.current_thread())
        return payloads[0] * 2

    def fail(_: Mapping[int, bytes]) -> bytes:
        raise OSError("disk full")

    async with DistBarrier() as barrier:
        with pytest.raises(TypeError, match="publish must be a function"):
            await barrier.commit(b"no function")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="payload must be bytes"):
            await barrier.commit(publish, payload=3)  # type: ignore[arg-type]
        assert await barrier.commit(publish, payload=b"ab") == b"abab"
        assert threads[0] is not threading.current_thread()
        with pytest.raises(OSError, match="disk full"):
            await barrier.commit(partial(fail))
        # How large it is depends on a rank's data: its peers are told, in the next call.
        with pytest.raises(ValueError, match="payload has 5242880 bytes"):
            await barrier.commit(publish, payload=bytes(5 << 20))
        assert (await barrier.execute_barrier()).sequence == 3


@pytest.mark.usefixtures("world_of_one")
async def test_a_thread_that_publishes_outlives_its_deadline_in_doubt() -> None:
    """It cannot be stopped, and may publish yet."""
    goes_on = threading.Event()
    async with DistBarrier() as barrier:
        with pytest.raises(BarrierTimeoutError, match="still publishing") as caught:
            await barrier.commit(lambda _: b"" * goes_on.wait(10), timeout_secs=0.1)
        assert caught.value.in_doubt
        goes_on.set()


@pytest.mark.usefixtures("world_of_one")
async def test_no_thread_for_publish_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, nothing is published, and the barrier goes on to work."""
    async with DistBarrier() as barrier:
        await barrier.execute_barrier()

        def start(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(BarrierError, match="none can be started"):
                await barrier.commit(lambda _: b"")
        await barrier.execute_barrier()


@pytest.mark.usefixtures("world_of_one")
async def test_two_commits_at_once_are_both_stopped_by_closing() -> None:
    """The one that publishes and the one that waits for its turn."""
    async with Tasks() as tasks:
        barrier = DistBarrier()

        async def publish(_: Mapping[int, bytes]) -> None:
            await anyio.sleep_forever()

        calls = []
        for _ in range(2):
            calls.append(tasks.start(lambda: barrier.commit(publish)))
            await anyio.wait_all_tasks_blocked()
        await barrier.aclose()
        for call in calls:
            assert not (await call.raised(BarrierClosedError)).in_doubt


@pytest.mark.usefixtures("world_of_one")
async def test_a_barrier_that_is_dropped_leaves_no_thread() -> None:
    """Nobody has to close one that nobody has; its keys go, too."""
    barrier = DistBarrier()
    await barrier.execute_barrier()
    DistBarrier()
    del barrier
    gc.collect()
    await library_threads_gone()
    store: Any = dist.distributed_c10d._get_default_store()
    assert not [key for key in keys_of(store) if "async_barriers" in key]


@pytest.mark.usefixtures("world_of_one")
def test_closing_is_not_undone_by_cancelling_it_twice() -> None:
    """asyncio's own cancel() goes through shields; what was begun goes on (law 3)."""

    async def close() -> None:
        barrier = DistBarrier()
        await barrier.execute_barrier()
        goes_on = threading.Event()
        barrier._calls.collectives.submit(lambda: goes_on.wait(10))
        closing = asyncio.create_task(barrier.aclose())
        for _ in range(2):
            await asyncio.sleep(0.05)
            assert not closing.done()
            closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        goes_on.set()
        assert await told(loop_here(None), barrier._calls.log.ended, time.monotonic() + 5)

    asyncio.run(close())
    store: Any = dist.distributed_c10d._get_default_store()
    assert not [key for key in keys_of(store) if "async_barriers" in key]


@pytest.mark.usefixtures("world_of_one")
async def test_a_leaders_word_is_not_lost_to_an_exception_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal handler's, say; peers would wait for it for ever, and so would the next call."""

    def struck(*_: Any) -> Any:
        raise KeyboardInterrupt

    async with DistBarrier(timeout_secs=5) as barrier:
        with monkeypatch.context() as patch:
            patch.setattr(publication, "Publishing", struck)
            with pytest.raises(KeyboardInterrupt):
                await barrier.commit(lambda _: b"")
        await barrier.execute_barrier()


@pytest.mark.usefixtures("world_of_one")
async def test_nothing_is_published_once_it_is_closed() -> None:
    """Also where all came in in that very moment."""
    published: list[Mapping[int, bytes]] = []
    async with DistBarrier(timeout_secs=5) as barrier:
        commit = Publication(barrier._calls, "x", None, 5.0)
        commit.stop()
        with pytest.raises(BarrierClosedError, match="barrier 'x' #0 is closed") as caught:
            await commit.run(published.append, b"")
        assert not caught.value.in_doubt
        assert not published
        await barrier.execute_barrier()


@pytest.mark.parametrize("as_it", ["connects", "leaves"])
async def test_a_store_that_is_silent_holds_up_nobody(as_it: str) -> None:
    """c10d would wait for it without end, in a thread that nothing could end."""
    program = (
        "import os, signal; from torch.distributed import TCPStore; "
        "store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False); "
        "print(store.port, os.getpid(), flush=True); signal.pause()"
    )
    server = subprocess.Popen([python(), "-c", program], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        port, pid = map(int, (await anyio.to_thread.run_sync(server.stdout.readline)).split())
        with default_group(dist.TCPStore("127.0.0.1", port, wait_for_workers=False)):
            barrier = DistBarrier(timeout_secs=0.2 if as_it == "connects" else 20.0)
            if as_it == "leaves":
                await barrier.execute_barrier()
            os.kill(pid, signal.SIGSTOP)
            if as_it == "connects":
                with pytest.raises(BarrierConnectionError, match="store does not answer"):
                    await barrier.connect()
            await barrier.aclose()
            await library_threads_gone()
    finally:
        server.kill()
        server.communicate()


@pytest.mark.usefixtures("world_of_one")
async def test_a_body_left_by_its_generator_uses_up_its_turn() -> None:
    """Nothing can be awaited there; the break goes on by itself."""
    async with DistBarrier() as barrier:

        async def shards() -> AsyncIterator[int]:
            async with barrier.phase("x", step=4):
                yield 1

        generator = shards()
        assert await generator.__anext__() == 1
        await generator.aclose()  # type: ignore[attr-defined]
        with pytest.raises(BrokenBarrierError, match="had come for this step already"):
            await barrier.execute_barrier("x", step=4)
        assert (await barrier.execute_barrier()).sequence == 1


@pytest.mark.usefixtures("world_of_one")
async def test_an_exception_while_a_call_is_handed_over_is_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal handler's, say: nobody knows whether the ranks still count alike."""
    async with DistBarrier() as barrier:

        def submit(*_: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(barrier._calls.collectives, "submit", submit)
            with pytest.raises(KeyboardInterrupt):
                await barrier.execute_barrier()
        with pytest.raises(BrokenBarrierError, match="ended early"):
            await barrier.execute_barrier()


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
        with pytest.raises(BrokenBarrierError, match="can no longer be used"):
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
        barrier._calls.collectives.submit(lambda: goes_on.wait(10))
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
    monkeypatch.setattr(arrivals, "_LOG_NOTES", 20)
    store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found: list[tuple[int, int]] = []

    async def cross() -> None:
        async with DistBarrier() as barrier:
            for calls in range(1, 2001):
                await barrier.execute_barrier("" if calls % 2 else f"unique {calls}")
                if calls in (100, 2000):
                    # What it notes in another thread is noted then.
                    await told(loop_here(None), barrier._calls.log.missing(calls))
                    found.append((store.num_keys(), threading.active_count()))

    with default_group(store):
        before = sorted(keys_of(store))
        anyio.run(cross)
        # A thread that starts others may have been there at first.
        (few, threads), (many, threads_after) = found
        assert few == many
        assert threads_after <= threads
        assert sorted(keys_of(store)) == before


@pytest.mark.usefixtures("world_of_one")
async def test_barriers_are_numbered_as_they_are_built() -> None:
    """And again from 0 for a new default group, also those that were built before it."""
    early = [Group(None), Group(None)]
    assert [group.root for group in early] == [
        "async_barriers/dist/0/",
        "async_barriers/dist/1/",
    ]
    dist.destroy_process_group()
    with pytest.raises(BarrierConnectionError, match="init_process_group"):
        early[1].identify()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    early[1].identify()
    early[1].identify()
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
        barrier._calls.collectives.submit(lambda: goes_on.wait(10))
        with pytest.raises(BarrierTimeoutError, match=r"are unknown \(the process group has"):
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
    """Wait until ``ranks`` have entered ``call``, counted from 1, and who enters after them is told
    from them; 0 is connecting."""
    store, key = job.store, f"0//async_barriers/dist/{barrier}/log/0"
    lines = {b"%d %d" % (call, rank) for rank in ranks}
    until(lambda: store.check([key]) and lines <= set(store.get(key).splitlines()))
    # The clocks of arrivals tick once in a millisecond.
    time.sleep(0.001)


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
def test_a_leader_whose_deadline_passes_before_all_are_in(start_job: StartJob) -> None:
    """The late rank is told of that deadline, too: nothing was published, and nothing failed."""
    job = start(start_job)
    everywhere(job, "cross")
    given = {"publish": "ranks", "payload": "x", "leader": 0}
    leading = job.ranks[0].start("commit", **given, timeout_secs=DEADLINE_SECS)
    error = leading.error("BarrierTimeoutError")
    assert (error["missing_ranks"], error["in_doubt"]) == ([1, 2], False)
    for error in errors_of(job.starts((1, 2), "commit", **given), "BarrierTimeoutError"):
        assert (error["missing_ranks"], error["in_doubt"]) == ([1, 2], False)
        assert error["timeout_secs"] == DEADLINE_SECS
        assert "ranks 1, 2 had not entered" in error["text"]
    quiet_exit(job, 0, 1, 2)


@pytest.mark.processes
def test_connecting_alone_is_bounded_and_named(start_job: StartJob) -> None:
    """Whoever waits for a group that does not come about is told who did not connect."""
    job = start(start_job, given={"timeout_secs": DEADLINE_SECS})
    everywhere(job, "build", barrier="second", timeout_secs=None)
    connecting = job.starts((0, 2), "connect")
    # The threads of these go on waiting for rank 1; but one that crosses has entered.
    held = job.starts((0, 2), "connect", barrier="second", scope="held")
    noted(job, 0, 0, 2, barrier=1)
    for call in [*job.starts((0, 2), "cancel", scope="held"), *held]:
        call.released()
    crossing = job.starts((0,), "cross", barrier="second", timeout_secs=DEADLINE_SECS)
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
        assert "the missing ranks are unknown" in error["text"]
        assert error["ended"] - error["began"] < DEADLINE_SECS + GRACE_SECS
    # It is tried again once.
    assert job.ranks[2].do("close")["secs"] < AGAIN_SECS + 0.2
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
    told = job.starts((0,), barrier="some")
    job.ranks[2].start("fail", barrier="some").error("OSError")
    assert "by rank 1 (global rank 2): it raised" in told[0].error("BrokenBarrierError")["text"]
    alone = job.ranks[0].start("cross", barrier="some", timeout_secs=DEADLINE_SECS)
    # Its ranks are counted in the group.
    error = alone.error("BarrierTimeoutError")
    assert error["missing_ranks"] == [1]
    assert "rank 1 had not entered (global rank 2)" in error["text"]
    quiet_exit(job, 0, 1, 2)


@pytest.mark.processes
def test_steps_that_differ_are_told_to_all(start_job: StartJob) -> None:
    """Nobody is released, nothing is published, and all may come for the same step yet."""
    job = start(start_job)

    def each(do: str, *given: dict[str, Any]) -> list[dict[str, Any]]:
        calls = [job.ranks[rank].start(do, **given[rank]) for rank in range(3)]
        return [call.answer() for call in calls]

    far = 1 << 50
    for ours, theirs, named in (
        (2, 3, "execute_barrier(step=2) and execute_barrier(step=3)"),
        (None, 3, "execute_barrier() and execute_barrier(step=3)"),
        (3, far, "execute_barrier(step=3) and one of a far later step"),
        (far, far + 1, f"execute_barrier(step={far}) and execute_barrier(step={far + 1})"),
    ):
        steps = [{"name": "x", "step": step} for step in (ours, theirs, theirs)]
        for error in each("cross", *steps):
            assert (error["error"], error["rank"]) == ("BrokenBarrierError", None)
            assert not error["in_doubt"]
            assert error["reason"] == f"the ranks made different calls, among them {named}"
    assert {told["sequence"] for told in everywhere(job, "cross", name="x", step=2)} == {2}
    # Who aborts a step has decided it for all; who aborts no step has not.
    for aborted in (None, 10):
        step = aborted or 9
        waiting = job.starts((0, 2), name="z", step=step)
        assert job.ranks[1].do("abort", reason="no space", name="z", step=aborted)["broke"]
        errors_of(waiting, "BrokenBarrierError")
        for call in job.starts(range(3), name="z", step=step):
            answer = call.answer()
            assert answer["sequence"] == step
            assert ("error" in answer) == (aborted is not None)
    given = {"publish": "plain", "payload": "x", "name": "x"}
    for error in each("commit", *({**given, "step": step} for step in (4, 4, 3))):
        assert "commit(step=3, leader=0) and commit(step=4, leader=0)" in error["reason"]
    assert not job.ranks[0].has_said("publishing")
    assert {told["value"] for told in everywhere(job, "commit", **given, step=3)} == {"x,x,x"}
    assert job.ranks[0].event() == {"event": "publishing", "on_loop": False}
    assert {told["sequence"] for told in everywhere(job, "cross", name="y", step=far)} == {far}
    quiet_exit(job, 0, 2)


@pytest.mark.processes
def test_payloads_of_all_reach_all(start_job: StartJob) -> None:
    """In the order of the ranks; whoever fails in between breaks it for all."""
    job = start(start_job)
    payloads = ["", "one", "the longest of them"]

    def gathers(*ranks: int) -> list[Call]:
        return [job.ranks[rank].start("gather", payload=payloads[rank]) for rank in ranks]

    for call in gathers(0, 1, 2):
        assert call.released()["gathered"] == payloads
    told = [*gathers(0, 1), job.ranks[2].start("abort", reason="no space")]
    assert told[2].released()["broke"]
    assert [call.error("BrokenBarrierError")["reason"] for call in told[:2]] == ["no space"] * 2
    told = [*gathers(0, 1), job.ranks[2].start("cross")]
    for call in told:
        assert "execute_barrier() and all_gather()" in call.error("BrokenBarrierError")["reason"]
    # Of two that abort the same call, one broke it.
    told = [*gathers(0), *job.starts((1, 2), "abort", reason="both")]
    assert told[0].error("BrokenBarrierError")["rank"] in (1, 2)
    assert sorted(call.released()["broke"] for call in told[1:]) == [False, True]
    for call in gathers(0, 1, 2):
        assert call.released()["gathered"] == payloads


@pytest.mark.processes
def test_a_part_of_a_commit_that_fails_breaks_it(start_job: StartJob) -> None:
    """In a leader or another rank: all others are told, nothing is published, and all go on."""
    job = start(start_job)
    cases: list[tuple[str, str | None, str]] = [
        ("fail", "ExceptionGroup", "disk full"),
        ("cancel", None, "its task was cancelled"),
        ("throw", None, "GeneratorExit"),
        ("text", "TypeError", "it raised TypeError: payload must be bytes, not str"),
        ("large", "ValueError", "it raised ValueError: payload has 5242880 bytes"),
    ]
    for number, (body, error, reason) in enumerate(cases):
        culprit, step = number % 3, 2 * number
        others = {0, 1, 2} - {culprit}
        given = {"name": "x", "leader": 1, "step": step}
        waiting = job.starts(others, "committing", body="p", **given)
        noted(job, step + 1, *others)
        failed = job.ranks[culprit].start("committing", body=body, **given).answer()
        assert failed.get("error") == error, failed
        assert failed.get("cancelled", False) == (body == "cancel")
        for broken in errors_of(waiting, "BrokenBarrierError"):
            assert broken["rank"] == culprit
            assert reason in broken["reason"]
            assert not broken["in_doubt"]
        assert not job.ranks[1].has_said("publishing")
        # Who never sets a payload brings none.
        given["step"] = step + 1
        bodies = ["p", "none", "q"]
        calls = [job.ranks[r].start("committing", body=bodies[r], **given) for r in range(3)]
        assert {call.released()["result"] for call in calls} == {"p,,q"}
        assert job.ranks[1].event() == {"event": "publishing"}
    # Also long before the others come, who are told all the same; and it need not wait for them.
    began = time.monotonic()
    job.ranks[2].do("committing", body="cancel", name="y", leader=1)
    assert time.monotonic() - began < 1
    for broken in errors_of(
        job.starts((0, 1), "committing", body="p", name="y", leader=1), "BrokenBarrierError"
    ):
        assert (broken["rank"], broken["reason"]) == (2, "its task was cancelled")
    quiet_exit(job, 0, 1, 2)


@pytest.mark.processes
def test_a_leaders_deadline_is_a_deadline_for_all(start_job: StartJob) -> None:
    """All ranks get the same error, with the seconds that the leader had."""
    job = start(start_job)
    given = {"publish": "hang", "payload": "x", "leader": 1}
    calls = [job.ranks[rank].start("commit", **given) for rank in (0, 2)]
    calls.append(job.ranks[1].start("commit", **given, timeout_secs=0.5))
    for error in errors_of(calls, "BarrierTimeoutError"):
        assert (error["timeout_secs"], error["missing_ranks"]) == (0.5, [])
        assert "rank 1 was still publishing" in error["text"]
        assert not error["in_doubt"]


@pytest.mark.processes
def test_a_wrong_result_is_the_same_error_for_all(start_job: StartJob) -> None:
    """It may have published, so all are in doubt; and all go on."""
    job = start(start_job)
    calls = job.starts(range(3), "commit", publish="wrong", payload="x", leader=1)
    told = errors_of(calls, "BrokenBarrierError")
    assert len({error["text"] for error in told}) == 1
    assert "may have published, but publish's result must be bytes, not str" in told[0]["text"]
    assert {(error["rank"], error["in_doubt"]) for error in told} == {(1, True)}
    assert {answer["sequence"] for answer in everywhere(job, "cross")} == {1}
    quiet_exit(job, 0, 1, 2)


@pytest.mark.processes
@pytest.mark.parametrize("do", ["abort", "cross", "commit"])
def test_who_waits_for_those_that_left_is_told(start_job: StartJob, do: str) -> None:
    """After its peers gave up and closed it is told so, however long its own deadline."""
    job = start(start_job, given={"timeout_secs": None})
    everywhere(job, "cross")
    for error in errors_of(job.starts((0, 1), timeout_secs=DEADLINE_SECS), "BarrierTimeoutError"):
        assert error["missing_ranks"] == [2]
    for call in job.starts((0, 1), "close"):
        call.released()
    if do != "abort":
        # A collective cannot be called back: this was the call that they had entered.
        job.ranks[2].do("cross")
    arguments: dict[str, dict[str, Any]] = {
        "abort": {"reason": "late"},
        "cross": {},
        "commit": {"publish": "plain", "payload": "x", "leader": 2},
    }
    error = job.ranks[2].start(do, **arguments[do]).error("BrokenBarrierError", TOLD_SECS)
    assert error["rank"] in (0, 1)
    assert error["reason"] == "it closed its barrier"
    assert not error["in_doubt"]
    error = job.ranks[2].start("cross").error("BrokenBarrierError", 1.0)
    assert "can no longer be used: rank" in error["reason"]
    quiet_exit(job, 0, 1)


@pytest.mark.processes
def test_who_waits_for_one_that_gave_up_is_told(start_job: StartJob) -> None:
    """Also where that has not closed; and who left because its program failed, says so."""
    job = start(start_job, given={"timeout_secs": None})
    everywhere(job, "build", barrier="second", timeout_secs=None)
    for barrier in ("", "second"):
        everywhere(job, "cross", barrier=barrier)
    errors_of(job.starts((0, 1), timeout_secs=DEADLINE_SECS), "BarrierTimeoutError")
    assert job.ranks[2].start("cross").released()["sequence"] == 1
    error = job.ranks[2].start("cross").error("BrokenBarrierError", TOLD_SECS)
    assert error["rank"] in (0, 1)
    assert error["reason"].endswith(f"DistBarrier: a call timed out after {DEADLINE_SECS} s")
    waiting = job.starts((1, 2), barrier="second")
    job.ranks[0].do("leave", barrier="second")
    for call in waiting:
        error = call.error("BrokenBarrierError", TOLD_SECS)
        assert (error["rank"], error["in_doubt"]) == (0, False)
        assert error["reason"].endswith("it raised LookupError: no such shard")
    quiet_exit(job, 0, 1, 2)


@pytest.mark.processes
def test_who_connects_to_those_that_left_is_told(start_job: StartJob) -> None:
    """Whether they gave up before or after it began to."""
    job = start(start_job, given={"timeout_secs": None})
    connecting = job.starts((0, 1), "connect")
    noted(job, 0, 0, 1)
    job.ranks[0].do("close")
    late = job.ranks[2].start("connect")
    for call in (connecting[1], late):
        error = call.error("BrokenBarrierError", TOLD_SECS)
        assert (error["rank"], error["reason"]) == (0, "it closed its barrier")
    assert error["ended"] - error["began"] < AT_ONCE_SECS
    assert connecting[0].answer()["error"] in ("BarrierClosedError", "BarrierConnectionError")
    quiet_exit(job, 0, 1, 2)


@pytest.mark.processes
@pytest.mark.parametrize("does", ["cross", "abort", "connect", "close", "drop"])
def test_a_forked_child_reaches_nothing_of_its_parents(start_job: StartJob, does: str) -> None:
    """It is told at once, and the parent goes on, in a call under way, too (law 1)."""
    job = start(start_job)
    everywhere(job, "build", barrier="idle")
    for barrier in ("", "idle"):
        everywhere(job, "cross", barrier=barrier)
    waiting = job.starts((0, 1))
    noted(job, 2, 0, 1)
    said = job.ranks[0].do("fork", does=does)
    assert said["status"] == 0
    if does in ("close", "drop"):
        assert said["said"] == "no error"
    else:
        assert said["said"].startswith("BarrierError: this DistBarrier was built in process")
    assert not any(call.answered for call in waiting)
    job.ranks[2].do("cross")
    assert all(call.released()["last_rank"] == 2 for call in waiting)
    assert {answer["sequence"] for answer in everywhere(job, "cross")} == {2}
    everywhere(job, "cross", barrier="idle")
    everywhere(job, "close")
    assert not [key for key in job.store.list_keys() if "async_barriers/dist" in key]
    quiet_exit(job, 0, 1, 2)


@pytest.mark.usefixtures("world_of_one")
def test_notes_do_not_pile_up() -> None:
    """Neither in the store nor before it; and who could not note a thing names nobody."""
    store: Any = dist.distributed_c10d._get_default_store()
    log = ArrivalLog(Group(None))

    def ours() -> list[str]:
        return [key.partition("0/")[2] for key in keys_of(store) if "async_barriers" in key]

    log.enter(1)
    assert log.missing(1).result(5) == ()
    goes_on = threading.Event()
    log._submit(lambda _: goes_on.wait(10))
    for call in range(1, 3001):
        log.enter(call)
    assert log._worker._calls.qsize() <= 2
    goes_on.set()
    assert log.missing(3000).result(5) == ()
    # All ranks have long entered the calls of the oldest.
    assert ours() == ["log/2"]
    assert store.get("async_barriers/dist/0/log/2") == b"3000 0\n"
    with pytest.raises(BarrierConnectionError, match="this rank's own arrival"):
        log.missing(3001).result(5)
    log.retire()
    log.ended.result(5)
    assert not ours()


@pytest.mark.usefixtures("world_of_one")
def test_a_group_that_was_let_go_takes_no_call() -> None:
    """What comes too late is refused, not queued for ever."""
    log = ArrivalLog(Group(None))
    collectives = Collectives(Group(None), log, None)
    collectives.give_up()
    with pytest.raises(BarrierConnectionError, match="stopped"):
        collectives.submit(collectives.connect).result(5)
    collectives.retire(lambda: None, log.retire)
    with pytest.raises(BarrierConnectionError, match="was closed"):
        collectives.submit(collectives.connect).result(5)
    log.ended.result(5)


@pytest.mark.usefixtures("world_of_one")
def test_who_leaves_says_so_before_its_connections_close() -> None:
    """They are what the peers notice, and then they ask why."""
    log = ArrivalLog(Group(None))
    log.enter(0)
    collectives = Collectives(Group(None), log, None)
    collectives.submit(collectives.connect).result(5)
    backends: list[Any] = []

    def look() -> None:
        backends.append(collectives._backend._backend)

    def last() -> None:
        look()
        log.retire()

    collectives.retire(look, last)
    log.ended.result(5)
    assert [backend is None for backend in backends] == [False, True]


sizes = st.integers(1, 5000)
steps = st.none() | st.integers(0, 40) | st.integers(0, (1 << 63) - 1)


@given(sizes, st.data())
def test_what_ranks_say_of_their_calls_is_understood(size: int, data: st.DataObject) -> None:
    """Any calls of any world fit into what goes round, and differ there if they differ.

    But for steps that are too large for it, which are told apart afterwards.
    """
    ranks = st.integers(0, size - 1)
    operations = st.builds(Operation, st.integers(0, COMMIT + size - 1), steps)
    calls = data.draw(st.dictionaries(ranks, st.none() | operations, min_size=1, max_size=5))
    came = data.draw(st.permutations([1e9 + i for i in range(len(calls))]))
    said = [
        (rank, time, call, pack(call, time, rank, size))
        for (rank, call), time in zip(calls.items(), came, strict=True)
    ]
    assert all(-(1 << 63) <= number < 1 << 63 for *_, numbers in said for number in numbers)
    largest, smallest = (max(numbers[i] for *_, numbers in said) for i in (0, 1))
    found = unpack(largest, smallest, size)
    aborts = [(time, rank) for rank, time, call, _ in said if call is None]
    assert found.aborted == bool(aborts)
    if aborts:
        assert found.last == max(aborts)[1]
        return
    if found.highest is not None:
        made = [(time, rank) for rank, time, call, _ in said if call == found.highest]
        assert found.last == max(made)[1]
    if found.highest == found.lowest is not None:
        assert set(calls.values()) == {found.highest}
    if len(set(calls.values())) == 1:
        assert found.highest == found.lowest


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0), st.integers(0), st.text())))
def test_what_those_who_leave_note_is_understood(
    notes: list[tuple[int, int, int, str]],
) -> None:
    """Whatever their reasons are; the last word of each counts."""
    gone = [Gone(*note) for note in notes]
    found = decode(b"".join(note.encode() for note in gone))
    assert [note.rank for note in found] == list(dict.fromkeys(note.rank for note in gone))
    last = {note.rank: note for note in gone}
    for note in found:
        assert note[:3] == last[note.rank][:3]
        assert note.reason == in_one_line(last[note.rank].reason)
