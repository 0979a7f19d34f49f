"""One rank's presence at one store: its connections, its membership, and whose turn is next.

Nothing here knows of event loops; callers await the promises, which worker threads settle (see
`Lanes`), or follow a series, which needs none as long as nothing else happens (see `Series`).
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from . import _membership
from ._connection import Connection
from ._errors import BarrierConnectionError, BrokenBarrierError
from ._keys import Keys
from ._lane import Lane, Open
from ._lanes import HANGS_SECS, Lanes
from ._life import Life
from ._membership import Membership
from ._open_turns import OpenTurns, break_phase, closed, settle_commit
from ._protocol import Forgotten, Turn
from ._series import Listener, Series
from ._verdict import Gathered, Verdict
from ._worker import Promise, end_at_exit, wait_for_all, wait_for_ends

T = TypeVar("T")

_Turns = list[tuple[Turn, Promise[Verdict | Gathered]]]

logger = logging.getLogger(__name__)

_LOST = "it lost its connection to the store"
# How long a rank that is told that the store goes away reads its last verdicts.
_DRAIN_SECS = 1.0
_FAREWELL_AT_EXIT_SECS = 0.5


class Session:
    """All that a connected barrier has; thread-safe.

    :ivar turns: those that were taken, and are awaited
    """

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
        self.all_joined: bool = False
        self._keys = keys
        self._token = uuid.uuid4().hex
        # Guards what follows where several threads change it together; never held over a
        # call to the store.
        self._lock = threading.Lock()
        self._life: Life | None = None
        self._watched: Membership | None = None
        self._left: Membership | None = None
        self._standing = False
        self._replaced = False
        self._silent = False
        self._joining: Promise[None] | None = None
        self._joining_since = 0.0
        self._series: dict[str, Series] = {}
        # Who has it finds either a series, or turns and a thread that was told to go on. Held over
        # nothing that waits; taken before the other lock.
        self._unfolding = threading.RLock()
        self._owed: list[Callable[[Connection], object]] = []
        self._owed_turns: list[tuple[str, str]] = []
        self._lanes = Lanes(open_connection, init_secs)
        self.turns = OpenTurns(self._lanes, keys.prefix)
        end_at_exit(self)

    # -- joining ---------------------------------------------------------------------

    @property
    def stands(self) -> bool:
        """Whether turns can be taken: joined, and the generation not known to be over."""
        return self._standing

    @property
    def joined_before(self) -> bool:
        """Whether joining is joining again."""
        return self._life is not None

    @property
    def generation(self) -> int:
        """The generation that this rank joined last."""
        return self._membership.generation

    @property
    def has_a_say(self) -> bool:
        """Whether `farewell` would tell anybody anything, and not just open a connection."""
        return self._watched is not None or bool(self.turns) or bool(self._series)

    @property
    def closing(self) -> bool:
        """Whether it is taking leave."""
        return self.turns.closing

    @property
    def silent(self) -> bool:
        """Whether the store has left a call unanswered, and none was answered since."""
        return self._silent

    @property
    def replaced(self) -> bool:
        """Whether another life of this rank took its place for good."""
        return self._replaced

    def join(self) -> Promise[None]:
        """Connect, and claim this rank in the present generation; one attempt serves all."""
        if self._joining is None or self._joining.done():
            self._joining_since = time.monotonic()
            self._joining = self._lanes.control.submit(self._join, again=True)
        return self._joining

    def doubt_joining(self) -> None:
        """The caller of `join` waits no longer: see whether it hangs, on a dead connection."""
        if self._joining is None or self._joining.done():
            return
        took = time.monotonic() - self._joining_since
        if took > (HANGS_SECS if self._lanes.control.connected else self.init_secs):
            self._start_afresh(None)

    def _join(self, store: Connection) -> None:
        if self._standing or self._replaced:
            return
        if self.closing:
            raise closed(self._keys.prefix)
        before = life = self._life
        previous = None if life is None else life.membership
        if previous is not None and previous.is_over(store):
            # Before this rank is seen to have left that generation, and what is left of it goes.
            self._lanes.reset_remains()
            self._outlive(store, previous, self._turns_in(previous))
        membership = _membership.join(
            store, self._keys, self.rank, self.world_size, self._token, previous
        )
        if membership is None:
            self._replaced = True
            return
        self._lanes.reset_remains()
        if life is None or membership is not previous:
            # Phases of a generation that is over are broken by those who still live in it.
            self._owed.clear()
            if previous is not None:
                # Our watcher may have been cut off when it ended.
                self._outlive(store, previous, self._turns_in(previous))
            life = Life(membership)
            self.all_joined = membership.generation == 0
        while self._owed:
            self._owed[0](store)
            del self._owed[0]
        while self._owed_turns:
            name, reason = self._owed_turns[0]
            break_phase(store, life.next_turn(name), reason)
            del self._owed_turns[0]
        with self._lock:
            # Not this one if it hung, was given up and comes to its end after another one.
            takes_effect = self._life is before and not self.closing
            if takes_effect:
                self._life = life
                self._standing = True
                self._silent = False
                watched, self._watched = self._watched, membership
        if not takes_effect:
            if membership is not previous:
                membership.leave(store)
            raise closed(self._keys.prefix)
        if watched is not membership:
            watcher = self._lanes.watcher
            watcher.submit(lambda store: self._watch(store, membership, watcher))

    def _watch(self, store: Connection, membership: Membership, watcher: Lane) -> None:
        began = time.monotonic()
        try:
            mail = self._await_mail(store, membership)
            turns = self._cease(membership, watcher)
            if mail == _membership.HOST_LEAVES:
                self._lose_host(store, turns)
            elif mail != _membership.CLOSED:
                self._outlive(store, membership, turns)
            store.delete(membership.mail)
            if mail in (_membership.CLOSED, _membership.HOST_LEAVES):
                # Our last word: a host that waits for it may be gone the moment it hears it.
                self._leave(store, membership)
        except BarrierConnectionError as exc:
            turns = self._cease(membership, watcher)
            if watcher is self._lanes.watcher:
                self._lanes.renew()
            logger.debug("rank %d lost the store: %s", self.rank, exc)
            if turns and time.monotonic() - began > 1:
                # Whoever waits has to hear of the next restart, too.
                self._lanes.control.submit(self._join, again=True)
            raise

    def _leave(self, store: Connection, membership: Membership) -> None:
        """Be counted out, once."""
        with self._lock:
            if self.hosts or self._left is membership:
                return
            self._left = membership
        membership.leave(store)

    def _await_mail(self, store: Connection, membership: Membership) -> bytes:
        while (mail := store.await_value(membership.mail)) not in _membership.LETTERS:
            # Something else wrote it, or somebody asks whether we live; this is the answer.
            store.delete(membership.mail)
            # A letter that came just before that is gone with it.
            if self.closing:
                return _membership.CLOSED
            if membership.is_over(store):
                return _membership.OVER
        return mail

    def _cease(self, membership: Membership, watcher: Lane) -> _Turns:
        """Take no more turns in a generation; those that are open in it.

        :param watcher: who heard of its end; not one that was left behind, and has been replaced
        """
        with self._lock:
            if self._watched is membership and self._lanes.watcher is watcher:
                self._watched = None
                self._standing = False
        return self._turns_in(membership)

    def _turns_in(self, membership: Membership) -> _Turns:
        self.unfold()
        turns = self.turns.items()
        return [item for item in turns if item[0].keys.generation == membership.generation]

    def _outlive(self, store: Connection, membership: Membership, turns: _Turns) -> None:
        rank = membership.successor(store)
        who = "another rank" if rank is None else f"rank {rank}"
        reason = f"{who} joined again: it was restarted, or two processes share its number"
        logger.info("barrier %r: %s", self._keys.prefix, reason)
        for turn, promise in turns:
            try:
                judged = break_phase(store, turn, reason, by=rank)
            except Forgotten as exc:
                exc.in_doubt = turn.entered
                promise.settle(error=exc)
                continue
            if isinstance(judged, Gathered) and judged.leader == rank:
                # It may have published before it died; nobody else can say.
                promise.settle(
                    error=BrokenBarrierError(turn.name, turn.sequence, rank, reason, in_doubt=True),
                )

    def _lose_host(self, store: Connection, turns: _Turns) -> None:
        reason = "rank 0 closed its barrier, and with it the store that it hosts"
        for turn, promise in turns:
            if isinstance(break_phase(store, turn, reason, by=0), Gathered):
                promise.settle(
                    error=BrokenBarrierError(turn.name, turn.sequence, 0, reason, in_doubt=True),
                )
        self.turns.stop_doubting()
        # Those that read verdicts, and the one that may be clearing up.
        readers = set(self._lanes.all) - {self._lanes.watcher}
        drained = [lane.drained() for lane in readers]
        wait_for_all(drained, time.monotonic() + _DRAIN_SECS)
        self._lanes.renew()

    @property
    def _membership(self) -> Membership:
        assert self._life is not None
        return self._life.membership

    def not_joined(self) -> Promise[tuple[int, ...]]:
        """The ranks that are not in the present generation."""
        return self._lanes.control.submit(self._membership.not_joined)

    # -- turns -----------------------------------------------------------------------

    def take_turn(self, name: str, leader: int | None = None) -> Turn | None:
        """This rank's turn in the next phase of ``name``; None where it must join (again) first."""
        for series in list(self._series.values()):
            # Others may keep their lanes while they need them.
            if series.name == name or not series.waits:
                self.unfold(series)
        # One with `_cease`: a turn in a generation that ends is either seen by it or not taken.
        with self._lock:
            life = self._life
            if life is None or not self._standing:
                return None
            turn = life.next_turn(name, leader)
            self.turns.open(turn)
            return turn

    def next_sequence(self, name: str) -> int:
        """The sequence number that the next turn of ``name`` would have."""
        self._unfold_name(name)
        return 0 if self._life is None else self._life.next_sequence(name)

    def owe_turn(self, name: str, reason: str) -> None:
        """The store could not be reached: break the next turn of ``name`` when it can."""
        self._owed_turns.append((name, reason))

    def open_turn(self, name: str) -> Turn | None:
        """The oldest turn of ``name`` that is awaited now."""
        self._unfold_name(name)
        return self.turns.named(name)

    def series(self, name: str, listen: Callable[[Connection], Listener | None]) -> Series | None:
        """What a crossing of ``name`` may follow; None where it needs a turn.

        :param listen: how the caller's event loop listens to a connection, if it can
        """
        if (series := self._series.get(name)) is not None:
            return series  # or it is over by now, and will say so
        with self._unfolding:
            life = self._life
            if life is None or not self._standing or self.closing:
                return None
            latest = life.latest(name)
            if latest is None or not latest.rests or (lane := self._lanes.take_idle()) is None:
                return None
            connection = lane.idle_connection
            listener = listen(connection) if connection is not None and connection.direct else None
            if connection is None or listener is None:
                self._lanes.put_back(lane)
                return None
            series = Series(life, latest, lane, connection, listener, self._unfolding)
            self._series[name] = series
            return series

    def unfold(self, *series: Series) -> None:
        """From any thread: have turns again, and a thread wait where an event loop does.

        :param series: in place of which; of all, if none are given
        """
        with self._unfolding:
            for each in series or list(self._series.values()):
                if not each.over:
                    self._unfold(each)
                    # Last, since some look without the lock: they find it, and come here.
                    del self._series[each.name]

    def _unfold_name(self, name: str) -> None:
        if (series := self._series.get(name)) is not None:
            self.unfold(series)

    def _unfold(self, series: Series) -> None:
        series.end()
        lane = series.lane
        with self._lock:
            series.life.resume(series.before)
            if not series.waits:
                self._lanes.put_back(lane)
                return
            turn = series.turn = series.life.next_turn(series.name, goes_on=True)
            # Before anyone else can find it.
            turn.said()
            self.turns.open(turn, lane)
        self.turns.promised(turn).when_settled(series.caller.tell)
        self.turns.finish(turn, lane, series.dialogue, series.connection)

    def owe(self, turn: Turn, verdict: Verdict) -> None:
        """The store did not take the leader's word: as `start_afresh`, but for that."""
        lane = self.turns.give_lane_up(turn)
        self._owe(lane, lambda store: settle_commit(store, turn, verdict))

    def start_afresh(self, turn: Turn, reason: str = _LOST) -> None:
        """The store did not answer in time: leave the connections that hang behind.

        The break of ``turn`` that it did not take is made up for when this rank joins again,
        which it tries at once: peers may still wait in the phase.
        """
        lane = self.turns.give_lane_up(turn)
        self._owe(lane, lambda store: self._make_up_for(store, turn, lane, reason))

    def _owe(self, lane: Lane | None, debt: Callable[[Connection], object]) -> None:
        self._owed.append(debt)
        self._start_afresh(lane)
        if not self.closing:
            self.join()

    def doubt(self) -> None:
        """The store answers, and may know nothing of this rank any more: join first, then go on."""
        self._standing = False
        self.unfold()

    def lost(self, turn: Turn) -> None:
        """``turn`` lost its connection, and is a commit that only its leader can settle."""
        self._owed.append(lambda store: self._make_up_for(store, turn, None))
        self.doubt()

    def _start_afresh(self, lane: Lane | None) -> None:
        self.doubt()
        self._silent = True
        self._joining = None
        hung = [] if lane is None else [lane]
        if self.closing:
            # Nothing is begun any more, so nobody would end it.
            for each in (*hung, self._lanes.control):
                each.abandon()
            return
        hung.append(self._lanes.replace_control())
        if self._lanes.watcher.interruptible:
            # Two that wait for the same mail would take it from each other.
            hung.append(self._lanes.replace_watcher())
            self._watched = None
        for each in hung:
            self._lanes.leave_behind(each)

    def _make_up_for(
        self, store: Connection, turn: Turn, lane: Lane | None, reason: str = _LOST
    ) -> None:
        try:
            judged = break_phase(store, turn, reason)
        except Forgotten:
            # Nobody is left who could wait for it, and this rank must not fail to join for it.
            return
        if isinstance(judged, Gathered):
            self._forsake(store, turn, judged, lane)

    def _forsake(self, store: Connection, turn: Turn, judged: Gathered, lane: Lane | None) -> None:
        """Leave a commit to its leader, and depart from it unless ``lane`` still waits there."""
        if judged.leader != self.rank and (lane is None or lane.interruptible):
            turn.forsake(store, judged)

    # -- leaving ---------------------------------------------------------------------

    def farewell(self) -> Promise[None]:
        """Break the open turns, and tell our own watcher, and a host that waits, that we leave.

        A host itself waits in it until its peers have left.
        """
        self.turns.closing = True
        self.unfold()
        return self._lanes.control.submit(self._say_farewell)

    def _say_farewell(self, store: Connection) -> None:
        for turn, promise in self.turns.items():
            judged = break_phase(store, turn, "it closed its barrier")
            if isinstance(judged, Gathered):
                promise.settle(error=closed(self._keys.prefix, in_doubt=True))
                self._forsake(store, turn, judged, self.turns.lane_of(turn))
            else:
                # Known now, while the thread that waits for it may not have read it yet.
                promise.settle(judged)
        self.turns.stop_doubting()
        for turn in self._life.kept if self._life is not None else ():
            turn.leave(store)
        # Not `_standing`: one lost connection ends that, and the watcher may be well.
        if (membership := self._watched) is not None:
            store.set(membership.mail, _membership.CLOSED)
            if self.hosts:
                membership.host_leave(store)
            elif not self._lanes.watcher.connected:
                # It would be stopped before it can; and a host waits for that.
                self._leave(store, membership)

    def retire(self) -> list[Lane]:
        """End all lanes after what they are doing; their `ended` is settled then."""
        self.turns.closing = True
        self.unfold()
        for turn, promise in self.turns.items():
            promise.settle(error=closed(self._keys.prefix, in_doubt=turn.entered))
        if self.hosts and self._life is not None:
            self._lanes.watcher.submit(self._membership.wait_no_longer)
        return self._lanes.retire()

    def stop_connecting(self) -> None:
        """End the lanes that have no connection, and are waiting for a store at most."""
        self._lanes.stop_connecting()

    def abandon(self) -> None:
        """End the calls of lanes that did not end by themselves."""
        self._lanes.abandon()

    def end(self, deadline: float) -> None:
        """Leave before the interpreter does, blocking until ``deadline`` (monotonic) at most."""
        if self.has_a_say and not self.closing:
            said = self.farewell()
            said.wait(min(_FAREWELL_AT_EXIT_SECS, deadline - time.monotonic()))
            self._silent = not said.done()
        ended = [lane.ended for lane in self.retire()]
        self.stop_connecting()
        wait_for_ends(ended, deadline, self.abandon, patient=not self._silent)
