"""Processes that fork: a barrier is of no use in a child, which reaches nothing of its parent's."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
from processes import GRACE_SECS, Forge
from rank_process import PREFIX, say
from reports import (
    TOLD_SECS,
    Programs,
    attempt,
    client,
    one,
    serve,
    tell,
    until_told,
)

from async_barriers import BarrierError, BarrierResult, StoreBarrier
from async_barriers.blocking import BlockingBarrier

pytestmark = pytest.mark.processes

# What a child does with what it inherited; beside it, it may drop it. "z" is a phase that the peer
# waits in, and the parent does not enter.
AWAITING: dict[str, Callable[[StoreBarrier], Awaitable[Any]]] = {
    "crosses": lambda barrier: barrier.execute_barrier("z", timeout_secs=2),
    "connects": lambda barrier: barrier.connect(),
    "aborts": lambda barrier: barrier.abort("a child's whim", "z"),
    "commits": lambda barrier: barrier.commit(publish, name="z", timeout_secs=2),
    "closes": lambda barrier: barrier.aclose(),
}
BLOCKING: dict[str, Callable[[BlockingBarrier], Any]] = {
    "crosses": lambda barrier: barrier.execute_barrier(timeout_secs=2),
    "closes": lambda barrier: barrier.close(),
}


async def publish(payloads: object) -> None:
    """What a child must not come to."""
    say(event="published")


def fork(act: Callable[[], object]) -> int:
    """A child that acts, says what came of it, and ends as a child of multiprocessing does."""
    pid = os.fork()
    if pid:
        return pid
    # One that hangs is ended by the alarm.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(8)
    began = time.monotonic()
    try:
        act()
        error = None
    except BarrierError as exc:
        error = str(exc)
    except BaseException as exc:
        error = f"not ours: {exc!r}"
    say(event="child", secs=time.monotonic() - began, error=error)
    os._exit(0)


def drop(held: list[Any]) -> None:
    held.clear()
    gc.collect()


async def wait_for(child: int) -> None:
    """The parent's loop goes on meanwhile."""
    status = await anyio.to_thread.run_sync(os.waitpid, child, 0)
    say(event="child ended", code=os.waitstatus_to_exitcode(status[1]))


async def awaiting_parent(port: int, does: str) -> None:
    """Rank 0, which forks while it waits in two phases."""
    held = [one(client(port), 0, 2, prefix=PREFIX)]
    for _ in range(3):
        await held[0].execute_barrier("x")
    async with anyio.create_task_group() as tasks:

        async def cross(name: str) -> None:
            said = await held[0].execute_barrier(name)
            say(event="crossed", name=name, sequence=said.sequence)

        tasks.start_soon(cross, "x")
        tasks.start_soon(cross, "y")
        say(event="waits")
        await until_told()
        if does == "drops":
            child = fork(partial(drop, held))
        else:
            child = fork(lambda: asyncio.run(bounded(AWAITING[does], held[0])))
        await wait_for(child)
    await cross("x")
    await until_told()


async def bounded(call: Callable[[StoreBarrier], Awaitable[Any]], barrier: StoreBarrier) -> None:
    with anyio.fail_after(6):
        await call(barrier)


async def idle_parent(port: int) -> None:
    """Rank 0, which forks between two phases, and tries in its turn when it is told."""
    barrier = one(client(port), 0, 2, prefix=PREFIX)
    for _ in range(5):
        await barrier.execute_barrier("x")
    await until_told()
    await wait_for(fork(lambda: asyncio.run(bounded(crossing, barrier))))
    while True:
        await until_told()
        said = await attempt(barrier.execute_barrier("x", timeout_secs=2))
        say(event="crossed", released=isinstance(said, BarrierResult))


async def crossing(barrier: StoreBarrier) -> None:
    await barrier.execute_barrier("x", timeout_secs=2)


async def blocking_parent(port: int, does: str) -> None:
    """Rank 0, which forks while a thread waits in a phase."""
    held = [BlockingBarrier(one(client(port), 0, 2, prefix=PREFIX))]

    def cross() -> None:
        say(event="crossed", name="", sequence=held[0].execute_barrier().sequence)

    for _ in range(3):
        await anyio.to_thread.run_sync(held[0].execute_barrier)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, cross)
        say(event="waits")
        await until_told()
        if does == "drops":
            child = fork(partial(drop, held))
        else:
            child = fork(lambda: BLOCKING[does](held[0]))
        await wait_for(child)
    await anyio.to_thread.run_sync(cross)
    await until_told()


CASES = [
    *((awaiting_parent, does) for does in (*AWAITING, "drops")),
    *((blocking_parent, does) for does in (*BLOCKING, "drops")),
]


