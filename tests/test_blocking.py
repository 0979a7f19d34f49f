"""BlockingBarrier: threads that wait, are interrupted, and leave."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pickle
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, cast

import anyio
import pytest
import torch.distributed.checkpoint._experimental.barriers as torchs
from blocking_world import BOUND_SECS, LEFT, World, broken, entered, interrupted, threads
from processes import CRASHES, EXIT_SECS, GRACE_SECS, StartJob, until
from stores import MemoryStore
from torch.distributed import HashStore, TCPStore
from worlds import free_port

from async_barriers import (
    Barrier,
    BarrierClosedError,
    BarrierConfig,
    BarrierConnectionError,
    BarrierError,
    BarrierResult,
    BarrierTimeoutError,
    BrokenBarrierError,
    DistBarrier,
    StoreBarrier,
)
from async_barriers._portal import Portal
from async_barriers.blocking import BlockingBarrier

# As the interpreter ends it, or as a shell reports it.
INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)


@pytest.fixture
def start_world() -> Iterator[Callable[..., World]]:
    with ExitStack() as worlds:

        def start(size: int = 2, **options: Any) -> World:
            world = World(size, **options)
            worlds.callback(world.close)
            return world

        yield start


StartWorld = Callable[..., World]


def fail_after(call: Callable[[], object], error: Exception) -> None:
    call()
    raise error


def test_crossing_from_many_threads_at_once(start_world: StartWorld) -> None:
    """Each call enters a phase of its own, and every rank's are released, numbered from 0."""
    world = start_world(3)
    calls = [world.start(rank) for _ in range(5) for rank in range(3)]
    results = [call.result(BOUND_SECS) for call in calls]
    assert sorted(result.sequence for result in results) == sorted([*range(5)] * 3)
    assert world.cross() == {5}


def test_deadlines(start_world: StartWorld) -> None:
    """None is the configured one, a number is this call's own; who was missing is named."""
    world = start_world(2, timeout_secs=0.3)
    world.ranks[1].connect()
    for given, timeout in (((), 0.3), ((None,), 0.3), ((0.1,), 0.1), ((0,), 0)):
        began = time.monotonic()
        with pytest.raises(BarrierTimeoutError) as caught:
            world.ranks[0].execute_barrier(*given)
        assert timeout <= time.monotonic() - began < timeout + GRACE_SECS
        assert (caught.value.timeout_secs, caught.value.missing_ranks) == (timeout, (1,))
    with pytest.raises(ValueError, match="timeout_secs is -1"):
        world.ranks[0].execute_barrier(-1)


def test_who_makes_no_progress(start_world: StartWorld) -> None:
    """A call gives its own bound for that, or has the one configured."""
    world = start_world(2, timeout_secs=None, stalled_after_secs=0.6)
    world.ranks[1].connect()
    first = world.ranks[0]

    def publish(payloads: Mapping[int, bytes]) -> None: ...

    calls: list[Callable[..., object]] = [
        first.execute_barrier,
        functools.partial(first.commit, publish),
        functools.partial(first.all_gather, b""),
    ]
    for given, secs in (({}, 0.6), ({"stalled_after_secs": 0.2}, 0.2)):
        for call in calls:
            with pytest.raises(BarrierTimeoutError, match="no progress") as caught:
                call(**given)
            assert caught.value.timeout_secs == secs
    with pytest.raises(ValueError, match="stalled_after_secs is -1"):
        first.execute_barrier(stalled_after_secs=-1)


def test_what_became_of_it(start_world: StartWorld) -> None:
    """Statistics, also of a closed one, and the record of a commit; a barrier that has neither
    says so."""
    world = start_world()
    assert world.cross() == {0}
    with ThreadPoolExecutor(2) as threads:
        for rank in world.ranks:
            threads.submit(rank.commit, lambda _: b"there", name="saved", step=7)
    record = world.ranks[1].outcome("saved", 7)
    assert record is not None
    assert (record.result, record.leader) == (b"there", 0)
    assert world.ranks[0].outcome("saved", 8) is None
    world.ranks[0].close()
    assert world.ranks[0].statistics().released == 2
    with pytest.raises(BarrierClosedError):
        world.ranks[0].outcome("saved", 7)
    without = BlockingBarrier(DistBarrier())
    with pytest.raises(NotImplementedError, match="DistBarrier keeps no statistics"):
        without.statistics()
    with pytest.raises(NotImplementedError, match="DistBarrier keeps no records of commits"):
        without.outcome("saved", 7)
    without.close()


