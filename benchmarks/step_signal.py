"""The cost per step of asking whether to stop, next to an all_reduce of a flag on gloo.

    python benchmarks/step_signal.py --sizes 2,8 --rounds 15

No rank has sent the signal, as in all steps of a job but one. Each round runs a burst of steps of
each way, in a random order, in the same processes; a rank's agent is connected and listens.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import random
import time
from collections.abc import Callable
from datetime import timedelta

import results
import torch
import torch.distributed as dist
from fleet import Fleet
from proxy import Server
from results import shown, spread, table
from torch.distributed import TCPStore

from async_barriers import StepSignal, StoreBarrier
from async_barriers.step_signal import BlockingStepSignal

OURS = ("await reached", "reached, blocking")
FLAG = "all_reduce"
# The goal for one step on asyncio.
GOAL_SECS = 2e-6


class Steps:
    """Rank ``number``; see `fleet.Fleet`."""

    def __init__(self, number: int, size: int, port: int, steps: int) -> None:
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        self._steps = steps
        self._step = 0
        self._runner = asyncio.Runner()
        store = TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=60))
        barrier = StoreBarrier(store, rank=number, world_size=size, prefix=f"of {size}")
        self._signal = StepSignal(barrier, "awaited")
        self._blocking = BlockingStepSignal(barrier, "blocking")
        self._barrier = barrier
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(f"gloo {size}", store), rank=number, world_size=size
        )
        self._flag = torch.tensor(0)

    def connect(self) -> None:
        """Have the agents listen, and wait for all ranks."""
        self._runner.run(self._connected())

    def measure(self, kind: str) -> float:
        """Seconds per step."""
        dist.barrier()
        if kind == FLAG:
            return self._timed(self._all_reduce, max(1, self._steps // 20))
        if kind == OURS[0]:
            return self._runner.run(self._awaited())
        return self._timed(self._reached, self._steps)

    def close(self) -> None:
        self._runner.run(self._barrier.aclose())

    async def _connected(self) -> None:
        await self._signal.reached(self._next())
        self._blocking.reached(self._step)
        await self._barrier.execute_barrier("connected")
        while not all(
            signal._agent._barrier._session.stands for signal in (self._signal, self._blocking)
        ):
            await asyncio.sleep(0.01)

    async def _awaited(self) -> float:
        signal, first = self._signal, self._next()
        began = time.perf_counter()
        for step in range(first, first + self._steps):
            if await signal.reached(step):
                raise RuntimeError("nobody has sent it")
        secs = (time.perf_counter() - began) / self._steps
        self._step += self._steps
        return secs

    def _reached(self) -> None:
        if self._blocking.reached(self._next()):
            raise RuntimeError("nobody has sent it")

    def _all_reduce(self) -> None:
        dist.all_reduce(self._flag, dist.ReduceOp.MAX)
        if self._flag.item():
            raise RuntimeError("nobody has set it")

    def _timed(self, call: Callable[[], object], steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            call()
        return (time.perf_counter() - began) / steps

    def _next(self) -> int:
        self._step += 1
        return self._step


def main() -> None:
    args = parse_arguments()
    report = results.Report("A step that asks whether all should stop; microseconds per step")
    kinds = (*OURS, FLAG)
    rows, data = [], []
    for size in args.sizes:
        secs: dict[str, list[float]] = {kind: [] for kind in kinds}
        with Fleet(1, Server) as server:
            port = server.ask("port")[0]
            program = functools.partial(Steps, size=size, port=port, steps=args.steps)
            with Fleet(size, program) as ranks:
                ranks.ask("connect")
                for number in range(args.rounds + 1):
                    for kind in random.sample(kinds, len(kinds)):
                        # A job waits for its slowest rank.
                        slowest = max(ranks.ask("measure", kind))
                        # The first round is to warm up.
                        if number:
                            secs[kind].append(slowest)
                results.progress(f"{size} ranks")
                ranks.ask("close")
        for kind in kinds:
            pairs = zip(secs[kind], secs[FLAG], strict=True)
            cost, ratio = spread(secs[kind]), spread(mine / flag for mine, flag in pairs)
            met = "" if kind != OURS[0] else "met" if cost["median"] <= GOAL_SECS else "MISSED"
            row = [kind, size, shown(cost, 1e-6, 2), f"{ratio['median']:.5f}", met]
            rows.append(row)
            data.append({"kind": kind, "ranks": size, "secs": cost, "of_all_reduce": ratio})
    head = ["", "ranks", "us per step", "of all_reduce", f"at most {GOAL_SECS * 1e6:g} us"]
    report.say(table(head, rows))
    if args.save:
        report.save("step_signal", {"steps": args.steps, "rows": data})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=results.numbers, default=[2, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2000, help="of a burst; a 20th of all_reduce")
    parser.add_argument("--save", action="store_true", help="write results/step_signal.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
