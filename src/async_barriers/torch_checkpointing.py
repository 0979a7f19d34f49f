"""Barriers for the package torch_checkpointing, which is needed for this module only."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore
from torch_checkpointing.barriers import BarrierConfig
from torch_checkpointing.types import RankInfo

from . import _launch
from ._checks import check_timeout
from ._protocol.keys import check_prefix
from ._store.sources import StoreAt
from .blocking import BlockingBarrier
from .store_barrier import StoreBarrier

__all__ = ["StoreBarrierConfig"]

# How many configurations without a prefix this process has built.
_numbers = itertools.count()


@dataclass
class StoreBarrierConfig(BarrierConfig):
    """The barrier of a ``CheckpointManager``, synchronous or not, over the process group's store.

    ::

        barrier_config = StoreBarrierConfig()
        writer_config = CheckpointWriterConfig(barrier_config=barrier_config)
        save = AsyncCheckpointSaverConfig(writer_config=writer_config)
        manager = CheckpointManager(CheckpointManager.Config(save=save))

    It opens no port. The barrier has its own connections to the store that the default process
    group met at, a TCPStore or a FileStore. The writer's ``checkpoint_write_barrier_timeout_sec``
    is the deadline of each crossing. If a write fails in a checkpoint subprocess, that process
    ends, and all other ranks learn it at once. A synchronous save fails where the training runs:
    use the guard of `barrier` there.

    :ivar timeout_barrier_init_sec: how long, in seconds, connecting may take, and how long a
        restarted rank waits for its peers
    :ivar prefix: None for a number, in the order in which this process builds its configurations.
        So managers in use at the same time do not meet each other. All ranks have to build theirs
        in the same order, or give prefixes
    :ivar warn_after_secs: a waiting rank reports after so many seconds, and again after each such
        period; None for no reports
    """

    timeout_barrier_init_sec: int = 60
    prefix: str | None = None
    warn_after_secs: float | None = 30.0

    def __post_init__(self) -> None:
        if check_timeout("timeout_barrier_init_sec", self.timeout_barrier_init_sec) is None:
            raise TypeError("timeout_barrier_init_sec must be a number of seconds, not None")
        check_timeout("warn_after_secs", self.warn_after_secs)
        if self.prefix is None:
            number = next(_numbers)
            self.prefix = "torch_checkpointing" + (f" {number}" if number else "")
        check_prefix(self.prefix)
        self._barrier: BlockingBarrier | None = None
        self._where: _Where | None = None

    @property
    def barrier(self) -> BlockingBarrier | None:
        """The last result of `create_barrier` in this process; None if a subprocess writes.

        If a synchronous save fails on one rank, that rank has not crossed, and its peers wait for
        it. Save with ``with barrier_config.barrier.guard():`` to tell them.
        """
        return self._barrier

    def create_barrier(  # type: ignore[override]  # theirs by registration, which mypy cannot see
        self, rank_info: RankInfo
    ) -> BlockingBarrier:
        """Build a barrier for the ranks of this role, connected to the store.

        :raises ValueError: there is no process group and no other process said where its store is,
            or the store is of a kind that no other process can reach
        :raises BarrierConnectionError: the store was not reached in time
        """
        rank, world_size = rank_info.role_rank, rank_info.role_world_size
        store = HashStore() if world_size == 1 else self._open_store()
        barrier = StoreBarrier(
            store,  # type: ignore[arg-type]  # or one that is not there yet
            rank=rank,
            world_size=world_size,
            prefix=self.prefix or "torch_checkpointing",
            timeout_barrier_init_secs=self.timeout_barrier_init_sec,
            warn_after_secs=self.warn_after_secs,
        )
        blocking = BlockingBarrier(barrier)
        # Connect now, so that a writer whose first write fails can tell its peers.
        blocking.connect()
        self._barrier = blocking
        return blocking

    @contextlib.contextmanager
    def use_in_subprocess(self) -> Iterator[None]:
        """Keep the process group's store, which the subprocess uses, while it does so."""
        # If this process hosts the store, it lives as long as a reference to it.
        store = _default_store()
        self._where = self._found()
        try:
            yield
        finally:
            del store

    def __getstate__(self) -> dict[str, Any]:
        # The process that gets this has no process group.
        return {**self.__dict__, "_where": self._found(), "_barrier": None}

    def _open_store(self) -> Store | StoreAt:
        where = self._found()
        if where is None:
            raise ValueError(
                "there is no default process group; call torch.distributed.init_process_group() "
                "before you build a CheckpointManager"
            )
        return where.open()

    def _found(self) -> _Where | None:
        store = _default_store()
        return self._where if store is None else _Where.of(store)


@dataclass(frozen=True)
class _Where:
    """The place of a store, in a form for another process."""

    host: str = ""
    port: int = 0
    path: str = ""
    unreachable: str = ""

    @classmethod
    def of(cls, store: Any) -> _Where:
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        if isinstance(store, TCPStore):
            return cls(host=store.host, port=store.port)
        if isinstance(store, FileStore):
            # torch's stubs do not know its path.
            return cls(path=str(store.path))  # type: ignore[attr-defined]
        return cls(unreachable=repr(store))

    def open(self) -> Store | StoreAt:
        if self.unreachable:
            raise ValueError(
                f"the process group met at {self.unreachable}, which no other process can reach; "
                "call init_process_group() with a TCPStore or a FileStore"
            )
        if self.path:
            return FileStore(self.path)
        return StoreAt(self.host, self.port, use_libuv=True, hosts=False)


def _default_store() -> Store | None:
    return _launch.from_group(None).store if dist.is_initialized() else None
