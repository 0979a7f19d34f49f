"""What was committed: records, who watches them, and ranks that ask what became of a commit."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest
from cuttable import Way, Ways
from processes import StartJob
from stores import PlainStore
from torch.distributed import PrefixStore, TCPStore
from worlds import AnyBarrier, Tasks, World, close, crash, free_port, gather, until

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    CommitObserver,
    CommitRecord,
    StoreBarrier,
)
from async_barriers._observer import watch
from async_barriers._protocol import records
from async_barriers._protocol.keys import Keys
from async_barriers._protocol.store import Delete

pytestmark = pytest.mark.anyio

SOME_STORES = pytest.mark.parametrize(
    "shared", ["tcp", "prefix", "hash", "python", "tcp, threads"], indirect=True
)
PREFIX = "tests"


async def committed(
    ranks: Sequence[AnyBarrier], name: str, step: int | None = None, result: bytes = b"done",
    leader: int = 0,
) -> None:  # fmt: skip
    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        return result

    given: dict[str, Any] = {"name": name, "step": step, "leader": leader}
    await gather(partial(rank.commit, publish, **given) for rank in ranks)


def watching(world: World, prefix: str = PREFIX) -> CommitObserver:
    threads = world.kind == "tcp, threads"
    return CommitObserver(world.store, prefix=prefix, worker_threads=threads)


def record(name: str, sequence: int, result: bytes = b"done", leader: int = 0) -> CommitRecord:
    return CommitRecord(name, sequence, result, leader, 2)


async def keys_of(world: World) -> set[str]:
    keys: list[str] = await world.call(world.innermost.list_keys)
    return set(keys)


async def taken(iterator: AsyncIterator[CommitRecord], count: int) -> list[CommitRecord]:
    return [await anext(iterator) for _ in range(count)]


@SOME_STORES
async def test_before_while_and_after(shared: World) -> None:
    """An observer that comes before any rank is told of a commit as it comes; one that comes after
    it finds it; and one that follows has all from now on, in order. None of them writes a key."""
    async with watching(shared) as first, Tasks() as tasks:
        waits = tasks.start(partial(first.wait_for, "saved", timeout_secs=10))
        ranks = await shared.barriers(2)
        await committed(ranks, "other", 7)
        # Departures go out a quarter of a second later.
        await anyio.sleep(0.6)
        follows, of_one = first.records(), first.records("saved")
        before = await keys_of(shared)
        assert not waits.ended.is_set()
        async with watching(shared):
            assert await keys_of(shared) == before
        assert await keys_of(shared) == before
        await committed(ranks, "saved", 300, b"where it is")
        # It is woken, and does not find it by looking now and then.
        with anyio.fail_after(2):
            assert await waits.returned() == record("saved", 300, b"where it is")
        await committed(ranks, "saved", 400, b"x" * 5000)
        await committed(ranks, "counted")
        with anyio.fail_after(5):
            assert [(r.name, r.sequence) for r in await taken(follows, 3)] == [
                ("saved", 300), ("saved", 400), ("counted", 0),
            ]  # fmt: skip
            assert await taken(of_one, 2) == [
                record("saved", 300, b"where it is"), record("saved", 400, b"x" * 5000)
            ]  # fmt: skip
    async with watching(shared) as late:
        # The latest of that name.
        assert await late.wait_for("saved", timeout_secs=0) == record("saved", 400, b"x" * 5000)
        assert await late.wait_for("other") == record("other", 7)
        with pytest.raises(BarrierTimeoutError, match=r"'tests/never'.*3 .*|'tests/never'.*4 com"):
            await late.wait_for("never", timeout_secs=0.1)


@SOME_STORES
async def test_no_record_of_what_broke(shared: World) -> None:
    """A commit that broke, or whose publish failed, is on no record, and outcome says None."""
    ranks = await shared.barriers(2)

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        raise OSError("disk full")

    async def fails(rank: AnyBarrier) -> None:
        with suppress(OSError, BrokenBarrierError):
            await rank.commit(publish, name="x", step=1)

    await gather(partial(fails, rank) for rank in ranks)
    assert await ranks[0].abort("no disk", "x", step=2)
    await committed(ranks, "x", 3)
    assert [await ranks[1].outcome("x", step) for step in (1, 2)] == [None, None]
    assert await ranks[1].outcome("x", 3) == record("x", 3)
    async with watching(shared) as observer:
        assert observer._watch.log is not None
        assert len(observer._watch.log.records) == 1


@pytest.mark.parametrize("shared", ["tcp", "hash"], indirect=True)
@pytest.mark.parametrize("result", [b"small", b"l" * 2000])
async def test_the_last_64_are_kept(shared: World, result: bytes) -> None:
    """Two hundred commits, of a new name each, leave as many keys as eighty; the last 64 can be
    asked for, and no more."""
    ranks = await shared.barriers(2)
    counts = []
    for step in range(200):
        await committed(ranks, f"step-{step}", step, result)
        if step in (79, 199):
            await anyio.sleep(0.6)
            counts.append(len(await keys_of(shared)))
    assert counts[0] == counts[1]
    assert await ranks[1].outcome("step-135", 135) is None
    assert await ranks[1].outcome("step-136", 136) == record("step-136", 136, result)
    async with watching(shared) as observer:
        assert await observer.wait_for("step-199") == record("step-199", 199, result)


@pytest.mark.parametrize("shared", ["tcp", "hash"], indirect=True)
async def test_who_is_slow_is_told(shared: World) -> None:
    """An observer that falls behind hears of how much it missed, and goes on with what is there."""
    ranks = await shared.barriers(2)
    async with watching(shared) as observer:
        follows = observer.records()
        for step in range(70):
            await committed(ranks, "x", step)
        assert (await observer.wait_for("x", timeout_secs=5)).sequence == 69
        with pytest.raises(BarrierError, match="fell behind: 6 records are not kept"):
            await anext(follows)
        assert [r.sequence for r in await taken(follows, 64)] == list(range(6, 70))


@pytest.mark.parametrize("shared", ["tcp", "hash", "python"], indirect=True)
async def test_many_leaders_and_many_observers(shared: World) -> None:
    """Commits of several names and leaders at once are each on record once, in one order for all
    observers, of which none leaves a key."""
    ranks = await shared.barriers(2, lanes=4)
    async with Tasks() as tasks:
        observers = [watching(shared) for _ in range(8)]
        await gather(observer.connect for observer in observers)
        follow = [tasks.start(partial(taken, each.records(), 60)) for each in observers]
        await gather(partial(several, ranks, f"n{number}", number % 2) for number in range(4))
        orders = [[(r.name, r.sequence) for r in await each.returned()] for each in follow]
        assert sorted(orders[0]) == [(f"n{n}", step) for n in range(4) for step in range(15)]
        assert all(order == orders[0] for order in orders)
        await anyio.sleep(0.6)
        before = await keys_of(shared)
        await gather(observer.aclose for observer in observers)

    async def as_before() -> bool:
        return await keys_of(shared) <= before

    await until(as_before)


async def several(ranks: Sequence[AnyBarrier], name: str, leader: int) -> None:
    for step in range(15):
        await committed(ranks, name, step, leader=leader)


def kill(leader: AnyBarrier) -> None:
    """End it in the middle of its publish, so that it says no word any more."""
    leader._session._over = True
    crash(leader)


# -- Ranks in doubt --------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["tcp", "hash"], indirect=True)
async def test_a_leader_that_dies_inside_publish(
    shared: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has said what became of it: None, and the log says why."""
    caplog.set_level(logging.INFO, "async_barriers")
    ranks = await shared.barriers(2)
    started = anyio.Event()

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        started.set()
        await anyio.sleep_forever()
        return b""

    async with Tasks() as tasks:
        tasks.start(partial(ranks[0].commit, publish, name="x", step=1))
        waits = tasks.start(partial(ranks[1].commit, publish, name="x", step=1, timeout_secs=0.5))
        await started.wait()
        kill(ranks[0])
        error = await waits.raised(BarrierTimeoutError)
    assert error.in_doubt
    assert await ranks[1].outcome("x", 1) is None
    assert "barrier 'tests/x' #1: no record that this commit was released" in caplog.text
    # In its next life it commits the same step, and that is on record.
    again = [shared.barrier(0, 2), ranks[1]]
    await again[0].connect()

    async def told() -> bool:
        return not ranks[1]._session.stands

    await until(told)
    await committed(again, "x", 1)
    assert await ranks[1].outcome("x", 1) == record("x", 1)


