"""Ranks that leave: their peers learn it at once, whatever way they go (laws 3, 4 and 13)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
from processes import BACKENDS, CRASHES, EXIT_SECS, Forge
from rank_process import PREFIX, say
from reports import (
    TOLD_SECS,
    Programs,
    client,
    job,
    meet,
    one,
    serve,
    tell,
    until_told,
)
from torch.distributed import HashStore
from worlds import Tasks, World, free_port, gather, until

from async_barriers import (
    BarrierTimeoutError,
    BrokenBarrierError,
    StepSignal,
    StoreBarrier,
    TCPStoreBarrier,
)
from async_barriers._protocol import leaving
from async_barriers._protocol.membership import FIELD, GONE
from async_barriers._protocol.store import Read, Request
from async_barriers._store import sources
from async_barriers._store.blocking_store import BlockingStore
from async_barriers._store.connection import SocketConnection
from async_barriers.testing import FaultyStore

in_process = pytest.mark.anyio
as_processes = pytest.mark.processes
BY_THREADS = "ASYNC_BARRIERS_WORKER_THREADS"
# What is asked of a barrier whose peer has left already is answered at once.
KNOWN_SECS = 0.8


def publish(payloads: object) -> None:
    raise AssertionError("it is another's to publish")


async def told(call: Awaitable[object], within_secs: float = KNOWN_SECS) -> BrokenBarrierError:
    """The break that a call has to end in, in time."""
    began = time.monotonic()
    with pytest.raises(BrokenBarrierError) as caught:
        await call
    assert time.monotonic() < began + within_secs
    return caught.value


class Struck(Exception):
    """What a signal handler throws."""


@in_process
@pytest.mark.parametrize("how", ["closes", "fails"])
async def test_a_host_that_has_left_before_its_peers_enter(how: str) -> None:
    """They learn that at once, and why, although its store is gone; also a call after that one."""
    async with contextlib.AsyncExitStack() as stack:
        host, peer = ranks = [
            TCPStoreBarrier(rank, 2, "p", 20, True, port, "127.0.0.1", 20)
            for port in [free_port()]
            for rank in range(2)
        ]
        stack.push_async_callback(peer.aclose)
        with contextlib.suppress(Struck):
            async with host:
                await gather(rank.execute_barrier for rank in ranks)
                if how == "fails":
                    raise Struck("no disk")
        await anyio.sleep(0.3)
        for call in (peer.execute_barrier, partial(peer.all_gather, b"")):
            began = time.monotonic()
            with pytest.raises(BrokenBarrierError, match="closed its barrier") as caught:
                await call(name="x")
            assert time.monotonic() < began + TOLD_SECS
            assert caught.value.rank == 0
            assert ("no disk" in caught.value.reason) is (how == "fails")


@in_process
@pytest.mark.parametrize("cut_at", [0, 1], ids=["at first", "later"])
async def test_a_connection_is_lost_as_a_rank_says_goodbye(
    monkeypatch: pytest.MonkeyPatch, cut_at: int
) -> None:
    """The store is there, so it says it on another one, and its peers learn it (law 3)."""
    tell, messages = leaving.tell, 0

    def cut(store: SocketConnection, *args: Any, **options: Any) -> Any:
        call = store.call

        def loses(*requests: Any, **given: Any) -> Any:
            nonlocal messages
            messages += 1
            if messages == cut_at + 1:
                store._lose(ConnectionResetError())
            return call(*requests, **given)

        monkeypatch.setattr(store, "call", loses)
        return tell(store, *args, **options)

    async with job(serve(), 2) as ranks, Tasks() as tasks:
        waiting = tasks.start(ranks[1].execute_barrier)
        await anyio.sleep(0.05)
        monkeypatch.setattr(leaving, "tell", cut)
        await ranks[0].aclose()
        error = await waiting.raised(BrokenBarrierError)
        assert (error.rank, error.reason) == (0, "it closed its barrier")
        assert messages > cut_at + 1
        assert waiting.secs < TOLD_SECS


@in_process
async def test_no_wait_is_cut_off_as_a_rank_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor that of a phase that was given up before all had joined, after which nothing was sent."""
    server = serve()
    async with job(server, 2):
        pass
    alone = one(server, 0, 2)
    with pytest.raises(BarrierTimeoutError):
        await alone.execute_barrier("x", timeout_secs=0.1)
    due: list[list[object]] = []
    end = SocketConnection._end

    def notes(connection: SocketConnection, *args: Any, **options: Any) -> None:
        due.append(list(connection._due))
        end(connection, *args, **options)

    monkeypatch.setattr(SocketConnection, "_end", notes)
    await alone.aclose()
    assert due == [[], []]


