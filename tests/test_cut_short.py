"""Undoing that is itself cut short: by a second cancellation, a store that stalls, an exit."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import pytest
from cuttable import Ways
from processes import EXIT_SECS, NO_HOST_NAME, Forge
from rank_process import PREFIX, say
from reports import (
    TOLD_SECS,
    Programs,
    attempt,
    client,
    host_store,
    interpreter,
    job,
    one,
    serve,
    tell,
    until_told,
)
from worlds import Tasks, close, free_port, gather, library_threads_gone

from async_barriers import BarrierError, BrokenBarrierError, StoreBarrier, TCPStoreBarrier


def asyncio_only(test: Callable[..., Any]) -> Callable[..., Any]:
    """A task's own `cancel` goes through what anyio shields."""
    for mark in (pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])):
        test = mark(test)
    return test


async def cancel(task: asyncio.Task[object], times: int, gap: float = 0.0) -> None:
    """Cancel ``task`` again and again, and wait until it has ended."""
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(gap)
    await asyncio.wait([task])


async def publish(payloads: object) -> bytes:
    return b"published"


@asyncio_only
@pytest.mark.parametrize("connected", [False, True], ids=["not connected", "connected"])
@pytest.mark.parametrize(
    ("times", "gap"), [(1, 0.0), (2, 0.0), (2, 0.001), (3, 0.005)], ids=["1", "2", "2 slow", "3"]
)
async def test_the_body_of_a_phase_that_is_cancelled(
    connected: bool, times: int, gap: float
) -> None:
    """However often, and also before its barrier has connected: its peer is told at once."""
    server = serve()
    ranks = [one(server, rank, 2, timeout_secs=6) for rank in range(2)]
    if connected:
        await gather(rank.execute_barrier for rank in ranks)

    async def body() -> None:
        async with ranks[0].phase("x"):
            await asyncio.sleep(30)

    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x"))
        task: asyncio.Task[object] = asyncio.create_task(body())
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await cancel(task, times, gap)
        error = await waiting.raised(BrokenBarrierError)
        assert time.monotonic() < began + TOLD_SECS
        assert error.rank == 0
        assert "cancel" in error.reason
    await close(ranks)


@asyncio_only
@pytest.mark.parametrize("times", [1, 2])
async def test_cancelled_while_the_store_is_out_of_reach(times: int) -> None:
    """What is owed then is made up for when it can be reached again: who comes last is not
    released, and who waits is told who gave up."""
    server = serve()
    ways = Ways()
    way = ways.to(server.port)
    ranks = [one(client(way.port), 0, 3), *(one(server, rank, 3) for rank in (1, 2))]
    try:
        await gather(rank.execute_barrier for rank in ranks)
        async with Tasks() as tasks:
            waiting = tasks.start(partial(ranks[1].execute_barrier, "x", timeout_secs=8))
            task: asyncio.Task[object] = asyncio.create_task(ranks[0].execute_barrier("x"))
            await asyncio.sleep(0.3)
            way.cut("hole")
            await cancel(task, times, 0.1)
            way.heal()
            # Its next call has it look for the store again, if it has not done so by itself.
            await attempt(ranks[0].execute_barrier("y", timeout_secs=1.5))
            late = await attempt(ranks[2].execute_barrier("x", timeout_secs=2))
            for error in (late, await waiting.raised(BrokenBarrierError)):
                assert isinstance(error, BrokenBarrierError), error
                assert error.rank == 0
        await close(ranks)
    finally:
        ways.close()


@asyncio_only
async def test_closing_that_is_cancelled_while_it_waits_for_a_publish() -> None:
    """Its rank leaves all the same, and its peers are told so."""
    async with job(serve(), 2) as ranks, Tasks() as tasks:
        publishing, go_on = anyio.Event(), anyio.Event()

        async def stubborn(payloads: object) -> bytes:
            publishing.set()
            with anyio.CancelScope(shield=True):
                await go_on.wait()
            return b"published"

        tasks.start(partial(ranks[0].commit, stubborn, name="save"))
        tasks.start(partial(ranks[1].commit, publish, name="save"))
        await publishing.wait()
        closing: asyncio.Task[object] = asyncio.create_task(ranks[0].aclose())
        await asyncio.sleep(0)
        await cancel(closing, 1)
        began = time.monotonic()
        error = await attempt(ranks[1].execute_barrier("y", timeout_secs=5))
        assert isinstance(error, BrokenBarrierError), error
        assert error.rank == 0
        assert time.monotonic() < began + TOLD_SECS
        go_on.set()


