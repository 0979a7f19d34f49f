"""Where the ranks of a DistBarrier meet: their group, its store, and the barrier's number in it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed import Store

from ._errors import BarrierConnectionError
from ._launch import group_store

# How many barriers each group has had. A group that is gone is forgotten.
_numbers: weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = weakref.WeakKeyDictionary()


class Meeting:
    """The group that one DistBarrier is for, and which of its barriers this one is.

    Barriers are numbered when they are built, so that it does not matter in which order the
    ranks connect them; and apart from torch's own count of groups, so that the training may
    make groups in another thread meanwhile.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._given = group
        self._numbered: weakref.ref[dist.ProcessGroup] | None = None
        self.rank = 0
        self.size = 1
        # What all keys of this barrier in the group's store begin with.
        self.root = ""
        if group is not None or dist.is_initialized():
            self.convene()

    def convene(self) -> None:
        """Find the group; once more if the default group may be another by now.

        :raises BarrierConnectionError: there is no default group
        """
        group = self._group
        if self._numbered is None or self._numbered() is not group:
            number = next(_numbers.setdefault(group, itertools.count()))
            self._numbered = weakref.ref(group)
            self.rank, self.size = group.rank(), group.size()
            self.root = f"async_barriers/dist/{number}/"

    @property
    def store(self) -> Store:
        """The group's own handle of its store; not to be talked through.

        :raises BarrierConnectionError: there is none
        """
        try:
            return group_store(self._group)
        except ValueError as exc:
            raise BarrierConnectionError("the process group has no store") from exc

    @property
    def _group(self) -> dist.ProcessGroup:
        # Not held on to, if it is not ours: whoever tears torch down means all of it.
        group = self._given or dist.group.WORLD
        if group is None:
            raise BarrierConnectionError(
                "a DistBarrier needs a process group: call torch.distributed."
                "init_process_group() first, or give it one"
            )
        return group
