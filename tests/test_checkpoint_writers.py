"""torch's checkpoint writers with our barrier, on four ranks that are real processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fork_server import python
from processes import GRACE_SECS, Job, StartJob
from worlds import free_port

pytestmark = pytest.mark.processes

SIZE = 4
FAILING = 2
SHARDS = [f"checkpoint_{rank}.pt" for rank in range(SIZE)]
# Four subprocesses that import torch at once take ten seconds on two idle cores, which these tests
# share with others, and their end takes half as long again.
PATIENCE_SECS = 60.0
BOUND_SECS = 150
# A subprocess that fails says so by ending. Before that, torch logs the failure, and to do so
# imports its compiler, which takes a second where there is nothing else to do.
ENDING_SECS = 8.0

StartWriters = Callable[..., Job]


@pytest.fixture
def start_writers(start_job: StartJob) -> StartWriters:
    """Starts ranks that have imported torch's writers."""

    def start(*imports: str) -> Job:
        return start_job(
            SIZE,
            own_store=False,
            backends=["blocking"],
            doings="writer_rank",
            imports=["writer_rank", *imports],
            other_port=free_port(),
            python=python(),
            given={"timeout_secs": 60.0},
        )

    return start


def each(job: Job, do: str, **arguments: Any) -> list[Any]:
    """Have all ranks do the same; what came of it."""
    calls = job.starts(range(SIZE), do, **arguments)
    return [call.released(PATIENCE_SECS)["value"] for call in calls]


def fails_on_one(
    job: Job, do: str, tmp_path: Path, *, step: int, within_secs: float
) -> list[dict[str, Any]]:
    """Have all save, where one cannot write; what the others are told, soon after."""
    (tmp_path / "file").touch()
    paths = [tmp_path / ("file" if rank == FAILING else "") / "x" for rank in range(SIZE)]
    saves = [
        rank.start(do, path=str(path), step=step)
        for rank, path in zip(job.ranks, paths, strict=True)
    ]
    failed, *others = (save.answer(PATIENCE_SECS) for save in [saves.pop(FAILING), *saves])
    assert "NotADirectoryError" in failed["error"] + failed["text"], failed
    assert all(other["ended"] < failed["ended"] + within_secs for other in others)
    return others


def test_torchs_writer(start_writers: StartWriters, tmp_path: Path) -> None:
    """No rank's write returns before all shards are there, and one that fails is known to all at
    once."""
    job = start_writers()
    assert each(job, "here_write", path=str(tmp_path / "1"), step=1) == [SHARDS] * SIZE
    for told in fails_on_one(job, "here_write", tmp_path, step=2, within_secs=GRACE_SECS):
        assert (told["error"], told["rank"]) == ("BrokenBarrierError", FAILING)
        assert "NotADirectoryError" in told["reason"]
    assert each(job, "here_write", path=str(tmp_path / "3"), step=3) == [SHARDS] * SIZE
    # How long a process of ours takes to end is for other tests; torch has more to take down here.
    job.ends(ENDING_SECS)


@pytest.mark.bound(BOUND_SECS)
def test_torchs_checkpoint_process(start_writers: StartWriters, tmp_path: Path) -> None:
    """The same in the subprocesses to which torch sends the barrier."""
    job = start_writers()
    each(job, "here_start_process", init_timeout_secs=PATIENCE_SECS)
    save = "here_write_in_process"
    assert each(job, save, path=str(tmp_path / "1"), step=1) == [SHARDS] * SIZE
    # A subprocess that fails ends, as torch has it, and that is what the others are told.
    for told in fails_on_one(job, save, tmp_path, step=2, within_secs=ENDING_SECS):
        assert f"was broken by rank {FAILING}: it closed its barrier" in told["text"]
    each(job, "here_close_process")
    # torch takes its time to end its subprocesses.
    job.ends(PATIENCE_SECS, quietly=False)


@pytest.mark.bound(BOUND_SECS)
@pytest.mark.skipif(
    importlib.util.find_spec("torch_checkpointing") is None,
    reason="needs the extra torch-checkpointing",
)
def test_torch_checkpointing(start_writers: StartWriters, tmp_path: Path) -> None:
    """A CheckpointManager saves through our barrier, first synchronously and then in a subprocess,
    and loads what it saved; a save that fails on one rank is known to all at once."""
    job = start_writers("torch_checkpointing")
    for synchronous in (True, False):
        here = tmp_path / str(synchronous)
        here.mkdir()
        each(job, "here_manage", synchronous=synchronous)
        path = str(here / "step_1")
        each(job, "here_save", path=path, step=1)
        assert len(list(Path(path).glob("model*"))) == SIZE
        assert each(job, "here_load", path=path, step=1) == [True] * SIZE
        within_secs = GRACE_SECS if synchronous else ENDING_SECS
        for told in fails_on_one(job, "here_save", here, step=2, within_secs=within_secs):
            assert f"was broken by rank {FAILING}" in told["text"]
        each(job, "here_close_manager")
    # torch takes its time to end its subprocesses.
    job.ends(PATIENCE_SECS, quietly=False)
