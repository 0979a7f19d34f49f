"""Processes that all end while they wait, or whose store is silent: in time, without a crash."""

from __future__ import annotations

import subprocess
import time
from signal import SIGCONT, SIGINT

import pytest
from fork_server import python
from processes import BACKENDS, CRASHES, EXIT_SECS, GRACE_SECS, Rank, StartJob

pytestmark = pytest.mark.processes

# How a program ends, and what its exit code is then. An interrupted one is ended by the
# interpreter, or as a shell reports it.
CODES = {"interrupted": (-SIGINT, 128 + SIGINT), "exits": (3,), "raises": (1,), "ends": (0,)}
managed_or_not = pytest.mark.parametrize("managed", [True, False], ids=["closed", "not closed"])


def waits(rank: Rank, how: str, name: str) -> None:
    """Have it enter a phase, in the task that ends the program where that makes a difference."""
    rank.start({"interrupted": "here_cross", "raises": "here_raise"}.get(how, "cross"), name=name)


def leaves(rank: Rank, how: str) -> float:
    """Have it end; when it was told."""
    if how == "interrupted":
        return rank.signal(SIGINT)
    return rank.start({"exits": "here_exit", "raises": "go", "ends": "end"}[how]).started


def has_left(rank: Rank, how: str, by: float) -> None:
    """It ends in time, as its program would without the library."""
    assert rank.exit(by) in CODES[how], rank.stderr
    assert not any(crash in rank.stderr for crash in CRASHES), rank.stderr
    assert ("LookupError: the rest" in rank.stderr) == (how == "raises"), rank.stderr
    assert ("KeyboardInterrupt" in rank.stderr) == (how == "interrupted"), rank.stderr


@managed_or_not
@pytest.mark.parametrize("how", CODES)
def test_all_leave_at_the_same_moment(start_job: StartJob, how: str, managed: bool) -> None:
    """As on Ctrl-C in a terminal: the host goes while its peers are going, and none crashes."""
    job = start_job(4, own_store=True, managed=managed, backends=BACKENDS[:: 1 - 2 * managed])
    # Beside what they wait for, one of them publishes, and the others are in doubt.
    for rank in job.ranks:
        rank.start("commit", publish="hang", payload="", leader=1, name="commit")
    assert job.ranks[1].event()["event"] == "publishing"
    for rank in job.ranks[:3]:
        waits(rank, how, "x")
    job.entered(0, 1, 2, name="x")
    if how == "interrupted":
        # One that heard of another's end before its own signal came would end otherwise. So all
        # have theirs before any of them goes on.
        for rank in job.ranks[:3]:
            rank.stop()
    for rank in job.ranks[:3]:
        leaves(rank, how)
    if how == "interrupted":
        for rank in job.ranks[:3]:
            rank.signal(SIGCONT)
    told = leaves(job.ranks[3], "ends")
    # Two processors that end four interpreters at once take their time for that alone.
    for rank in job.ranks[3:0:-1]:
        has_left(rank, "ends" if rank is job.ranks[3] else how, told + 2 * EXIT_SECS)
    # The host need not wait for anyone then.
    has_left(job.ranks[0], how, time.monotonic() + GRACE_SECS)


@managed_or_not
@pytest.mark.parametrize("ways", [("interrupted", "exits"), ("raises", "ends")], ids="/".join)
def test_leaving_while_the_store_is_silent(
    start_job: StartJob, ways: tuple[str, ...], managed: bool
) -> None:
    """Its host was stopped: nobody who waits for an answer is kept from exiting (law 8)."""
    job = start_job(3, own_store=True, managed=managed)
    leavers = list(zip(ways, job.ranks[1:], strict=True))
    # Beside what they wait for, one of them publishes, and the other is in doubt.
    for rank in job.ranks:
        rank.start("commit", publish="hang", payload="", leader=1, name="commit")
    assert job.ranks[1].event()["event"] == "publishing"
    for how, rank in leavers:
        waits(rank, how, "x")
    job.entered(1, 2, name="x")
    job.ranks[0].stop()
    told = [leaves(rank, how) for how, rank in leavers]
    for how, rank in leavers:
        has_left(rank, how, max(told) + EXIT_SECS)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "the host first"])
def test_worker_threads_are_silent_as_the_host_leaves(start_job: StartJob, late: bool) -> None:
    """c10d prints where its server goes while a thread waits for it; none does then (law 12)."""
    job = start_job(3, own_store=True, given={"worker_threads": True})
    job.crosses()
    if late:
        told = job.ranks[0].start("end").started
        assert job.ranks[0].exit(told + 2 * EXIT_SECS) == 0, job.ranks[0].stderr
        assert not job.ranks[0].stderr
    job.ends()


RETURNS = """
import asyncio, gc, sys
from torch.distributed import HashStore
from async_barriers import StoreBarrier
from async_barriers.testing import FaultyStore

# It is to take its time to end.
gc.unfreeze()

async def main():
    store = FaultyStore(HashStore())
    barrier = StoreBarrier(store, rank=0, world_size=2, timeout_secs=None)
    await barrier.connect()
    for call in ("set", "add", "compare_set", "check"):
        store.hang(call)
    waiting = asyncio.create_task(barrier.execute_barrier("x"))
    await asyncio.sleep(float(sys.argv[1]))
    waiting.cancel()
    await asyncio.wait([waiting])

asyncio.run(main())
"""


@pytest.mark.parametrize("secs", [0.4, 0.5])
def test_a_wait_that_ends_by_itself_as_the_interpreter_does(secs: float) -> None:
    """A thread that returned from C++ just then would end the process with SIGABRT."""
    command = [python(), "-c", RETURNS, str(secs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stderr) == (0, "")
