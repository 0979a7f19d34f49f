"""Every interleaving of the protocol's operations on the store, with a fault at each point."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from explorer import Violation
from lives import Lives
from scenarios import DEADLINE, KEYS, PHASE, STORES, Scenario

from async_barriers import _membership, _verdict
from async_barriers._connection import Connection
from async_barriers._keys import Keys, PhaseKeys
from async_barriers._membership import Membership
from async_barriers._protocol import Turn
from async_barriers._verdict import Broken, Gathered, Released, Verdict

# `make explore`: what takes minutes, too.
DEEP = bool(os.environ.get("EXPLORE_DEEP"))
deep = pytest.mark.skipif(not DEEP, reason="takes minutes; see `make explore`")
CANCEL = None
# Meeting, and listening.
both_ways = pytest.mark.parametrize("store", ["tcp", "tcp, large world"])
every_store = pytest.mark.parametrize("store", STORES)
quick_store = pytest.mark.parametrize("store", ["tcp, answered", pytest.param("tcp", marks=deep)])


if DEEP:

    @pytest.fixture(autouse=True)
    def bounded() -> None:
        """No bound on a test's time."""


# -- one fault at every point --------------------------------------------------------------


@every_store
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_enter(world_size: int, store: str) -> None:
    """All are released and leave nothing behind; if one dies, nobody is released without it."""
    scenario = Scenario(world_size, store=store)
    scenario.enter(*range(world_size))
    scenario.explore(may_crash=[str(rank) for rank in range(world_size)])


@pytest.mark.parametrize(
    ("timeout_secs", "store"),
    [
        (DEADLINE, "tcp"),
        (CANCEL, "tcp"),
        (DEADLINE, "tcp, large world"),
        (DEADLINE, "hash"),
        (CANCEL, "any"),
    ],
)
def test_one_gives_up(timeout_secs: float | None, store: str) -> None:
    """A deadline or a cancel races the last arrival; the other rank may die anywhere."""
    scenario = Scenario(2, store=store)
    scenario.enter(0, 1)
    scenario.give_up(1, timeout_secs=timeout_secs)
    scenario.explore(may_crash=["0"])


@deep
@both_ways
def test_two_give_up(store: str) -> None:
    """Two deadlines in the same instant are settled one way."""
    scenario = Scenario(2, store=store)
    scenario.enter(0, 1)
    scenario.give_up(0, timeout_secs=1.5)
    scenario.give_up(1, timeout_secs=2.5)
    scenario.explore(may_crash=["0", "1"])


@deep
@both_ways
def test_one_of_three_gives_up(store: str) -> None:
    """A deadline races two arrivals, and either of the others may die anywhere."""
    scenario = Scenario(3, store=store)
    scenario.enter(0, 1, 2)
    scenario.give_up(2)
    scenario.explore(may_crash=["0", "1"])


@both_ways
@pytest.mark.parametrize("world_size", [2, 3])
def test_abort_without_entering(world_size: int, store: str) -> None:
    """A rank that never enters breaks the phase for all others; one of them may die anywhere."""
    scenario = Scenario(world_size, store=store)
    scenario.enter(*range(world_size - 1))
    scenario.give_up(world_size - 1, timeout_secs=None)
    scenario.explore(may_crash=["0"])


@both_ways
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=deep)])
def test_arrival_made_twice(world_size: int, store: str) -> None:
    """A rank that arrives and is counted twice makes up for nobody."""
    scenario = Scenario(world_size, store=store)
    scenario.enter(*range(world_size))
    scenario.stray(0)
    scenario.explore()


@deep
@both_ways
def test_arrival_made_twice_and_a_deadline(store: str) -> None:
    """A rank that arrives twice and gives up is still one that gave up."""
    scenario = Scenario(2, store=store)
    scenario.enter(0, 1)
    scenario.stray(0)
    scenario.give_up(0)
    scenario.explore()


def test_a_report_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking who is missing holds up nobody, and what it leaves is deleted with the rest."""
    monkeypatch.setattr("async_barriers._protocol.time.sleep", lambda secs: None)
    scenario = Scenario(2, store="tcp, large world")
    scenario.enter(0, 1)
    scenario.ask(0)
    scenario.explore()


# -- commit --------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["publishes", "fails"])
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=deep)])
def test_commit(world_size: int, fails: bool) -> None:
    """Only the leader settles, when all are in; if it dies, nobody is told anything."""
    scenario = Scenario(world_size)
    scenario.enter(*range(world_size), leader=0)
    scenario.publish(0, fails=fails)
    scenario.explore(may_crash=["0"])


@deep
@pytest.mark.parametrize("rank", [0, 1], ids=["leader", "peer"])
@pytest.mark.parametrize("fails", [False, True], ids=["publishes", "fails"])
def test_commit_and_a_deadline(rank: int, fails: bool) -> None:
    """A deadline races the last arrival and the publishing: what is published is released."""
    scenario = Scenario(2)
    scenario.enter(0, 1, leader=0)
    scenario.publish(0, fails=fails)
    scenario.give_up(rank, leader=0)
    scenario.explore(may_crash=["0"])


# -- one name again and again --------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "count"), [(2, 6), *(pytest.param(3, count, marks=deep) for count in (3, 4))]
)
def test_a_series(world_size: int, count: int) -> None:
    """Phases that share their keys never read each other's logs, and leave nothing behind."""
    scenario = Scenario(world_size)
    for rank in range(world_size):
        scenario.series(rank, count)
    scenario.explore(may_crash=["0", "1"])


