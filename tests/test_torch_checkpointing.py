"""The configuration that torch_checkpointing takes: where it finds the store."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore

pytest.importorskip("torch_checkpointing", reason="needs the extra torch-checkpointing")

from torch_checkpointing.barriers import Barrier
from torch_checkpointing.types import RankInfo

from async_barriers._protocol.keys import Keys
from async_barriers.torch_checkpointing import StoreBarrierConfig

BOUND_SECS = 15.0
ALONE = RankInfo(global_rank=0, global_world_size=1, role_rank=0, role_world_size=1)
PAIR = [RankInfo(rank, 2, rank, 2) for rank in range(2)]


@contextmanager
def process_group(store: Store) -> Iterator[None]:
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_the_store_is_found_in_another_process(kind: str, tmp_path: Path) -> None:
    """A copy knows the store of the process group that the original saw, and there is none."""
    store: Store
    if kind == "tcp":
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    else:
        store = FileStore(str(tmp_path / "store"), 1)
    config = StoreBarrierConfig()
    with process_group(PrefixStore("theirs", store)):
        scope = config.use_in_subprocess()
        scope.__enter__()
        parcel = pickle.dumps(config)
    copies = [pickle.loads(parcel) for _ in PAIR]
    barriers = [copy.create_barrier(info) for copy, info in zip(copies, PAIR, strict=True)]
    assert all(isinstance(barrier, Barrier) for barrier in barriers)
    # Connected already, so that one whose first write fails can tell the other.
    observed: Any = store
    keys = Keys(str(config.prefix))
    assert observed.check([keys.member(info.role_rank) for info in PAIR])
    with ThreadPoolExecutor() as pool:
        crossings = [pool.submit(barrier.execute_barrier, 10) for barrier in barriers]
        assert [crossing.result(BOUND_SECS).sequence for crossing in crossings] == [0, 0]
        for copy, barrier in zip(copies, barriers, strict=True):
            assert copy.barrier is barrier
            barrier.close()
    assert config.barrier is None
    scope.__exit__(None, None, None)


def test_a_single_rank_needs_no_store() -> None:
    """Nor a process group; the barrier is crossed at once, here and in a subprocess."""
    config = StoreBarrierConfig()
    with config.use_in_subprocess():
        for found in (config, pickle.loads(pickle.dumps(config))):
            with found.create_barrier(ALONE) as barrier:
                barrier.execute_barrier(10)
                # It can be sent on even so; the barrier stays here.
                assert pickle.loads(pickle.dumps(found)).barrier is None


def test_a_store_that_others_cannot_reach() -> None:
    """Says what to use instead; so does none at all."""
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group\(\)"):
        StoreBarrierConfig().create_barrier(PAIR[0])
    with (
        process_group(HashStore()),
        pytest.raises(ValueError, match=r"HashStore.* which no other process can reach"),
    ):
        StoreBarrierConfig().create_barrier(PAIR[0])