@in_process
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_closing_that_is_struck(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal handler's exception, before a word is said: it is begun anew."""
    said: list[object] = []
    tell = leaving.tell

    def struck(*args: Any, **options: Any) -> Any:
        said.append(args)
        if len(said) == 1:
            raise Struck
        return tell(*args, **options)

    async with job(serve(), 2) as ranks, Tasks() as tasks:
        waiting = tasks.start(ranks[1].execute_barrier)
        await anyio.sleep(0.05)
        with monkeypatch.context() as patch:
            patch.setattr(leaving, "tell", struck)
            with contextlib.suppress(Struck):
                await ranks[0].aclose()
            error = await waiting.raised(BrokenBarrierError)
        assert error.rank == 0
        assert "closed its barrier" in error.reason
        assert len(said) == 2
        assert waiting.secs < TOLD_SECS


@in_process
async def test_closing_between_phases() -> None:
    """It is said at once: in the phases that peers wait in, in those they come to later, and no
    more when that rank has joined again."""
    server = serve()
    async with job(server, 3) as ranks, Tasks() as tasks:
        waiting = [tasks.start(partial(ranks[0].execute_barrier, name)) for name in ("x", "y")]
        await anyio.sleep(0.1)
        began = time.monotonic()
        await ranks[2].aclose()
        for outcome in waiting:
            error = await outcome.raised(BrokenBarrierError)
            assert error.rank == 2
            assert "closed its barrier" in error.reason
        assert time.monotonic() < began + TOLD_SECS
        for rank, name in ((1, "x"), (0, "z"), (1, "z"), (0, "y")):
            error = await told(ranks[rank].execute_barrier(name))
            assert (error.name, error.rank) == (name, 2)
            assert "closed its barrier" in error.reason
        error = await told(ranks[1].commit(publish, name="saved"))
        assert error.rank == 2
        ranks[2] = one(server, 2, 3)
        await ranks[2].connect()
        await meet(*ranks, name="x")
        await meet(*ranks, name="never used before")
        await ranks[2].aclose()


@in_process
async def test_closing_after_a_phase_that_was_released() -> None:
    """What was decided before stays so: nobody is told that a released phase was broken."""
    async with job(serve(), 2) as ranks:

        async def crosses_and_closes() -> int:
            result = await ranks[0].execute_barrier("x")
            await ranks[0].aclose()
            return result.sequence

        async def crosses() -> int:
            return (await ranks[1].execute_barrier("x")).sequence

        assert await gather([crosses_and_closes, crosses]) == [0, 0]


# -- Programs that fail ----------------------------------------------------------------------------


async def fails(barrier: StoreBarrier) -> None:
    """Between two phases."""
    async with barrier:
        await anyio.sleep(0.1)
        raise LookupError("the data ran out")


async def fails_beside_its_save(barrier: StoreBarrier) -> None:
    """Its save goes on in a task that outlives the barrier."""

    async def save() -> None:
        async with barrier.phase("saved"):
            await anyio.sleep(30)

    async with anyio.create_task_group() as tasks, barrier:
        tasks.start_soon(save)
        await anyio.sleep(0.1)
        raise LookupError("the data ran out")


@in_process
@pytest.mark.parametrize("program", [fails, fails_beside_its_save])
async def test_an_exception_that_leaves_the_block(
    program: Callable[[StoreBarrier], Awaitable[None]],
) -> None:
    """Peers are told what it was, in the phase they wait in and in later ones."""
    async with job(serve(), 2) as ranks, Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "saved"))
        began = time.monotonic()
        failing = tasks.start(partial(program, ranks[0]))
        errors = [await waiting.raised(BrokenBarrierError)]
        assert time.monotonic() < began + 0.1 + TOLD_SECS
        await failing.raised(Exception)
        errors.append(await told(ranks[1].execute_barrier("later")))
        for error in errors:
            assert error.rank == 0
            assert "LookupError: the data ran out" in error.reason


