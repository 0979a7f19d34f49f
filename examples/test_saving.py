"""How to test code that uses barriers: all ranks in one process, no ports, no torchrun.

    pytest examples/test_saving.py

anyio has a pytest plugin that runs ``async`` tests, once on asyncio and once on trio if that is
installed. `save` stands for your code.
"""

from __future__ import annotations

from collections.abc import Mapping

import anyio
import pytest
from torch.distributed import HashStore

from async_barriers import Barrier, BarrierError, BrokenBarrierError
from async_barriers.testing import FaultyStore, local_barriers

pytestmark = pytest.mark.anyio


async def save(barrier: Barrier, step: int, shard: bytes | None) -> str:
    """The code under test: write a shard, or fail; then publish the checkpoint with all others."""

    async def publish(shards: Mapping[int, bytes]) -> bytes:
        return b"+".join(shards[rank] for rank in sorted(shards))

    async with barrier.committing(publish, name="saved", step=step) as part:
        if shard is None:
            raise OSError("no space left")
        part.payload = shard
    return part.result.decode()


async def save_on_all(
    barriers: list[Barrier], step: int, *, full: int | None = None
) -> dict[int, str | Exception]:
    """Run it on every rank; the result or the error of each."""
    ended: dict[int, str | Exception] = {}

    async def run(rank: int, barrier: Barrier) -> None:
        try:
            ended[rank] = await save(barrier, step, None if rank == full else b"shard %d" % rank)
        except (OSError, BarrierError) as exc:
            ended[rank] = exc

    async with anyio.create_task_group() as tasks:
        for rank, barrier in enumerate(barriers):
            tasks.start_soon(run, rank, barrier)
    return ended


async def test_a_checkpoint_is_published_once() -> None:
    async with local_barriers(3, timeout_secs=10) as barriers:
        ended = await save_on_all(list(barriers), step=1)
    assert ended == dict.fromkeys(range(3), "shard 0+shard 1+shard 2")


async def test_a_full_disk_is_everybodys() -> None:
    async with local_barriers(3, timeout_secs=10) as barriers:
        ended = await save_on_all(list(barriers), step=1, full=1)
    assert isinstance(ended[1], OSError)
    for rank in (0, 2):
        error = ended[rank]
        assert isinstance(error, BrokenBarrierError)
        assert (error.rank, error.reason) == (1, "it raised OSError: no space left")


async def test_a_store_that_hangs_is_survived() -> None:
    store = FaultyStore(HashStore())
    async with local_barriers(2, store=store, timeout_secs=0.2) as barriers:
        store.hang("add")
        with anyio.fail_after(2):  # the deadline holds, whatever the store does
            ended = await save_on_all(list(barriers), step=1)
        assert all(isinstance(error, BarrierError) for error in ended.values())
        store.heal()
        # Step 1 is decided, and broken; the next one works.
        ended = await save_on_all(list(barriers), step=2)
        assert ended == dict.fromkeys(range(2), "shard 0+shard 1")
