"""The code that ships, in the orders of messages to and from the store that can come about.

A model of a store and of an event loop runs the library's own sessions; see `explorer` and
`scenarios`. Small worlds are explored whole, or with so many switches; larger ones are wandered in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from explorer import Move
from replayed import Job
from scenarios import Scenario, Violation
from signal_scenarios import ObservedGate, SignalScenario

from async_barriers._client.departing import Departing
from async_barriers._protocol import breaking, claiming, count, leaving, phase
from async_barriers._protocol.keys import Keys
from async_barriers._protocol.membership import Membership, State
from async_barriers._protocol.phase import Entry
from async_barriers._protocol.signal import Sent, sending
from async_barriers._protocol.store import CompareSet, Read, Request, Set, SetMany, Store
from async_barriers._protocol.verdict import Broken
from async_barriers._signal import announcing
from async_barriers._signal.gate import Round

DEEP = bool(os.environ.get("EXPLORE_DEEP"))
# How often `make test` goes one way at random, and how many switches it has the time for.
RUNS = 10_000 if DEEP else 100
SWITCHES = 3 if DEEP else 1

pytestmark = pytest.mark.bound(600 if DEEP else 40)

# The ranks that reach the store through worker threads. Each message of theirs is several.
ways = pytest.mark.parametrize("threads", ["", "012", "0"], ids=["sockets", "threads", "mixed"])


def wander(scenario: Scenario, **options: Any) -> None:
    scenario.wander(runs=RUNS // 2 if scenario.threads else RUNS, **options)


@ways
def test_two_that_cross(threads: str) -> None:
    """Cancelled anywhere, or dead anywhere: one verdict, and nobody waits for ever."""
    scenario = Scenario(2, threads)
    scenario.rank("0", scenario.crosses(cancels=1))
    scenario.rank("1", scenario.crosses())
    wander(scenario, may_crash=["0", "1"])


@ways
def test_three_that_cross_again_and_again(threads: str) -> None:
    """They stay in step, whoever is cancelled or lets its deadline pass."""
    scenario = Scenario(3, threads)
    scenario.rank("0", scenario.crosses(times=3, cancels=1))
    scenario.rank("1", scenario.crosses(times=3, passes=1))
    scenario.rank("2", scenario.crosses(times=3))
    wander(scenario)


@ways
def test_one_that_breaks_before_it_enters(threads: str) -> None:
    """It looks at nothing. Others may give up at the same time, and all come to the next phase."""
    scenario = Scenario(3, threads)
    scenario.doubts = True
    scenario.rank("0", scenario.crosses(times=2, aborts=True), losses=1)
    scenario.rank("1", scenario.crosses(times=2, cancels=1))
    scenario.rank("2", scenario.crosses(times=2, passes=1), losses=1)
    wander(scenario)


@ways
@pytest.mark.parametrize("steps", [False, True], ids=["", "steps"])
def test_three_that_commit(steps: bool, threads: str) -> None:
    """Each commit is published or broken, for all of them."""
    scenario = Scenario(3, threads)
    scenario.rank("0", scenario.commits(steps=steps, cancels=1))
    scenario.rank("1", scenario.commits(steps=steps, passes=1))
    scenario.rank("2", scenario.commits(steps=steps))
    wander(scenario)


@ways
def test_three_that_gather(threads: str) -> None:
    """All payloads, or none."""
    scenario = Scenario(3, threads)
    scenario.rank("0", scenario.gathers(cancels=1))
    scenario.rank("1", scenario.gathers(cancels=1))
    scenario.rank("2", scenario.gathers())
    wander(scenario)


@ways
@pytest.mark.parametrize("in_doubt", [False, True], ids=["", "in doubt"])
def test_one_that_leaves(in_doubt: bool, threads: str) -> None:
    """Its peers are told in what they wait in, and in what they enter later."""
    scenario = Scenario(3, threads)
    leaves = scenario.closes(in_doubt=in_doubt)
    scenario.rank("0", scenario.crosses("x", cancels=1), scenario.crosses("y"), leaves)
    scenario.rank("1", scenario.crosses("y"), scenario.crosses("x", cancels=1))
    scenario.rank("2", scenario.crosses("x"), scenario.crosses("y"))
    wander(scenario)


@ways
def test_a_rank_that_restarts(threads: str) -> None:
    """When all are back they meet, whatever was tried before."""
    scenario = Scenario(3, threads)
    scenario.rank("0", scenario.crosses_anew(2))
    scenario.rank("1")
    scenario.rank("2", scenario.crosses_anew(2))
    again = scenario.crosses_anew(2)
    scenario.rank("1 again", again, joined=False, replaces="1")
    wander(scenario)


@ways
def test_one_that_aborts_before_all_are_back(threads: str) -> None:
    """Or as it is about to hear that they are: all are in step then.

    With this seed it finds a phase that is moved twice, by a look at it and by the bell.
    """
    scenario = Scenario(3, threads)
    scenario.restarted()
    scenario.rank("0", scenario.crosses_anew(2, aborts=True), joined=False)
    scenario.rank("1", scenario.crosses_anew(2, cancels=1), joined=False)
    scenario.rank("2", scenario.crosses_anew(2), joined=False)
    wander(scenario, seed=1)


@ways
def test_a_deadline_as_all_come_back(threads: str) -> None:
    """What one rank gives up then, breaks one call of each, however that call is numbered."""
    scenario = Scenario(3, threads)
    scenario.restarted()
    scenario.rank("0", scenario.crosses_anew(tries_at_most=2, passes=1), joined=False)
    scenario.rank("1", scenario.crosses_anew(tries_at_most=2), joined=False)
    scenario.rank("2", scenario.crosses_anew(tries_at_most=2), joined=False)
    scenario.wander(runs=5 * RUNS)


@ways
@pytest.mark.parametrize("call", ["crosses", "commits", "gathers"])
def test_connections_that_are_lost(call: str, threads: str) -> None:
    """Each rank that may have entered gives up, or is released: nobody waits for ever."""
    scenario = Scenario(3, threads)
    scenario.doubts = True
    makes: dict[str, Callable[[], Job]] = {
        "crosses": partial(scenario.crosses, times=3),
        "commits": partial(scenario.commits, steps=True),
        "gathers": scenario.gathers,
    }
    scenario.rank("0", makes[call](), losses=1)
    scenario.rank("1", makes[call](), losses=1)
    scenario.rank("2", makes[call]())
    wander(scenario)


def test_an_answer_that_is_lost_with_its_connection() -> None:
    """It would have said that this rank was the last one to enter. It learns from its bell that all
    are in, and its peer, which uses threads, from nobody else."""
    scenario = Scenario(2, "01")
    scenario.doubts = True
    scenario.rank("0", scenario.crosses(), losses=2)
    scenario.rank("1", scenario.crosses())

    def other_ways(move: Move, at: tuple[int, int]) -> bool:
        loses = move.event[:1] == ("lose",) and move.event != ("lose", 2)
        return loses or (move.kind == "deliver" and at == (0, 1))

    scenario.wander(runs=RUNS, avoids=other_ways)


@ways
def test_connections_that_are_lost_around_a_restart(threads: str) -> None:
    """All are back in the end, and in step."""
    scenario = Scenario(3, threads)
    scenario.doubts = True
    scenario.rank("0", scenario.crosses_anew(2), losses=1)
    scenario.rank("1")
    scenario.rank("2", scenario.crosses_anew(2))
    again = scenario.crosses_anew(2)
    scenario.rank("1 again", again, joined=False, replaces="1", losses=1)
    wander(scenario)


@ways
def test_steps_that_are_passed(threads: str) -> None:
    """One rank breaks a step; who comes for an earlier one then, or waits in it, learns of it."""
    scenario = Scenario(3, threads)
    scenario.rank("0", scenario.crosses_steps("x 0", "abort 3", "y 0", "x 4", "x 5"))
    scenario.rank("1", scenario.crosses_steps("x 0", "y 0", "x 1", "x 2", "x 4", "x 5"))
    scenario.rank("2", scenario.crosses_steps("x 0", "x 1", "y 0", "x 4", "x 5"))
    wander(scenario)


@ways
def test_a_step_that_begins_as_the_bell_is_taken(threads: str) -> None:
    """Its rank learns that a later one broke, from the bell or as it enters."""
    scenario = Scenario(2, threads)
    scenario.rank("0", scenario.crosses_steps("x 0", "x 1", "x 4", "x 5", cancels=1))
    scenario.rank("1", scenario.crosses_steps("abort 3", "x 4", "x 5"))
    scenario.wander(runs=RUNS)


@ways
def test_steps_that_are_skipped(threads: str) -> None:
    """Of those that broke, and to which not all came, no key is left two steps later."""
    scenario = Scenario(3, threads)
    calls = ["x 1", "x 2", "x 3", "x 4", "x 5", "x 6"]
    aborts = ["abort 1", "x 2", "abort 3", *calls[3:]]
    scenario.rank("0", scenario.crosses_steps(*aborts))
    scenario.rank("1", scenario.crosses_steps(*calls))
    scenario.rank("2", scenario.crosses_steps(*calls[1:]))
    wander(scenario, seed=1)


def test_a_release_without_all_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The explorer finds a count that is taken for full one rank too early."""

    def full(self: count.Count, world_size: int, kind: int) -> bool:
        return self.arrived >= world_size - 1 and not self.broken

    monkeypatch.setattr(count.Count, "full", full)
    scenario = Scenario(2)
    scenario.rank("0", scenario.crosses(cancels=1))
    scenario.rank("1", scenario.crosses())
    with pytest.raises(Violation):
        scenario.wander(runs=RUNS)


