"""One rank's presence at one store: its connections, its membership, its open turns.

Three kinds of lanes, each a worker thread with a connection of its own, so that none waits
for another: *control* (short calls: join, break, survey), the *watcher* (blocks on the
rank's mail, idle for most of its life) and one per phase that is awaited at the same time.
Nothing here knows of event loops; callers await the futures.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import TypeVar

from . import _membership
from ._connection import Connection
from ._errors import BarrierClosedError, BarrierConnectionError, BrokenBarrierError
from ._keys import Keys
from ._membership import Membership
from ._protocol import Turn
from ._verdict import Gathered, Verdict
from ._worker import Worker, end_at_exit, settle

T = TypeVar("T")
Open = Callable[[float, threading.Event], Connection]

logger = logging.getLogger(__name__)

# How long a rank that is told that the store goes away reads its last verdicts.
_DRAIN_SECS = 1.0
_FAREWELL_AT_EXIT_SECS = 0.5


class Lane:
    """A thread and the connection that it alone uses, opened by the first call."""

    def __init__(self, open_connection: Open, init_secs: float) -> None:
        self._open = open_connection
        self._init_secs = init_secs
        self._connection: Connection | None = None
        self._abandoned = threading.Event()
        self._worker = Worker()
        self.ended = self._worker.ended

    def submit(self, call: Callable[[Connection], T]) -> Future[T]:
        """Have the thread make ``call``; a lost connection is replaced for the next one."""

        def run() -> T:
            if self._connection is None and not self._abandoned.is_set():
                deadline = time.monotonic() + self._init_secs
                self._connection = self._open(deadline, self._abandoned)
            # A call that was given up must not be made late: by then it may be another store
            # that answers at the same address.
            if self._connection is None or self._abandoned.is_set():
                raise BarrierConnectionError("the connection to the store was given up")
            try:
                return call(self._connection)
            except BarrierConnectionError:
                self._hang_up()
                raise

        return self._worker.submit(run)

    @property
    def interruptible(self) -> bool:
        """Whether `abandon` ends a call that would not end by itself."""
        return self._connection is None or self._connection.interruptible

    def join(self, timeout_secs: float) -> None:
        """Block until the thread is gone, which it is microseconds after `ended`."""
        self._worker.join(timeout_secs)

    def retire(self) -> None:
        """Close after the calls already submitted."""
        if self._worker.started:
            self._worker.submit(self._hang_up)
        self._worker.retire()

    def stop_waiting(self) -> None:
        """From any thread: end a wait for a key that nobody is left to set."""
        if (connection := self._connection) is not None:
            connection.stop_waiting()

    def abandon(self) -> None:
        """From any thread: end the call under way, where that can be done, and make no other."""
        self._abandoned.set()
        if (connection := self._connection) is not None:
            connection.interrupt()

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class Session:
    """All that a connected barrier has; thread-safe."""

    def __init__(
        self,
        open_connection: Open,
        keys: Keys,
        rank: int,
        world_size: int,
        *,
        init_secs: float,
        hosts: bool = False,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.generation = 0
        self.all_joined = False
        self._open_connection = open_connection
        self._keys = keys
        self.init_secs = init_secs
        self.hosts = hosts
        self._token = uuid.uuid4().hex
        self._membership: Membership | None = None
        self._watched: Membership | None = None
        self._standing = False
        self._replaced = False
        self._closing = False
        self._sequences: Counter[str] = Counter()
        self._turns: dict[Turn, Future[Verdict | Gathered]] = {}
        self._entered_on: dict[Turn, Lane] = {}
        self._owed: list[Callable[[Connection], object]] = []
        self._in_store = 0
        self._changed = threading.Condition()
        self._control = self._lane()
        self._watcher = self._lane()
        self._idle: deque[Lane] = deque()
        self._lanes = [self._control, self._watcher]
        end_at_exit(self)

    # -- joining ---------------------------------------------------------------------

    @property
    def stands(self) -> bool:
        """Whether turns can be taken: joined, and the generation not known to be over."""
        return self._standing

    @property
    def has_a_say(self) -> bool:
        """Whether `farewell` would tell anybody anything, and not just open a connection."""
        return self._watched is not None or bool(self._turns)

    @property
    def closing(self) -> bool:
        """Whether it is taking leave."""
        return self._closing

    @property
    def replaced(self) -> bool:
        """Whether another life of this rank took its place for good."""
        return self._replaced

    def join(self) -> Future[None]:
        """Connect, and claim this rank in the present generation."""
        return self._control.submit(self._join)

    def _join(self, store: Connection) -> None:
        if self._standing or self._replaced:
            return
        previous = self._membership
        membership = _membership.join(
            store, self._keys, self.rank, self.world_size, self._token, previous
        )
        if membership is None:
            self._replaced = True
            return
        if membership is not previous:
            self._sequences.clear()
            self._membership = membership
            self.generation = membership.generation
            self.all_joined = membership.generation == 0
            # Phases of a generation that is over are broken by those who still live in it.
            self._owed.clear()
        while self._owed:
            self._owed[0](store)
            del self._owed[0]
        self._standing = True
        if self._watched is not membership:
            self._watched = membership
            self._watcher.submit(lambda store: self._watch(store, membership))

    def _watch(self, store: Connection, membership: Membership) -> None:
        try:
            mail = store.await_value(membership.mail)
            self._stop_standing()
            if mail == _membership.OVER:
                self._outlive(store, membership)
            elif mail == _membership.HOST_LEAVES:
                self._lose_host(store)
            store.delete(membership.mail)
            if mail != _membership.OVER and not self.hosts:
                # Our last word: a host that waits for it may be gone the moment it hears it.
                membership.leave(store)
        except BarrierConnectionError as exc:
            self._stop_standing()
            logger.debug("rank %d lost the store: %s", self.rank, exc)
            raise

    def _stop_standing(self) -> None:
        self._standing = False
        self._watched = None

    def _outlive(self, store: Connection, membership: Membership) -> None:
        rank = membership.successor(store)
        who = "another rank" if rank is None else f"rank {rank}"
        reason = f"{who} joined again: it was restarted, or two processes share its number"
        logger.info("barrier %r: %s", self._keys.prefix, reason)
        for turn, future in list(self._turns.items()):
            judged = self._break(store, turn, reason, by=rank)
            if isinstance(judged, Gathered) and judged.leader == rank:
                # It may have published before it died; nobody else can say.
                settle(
                    future,
                    error=BrokenBarrierError(turn.name, turn.sequence, rank, reason, in_doubt=True),
                )

    def _lose_host(self, store: Connection) -> None:
        reason = "rank 0 closed its barrier, and with it the store that it hosts"
        for turn, future in list(self._turns.items()):
            if isinstance(self._break(store, turn, reason, by=0), Gathered):
                settle(
                    future,
                    error=BrokenBarrierError(turn.name, turn.sequence, 0, reason, in_doubt=True),
                )
        with self._changed:
            self._changed.wait_for(lambda: not self._in_store, _DRAIN_SECS)

    def not_joined(self) -> Future[tuple[int, ...]]:
        """The ranks that are not in the present generation."""
        membership = self._membership
        assert membership is not None
        return self._control.submit(membership.not_joined)

    # -- turns -----------------------------------------------------------------------

    def take_turn(self, name: str, leader: int | None = None) -> Turn | None:
        """This rank's turn in the next phase of ``name``; None where it must join (again) first."""
        sequence = self._sequences[name]
        keys = self._keys.phase(self.generation, name, sequence)
        turn = Turn(keys, name, sequence, self.rank, self.world_size, leader)
        self._turns[turn] = Future()
        # Registered first, then looked: the watcher does the two in the other order, so a
        # turn in a generation that ends is either seen by it or not taken.
        if not self._standing:
            del self._turns[turn]
            return None
        self._sequences[name] = sequence + 1
        return turn

    def open_turn(self, name: str) -> Turn | None:
        """The oldest turn of ``name`` that is awaited now."""
        return next((turn for turn in list(self._turns) if turn.name == name), None)

    def forget(self, turn: Turn) -> None:
        """Nobody on this rank waits for ``turn`` any more."""
        self._turns.pop(turn, None)

    def enter(self, turn: Turn, payload: bytes = b"") -> Future[Verdict | Gathered]:
        """Enter the phase on a lane that is free; settled by the verdict."""
        future = self._turns[turn]
        lane = self._entered_on[turn] = self._take_lane()
        freed = False

        def call(store: Connection) -> None:
            nonlocal freed
            # A turn that was given up before its lane could open is not entered any more.
            if not turn.hold():
                freed = True
                self._free(turn, lane, future, turn.known_verdict)
                return
            with self._changed:
                self._in_store += 1
            try:
                outcome = turn.enter(store, payload)
                # The caller goes on now, and may use this lane again: what follows is off
                # its path, and short.
                freed = True
                self._free(turn, lane, future, outcome)
            finally:
                try:
                    turn.release(store)
                finally:
                    with self._changed:
                        self._in_store -= 1
                        self._changed.notify_all()

        def ended(job: Future[None]) -> None:
            if (error := job.exception()) is not None and not freed:
                self._entered_on.pop(turn, None)
                self._discard(lane)
                settle(future, error=error)

        lane.submit(call).add_done_callback(ended)
        return future

    def _free(self, turn: Turn, lane: Lane, future: Future[T], outcome: T) -> None:
        # If the lane was given up meanwhile, it is nobody's any more.
        if self._entered_on.pop(turn, None) is lane:
            self._idle.append(lane)
        settle(future, outcome)

    def give_up(
        self,
        turn: Turn,
        reason: str,
        timeout_secs: float | None = None,
        missing: tuple[int, ...] | None = None,
    ) -> Future[Verdict | Gathered]:
        """Break the phase of ``turn`` unless it is decided; settled by what was decided."""
        return self._control.submit(
            lambda store: self._break(store, turn, reason, timeout_secs, missing)
        )

    def _break(
        self,
        store: Connection,
        turn: Turn,
        reason: str,
        timeout_secs: float | None = None,
        missing: tuple[int, ...] | None = None,
        by: int | None = None,
    ) -> Verdict | Gathered:
        return turn.during(
            store,
            lambda store: turn.give_up(store, reason, timeout_secs, missing, by),
            lambda: turn.known_verdict,
        )

    def payloads(self, turn: Turn) -> Future[dict[int, bytes]]:
        """What all brought, for the leader of a commit in which everyone has arrived."""
        return self._on_free_lane(lambda store: turn.during(store, turn.payloads, dict))

    def settle(self, turn: Turn, verdict: Verdict) -> Future[Verdict]:
        """The leader's word on such a commit; settled by the first word it gave."""
        try:
            return self._on_free_lane(lambda store: _settle(store, turn, verdict))
        except BarrierClosedError as exc:
            refused: Future[Verdict] = Future()
            refused.set_exception(BarrierConnectionError(str(exc)))
            return refused

    def owe(self, turn: Turn, verdict: Verdict) -> None:
        """The store did not take the leader's word: give it when this rank joins again."""
        self._owed.append(lambda store: _settle(store, turn, verdict))
        self._standing = False

    def hear(self, turn: Turn) -> Future[Verdict]:
        """Wait for the verdict, without entering."""
        return self._on_free_lane(
            lambda store: turn.during(store, turn.await_verdict, lambda: turn.known_verdict)
        )

    def _on_free_lane(self, call: Callable[[Connection], T]) -> Future[T]:
        lane = self._take_lane()
        future = lane.submit(call)
        future.add_done_callback(lambda _: self._idle.append(lane))
        return future

    def survey(self, turn: Turn) -> Future[tuple[int, tuple[int, ...]] | None]:
        """Who has arrived; None where the phase is over."""
        return self._control.submit(lambda store: turn.during(store, turn.survey, lambda: None))

    def start_afresh(self, turn: Turn) -> None:
        """The store did not answer in time: leave the connections that hang behind.

        The break of ``turn`` that it did not take is made up for when this rank joins again.
        """
        reason = "it lost its connection to the store"
        self._owed.append(lambda store: self._break(store, turn, reason))
        self._standing = False
        hung = [self._control]
        self._control = self._lane()
        self._lanes.append(self._control)
        if (lane := self._entered_on.pop(turn, None)) is not None:
            hung.append(lane)
        if self._watcher.interruptible:
            # Two that wait for the same mail would take it from each other.
            hung.append(self._watcher)
            self._watcher, self._watched = self._lane(), None
            self._lanes.append(self._watcher)
        for lane in hung:
            self._discard(lane)

    def lost(self) -> None:
        """A connection broke: join again before the next turn."""
        self._standing = False

    # -- lanes -----------------------------------------------------------------------

    def _lane(self) -> Lane:
        return Lane(self._open_connection, self.init_secs)

    def _take_lane(self) -> Lane:
        if self._closing:
            raise _closed(self._keys.prefix)
        try:
            return self._idle.pop()
        except IndexError:
            lane = self._lane()
            self._lanes.append(lane)
            return lane

    def _discard(self, lane: Lane) -> None:
        if lane in self._lanes:
            self._lanes.remove(lane)
        lane.abandon()
        lane.retire()

    # -- leaving ---------------------------------------------------------------------

    def farewell(self) -> Future[None]:
        """Break the open turns, and tell our own watcher, and a host that waits, that we leave.

        A host itself waits in it until its peers have left.
        """
        self._closing = True
        return self._control.submit(self._say_farewell)

    def _say_farewell(self, store: Connection) -> None:
        for turn, future in list(self._turns.items()):
            judged = self._break(store, turn, "it closed its barrier")
            if isinstance(judged, Gathered):
                settle(future, error=_closed(self._keys.prefix, in_doubt=True))
            else:
                # Known now, while the thread that waits for it may not have read it yet.
                settle(future, judged)
        membership = self._membership
        if membership is None:
            return
        # Not `_standing`: one lost connection ends that, and the watcher may be well.
        if self._watched is not None:
            store.set(membership.mail, _membership.CLOSED)
            if self.hosts:
                membership.host_leave(store)

    def retire(self) -> list[Lane]:
        """End all lanes after what they are doing; their `ended` is settled then."""
        self._closing = True
        for turn, future in list(self._turns.items()):
            settle(future, error=_closed(self._keys.prefix, in_doubt=turn.entered))
        membership = self._membership
        if self.hosts and membership is not None:
            self._watcher.submit(membership.wait_no_longer)
        # Turns that nobody awaits any more can only be those that are in doubt: commits whose
        # leader has not settled them, and may be dead.
        for turn, lane in list(self._entered_on.items()):
            if turn not in self._turns:
                lane.stop_waiting()
        lanes = list(self._lanes)
        for lane in lanes:
            lane.retire()
        return lanes

    def abandon(self) -> None:
        """End the calls of lanes that did not end by themselves."""
        for lane in list(self._lanes):
            if not lane.ended.done():
                lane.abandon()

    def end(self, deadline: float) -> None:
        """Leave before the interpreter does, blocking until ``deadline`` (monotonic) at most."""
        if self.has_a_say and not self._closing:
            said = self.farewell()
            wait_for([said], timeout=min(_FAREWELL_AT_EXIT_SECS, deadline - time.monotonic()))
        lanes = [lane.ended for lane in self.retire()]
        wait_for(lanes, timeout=max(0.0, (deadline - time.monotonic()) / 2))
        self.abandon()
        wait_for(lanes, timeout=max(0.0, deadline - time.monotonic()))


def _settle(store: Connection, turn: Turn, verdict: Verdict) -> Verdict:
    return turn.during(store, lambda store: turn.settle(store, verdict), lambda: turn.known_verdict)


def _closed(prefix: str, *, in_doubt: bool = False) -> BarrierClosedError:
    error = BarrierClosedError(f"barrier {prefix!r}")
    error.in_doubt = in_doubt
    return error
