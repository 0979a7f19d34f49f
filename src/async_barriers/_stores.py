"""Where a barrier's store comes from: passed in, or at an address where one rank hosts it."""

from __future__ import annotations

import socket
import threading
from typing import Protocol

from torch.distributed import Store, TCPStore

from . import _connecting
from ._connection import Connection


class Source(Protocol):
    """Opens connections to one store."""

    hosts: bool
    """Whether the store ends with this process."""

    def open(self, deadline: float, stop: threading.Event) -> Connection:
        """A new connection; see `_connecting.connect_to`."""
        ...

    def let_go(self) -> None:
        """The barrier is closed."""
        ...


class PassedIn:
    """A store of the caller's, which is only ever cloned."""

    hosts = False

    def __init__(self, store: Store) -> None:
        self._store = store

    def open(self, deadline: float, stop: threading.Event) -> Connection:
        return _connecting.connect_to(self._store, deadline, stop)

    def let_go(self) -> None:
        """It is the caller's."""


class StoreAt:
    """A TCPStore at an address; on the rank that hosts it, the server itself.

    :param shared: whether others in this process may host, or have hosted, at the same port
        (c10d's multi-tenancy): all get the same server, and it lives as long as one of them
    """

    def __init__(
        self, host: str, port: int, use_libuv: bool, *, hosts: bool, shared: bool = False
    ) -> None:
        self.hosts = hosts
        self._address = (host, port, use_libuv)
        self._shared = shared
        self._lock = threading.Lock()
        self._server: TCPStore | None = None

    def probe(self) -> str:
        """What is seen at the address, in words; for a barrier that could not connect."""
        host, port, _ = self._address
        try:
            socket.create_connection((host, port), timeout=5.0).close()
        except OSError as exc:
            return f"nothing answers at {host}:{port} ({exc})"
        return f"something answers at {host}:{port}, but it may be no store"

    def open(self, deadline: float, stop: threading.Event) -> Connection:
        if not self.hosts:
            return _connecting.connect_to_port(*self._address, deadline, stop)
        with self._lock:
            if self._server is None:
                self._server = _connecting.host_store(*self._address, shared=self._shared)
            server = self._server
        return _connecting.clone_tcp(server, deadline, stop)

    def let_go(self) -> None:
        self._server = None
