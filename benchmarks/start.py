"""The cost of starting: importing, connecting, closing.

    python benchmarks/start.py --rounds 7

Each round is a fresh interpreter. The import counts on top of torch.distributed and anyio, which
a program that needs a barrier has imported anyway.
"""

from __future__ import annotations

import argparse
import compileall
import json
import subprocess
import sys

import results
from fleet import Fleet
from proxy import Server
from results import shown, spread, table

import async_barriers

PROGRAM = """
import sys, time
began = time.perf_counter()
import torch.distributed, anyio, asyncio
theirs = time.perf_counter()
from async_barriers import StoreBarrier
ours = time.perf_counter()
import json
from torch.distributed import TCPStore
from torch.distributed.checkpoint._experimental.barriers import TCPStoreBarrier as TorchBarrier

port = int(sys.argv[1])
store = TCPStore("127.0.0.1", port, wait_for_workers=False)
clock = time.perf_counter

async def connect():
    barrier = StoreBarrier(store, rank=0, world_size=1, prefix=sys.argv[2])
    a = clock()
    await barrier.connect()
    b = clock()
    await barrier.execute_barrier()
    c = clock()
    await barrier.aclose()
    d = clock()
    another = StoreBarrier(store, rank=0, world_size=1, prefix=sys.argv[2] + "another")
    e = clock()
    await another.connect()
    f = clock()
    await another.aclose()
    return {
        "connect, the first (anyio loads its backend)": b - a,
        "connect, another": f - e,
        "first crossing": c - b,
        "aclose": d - c,
    }

times = asyncio.run(connect())
a = clock()
another = store.clone()
b = clock()
torchs = TorchBarrier(1, 1, sys.argv[2], 60, True, port, "127.0.0.1", 60)
c = clock()
torchs.execute_barrier()
times |= {
    "store.clone()": b - a,
    "torch's barrier: connect": c - b,
    "torch's barrier: first crossing": clock() - c,
    "import torch.distributed, anyio": theirs - began,
    "import async_barriers": ours - theirs,
}
print(json.dumps(times))
"""


def main() -> None:
    args = parse_arguments()
    report = results.Report("Importing and connecting")
    taken: dict[str, list[float]] = {}
    # Compile it, as an installed package and the alternatives are, even if Python is to write no
    # bytecode.
    compileall.compile_dir(async_barriers.__path__[0], quiet=1)
    with Fleet(1, Server) as server:
        port = server.ask("port")[0]
        for number in range(args.rounds):
            for what, secs in run(port, f"round{number}").items():
                taken.setdefault(what, []).append(secs)
    found = {what: spread(secs) for what, secs in taken.items()}
    report.say(table(["", "ms"], [[what, shown(of, 1e-3, 2)] for what, of in found.items()]))
    if args.save:
        report.save("start", {"secs": found})


def run(port: int, prefix: str) -> dict[str, float]:
    """The times of one fresh interpreter."""
    command = [sys.executable, "-c", PROGRAM, str(port), prefix]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    times: dict[str, float] = json.loads(done.stdout)
    return times


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write results/start.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
