"""torch.distributed.checkpoint saves in the background; the barrier says when a checkpoint counts.

    torchrun --standalone --nproc-per-node 2 examples/dcp_async_save.py --out /tmp/run
    torchrun --standalone --nproc-per-node 2 examples/dcp_async_save.py --out /tmp/run \
        --fail-rank 1 --fail-at 2

`async_save` returns futures: one for when the state has been copied and training may go on, one
for when DCP has written its shards and metadata. This program awaits both, and then `commit`
publishes the checkpoint. That adds to DCP:

- One verdict on all that belongs to a checkpoint. DCP knows only its own files. It cannot know that
  each rank also saved the position of its data loader. ``latest`` moves when every rank has said
  what it wrote, and not before.
- If a rank fails, the others learn it at once, with the reason. A rank that does not come is named
  at this checkpoint's own deadline. DCP waits in collectives of a process group, whose timeout is
  minutes and names no rank.
- Nothing blocks: no thread of a pool waits for the other ranks, the process group is not touched,
  and the next checkpoint may begin while this one commits. The step keeps them apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import anyio
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from async_barriers import BarrierError, StoreBarrier
from async_barriers.torchrun import record

logger = logging.getLogger("dcp_async_save")


async def train(args: argparse.Namespace) -> None:
    """A few steps, each followed by a checkpoint that is committed while the next ones run."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights: Tensor = distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0)])
    # DCP's collectives run in a thread. They need a group of their own, apart from the training's.
    group = dist.new_group(backend="gloo")
    # On CPU: no pinned memory, no shared memory, in a thread, no streams.
    stager = DefaultStager(StagingOptions(False, False, True, False))
    async with (
        StoreBarrier.from_process_group(prefix="dcp") as barrier,
        anyio.create_task_group() as tasks,
    ):
        uploaded: Future[Any] | None = None
        for step in range(1, args.steps + 1):
            if uploaded is not None:
                # Two saves at once on one group would take each other's collectives, and hang.
                # `finish` logs how this one ended.
                await asyncio.gather(asyncio.wrap_future(uploaded), return_exceptions=True)
            weights = weights + step
            directory = args.out / f"step-{step}"
            saving = dcp.async_save(
                {"weights": weights, "step": step},
                checkpoint_id=directory,
                process_group=group,
                async_stager=stager,
            )
            assert isinstance(saving, AsyncSaveResponse)
            # From here on, training may change the weights again.
            await asyncio.wrap_future(saving.staging_completion)
            reader_state = None if fails(args, step) else {"samples": 32 * step}
            uploaded = saving.upload_completion
            tasks.start_soon(finish, barrier, step, directory, uploaded, reader_state)
            await asyncio.sleep(args.step_secs)
    stager.close()
    check(args, weights)


async def finish(
    barrier: StoreBarrier, step: int, directory: Path, uploaded: Future[Any], reader_state: Any
) -> None:
    """Finish one checkpoint on this rank, and log how it ended."""
    rank = dist.get_rank()
    side = directory / f"reader-{rank}.json"
    try:

        async def publish(manifests: Mapping[int, bytes]) -> None:
            files = {rank: manifest.decode() for rank, manifest in manifests.items()}
            pointer = directory / "latest"
            await asyncio.to_thread(write_json, directory / "commit.json", files)
            await asyncio.to_thread(pointer.write_text, directory.name)
            # Atomic, and the last step. With no await after it, nothing comes between it and the
            # verdict. A thread would go on if this were cancelled.
            os.replace(pointer, directory.with_name("latest"))

        # Without this, the others wait for a rank that will not come.
        async with barrier.committing(publish, name="saved", step=step, timeout_secs=60) as part:
            await asyncio.wrap_future(uploaded)
            await asyncio.to_thread(write_json, side, reader_of(reader_state))
            part.payload = side.name.encode()
    except (BarrierError, OSError) as exc:
        # Training goes on; the checkpoint before this one stays the latest.
        logger.warning("rank %d: %s does not count: %s", rank, directory.name, exc)
    else:
        logger.info("rank %d: %s is committed", rank, directory.name)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def reader_of(reader_state: Any) -> Any:
    """The file with the position of this rank's data loader."""
    if reader_state is None:
        raise OSError("the data loader's state is lost (as --fail-rank asked)")
    return reader_state


def check(args: argparse.Namespace, weights: Tensor) -> None:
    """Load what ``latest`` points to."""
    latest = (args.out / "latest").read_text()
    state: dict[str, Any] = {"weights": torch.zeros_like(weights), "step": 0}
    dcp.load(state, checkpoint_id=args.out / latest)
    step = state["step"]
    loaded = state["weights"].to_local()
    assert torch.equal(loaded, torch.full_like(loaded, step * (step + 1) / 2))
    logger.info("rank %d: loaded %s", dist.get_rank(), latest)


def fails(args: argparse.Namespace, step: int) -> bool:
    return bool(dist.get_rank() == args.fail_rank and step == args.fail_at)


@record
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--step-secs", type=float, default=0.1)
    parser.add_argument("--fail-rank", type=int, metavar="RANK", help="who cannot finish its part")
    parser.add_argument("--fail-at", type=int, default=2, metavar="STEP")
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    dist.init_process_group("gloo")
    try:
        asyncio.run(train(args))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
