"""``python -m async_barriers doctor``: see whether barriers work between the ranks of a job."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import anyio
import anyio.to_thread

from . import _launch
from ._doctor.measure import Facts, examine, probe
from ._doctor.report import Report, of_error, of_facts
from ._errors import BarrierConnectionError, BarrierError, BarrierTimeoutError
from .store_barrier import StoreBarrier


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    args = parser().parse_args(argv)
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return anyio.run(check, args)
    return _start_ranks(args)


async def check(args: argparse.Namespace) -> int:
    """This rank's part in examining the job; the exit status, 1 on all ranks or on none."""
    try:
        launched = _launch.from_environment()
        barrier = StoreBarrier(
            launched.store,  # type: ignore[arg-type]  # a store that is not there yet
            rank=launched.rank,
            world_size=launched.world_size,
            prefix="async_barriers doctor",
            timeout_secs=args.timeout_secs,
            timeout_barrier_init_secs=args.timeout_secs,
            warn_after_secs=None,
        )
    except ValueError as exc:
        _say(of_error(exc), args)
        return 1
    reports: list[Report] = []

    def judge(ranks: list[Facts]) -> bool:
        reports.append(of_facts(ranks))
        return reports[0].ok

    try:
        async with barrier:
            ok = await examine(
                barrier,
                launched.store,
                judge,
                crossings=args.crossings,
                timeout_secs=args.timeout_secs,
            )
    except BarrierError as exc:
        if _speaks(launched.rank, exc):
            seen = await anyio.to_thread.run_sync(probe, *launched.store.address)
            _say(of_error(exc, seen), args)
        return 1
    for report in reports:
        _say(report, args)
    return 0 if ok else 1


def _speaks(rank: int, error: BarrierError) -> bool:
    """Whether this rank says it: rank 0 does, unless it is missing; and who is cut off."""
    if isinstance(error, BarrierTimeoutError):
        return all(other in error.missing_ranks for other in range(rank))
    return rank == 0 or isinstance(error, BarrierConnectionError)


def _say(report: Report, args: argparse.Namespace) -> None:
    print(report.as_json() if args.json else report.as_text(), flush=True)


def _start_ranks(args: argparse.Namespace) -> int:
    """Outside any job: examine one of a few ranks on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    job = {"WORLD_SIZE": args.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", __package__, "doctor"]
    command += ["--timeout-secs", str(args.timeout_secs), "--crossings", str(args.crossings)]
    command += ["--json"] * args.json
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(args.ranks):
            own = {**job, "RANK": rank}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            ranks.append(subprocess.Popen(command, env=environment))
        return max(process.wait() for process in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    whole = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="see whether barriers work between the ranks of a job",
        description="Examines the ranks that torchrun started (`torchrun ... -m async_barriers "
        "doctor`), or else a few of its own on this machine. The exit status is 1 where something "
        "is wrong.",
    )
    add = doctor.add_argument
    add("--json", action="store_true", help="for machines")
    add("--timeout-secs", type=float, default=30.0, help="for connecting, and for each crossing")
    add("--crossings", type=_positive, default=200, help="to measure")
    add("--ranks", type=_positive, default=3, help="to start, outside torchrun")
    return whole


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


if __name__ == "__main__":
    sys.exit(main())
