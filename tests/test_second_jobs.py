"""Others who come with a rank that is taken: the second is refused, the first is not disturbed."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from functools import partial

import anyio
import pytest
from processes import EXIT_SECS, PATIENCE_SECS, Forge, Rank
from rank_process import PREFIX, say
from reports import Programs, attempt, client, job, one, serve, until_told
from worlds import Tasks, free_port, gather

from async_barriers import BarrierError, BarrierResult, StoreBarrier, TCPStoreBarrier

SIZE = 3
STEPS = 8
HOST = socket.gethostname()


# -- Another job on the same port ------------------------------------------------------------------


async def trains(name: str, rank: int, port: int) -> None:
    """A program: a job's rank, which commits a shard of its own in each step."""

    async def publish(shards: Mapping[int, bytes]) -> None:
        say(published=[shards[number].decode() for number in range(SIZE)])

    barrier = TCPStoreBarrier(
        rank,
        SIZE,
        tcpstore_port=port,
        master_address="127.0.0.1",
        timeout_secs=4,
        timeout_barrier_init_secs=2,
    )
    try:
        async with barrier:
            for step in range(STEPS):
                await barrier.commit(publish, payload=f"{name}{rank} {step}".encode())
                say(committed=step)
                await anyio.sleep(0.4)
    except BarrierError as exc:
        say(refused=str(exc))
    say(event="over")
    await until_told()


def heard(rank: Rank) -> list[dict[str, object]]:
    """What a rank of a job said until it was over."""
    said = []
    while (event := rank.event()) != {"event": "over"}:
        said.append(event)
    return said


@pytest.mark.processes
def test_a_second_job_on_the_same_port(forge: Forge) -> None:
    """It is refused, each rank of it; the first job goes on, and publishes its own shards only."""
    port = free_port()
    with Programs(forge) as programs:
        first = [programs.start(trains, "a", rank, port) for rank in range(SIZE)]
        began = [rank.event() for rank in first]
        assert began[1:] == [{"committed": 0}] * (SIZE - 1)
        second = [programs.start(trains, "b", rank, port) for rank in range(SIZE)]
        for number, rank in enumerate(second):
            (said,) = heard(rank)
            assert set(said) == {"refused"}, (number, said)
            # The host's port is taken, and the others' ranks are.
            named = [str(port)] if number == 0 else [HOST, str(first[number].pid), str(rank.pid)]
            assert all(word in str(said["refused"]) for word in named), (number, said)
        steps = [{"committed": step} for step in range(STEPS)]
        shards = [
            {"published": [f"a{rank} {step}" for rank in range(SIZE)]} for step in range(STEPS)
        ]
        of_all = [
            before + heard(rank) for before, rank in zip([[b] for b in began], first, strict=True)
        ]
        assert [said for said in of_all[0] if "published" not in said] == steps
        assert [said for said in of_all[0] if "published" in said] == shards
        assert of_all[1:] == [steps] * (SIZE - 1)


# -- Another run -----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_rank_of_another_run() -> None:
    """It is refused, both runs are named, and nobody waits with it; a restart of this run is
    welcome, as before."""
    server = serve()
    async with job(server, 2, run_id="monday") as ranks, Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x"))
        await ranks[1].aclose()
        await waiting.raised(BarrierError)
        for number in (1, 0):
            stranger = one(server, number, 2, run_id="tuesday")
            began = time.monotonic()
            with pytest.raises(BarrierError, match="tuesday") as caught:
                await stranger.execute_barrier("x", timeout_secs=4)
            assert "monday" in str(caught.value)
            assert time.monotonic() < began + 2
            await stranger.aclose()
        ranks[1] = one(server, 1, 2, run_id="monday")
        await ranks[1].connect()
        results = await gather(partial(rank.execute_barrier, "y") for rank in ranks)
        assert {type(result) for result in results} == {BarrierResult}


