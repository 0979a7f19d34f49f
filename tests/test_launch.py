"""Barriers that find their ranks and their store through torchrun, its variables and groups."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launched_rank
import pytest
import torch.distributed as dist
from fork_server import python
from processes import BACKENDS, PATIENCE_SECS, Forge, Rank
from torch.distributed import FileStore, HashStore, TCPStore
from worlds import free_port, gather

from async_barriers import BarrierConnectionError, BarrierError, StoreBarrier, TCPStoreBarrier
from async_barriers._protocol.keys import Keys

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A job of one, whose variables are set by hand."""
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        monkeypatch.delenv(name)
    for name, value in zip(LAUNCHED, ("0", "1", "127.0.0.1", str(free_port())), strict=True):
        monkeypatch.setenv(name, value)
    yield monkeypatch
    if dist.is_initialized():
        dist.destroy_process_group()


def of_all_ranks(facts: list[dict[str, Any]], size: int) -> None:
    """What the program's ranks found is as it should be."""
    facts.sort(key=lambda fact: fact["rank"])
    assert [fact["rank"] for fact in facts] == list(range(size))
    for rank, fact in enumerate(facts):
        assert ("refused" in fact) == (rank == 0)
        crossed = [tuple(result) for result in fact["results"]]
        assert crossed == [("x", 0), ("x", 0), *[("x", 0)] * (rank > 0), ("x", 1)]
        assert fact["votes"] == size * (size - 1) // 2
        assert fact["group_timeout"] == 1
        assert fact["committed"]
    assert "not in the process group" in facts[0]["refused"]