def test_what_is_decided_now_in_a_world_of_one() -> None:
    """A deadline of 0 is met there, by the first call as by those after it."""
    with_own_store = {"global_rank": 0, "global_world_size": 1, "tcpstore_port": 0}
    for barrier in (
        BlockingBarrier(StoreBarrier(HashStore(), rank=0, world_size=1)),
        BlockingBarrier(BarrierConfig("tcp_store", with_own_store)),
    ):
        assert [barrier.execute_barrier(timeout_secs=0).sequence for _ in range(3)] == [0, 1, 2]
        barrier.close()


def test_it_has_what_a_barrier_has(start_world: StartWorld) -> None:
    """Names and steps, payloads that are gathered or published, and their errors."""
    world = start_world()
    published: list[Mapping[int, bytes]] = []

    def publish(payloads: Mapping[int, bytes]) -> bytes:
        published.append(dict(payloads))
        return b"published"

    async def publish_later(payloads: Mapping[int, bytes]) -> bytes:
        await anyio.sleep(0)
        return publish(payloads)

    def work(rank: int) -> list[Any]:
        barrier = world.ranks[rank]
        payload = b"%d" % rank
        done: list[Any] = [
            barrier.execute_barrier(name="a").sequence,
            barrier.execute_barrier(5, name="a", step=7).sequence,
            barrier.all_gather(payload, name="g", step=7),
            barrier.commit(publish, payload=payload, name="c", step=7),
            barrier.commit(publish_later, payload=payload, name="c", leader=1, timeout_secs=5),
        ]
        with pytest.raises(BrokenBarrierError) as caught:
            barrier.commit(publish, name="c", step=6)
        return [*done, (caught.value.name, caught.value.sequence)]

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(work, range(2)))
    assert done == [[0, 7, (b"0", b"1"), b"published", b"published", ("c", 6)]] * 2
    assert published == [{0: b"0", 1: b"1"}] * 2
    with pytest.raises(BarrierTimeoutError, match="'barrier/late' #3") as caught:
        world.ranks[0].execute_barrier(0.1, name="late", step=3)
    assert (caught.value.name, caught.value.missing_ranks) == ("late", (1,))
    with pytest.raises(TypeError, match="publish must be"):
        world.ranks[0].commit(b"no function")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step must be"):
        world.ranks[0].execute_barrier(step="3")  # type: ignore[arg-type]
    assert repr(world.ranks[0]).startswith("<BlockingBarrier of <StoreBarrier 'barrier', rank 0")


@pytest.mark.parametrize("exception", [KeyboardInterrupt, LookupError])
def test_an_interrupted_wait_breaks_the_phase(
    start_world: StartWorld, exception: type[BaseException]
) -> None:
    """What a signal handler raises goes on, the peers are told, and the next phase works."""
    world = start_world(3)
    waiting = world.waiting(1)
    with (
        pytest.raises(exception),
        interrupted(lambda: bool(entered(world.ranks[0])), exception),
    ):
        world.ranks[0].execute_barrier()
    broken(waiting, 0, "its task was cancelled")
    broken(world.start(2), 0, "its task was cancelled")
    assert world.cross() == {1}


