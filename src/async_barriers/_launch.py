"""The rank, the world and the store of this process, from a launcher or a process group."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import Store, distributed_c10d

from ._checks import check_address
from ._store.sources import StoreAt

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launched(NamedTuple):
    """This process's place in the job that a launcher started."""

    store: StoreAt
    rank: int
    world_size: int
    run_id: str | None = None


class Member(NamedTuple):
    """This process's place in a process group.

    :ivar global_ranks: of the group's ranks; None where they are the same
    """

    store: Store
    rank: int
    world_size: int
    global_ranks: tuple[int, ...] | None = None


def from_environment() -> Launched:
    """Read torchrun's environment variables, as `init_process_group` does.

    :raises ValueError: variables are missing, or are no numbers
    """
    if missing := [name for name in _VARIABLES if not os.environ.get(name)]:
        raise ValueError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set in the "
            "environment; start the program with torchrun, set "
            f"{', '.join(_VARIABLES)} on every rank, or give a store to StoreBarrier()"
        )
    rank, world_size, port = _number("RANK"), _number("WORLD_SIZE"), _port()
    # torchrun's agent may host the store itself; then no process of the job does.
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = StoreAt(
        check_address("MASTER_ADDR", os.environ["MASTER_ADDR"]),
        port,
        os.environ.get("USE_LIBUV", "1") == "1",
        hosts=rank == 0 and not agent_hosts,
        # init_process_group() hosts there too.
        shared=True,
    )
    # torchrun's own default is the same for all jobs.
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return Launched(store, rank, world_size, None if run_id in (None, "", "none") else run_id)


def store_from_environment() -> StoreAt:
    """The store of a job that a launcher started, for a process that is none of its ranks.

    :raises ValueError: variables are missing, or are no numbers
    """
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ValueError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set in the "
            "environment; set MASTER_ADDR and MASTER_PORT to those of the job that is to be "
            "observed, or give a store to CommitObserver()"
        )
    host = check_address("MASTER_ADDR", os.environ["MASTER_ADDR"])
    return StoreAt(host, _port(), True, hosts=False)


def _port() -> int:
    port = _number("MASTER_PORT")
    if not 0 <= port <= 65535:
        raise ValueError(f"MASTER_PORT is {port} in the environment; it must be 0 to 65535")
    return port


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as exc:
        raise ValueError(
            f"{name} is {os.environ[name]!r} in the environment; it must be an integer"
        ) from exc


def from_group(group: object) -> Member:
    """Read ``group``, or else the default process group.

    :raises ValueError: there is no such group, it has no store, or this process is not in it
    :raises TypeError: it is no process group
    """
    if group is None:
        if not dist.is_initialized():
            raise ValueError(
                "there is no default process group; call torch.distributed.init_process_group() "
                "first, or use StoreBarrier.from_env()"
            )
        group = dist.group.WORLD
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "this process is not in the process group; build the barrier on its ranks only"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or None, not {group!r}")
    return Member(group_store(group), group.rank(), group.size(), global_ranks(group))


def global_ranks(group: dist.ProcessGroup) -> tuple[int, ...] | None:
    """The numbers of a group's ranks in the job; None where they are the same."""
    try:
        ranks = tuple(dist.get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):
        return None  # A group that torch itself did not make.
    return None if ranks == tuple(range(group.size())) or len(ranks) != group.size() else ranks


def group_store(group: dist.ProcessGroup) -> Store:
    """The store that ``group`` was made with; its keys stand behind the group's own name.

    :raises ValueError: there is none
    """
    # torch's own list also has the store of a backend that is written in Python. Such a backend
    # cannot give it, but the list has only groups that torch itself made.
    try:
        store: Store | None = distributed_c10d._get_process_group_store(group)
    except KeyError:
        store = group.get_group_store()
    if store is None:
        raise ValueError("the process group has no store; give one to StoreBarrier()")
    return store
