"""StepSignal: all ranks act at one step that none of them has passed, or all are told why not."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

import anyio
import pytest
from blocking_world import World as BlockingWorld
from blocking_world import interrupted
from fork_server import python
from torch.distributed import TCPStore
from worlds import Tasks, World, gather, library_threads

import async_barriers
from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    DistBarrier,
    StepSignal,
    TCPStoreBarrier,
)
from async_barriers._signal.gate import Agreement, Gate, Round
from async_barriers.step_signal import BlockingStepSignal
from async_barriers.testing import local_barriers

pytestmark = pytest.mark.anyio
SOURCE = Path(async_barriers.__file__).parents[1]


async def train(
    stop: StepSignal, pace_secs: float, first: int = 0, peers: Sequence[StepSignal] = ()
) -> int:
    """The step at which a rank stops.

    :param peers: of which none falls back by more than a few steps, as with a job's collectives
    """
    for step in range(first, 100_000):
        if await stop.reached(step):
            return step
        await anyio.sleep(pace_secs)
        while any(peer._last < step - AHEAD for peer in peers):
            await anyio.sleep(pace_secs)
    raise AssertionError("never reached")


def train_blocking(stop: BlockingStepSignal, first: int) -> int:
    """As `train`, in this thread."""
    for step in range(first, 100_000):
        if stop.reached(step):
            return step
        time.sleep(0.001)
    raise AssertionError("never reached")


async def test_all_ranks_agree_on_one_step(world: World) -> None:
    """Ranks of different pace, of which several send, stop at one step with one sender; and so
    they do when it is sent again."""
    ranks = await world.barriers(3)
    stops = [StepSignal(rank) for rank in ranks]

    async def send() -> None:
        while min(stop._last for stop in stops) < 5:
            await anyio.sleep(0.01)
        threading.Thread(target=stops[1].send, args=["disk full"]).start()
        stops[2].send("SIGTERM")

    first = 0
    for _ in range(2):
        trains: list[Callable[[], Awaitable[int | None]]] = [
            partial(train, stop, pace, first, stops)
            for stop, pace in zip(stops, PACES, strict=True)
        ]
        step, *others, _ = await gather([*trains, send])
        assert step is not None
        assert others == [step] * 2
        told = {(stop.step, stop.rank, stop.reason) for stop in stops}
        assert told in ({(step, 1, "disk full")}, {(step, 2, "SIGTERM")})
        first = step + 1
        for stop in stops:
            assert not await stop.reached(first)
        first += 1


PACES = (0.001, 0.004, 0.011)
AHEAD = 10


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_neither_thread_nor_loop_of_a_rank_is_needed() -> None:
    """A rank's caller is away in a collective, steps ahead of the other, which learns the step."""
    async with local_barriers(2) as ranks:
        stops = [StepSignal(rank) for rank in ranks]
        for step in range(8):
            assert not await stops[1].reached(step)
        assert not await stops[0].reached(2)
        stops[0].send()
        while stops[0]._agent._round is None:
            await anyio.sleep(0.001)
        # Nobody calls stops[1] meanwhile.
        with anyio.fail_after(5):
            assert [await stops[0].reached(step) for step in range(3, 9)] == [False] * 5 + [True]
        assert stops[0].step == 8
        assert await stops[1].reached(8)


async def test_steps_may_leave_out_numbers() -> None:
    """They are stopped at the first one that they have after what was agreed."""
    async with local_barriers(2) as ranks:
        stops = [StepSignal(rank) for rank in ranks]
        assert [await stop.reached(10) for stop in stops] == [False, False]
        stops[1].send("why")
        while not all(stop._agent._round for stop in stops):
            await anyio.sleep(0.001)
        for stop in stops:
            assert [step for step in range(20, 60, 10) if await stop.reached(step)] == [20]
            assert (stop.step, stop.rank, stop.reason) == (20, 1, "why")


async def test_who_takes_no_part_is_named() -> None:
    """A rank that never called `reached` is missing; all others are told, each once."""
    async with local_barriers(3, timeout_secs=0.3) as ranks:
        stops = [StepSignal(rank) for rank in ranks[:2]]
        assert [await stop.reached(0) for stop in stops] == [False, False]
        stops[1].send()
        for stop in stops:
            with pytest.raises(BarrierTimeoutError, match="'barrier/stop' #0") as caught:
                await train(stop, 0.001, 1)
            assert caught.value.missing_ranks == (2,)
            assert not await stop.reached(50_000)


