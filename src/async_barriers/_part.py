"""A rank's part of a checkpoint that a `Saver` saves."""

from __future__ import annotations

from dataclasses import dataclass

from ._background import Background
from ._storage import Storage


@dataclass(frozen=True)
class Part:
    """This rank's part of a checkpoint that is being saved.

    :ivar step: the training step
    :ivar path: the directory for this rank's files; the saver makes them durable
    """

    step: int
    path: str
    _storage: Storage
    _background: Background
    # What this rank's calls write to, in all attempts at this step.
    _writes: str

    async def write(self, name: str, data: bytes) -> None:
        """Write one file, in a thread; ``name`` may have directories, such as ``"layers/0.pt"``.

        :raises ValueError: ``name`` leads out of the directory for this rank's files

        **Cancellation:** returns at once; the thread goes on. As long as it does, this process
        saves this step no more.
        """
        if not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(f"{name!r} is no name of a file of this rank's")
        write = self._storage.write
        await self._background.run(write, f"{self.path}/{name}", data, place=self._writes)
