"""Ranks that restart: what sessions do when generations end, and the laws of it."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import modelled
import pytest
from explorer import Report, View
from replayed import END, Stage
from scenarios import KEYS, PHASE, Scenario

from async_barriers import _membership, _verdict
from async_barriers._connection import Connection
from async_barriers._membership import Membership
from async_barriers._protocol import Turn


class Life:
    """What a session remembers of the generation that it is in."""

    def __init__(self, standing: bool) -> None:
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
        with self._lock:
            self.has_turn = False

    def cease(self) -> bool:
        """Take no more turns; whether there is one to break."""
        with self._lock:
            self.stands = False
            return self.has_turn


class Lives(Scenario):
    """Processes that join, and phases in whatever generation they are in."""

    join = staticmethod(_membership.join)

    def __init__(self, world_size: int, *, store: str = "tcp") -> None:
        super().__init__(world_size, store=store)
        self.alive: set[str] = set()

    def joined(self, *ranks: int) -> None:
        """All that happens before the scenario begins."""
        store = self.system.connection()
        for process in map(str, ranks):
            self._join(store, process, None)

    def dies_entering(self, process: str, *, after: int) -> None:
        """``process`` died before the scenario began, ``after`` operations of its arrival."""
        store = self.system.connection()
        if after > 0:
            self.system.note("entered", f"{process} in {PHASE.path}")
            store.append(PHASE.logs[0], _verdict.arrival(int(process), None, meets=store.meets))
        if after > 1:
            store.add(PHASE.count, 1)

    def live(self, process: str, *, afresh: bool = False) -> None:
        """Join, and join again whenever the generation ended."""
        stage = (
            (self._join_and_live, process, None) if afresh else (self._live, _first(process, self))
        )
        self.system.activity(f"{process} lives", process, stage)
        self.alive.add(process)

    def _live(self, store: Connection, membership: Membership) -> Stage:
        store.await_value(membership.mail)
        store.delete(membership.mail)
        return (self._join_and_live, membership.token, membership)

    def _join_and_live(self, store: Connection, process: str, previous: Membership | None) -> Stage:
        membership = self._join(store, process, previous)
        return END if membership is None else (self._live, membership)

    def cross(self, process: str, *, afresh: bool = False, watched: bool = True) -> None:
        """Cross in the generation that it is in; if that ends, once more in the next.

        Its watcher is an activity of its own, as `Session._watch` is.
        """
        life = self.system.shared(f"life of {process}", Life, not afresh)
        first = _first(process, self)
        for generation in range(3):
            present = replace(first, generation=generation).holds
            self.turn(process, KEYS.phase(generation, "x", 0), present=present)
        begin = (
            (self._join_and_cross, process, life, None) if afresh else (self._cross, life, first)
        )
        self.system.activity(f"{process} crosses", process, begin)
        self.alive.add(process)
        if watched:
            self.system.activity(f"{process} watches", process, (self._watch, life, first, afresh))

    def _turn_in(self, membership: Membership) -> Turn:
        return self.turn(membership.token, KEYS.phase(membership.generation, "x", 0))

    def _cross(self, store: Connection, life: Life, membership: Membership) -> Stage:
        following = (self._crossed, life, membership)
        if not life.take_turn():
            return following
        return self.entering(membership.token, self._turn_in(membership), following)

    def _crossed(self, store: Connection, life: Life, membership: Membership) -> Stage:
        life.forget()
        if membership.generation:
            return END
        self.system.await_note("over", f"{membership.token} in {membership.generation}")
        return (self._join_and_cross, membership.token, life, membership)

    def _join_and_cross(
        self, store: Connection, process: str, life: Life, previous: Membership | None
    ) -> Stage:
        membership = self._join(store, process, previous)
        if membership is None:
            return END
        life.stand()
        return (self._cross, life, membership)

    def _watch(self, store: Connection, life: Life, membership: Membership, afresh: bool) -> Stage:
        if afresh:
            generation = self.system.await_note("is in", membership.token)
            membership = replace(membership, generation=generation)
        store.await_value(membership.mail)
        following = (self._watched, membership)
        if not life.cease():
            return following
        by = membership.successor(store)
        return self.giving_up(
            membership.token, self._turn_in(membership), by=by, following=following
        )

    def _watched(self, store: Connection, membership: Membership) -> Stage:
        store.delete(membership.mail)
        self.system.note("over", f"{membership.token} in {membership.generation}")
        return END

    def _join(self, store: Connection, process: str, previous: Membership | None) -> Any:
        rank = int(process.split()[0])
        membership = self.join(store, KEYS, rank, self.world_size, process, previous)
        if membership is None:
            self.system.note("replaced", process)
        else:
            self.system.note("joined", f"{process} in {membership.generation}")
            self.system.note("is in", process, membership.generation)
        return membership

    # -- the laws ----------------------------------------------------------------------

    def noted(self, view: View, kind: str, about: str, value: Any) -> None:
        over = [key for key in modelled.stored(view.values) if key.startswith(f"{KEYS.root}/over/")]
        generations = {key.rpartition("/")[2] for key in over}
        # Where a generation is over, its phases need not be known any more.
        if kind != "in doubt" or about.partition("/phase/")[2].split("/")[0] not in generations:
            super().noted(view, kind, about, value)
        lives = [who.partition(" in ") for who in view.notes("joined")]
        ranks = [(process.split()[0], generation) for process, _, generation in lives]
        assert len(ranks) == len(set(ranks)), f"law 1: two lives in one generation: {lives}"

    def explore(self, *, may_crash: Collection[str] = ()) -> Report:
        with pytest.MonkeyPatch.context() as patch:
            # What joining is made of, so that it, too, leaves only its results behind.
            for name in ("_present", "_end"):
                called = modelled.called(getattr(_membership, name), self.system.call)
                patch.setattr(_membership, name, called)
            return super().explore(may_crash=may_crash)

    def at_end(self, view: View) -> None:
        super().at_end(view)
        present = max(view.notes("is in").values())
        for process, generation in view.notes("is in").items():
            if process in self.alive - {*view.notes("replaced"), view.crashed}:
                assert generation == present, f"law 11: {process} was left in {generation}"

    def may_wait(self, activity: str) -> bool:
        return activity.endswith((" watches", " lives"))

    def left_behind(self, view: View) -> list[str]:
        """What the dead left is swept when their generation is history."""
        generations = view.notes("is in")
        present = max(generations.values())
        if view.crashed is not None and generations.get(view.crashed, present) == present:
            return []
        return [key for key in modelled.stored(view.values) if f"/phase/{present}/" in key]


def _first(process: str, scenario: Scenario) -> Membership:
    """That of a process that joined before the scenario began."""
    return Membership(KEYS, int(process.split()[0]), scenario.world_size, process, 0)
