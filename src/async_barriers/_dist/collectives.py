"""The collectives behind a DistBarrier's calls, and the thread that waits for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from .._errors import BarrierConnectionError
from .._store.worker import Promise, Worker
from .arrivals import ArrivalLog
from .backend import Backend
from .departures import Gone
from .fingerprint import COMMIT, EXECUTE, GATHER, Operation, pack, unpack
from .group import Group

T = TypeVar("T")

PUBLISHED, FAILED, IN_DOUBT, TIMED_OUT, TIMED_OUT_IN_DOUBT = range(5)


class Word(NamedTuple):
    """The message of a commit's leader, or of a rank that aborts.

    :ivar how: PUBLISHED, FAILED, or IN_DOUBT if it may have published; and two for its deadline
    :ivar message: the result of publish, or the reason of its failure; for a deadline, its seconds,
        the missing ranks and the reason
    """

    how: int
    message: bytes
    step: int | None = None


class Aborted(Exception):
    """A rank gave up its turn; all ranks know it."""

    def __init__(self, rank: int, reason: str, step: int | None) -> None:
        super().__init__(reason)
        self.rank = rank
        self.step = step


class DifferentCalls(Exception):
    """The ranks made different calls; all ranks know it."""

    def __init__(self, one: Operation | None, other: Operation | None) -> None:
        first, second = (call or "one of a far later step" for call in (one, other))
        super().__init__(f"the ranks made different calls, among them {first} and {second}")


class Collectives:
    """The calls block, in a thread of their own; see `submit`. They raise as `Backend` does."""

    def __init__(self, group: Group, log: ArrivalLog, given: dist.ProcessGroup | None) -> None:
        self._group = group
        self._backend = Backend(group, log, given)
        self._word: Promise[Word] | None = None
        # Of the call under way; see `begin`.
        self._number = 0
        self._came = 0.0
        self._worker = Worker("collectives")
        self._used = False
        self.ended = self._worker.ended
        self.connect = self._backend.connect
        self.give_up = self._backend.give_up
        self.forsake = self._backend.forsake

    # -- the thread --------------------------------------------------------------------------

    def submit(self, call: Callable[[], T], promise: Promise[T] | None = None) -> Promise[T]:
        """Have the thread make ``call`` after those submitted before; see `Worker.submit`."""
        told: Promise[T] = promise or Promise()
        try:
            self._worker.submit(call, told)
            self._used = True
        except RuntimeError as exc:
            told.settle(error=BarrierConnectionError(f"the group was closed ({exc})"))
        return told

    def abandon(self) -> None:
        """From any thread: give up waiting for peers, and for the leader's word."""
        self.give_up()
        if (word := self._word) is not None:
            word.settle(Word(FAILED, b"the leader left"))

    def retire(self, first: Callable[[], object], last: Callable[[], object]) -> None:
        """End the group and the thread, after the calls already submitted.

        :param first: called before that, since the peers see that the group's connections close
        :param last: called after it
        """

        def let_go() -> None:
            first()
            self._backend.let_go()
            last()

        self._worker.retire(let_go)
        if not self._used:
            # There is no thread, and no group to end.
            last()

    # -- the calls ---------------------------------------------------------------------------

    def begin(self, number: int, came: float) -> None:
        """Begin the call of that number, which was made at ``came``."""
        self._number, self._came = number, came

    def execute(self, step: int | None) -> int:
        """Wait until every rank has called it; return the rank that came last."""
        return self._meet(Operation(EXECUTE, step), step)

    def abort(self, reason: str, step: int | None) -> bool:
        """Tell all ranks, once they have entered; return whether no other rank broke it, too."""
        try:
            self._meet(None, step, reason)
        except Aborted as exc:
            return exc.rank == self._group.rank
        raise AssertionError("an abort was no abort")

    def all_gather(self, payload: bytes, step: int | None) -> tuple[bytes, ...]:
        """Wait until every rank has called it; return all payloads."""
        self._meet(Operation(GATHER, step), step)
        return self._backend.all_gather(payload, self._unserved)

    def lead(
        self,
        payload: bytes,
        step: int | None,
        gathered: Promise[dict[int, bytes]],
        word: Promise[Word],
    ) -> dict[int, bytes]:
        """Wait until every rank has called it or `follow`; then wait for ``word`` and send it.

        :param gathered: gets the payloads of all ranks
        """
        brought = self._gather(payload, step, self._group.rank)
        self._word = word
        gathered.settle(brought)
        self._tell(word.result(None))
        return brought

    def follow(self, payload: bytes, step: int | None, leader: int) -> Word:
        """Bring ``payload``; return the leader's word."""
        self._gather(payload, step, leader)
        # At once, so that the leader can tell and leave, also while our event loop is busy.
        return self._hear(leader)

    # -- what they are made of ---------------------------------------------------------------

    def _meet(self, operation: Operation | None, step: int | None, reason: str = "") -> int:
        """Begin any call, so that ranks with different calls find out.

        :param operation: None for an abort
        :return: the rank that came last
        :raises Aborted, DifferentCalls: all ranks raise it
        """
        rank, size = self._group.rank, self._group.size
        said = pack(operation, self._came, rank, size)
        largest, smallest = self._backend.maxima(said, self._not_entered)
        met = unpack(largest, smallest, size)
        if met.aborted:
            # The last rank that aborted tells all.
            if operation is None and met.last == rank:
                word = Word(FAILED, reason.encode(), step)
                self._tell(word)
            else:
                word = self._hear(met.last)
            raise Aborted(met.last, word.message.decode(), word.step)
        if met.lowest != met.highest:
            raise DifferentCalls(met.lowest, met.highest)
        if met.highest is None:
            assert operation is not None
            self._meet_far(operation)
        return met.last

    def _meet_far(self, operation: Operation) -> None:
        """As `_meet`, for steps that are too large for its numbers."""
        kind, step = operation.kind, operation.step or 0
        largest, latest, smallest, earliest = self._backend.maxima(
            (kind, step, -kind, -step), self._unserved
        )
        if (largest, latest) != (-smallest, -earliest):
            raise DifferentCalls(Operation(-smallest, -earliest), Operation(largest, latest))

    def _gather(self, payload: bytes, step: int | None, leader: int) -> dict[int, bytes]:
        self._meet(Operation(COMMIT + leader, step), step)
        return self._backend.gather(payload, leader, self._unserved)

    def _tell(self, word: Word) -> None:
        step = -1 if word.step is None else word.step
        self._backend.share(self._group.rank, [word.how, step], word.message, self._unserved)

    def _hear(self, source: int) -> Word:
        # No other rank is needed for this one to receive it, and some may have left meanwhile.
        def left(gone: Gone) -> bool:
            return gone.rank == source and self._unserved(gone)

        (how, step), message = self._backend.share(source, [0, 0], b"", left)
        return Word(how, message, None if step < 0 else step)

    def _not_entered(self, gone: Gone) -> bool:
        return gone.entered < self._number

    def _unserved(self, gone: Gone) -> bool:
        return gone.served < self._number
