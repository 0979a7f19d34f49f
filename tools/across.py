"""Ranks on different torches at one store: each of them hosts it once.

Run by `versions`. `python tools/across.py RANK SIZE PORT BACKEND WORKER_THREADS` is one rank.
"""

from __future__ import annotations

import functools
import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# The deadline, in seconds, for all calls of one world.
PATIENCE_SECS = 60.0


async def be_rank(rank: int, size: int, port: int, worker_threads: bool) -> dict[str, object]:
    """Make one call of each kind with the others, and report the results."""
    import torch

    from async_barriers import BarrierTimeoutError, BrokenBarrierError, TCPStoreBarrier

    last = size - 1
    told: dict[str, object] = {}

    def publish(payloads: Mapping[int, bytes]) -> bytes:
        return b"+".join(payloads[each] for each in range(size))

    async with TCPStoreBarrier(
        rank, size, "across", 20, True, port, "127.0.0.1", 20, worker_threads=worker_threads
    ) as barrier:
        for step in range(20):
            await barrier.execute_barrier("step", step=step)
        versions = await barrier.all_gather(torch.__version__.encode(), name="versions", step=0)
        told["versions"] = [version.decode() for version in versions]
        payload = b"%d" % rank
        told["published"] = (
            await barrier.commit(publish, payload=payload, name="save", step=0, leader=last)
        ).decode()
        try:
            if rank == last:
                await barrier.abort("on purpose", "aborted", step=0)
            else:
                await barrier.execute_barrier("aborted", step=0)
        except BrokenBarrierError as exc:
            told["broken by"] = exc.rank
        if rank != last:
            try:
                await barrier.execute_barrier("late", step=0, timeout_secs=0.5)
            except BarrierTimeoutError as exc:
                told["missed"] = last in exc.missing_ranks
        await barrier.execute_barrier("end", step=0)
    return told


def expected(rank: int, versions: list[str]) -> dict[str, object]:
    """The results that a rank should report."""
    size = len(versions)
    told: dict[str, object] = {"versions": versions}
    told["published"] = "+".join(str(each) for each in range(size))
    if rank != size - 1:
        told |= {"broken by": size - 1, "missed": True}
    return told


def cross(
    pythons: list[Path], backend: str, worker_threads: bool, env: dict[str, str]
) -> list[str]:
    """Run a rank on each interpreter, the first one as host; return their versions of torch.

    :param env: the ranks' environment variables
    :raises AssertionError: the results are not those expected
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = len(pythons)
    ranks = [
        subprocess.Popen(
            [python, __file__, *map(str, (rank, size, port, backend, int(worker_threads)))],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, python in enumerate(pythons)
    ]
    try:
        said = [rank.communicate(timeout=PATIENCE_SECS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (out, err) in enumerate(said):
        # If a thread waits as the host leaves, c10d may print that.
        silent = worker_threads or not err
        assert (ranks[number].returncode, silent) == (0, True), f"rank {number}: {out}{err}"
    told = [json.loads(out) for out, _ in said]
    versions: list[str] = told[0]["versions"]
    for rank_number, each in enumerate(told):
        assert each == expected(rank_number, versions), f"rank {rank_number}: {each}"
    return versions


if __name__ == "__main__":
    import anyio

    rank, size, port, threads = (int(sys.argv[at]) for at in (1, 2, 3, 5))
    doing = functools.partial(be_rank, rank, size, port, bool(threads))
    print(json.dumps(anyio.run(doing, backend=sys.argv[4])))
