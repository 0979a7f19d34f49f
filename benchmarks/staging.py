"""How pending barriers slow down staging and uploading: 1 GiB copied and written meanwhile.

    python benchmarks/staging.py --rounds 5

The copies run in asyncio's own thread pool, as checkpoint writers have them. Phases that wait in
that pool (a blocking barrier through `asyncio.to_thread`) take its threads from them.
"""

from __future__ import annotations

import argparse
import functools
import random

import results
from fleet import Fleet
from pending import CHUNK_BYTES, CHUNKS, Pending
from proxy import Server
from results import shown, spread, table

CONDITIONS = (
    ("idle", 0),
    *(("ours", 1), ("ours", 16), ("ours", 64)),
    *(("torch-thread", 1), ("torch-thread", 16)),
)
# The other rank is late by so many seconds.
LATE_SECS = 3.0


def main() -> None:
    args = parse_arguments()
    report = results.Report(
        f"Staging and writing 1 GiB while phases are pending, which they are for {LATE_SECS:g} s"
    )
    secs: dict[tuple[str, int], list[float]] = {condition: [] for condition in CONDITIONS}
    with Fleet(1, Server) as server:
        program = functools.partial(Pending, port=server.ask("port")[0])
        with Fleet(2, program) as ranks:
            ranks.ask("connect", max(phases for _, phases in CONDITIONS))
            ranks.ask("stage", "idle", 0, ranks=[0])
            for number in range(args.rounds):
                for kind, phases in random.sample(CONDITIONS, len(CONDITIONS)):
                    ranks.start("stage", kind, phases, ranks=[0])
                    if phases:
                        ranks.ask("enter", kind, phases, LATE_SECS, ranks=[1])
                    secs[kind, phases].append(ranks.answer(0))
                results.progress(f"round {number + 1} of {args.rounds}")
            ranks.ask("close")
    rates = {key: spread(CHUNKS * CHUNK_BYTES / s / 1e6 for s in secs[key]) for key in CONDITIONS}
    idle = rates["idle", 0]["median"]
    rows = [
        [kind, phases, shown(rate), f"{rate['median'] / idle:.0%}"]
        for (kind, phases), rate in rates.items()
    ]
    report.say(table(["", "phases", "MB/s", "of idle"], rows))
    if args.save:
        data = [{"kind": k, "phases": n, "mb_per_sec": rate} for (k, n), rate in rates.items()]
        report.save("staging", {"late_secs": LATE_SECS, "rows": data})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write results/staging.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
