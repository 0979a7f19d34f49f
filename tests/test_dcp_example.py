"""The example of torch.distributed.checkpoint, under torchrun as its docstring says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from fork_server import python

EXAMPLE = Path(__file__).parent.parent / "examples" / "dcp_async_save.py"
BOUND_SECS = 38


@pytest.mark.processes
def test_only_whole_checkpoints_are_the_latest(tmp_path: Path) -> None:
    """DCP's futures and our commit, awaited together: what one rank could not finish does not
    count, both know why, and the next one does and can be loaded."""
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone"]
    options = ["--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    # Without a pause: the next save would begin while this one is uploaded.
    faults = ["--fail-rank", "1", "--fail-at", "2", "--step-secs", "0"]
    ended = subprocess.run(
        [*torchrun, *options, str(EXAMPLE), "--out", str(tmp_path), *faults],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=BOUND_SECS,
    )
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.splitlines()
    for rank in range(2):
        assert f"rank {rank}: step-1 is committed" in said
        (lost,) = (line for line in said if line.startswith(f"rank {rank}: step-2"))
        assert "does not count" in lost
        assert "the data loader's state is lost" in lost
        assert f"rank {rank}: step-3 is committed" in said
        assert f"rank {rank}: loaded step-3" in said
    assert "broken by rank 1" in next(line for line in said if line.startswith("rank 0: step-2"))
    committed = {path.parent.name for path in tmp_path.glob("*/commit.json")}
    assert committed == {"step-1", "step-3"}
    manifest = json.loads((tmp_path / "step-3" / "commit.json").read_text())
    assert manifest == {"0": "reader-0.json", "1": "reader-1.json"}
