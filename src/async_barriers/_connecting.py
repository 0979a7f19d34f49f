"""How a connection to a torch store comes about, and a store that this process hosts.

c10d's constructors cannot be called off, and from a port that is silent they never return. So it is
known that a server answers before one of them is called, and opening ends when it has to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, Store, TCPStore

from . import _dialogue
from ._connection import Connection, HashConnection, TCPConnection, first_line, innermost
from ._errors import BarrierConnectionError

_RETRY_SECS = 0.1
# While it is tried again nothing can end c10d's constructor, and a thread that comes back from
# it into an interpreter that is ending aborts the process: no longer than closing waits.
_CONSTRUCTION = timedelta(seconds=0.3)
# VALIDATE with c10d's magic number, and PING with a number that is sent back.
_ECHO = struct.pack("=I", 20020)
_HAIL = struct.pack("=BIB", 0, 0x3C85F7CE, 13) + _ECHO
# TCP tries again after one second and three; a new attempt does not wait as long as that.
_ATTEMPT_SECS = 2.0
# Opening a connection takes the GIL many times: 16 threads doing so at once starved an
# event loop for 99 ms, so they take turns; but one that hangs must not hold up the others.
_opening = threading.BoundedSemaphore(8)
_TURN_SECS = 0.2
# Which servers, by host and port, have shown whether meetings can be held with them directly.
_understand: dict[tuple[str, int], bool] = {}


def connect_to(store: Store, deadline: float, stop: threading.Event) -> Connection:
    """A connection of our own to where ``store`` leads; its timeout and its lock stay its owner's.

    Blocks until ``deadline`` (on the `time.monotonic` clock) or until ``stop`` is set.

    :raises BarrierConnectionError: the store could not be reached by then
    """
    base = innermost(store)
    if isinstance(base, TCPStore):
        # clone() would try for as long as its owner's timeout says.
        await_store(base.host, base.port, deadline, stop)
        return clone_tcp(store, deadline, stop)
    if isinstance(base, HashStore):
        return HashConnection(_clone(store))
    try:
        return Connection(_clone(store))
    except BarrierConnectionError:
        # A store written in Python need not have clone(); then it has no connections either.
        return Connection(store)


def clone_tcp(store: Store, deadline: float, stop: threading.Event) -> TCPConnection:
    """A new connection to the server that ``store`` is connected to, and that answers."""
    base: Any = innermost(store)
    return _tried(lambda: _clone(store), base.host, base.port, deadline, stop)


def connect_to_port(
    host: str, port: int, use_libuv: bool, deadline: float, stop: threading.Event
) -> Connection:
    """A connection to the TCPStore that another process hosts; else as `connect_to`."""
    while True:
        await_store(host, port, deadline, stop)
        try:
            return _tried(lambda: _client(host, port, use_libuv), host, port, deadline, stop)
        except BarrierConnectionError:
            # It went away in that very instant.
            if time.monotonic() >= deadline or stop.is_set():
                raise


def host_store(host: str, port: int, use_libuv: bool, *, shared: bool = False) -> TCPStore:
    """Host a TCPStore in this process; it lives as long as the object.

    :param shared: with all that host at this port in this process and share it
    """
    with _translated(
        f"rank 0 cannot host a store at {host}:{port}; is the port taken by another process, or "
        "the address another machine's?"
        + (
            " If another process of this job hosts its store there, set "
            "TORCHELASTIC_USE_AGENT_STORE=True on every rank; else choose another MASTER_PORT."
        )
        * shared
    ):
        return TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            use_libuv=use_libuv,
            multi_tenant=shared,
        )


def await_store(host: str, port: int, deadline: float, stop: threading.Event) -> None:
    """Block until a TCPStore answers at ``host:port``.

    c10d's own waiting for it cannot be called off and prints warnings, and where something
    accepts and is silent, it never ends.
    """
    while True:
        try:
            return _hail(host, port, deadline, stop)
        except OSError as exc:
            if time.monotonic() >= deadline or stop.wait(_RETRY_SECS):
                raise BarrierConnectionError(
                    f"no store answers at {host}:{port} ({exc}); is the process that hosts it up, "
                    "and do address and port agree?"
                ) from exc


def _hail(host: str, port: int, deadline: float, stop: threading.Event) -> None:
    """Have the store say a number back, as c10d's own client does when it connects."""
    with _knock(host, port, deadline, stop) as hailing:
        hailing.settimeout(_RETRY_SECS)
        hailing.sendall(_HAIL)
        while True:
            try:
                answer = hailing.recv(len(_ECHO))
                break
            except TimeoutError:
                if time.monotonic() >= deadline or stop.is_set():
                    raise
    if answer != _ECHO:
        raise ConnectionError(f"it answers {answer!r}, which no TCPStore does")


def _knock(host: str, port: int, deadline: float, stop: threading.Event) -> socket.socket:
    """As `socket.create_connection`, but ends when it is called off."""
    by = min(time.monotonic() + _ATTEMPT_SECS, max(deadline, time.monotonic() + _RETRY_SECS))
    failure = 0
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        knocking = socket.socket(family, kind, protocol)
        knocking.setblocking(False)
        failure = knocking.connect_ex(address)
        opened = select.poll()
        opened.register(knocking, select.POLLOUT)
        while failure == errno.EINPROGRESS and not stop.is_set() and time.monotonic() < by:
            if opened.poll(1000 * _RETRY_SECS):
                failure = knocking.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not failure:
            return knocking
        knocking.close()
    raise OSError(failure, "timed out" if failure == errno.EINPROGRESS else os.strerror(failure))


def _clone(store: Any) -> Store:
    with _translated("the store cannot be reached"):
        clone: Store = store.clone()
        return clone


def _client(host: str, port: int, use_libuv: bool) -> Store:
    with _translated(f"no store can be reached at {host}:{port}"):
        return TCPStore(
            host,
            port,
            is_master=False,
            timeout=_CONSTRUCTION,
            wait_for_workers=False,
            use_libuv=use_libuv,
        )


def _tried(
    open_store: Callable[[], Store], host: str, port: int, deadline: float, stop: threading.Event
) -> TCPConnection:
    """A connection, of which it is known whether it can be used without blocking."""

    def opened() -> TCPConnection:
        with _in_turn():
            return TCPConnection(open_store())

    connection = opened()
    shares = connection.interruptible and hasattr(socket, "SOCK_NONBLOCK")
    if not (connection.meets and shares):
        return connection
    address = host, port
    # Twice, as one that was silent may have been stopped for a moment.
    for _ in range(2):
        if address in _understand:
            break
        tried = f"async_barriers/tried/{uuid.uuid4().hex}"
        if connection.understood(tried):
            _understand[address] = True
        else:
            connection.close()
            await_store(host, port, deadline, stop)
            connection = opened()
        for key in _dialogue.keys(tried):
            connection.delete(key)
    connection.direct = _understand.setdefault(address, False)
    return connection


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    mine = _opening.acquire(timeout=_TURN_SECS)
    try:
        yield
    finally:
        if mine:
            _opening.release()


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """c10d raises nothing but its own errors; each becomes ours, with what it says."""
    try:
        yield
    except Exception as exc:
        raise BarrierConnectionError(f"{what} ({first_line(exc)})") from exc
