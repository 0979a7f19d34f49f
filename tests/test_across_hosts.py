"""The example of barriers on many hosts: one verdict for all ranks of all of them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from worlds import AnyBarrier, Outcome, Tasks, World, gather

from async_barriers import BarrierError

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from across_hosts import cross_hosts

pytestmark = pytest.mark.anyio

HOSTS = 2
PER_HOST = 3
ALL = [(host, number) for host in range(HOSTS) for number in range(PER_HOST)]
LATE = (1, 2)


class Cluster:
    """Hosts, each with a barrier of its own."""

    def __init__(self, world: World) -> None:
        self.local: list[list[AnyBarrier]] = [
            [world.barrier(number, PER_HOST, f"host {host}") for number in range(PER_HOST)]
            for host in range(HOSTS)
        ]
        self.between = [world.barrier(host, HOSTS, "between") for host in range(HOSTS)]

    async def cross(self, host: int, number: int, timeout_secs: float = 20.0) -> None:
        between = None if number else self.between[host]
        local = self.local[host][number]
        await cross_hosts(host, local, between, "x", timeout_secs=timeout_secs)

    async def all_cross(self) -> None:
        await gather(partial(self.cross, *rank) for rank in ALL)


@pytest.fixture
async def cluster(tcp: World) -> Cluster:
    made = Cluster(tcp)
    # So that no deadline below depends on how long it takes to connect.
    await made.all_cross()
    return made


def start(tasks: Tasks, cluster: Cluster, *but: Any, **options: Any) -> dict[Any, Outcome]:
    ranks = [rank for rank in ALL if rank not in but]
    return {rank: tasks.start(partial(cluster.cross, *rank, **options)) for rank in ranks}


async def told(outcomes: dict[Any, Outcome], *words: str) -> None:
    """Nobody is released, and each error has the ``words``."""
    for rank, outcome in outcomes.items():
        text = str(await outcome.raised(BarrierError))
        assert all(word in text for word in words), (rank, text)


async def test_nobody_is_released_before_the_last(tcp: World, cluster: Cluster) -> None:
    """Neither where it is, nor elsewhere, where all have come and the leader waits for its host."""
    async with Tasks() as tasks:
        outcomes = start(tasks, cluster, LATE)
        await tcp.entered(0, name="x", sequence=1, prefix="between")
        await tcp.entered(0, 1, name="x on host 1", sequence=2, prefix="host 1")
        assert not any(outcome.ended.is_set() for outcome in outcomes.values())
        await cluster.cross(*LATE)
        for outcome in outcomes.values():
            await outcome.returned()


async def test_one_that_fails_is_known_on_all_hosts(tcp: World, cluster: Cluster) -> None:
    """With its reason; and all cross the next time."""
    async with Tasks() as tasks:
        outcomes = start(tasks, cluster, LATE)
        await tcp.entered(0, name="x", sequence=1, prefix="between")
        await cluster.local[1][2].abort("the disk is full", "x on host 1")
        await told(outcomes, "the disk is full")
    await cluster.all_cross()


async def test_one_that_is_missing_is_named_on_all_hosts(cluster: Cluster) -> None:
    """With its host; when it comes, it is told the same."""
    async with Tasks() as tasks:
        outcomes = start(tasks, cluster, LATE, timeout_secs=0.5)
        await told(outcomes, "host 1", "rank 2 had not entered")
        outcomes = {LATE: tasks.start(partial(cluster.cross, *LATE))}
        await told(outcomes, "rank 2 had not entered")
    await cluster.all_cross()


@pytest.mark.parametrize("host", range(HOSTS), ids=["where all have come", "where one is missing"])
async def test_a_leader_that_is_cancelled(tcp: World, cluster: Cluster, host: int) -> None:
    """It breaks the phase for all ranks of all hosts, wherever it waits."""
    async with Tasks() as tasks:
        outcomes = start(tasks, cluster, LATE)
        await tcp.entered(0, name="x", sequence=1, prefix="between")
        await tcp.entered(0, 1, name="x on host 1", sequence=2, prefix="host 1")
        leader = outcomes.pop((host, 0))
        leader.scope.cancel()
        await leader.ended.wait()
        outcomes[LATE] = tasks.start(partial(cluster.cross, *LATE))
        with anyio.fail_after(10):
            await told(outcomes, "cancelled")
    await cluster.all_cross()
