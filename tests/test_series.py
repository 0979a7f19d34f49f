"""Crossings that an event loop makes by itself, and what becomes of them when it cannot go on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import threading
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from torch.distributed import TCPStore
from worlds import PREFIX, AnyBarrier, Tasks, World, close, gather, until

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierProgress,
    BarrierTimeoutError,
    BrokenBarrierError,
    StoreBarrier,
    _life,
    _series,
)
from async_barriers._connection import TCPConnection
from async_barriers._dialogue import Dialogue
from async_barriers._ear import Ear
from async_barriers._keys import LOGS
from async_barriers._lane import Lane
from async_barriers._series import Listener, Series
from async_barriers._verdict import Released
from async_barriers._waiting import outcome
from async_barriers._worker import Worker

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize(
    "anyio_backend",
    [
        "asyncio",
        pytest.param(
            ("asyncio", {"use_uvloop": True}),
            id="uvloop",
            marks=pytest.mark.skipif(find_spec("uvloop") is None, reason="needs uvloop"),
        ),
    ],
)

# How many crossings it takes until all are held by event loops.
SERIES = 4


def waits(rank: AnyBarrier) -> bool:
    """Whether its event loop waits by itself."""
    return any(series.waits for series in rank._session._series.values())


def series_of(rank: AnyBarrier, name: str = "") -> Series:
    series: Series = rank._session._series[name]
    return series


def ear_of(series: Series) -> Ear:
    return cast(Ear, series._listener)


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


async def cross_often(ranks: list[AnyBarrier]) -> None:
    async def lanes_rest() -> bool:
        return not any(lane.busy for rank in ranks for lane, _ in rank._session._lanes._idle)

    for _ in range(SERIES):
        await cross(ranks)
        # A thread may still depart; then the next phase would take another lane.
        await until(lanes_rest)


async def entered(world: World, rank: AnyBarrier) -> None:
    """Wait until ``rank`` has arrived in the phase that it waits in."""

    async def it_has() -> bool:
        if waits(rank):
            turn = series_of(rank).before
            log = turn.keys.logs[(turn.index + 1) % LOGS]
        elif turns := rank._session.turns.items():
            turn = turns[0][0]
            log = turn.log
        else:
            return False
        return turn.line in (await world.read(log) or b"")

    await until(it_has)


def sockets() -> int:
    """How many descriptors of sockets this process has."""
    count = 0
    for each in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(each).startswith("socket:")
        except FileNotFoundError:
            continue
    return count


async def cross(ranks: list[AnyBarrier], name: str = "") -> int:
    results = await gather(partial(rank.execute_barrier, name) for rank in ranks)
    (sequence,) = {result.sequence for result in results}
    return int(sequence)


@on_asyncio
async def test_no_thread_is_asked(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """For crossings of one name, one after another, once their lanes are open."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    # Nor if somebody else had to look meanwhile.
    ranks[0]._session.unfold()
    calls: list[object] = []
    monkeypatch.setattr(Worker, "post", lambda worker, call: calls.append(call))
    await cross_often(ranks)
    monkeypatch.undo()
    assert not calls


@on_asyncio
@pytest.mark.parametrize("ends", ["deadline", "cancelled", "aborted", "closed"])
async def test_one_that_stops_waiting(tcp: World, anyio_backend: Any, ends: str) -> None:
    """Its thread takes over, and reads what came of it; and the next phase works."""
    ranks = await tcp.barriers(3)
    await cross_often(ranks)
    async with Tasks() as tasks:
        peer = tasks.start(ranks[1].execute_barrier)
        await entered(tcp, ranks[1])
        with anyio.CancelScope() as scope:
            options: dict[str, Any] = {"timeout_secs": 0.1} if ends == "deadline" else {}
            async with Tasks() as inner:
                first = inner.start(partial(ranks[0].execute_barrier, **options))
                await entered(tcp, ranks[0])
                assert waits(ranks[0])
                if ends == "deadline":
                    error = await first.raised(BarrierTimeoutError)
                    assert error.missing_ranks == (2,)
                elif ends == "cancelled":
                    scope.cancel()
                elif ends == "aborted":
                    await ranks[0].abort("no space")
                    await first.raised(BrokenBarrierError)
                else:
                    await ranks[0].aclose()
                    await first.raised(BarrierClosedError)
        assert not waits(ranks[0])
        if ends == "deadline":
            await peer.raised(BarrierTimeoutError)
        else:
            assert (await peer.raised(BrokenBarrierError)).rank == 0
    if ends != "closed":
        with pytest.raises((BarrierTimeoutError, BrokenBarrierError)):
            await ranks[2].execute_barrier()
        assert await cross(ranks) == SERIES + 1


