"""The laws of a phase that all ranks see, for every barrier over every store on every loop."""

from __future__ import annotations

import pytest
from worlds import Tasks, World, gather

pytestmark = pytest.mark.anyio


async def test_all_cross(world: World) -> None:
    """When every rank has entered, every rank is released, and learns who came last."""
    ranks = await world.barriers(3)
    results = await gather(rank.execute_barrier for rank in ranks)
    assert {result.last_rank for result in results} <= {0, 1, 2, None}
    assert len({result.last_rank for result in results} - {None}) <= 1
    assert [(result.name, result.sequence) for result in results] == [("", 0)] * 3


async def test_waits(world: World) -> None:
    """Nobody is released before the last rank has entered."""
    ranks = await world.barriers(3)
    async with Tasks() as tasks:
        first = tasks.start(ranks[0].execute_barrier)
        second = tasks.start(ranks[2].execute_barrier)
        await world.entered(0, 2)
        assert not first.ended.is_set()
        assert not second.ended.is_set()
        result = await ranks[1].execute_barrier()
        assert await first.returned() != result
        assert result.last_rank == 1
        await second.returned()