def refused(said: dict[str, Any], *, required: bool) -> None:
    """What a child said of its call: it ended at once, in an error that says why."""
    assert said["event"] == "child", said
    assert said["secs"] < GRACE_SECS
    if required or said["error"] is not None:
        assert "process" in (said["error"] or "nothing was said"), said
        assert "not ours" not in said["error"]


@pytest.mark.parametrize(
    ("parent", "does"), CASES, ids=[f"{parent.__name__}-{does}" for parent, does in CASES]
)
def test_a_child_reaches_nothing_of_its_parents(
    forge: Forge, parent: Callable[..., Awaitable[None]], does: str
) -> None:
    """Whatever it does with the barrier, it is refused at once, stands in for nobody, and its
    parent's phases are released when the peer comes (laws 1 and 12)."""
    server = serve()
    names = ("x", "y") if parent is awaiting_parent else ("",)
    with Programs(forge) as programs:
        peer = programs.rank(1, 2, server.port, backend="trio")
        rank = programs.start(parent, server.port, does)
        for _ in range(3):
            peer.start("cross", name=names[0]).released()
        assert rank.event() == {"event": "waits"}
        time.sleep(0.3)  # what it has begun to wait for, it waits for now
        alone = peer.start("cross", name="z", timeout_secs=1.5)
        tell(rank)
        child = rank.event()
        assert alone.error("BarrierTimeoutError")["missing_ranks"] == [0]
        refused(child, required=does in ("crosses", "connects", "aborts", "commits"))
        assert rank.event() == {"event": "child ended", "code": 0}
        calls = [peer.start("cross", name=name) for name in names]
        waited = {call.released()["sequence"] for call in calls}
        crossed = [rank.event() for _ in names]
        assert {said["event"] for said in crossed} == {"crossed"}, crossed
        assert waited == {said["sequence"] for said in crossed} == ({3, 0} if names[1:] else {3})
        assert peer.start("cross", name=names[0]).released()["sequence"] == 4
        assert rank.event()["sequence"] == 4
        assert not rank.stderr


def test_a_child_does_not_make_up_for_its_parent(forge: Forge) -> None:
    """The parent does not enter, and its child does: the peer is not released (law 1), and is in
    step with the parent afterwards."""
    server = serve()
    with Programs(forge) as programs:
        peer = programs.rank(1, 2, server.port)
        rank = programs.start(idle_parent, server.port)
        for _ in range(5):
            peer.start("cross", name="x").released()
        alone = peer.start("cross", name="x", timeout_secs=1.5)
        time.sleep(0.3)
        tell(rank)
        child = rank.event()
        assert alone.error("BarrierTimeoutError")["missing_ranks"] == [0]
        refused(child, required=True)
        assert rank.event() == {"event": "child ended", "code": 0}
        # The parent comes to the phase that its peer gave up, learns that, and then they meet.
        tell(rank)
        assert rank.event() == {"event": "crossed", "released": False}
        tell(rank)
        peer.start("cross", name="x", timeout_secs=5).released()
        assert rank.event() == {"event": "crossed", "released": True}


# -- Children with barriers of their own -----------------------------------------------------------


async def has_child(port: int, method: str, kind: str) -> None:
    """A program whose child is rank 0."""
    context: Any = multiprocessing.get_context(method)
    child = context.Process(target=be_rank_0, args=(port, kind))
    child.start()
    await anyio.to_thread.run_sync(child.join)
    say(event="child ended", code=child.exitcode, at=time.monotonic())
    await until_told()


def be_rank_0(port: int, kind: str) -> None:
    """Cross once, and end without closing what was built; atexit's functions are not called."""
    barrier = one(client(port), 0, 2, prefix=PREFIX)
    if kind == "blocking":
        left_open.append(BlockingBarrier(barrier))
        left_open[-1].execute_barrier()
    else:
        left_open.extend([barrier, asyncio.new_event_loop()])
        left_open[-1].run_until_complete(barrier.execute_barrier())


left_open: list[Any] = []


@pytest.mark.parametrize(
    ("method", "kind"), [("fork", "blocking"), ("fork", "asyncio"), ("forkserver", "blocking")]
)
def test_a_child_of_multiprocessing_says_that_it_leaves(
    forge: Forge, method: str, kind: str
) -> None:
    """Its interpreter ends by os._exit, and its peer learns at once that it has left (law 3)."""
    server = serve()
    with Programs(forge) as programs:
        peer = programs.rank(1, 2, server.port)
        parent = programs.start(has_child, server.port, method, kind)
        peer.start("cross").released()
        waiting = peer.start("cross")
        ended = parent.event()
        assert ended["code"] == 0
        told = waiting.error("BrokenBarrierError", within_secs=5)
        assert told["ended"] < ended["at"] + TOLD_SECS
        assert told["rank"] == 0
        assert "closed its barrier" in told["reason"]
