"""Runs scripts as a reader would, each in a process and a directory of its own.

    python tests/run_pages.py DIRECTORY/script.py...

Beside each script it leaves ``output.txt``, which ends in how the process ended. The processes are
forked from one that has imported torch, which is most of what such a script costs.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

import torch.distributed
import trio

import async_barriers
import async_barriers.blocking
import async_barriers.testing

# Imported for those who are forked.
READY = (torch.distributed, trio, async_barriers.blocking, async_barriers.testing)
BOUND_SECS = 45
# They wait more than they compute.
AT_ONCE = 4


def run(script: Path) -> None:
    """In the process that is `script`'s alone."""
    signal.alarm(BOUND_SECS)
    os.chdir(script.parent)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = [str(script)]
    runpy.run_path(str(script), run_name="__main__")


def main() -> None:
    scripts = list(map(Path, sys.argv[1:]))
    running: dict[int, Path] = {}
    while scripts or running:
        if scripts and len(running) < AT_ONCE:
            script = scripts.pop()
            pid = os.fork()
            if pid == 0:
                return run(script)
            running[pid] = script
        else:
            pid, status = os.wait()
            with (running.pop(pid).parent / "output.txt").open("a") as output:
                output.write(f"\nended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
