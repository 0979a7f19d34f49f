"""Barriers over torch's stores: StoreBarrier and TCPStoreBarrier."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, TypeVar

from torch.distributed import ProcessGroup, Store

from . import _launch
from ._client.barrier import CrossingBarrier
from ._config import register_barrier
from ._store.sources import PassedIn, Source, StoreAt
from ._values import BarrierProgress

StoreBarrierT = TypeVar("StoreBarrierT", bound="StoreBarrier")


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
    :param stalled_after_secs: a phase also breaks, with `BarrierTimeoutError`, when a missing rank
        has shown no progress for so many seconds: it has neither entered nor said anything new by
        `report`. Where ranks are slow, give this and a long ``timeout_secs``, or none
    :param warn_after_secs: a waiting rank reports after this long, and again each such
        period; None for no reports
    :param on_progress: called with each report, on the event loop; keep it short
    :param run_id: a name for this run of the job; processes that give another one are refused,
        and not taken for a restart
    :param worker_threads: have c10d's own client make the calls, in threads, also where the store
        is a TCPStore, which can be spoken to without blocking; slower, all promises hold. The
        environment variable ``ASYNC_BARRIERS_WORKER_THREADS=1`` does the same
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
        stalled_after_secs: float | None = None,
        warn_after_secs: float | None = 30.0,
        on_progress: Callable[[BarrierProgress], object] | None = None,
        run_id: str | None = None,
        worker_threads: bool = False,
    ) -> None:
        source: Source
        if isinstance(store, StoreAt):
            source = store
            if worker_threads:
                store.use_threads()
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

        No port is opened and no collective is run: the barrier has connections of its own to
        the group's store, and may be awaited while the group is in use, whatever its backend.
        Barriers of different groups are independent, also where their prefixes are the same.

        :param group: None for the default group. Ranks, here and in results and errors, are
            those within the group. -100 is what `new_group` returns on a rank that is not in the
            group, and is refused.
        :param prefix: and what follows, as for `StoreBarrier`
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
        """A barrier for all ranks of a job that torchrun started; needs no process group.

        Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as `init_process_group` does, and
        connects to the same store. Where torchrun's agent hosts it (it sets
        TORCHELASTIC_USE_AGENT_STORE=True), every rank is a client. Elsewhere rank 0 hosts it
        from when it connects, together with whoever hosts it in the same process already or
        later: `init_process_group`, another barrier. Rank 0's `aclose` then is the last one.
        torchrun's name of the run is the ``run_id``, unless one is given.

        :param prefix: and what follows, as for `StoreBarrier`
        :raises ValueError: variables are missing, and which, or a value is not allowed
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

    Takes the parameters of torch's own class of this name; here each takes effect.

    :param global_rank: of this process, 0 to ``global_world_size`` - 1
    :param global_world_size: how many ranks have to enter
    :param barrier_prefix: non-empty; part of the keys in the store
    :param timeout_barrier_init_secs: how long, in seconds, to wait for rank 0 to host
    :param use_checkpoint_barrier_tcpstore_libuv: whether the store's server uses libuv
    :param tcpstore_port: 0 to 65535; 0, a free port, makes sense in a world of one only
    :param master_address: where rank 0 is
    :param timeout_secs: the deadline of each crossing, in seconds; None for none
    :param stalled_after_secs: as in `StoreBarrier`
    :param warn_after_secs: as in `StoreBarrier`
    :param on_progress: as in `StoreBarrier`
    :param run_id: as in `StoreBarrier`
    :param worker_threads: as in `StoreBarrier`
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
        stalled_after_secs: float | None = None,
        warn_after_secs: float | None = 30.0,
        on_progress: Callable[[BarrierProgress], object] | None = None,
        run_id: str | None = None,
        worker_threads: bool = False,
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
        own_store = StoreAt(
            master_address,
            _checked_port(tcpstore_port),
            use_checkpoint_barrier_tcpstore_libuv,
            hosts=global_rank == 0,
            worker_threads=worker_threads,
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
