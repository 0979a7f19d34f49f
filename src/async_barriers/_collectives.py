"""The collectives that a DistBarrier is made of, each waited for in a thread of our own."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ._errors import BarrierConnectionError
from ._worker import Promise, Worker, end_at_exit

T = TypeVar("T")

# gloo cannot be woken, so a thread that waits for it looks up this often to see whether it
# may end. It learns of the collective's own end at once.
_LOOK_UP = timedelta(milliseconds=250)
# Our own group's operations must outlast every deadline: one that times out kills the group.
_FOREVER = timedelta(days=365)


class DifferentLeaders(Exception):
    """The ranks of one commit named different leaders; all of them know it."""

    def __init__(self, leaders: tuple[int, ...]) -> None:
        super().__init__(f"the ranks named different leaders of a commit: {leaders}")


class Collectives:
    """One process group, and the thread that waits for it. The calls block; see `submit`."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._own = group is None
        self._group = group
        self._abandoned = threading.Event()
        self._stuck = False
        self._worker = Worker()
        self.ended = self._worker.ended
        end_at_exit(self)

    def submit(self, call: Callable[[], T]) -> Promise[T]:
        """Have the thread make ``call`` after those submitted before."""
        try:
            return self._worker.submit(lambda: _translated(call))
        except RuntimeError as exc:
            refused: Promise[T] = Promise()
            refused.settle(error=BarrierConnectionError(f"the group was let go ({exc})"))
            return refused

    @property
    def connected(self) -> bool:
        return self._group is not None

    @property
    def rank(self) -> int:
        return dist.get_rank(self._group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self._group)

    def connect(self) -> None:
        """Make the group, unless one was given; blocks until every rank does."""
        if self._group is not None:
            return
        if not dist.is_initialized():
            raise BarrierConnectionError(
                "a DistBarrier needs a process group: call torch.distributed."
                "init_process_group() first, or give it one"
            )
        # gloo, whatever the default group is: this one must never touch a GPU, nor stand
        # between the collectives of the training.
        self._group = dist.new_group(backend="gloo", timeout=_FOREVER)

    def cross(self, abort: bool) -> int | None:
        """Wait until every rank has called it; a rank that aborts, if there is one."""
        flag = self._tensor([self.rank + 1 if abort else 0])
        self._wait(dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True))
        return int(flag.item()) - 1 if flag.item() else None

    def gather(self, payload: bytes, leader: int) -> dict[int, bytes]:
        """Wait until every rank has called it; what all brought, on the leader."""
        facts = [self._tensor([0, 0]) for _ in range(self.size)]
        mine = self._tensor([len(payload), leader])
        self._wait(dist.all_gather(facts, mine, group=self._group, async_op=True))
        sizes, leaders = zip(*(fact.tolist() for fact in facts), strict=True)
        if len(set(leaders)) > 1:
            raise DifferentLeaders(leaders)
        longest = max(1, *sizes)
        brought = self._bytes(payload.ljust(longest, b"\0"))
        found = [torch.empty_like(brought) for _ in sizes] if self.rank == leader else None
        self._wait(dist.gather(brought, found, group=self._group, group_dst=leader, async_op=True))
        return {
            rank: tensor.cpu().numpy().tobytes()[: sizes[rank]]
            for rank, tensor in enumerate(found or ())
        }

    def tell(self, published: bool, message: bytes) -> None:
        """The leader's word to all others."""
        self._share(self._tensor([published, len(message)]), self.rank)
        self._share(self._bytes(message or b"\0"), self.rank)

    def hear(self, leader: int) -> tuple[bool, bytes]:
        """What the leader tells."""
        head = self._tensor([0, 0])
        self._share(head, leader)
        published, size = head.tolist()
        message = self._bytes(b"\0" * max(1, size))
        self._share(message, leader)
        return bool(published), message.cpu().numpy().tobytes()[:size]

    def give_up(self) -> None:
        """From any thread: stop waiting for a collective that may never end."""
        self._abandoned.set()

    def retire(self) -> None:
        """Let go of the group, after the calls already submitted, and end the thread."""
        self._worker.retire(self._let_go)

    def end(self, deadline: float) -> None:
        """Leave before the interpreter does; see `_worker.end_at_exit`."""
        self.give_up()
        self.retire()
        self.ended.wait(deadline - time.monotonic())

    def _share(self, tensor: torch.Tensor, source: int) -> None:
        self._wait(dist.broadcast(tensor, group=self._group, group_src=source, async_op=True))

    def _wait(self, work: dist.Work | None) -> None:
        assert work is not None
        self._stuck = True
        while not _has_ended(work):
            if self._abandoned.is_set():
                raise BarrierConnectionError("the collective was given up")
        # Returns at once; raises if it failed.
        work.wait()
        self._stuck = False

    def _let_go(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        if self._stuck:
            # Its destructor would wait for the collective, and so would the interpreter's
            # exit: one reference too many keeps it from ever being run.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        elif self._own and dist.is_initialized():
            dist.destroy_process_group(group)

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _bytes(self, value: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(value), dtype=torch.uint8).to(self._device)

    @property
    def _device(self) -> torch.device:
        # The CPU where the group serves it; a group we were given may be a GPU's alone.
        assert self._group is not None
        kinds: list[torch.device] = self._group._device_types
        return next((kind for kind in kinds if kind.type == "cpu"), kinds[0])


def _has_ended(work: dist.Work) -> bool:
    """Wait a moment for it."""
    with contextlib.suppress(RuntimeError):
        work.wait(_LOOK_UP)
    return work.is_completed()


def _translated(call: Callable[[], T]) -> T:
    """torch's errors become ours."""
    try:
        return call()
    except RuntimeError as exc:
        line = str(exc).partition("\n")[0]
        raise BarrierConnectionError(
            f"the process group failed ({line}); see whether a peer died"
        ) from exc