async def test_a_sender_that_reaches_no_store_is_told_at_its_deadline() -> None:
    """Not only after ``timeout_barrier_init_secs``, and its steps wait no longer than that."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        barrier = TCPStoreBarrier(
            1, 2, tcpstore_port=silent.getsockname()[1], timeout_secs=0.4,
            timeout_barrier_init_secs=30,
        )  # fmt: skip
        async with aclosing(barrier):
            stop = StepSignal(barrier)
            assert not await stop.reached(0)
            while not stop._agent._connecting:
                await anyio.sleep(0.001)
            stop.send()
            with (
                anyio.fail_after(1.4),
                pytest.raises(BarrierConnectionError, match=r"within 0\.4 s"),
            ):
                await train(stop, 0.001, 1)
            assert not await stop.reached(5_000)


async def test_who_leaves_is_named() -> None:
    """Of a rank that closed its barrier, also the thread has left."""
    async with local_barriers(3) as ranks:
        stops = [StepSignal(rank) for rank in ranks]
        await gather(lambda s=s: s.reached(0) for s in stops)  # type: ignore[misc]
        # So that all are there.
        stops[0].send()
        assert len(set(await gather(lambda s=s: train(s, 0.001, 1) for s in stops))) == 1  # type: ignore[misc]
        await ranks[2].aclose()
        # Not only who sends is told, though that one finds no barrier to enter.
        stops[0].send()
        for stop in stops[:2]:
            with (
                anyio.fail_after(5),
                pytest.raises(BrokenBarrierError, match="closed its barrier") as caught,
            ):
                await train(stop, 0.001, 50_000)
            assert caught.value.rank == 2
        with pytest.raises(BarrierClosedError):
            await stops[2].reached(60_000)
        stops[2].send("nobody is there to be told")


@pytest.mark.parametrize("knows", [False, True], ids=["waits", "asks later"])
async def test_who_leaves_without_a_signal_is_named(knows: bool) -> None:
    """It never built one, or its thread had not come to the store; nobody waits for it."""
    async with local_barriers(3, timeout_secs=20) as ranks, Tasks() as tasks:
        await gather(rank.execute_barrier for rank in ranks)
        stops = [StepSignal(rank) for rank in ranks[:2]]
        if knows:
            await ranks[2].aclose()
        stops[0].send()
        waiting = [tasks.start(partial(train, stop, 0.001, 1)) for stop in stops]
        if not knows:
            await anyio.sleep(0.3)
            assert not any(each.ended.is_set() for each in waiting)
            await ranks[2].aclose()
        for each in waiting:
            error = await each.raised(BrokenBarrierError)
            assert (error.rank, error.reason) == (2, "it closed its barrier")
            assert each.secs < 3


async def test_closing_ends_the_waiting_and_the_thread() -> None:
    """A `reached` that waits for a rank which never comes ends with its barrier."""
    async with local_barriers(2) as ranks, anyio.create_task_group() as tasks:
        stop = StepSignal(ranks[0])
        assert not await stop.reached(0)
        stop.send()

        async def waits() -> None:
            with pytest.raises(BarrierClosedError):
                await train(stop, 0.001, 1)

        tasks.start_soon(waits)
        while stop._agent._round is None:
            await anyio.sleep(0.01)
        # Cancelling a call leaves the agreement, and the step, as they are.
        with anyio.move_on_after(0.05) as scope:
            await stop.reached(200_000)
        assert scope.cancelled_caught
        await ranks[0].aclose()
        for thread in library_threads():
            if "loop" in thread.name:
                # Its last call has ended; the interpreter still takes a moment to end it.
                thread.join(1.0)
                assert not thread.is_alive()


async def test_what_is_no_signal_is_refused() -> None:
    """Before anything is begun."""
    async with local_barriers(1) as (barrier,):
        stop = StepSignal(barrier)
        with pytest.raises(ValueError, match="already"):
            StepSignal(barrier)
        with pytest.raises(TypeError, match="name must be"):
            StepSignal(barrier, 3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="StoreBarrier"):
            StepSignal(DistBarrier())
        with pytest.raises(TypeError, match="reason must be"):
            stop.send(15)  # type: ignore[arg-type]
        for wrong in (None, "1", 1.5, True):
            with pytest.raises(TypeError, match="step must be"):
                await stop.reached(wrong)  # type: ignore[arg-type]
        assert not await stop.reached(3)
        with pytest.raises(ValueError, match="step is 3, after 3; steps must rise"):
            await stop.reached(3)
    with pytest.raises(BarrierClosedError):
        await StepSignal(barrier, "late").reached(0)


def test_a_step_passes_or_is_stopped() -> None:
    """Whatever the threads' timing: the last step that passed is what the round was told."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for attempt in range(300):
            gate, ready, passed = Gate(), threading.Event(), [-1]
            rounds = [Round(), Round()]

            def steps(gate: Gate, ready: threading.Event, passed: list[int]) -> None:
                ready.set()
                step = 0
                # Bounded, so that a stop that is lost fails, and does not hang.
                while gate.stops(step) is None and step < 100_000:
                    passed.append(step)
                    step += 1

            thread = threading.Thread(target=steps, args=[gate, ready, passed])
            thread.start()
            ready.wait()
            for _ in range(attempt % 50):
                pass
            gate.stop(rounds[0])
            first = rounds[0].passed
            thread.join()
            assert first == passed[-1]
            # Stopped again before the caller has seen the end of that.
            rounds[0].settle(Agreement(first + 4, 0, ""))
            gate.stop(rounds[1])
            assert rounds[1].passed == first + 4
            gate.go_on(rounds[0])
            assert gate.stops(first + 5) is rounds[1]
    finally:
        sys.setswitchinterval(interval)