@asyncio_only
@pytest.mark.parametrize("when", ["publishing", "published"])
@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 5])
async def test_a_leader_that_is_cancelled_twice(when: str, rounds: int) -> None:
    """Its peers learn at once what became of the commit; what was published is never declared
    broken to them."""
    async with job(serve(), 2) as ranks, Tasks() as tasks:

        async def cancel_twice() -> None:
            for _ in range(2):
                for _ in range(rounds):
                    await asyncio.sleep(0)
                task.cancel()

        async def published_and_cancelled(payloads: object) -> bytes:
            tasks.start(cancel_twice)
            if when == "publishing":
                await asyncio.sleep(30)
            return b"published"

        waiting = tasks.start(partial(ranks[1].commit, publish, name="save"))
        began = time.monotonic()
        task: asyncio.Task[object] = asyncio.create_task(
            ranks[0].commit(published_and_cancelled, name="save")
        )
        await asyncio.wait([task])
        await waiting.ended.wait()
        assert time.monotonic() < began + TOLD_SECS
        if when == "publishing":
            assert (await waiting.raised(BrokenBarrierError)).rank == 0
        elif waiting.error is None:
            assert waiting.value == b"published"
        else:
            assert (await waiting.raised(BarrierError)).in_doubt


@asyncio_only
@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 6, 10])
async def test_a_host_whose_closing_is_cancelled(rounds: int) -> None:
    """It lets go of its port and its threads all the same."""
    port = free_port()

    def host() -> TCPStoreBarrier:
        return TCPStoreBarrier(
            0, 1, tcpstore_port=port, master_address="127.0.0.1", timeout_barrier_init_secs=3
        )

    barrier = host()
    await barrier.execute_barrier()
    task: asyncio.Task[object] = asyncio.create_task(barrier.aclose())
    for _ in range(rounds):
        await asyncio.sleep(0)
    await cancel(task, 1)
    async with host() as anew:
        await anew.execute_barrier()
    await barrier.aclose()
    await library_threads_gone()


# -- A store that stalls ---------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.processes
@pytest.mark.parametrize("call", ["crosses", "commits"])
async def test_the_store_stalls_as_a_rank_leaves(
    forge: Forge, anyio_backend: str, call: str
) -> None:
    """It is cancelled and closes in good order meanwhile: its peer is told when the store is well
    again, long before its own deadline."""
    with Programs(forge) as programs:
        agent = programs.start(host_store)
        store = client(agent.event()["port"])
        async with job(store, 3, timeout_secs=15.0) as ranks, Tasks() as tasks:
            for _ in range(3):
                await gather(partial(rank.execute_barrier, "x") for rank in ranks)

            def enter(rank: StoreBarrier) -> Awaitable[object]:
                if call == "commits":
                    return rank.commit(publish, name="x", leader=1)
                return rank.execute_barrier("x")

            # Rank 2 never comes.
            waiting = tasks.start(partial(enter, ranks[1]))
            leaving = tasks.start(partial(enter, ranks[0]))
            await anyio.sleep(0.3)
            agent.stop()
            leaving.scope.cancel()
            with anyio.fail_after(1.3):
                await leaving.ended.wait()
            tasks.start(ranks[0].aclose)
            await anyio.sleep(1.3 - leaving.secs + 0.3)
            back = agent.signal(signal.SIGCONT)
            error = await waiting.raised(BrokenBarrierError)
            assert time.monotonic() < back + TOLD_SECS
            assert error.rank == 0


CALLS = ("crosses", "commits", "times out")


async def leaves(port: int, call: str) -> None:
    """A program: its rank waits, until it is cancelled or its deadline passes, and it ends."""
    async with one(client(port), 0, 2) as barrier, anyio.create_task_group() as tasks:

        async def wait() -> None:
            if call == "commits":
                await barrier.commit(publish, name="x")
            elif call == "crosses":
                await barrier.execute_barrier("x")
            else:
                await attempt(barrier.execute_barrier("x", timeout_secs=0.8))

        tasks.start_soon(wait)
        await anyio.sleep(0.3)
        say(event="waits")
        await until_told()
        if call != "times out":
            tasks.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.processes
