"""Sharded checkpoints, saved while training goes on and published on all ranks or on none.

Every rank stages its shard (copies it out of the way of the optimizer), uploads it, and enters
`barrier.commit` with the shard's hash and the training step. When all ranks are in for the same
step, rank 0 writes the manifest and renames the directory; only then does a checkpoint of that name
exist. If any rank fails or never comes, no rank publishes, and every rank learns why.

    saver = Saver(portal, CheckpointWriter(barrier, rank=rank, ...))
    for step in ...:
        loss.backward()
        saver.wait_staged()              # the last checkpoint still reads the old weights
        optimizer.step()
        if due and not any_rank_busy():
            saver.start(step, shard)     # returns at once
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import anyio
import torch
from anyio.from_thread import BlockingPortal
from torch.distributed.checkpoint._experimental import CheckpointStagerConfig, DefaultStager

from async_barriers import Barrier, BarrierError, BarrierTimeoutError, BrokenBarrierError

Shard: TypeAlias = dict[str, Any]
Put: TypeAlias = Callable[[Path, bytes], Awaitable[None]]

logger = logging.getLogger("checkpointing")

LEADER = 0
COMMIT = "checkpoint"
MANIFEST = "manifest.json"
NOT_UPLOADED = b""


@dataclass(frozen=True)
class Verdict:
    """How a checkpoint ended, as one rank learned it."""

    published: bool | None
    """None: in doubt, this rank could not learn it. The directory tells, once it can be read."""
    culprits: tuple[int, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        if self.published:
            return "published"
        state = "in doubt" if self.published is None else "broken"
        ranks = ", ".join(str(rank) for rank in self.culprits)
        return f"{state} by rank {ranks}: {self.reason}" if ranks else f"{state}: {self.reason}"


@dataclass
class Saving:
    """One checkpoint on one rank: what happened when (`time.time()`, None if it did not)."""

    step: int
    rank: int
    started: float
    staged: float | None = None
    failed: float | None = None
    entered: float | None = None
    settled: float = 0.0
    verdict: Verdict = Verdict(None)


class CheckpointWriter:
    """One rank's part in saving checkpoints; `root` is a directory that all ranks share.

    `put` stores bytes under a path. It gets `upload_timeout_secs`, which should be longer than the
    barrier's own timeout: a rank whose storage hangs then learns the same verdict as its peers,
    which have stopped waiting for it when it comes.
    """

    def __init__(
        self, barrier: Barrier, *, rank: int, root: Path, put: Put, upload_timeout_secs: float
    ) -> None:
        self.barrier = barrier
        self.rank = rank
        self.root = root
        self.put = put
        self.upload_timeout_secs = upload_timeout_secs

    async def save(self, step: int, staging: Future[Shard]) -> Saving:
        """Upload what `staging` yields, and publish it together with all other ranks.

        A checkpoint that fails raises nothing: the result has the verdict. Cancelling breaks the
        checkpoint for all ranks.
        """
        saving = Saving(step, self.rank, started=time.time())
        try:
            payload = await self._stage_and_upload(saving, staging)
        except BaseException as exc:
            saving.failed = time.time()
            reason = f"upload failed: {exc!r}"
            saving.verdict = Verdict(False, (self.rank,), reason)
            # Tell the peers now, so that they do not wait for a shard that will not come. If even
            # that fails, their own deadlines end the wait.
            with anyio.move_on_after(1, shield=True), contextlib.suppress(BarrierError):
                await self.barrier.abort(reason, COMMIT, step=step)
            if not isinstance(exc, Exception):
                raise
        else:
            saving.entered = time.time()
            if payload == NOT_UPLOADED:
                saving.failed = saving.entered
            saving.verdict = await self._commit(step, payload)
        saving.settled = time.time()
        level = logging.INFO if saving.verdict.published else logging.WARNING
        logger.log(level, "step-%d %s", step, saving.verdict)
        await anyio.to_thread.run_sync(self._clear_up, step, saving.verdict.published)
        return saving

    async def _stage_and_upload(self, saving: Saving, staging: Future[Shard]) -> bytes:
        """Returns this rank's entry in the manifest, or NOT_UPLOADED if it took too long."""
        with anyio.move_on_after(self.upload_timeout_secs):
            shard = await asyncio.wrap_future(staging)
            saving.staged = time.time()
            data = await anyio.to_thread.run_sync(_serialize, shard)
            path = self._partial(saving.step) / f"rank-{self.rank}.pt"
            await self.put(path, data)
            digest = hashlib.sha256(data).hexdigest()
            return json.dumps({"file": path.name, "bytes": len(data), "sha256": digest}).encode()
        return NOT_UPLOADED

    async def _commit(self, step: int, payload: bytes) -> Verdict:
        try:
            # With the step, shards of different steps are never published together, whatever a rank
            # has missed, aborted or tried again before.
            await self.barrier.commit(
                partial(self._publish, step), payload=payload, name=COMMIT, step=step
            )
        except BarrierTimeoutError as exc:
            missing = exc.missing_ranks
            reason = f"missing after {exc.timeout_secs:g} s" if missing else str(exc)
            return Verdict(None if exc.in_doubt else False, missing, reason)
        except BrokenBarrierError as exc:
            culprits = () if exc.rank is None else (exc.rank,)
            return Verdict(None if exc.in_doubt else False, culprits, exc.reason)
        except BarrierError as exc:
            return Verdict(None if exc.in_doubt else False, reason=str(exc))
        except Exception as exc:
            # The exception of `_publish`. Only the leader sees it as it is.
            return Verdict(False, (self.rank,), repr(exc))
        return Verdict(True)

    async def _publish(self, step: int, payloads: Mapping[int, bytes]) -> bytes:
        """Runs on the leader alone, when every rank has entered."""
        late = [rank for rank, payload in payloads.items() if payload == NOT_UPLOADED]
        if late:
            raise IncompleteCheckpointError(f"no shard from rank {', '.join(map(str, late))}")
        shards = [json.loads(payloads[rank]) for rank in sorted(payloads)]
        manifest = json.dumps({"step": step, "shards": shards}, indent=2).encode()
        await anyio.to_thread.run_sync(write_durably, self._partial(step) / MANIFEST, manifest)
        await anyio.to_thread.run_sync(_sync_directory, self._partial(step))
        # Until here no reader sees the checkpoint. The rename is atomic, takes microseconds, and is
        # the last step: with no await after it, no deadline and no cancellation comes between it
        # and the verdict. A thread would go on when this is cancelled, and could rename after the
        # peers have learned that the checkpoint broke.
        self._partial(step).rename(self.root / f"step-{step}")
        return b""

    def _clear_up(self, step: int, published: bool | None) -> None:
        if published and self.rank == LEADER:
            # If the machine fails before this, the checkpoint before this one may be the newest.
            with contextlib.suppress(OSError):
                _sync_directory(self.root)
        elif published is False:
            self._discard(step)

    def _discard(self, step: int) -> None:
        """Remove this rank's part of a broken checkpoint; the last rank removes the directory."""
        directory = self._partial(step)
        (directory / f"rank-{self.rank}.pt").unlink(missing_ok=True)
        if self.rank == LEADER:
            (directory / MANIFEST).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()

    def _partial(self, step: int) -> Path:
        return self.root / f".step-{step}.partial"


