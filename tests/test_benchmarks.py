"""The benchmarks run; what they measure is no test's business."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import async_barriers

ROOT = Path(__file__).parents[1]
SOURCE = Path(async_barriers.__file__).parents[1]


def run(benchmark: str, *args: str) -> str:
    """What it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / benchmark), *args],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=35,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.processes
def test_crossings_are_measured_side_by_side() -> None:
    """Each variant asked for has its row, and ours is set against the others."""
    variants = ["ours-asyncio", "ours-uvloop", "ours-trio", "torch-blocking", "torch-thread"]
    said = run(
        "crossing.py",
        *["--sizes", "2", "--rounds", "2", "--burst-secs", "0.01"],
        "--only",
        ",".join(variants),
    )
    rows = [line.split()[0] for line in said.splitlines() if line]
    assert [row for row in rows if row in variants][: len(variants)] == variants
    assert "ours-asyncio of torch-thread: " in said
    assert "ours-asyncio of torch-blocking: " in said
