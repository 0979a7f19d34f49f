"""What barriers count: phases by how they ended, waiting, who came last, connections anew."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial

import anyio
import pytest
from cuttable import Ways
from torch.distributed import TCPStore
from worlds import AnyBarrier, Tasks, World, crash, gather

from async_barriers import BarrierError, BarrierStatistics, StoreBarrier

pytestmark = pytest.mark.anyio

Call = Callable[[], Awaitable[object]]


async def publish(payloads: Mapping[int, bytes]) -> bytes:
    return b"done"


def broken(rank: AnyBarrier) -> dict[str, int]:
    """What is not 0."""
    statistics = rank.statistics()
    assert sum(statistics.broken_by.values()) == statistics.broken
    return {why: count for why, count in statistics.broken_by.items() if count}


@pytest.mark.parametrize("world", ["tcp", "hash", "tcp, threads", "own, libuv"], indirect=True)
async def test_what_is_released(world: World) -> None:
    """Crossings of every kind, with who came last and how long the others waited."""
    ranks = [world.barrier(rank, 2) for rank in range(2)]
    await gather(rank.connect for rank in ranks)

    async def last(call: Call) -> object:
        await anyio.sleep(0.1)
        return await call()

    calls: list[Callable[[AnyBarrier], Call]] = [
        lambda rank: rank.execute_barrier,
        lambda rank: partial(rank.all_gather, b""),
        lambda rank: partial(rank.commit, publish, name="c", leader=0),
        lambda rank: partial(rank.commit, publish, name="c", leader=1),
    ]
    for call in calls:
        both: list[Call] = [call(ranks[0]), partial(last, call(ranks[1]))]
        await gather(both)
    first, second = (rank.statistics() for rank in ranks)
    assert (first.released, first.broken, first.came_last) == (4, 0, 0)
    assert (second.released, second.broken, second.came_last) == (4, 0, 4)
    assert 0.4 < first.waited_secs < 2
    assert 0.1 < first.waited_secs_at_most < first.waited_secs
    assert second.waited_secs_at_most <= second.waited_secs < first.waited_secs
    assert first.reconnections == second.reconnections == 0
    with pytest.raises(AttributeError):
        first.released = 3  # type: ignore[misc]


@pytest.mark.parametrize("shared", ["tcp", "hash"], indirect=True)
async def test_what_is_broken_and_why(shared: World) -> None:
    """Each class of reasons, on the rank that is to blame and on its peer."""
    ranks = await shared.barriers(2, lanes=2)

    async def breaks(rank: AnyBarrier, name: str) -> None:
        with suppress(BarrierError):
            await rank.execute_barrier(name)

    # A deadline of one is a time-out of both.
    with suppress(BarrierError):
        await ranks[0].execute_barrier("slow", timeout_secs=0.1)
    await breaks(ranks[1], "slow")
    assert broken(ranks[0]) == broken(ranks[1]) == {"timeout": 1}
    # Cancelled, raised in its body, aborted.
    with anyio.move_on_after(0.1):
        await ranks[0].execute_barrier("cancelled")
    with pytest.raises(LookupError):
        async with ranks[0].phase("raised"):
            raise LookupError
    assert await ranks[0].abort("no disk", "aborted")
    for name in ("cancelled", "raised", "aborted"):
        await breaks(ranks[1], name)
    assert broken(ranks[0]) == {"timeout": 1, "gave_up": 3}
    assert broken(ranks[1]) == {"timeout": 1, "peer": 3}
    # A publish that fails.

    async def fails(payloads: Mapping[int, bytes]) -> bytes:
        raise LookupError

    async def commits(rank: AnyBarrier) -> None:
        with suppress(BarrierError, LookupError):
            await rank.commit(fails, name="published")

    await gather(partial(commits, rank) for rank in ranks)
    assert broken(ranks[0]) == {"timeout": 1, "gave_up": 4}
    assert broken(ranks[1]) == {"timeout": 1, "peer": 4}
    # A rank that is restarted.
    async with Tasks() as tasks:
        waits = tasks.start(partial(ranks[1].execute_barrier, "restart"))
        await shared.entered(1, name="restart")
        crash(ranks[0])
        again = shared.barrier(0, 2)
        await again.connect()
        await waits.raised(BarrierError)
    assert broken(ranks[1]) == {"timeout": 1, "peer": 4, "restart": 1}
    await gather([again.execute_barrier, ranks[1].execute_barrier])
    # One that leaves, and what is called there after that.
    async with Tasks() as tasks:
        waits = tasks.start(partial(ranks[1].execute_barrier, "left"))
        await shared.entered(1, name="left")
        await again.aclose()
        await waits.raised(BarrierError)
    assert broken(ranks[1]) == {"timeout": 1, "peer": 4, "restart": 1, "left": 1}
    assert broken(again) == {}
    assert ranks[1].statistics().released == 3


async def test_connections_that_are_lost(tcp: World) -> None:
    """Each that is replaced counts; and what broke by it."""
    assert isinstance(tcp.store, TCPStore)
    ways = Ways()
    way = ways.to(tcp.store.port)
    store = await tcp.call(
        partial(TCPStore, "127.0.0.1", way.port, is_master=False, wait_for_workers=False)
    )
    far = StoreBarrier(store, rank=0, world_size=2, prefix="tests", timeout_barrier_init_secs=5)
    near = tcp.barrier(1, 2)
    await gather([far.connect, near.connect])
    await gather([far.execute_barrier, near.execute_barrier])
    async with Tasks() as tasks:
        waits = tasks.start(partial(far.execute_barrier, "x", timeout_secs=5))
        await tcp.entered(0, name="x")
        way.cut("reset")
        way.heal()
        await waits.raised(BarrierError)
    assert broken(far) == {"connection": 1}
    # That of the phase, and the one on which it hears of breaks.
    await gather([partial(far.execute_barrier, "y"), partial(near.execute_barrier, "y")])
    assert far.statistics().reconnections >= 2
    assert far.statistics().released == 2
    await far.aclose()
    ways.close()
    assert far.statistics().released == 2


async def test_it_is_a_value(memory: World) -> None:
    """What was asked before does not change."""
    ranks = await memory.barriers(2)
    before = ranks[0].statistics()
    assert isinstance(before, BarrierStatistics)
    with suppress(BarrierError):
        await ranks[0].execute_barrier("x", timeout_secs=0)
    assert before.broken_by["timeout"] == before.broken == 0
    assert ranks[0].statistics().broken == 1
