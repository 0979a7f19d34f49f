"""Which ranks have entered a call of a DistBarrier, and which have left it.

A collective cannot tell which rank is missing. gloo's own `monitored_barrier` tells only rank 0,
and ends the group. So each rank notes its arrivals in the group's store, and does not wait for
that. No note ever releases a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .._errors import BarrierConnectionError
from .._missing import had_not_entered
from .._protocol.store import Add, Append, Delete, Read, Set
from .._store.blocking_store import BlockingStore
from .._store.event_loop import Loop
from .._store.waiting import told
from .._store.worker import Promise, Worker
from .departures import MOMENT_SECS, Gone, decode
from .group import Group

T = TypeVar("T")

# The number of making the group; calls count from 1.
CONNECTING = 0
# Roughly how many notes go into one log.
_LOG_NOTES = 1024
# The store answered when the group was made. The barrier works without it, too.
_INIT_SECS, AGAIN_SECS = 5.0, 0.5
_KEYS = ("joined", "gone", "written", "departed")


class ArrivalLog:
    """Logs, one after another, to which ranks append "<call> <rank>", and one of ranks that left.

    A thread of its own writes and reads them. The thread of the collectives is in a collective when
    a deadline fires, and must not wait for a store that does not answer.

    :ivar latest: the call that this rank has entered last
    """

    def __init__(self, group: Group) -> None:
        self.latest: int = CONNECTING - 1
        self._group = group
        self._worker = Worker("arrivals")
        self.ended = self._worker.ended
        self._store: BlockingStore | None = None
        self._given_up: Promise[None] = Promise()
        self._lost = ""
        self._noting = False
        # The oldest log that rank 0 has not deleted.
        self._oldest = 0
        # This rank's keys there for making the group.
        self._written: list[str] = []

    def enter(self, call: int) -> None:
        """From any thread: note that this rank has entered ``call``, and all before it."""
        if call <= self.latest:
            return
        self.latest = call
        # One note stands for all calls so far, so only one waits for a store that hangs.
        if not self._noting:
            self._noting = True
            self._submit(self._note)

    @property
    def begun(self) -> int:
        """The latest call whose turn it was."""
        return max(CONNECTING, self.latest)

    async def explain(self, call: int, loop: Loop, until: float) -> tuple[str, tuple[int, ...]]:
        """The missing ranks of ``call``, and a text for an error.

        It takes until the running loop's clock says ``until``, at most.
        """
        begun = min(call, self.begun)
        why, missing = "the group's store does not answer", None
        asked = self.missing(begun)
        if await told(loop, asked, until):
            try:
                missing = asked.result()
            except BarrierConnectionError as exc:
                why = str(exc)
        if missing is None:
            return f"the missing ranks are unknown ({why})", ()
        if not missing:
            return "every rank had entered, so look for one that is stopped or has given up", ()
        if begun < call:
            return f"a call before it still waited for {self._group.told(missing)}", missing
        return had_not_entered(missing, (), self._group.global_ranks), missing

    def missing(self, call: int) -> Promise[tuple[int, ...]]:
        """The ranks that have not entered ``call``, which this rank has.

        The promise fails with `BarrierConnectionError` if the store cannot tell.
        """
        return self._submit(lambda store: self._absent(store, call))

    def gone(self) -> Promise[list[Gone]]:
        """The ranks that have given up or left; fails as `missing`."""
        return self._submit(lambda store: decode(store.do(Read(self._gone)) or b""))

    def join(self) -> Promise[int]:
        """Count this rank among those that make the group; fails as `missing`."""
        return self._submit(
            lambda store: store.do(Add(self._group.root + "joined", 1)), again=False
        )

    def read(self, key: str) -> Promise[bytes | None]:
        """A value of this barrier's in the group's store; fails as `missing`."""
        return self._submit(lambda store: store.do(Read(self._group.root + key)))

    def write(self, key: str, value: bytes) -> Promise[None]:
        """Set a key of this barrier until it is closed; fails as `missing`."""
        self._written.append(self._group.root + key)
        return self._submit(lambda store: store.do(Set(self._group.root + key, value)))

    def tidy(self) -> None:
        """All ranks have read these keys: delete them."""
        written, self._written = self._written, []
        if written:
            self._submit(lambda store: _delete(store, written))

    def note_gone(self, entered: int, served: int, reason: str) -> Promise[None] | None:
        """Tell the ranks that wait for this one that it has given up or left.

        :return: settled when they can read it; None if there is nothing to tell
        """
        if self.latest < CONNECTING:
            return None
        line = Gone(self._group.rank, entered, served, reason).encode()

        def note(store: BlockingStore) -> None:
            store.do(Append(self._gone, line))
            # An append has no answer; this call has one.
            store.do(Read(self._gone))

        return self._submit(note)

    def note_left(self, entered: int, served: int, reason: str) -> None:
        """As `note_gone`, but blocks for a moment, until they can read it."""
        if (noted := self.note_gone(entered, served, reason)) is not None:
            noted.wait(MOMENT_SECS)

    def retire(self) -> None:
        """Close the store; `ended` is then settled. The last rank to do so deletes the keys."""
        if self.latest >= CONNECTING:
            self._submit(self._depart, again=False)
        self._worker.retire(self._hang_up)

    def abandon(self, *, at_exit: bool = False) -> None:
        """From any thread: give up a store that does not answer.

        :param at_exit: the interpreter ends, so a call that hangs there must not return any more
        """
        self._lost = self._lost or "the group's store did not answer"
        self._given_up.settle()
        if (store := self._store) is None:
            return
        if at_exit and store.never_return():
            if store.asks:
                self._worker.forget()
        else:
            store.interrupt()

    @property
    def _gone(self) -> str:
        return self._group.root + "gone"

    def _submit(self, call: Callable[[BlockingStore], T], *, again: bool = True) -> Promise[T]:
        """Have the thread make ``call``.

        :param again: on another connection, if the present one turns out to be lost
        """
        promise: Promise[T] = Promise()
        try:
            self._worker.submit(lambda: self._make(call, again), promise)
        except RuntimeError as exc:
            error = BarrierConnectionError(f"the group's store was closed ({exc})")
            promise.settle(error=error)
        return promise

    def _make(self, call: Callable[[BlockingStore], T], again: bool) -> T:
        store = self._store
        if store is None:
            store = self._store = self._open(_INIT_SECS)
            again = False
        try:
            return call(store)
        except BarrierConnectionError:
            self._hang_up()
            if not again:
                raise
        self._store = self._open(AGAIN_SECS)
        return call(self._store)

    def _open(self, secs: float) -> BlockingStore:
        if self._lost:
            raise BarrierConnectionError(self._lost)
        try:
            return self._group.open_store(secs, self._given_up)
        except BarrierConnectionError as exc:
            # One attempt is enough: another would delay the calls that follow, and closing.
            self._lost = str(exc)
            raise

    def _hang_up(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def _number(self, call: int) -> int:
        """The number of the log with the notes of ``call``."""
        return call // max(1, _LOG_NOTES // self._group.size)

    def _log(self, number: int) -> str:
        return f"{self._group.root}log/{number}"

    def _note(self, store: BlockingStore) -> None:
        self._noting = False
        call = self.latest
        number = self._number(call)
        store.do(Append(self._log(number), b"%d %d\n" % (call, self._group.rank)))
        # All ranks have entered all calls of the log before, and have long left those of the log
        # before that.
        while not self._group.rank and self._oldest < number - 1:
            store.do(Delete([self._log(self._oldest)]))
            self._oldest += 1

    def _absent(self, store: BlockingStore, call: int) -> tuple[int, ...]:
        # A rank that was released in this instant may be one call ahead.
        logs = {self._log(self._number(call)), self._log(self._number(call + 1))}
        notes = b"".join(store.do(Read(log)) or b"" for log in sorted(logs)).splitlines()
        entered = {int(note.split()[1]) for note in notes if int(note.split()[0]) >= call}
        if self._group.rank not in entered:
            raise BarrierConnectionError("not even this rank's own arrival was noted")
        return tuple(rank for rank in range(self._group.size) if rank not in entered)

    def _depart(self, store: BlockingStore) -> None:
        # A rank's notes came before, on the same connection.
        root = self._group.root
        if self._written:
            store.do(Append(root + "written", "\n".join([*self._written, ""]).encode()))
        if store.do(Add(root + "departed", 1)) == self._group.size:
            written = (store.do(Read(root + "written")) or b"").decode().split()
            # Ranks may be a log apart from each other, and rank 0 behind.
            latest = self._number(max(self.latest, CONNECTING))
            logs = [self._log(number) for number in range(max(0, latest - 2), latest + 2)]
            _delete(store, [*written, *logs, *(root + key for key in _KEYS)])


def _delete(store: BlockingStore, keys: list[str]) -> None:
    for key in keys:
        store.do(Delete([key]))
