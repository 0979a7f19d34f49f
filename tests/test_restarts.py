"""Ranks that come back, twice over, too late or to a store that is not there yet."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial

import anyio
import pytest
from stores import MemoryStore
from worlds import AnyBarrier, Tasks, World, free_port, gather, until

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BrokenBarrierError,
    StoreBarrier,
    TCPStoreBarrier,
)
from async_barriers import _connecting as connections
from async_barriers import _lane as lanes
from async_barriers import _membership as membership
from async_barriers._connection import Connection
from async_barriers._keys import Keys
from async_barriers._protocol import Forgotten, Turn
from async_barriers._worker import Promise

pytestmark = pytest.mark.anyio


def own(rank: int, port: int, **options: float) -> TCPStoreBarrier:
    """A rank of two over a store of their own."""
    return TCPStoreBarrier(
        rank,
        2,
        "p",
        tcpstore_port=port,
        master_address="127.0.0.1",
        timeout_secs=10,
        timeout_barrier_init_secs=options.get("init_secs", 10),
    )


async def told(*ranks: AnyBarrier) -> None:
    """Wait until ``ranks`` know that their generation is over."""

    async def all_know() -> bool:
        return not any(rank._session.stands for rank in ranks)

    await until(all_know)


async def test_the_later_of_two_with_the_same_rank_stays(shared: World) -> None:
    """The other one is refused for good, however often it calls (laws 1 and 11)."""
    ranks = await shared.barriers(2)
    newcomer = shared.barrier(0, 2)
    await newcomer.connect()
    await told(*ranks)
    for _ in range(3):
        with pytest.raises(BrokenBarrierError, match="took this one's place") as caught:
            await ranks[0].execute_barrier("x")
        assert (caught.value.name, caught.value.rank) == ("x", 0)
    results = await gather(partial(rank.execute_barrier, "x") for rank in (newcomer, ranks[1]))
    assert {result.sequence for result in results} == {0}


def test_a_life_that_was_followed_by_another_gives_way() -> None:
    """Also where that one came into a later generation, or is on its way."""
    store, keys = Connection(MemoryStore()), Keys("p")
    first = membership.join(store, keys, 0, 2, "first")
    assert first is not None
    assert membership.join(store, keys, 0, 2, "first", first) is first
    membership.join(store, keys, 1, 2, "peer")
    membership.join(store, keys, 1, 2, "peer again")
    membership.join(store, keys, 0, 2, "second")
    assert membership.join(store, keys, 0, 2, "first", first) is None
    assert first.successor(store) == 1
    third = membership.join(store, keys, 0, 2, "third")
    assert third is not None
    store.delete(keys.over(0))
    assert membership.join(store, keys, 0, 2, "first", first) is None


def test_a_letter_that_is_taken_out_in_the_instant_it_is_looked_at() -> None:
    """Whoever asks whether a member lives does not wait for its own letter (law 5)."""
    memory = MemoryStore()
    memory.set_timeout(timedelta(seconds=1))
    store, keys = Connection(memory), Keys("p")
    membership.join(store, keys, 0, 2, "member")
    looks = 0

    def take_out(operation: str, key: str) -> None:
        nonlocal looks
        if key == keys.mail(0, 0):
            looks += operation == "check"
            # What has been seen is gone when it is got, or looked for once more.
            if operation == "get" or looks == 2:
                memory.data.values.pop(key, None)

    memory.data.hook = take_out
    with pytest.raises(BarrierError, match="world size 1, but its peers with 2"):
        membership.join(store, keys, 0, 1, "stranger")


def test_a_claim_that_was_carried_out_late() -> None:
    """A rank that gave up on joining, and whose claim was made all the same, joins for real."""
    store, keys = Connection(MemoryStore()), Keys("p")
    first = membership.join(store, keys, 0, 2, "first")
    membership.join(store, keys, 1, 2, "peer")
    membership.join(store, keys, 1, 2, "peer again")
    # As by a connection that was cut and given up, when what was sent on it gets through.
    store.set(keys.member(0), json.dumps({"generation": 1, "token": "first"}).encode())
    second = membership.join(store, keys, 0, 2, "first", first)
    assert second is not None
    assert second.generation == 1
    assert membership.join(store, keys, 0, 2, "first", second) is second


def test_what_a_sleeper_may_come_to_is_not_swept() -> None:
    """What a generation leaves behind is deleted when every rank has joined a later one: a log
    without the lines of the others would tell who comes late another verdict (law 2)."""
    store, keys = Connection(MemoryStore()), Keys("p")
    log = keys.phase(0, "x", 0).logs[0]
    sleeper = membership.join(store, keys, 2, 3, "sleeper")
    membership.join(store, keys, 1, 3, "peer")
    store.set(log, b"decided")

    def others_restart(life: str) -> None:
        membership.join(store, keys, 0, 3, f"0, {life}")
        membership.join(store, keys, 1, 3, f"1, {life}")

    for life in "abcd":
        others_restart(life)
    assert store.read(log) == b"decided"
    assert membership.join(store, keys, 2, 3, "sleeper", sleeper) is not sleeper
    others_restart("e")
    assert store.read(log) is None


async def test_a_break_that_is_owed_to_a_phase_that_is_forgotten(memory: World) -> None:
    """It is given up; a rank is not kept from joining by it."""
    ranks = await memory.barriers(2, lanes=2)
    session = ranks[0]._session
    async with Tasks() as tasks:
        tasks.start(partial(ranks[0].execute_barrier, "x"))
        await memory.entered(0, name="x")
        await memory.call(memory.store.delete_key, memory.keys("x").logs[0])
        turn = session.open_turn("x")
        assert turn is not None
        session.start_afresh(turn)
        results = await gather(partial(rank.execute_barrier, "y") for rank in ranks)
        assert {result.sequence for result in results} == {0}
    # Nothing ends a wait in this store but what it waits for.
    await memory.call(memory.store.set, memory.keys("x").verdict, "r1\n")


def test_two_that_join_at_the_same_moment() -> None:
    """Of two claims of one rank the store takes one; the other one tries again."""
    data = MemoryStore()
    store, keys = Connection(data), Keys("p")

    def overtake(operation: str, key: str) -> None:
        if (operation, key) == ("compare_set", keys.member(0)):
            data.data.hook = None
            membership.join(store, keys, 0, 2, "quicker")

    data.data.hook = overtake
    slower = membership.join(store, keys, 0, 2, "slower")
    assert slower is not None
    assert slower.generation == 1
    assert b"slower" in (store.read(keys.member(0)) or b"")


def test_a_world_that_changes_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that comes back, larger or smaller, when nobody of the former size is left."""
    monkeypatch.setattr(membership, "_ANSWERS_SECS", 0.1)
    store, keys = Connection(MemoryStore()), Keys("p")
    for rank in range(3):
        membership.join(store, keys, rank, 3, f"old {rank}")
    joined = [membership.join(store, keys, rank, 2, f"new {rank}") for rank in range(2)]
    assert {one.generation for one in joined if one is not None} == {1}
    # A rank of the old size that comes back: the last word on the size is its own.
    back = membership.join(store, keys, 2, 3, "new 2")
    assert back is not None
    assert back.generation == 2
    # One that was no member before.
    grown = membership.join(store, keys, 3, 4, "new 3")
    assert grown is not None
    assert grown.generation == 3


