"""BlockingBarrier: threads that wait, are interrupted, and leave."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import anyio
import pytest
import torch.distributed.checkpoint._experimental.barriers as torchs
from processes import CRASHES, EXIT_SECS, GRACE_SECS, StartJob, until
from stores import MemoryStore
from torch.distributed import HashStore
from worlds import free_port

from async_barriers import (
    Barrier,
    BarrierClosedError,
    BarrierConfig,
    BarrierConnectionError,
    BarrierResult,
    BarrierTimeoutError,
    BrokenBarrierError,
    StoreBarrier,
)
from async_barriers.blocking import BlockingBarrier

# As the interpreter ends it, or as a shell reports it.
INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)
BOUND_SECS = 15.0


class World:
    """Ranks whose calls wait in threads."""

    def __init__(self, size: int, **options: Any) -> None:
        store = HashStore()
        self.ranks = [
            BlockingBarrier(
                BarrierConfig(
                    "store",
                    {
                        "store": store,
                        "rank": rank,
                        "world_size": size,
                        "timeout_secs": 20,
                        **options,
                    },
                )
            )
            for rank in range(size)
        ]
        self._threads = ThreadPoolExecutor(16)

    def start(self, rank: int, *args: Any) -> Future[BarrierResult]:
        """Have a rank cross, in a thread."""
        return self._threads.submit(self.ranks[rank].execute_barrier, *args)

    def waiting(self, rank: int, *args: Any) -> Future[BarrierResult]:
        """The same, when it has entered."""
        turns = turns_of(self.ranks[rank])
        before = len(turns)
        future = self.start(rank, *args)
        until(lambda: any(turn.entered for turn in list(turns)[before:]))
        return future

    def cross(self) -> set[int]:
        """Have all cross; the numbers of the phases, of which there is one."""
        futures = [self.start(rank) for rank in range(len(self.ranks))]
        return {future.result(BOUND_SECS).sequence for future in futures}

    def close(self) -> None:
        for barrier in self.ranks:
            barrier.close()
        self._threads.shutdown()


def turns_of(barrier: Any) -> dict[Any, Any]:
    turns: dict[Any, Any] = barrier._barrier._session.turns._promises
    return turns


@pytest.fixture
def start_world() -> Iterator[Callable[..., World]]:
    with ExitStack() as worlds:

        def start(size: int = 2, **options: Any) -> World:
            world = World(size, **options)
            worlds.callback(world.close)
            return world

        yield start


StartWorld = Callable[..., World]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "async_barriers" in thread.name}


def fail_after(call: Callable[[], object], error: Exception) -> None:
    call()
    raise error


def broken(future: Future[BarrierResult], rank: int, reason: str) -> None:
    """``future`` ends within a second, told who broke the phase and why."""
    with pytest.raises(BrokenBarrierError) as caught:
        future.result(GRACE_SECS)
    assert (caught.value.rank, caught.value.reason) == (rank, reason)


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
    for given, timeout in (((), 0.3), ((None,), 0.3), ((0.1,), 0.1)):
        began = time.monotonic()
        with pytest.raises(BarrierTimeoutError) as caught:
            world.ranks[0].execute_barrier(*given)
        assert timeout <= time.monotonic() - began < timeout + GRACE_SECS
        assert (caught.value.timeout_secs, caught.value.missing_ranks) == (timeout, (1,))
    with pytest.raises(ValueError, match="timeout_secs is -1"):
        world.ranks[0].execute_barrier(-1)


@contextmanager
def interrupted(when: Callable[[], bool], exception: type[BaseException]) -> Iterator[None]:
    """A signal handler of the main thread raises ``exception``, as soon as ``when`` holds."""

    def interrupt(*_: object) -> None:
        raise exception

    def kill(main: int) -> None:
        until(when)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    killer = threading.Thread(target=kill, args=[threading.get_ident()])
    killer.start()
    try:
        yield
    finally:
        killer.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("exception", [KeyboardInterrupt, LookupError])
def test_an_interrupted_wait_breaks_the_phase(
    start_world: StartWorld, exception: type[BaseException]
) -> None:
    """What a signal handler raises goes on, the peers are told, and the next phase works."""
    world = start_world(3)
    waiting = world.waiting(1)
    turns = turns_of(world.ranks[0])
    with (
        pytest.raises(exception),
        interrupted(lambda: any(turn.entered for turn in list(turns)), exception),
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
    broken(theirs, 0, "it closed its barrier")
    broken(world.start(2), 0, "it closed its barrier")
    # It says so for the phase after that, too, in which it will never be.
    broken(world.start(1), 0, "it closed its barrier")
    world.ranks[0].close()
    with pytest.raises(BarrierClosedError, match=r"this BlockingBarrier .* is closed"):
        world.ranks[0].execute_barrier()
    world.close()
    until(lambda: threads() <= before)


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
    broken(waiting, 0, "it raised OSError: disk full")
    with pytest.raises(LookupError), world.ranks[1], world.ranks[1]:
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


def test_aborting(start_world: StartWorld) -> None:
    """Breaks the next phase, once, also within a guard."""
    world = start_world()
    waiting = world.waiting(1)
    with pytest.raises(OSError, match="disk full"), world.ranks[0].guard():
        fail_after(lambda: world.ranks[0].abort("no space left"), OSError("disk full"))
    broken(waiting, 0, "no space left")
    assert world.cross() == {1}


def test_pickling_takes_the_configuration() -> None:
    """A copy is built from it elsewhere; what was built otherwise says why it cannot be."""
    config = BarrierConfig(
        "tcp_store", {"global_rank": 0, "global_world_size": 1, "tcpstore_port": free_port()}
    )
    with BlockingBarrier(config) as barrier:
        barrier.execute_barrier()
        config.barrier_args.clear()
        parcel = pickle.dumps(barrier)
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
        calls = barrier._portal._calls
        until(lambda: len(calls) == 1)
        began = time.monotonic()
        with pytest.raises(LookupError), interrupted(lambda: len(calls) == 2, LookupError):
            barrier.execute_barrier()
        assert time.monotonic() - began < GRACE_SECS + 0.2
        made.go_on.close()
        blocking.result(BOUND_SECS)
    barrier.close()
    assert made.crossed == 0


def test_no_event_loop_can_be_made() -> None:
    """Without file descriptors there is none; the caller is told."""
    barrier = BlockingBarrier(StoreBarrier(HashStore(), rank=0, world_size=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            barrier.connect()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with pytest.raises(BarrierClosedError):
        barrier.connect()


@pytest.mark.processes
def test_ctrl_c(start_job: StartJob) -> None:
    """A rank that waits in its main thread is interrupted at once, and so are its peers."""
    job = start_job(3, own_store=False, backends=["blocking"])
    (waiting,) = job.starts([1])
    job.ranks[0].start("here_cross")
    job.entered(0, 1, sequence=1)
    killed = job.ranks[0].signal(signal.SIGINT)
    assert job.ranks[0].event()["at"] < killed + GRACE_SECS
    error = waiting.error("BrokenBarrierError")
    assert (error["rank"], error["reason"]) == (0, "its task was cancelled")
    assert error["ended"] < killed + GRACE_SECS
    assert job.ranks[0].exit(killed + EXIT_SECS) in INTERRUPTED
    assert job.ranks[0].stderr.count("KeyboardInterrupt") == 1
    assert not any(crash in job.ranks[0].stderr for crash in CRASHES)
    # Who comes later hears of that exit.
    job.ranks[2].start("cross").error("BrokenBarrierError")
    error = job.ranks[2].start("cross").error("BrokenBarrierError")
    assert (error["rank"], error["reason"]) == (0, "it closed its barrier")
    job.ends()


@pytest.mark.processes
@pytest.mark.parametrize("own_store", [False, True], ids=["shared store", "own store"])
def test_exits_of_those_that_were_not_closed(start_job: StartJob, own_store: bool) -> None:
    """Nothing keeps the interpreter, nothing is printed, and peers are told at once; ranks that
    can await cross with those that cannot."""
    backends = ["blocking", "blocking", "blocking", "trio"]
    job = start_job(4, own_store=own_store, backends=backends, lanes=0)
    assert job.crosses()[0]["sequence"] == 0
    told = job.ranks[1].do("here_fork")["value"]
    assert told.startswith("this BlockingBarrier (its thread is in the process")
    waiting = job.starts([0, 3], name="")
    job.entered(0, 3, sequence=1)
    left = time.monotonic()
    job.ranks[1].start("end")
    for call in waiting:
        error = call.error("BrokenBarrierError")
        assert (error["rank"], error["reason"]) == (1, "it closed its barrier")
        assert error["ended"] < left + GRACE_SECS
    assert job.ranks[1].exit(left + EXIT_SECS) == 0, job.ranks[1].stderr
    assert job.ranks[1].stderr == ""
    # With a call that waits in another thread, too; and with the host of the store.
    job.ranks[2].start("cross").error("BrokenBarrierError")
    job.ranks[2].start("cross")
    job.entered(2, sequence=2)
    job.ends(EXIT_SECS + GRACE_SECS)


@pytest.mark.processes
def test_a_store_that_dies(start_job: StartJob) -> None:
    """With the rank that hosts it: those that wait learn of it, and exit as ever."""
    job = start_job(2, own_store=True, backends=["blocking"])
    (waiting,) = job.starts([1])
    job.entered(1, sequence=1)
    killed = job.ranks[0].signal(signal.SIGKILL)
    assert job.ranks[0].exit(killed + EXIT_SECS) == -signal.SIGKILL
    error = waiting.error("BarrierConnectionError")
    assert error["in_doubt"]
    assert error["ended"] < killed + 2 * GRACE_SECS
    job.ends(quietly=False)