@on_asyncio
async def test_an_ear_goes_when_a_thread_is_spoken_to(tcp: World, anyio_backend: Any) -> None:
    """What comes for the thread wakes the loop once; the next phase is heard again."""

    async def gone(ear: Ear, lane: Lane) -> bool:
        # Behind the loop's back: it is shown what comes, and must not take it.
        assert await outcome(lane.submit(lambda store: store.read("none"))) is None
        return not ear.listens

    ranks = await tcp.barriers(1)
    for number in range(3):
        await cross_often(ranks)
        series = series_of(ranks[0])
        ear, lane = ear_of(series), series.lane
        assert ear.listens
        await until(partial(gone, ear, lane))
        assert ear.copy.fileno() == -1
        assert await cross(ranks) == (number + 1) * (SERIES + 1) - 1
        assert ear.listens
        assert series is series_of(ranks[0])


@on_asyncio
async def test_connections_that_are_replaced(tcp: World, anyio_backend: Any) -> None:
    """The loop lets go of each as it is closed, so that descriptors do not pile up."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    counts = []
    for _ in range(6):
        before = series_of(ranks[0]).connection
        for rank in ranks:
            rank._session._lanes.renew()
        await cross(ranks)
        await cross(ranks)
        assert series_of(ranks[0]).connection is not before
        counts.append(sockets())
    assert counts[-1] <= counts[1], counts


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("lacks", ["files", "descriptors"])
async def test_a_loop_that_cannot_listen(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any, lacks: str
) -> None:
    """Where no more files can be opened, or it knows no descriptors, threads make the calls."""

    def overhear(connection: TCPConnection) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    def add_reader(*_: Any) -> None:
        raise NotImplementedError

    ranks = await tcp.barriers(2)
    await cross(ranks)
    await cross(ranks)
    count = sockets()
    with monkeypatch.context() as patch:
        if lacks == "files":
            patch.setattr(TCPConnection, "overhear", overhear)
        else:
            patch.setattr(asyncio.get_running_loop(), "add_reader", add_reader)
        await cross_often(ranks)
        assert await cross(ranks) == SERIES + 2
        # Those of the lanes may come and go; those that were made for nothing would pile up.
        assert sockets() < count + SERIES


@on_asyncio
async def test_a_connection_that_is_to_be_replaced(tcp: World, anyio_backend: Any) -> None:
    """While the loop waits, and is called too early: the thread goes on with the same one."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    async with Tasks() as tasks:
        first = tasks.start(ranks[0].execute_barrier)
        await entered(tcp, ranks[0])
        ranks[0]._session._lanes.renew()
        await ranks[1].abort("no space")
        assert (await first.raised(BrokenBarrierError)).reason == "no space"
    assert await cross(ranks) == SERIES + 1


