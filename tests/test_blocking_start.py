"""BlockingBarrier.start: calls that go on while their thread does something else."""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from typing import Any

import anyio
import pytest
from blocking_world import BOUND_SECS, LEFT, World, broken, entered, interrupted, threads
from processes import GRACE_SECS, until

from async_barriers import BarrierClosedError, BarrierTimeoutError, BrokenBarrierError
from async_barriers.blocking import BlockingBarrier

StartWorld = Callable[..., World]


@pytest.fixture
def start_world() -> Iterator[StartWorld]:
    with ExitStack() as worlds:

        def start(size: int = 2, **options: Any) -> World:
            world = World(size, **options)
            worlds.callback(world.close)
            return world

        yield start


def crossing(blocking: BlockingBarrier, *args: Any, **options: Any) -> Future[Any]:
    """Has begun to cross, and waits."""
    before = entered(blocking)
    future = blocking.start(blocking.barrier.execute_barrier, *args, **options)
    until(lambda: bool(entered(blocking) - before))
    return future


def test_a_save_that_goes_on_beside_the_training(start_world: StartWorld) -> None:
    """The training asks whether it is done, and takes the result; what it raises is raised."""
    world = start_world()
    released = threading.Event()

    def publish(payloads: Mapping[int, bytes]) -> bytes:
        released.wait(BOUND_SECS)
        return b"+".join(payloads[rank] for rank in sorted(payloads))

    saving = [
        rank.start(rank.barrier.commit, publish, payload=b"%d" % number, name="save", step=3)
        for number, rank in enumerate(world.ranks)
    ]
    assert world.cross() == {0}
    assert not any(save.done() for save in saving)
    released.set()
    assert [save.result(BOUND_SECS) for save in saving] == [b"0+1"] * 2
    assert all(save.done() for save in saving)
    late = crossing(world.ranks[0], "late", timeout_secs=0.1)
    with pytest.raises(BarrierTimeoutError, match="'barrier/late' #0"):
        late.result(BOUND_SECS)


def test_any_coroutine_function(start_world: StartWorld) -> None:
    """It runs on the barrier's own loop, with what it was given; what is none is told."""
    world = start_world()

    async def save(number: int, *, step: int) -> tuple[str, int]:
        await anyio.sleep(0)
        barrier = world.ranks[number].barrier
        async with barrier.phase("files", step=step):
            await anyio.sleep(0)
        await barrier.execute_barrier("all", step=step)
        return threading.current_thread().name, number

    futures = [rank.start(save, number, step=2) for number, rank in enumerate(world.ranks)]
    told = [future.result(BOUND_SECS) for future in futures]
    assert [number for _, number in told] == [0, 1]
    assert {name for name, _ in told} <= threads()
    with pytest.raises(TypeError, match="call must be a coroutine function, not int"):
        world.ranks[0].start(3)  # type: ignore[arg-type]
    for wrong in (os.getpid, world.ranks[0].barrier.phase):
        with pytest.raises(TypeError, match="a coroutine function is needed"):
            world.ranks[0].start(wrong).result(BOUND_SECS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="surplus"):
        world.ranks[0].start(world.ranks[0].barrier.connect, surplus=1).result(  # type: ignore[call-arg]
            BOUND_SECS
        )


def test_a_call_that_would_wait_for_itself(start_world: StartWorld) -> None:
    """A coroutine, or a future's callback, that blocks the barrier's own loop is told so."""
    world = start_world()
    rank = world.ranks[0]
    raised: list[BaseException] = []

    async def block() -> None:
        rank.execute_barrier()

    def call_back(future: Future[Any]) -> None:
        try:
            rank.abort("from a callback")
        except BaseException as exc:
            raised.append(exc)

    with pytest.raises(RuntimeError, match=r"own event loop; await its barrier"):
        rank.start(block).result(BOUND_SECS)
    waiting = crossing(rank)
    waiting.add_done_callback(call_back)
    world.ranks[1].execute_barrier()
    waiting.result(BOUND_SECS)
    until(lambda: bool(raised))
    assert isinstance(raised[0], RuntimeError)

    async def close() -> None:
        rank.close()

    # Nor does closing wait there; the coroutine itself goes the way of all that are under way.
    closing = rank.start(close)
    concurrent.futures.wait([closing], BOUND_SECS)
    with pytest.raises(BarrierClosedError):
        rank.connect()
    broken(world.start(1), 0, LEFT)


@pytest.mark.parametrize("exception", [KeyboardInterrupt, LookupError])
def test_an_interrupted_wait_for_the_result(
    start_world: StartWorld, exception: type[BaseException]
) -> None:
    """It ends the waiting, and nothing else: the save goes on, and the barrier can be used."""
    world = start_world()
    saving = crossing(world.ranks[0], "save")
    with pytest.raises(exception), interrupted(lambda: True, exception):
        saving.result(BOUND_SECS)
    assert not saving.done()
    assert world.cross() == {0}
    world.ranks[1].execute_barrier(name="save")
    assert saving.result(BOUND_SECS).sequence == 0