@pytest.mark.processes
@pytest.mark.parametrize("order", ["barrier first", "group first"])
def test_beside_a_process_group_without_a_launcher(forge: Forge, order: str) -> None:
    """With RANK and the rest set by hand, rank 0's group and barriers share one port."""
    environment = {
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    program = {"program": launched_rank.__name__, "arguments": [order]}
    ranks = [
        Rank(
            forge,
            {
                "rank": rank,
                "backend": BACKENDS[rank % 2],
                "environment": {**environment, "RANK": str(rank)},
                **program,
            },
        )
        for rank in range(3)
    ]
    try:
        of_all_ranks([rank.event() for rank in ranks], 3)
        by = time.monotonic() + PATIENCE_SECS
        assert [(rank.exit(by), rank.stderr) for rank in ranks] == [(0, "")] * 3
    finally:
        for rank in ranks:
            rank.dispose()


@pytest.mark.processes
@pytest.mark.parametrize("agent_hosts", [True, False], ids=["agent hosts", "rank 0 hosts"])
def test_under_torchrun(agent_hosts: bool) -> None:
    """Whoever hosts the job's store, barriers work beside its group; and after a worker is killed
    within a phase and all are started anew, what the old ones had entered is history."""
    ended = subprocess.run(
        [
            *(python(), "-m", "torch.distributed.run", "--standalone"),
            *("--local-addr", "127.0.0.1", "--nproc-per-node", "2"),
            *("--max-restarts", "1" if agent_hosts else "0"),
            *(launched_rank.__file__, "barrier first"),
        ],
        env={
            **os.environ,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0" if agent_hosts else "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "RES_OPTIONS": "attempts:0",
        },
        capture_output=True,
        text=True,
        timeout=35,
    )
    assert ended.returncode == 0, ended.stderr
    facts = [json.loads(line) for line in ended.stdout.splitlines()]
    of_all_ranks(facts, 2)
    assert {fact["attempt"] for fact in facts} == {int(agent_hosts)}
    # Who waited for less than 10 ms need not know.
    assert facts[0]["last"] == 0
    assert {fact["last"] for fact in facts} <= {0, None}


@pytest.mark.parametrize("lacking", [LAUNCHED[:1], LAUNCHED[2:], LAUNCHED])
def test_variables_that_are_missing_are_named(
    launched: pytest.MonkeyPatch, lacking: tuple[str, ...]
) -> None:
    """Outside torchrun the error says which variables are not set."""
    for name in lacking:
        launched.delenv(name)
    with pytest.raises(ValueError, match=f"^{', '.join(lacking)} (is|are) not set") as caught:
        StoreBarrier.from_env()
    assert "torchrun" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("RANK", "first", "RANK is 'first' in the environment; it must be an integer"),
        ("MASTER_PORT", "65536", "MASTER_PORT is 65536 in the environment; it must be 0 to 65535"),
        ("RANK", "1", "rank 1 is outside the world; with 1 ranks it must be 0 to 0"),
    ],
)
def test_variables_that_make_no_sense_are_named(
    launched: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    """A value that is not allowed is refused before anything is connected to."""
    launched.setenv(name, value)
    with pytest.raises(ValueError, match=text):
        StoreBarrier.from_env()


@pytest.mark.anyio
async def test_barriers_of_one_process_share_the_port(launched: pytest.MonkeyPatch) -> None:
    """Two barriers host together, and the store ends with the last of them: the port is free then,
    and not only when the interpreter comes to collecting garbage."""
    port = int(os.environ["MASTER_PORT"])
    gc.disable()
    one, two = (StoreBarrier.from_env(prefix=prefix) for prefix in "ab")
    await gather(barrier.execute_barrier for barrier in (one, two))
    await one.aclose()
    await two.execute_barrier()
    await two.aclose()
    # A host that shares nothing can have the port now.
    try:
        async with TCPStoreBarrier(
            0, 1, tcpstore_port=port, master_address="127.0.0.1", timeout_barrier_init_secs=8
        ) as barrier:
            await barrier.execute_barrier()
    finally:
        gc.enable()


@pytest.mark.anyio
async def test_a_port_that_another_process_has(
    launched: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another job's store is not joined by mistake; one's own is when that is said."""
    # Hosted here, but not shared: to c10d that is as if another process did.
    other = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launched.setenv("MASTER_PORT", str(other.port))
    with pytest.raises(BarrierConnectionError, match="choose another MASTER_PORT"):
        async with StoreBarrier.from_env():
            pass
    launched.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    capfd.readouterr()
    async with StoreBarrier.from_env() as barrier:
        await barrier.execute_barrier()
    # c10d complains where it is told to host and cannot.
    assert "bind" not in capfd.readouterr().err


def test_a_group_that_is_none() -> None:
    """Without a default group there is a remedy to read; what is no group is refused."""
    with pytest.raises(ValueError, match=r"no default process group.*init_process_group"):
        StoreBarrier.from_process_group()
    with pytest.raises(TypeError, match="group must be a ProcessGroup or None, not 'world'"):
        StoreBarrier.from_process_group("world")  # type: ignore[arg-type]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
async def test_groups_over_every_store(
    launched: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Whatever store a group met at serves its barriers, and is left as it was (law 12)."""
    launched.setenv("GLOO_SOCKET_IFNAME", "lo")
    store: Any
    if kind == "hash":
        store = HashStore()
    elif kind == "file":
        store = FileStore(str(tmp_path / "rendezvous"), 1)
    else:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    timeout = store.timeout
    barriers = [
        StoreBarrier.from_process_group(group, timeout_secs=10.0)
        for group in (None, dist.new_group([0]), dist.group.WORLD)
    ]
    first, second, same = barriers
    async with first, second:
        for barrier in (first, second, first):
            await barrier.execute_barrier("x")
        # The default group, by another name: a second one with its rank 0.
        with pytest.raises(BarrierError, match=f"is held by process {os.getpid()} on"):
            await same.execute_barrier("x")
    async with same:
        await same.execute_barrier("x")
    assert store.timeout == timeout
    # The keys were written behind the group's name, so nobody else's are in the way.
    assert not store.check([Keys("barrier").member(0)])
