"""What `committing` promises, phase and commit in one crossing; and too large a payload."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import anyio
import pytest
from worlds import AnyBarrier, Tasks, World, gather

from async_barriers import BrokenBarrierError, Committing, DistBarrier
from async_barriers._checks import MAX_PAYLOAD_BYTES
from async_barriers.recording import Recorder

pytestmark = pytest.mark.anyio
TOO_LARGE = b"x" * (MAX_PAYLOAD_BYTES + 1)


class Publisher:
    """A ``publish`` that notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[int, bytes]] = []

    async def __call__(self, payloads: Mapping[int, bytes]) -> bytes:
        self.calls.append(dict(payloads))
        return b"+".join(payloads[rank] for rank in sorted(payloads))


async def takes_part(barrier: Any, publish: Publisher, payload: Any, step: int = 1) -> bytes:
    async with barrier.committing(publish, name="x", step=step) as part:
        part.payload = payload
    assert isinstance(part, Committing)
    return part.result


async def commits(ranks: list[AnyBarrier], step: int) -> None:
    """The next commit works (law 10)."""
    publish = Publisher()
    calls = [partial(takes_part, rank, publish, b"p", step) for rank in ranks]
    assert await gather(calls) == [b"p+p"] * 2
    assert publish.calls == [{0: b"p", 1: b"p"}]


async def test_all_bodies_succeed(world: World) -> None:
    """One crossing; what publish returns is there on every rank, and nothing before it."""
    ranks = await world.barriers(2)
    publish = Publisher()

    async def silent() -> bytes:
        async with ranks[1].committing(publish, name="x", step=1) as part:
            with pytest.raises(RuntimeError, match="there is no result"):
                part.result  # noqa: B018  (it raises)
        return part.result

    calls: list[Callable[[], Awaitable[bytes]]] = [
        partial(takes_part, ranks[0], publish, b"zero"),
        silent,
    ]
    results = await gather(calls)
    assert results == [b"zero+"] * 2
    assert publish.calls == [{0: b"zero", 1: b""}]  # who never sets a payload brings none


async def raises(rank: AnyBarrier, publish: Publisher) -> None:
    with pytest.raises(OSError, match="disk full"):
        async with rank.committing(publish, name="x", step=1):
            raise OSError("disk full")


async def is_cancelled(rank: AnyBarrier, publish: Publisher) -> None:
    with anyio.CancelScope() as scope:
        async with rank.committing(publish, name="x", step=1):
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught


async def is_thrown_away(rank: AnyBarrier, publish: Publisher) -> None:
    async def parts() -> AsyncIterator[None]:
        async with rank.committing(publish, name="x", step=1):
            yield

    generator: Any = parts()
    await generator.__anext__()
    await generator.aclose()


async def fails_in_a_task_group(rank: AnyBarrier, publish: Publisher) -> None:
    async def upload() -> None:
        raise OSError("disk full")

    async def part() -> None:
        async with rank.committing(publish, name="x", step=1), anyio.create_task_group() as tasks:
            tasks.start_soon(upload)
            await anyio.sleep_forever()

    with pytest.raises(Exception, match=r"TaskGroup|Nursery|xceptions"):
        await part()


async def brings_text(rank: AnyBarrier, publish: Publisher) -> None:
    with pytest.raises(TypeError, match="payload must be bytes, not str"):
        await takes_part(rank, publish, "text")


