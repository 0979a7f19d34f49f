"""Four ranks learn to read digits, and save a checkpoint every few steps without ever stopping.

    make demo
    make demo ARGS="--fail-rank 2 --fail-at 3"    # the third upload of rank 2 raises
    make demo ARGS="--hang-rank 3 --hang-at 4"    # the fourth upload of rank 3 never ends
    make demo ARGS="--preempt-at 3"               # rank 1 gets a SIGTERM as the third one is saved
    make demo ARGS="--trace trace.json"           # every phase of the barrier, for Perfetto

Training is DistributedDataParallel on gloo, in the main thread. Checkpoints are written by an
asyncio event loop in a second thread, over a barrier with a TCPStore of its own, so that the two
share no channel. `checkpointing.py` has the part worth copying; `report.py` and `timeline.py`
show what happened. The exit status is 0 if everything went as it should, faults included.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import report
import torch
import torch.distributed as dist
from anyio.from_thread import start_blocking_portal
from checkpointing import CheckpointWriter, Saver, Shard, load_newest, write_durably
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from async_barriers import Barrier, TCPStoreBarrier
from async_barriers.recording import Recorder
from async_barriers.step_signal import BlockingStepSignal
from async_barriers.torchrun import record

logger = logging.getLogger("demo")

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@record
def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    configure_logging(dist.get_rank())
    try:
        good = run(args, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
    sys.exit(0 if good else 1)


def run(args: argparse.Namespace, rank: int, world_size: int) -> bool:
    root, port = agree_on_directory_and_port(args.out)
    digits = Digits(rank, world_size, args.batch_size)
    model, optimizer = build()
    log = report.RankLog(rank)

    recorder = Recorder()
    barrier: Barrier = TCPStoreBarrier(
        rank,
        world_size,
        "checkpoint",
        timeout_barrier_init_secs=30,
        use_checkpoint_barrier_tcpstore_libuv=True,
        tcpstore_port=port,
        master_address="127.0.0.1",
        timeout_secs=args.commit_timeout_secs,
        warn_after_secs=2,
    )
    stop = BlockingStepSignal(barrier)
    signal.signal(signal.SIGTERM, lambda *_: stop.send("SIGTERM"))
    if args.trace is not None:
        barrier = recorder.watch(barrier)
    writer = CheckpointWriter(
        barrier,
        rank=rank,
        root=root,
        put=SlowStorage(args, rank).put,
        upload_timeout_secs=args.commit_timeout_secs + 3 * args.upload_secs,
    )
    # The portal is an event loop in a thread of its own; the training below never enters it.
    with start_blocking_portal("asyncio") as portal, portal.wrap_async_context_manager(barrier):
        saver = Saver(portal, writer)
        train(args, model, optimizer, digits, saver, stop, log)
        saver.close()
    log.savings = saver.savings

    restore(root, digits, log)
    logs = [log] * world_size
    dist.gather_object(log, logs if rank == 0 else None)
    events = [recorder.events] * world_size
    dist.gather_object(recorder.events, events if rank == 0 else None)
    if rank != 0:
        return True
    if args.trace is not None:
        save_trace(events, args.trace)
    good = conclude(args, logs)
    if args.out is None:
        shutil.rmtree(root)
    return good


def save_trace(events: list[list[dict[str, Any]]], path: Path) -> None:
    """One file for all ranks."""
    trace = Recorder()
    for of_one_rank in events:
        trace.merge(of_one_rank)
    trace.save(path)
    print(f"\nThe phases of all ranks are in {path}; open it at https://ui.perfetto.dev.")


def conclude(args: argparse.Namespace, logs: list[report.RankLog]) -> bool:
    import timeline  # here, because the other ranks need no matplotlib

    print(f"\n{report.render(logs, args.commit_timeout_secs)}")
    timeline.draw(logs, args.commit_timeout_secs, args.timeline)
    print(f"\nThe timeline is in {args.timeline}.")
    problems = report.check(logs, args.commit_timeout_secs, faults(args))
    if args.preempt_at is not None:
        problems += report.check_stop(logs, args.preempt_rank)
    for problem in problems:
        print(f"NOT AS IT SHOULD BE: {problem}")
    return not problems


def train(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: Optimizer,
    digits: Digits,
    saver: Saver,
    stop: BlockingStepSignal,
    log: report.RankLog,
) -> None:
    ddp = DistributedDataParallel(model)
    saved_at = saves = 0
    for epoch in range(1, args.epochs + 1):
        for images, labels in digits.batches(epoch):
            loss = cross_entropy(ddp(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            # A checkpoint that is still being staged reads the weights as they are now.
            saver.wait_staged()
            optimizer.step()
            log.steps.append(time.time())
            if stop.reached(len(log.steps)):
                # All ranks stop here, and save this step below.
                log.stopped = report.Stop(len(log.steps), stop.rank, stop.reason)
                logger.info("stops at step %d: rank %s got %s", stop.step, stop.rank, stop.reason)
                break
            # One checkpoint is in flight at a time. All ranks put off one that is due meanwhile:
            # they vote, so that no rank saves a step that another one skips.
            due = len(log.steps) - saved_at >= args.every
            if due and not any_rank(saver.busy):
                saved_at = len(log.steps)
                saver.start(saved_at, shard_of(model, optimizer))
                saves += 1
                if saves == args.preempt_at and log.rank == args.preempt_rank:
                    log.preempted = time.time()
                    os.kill(os.getpid(), signal.SIGTERM)  # as a cluster would
        if log.stopped is not None:
            break
        if epoch % 10 == 0:
            logger.info("epoch %d, step %d: loss %.4f", epoch, len(log.steps), loss.item())
    if saved_at < len(log.steps):
        saver.start(len(log.steps), shard_of(model, optimizer))
    saver.wait()
    log.trained_accuracy = digits.accuracy(model)
    logger.info("trained: %.1f%% of the test set is right", 100 * log.trained_accuracy)


def any_rank(flag: bool) -> bool:
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def shard_of(model: nn.Module, optimizer: Optimizer) -> Shard:
    """This rank's share of the model and optimizer state; every rank holds all of it alike."""
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    state: Shard = {f"model.{key}": value for key, value in weights.items()}
    state |= {f"optimizer.{key}": value for key, value in moments.items()}
    return {key: state[key] for key in sorted(state)[dist.get_rank() :: dist.get_world_size()]}