@pytest.mark.parametrize(
    ("gives_up_in", "count"),
    [(0, 2), *(pytest.param(*each, marks=deep) for each in [(0, 5), (1, 3), (2, 4), (3, 5)])],
)
def test_a_series_that_breaks(gives_up_in: int, count: int) -> None:
    """Wherever a rank gives up, its peers are told, and the phases after that one work; a break
    that is late meets a log that serves a later phase, and does nothing there."""
    scenario = Scenario(2)
    scenario.series(0, count)
    scenario.series(1, count, gives_up_in=gives_up_in)
    scenario.explore(may_crash=["0"])


def test_a_crossing_that_starts_during_another() -> None:
    """A rank that begins the next phase of a name early finds the same keys as its peers."""
    scenario = Scenario(2)
    scenario.overlap(0)
    scenario.series(1, 2)
    scenario.explore()


# -- names and lives -----------------------------------------------------------------------


@pytest.mark.parametrize("other", [KEYS.phase(0, "y", 0), Keys("q").phase(0, "x", 0)])
def test_independent(other: PhaseKeys) -> None:
    """What happens to one name does not touch another, nor one prefix another (law 9)."""
    _independent(PHASE, other)


def _independent(lonely: PhaseKeys, crossed: PhaseKeys) -> None:
    scenario = Scenario(2, store="hash")
    scenario.enter(0, keys=lonely)
    scenario.enter(1, 0, keys=crossed)
    # Nobody else comes, and that is all there is to wait for.
    scenario.idle = f"0 enters in {lonely.path}"
    scenario.explore()


@quick_store
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_rank_comes_back(after: int, store: str) -> None:
    """Whoever waits for its former life, which ended anywhere, is told; the next one crosses."""
    scenario = Lives(2, store=store)
    scenario.joined(0, 1)
    scenario.cross("0")
    scenario.dies_entering("1", after=after)
    scenario.cross("1 again", afresh=True, watched=False)
    scenario.explore()


@quick_store
def test_a_rank_is_there_twice(store: str) -> None:
    """A life that goes on when a later one joins breaks its own turn, and is replaced."""
    scenario = Lives(2, store=store)
    scenario.joined(0, 1)
    scenario.cross("1")
    scenario.live("1 again", afresh=True)
    scenario.explore()


@quick_store
@pytest.mark.parametrize("newcomers", [("1 again", "1 once more"), ("1 again", "2 again")])
def test_two_lives_join_at_once(newcomers: tuple[str, ...], store: str) -> None:
    """No generation has two lives of a rank, and all who are not replaced end up in one."""
    scenario = Lives(3, store=store)
    scenario.joined(0, 1, 2)
    if DEEP or "2 again" in newcomers:
        scenario.live("0")
    for process in newcomers:
        scenario.live(process, afresh=True)
    scenario.explore()


# -- whether it would be noticed -----------------------------------------------------------


class CountsFirst(Turn):
    """Counts its arrival before it is in the log."""

    def enter(self, store: Connection, payload: bytes = b"") -> Verdict | Gathered:
        arrived_at = store.add(self.keys.count, 1)
        store.append(self.log, _verdict.arrival(self.rank, self.leader))
        return self._decide(store) if arrived_at == self.world_size else self.await_verdict(store)


class TrustsTheCounter(Turn):
    """Takes the counter for the verdict."""

    def enter(self, store: Connection, payload: bytes = b"") -> Verdict | Gathered:
        store.append(self.log, _verdict.arrival(self.rank, self.leader))
        if store.add(self.keys.count, 1) < self.world_size:
            return self.await_verdict(store)
        self.verdict = Released(self.rank)
        store.set(self.keys.verdict, _verdict.encode(self.verdict))
        return self.verdict


class TrustsTheMeeting(Turn):
    """Takes it that all have arrived when it is called from the meeting."""

    def judge_meeting(self, store: Connection, log: bytes) -> Verdict | Gathered:
        self._counted = True
        self.verdict = Released(self.rank)
        return self.verdict