@on_asyncio
@pytest.mark.parametrize("when", ["waits", "at once", "idle"])
async def test_a_connection_that_is_cut(tcp: World, anyio_backend: Any, when: str) -> None:
    """While the loop waits, as it enters, or before: broken for all, and the next one works."""
    ranks = await tcp.barriers(2)
    kept, counts = [], []
    for _ in range(5):
        await cross_often(ranks)
        counts.append(sockets())
        async with Tasks() as tasks:
            series = series_of(ranks[0])
            if when == "waits":
                first = tasks.start(ranks[0].execute_barrier)
                await entered(tcp, ranks[0])
                series.connection.interrupt()
            else:
                series.connection.interrupt()
                while when == "idle" and ear_of(series).listens:
                    await asyncio.sleep(0)
                first = tasks.start(ranks[0].execute_barrier)
            del series
            kept.append(await first.raised(BarrierConnectionError))
            assert not kept[-1].in_doubt
            with pytest.raises(BrokenBarrierError) as told:
                await ranks[1].execute_barrier()
            assert told.value.rank == 0
    # Whoever keeps the errors keeps no sockets. (Nor in the other cases, but for what looks for
    # blocking calls in these tests: its frames keep the stores that were called.)
    assert when != "waits" or counts[-1] <= counts[1], counts


def test_one_loop_after_another(server: TCPStore) -> None:
    """A barrier goes from one to the next, which is closed, or waits, or runs in another thread."""
    barriers = [StoreBarrier(server, rank=rank, world_size=2, prefix=PREFIX) for rank in range(2)]

    async def crossings() -> int:
        await cross(barriers)  # type: ignore[arg-type]
        return await cross(barriers)  # type: ignore[arg-type]

    assert asyncio.run(crossings()) == 1
    waits = asyncio.new_event_loop()
    assert waits.run_until_complete(crossings()) == 3
    told: list[int] = []
    thread = threading.Thread(target=lambda: told.append(asyncio.run(crossings())))
    thread.start()
    thread.join()
    assert told == [5]
    assert waits.run_until_complete(crossings()) == 7
    waits.close()

    asyncio.run(close(barriers))


@pytest.mark.parametrize("thrown_away", [True, False])
def test_a_loop_that_ends_meanwhile(server: TCPStore, thrown_away: bool) -> None:
    """A crossing that it leaves behind is broken for the peers, when it is thrown away; if it is
    not, it is finished when the barrier is used on another loop."""
    barriers = [StoreBarrier(server, rank=rank, world_size=2, prefix=PREFIX) for rank in range(2)]

    async def crossings() -> None:
        await cross_often(barriers)  # type: ignore[arg-type]

    loop = asyncio.new_event_loop()
    loop.run_until_complete(crossings())
    left: Any = barriers[0].execute_barrier()
    task = loop.create_task(left)
    loop.run_until_complete(asyncio.sleep(0))
    assert waits(barriers[0])
    loop.close()
    if thrown_away:
        left.close()
        assert not waits(barriers[0])
        (turn,) = barriers[0]._session._life.kept  # type: ignore[union-attr]
        while b"GeneratorExit" not in server.get(turn.log):
            pass  # It is a thread that says so.

    async def rest() -> None:
        if thrown_away:
            with pytest.raises(BrokenBarrierError) as told:
                await barriers[1].execute_barrier(timeout_secs=10)
            assert told.value.rank == 0
        else:
            await barriers[1].execute_barrier(timeout_secs=10)
        await crossings()
        assert not waits(barriers[0])
        assert not barriers[0]._session.turns._entered_on
        for barrier in barriers:
            await barrier.aclose()

    asyncio.run(rest())
    left.close()
    del task


STEPS = ["before it enters", "entered", "called", "asked", "answered", "told", "released"]