def test_an_interrupt_that_is_interrupted(
    start_world: StartWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes before the call was cancelled does not keep it from that."""
    world = start_world(3)
    waiting = world.waiting(1)

    def interrupt(*_: object) -> None:
        undo.undo()
        raise KeyboardInterrupt

    with monkeypatch.context() as undo:
        undo.setattr(Portal, "cancel", interrupt)
        with (
            pytest.raises(KeyboardInterrupt),
            interrupted(lambda: bool(entered(world.ranks[0])), LookupError),
        ):
            world.ranks[0].execute_barrier()
    broken(waiting, 0, "its task was cancelled")
    broken(world.start(2), 0, "its task was cancelled")
    assert world.cross() == {1}


def test_a_store_that_hangs_does_not_hold_up_an_interrupt() -> None:
    """It is raised within a second all the same, and closing ends, too (law 5)."""
    store = MemoryStore()
    barrier = BlockingBarrier(StoreBarrier(store, rank=0, world_size=2))
    barrier.connect()
    hung = threading.Event()

    def hang(*_: str) -> None:
        hung.wait(BOUND_SECS)

    store.data.hook = hang
    try:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt), interrupted(lambda: True, KeyboardInterrupt):
            barrier.execute_barrier()
        assert time.monotonic() - began < GRACE_SECS + 0.2
        barrier.close()
    finally:
        hung.set()


def test_an_interrupt_before_the_loop_runs(start_world: StartWorld) -> None:
    """The call is not made, or is cancelled when it begins; either way nobody waits for it."""
    world = start_world()
    with pytest.raises(KeyboardInterrupt), interrupted(lambda: True, KeyboardInterrupt):
        world.ranks[0].execute_barrier()
    world.ranks[0].close()


def test_closing(start_world: StartWorld) -> None:
    """Whoever waits is told, on this rank and on others, now and later; twice is no harm."""
    before = threads()
    world = start_world(3)
    world.cross()
    mine, theirs = world.waiting(0), world.waiting(1)
    world.ranks[0].close()
    with pytest.raises(BarrierClosedError):
        mine.result(GRACE_SECS)
    broken(theirs, 0, LEFT)
    broken(world.start(2), 0, LEFT)
    # It says so for every phase after that, too, in which it will never be.
    broken(world.start(1, name="x", step=3), 0, LEFT)
    world.ranks[0].close()
    with pytest.raises(BarrierClosedError, match=r"this BlockingBarrier .* is closed"):
        world.ranks[0].execute_barrier()
    with pytest.raises(BarrierClosedError, match="<StoreBarrier 'barrier', rank 0 of 3, closed>"):
        world.ranks[0].all_gather(b"")
    world.close()
    until(lambda: threads() <= before)


def test_closing_between_phases(start_world: StartWorld) -> None:
    """Whoever waits for this rank, or comes later, is told at once, not at its deadline."""
    world = start_world()
    world.cross()
    waiting = world.waiting(1, name="x")
    world.ranks[0].close()
    broken(waiting, 0, LEFT)
    broken(world.start(1, name="y"), 0, LEFT)


def test_one_that_was_never_used_connects_to_nothing() -> None:
    """Neither to cross nor to leave, so that it may be built only to be sent elsewhere."""
    before = threads()
    config = BarrierConfig(
        "tcp_store",
        {"global_rank": 1, "global_world_size": 2, "tcpstore_port": free_port()},
    )
    began = time.monotonic()
    barrier = BlockingBarrier(config)
    assert threads() == before
    barrier.close()
    assert time.monotonic() - began < GRACE_SECS
    until(lambda: threads() <= before)


def test_leaving_a_block_by_an_exception(start_world: StartWorld) -> None:
    """Peers are told what was raised, and it goes on."""
    world = start_world()
    waiting = world.waiting(1)
    with pytest.raises(OSError, match="disk full"), world.ranks[0]:
        raise OSError("disk full")
    broken(waiting, 0, f"{LEFT}: it raised OSError: disk full")
    broken(world.start(1), 0, f"{LEFT}: it raised OSError: disk full")
    twice = start_world().ranks[1]
    with pytest.raises(LookupError), twice, twice:
        raise LookupError


def test_a_block_whose_store_is_not_there() -> None:
    """It is not entered, and nothing stays behind."""
    before = threads()
    config = BarrierConfig(
        "tcp_store",
        {
            "global_rank": 1,
            "global_world_size": 2,
            "tcpstore_port": free_port(),
            "timeout_barrier_init_secs": 0.2,
        },
    )
    with pytest.raises(BarrierConnectionError), BlockingBarrier(config):
        pytest.fail("it connected")
    until(lambda: threads() <= before)


def test_a_guard_tells_of_what_failed_before_the_crossing(start_world: StartWorld) -> None:
    """And of nothing that failed later, when there is no phase to break any more."""
    world = start_world()
    waiting = world.waiting(1)
    with pytest.raises(OSError, match="disk full"), world.ranks[0].guard():
        raise OSError("disk full")
    broken(waiting, 0, "it raised OSError: disk full")
    waiting = world.start(1)
    with pytest.raises(OSError, match="renaming"), world.ranks[0].guard():
        fail_after(world.ranks[0].execute_barrier, OSError("renaming failed"))
    waiting.result(BOUND_SECS)
    with world.ranks[0].guard():
        pass
    assert world.cross() == {2}


def test_a_guard_of_a_name(start_world: StartWorld) -> None:
    """It tells of its own phase, whatever else the body has crossed or guards."""
    world = start_world()
    waiting = world.waiting(1, name="save", step=3)
    world.start(1)
    with pytest.raises(OSError, match="disk full"), world.ranks[0].guard("save", step=3):
        fail_after(world.ranks[0].execute_barrier, OSError("disk full"))
    broken(waiting, 0, "it raised OSError: disk full")
    waiting = world.waiting(1, name="save", step=4)
    with (  # noqa: PT012  # noqa: PT012
        pytest.raises(OSError, match="again"),
        world.ranks[0].guard("save", step=4),
        world.ranks[0].guard("save", step=5),
    ):
        crossing = functools.partial(world.ranks[0].execute_barrier, name="save", step=4)
        fail_after(crossing, OSError("again"))
    assert waiting.result(BOUND_SECS).sequence == 4
    with pytest.raises(BrokenBarrierError, match="it raised OSError: again"):
        world.ranks[1].execute_barrier(name="save", step=5)
    world.ranks[0].close()
    with pytest.raises(OSError, match="too late"), world.ranks[0].guard():
        raise OSError("too late")


def test_aborting(start_world: StartWorld) -> None:
    """Breaks the next phase, once, also within a guard; or that of a step, unless it was
    released."""
    world = start_world()
    waiting = world.waiting(1)
    with pytest.raises(OSError, match="disk full"), world.ranks[0].guard():
        fail_after(lambda: world.ranks[0].abort("no space left"), OSError("disk full"))
    broken(waiting, 0, "no space left")
    assert world.cross() == {1}
    assert world.cross(name="x", step=3) == {3}
    assert not world.ranks[0].abort("too late", "x", step=3)
    waiting = world.waiting(1, name="x", step=4)
    assert world.ranks[0].abort("in time", "x", step=4)
    broken(waiting, 0, "in time")


def test_pickling_takes_the_configuration() -> None:
    """A copy is built from it elsewhere; what was built otherwise says why it cannot be."""
    config = BarrierConfig(
        "tcp_store", {"global_rank": 0, "global_world_size": 1, "tcpstore_port": free_port()}
    )
    with BlockingBarrier(config) as barrier:
        barrier.execute_barrier()
        config.barrier_args.clear()
        parcel = pickle.dumps(barrier)
        # A rank is one process's alone, and the first one's.
        port = barrier.barrier._session._source.address[1]  # type: ignore[attr-defined]
        client = TCPStore("127.0.0.1", port, wait_for_workers=False)
        copy = BlockingBarrier(StoreBarrier(client, rank=0, world_size=1))
        with pytest.raises(BarrierError, match="is refused"):
            copy.execute_barrier()
        assert barrier.execute_barrier().sequence == 1
        copy.close()
    with pickle.loads(parcel) as again:
        assert again.execute_barrier().sequence == 0
    made = BlockingBarrier(StoreBarrier(HashStore(), rank=0, world_size=1))
    with pytest.raises(TypeError, match="build it from a BarrierConfig"):
        pickle.dumps(made)


def test_what_it_can_be_built_from() -> None:
    """A configuration, torch's too, or a barrier; the rest is refused at once."""
    args = {"global_rank": 0, "global_world_size": 1, "tcpstore_port": 1}
    BlockingBarrier(torchs.BarrierConfig("tcp_store", args))  # type: ignore[arg-type]
    BlockingBarrier(BarrierConfig("tcp_store", args))
    for nothing in (BarrierConfig(), torchs.BarrierConfig()):
        with pytest.raises(ValueError, match="barrier_type is None"):
            BlockingBarrier(nothing)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a BarrierConfig or a Barrier, not 'tcp_store'"):
        BlockingBarrier("tcp_store")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="global_rank"):
        BlockingBarrier(BarrierConfig("tcp_store"))