# -- planted races: each has to be found --------------------------------------------------


class Anything(bytes):
    """Equal to all."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = bytes.__hash__


def two_that_cross() -> Scenario:
    scenario = Scenario(2)
    scenario.rank("0", scenario.crosses(cancels=1))
    scenario.rank("1", scenario.crosses())
    return scenario


def test_a_break_that_does_not_compare_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rank may have entered since the count was read."""

    def compare_set(key: str, expected: bytes, desired: bytes) -> CompareSet:
        return CompareSet(key, Anything() if key.endswith("/count") else expected, desired)

    monkeypatch.setattr(breaking, "CompareSet", compare_set)
    with pytest.raises(Violation, match="law 2"):
        two_that_cross().wander(runs=RUNS)


def test_a_break_that_does_not_look_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a rank that has not entered may break a phase so."""

    async def give_up(
        store: Store, entry: Entry, broken: Broken, *, tells: Sequence[Request] = (), **rest: Any
    ) -> tuple[Any, bool]:
        judged, ours, _ = await breaking.break_unentered(store, entry, broken, tells)
        return judged, ours

    monkeypatch.setattr(breaking, "give_up", give_up)
    with pytest.raises(Violation, match="law 2"):
        two_that_cross().wander(runs=RUNS)


def test_a_generation_that_is_overwritten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that come first at once: the one stands where the other never comes."""

    async def replaced(store: Store, keys: Keys, found: bytes | None, state: State) -> State:
        await store.call(Set(keys.state, state.encoded), Read(keys.state))
        return state

    two_that_join().wander(runs=RUNS)
    monkeypatch.setattr(claiming, "_replaced", replaced)
    with pytest.raises(Violation, match=r"law (11|3)"):
        two_that_join().wander(runs=RUNS)


