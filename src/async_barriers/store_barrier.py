"""Barriers over torch's stores: StoreBarrier and TCPStoreBarrier."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, TypeVar

from torch.distributed import ProcessGroup, Store

from . import _launch
from ._checks import check_address, check_flag
from ._client.barrier import CrossingBarrier
from ._config import register_barrier
from ._store.sources import PassedIn, Source, StoreAt
from ._values import BarrierProgress

StoreBarrierT = TypeVar("StoreBarrierT", bound="StoreBarrier")


@register_barrier
class StoreBarrier(CrossingBarrier):
    """A barrier over any torch store: TCPStore, PrefixStore, HashStore, FileStore or one in Python.

    The store keeps its own timeout and its own connection. The barrier opens others.

    :param store: leads to the same data on every rank
    :param rank: of this process, 0 to ``world_size`` - 1; a rank belongs to one process
    :param world_size: how many ranks have to enter
    :param prefix: barriers of different prefixes on one store are independent
    :param timeout_secs: the deadline of each crossing, in seconds; None for no deadline
    :param timeout_barrier_init_secs: how long, in seconds, connecting may take, and how long a
        restarted rank waits for its peers to join again
    :param stalled_after_secs: a phase also breaks, with `BarrierTimeoutError`, when a missing rank
        has shown no progress for so many seconds: it has neither entered nor said anything new by
        `report`. If ranks may be slow, give this and a long ``timeout_secs``, or None
    :param warn_after_secs: a waiting rank reports after so many seconds, and again after each such
        period; None for no reports
    :param on_progress: called with each report, on the event loop; keep it short
    :param run_id: a name for this run of the job. A process that gives another one is refused, and
        is not taken for a restart
    :param worker_threads: have c10d's own client make all calls, in threads. Otherwise the library
        speaks to a TCPStore itself, without blocking. Threads are slower; all promises hold. The
        environment variable ``ASYNC_BARRIERS_WORKER_THREADS=1`` does the same
    :raises TypeError, ValueError: an argument is not allowed
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
        stalled_after_secs: float | None = None,
        warn_after_secs: float | None = 30.0,
        on_progress: Callable[[BarrierProgress], object] | None = None,
        run_id: str | None = None,
        worker_threads: bool = False,
    ) -> None:
        check_flag("worker_threads", worker_threads)
        source: Source
        if isinstance(store, StoreAt):
            source = store
            if worker_threads:
                store.threads = True
        elif isinstance(store, Store):
            source = PassedIn(store, worker_threads)
        else:
            raise TypeError(f"store must be a torch.distributed.Store, not {store!r}")
        super().__init__(
            source,
            rank,
            world_size,
            prefix,
            timeout_barrier_init_secs,
            timeout_secs,
            warn_after_secs,
            on_progress,
            run_id,
            stalled_after_secs,
        )

    @classmethod
    def from_process_group(
        cls: type[StoreBarrierT],
        group: ProcessGroup | Literal[-100] | None = None,
        *,
        prefix: str = "barrier",
        timeout_secs: float | None = 600.0,
        timeout_barrier_init_secs: float = 60.0,
        stalled_after_secs: float | None = None,
        warn_after_secs: float | None = 30.0,
        on_progress: Callable[[BarrierProgress], object] | None = None,
        run_id: str | None = None,
        worker_threads: bool = False,
    ) -> StoreBarrierT:
        """A barrier for the ranks of a process group, over the store that the group met at.

        It opens no port and runs no collective. It has its own connections to the group's store, so
        you may await it while the group is in use, with any backend. Barriers of different groups
        are independent, also if their prefixes are the same.

        :param group: None for the default group. Ranks, here and in results and errors, are those
            within the group. -100 is what `new_group` returns on a rank that is not in the group,
            and is refused.
        :param prefix: as for `StoreBarrier`, and so are the parameters after it
        :raises ValueError: there is no default group, this process is not in ``group``, or an
            argument's value is not allowed
        :raises TypeError: ``group`` is no process group, or an argument has a wrong type
        """
        member = _launch.from_group(group)
        barrier = cls(
            member.store,
            rank=member.rank,
            world_size=member.world_size,
            prefix=prefix,
            timeout_secs=timeout_secs,
            timeout_barrier_init_secs=timeout_barrier_init_secs,
            stalled_after_secs=stalled_after_secs,
            warn_after_secs=warn_after_secs,
            on_progress=on_progress,
            run_id=run_id,
            worker_threads=worker_threads,
        )
        barrier._watch = barrier._watch._replace(global_ranks=member.global_ranks)
        return barrier

    @classmethod
    def from_env(
        cls: type[StoreBarrierT],
        *,
        prefix: str = "barrier",
        timeout_secs: float | None = 600.0,
        timeout_barrier_init_secs: float = 60.0,
        stalled_after_secs: float | None = None,
        warn_after_secs: float | None = 30.0,
        on_progress: Callable[[BarrierProgress], object] | None = None,
        run_id: str | None = None,
        worker_threads: bool = False,
    ) -> StoreBarrierT:
        """A barrier for all ranks of a job that torchrun started. It needs no process group.

        It reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as `init_process_group` does, and
        connects to the same store. If torchrun's agent hosts the store (it sets
        TORCHELASTIC_USE_AGENT_STORE=True), every rank is a client. Otherwise rank 0 hosts it from
        when it connects, and shares it with `init_process_group` and other barriers of the same
        process. Then rank 0's `aclose` is the last one. torchrun's name of the run is the
        ``run_id``, unless you give one.

        :param prefix: as for `StoreBarrier`, and so are the parameters after it
        :raises ValueError: variables are missing (it names them), or a value is not allowed
        :raises TypeError: an argument has a wrong type
        """
        launched = _launch.from_environment()
        return cls(
            launched.store,  # type: ignore[arg-type]  # a store that is not there yet
            rank=launched.rank,
            world_size=launched.world_size,
            prefix=prefix,
            timeout_secs=timeout_secs,
            timeout_barrier_init_secs=timeout_barrier_init_secs,
            stalled_after_secs=stalled_after_secs,
            warn_after_secs=warn_after_secs,
            on_progress=on_progress,
            run_id=launched.run_id if run_id is None else run_id,
            worker_threads=worker_threads,
        )