async def test_a_host_that_is_built_anew() -> None:
    """Its peers keep their objects, and wait for it as if they had just begun (law 11)."""
    port = free_port()
    host, peer = own(0, port), own(1, port)
    await gather([host.execute_barrier, peer.execute_barrier])
    with anyio.fail_after(2):
        await host.aclose()
    again = own(0, port)
    async with Tasks() as tasks:
        waiting = tasks.start(peer.execute_barrier)
        await again.execute_barrier()
        assert (await waiting.returned()).sequence == 0
    with anyio.fail_after(2):
        await peer.aclose()
        await again.aclose()


async def test_a_body_that_fails_before_there_is_a_store() -> None:
    """Its turn is broken when the store can be reached: nobody takes the next for it (law 3)."""
    port = free_port()
    host, peer = own(0, port), own(1, port)
    with pytest.raises(OSError, match="disk full"):
        async with peer.phase("save"):
            raise OSError("disk full")
    with pytest.raises(BrokenBarrierError, match="disk full"):
        await host.execute_barrier("save")
    results = await gather(partial(rank.execute_barrier, "save") for rank in (host, peer))
    assert {result.sequence for result in results} == {1}
    await peer.aclose()
    await host.aclose()


async def test_a_phase_that_the_store_forgot(memory: World) -> None:
    """Whoever waits in it is in doubt, at the latest when a rank restarts (laws 2 and 5)."""
    ranks = await memory.barriers(2)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x"))
        await memory.entered(1, name="x")
        await memory.call(memory.store.delete_key, memory.keys(name="x").logs[0])
        await memory.barrier(0, 2).connect()
        error = await waiting.raised(BarrierConnectionError)
        assert error.in_doubt
        assert "the store no longer knows that this rank had entered" in str(error)
        # Lets go of the thread that waits for it, which only a TCPStore's could be made to.
        await memory.call(memory.store.set, memory.keys(name="x").verdict, "r0\n")


