"""Ranks as objects in one process, over every kind of store."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from stores import MemoryStore, PlainStore
from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore

from async_barriers import BarrierConnectionError, StoreBarrier, TCPStoreBarrier
from async_barriers._client import process
from async_barriers._protocol.keys import PhaseKeys
from async_barriers._protocol.membership import Membership
from async_barriers._store.connection import SocketConnection
from async_barriers._store.copies import copy_of

T = TypeVar("T")
AnyBarrier = StoreBarrier | TCPStoreBarrier

OVER_A_STORE = (
    "tcp", "prefix", "hash", "file", "python", "python without clone", "tcp, threads",
)  # fmt: skip
WITH_OWN_STORE = ("own, libuv", "own, no libuv")
KINDS = OVER_A_STORE + WITH_OWN_STORE
PREFIX = "tests"


class World:
    """Barriers that meet at one store of the given kind."""

    def __init__(self, kind: str, tmp_path: Path) -> None:
        self.kind = kind
        self.owns_store = kind in WITH_OWN_STORE
        self.made: list[AnyBarrier] = []
        self._port = 0
        self._store: Store | None = None
        self._observer: Store | None = None
        if self.owns_store:
            self._port = free_port()
        else:
            self._store = open_store(kind, tmp_path)
        self._watching = anyio.CapacityLimiter(4)

    @property
    def store(self) -> Store:
        """The user's own handle of the store."""
        if self._store is None:
            self._store = TCPStore("127.0.0.1", self._port, wait_for_workers=False)
        return self._store

    @property
    def innermost(self) -> Store:
        """The store without the user's prefix, where the keys of barriers are."""
        store: Any = self.store
        beneath: Store = store.underlying_store if self.kind == "prefix" else store
        return beneath

    def barrier(
        self, rank: int, world_size: int, prefix: str = PREFIX, **options: Any
    ) -> AnyBarrier:
        """One rank's barrier, not connected; closed with the world."""
        options = {"timeout_secs": 20.0, "timeout_barrier_init_secs": 20.0, **options}
        barrier: AnyBarrier
        if self.owns_store:
            barrier = TCPStoreBarrier(
                rank,
                world_size,
                prefix,
                use_checkpoint_barrier_tcpstore_libuv=self.kind == "own, libuv",
                tcpstore_port=self._port,
                master_address="127.0.0.1",
                **options,
            )
        else:
            options = {"worker_threads": self.kind == "tcp, threads", **options}
            barrier = StoreBarrier(
                self.store, rank=rank, world_size=world_size, prefix=prefix, **options
            )
        self.made.append(barrier)
        return barrier

    async def barriers(
        self, world_size: int, *, lanes: int = 1, prefix: str = PREFIX, **options: Any
    ) -> list[AnyBarrier]:
        """All ranks' barriers, with ``lanes`` connections each, so that no deadline in a test
        depends on the time to connect."""
        ranks = [self.barrier(rank, world_size, prefix, **options) for rank in range(world_size)]
        await warm_up(ranks, lanes)
        return ranks

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Make a blocking call of the test's own."""
        return await anyio.to_thread.run_sync(function, *args, limiter=self._watching)

    def membership(self, prefix: str = PREFIX) -> Membership:
        """The membership of some rank that has joined, in the latest generation."""
        joined = [
            barrier._session.membership
            for barrier in self.made
            if barrier._session.prefix == prefix and barrier._session.membership is not None
        ]
        assert joined, "nobody has joined"
        return max(joined, key=lambda membership: membership.state.number)

    def keys(self, name: str = "", sequence: int | str = 0, prefix: str = PREFIX) -> PhaseKeys:
        """The keys of a phase in the latest generation."""
        return self.membership(prefix).own.phase(name, str(sequence))

    async def read(self, key: str) -> bytes | None:
        """A value, over a connection of the test's own."""

        def look() -> bytes | None:
            if self._observer is None:
                store = self.innermost
                self._observer = store if "without" in self.kind else copy_of(store)
            observer: Any = self._observer
            # A get would wait for a key that is deleted between a check and the get.
            value: bytes = observer.compare_set(key, "\0", "\0")
            return None if value == b"\0" else value

        return await self.call(look)

    async def entered(self, *ranks: int, **phase: Any) -> None:
        """Wait until ``ranks`` have arrived in a phase that is not over."""

        async def they_have() -> bool:
            log = await self.read(self.keys(**phase).log) or b""
            return {*ranks} <= {int(line) for line in log.split() if line.isdigit()}

        await until(they_have)

    async def exists(self, key: str) -> None:
        """Wait until ``key`` is there."""

        async def there() -> bool:
            return await self.read(key) is not None

        await until(there)

    async def gone(self, key: str) -> None:
        """Wait until ``key`` is gone."""

        async def gone() -> bool:
            return await self.read(key) is None

        await until(gone)

    async def aclose(self) -> None:
        await close(self.made)
        await library_threads_gone()


