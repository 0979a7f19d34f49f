"""Programs that end while an event loop goes on in a daemon thread of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIGCONT

import pytest
from fork_server import python
from processes import EXIT_SECS, NO_HOST_NAME, Forge
from reports import TOLD_SECS, Programs, client, host_store, one
from worlds import Tasks

from async_barriers import BrokenBarrierError

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

PROGRAM = """
import contextlib, sys, threading, time, anyio
from torch.distributed import TCPStore
from async_barriers import BarrierError, StoreBarrier
from async_barriers._store.private_loop import PrivateLoop

_, backend, port, way, again = sys.argv
store = TCPStore("127.0.0.1", int(port), is_master=False, wait_for_workers=False)
barrier = StoreBarrier(store, rank=0, world_size=2, worker_threads=way == "threads")
crossed = threading.Event()

async def work():
    await barrier.execute_barrier("first")
    crossed.set()
    with contextlib.suppress(BarrierError):
        await barrier.execute_barrier("second")
        while again:
            await barrier.execute_barrier("again")

def slowly(self, *args, run=PrivateLoop.run):
    time.sleep(0.1)
    return run(self, *args)

PrivateLoop.run = slowly
threading.Thread(target=anyio.run, args=(work,), kwargs={"backend": backend}, daemon=True).start()
crossed.wait()
print(flush=True)
sys.stdin.readline()
"""
both_ways = pytest.mark.parametrize("way", ["sockets", "threads"])


@contextmanager
def program(
    backend: str, port: int, way: str, *, again: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Rank 0 of two, which has crossed, and goes on with that; it ends once it is told a line."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [python(), "-c", PROGRAM, backend, str(port), way, "again" * again],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def crossed(running: subprocess.Popen[str]) -> None:
    assert running.stdout is not None
    running.stdout.readline()


def tell(running: subprocess.Popen[str]) -> float:
    """Have it end; when it was told."""
    print(file=running.stdin, flush=True)
    return time.monotonic()


def ends(running: subprocess.Popen[str], by: float) -> None:
    """It has ended in time, with code 0 and without a word."""
    error = running.communicate(timeout=max(0.5, by - time.monotonic()))[1]
    words = [line for line in error.splitlines() if NO_HOST_NAME not in line]
    assert (running.returncode, words) == (0, []), error


@both_ways
async def test_its_peers_are_told(forge: Forge, anyio_backend_name: str, way: str) -> None:
    """At once, though the loop goes on as long as the interpreter (law 3)."""
    with Programs(forge) as programs:
        port = programs.start(host_store).event()["port"]
        with program(anyio_backend_name, port, way) as running:
            async with one(client(port), 1, 2) as peer, Tasks() as tasks:
                await peer.execute_barrier("first")
                waiting = tasks.start(peer.execute_barrier)
                crossed(running)
                told = tell(running)
                error = await waiting.raised(BrokenBarrierError)
                assert time.monotonic() < told + TOLD_SECS
                assert "its program ended" in error.reason
                ends(running, told + EXIT_SECS + 2)


@both_ways
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_its_peers_are_told_as_it_crosses(
    forge: Forge, anyio_backend_name: str, way: str
) -> None:
    """Its loop makes no further call once it leaves (law 3)."""
    with Programs(forge) as programs:
        port = programs.start(host_store).event()["port"]
        with program(anyio_backend_name, port, way, again=True) as running:
            async with one(client(port), 1, 2) as peer:
                await peer.execute_barrier("first")
                await peer.execute_barrier("second")
                told = tell(running)

                async def goes_on() -> None:
                    while True:
                        await peer.execute_barrier("again")

                with pytest.raises(BrokenBarrierError, match="its program ended"):
                    await goes_on()
                assert time.monotonic() < told + TOLD_SECS
                ends(running, told + EXIT_SECS + 2)


@both_ways
async def test_while_the_store_is_silent(forge: Forge, anyio_backend_name: str, way: str) -> None:
    """No thread that waits in c10d returns from there to an interpreter that finalises, which would
    end it with SIGABRT, and none is made to print why it returned (laws 8 and 12)."""
    with Programs(forge) as programs:
        agent = programs.start(host_store)
        port = agent.event()["port"]
        with program(anyio_backend_name, port, way) as running:
            async with one(client(port), 1, 2) as peer:
                await peer.execute_barrier("first")
                crossed(running)
                agent.stop()
                ends(running, tell(running) + EXIT_SECS + 2)
                agent.signal(SIGCONT)
