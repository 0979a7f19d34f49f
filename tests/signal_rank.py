"""A rank that trains until its signal is reached; run by test_step_signal.

python signal_rank.py RANK WORLD_SIZE PORT PACE_SECS [thread|loop]

With the last one, each step is a collective of gloo, which blocks the main thread, or the event
loop in it, until all ranks have come to that step.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from async_barriers import BarrierError, StepSignal, StoreBarrier
from async_barriers.blocking import BlockingBarrier

RANK, WORLD_SIZE, PORT = map(int, sys.argv[1:4])
PACE_SECS = float(sys.argv[4])
BLOCKED = sys.argv[5] if len(sys.argv) > 5 else ""


def train(step: int) -> None:
    if BLOCKED:
        dist.all_reduce(torch.ones(1000))
    if step == 3:
        print("trains", os.getpid(), flush=True)
    time.sleep(PACE_SECS)


def reached(stop: object, step: int) -> None:
    told = [getattr(stop, what) for what in ("step", "rank", "reason")]
    print("reached", step, *told, flush=True)


def run(barrier: StoreBarrier) -> None:
    # No `with`, nor close: its process just ends.
    stop = BlockingBarrier(barrier).step_signal()
    signal.signal(signal.SIGTERM, lambda *_: stop.send("SIGTERM"))
    for step in range(1_000_000):
        if stop.reached(step):
            return reached(stop, step)
        train(step)


async def run_on_loop(barrier: StoreBarrier) -> None:
    stop = StepSignal(barrier)
    signal.signal(signal.SIGTERM, lambda *_: stop.send("SIGTERM"))
    for step in range(1_000_000):
        if await stop.reached(step):
            return reached(stop, step)
        train(step)


def main() -> None:
    # A shell that started us in the background would have us ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    store = dist.TCPStore("127.0.0.1", PORT, wait_for_workers=False)
    barrier = StoreBarrier(store, rank=RANK, world_size=WORLD_SIZE, timeout_secs=20)
    if BLOCKED:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("train", store), rank=RANK, world_size=WORLD_SIZE,
            timeout=timedelta(seconds=20),
        )  # fmt: skip
    try:
        if BLOCKED == "loop":
            asyncio.run(run_on_loop(barrier))
        else:
            run(barrier)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    except BarrierError as exc:
        print("told", type(exc).__name__, exc, flush=True)
    if BLOCKED:
        dist.destroy_process_group()


main()
