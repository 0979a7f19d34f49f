"""What errors say: of which barrier, in one line, with numbers that a person would write."""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Awaitable
from functools import partial

import anyio
import pytest
from worlds import Tasks, World, gather

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    StepSignal,
    TCPStoreBarrier,
)
from async_barriers._errors import describe, seconds


@pytest.mark.parametrize(
    "error",
    [
        BarrierError("a\nb"),
        BarrierConnectionError("a\r\nb\x1b[31m"),
        BarrierClosedError(describe("a\nb")),
        BarrierTimeoutError("a\nb", 0, (1,), 5.0, detail="c\nd", prefix="p\nq"),
        BrokenBarrierError("a\nb", 0, 1, "c\nd\u2028e", prefix="p\nq"),
        BrokenBarrierError("n" * 7000, 0, 1, "r" * 7000),
    ],
)
def test_an_error_is_one_line(error: BarrierError) -> None:
    """Whatever names and reasons bring along; and no log is filled by one."""
    said = str(error)
    assert said.isprintable()
    assert len(said) < 2100
    assert not {"\n", "\r"} & set(said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.30000000000000004, "0.3 s"), (4.0, "4 s"), (12.3456, "12.3 s"), (0.0042, "0.004 s"),
        (86_400.0, "86400 s"), (2_678_400.04, "2678400 s"), (0.0, "0 s"),
    ],
)  # fmt: skip
def test_seconds_are_rounded(value: float, said: str) -> None:
    """As a person would, and never in powers of ten."""
    assert seconds(value) == said


def test_how_a_barrier_is_called() -> None:
    """By prefix and name; without a name by the prefix alone."""
    assert describe("step-100", 3, "ckpt") == "barrier 'ckpt/step-100' #3"
    assert describe("", 3, "ckpt") == "barrier 'ckpt' #3"
    assert describe("ckpt") == "barrier 'ckpt'"


@pytest.mark.anyio
async def test_errors_name_their_barrier(memory: World) -> None:
    """Each that a call raises, prefix and name."""
    ranks = await memory.barriers(2)
    first, second = ranks
    said: dict[str, BarrierError] = {}
    with pytest.raises(BarrierTimeoutError) as late:
        await first.execute_barrier("late", timeout_secs=0.1)
    said["late"] = late.value
    async with Tasks() as tasks:
        waits = tasks.start(partial(first.execute_barrier, "aborted"))
        await memory.entered(0, name="aborted")
        await second.abort("no disk", "aborted")
        aborted = said["aborted"] = await waits.raised(BrokenBarrierError)
    await gather(partial(rank.execute_barrier, "step", step=5) for rank in ranks)
    with pytest.raises(BrokenBarrierError) as behind:
        await first.execute_barrier("step", step=4)
    said["step"] = behind.value
    assert memory.store.data.hook is None  # type: ignore[attr-defined]
    memory.store.data.lose()  # type: ignore[attr-defined]
    with pytest.raises(BarrierConnectionError) as lost:
        await first.execute_barrier("lost", timeout_secs=0.2)
    said["lost"] = lost.value
    for name, error in said.items():
        assert "barrier 'tests" in str(error), name
        assert name == "lost" or f"'tests/{name}' #" in str(error)
    assert isinstance(aborted, BrokenBarrierError)
    assert aborted.prefix == "tests"
    await first.aclose()
    with pytest.raises(BarrierClosedError, match="barrier 'tests' is closed"):
        await first.execute_barrier("x")
    await anyio.sleep(0)


async def failed(call: Awaitable[object]) -> BarrierError:
    with pytest.raises(BarrierError) as got:
        await call
    return got.value


@pytest.mark.anyio
async def test_errors_outside_a_phase_name_what_was_called(memory: World) -> None:
    """A store that is not there, a rank that is refused, and one that left: by every call."""
    said: dict[str, BarrierError] = {}
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        for rank, host in ((0, "127.0.0.1"), (1, "127.0.0.1"), (1, "127.0.0.2")):
            # One cannot host it, one has no answer, one is refused.
            options = {"tcpstore_port": port, "master_address": host, "timeout_secs": 0.5}
            barrier = TCPStoreBarrier(rank, 2, "tests", 0.1, **options)
            said[f"'tests': {host}"] = await failed(barrier.connect())
            said[f"'tests/x': {host}"] = await failed(barrier.execute_barrier("x"))
            said[f"'tests/x' #7: {host}"] = await failed(barrier.all_gather(b"", name="x", step=7))
            said[f"'tests/y' #7: {host}"] = await failed(barrier.abort("why", name="y", step=7))
            said[f"'tests/z' #7: {host}"] = await failed(barrier.outcome("z", 7))
            await barrier.aclose()
    ranks = await memory.barriers(2)
    signal, other = (StepSignal(rank, "stop") for rank in ranks)
    assert not await signal.reached(0)
    assert not await other.reached(0)
    for size, why in ((2, "held"), (3, "of another size")):
        refused = memory.barrier(1, size)
        said[f"'tests' {why}"] = await failed(refused.execute_barrier("x"))
    await ranks[1].aclose()
    await memory.exists(memory.membership().own.closed)
    said["'tests/x' #0 left"] = await failed(ranks[0].execute_barrier("x"))
    said["'tests/x' #3 left"] = await failed(ranks[0].commit(len, name="x", step=3))  # type: ignore[arg-type]
    said["'tests/y' #3 left"] = await failed(ranks[0].abort("why", name="y", step=3))
    signal.send("why")
    said["'tests/stop' left"] = await failed(reached(signal))
    for named, error in said.items():
        what = named.partition(": ")[0].partition(" left")[0].partition(" held")[0]
        what = what.partition(" of ")[0]
        assert f"barrier {what}" in str(error), (named, str(error))
        assert str(error).isprintable()
        assert not re.search(r"\d\.\d{4}", str(error)), str(error)


async def reached(signal: StepSignal) -> None:
    """Call until it is told; when the signal is heard of is not this test's."""
    for step in itertools.count(1):
        await signal.reached(step)
        await anyio.sleep(0.01)