class LooksBeforeItBreaks(Turn):
    """Decides by a log that it read before its break was in it."""

    def give_up(self, store: Connection, *args: Any, **kwargs: Any) -> Verdict | Gathered:
        judged = self._judge(store)
        if judged is None:
            line = _verdict.breaking(self.rank, self.sequence, args[0])
            store.append(self.log, line)
            judged = Broken(self.rank, args[0])
        return self._announce(store, judged)


class BreaksQuietly(Turn):
    """Calls nobody where it sees nobody wait."""

    def give_up(self, store: Connection, *args: Any, **kwargs: Any) -> Verdict | Gathered:
        if store.read(self.keys.count) is not None:
            return super().give_up(store, *args, **kwargs)
        store.append(self.log, _verdict.breaking(self.rank, self.sequence, args[0]))
        judged = self._judge(store)
        assert isinstance(judged, Broken)
        self.verdict = judged
        return judged


class DepartsInUse(Turn):
    """Departs when the first of its threads is done with the phase."""

    def let_go(self, *, if_last: bool = False) -> bool | None:
        with self._lock:
            if self._departed or self.verdict is None:
                return False
            self._departed = True
        return not self.shared


class DepartsUnheard(Turn):
    """Departs on one connection while what it sent on another may still be on its way."""

    def let_go(self, *, if_last: bool = False) -> bool | None:
        return super().let_go()


class ClaimsAlways(Turn):
    """Begins to publish and gives up at the same time."""

    def claim(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("turn", "store", "law"),
    [
        (CountsFirst, "tcp, large world", "law 3"),
        (TrustsTheCounter, "tcp, large world", "law 1"),
        (TrustsTheMeeting, "tcp", "law 1"),
        (LooksBeforeItBreaks, "tcp, answered", "law 2: .* too late"),
        (LooksBeforeItBreaks, "hash", "law 2: .* too late"),
        (BreaksQuietly, "tcp, large world", "law 3: .* for ever"),
        (DepartsInUse, "tcp", "deleted"),
        (DepartsUnheard, "tcp", "deleted"),
        (DepartsUnheard, "tcp, large world", "deleted"),
    ],
)
def test_a_planted_race_is_found(turn: type[Turn], store: str, law: str) -> None:
    """The shortest schedule in which a race shows is found and told."""
    scenario = Scenario(2, turn, store=store)
    scenario.enter(*([0] if turn is BreaksQuietly else [0, 1]))
    if turn is TrustsTheCounter:
        scenario.stray(0)
    elif turn is not CountsFirst:
        scenario.give_up(1, timeout_secs=None)
    _finds(scenario, law)


def _finds(scenario: Scenario, law: str) -> None:
    with pytest.raises(Violation, match=law) as found:
        scenario.explore()
    print(f"\n{found.value}")
    assert len(str(found.value).splitlines()) > 3


def test_a_planted_race_in_commit_is_found() -> None:
    """A leader that publishes and gives up at once is caught declaring both."""
    scenario = Scenario(2, ClaimsAlways)
    scenario.enter(0, 1, leader=0)
    scenario.publish(0)
    scenario.give_up(0, leader=0)
    _finds(scenario, "law 2: published, but")


def test_planted_keys_that_collide_are_found() -> None:
    """A name that runs into its sequence number matches another name's (law 9)."""
    path = f"{KEYS.root}/phase/0/x10"
    mixed = [PhaseKeys(path, generation) for generation in (0, 1)]
    with pytest.raises(Violation, match=r"law 3: 0 enters .* share a rank"):
        _independent(*mixed)


def test_a_planted_log_that_is_cleared_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two logs in turn instead of three, a slow rank reads one that was emptied."""
    monkeypatch.setattr("async_barriers._keys.LOGS", 2)
    monkeypatch.setattr("async_barriers._protocol.LOGS", 2)
    scenario = Scenario(2)
    for rank in (0, 1):
        scenario.series(rank, 4)
    with pytest.raises(Violation, match="in doubt"):
        scenario.explore()


class JoinsUnseen(Lives):
    """Joins, but does not see that another life of its rank was faster."""

    @staticmethod
    def join(
        store: Connection,
        keys: Keys,
        rank: int,
        world_size: int,
        token: str,
        previous: Membership | None = None,
    ) -> Membership | None:
        generation = int(store.read(keys.generation) or b"0")
        mine = store.read(keys.member(rank))
        if mine is not None and json.loads(mine)["generation"] == generation:
            _membership._end(store, keys, generation, rank, token, world_size)
            generation += 1
        claim = json.dumps({"generation": generation, "token": token}).encode()
        store.compare_set(keys.member(rank), mine or b"", claim)
        return Membership(keys, rank, world_size, token, generation)


def test_a_planted_race_between_lives_is_found() -> None:
    """Two lives that claim their rank in one generation are caught at it."""
    scenario = JoinsUnseen(2)
    scenario.joined(1)
    scenario.live("1 again", afresh=True)
    scenario.live("1 once more", afresh=True)
    _finds(scenario, "law 1: two lives in one generation")