def test_torch_takes_it_for_one_of_its_own() -> None:
    """Where its code asks what kind of barrier it was given."""
    barrier = BlockingBarrier(StoreBarrier(HashStore(), rank=0, world_size=1))
    assert isinstance(cast(object, barrier), torchs.Barrier)


def test_one_that_is_dropped_leaves_no_thread() -> None:
    """Closed or not."""
    before = threads()
    for _ in range(3):
        barrier = BlockingBarrier(StoreBarrier(HashStore(), rank=0, world_size=1))
        assert barrier.execute_barrier().sequence == 0
        del barrier
        gc.collect()
        until(lambda: threads() <= before)


class Odd(Barrier):
    """Raises what no barrier should, and does not end when it is closed."""

    barrier_type = "odd"

    async def execute_barrier(self, name: str = "", **_: Any) -> BarrierResult:
        await anyio.sleep_forever()
        raise AssertionError

    async def connect(self) -> None:
        raise SystemExit(3)

    async def aclose(self) -> None:
        raise LookupError("cannot close")


def test_a_barrier_of_ones_own_that_misbehaves() -> None:
    """What it raises reaches the caller, and a call that does not end is ended."""
    before = threads()
    barrier = BlockingBarrier(Odd())
    with pytest.raises(SystemExit):
        barrier.connect()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(barrier.execute_barrier)
        until(lambda: len(barrier._portal._calls) == 1)
        with pytest.raises(LookupError, match="cannot close"):
            barrier.close()
        with pytest.raises(BarrierClosedError):
            waiting.result(GRACE_SECS)
    until(lambda: threads() <= before)


