"""What the system is asked, and barriers where it tells less than Linux does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from async_barriers._system import holder_of, hosted_here

PATIENCE_SECS = 40.0
# What macOS has not, and what it has in its place, as far as another system can pretend.
MACOS = """
import asyncio, builtins, os, socket, sys
import anyio, torch.distributed, trio

def without_proc(real):
    def call(path, *args, **options):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path, *args, **options)
    return call

os.open, os.readlink, os.listdir = map(without_proc, (os.open, os.readlink, os.listdir))
builtins.open = without_proc(open)
del socket.MSG_NOSIGNAL, socket.SOCK_NONBLOCK
sys.platform = "darwin"
sys.modules["fcntl"] = sys.modules["termios"] = None

SIGPIPE, UNSENT, asked = 0x1022, 0x1024, set()

class Socket(socket.socket):
    def setsockopt(self, level, name, *value):
        if name == SIGPIPE:
            asked.add(name)
        else:
            super().setsockopt(level, name, *value)

    def getsockopt(self, level, name, *size):
        if name == UNSENT:
            asked.add(name)
            return 0
        return super().getsockopt(level, name, *size)

socket.socket = Socket
"""
CROSS = """
from async_barriers import BarrierTimeoutError, StoreBarrier

async def be(store, rank):
    async with StoreBarrier(store, rank=rank, world_size=2, timeout_secs=10) as barrier:
        for step in range(3):
            await barrier.execute_barrier(step=step)
        assert await barrier.all_gather(b"%d" % rank, step=9) == (b"0", b"1")
        if not rank:
            try:
                await barrier.execute_barrier("late", step=0, timeout_secs=0.2)
            except BarrierTimeoutError as exc:
                assert exc.missing_ranks == (1,)
            else:
                raise AssertionError
        await barrier.execute_barrier("end", step=0)

async def main():
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    async with anyio.create_task_group() as ranks:
        for rank in range(2):
            ranks.start_soon(be, store, rank)

for backend in ("asyncio", "trio"):
    anyio.run(main, backend=backend)
assert asked == {SIGPIPE, UNSENT}, asked
"""


@pytest.mark.processes
def test_where_there_is_no_proc() -> None:
    """On macOS, as far as it can be pretended, importing works and so do crossings, with nothing
    printed."""
    done = subprocess.run(
        [sys.executable, "-c", MACOS + CROSS],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECS,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_who_listens_at_a_port(address: str) -> None:
    """This process does as long as it listens; one that is connected, or only bound, does not."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        server.bind((address, 0))
        port = server.getsockname()[1]
        assert not hosted_here(port)
        server.listen()
        assert hosted_here(port)
        assert holder_of(port)[1]
        with socket.create_connection((address, port)) as client:
            assert not hosted_here(client.getsockname()[1])
    assert not hosted_here(port)
