"""The benchmarks run; what they measure is no test's business."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from fork_server import python

import async_barriers

ROOT = Path(__file__).parents[1]
SOURCE = Path(async_barriers.__file__).parents[1]


def run(benchmark: str, *args: str) -> str:
    """What it printed."""
    done = subprocess.run(
        [python(), str(ROOT / "benchmarks" / benchmark), *args],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=35,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.processes
def test_crossings_are_measured_side_by_side() -> None:
    """Every use over every store on every loop has its row, next to what is set against it."""
    said = run("crossing.py", "--sizes", "2", "--rounds", "2", "--crossings", "8")
    for store in ("bare", "prefix"):
        for use in ("same name", "new name", "two names", "phase", "step", "commit", "commit step"):
            assert f"\n{use}, {store} " in said
            for loop in ("asyncio", "uvloop", "trio"):
                assert f"\n{use}, {store}, {loop} " in said
    assert "\ntorch barrier, bare, blocking " in said
    assert "\ntorch commit, bare, blocking " in said
    assert "\ntorch commit, prefix, trio " in said
    assert " of 42 goals MISSED" in said


@pytest.mark.processes
def test_many_ranks_are_set_against_torch() -> None:
    """What the server spends on each, and what each receives, as the world grows."""
    said = run("scale.py", "--sizes", "16,32", "--rounds", "1", "--burst-secs", "0.05")
    assert "server CPU us per rank at 32 ranks, of torch's: " in said
    assert "\nbytes received per rank: " in said


@pytest.mark.processes
def test_phases_that_are_awaited_at_once() -> None:
    """Over sockets, in worker threads, and torch's."""
    said = run("at_once.py", "--ranks", "2", "--names", "1,3", "--rounds", "2", "--times", "2")
    for way in ("sockets", "worker threads", "torch in threads"):
        for names in (1, 3):
            assert f"\n{way}, {names} " in said


@pytest.mark.processes
def test_one_deadline_for_all() -> None:
    """How late the last rank is told, in each use."""
    said = run("deadlines.py", "--sizes", "16", "--rounds", "1")
    assert "\nall_gather " in said
    assert "the last rank was told 0." in said
