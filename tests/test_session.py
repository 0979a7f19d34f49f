"""A rank's presence at a store: reports, dropped coroutines, dropped barriers, many names."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import anyio
import pytest
from processes import NO_HOST_NAME
from stores import MemoryStore
from worlds import AnyBarrier, Outcome, Tasks, World, gather, library_threads, until

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BrokenBarrierError,
    StoreBarrier,
)
from async_barriers import _protocol as protocol
from async_barriers._connection import Connection
from async_barriers._keys import Keys
from async_barriers._protocol import Turn
from async_barriers._verdict import Gathered
from async_barriers._worker import Promise

# What a busy machine may add to a bound that a law sets.
LOAD_SECS = 0.3
PHASE = Keys("tests").phase(0, "x", 0)


class Hook:
    """Faults of a store in memory, to be switched on and off."""

    def __init__(self, world: World, call: Callable[[str, str], object]) -> None:
        self._data = world.store.data  # type: ignore[attr-defined]
        self._call = call

    def on(self) -> None:
        self._data.hook = self._call

    def off(self) -> None:
        self._data.hook = None


def turn_of(rank: int, world_size: int = 3) -> Turn:
    return Turn(PHASE, "x", 0, rank, world_size)


def threads_of(barrier: AnyBarrier) -> list[threading.Thread]:
    threads = [lane._worker._thread for lane in barrier._session._lanes.all]
    return [thread for thread in threads if thread is not None]


def arrive(turn: Turn, store: Connection, pool: ThreadPoolExecutor) -> None:
    """Enter, in a thread that waits for the verdict, and return when that has arrived."""
    before = int(store.read(PHASE.count) or b"0")
    pool.submit(turn.enter, store)
    while int(store.read(PHASE.count) or b"0") == before:
        pass
    while not turn._arrived_at:
        pass


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worlds of three are as large as those in which not every rank may read all arrivals."""
    monkeypatch.setattr(protocol, "_MEETING", 2)


@pytest.mark.usefixtures("large")
def test_one_rank_reads_for_all() -> None:
    """Of many that report in one period, one reads the log; the others read what it found."""
    store = MemoryStore()
    connection = Connection(store)
    reads: list[str] = []
    with ThreadPoolExecutor(3) as pool:
        turns = [turn_of(rank) for rank in range(2)]
        for turn in turns:
            arrive(turn, connection, pool)
        store.data.hook = lambda operation, key: reads.append(f"{operation} {key}")
        assert [turn.survey(connection) for turn in turns] == [(2, (2,))] * 2
        assert sum(read == f"get {PHASE.logs[0]}" for read in reads) == 1
        # The next period needs a new reading, and again one is enough.
        assert [turn.survey(connection) for turn in turns] == [(2, (2,))] * 2
        assert sum(read == f"get {PHASE.logs[0]}" for read in reads) == 2
        store.data.hook = None
        turn_of(2).enter(connection)


@pytest.mark.usefixtures("large")
def test_a_summary_that_lacks_me_is_not_mine() -> None:
    """A rank that entered after the last reading does not report itself as missing."""
    connection = Connection(MemoryStore())
    with ThreadPoolExecutor(3) as pool:
        first, second = turn_of(0), turn_of(1)
        arrive(first, connection, pool)
        assert first.survey(connection) == (1, (1, 2))
        arrive(second, connection, pool)
        assert second.survey(connection) == (2, (2,))
        turn_of(2).enter(connection)


@pytest.mark.usefixtures("large")
def test_a_reader_that_died_is_not_waited_for() -> None:
    """A claim to read that nobody makes good costs the others a moment, not their report."""
    connection = Connection(MemoryStore())
    with ThreadPoolExecutor(3) as pool:
        turn = turn_of(0)
        arrive(turn, connection, pool)
        connection.set(PHASE.summary, b"1 by 1")
        assert turn.survey(connection) == (1, (1, 2))
        for rank in (1, 2):
            pool.submit(turn_of(rank).enter, connection)


