"""What ranks do in phases, as a session has them do it.

Every call that a session makes is an activity on a connection of its own, so more orders are
explored than a session's control lane, which makes some of them one after another, would allow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
from explorer import Report, explore
from phase_laws import PhaseLaws, sequence_of
from replayed import END, Stage, System

from async_barriers import _protocol, _verdict
from async_barriers._connection import Connection, HashConnection, TCPConnection
from async_barriers._keys import Keys, PhaseKeys
from async_barriers._protocol import Forgotten, Turn
from async_barriers._verdict import Broken, Gathered, Released, Verdict

KEYS = Keys("p")
PHASE = KEYS.phase(0, "x", 0)
DEADLINE = 1.5


class Listening(TCPConnection):
    """A TCPStore where ranks listen instead of meeting."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.meets = False


# How the library talks to a store, and whether that leaves calls unanswered. In a large world,
# ranks listen and may not all read the log.
STORES: dict[str, tuple[Callable[..., Connection], bool]] = {
    "tcp": (TCPConnection, True),
    "tcp, answered": (TCPConnection, False),
    "tcp, large world": (Listening, True),
    "hash": (HashConnection, False),
    "any": (Connection, False),
}


class Scenario(PhaseLaws):
    """Who does what. A process is named by its rank, "1", a later life of it "1 again"."""

    def __init__(
        self, world_size: int, turn: Callable[..., Turn] = Turn, *, store: str = "tcp"
    ) -> None:
        super().__init__(world_size)
        connect, in_flight = STORES[store]
        self.system = System(connect, in_flight=in_flight)
        # What may be left waiting besides.
        self.idle = ""
        self._meeting = 1 if store == "tcp, large world" else _protocol._MEETING
        self._make_turn = turn
        self._turns: dict[tuple[str, PhaseKeys], Turn] = {}
        self._phases: dict[Turn, str] = {}

    def turn(
        self,
        process: str,
        keys: PhaseKeys = PHASE,
        *,
        leader: int | None = None,
        **options: Any,
    ) -> Turn:
        """The part that ``process`` has in a phase, the same for all its calls."""
        if (process, keys) not in self._turns:
            rank = int(process.split()[0])
            if leader is not None:
                self.leaders[keys.path] = leader
            turn = self.system.shared(
                f"{process} in {keys}",
                self._make_turn,
                *(keys, "x", sequence_of(keys.path), rank, self.world_size, leader),
                changing=("keys",),
                **options,
            )
            self._turns[process, keys] = turn
            self._phases[turn] = keys.path
        return self._turns[process, keys]

    def about(self, who: str, turn: Turn) -> str:
        """For notes of what ``who`` does in a phase."""
        return f"{who} in {self._phases[turn]}"

    def act(self, process: str, what: str, stage: Stage, keys: PhaseKeys = PHASE) -> None:
        """An activity of ``process`` that has to do with one phase."""
        name, memory = _in(f"{process} {what}", keys), _in(process, keys)
        self.system.activity(name, process, stage, memory=memory)

    def during(
        self,
        store: Connection,
        who: str,
        turn: Turn,
        following: Stage,
        call: Callable[..., Verdict | Gathered | None],
        *args: Any,
    ) -> Stage:
        """`Turn.during` in stages, then ``following``; ``call`` returns what ``who`` learns."""
        if turn.hold():
            return (self._call, who, turn, following, call, *args)
        self._learn(who, turn, turn.parting_word)
        return following

    def _call(
        self,
        store: Connection,
        who: str,
        turn: Turn,
        following: Stage,
        call: Callable[..., Verdict | Gathered | None],
        *args: Any,
    ) -> Stage:
        try:
            turn.locate(store)
            self._learn(who, turn, call(store, turn, *args))
        except Forgotten as exc:
            self.system.note("in doubt", self.about(who, turn), str(exc))
            return (self._release, turn, following, False)
        return (self._release, turn, following, True)

    def _release(self, store: Connection, turn: Turn, following: Stage, spoke: bool) -> Stage:
        turn.release(store, spoke=spoke)
        return following

    def _learn(self, who: str, turn: Turn, verdict: Verdict | Gathered | None) -> None:
        if verdict is not None:
            self.system.note("learned", self.about(who, turn), (turn.log, verdict))

    def series(self, rank: int, count: int, *, gives_up_in: int | None = None) -> None:
        """Cross one name ``count`` times, one after the other, and close."""
        process, turns = str(rank), self._kept(rank, count)
        stage: Stage = (self._close, turns[-1], gives_up_in is not None)
        for turn in reversed(turns):
            stage = (self._take, turn, self.entering(process, turn, stage))
        self.system.activity(f"{process} crosses", process, stage)
        if gives_up_in is not None:
            turn = turns[gives_up_in]
            name = self.about(f"{process} gives up", turn)
            self.system.activity(name, process, (self._stop, process, turn))

    def overlap(self, rank: int) -> None:
        """Start to cross a name a second time while the first crossing may be under way."""
        process = str(rank)
        # One that begins early does not ask for the keys of the one before.
        for turn in self._kept(rank, 2, but=1):
            stage = (self._take, turn, self.entering(process, turn))
            self.system.activity(self.about(f"{process} enters", turn), process, stage)

    def _kept(self, rank: int, count: int, *, but: int | None = None) -> list[Turn]:
        turns: list[Turn] = []
        for sequence in range(count):
            keys, follows = KEYS.phase(0, "x", sequence), turns[-1] if turns else None
            keeps = sequence != but
            turns.append(self.turn(str(rank), keys, keeps=keeps, follows=follows))
        return turns

    def _stop(self, store: Connection, process: str, turn: Turn) -> Stage:
        self.system.await_note("entered", self.about(process, turn))
        return self.giving_up(process, turn, following=(self._stopped, process))

    def _stopped(self, store: Connection, process: str) -> Stage:
        self.system.note("stopped", process)
        return END

    def _take(self, store: Connection, turn: Turn, following: Stage) -> Stage:
        """`Session.take_turn`, and what a `Turn` finds out when it is made."""
        before = turn._follows
        if before is not None and before.verdict is not None:
            turn._take_over(before, before.verdict)
        return following

    def _close(self, store: Connection, turn: Turn, gives_up: bool) -> Stage:
        if gives_up:
            # A session says farewell on the same lane.
            self.system.await_note("stopped", str(turn.rank))
        turn.leave(store)
        return END

    def enter(self, *ranks: int, keys: PhaseKeys = PHASE, leader: int | None = None) -> None:
        """`Session.enter`."""
        for process in map(str, ranks):
            turn = self.turn(process, keys, leader=leader)
            self.act(process, "enters", self.entering(process, turn), keys)

    def entering(self, process: str, turn: Turn, following: Stage = END) -> Stage:
        return (self.during, f"{process} enters", turn, following, self._enter, process)

    def _enter(self, store: Connection, turn: Turn, process: str) -> Verdict | Gathered:
        self.system.note("entered", self.about(process, turn))
        return turn.enter(store, b"" if turn.leader is None else b"of %d" % turn.rank)

    def give_up(
        self,
        *ranks: int,
        timeout_secs: float | None = DEADLINE,
        keys: PhaseKeys = PHASE,
        leader: int | None = None,
    ) -> None:
        """`Session.give_up`: a deadline; a cancel without one; an abort if it does not enter."""
        for process in map(str, ranks):
            turn = self.turn(process, keys, leader=leader)
            self.act(process, "gives up", self.giving_up(process, turn, timeout_secs), keys)

    def giving_up(
        self,
        process: str,
        turn: Turn,
        timeout_secs: float | None = None,
        by: int | None = None,
        following: Stage = END,
    ) -> Stage:
        how = (self._give_up, process if by is None else str(by), timeout_secs, by)
        return (self.during, f"{process} gives up", turn, following, *how)

    def _give_up(
        self,
        store: Connection,
        turn: Turn,
        culprit: str,
        timeout_secs: float | None,
        by: int | None,
    ) -> Verdict | Gathered:
        self.system.note("gave up", self.about(culprit, turn))
        reason = "stopped" if timeout_secs is None else ""
        return turn.give_up(store, reason, timeout_secs, None, by)

    def publish(self, leader: int, *, fails: bool = False) -> None:
        """What `commit` does on the leader, once it hears that all are in."""
        turn = self.turn(str(leader), leader=leader)
        self.act(str(leader), "publishes", (self._publishing, str(leader), turn, fails))

    def _publishing(self, store: Connection, process: str, turn: Turn, fails: bool) -> Stage:
        _, gathered = self.system.await_note("learned", self.about(f"{process} enters", turn))
        if not isinstance(gathered, Gathered):
            return END
        who = f"{process} publishes"
        if not turn.claim():
            return (self.during, who, turn, END, self._hear)
        verdict: Verdict = Released(gathered.last_rank, b"result")
        if fails:
            verdict = Broken(turn.rank, "publish failed")
        following = (self.during, who, turn, END, self._settle, process, verdict)
        return (self.during, who, turn, following, self._begin)

    def _hear(self, store: Connection, turn: Turn) -> Verdict:
        return turn.await_verdict(store)

    def _begin(self, store: Connection, turn: Turn) -> None:
        payloads = tuple(turn.payloads(store).items())
        self.system.note("publishing", self._phases[turn], (turn.log, payloads))

    def _settle(self, store: Connection, turn: Turn, process: str, verdict: Verdict) -> Verdict:
        if isinstance(verdict, Broken):
            self.system.note("gave up", self.about(process, turn))
        else:
            self.system.note("published", self._phases[turn])
        return turn.settle(store, verdict)

    def stray(self, rank: int) -> None:
        """The arrival of ``rank``, which has begun to enter, is made twice."""

        def run(store: Connection) -> Stage:
            self.system.await_note("entered", _in(str(rank), PHASE))
            line = _verdict.arrival(rank, None, meets=store.meets)
            if store.meets:
                store.meet(PHASE.logs[0], line, PHASE.count, self.world_size)
            else:
                store.append(PHASE.logs[0], line)
                store.add(PHASE.count, 1)
            return END

        self.has_stray = True
        self.system.activity(f"stray {rank}", "stray", (run,), stray=True)

    def ask(self, rank: int) -> None:
        """`Session.survey`, for a report."""
        turn = self.turn(str(rank))

        def survey(store: Connection, turn: Turn) -> None:
            turn.survey(store)

        self.act(str(rank), "asks", (self.during, f"{rank} asks", turn, END, survey))

    def may_wait(self, activity: str) -> bool:
        return super().may_wait(activity) or activity == self.idle

    def explore(self, *, may_crash: Collection[str] = ()) -> Report:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_protocol, "_MEETING", self._meeting)
            report = explore(self.system, self, may_crash)
        print(f"\n  {self.world_size} ranks: {report}")
        return report


def _in(who: str, keys: PhaseKeys) -> str:
    return f"{who} in {keys.path}"