def waits(stop: BlockingStepSignal) -> bool:
    """Whether a call waits for an agreement."""
    stopped = stop._agent._round
    return stopped is not None and bool(stopped.agreed._wakes)


def test_ctrl_c_ends_the_waiting_alone() -> None:
    """It is raised at once; the agreement goes on, and the step can be asked for again."""
    world = BlockingWorld(2)
    try:
        stop, other = (rank.step_signal("halt") for rank in world.ranks)
        assert not stop.reached(0)
        stop.send("x")
        with (
            interrupted(lambda: waits(stop), KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            train_blocking(stop, 1)
        assert not other.reached(0)
        step = int(stop._last) + 1
        assert stop.reached(step)
        assert [other.reached(each) for each in range(1, step + 1)][-1]
        assert (other.step, other.rank, other.reason) == (step, 0, "x")
    finally:
        world.close()


def test_a_forked_child_is_refused() -> None:
    """Whatever it calls; and its parent goes on."""
    world = BlockingWorld(1)
    try:
        stop = world.ranks[0].step_signal()
        assert not stop.reached(0)
        # The child must not collect what other tests left: the threads of c10d objects are gone.
        gc.collect()
        pid = os.fork()
        if pid == 0:
            refused = 0
            for call in (lambda: stop.reached(1), lambda: stop.send()):
                try:
                    call()
                except BarrierError as exc:
                    refused += "forked from there" in str(exc)
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
        stop.send()
        assert train_blocking(stop, 1) == stop.step
    finally:
        world.close()


# -- real processes and real signals -----------------------------------------------------


class Ranks:
    """Processes that train until they are told to stop."""

    def __init__(self) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.made: list[subprocess.Popen[str]] = []

    def start(self, rank: int, *blocked: str, by: str = "") -> subprocess.Popen[str]:
        script = str(Path(__file__).with_name("signal_rank.py"))
        pace = str(0.002 * (1 + rank))
        process = subprocess.Popen(
            [by or python(), script, str(rank), "3", str(self._store.port), pace, *blocked],
            env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.made.append(process)
        return process


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    found = Ranks()
    yield found
    for process in found.made:
        process.kill()
        process.communicate()


def trains(process: subprocess.Popen[str]) -> int:
    """Wait until it trains; its process id: what was started is a client of the fork server."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("trains "), line + (process.communicate()[1])
    return int(line.split()[1])


def last_words(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=15)
    assert (process.returncode, err) == (0, "")
    return out.strip()


@pytest.mark.processes
@pytest.mark.parametrize(("blocked", "signalled"), [("thread", [0, 1, 2]), ("loop", [1])])
def test_a_real_signal(ranks: Ranks, blocked: str, signalled: list[int]) -> None:
    """SIGTERM to one rank, or to all at once: all stop at one step and exit, though none closes its
    barrier, and though the main thread or the event loop is blocked in each step's collective."""
    processes = [ranks.start(rank, blocked) for rank in range(3)]
    for each in processes:
        trains(each)
    for rank in signalled:
        processes[rank].send_signal(signal.SIGTERM)
    said = {last_words(each) for each in processes}
    assert len(said) == 1
    reached, step, agreed, sender, reason = said.pop().split()
    assert (reached, step, reason) == ("reached", agreed, "SIGTERM")
    assert int(sender) in signalled


@pytest.mark.processes
def test_a_process_that_waits_exits(ranks: Ranks) -> None:
    """Its peers never come; Ctrl-C ends it, though its thread is amid an agreement."""
    # Its end is timed, and is to take as long as any.
    process = ranks.start(0, by=sys.executable)
    trains(process)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert last_words(process) == "interrupted"
    assert time.monotonic() - began < 2


@pytest.mark.processes
def test_a_rank_that_dies_in_the_agreement(ranks: Ranks) -> None:
    """It stands still while the others wait for it, is killed, and comes back: they are told."""
    processes = [ranks.start(rank) for rank in range(3)]
    os.kill([trains(each) for each in processes][2], signal.SIGSTOP)
    processes[0].send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        processes[1].wait(1)
    processes[2].kill()
    # Its pipes are closed when the program itself is gone.
    processes[2].communicate()
    ranks.start(2)
    broken = "told BrokenBarrierError barrier 'barrier/stop' #0 was broken by rank 2: "
    for each in processes[:2]:
        assert last_words(each).startswith(broken)