@pytest.mark.processes
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_leader_that_is_killed(start_job: StartJob) -> None:
    """As a process: nothing is known of a commit that it was publishing, and the one before is on
    record, for its next life, too."""
    job = start_job(2, own_store=False)
    before = {"name": "x", "step": 1, "publish": "", "payload": "p"}
    for call in job.starts(range(2), "commit", **before):
        call.answer()
    killed = {**before, "step": 2, "publish": "hang"}
    job.ranks[0].start("commit", **killed)
    waits = job.ranks[1].start("commit", **killed, timeout_secs=1.0)
    assert job.ranks[0].event()["event"] == "publishing"
    assert job.ranks[0].event()["event"] == "publishing"
    job.ranks[0].strike(signal.SIGKILL)
    assert waits.error("BarrierTimeoutError")["in_doubt"]
    asked = {step: job.ranks[1].do("outcome", name="x", sequence=step) for step in (1, 2)}
    assert asked[2]["record"] is None
    found = asked[1]["record"]
    assert found == {"name": "x", "sequence": 1, "result": "p+p", "leader": 0, "world_size": 2}
    job.come_back(0)
    assert job.ranks[0].do("outcome", name="x", sequence=1)["record"] == found


async def test_a_leader_that_dies_between_its_record_and_its_word(memory: World) -> None:
    """It has published, and was to say no other word: the record says so to those in doubt."""
    assert isinstance(memory.store, PlainStore)
    ranks = await memory.barriers(2)

    data, killed = memory.store.data, threading.Event()

    def dies(operation: str, key: str) -> None:
        if operation == "set" and key.endswith("/word"):
            data.hook = None
            killed.wait()
            raise ConnectionResetError("it was killed")

    async with Tasks() as tasks:
        data.hook = dies

        async def publish(payloads: Mapping[int, bytes]) -> bytes:
            return b"done"

        leads = tasks.start(partial(ranks[0].commit, publish, name="x", step=1))
        waits = tasks.start(partial(ranks[1].commit, publish, name="x", step=1, timeout_secs=0.5))

        async def on_record() -> bool:
            return await memory.read(Keys(PREFIX).commits) is not None

        await until(on_record)
        kill(ranks[0])
        killed.set()
        error = await waits.raised(BarrierTimeoutError)
        leads.scope.cancel()
    assert error.in_doubt
    assert await ranks[1].outcome("x", 1) == record("x", 1)


