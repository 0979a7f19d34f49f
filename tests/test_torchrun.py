"""What torchrun shows as the root cause of a job that failed."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torchrun_rank
from fork_server import python

from async_barriers import BarrierTimeoutError, BrokenBarrierError, torchrun
from async_barriers.torchrun import record


@pytest.mark.processes
@pytest.mark.parametrize("fault", ["fails", "hangs"])
def test_the_root_cause_is_the_rank_that_failed(fault: str) -> None:
    """It may take its time to end: those that waited for it end later, or name it."""
    ended = subprocess.run(
        [
            *(python(), "-m", "torch.distributed.run", "--standalone"),
            *("--local-addr", "127.0.0.1", "--nproc-per-node", "2"),
            *(torchrun_rank.__file__, fault),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "RES_OPTIONS": "attempts:0"},
        capture_output=True,
        text=True,
        timeout=35,
    )
    assert ended.returncode == 1
    root = ended.stderr.partition("Root Cause (first observed failure):")[2]
    if fault == "fails":
        assert "rank      : 1 (local_rank: 1)" in root
        assert "OSError: no space left on device" in root
    else:
        # The one that hangs is killed, and says nothing.
        assert "traceback : rank 1 caused this: had not entered; this rank waited for it" in root


def broken(rank: int | None) -> BrokenBarrierError:
    return BrokenBarrierError("written", 3, rank, "it raised OSError: disk full")


def group(*leaves: Exception) -> Exception:
    """As Python 3.11 has it, and anyio elsewhere."""
    error = RuntimeError("a group")
    error.exceptions = leaves  # type: ignore[attr-defined]
    return error


def from_a_barrier(error: Exception) -> Exception:
    """What a program raises that was told so by a barrier."""
    own = RuntimeError("the save failed")
    own.__cause__ = error
    return own


def in_a_circle() -> Exception:
    """An error that is its own cause's cause."""
    error, cause = OSError("disk full"), ValueError()
    error.__cause__, cause.__cause__ = cause, error
    return error


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (broken(3), "rank 3 caused this: it raised OSError: disk full; "),
        (BarrierTimeoutError("written", 3, (1, 2), 5.0), "ranks 1, 2 caused this: had not entered"),
        (from_a_barrier(broken(3)), "rank 3 caused this: "),
        (group(broken(3), group(broken(3))), "rank 3 caused this: "),
        (broken(0), ""),
        (broken(None), ""),
        (group(broken(3), OSError("disk full")), ""),
        (in_a_circle(), ""),
        (OSError("disk full"), ""),
    ],
)
def test_who_is_blamed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, blamed: str
) -> None:
    """An error of this rank's own is recorded as torch does it, and at once."""
    monkeypatch.setattr(torchrun, "_GRACE_SECS", 0.3)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    @record
    def main() -> None:
        raise error

    began, wall = time.monotonic(), time.time()
    with pytest.raises(type(error)):
        main()
    assert (time.monotonic() - began >= 0.3) == bool(blamed)
    recorded = json.loads((tmp_path / "error.json").read_text())["message"]
    assert recorded["message"].startswith(blamed or type(error).__name__)
    # Before all of those that waited.
    assert (int(recorded["extraInfo"]["timestamp"]) > wall + 0.3) == bool(blamed)


def test_without_torchrun_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nobody to tell."""
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)

    @record
    def main(answer: int) -> int:
        if not answer:
            raise broken(3)
        return answer

    assert main(42) == 42
    began = time.monotonic()
    with pytest.raises(BrokenBarrierError):
        main(0)
    assert time.monotonic() - began < 1