@on_asyncio
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", range(LOGS))
async def test_it_is_unfolded_at_any_step(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any, step: str, number: int
) -> None:
    """With any log: one release for all, and all goes on from there."""
    ranks = await tcp.barriers(2)
    for _ in range(number + SERIES):
        await cross(ranks)
    series = series_of(ranks[0])
    reached = []

    def at(now: str) -> None:
        if not series.over or now == "released":
            reached.append(now)
        if now == step:
            # As another thread would that hears of the end of the generation.
            ranks[0]._session.unfold()

    def around(method: Callable[..., Any], *steps: str) -> Callable[..., Any]:
        left = list(steps)

        def call(self: Series, *args: Any) -> Any:
            if self is not series or not left:
                return method(self, *args)
            at(left.pop(0))
            answer = method(self, *args)
            at(left.pop(0))
            return answer

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Series, "enter", around(Series.enter, "before it enters", "entered"))
        patch.setattr(Series, "hear", around(Series.hear, "called", "asked", "answered", ""))
        patch.setattr(Series, "met", around(Series.met, "told", "released"))
        ear_of(series).go()  # and it comes to hear with this
        assert await cross(ranks) == number + SERIES
    assert step in reached
    assert series.over
    assert (series.turn is None) == (step in ("before it enters", "released"))
    for after in range(1, 6):
        assert await cross(ranks) == number + SERIES + after
    assert series_of(ranks[0]) is not series


@on_asyncio
async def test_a_break_and_the_loop(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """A rank gives up in the instant in which its loop has heard the log: one verdict for all."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    session, held, met = ranks[0]._session, series_of(ranks[0]), Series.met
    given: list[Any] = []

    def gives_up_first(series: Series) -> bool:
        if series is held:
            session.unfold(series)
            assert series.turn is not None
            given.append(session.turns.give_up(series.turn, "too late"))
        return met(series)

    with monkeypatch.context() as patch:
        patch.setattr(Series, "met", gives_up_first)
        assert await cross(ranks) == SERIES
    assert isinstance(await outcome(given[0]), Released)
    assert await cross(ranks) == SERIES + 1


@on_asyncio
async def test_cancelled_as_it_is_released(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """In the round in which the loop hears it: it is cancelled, and its peers are released."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    series, hear = series_of(ranks[0]), Series.hear

    def cancels_first(self: Series, listener: Listener) -> None:
        if self is series:
            first.cancel()
        hear(self, listener)

    with monkeypatch.context() as patch:
        patch.setattr(Series, "hear", cancels_first)
        ear_of(series).go()
        first = asyncio.ensure_future(ranks[0].execute_barrier())
        await entered(tcp, ranks[0])
        assert (await ranks[1].execute_barrier()).sequence == SERIES
        with pytest.raises(asyncio.CancelledError):
            await first
    for after in range(1, 6):
        assert await cross(ranks) == SERIES + after


@on_asyncio
async def test_two_tasks_of_one_rank(tcp: World, anyio_backend: Any) -> None:
    """The second takes the next phase, while the first is still held."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    async with Tasks() as tasks:
        first = tasks.start(ranks[0].execute_barrier)
        await entered(tcp, ranks[0])
        second = tasks.start(ranks[0].execute_barrier)
        for after in range(2):
            assert (await ranks[1].execute_barrier()).sequence == SERIES + after
        assert (await first.returned()).sequence == SERIES
        assert (await second.returned()).sequence == SERIES + 1
    for after in range(2, 8):
        assert await cross(ranks) == SERIES + after
    assert series_of(ranks[0]).sequence == SERIES + 7


@on_asyncio
async def test_several_series(tcp: World, anyio_backend: Any) -> None:
    """While one waits, other names have one, too; and who takes a turn has the idle ones' lanes."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    async with Tasks() as tasks:
        first = tasks.start(ranks[0].execute_barrier)
        await entered(tcp, ranks[0])
        for sequence in range(SERIES):
            assert await cross(ranks, "other") == sequence
        assert series_of(ranks[0]).waits
        assert series_of(ranks[0], "other").sequence == SERIES - 1
        lane = series_of(ranks[0], "other").lane
        assert await cross(ranks, "a third") == 0
        assert list(ranks[0]._session._series) == [""]
        assert lane in [idle for idle, _ in ranks[0]._session._lanes._idle]
        assert (await ranks[1].execute_barrier()).sequence == SERIES
        assert (await first.returned()).sequence == SERIES
    for after in range(4):
        assert await cross(ranks) == SERIES + 1 + after
        assert await cross(ranks, "other") == SERIES + after
    await cross_often(ranks)
    assert series_of(ranks[0]).sequence == 2 * SERIES + 4


@on_asyncio
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError])
async def test_interrupted_as_it_enters(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any, interrupt: type[BaseException]
) -> None:
    """It has not entered, then, and takes nothing for the answer that answered the phase before."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    with monkeypatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise interrupt

        patch.setattr(_series, "Dialogue", interrupted)
        call: Any = ranks[0].execute_barrier()
        with pytest.raises(interrupt):
            call.send(None)
    for after in range(5):
        assert await cross(ranks) == SERIES + after


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_turn_is_taken_while_it_is_unfolded(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """By another thread, which waits until the turns are what they should be."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    session, end = ranks[0]._session, Series.end
    taken: list[Any] = []
    thread = threading.Thread(target=lambda: taken.append(session.take_turn("")))

    def ends(series: Series) -> None:
        end(series)
        thread.start()
        thread.join(0.3)

    with monkeypatch.context() as patch:
        patch.setattr(Series, "end", ends)
        await anyio.to_thread.run_sync(session.unfold)
    thread.join()
    assert taken[0].sequence == SERIES


