"""torch's own configuration builds our barriers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._experimental import (
    BarrierConfig,
    CheckpointerConfig,
    make_sync_checkpointer,
)
from torch.distributed.checkpoint._experimental.barriers import create_barrier_from_config
from torch.distributed.checkpoint._experimental.types import RankInfo

from async_barriers.blocking import BlockingBarrier
from async_barriers.torch_experimental import register_in_torch


def test_a_checkpointer_of_torch_crosses_our_barrier(tmp_path: Path) -> None:
    """No class of the user's is needed, and torch's own types are still there."""
    register_in_torch()
    register_in_torch()
    where = {"global_rank": 0, "global_world_size": 1, "tcpstore_port": 0}
    config = CheckpointerConfig(barrier_config=BarrierConfig("async_barriers.tcp_store", where))
    checkpointer = make_sync_checkpointer(config, RankInfo(global_rank=0, global_world_size=1))
    checkpointer.save(str(tmp_path), {"weights": torch.zeros(2)})
    assert list(tmp_path.iterdir())
    barrier: Any = checkpointer._writer._barrier
    assert isinstance(barrier, BlockingBarrier)
    assert barrier.execute_barrier().sequence == 1
    barrier.close()
    with pytest.raises(TypeError, match="argument: 'global_rank'"):
        create_barrier_from_config(BarrierConfig("async_barriers.tcp_store", {}))
    with pytest.raises(ValueError, match=r"'tcp_store'.*'async_barriers\.store'"):
        create_barrier_from_config(BarrierConfig("unknown"))
