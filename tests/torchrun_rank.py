"""The program of a rank that ends by an error under torchrun."""

from __future__ import annotations

import asyncio
import os
import sys
import time

from async_barriers import StoreBarrier
from async_barriers.torchrun import record


async def train(fault: str) -> None:
    """Rank 1 fails in its part of a checkpoint, or never comes."""
    rank = os.environ["RANK"]
    async with StoreBarrier.from_env(timeout_secs=20) as barrier:
        await barrier.execute_barrier("started")
        timeout_secs = 0.5 if fault == "hangs" else 20
        async with barrier.phase("written", step=1, timeout_secs=timeout_secs):
            if rank == "1":
                if fault == "hangs":
                    await asyncio.sleep(30)
                raise OSError("no space left on device")


@record
def main() -> None:
    try:
        asyncio.run(train(sys.argv[1]))
    finally:
        if os.environ["RANK"] == "1":
            # Its peers could be gone by now.
            time.sleep(1.4)


if __name__ == "__main__":
    main()
