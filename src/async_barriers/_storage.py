"""Where a `Saver` keeps checkpoints: the interface, and a directory that all ranks share."""

from __future__ import annotations

import abc
import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LATEST = "latest"
# As this module writes them: a directory of another name, such as step-007, is the user's.
_NUMBER = "(0|[1-9][0-9]*)"
STEP = re.compile(f"step-{_NUMBER}")
_PARTIAL = re.compile(rf"\.step-{_NUMBER}\.partial")
# A rank's directory; before the checkpoint is complete, with the token of its attempt.
RANK = re.compile(rf"rank-{_NUMBER}(\.[0-9a-f]+)?")


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
    def prepare(self, step: int, manifest: bytes, places: Sequence[str]) -> None:
        """Do what can be done before `complete`; readers do not see it.

        What other attempts have left, or write now, is no part of the checkpoint.

        :param places: what `begin` returned to each rank, in rank order
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

    def discard(self, place: str) -> None:  # noqa: B027  (what is incomplete may stay)
        """Remove what a rank has written to ``place``, which `begin` returned: its save failed."""

    def clear(self, before: int) -> None:  # noqa: B027  (here, too)
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
        # Another place for each attempt: one that goes on, or begins before an earlier one is
        # decided, writes into no checkpoint that the leader completes just then.
        place = self._partial(step) / f"rank-{rank}.{secrets.token_hex(4)}"
        try:
            place.mkdir(parents=True)
        except FileNotFoundError:
            # A rank whose save has failed removed the directory above, just then.
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

    def prepare(self, step: int, manifest: bytes, places: Sequence[str]) -> None:
        partial = self._partial(step)
        # Each rank may know the directory by another path.
        parts = {f"rank-{rank}": os.path.basename(place) for rank, place in enumerate(places)}
        found = os.listdir(partial)
        if lacking := [rank for rank, part in parts.items() if part not in found]:
            raise FileNotFoundError(
                f"{partial} lacks {', '.join(lacking)}; do two savers share the directory?"
            )
        for name in found:
            if RANK.fullmatch(name) and name not in parts.values():
                shutil.rmtree(partial / name)
        for rank, part in parts.items():
            os.rename(partial / part, partial / rank)
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
        found = self._found(STEP)
        return [step for step in found if os.path.exists(os.path.join(self.path(step), MANIFEST))]

    def path(self, step: int) -> str:
        return str(self._root / f"step-{step}")

    def manifest(self, step: int) -> bytes:
        return Path(self.path(step), MANIFEST).read_bytes()

    def remove(self, step: int) -> None:
        os.rename(self.path(step), self._partial(step))
        shutil.rmtree(self._partial(step))

    def discard(self, place: str) -> None:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(place))

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
