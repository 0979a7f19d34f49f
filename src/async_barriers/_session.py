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
from ._connection import Connection, Remains
from ._errors import BarrierClosedError, BarrierConnectionError, BrokenBarrierError
from ._keys import Keys
from ._lane import Lane, Open
from ._membership import Membership
from ._protocol import Forgotten, Turn
from ._verdict import Gathered, Verdict
from ._worker import end_at_exit, settle

T = TypeVar("T")

_OpenTurns = list[tuple[Turn, Future[Verdict | Gathered]]]

logger = logging.getLogger(__name__)

_LOST = "it lost its connection to the store"
# How long a rank that is told that the store goes away reads its last verdicts.
_DRAIN_SECS = 1.0
_FAREWELL_AT_EXIT_SECS = 0.5
# A join that takes longer than this on a connection that is open may hang.
_HANGS_SECS = 0.8


class _Life:
    """A membership, and how many turns of each name were taken in it."""

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self.sequences: Counter[str] = Counter()


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
        self.init_secs = init_secs
        self.hosts = hosts
        self.all_joined = False
        self._open_connection = open_connection
        self._keys = keys
        self._token = uuid.uuid4().hex
        # Guards what follows where several threads change it together; never held over a
        # call to the store.
        self._lock = threading.Lock()
        self._life: _Life | None = None
        self._watched: Membership | None = None
        self._standing = False
        self._replaced = False
        self._closing = False
        self._joining: Future[None] | None = None
        self._joining_since = 0.0
        self._turns: dict[Turn, Future[Verdict | Gathered]] = {}
        self._entered_on: dict[Turn, Lane] = {}
        self._owed: list[Callable[[Connection], object]] = []
        self._owed_turns: list[tuple[str, str]] = []
        self._remains: list[Remains] = []
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
    def generation(self) -> int:
        """The generation that this rank joined last."""
        return self._membership.generation

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
        """Connect, and claim this rank in the present generation; one attempt serves all."""
        if self._joining is None or self._joining.done():
            self._joining_since = time.monotonic()
            self._joining = self._control.submit(self._join, again=True)
        return self._joining

    def doubt_joining(self) -> None:
        """The caller of `join` waits no longer: see whether it hangs, on a dead connection."""
        if self._joining is None or self._joining.done():
            return
        took = time.monotonic() - self._joining_since
        if took > (_HANGS_SECS if self._control.connected else self.init_secs):
            self._start_afresh(None)

    def _join(self, store: Connection) -> None:
        if self._standing or self._replaced:
            return
        if self._closing:
            raise _closed(self._keys.prefix)
        before = life = self._life
        previous = None if life is None else life.membership
        membership = _membership.join(
            store, self._keys, self.rank, self.world_size, self._token, previous
        )
        if membership is None:
            self._replaced = True
            return
        # Before this rank departs from the phases that it gave up, and their keys are deleted:
        # an arrival that came late would bring them back.
        while self._remains:
            self._remains.pop().reset()
        if life is None or membership is not previous:
            # Phases of a generation that is over are broken by those who still live in it.
            self._owed.clear()
            if previous is not None:
                # Our watcher may have been cut off when it ended.
                self._outlive(store, previous, self._turns_in(previous))
            life = _Life(membership)
            self.all_joined = membership.generation == 0
        while self._owed:
            self._owed[0](store)
            del self._owed[0]
        while self._owed_turns:
            name, reason = self._owed_turns[0]
            self._break(store, self._next_turn(life, name), reason)
            del self._owed_turns[0]
        with self._lock:
            # Not this one if it hung, was given up and comes to its end after another one.
            takes_effect = self._life is before and not self.closing
            if takes_effect:
                self._life = life
                self._standing = True
                watched, self._watched = self._watched, membership
        if not takes_effect:
            if membership is not previous:
                membership.leave(store)
            raise _closed(self._keys.prefix)
        if watched is not membership:
            self._watcher.submit(lambda store: self._watch(store, membership))

    def _watch(self, store: Connection, membership: Membership) -> None:
        began = time.monotonic()
        try:
            mail = store.await_value(membership.mail)
            turns = self._cease(membership)
            if mail == _membership.HOST_LEAVES:
                self._lose_host(store, turns)
            elif mail != _membership.CLOSED:
                self._outlive(store, membership, turns)
            store.delete(membership.mail)
            if mail in (_membership.CLOSED, _membership.HOST_LEAVES) and not self.hosts:
                # Our last word: a host that waits for it may be gone the moment it hears it.
                membership.leave(store)
        except BarrierConnectionError as exc:
            turns = self._cease(membership)
            self._renew_lanes()
            logger.debug("rank %d lost the store: %s", self.rank, exc)
            if turns and time.monotonic() - began > 1:
                # Whoever waits has to hear of the next restart, too.
                self._control.submit(self._join, again=True)
            raise

    def _cease(self, membership: Membership) -> _OpenTurns:
        """Take no more turns in a generation; those that are open in it."""
        with self._lock:
            if self._watched is membership:
                self._watched = None
                self._standing = False
        return self._turns_in(membership)

    def _turns_in(self, membership: Membership) -> _OpenTurns:
        turns = list(self._turns.items())
        return [item for item in turns if item[0].keys.generation == membership.generation]

    def _outlive(self, store: Connection, membership: Membership, turns: _OpenTurns) -> None:
        rank = membership.successor(store)
        who = "another rank" if rank is None else f"rank {rank}"
        reason = f"{who} joined again: it was restarted, or two processes share its number"
        logger.info("barrier %r: %s", self._keys.prefix, reason)
        for turn, future in turns:
            try:
                judged = self._break(store, turn, reason, by=rank)
            except Forgotten as exc:
                exc.in_doubt = turn.entered
                settle(future, error=exc)
                continue
            if isinstance(judged, Gathered) and judged.leader == rank:
                # It may have published before it died; nobody else can say.
                settle(
                    future,
                    error=BrokenBarrierError(turn.name, turn.sequence, rank, reason, in_doubt=True),
                )

    def _lose_host(self, store: Connection, turns: _OpenTurns) -> None:
        reason = "rank 0 closed its barrier, and with it the store that it hosts"
        for turn, future in turns:
            if isinstance(self._break(store, turn, reason, by=0), Gathered):
                settle(
                    future,
                    error=BrokenBarrierError(turn.name, turn.sequence, 0, reason, in_doubt=True),
                )
        self._stop_doubting()
        with self._changed:
            self._changed.wait_for(lambda: not self._in_store, _DRAIN_SECS)
        self._renew_lanes()

    def _stop_doubting(self) -> None:
        """End the waits for commits that their leader has not settled, and may be dead."""
        for turn, lane in list(self._entered_on.items()):
            if turn.verdict is None:
                lane.stop_waiting()

    def _renew_lanes(self) -> None:
        for lane in list(self._lanes):
            lane.renew()

    @property
    def _membership(self) -> Membership:
        assert self._life is not None
        return self._life.membership

    def not_joined(self) -> Future[tuple[int, ...]]:
        """The ranks that are not in the present generation."""
        return self._control.submit(self._membership.not_joined)

    # -- turns -----------------------------------------------------------------------

    def take_turn(self, name: str, leader: int | None = None) -> Turn | None:
        """This rank's turn in the next phase of ``name``; None where it must join (again) first."""
        # One with `_cease`: a turn in a generation that ends is either seen by it or not taken.
        with self._lock:
            if self._life is None or not self._standing:
                return None
            turn = self._next_turn(self._life, name, leader)
            self._turns[turn] = Future()
            return turn

    def next_sequence(self, name: str) -> int:
        """The sequence number that the next turn of ``name`` would have."""
        return 0 if self._life is None else self._life.sequences[name]

    def owe_turn(self, name: str, reason: str) -> None:
        """The store could not be reached: break the next turn of ``name`` when it can."""
        self._owed_turns.append((name, reason))

    def _next_turn(self, life: _Life, name: str, leader: int | None = None) -> Turn:
        sequence = life.sequences[name]
        life.sequences[name] += 1
        keys = self._keys.phase(life.membership.generation, name, sequence)
        return Turn(keys, name, sequence, self.rank, self.world_size, leader)

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
                self._free(turn, lane, future, turn.parting_word)
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
            lambda: turn.parting_word,
        )

    def payloads(self, turn: Turn) -> Future[dict[int, bytes]]:
        """What all brought, for the leader of a commit in which everyone has arrived."""
        return self._on_free_lane(lambda store: turn.during(store, turn.payloads, dict))

    def settle(self, turn: Turn, verdict: Verdict) -> Future[Verdict | Gathered]:
        """The leader's word on such a commit; settled by the first word it gave."""
        try:
            return self._on_free_lane(lambda store: _settle(store, turn, verdict))
        except BarrierClosedError as exc:
            refused: Future[Verdict | Gathered] = Future()
            refused.set_exception(BarrierConnectionError(str(exc)))
            return refused

    def owe(self, turn: Turn, verdict: Verdict) -> None:
        """The store did not take the leader's word: give it when this rank joins again."""
        self._owed.append(lambda store: _settle(store, turn, verdict))
        self._standing = False

    def hear(self, turn: Turn) -> Future[Verdict | Gathered]:
        """Wait for the verdict, without entering."""
        return self._on_free_lane(
            lambda store: turn.during(store, turn.await_verdict, lambda: turn.parting_word)
        )

    def _on_free_lane(self, call: Callable[[Connection], T]) -> Future[T]:
        lane = self._take_lane()
        future = lane.submit(call)
        future.add_done_callback(lambda _: self._idle.append(lane))
        return future

    def survey(self, turn: Turn) -> Future[tuple[int, tuple[int, ...]] | None]:
        """Who has arrived; None where the phase is over."""
        return self._control.submit(lambda store: turn.during(store, turn.survey, lambda: None))

    def start_afresh(self, turn: Turn, reason: str = _LOST) -> None:
        """The store did not answer in time: leave the connections that hang behind.

        The break of ``turn`` that it did not take is made up for when this rank joins again,
        which it tries at once: peers may still wait in the phase.
        """
        lane = self._entered_on.pop(turn, None)
        self._owed.append(lambda store: self._make_up_for(store, turn, lane, reason))
        self._start_afresh(lane)
        if not self._closing:
            self.join()

    def lost(self, turn: Turn) -> None:
        """``turn`` lost its connection, and is a commit that only its leader can settle."""
        self._owed.append(lambda store: self._make_up_for(store, turn, None))
        self._standing = False

    def _start_afresh(self, lane: Lane | None) -> None:
        self._standing = False
        self._joining = None
        hung = [self._control]
        if lane is not None:
            hung.append(lane)
        if self._closing:
            # Nothing is begun any more, so nobody would end it.
            for lane in hung:
                lane.abandon()
            return
        self._control = self._lane()
        self._lanes.append(self._control)
        if self._watcher.interruptible:
            # Two that wait for the same mail would take it from each other.
            hung.append(self._watcher)
            self._watcher, self._watched = self._lane(), None
            self._lanes.append(self._watcher)
        for lane in hung:
            self._remains += lane.remains()
            self._discard(lane)

    def _make_up_for(
        self, store: Connection, turn: Turn, lane: Lane | None, reason: str = _LOST
    ) -> None:
        judged = self._break(store, turn, reason)
        if isinstance(judged, Gathered):
            self._forsake(store, turn, judged, lane)

    def _forsake(self, store: Connection, turn: Turn, judged: Gathered, lane: Lane | None) -> None:
        """Leave a commit to its leader, and depart from it unless ``lane`` still waits there."""
        if judged.leader != self.rank and (lane is None or lane.interruptible):
            turn.forsake(store, judged)

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
                self._forsake(store, turn, judged, self._entered_on.get(turn))
            else:
                # Known now, while the thread that waits for it may not have read it yet.
                settle(future, judged)
        self._stop_doubting()
        # Not `_standing`: one lost connection ends that, and the watcher may be well.
        if (membership := self._watched) is not None:
            store.set(membership.mail, _membership.CLOSED)
            if self.hosts:
                membership.host_leave(store)

    def retire(self) -> list[Lane]:
        """End all lanes after what they are doing; their `ended` is settled then."""
        self._closing = True
        for turn, future in list(self._turns.items()):
            settle(future, error=_closed(self._keys.prefix, in_doubt=turn.entered))
        if self.hosts and self._life is not None:
            self._watcher.submit(self._membership.wait_no_longer)
        while self._remains:
            self._remains.pop().close()
        lanes = list(self._lanes)
        for lane in lanes:
            lane.retire()
        return lanes

    def stop_connecting(self) -> None:
        """End the lanes that have no connection, and are waiting for a store at most."""
        for lane in list(self._lanes):
            if not lane.connected:
                lane.abandon()

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
        self.stop_connecting()
        wait_for(lanes, timeout=max(0.0, (deadline - time.monotonic()) / 2))
        self.abandon()
        wait_for(lanes, timeout=max(0.0, deadline - time.monotonic()))


def _settle(store: Connection, turn: Turn, verdict: Verdict) -> Verdict | Gathered:
    return turn.during(store, lambda store: turn.settle(store, verdict), lambda: turn.parting_word)


def _closed(prefix: str, *, in_doubt: bool = False) -> BarrierClosedError:
    error = BarrierClosedError(f"barrier {prefix!r}")
    error.in_doubt = in_doubt
    return error