# -- Bodies that a generator leaves ----------------------------------------------------------------


async def shards(barrier: StoreBarrier) -> AsyncGenerator[int, None]:
    async with barrier.phase("upload"):
        for shard in range(10):
            yield shard


async def closed(barrier: StoreBarrier) -> None:
    async with contextlib.aclosing(shards(barrier)) as uploading:
        async for shard in uploading:
            if shard == 3:
                break


async def left_to_the_loop(barrier: StoreBarrier) -> None:
    async for shard in shards(barrier):
        if shard == 3:
            break


@in_process
@pytest.mark.parametrize(
    ("anyio_backend", "leave"),
    # Trio closes what is left to it, too, but warns whoever does that.
    [("asyncio", closed), ("trio", closed), ("asyncio", left_to_the_loop)],
)
async def test_a_generator_that_leaves_the_body_of_a_phase(
    leave: Callable[[StoreBarrier], Awaitable[None]],
) -> None:
    """It has not succeeded: the phase is broken at once, and the next one of that name works."""
    async with job(serve(), 2, timeout_secs=6.0) as ranks, Tasks() as tasks:

        async def uploads() -> None:
            async with ranks[0].phase("upload"):
                pass

        waiting = tasks.start(uploads)
        await anyio.sleep(0.1)
        began = time.monotonic()
        await leave(ranks[1])
        error = await waiting.raised(BrokenBarrierError)
        assert time.monotonic() < began + TOLD_SECS
        assert (error.name, error.rank) == ("upload", 1)
        results = await gather(partial(rank.execute_barrier, "upload") for rank in ranks)
        assert {result.sequence for result in results} == {1}


# -- Processes -------------------------------------------------------------------------------------


async def trains(rank: int, port: int) -> None:
    """A program: it crosses again and again; rank 1 raises SystemExit where SIGTERM finds it."""

    def preempted(*_: object) -> None:
        raise SystemExit(43)

    if rank == 1:
        signal.signal(signal.SIGTERM, preempted)
    barrier = one(client(port), rank, 3, timeout_secs=12)
    async with barrier:
        await barrier.execute_barrier("ready")
        say(event="ready")
        while True:
            # Awaited where it is made: a signal that finds it made and handed on, but not begun, is
            # in no code of ours, and Python prints that it was never awaited.
            try:
                await barrier.execute_barrier("step")
            except BrokenBarrierError as exc:
                say(told=time.monotonic(), rank=exc.rank, reason=exc.reason)
                await until_told()


@as_processes
def test_preempted_anywhere(forge: Forge) -> None:
    """A handler that raises SystemExit wherever it is: the exit code stays, nothing is printed,
    and the others are told within a second, however long their deadlines are."""
    for run in range(8):
        server = serve()
        with Programs(forge) as programs:
            ranks = [programs.start(trains, rank, server.port) for rank in range(3)]
            for rank in ranks:
                assert rank.event() == {"event": "ready"}, rank.stderr
            time.sleep(0.05 + 0.0231 * run)
            sent = ranks[1].signal(signal.SIGTERM)
            assert ranks[1].exit(sent + EXIT_SECS) == 43, ranks[1].stderr
            assert not ranks[1].stderr
            for rank in (ranks[0], ranks[2]):
                answer = rank.event(within_secs=5)
                assert answer["told"] < sent + TOLD_SECS
                assert answer["rank"] == 1, answer


async def hosts(leads: str) -> None:
    """A program: rank 0, with a TCPStore that it has made and passed in."""
    server = serve()
    say(port=server.port)
    async with one(server, 0, 2, prefix=PREFIX) as barrier:
        await barrier.execute_barrier("ready")
        await until_told()
        if leads == "nobody":
            await barrier.execute_barrier("last")
        else:
            try:
                await barrier.commit(publish, name="last", leader=1, timeout_secs=0.5)
            except BarrierTimeoutError as exc:
                say(in_doubt=exc.in_doubt)
    say(event="left")


