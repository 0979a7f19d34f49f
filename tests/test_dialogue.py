"""Meetings that an event loop holds by itself, and what becomes of them when it cannot go on."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import pytest
from torch.distributed import TCPStore
from worlds import PREFIX, AnyBarrier, Tasks, World, gather, until

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierTimeoutError,
    BrokenBarrierError,
    StoreBarrier,
)
from async_barriers import _connection as connections
from async_barriers import _dialogue as dialogues
from async_barriers._connection import TCPConnection
from async_barriers._dialogue import Dialogue
from async_barriers._ear import Ear
from async_barriers._session import Session
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

ALONE = ("log", b"me\n", "count", 1)
# How many crossings it takes until all are held by event loops.
SERIES = 4


def connect(server: TCPStore) -> TCPConnection:
    return connections.clone_tcp(server, time.monotonic() + 10, threading.Event())


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A rank's side of a connection, and the store's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


async def cross_often(ranks: list[AnyBarrier]) -> None:
    for _ in range(SERIES):
        await cross(ranks)


async def entered(world: World, rank: AnyBarrier) -> None:
    """Wait until ``rank`` has arrived in the phase that it waits in."""

    async def it_has() -> bool:
        turn = rank._session.open_turn("")
        return turn is not None and b"k%d\n" % turn.rank in (await world.read(turn.log) or b"")

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


# -- what is said --------------------------------------------------------------------------


def test_what_comes_in_pieces(pair: tuple[socket.socket, socket.socket]) -> None:
    """It is put together; and being called for nothing ends nothing."""
    ours, theirs = pair
    dialogue = Dialogue(*ALONE)
    assert not dialogue.begin(ours)
    assert not dialogue.hear(ours)
    assert b"count" in theirs.recv(4096)
    theirs.send(b"\0")
    assert not dialogue.hear(ours)
    assert b"log" in theirs.recv(4096)
    for byte in b"\x05\0\0\0\0\0\0\0me\nk":
        assert not dialogue.hear(ours)
        theirs.send(bytes([byte]))
        assert not dialogue.hear(ours)
    theirs.send(b"0")
    assert dialogue.hear(ours)
    assert dialogue.log == b"me\nk0"
    assert dialogue.finish(ours) == dialogue.log


@pytest.mark.parametrize("asked", [False, True])
def test_a_server_that_hangs_up(pair: tuple[socket.socket, socket.socket], asked: bool) -> None:
    """The loop is done with it, and who goes on finds out why."""
    ours, theirs = pair
    dialogue = Dialogue(*ALONE)
    assert not dialogue.begin(ours)
    theirs.recv(4096)
    if asked:
        theirs.send(b"\0")
        assert not dialogue.hear(ours)
        theirs.recv(4096)
    theirs.close()
    assert dialogue.hear(ours)
    with pytest.raises(OSError, match=r"hung up|reset"):
        dialogue.finish(ours)


@pytest.mark.parametrize("long", ["count", "log"])
def test_no_room_for_what_is_to_be_said(
    pair: tuple[socket.socket, socket.socket], long: str
) -> None:
    """The loop does not wait for it, and who goes on says the rest, in order."""
    ours, theirs = pair
    keys = {"log": "log", "count": "count", long: 500_000 * "x"}

    def heard(last: bytes) -> bytes:
        said = b""
        while not said.endswith(last):
            said += theirs.recv(1 << 16)
        return said

    dialogue = Dialogue(keys["log"], b"me\n", keys["count"], 1)
    assert dialogue.begin(ours)
    assert dialogue.hear(ours)
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(dialogue.finish, ours)
        said = heard(struct.pack("=q", 1))
        theirs.send(b"\0")
        said += heard(b"\0absent\0")
        assert said.count(b"x" * 500_000) == (2 if long == "log" else 1)
        theirs.send(b"\x03\0\0\0\0\0\0\0me\n")
        assert finished.result() == b"me\n"


def test_no_room_for_what_is_asked(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, when the first half was said."""
    ours, theirs = pair
    monkeypatch.setattr(dialogues, "ABSENT", 500_000 * b"x")
    dialogues._asking.cache_clear()
    dialogue = Dialogue(*ALONE)
    dialogues._asking.cache_clear()
    assert not dialogue.begin(ours)
    theirs.recv(4096)
    theirs.send(b"\0")
    assert dialogue.hear(ours)
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(dialogue.finish, ours)
        asked = 0
        while asked < 1_000_000:
            asked += theirs.recv(1 << 16).count(b"x")
        theirs.send(b"\x03\0\0\0\0\0\0\0me\n")
        assert finished.result() == b"me\n"


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_thread_takes_over_at_any_step(server: TCPStore, steps: int) -> None:
    """It goes on from there, with a real store, and the loop leaves it alone."""
    connection = connect(server)
    ears = connection.overhear()
    dialogue = Dialogue("log", b"me\n", "count", 2)
    if steps:
        assert not dialogue.begin(ears)
    if steps > 1:
        server.barrier("count", 2)  # type: ignore[attr-defined]
        while not dialogue._asked:
            assert not dialogue.hear(ears)
    if steps > 2:
        while not dialogue.hear(ears):
            pass
    dialogue.take_over()
    assert dialogue.begin(ears)
    assert dialogue.hear(ears)
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(connection.finish, dialogue)
        if steps <= 1:
            server.barrier("count", 2)  # type: ignore[attr-defined]
        assert finished.result() == b"me\n"
    # The connection is as it was.
    assert connection.read("log") == b"me\n"
    ears.close()
    connection.close()


