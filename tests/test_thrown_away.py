"""Coroutines that are thrown away: they can await nothing more, and what they owe goes on.

On asyncio alone can a coroutine be stepped by hand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
from torch.distributed import HashStore
from worlds import PREFIX, Tasks, World, drop, gather

from async_barriers import BarrierClosedError, BrokenBarrierError, CommitObserver, StoreBarrier

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]


async def enters(what: AbstractAsyncContextManager[Any], entered: Callable[[], object]) -> None:
    async with what:
        entered()
        await anyio.sleep_forever()


async def test_a_barrier_whose_body_is_thrown_away(tcp: World) -> None:
    """It closes all the same: its peers are told."""
    ranks = await tcp.barriers(2)
    when = asyncio.Event()
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x", timeout_secs=None))
        await tcp.entered(1, name="x")
        dropping = tasks.start(lambda: drop(enters(ranks[0], when.set), when))
        await dropping.returned()
        error = await waiting.raised(BrokenBarrierError)
    assert (error.rank, error.reason) == (0, "it closed its barrier")


async def test_a_barrier_that_is_thrown_away_as_it_connects(tcp: World) -> None:
    """Its rank can come again, once it has left."""
    barrier = tcp.barrier(0, 2)
    when = asyncio.Event()
    asyncio.get_running_loop().call_soon(when.set)
    await drop(enters(barrier, pytest.fail), when)
    await barrier.aclose()
    results = await gather(partial(rank.execute_barrier, "x") for rank in await tcp.barriers(2))
    assert [result.sequence for result in results] == [0, 0]


async def test_an_observer_that_is_thrown_away(tcp: World) -> None:
    """In its body, or as it connects; it is closed then."""
    when = asyncio.Event()
    observer = CommitObserver(tcp.store, prefix=PREFIX)
    await drop(enters(observer, when.set), when)
    with pytest.raises(BarrierClosedError):
        await observer.wait_for("c")
    when.clear()
    asyncio.get_running_loop().call_soon(when.set)
    observer = CommitObserver(tcp.store, prefix=PREFIX)
    await drop(enters(observer, pytest.fail), when)
    with pytest.raises(BarrierClosedError):
        await observer.wait_for("c")


async def test_a_leader_that_is_thrown_away_as_it_tells_of_its_commit(tcp: World) -> None:
    """It has published, and its peers learn that."""
    ranks = await tcp.barriers(2)
    when = asyncio.Event()

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        when.set()
        return b"published"

    async with Tasks() as tasks:
        following = tasks.start(partial(ranks[1].commit, publish, payload=b"1", name="c"))
        await tcp.entered(1, name="c")
        await drop(ranks[0].commit(publish, payload=b"0", name="c"), when)
        assert await following.returned() == b"published"


@pytest.mark.parametrize("closes", [False, True])
async def test_a_barrier_that_is_thrown_away_without_its_loop(closes: bool) -> None:
    """Nothing is raised; it leaves with the loop, or at exit."""
    found: list[BaseException] = []

    def use() -> None:
        barrier = StoreBarrier(HashStore(), rank=0, world_size=1, prefix=PREFIX)
        loop = asyncio.new_event_loop()
        entered = loop.create_future()
        body = enters(barrier, lambda: entered.set_result(None))
        task = loop.create_task(body)
        loop.run_until_complete(entered)
        if closes:
            loop.close()
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        try:
            body.close()
        except BaseException as exc:
            found.append(exc)
        loop.close()

    await anyio.to_thread.run_sync(use)
    assert not found
