"""DistBarrier: a world of one in this process, worlds of three in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import anyio
import pytest
import torch.distributed as dist

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierTimeoutError,
    BrokenBarrierError,
    DistBarrier,
)
from async_barriers._collectives import Collectives

pytestmark = pytest.mark.anyio


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """An initialised default group with one rank, this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


async def test_it_needs_a_default_group_or_one_given() -> None:
    """Without an initialised default group, connecting says what to call."""
    async with anyio.create_task_group():
        barrier = DistBarrier()
        with pytest.raises(BarrierConnectionError, match=r"init_process_group\(\) first"):
            await barrier.connect()
        with pytest.raises(BarrierConnectionError, match="init_process_group"):
            await barrier.execute_barrier()
        await barrier.aclose()


@pytest.mark.parametrize(("group", "timeout_secs"), [("world", 1), (-100, 1), (None, 0)])
def test_bad_arguments_are_refused_when_it_is_built(group: Any, timeout_secs: float) -> None:
    """What is no group, such as torch's mark for "not a member", is refused at once."""
    with pytest.raises((TypeError, ValueError), match=r"process_group must|timeout_secs is 0"):
        DistBarrier(group, timeout_secs=timeout_secs)


@pytest.mark.usefixtures("world_of_one")
async def test_crossings_are_counted_in_call_order() -> None:
    """All names share one order of calls, and nobody knows who came last."""
    async with DistBarrier(timeout_secs=10) as barrier:
        first = await barrier.execute_barrier("a")
        second = await barrier.execute_barrier("b", timeout_secs=None)
        assert (first.name, first.sequence, first.last_rank) == ("a", 0, -1)
        assert (second.name, second.sequence) == ("b", 1)
        with pytest.raises(TypeError, match="name must be a string"):
            await barrier.execute_barrier(3)  # type: ignore[arg-type]


@pytest.mark.usefixtures("world_of_one")
async def test_a_group_that_is_given_is_used_and_left_alone() -> None:
    """Closing destroys the group only if the barrier made it."""
    group = dist.new_group(backend="gloo")
    async with DistBarrier(group) as barrier:
        await barrier.execute_barrier()
    assert dist.get_rank(group) == 0
    await barrier.aclose()
    with pytest.raises(BarrierClosedError, match="DistBarrier is closed"):
        await barrier.execute_barrier()


@pytest.mark.usefixtures("world_of_one")
async def test_closing_after_the_default_group_is_no_error() -> None:
    """Whoever tears torch down first leaves nothing for us to destroy."""
    barrier = DistBarrier()
    await barrier.connect()
    dist.destroy_process_group()
    await barrier.aclose()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.usefixtures("world_of_one")
async def test_commit_returns_what_the_leader_publishes() -> None:
    """None stands for no bytes; whatever publish gets wrong, it has published."""
    seen: list[Mapping[int, bytes]] = []
    answer: Any = b"done"

    async def publish(payloads: Mapping[int, bytes]) -> Any:
        seen.append(payloads)
        return answer

    async with DistBarrier() as barrier:
        assert await barrier.commit(publish, payload=b"mine") == b"done"
        answer = None
        assert await barrier.commit(publish) == b""
        assert seen == [{0: b"mine"}, {0: b""}]
        answer = "text"
        with pytest.raises(TypeError, match="publish's result must be bytes, not str"):
            await barrier.commit(publish)
        with pytest.raises(ValueError, match="rank 3 is outside the world"):
            await barrier.commit(publish, leader=3)


@pytest.mark.usefixtures("world_of_one")
async def test_publish_that_raises_leaves_the_barrier_whole() -> None:
    """All ranks took part in the collectives, so the next call is in step."""

    async def fail(_: Mapping[int, bytes]) -> bytes:
        raise OSError("disk full")

    async with DistBarrier() as barrier:
        with pytest.raises(OSError, match="disk full"):
            await barrier.commit(fail)
        assert (await barrier.execute_barrier()).sequence == 1


@pytest.mark.usefixtures("world_of_one")
async def test_the_leaders_deadline_stops_publish_without_doubt() -> None:
    """The leader knows that nothing was published, and the barrier is of no more use."""
    async with DistBarrier() as barrier:
        with pytest.raises(BarrierTimeoutError, match=r"timed out after 0\.1 s") as caught:
            await barrier.commit(lambda _: anyio.sleep_forever(), timeout_secs=0.1)
        assert not caught.value.in_doubt
        with pytest.raises(BrokenBarrierError, match=r"timed out after 0.1 s.*use a StoreBarrier"):
            await barrier.execute_barrier()
        with pytest.raises(BrokenBarrierError, match="of no more use"):
            await barrier.connect()