# -- with whom -----------------------------------------------------------------------------


@pytest.mark.parametrize("use_libuv", [True, False])
def test_a_server_is_tried_once(use_libuv: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written for that is gone."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=use_libuv)
    keys = server.num_keys()
    first = connect(server)
    assert first.direct
    assert server.num_keys() == keys
    monkeypatch.setattr(dialogues, "understood", None)
    second = connect(server)
    assert second.direct
    for connection in (first, second):
        connection.close()


@pytest.mark.parametrize("opcode", [b"\x63", b"\x0d", b"\x05"])
@on_asyncio
async def test_a_server_that_does_not_understand(
    tcp: World, monkeypatch: pytest.MonkeyPatch, opcode: bytes, anyio_backend: Any
) -> None:
    """It hangs up, is silent or answers something else; then threads make the calls."""
    monkeypatch.setattr(dialogues, "_BARRIER", opcode)
    dialogues._arriving.cache_clear()
    ranks = await tcp.barriers(2)
    assert await cross(ranks) == 0
    assert await cross(ranks) == 1
    monkeypatch.undo()
    dialogues._arriving.cache_clear()
    assert not connections._understand[tcp.store.host, tcp.store.port]  # type: ignore[attr-defined]


def test_a_server_that_was_held_up(server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it was tried first; it is tried once more, and what was written is gone."""
    trials = 0
    understood = dialogues.understood

    def at_the_second(connection: socket.socket, tried: str) -> bool:
        nonlocal trials
        trials += 1
        return understood(connection, tried) and trials > 1

    monkeypatch.setattr(dialogues, "understood", at_the_second)
    keys = server.num_keys()
    connection = connect(server)
    assert connection.direct
    assert trials == 2
    assert server.num_keys() == keys
    connection.close()


def test_a_server_that_stays_silent(server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on: connecting ends in time, and not in c10d's constructor, which would not."""
    monkeypatch.setattr(dialogues, "understood", lambda *_: False)

    def silent(host: str, port: int, deadline: float, stop: threading.Event) -> None:
        if server in opened:
            raise BarrierConnectionError("no store answers")

    opened: list[TCPStore] = []

    def clone(store: TCPStore) -> Any:
        opened.append(store)
        return store.clone()  # type: ignore[attr-defined]

    monkeypatch.setattr(connections, "_clone", clone)
    monkeypatch.setattr(connections, "await_store", silent)
    with pytest.raises(BarrierConnectionError, match="no store answers"):
        connect(server)
    assert len(opened) == 1


def test_a_program_that_signals_end(pair: tuple[socket.socket, socket.socket]) -> None:
    """Where writing to who has hung up would end the process, it does not."""
    ours, theirs = pair
    theirs.close()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os._exit(0 if Dialogue(*ALONE).begin(ours) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_default_timeout_for_sockets(server: TCPStore) -> None:
    """A program that sets one changes nothing for the connections that we look into."""
    socket.setdefaulttimeout(0.05)
    try:
        connection = connect(server)
        ears = connection.overhear()
    finally:
        socket.setdefaulttimeout(None)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(connection.await_value, "key")
        with pytest.raises(TimeoutError):
            waits.result(0.3)
        server.set("key", "value")
        assert waits.result() == b"value"
    ears.close()
    connection.close()


# -- on an event loop ----------------------------------------------------------------------


@on_asyncio
async def test_no_thread_is_asked(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """For crossings of one name, one after another, once their lanes are open."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
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
    session = ranks[0]._session
    async with Tasks() as tasks:
        peer = tasks.start(ranks[1].execute_barrier)
        await entered(tcp, ranks[1])
        with anyio.CancelScope() as scope:
            options: dict[str, Any] = {"timeout_secs": 0.1} if ends == "deadline" else {}
            async with Tasks() as inner:
                first = inner.start(partial(ranks[0].execute_barrier, **options))
                await entered(tcp, ranks[0])
                assert session._meetings
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
        assert not session._meetings
        if ends == "deadline":
            await peer.raised(BarrierTimeoutError)
        else:
            assert (await peer.raised(BrokenBarrierError)).rank == 0
    if ends != "closed":
        with pytest.raises((BarrierTimeoutError, BrokenBarrierError)):
            await ranks[2].execute_barrier()
        assert await cross(ranks) == SERIES + 1


@on_asyncio
async def test_an_ear_goes_when_a_thread_is_spoken_to(server: TCPStore, anyio_backend: Any) -> None:
    """What comes for the thread wakes the loop once; the next dialogue is heard again."""
    connection = await anyio.to_thread.run_sync(connect, server)
    ear = Ear(asyncio.get_running_loop(), connection.overhear())
    for number in range(1, 4):
        ended = asyncio.Event()
        dialogue = Dialogue(f"log{number}", b"me\n", f"count{number}", 1)
        ear.listen()
        ear.hold(dialogue, ended.set)
        await ended.wait()
        assert dialogue.log == b"me\n"
        assert ear._listens
        # Behind the loop's back: it is shown what comes, and must not take it.
        assert await anyio.to_thread.run_sync(connection.read, f"log{number}") == b"me\n"
        with anyio.fail_after(5):
            while ear._listens:
                await asyncio.sleep(0)
                await anyio.to_thread.run_sync(connection.read, "none")
    await anyio.to_thread.run_sync(connection.close)


@on_asyncio
async def test_connections_that_are_replaced(tcp: World, anyio_backend: Any) -> None:
    """The loop lets go of each as it is closed, so that descriptors do not pile up."""
    ranks = await tcp.barriers(2)
    await cross(ranks)
    counts = []
    for _ in range(6):
        for rank in ranks:
            rank._session._lanes.renew()
        await cross(ranks)
        await cross(ranks)
        counts.append(sockets())
    assert counts[-1] <= counts[1], counts


@on_asyncio
async def test_a_loop_that_cannot_listen(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """Where no more files can be opened, or it knows no descriptors, threads make the calls."""

    def overhear(connection: TCPConnection) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(TCPConnection, "overhear", overhear)
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    assert await cross(ranks) == SERIES


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
async def test_a_connection_that_is_cut(tcp: World, anyio_backend: Any) -> None:
    """While the loop waits: the phase is broken for all, with the rank, and the next one works."""
    ranks = await tcp.barriers(2)
    kept, counts = [], []
    for _ in range(5):
        await cross_often(ranks)
        counts.append(sockets())
        async with Tasks() as tasks:
            first = tasks.start(ranks[0].execute_barrier)
            await entered(tcp, ranks[0])
            ((_, connection, _),) = ranks[0]._session._meetings.values()
            connection.interrupt()
            kept.append(await first.raised(BarrierConnectionError))
            assert not kept[-1].in_doubt
            with pytest.raises(BrokenBarrierError) as told:
                await ranks[1].execute_barrier()
            assert told.value.rank == 0
        del connection
    # Whoever keeps the errors keeps no sockets.
    assert counts[-1] <= counts[1], counts


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

    async def close() -> None:
        for barrier in barriers:
            await barrier.aclose()

    asyncio.run(close())


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
    turn = barriers[0]._session.open_turn("")
    assert turn is not None
    loop.close()
    if thrown_away:
        left.close()
        assert not barriers[0]._session._meetings
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
        assert not barriers[0]._session._meetings
        assert not barriers[0]._session._entered_on
        for barrier in barriers:
            await barrier.aclose()

    asyncio.run(rest())
    left.close()
    del task


@on_asyncio
async def test_a_call_that_still_uses_the_phase(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """A report, say, when the loop hears the log: released all the same; the lane is free later."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    met = Session._met
    held: list[Any] = []

    def held_meanwhile(session: Session, turn: Any) -> None:
        if session.rank == 0:
            assert turn.hold()
            held.append(turn)
        met(session, turn)

    monkeypatch.setattr(Session, "_met", held_meanwhile)
    assert await cross(ranks) == SERIES
    monkeypatch.undo()
    (turn,) = held
    await outcome(ranks[0]._session._lanes.control.submit(turn.release))

    async def done() -> bool:
        return turn._departed and not ranks[0]._session._entered_on

    await until(done)
    await cross_often(ranks)


@on_asyncio
async def test_a_break_and_the_loop(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    """A rank gives up in the instant in which its loop hears the log: one verdict for all."""
    ranks = await tcp.barriers(2)
    await cross_often(ranks)
    met = Session._met
    given: list[Any] = []

    def gives_up_first(session: Session, turn: Any) -> None:
        if session.rank == 0 and not given:
            given.append(session.give_up(turn, "too late"))
        met(session, turn)

    monkeypatch.setattr(Session, "_met", gives_up_first)
    assert await cross(ranks) == SERIES
    assert isinstance(await outcome(given[0]), Released)
    assert await cross(ranks) == SERIES + 1
    assert not ranks[0]._session._meetings