def test_cancelling(start_world: StartWorld) -> None:
    """The phase breaks for the peers; whoever waits for the future wakes when that is done."""
    world = start_world(3)
    waiting = world.waiting(1, name="save")
    saving = crossing(world.ranks[0], "save")
    assert saving.cancel()
    assert saving.cancelled()
    assert saving.cancel()
    broken(waiting, 0, "its task was cancelled")
    broken(world.start(2, name="save"), 0, "its task was cancelled")
    assert concurrent.futures.wait([saving], GRACE_SECS).done == {saving}
    with pytest.raises(CancelledError):
        saving.result(0)
    assert world.cross(name="save") == {1}
    done = world.ranks[0].start(world.ranks[0].barrier.connect)
    done.result(BOUND_SECS)
    assert not done.cancel()


def test_nobody_is_released_by_what_was_cancelled(start_world: StartWorld) -> None:
    """Once `cancel` has returned, its arrival does not count (law 3)."""
    world = start_world(2)
    for _ in range(20):
        saving = crossing(world.ranks[0], "save")
        time.sleep(0.02)
        assert saving.cancel()
        with pytest.raises(BrokenBarrierError, match="its task was cancelled"):
            world.ranks[1].execute_barrier(name="save", timeout_secs=5)
        assert saving.cancelled()


def test_cancelling_what_has_not_begun(start_world: StartWorld) -> None:
    """It is never made."""
    world = start_world()
    rank = world.ranks[0]
    go_on = threading.Event()
    made = []

    async def block() -> None:
        while not go_on.is_set():
            os.sched_yield()

    async def make() -> None:
        made.append(1)

    blocking = rank.start(block)
    until(lambda: len(rank._portal._calls) == 1)
    cancelled = rank.start(make)
    assert cancelled.cancel()
    assert concurrent.futures.wait([cancelled], GRACE_SECS).done == {cancelled}
    go_on.set()
    blocking.result(BOUND_SECS)
    assert world.cross() == {0}
    assert not made


def test_what_cancels_itself_is_told(start_world: StartWorld) -> None:
    """Nobody waits for ever for a coroutine that ended as a cancelled one does."""
    world = start_world()

    async def cancel() -> None:
        raise anyio.get_cancelled_exc_class()

    with pytest.raises(CancelledError):
        world.ranks[0].start(cancel).result(BOUND_SECS)
    assert world.cross() == {0}


def test_closing_with_futures_pending(start_world: StartWorld) -> None:
    """What they wait in breaks for the peers, and each ends at once in the error that says why."""
    before = threads()
    world = start_world(3)
    rank = world.ranks[0]
    world.cross()
    waiting = world.waiting(1, name="save")
    saving = crossing(rank, "save")
    endless = rank.start(anyio.sleep_forever)
    told = threading.Event()
    endless.add_done_callback(lambda future: told.set())
    began = time.monotonic()
    rank.close()
    assert time.monotonic() - began < GRACE_SECS
    broken(waiting, 0, LEFT)
    for future in (saving, endless):
        with pytest.raises(BarrierClosedError):
            future.result(GRACE_SECS)
    assert told.is_set()
    with pytest.raises(BarrierClosedError):
        rank.start(anyio.sleep_forever)
    world.close()
    until(lambda: threads() <= before)


def test_closing_ends_though_a_coroutine_blocks_the_loop(
    start_world: StartWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is bounded, whatever was given to the loop."""
    monkeypatch.setattr("async_barriers._portal._CLOSED_SECS", 0.2)
    go_on = threading.Event()

    async def block() -> None:
        while not go_on.is_set():
            os.sched_yield()

    rank = start_world().ranks[0]
    blocked = rank.start(block)
    until(lambda: len(rank._portal._calls) == 1)
    rank.close()
    assert not blocked.done()
    go_on.set()
    blocked.result(BOUND_SECS)
    rank.close()


def test_leaving_a_block_with_a_future_pending(start_world: StartWorld) -> None:
    """Peers in its phase are told what was raised."""
    world = start_world(3)
    waiting = world.waiting(1)
    with pytest.raises(OSError, match="disk full"), world.ranks[0] as rank:  # noqa: PT012  # noqa: PT012
        saving = crossing(rank)
        raise OSError("disk full")
    broken(waiting, 0, f"{LEFT}: it raised OSError: disk full")
    with pytest.raises((BarrierClosedError, BrokenBarrierError)):
        saving.result(GRACE_SECS)
