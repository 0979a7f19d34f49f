"""Where a `Saver` keeps checkpoints: a directory, or any file system that fsspec knows."""

from __future__ import annotations

import abc
import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LATEST = "latest"
# As this module writes them: a directory of another name, such as step-007, is the user's.
_NUMBER = "(0|[1-9][0-9]*)"
_STEP = re.compile(f"step-{_NUMBER}")
_PARTIAL = re.compile(rf"\.step-{_NUMBER}\.partial")
_RANK = re.compile(f"rank-{_NUMBER}")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    :ivar step: the training step
    :ivar path: its directory, which has the files of rank ``r`` in ``rank-r``
    :ivar entries: what each rank's upload returned, in rank order; empty in what `Saver.save`
        returns
    """

    step: int
    path: str
    entries: tuple[Any, ...] = ()


class Storage(abc.ABC):
    """Keeps checkpoints by their step. Its methods block; a `Saver` calls them in threads."""

    @abc.abstractmethod
    def begin(self, step: int, rank: int) -> str:
        """Make the place for a rank's files of an incomplete checkpoint, and return it."""

    @abc.abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Write a file in full, and make the directories that it is in."""

    @abc.abstractmethod
    def seal(self, path: str) -> None:
        """Make durable what a rank has written to ``path``, which `begin` returned."""

    @abc.abstractmethod
    def prepare(self, step: int, manifest: bytes) -> None:
        """Do what can be done before `complete`; readers do not see it.

        What an earlier attempt with more ranks has left is no part of the checkpoint.
        """

    @abc.abstractmethod
    def complete(self, step: int) -> None:
        """Make a checkpoint complete for readers, in one atomic step.

        A `Saver` waits for its end, also if the save is cancelled. So it must take little time.
        """

    @abc.abstractmethod
    def point(self, step: int) -> None:
        """Make ``latest`` name this complete checkpoint."""

    @abc.abstractmethod
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, sorted."""

    @abc.abstractmethod
    def path(self, step: int) -> str:
        """Where a complete checkpoint is."""

    @abc.abstractmethod
    def manifest(self, step: int) -> bytes:
        """The manifest of a complete checkpoint."""

    @abc.abstractmethod
    def remove(self, step: int) -> None:
        """Remove a complete checkpoint; make it incomplete before you remove any of its files."""

    def read(self, step: int) -> Checkpoint:
        """Read a complete checkpoint from its manifest."""
        entries = json.loads(self.manifest(step))["entries"]
        return Checkpoint(step, self.path(step), tuple(entries))

    def clear(self, before: int) -> None:  # noqa: B027  (what is incomplete may stay)
        """Remove what incomplete checkpoints of earlier steps have left."""


class Directory(Storage):
    """A directory that all ranks share, on a file system with an atomic rename.

    An incomplete checkpoint is ``.step-300.partial``, and a complete one ``step-300``.

    :param root: is made if it does not exist
    :raises ValueError: it is a URL
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        if isinstance(root, str) and "://" in root:
            raise ValueError(f"{root!r} is a URL and no directory; give FsspecStorage({root!r})")
        self._root = Path(root)

    def begin(self, step: int, rank: int) -> str:
        place = self._partial(step) / f"rank-{rank}"
        # Files of an earlier attempt at this step are no part of this one.
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return str(place)

    def write(self, path: str, data: bytes) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)

    def seal(self, path: str) -> None:
        if not os.path.isdir(path):
            raise FileNotFoundError(f"{path} is gone; do two savers share the directory?")
        for directory, _, files in os.walk(path):
            for file in (os.path.join(directory, name) for name in files):
                # To open a pipe blocks, and a link may lead nowhere.
                if os.path.isfile(file):
                    _sync(file)
            _sync(directory)

    def prepare(self, step: int, manifest: bytes) -> None:
        partial = self._partial(step)
        found, ranks = os.listdir(partial), len(json.loads(manifest)["entries"])
        if lacking := {f"rank-{rank}" for rank in range(ranks)} - {*found}:
            raise FileNotFoundError(
                f"{partial} lacks {', '.join(sorted(lacking))}; do two savers share the directory?"
            )
        for name in _left_over(found, ranks):
            shutil.rmtree(partial / name)
        _write_durably(partial / MANIFEST, manifest)
        _sync(partial)

    def complete(self, step: int) -> None:
        os.rename(self._partial(step), self.path(step))
        try:
            _sync(self._root)
        except OSError:
            # The ranks will be told that it failed, so readers must not find it.
            os.rename(self.path(step), self._partial(step))
            raise

    def point(self, step: int) -> None:
        _write_durably(self._root / f".{LATEST}", f"step-{step}".encode())
        os.replace(self._root / f".{LATEST}", self._root / LATEST)
        _sync(self._root)

    def steps(self) -> list[int]:
        # A directory without a manifest is the user's.
        found = self._found(_STEP)
        return [step for step in found if os.path.exists(os.path.join(self.path(step), MANIFEST))]

    def path(self, step: int) -> str:
        return str(self._root / f"step-{step}")

    def manifest(self, step: int) -> bytes:
        return Path(self.path(step), MANIFEST).read_bytes()

    def remove(self, step: int) -> None:
        os.rename(self.path(step), self._partial(step))
        shutil.rmtree(self._partial(step))

    def clear(self, before: int) -> None:
        for step in self._found(_PARTIAL):
            if step < before:
                shutil.rmtree(self._partial(step), ignore_errors=True)

    def _partial(self, step: int) -> Path:
        return self._root / f".step-{step}.partial"

    def _found(self, names: re.Pattern[str]) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            matches = map(names.fullmatch, os.listdir(self._root))
            return sorted(int(match[1]) for match in matches if match)
        return []


class FsspecStorage(Storage):
    """Any file system that fsspec knows: S3, GCS, memory, ... Needs the extra ``fsspec``.

    A checkpoint is complete when its ``manifest.json`` exists.

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

    def prepare(self, step: int, manifest: bytes) -> None:
        place = self.path(step)
        for name in _left_over(self._names_in(place), len(json.loads(manifest)["entries"])):
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
        found = map(_STEP.fullmatch, self._names_in(self._root))
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


def _left_over(names: Iterable[str], ranks: int) -> list[str]:
    """Those of the names that are ranks' directories, but not of one of so many ranks."""
    matches = map(_RANK.fullmatch, names)
    return [match[0] for match in matches if match and int(match[1]) >= ranks]


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