@pytest.mark.parametrize("call", CALLS[:2])
async def test_a_store_that_comes_back_after_a_rank_has_gone(
    forge: Forge, anyio_backend: str, call: str
) -> None:
    """The rank's process has ended in time, and its last words arrive all the same (law 3)."""
    with Programs(forge) as programs:
        agent = programs.start(host_store)
        port = agent.event()["port"]
        gone = programs.start(leaves, port, call, backend=anyio_backend)
        async with one(client(port), 1, 2) as peer, Tasks() as tasks:
            waiting = tasks.start(partial(peer.execute_barrier, "y"))
            assert await anyio.to_thread.run_sync(gone.event) == {"event": "waits"}
            agent.stop()
            assert gone.exit(tell(gone) + EXIT_SECS) == 0, gone.stderr
            back = agent.signal(signal.SIGCONT)
            error = await waiting.raised(BrokenBarrierError)
            assert time.monotonic() < back + TOLD_SECS
            assert (error.rank, "closed" in error.reason) == (0, True)


async def leaves_and_comes_back(port: int, backend: str, waits: bool) -> None:
    """A program: a rank whose event loop ends, and which another loop uses then."""
    barrier = one(client(port), 0, 2, prefix=PREFIX, timeout_secs=5)

    async def leave() -> None:
        await barrier.execute_barrier("ready")
        async with Tasks() as tasks:
            if waits:
                tasks.start(partial(barrier.execute_barrier, "x"))
                await anyio.sleep(0.3)
            say(event="ready")
            await until_told()

    async def meet() -> None:
        say(event="left")
        await until_told()
        # The first call ends the generation that it left, and its peer may hear of that late.
        while isinstance(met := await attempt(barrier.execute_barrier("y")), BrokenBarrierError):
            pass
        say(event=type(met).__name__)
        await barrier.aclose()

    def two_loops() -> None:
        for use in (leave, meet):
            anyio.run(use, backend=backend)

    await anyio.to_thread.run_sync(two_loops)


@pytest.mark.processes
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("waits", [False, True], ids=["idle", "in a phase"])
def test_another_loop_after_the_last_words(forge: Forge, backend: str, waits: bool) -> None:
    """What was said is not taken back: the rank joins again, and its peer meets it there."""
    with Programs(forge) as programs:
        agent = programs.start(host_store)
        port = agent.event()["port"]
        leaver = programs.start(leaves_and_comes_back, port, backend, waits)
        peer = programs.rank(1, 2, port)
        peer.start("cross", name="ready").released()
        waiting = peer.start("cross", name="y")
        assert leaver.event() == {"event": "ready"}
        agent.stop()
        tell(leaver)
        assert leaver.event() == {"event": "left"}
        agent.signal(signal.SIGCONT)
        assert waiting.error("BrokenBarrierError")["rank"] == 0
        tell(leaver)
        while peer.do("cross", name="y", timeout_secs=5).get("error") == "BrokenBarrierError":
            pass
        assert leaver.event() == {"event": "BarrierResult"}


@pytest.mark.processes
@pytest.mark.parametrize("call", CALLS)
def test_an_exit_as_the_store_comes_back(forge: Forge, call: str) -> None:
    """It stalls for a while, or for good, as a rank gives up and its program ends: in time, with
    code 0 and without a word (law 8)."""
    stalls = (1.1, 1.5, None)
    with Programs(forge) as programs:
        agents = [programs.start(host_store) for _ in stalls]
        # A forked one ends faster than what comes back too late.
        ranks = [interpreter(leaves, agent.event()["port"], call) for agent in agents]
        for rank in ranks:
            programs.enter_context(rank)
            programs.callback(rank.kill)
            assert json.loads(said(rank)) == {"event": "waits"}
        for agent in agents:
            agent.stop()
        began = time.monotonic()
        for rank in ranks:
            print(file=rank.stdin, flush=True)
        for agent, stall in zip(agents, stalls, strict=True):
            if stall is not None:
                time.sleep(max(0.0, began + stall - time.monotonic()))
                agent.signal(signal.SIGCONT)
        for rank, stall in zip(ranks, stalls, strict=True):
            # What torch takes to end is not ours, nor what three interpreters take on two
            # processors.
            by = began + 2 * EXIT_SECS + 4
            error = rank.communicate(timeout=max(0.5, by - time.monotonic()))[1]
            words = [line for line in error.splitlines() if NO_HOST_NAME not in line]
            assert (rank.returncode, words) == (0, []), (stall, error)


def said(rank: subprocess.Popen[str]) -> str:
    assert rank.stdout is not None
    return rank.stdout.readline()