def open_store(kind: str, tmp_path: Path) -> Store:
    if kind == "hash":
        return HashStore()
    if kind == "file":
        return FileStore(str(tmp_path / "store"), 1)
    if kind == "python":
        return MemoryStore()
    if kind == "python without clone":
        return PlainStore()
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return PrefixStore("job", server) if kind == "prefix" else server


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def warm_up(ranks: Sequence[AnyBarrier], lanes: int = 1) -> None:
    """Cross ``lanes`` names at once, so that every rank has as many connections."""
    await gather(rank.connect for rank in ranks)
    await gather(
        lambda r=rank, n=name: r.execute_barrier(f"warm-up {n}")  # type: ignore[misc]
        for rank in ranks
        for name in range(lanes)
    )


async def close(ranks: Iterable[AnyBarrier]) -> None:
    await gather(rank.aclose for rank in ranks)


def crash(barrier: AnyBarrier) -> None:
    """End it as a killed process ends: it says nothing, and its claim stands.

    The next barrier of its rank is a newcomer after a life that is gone. Calls under way in the
    crashed barrier end with an error that a killed process would not see.
    """
    session = barrier._session
    claim = session.membership
    barrier._closed = session.closing = session._over = True
    session._not_at_end()
    for effort in list(session._efforts):
        effort.stop(BarrierConnectionError("this process was killed"))
    for connection in session._connections():
        # In a store that is no TCPStore, only the awaited key ends a call that waits.
        connection.close(reset=isinstance(connection, SocketConnection))
    for phase in list(session.open):
        session.settle(phase, error=BarrierConnectionError("this process was killed"))
    session.open.clear()
    session._idle, session._bell, session.turns = [], None, None
    session._leaving = session.start(_nothing_to_say())
    session._source.let_go()
    if claim is not None:
        process.holders.pop(claim.claim.life.token, None)


async def _nothing_to_say() -> None:
    pass