@pytest.mark.anyio
async def test_the_run_that_torchrun_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_env` takes it, so that a second job of it at the same agent is refused."""
    server = serve()
    for name, value in {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)

    def from_env(rank: int, run: str) -> StoreBarrier:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
        return StoreBarrier.from_env(timeout_secs=4.0, timeout_barrier_init_secs=4.0)

    ranks = [from_env(rank, "monday") for rank in range(2)]
    await gather(rank.execute_barrier for rank in ranks)
    await ranks[1].aclose()
    stranger = from_env(1, "tuesday")
    with pytest.raises(BarrierError, match=r"monday.*tuesday|tuesday.*monday"):
        await stranger.execute_barrier()
    await stranger.aclose()
    await ranks[0].aclose()


# -- Another process of one rank -------------------------------------------------------------------


async def comes_second(rank: int, port: int) -> None:
    """A program: it says what its crossing came to."""
    barrier = one(client(port), rank, 2, prefix=PREFIX)
    began = time.monotonic()
    said = await attempt(barrier.execute_barrier("x", timeout_secs=5))
    say(said=str(said), refused=isinstance(said, BarrierError), secs=time.monotonic() - began)
    await barrier.aclose()
    await until_told()


@pytest.mark.processes
@pytest.mark.parametrize("waits", [False, True], ids=["between phases", "in a phase"])
def test_two_living_processes_with_one_rank(forge: Forge, waits: bool) -> None:
    """The second is refused at once, with both hosts and pids named; the first goes on unharmed,
    and counts for itself alone (law 1)."""
    server = serve()
    with Programs(forge) as programs:
        ranks = [programs.rank(number, 2, server.port) for number in range(2)]
        for call in [rank.start("cross", name="x") for rank in ranks]:
            call.released()
        waiting = ranks[0].start("cross", name="x") if waits else None
        time.sleep(0.2)
        second = programs.start(comes_second, 0, server.port)
        said = second.event()
        assert said["refused"], said
        assert said["secs"] < 2
        for word in (HOST, str(ranks[0].pid), str(second.pid)):
            assert word in said["said"], said
        if waiting is None:
            alone = ranks[1].start("cross", name="y", timeout_secs=0.5)
            assert alone.error("BarrierTimeoutError")["missing_ranks"] == [0]
            waiting = ranks[0].start("cross", name="x")
        else:
            assert not waiting.answered
        assert ranks[1].start("cross", name="x").released()["sequence"] == 1
        assert waiting.released()["sequence"] == 1


@pytest.mark.processes
def test_a_rank_whose_process_was_killed_is_not_taken(forge: Forge) -> None:
    """Who is dead holds no rank: the next process of it is welcome."""
    server = serve()
    with Programs(forge) as programs:
        ranks = [programs.rank(number, 2, server.port) for number in range(2)]
        for call in [rank.start("cross", name="x") for rank in ranks]:
            call.released()
        killed = ranks[0].signal(signal.SIGKILL)
        assert ranks[0].exit(killed + EXIT_SECS) == -signal.SIGKILL
        ranks[0] = programs.rank(0, 2, server.port)
        by = time.monotonic() + PATIENCE_SECS
        answers = [{"error": "not yet"}]
        while any("error" in answer for answer in answers):
            assert time.monotonic() < by, answers
            calls = [rank.start("cross", name="y", timeout_secs=2) for rank in ranks]
            answers = [call.answer() for call in calls]


@pytest.mark.anyio
@pytest.mark.parametrize("waits", [False, True], ids=["between phases", "in a phase"])
async def test_two_barriers_of_one_rank_in_one_process(waits: bool) -> None:
    """The second is refused while the first is open, however it calls; then it may be built."""
    server = serve()
    async with job(server, 2) as ranks, Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x")) if waits else None
        await anyio.sleep(0.05)
        for call in ("connect", "execute_barrier"):
            second = one(server, 0, 2, timeout_secs=4)
            with pytest.raises(BarrierError) as caught:
                await (second.connect() if call == "connect" else second.execute_barrier("x"))
            assert HOST in str(caught.value)
            assert str(os.getpid()) in str(caught.value)
            await second.aclose()
        waiting = waiting or tasks.start(partial(ranks[0].execute_barrier, "x"))
        assert (await ranks[1].execute_barrier("x")).sequence == 0
        assert (await waiting.returned()).sequence == 0
        await ranks[0].aclose()
        ranks[0] = one(server, 0, 2)
        await ranks[0].connect()
        results = await gather(partial(rank.execute_barrier, "z") for rank in ranks)
        assert {result.sequence for result in results} == {0}