def test_an_empty_verdict_is_none() -> None:
    """A TCPStore answers so where the key is deleted just as it is read."""
    store = Connection(MemoryStore())
    keys = Keys("p").phase(0, "x", 0)
    store.set(keys.verdict, b"")
    with pytest.raises(Forgotten):
        Turn(keys, "x", 0, 0, 2).enter(store)


async def test_a_join_that_hangs_is_left_behind(memory: World) -> None:
    """One call that never returns does not end the barrier: a later attempt works."""
    for operation in ("clone", "check"):
        hung = threading.Event()
        hang = [True]

        def hook(
            called: str,
            key: str,
            wanted: str = operation,
            hung: threading.Event = hung,
            hang: list[bool] = hang,
        ) -> None:
            if called == wanted and hang:
                hang.pop()
                hung.wait()

        memory.store.data.hook = hook  # type: ignore[attr-defined]
        barrier = memory.barrier(0, 1, prefix=operation, timeout_barrier_init_secs=0.5)
        with pytest.raises(BarrierConnectionError):
            await barrier.execute_barrier()

        async def works(barrier: AnyBarrier = barrier) -> bool:
            with suppress(BarrierConnectionError):
                await barrier.execute_barrier()
                return True
            return False

        await until(works, within_secs=5)
        hung.set()
        assert (await barrier.execute_barrier()).sequence == 1
        memory.store.data.hook = None  # type: ignore[attr-defined]


async def test_closing_while_it_joins(memory: World) -> None:
    """The join ends in BarrierClosedError, and the rank is no longer on the roll (law 13)."""
    barrier = memory.barrier(0, 2)
    started, go_on = threading.Event(), threading.Event()

    def hook(operation: str, key: str) -> None:
        if key.endswith("/roll/0") and not started.is_set():
            started.set()
            go_on.wait()

    memory.store.data.hook = hook  # type: ignore[attr-defined]
    async with Tasks() as tasks:
        connecting = tasks.start(barrier.connect)

        async def under_way() -> bool:
            return started.is_set()

        await until(under_way)
        closing = tasks.start(barrier.aclose)

        async def closed() -> bool:
            return barrier._session.closing

        await until(closed)
        go_on.set()
        await connecting.raised(BarrierClosedError)
        await closing.returned()
    roll = int(await memory.read(Keys("tests").roll(0)) or b"0")
    assert (roll & ((1 << 31) - 1), roll >> 31) == (1, 1)
    with pytest.raises(BarrierClosedError):
        async with barrier.phase("late"):
            raise AssertionError("never entered")


