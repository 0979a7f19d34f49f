"""Stores that fail, hang or forget: every await ends in time, and nobody guesses a verdict."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial

import anyio
import pytest
from stores import MemoryStore
from worlds import Tasks, close, gather, library_threads_gone, share

from async_barriers import BarrierError, BarrierResult, BrokenBarrierError, StoreBarrier
from async_barriers.testing import FaultyStore

pytestmark = pytest.mark.anyio

DEADLINE_SECS = 0.5
# Law 5 allows one second; a little more for a machine that runs several worlds at once.
BOUND_SECS = DEADLINE_SECS + 1 + 0.3
WORLDS_AT_ONCE = 4


Scenario = Callable[[list[StoreBarrier]], list[Callable[[], Awaitable[object]]]]


async def publish(payloads: object) -> bytes:
    await anyio.sleep(0)
    return b"published"


def crossing(ranks: list[StoreBarrier]) -> list[Callable[[], Awaitable[object]]]:
    return [partial(rank.execute_barrier, "x", timeout_secs=DEADLINE_SECS) for rank in ranks]


def committing(ranks: list[StoreBarrier]) -> list[Callable[[], Awaitable[object]]]:
    return [
        partial(r.commit, publish, name="x", payload=b"p", timeout_secs=DEADLINE_SECS)
        for r in ranks
    ]


def aborting(ranks: list[StoreBarrier]) -> list[Callable[[], Awaitable[object]]]:
    return [
        partial(ranks[0].execute_barrier, "x", timeout_secs=DEADLINE_SECS),
        partial(ranks[1].abort, "no disk", "x"),
    ]


def missing(ranks: list[StoreBarrier]) -> list[Callable[[], Awaitable[object]]]:
    return [partial(ranks[0].execute_barrier, "x", timeout_secs=DEADLINE_SECS)]


async def run(scenario: Scenario, nth: int, *, hang: bool, lasting: bool) -> int:
    """One world of two ranks under one fault; how many calls the store had."""
    store = FaultyStore(MemoryStore())
    # A read that hung may find its key gone when it goes on; this ends it.
    store.set_timeout(timedelta(seconds=1))
    ranks = [
        StoreBarrier(store, rank=rank, world_size=2, timeout_barrier_init_secs=1.0)
        for rank in range(2)
    ]
    await gather(rank.connect for rank in ranks)
    connected = store.calls
    times = None if lasting else 1
    if hang:
        store.hang(after=nth, times=times)
    else:
        store.fail(after=nth, times=times)
    async with Tasks() as tasks:
        outcomes = [tasks.start(call) for call in scenario(ranks)]
        for outcome in outcomes:
            await outcome.ended.wait()
    verdicts = set()
    for outcome in outcomes:
        assert outcome.own_secs < BOUND_SECS, (nth, outcome.secs, outcome.error)
        if outcome.error is None:
            if isinstance(outcome.value, BarrierResult | bytes):
                verdicts.add("released")
        else:
            assert isinstance(outcome.error, BarrierError), (nth, outcome.error)
            if not outcome.error.in_doubt:
                verdicts.add("broken")
    assert len(verdicts) <= 1, (nth, [outcome.error for outcome in outcomes])
    calls = store.calls - connected
    store.heal()
    # The store is well again, and so is the barrier (law 10). Where one rank never used its
    # turn of "x", another name tells.
    again = await gather(partial(rank.execute_barrier, "y", timeout_secs=10.0) for rank in ranks)
    assert {result.sequence for result in again} == {0}
    await close(ranks)
    return calls


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("hang", [False, True], ids=["fails", "hangs"])
@pytest.mark.parametrize("scenario", [crossing, committing, aborting, missing])
async def test_a_fault_at_any_point(
    scenario: Scenario, hang: bool, lasting: bool, anyio_backend_name: str
) -> None:
    """Whichever call to the store fails or hangs, awaits end in time and verdicts agree."""
    calls = await run(scenario, 10**6, hang=hang, lasting=lasting)
    limit = anyio.Semaphore(WORLDS_AT_ONCE)

    async def in_turn(nth: int) -> None:
        async with limit:
            await run(scenario, nth, hang=hang, lasting=lasting)

    async with anyio.create_task_group() as tasks:
        for nth in share(range(calls + 2), anyio_backend_name):
            tasks.start_soon(in_turn, nth)
    await library_threads_gone()


async def test_closing_when_the_store_takes_nothing_any_more() -> None:
    """Nor gets the key that would wake the thread that waits: it ends all the same (law 8)."""
    store = FaultyStore(MemoryStore())
    barrier = StoreBarrier(store, rank=0, world_size=2)
    await barrier.connect()
    store.fail()
    await barrier.aclose()
    await library_threads_gone()


async def test_a_wait_that_misses_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a process which was stopped while it was written and deleted. And the store's
    words for a wait that has lasted as long as was asked are its own."""

    def misses(self: MemoryStore, keys: list[str], timeout: timedelta | None = None) -> None:
        assert timeout is not None
        time.sleep(timeout.total_seconds())
        raise TimeoutError("so late")

    monkeypatch.setattr("async_barriers._store.blocking_store._AT_A_TIME", timedelta(seconds=0.05))
    monkeypatch.setattr(MemoryStore, "wait", misses)
    store = MemoryStore()
    ranks = [StoreBarrier(store, rank=rank, world_size=2) for rank in range(2)]
    await gather([rank.execute_barrier for rank in ranks])
    await gather([partial(rank.commit, publish) for rank in ranks])
    async with Tasks() as tasks:
        waiting = tasks.start(ranks[0].execute_barrier)
        assert await ranks[1].abort("no more")
        await waiting.raised(BrokenBarrierError)
    assert not any(rank.statistics().reconnections for rank in ranks)
    await close(ranks)