@pytest.mark.usefixtures("world_of_one")
async def test_a_cancelled_publish_breaks_the_barrier_for_good() -> None:
    """Cancellation passes through, and later calls say what happened."""
    async with DistBarrier() as barrier:
        with anyio.move_on_after(0.1) as scope:
            await barrier.commit(lambda _: anyio.sleep_forever())
        assert scope.cancelled_caught
        with pytest.raises(BrokenBarrierError, match="its task was cancelled"):
            await barrier.execute_barrier()


@pytest.mark.usefixtures("world_of_one")
async def test_abort_takes_a_turn_in_the_collective() -> None:
    """In a world of one there is nobody else to tell, and the next call works."""
    async with DistBarrier() as barrier:
        await barrier.abort("changed my mind", "a")
        with pytest.raises(KeyError, match="body"):
            async with barrier.phase("b"):
                raise KeyError("body")
        assert (await barrier.execute_barrier()).sequence == 2


# What each of three ranks runs; `act` is the test's own part.
RANK_MAIN = """
import json, os, sys, time
import anyio, torch.distributed as dist
from async_barriers import *

rank = int(sys.argv[1])
port_file = sys.argv[2]

def say(**facts):
    print(json.dumps(facts), flush=True)

def failure(exc):
    in_doubt = getattr(exc, "in_doubt", None)
    return {"error": type(exc).__name__, "text": str(exc), "in_doubt": in_doubt}

async def attempt(awaitable):
    started = time.monotonic()
    try:
        result = await awaitable
        result = result.decode() if isinstance(result, bytes) else "ok"
    except Exception as exc:
        result = failure(exc)
    return {"rank": rank, "result": result, "secs": time.monotonic() - started}

ACT

async def main():
    barrier = DistBarrier(timeout_secs=30)
    await act(barrier)
    started = time.monotonic()
    await barrier.aclose()
    assert time.monotonic() - started < 1, "aclose took too long"

store = dist.FileStore(port_file, 3)
dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
anyio.run(main, backend=sys.argv[3])
say(rank=rank, ended=time.time())
"""


def run_ranks(act: str, tmp_path: Any, backend: str) -> tuple[list[dict[str, Any]], list[int], str]:
    """Run three ranks to their end; what they said, their exit codes, their stderr."""
    program = RANK_MAIN.replace("ACT", textwrap.dedent(act))
    arguments = [str(tmp_path / "rendezvous"), backend]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(3)
    ]
    said, errors = [], ""
    for process in ranks:
        out, err = process.communicate(timeout=90)
        said += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        errors += err
    return said, [process.returncode for process in ranks], errors


def results(said: list[dict[str, Any]]) -> dict[int, Any]:
    """The result of each rank that told one."""
    return {fact["rank"]: fact["result"] for fact in said if "result" in fact}


@pytest.mark.processes
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_three_ranks_stay_in_step(tmp_path: Any, backend: str) -> None:
    """Crossings, commits and what goes wrong in them reach every rank, and all go on."""
    act = """
    async def act(barrier):
        async def publish(payloads):
            return b",".join(payloads[r] for r in sorted(payloads))
        async def fail(payloads):
            raise OSError("disk full")
        async def failing_body():
            async with barrier.phase("upload"):
                if rank == 1:
                    raise OSError("disk full")
        for _ in range(20):
            await barrier.execute_barrier("step", timeout_secs=20)
        payload = b"p%d" % rank * (rank + 1)
        say(case="commit", **await attempt(barrier.commit(publish, payload=payload, leader=1)))
        say(case="fail", **await attempt(barrier.commit(fail, leader=2)))
        say(case="body", **await attempt(failing_body()))
        say(case="leaders", **await attempt(barrier.commit(publish, leader=rank)))
    """
    said, codes, errors = run_ranks(act, tmp_path, backend)
    assert codes == [0, 0, 0], errors
    told = {
        case: results([f for f in said if f.get("case") == case])
        for case in ("commit", "fail", "body", "leaders")
    }
    assert told["commit"] == dict.fromkeys(range(3), "p0,p1p1,p2p2p2")
    assert told["fail"][2]["error"] == told["body"][1]["error"] == "OSError"
    for rank in (0, 1):
        text = told["fail"][rank]["text"]
        assert "broken by rank 2: publish failed: it raised OSError: disk full" in text
    for rank in (0, 2):
        assert "broken by rank 1: it gave the phase up" in told["body"][rank]["text"]
    assert all("different leaders" in refused["text"] for refused in told["leaders"].values())


