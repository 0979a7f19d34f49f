"""A writer to start from: `Saver` saves checkpoints that are complete on all ranks or on none.

    async def upload(state, part):  # your writer; each rank writes its own files
        await part.write("weights.pt", serialize(state))

    saver = Saver(barrier, "/shared/run-7", upload, rank=rank, keep=3)
    newest = await saver.newest()                 # the same on every rank, or None
    ...
    await tasks.start(saver.save, step, state)    # returns when the state is copied

It uses public calls of the library only. Copy it, and change what does not fit.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskStatus

from . import Barrier, BarrierError
from ._background import Background
from ._checks import check_callable, check_number
from ._part import Part
from ._reasons import reason_of
from ._storage import Checkpoint, Directory, FsspecStorage, Storage
from .blocking import BlockingBarrier

__all__ = ["BlockingSaver", "Checkpoint", "Directory", "FsspecStorage", "Part", "Saver", "Storage"]

T = TypeVar("T")
_logger = logging.getLogger(__name__)
# So many steps are enough to find one that all ranks see, and few enough to send.
_MOST_STEPS = 1000


Upload = Callable[[Any, Part], Any]


class Saver:
    """Saves the checkpoints of one rank. All ranks build one alike, and save the same steps.

    Readers see a checkpoint when every rank has uploaded its part, and never before. If a rank
    fails, leaves or never comes, the checkpoint is incomplete for all ranks, and all get the
    reason. ``latest`` moves after the commit, on the leader.

    :param barrier: connects the ranks; it stays open, and you may use it for other names
    :param storage: the path of a directory that all ranks share, or another `Storage`
    :param upload: ``await upload(state, part)`` writes this rank's files to ``part.path``, or with
        ``part.write``. What it returns, if anything, must fit into JSON and becomes this rank's
        entry in the manifest. A plain function runs in a thread.
    :param rank: the rank of this process in the barrier
    :param stage: copies the state, in a thread, so that training may change the original
    :param keep: how many of the newest complete checkpoints to keep; None keeps all
    :param queue: if True, a save that overlaps another waits for it; else it is refused, on all
        ranks
    :param name: of the phases; savers of one barrier need different ones
    :param leader: the rank that writes the manifest and moves ``latest``
    """

    def __init__(
        self,
        barrier: Barrier,
        storage: str | os.PathLike[str] | Storage,
        upload: Upload,
        *,
        rank: int,
        stage: Callable[[Any], Any] = copy.deepcopy,
        keep: int | None = None,
        queue: bool = False,
        name: str = "save",
        leader: int = 0,
    ) -> None:
        check_callable("upload", upload)
        check_callable("stage", stage)
        if keep is not None:
            check_number("keep", keep, 1)
        self._barrier = barrier
        self._storage = storage if isinstance(storage, Storage) else Directory(storage)
        self._upload = upload
        self._rank = check_number("rank", rank)
        self._stage = stage
        self._keep = keep
        self._queues = queue
        self._name = name
        self._leader = check_number("leader", leader)
        # The steps that are not decided yet, in order, with the reason of each that is given up. A
        # step is broken in its turn: to break it earlier would break the save before it, too.
        self._pending: dict[int, str] = {}
        self._turn = anyio.Lock()
        self._staging = anyio.Lock()
        self._background = Background()

    async def save(
        self, step: int, state: Any, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> Checkpoint:
        """Copy the state, upload it and complete the checkpoint with all other ranks.

        Under a task group, ``await tasks.start(saver.save, step, state)`` returns when the state is
        copied, and the rest goes on in the background. If staging or the upload raises, this rank
        gets that exception. All other errors are those of `Barrier.commit`.

        :param step: larger than that of every save before
        :raises RuntimeError: another save is under way (without ``queue``); no rank completes this
        :raises FileExistsError: a complete checkpoint of this step exists

        **Cancellation:** the checkpoint is incomplete for all ranks, unless it was complete before.
        It only waits for the leader's last step, so that this cannot come late.
        """
        check_number("step", step)
        if any(step <= other for other in self._pending):
            raise ValueError(f"step {step} does not come after step {max(self._pending)}")
        refused = None if self._queues else next(iter(self._pending), None)
        self._pending[step] = ""
        try:
            if refused is not None:
                raise RuntimeError(f"step {step} is refused: step {refused} is still being saved")
            # One after another, so that turns are taken in the order of the calls.
            async with self._staging:
                staged = await self._background.run(self._stage, state)
            task_status.started()
            await self._turn.acquire()
        except GeneratorExit:
            # Nothing may be awaited here. The barrier tells the peers when its loop ends.
            del self._pending[step]
            raise
        except BaseException as exc:
            self._pending[step] = reason_of(exc)
            await self._break_given_up()
            raise
        try:
            return await self._save(step, staged)
        finally:
            del self._pending[step]
            try:
                await self._break_given_up()
            finally:
                self._turn.release()

    async def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is complete for every rank, or None; the same on all ranks.

        All ranks call it, as often as each other, and not while they save. If the storage raises,
        that rank gets the exception. All other errors are those of `Barrier.commit`.

        **Cancellation:** as `Barrier.commit`; nothing is changed.
        """

        async def agree(seen: Mapping[int, bytes]) -> bytes:
            common = set.intersection(*(set(json.loads(steps)) for steps in seen.values()))
            return json.dumps(max(common, default=None)).encode()

        found = self._barrier.committing(agree, name=f"{self._name}: newest", leader=self._leader)
        async with found as part:
            steps = await self._background.run(self._storage.steps)
            part.payload = json.dumps(steps[-_MOST_STEPS:]).encode()
        step = json.loads(part.result)
        return None if step is None else await self._background.run(self._storage.read, step)

    async def _save(self, step: int, staged: Any) -> Checkpoint:
        storage = self._storage
        published = False
        cancelled: list[BaseException] = []

        async def publish(entries: Mapping[int, bytes]) -> None:
            nonlocal published
            listed = []
            for rank in sorted(entries):
                said, entry = json.loads(entries[rank])
                if said != rank:
                    raise ValueError(f"the saver of rank {rank} was built with rank={said}")
                listed.append(entry)
            manifest = json.dumps({"step": step, "entries": listed}).encode()
            await self._background.run(storage.prepare, step, manifest)
            # The verdict follows from this step, so nothing may come between them. Its thread
            # outlives a cancellation, and could complete a checkpoint that peers take for broken.
            # So wait for its end.
            cancelled.extend(await self._background.run_to_the_end(storage.complete, step))
            published = True

        commit = self._barrier.committing(publish, name=self._name, step=step, leader=self._leader)
        try:
            async with commit as part:
                entry = await self._uploaded(step, staged)
                part.payload = json.dumps([self._rank, entry]).encode()
        finally:
            # Also where this task was cancelled meanwhile: the checkpoint is complete.
            if published:
                cancelled.extend(await self._background.run_to_the_end(self._after, step))
            if cancelled:
                raise cancelled[0]
        return Checkpoint(step, storage.path(step))

    async def _uploaded(self, step: int, staged: Any) -> Any:
        storage = self._storage
        if step in await self._background.run(storage.steps):
            raise FileExistsError(f"{storage.path(step)} is complete; it is not overwritten")
        path = await self._background.run(storage.begin, step, self._rank)
        part = Part(step, path, storage, self._background)
        entry = await self._background.run_any(self._upload, staged, part)
        await self._background.run(storage.seal, path)
        return entry

    def _after(self, step: int) -> None:
        """On the leader, after the commit: move ``latest``, and remove what is too old."""
        storage = self._storage
        try:
            storage.point(step)
            storage.clear(step)
            older = [other for other in storage.steps() if other < step]
            # With this one, `keep` are left.
            for other in older[: max(0, len(older) + 1 - self._keep)] if self._keep else ():
                storage.remove(other)
        except Exception:
            # The checkpoint is complete all the same, and the next save does this again.
            _logger.warning("step %d is saved, but its clean-up failed", step, exc_info=True)

    async def _break_given_up(self) -> None:
        while (step := next(iter(self._pending), None)) is not None and self._pending[step]:
            reason = self._pending.pop(step)
            with anyio.move_on_after(1, shield=True), contextlib.suppress(BarrierError):
                await self._barrier.abort(reason, self._name, step=step)


