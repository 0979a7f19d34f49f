"""The places of a barrier's store: passed in, or at an address where one rank hosts it.

Each opens connections to one store, and keeps the latest *failure* while none has worked since. It
knows the *namespace*, the beginning of all our keys there, once a connection is open.
"""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial
from typing import cast

from torch.distributed import FileStore, PrefixStore, Store, TCPStore

from .._errors import BarrierConnectionError, seconds, told_by
from .._protocol.keys import measured
from .._system import holder_of, hosted_here
from . import connecting, copies
from .blocking_store import innermost
from .connecting import NotUnderstood, in_thread
from .connection import SocketConnection
from .event_loop import Loop
from .future import Effort
from .threads import ThreadedConnection
from .waiting import sleep, within
from .worker import Living

Connection = SocketConnection | ThreadedConnection

_BY_THREADS = "ASYNC_BARRIERS_WORKER_THREADS"
_RETRY_SECS = 0.2
# How long a store that was passed in may be busy before it is cloned.
_BUSY_SECS = 0.3
# How long a server of this process takes to free its port, and a thread that makes no call to end.
_CLOSING_SECS, _IDLE_SECS = 0.5, 0.02


class CannotHost(BarrierConnectionError):
    """The store cannot be hosted here, and another attempt would fail, too."""


class Beside:
    """Leads to the store of another source, with keys of its own; the other one ends the store.

    :param what: the owner of the keys; no other choice of it collides
    """

    def __init__(self, source: PassedIn | StoreAt, what: str) -> None:
        self.failures: list[BaseException] = []
        self._source = source
        self._client: PassedIn | StoreAt = source.client()
        self._what = what

    @property
    def namespace(self) -> str:
        # The keys of another prefix have "async_barriers/" there, and those of an agreed name hex.
        return f"{self._client.namespace}async_barriers.beside/{measured(self._what)}/"

    async def open(self, loop: Loop, deadline: float) -> Connection:
        """A new connection, by the time the loop's clock says ``deadline``.

        :raises BarrierConnectionError: no connection was possible
        """
        # Its port may be known only once it is hosted.
        self._client = self._source.client()
        return await self._client.open(loop, deadline)

    async def hosts(self, loop: Loop) -> bool:
        """Whether the store ends with this process."""
        return await self._source.hosts(loop)

    def let_go(self) -> None:
        """The store belongs to the other source."""


def by_threads(asked: bool) -> bool:
    """Whether to use c10d's client in threads, although sockets would do."""
    return asked or os.environ.get(_BY_THREADS, "0") not in ("", "0")


class PassedIn:
    """A store of the caller, which is used only for its address."""

    def __init__(self, store: Store, worker_threads: bool = False) -> None:
        self.namespace: str = ""
        self.failures: list[BaseException] = []
        self._store = store
        base = innermost(store)
        self._tcp = base if isinstance(base, TCPStore) else None
        self.threads: bool = self._tcp is None or by_threads(worker_threads)
        self.clients: Living[ThreadedConnection] = Living()

    async def open(self, loop: Loop, deadline: float) -> Connection:
        tcp, connection = self._tcp, None
        if tcp is not None:
            # First, since c10d prints what it says to a server that has gone.
            connection = await _reach(self, loop, tcp.host, tcp.port, deadline)
        reopened = isinstance(innermost(self._store), TCPStore | FileStore)
        if reopened and isinstance(self._store, PrefixStore) and not self.namespace:
            try:
                self.namespace = await self._agreed(loop)
            except BaseException:
                if connection is not None:
                    connection.close()
                raise
        return connection or await connecting.connect_by_threads(
            loop, partial(copies.copy_of, self._store), deadline, "the store", self.clients
        )

    async def _agreed(self, loop: Loop) -> str:
        asked = Effort(in_thread(loop, "namespace", partial(copies.agreed_namespace, self._store)))
        if not await within(loop, asked, _BUSY_SECS):
            # Another thread of the program waits there, and c10d's client makes one call at a time.
            own = await in_thread(loop, "copy", partial(copies.copy_of, self._store))
            return str(await in_thread(loop, "namespace", partial(copies.agreed_namespace, own)))
        return str(asked.result())

    async def hosts(self, loop: Loop) -> bool:
        port = None if self._tcp is None else self._tcp.port
        return port is not None and bool(await in_thread(loop, "host", partial(hosted_here, port)))

    def let_go(self) -> None:
        """The store belongs to the caller."""

    def client(self) -> PassedIn:
        """Another source that leads to the same store."""
        return PassedIn(self._store, self.threads)


