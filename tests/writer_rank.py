"""What a rank does that saves with torch's checkpoint writers; see blocking_rank.py."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Mapping
from typing import Any

import blocking_rank
import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from torch.distributed.checkpoint._experimental.checkpoint_process import (
    CheckpointProcess,
    CheckpointProcessConfig,
)
from torch.distributed.checkpoint._experimental.checkpoint_writer import (
    CheckpointWriter,
    CheckpointWriterConfig,
)
from torch.distributed.checkpoint._experimental.types import RankInfo

from async_barriers import BarrierConfig
from async_barriers.blocking import BlockingBarrier


class Doings(blocking_rank.Doings):
    """Commands of the main thread wait for what they do; ``path`` is the checkpoint's."""

    def __init__(self, barrier: BlockingBarrier, options: Mapping[str, Any]) -> None:
        super().__init__(barrier, options)
        # Of its subprocesses, which would import torch for as long as all else takes.
        multiprocessing.set_executable(options["python"])
        self.rank, self.size = options["rank"], options["size"]
        self._info = RankInfo(self.rank, self.size)
        self._process: CheckpointProcess | None = None
        self._manager: Any = None

    def state(self, step: int) -> dict[str, Any]:
        return {"weights": torch.full((8,), float(10 * step + self.rank)), "step": step}

    # torch.distributed.checkpoint._experimental

    def here_write(self, path: str, step: int) -> list[str]:
        """Save synchronously; the shards that are there then."""
        writer = CheckpointWriter(CheckpointWriterConfig(), self._info, self.barrier)  # type: ignore[arg-type]
        with self.barrier.guard():
            writer.write(path, self.state(step))
        return sorted(os.listdir(path))

    def here_start_process(self, init_timeout_secs: float) -> None:
        """Have a checkpoint process, to which the barrier's configuration is sent."""
        own = {"tcpstore_port": self.options["other_port"], "master_address": "127.0.0.1"}
        where = {"global_rank": self.rank, "global_world_size": self.size, **own}
        barrier = BlockingBarrier(BarrierConfig("tcp_store", where))
        self._process = CheckpointProcess(
            rank_info=self._info,
            config=CheckpointProcessConfig(subprocess_init_timeout_secs=int(init_timeout_secs)),
            subprocess_init_fn=os.getpid,  # type: ignore[arg-type]
            subprocess_init_args=(),
            checkpoint_writer_init_fn=CheckpointWriter,
            checkpoint_writer_init_args={"config": CheckpointWriterConfig(), "barrier": barrier},
        )

    def here_write_in_process(self, path: str, step: int) -> list[str]:
        assert self._process is not None
        writing = self._process.write(self.state(step), path)
        assert writing is not None
        writing.result()
        return sorted(os.listdir(path))

    def here_close_process(self) -> None:
        assert self._process is not None
        # close() ends the thread that spawned it, whereupon the kernel sends it a SIGINT, as
        # torch has asked; one that is about to exit by itself had better be gone by then.
        subprocesses: Any = self._process.process
        subprocesses.processes[0].join()
        self._process.close()

    # torch_checkpointing

    def here_manage(self, synchronous: bool) -> None:
        """Have a CheckpointManager that uses our barrier."""
        from torch_checkpointing.checkpoint_manager import CheckpointManager
        from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
        from torch_checkpointing.config import (
            AsyncCheckpointSaverConfig,
            CheckpointSaverConfig,
            SyncCheckpointSaverConfig,
        )
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        from async_barriers.torch_checkpointing import StoreBarrierConfig

        if not dist.is_initialized():
            store = TCPStore("127.0.0.1", self.options["port"], wait_for_workers=False)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)
        self._barrier_config = StoreBarrierConfig(prefix=f"managed {synchronous}")
        writer = CheckpointWriterConfig(barrier_config=self._barrier_config)
        save: CheckpointSaverConfig = (
            SyncCheckpointSaverConfig(writer_config=writer)
            if synchronous
            else AsyncCheckpointSaverConfig(writer_config=writer)
        )
        # Not every file system that tests run on takes direct I/O.
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        config = CheckpointManager.Config(save=save, storage_config=storage)
        self._manager = CheckpointManager(config)

    def here_save(self, path: str, step: int) -> None:
        barrier = self._barrier_config.barrier
        payload = {"model": self.state(step), "step": step}
        if barrier is None:
            self._manager.save(path, payload).result()
        else:
            with barrier.guard():
                self._manager.save(path, payload)

    def here_load(self, path: str, step: int) -> bool:
        """Load; whether it is what was saved."""
        zeros = {"weights": torch.zeros(8), "step": 0}
        found = self._manager.load(path, {"model": zeros, "step": 0})
        model, saved = found["model"], self.state(step)
        equal = torch.equal(model["weights"], saved["weights"])
        return equal and bool(model["step"] == found["step"] == step)

    def here_close_manager(self) -> None:
        # It raises again what became of the last save.
        with contextlib.suppress(RuntimeError, OSError):
            self._manager.close()