def two_that_join() -> Scenario:
    scenario = Scenario(2)
    scenario.rank("0", scenario.crosses(), joined=False)
    scenario.rank("1", scenario.crosses(), joined=False)
    return scenario


def test_a_ring_before_the_news_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that leaves wakes its peers, which look around before it has said so."""
    tell = leaving.tell

    async def rings_first(store: Store, membership: Membership, *args: Any, **kwargs: Any) -> None:
        await store.call(SetMany(membership.bells, b"left"), Read(membership.keys.state))
        await tell(store, membership, *args, **kwargs)

    monkeypatch.setattr(leaving, "tell", rings_first)
    monkeypatch.setattr(leaving, "SetMany", lambda keys, value: SetMany([], value))
    scenario = Scenario(2)
    scenario.rank("0", scenario.closes())
    scenario.rank("1", scenario.crosses())
    with pytest.raises(Violation, match="law 3"):
        scenario.wander(runs=RUNS)


def test_keys_that_are_deleted_too_early_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first to depart, when the slowest has yet to read or count."""
    departed = Departing._departed

    def too_early(self: Any, gone: Any, connection: Any, answers: list[Any]) -> None:
        connection.call(*phase.spent(gone.entry, broken=False))
        departed(self, gone, connection, answers)

    monkeypatch.setattr(Departing, "_departed", too_early)
    scenario = Scenario(2)
    scenario.rank("0", scenario.crosses(times=3, cancels=1))
    scenario.rank("1", scenario.crosses(times=3, passes=1))
    with pytest.raises(Violation, match=r"law (5|10)"):
        scenario.wander(runs=RUNS, seed=9)


# -- agreeing on a step -------------------------------------------------------------------