async def test_closing_before_it_joins(memory: World) -> None:
    """A join that was only queued claims nothing any more."""
    barrier = memory.barrier(0, 2)
    started, go_on = threading.Event(), threading.Event()

    def hook(operation: str, key: str) -> None:
        if operation == "clone":
            started.set()
            go_on.wait()

    memory.store.data.hook = hook  # type: ignore[attr-defined]
    async with Tasks() as tasks:
        connecting = tasks.start(barrier.connect)

        async def under_way() -> bool:
            return started.is_set()

        await until(under_way)
        await barrier.aclose()
        go_on.set()
        await connecting.raised(BarrierClosedError)
    assert await memory.read(Keys("tests").member(0)) is None


async def test_closing_before_its_watcher_is_connected(memory: World) -> None:
    """It is counted out all the same, or a host would wait for it (law 13)."""
    clones: list[str] = []
    go_on = threading.Event()

    def hook(operation: str, key: str) -> None:
        if operation == "clone":
            clones.append(key)
            if len(clones) == 2:
                go_on.wait()

    await memory.read("anything")  # over a clone of its own
    memory.store.data.hook = hook  # type: ignore[attr-defined]
    barrier = memory.barrier(0, 2)
    await barrier.connect()
    await barrier.aclose()
    roll = int(await memory.read(Keys("tests").roll(0)) or b"0")
    assert (roll & ((1 << 31) - 1), roll >> 31) == (1, 1)
    go_on.set()


async def test_closing_while_it_joins_again(memory: World) -> None:
    """It keeps its place on the roll, which the farewell gives up (law 13)."""
    (barrier,) = await memory.barriers(1)
    session = barrier._session
    roll = await memory.read(Keys("tests").roll(0))

    def close(operation: str, key: str) -> None:
        if key == Keys("tests").member(0):
            session.turns.closing = True

    memory.store.data.hook = close  # type: ignore[attr-defined]
    session._standing = False
    for _ in range(2):
        with pytest.raises(BarrierClosedError):
            await memory.call(session.join().result, 5)
    memory.store.data.hook = None  # type: ignore[attr-defined]
    assert await memory.read(Keys("tests").roll(0)) == roll
    assert session.has_a_say


async def test_a_watcher_that_is_late_stops_nothing(memory: World) -> None:
    """What happens to a watch of a former generation is no matter of the present one."""
    ranks = await memory.barriers(2)
    session = ranks[1]._session
    former = session._membership
    await memory.barrier(0, 2).connect()
    await told(ranks[1])
    await ranks[1].connect()
    assert session._cease(former, session._lanes.watcher) == []
    assert session.stands
    # One that was left behind with its connection, in a generation that goes on.
    assert session._cease(session._membership, session._lanes.control) == []
    assert session.stands


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_one_loop_after_the_other(memory: World) -> None:
    """A barrier may move from one event loop to another, of another kind even."""
    barrier = StoreBarrier(memory.store, rank=0, world_size=1, prefix="moves")

    def run(backend: str) -> int:
        return anyio.run(barrier.execute_barrier, "x", backend=backend).sequence

    sequences = [await memory.call(run, backend) for backend in ("trio", "asyncio", "trio")]
    assert sequences == [0, 1, 2]
    await barrier.aclose()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_forked_child_leaves_its_parents_connections_alone(tcp: World) -> None:
    """Whatever the child does at its own exit."""
    ranks = await tcp.barriers(2)
    child = os.fork()
    if not child:
        from async_barriers import _worker

        _worker._at_exit()
        os.kill(os.getpid(), signal.SIGKILL)
    await tcp.call(os.waitpid, child, 0)
    results = await gather(partial(rank.execute_barrier, "x") for rank in ranks)
    assert len(results) == 2


