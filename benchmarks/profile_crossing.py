"""Two ranks in one process that only cross, for a profiler.

pyinstrument benchmarks/profile_crossing.py                          # the event loop's side
py-spy record -f raw -o stacks.txt -- python benchmarks/profile_crossing.py   # all threads
"""

from __future__ import annotations

import asyncio
import sys
import time

from torch.distributed import TCPStore

from async_barriers import StoreBarrier


async def cross_for(secs: float) -> int:
    """How many crossings two ranks make in so many seconds."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    barriers = [StoreBarrier(store, rank=rank, world_size=2) for rank in range(2)]
    crossings = 0
    ends = time.monotonic() + secs
    while time.monotonic() < ends:
        await asyncio.gather(*(barrier.execute_barrier() for barrier in barriers))
        crossings += 1
    for barrier in barriers:
        await barrier.aclose()
    return crossings


if __name__ == "__main__":
    secs = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    print(f"{secs / asyncio.run(cross_for(secs)) * 1e6:.0f} us per crossing")
