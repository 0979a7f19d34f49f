"""The process group that a DistBarrier is for, its store, and the barrier's number there."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed import Store, TCPStore

from .._errors import BarrierConnectionError, BrokenBarrierError, plural_ranks, told_by
from .._launch import global_ranks, group_store
from .._missing import global_rank, in_job
from .._store.blocking_store import BlockingStore, innermost
from .._store.connecting import NotUnderstood, connect
from .._store.copies import copy_of
from .._store.future import Effort
from .._store.private_loop import PrivateLoop
from .._store.worker import Promise

# How often to look whether connecting was stopped.
_LOOK_UP_SECS = 0.1
# How many barriers each group has had. A group that is gone is forgotten.
_numbers: weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = weakref.WeakKeyDictionary()


class Group:
    """The group of one DistBarrier, and the barrier's number in it.

    Barriers are numbered when they are built, so the order in which ranks connect them does not
    matter. The numbers are apart from torch's own count of groups, so the training may make groups
    in another thread meanwhile.

    :ivar root: the beginning of all keys of this barrier in the group's store
    :ivar global_ranks: of the ranks of a subgroup, in the job
    """

    def __init__(self, given: dist.ProcessGroup | None) -> None:
        self._given = given
        self._numbered: weakref.ref[dist.ProcessGroup] | None = None
        self.rank = 0
        self.size = 1
        self.root = ""
        self.global_ranks: tuple[int, ...] | None = None
        if given is not None or dist.is_initialized():
            self.identify()

    def identify(self) -> None:
        """Find the group; again if the default group may be another by now.

        :raises BarrierConnectionError: there is no default group
        """
        group = self._group
        if self._numbered is None or self._numbered() is not group:
            number = next(_numbers.setdefault(group, itertools.count()))
            self._numbered = weakref.ref(group)
            self.rank, self.size = group.rank(), group.size()
            self.global_ranks = global_ranks(group)
            self.root = f"async_barriers/dist/{number}/"

    def told(self, ranks: tuple[int, ...]) -> str:
        """``ranks 0, 1``, and of a subgroup's ranks ``(global ranks 2, 3)``."""
        return plural_ranks(ranks) + in_job(ranks, self.global_ranks)

    def broken(
        self, name: str, sequence: int, rank: int | None, reason: str, *, in_doubt: bool = False
    ) -> BrokenBarrierError:
        """The error of a call that ``rank`` broke."""
        error = BrokenBarrierError(name, sequence, rank, reason, in_doubt=in_doubt)
        error.global_rank = global_rank(rank, self.global_ranks)
        return error

    def open_store(self, secs: float, given_up: Promise[None]) -> BlockingStore:
        """A connection of our own to the group's store. Blocks, unless it is ``given_up``.

        :raises BarrierConnectionError: it does not answer within ``secs``, or there is none
        """
        store = self._store
        base = innermost(store)
        if isinstance(base, TCPStore):
            # c10d's constructor never returns from a server that is silent.
            _await_answer(base.host, base.port, secs, given_up)
        try:
            return BlockingStore(copy_of(store))
        except Exception as exc:
            raise BarrierConnectionError(f"the store was lost ({told_by(exc)})") from exc

    @property
    def _store(self) -> Store:
        """The group's own handle; make no calls on it."""
        try:
            return group_store(self._group)
        except ValueError as exc:
            raise BarrierConnectionError("the process group has no store") from exc

    @property
    def _group(self) -> dist.ProcessGroup:
        # Keep no reference if it is not ours: destroying the groups of torch must end all of it.
        group = self._given or dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise BarrierConnectionError(
                "a DistBarrier needs a process group: call torch.distributed."
                "init_process_group() first, or give it one"
            )
        return group


def _await_answer(host: str, port: int, secs: float, given_up: Promise[None]) -> None:
    """Block until a store answers there."""
    loop = PrivateLoop()
    greeting = Effort(connect(loop, host, port, loop.now() + secs))
    try:
        while not greeting.done and not given_up.done():
            loop.run(lambda: greeting.done, loop.now() + _LOOK_UP_SECS)
        greeting.stop(BarrierConnectionError("connecting was stopped"))
        greeting.result().close()
    except NotUnderstood:
        pass  # c10d's own client may.
    finally:
        loop.close()