def restore(root: Path, digits: Digits, log: report.RankLog) -> None:
    """Load the newest checkpoint into a new model, and test that model."""
    try:
        log.restored_step, state = load_newest(root)
    except ValueError as exc:
        log.problem = str(exc)
        logger.error("%s", exc)
        return
    model, optimizer = build()
    set_state_dict(
        model,
        optimizer,
        model_state_dict=part_of(state, "model."),
        optim_state_dict=part_of(state, "optimizer."),
        options=FLAT,
    )
    log.accuracy = digits.accuracy(model)
    logger.warning(
        "loaded step-%d: every hash is right, and so is %.1f%% of the test set",
        log.restored_step,
        100 * log.accuracy,
    )


def part_of(state: Shard, prefix: str) -> Shard:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def build() -> tuple[nn.Module, Optimizer]:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    return model, AdamW(model.parameters(), lr=1e-3)


class Digits:
    """1797 handwritten digits: this rank's part of the training set, and the test set."""

    def __init__(self, rank: int, world_size: int, batch_size: int) -> None:
        images, labels = load_digits(return_X_y=True)
        split = train_test_split(
            torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16,
            torch.tensor(labels),
            test_size=0.2,
            random_state=0,
            stratify=labels,
        )
        self.images, self.test_images, self.labels, self.test_labels = split
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every rank draws the same order and takes every `world_size`-th sample of it."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch))
        count = len(order) // (self.world_size * self.batch_size)
        mine = order[self.rank :: self.world_size]
        for batch in mine[: count * self.batch_size].reshape(count, self.batch_size):
            yield self.images[batch], self.labels[batch]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        guesses = model(self.test_images).argmax(dim=1)
        return float((guesses == self.test_labels).float().mean())


class SlowStorage:
    """A directory behind a slow link, with the faults that the command line asks for."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        self.secs: float = args.upload_secs
        self.fails_at = args.fail_at if rank == args.fail_rank else None
        self.hangs_at = args.hang_at if rank == args.hang_rank else None
        self.uploads = 0

    async def put(self, path: Path, data: bytes) -> None:
        self.uploads += 1
        if self.uploads == self.hangs_at:
            await anyio.sleep_forever()
        await anyio.sleep(self.secs * random.uniform(0.75, 1.25))
        if self.uploads == self.fails_at:
            raise OSError("no space left (as --fail-rank asked)")
        await anyio.to_thread.run_sync(write_durably, path, data)


def faults(args: argparse.Namespace) -> dict[int, int]:
    """The checkpoints that are to break, counted from 1, and the rank that breaks each."""
    wanted = {args.fail_at: args.fail_rank, args.hang_at: args.hang_rank}
    return {at: rank for at, rank in wanted.items() if rank is not None}


def agree_on_directory_and_port(out: Path | None) -> tuple[Path, int]:
    """Rank 0 chooses, and tells the others through the process group."""
    choice = [("", 0)]
    if dist.get_rank() == 0:
        root = str(out or tempfile.mkdtemp(prefix="async-checkpoint-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            choice = [(root, probe.getsockname()[1])]
    dist.broadcast_object_list(choice)
    root, port = choice[0]
    return Path(root), port


def configure_logging(rank: int) -> None:
    logging.basicConfig(
        stream=sys.stdout,
        format=f"%(asctime)s.%(msecs)03d  rank {rank}  %(message)s",
        datefmt="%H:%M:%S",
    )
    # Good news once, bad news from every rank.
    for name in ("demo", "checkpointing"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=int, default=60)
    add("--batch-size", type=int, default=64, help="of one rank")
    add("--every", type=int, default=30, metavar="STEPS", help="between two checkpoints")
    add("--upload-secs", type=float, default=0.6, help="simulated slowness of the storage")
    add("--commit-timeout-secs", type=float, default=3.0, help="how long to wait for other ranks")
    add("--fail-rank", type=int, metavar="RANK", help="whose upload raises")
    add("--fail-at", type=int, default=3, metavar="N", help="in which checkpoint, from 1")
    add("--hang-rank", type=int, metavar="RANK", help="whose upload never ends")
    add("--hang-at", type=int, default=4, metavar="N", help="in which checkpoint, from 1")
    add("--preempt-rank", type=int, default=1, metavar="RANK", help="who gets a SIGTERM")
    add("--preempt-at", type=int, metavar="N", help="as which checkpoint is saved, from 1")
    add("--out", type=Path, metavar="DIR", help="keep the checkpoints (default: temporary)")
    add("--timeline", type=Path, metavar="PNG", help="default: timeline.png, in DIR if given")
    add("--trace", type=Path, metavar="JSON", help="write the barrier's phases, for Perfetto")
    args = parser.parse_args()
    if args.out is not None and any(args.out.glob("step-*")):
        parser.error(f"{args.out} has checkpoints in it already")
    if args.timeline is None:
        args.timeline = (args.out or Path()) / "timeline.png"
    return args


if __name__ == "__main__":
    main()
