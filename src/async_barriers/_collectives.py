"""The collectives that a DistBarrier is made of, each waited for in a thread of our own."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ._connecting import connect_to
from ._connection import Connection
from ._errors import BarrierConnectionError
from ._meeting import Meeting
from ._worker import Promise, Worker, end_at_exit, wait_for_ends

T = TypeVar("T")
# Whether the leader published, and what it returned or why it failed.
Word = tuple[bool, bytes]

# gloo cannot be woken, so a thread that waits for it looks up this often to see whether it
# may end. It learns of the collective's own end at once.
_LOOK_UP = timedelta(milliseconds=250)
# gloo's own operations must outlast every deadline: one that times out kills the group.
_FOREVER = timedelta(days=365)
# The group's store answered when that was made.
_INIT_SECS = 5.0
# How exactly ranks tell each other when they came; below the clocks' own differences.
_TICK_SECS = 1e-3
_CROSSING = 0


class Aborted(Exception):
    """A rank used up its turn by giving it up; all of them know it."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(reason)
        self.rank = rank


class DifferentCalls(Exception):
    """The ranks did not all make the same call; all of them know it."""

    def __init__(self, one: int, other: int) -> None:
        first, second = _described(one), _described(other)
        super().__init__(f"the ranks made different calls, among them {first} and {second}")


