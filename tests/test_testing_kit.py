"""The kit for tests of code that uses barriers."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import pytest
from processes import until
from stores import PlainStore, keys_of
from torch.distributed import HashStore, PrefixStore, Store, TCPStore
from worlds import Tasks, gather, library_threads_gone

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierTimeoutError,
    BrokenBarrierError,
    StoreBarrier,
)
from async_barriers._store.copies import copy_of
from async_barriers.testing import FaultyStore, local_barriers

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["hash", "tcp"])
def faulty(request: pytest.FixtureRequest) -> FaultyStore:
    store: Store = HashStore()
    if request.param == "tcp":
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return FaultyStore(store)


async def test_a_world_in_one_process() -> None:
    """One connected barrier for each rank; options reach them; leaving closes them."""
    async with local_barriers(3, prefix="p", timeout_secs=0.2) as barriers:
        results = await gather(barrier.execute_barrier for barrier in barriers)
        assert [result.sequence for result in results] == [0, 0, 0]
        with pytest.raises(BarrierTimeoutError) as caught:
            await barriers[1].execute_barrier()
        assert caught.value.missing_ranks == (0, 2)
        assert caught.value.timeout_secs == 0.2
    with pytest.raises(BarrierClosedError):
        await barriers[2].execute_barrier()
    await library_threads_gone()


async def test_leaving_breaks_what_is_awaited() -> None:
    """An error in the body comes out as it is, and no thread stays."""
    async with Tasks() as tasks:
        with pytest.raises(LookupError, match="mine"):  # noqa: PT012  (leaving is the point)
            async with local_barriers(2) as barriers:
                waiting = tasks.start(barriers[0].execute_barrier)
                await anyio.sleep(0)
                raise LookupError("mine")
        assert (await waiting.raised(Exception)).__class__ in (
            BarrierClosedError,
            BrokenBarrierError,
        )
    await library_threads_gone()


async def test_a_world_that_cannot_be() -> None:
    """Bad arguments and a dead store are refused on entering."""
    with pytest.raises(ValueError, match="timeout_secs is -1; it must be positive"):
        async with local_barriers(1, timeout_secs=-1):
            pass
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"world size is {size}; it must be at least 1"):
            async with local_barriers(size):
                pass
    store = FaultyStore(HashStore())
    store.fail("check")
    with pytest.raises(BarrierConnectionError):
        async with local_barriers(2, store=store, timeout_barrier_init_secs=0.5):
            pass


def test_faults_reach_the_clones(faulty: FaultyStore) -> None:
    """What a store is told its clones do, until it is told otherwise."""
    clone = faulty.clone()
    clone.fail("add", OSError("mine"), times=2)
    for store in (faulty, clone):
        with pytest.raises(OSError, match="mine"):
            store.add("n", 1)
    assert clone.add("n", 1) == 1
    faulty.fail(key="n", after=1)
    assert clone.add("n", 1) == 2
    for call in (clone.get, clone.delete_key, lambda key: clone.check([key])):
        with pytest.raises(ConnectionResetError, match="told to fail"):
            call("n")
    clone.set("other", "1")
    faulty.heal()
    assert clone.get("n") == b"2"
    assert faulty.calls == 10
    with pytest.raises(ValueError, match="no call 'ad'"):
        faulty.hang("ad")


def test_calls_that_hang_or_are_late(faulty: FaultyStore) -> None:
    """A call that hangs goes on when the store is healed; a late one after its delay."""
    faulty.delay("get", 0.1, times=1)
    faulty.set("k", "v")
    began = time.monotonic()
    assert faulty.get("k") == faulty.get("k") == b"v"
    assert time.monotonic() - began >= 0.1
    faulty.hang("set")
    with ThreadPoolExecutor(1) as pool:
        hung = pool.submit(faulty.clone().set, "k", "w")
        until(lambda: faulty.hanging == 1)
        assert faulty.get("k") == b"v"
        faulty.heal()
        hung.result(10)
    assert faulty.hanging == 0
    assert faulty.get("k") == b"w"


def test_it_is_a_store(faulty: FaultyStore) -> None:
    """Every call goes to the store within, a PrefixStore's too."""
    calls: Any = faulty
    calls.set_timeout(timedelta(seconds=7))
    assert calls.timeout == timedelta(seconds=7)
    calls.multi_set(["a", "b"], ["1", "2"])
    assert calls.multi_get(["a", "b"]) == [b"1", b"2"]
    assert calls.compare_set("a", "1", "3") == b"3"
    calls.append("a", "4")
    calls.wait(["a"])
    calls.wait(["b"], timedelta(seconds=1))
    assert calls.get("a") == b"34"
    keys = calls.num_keys()
    prefixed = PrefixStore("job", faulty)
    prefixed.set("c", "5")
    assert (prefixed.get("c"), calls.get("job/c")) == (b"5", b"5")
    assert prefixed.num_keys() == keys + 1
    assert prefixed.delete_key("c")
    assert sorted(key.strip("/") for key in keys_of(calls) if "init" not in key) == ["a", "b"]


async def test_a_store_that_has_no_clones_is_shared() -> None:
    """As with the store within, a barrier then talks through the one that it was given."""
    store = FaultyStore(PlainStore())
    async with StoreBarrier(store, rank=0, world_size=1) as barrier:
        await barrier.execute_barrier()
        store.fail()
        with pytest.raises(BarrierConnectionError):
            await barrier.execute_barrier()
        store.heal()
        await barrier.execute_barrier()


async def test_barriers_over_faults() -> None:
    """A barrier over such a store bounds its waiting, and is well again when the store is."""
    store = FaultyStore(HashStore())
    async with local_barriers(2, store=store) as barriers:
        store.hang("wait", times=1)
        async with Tasks() as tasks:
            first = tasks.start(partial(barriers[0].execute_barrier, timeout_secs=0.3))
            await first.raised(BarrierTimeoutError)
            with pytest.raises(BarrierTimeoutError):
                await barriers[1].execute_barrier()
        store.heal()
        await gather(barrier.execute_barrier for barrier in barriers)


def test_a_prefix_around_a_store_in_python() -> None:
    """It is used as it is: torch clones such a pair, and loses what is written in Python."""
    store = PrefixStore("x", FaultyStore(HashStore()))
    assert copy_of(store) is store