class IncompleteCheckpointError(Exception):
    """A rank entered without having uploaded its shard."""


class Saver:
    """The training thread's handle on the writer, whose event loop runs in `portal`'s thread.

    At most one checkpoint is in flight: start the next one when no rank is `busy`.
    """

    def __init__(self, portal: BlockingPortal, writer: CheckpointWriter) -> None:
        self.savings: list[Saving] = []
        self._portal = portal
        self._writer = writer
        self._stager = DefaultStager(
            CheckpointStagerConfig(
                use_pinned_memory=torch.cuda.is_available(),
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=torch.cuda.is_available(),
            )
        )
        self._staging: Future[Shard] | None = None
        self._saving: Future[Saving] | None = None

    @property
    def busy(self) -> bool:
        return self._saving is not None and not self._saving.done()

    def start(self, step: int, shard: Shard) -> None:
        """Start saving `shard`. Its tensors must not change until `wait_staged` has returned."""
        self.wait()
        self._staging = cast("Future[Shard]", self._stager.stage(shard))
        self._saving = self._portal.start_task_soon(self._writer.save, step, self._staging)

    def wait_staged(self) -> None:
        if self._staging is not None:
            # If staging failed, the writer says so; training goes on.
            futures.wait([self._staging])
            self._staging = None

    def wait(self) -> None:
        """Wait for the verdict on the checkpoint in flight, if there is one."""
        if self._saving is not None:
            self.savings.append(self._saving.result())
            self._saving = None

    def close(self) -> None:
        self._stager.close()


def load_newest(root: Path) -> tuple[int, Shard]:
    """The newest complete checkpoint under `root`, put together from all its shards.

    Raises ValueError for a shard whose hash is not the one in the manifest.
    """
    newest = max(root.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    manifest = json.loads((newest / MANIFEST).read_bytes())
    state: Shard = {}
    for entry in manifest["shards"]:
        data = (newest / entry["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{newest / entry['file']} does not have the hash in its manifest")
        state.update(torch.load(io.BytesIO(data), weights_only=True))
    return manifest["step"], state


def write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _serialize(shard: Shard) -> bytes:
    buffer = io.BytesIO()
    torch.save(shard, buffer)
    return buffer.getvalue()