@as_processes
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_of_a_store_that_was_passed_in_leaves_last(forge: Forge, backend: str) -> None:
    """It waits until a peer that is slow has learned that the phase was released (law 13)."""
    with Programs(forge) as programs:
        host = programs.start(hosts, "nobody", backend=backend)
        peer = programs.rank(1, 2, host.event()["port"], backend=backend)
        peer.start("cross", name="ready").released()
        waiting = peer.start("cross", name="last")
        time.sleep(0.3)
        peer.stop()
        tell(host)
        time.sleep(1.0)
        assert not host.has_said("left")
        peer.signal(signal.SIGCONT)
        waiting.released()
        assert host.event() == {"event": "left"}
        assert host.exit(time.monotonic() + EXIT_SECS) == 0
        assert not host.stderr
        assert not any(crash in peer.stderr for crash in CRASHES), peer.stderr


async def listens(rank: int, port: int, slow_secs: float) -> None:
    """A program: a rank whose signal listens in a thread, with c10d's client.

    :param slow_secs: how long each call of the host takes as it leaves
    """
    do = BlockingStore.do

    def slowly(self: BlockingStore, request: Request) -> Any:
        time.sleep(slow_secs)
        return do(self, request)

    async with TCPStoreBarrier(rank, 2, PREFIX, 20, True, port, "127.0.0.1", 20) as barrier:
        stop = StepSignal(barrier)
        assert not await stop.reached(0)

        async def stands() -> bool:
            return stop._agent._barrier._session.stands

        await until(stands)
        await barrier.execute_barrier("both")
        say(event="listens")
        await until_told()
        if rank == 0:
            BlockingStore.do = slowly  # type: ignore[method-assign]


@as_processes
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slow_secs", [0.0, 0.2], ids=["", "slow"])
def test_a_signal_listens_as_the_host_leaves(forge: Forge, backend: str, slow_secs: float) -> None:
    """c10d prints where its server goes while a thread uses it (law 12): one of a peer, or one of
    the host, whose calls may take longer than it has time to leave."""
    with Programs(forge) as programs:
        port = free_port()
        ranks = [
            programs.start(listens, rank, port, slow_secs, backend=backend, **{BY_THREADS: "1"})
            for rank in range(2)
        ]
        for rank in ranks:
            assert rank.event(within_secs=20) == {"event": "listens"}, rank.stderr
        for rank in ranks:
            assert rank.exit(tell(rank) + 2 * EXIT_SECS) == 0, rank.stderr
            assert not rank.stderr


def test_a_host_with_a_signal_goes_to_another_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal's thread goes on, with c10d's clients; they do not keep the server that ended."""
    monkeypatch.setenv(BY_THREADS, "1")
    barrier = TCPStoreBarrier(0, 1, PREFIX, 20, True, free_port(), "127.0.0.1", 5)
    stop = StepSignal(barrier)

    async def stands() -> bool:
        return stop._agent._barrier._session.stands

    async def first() -> None:
        await barrier.execute_barrier("x")
        assert not await stop.reached(0)
        await until(stands)

    async def again() -> None:
        await barrier.execute_barrier("x")
        await barrier.aclose()

    asyncio.run(first())
    asyncio.run(again())


@as_processes
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_leaves_after_what_another_rank_publishes(forge: Forge, backend: str) -> None:
    """Its own deadline has passed and it closes; the leader still says what it published."""
    with Programs(forge) as programs:
        host = programs.start(hosts, "rank 1", backend=backend)
        peer = programs.rank(1, 2, host.event()["port"], backend=backend)
        peer.start("cross", name="ready").released()
        commit = peer.start("commit", publish="wait", payload="1", name="last", leader=1)
        tell(host)
        assert peer.event()["event"] == "publishing"
        assert host.event() == {"in_doubt": True}
        time.sleep(1.0)
        assert not host.has_said("left")
        peer.do("give_word")
        assert commit.released()["value"] == "+1"
        assert host.event() == {"event": "left"}
        assert host.exit(time.monotonic() + EXIT_SECS) == 0


@pytest.mark.anyio
async def test_one_that_left_before_the_others_came() -> None:
    """Its program failed while its peer was still starting: the peer learns it when it comes."""
    server = serve()
    with pytest.raises(LookupError):
        async with one(server, 1, 2):
            raise LookupError("no shard")
    async with one(server, 0, 2, timeout_secs=15) as late:
        began = time.monotonic()
        with pytest.raises(BrokenBarrierError, match="no shard") as caught:
            await late.execute_barrier("x")
        assert caught.value.rank == 1
        assert time.monotonic() < began + 2


@in_process
async def test_leaving_with_an_answer_yet_to_come(capfd: pytest.CaptureFixture[str]) -> None:
    """As while a rank reports: c10d's wait is ended in good order, and nothing is printed of it."""
    async with job(serve(), 2, worker_threads=True) as ranks:
        await gather(rank.execute_barrier for rank in ranks)
        for rank in ranks:
            bell = rank._session._bell
            assert bell is not None
            bell.call(*[Read(rank._session.keys.state)] * 50)
            await rank.aclose()
    assert "failed on SocketImpl" not in capfd.readouterr().err


