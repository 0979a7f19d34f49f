"""A process group, and its collectives on bytes and numbers. A rank can give up each of them."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from .._errors import BarrierConnectionError, told_by
from .._store.worker import Promise
from .arrivals import ArrivalLog
from .departures import Gone, Lookout
from .gloo import make_group
from .group import Group

# Nothing wakes a thread that waits for gloo, so it looks this often whether it may end. It learns
# of the collective's end at once.
_LOOK_UP = timedelta(milliseconds=250)
# gloo's operations must outlast every deadline: one that times out kills the group.
_FOREVER = timedelta(days=365)

# Whether a collective cannot end without a rank that is gone.
Hopeless = Callable[[Gone], bool]


class Backend:
    """The collectives block, and raise these errors:

    :raises BarrierConnectionError: the group failed, or it was given up
    :raises Departed: it cannot end without a rank that has left; see `Hopeless`
    """

    def __init__(self, group: Group, log: ArrivalLog, given: dist.ProcessGroup | None) -> None:
        self._group = group
        self._log = log
        self._own = given is None
        # A ProcessGroup or, for ours, a bare backend that is not in torch's own list of groups.
        # torch's stubs have no common type of the two.
        self._backend: Any = given
        # Made only once: a group that was lost is not made again.
        self._made = given is not None
        self._given_up: Promise[None] = Promise()
        self._stuck = False

    def connect(self) -> None:
        """Make the group, unless one was given; blocks until every rank does."""
        if not self._made:
            with _translated():
                self._backend = make_group(self._group, self._log, self._given_up)
            self._made = True

    def give_up(self) -> None:
        """From any thread: stop waiting for peers that may never come."""
        self._given_up.settle()

    def let_go(self) -> None:
        """End the use of the group."""
        backend, self._backend = self._backend, None
        if self._stuck:
            # Its destructor would wait for the collective, and so would the interpreter's exit. One
            # extra reference keeps it from running.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))
        # Ours ends with its last reference, here and not on an event loop, since that takes a
        # while.
        del backend

    def forsake(self) -> None:
        """In a forked child: it is the parent's, and its destructor needs the parent's threads."""
        self._stuck = True
        self.let_go()

    def maxima(self, values: Sequence[int], hopeless: Hopeless) -> list[int]:
        """The maximum over all ranks of each of the values."""
        tensor = self._numbers(values)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        options.timeout = _FOREVER
        self._make(lambda backend: backend.allreduce([tensor], options), hopeless)
        return [int(value) for value in tensor.tolist()]

    def all_gather(self, payload: bytes, hopeless: Hopeless) -> tuple[bytes, ...]:
        """The payloads of all ranks."""
        brought = self._padded(payload, hopeless)
        found = [torch.empty_like(brought) for _ in range(self._group.size)]
        options = AllgatherOptions()
        options.timeout = _FOREVER
        self._make(lambda backend: backend.allgather([found], [brought], options), hopeless)
        return tuple(map(_unpadded, found))

    def gather(self, payload: bytes, leader: int, hopeless: Hopeless) -> dict[int, bytes]:
        """The payloads of all ranks, on the ``leader`` alone."""
        brought = self._padded(payload, hopeless)
        leads = leader == self._group.rank
        found = [[torch.empty_like(brought) for _ in range(self._group.size)]] if leads else []
        options = dist.GatherOptions()
        options.rootRank, options.timeout = leader, _FOREVER
        self._make(lambda backend: backend.gather(found, [brought], options), hopeless)
        return dict(enumerate(map(_unpadded, found[0]))) if leads else {}

    def share(
        self, source: int, numbers: Sequence[int], message: bytes, hopeless: Hopeless
    ) -> tuple[list[int], bytes]:
        """The message of the ``source``, on all ranks."""
        head = self._numbers([*numbers, len(message)])
        self._broadcast(head, source, hopeless)
        *said, size = map(int, head.tolist())
        # gloo has no empty messages, and only the source has more to say.
        body = self._bytes(message.ljust(max(1, size), b"\0"))
        self._broadcast(body, source, hopeless)
        return said, body.cpu().numpy().tobytes()[:size]

    def _broadcast(self, tensor: torch.Tensor, source: int, hopeless: Hopeless) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = source, 0, _FOREVER
        self._make(lambda backend: backend.broadcast([tensor], options), hopeless)

    def _make(self, collective: Callable[[Any], dist.Work], hopeless: Hopeless) -> None:
        """Begin it, and wait for its end."""
        lookout = Lookout(self._log.gone, hopeless)
        try:
            with _translated():
                self._wait_for(collective(self._backend), lookout)
        except BarrierConnectionError:
            # A rank that leaves closes its connections, as one that dies does.
            if not self._given_up.done():
                lookout.look_now()
            raise

    def _wait_for(self, work: dist.Work, lookout: Lookout) -> None:
        self._stuck = True
        while not _has_ended(work):
            if self._given_up.done():
                raise BarrierConnectionError("the collective was stopped")
            lookout.look()
        self._stuck = False
        try:
            # Returns at once; raises if it failed.
            work.wait()
        except RuntimeError:
            # The group is of no more use. If it is ours it ends here, and so the peers that wait
            # for us learn of it. The error's traceback would keep the work, which keeps the group.
            self._backend = None
            del work
            raise

    def _padded(self, payload: bytes, hopeless: Hopeless) -> torch.Tensor:
        # Each message stands behind its length, and is padded to the longest.
        (longest,) = self.maxima([len(payload)], hopeless)
        return self._bytes(len(payload).to_bytes(8, "big") + payload.ljust(longest, b"\0"))

    def _numbers(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _bytes(self, value: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(value), dtype=torch.uint8).to(self._device)

    @property
    def _device(self) -> torch.device:
        # The CPU if the group serves it; a group that we were given may serve GPUs alone.
        kinds = [torch.device("cpu")] if self._own else self._backend._device_types
        return next((kind for kind in kinds if kind.type == "cpu"), kinds[0])


def _unpadded(tensor: torch.Tensor) -> bytes:
    piece = tensor.cpu().numpy().tobytes()
    return piece[8 : 8 + int.from_bytes(piece[:8], "big")]


def _has_ended(work: dist.Work) -> bool:
    """Wait a moment for it."""
    with contextlib.suppress(RuntimeError):
        work.wait(_LOOK_UP)
    return work.is_completed()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """torch's errors become ours."""
    try:
        yield
    except RuntimeError as exc:
        raise BarrierConnectionError(
            f"the process group failed ({told_by(exc)}); see whether a peer died"
        ) from exc
