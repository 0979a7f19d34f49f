"""The cost of waiting: CPU and store traffic of a rank-minute; threads, sockets and memory.

    python benchmarks/waiting.py --ranks 16 --secs 60

Ranks in one process wait for one that does not come, with all settings at their defaults, so a
minute has two progress reports in it. The memory of an idle rank is that of Python's objects alone,
in a process that has other ranks already: not that of imports, nor the kernel's for its sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import os
import time
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import results
from fleet import Fleet
from many_ranks import ManyRanks
from proxy import Proxy, Server, Traffic, difference
from results import table
from torch.distributed import TCPStore
from variants import HOST

from async_barriers import StoreBarrier

KINDS = ("ours", "torch")
MANY = 16
SETTLE_SECS = 2.0
# The rows of the report: from which step to which, and for how many phases.
STEPS = (
    ("idle", "empty", "connected", 1),
    ("with one phase awaited", "empty", "one", 1),
    ("for each further phase", "one", "many", MANY - 1),
)
STEPS_FIELDS = ("threads", "sockets", "kib")
# So many ranks are there before those whose memory is measured.
BEFORE, MEASURED = 32, 200
IDLE_GOAL_KIB = 4.0


class Waiters(ManyRanks):
    """All ranks of a world but the last. See `fleet.Fleet`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._empty = resources()
        super().__init__(*args, **options)

    def wait(self, secs: float) -> dict[str, dict[str, float]]:
        """Resources at each step, and the CPU of ``secs`` of waiting in one phase."""
        return self._runner.run(self._wait(secs))

    async def _wait(self, secs: float) -> dict[str, dict[str, float]]:
        found = {"empty": self._empty, "connected": resources()}
        tasks = self._enter("")
        await asyncio.sleep(SETTLE_SECS)
        found["one"] = resources()
        began = time.process_time()
        await asyncio.sleep(secs)
        found["waited"] = {"cpu_secs": time.process_time() - began}
        if self._barriers:
            for number in range(1, MANY):
                tasks += self._enter(str(number))
            await asyncio.sleep(SETTLE_SECS)
            found["many"] = resources()
        # The process ends now; no rank will release them.
        for task in tasks:
            task.cancel()
        return found

    def _enter(self, name: str) -> list[asyncio.Future[object]]:
        if self._barriers:
            return [asyncio.ensure_future(b.execute_barrier(name)) for b in self._barriers]
        return [asyncio.ensure_future(cross()) for cross in self._crosses.values()]


class Idle:
    """Ranks that are connected, and wait for nothing. See `fleet.Fleet`."""

    def __init__(self, _: int, port: int) -> None:
        self._store = TCPStore(HOST, port, wait_for_workers=False)
        self._ranks: list[StoreBarrier] = []

    def kib(self) -> float:
        """Of Python's objects, for each rank more."""
        return asyncio.run(self._kib())

    async def _kib(self) -> float:
        await self._connect(range(BEFORE))
        gc.collect()
        tracemalloc.start()
        await self._connect(range(BEFORE, BEFORE + MEASURED))
        await asyncio.sleep(SETTLE_SECS)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
        return taken / MEASURED / 1024

    async def _connect(self, ranks: Iterable[int]) -> None:
        size = BEFORE + MEASURED
        more = [StoreBarrier(self._store, rank=rank, world_size=size) for rank in ranks]
        self._ranks += more
        await asyncio.gather(*(barrier.connect() for barrier in more))


def resources() -> dict[str, float]:
    """The resources of this process."""
    gc.collect()
    # A socket may have two descriptors.
    links = {os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}
    status = Path("/proc/self/status").read_text().split()
    return {
        "threads": float(status[status.index("Threads:") + 1]),
        "sockets": float(sum(link.startswith("socket:") for link in links)),
        "kib": float(status[status.index("VmRSS:") + 1]),
    }


def main() -> None:
    args = parse_arguments()
    report = results.Report(f"Waiting {args.secs:g} s, {args.ranks} ranks in one process")
    rows = [measure(kind, args.ranks, args.secs) for kind in KINDS]
    fields = list(rows[0]["per_rank_minute"])
    head = ["per rank-minute of waiting", *(row["kind"] for row in rows)]
    lines = [[field, *(f"{row['per_rank_minute'][field]:.4g}" for row in rows)] for field in fields]
    report.say(table(head, lines) + "\n")
    head = ["per rank", *STEPS_FIELDS]
    lines = [
        [f"{row['kind']}, {step}", *(f"{value:.2f}" for value in of.values())]
        for row in rows
        for step, of in row["per_rank"].items()
    ]
    report.say(table(head, lines))
    kib = memory_of_an_idle_rank()
    verdict = "reached" if kib <= IDLE_GOAL_KIB else "MISSED"
    report.say(f"\nan idle rank more: {kib:.1f} KiB of objects, goal {IDLE_GOAL_KIB:g}: {verdict}")
    if args.save:
        found = {"ranks": args.ranks, "secs": args.secs, "rows": rows, "idle_kib": kib}
        report.save("waiting", found)


def memory_of_an_idle_rank() -> float:
    """In KiB."""
    with (
        Fleet(1, Server) as server,
        Fleet(1, functools.partial(Idle, port=server.ask("port")[0])) as idle,
    ):
        return float(idle.ask("kib")[0])


def measure(kind: str, ranks: int, secs: float) -> dict[str, Any]:
    """Measure one kind, waiting through counting proxies."""
    traffic = Traffic(ranks)
    with Fleet(1, Server) as server:
        port = server.ask("port")[0]
        with Fleet(1, functools.partial(Proxy, server_port=port, traffic=traffic)) as proxy:
            ports = dict(enumerate(proxy.ask("ports")[0]))
            world = functools.partial(Waiters, kind=kind, size=ranks + 1, ports=ports)
            with Fleet(1, world) as waiters:
                waiters.ask("cpu_secs")
                waiters.start("wait", secs)
                time.sleep(SETTLE_SECS)
                before, cpu_before = traffic.all(), server.ask("cpu_secs")[0]
                time.sleep(secs)
                after, cpu_after = traffic.all(), server.ask("cpu_secs")[0]
                found = waiters.answer(0)
    minutes = ranks * secs / 60
    counted = [difference(a, b) for a, b in zip(after, before, strict=True)]
    return {
        "kind": kind,
        "per_rank_minute": {
            "cpu_secs": found["waited"]["cpu_secs"] / minutes,
            "server_cpu_secs": (cpu_after - cpu_before) / minutes,
            **{field: sum(of[field] for of in counted) / minutes for field in Traffic.FIELDS},
        },
        "per_rank": {
            name: {
                field: (found[after][field] - found[before][field]) / ranks / share
                for field in STEPS_FIELDS
            }
            for name, before, after, share in STEPS
            if after in found
        },
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--secs", type=float, default=62.0)
    parser.add_argument("--save", action="store_true", help="write results/waiting.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
