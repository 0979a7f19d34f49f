"""``python -m async_barriers doctor``: see whether barriers work between the ranks of a job."""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import anyio

from . import _launch
from ._doctor.measure import Facts, examine
from ._doctor.newcomer import LookUps, first_connection
from ._doctor.report import Finding, Report, of_error, of_facts, of_roll
from ._doctor.roll import Roll
from ._errors import BarrierConnectionError, BarrierError
from ._store.event_loop import Loop
from ._store.future import Effort
from ._store.loops import loop_here
from ._store.sources import Connection
from ._store.waiting import settled
from .store_barrier import StoreBarrier


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parser().parse_args(argv)
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return anyio.run(check, args)
    return _start_ranks(args)


async def check(args: argparse.Namespace) -> int:
    """Do this rank's part in examining the job; return the exit status."""
    try:
        launched = _launch.from_environment()
    except ValueError as exc:
        report = of_error(exc)
    else:
        report = await _Examination(launched, args).report()
        report.rank = launched.rank
    if report.ranks or not report.ok:
        # Written in one piece, since all ranks may write to one pipe.
        said = report.as_json() if args.json else report.as_text()
        sys.stdout.write(said + "\n")
        sys.stdout.flush()
    # If one rank exits with an error, torchrun kills the others before they have printed, and
    # writes a trace of its own.
    launcher_heeds = "TORCHELASTIC_RUN_ID" in os.environ and not args.strict
    return 0 if report.ok or launcher_heeds else 1


class _Examination:
    """One rank's examination, together with the others."""

    def __init__(self, launched: _launch.Launched, args: argparse.Namespace) -> None:
        self._launched = launched
        self._args = args
        self._loop: Loop = loop_here(None)
        self._began = self._loop.now()
        self._look_ups = LookUps(self._loop, launched.store.address)

    async def report(self) -> Report:
        launched, loop = self._launched, self._loop
        deadline = loop.now() + self._args.timeout_secs
        connection: Connection | None = None
        try:
            opening = Effort(first_connection(launched.store, loop, deadline))
            # It ends by itself and says why, but a name look-up can take longer.
            if not await settled(loop, opening, deadline + 1.0):
                raise BarrierConnectionError(f"no store was reached at {_at(launched)} in time")
            connection = opening.result()
            roll = Roll(connection, loop, launched.rank, launched.world_size)
            return await self._with(roll, deadline)
        except (BarrierError, ValueError) as exc:
            return of_error(exc, self._look_ups)
        finally:
            if connection is not None:
                connection.close(reset=connection.unsaid)
            launched.store.let_go()

    async def _with(self, roll: Roll, deadline: float) -> Report:
        loop = self._loop
        calling = Effort(roll.call(deadline))
        try:
            if not await settled(loop, calling, deadline + 1.0):
                raise BarrierConnectionError(
                    f"the store at {_at(self._launched)} stopped answering"
                )
            report = of_roll(calling.result(), loop.now() - self._began)
            return await self._measured(roll) if report.ok else report
        finally:
            hosts = await self._launched.store.hosts(loop)
            leaving = Effort(roll.leave(hosts=hosts))
            await settled(loop, leaving, loop.now() + 4.0)

    async def _measured(self, roll: Roll) -> Report:
        launched, args = self._launched, self._args
        reports: list[Report] = []
        barrier = StoreBarrier(
            launched.store,  # type: ignore[arg-type]  # a store that is not there yet
            rank=launched.rank,
            world_size=launched.world_size,
            prefix="async_barriers doctor",
            timeout_secs=args.timeout_secs,
            timeout_barrier_init_secs=args.timeout_secs,
            warn_after_secs=None,
        )

        def judge(ranks: list[Facts]) -> bytes:
            reports.append(of_facts(ranks))
            return json.dumps(
                [[found.what, found.remedy] for found in reports[0].problems]
            ).encode()

        problems = b""
        failed: BarrierError | None = None
        async with barrier, anyio.create_task_group() as tasks:
            with anyio.CancelScope() as examining:
                tasks.start_soon(self._stop_when_over, roll, examining)
                # An error that left the task group would come out in an ExceptionGroup.
                try:
                    problems = await examine(
                        barrier,
                        launched.store,
                        judge,
                        look_ups=self._look_ups,
                        crossings=args.crossings,
                        timeout_secs=args.timeout_secs,
                    )
                except BarrierError as exc:
                    failed = exc
            # A process may have come meanwhile with a rank that is taken.
            reading = Effort(roll.read())
            await settled(self._loop, reading, self._loop.now() + 1.0)
            tasks.cancel_scope.cancel()
        found = of_roll(reading.result(), 0.0) if reading.done and not reading.error else Report()
        if examining.cancelled_caught:
            failed = BarrierError("another rank has found something wrong, and says what")
        if failed is not None and found.ok:
            raise failed
        if reports:
            reports[0].problems += found.problems
            return reports[0]
        if problems:
            found.problems += [Finding(*each) for each in json.loads(problems)]
        return found

    async def _stop_when_over(self, roll: Roll, scope: anyio.CancelScope) -> None:
        over = Effort(roll.over())
        if await settled(self._loop, over, math.inf) and over.error is None:
            scope.cancel()


def _at(launched: _launch.Launched) -> str:
    return "{}:{}".format(*launched.store.address)


def _start_ranks(args: argparse.Namespace) -> int:
    """Outside any job: start a few ranks on this machine, each of which examines."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    job = {"WORLD_SIZE": args.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", __package__, "doctor"]
    command += ["--timeout-secs", str(args.timeout_secs), "--crossings", str(args.crossings)]
    command += ["--json"] * args.json
    # These variables belong to a job that does not run.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(args.ranks):
            own = {**job, "RANK": rank}
            environment = {**kept, **{name: str(value) for name, value in own.items()}}
            ranks.append(subprocess.Popen(command, env=environment))
        # A process that was killed has a negative status.
        statuses = [process.wait() for process in ranks]
        return int(any(statuses))
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    whole = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="see whether barriers work between the ranks of a job",
        description="Examines the ranks that torchrun started (`torchrun ... -m async_barriers "
        "doctor`), or else a few of its own on this machine. Every rank that sees a problem says "
        "so, and the exit status is 1. Under torchrun it is 0, because torchrun would otherwise "
        "end the other ranks before they have printed, and print a trace.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = doctor.add_argument
    add("--json", action="store_true", help="for machines, an object on one line")
    add("--strict", action="store_true", help="exit with 1 under torchrun, too")
    add(
        "--timeout-secs",
        type=_positive_secs,
        default=30.0,
        help="for connecting, for all ranks to come, and for each crossing",
    )
    add("--crossings", type=_positive, default=200, help="to measure")
    add("--ranks", type=_positive, default=3, help="to start, outside torchrun")
    return whole


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _positive_secs(text: str) -> float:
    secs = float(text)
    if not 0 < secs < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return secs


def _run() -> None:
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is printed and closed. A thread in a look-up, or in c10d, neither delays nor aborts
    # the end.
    os._exit(status)


if __name__ == "__main__":
    _run()
