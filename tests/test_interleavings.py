"""Every interleaving of the protocol's steps, with one fault at every point of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from explorer import Report, System, View, explore

from async_barriers._connection import Connection
from async_barriers._keys import Keys, PhaseKeys
from async_barriers._protocol import Turn
from async_barriers._verdict import Broken, Gathered, Released

PHASE = Keys("p").phase(0, "x", 0)


class Scenario:
    """Ranks that do in one phase what a session has them do, each call in a thread of its own."""

    def __init__(
        self, world_size: int, *, turn: Callable[..., Turn] = Turn, answers_all: bool = False
    ) -> None:
        self.world_size = world_size
        self.system = System(answers_all=answers_all)
        self._turn = turn
        self._turns: dict[tuple[str, int], Turn] = {}
        self._strays: set[int] = set()

    def turn(self, rank: int, leader: int | None, keys: PhaseKeys) -> Turn:
        """The part of ``rank`` in a phase, one object for all its threads."""
        label = f"{rank} in {keys.path}"
        if (keys.path, rank) not in self._turns:
            self._turns[keys.path, rank] = self.system.shared(
                self._turn, label, keys, "x", 0, rank, self.world_size, leader
            )
        return self._turns[keys.path, rank]

    def enter(
        self, *ranks: int, leader: int | None = None, payload: bytes = b"", keys: PhaseKeys = PHASE
    ) -> None:
        """`Session.enter`."""
        for rank in ranks:
            turn = self.turn(rank, leader, keys)
            self.add(rank, "enters", keys, lambda store, turn=turn: self._enter(store, turn))

    def _enter(self, store: Connection, turn: Turn) -> None:
        if not turn.hold():
            return self.learn(turn, "enters", turn.parting_word)
        try:
            self.system.note("entered", f"{turn.rank} {turn.keys.path}", True)
            payload = b"" if turn.leader is None else b"%d" % turn.rank
            self.learn(turn, "enters", turn.enter(store, payload))
        finally:
            turn.release(store)

    def give_up(
        self,
        *ranks: int,
        timeout_secs: float | None = None,
        leader: int | None = None,
        keys: PhaseKeys = PHASE,
        how: str = "gives up",
    ) -> None:
        """`Session.give_up`, for a deadline, a cancel, an abort."""
        for rank in ranks:
            turn = self.turn(rank, leader, keys)
            self.add(
                rank,
                how,
                keys,
                lambda store, turn=turn: turn.during(
                    store,
                    lambda store: self._give_up(store, turn, how, timeout_secs),
                    lambda: self.learn(turn, how, turn.parting_word),
                ),
            )

    def _give_up(self, store: Connection, turn: Turn, how: str, timeout_secs: float | None) -> None:
        self.system.note("gave up", f"{turn.rank} {turn.keys.path}", True)
        self.learn(turn, how, turn.give_up(store, how, timeout_secs))

    def publish(self, rank: int, *, fails: bool = False, keys: PhaseKeys = PHASE) -> None:
        """What `commit` does on the leader when it learns that all are in."""
        turn = self.turn(rank, rank, keys)
        self.add(rank, "publishes", keys, lambda store: self._publish(store, turn, fails))

    def _publish(self, store: Connection, turn: Turn, fails: bool) -> None:
        _, gathered = self.system.await_note("learned", f"{turn.rank} enters {turn.keys.path}")
        if not isinstance(gathered, Gathered):
            return
        if not turn.claim():
            self.learn(
                turn,
                "publishes",
                turn.during(store, turn.await_verdict, lambda: turn.parting_word),
            )
            return
        payloads = turn.during(store, turn.payloads, dict)
        self.system.note("publishing", turn.keys.path, tuple(payloads.items()))
        verdict: Released | Broken
        if fails:
            verdict = Broken(turn.rank, "publish failed")
            self.system.note("gave up", f"{turn.rank} {turn.keys.path}", True)
        else:
            verdict = Released(gathered.last_rank, b"result")
            self.system.note("published", turn.keys.path, True)
        settled = turn.during(
            store, lambda store: turn.settle(store, verdict), lambda: turn.parting_word
        )
        self.learn(turn, "publishes", settled)

    def add(
        self, rank: int, how: str, keys: PhaseKeys, run: Callable[[Connection], object]
    ) -> None:
        self.system.activity(f"{rank} {how}", str(rank), run, memory=f"{rank} in {keys.path}")

    def learn(self, turn: Turn, how: str, verdict: object) -> None:
        path = turn.keys.path
        self.system.note("learned", f"{turn.rank} {how} {path}", (path, verdict))

    def explore(self, **options: Any) -> Report:
        return explore(self.system, self.noted, self.ended, **options)

    # -- the laws ----------------------------------------------------------------------

    def noted(self, view: View, kind: str, who: str, value: Any) -> None:
        if kind == "publishing":
            complete, broke = read_log(view, who, self.world_size)
            assert complete, f"published, but not everyone is in: {broke}"
            everyone = {r: b"%d" % r for r in range(self.world_size)}
            assert dict(value) == everyone, f"not what they brought: {value}"
        if kind == "learned":
            self._learned(view, who, *value)

    def _learned(self, view: View, who: str, path: str, verdict: object) -> None:
        complete, broke = read_log(view, path, self.world_size)
        entered = view.notes("entered")
        if isinstance(verdict, Released | Gathered):
            assert complete, f"law 1: {who} learns {verdict}, the log says {broke}"
            for rank in range(self.world_size):
                assert f"{rank} {path}" in entered, f"law 1: {who}, but {rank} did not enter"
        if isinstance(verdict, Broken):
            blamed = f"{verdict.rank} {path}"
            assert blamed in view.notes("gave up"), f"{who}: nobody gave up, but {verdict}"
            assert path not in view.notes("published"), f"{who}: published, but {verdict}"
            assert complete is not None or broke is not None, f"{who}: nothing decided {verdict}"
            if broke is not None:
                said = (broke["rank"], broke["reason"], broke["timeout_secs"])
                assert said == (verdict.rank, verdict.reason, verdict.timeout_secs), "law 3"
                missing = broke["missing"] if verdict.timeout_secs is not None else ()
                assert verdict.missing == missing, f"law 6: {who} {verdict}"
        for other, (there, heard) in view.notes("learned").items():
            if there == path and Gathered not in (type(heard), type(verdict)):
                assert heard == verdict, f"law 2: {who}: {verdict}, {other}: {heard}"

    def ended(self, view: View) -> None:
        assert not view.blocked, f"law 4: blocked for ever: {view.blocked}"
        if view.crashed is None:
            left = [key for key in view.keys() if "/phase/" in key]
            assert not left, f"law 10: left behind: {left}"


def read_log(view: View, path: str, world_size: int) -> tuple[bool | None, dict[str, Any] | None]:
    """What its order says, told in another way than the library does."""
    lines = view.ever(f"{path}/log").decode().splitlines()
    arrivals = [int(line[1:].split()[0]) if line[0] in "ac" else -1 for line in lines]
    everyone = set(range(world_size))
    for index, line in enumerate(lines):
        if line[0] == "b":
            missing = tuple(sorted(everyone - set(arrivals[:index])))
            return None, json.loads(line[1:]) | {"missing": missing}
        if everyone <= set(arrivals[: index + 1]):
            return True, None
    return None, None


def test_all_enter() -> None:
    """x"""
    import time

    for n in (2, 3):
        t = time.time()
        s = Scenario(n)
        s.enter(*range(n))
        print(n, s.explore(), time.time() - t)
    for n in (2, 3):
        t = time.time()
        s = Scenario(n)
        s.enter(*range(n))
        s.give_up(n - 1, timeout_secs=1.0)
        print(n, s.explore(may_crash=["0"]), time.time() - t)
    for n in (2, 3):
        t = time.time()
        s = Scenario(n)
        s.enter(*range(n))
        s.give_up(0, n - 1, timeout_secs=1.0)
        print(n, s.explore(), time.time() - t)