@pytest.mark.usefixtures("large")
def test_two_that_claim_the_reading() -> None:
    """The one that loses the claim takes what the other one found."""
    store = MemoryStore()
    connection = Connection(store)
    with ThreadPoolExecutor(3) as pool:
        turns = [turn_of(rank) for rank in range(2)]
        for turn in turns:
            arrive(turn, connection, pool)

        def overtake(operation: str, key: str) -> None:
            if (operation, key) == ("compare_set", PHASE.summary):
                store.data.hook = None
                assert turns[1].survey(connection) == (2, (2,))

        store.data.hook = overtake
        assert turns[0].survey(connection) == (2, (2,))
        assert (connection.read(PHASE.summary) or b"").startswith(b"1:")
        turn_of(2).enter(connection)


@pytest.mark.anyio
async def test_nobody_reports_a_phase_that_is_over(memory: World) -> None:
    """A report that comes as the verdict comes is not made."""
    ranks = await memory.barriers(2)
    session = ranks[0]._session
    turn = session.take_turn("x")
    assert turn is not None
    await ranks[1].abort("no", "x")
    session.turns.enter(turn)

    async def departed() -> bool:
        return turn._departed

    await until(departed)
    future = session.turns.survey(turn)

    async def done() -> bool:
        return future.done()

    await until(done)
    assert future.result() is None
    session.turns.forget(turn)


