"""Programs that say what they see, ranks in this process, and a relay that does things to bytes.

For the tests of what people reported: they know nothing but what is public.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import anyio
from fork_server import python
from processes import Forge, Rank
from rank_process import say
from torch.distributed import Store, TCPStore
from worlds import close, gather

from async_barriers import BarrierError, BarrierResult, StoreBarrier

T = TypeVar("T")

# Deadlines that no test means to reach.
PATIENT = {"timeout_secs": 20.0, "timeout_barrier_init_secs": 20.0}
# Law 4 says one second; the rest is for a machine that is busy.
TOLD_SECS = 1.5
Hook = Callable[[bytes], Iterable[bytes]]


class Programs(ExitStack):
    """Processes of one test; those that are left are killed on leaving."""

    def __init__(self, forge: Forge) -> None:
        super().__init__()
        self._forge = forge

    def start(
        self,
        function: Callable[..., Awaitable[None]],
        *arguments: Any,
        backend: str = "asyncio",
        **environment: str,
    ) -> Rank:
        """A process that runs a module's ``function``, on an event loop; what it says are events.

        It may wait for its stdin: it ends there when the test is over, or by `let_end`.
        """
        module = function.__module__
        return self._add(
            {
                "rank": function.__name__,
                "backend": backend,
                "imports": [module],
                "program": __name__,
                "arguments": [module, function.__name__, *arguments],
                "environment": environment,
            }
        )

    def rank(self, number: int, size: int, port: int, **options: Any) -> Rank:
        """A process that does what it is told to, as one rank at a TCPStore; see rank_process."""
        where = {"host": "127.0.0.1", "port": port, "own_store": False}
        rank = self._add({"rank": number, "size": size, "backend": "asyncio", **where, **options})
        rank.connects()
        return rank

    def _add(self, options: dict[str, Any]) -> Rank:
        process = Rank(self._forge, options)
        self.callback(process.dispose)
        return process


async def main(module: str, function: str, *arguments: Any) -> None:
    """What a process of `Programs.start` runs."""
    await getattr(importlib.import_module(module), function)(*arguments)


async def host_store(port: int = 0) -> None:
    """A program: it hosts a TCPStore, says its port, and ends with its stdin."""
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    say(port=server.port)
    await until_told()


async def until_told() -> None:
    """In a program: wait for a line of `tell`."""
    await anyio.wait_readable(0)
    os.read(0, 1 << 12)


def tell(process: Rank) -> float:
    """Have a program that is in `until_told` go on; when it was told."""
    process.start("go")
    return time.monotonic()


def serve() -> TCPStore:
    """The server of a job, in this process."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(port: int) -> TCPStore:
    """The connection to a server that a rank's program has made."""
    return TCPStore("127.0.0.1", port, wait_for_workers=False)


def one(store: Store, rank: int, size: int, **options: Any) -> StoreBarrier:
    """A rank's barrier; what is not given is as `PATIENT` has it."""
    return StoreBarrier(store, rank=rank, world_size=size, **{**PATIENT, **options})


@asynccontextmanager
async def job(store: Store, size: int, **options: Any) -> AsyncIterator[list[StoreBarrier]]:
    """All ranks of a job in this process; they have met once, in "ready"."""
    ranks = [one(store, rank, size, **options) for rank in range(size)]
    try:
        await gather(lambda r=rank: r.execute_barrier("ready") for rank in ranks)  # type: ignore[misc]
        yield ranks
    finally:
        await close(ranks)


async def attempt(call: Awaitable[T]) -> T | BarrierError:
    """What a call came to; anything else that is raised is no way to end."""
    try:
        return await call
    except BarrierError as exc:
        return exc


async def meet(*ranks: StoreBarrier, name: str = "", rounds: int = 3, secs: float = 1.0) -> None:
    """Have all cross once per round, as a training loop does, until they meet."""
    told: list[Any] = []
    for _ in range(rounds):
        told = await gather(
            lambda r=rank: attempt(r.execute_barrier(name, timeout_secs=secs))  # type: ignore[misc]
            for rank in ranks
        )
        if all(isinstance(end, BarrierResult) for end in told):
            assert len({end.sequence for end in told}) == 1, told
            return
    raise AssertionError(f"they did not meet in {rounds} rounds; the last one: {told}")


class Relay:
    """A port whose bytes go on to another one, through hooks that say what becomes of them.

    :param up: is given each chunk that a client sent, and yields what is sent on; it may take
        its time
    :param down: the same for what the server sends
    """

    def __init__(self, port: int, up: Hook | None = None, down: Hook | None = None) -> None:
        self._to, self._up, self._down = port, up, down
        self.links: list[Link] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for link in self.links:
            link.reset()

    def _accept(self) -> None:
        with self._listener, suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                try:
                    far = socket.create_connection(("127.0.0.1", self._to))
                except OSError:
                    near.close()
                else:
                    self.links.append(Link(near, far, self._up, self._down))


class Link:
    """One connection through a relay."""

    def __init__(
        self, near: socket.socket, far: socket.socket, up: Hook | None, down: Hook | None
    ) -> None:
        self._ends = (near, far)
        self._reset = False
        for end in self._ends:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threads = [
            threading.Thread(target=self._forward, args=way, name="relay", daemon=True)
            for way in ((near, far, up), (far, near, down))
        ]
        for thread in threads:
            thread.start()
        threading.Thread(target=self._close, args=threads, name="relay", daemon=True).start()

    def reset(self) -> None:
        """Reset both ends."""
        self._reset = True
        for end in self._ends:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                # It ends what is being read here, and sends nothing.
                end.shutdown(socket.SHUT_RD)

    def _forward(self, end: socket.socket, other: socket.socket, hook: Hook | None) -> None:
        with suppress(OSError):
            while chunk := end.recv(1 << 16):
                for piece in (chunk,) if hook is None else hook(chunk):
                    # What one that was killed had sent goes on, and what it is sent is dropped.
                    with suppress(OSError):
                        other.sendall(piece)
        if not self._reset:
            with suppress(OSError):
                other.shutdown(socket.SHUT_WR)

    def _close(self, *threads: threading.Thread) -> None:
        for thread in threads:
            thread.join()
        for end in self._ends:
            end.close()


@contextmanager
def relay(port: int, up: Hook | None = None, down: Hook | None = None) -> Iterator[Relay]:
    """A `Relay` to ``port``."""
    made = Relay(port, up, down)
    try:
        yield made
    finally:
        made.close()


def interpreter(
    function: Callable[..., Awaitable[None]],
    *arguments: Any,
    backend: str = "asyncio",
    wrapper: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """As `Programs.start`, in an interpreter that ends as slowly as any does, and that ``wrapper``
    may start, also in other namespaces than the fork server's; its caller waits for it."""
    what = (function.__module__, function.__name__, *arguments)
    code = "import anyio, gc, reports; gc.unfreeze();"
    code += f"anyio.run(reports.main, *{what!r}, backend={backend!r})"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*wrapper, sys.executable if wrapper else python(), "-c", code],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
