"""One verdict for the ranks of many hosts, with a store on each host and one between them.

    torchrun --standalone --nproc-per-node 6 examples/across_hosts.py
    torchrun --standalone --nproc-per-node 6 examples/across_hosts.py --missing-rank 4

The server of a store is one thread, and all ranks ask it. Here it sees the ranks of one host only,
and the one between hosts sees one rank of each, the host's *leader*. This is for thousands of
ranks; below that, one barrier is simpler, and names all missing ranks at once.

`commit` makes one verdict of several: a leader publishes on its host that the leaders have crossed.
So a rank is released exactly if the leaders are, and a leader enters only when all ranks of its
host have entered. If they do not, the leader breaks the phase of the leaders, with the reason. If a
leader dies after that, the ranks of its host are in doubt, as after the death of any commit's
leader. In one case two hosts may differ: a leader that is cancelled in the instant in which the
leaders are released may tell its host that the commit broke.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Mapping

import anyio

from async_barriers import Barrier, BarrierError, TCPStoreBarrier
from async_barriers.torchrun import record

# A leader waits so much longer for the other leaders than for its own ranks, since they may have to
# tell it which rank is missing. Its ranks wait so much longer for its answer.
TELLS_SECS = 1.0


async def cross_hosts(
    host: int,
    local: Barrier,
    between: Barrier | None,
    name: str,
    *,
    step: int | None = None,
    timeout_secs: float,
) -> None:
    """Cross with all ranks of all hosts.

    Cancelling it breaks the phase for all of them.

    :param host: the number of this host
    :param local: of the ranks of this host; its rank 0 is the leader
    :param between: of the leaders, who have their hosts' numbers there; None on all other ranks
    :param step: as for `Barrier.execute_barrier`
    :param timeout_secs: for the ranks of this host; the verdict may take three seconds more
    :raises BarrierError: no rank is released; the error says which rank is to blame
    """
    here = f"{name} on host {host}"
    # The ranks of a host cross twice, and no step of a name is crossed twice.
    twice = (None, None) if step is None else (2 * step, 2 * step + 1)
    deadline = anyio.current_time() + timeout_secs
    gathered = False

    async def cross_between(payloads: Mapping[int, bytes]) -> bytes:
        nonlocal gathered
        gathered = True
        assert between is not None
        secs = deadline + TELLS_SECS - anyio.current_time()
        await between.execute_barrier(name, step=step, timeout_secs=secs)
        return b""

    try:
        # First without the other hosts: their leaders must not give up before this one can say
        # which rank is missing here.
        await local.execute_barrier(here, step=twice[0], timeout_secs=timeout_secs)
        secs = deadline + 2 * TELLS_SECS - anyio.current_time()
        await local.commit(cross_between, name=here, step=twice[1], timeout_secs=secs)
    except BaseException as exc:
        if between is not None and not gathered:
            failed = isinstance(exc, Exception)
            reason = str(exc) if failed else "its leader was cancelled or interrupted"
            with anyio.move_on_after(TELLS_SECS, shield=True), contextlib.suppress(BarrierError):
                await between.abort(reason, name, step=step)
        raise


async def main() -> None:
    parser = argparse.ArgumentParser(description="Hosts on one machine, each with its own store.")
    parser.add_argument("--ranks-per-host", type=int, default=3)
    parser.add_argument("--missing-rank", type=int, default=-1)
    parser.add_argument("--port", type=int, default=29700, help="and one more for each host")
    args = parser.parse_args()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, local_rank = divmod(rank, args.ranks_per_host)
    hosts = world_size // args.ranks_per_host

    def barrier(number: int, size: int, port: int) -> TCPStoreBarrier:
        # On a cluster, use 127.0.0.1 on each host, and between hosts an address that all can reach.
        return TCPStoreBarrier(
            number, size, "across hosts", tcpstore_port=port, master_address="127.0.0.1"
        )

    async with contextlib.AsyncExitStack() as stack:
        local = barrier(local_rank, args.ranks_per_host, args.port + 1 + host)
        await stack.enter_async_context(local)
        between = None if local_rank else barrier(host, hosts, args.port)
        if between is not None:
            await stack.enter_async_context(between)
        for step in range(3):
            if rank == args.missing_rank and step == 1:
                await anyio.sleep(5)
            try:
                await cross_hosts(host, local, between, "done", step=step, timeout_secs=3)
                print(f"rank {rank}: step {step} is done everywhere\n", end="", flush=True)
            except BarrierError as exc:
                print(f"rank {rank}: step {step} is not: {exc}\n", end="", flush=True)


@record
def run() -> None:
    logging.basicConfig(level=logging.WARNING)
    anyio.run(main)


if __name__ == "__main__":
    run()