def test_from_loop_to_loop_and_back(server: TCPStore) -> None:
    """Loops that stay open keep no more than what they listened to last."""
    barriers = [StoreBarrier(server, rank=rank, world_size=2, prefix=PREFIX) for rank in range(2)]
    loops = [asyncio.new_event_loop() for _ in range(2)]

    async def crossings() -> None:
        await cross_often(barriers)  # type: ignore[arg-type]

    counts = []
    for _ in range(5):
        for loop in loops:
            loop.run_until_complete(crossings())
        counts.append(sockets())
    assert counts[-1] <= counts[1], counts

    loops[0].run_until_complete(close(barriers))
    for loop in loops:
        loop.close()


def test_a_loop_per_crossing(server: TCPStore) -> None:
    """Each that is closed lets go of its descriptors at once, not when garbage is collected."""
    barriers = [StoreBarrier(server, rank=rank, world_size=2, prefix=PREFIX) for rank in range(2)]
    counts = []

    async def crossings() -> None:
        await cross_often(barriers)  # type: ignore[arg-type]
        counts.append(sockets())

    gc.collect()
    gc.disable()
    try:
        for _ in range(6):
            asyncio.run(crossings())
    finally:
        gc.enable()
    assert counts[-1] <= counts[1], counts

    asyncio.run(close(barriers))


@on_asyncio
async def test_other_calls_between_crossings(tcp: World, anyio_backend: Any) -> None:
    """Each takes the next turn of the name, wherever the series has come to."""
    ranks = await tcp.barriers(2)
    sequence = -1

    async def series() -> None:
        nonlocal sequence
        for _ in range(SERIES):
            sequence += 1
            assert await cross(ranks) == sequence
        assert series_of(ranks[0]).sequence == sequence

    async def publish(payloads: Any) -> bytes:
        return b"+".join(payloads[rank] for rank in sorted(payloads))

    await series()
    results = await gather(partial(rank.commit, publish, payload=b"x") for rank in ranks)
    assert results == [b"x+x", b"x+x"]
    sequence += 1
    await series()
    await ranks[1].abort("no space")
    with pytest.raises(BrokenBarrierError) as told:
        await ranks[0].execute_barrier()
    sequence += 1
    assert (told.value.sequence, told.value.rank) == (sequence, 1)
    await series()
    with pytest.raises(OSError, match="no space"):
        async with ranks[0].phase():
            raise OSError("no space")
    with pytest.raises(BrokenBarrierError):
        await ranks[1].execute_barrier()
    sequence += 1
    await series()