@pytest.mark.parametrize("lost", ["append", "number", "word"])
async def test_a_leader_that_says_it_again(memory: World, lost: str) -> None:
    """Where its connection is lost in between, it repeats what it said, and one record is there."""
    assert isinstance(memory.store, PlainStore)
    data: Any = memory.store.data
    ranks = await memory.barriers(2)
    await committed(ranks, "x", 0)
    ends = {"append": "/commits", "number": "/commits/number", "word": "/word"}[lost]

    def lose(operation: str, key: str) -> None:
        if key.endswith(ends) and operation in ("compare_set", "add", "set"):
            data.hook = None
            raise ConnectionResetError("cut")

    async with watching(memory) as observer:
        follows = observer.records()
        data.hook = lose
        await committed(ranks, "x", 1)
        assert data.hook is None
        await committed(ranks, "x", 2)
        with anyio.fail_after(5):
            assert [r.sequence for r in await taken(follows, 2)] == [1, 2]
    log = records.decode(await memory.read(Keys(PREFIX).commits))
    assert [each.sequence for each in log.records.values()] == [0, 1, 2]
    assert log.end == 3


def test_what_is_there_twice_is_one_record() -> None:
    """A record that came late on a connection that was lost; rubbish is passed over."""
    one, two = (records.Record("g", "x", f"s{n}", 0, 2, b"r") for n in range(2))
    value = b"@5\n" + b"".join(map(records.encode, (one, two, one))) + b"rubbish\n[1, 2]\n"
    log = records.decode(value)
    assert (log.begin, log.end, list(log.records.items())) == (5, 10, [(5, one), (6, two)])