class Blocked(Odd):
    """Blocks its event loop, as none should, until it is let go on; crosses at once."""

    crossed = 0

    def __init__(self) -> None:
        self._until, self.go_on = multiprocessing.Pipe(duplex=False)

    async def connect(self) -> None:
        select.select([self._until], [], [], BOUND_SECS)

    async def execute_barrier(self, name: str = "", **_: Any) -> BarrierResult:
        await anyio.sleep(0)
        self.crossed += 1
        raise AssertionError

    async def aclose(self) -> None:
        pass


def test_a_call_that_is_interrupted_before_it_began() -> None:
    """It is never made, and the interrupt does not wait for it longer than for others."""
    made = Blocked()
    barrier = BlockingBarrier(made)
    with ThreadPoolExecutor() as pool:
        blocking = pool.submit(barrier.connect)
        until(lambda: len(barrier._portal._calls) == 1)
        inbox = barrier._portal._inbox
        began = time.monotonic()
        with pytest.raises(LookupError), interrupted(lambda: len(inbox) == 1, LookupError):
            barrier.execute_barrier()
        assert time.monotonic() - began < GRACE_SECS + 0.2
        made.go_on.close()
        blocking.result(BOUND_SECS)
    barrier.close()
    assert made.crossed == 0


def test_no_event_loop_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without file descriptors or threads there is none; the caller is told, and the next one has
    one again."""
    before = threads()
    barrier = BlockingBarrier(StoreBarrier(HashStore(), rank=0, world_size=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    for some in range(3):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + some, hard))
        try:
            with pytest.raises(BarrierConnectionError, match="Too many open files"):
                barrier.connect()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    until(lambda: threads() <= before)

    def no_more(thread: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        with pytest.raises(BarrierConnectionError, match=r"can't start new thread.*ulimit -u"):
            barrier.connect()
    assert barrier.execute_barrier().sequence == 0
    barrier.close()
    until(lambda: threads() <= before)


@pytest.mark.processes
def test_ctrl_c(start_job: StartJob) -> None:
    """A rank that waits in its main thread is interrupted at once, and so are its peers."""
    job = start_job(3, own_store=False, backends=["blocking"])
    (waiting,) = job.starts([1])
    job.ranks[0].start("here_cross")
    job.entered(0, 1)
    killed = job.ranks[0].signal(signal.SIGINT)
    assert job.ranks[0].event()["at"] < killed + GRACE_SECS
    error = waiting.error("BrokenBarrierError")
    assert (error["rank"], error["reason"]) == (0, "its task was cancelled")
    assert error["ended"] < killed + GRACE_SECS
    assert job.ranks[0].exit(killed + EXIT_SECS) in INTERRUPTED
    assert job.ranks[0].stderr.count("KeyboardInterrupt") == 1
    assert not any(crash in job.ranks[0].stderr for crash in CRASHES)
    # Who comes later hears of that, or of that exit.
    job.ranks[2].start("cross").error("BrokenBarrierError")
    error = job.ranks[2].start("cross").error("BrokenBarrierError")
    assert error["rank"] == 0
    assert error["reason"].startswith(LEFT)
    job.ends()


@pytest.mark.processes
@pytest.mark.parametrize("own_store", [False, True], ids=["shared store", "own store"])
def test_exits_of_those_that_were_not_closed(start_job: StartJob, own_store: bool) -> None:
    """Nothing keeps the interpreter, nothing is printed, and peers are told at once; ranks that
    can await cross with those that cannot."""
    backends = ["blocking", "blocking", "blocking", "trio"]
    job = start_job(4, own_store=own_store, backends=backends, lanes=0)
    assert job.crosses()[0]["sequence"] == 0
    waiting = job.starts([0, 3])
    job.entered(0, 3, sequence=1)
    left = time.monotonic()
    job.ranks[1].start("end")
    for call in waiting:
        error = call.error("BrokenBarrierError")
        assert error["rank"] == 1
        assert error["reason"].startswith(LEFT)
        assert error["ended"] < left + GRACE_SECS
    assert job.ranks[1].exit(left + EXIT_SECS) == 0, job.ranks[1].stderr
    assert job.ranks[1].stderr == ""
    # With a call that waits in another thread, too; and with the host of the store.
    job.ranks[2].start("cross").error("BrokenBarrierError")
    job.ranks[2].start("cross", name="x")
    job.ends(EXIT_SECS + GRACE_SECS)


@pytest.mark.processes
def test_a_forked_child(start_job: StartJob) -> None:
    """Each of its calls says at once whose the barrier is, and whose it is not; its parent is in a
    phase meanwhile, in another thread, and crosses it, and the next."""
    job = start_job(2, own_store=False, backends=["blocking"])
    calls = [job.ranks[0].start("cross")]
    job.entered(0)
    told = job.ranks[0].do("here_fork")
    assert told["secs"] < GRACE_SECS / 2
    for error in told["errors"]:
        assert f"was built in process {told['parent']} " in error
        assert f"this is process {told['child']}" in error
    calls.append(job.ranks[1].start("cross"))
    assert [call.released()["sequence"] for call in calls] == [0, 0]
    assert job.crosses()[0]["sequence"] == 1
    job.ends()


@pytest.mark.processes
def test_a_store_that_dies(start_job: StartJob) -> None:
    """With the rank that hosts it: those that wait learn of it, and exit as ever."""
    job = start_job(2, own_store=True, backends=["blocking"])
    (waiting,) = job.starts([1])
    job.entered(1)
    killed = job.ranks[0].signal(signal.SIGKILL)
    assert job.ranks[0].exit(killed + EXIT_SECS) == -signal.SIGKILL
    error = waiting.error("BarrierConnectionError")
    assert error["in_doubt"]
    assert error["ended"] < killed + 2 * GRACE_SECS
    job.ends(quietly=False)
