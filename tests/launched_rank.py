"""The program of a rank that finds its barriers through its launcher and its process groups.

Run by torchrun, or by a rank that a test forked with the variables set by hand.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
import torch
import torch.distributed as dist

from async_barriers import StoreBarrier
from async_barriers._protocol.keys import Keys

OPTIONS: dict[str, Any] = {"timeout_secs": 20.0, "timeout_barrier_init_secs": 20.0}


async def main(order: str) -> None:
    """Cross barriers of the job, of its default group and of a subgroup, of one prefix."""
    attempt = attempt_now()
    job = StoreBarrier.from_env(**OPTIONS)
    if order == "barrier first":
        await job.execute_barrier("early")
    last_rank = 0
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        if os.environ["RANK"] != str(attempt):
            # Rank 0 enters in the first attempt, and comes last in the second one: were its first
            # arrival left, rank 1 would be released without it.
            await anyio.to_thread.run_sync(await_arrival, "cut short", attempt)
            if attempt == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        last_rank = (await job.execute_barrier("cut short")).last_rank  # type: ignore[assignment]
    group_timeout = timedelta(seconds=77)
    dist.init_process_group("gloo", timeout=group_timeout)
    rank, size = dist.get_rank(), dist.get_world_size()
    others = dist.new_group(list(range(1, size)))
    store: Any = dist.distributed_c10d._get_default_store()
    facts: dict[str, Any] = {"rank": rank, "attempt": attempt, "last": last_rank}
    world = StoreBarrier.from_process_group(**OPTIONS)
    async with job, world:
        results: list[Any] = []

        async def cross(barrier: StoreBarrier) -> None:
            results.append(asdict(await barrier.execute_barrier("x")))

        async with anyio.create_task_group() as tasks:
            if rank != 0:
                tasks.start_soon(cross, job)
            # All barriers have the same prefix, and those below are crossed while the one of
            # the job waits for rank 0.
            await cross(world)
            try:
                async with StoreBarrier.from_process_group(others, **OPTIONS) as some:
                    await cross(some)
            except ValueError as exc:
                facts["refused"] = str(exc)
            votes = torch.tensor(rank)
            dist.all_reduce(votes)
            facts["votes"] = votes.item()
            await cross(world)
            if rank == 0:
                await cross(job)
        facts["results"] = sorted((r["name"], r["sequence"]) for r in results)
        facts["group_timeout"] = store.timeout / group_timeout
        facts["committed"] = (
            await job.commit(publish, payload=b"%d" % rank) == b"0 1 2"[: 2 * size - 1]
        )
    dist.destroy_process_group()
    os.write(1, json.dumps(facts).encode() + b"\n")


def attempt_now() -> int:
    """How often torchrun has started this program anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def await_arrival(name: str, rank: int) -> None:
    """Block until ``rank`` has entered the first phase of ``name`` in this attempt."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Any = dist.TCPStore(address, port, wait_for_workers=False)
    keys = Keys("barrier")
    while True:
        state = json.loads(store.get(keys.state))
        # Whoever comes back begins another generation; both may do that.
        if state["number"] >= attempt_now():
            own = keys.generation(state["identity"])
            # Before all have joined again, phases are numbered apart.
            for label in ("0", "e0"):
                log = own.phase(name, label).log
                if store.check([log]) and b"%d" % rank in store.get(log).splitlines():
                    return
        time.sleep(0.01)


async def publish(payloads: Any) -> bytes:
    return b" ".join(payloads[rank] for rank in sorted(payloads))


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
