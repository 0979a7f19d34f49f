"""What a rank does that saves with a `BlockingSaver`; see blocking_rank.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blocking_rank

from async_barriers.blocking import BlockingBarrier
from async_barriers.saving import BlockingSaver, Part


class Doings(blocking_rank.Doings):
    """Has one saver, made with the first command."""

    def __init__(self, barrier: BlockingBarrier, options: Mapping[str, Any]) -> None:
        super().__init__(barrier, options)
        self.rank = options["rank"]
        self.hang_on = -1
        self.saver: BlockingSaver | None = None

    def save(self, root: str, step: int, hang_on: int = -1) -> int:
        self.hang_on = hang_on
        return self._saver(root).save(step, {"step": step}).step

    def newest(self, root: str) -> int:
        found = self._saver(root).newest()
        return -1 if found is None else found.step

    def _saver(self, root: str) -> BlockingSaver:
        if self.saver is None:
            self.saver = BlockingSaver(self.barrier, root, self._upload, rank=self.rank, keep=2)
        return self.saver

    def _upload(self, state: Any, part: Part) -> None:
        Path(part.path, "begun").touch()
        if self.rank == self.hang_on:
            time.sleep(60)
