"""What users write, for type checkers alone: mypy and pyright take it on every torch; never run."""

from __future__ import annotations

import torch.distributed as dist

from async_barriers import DistBarrier, StoreBarrier


async def over_groups() -> None:
    """What torch's own functions return is taken."""
    DistBarrier(dist.group.WORLD)
    DistBarrier(dist.new_group())
    StoreBarrier.from_process_group(dist.group.WORLD)
    async with StoreBarrier.from_process_group(dist.new_group([0, 1])) as barrier:
        result = await barrier.execute_barrier("end", step=1)
        print(result.waited_secs + 1.0, result.last_rank)
