"""Threads, descriptors and memory that run out: errors that say so, and nothing broken for good."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from processes import PATIENCE_SECS, Forge
from rank_process import say
from reports import Programs, attempt, client, interpreter, meet, one, serve, until_told
from torch.distributed import HashStore, Store
from worlds import close, library_threads_gone

from async_barriers import BarrierConnectionError, BarrierError, StoreBarrier
from async_barriers.testing import FaultyStore

NOBODY_ELSES = 23456
DEADLINE_SECS = 2.0

# -- Threads ---------------------------------------------------------------------------------------

# Another user, whose threads can be limited; it may read where the interpreter is, and no more.
AS_ANOTHER = (
    "setpriv",
    f"--reuid={NOBODY_ELSES}",
    "--clear-groups",
    "--inh-caps=+dac_override",
    "--ambient-caps=+dac_override",
)


async def runs_out_of_threads(port: int, over: str) -> None:
    """A program: it crosses before, while and after no thread can be started."""
    if over == "threads of a TCPStore":
        os.environ["ASYNC_BARRIERS_WORKER_THREADS"] = "1"
    store: Store = HashStore() if over == "HashStore" else client(port)
    barriers = {name: one(store, 0, 1, prefix=name) for name in ("old", "new", "last")}

    async def crosses(name: str) -> None:
        began = time.monotonic()
        said = await attempt(barriers[name].execute_barrier("x", timeout_secs=DEADLINE_SECS))
        error = str(said) if isinstance(said, BarrierError) else None
        say(barrier=name, error=error, secs=time.monotonic() - began)

    await crosses("old")
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
    try:
        threading.Thread(target=int).start()
        say(limit="does not hold")
    except RuntimeError:
        say(limit="holds")
    for name in ("new", "old", "new"):
        await crosses(name)
    resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
    for name in barriers:
        await crosses(name)
    await close(barriers.values())


@pytest.mark.processes
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="cannot become another user"
)
@pytest.mark.parametrize("over", ["TCPStore", "threads of a TCPStore", "HashStore"])
def test_no_more_threads(over: str) -> None:
    """While none can be started, a crossing ends in time, by an error that says why if it needs
    one; afterwards all barriers of the process work, the old, the new and another."""
    server = serve()
    rank = interpreter(runs_out_of_threads, server.port, over, wrapper=AS_ANOTHER)
    out, errors = rank.communicate(timeout=2 * PATIENCE_SECS)
    said = [json.loads(line) for line in out.splitlines()]
    assert rank.returncode == 0, errors
    before, limit, *during, old, new, last = said
    assert limit == {"limit": "holds"}
    for crossing in during:
        assert crossing["secs"] < DEADLINE_SECS + 1
        assert crossing["error"] is None or "thread" in crossing["error"], crossing
    for crossing in (before, old, new, last):
        assert crossing["error"] is None, crossing


# -- Descriptors -----------------------------------------------------------------------------------


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """No more than ``spare`` can be opened in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    # The limit is one on their numbers, so the gaps are filled.
    held = [os.open(os.devnull, os.O_RDONLY)]
    while held[-1] < highest:
        held.append(os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1] + 1 + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)


async def runs_out_of_descriptors(port: int, spare: int) -> None:
    """A program: its two ranks cross several names meanwhile, and a third barrier connects."""
    options = {"timeout_secs": 1.0, "timeout_barrier_init_secs": 1.0}
    stores = [client(port) for _ in range(3)]
    ranks = [one(stores[rank], rank, 2, **options) for rank in range(2)]
    await meet(*ranks, name="x")
    third = one(stores[2], 0, 1, prefix="third", **options)

    async def crosses(barrier: StoreBarrier, name: str) -> None:
        began = time.monotonic()
        error: Any = None
        try:
            await barrier.execute_barrier(name)
        except Exception as exc:
            error = exc
        ours = error is None or isinstance(error, BarrierError)
        unconnected = isinstance(error, BarrierConnectionError)
        end = {"ours": ours, "unconnected": unconnected, "error": error and str(error)}
        ends.append({"third": barrier is third, "secs": time.monotonic() - began, **end})

    ends: list[dict[str, Any]] = []
    with few_descriptors(spare):
        async with anyio.create_task_group() as tasks:
            for barrier, names in ((ranks[0], "abcd"), (ranks[1], "a"), (third, "t")):
                for name in names:
                    tasks.start_soon(crosses, barrier, name)
    for end in ends:
        say(**end)
    await meet(*ranks, name="x", rounds=8)
    await third.execute_barrier()
    await close([*ranks, third])
    say(event="well again")
    await until_told()


@pytest.mark.processes
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("spare", [0, 1, 2, 3, 5])
def test_no_more_descriptors(forge: Forge, spare: int, backend: str) -> None:
    """Whatever ends then ends in an error of ours, in time, and says why; afterwards all works,
    without anything being built anew."""
    with Programs(forge) as programs:
        server = serve()
        rank = programs.start(runs_out_of_descriptors, server.port, spare, backend=backend)
        for _ in range(6):
            end = rank.event()
            assert end["ours"], end
            assert end["secs"] < 1 + 1
            if end["unconnected"] or (end["third"] and spare == 0):
                assert "too many open files" in end["error"].lower(), end
        assert rank.event() == {"event": "well again"}, rank.stderr


@pytest.mark.anyio
async def test_the_first_use_without_descriptors() -> None:
    """It is an error of ours, also where the loop itself needs one; the next use works."""
    barrier = one(serve(), 0, 1, timeout_barrier_init_secs=0.5)
    said = r"(?i)too many open files"
    with few_descriptors(0), pytest.raises(BarrierConnectionError, match=said):
        await barrier.connect()
    await barrier.execute_barrier()
    await barrier.aclose()


# -- Memory ----------------------------------------------------------------------------------------


class Model:
    """Stands for what is in the frame of whoever built the barrier."""


async def fails_to_join(store: Store, size: int, how: str) -> list[weakref.ref[Any]]:
    """A barrier that cannot join; what should be gone afterwards."""
    model = Model()
    barrier = one(store, 1, size, timeout_barrier_init_secs=0.3)
    gone: list[weakref.ref[Any]] = [weakref.ref(model), weakref.ref(barrier)]

    async def enter() -> None:
        async with barrier:
            pass

    with pytest.raises(BarrierError):
        await (enter() if how == "async with" else barrier.execute_barrier("x"))
    if how == "closed":
        await barrier.aclose()
    return gone


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["async with", "closed", "dropped"])
@pytest.mark.parametrize("kind", ["another world size", 0, 3, 6], ids=str)
async def test_a_barrier_that_could_not_join(kind: str | int, how: str) -> None:
    """Closed properly or dropped, it is collected, and with it its caller's frames, its threads
    and its connections."""
    server = serve()
    first = one(server, 0, 2)
    await first.connect()
    store: Store = server
    if isinstance(kind, int):
        store = FaultyStore(HashStore())
        store.fail(after=kind)
    gone = await fails_to_join(store, 3, how)
    with anyio.fail_after(3):
        while any(ref() is not None for ref in gone):
            await anyio.sleep(0.05)
            gc.collect()
    await library_threads_gone()
    await first.aclose()
