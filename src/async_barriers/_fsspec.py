"""Checkpoints of a `Saver` on any file system that fsspec knows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from ._storage import LATEST, MANIFEST, RANK, STEP, Storage


class FsspecStorage(Storage):
    """Any file system that fsspec knows: S3, GCS, memory, ... Needs the extra ``fsspec``.

    A checkpoint is complete when its ``manifest.json`` exists. Files are written where they stay:
    do not save a step again before its last attempt is decided on all ranks.

    :param url: such as ``"s3://bucket/run-7"``; all ranks must see the same files there
    :param options: for the file system, as for ``fsspec.filesystem``
    :raises ValueError: ``url`` has a ``*``, ``?`` or ``[``, which fsspec takes for a pattern
    """

    def __init__(self, url: str, **options: Any) -> None:
        from fsspec.core import url_to_fs

        self._fs, self._root = url_to_fs(url, **options)
        if any(each in self._root for each in "*?["):
            raise ValueError(f"{url!r} has a character that fsspec takes for a pattern: *, ? or [")

    @property
    def fs(self) -> Any:
        """The file system, for an upload that writes by itself."""
        return self._fs

    def begin(self, step: int, rank: int) -> str:
        place = f"{self.path(step)}/rank-{rank}"
        if self._fs.exists(place):
            self._fs.rm(place, recursive=True)
        self._fs.makedirs(place, exist_ok=True)
        return place

    def write(self, path: str, data: bytes) -> None:
        try:
            self._fs.pipe_file(path, data)
        except FileNotFoundError:
            # Most have no directories, or make them.
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)

    def seal(self, path: str) -> None:
        """An object store keeps all that it has accepted."""

    def prepare(self, step: int, manifest: bytes, places: Sequence[str]) -> None:
        place = self.path(step)
        for name in self._names_in(place):
            # Of an attempt with more ranks.
            if (rank := RANK.fullmatch(name)) and int(rank[1]) >= len(places):
                self._fs.rm(f"{place}/{name}", recursive=True)
        self.write(f"{place}/.{MANIFEST}", manifest)

    def complete(self, step: int) -> None:
        # Not written in place: some file systems show a file before all of it is there.
        try:
            self._fs.mv(f"{self.path(step)}/.{MANIFEST}", f"{self.path(step)}/{MANIFEST}")
        except Exception:
            # Most copy it, and delete the original, which may be refused. Readers see the copy.
            if not self._is_complete(step):
                raise

    def point(self, step: int) -> None:
        self.write(f"{self._root}/.{LATEST}", f"step-{step}".encode())
        self._fs.mv(f"{self._root}/.{LATEST}", f"{self._root}/{LATEST}")

    def steps(self) -> list[int]:
        self._fs.invalidate_cache()
        found = map(STEP.fullmatch, self._names_in(self._root))
        steps = sorted(int(match[1]) for match in found if match)
        return [step for step in steps if self._fs.exists(f"{self.path(step)}/{MANIFEST}")]

    def path(self, step: int) -> str:
        return f"{self._root}/step-{step}"

    def manifest(self, step: int) -> bytes:
        manifest: bytes = self._fs.cat_file(f"{self.path(step)}/{MANIFEST}")
        return manifest

    def remove(self, step: int) -> None:
        self._fs.rm_file(f"{self.path(step)}/{MANIFEST}")
        self._fs.rm(self.path(step), recursive=True)

    def _is_complete(self, step: int) -> bool:
        with contextlib.suppress(Exception):
            self._fs.invalidate_cache()
            return bool(json.loads(self.manifest(step)))
        return False

    def _names_in(self, place: str) -> list[str]:
        try:
            found = self._fs.ls(place, detail=False)
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rpartition("/")[2] for path in found]