async def gather(calls: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """Run all calls at once; return their results in order. The first error cancels the rest."""
    calls = list(calls)
    results: dict[int, T] = {}

    async def run(index: int, call: Callable[[], Awaitable[T]]) -> None:
        results[index] = await call()

    async with anyio.create_task_group() as tasks:
        for index, call in enumerate(calls):
            tasks.start_soon(run, index, call)
    return [results[index] for index in range(len(calls))]


async def crosses(ranks: list[AnyBarrier], name: str = "x") -> int:
    """Cross ``name`` with everyone; its sequence number, which all must agree on."""
    results = await gather(partial(rank.execute_barrier, name) for rank in ranks)
    (sequence,) = {result.sequence for result in results}
    return sequence


class Outcome:
    """A call under way in a task of its own, and how it ended.

    :ivar secs: how long it took
    :ivar own_secs: the same without the time in which others had the processor
    """

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self.secs = self.own_secs = 0.0
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()

    async def run(self, call: Callable[[], Awaitable[Any]]) -> None:
        started, waited = anyio.current_time(), waited_for_processor("thread-self")
        try:
            with self.scope:
                self.value = await call()
        except Exception as exc:
            self.error = exc
        finally:
            self.secs = anyio.current_time() - started
            self.own_secs = self.secs - (waited_for_processor("thread-self") - waited)
            self.ended.set()

    async def raised(self, kind: type[T]) -> T:
        """Wait for the error that it must end in."""
        await self.ended.wait()
        if not isinstance(self.error, kind):
            raise AssertionError(f"{self.error!r} (value {self.value!r}) is no {kind.__name__}")
        return self.error

    async def returned(self) -> Any:
        """Wait for its value."""
        await self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.value


class Tasks(AsyncExitStack):
    """A task group whose tasks are `Outcome`s; leaving it cancels those under way."""

    async def __aenter__(self) -> Tasks:
        await super().__aenter__()
        self._group = await self.enter_async_context(anyio.create_task_group())
        self.callback(self._group.cancel_scope.cancel)
        return self

    def start(self, call: Callable[[], Awaitable[Any]]) -> Outcome:
        outcome = Outcome()
        self._group.start_soon(outcome.run, call)
        return outcome


def share(cases: Sequence[T], backend: str) -> list[T]:
    """The cases that there is time for: a quarter under one event loop, another quarter under the
    other; with ``EVERY_CASE`` in the environment a half each."""
    drawn = random.Random(0).sample(cases, len(cases))
    return drawn[backend == "trio" :: 2 if "EVERY_CASE" in os.environ else 4]


async def until(condition: Callable[[], Awaitable[bool]], within_secs: float = 15.0) -> None:
    """Wait for ``condition``; a bound that is missed is an error, never luck."""
    with anyio.fail_after(within_secs):
        while not await condition():
            await anyio.sleep(0.003)


def waited_for_processor(of: int | str) -> float:
    """The seconds in which a process's main thread could have run, and others did; 0 if the system
    does not say.

    :param of: its process id, or ``thread-self``
    """
    try:
        stat = Path(f"/proc/{of}/schedstat").read_text()
    except OSError:
        return 0.0
    return int(stat.split()[1]) / 1e9


# Threads that an earlier test left behind are not this test's fault.
_there_before: set[threading.Thread] = set()


def library_threads() -> list[threading.Thread]:
    """The library's workers that this test has caused; not the thread that starts them, which ends
    by itself."""
    return [thread for thread in _library_threads() if thread not in _there_before]


def begin_of_test() -> None:
    """Ignore the threads that exist now."""
    _there_before.clear()
    _there_before.update(_library_threads())


def _library_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("async_barriers")]


async def knows_who_left(rank: AnyBarrier) -> bool:
    """Whether it has heard that another rank has left."""
    return rank._session.closed_by is not None


async def library_threads_gone(within_secs: float = 8.0) -> None:
    """Wait until no thread of the library is left; looking up a name takes up to 5 s here."""

    async def none() -> bool:
        return not library_threads()

    try:
        await until(none, within_secs)
    except TimeoutError:
        frames = sys._current_frames()
        stacks = {t.name: traceback.format_stack(frames[t.ident]) for t in library_threads()}  # type: ignore[index]
        raise AssertionError(
            "\n".join(f"{name}:\n{''.join(stack[-4:])}" for name, stack in stacks.items())
        ) from None


async def drop(coroutine: Coroutine[Any, Any, Any], when: asyncio.Event) -> None:
    """Run ``coroutine`` in this task of asyncio, and throw it away where it stands when told to."""
    told = asyncio.ensure_future(when.wait())
    while not told.done():
        awaited = coroutine.send(None)
        awaited._asyncio_future_blocking = False
        if when.is_set():
            break  # Before what it awaits can come.
        await asyncio.wait((awaited, told), return_when=asyncio.FIRST_COMPLETED)
    coroutine.close()