@pytest.mark.anyio
async def test_sixty_four_names_at_once(tcp: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In opposite orders by two ranks, while the event loop waits for no thread (laws 7, 9)."""
    names = [f"n{number}" for number in range(64)]
    ranks = await tcp.barriers(2, timeout_secs=30.0)
    starters: list[int] = []
    start = threading.Thread.start

    def record(thread: threading.Thread) -> None:
        starters.append(threading.get_ident())
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", record)
    results = await gather(
        partial(rank.execute_barrier, name)
        for rank, order in zip(ranks, (names, names[::-1]), strict=True)
        for name in order
    )
    assert sorted(result.name for result in results) == sorted(names * 2)
    # Only the thread that starts the others, now and then; Thread.start() waits.
    assert len(starters) > 64
    assert starters.count(threading.get_ident()) < 30


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_a_coroutine_that_is_dropped(memory: World) -> None:
    """Its phase is broken all the same, for its body's sake too (law 3)."""
    ranks = await memory.barriers(2)
    crossing: Any = ranks[0].execute_barrier("x")
    crossing.send(None)
    await memory.entered(0, name="x")
    crossing.close()
    # It does not wait for its break to arrive; the last arrival might be quicker.
    await memory.exists(memory.keys(name="x").verdict)
    with pytest.raises(BrokenBarrierError, match="broken by rank 0: it raised GeneratorExit"):
        await ranks[1].execute_barrier("x")


@pytest.mark.anyio
async def test_a_barrier_that_is_dropped(memory: World) -> None:
    """Without aclose() its threads end as well, and its peers are told."""
    strangers = set(library_threads())
    peer = memory.barrier(1, 2)
    dropped = StoreBarrier(memory.store, rank=0, world_size=2, prefix="tests")
    await gather([dropped.connect, peer.connect])
    before = set(library_threads())
    task: Any = None
    async with Tasks() as tasks:
        outcome = tasks.start(partial(dropped.execute_barrier, "x"))
        await memory.entered(0, name="x")
        outcome.scope.cancel()
        await outcome.ended.wait()
    assert set(library_threads()) > before
    del dropped, outcome, task, tasks
    gc.collect()

    async def fewer() -> bool:
        return len(set(library_threads()) - strangers) <= 2  # the peer's

    await until(fewer)


@pytest.mark.anyio
async def test_a_store_that_is_lost_while_waiting(
    memory: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The waiting rank says so, in doubt, and closing afterwards is quiet (laws 5 and 12)."""
    ranks = await memory.barriers(2)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=None))
        await memory.entered(0, name="x")
        memory.store.data.lose()  # type: ignore[attr-defined]
        error = await waiting.raised(BarrierConnectionError)
        assert error.in_doubt
        assert "see whether the process that hosts the store is alive" in str(error)
        with pytest.raises(BarrierConnectionError) as caught:
            await ranks[1].abort("no disk", "x")
        assert not caught.value.in_doubt
        with caplog.at_level(logging.WARNING):
            for rank in ranks:
                await rank.aclose()
    assert not caplog.records
    with pytest.raises(BarrierClosedError):
        await ranks[0].abort("late", "x")


@pytest.mark.anyio
async def test_what_the_store_did_not_take_is_made_up_for(memory: World) -> None:
    """A rank that was cut off when it gave up says so as soon as it is back (law 3)."""
    ranks = await memory.barriers(3, timeout_barrier_init_secs=5.0)
    others = {thread.name for rank in ranks[1:] for thread in threads_of(rank)}
    cut_off = threading.Event()

    def fail(operation: str, key: str) -> None:
        if cut_off.is_set() and threading.current_thread().name not in others:
            raise ConnectionResetError("cut off")

    memory.store.data.hook = fail  # type: ignore[attr-defined]
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x"))
        gone = tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=0.5))
        await memory.entered(0, 1, name="x")
        cut_off.set()
        assert (await gone.raised(BarrierConnectionError)).in_doubt
        assert gone.secs < 0.5 + 1 + LOAD_SECS
        assert not waiting.ended.is_set()
        cut_off.clear()
        await ranks[0].connect()  # it tries by itself, once, but the test may be quicker
        error = await waiting.raised(BrokenBarrierError)
        assert (error.rank, error.reason) == (0, "it lost its connection to the store")
        with pytest.raises(BrokenBarrierError):
            await ranks[2].execute_barrier("x")


@pytest.mark.anyio
async def test_cancelling_while_the_store_hangs(memory: World) -> None:
    """It ends within a second, and the break is made up for later (laws 5 and 8)."""
    ranks = await memory.barriers(2)
    go_on = threading.Event()
    hook = Hook(memory, lambda operation, key: go_on.wait())
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=None))
        await memory.entered(0, name="x")
        hook.on()
        cancelled_at = anyio.current_time()
        waiting.scope.cancel()
        await waiting.ended.wait()
        assert waiting.scope.cancelled_caught
        assert anyio.current_time() - cancelled_at < 1 + LOAD_SECS
    hook.off()
    go_on.set()
    await memory.exists(memory.keys(name="x").verdict)
    with pytest.raises(BrokenBarrierError, match="broken by rank 0"):
        await ranks[1].execute_barrier("x")
    await gather(partial(rank.execute_barrier, "y") for rank in ranks)


@pytest.mark.anyio
async def test_reports_that_the_store_does_not_answer(memory: World) -> None:
    """Neither the report nor the question who came back outlasts the deadline (law 5)."""
    ranks = await memory.barriers(
        2, warn_after_secs=0.3, timeout_barrier_init_secs=0.45, timeout_secs=0.6
    )
    again = memory.barrier(
        1, 2, warn_after_secs=0.2, timeout_barrier_init_secs=0.45, timeout_secs=0.6
    )
    await again.connect()
    go_on = threading.Event()
    hook = Hook(
        memory,
        lambda operation, key: go_on.wait() if "summary" in key or "member" in key else None,
    )
    async with Tasks() as tasks:
        waiting = tasks.start(partial(again.execute_barrier, "x"))
        await memory.entered(1, name="x", generation=1)
        hook.on()
        await waiting.raised(BarrierConnectionError)
        assert waiting.secs < 0.6 + 1 + LOAD_SECS
    hook.off()
    go_on.set()
    await ranks[0].connect()
    await gather(partial(rank.execute_barrier, "y") for rank in (ranks[0], again))


@pytest.mark.anyio
async def test_who_came_back_is_asked_once(memory: World) -> None:
    """When all are back it is a phase like any other; when the store then hangs, it is said."""
    first = await memory.barriers(2)
    ranks = [memory.barrier(rank, 2, timeout_barrier_init_secs=0.3) for rank in range(2)]
    await gather(rank.connect for rank in ranks)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x"))
        await memory.entered(0, name="x", generation=ranks[0]._session.generation)
        await anyio.sleep(0.5)  # past the question, which goes well
        await ranks[1].execute_barrier("x")
        await waiting.returned()
    lone = memory.barrier(1, 2, timeout_barrier_init_secs=0.3)
    await lone.connect()
    go_on = threading.Event()
    hook = Hook(
        memory,
        lambda operation, key: go_on.wait() if operation != "wait" and "/log" in key else None,
    )
    async with Tasks() as tasks:
        waiting = tasks.start(partial(lone.execute_barrier, "x", timeout_secs=20.0))
        await memory.entered(1, name="x", generation=lone._session.generation)
        hook.on()
        assert (await waiting.raised(BarrierConnectionError)).in_doubt
        assert waiting.secs < 2
    hook.off()
    go_on.set()
    await lone.connect()
    for rank in first:
        await rank.aclose()


@pytest.mark.anyio
async def test_closing_when_the_store_refuses(memory: World) -> None:
    """The store that takes no farewell is not the closing rank's problem."""
    ranks = await memory.barriers(2)

    def refuse(operation: str, key: str) -> None:
        if operation == "set":
            raise ConnectionResetError("read-only")

    hook = Hook(memory, refuse)
    hook.on()
    await ranks[0].aclose()
    hook.off()
    await memory.call(memory.store.set, Keys("tests").mail(0, 0), b"closed")


@pytest.mark.anyio
async def test_an_abort_that_the_store_did_not_take(memory: World) -> None:
    """It is made up for when the rank is back, with its own reason: peers wait in that phase."""
    ranks = await memory.barriers(2)
    log = memory.keys("x").logs[0]

    def refuse(operation: str, key: str) -> None:
        if operation == "append" or (operation, key) == ("compare_set", log):
            hook.off()
            raise ConnectionResetError(operation)

    hook = Hook(memory, refuse)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x", timeout_secs=None))
        await memory.entered(1, name="x")
        hook.on()
        with pytest.raises(BarrierConnectionError):
            await ranks[0].abort("no disk", "x")
        error = await waiting.raised(BrokenBarrierError)
    assert (error.rank, error.reason) == (0, "no disk")


@pytest.mark.anyio
async def test_a_word_that_the_store_did_not_take(memory: World) -> None:
    """The leader gives it again as soon as it can: its peers do not wait for its next call."""
    ranks = await memory.barriers(2)
    verdict = memory.keys("x").verdict

    def refuse(operation: str, key: str) -> None:
        if (operation, key) == ("compare_set", verdict):
            hook.off()
            raise ConnectionResetError(operation)

    async def publish(payloads: object) -> bytes:
        hook.on()
        return b"published"

    hook = Hook(memory, refuse)
    async with Tasks() as tasks:
        leader, peer = (
            tasks.start(partial(rank.commit, publish, name="x", timeout_secs=None))
            for rank in ranks
        )
        assert (await leader.raised(BarrierConnectionError)).in_doubt
        assert await peer.returned() == b"published"


@pytest.mark.anyio
async def test_a_connection_that_hangs_is_not_used_again(
    memory: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rank knew the verdict, and the store did not answer any more: the next phase works."""
    monkeypatch.setattr("async_barriers._lanes.HANGS_SECS", 0.0)
    ranks = await memory.barriers(2)
    counter = memory.keys("x").count
    counted, over = [0], threading.Event()

    def hang(operation: str, key: str) -> None:
        if (operation, key) == ("add", counter):
            counted[0] += 1
            if counted[0] > 2:
                over.wait()

    async def they_depart() -> bool:
        return counted[0] == 4

    hook = Hook(memory, hang)
    hook.on()
    await gather(partial(rank.execute_barrier, "x") for rank in ranks)
    await until(they_depart)
    await gather(partial(rank.execute_barrier, "y", timeout_secs=5) for rank in ranks)
    hook.off()
    over.set()


@pytest.mark.anyio
async def test_joining_again_hangs(memory: World) -> None:
    """On a connection that stays dead when the store is well again: another one is tried."""
    ranks = await memory.barriers(2)
    over = threading.Event()

    def hang(operation: str, key: str) -> None:
        # A connection that hangs as it is opened has longer.
        if key == memory.keys("x").logs[0]:
            over.wait()

    hook = Hook(memory, hang)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=0.3))
        await memory.entered(0, name="x")
        hook.on()
        assert (await waiting.raised(BarrierConnectionError)).in_doubt
        hook.off()
        # What hangs goes on hanging.
        await gather(partial(rank.execute_barrier, "y", timeout_secs=5) for rank in ranks)
    over.set()


@pytest.mark.anyio
async def test_closing_while_a_break_hangs(memory: World) -> None:
    """The caller is told in time that it cannot know; no connection is begun that nobody ends."""
    ranks = await memory.barriers(2)
    breaking, over = threading.Event(), threading.Event()

    def hang(operation: str, key: str) -> None:
        if key == memory.keys("x").logs[0]:
            breaking.set()
        over.wait()

    hook = Hook(memory, hang)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=0.3))
        await memory.entered(0, name="x")
        hook.on()
        await memory.call(breaking.wait)
        before = set(ranks[0]._session._lanes.all)
        await ranks[0].aclose()
        assert (await waiting.raised(BarrierConnectionError)).in_doubt
        assert set(ranks[0]._session._lanes.all) <= before
    assert waiting.secs < 0.3 + 1 + LOAD_SECS
    hook.off()
    over.set()
    # A call to a store in Python cannot be ended from outside, its watcher's neither.
    await memory.call(memory.store.set, Keys("tests").mail(0, 0), b"closed")


@pytest.mark.anyio
async def test_what_cannot_be_broken_is_said(
    memory: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A body fails on a rank that was replaced: its exception goes on, a warning says more."""
    (old,) = await memory.barriers(1)
    await memory.barrier(0, 1).connect()

    async def told() -> bool:
        return not old._session.stands

    await until(told)
    with pytest.raises(OSError, match="disk full"):
        async with old.phase("x"):
            raise OSError("disk full")
    assert "could not be broken for its peers" in caplog.text
    with pytest.raises(TypeError, match="reason must be a string"):
        await old.abort(OSError("disk full"), "x")  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_reports_need_no_callback(memory: World, caplog: pytest.LogCaptureFixture) -> None:
    """The log has them all the same; a phase that ends meanwhile is not reported."""
    ranks = await memory.barriers(2, warn_after_secs=0.2)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x"))

        async def reported() -> bool:
            return "1 of 2 ranks" in caplog.text

        await until(reported)
        await ranks[1].execute_barrier("x")
        await waiting.returned()


def test_departing_twice_is_departing_once() -> None:
    """Whichever of two calls of a rank leaves the phase last, it is counted out once."""
    store = Connection(MemoryStore())
    turn = turn_of(0)
    turn.forsake(store, Gathered(2, 1))
    turn.forsake(store, Gathered(2, 1))
    assert turn.parting_word == Gathered(2, 1)
    assert int(store.read(PHASE.count) or b"0") == protocol._DEPARTED


@pytest.mark.anyio
async def test_nothing_is_printed(tcp: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither by us nor by c10d, through a life with a break and a deadline in it (law 12)."""
    ranks = await tcp.barriers(2)
    outcomes: list[Outcome] = []
    async with Tasks() as tasks:
        outcomes.append(tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=0.3)))
        await outcomes[0].ended.wait()
    await ranks[1].abort("no", "y")
    for rank in ranks:
        await rank.aclose()
    printed, complained = capfd.readouterr()
    assert not printed
    # c10d asks the DNS for the name of its peer, and says so where that knows none.
    assert not [line for line in complained.splitlines() if NO_HOST_NAME not in line]


def test_a_promise_wakes_in_the_order_in_which_it_was_asked() -> None:
    """A lane is put back before the caller goes on, who may want it again."""
    promise: Promise[None] = Promise()
    woken: list[str] = []
    promise.when_settled(lambda: woken.append("puts the lane back"))
    promise.when_settled(lambda: woken.append("goes on"))
    promise.settle()
    assert woken == ["puts the lane back", "goes on"]
