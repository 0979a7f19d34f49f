"""Steps that a rank gave up or skipped, calls that are cancelled, and stores that half work."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
import pytest
from reports import TOLD_SECS, attempt, job, serve
from torch.distributed import HashStore
from worlds import Tasks, World, until

from async_barriers import BarrierTimeoutError, BrokenBarrierError, CommitRecord, StoreBarrier
from async_barriers.testing import FaultyStore

pytestmark = pytest.mark.anyio


class Fails(Exception):
    """What a body raises."""


async def gives_up_again(rank: StoreBarrier, how: str) -> None:
    """A rank that has left a commit in doubt wants nothing of its step any more."""
    if how == "aborts":
        assert await rank.abort("given up", "saved", step=5) is False
        return
    with pytest.raises(Fails):
        async with rank.committing(lambda payloads: b"", name="saved", step=5):
            raise Fails


@pytest.mark.parametrize("how", ["aborts", "has a body that fails"])
@pytest.mark.parametrize("when", ["while it is published", "after it was"])
async def test_what_was_published_is_not_broken_by_who_gave_it_up(how: str, when: str) -> None:
    """Whatever it does with that step, the others are released (laws 2 and 3)."""
    started, goes_on = anyio.Event(), anyio.Event()

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        started.set()
        await goes_on.wait()
        return b"published"

    async with job(serve(), 3) as ranks, Tasks() as tasks:
        calls = [
            tasks.start(partial(rank.commit, publish, name="saved", step=5, timeout_secs=secs))
            for rank, secs in zip(ranks, (20, 0.4, 20), strict=True)
        ]
        await started.wait()
        assert (await calls[1].raised(BarrierTimeoutError)).in_doubt
        if when.startswith("while"):
            await gives_up_again(ranks[1], how)
        goes_on.set()
        for call in (calls[0], calls[2]):
            assert await call.returned() == b"published"
        if when.startswith("after"):
            await gives_up_again(ranks[1], how)
        outcome = await ranks[1].outcome("saved", 5)
        assert isinstance(outcome, CommitRecord)
        assert outcome.result == b"published"
        for rank in ranks:
            assert isinstance(await attempt(rank.execute_barrier("saved", step=5)), Exception)


@pytest.mark.parametrize("backend", ["", "native"])
async def test_an_abort_is_cancelled_while_the_store_hangs(
    backend: str, anyio_backend_name: str
) -> None:
    """It returns at once, and goes on by itself (law 8)."""
    store = FaultyStore(HashStore())
    async with job(store, 2) as ranks:
        store.hang("compare_set")
        began = time.monotonic()
        if backend == "native" and anyio_backend_name == "asyncio":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(ranks[0].abort("because", "x"), 0.2)
        else:
            with anyio.move_on_after(0.2) as scope:
                await ranks[0].abort("because", "x")
            assert scope.cancelled_caught
        assert time.monotonic() < began + TOLD_SECS
        store.heal()
        error = await attempt(ranks[1].execute_barrier("x"))
        assert isinstance(error, BrokenBarrierError)
        assert (error.rank, error.reason) == (0, "because")


async def test_steps_that_one_rank_aborts_and_the_others_skip() -> None:
    """Their keys go when all are past them, not only when the job ends (law 10)."""
    server = serve()

    async def some(ranks: list[StoreBarrier], steps: range) -> None:
        for step in steps:
            if step % 2:
                async with anyio.create_task_group() as tasks:
                    for rank in ranks:
                        tasks.start_soon(partial(rank.execute_barrier, "x", step=step))
            else:
                assert await ranks[0].abort("no disk", "x", step=step)

    async with job(server, 3) as ranks:
        await some(ranks, range(20))
        await anyio.sleep(0.6)
        before = server.num_keys()
        await some(ranks, range(20, 320))

        async def no_more() -> bool:
            return server.num_keys() <= before

        await until(no_more)


@pytest.mark.parametrize("call", ["get", "check", "compare_set", "wait"])
async def test_a_store_one_of_whose_calls_fails(call: str) -> None:
    """Its ranks do not ask as fast as they can: the loop stays free, and deadlines hold."""
    store = FaultyStore(HashStore())
    async with job(store, 2) as ranks:
        store.fail(call)
        calls, late = store.calls, 0.0

        async def tick() -> None:
            nonlocal late
            while True:
                began = time.monotonic()
                await anyio.sleep(0.01)
                late = max(late, time.monotonic() - began - 0.01)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            with anyio.fail_after(1 + 1.9):
                await attempt(ranks[0].execute_barrier("x", timeout_secs=1))
            tasks.cancel_scope.cancel()
        assert store.calls - calls < 1_000
        assert late < 0.5
        store.heal()


async def test_a_step_that_another_call_is_breaking(memory: World) -> None:
    """Its rank may not come for it again, since it departs once, and the keys must not go before
    the last peer has read them."""
    rank, peer = await memory.barriers(2)
    latest, log = memory.membership().own.latest("x"), memory.keys("x", "s5").log
    telling, go_on = threading.Event(), threading.Event()

    def hook(operation: str, key: str) -> None:
        if operation == "compare_set" and key == latest and not telling.is_set():
            telling.set()
            go_on.wait(10)

    store: Any = memory.store
    store.data.hook = hook
    async with Tasks() as tasks:
        aborts = tasks.start(partial(rank.abort, "no disk", "x", step=5))
        await memory.call(telling.wait, 10)
        with pytest.raises(BrokenBarrierError, match="rank 0 came for step 5 when this step was"):
            await rank.execute_barrier("x", step=5, timeout_secs=5)
        assert await memory.read(log) is None
        go_on.set()
        assert await aborts.returned()
    with pytest.raises(BrokenBarrierError, match="no disk"):
        await peer.execute_barrier("x", step=5)
