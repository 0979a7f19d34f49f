"""One rank's part in one phase: what it writes to the store, in which order.

Blocking calls on one connection, no threads and no event loop, so that it can be read
beside the laws. Why it is safe is argued in docs/design.md; in short:

* *enter*: append my arrival to the phase's log, then count it. Ranks that *meet* wait for the
  count to be full, read the log and judge it, each for itself. Where they cannot, whoever counts
  the last arrival reads the log, judges it and announces the verdict; the others *listen* for it.
* *give up*: append a break to the log, overfill the count, read the log back, judge it, announce.
  The order of the log decides between a break and the last arrival, so all who judge it agree.
* *depart*: when I know the verdict and no call of mine uses the phase any more, I count
  myself out. The last one out deletes the keys: nobody is left to read them. Where all ranks
  *keep* the keys, the next phase of the name has them, and we depart with that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from . import _verdict
from ._connection import Connection, countable
from ._errors import BarrierConnectionError, BarrierError, describe
from ._keys import LOGS, PhaseKeys
from ._verdict import Broken, Gathered, Released, Verdict

T = TypeVar("T")

logger = logging.getLogger(__name__)

# The counter of a phase: arrivals, those who gave up, departures, and whether somebody wrote a
# summary. Anyone who gives up brings it over any world size, so that no one waits at it any more.
_RANKS = (1 << 24) - 1
_GAVE_UP = 1 << 24
_DEPARTED = 1 << 36
_SUMMARISED = 1 << 62
# Nothing of ours counts up to this.
_MOST = _SUMMARISED + (_SUMMARISED >> 1)
# In larger worlds not every rank may read all arrivals: those of so many still fit into one packet.
_MEETING = 256
# So many phases may have the same keys: all their arrivals are one number.
LONGEST_SERIES = _RANKS // _MEETING - 2


def all_counted(world_size: int, index: int) -> int:
    """What the count is when all have arrived; those of the ``index`` phases before count, too."""
    return world_size * (index + 1)


def stale_log(index: int) -> int | None:
    """Which log is to be emptied for the next phase, by who came last in the one before this one.

    He does so before he enters.
    """
    return (index + 1) % LOGS if index >= LOGS - 1 else None


class Forgotten(BarrierConnectionError):
    """The store does not know our arrival: it was restarted, or our generation is long over."""

    def __init__(self) -> None:
        super().__init__(
            "the store no longer knows that this rank had entered: was it restarted, or did "
            "something else write to its keys?"
        )


class Turn:
    """One rank's part in one phase. Its methods may run in several threads at once."""

    # How many phases had these keys before this one.
    index: int = 0
    entered: bool = False
    verdict: Verdict | None = None
    _users = 0
    _heir: Turn | None = None
    _clears = False
    _arrival = b""
    _counted = False
    _arrived_at = 0
    _summary_seen = 0
    _departed = False
    _forsaken: Gathered | None = None
    _claimed = False

    def __init__(
        self,
        keys: PhaseKeys,
        name: str,
        sequence: int,
        rank: int,
        world_size: int,
        leader: int | None = None,
        keeps: bool = False,
        follows: Turn | None = None,
        present: Callable[[Connection], bool] = lambda store: True,
    ) -> None:
        self.keys: PhaseKeys = keys
        self.name = name
        self.sequence = sequence
        self.rank = rank
        self.world_size = world_size
        self.leader = leader
        self.keeps = keeps
        self._present = present
        self._lock = threading.Lock()
        self._follows = follows
        if follows is not None and follows.verdict is not None:
            self._take_over(follows, follows.verdict)

    @property
    def log(self) -> str:
        """The key that all ranks append to in this phase."""
        return self.keys.logs[self.index % LOGS]

    @property
    def line(self) -> bytes:
        """What it appended there to arrive; empty before that."""
        return self._arrival

    @property
    def parting_word(self) -> Verdict | Gathered:
        """What this rank knew when it departed."""
        word = self.verdict or self._forsaken
        assert word is not None
        return word

    def hold(self) -> bool:
        """Keep this rank from departing until `release`; False if it has departed."""
        with self._lock:
            self._users += not self._departed
            return not self._departed

    def release(self, store: Connection, *, spoke: bool = False) -> None:
        """Undo one `hold`. The last one departs, if the verdict is known.

        :param spoke: where what was last sent on ``store`` may still be on its way
        """
        departs = self.let_go(if_last=spoke)
        if departs is None:
            # Another connection departs for us, and what is on its way on this one must not come
            # after that, when the keys may be gone. An answer says that it has come.
            try:
                store.read(self.keys.summary)
            finally:
                departs = self.let_go()
        if departs:
            self.depart(store)
        elif heir := self._bequeath():
            heir.release(store)

    def let_go(self, *, if_last: bool = False) -> bool | None:
        """Undo one `hold`; whether it is up to the caller to `depart` now.

        :param if_last: not where this rank cannot depart with it: None, and `release` is due
        """
        with self._lock:
            verdict = self.verdict
            if verdict is None or self._users > 1 or self._departed:
                if if_last:
                    return None
                self._users -= 1
                return False
            if if_last and self._heir is not None:
                return None
            self._users = 0
            self._departed = True
        # Where the next phase of this name has our keys, we depart with that.
        return not verdict.shared

    def _leave_to(self, heir: Turn) -> bool:
        """Whether ``heir`` has to be released when all calls have let go of this turn."""
        with self._lock:
            if not self._users or self._heir is heir:
                return False
            self._heir = heir
            return True

    def _bequeath(self) -> Turn | None:
        """The next turn with our keys, if it has to be released now."""
        with self._lock:
            if self._users:
                return None
            heir, self._heir = self._heir, None
            return heir

    @property
    def shared(self) -> bool:
        """Whether the next phase of this name has the same keys."""
        return self.verdict is not None and self.verdict.shared

    @property
    def rests(self) -> bool:
        """Whether it has no more to do before the next phase of this name has its keys."""
        return self._departed and self.shared

    def later(self, phases: int, last_rank: int) -> Turn:
        """The turn so many ``phases`` later, where this one and all up to that were `rests`."""
        if not phases:
            return self
        turn = Turn(
            self.keys,
            self.name,
            self.sequence + phases,
            self.rank,
            self.world_size,
            keeps=True,
            present=self._present,
        )
        turn.index = self.index + phases
        turn.verdict = Released(last_rank, listeners=False, shared=True)
        turn.entered = turn._counted = turn._departed = True
        turn._arrival = self._arrival
        return turn

    def leave(self, store: Connection) -> None:
        """Depart from keys that were kept for a phase that this rank will not take part in."""
        if self.shared:
            self.depart(store)

    def forsake(self, store: Connection, gathered: Gathered) -> None:
        """Depart without the verdict of a commit, which only its leader can give."""
        with self._lock:
            if self._departed:
                return
            self._departed = True
            self._forsaken = gathered
        self.depart(store)

    def during(
        self, store: Connection, call: Callable[[Connection], T], afterwards: Callable[[], T]
    ) -> T:
        """``call``, and no departing until it returns; ``afterwards`` if this rank has departed."""
        if not self.hold():
            return afterwards()
        spoke = False
        try:
            self.locate(store)
            outcome = call(store)
            spoke = True
            return outcome
        finally:
            self.release(store, spoke=spoke)

    def locate(self, store: Connection) -> None:
        """Find out which keys are ours, where the phase before was going on when we began."""
        if (before := self._follows) is not None:
            judged = before.during(store, before._leave_behind, lambda: before.verdict)
            self._take_over(before, judged)

    def _leave_behind(self, store: Connection) -> Verdict | Gathered | None:
        # Either this line stands before what decides the phase, which then shares its keys with
        # none; or it is decided, and we read what all read.
        store.append(self.log, _verdict.listening(self.rank))
        return self._judge(store)

    def _take_over(self, before: Turn, judged: Verdict | Gathered | None) -> None:
        if isinstance(judged, Released) and judged.shared:
            self.keys = before.keys
            self.index = before.index + 1
            # All ranks are done with the phase before that one, as all have entered it. Its
            # log is the one after ours; it is empty by the time anyone enters the next phase,
            # as nobody does before we have entered this one.
            self._clears = judged.last_rank == self.rank
            # A call that would break the phase before may still be under way, and writes to these
            # keys: it keeps us from departing, too.
            if before._users:
                self.hold()
                if not before._leave_to(self):
                    self.let_go()
        self._follows = None

    def enter(self, store: Connection, payload: bytes = b"") -> Verdict | Gathered:
        """Arrive and wait for the verdict; a commit's leader waits only until all are in."""
        if self._follows is not None:
            self.locate(store)
        self.entered = True
        if payload:
            # With its length, so that what something else wrote there is not published.
            store.set(self.keys.payload(self.rank), b"%d:%s" % (len(payload), payload))
        meets = store.meets and self.leader is None and self.world_size <= _MEETING
        if self._clears and (stale := stale_log(self.index)) is not None:
            store.set(self.keys.logs[stale], b"")
        self._arrival = _verdict.arrival(
            self.rank, self.leader, meets=meets, keeps=meets and self.keeps
        )
        if meets:
            return self.judge_meeting(store, self._meet(store))
        # Appended before it is counted: whoever counts world_size arrivals finds them all.
        store.append(self.log, self._arrival)
        self._arrived_at = store.add(self.keys.count, 1) & _RANKS
        self._counted = True
        if self._arrived_at >= self._total:
            judged = self._decide(store)
        elif self.rank == self.leader:
            store.await_value(self.keys.gathered)
            judged = self._decide(store)
        else:
            return self.await_verdict(store)
        if isinstance(judged, Gathered) and self.rank != self.leader:
            return self.await_verdict(store)
        return judged

    def _meet(self, store: Connection) -> bytes:
        """Wait until all have arrived; the log."""
        return store.meet(self.log, self._arrival, self.keys.count, self._total)

    @property
    def _total(self) -> int:
        return all_counted(self.world_size, self.index)

    def said(self) -> None:
        """As `hold`, and its arrival was said to the store, which is for `judge_meeting`."""
        self.hold()
        self.entered = True
        self._arrival = _verdict.arrival(self.rank, None, meets=True, keeps=self.keeps)

    def judge_meeting(self, store: Connection, log: bytes) -> Verdict | Gathered:
        """Judge the log of a meeting ourselves."""
        self._counted = True
        if self.verdict is None and self._arrival in log:
            released = _verdict.all_keep(log, self.world_size)
            if released is not None:
                # Most often. All are here and see the same, so there is nobody to tell.
                self.verdict = released
                return released
        judged = self._judge(store, log)
        if judged is None:
            # Whatever called us, it was too early. Said in the log before we look again, so
            # either we find it decided, or whoever decides it finds that we listen.
            store.append(self.log, _verdict.listening(self.rank))
            judged = self._judge(store)
            if judged is None:
                return self._listen(store)
        return self._announce(store, judged)

    def _listen(self, store: Connection) -> Verdict | Gathered:
        """Wait for the bell, when called from the meeting too early."""
        if (why := self._foul_count(store)) is not None:
            return self._break(store, None, why)
        # If it is lower than it was, those who have yet to come would wait there for ever.
        store.add(self.keys.count, _GAVE_UP)
        return self.await_verdict(store)

    def give_up(
        self,
        store: Connection,
        reason: str,
        timeout_secs: float | None = None,
        missing: tuple[int, ...] | None = None,
        by: int | None = None,
    ) -> Verdict | Gathered:
        """Break the phase, unless it is decided; what was decided either way.

        ``by`` is the rank to blame, if not this one. For all but the leader a commit in which
        everyone has arrived is `Gathered`, and giving up leaves it to the leader; for the
        leader too, once it has begun to publish.
        """
        return self._break(store, self.rank if by is None else by, reason, timeout_secs, missing)

    def give_up_lost(self, store: Connection, reason: str) -> Verdict | Gathered:
        """As `give_up`, after a call on another connection has failed."""
        if (why := self._foul_count(store)) is not None:
            return self._break(store, None, why)
        return self._break(store, self.rank, reason)

    def _break(
        self,
        store: Connection,
        blamed: int | None,
        reason: str,
        timeout_secs: float | None = None,
        missing: tuple[int, ...] | None = None,
    ) -> Verdict | Gathered:
        # Before all else: who asks for it may have no time to wait.
        store.append(
            self.log,
            _verdict.breaking(blamed, self.sequence, reason, timeout_secs, missing),
        )
        if self.world_size <= _MEETING and self._foul_count(store) is None:
            store.add(self.keys.count, _GAVE_UP)
        judged = self._decide(store)
        if isinstance(judged, Gathered) and judged.leader == self.rank and self.claim():
            return self.settle(store, Broken(blamed, reason, timeout_secs))
        # What the leader said may be known here already.
        return self.verdict or judged

    def _foul_count(self, store: Connection) -> str | None:
        """Why nothing can be counted, if something else wrote there; from now on it can be."""
        value = store.read(self.keys.count)
        if value is None or (countable(value) and int(value) < _MOST):
            return None
        store.compare_set(self.keys.count, value, b"%d" % _GAVE_UP)
        return f"something else wrote {_verdict.show(value)} where its arrivals are counted"

    def claim(self) -> bool:
        """Take the leader's right to settle; True for the first that asks, in this process."""
        with self._lock:
            claimed, self._claimed = self._claimed, True
            return not claimed

    def settle(self, store: Connection, verdict: Verdict) -> Verdict:
        """The leader's word on a commit in which everyone has arrived.

        Only the leader gives it, so a plain compare-and-set makes it final: told twice, on
        two connections, the first one stands.
        """
        winner = store.compare_set(self.keys.verdict, b"", _verdict.encode(verdict))
        try:
            self.verdict = _verdict.decode(winner)
        except ValueError:
            # Something else wrote there, and nobody but the leader can put it right.
            self.verdict = verdict
        # Once more, since a TCPStore's server without libuv wakes nobody for a compare_set.
        store.set(self.keys.verdict, _verdict.encode(self.verdict))
        return self.verdict

    def payloads(self, store: Connection) -> dict[int, bytes]:
        """What every rank brought; for the leader of a commit in which everyone has arrived."""
        found = store.read_many([self.keys.payload(rank) for rank in range(self.world_size)])
        brought = {}
        for rank, value in enumerate(found):
            length, _, payload = (b"0:" if value is None else value).partition(b":")
            if length != b"%d" % len(payload):
                raise BarrierError(
                    f"something else wrote {_verdict.show(value or b'')} where rank {rank} had put "
                    f"its payload for {describe(self.name, self.sequence)}"
                )
            brought[rank] = payload
        return brought

    def survey(self, store: Connection) -> tuple[int, tuple[int, ...]]:
        """How many ranks had arrived, and who had not.

        One rank reads all arrivals and leaves a summary for the others, who read no more
        than that. A summary serves a rank that has not used it yet and is counted in it.
        Where all may read the log anyway, they do.
        """
        if self.world_size <= _MEETING:
            missing = self._missing(store)
            return self.world_size - len(missing), missing
        key = self.keys.summary
        absent: tuple[int, ...] | None
        for _ in range(5):
            value = store.read(key) or b"0"
            try:
                number, absent = _read_summary(value, self.world_size)
            except ValueError:
                # Something else wrote it.
                number, absent = self._summary_seen, self._missing(store)
                break
            known = None if absent is None else self.world_size - len(absent)
            if known is not None and number != self._summary_seen and known >= self._arrived_at:
                break
            if known is not None or value == b"0":
                claim = b"%d by %d" % (number + 1, self.rank)
                before = b"" if value == b"0" else value
                if store.compare_set(key, before, claim) == claim:
                    if not before:
                        store.add(self.keys.count, _SUMMARISED)
                    number += 1
                    absent = self._missing(store)
                    store.set(key, b"%d:%s" % (number, _ranges(absent)))
                    break
            time.sleep(0.02)  # another rank is reading; it takes it less than this
        else:
            # The rank that claimed the reading has died over it.
            absent = self._missing(store)
        assert absent is not None
        self._summary_seen = number
        return self.world_size - len(absent), absent

    def _missing(self, store: Connection) -> tuple[int, ...]:
        return _verdict.missing(store.read(self.log) or b"", self.world_size)

    def _decide(self, store: Connection) -> Verdict | Gathered:
        judged = self._judge(store)
        if judged is None:
            absent = ", ".join(map(str, self._missing(store)))
            store.append(
                self.log,
                _verdict.breaking(
                    self.rank,
                    self.sequence,
                    f"{self.world_size} arrivals were counted, but none of rank {absent}; "
                    "do two processes share a rank, or did something else write to its keys?",
                ),
            )
            judged = self._judge(store)
            assert judged is not None
        return self._announce(store, judged)

    def _announce(self, store: Connection, judged: Verdict | Gathered) -> Verdict | Gathered:
        """Wake who listens for the verdict.

        Everyone who judges the log announces the same, so it does no harm that several may:
        the verdict key is a copy of what the log says, and a bell.
        """
        if isinstance(judged, Gathered):
            store.set(self.keys.gathered, b"g")
            return judged
        self.verdict = judged
        if isinstance(judged, Broken):
            store.set(self.keys.gathered, b"g")
        elif not judged.listeners:
            return judged
        store.set(self.keys.verdict, _verdict.encode(judged))
        return judged

    def _judge(self, store: Connection, log: bytes | None = None) -> Verdict | Gathered | None:
        # Asked before the log is read: another thread may be arriving just now.
        counted = self._counted
        if log is None:
            log = store.read(self.log) or b""
        if self.verdict is not None:
            # Known by now; and then a later phase may have this log already.
            return self.verdict
        # An arrival that is not there may just be on its way, if it was not counted yet.
        if self._arrival not in log and (counted or not self._present(store)):
            raise Forgotten
        return _verdict.judge(log, self.world_size, self.sequence)

    def await_verdict(self, store: Connection) -> Verdict:
        """Block until the phase is decided."""
        value = store.await_value(self.keys.verdict)
        if not value:
            # A TCPStore's answer where the key is deleted just as it is read.
            raise Forgotten
        try:
            self.verdict = _verdict.decode(value)
        except ValueError as exc:
            judged = self.give_up(store, f"something else wrote to its verdict ({exc})")
            if isinstance(judged, Gathered):
                # Only the leader knows, and what it said was overwritten.
                raise BarrierConnectionError("the verdict of this commit was overwritten") from exc
            return judged
        return self.verdict

    def depart(self, store: Connection) -> None:
        """Count this rank out; the last one deletes the keys."""
        keys = self.keys
        try:
            count = store.add(keys.count, _DEPARTED)
        except BarrierConnectionError as exc:
            # Nobody must lose for it what he has just learnt. What stays is deleted when this
            # generation is history.
            logger.debug("rank %d could not depart from %r: %s", self.rank, keys.path, exc)
            return
        if count // _DEPARTED & _RANKS < self.world_size:
            return
        spent = list(keys.logs[: self.index + 1])
        if not isinstance(self.verdict, Released) or self.verdict.listeners:
            spent.append(keys.verdict)
        if self.leader is not None or not isinstance(self.verdict, Released):
            # Also where this rank was no part of the commit, since others may have been.
            came = _verdict.committing(store.read(self.log) or b"")
            spent += [keys.gathered, *map(keys.payload, came)]
        if count & _SUMMARISED:
            spent.append(keys.summary)
        for key in (*spent, keys.count):
            store.delete(key)


def _read_summary(value: bytes, world_size: int) -> tuple[int, tuple[int, ...] | None]:
    """Its number and who was missing; None while the rank that claimed it still reads.

    :raises ValueError: it is no summary of this world
    """
    number, colon, ranges = value.partition(b":")
    if not colon:
        return int(number.partition(b" ")[0]), None
    missing: list[int] = []
    for span in ranges.split(b",") if ranges else ():
        first, _, last = span.partition(b"-")
        if int(last or first) >= world_size:
            raise ValueError(f"no summary: {_verdict.show(value)}")
        missing.extend(range(int(first), int(last or first) + 1))
    return int(number), tuple(missing)


def _ranges(ranks: tuple[int, ...]) -> bytes:
    """``3,5-9``: thousands of missing ranks are mostly neighbours."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return b",".join(b"%d" % a if a == b else b"%d-%d" % (a, b) for a, b in spans)


__all__ = ["Broken", "Forgotten", "Gathered", "Released", "Turn"]