async def brings_too_much(rank: AnyBarrier, publish: Publisher) -> None:
    with pytest.raises(ValueError, match="payload has 4194305 bytes"):
        await takes_part(rank, publish, TOO_LARGE)


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (raises, "it raised OSError: disk full"),
        (is_cancelled, "its task was cancelled"),
        (is_thrown_away, "GeneratorExit"),
        (fails_in_a_task_group, "disk full"),
        (brings_text, "TypeError: payload must be bytes, not str"),
        (brings_too_much, "ValueError: payload has 4194305 bytes; at most 4194304 are allowed"),
    ],
)
@pytest.mark.parametrize("culprit", [0, 1], ids=["leader", "follower"])
async def test_a_part_that_fails_breaks_the_commit(
    memory: World, fails: Callable[..., Any], reason: str, culprit: int
) -> None:
    """Peers that wait in the commit are told at once, nothing is published, the next one works."""
    ranks = await memory.barriers(2)
    publish = Publisher()
    async with Tasks() as tasks:
        waiting = tasks.start(partial(takes_part, ranks[1 - culprit], publish, b"p"))
        await memory.entered(1 - culprit, name="x", sequence="s1")
        with anyio.fail_after(2):
            await fails(ranks[culprit], publish)
            error = await waiting.raised(BrokenBarrierError)
    assert error.rank == culprit
    assert reason in error.reason
    assert not publish.calls
    await commits(ranks, 2)


async def test_what_is_wrong_with_the_call_is_said_before_the_body(memory: World) -> None:
    """No checkpoint is written for nothing; also by a barrier that is recorded."""
    ranks = await memory.barriers(2)
    recorded = Recorder().watch(ranks[0])
    wrong: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (None, {}, TypeError, "publish must be a function"),
        (Publisher(), {"leader": 2}, ValueError, "leader: rank 2 is outside the world"),
        (Publisher(), {"step": -1}, ValueError, "step is -1"),
        (Publisher(), {"timeout_secs": -1}, ValueError, "timeout_secs is -1"),
    ]
    for barrier in (ranks[0], recorded):
        for publish, options, kind, message in wrong:
            with pytest.raises(kind, match=message):
                barrier.committing(publish, **options)
    for publish, options, kind, message in wrong:
        options = {"leader": -1} if "leader" in options else options
        with pytest.raises(kind, match=message.replace("rank 2", "rank -1")):
            DistBarrier().committing(publish, **options)


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
async def test_gathering(tcp: World, size: int) -> None:
    """From nothing to 1 MiB each, in rank order, the same on all."""
    ranks = await tcp.barriers(4)
    brought = [bytes([rank]) * size for rank in range(4)]
    calls = [partial(rank.all_gather, brought[i], step=1) for i, rank in enumerate(ranks)]
    assert await gather(calls) == [tuple(brought)] * 4


async def commits_with(rank: AnyBarrier, payload: Any) -> bytes:
    return await rank.commit(Publisher(), name="x", payload=payload)


async def gathers(rank: AnyBarrier, payload: Any) -> tuple[bytes, ...]:
    return await rank.all_gather(payload, name="x")


@pytest.mark.parametrize(("call", "result"), [(commits_with, b"p+p"), (gathers, (b"p", b"p"))])
async def test_too_much_is_an_error_on_all_ranks(
    tcp: World, call: Callable[..., Any], result: object
) -> None:
    """How much a rank brings depends on its data: peers that wait already must not go on."""
    ranks = await tcp.barriers(2)
    # The length of the other one is counted in items, of eight bytes here.
    for payload, size in (
        (TOO_LARGE, 4194305),
        (memoryview(bytes(MAX_PAYLOAD_BYTES + 8)).cast("Q"), 4194312),
    ):
        async with Tasks() as tasks:
            waiting = tasks.start(partial(call, ranks[0], b"p"))
            await tcp.entered(0, name="x", sequence=f"{int(size != 4194305)}")
            with anyio.fail_after(2):
                with pytest.raises(ValueError, match=f"payload has {size} bytes"):
                    await call(ranks[1], payload)
                error = await waiting.raised(BrokenBarrierError)
        assert error.rank == 1
        assert f"payload has {size} bytes; at most 4194304 are allowed" in error.reason
    assert await gather([partial(call, rank, b"p") for rank in ranks]) == [result] * 2


async def test_a_leader_that_is_none(memory: World) -> None:
    """It is refused before the body runs, as any other that is no rank."""
    (rank,) = await memory.barriers(1)
    with pytest.raises(TypeError, match="not None"):
        rank.committing(Publisher(), leader=None)  # type: ignore[arg-type]