async def test_openings_that_hang_do_not_hold_up_others(
    tcp: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight that wait for a server that does not answer; the ninth goes to another one (law 9)."""
    for _ in range(8):
        connections._opening.acquire()
    try:
        (barrier,) = await tcp.barriers(1)
    finally:
        for _ in range(8):
            connections._opening.release()
    assert barrier._session.stands


async def test_a_watcher_that_was_cut_off_watches_again(
    memory: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits without a deadline hears of a restart also over its second connection (law 11)."""
    ranks = await memory.barriers(2)
    session = ranks[1]._session
    watcher = session._lanes.watcher._worker._thread
    cut = threading.Event()

    def fail(operation: str, key: str) -> None:
        if cut.is_set() and threading.current_thread() is watcher:
            cut.clear()
            raise ConnectionResetError("cut off")

    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x", timeout_secs=None))
        await memory.entered(1, name="x")
        await anyio.sleep(1.05)  # a watch that fails sooner than that is not taken up again
        memory.store.data.hook = fail  # type: ignore[attr-defined]
        cut.set()
        # A bell that nobody rang for us: the watcher wakes, and its next call fails.
        await memory.call(memory.store.set, Keys("tests").mail(0, 1), b"over")
        await memory.barrier(0, 2).connect()
        await waiting.raised(BrokenBarrierError)
        assert not cut.is_set()


def test_a_lane_that_was_given_up_takes_no_call() -> None:
    """Neither one that is queued nor one that comes later."""
    store = MemoryStore()
    lane = lanes.Lane(lambda deadline, stop: Connection(store), 1.0)
    busy, go_on = threading.Event(), threading.Event()

    def occupy(connection: Connection) -> None:
        busy.set()
        go_on.wait()

    lane.submit(occupy)
    assert busy.wait(5)
    queued = lane.submit(lambda connection: connection.read("k"))
    lane.stop_waiting()
    lane.abandon()
    go_on.set()
    with pytest.raises(BarrierConnectionError, match="given up"):
        queued.result(5)
    lane.retire()
    with pytest.raises(BarrierConnectionError, match="given up"):
        lane.submit(lambda connection: connection.read("k")).result(5)
    lane.ended.result(5)
    lane.stop_waiting()


def test_a_call_that_may_be_made_twice() -> None:
    """A connection that turns out to be lost is replaced within the same call."""
    store = MemoryStore()
    lane = lanes.Lane(lambda deadline, stop: Connection(store), 1.0)
    assert lane.submit(lambda connection: connection.add("k", 1)).result(5) == 1

    def fail(operation: str, key: str) -> None:
        store.data.hook = None
        raise ConnectionResetError("an old connection")

    store.data.hook = fail
    with pytest.raises(BarrierConnectionError):
        lane.submit(lambda connection: connection.add("k", 1)).result(5)
    lane.submit(lambda connection: connection.read("k")).result(5)
    store.data.hook = fail
    assert lane.submit(lambda connection: connection.add("k", 1), again=True).result(5) == 2
    lane.retire()
    lane.ended.result(time.monotonic())


def test_what_a_lane_tells_when_it_cannot() -> None:
    """A call that fails is told as it failed; a lane that was retired has nothing left to do."""
    lane = lanes.Lane(lambda deadline, stop: Connection(MemoryStore()), 1.0)
    failed: list[BaseException] = []
    told = threading.Event()

    def fail(store: Connection, about: str) -> None:
        raise ValueError("not the store's fault")

    def has_failed(error: BaseException, about: str) -> None:
        failed.append(error)
        told.set()

    lane.post(fail, has_failed, "a call")
    assert told.wait(5)
    assert isinstance(failed[0], ValueError)
    assert lane.drained().wait(5)
    lane.retire()
    lane.ended.result(5)
    assert lane.drained().done()
    lane.post(fail, has_failed, "a call")
    assert isinstance(failed[1], BarrierConnectionError)
    with pytest.raises(TimeoutError, match="nothing was told"):
        Promise[None]().result(0.01)