@pytest.mark.processes
def test_a_deadline_ends_the_barrier_but_not_the_process(tmp_path: Any) -> None:
    """The rank whose peers never came times out, in doubt, and its process still exits at once."""
    act = """
    async def act(barrier):
        await barrier.execute_barrier()
        if rank == 0:
            say(**await attempt(barrier.execute_barrier("lonely", timeout_secs=1)))
        else:
            await anyio.sleep(6)
    """
    said, codes, errors = run_ranks(act, tmp_path, "trio")
    assert codes == [0, 0, 0], errors
    told = results(said)[0]
    assert told["error"] == "BarrierTimeoutError"
    assert told["in_doubt"]
    ended = {fact["rank"]: fact["ended"] for fact in said if "ended" in fact}
    # The peers sleep 5 s longer: the exit did not wait for the collective to end.
    assert ended[0] < min(ended[1], ended[2]) - 2


@pytest.mark.processes
def test_exit_with_a_crossing_under_way_is_prompt(tmp_path: Any) -> None:
    """A barrier that was never closed is left behind at exit, not waited for."""
    act = """
    async def act(barrier):
        await barrier.execute_barrier()
        if rank == 0:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(barrier.execute_barrier)
                await anyio.sleep(0.5)
                tasks.cancel_scope.cancel()
            raise SystemExit(3)
        await anyio.sleep(6)
    """
    _, codes, errors = run_ranks(act, tmp_path, "asyncio")
    assert codes == [3, 0, 0], errors
    assert "terminate called" not in errors


@pytest.mark.processes
def test_a_peer_that_dies_inside_is_noticed(tmp_path: Any) -> None:
    """gloo notices a closed connection; who waits is told at once, and is in doubt."""
    act = """
    async def act(barrier):
        await barrier.execute_barrier()
        if rank == 2:
            os._exit(9)
        say(**await attempt(barrier.execute_barrier()))
    """
    said, codes, errors = run_ranks(act, tmp_path, "trio")
    assert codes == [0, 0, 9], errors
    for told in (results(said)[0], results(said)[1]):
        assert told["error"] == "BarrierConnectionError"
        assert told["in_doubt"]


@pytest.mark.processes
def test_connecting_alone_is_bounded(tmp_path: Any) -> None:
    """A rank whose peers never connect is told so at its deadline."""
    act = """
    async def act(barrier):
        alone = DistBarrier(timeout_secs=1)
        if rank == 0:
            say(**await attempt(alone.connect()))
        await alone.aclose()
        await barrier.aclose()
    """
    said, codes, errors = run_ranks(act, tmp_path, "asyncio")
    told = results(said)[0]
    assert told["error"] == "BarrierConnectionError"
    assert "no gloo group came about within 1 s" in told["text"]
    assert codes == [0, 0, 0], errors


@pytest.mark.processes
def test_closing_ends_a_crossing_of_another_task(tmp_path: Any) -> None:
    """The call that waits learns that its barrier was closed."""
    act = """
    async def act(barrier):
        await barrier.execute_barrier()
        if rank == 0:
            async with anyio.create_task_group() as tasks:
                async def cross():
                    say(**await attempt(barrier.execute_barrier("waits")))
                tasks.start_soon(cross)
                await anyio.sleep(0.5)
                await barrier.aclose()
        else:
            await anyio.sleep(3)
    """
    said, codes, errors = run_ranks(act, tmp_path, "trio")
    assert codes == [0, 0, 0], errors
    assert results(said)[0]["error"] == "BarrierClosedError"


def test_a_group_that_was_let_go_takes_no_call() -> None:
    """What comes after closing is refused, not queued for ever."""
    group = Collectives(None)
    group.retire()
    with pytest.raises(BarrierConnectionError, match="let go"):
        group.submit(group.connect).result(5)
