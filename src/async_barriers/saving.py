"""A writer to start from: `Saver` saves checkpoints that are complete on all ranks or on none.

    async def upload(state, part):  # your writer; each rank writes its own files
        await part.write("weights.pt", serialize(state))

    saver = Saver(barrier, "/shared/run-7", upload, rank=rank, keep=3)
    newest = await saver.newest()                 # the same on every rank, or None
    ...
    await tasks.start(saver.save, step, state)    # returns when the state is copied

`_saver.py` uses public calls of the library only. Copy it, and change what does not fit.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from ._fsspec import FsspecStorage
from ._part import Part
from ._pending import CANCELLED_SECS, Call
from ._saver import Saver, Upload
from ._storage import Checkpoint, Directory, Storage
from ._store.worker import Promise
from .blocking import BlockingBarrier

__all__ = ["BlockingSaver", "Checkpoint", "Directory", "FsspecStorage", "Part", "Saver", "Storage"]

T = TypeVar("T")


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
        staged, portal = _Staged(), self._blocking._portal
        call = Call(partial(self._saver.save, step, state, task_status=staged))
        try:
            saving = portal.begin(call)
            # Not a callback of the future's: that would swallow what a signal handler raises.
            call.promise.when_settled(staged.started)
            staged.wait(None)
            return saving
        except BaseException:
            portal.cancel(call)
            call.promise.wait(CANCELLED_SECS)
            raise

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


class _Staged(Promise[None]):
    """A ``task_status`` that a thread waits for."""

    def started(self, value: None = None) -> None:
        self.settle()