class BlockingSaver:
    """A `Saver` for code that cannot await, on the event loop of a `BlockingBarrier`.

    :param blocking: stays open
    :param storage: as for `Saver`, and so are ``upload`` and ``options``
    """

    def __init__(
        self,
        blocking: BlockingBarrier,
        storage: str | os.PathLike[str] | Storage,
        upload: Upload,
        **options: Any,
    ) -> None:
        self._blocking = blocking
        self._saver = Saver(blocking.barrier, storage, upload, **options)

    def start(self, step: int, state: Any) -> Future[Checkpoint]:
        """Begin to save, and return when the state is copied; otherwise as `Saver.save`.

        **Interruption**, as by Ctrl-C, while the state is copied: no rank completes this step.
        """
        staged = _Staged()
        saving = self._blocking.start(self._saver.save, step, state, task_status=staged)
        saving.add_done_callback(lambda _: staged.started())
        try:
            staged.wait()
        except BaseException:
            saving.cancel()
            raise
        return saving

    def save(self, step: int, state: Any) -> Checkpoint:
        """As `Saver.save`, blocking.

        **Interruption:** as the cancellation of `Saver.save`.
        """
        return self._result(self.start(step, state))

    def newest(self) -> Checkpoint | None:
        """As `Saver.newest`, blocking.

        **Interruption:** as the cancellation of `Saver.newest`.
        """
        return self._result(self._blocking.start(self._saver.newest))

    def _result(self, running: Future[T]) -> T:
        try:
            return running.result()
        except BaseException:
            running.cancel()
            raise


class _Staged(threading.Event):
    """A ``task_status`` that a thread waits for."""

    def started(self, value: None = None) -> None:
        self.set()