@on_asyncio
async def test_it_waits_long(tcp: World, anyio_backend: Any) -> None:
    """Who is missing is reported, as ever; and the next crossings are a series again."""
    told: list[BarrierProgress] = []
    ranks = await tcp.barriers(3, warn_after_secs=0.2, on_progress=told.append)
    await cross_often(ranks)
    async with Tasks() as tasks:
        early = [tasks.start(rank.execute_barrier) for rank in ranks[:2]]

        async def reported() -> bool:
            return len(told) > 3

        await until(reported)
        assert (await ranks[2].execute_barrier()).sequence == SERIES
        for each in early:
            assert (await each.returned()).last_rank == 2
    assert {(each.sequence, each.missing_ranks) for each in told} <= {
        (SERIES, (1, 2)),
        (SERIES, (0, 2)),
        (SERIES, (2,)),
    }
    assert told[-1].missing_ranks == (2,)
    await cross_often(ranks)
    assert series_of(ranks[0]).sequence == 2 * SERIES


@on_asyncio
async def test_a_peer_that_joins_again(tcp: World, anyio_backend: Any) -> None:
    """While a loop waits: it is told so, and in the next generation there is a series again."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    async with Tasks() as tasks:
        first = tasks.start(ranks[0].execute_barrier)
        await entered(tcp, ranks[0])
        again = tcp.barrier(1, 2)
        await again.connect()
        assert (await first.raised(BrokenBarrierError)).rank == 1
    ranks[1] = again
    assert [await cross(ranks) for _ in range(SERIES)] == list(range(SERIES))
    assert series_of(ranks[0]).sequence == SERIES - 1


@on_asyncio
async def test_a_coroutine_that_nobody_resumes(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """When its connection has ended, too: the loop does not spin."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    heard: list[bool] = []
    hear = Series.hear

    def hears(series: Series, listener: Listener) -> None:
        hear(series, listener)
        heard.append(listener.listens)

    with monkeypatch.context() as patch:
        patch.setattr(Series, "hear", hears)
        ear_of(series_of(ranks[0])).go()
        call: Any = ranks[0].execute_barrier()
        call.send(None)
        series_of(ranks[0]).connection.interrupt()
        for _ in range(100):
            await asyncio.sleep(0)
        assert heard == [True, False]
    call.close()
    # It had entered; whether the break comes before the other one does is not said.
    with contextlib.suppress(BrokenBarrierError):
        await ranks[1].execute_barrier()
    assert await cross(ranks) == SERIES + 1


@on_asyncio
async def test_no_room_for_the_arrival(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """A thread says what the loop could not say at once."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    begin = Dialogue.begin

    def begins_nothing(dialogue: Dialogue, connection: socket.socket) -> bool:
        monkeypatch.setattr(Dialogue, "begin", begin)
        return False

    monkeypatch.setattr(Dialogue, "begin", begins_nothing)
    for after in range(SERIES):
        assert await cross(ranks) == SERIES + after


@on_asyncio
async def test_a_barrier_that_takes_leave(tcp: World, anyio_backend: Any) -> None:
    """At the exit of the interpreter, say, while its loop goes on: no series begins any more."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    session = ranks[0]._session
    assert session.series("", Ear) is not None  # type: ignore[arg-type]
    await outcome(session.farewell())
    assert session.series("", Ear) is None  # type: ignore[arg-type]
    assert not session._series


@on_asyncio
async def test_a_store_in_doubt(tcp: World, anyio_backend: Any) -> None:
    """No phase is entered before the rank has joined again."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    ranks[0]._session.doubt()
    assert not ranks[0]._session._series
    assert await cross(ranks) == SERIES
    assert ranks[0]._session.stands


@on_asyncio
async def test_the_longest_series(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """It is followed by a turn with keys of its own, and then by another series."""
    monkeypatch.setattr(_life, "LONGEST_SERIES", 5)
    monkeypatch.setattr(_series, "LONGEST_SERIES", 5)
    ranks = await tcp.barriers(2)
    found: set[Series] = set()
    for sequence in range(30):
        assert await cross(ranks) == sequence
        found.update(ranks[0]._session._series.values())
    assert len(found) > 2