@register_barrier
class TCPStoreBarrier(CrossingBarrier):
    """A barrier over a TCPStore of its own, which rank 0 hosts while its barrier is open.

    It takes the parameters of torch's own class of this name. Here each takes effect.

    :param global_rank: of this process, 0 to ``global_world_size`` - 1
    :param global_world_size: how many ranks have to enter
    :param barrier_prefix: not empty; part of the keys in the store
    :param timeout_barrier_init_secs: how long, in seconds, to wait for rank 0 to host
    :param use_checkpoint_barrier_tcpstore_libuv: whether the store's server uses libuv
    :param tcpstore_port: 0 to 65535; 0, a free port, is useful only in a world of one
    :param master_address: where rank 0 is
    :param timeout_secs: the deadline of each crossing, in seconds; None for no deadline
    :param stalled_after_secs: as in `StoreBarrier`
    :param warn_after_secs: as in `StoreBarrier`
    :param on_progress: as in `StoreBarrier`
    :param run_id: as in `StoreBarrier`
    :param worker_threads: as in `StoreBarrier`
    :raises TypeError, ValueError: an argument is not allowed
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
        stalled_after_secs: float | None = None,
        warn_after_secs: float | None = 30.0,
        on_progress: Callable[[BarrierProgress], object] | None = None,
        run_id: str | None = None,
        worker_threads: bool = False,
    ) -> None:
        own_store = StoreAt(
            check_address("master_address", master_address),
            _checked_port(tcpstore_port),
            check_flag(
                "use_checkpoint_barrier_tcpstore_libuv", use_checkpoint_barrier_tcpstore_libuv
            ),
            hosts=global_rank == 0,
            worker_threads=check_flag("worker_threads", worker_threads),
        )
        super().__init__(
            own_store,
            global_rank,
            global_world_size,
            barrier_prefix,
            timeout_barrier_init_secs,
            timeout_secs,
            warn_after_secs,
            on_progress,
            run_id,
            stalled_after_secs,
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