class Collectives:
    """One process group, and the thread that waits for it. The calls block; see `submit`."""

    def __init__(self, meeting: Meeting, group: dist.ProcessGroup | None) -> None:
        self._meeting = meeting
        self._own = group is None
        # A ProcessGroup or, for ours, a bare backend that torch's own list of groups does
        # not know: torch's stubs have no name for what is common to them.
        self._group: Any = group
        # Once only: a group that was lost is not made again.
        self._formed = group is not None
        self._connection: Connection | None = None
        self._word: Promise[Word] | None = None
        self._abandoned = threading.Event()
        self._stuck = False
        # When the call under way was made; see `Call`.
        self.came: float = 0.0
        self._worker = Worker()
        self.ended = self._worker.ended
        end_at_exit(self)

    def submit(self, call: Callable[[], T], promise: Promise[T] | None = None) -> Promise[T]:
        """Have the thread make ``call`` after those submitted before; see `Worker.submit`."""
        told: Promise[T] = promise or Promise()
        try:
            self._worker.submit(call, told)
        except RuntimeError as exc:
            told.settle(error=BarrierConnectionError(f"the group was let go ({exc})"))
        return told

    def connect(self) -> None:
        """Make the group, unless one was given; blocks until every rank does."""
        if not self._formed:
            with _translated():
                self._group = self._made()
            self._formed = True

    def cross(self) -> int:
        """Wait until every rank has called it; the rank that came last."""
        return self._meet(_CROSSING)

    def abort(self, reason: str) -> None:
        """Tell all ranks, once they have entered."""
        with contextlib.suppress(Aborted):
            self._meet(self._meeting.size + 1, reason)

    def lead(
        self, payload: bytes, gathered: Promise[dict[int, bytes]], word: Promise[Word]
    ) -> dict[int, bytes]:
        """Wait until every rank has called it or `follow`, and then for ``word``, to tell it.

        :param gathered: told what all brought
        """
        brought = self._gather(payload, self._meeting.rank)
        self._word = word
        gathered.settle(brought)
        self._tell(*word.result(None))
        return brought

    def follow(self, payload: bytes, leader: int) -> Word:
        """Bring ``payload``; the leader's word."""
        self._gather(payload, leader)
        # At once, so that the leader can tell and leave, whatever our event loop is doing.
        return self._hear(leader)

    def give_up(self) -> None:
        """From any thread: stop waiting for peers that may never come."""
        self._abandoned.set()
        if (connection := self._connection) is not None:
            connection.stop_waiting()

    def abandon(self) -> None:
        """From any thread: give up the leader's word, and a store that does not answer."""
        self.give_up()
        if (word := self._word) is not None:
            word.settle((False, b"the leader left"))
        if (connection := self._connection) is not None:
            connection.interrupt()

    def retire(self) -> None:
        """Let go of the group, after the calls already submitted, and end the thread."""
        self._worker.retire(self._let_go)

    def end(self, deadline: float) -> None:
        """Leave before the interpreter does; see `_worker.end_at_exit`."""
        self.give_up()
        self.retire()
        wait_for_ends([self.ended], deadline, self.abandon)

    def _made(self) -> dist.ProcessGroupGloo:
        meeting, deadline = self._meeting, time.monotonic() + _INIT_SECS
        # Over a connection of our own, since a wait stalls all others who talk through the same.
        self._connection = connect_to(meeting.store, deadline, self._abandoned)
        if self._connection.add(meeting.root + "joined", 1) == meeting.size:
            self._connection.set(meeting.root + "complete", b"1")
        if self._abandoned.is_set():
            raise BarrierConnectionError("connecting was given up")
        # gloo's own waiting for the others could not be called off.
        self._connection.await_value(meeting.root + "complete")
        # gloo, whatever the default group is: this one must never touch a GPU, nor stand
        # between the collectives of the training.
        store = dist.PrefixStore(meeting.root + "gloo", self._connection.store)
        return dist.ProcessGroupGloo(store, meeting.rank, meeting.size, _FOREVER)

    def _meet(self, call: int, reason: str = "") -> int:
        """How every call begins, so that calls of different kinds find out that they are.

        :param call: 0 for a crossing, or one more than the leader of a commit; an abort is more
            than any of them
        :return: the rank that came last
        """
        rank, size = self._meeting.rank, self._meeting.size
        # The largest of these tells who came last among those with the largest call. gloo sends
        # round a message for each number, so that there are no more than two.
        ticks = 1 << (62 - 2 * (size + 1).bit_length())
        came = int(self.came / _TICK_SECS) % ticks
        highest, lowest = self._largest((call * ticks + came) * size + rank, -call)
        highest, last = divmod(highest, size)
        highest, lowest = highest // ticks, -lowest
        if highest > size:
            if call > size and last == rank:
                self._tell(False, reason.encode())
            else:
                reason = self._hear(last)[1].decode()
            raise Aborted(last, reason)
        if highest != lowest:
            raise DifferentCalls(lowest, highest)
        return last

    def _largest(self, *values: int) -> list[int]:
        """Of each of the values that the ranks have."""
        largest = self._tensor(list(values))
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        options.timeout = _FOREVER
        self._make(lambda group: group.allreduce([largest], options))
        return [int(value) for value in largest.tolist()]

    def _gather(self, payload: bytes, leader: int) -> dict[int, bytes]:
        # A payload comes behind its length and is filled up to the longest.
        self._meet(leader + 1)
        size = len(payload).to_bytes(8, "big")
        (longest,) = self._largest(len(payload))
        brought = self._bytes(size + payload.ljust(longest, b"\0"))
        leads = leader == self._meeting.rank
        found = [torch.empty_like(brought) for _ in range(self._meeting.size)] if leads else []
        options = dist.GatherOptions()
        options.rootRank, options.timeout = leader, _FOREVER
        self._make(lambda group: group.gather([found] if leads else [], [brought], options))
        pieces = [tensor.cpu().numpy().tobytes() for tensor in found]
        return {
            rank: piece[8 : 8 + int.from_bytes(piece[:8], "big")]
            for rank, piece in enumerate(pieces)
        }

    def _tell(self, published: bool, message: bytes) -> None:
        self._share(self._tensor([published, len(message)]), self._meeting.rank)
        self._share(self._bytes(message or b"\0"), self._meeting.rank)

    def _hear(self, source: int) -> Word:
        head = self._tensor([0, 0])
        self._share(head, source)
        published, size = head.tolist()
        message = self._bytes(b"\0" * max(1, size))
        self._share(message, source)
        return bool(published), message.cpu().numpy().tobytes()[:size]

    def _share(self, tensor: torch.Tensor, source: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = source, 0, _FOREVER
        self._make(lambda group: group.broadcast([tensor], options))

    def _make(self, collective: Callable[[Any], dist.Work]) -> None:
        """Begin it, and wait for its end."""
        with _translated():
            work = collective(self._group)
            self._stuck = True
            while not _has_ended(work):
                if self._abandoned.is_set():
                    raise BarrierConnectionError("the collective was given up")
            self._stuck = False
            try:
                # Returns at once; raises if it failed.
                work.wait()
            except RuntimeError:
                # The group is of no more use. If it is ours it ends here, and that is how peers
                # learn of it who wait for us. The error's traceback would keep the work, and that
                # the group.
                self._group = None
                del work
                raise

    def _let_go(self) -> None:
        group, self._group = self._group, None
        if self._stuck:
            # Its destructor would wait for the collective, and so would the interpreter's
            # exit: one reference too many keeps it from ever being run.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        # Ours goes with its last reference, here and not on an event loop: that takes a while.
        del group
        if self._connection is not None:
            self._connection.close()

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _bytes(self, value: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(value), dtype=torch.uint8).to(self._device)

    @property
    def _device(self) -> torch.device:
        # The CPU where the group serves it; a group we were given may be a GPU's alone.
        kinds = [torch.device("cpu")] if self._own else self._group._device_types
        return next((kind for kind in kinds if kind.type == "cpu"), kinds[0])


def _described(call: int) -> str:
    return f"commit(leader={call - 1})" if call else "execute_barrier()"


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
        line = str(exc).partition("\n")[0]
        raise BarrierConnectionError(
            f"the process group failed ({line}); see whether a peer died"
        ) from exc
