"""`Saver`: each rank uploads its part of a checkpoint, and a commit completes all or none.

It uses public calls of the library only, beside the threads of `_background`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import anyio
from anyio.abc import TaskStatus

from ._background import Background, goes_on
from ._barrier import Barrier
from ._checks import check_callable, check_number
from ._errors import BarrierError, BarrierTimeoutError, BrokenBarrierError
from ._part import Part
from ._publish import is_async
from ._reasons import reason_of
from ._storage import Checkpoint, Directory, Storage
from ._store.event_loop import Loop
from ._store.worker import Promise

_logger = logging.getLogger("async_barriers.saving")
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
        if is_async(stage):
            raise TypeError(f"stage is called in a thread: {stage!r} is a coroutine function")
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
        self._loop: Loop | None = None
        # No lock, since a coroutine may be thrown away in another task than its own.
        self._turn: anyio.Semaphore
        self._staging: anyio.Lock
        self._background = Background()
        # Clean-up outlives its save. ``latest`` never moves back.
        self._cleaning = threading.Lock()
        self._latest = self._before = -1

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
        It only waits for the leader's last step, so that this cannot come late; `latest` then moves
        in the background.
        """
        check_number("step", step)
        if (loop := self._background.use()) is not self._loop:
            # The saves of a loop that ended under them are given up.
            self._loop = loop
            self._turn, self._staging, self._pending = anyio.Semaphore(1), anyio.Lock(), {}
        if any(step <= other for other in self._pending):
            raise ValueError(f"step {step} does not come after step {max(self._pending)}")
        refused = None if self._queues else next(iter(self._pending), None)
        pending, turn = self._pending, self._turn
        pending[step] = ""
        try:
            if refused is not None:
                raise RuntimeError(f"step {step} is refused: step {refused} is still being saved")
            # One after another, so that turns are taken in the order of the calls.
            async with self._staging:
                staged = await self._background.run(self._stage, state)
            task_status.started()
            await turn.acquire()
        except GeneratorExit:
            # Nothing may be awaited here. The barrier tells the peers when its loop ends.
            del pending[step]
            raise
        except BaseException as exc:
            pending[step] = reason_of(exc)
            await self._break_given_up()
            raise
        try:
            checkpoint, cleaned = await self._save(step, staged)
        except GeneratorExit:
            del pending[step]
            with contextlib.suppress(RuntimeError):  # Its loop may have ended.
                turn.release()
            raise
        except BaseException:
            await self._decided(step, pending, turn)
            raise
        await self._decided(step, pending, turn)
        # The next save need not wait for this.
        if cleaned is not None:
            await self._background.end_of(cleaned)
        return checkpoint

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

    async def _save(self, step: int, staged: Any) -> tuple[Checkpoint, Promise[None] | None]:
        """Complete the checkpoint; on the leader also begin to clean up."""
        storage = self._storage
        published = False
        cleaned: Promise[None] | None = None
        cancelled: list[BaseException] = []

        async def publish(entries: Mapping[int, bytes]) -> None:
            nonlocal published
            listed, places = [], []
            for rank in sorted(entries):
                said, entry, place = json.loads(entries[rank])
                if said != rank:
                    raise ValueError(f"the saver of rank {rank} was built with rank={said}")
                listed.append(entry)
                places.append(place)
            manifest = json.dumps({"step": step, "entries": listed}).encode()
            await self._background.run(storage.prepare, step, manifest, places)
            # The verdict follows from this step, so nothing may come between them. Its thread
            # outlives a cancellation, and could complete a checkpoint that peers take for broken.
            # So wait for its end.
            cancelled.extend(await self._background.run_to_the_end(storage.complete, step))
            published = True

        commit = self._barrier.committing(publish, name=self._name, step=step, leader=self._leader)
        path = ""
        try:
            async with commit as part:
                path = await self._begun(step)
                entry = await self._uploaded(step, staged, path)
                part.payload = json.dumps([self._rank, entry, path]).encode()
        except BaseException as exc:
            # Not where it has entered, and the leader may complete the checkpoint all the same.
            broken = isinstance(exc, BrokenBarrierError | BarrierTimeoutError) and not exc.in_doubt
            if path and (broken or not part.payload):
                self._background.begin(storage.discard, path)
            raise
        finally:
            # Also where this task was cancelled meanwhile: the checkpoint is complete.
            if published:
                cleaned = self._background.begin(self._after, step)
            if cancelled:
                raise cancelled[0]
        return Checkpoint(step, storage.path(step)), cleaned

    async def _begun(self, step: int) -> str:
        """A place for this rank's files."""
        storage = self._storage
        # Before anything is written: this process may be refused, as a second one of its rank.
        await self._barrier.connect()
        if self._rank == self._leader:
            # What ranks that were killed have left may take the room of this one. A slow rank may
            # still be at the one before.
            before, self._before = self._before, step
            await self._background.run(storage.clear, before)
        if step in await self._background.run(storage.steps):
            raise FileExistsError(f"{storage.path(step)} is complete; it is not overwritten")
        return await self._background.run(storage.begin, step, self._rank)

    async def _uploaded(self, step: int, staged: Any, path: str) -> Any:
        storage = self._storage
        writes = f"{storage.path(step)}/rank-{self._rank}"
        if goes_on(writes):
            raise RuntimeError(f"step {step} is refused: an earlier attempt still writes to {path}")
        part = Part(step, path, storage, self._background, writes)
        entry = await self._background.run_any(self._upload, staged, part, place=writes)
        await self._background.run(storage.seal, path)
        return entry

    def _after(self, step: int) -> None:
        """On the leader, after the commit: move ``latest``, and remove what is too old."""
        storage = self._storage
        try:
            with self._cleaning:
                if step > self._latest:
                    self._clean(step, storage.point)
                    self._latest = step
                self._clean(step, storage.clear)
                older = [other for other in storage.steps() if other < step]
                # With this one, `keep` are left.
                for other in older[: max(0, len(older) + 1 - self._keep)] if self._keep else ():
                    self._clean(other, storage.remove)
        except Exception:
            _logger.warning("step %d is saved, but its clean-up failed", step, exc_info=True)

    def _clean(self, step: int, call: Callable[[int], object]) -> None:
        """What fails does not keep the rest from being done; the next save does this again."""
        try:
            call(step)
        except Exception:
            what = getattr(call, "__name__", "clean-up")
            _logger.warning("%s of step %d failed; the save is complete", what, step, exc_info=True)

    async def _decided(self, step: int, pending: dict[int, str], turn: anyio.Semaphore) -> None:
        """Give the turn back, on the loop on which it was taken."""
        del pending[step]
        try:
            await self._break_given_up()
        finally:
            turn.release()

    async def _break_given_up(self) -> None:
        while (step := next(iter(self._pending), None)) is not None and self._pending[step]:
            reason = self._pending.pop(step)
            with anyio.move_on_after(1, shield=True), contextlib.suppress(BarrierError):
                await self._barrier.abort(reason, self._name, step=step)