class StoreAt:
    """A TCPStore at an address; on the rank that hosts it, the server itself.

    :param shared: whether others in this process may host at the same port (c10d's multi-tenancy):
        all get the same server, which lives as long as one of them
    """

    namespace: str = ""

    def __init__(
        self,
        host: str,
        port: int,
        use_libuv: bool,
        *,
        hosts: bool,
        shared: bool = False,
        worker_threads: bool = False,
    ) -> None:
        self.failures: list[BaseException] = []
        self.address: tuple[str, int] = (host, port)
        self._use_libuv = use_libuv
        self._hosts = hosts
        self._shared = shared
        self.threads: bool = by_threads(worker_threads)
        self.clients: Living[ThreadedConnection] = Living()
        self._server: TCPStore | None = None

    async def open(self, loop: Loop, deadline: float) -> Connection:
        host, port = self.address
        if self._hosts:
            self._server = await self._host(loop, deadline)
            # A name may lead to another machine from here.
            port = self._server.port
        return await _reach(self, loop, host, port, deadline)

    async def _host(self, loop: Loop, deadline: float) -> TCPStore:
        host, port = self.address
        began = loop.now()
        while True:
            if self._server is not None:
                return self._server
            try:
                hosting = partial(connecting.host_store, port, self._use_libuv, shared=self._shared)
                # Not held by this frame, which the traceback of an earlier attempt may keep: the
                # port is free when no reference to the server is left.
                return cast(TCPStore, await in_thread(loop, "host", hosting))
            except OSError as exc:
                if isinstance(exc, BarrierConnectionError):
                    raise
                if exc.errno != errno.EADDRINUSE:
                    advice = ""
                else:
                    holder, ours = await in_thread(loop, "port", partial(holder_of, port))
                    # A server of this process that is not shared will never be.
                    ends = began + _CLOSING_SECS if ours and self._shared else deadline
                    if loop.now() < min(ends, deadline):
                        # An earlier process of this job may still hold the port for a moment.
                        self.failures[:] = [OSError(exc.errno, f"{exc.strerror}, by {holder}")]
                        await sleep(loop, min(_RETRY_SECS, max(0.0, deadline - loop.now())))
                        continue
                    advice = f"; the port is held by {holder}"
                    if self._shared:
                        advice += (
                            ". If that hosts this job's store, set "
                            "TORCHELASTIC_USE_AGENT_STORE=True on every rank; else choose another "
                            "MASTER_PORT"
                        )
                raise CannotHost(
                    f"this process could not host the store at {host}:{port} after "
                    f"{seconds(loop.now() - began)} ({told_by(exc)}){advice}"
                ) from exc

    async def hosts(self, loop: Loop) -> bool:
        return self._hosts

    def let_go(self) -> None:
        server, self._server = self._server, None
        clients = self.clients.latest_first() if server is not None else []
        secs = _IDLE_SECS
        for ended in (each for client in clients if client.lost for each in client.ended):
            # c10d prints what a thread says to a server that has gone: keep it until then.
            if not ended.wait(secs):
                secs = 0.0
                ended.when_settled(partial(id, server))

    def client(self) -> StoreAt:
        """A source that leads to the same store and does not host it."""
        host, port = self.address
        at = port if self._server is None else self._server.port
        client = StoreAt(host, at, self._use_libuv, hosts=False, worker_threads=self.threads)
        client.clients = self.clients
        return client


async def _reach(
    source: PassedIn | StoreAt, loop: Loop, host: str, port: int, deadline: float
) -> Connection:
    # Also before a client of c10d's, whose constructor never returns from a silent port.
    with contextlib.suppress(NotUnderstood):
        connection = await connecting.connect(loop, host, port, deadline, source.failures)
        if not source.threads:
            return connection
        connection.close()
    client, what = partial(copies.client_of, host, port), f"the store at {host}:{port}"
    threaded = await connecting.connect_by_threads(loop, client, deadline, what, source.clients)
    source.threads = True
    return threaded


Source = PassedIn | StoreAt | Beside