@in_process
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_rank_that_says_twice_that_it_leaves_counts_once(
    monkeypatch: pytest.MonkeyPatch, anyio_backend: str
) -> None:
    """A signal handler raises when the store has counted it. Counted twice it would pass for its
    peer, and the keys of both would go."""
    server = serve()
    # Else its peer would let the host go, and be gone itself.
    monkeypatch.setattr(sources, "hosted_here", lambda port: False)
    async with job(server, 2) as (first, second):
        membership = second._session.membership
        assert membership is not None

        class Strikes(int):
            def __rand__(self, roll: int) -> int:
                monkeypatch.setattr(leaving, "FIELD", FIELD)
                raise Struck

        monkeypatch.setattr(leaving, "FIELD", Strikes(FIELD))
        raised: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: raised.append(context.get("exception")))
        await first.aclose()
        loop.set_exception_handler(None)
        assert [type(exc) for exc in raised] == [Struck]
        assert (await told(second.execute_barrier("x"))).rank == 0
        roll = int(await anyio.to_thread.run_sync(server.get, membership.own.roll))
        assert (roll & FIELD, roll // GONE & FIELD) == (2, 1)


@pytest.mark.parametrize("after", range(3, 13, 2))
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_that_ends_while_it_connects(backend: str, after: int) -> None:
    """Its peers know this rank by its claim, and learn that it has gone, wherever it was cut."""
    shared, ready = HashStore(), threading.Event()
    told: list[BrokenBarrierError] = []
    times: list[float] = []

    async def waits() -> None:
        async with StoreBarrier(shared, rank=1, world_size=2, warn_after_secs=None) as peer:
            ready.set()
            with pytest.raises(BrokenBarrierError) as caught:
                await peer.execute_barrier(timeout_secs=20)
            told.append(caught.value)
            times.append(time.monotonic())

    thread = threading.Thread(target=partial(anyio.run, waits, backend=backend))
    thread.start()
    ready.wait()
    faulty = FaultyStore(shared)
    barrier = StoreBarrier(faulty, rank=0, world_size=2, warn_after_secs=None)

    async def connects() -> None:
        faulty.delay(secs=0.2, after=after, times=1)
        with anyio.move_on_after(0.1):
            await barrier.connect()

    anyio.run(connects, backend=backend)
    ended = time.monotonic()
    thread.join(30)
    assert (told[0].rank, told[0].reason) == (0, "it closed its barrier (its event loop ended)")
    assert times[0] < ended + TOLD_SECS


@in_process
async def test_a_rank_that_left_is_named_after_an_attempt_that_failed(memory: World) -> None:
    """By the attempt that reached the store, however the one before ended."""
    one, other = await memory.barriers(2)
    await other.aclose()
    await told(one.execute_barrier("x"))
    fails = 1

    def hook(operation: str, key: str) -> None:
        nonlocal fails
        if fails and operation == "check":
            fails -= 1
            raise ConnectionResetError("gone for a moment")

    store: Any = memory.store
    store.data.hook = hook
    # Nothing is known of its generation any more, as after a call that the store left unanswered.
    one._session._doubtful = True
    late = await told(one.execute_barrier("x"), 5.0)
    assert late.rank == 1
    assert not fails
