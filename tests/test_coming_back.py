"""Ranks that come back: whatever was tried before, all meet again when all are there (law 11)."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial

import anyio
import pytest
from processes import EXIT_SECS, Forge, Rank
from rank_process import PREFIX, say
from reports import (
    TOLD_SECS,
    Programs,
    attempt,
    client,
    host_store,
    meet,
    one,
    relay,
    serve,
    tell,
    until_told,
)
from worlds import close, free_port, gather

from async_barriers import BarrierConnectionError, BarrierError, StoreBarrier, TCPStoreBarrier

# -- In step again ---------------------------------------------------------------------------------


async def tries_alone(barrier: StoreBarrier, how: str) -> None:
    """What a rank does in vain that has come back first."""
    if how == "deadline":
        assert isinstance(
            await attempt(barrier.execute_barrier("save", timeout_secs=0.3)), BarrierError
        )
    elif how == "abort":
        await barrier.abort("a shard is missing", "save")
    elif how == "body":
        with pytest.raises(LookupError):
            async with barrier.phase("save"):
                raise LookupError("a shard is missing")


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["nothing", "deadline", "abort", "body"])
@pytest.mark.parametrize("both", [False, True], ids=["one restarts", "both restart"])
async def test_what_was_tried_before_all_were_back(how: str, both: bool) -> None:
    """It puts nobody out of step: ranks that cross once per round meet within three."""
    server = serve()
    options = {"timeout_secs": 2.0, "timeout_barrier_init_secs": 2.0}
    ranks = [one(server, rank, 2, **options) for rank in range(2)]
    await gather(partial(rank.execute_barrier, "save") for rank in ranks)
    await ranks[0].aclose()
    if both:
        await ranks[1].aclose()
    ranks[0] = one(server, 0, 2, **options)
    await tries_alone(ranks[0], how)
    if both:
        ranks[1] = one(server, 1, 2, **options)
    await meet(*ranks, name="save", secs=0.5)
    await close(ranks)


@pytest.mark.anyio
async def test_restarts_that_take_turns() -> None:
    """Three ranks of which one after another is built anew, and tries alone: they meet each time,
    in names that are old and in names that are new."""
    server = serve()
    options = {"timeout_secs": 2.0, "timeout_barrier_init_secs": 2.0}
    ranks = [one(server, rank, 3, **options) for rank in range(3)]
    await gather(partial(rank.execute_barrier, "save") for rank in ranks)
    for turn in range(6):
        await ranks[turn % 3].aclose()
        ranks[turn % 3] = one(server, turn % 3, 3, **options)
        await tries_alone(ranks[turn % 3], ("deadline", "abort")[turn % 2])
        await meet(*ranks, name="save", secs=0.5)
        await meet(*ranks, name=f"step-{turn}", secs=0.5)
    await close(ranks)


@pytest.mark.anyio
async def test_who_comes_back_is_not_told_of_what_only_the_gone_had_broken() -> None:
    """A deadline of processes that are gone is nothing to those that come after them."""
    server = serve()
    ranks = [one(server, rank, 2) for rank in range(2)]
    await gather(partial(rank.execute_barrier, "save") for rank in ranks)
    assert isinstance(
        await attempt(ranks[0].execute_barrier("save", timeout_secs=0.1)), BarrierError
    )
    await close(ranks)
    ranks = [one(server, rank, 2) for rank in range(2)]
    await gather(rank.connect for rank in ranks)
    results = await gather(partial(rank.execute_barrier, "save") for rank in ranks)
    assert len({result.sequence for result in results}) == 1
    await close(ranks)


# -- Alone -----------------------------------------------------------------------------------------


async def is_far(port: int) -> None:
    """A program: a way to a store whose answers take a millisecond."""

    def slowly(chunk: bytes) -> Iterator[bytes]:
        time.sleep(0.001)
        yield chunk

    with relay(port, down=slowly) as way:
        say(port=way.port)
        await until_told()


@pytest.mark.anyio
@pytest.mark.processes
@pytest.mark.parametrize("size", [100, 1000, 4000])
async def test_alone_in_a_large_world(forge: Forge, anyio_backend: str, size: int) -> None:
    """Also over a network that is slow, it is told within `timeout_barrier_init_secs` who has not
    joined again."""
    server = serve()
    with Programs(forge) as programs:
        store = client(programs.start(is_far, server.port).event()["port"])
        options = {"timeout_secs": 9.0, "timeout_barrier_init_secs": 2.0}
        async with one(store, 0, size, **options):
            pass
        barrier = one(store, 0, size, **options)
        await barrier.connect()
        began = time.monotonic()
        with pytest.raises(BarrierError, match=r"ranks? 1, 2, 3"):
            await barrier.execute_barrier()
        assert time.monotonic() < began + 2 + 1
        await barrier.aclose()


# -- Networks that fail as a rank comes back -------------------------------------------------------


def kill(rank: Rank) -> None:
    killed = rank.signal(signal.SIGKILL)
    assert rank.exit(killed + EXIT_SECS) == -signal.SIGKILL


@pytest.mark.processes
@pytest.mark.parametrize("secs", [0.2, 1.5])
@pytest.mark.parametrize("index", range(6))
def test_a_connection_that_is_reset_early(forge: Forge, index: int, secs: float) -> None:
    """Whichever of its connections it is, a rank that waits is told all the same when its peer
    has been killed and is back."""
    server = serve()
    with Programs(forge) as programs, relay(server.port) as way:
        given = {"timeout_secs": 8.0, "timeout_barrier_init_secs": 5.0}
        waiting = programs.rank(0, 2, way.port, given=given)
        peer = programs.rank(1, 2, server.port, given=given)
        call = waiting.start("cross", name="x")
        time.sleep(secs)
        for link in way.links[index : index + 1]:
            link.reset()
        time.sleep(0.5)
        kill(peer)
        peer = programs.rank(1, 2, server.port, given=given)
        back = time.monotonic()
        answer = call.answer()
        # Where it was the connection of what it waits for, it may have lost the phase with it.
        assert "error" in answer
        assert answer["ended"] < back + TOLD_SECS
        met = False
        for _ in range(3):
            calls = [rank.start("cross", timeout_secs=2) for rank in (waiting, peer)]
            # Of both, before they cross again: once per round.
            answers = [call.answer() for call in calls]
            met = met or not any("error" in answer for answer in answers)
        assert met


class Gate:
    """Lets so many chunks pass, and the others when it is opened."""

    def __init__(self, passes: int) -> None:
        self.left = passes
        self.shut = threading.Event()
        self._lock = threading.Lock()
        self._open = threading.Event()

    def __call__(self, chunk: bytes) -> Iterator[bytes]:
        with self._lock:
            self.left -= 1
            waits = self.left < 0
        if waits:
            self.shut.set()
            self._open.wait()
        yield chunk

    def open(self) -> None:
        self._open.set()


@pytest.mark.processes
@pytest.mark.bound(120)
def test_what_a_killed_process_had_sent_comes_late(forge: Forge) -> None:
    """At whatever point of joining its way was cut: when that comes through, after its peers have
    restarted again and again, it puts nobody back, and all meet when all are there."""
    for passes in range(30):
        if came_late(forge, passes):
            return
    raise AssertionError("joining does not end")


def came_late(forge: Forge, passes: int) -> bool:
    """One such case; whether joining needed no more than ``passes``."""
    server = serve()
    given = {"timeout_secs": 4.0, "timeout_barrier_init_secs": 3.0}
    gate = Gate(passes)
    with Programs(forge) as programs, relay(server.port, up=gate) as way:
        ranks = [programs.rank(number, 3, server.port, given=given) for number in range(3)]
        for call in [rank.start("cross") for rank in ranks]:
            call.released()
        kill(ranks[2])
        late = programs.start(joins, way.port)
        while not (through := late.has_said("joined")) and not gate.shut.wait(0.01):
            pass
        kill(late)
        for _ in range(11):
            kill(ranks[0])
            ranks[0] = programs.rank(0, 3, server.port, given=given)
        for call in [rank.start("cross", timeout_secs=0.3) for rank in ranks[:2]]:
            assert "error" in call.answer()
        gate.open()
        time.sleep(0.2)
        ranks[2] = programs.rank(2, 3, server.port, given=given)
        for _ in range(3):
            calls = [rank.start("cross", timeout_secs=2) for rank in ranks]
            answers = [call.answer() for call in calls]
            if not any("error" in answer for answer in answers):
                return through
        raise AssertionError(f"they never met again, cut after {passes} chunks")


async def joins(port: int) -> None:
    """A program: rank 2 comes back, and is heard of no more."""
    barrier = one(client(port), 2, 3, prefix=PREFIX)
    await barrier.connect()
    say(event="joined")
    await anyio.sleep_forever()


# -- A port that is still held ---------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.processes
async def test_an_old_process_still_holds_the_port(forge: Forge, anyio_backend: str) -> None:
    """The host tries again until it is free, within the time that it has to connect."""
    port = free_port()
    with Programs(forge) as programs:
        former = programs.start(host_store, port)
        assert former.event() == {"port": port}
        ranks = [own(rank, port, timeout_barrier_init_secs=8) for rank in range(2)]

        async def ends() -> None:
            await anyio.sleep(1.5)
            tell(former)

        began = time.monotonic()
        await gather([ends, ranks[0].connect])
        assert time.monotonic() > began + 1.5
        await ranks[1].connect()
        await gather(rank.execute_barrier for rank in ranks)
        await close(ranks)


@pytest.mark.anyio
async def test_a_port_that_is_never_free() -> None:
    """The host says which one it waited for, when its time to connect is over."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        barrier = own(0, port, timeout_barrier_init_secs=1)
        began = time.monotonic()
        with pytest.raises(BarrierConnectionError, match=str(port)):
            await barrier.connect()
        assert began + 0.9 < time.monotonic() < began + 2
        await barrier.aclose()


def own(rank: int, port: int, **options: float) -> TCPStoreBarrier:
    """A rank of two over a store of their own."""
    where = {"tcpstore_port": port, "master_address": "127.0.0.1"}
    return TCPStoreBarrier(rank, 2, timeout_secs=10, **where, **options)  # type: ignore[arg-type]