@pytest.mark.parametrize("shared", ["tcp", "hash"], indirect=True)
async def test_counts_of_another_generation_mean_nothing(
    shared: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A commit that was counted is known to those who took part in it, in its own generation; one
    that has a step is known to all."""
    caplog.set_level(logging.INFO, "async_barriers")
    ranks = await shared.barriers(2)
    await committed(ranks, "counted")
    await committed(ranks, "stepped", 5)
    assert await ranks[1].outcome("counted", 0) == record("counted", 0)
    crash(ranks[0])
    ranks[0] = shared.barrier(0, 2)
    await gather(rank.connect for rank in ranks)
    assert await ranks[0].outcome("counted", 0) is None
    assert "took no part in it" in caplog.text
    assert await ranks[0].outcome("stepped", 5) == record("stepped", 5)
    # The same count in the next generation, which breaks: it is not taken for the one before.
    async with Tasks() as tasks:
        waits = tasks.start(partial(ranks[1].commit, bytes, name="counted"))
        await shared.entered(1, name="counted")
        await ranks[0].abort("no disk", "counted")
        await waits.raised(BrokenBarrierError)
    assert await ranks[1].outcome("counted", 0) is None


# -- Connections that are lost ---------------------------------------------------------------------


@pytest.fixture
def ways() -> Iterator[Ways]:
    made = Ways()
    yield made
    made.close()


def through(way: Way) -> TCPStore:
    return TCPStore("127.0.0.1", way.port, wait_for_workers=False)


async def test_a_rank_whose_connection_is_cut(tcp: World, ways: Ways) -> None:
    """It is in doubt, and learns what became of the commit when the store answers again."""
    assert isinstance(tcp.store, TCPStore)
    way = ways.to(tcp.store.port)
    leads = tcp.barrier(0, 2)
    far = StoreBarrier(
        await tcp.call(through, way), rank=1, world_size=2, prefix=PREFIX,
        timeout_barrier_init_secs=5,
    )  # fmt: skip
    started, go_on = anyio.Event(), anyio.Event()

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        started.set()
        await go_on.wait()
        return b"done"

    async with Tasks() as tasks:
        leading = tasks.start(partial(leads.commit, publish, name="x", step=1))
        waits = tasks.start(partial(far.commit, publish, name="x", step=1, timeout_secs=2))
        await started.wait()
        way.cut("reset")
        error = await waits.raised(BarrierError)
        assert error.in_doubt
        asks = tasks.start(partial(far.outcome, "x", 1))
        go_on.set()
        assert await leading.returned() == b"done"
        way.heal()
        assert await asks.returned() == record("x", 1)
    assert far.statistics().broken_by["connection"] + far.statistics().broken_by["timeout"] == 1
    await far.aclose()


async def test_an_observer_whose_connection_is_cut(tcp: World, ways: Ways) -> None:
    """One that follows is told, and may go on where it was; one that waits connects again."""
    assert isinstance(tcp.store, TCPStore)
    way = ways.to(tcp.store.port)
    ranks = await tcp.barriers(2)
    async with CommitObserver(await tcp.call(through, way), prefix=PREFIX) as far, Tasks() as tasks:
        follows = far.records()
        next_one = tasks.start(partial(anext, follows))
        waits = tasks.start(partial(far.wait_for, "x", timeout_secs=10))
        await committed(ranks, "y", 0)
        assert await next_one.returned() == record("y", 0)
        way.cut("reset")
        with pytest.raises(BarrierConnectionError, match="observer of barrier 'tests'"):
            await anext(follows)
        await committed(ranks, "y", 1)
        await committed(ranks, "x", 2)
        way.heal()
        assert await waits.returned() == record("x", 2)
        assert [r.sequence for r in await taken(follows, 2)] == [1, 2]


async def test_a_store_that_is_built_anew() -> None:
    """What was in it is gone: who waits connects again, and what comes then is new to those who
    follow."""
    port = free_port()
    servers = [await anyio.to_thread.run_sync(host, port)]
    client = await anyio.to_thread.run_sync(partial(TCPStore, "127.0.0.1", port, **CLIENT))
    async with CommitObserver(client) as observer, Tasks() as tasks:
        follows = observer.records()
        await meet(port, "x", 1)
        assert await anext(follows) == record("x", 1)
        waits = tasks.start(partial(observer.wait_for, "later", timeout_secs=15))
        servers.clear()
        with anyio.fail_after(5), pytest.raises(BarrierConnectionError):
            await anext(follows)
        await anyio.sleep(0.3)
        servers.append(await anyio.to_thread.run_sync(host, port))
        await meet(port, "later", 2)
        assert await waits.returned() == record("later", 2)
        assert await anext(follows) == record("later", 2)
        servers.clear()
        began = anyio.current_time()
        with pytest.raises(BarrierConnectionError, match="had no answer from the store"):
            await observer.wait_for("never", timeout_secs=0.7)
        assert anyio.current_time() - began < 1.7


CLIENT: dict[str, Any] = {"is_master": False, "wait_for_workers": False}


def host(port: int) -> TCPStore:
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


async def meet(port: int, name: str, step: int) -> None:
    store = await anyio.to_thread.run_sync(partial(TCPStore, "127.0.0.1", port, **CLIENT))
    ranks = [StoreBarrier(store, rank=rank, world_size=2) for rank in range(2)]
    await committed(ranks, name, step)
    await close(ranks)


async def test_a_leader_that_was_killed_before_it_woke_anybody(
    tcp: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record is found when the observer looks, which it does now and then."""
    monkeypatch.setattr(watch, "_LOOK_SECS", 0.2)
    ranks = await tcp.barriers(2)
    async with watching(tcp) as observer:
        with monkeypatch.context() as patch:
            patch.setattr(records, "_news", lambda keys, count: Delete(["nothing"]))
            await committed(ranks, "x", 1)
            assert await observer.wait_for("x", timeout_secs=5) == record("x", 1)
        follows = observer.records()
        await committed(ranks, "x", 2)
        with anyio.fail_after(5):
            assert await anext(follows) == record("x", 2)


async def test_an_observer_that_is_overtaken(memory: World) -> None:
    """So many commits come between its look and its wait that what it would wait for is gone again:
    it looks once more."""
    data: Any = memory.store.data  # type: ignore[attr-defined]
    ranks = await memory.barriers(2)
    await committed(ranks, "x", 0)
    parked, go_on = threading.Event(), threading.Event()
    looks: list[str] = []

    def park(operation: str, key: str) -> None:
        if operation == "check" and key == Keys(PREFIX).commits_number:
            looks.append(key)
            if len(looks) == 2:
                parked.set()
                go_on.wait()

    data.hook = park
    async with watching(memory) as observer, Tasks() as tasks:
        waits = tasks.start(partial(observer.wait_for, "last", timeout_secs=10))
        await anyio.to_thread.run_sync(parked.wait)
        for step in range(1, 12):
            await committed(ranks, "x", step)
        data.hook = None
        go_on.set()
        await committed(ranks, "last", 1)
        with anyio.fail_after(2):
            assert await waits.returned() == record("last", 1)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nobody_polls(tcp: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An observer that waits says nothing; and a commit is no message longer for being recorded."""
    ranks = await tcp.barriers(2)
    for step in range(2):
        await committed(ranks, "x", step)
    sent: list[int] = []
    send = socket.socket.send

    def sending(sock: socket.socket, *args: Any) -> int:
        sent.append(sock.fileno())
        return send(sock, *args)

    async with watching(tcp) as observer, Tasks() as tasks:
        await anyio.sleep(0.6)
        monkeypatch.setattr(socket.socket, "send", sending)
        waits = tasks.start(partial(observer.wait_for, "y"))
        # One look, and nothing after it.
        await anyio.sleep(0.5)
        assert len(sent) == 1
        watched = {*sent}
        sent.clear()
        await committed(ranks, "y", 2)
        # Each enters; one wakes the leader if it was last; the leader takes what all brought, and
        # says its word; the others read it.
        ours = [fd for fd in sent if fd not in watched]
        assert len(ours) <= 6
        await waits.returned()


# -- Being used, and the end -----------------------------------------------------------------------


async def test_calls_end_with_the_observer(tcp: World) -> None:
    """Those under way and those to come say that it is closed."""
    observer = watching(tcp)
    async with Tasks() as tasks:
        waits = tasks.start(partial(observer.wait_for, "x"))
        follows = tasks.start(partial(anext, observer.records()))
        await anyio.sleep(0.1)
        await observer.aclose()
        await observer.aclose()
        for outcome in (waits, follows):
            error = await outcome.raised(BarrierClosedError)
            assert "the observer of barrier 'tests' is closed" in str(error)
    with pytest.raises(BarrierClosedError):
        await observer.wait_for("x")


async def test_cancelled_waiting_can_be_begun_again(tcp: World) -> None:
    """Nothing is lost: what comes meanwhile is there."""
    ranks = await tcp.barriers(2)
    async with watching(tcp) as observer:
        follows = observer.records()
        with anyio.move_on_after(0.1) as scope:
            await anext(follows)
        assert scope.cancelled_caught
        with anyio.move_on_after(0.1):
            await observer.wait_for("x")
        await committed(ranks, "x", 1)
        with anyio.fail_after(5):
            assert await anext(follows) == record("x", 1) == await observer.wait_for("x")


async def test_an_observer_by_the_environment(tcp: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs an address alone, and hosts nothing."""
    assert isinstance(tcp.store, TCPStore)
    ranks = await tcp.barriers(2)
    await committed(ranks, "x", 1)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT are not set"):
        CommitObserver.from_env()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", f"{tcp.store.port}")
    async with CommitObserver.from_env(prefix=PREFIX) as observer:
        assert await observer.wait_for("x") == record("x", 1)
        assert repr(observer) == "<CommitObserver 'tests'>"


async def test_the_ranks_namespace_is_found(tcp: World) -> None:
    """Wrapped in the same PrefixStores it finds the ranks' keys, in others it does not."""
    ranks = [
        StoreBarrier(PrefixStore("group", tcp.store), rank=rank, world_size=2) for rank in range(2)
    ]
    async with CommitObserver(PrefixStore("group", tcp.store)) as observer, Tasks() as tasks:
        waits = tasks.start(partial(observer.wait_for, "x", timeout_secs=10))
        await committed(ranks, "x", 1)
        assert await waits.returned() == record("x", 1)
    async with CommitObserver(tcp.store) as elsewhere:
        with pytest.raises(BarrierTimeoutError):
            await elsewhere.wait_for("x", timeout_secs=0)
    await close(ranks)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda store: CommitObserver("localhost"), TypeError),  # type: ignore[arg-type]
        (lambda store: CommitObserver(store, prefix=""), ValueError),
        (lambda store: CommitObserver(store).records(3), TypeError),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(wrong: Callable[[Any], object], error: type[Exception]) -> None:
    """Said at once, before anything is connected to."""
    with pytest.raises(error):
        wrong(PlainStore())