def two_that_send() -> SignalScenario:
    scenario = SignalScenario(2)
    scenario.rank("0", scenario.trains(), scenario.sends())
    scenario.rank("1", scenario.trains(ahead=3), scenario.sends())
    return scenario


def test_two_that_send_at_once() -> None:
    """One agreement, on a step that neither has passed; on every kind of server."""
    two_that_send().wander(runs=RUNS, whole=False, wakes=False)


def test_three_that_agree_twice() -> None:
    """At any distance, one of them cancelled anywhere; and the signal is sent again."""
    scenario = SignalScenario(3)
    trains = scenario.trains(ahead=4, times=2, again=True, cancels=1)
    scenario.rank("0", trains, scenario.sends())
    scenario.rank("1", scenario.trains(ahead=1, times=2), scenario.sends(), waits=False)
    scenario.rank("2", scenario.trains(times=2))
    scenario.wander(runs=RUNS // 3)


def test_a_rank_that_is_away_takes_part() -> None:
    """A collective blocks it for good; the others are not held up."""
    scenario = SignalScenario(2)
    scenario.rank("0", scenario.trains(ahead=1), scenario.sends())
    scenario.rank("1", scenario.trains(ahead=3, away=True))
    scenario.explore(switches=SWITCHES)


def test_one_that_leaves_in_the_agreement() -> None:
    """Before it is sent, or amid it: all others agree, or all are told."""
    scenario = SignalScenario(3)
    scenario.rank("0", scenario.trains(), scenario.sends())
    scenario.rank("1", scenario.trains(), scenario.closes(later=5))
    scenario.rank("2", scenario.trains())
    scenario.wander(runs=RUNS // 2)


def test_one_that_dies_in_the_agreement() -> None:
    """All others agree, or all are told at their deadlines."""
    scenario = SignalScenario(2)
    scenario.rank("0", scenario.trains(ahead=1), scenario.sends(), passes=3)
    scenario.rank("1", scenario.trains(ahead=1))
    scenario.dies("1")
    scenario.explore(switches=SWITCHES)


def test_connections_that_are_lost_in_the_agreement() -> None:
    """What was sent is said again: all agree, or all are told."""
    scenario = SignalScenario(2)
    scenario.doubts = True
    scenario.rank("0", scenario.trains(), scenario.sends(), losses=1, passes=4)
    scenario.rank("1", scenario.trains(ahead=3), losses=1, passes=4)
    scenario.wander(runs=RUNS)


def test_one_that_restarts_in_the_agreement() -> None:
    """Its peers are told, and agree with its next life on what that sends."""
    scenario = SignalScenario(2)
    scenario.restarts = True
    scenario.rank("0", scenario.trains(), scenario.sends())
    scenario.rank("1", scenario.trains())
    again = [scenario.trains(), scenario.sends()]
    scenario.rank("1 again", *again, joined=False, replaces="1")
    scenario.wander(runs=RUNS)


def test_steps_that_pass_while_they_are_told_are_found() -> None:
    """A rank that says which step was the last before it stops passing them."""

    class StopsLate(ObservedGate):
        def stop(self, stopping: Round) -> None:
            last, settle = self.last, stopping.settle

            def late(*args: Any, **kwargs: Any) -> None:
                super(StopsLate, self).stop(stopping)
                settle(*args, **kwargs)

            stopping.passed, stopping.settle = last, late  # type: ignore[method-assign]

    scenario = two_that_send()
    scenario.gate = StopsLate
    with pytest.raises(Violation, match="reached"):
        scenario.wander(runs=RUNS)


def test_two_that_think_they_sent_first_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A register that is written without looking."""

    def overwriting(keys: Keys, membership: Membership, held: bytes, said: Sent) -> list[Any]:
        bells = SetMany(membership.bells, b"signal")
        return [Set(keys.signal, said.encode()), bells, Read(keys.signal)]

    monkeypatch.setattr(announcing, "sending", overwriting)
    with pytest.raises(Violation, match="reached"):
        two_that_send().wander(runs=RUNS)


def test_a_signal_that_rings_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that looks between the ring and what it was rung for."""
    monkeypatch.setattr(announcing, "sending", lambda *args: sending(*args)[::-1])
    scenario = SignalScenario(2)
    scenario.rank("0", scenario.trains(), scenario.sends())
    scenario.rank("1", scenario.trains())
    with pytest.raises(Violation, match="waits for ever"):
        scenario.explore(switches=2, whole=False)
