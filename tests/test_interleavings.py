"""Every interleaving of the protocol's operations, with a fault at each point of each.

Ranks do what a session has them do, every call in a thread and on a connection of its own, in
every order (a session's control lane would make some of them one after another). See `explorer`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from explorer import Report, System, View, Violation, explore

from async_barriers import _membership, _verdict
from async_barriers._connection import Connection
from async_barriers._errors import BarrierConnectionError
from async_barriers._keys import Keys, PhaseKeys
from async_barriers._membership import Membership
from async_barriers._protocol import Turn
from async_barriers._verdict import Broken, Gathered, Released, Verdict

KEYS = Keys("p")
PHASE = KEYS.phase(0, "x", 0)
# A deadline's reason is empty, a cancel's is not.
CANCEL, DEADLINE = None, 1.5

Record = Callable[[str, object], None]


class Scenario:
    """Who does what, and what has to hold."""

    def __init__(
        self, world_size: int, turn: Callable[..., Turn] = Turn, join: Any = None, **options: bool
    ) -> None:
        self.world_size = world_size
        self.system = System(**options)
        self._make_turn = turn
        self._join = join or _membership.join
        self._turns: dict[tuple[str, str], Turn] = {}
        self._leader: int | None = None
        self._has_stray = False

    def turn(
        self, process: str, keys: PhaseKeys = PHASE, *, leader: int | None = None
    ) -> Turn:
        """The part that ``process`` ("1", or "1 again") has in a phase, the same for all calls."""
        if (process, keys.path) not in self._turns:
            self._turns[process, keys.path] = self.system.shared(
                self._make_turn,
                f"{process} in {keys.path}",
                keys,
                "x",
                0,
                int(process.split()[0]),
                self.world_size,
                leader,
            )
        return self._turns[process, keys.path]

    def act(
        self, process: str, what: str, run: Callable[[Connection], object], **options: Any
    ) -> None:
        self.system.activity(f"{process} {what}", process, run, **options)

    # -- what a session does -----------------------------------------------------------

    def enter(self, *ranks: int, leader: int | None = None, keys: PhaseKeys = PHASE) -> None:
        """`Session.enter`."""
        for rank in map(str, ranks):
            turn = self.turn(rank, keys, leader=leader)
            self.act(
                rank,
                "enters",
                lambda store, rank=rank, turn=turn: self._enter(store, rank, turn),
                memory=f"{rank} in {keys.path}",
            )
        self._leader = leader

    def _enter(self, store: Connection, process: str, turn: Turn) -> None:
        path = turn.keys.path
        if not turn.hold():
            return self._learn(process, "enters", turn, turn.parting_word)
        try:
            self.system.note("entered", f"{process} in {path}", True)
            payload = b"" if turn.leader is None else b"of %d" % turn.rank
            self._learn(process, "enters", turn, turn.enter(store, payload))
        finally:
            turn.release(store)

    def give_up(
        self,
        *ranks: int,
        timeout_secs: float | None = DEADLINE,
        keys: PhaseKeys = PHASE,
        leader: int | None = None,
    ) -> None:
        """`Session.give_up`: a deadline, a cancel; an abort, if the rank does not enter."""
        for rank in map(str, ranks):
            turn = self.turn(rank, keys, leader=leader)
            self.act(
                rank,
                "gives up",
                lambda store, rank=rank, turn=turn: self._break(
                    store, rank, turn, None if timeout_secs else "stopped", timeout_secs
                ),
                memory=f"{rank} in {keys.path}",
            )

    def _break(
        self,
        store: Connection,
        process: str,
        turn: Turn,
        reason: str | None,
        timeout_secs: float | None = None,
        by: int | None = None,
    ) -> None:
        def call(store: Connection) -> None:
            who = process if by is None else str(by)
            self.system.note("gave up", f"{who} in {turn.keys.path}", True)
            judged = turn.give_up(store, reason or "", timeout_secs, None, by)
            self._learn(process, "gives up", turn, judged)

        turn.during(
            store, call, lambda: self._learn(process, "gives up", turn, turn.parting_word)
        )

    def publish(self, leader: int, *, fails: bool = False) -> None:
        """What `commit` does on the leader, when it hears that all are in."""
        turn = self.turn(str(leader), leader=leader)
        self.act(
            str(leader),
            "publishes",
            lambda store: self._publish(store, str(leader), turn, fails),
            memory=f"{leader} in {PHASE.path}",
        )

    def _publish(self, store: Connection, process: str, turn: Turn, fails: bool) -> None:
        path = turn.keys.path
        _, gathered = self.system.await_note("learned", f"{process} enters in {path}")
        if not isinstance(gathered, Gathered):
            return
        last_rank = gathered.last_rank

        def hear(store: Connection) -> None:
            self._learn(process, "publishes", turn, turn.await_verdict(store))

        def begin(store: Connection) -> None:
            self.system.note("publishing", path, tuple(turn.payloads(store).items()))

        def settle(store: Connection) -> None:
            if fails:
                self.system.note("gave up", f"{process} in {path}", True)
                verdict: Verdict = Broken(turn.rank, "publish failed")
            else:
                self.system.note("published", path, True)
                verdict = Released(last_rank, b"result")
            self._learn(process, "publishes", turn, turn.settle(store, verdict))

        def departed() -> None:
            self._learn(process, "publishes", turn, turn.parting_word)

        if turn.claim():
            turn.during(store, begin, departed)
            turn.during(store, settle, departed)
        else:
            turn.during(store, hear, departed)

    def stray(self, rank: int) -> None:
        """The arrival of ``rank``, which has begun to enter, is made twice."""

        def run(store: Connection) -> None:
            self.system.await_note("entered", f"{rank} in {PHASE.path}")
            store.append(PHASE.log, _verdict.arrival(rank, None))
            store.add(PHASE.count, 1)

        self.act("stray", f"is {rank}", run, stray=True)
        self._has_stray = True

    def _learn(self, process: str, how: str, turn: Turn, verdict: object) -> None:
        path = turn.keys.path
        self.system.note("learned", f"{process} {how} in {path}", (path, verdict))

    # -- lives of a rank ---------------------------------------------------------------

    def joined(self, *ranks: int) -> None:
        """All that happens before the scenario begins."""
        store = self.system.connection()
        for rank in map(str, ranks):
            self.system.shared(Life, rank)
            self._joins(store, rank, None)

    def _joins(
        self, store: Connection, process: str, previous: Membership | None
    ) -> Membership | None:
        membership: Membership | None = self._join(
            store, KEYS, int(process.split()[0]), self.world_size, process, previous
        )
        generation = None if membership is None else membership.generation
        if generation is None:
            self.system.note("replaced", process, True)
        else:
            self.system.note("joined", f"{process} in {generation}", True)
            self.system.note("is in", process, generation)
        return membership

    def live(self, process: str) -> None:
        """Join, and join again whenever the generation ended."""

        def run(store: Connection) -> None:
            membership = self._joins(store, process, None)
            while membership is not None:
                store.await_value(membership.mail)
                store.delete(membership.mail)
                membership = self._joins(store, process, membership)

        self.act(process, "lives", run)

    def cross(self, process: str, *, afresh: bool = False) -> None:
        """Cross in the generation that it is in; if that ends, once more in the next.

        Its watcher is an activity of its own, as `Session._watch` is.
        """
        life = self.system.shared(Life, f"life of {process}", not afresh)
        rank = int(process.split()[0])
        turns = {
            generation: self.turn(process, KEYS.phase(generation, "x", 0))
            for generation in range(3)
        }

        def run(store: Connection) -> None:
            membership: Membership | None
            if afresh:
                membership = self._joins(store, process, None)
                assert membership is not None
                life.stand()
            else:
                membership = Membership(KEYS, rank, self.world_size, process, 0)
            while True:
                if life.take_turn():
                    self._enter(store, process, turns[membership.generation])
                    life.forget()
                if membership.generation:
                    return
                self.system.await_note("over", f"{process} in {membership.generation}")
                membership = self._joins(store, process, membership)
                if membership is None:
                    return
                life.stand()

        def watch(store: Connection) -> None:
            generation = self.system.await_note("is in", process) if afresh else 0
            membership = Membership(KEYS, rank, self.world_size, process, generation)
            store.await_value(membership.mail)
            if life.cease():
                self._break(
                    store, process, turns[generation], "again", by=membership.successor(store)
                )
            store.delete(membership.mail)
            self.system.note("over", f"{process} in {generation}", True)

        self.act(process, "crosses", run)
        self.act(process, "watches", watch)

    # -- the laws ----------------------------------------------------------------------

    def explore(self, record: Record | None = None, **options: Any) -> Report:
        report = explore(self.system, self.noted, self.ended, **options)
        print(f"\n  {self.world_size} ranks: {report}")
        if record is not None:
            record(f"explored, {self.world_size} ranks", str(report))
        return report

    def noted(self, view: View, kind: str, who: str, value: Any) -> None:
        if kind == "learned":
            self._judge(view, who, *value)
        elif kind == "publishing":
            assert read_log(view, who, self.world_size) is True, "published without everyone"
            assert dict(value) == {r: b"of %d" % r for r in range(self.world_size)}, value
        elif kind in ("joined", "entered"):
            lives = [w for w in view.notes(kind) if (w[0], where(w)) == (who[0], where(who))]
            assert lives == [who], f"law 1: two lives in one generation: {lives}"

    def _judge(self, view: View, who: str, path: str, verdict: object) -> None:
        said = read_log(view, path, self.world_size)
        entered = {w.split()[0] for w in view.notes("entered") if where(w) == path}
        if isinstance(verdict, Released | Gathered):
            assert said is True, f"law 1: {who} learns {verdict}, where the log says {said}"
            assert len(entered) == self.world_size, f"law 1: {who} is released, {entered} entered"
        if isinstance(verdict, Broken):
            assert said is not None, f"law 3: {who} learns {verdict}, but nothing is decided"
            assert path not in view.notes("published"), f"published, but {who} learns {verdict}"
            if said is True:
                assert verdict.rank == self._leader, f"law 3: {who} learns {verdict}, too late"
            else:
                told = {"rank": verdict.rank, "reason": verdict.reason}
                if verdict.timeout_secs is not None:
                    told["missing"] = list(verdict.missing)  # type: ignore[assignment]
                assert told.items() <= said.items(), f"law 6: {who} learns {verdict}, not {said}"
            blamed = [w for w in view.notes("gave up") if where(w) == path]
            if not (self._has_stray and "share a rank" in verdict.reason):
                assert f"{verdict.rank} in {path}" in blamed, f"law 3: {verdict}, gave up: {blamed}"
        for other, (there, heard) in view.notes("learned").items():
            if there == path and Gathered not in (type(heard), type(verdict)):
                assert heard == verdict, f"law 2: {who} learns {verdict}, {other}: {heard}"

    def ended(self, view: View) -> None:
        waits = [name for name in view.blocked if not name.endswith(("watches", "lives", "is 0"))]
        if view.crashed is not None and view.crashed == str(self._leader):
            # Nobody else can say whether it had published; whoever waits for that has a deadline.
            waits = [name for name in waits if not name.endswith("enters")]
        assert not waits, f"laws 4, 11: blocked for ever: {waits}"
        left = [key for key in view.keys() if "/phase/" in key]
        # What the dead left is swept when their generation is history.
        dead = view.crashed is not None or view.notes("replaced")
        assert dead or not left, f"law 10: left behind: {left}"
        present = max(view.notes("is in").values(), default=0)
        for process, generation in view.notes("is in").items():
            if process not in (*view.notes("replaced"), view.crashed, "0 old", "1 old"):
                assert generation == present, f"law 11: {process} was left in {generation}"


class Life:
    """What a session remembers of the generation it is in."""

    def __init__(self, standing: bool = True) -> None:
        import threading

        self._lock = threading.Lock()
        self.stands = standing
        self.has_turn = False

    def stand(self) -> None:
        with self._lock:
            self.stands = True

    def take_turn(self) -> bool:
        with self._lock:
            self.has_turn = self.stands
            return self.has_turn

    def forget(self) -> None:
        self.has_turn = False

    def cease(self) -> bool:
        with self._lock:
            self.stands = False
        return self.has_turn


def where(who: str) -> str:
    """The phase or generation in "1 again enters in <phase>"."""
    return who.partition(" in ")[2]


def read_log(view: View, path: str, world_size: int) -> bool | dict[str, Any] | None:
    """True if it is complete, or the line that broke it; told otherwise than the library does."""
    lines = view.ever(f"{path}/log").decode().splitlines()
    everyone = set(range(world_size))
    for index, line in enumerate(lines):
        here = {int(line[1:].split()[0]) for line in lines[:index]}
        if line[0] == "b":
            said: dict[str, Any] = json.loads(line[1:])
            return {**said, "missing": sorted(everyone - here)}
        if here | {int(line[1:].split()[0])} == everyone:
            return True
    return None
