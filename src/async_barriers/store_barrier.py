"""Barriers over torch's stores: StoreBarrier and TCPStoreBarrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ClassVar

from torch.distributed import Store, TCPStore

from . import _connection
from ._barrier import check_timeout, check_world
from ._config import register_barrier
from ._connection import Connection
from ._crossing import CrossingBarrier
from ._keys import Keys, check_prefix
from ._lane import Open
from ._session import Session
from ._values import BarrierProgress


@register_barrier
class StoreBarrier(CrossingBarrier):
    """A barrier over any torch store: TCPStore, PrefixStore, HashStore, FileStore or one in Python.

    The store keeps its own timeout and its own connection; the barrier opens others.

    :param store: leads to the same data on every rank
    :param rank: of this process, 0 to ``world_size`` - 1; each rank is one process's alone
    :param world_size: how many ranks have to enter
    :param prefix: barriers of different prefixes on one store are independent
    :param timeout_secs: the deadline of each crossing, in seconds; None for none
    :param timeout_barrier_init_secs: how long, in seconds, connecting may take, and how long
        a rank that was restarted waits for its peers to join again
    :param warn_after_secs: a waiting rank reports after this long, and again each such
        period; None for no reports
    :param on_progress: called with each report, on the event loop; keep it short
    :raises TypeError, ValueError: an argument is not what is allowed
    """

    barrier_type: ClassVar[str] = "store"

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        prefix: str = "barrier",
        timeout_secs: float | None = 600.0,
        timeout_barrier_init_secs: float = 60.0,
        warn_after_secs: float | None = 30.0,
        on_progress: Callable[[BarrierProgress], object] | None = None,
    ) -> None:
        if not isinstance(store, Store):
            raise TypeError(f"store must be a torch.distributed.Store, not {store!r}")
        session = _checked_session(
            lambda deadline, stop: _connection.connect_to(store, deadline, stop),
            rank,
            world_size,
            prefix,
            timeout_barrier_init_secs,
        )
        super().__init__(session, prefix, timeout_secs, warn_after_secs, on_progress)


@register_barrier
class TCPStoreBarrier(CrossingBarrier):
    """A barrier over a TCPStore of its own, which rank 0 hosts while its barrier is open.

    Takes the parameters of torch's own class of this name; here each takes effect.

    :param global_rank: of this process, 0 to ``global_world_size`` - 1
    :param global_world_size: how many ranks have to enter
    :param barrier_prefix: non-empty; part of the keys in the store
    :param timeout_barrier_init_secs: how long, in seconds, to wait for rank 0 to host
    :param use_checkpoint_barrier_tcpstore_libuv: whether the store's server uses libuv
    :param tcpstore_port: 0 to 65535; 0, a free port, makes sense in a world of one only
    :param master_address: where rank 0 is
    :param timeout_secs: the deadline of each crossing, in seconds; None for none
    :param warn_after_secs: as in `StoreBarrier`
    :param on_progress: as in `StoreBarrier`
    :raises TypeError, ValueError: an argument is not what is allowed
    """

    barrier_type: ClassVar[str] = "tcp_store"

    def __init__(
        self,
        global_rank: int,
        global_world_size: int,
        barrier_prefix: str = "barrier",
        timeout_barrier_init_secs: float = 60.0,
        use_checkpoint_barrier_tcpstore_libuv: bool = True,
        tcpstore_port: int = 29511,
        master_address: str = "localhost",
        timeout_secs: float | None = 600.0,
        *,
        warn_after_secs: float | None = 30.0,
        on_progress: Callable[[BarrierProgress], object] | None = None,
    ) -> None:
        if not isinstance(use_checkpoint_barrier_tcpstore_libuv, bool):
            raise TypeError(
                "use_checkpoint_barrier_tcpstore_libuv must be True or False, not "
                f"{use_checkpoint_barrier_tcpstore_libuv!r}"
            )
        if not (isinstance(master_address, str) and master_address):
            raise ValueError(
                f"master_address is {master_address!r}; it must be a host name or an IP address"
            )
        own_store = _OwnStore(
            master_address, _checked_port(tcpstore_port), use_checkpoint_barrier_tcpstore_libuv
        )
        session = _checked_session(
            own_store.host_and_connect if global_rank == 0 else own_store.connect,
            global_rank,
            global_world_size,
            barrier_prefix,
            timeout_barrier_init_secs,
            hosts=global_rank == 0,
        )
        super().__init__(session, barrier_prefix, timeout_secs, warn_after_secs, on_progress)
        self._own_store = own_store

    def _let_go(self) -> None:
        self._own_store.server = None


class _OwnStore:
    """Where the store of a TCPStoreBarrier is; on rank 0, the server itself."""

    def __init__(self, host: str, port: int, use_libuv: bool) -> None:
        self._address = (host, port, use_libuv)
        self._lock = threading.Lock()
        self.server: TCPStore | None = None

    def connect(self, deadline: float, stop: threading.Event) -> Connection:
        return _connection.connect_to_port(*self._address, deadline, stop)

    def host_and_connect(self, deadline: float, stop: threading.Event) -> Connection:
        with self._lock:
            if self.server is None:
                self.server = _connection.host_store(*self._address)
            server = self.server
        return _connection.clone_tcp(server)


def _checked_session(
    open_connection: Open,
    rank: int,
    world_size: int,
    prefix: str,
    timeout_barrier_init_secs: float,
    *,
    hosts: bool = False,
) -> Session:
    check_world(rank, world_size)
    check_prefix(prefix)
    init_secs = check_timeout("timeout_barrier_init_secs", timeout_barrier_init_secs)
    if init_secs is None:
        raise TypeError("timeout_barrier_init_secs must be a number of seconds, not None")
    return Session(
        open_connection, Keys(prefix), rank, world_size, init_secs=init_secs, hosts=hosts
    )


def _checked_port(port: int) -> int:
    try:
        if isinstance(port, bool | float):
            raise TypeError(port)
        number = int(port)
    except (TypeError, ValueError) as exc:
        raise TypeError(f"tcpstore_port must be an integer, not {port!r}") from exc
    if not 0 <= number <= 65535:
        raise ValueError(f"tcpstore_port is {port}; it must be 0 to 65535")
    return number
