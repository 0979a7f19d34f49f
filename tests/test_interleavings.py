"""The code that ships, in the orders of messages to and from the store that can come about.

A model of a store and of an event loop runs the library's own sessions; see `explorer` and
`scenarios`. Small worlds are explored whole, or with so many switches; larger ones are wandered in.
"""

from __future__ import annotations

import os

import pytest
from scenarios import Scenario, Violation

from async_barriers._protocol import count

# Which scenarios `make test` has the time for.
RUNS = 4000 if os.environ.get("EXPLORE_DEEP") else 150


def test_two_that_cross() -> None:
    """Cancelled anywhere, or dead anywhere: one verdict, and nobody waits for ever."""
    scenario = Scenario(2)
    scenario.rank("0", scenario.crosses(cancels=1))
    scenario.rank("1", scenario.crosses())
    scenario.wander(runs=RUNS, may_crash=["0", "1"])


def test_three_that_cross_again_and_again() -> None:
    """They stay in step, whoever is cancelled or lets its deadline pass."""
    scenario = Scenario(3)
    scenario.rank("0", scenario.crosses(times=3, cancels=1))
    scenario.rank("1", scenario.crosses(times=3, passes=1))
    scenario.rank("2", scenario.crosses(times=3))
    scenario.wander(runs=RUNS)


def test_one_that_leaves() -> None:
    """Its peers are told in what they wait in, and in what they enter later."""
    scenario = Scenario(3)
    scenario.rank("0", scenario.crosses("x", cancels=1), scenario.crosses("y"), scenario.closes())
    scenario.rank("1", scenario.crosses("y"), scenario.crosses("x", cancels=1))
    scenario.rank("2", scenario.crosses("x"), scenario.crosses("y"))
    scenario.wander(runs=RUNS)


def test_a_rank_that_restarts() -> None:
    """When all are back they meet, whatever was tried before."""
    scenario = Scenario(3)
    scenario.rank("0", scenario.crosses_anew(2))
    scenario.rank("1")
    scenario.rank("2", scenario.crosses_anew(2))
    again = scenario.crosses_anew(2)
    scenario.rank("1 again", again, joined=False, replaces="1")
    scenario.wander(runs=RUNS)


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
