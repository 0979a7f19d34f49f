"""Every order of the operations of a few activities that share a store and some memory.

A state of the system is a value: what is in store and memory (`modelled`), where each activity
stands (`replayed`), and what each connection has sent without an answer (c10d's client waits for
none to `set` and `append`, so these arrive at any time before the connection's next answer, in
order). `explore` visits every state that can be reached, breadth first, so that a violation is
told with the fewest steps. Not explored are

* ways to a state seen before, since what follows is the same; they are counted only;
* orders of what nobody else can tell: sending (arriving is a step), and notes for the laws;
* what others do between an operation and the use of memory that follows it, unless a lock is
  taken for it: that is a step of its own, with all that happens under the lock;
* steps of others where all that share a memory are about to take a lock: nobody else can
  interfere with them (a persistent set, Godefroid 1996);
* crashes as steps. A process that stops for ever cannot be told from one that is not scheduled
  any more, nor what it had sent from what never arrives. So where only one process can still
  move, that is an end in which it crashed, after any of its operations.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import modelled
from modelled import Op, Values
from replayed import Node, System

_PRIVATE = {"load", "save", "note"}
_UNANSWERED = {"append", "set"}
# Far more than any scenario needs; what goes round for ever stops here.
_MAX_STEPS = 300


class Violation(AssertionError):
    """A law is broken; with the shortest schedule that does it."""


class State(NamedTuple):
    values: tuple[int, ...]
    nodes: tuple[Node, ...]
    sent: tuple[tuple[Op, ...], ...]


class Move(NamedTuple):
    """One step: an activity's next operation, or the arrival of what it sent first."""

    activity: int
    arrives: bool


class View(NamedTuple):
    """A state, as the laws see it."""

    values: Values
    waiting: list[str]
    crashed: str | None

    def notes(self, kind: str) -> dict[str, Any]:
        """What was noted as ``kind``, by whom it is about."""
        return {key[2]: value for key, value in self.values.items() if key[:2] == ("note", kind)}


class Laws(Protocol):
    """What has to be so: an `AssertionError` where it is not."""

    def noted(self, view: View, kind: str, about: str, value: Any) -> None:
        """Judge what was noted in the last step."""

    def at_end(self, view: View) -> None:
        """Judge a state that nothing follows."""


@dataclass
class Report:
    """How much was explored."""

    states: int = 0
    steps: int = 0
    schedules: int = 0
    ends: int = 0
    crashes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.states} states, {self.steps} steps, {self.schedules:.3g} schedules, "
            f"{self.ends} ends, {self.crashes} ends with a crash"
        )


def explore(system: System, laws: Laws, may_crash: Collection[str] = ()) -> Report:
    """Visit all states.

    :raises Violation: a law does not hold, or an activity raised
    """
    report = Report()
    none: tuple[Op, ...] = ()
    start = State(system.initial.numbers(), system.begin(), (none,) * len(system.activities))
    # How many ways lead to each state that is as many steps from the start.
    level = {start: 1}
    came: dict[State, tuple[State, Move]] = {}
    for _ in range(_MAX_STEPS):
        following: dict[State, int] = {}
        for state, ways in level.items():
            values = Values(system.table, state.values)
            moves = _moves(system, state, values)
            last: Move | None = None
            try:
                movers = {system.activities[move.activity].process for move in moves}
                if not moves:
                    report.ends += 1
                    report.schedules += ways
                    laws.at_end(_view(system, state, values))
                elif len(movers) == 1 and not movers.isdisjoint(may_crash):
                    report.crashes += 1
                    laws.at_end(_view(system, state, values, *movers))
                for last in _persistent(system, state, moves):
                    new, after, done = _step(system, state, last)
                    report.steps += 1
                    if new not in following:
                        came.setdefault(new, (state, last))
                        for op, _ in done:
                            if op.kind == "note":
                                view = _view(system, new, after)
                                laws.noted(view, op.key[1], op.key[2], op.args[0])
                    following[new] = following.get(new, 0) + ways
                    last = None
            except AssertionError as exc:
                raise Violation("\n".join([str(exc), *_story(system, came, state, last)])) from exc
        report.states += len(level)
        level = following
        if not level:
            return report
    raise Violation(f"law 5: after {_MAX_STEPS} steps there is no end")


def _moves(system: System, state: State, values: Values) -> list[Move]:
    """All steps that are possible."""
    found = []
    for index, (node, sent) in enumerate(zip(state.nodes, state.sent, strict=True)):
        if sent:
            found.append(Move(index, True))
        op = node.pending
        # An answer comes after what was sent before.
        if op is None or (sent and op.in_store and not _sends(system, op)):
            continue
        if modelled.can(values, op, index):
            found.append(Move(index, False))
    return found


def _persistent(system: System, state: State, moves: list[Move]) -> list[Move]:
    """As many of ``moves`` as will do."""
    pending: dict[str, list[tuple[int, str]]] = {}
    for index, (activity, node) in enumerate(zip(system.activities, state.nodes, strict=True)):
        if node.pending is not None:
            pending.setdefault(activity.memory, []).append((index, node.pending.kind))
    for sharing in pending.values():
        if all(kind == "lock" for _, kind in sharing):
            return [Move(index, False) for index, _ in sharing]
    return moves


def _step(system: System, state: State, move: Move) -> tuple[State, Values, list[tuple[Op, Any]]]:
    """The state after ``move``, and what was done."""
    index = move.activity
    values = Values(system.table, state.values)
    node, sent = state.nodes[index], list(state.sent[index])
    done: list[tuple[Op, Any]] = []
    late = system.activities[index].stray
    if move.arrives:
        first = sent.pop(0)
        done.append((first, modelled.apply(values, first, index, late)))
    while not move.arrives and (op := node.pending) is not None:
        sends = _sends(system, op)
        if done and not sends and op.kind not in _PRIVATE:
            break
        if sends:
            sent.append(op)
        result = None if sends else modelled.apply(values, op, index, late)
        done.append((op, result))
        node = system.after(index, node, result)
    assert not node.error, f"{system.activities[index].name} raised {node.error}"
    nodes = (*state.nodes[:index], node, *state.nodes[index + 1 :])
    all_sent = (*state.sent[:index], tuple(sent), *state.sent[index + 1 :])
    return State(values.numbers(), nodes, all_sent), values, done


def _sends(system: System, op: Op) -> bool:
    return system.in_flight and op.kind in _UNANSWERED


def _view(system: System, state: State, values: Values, crashed: str | None = None) -> View:
    waiting = [
        activity.name
        for activity, node in zip(system.activities, state.nodes, strict=True)
        if node.pending is not None and activity.process != crashed
    ]
    return View(values, waiting, crashed)


def _story(
    system: System, came: dict[State, tuple[State, Move]], state: State, last: Move | None
) -> list[str]:
    """What happened up to ``state`` and in ``last``; memory is left out."""
    path = [] if last is None else [(state, last)]
    while state in came:
        state, move = came[state]
        path.append((state, move))
    lines = []
    for before, move in reversed(path):
        index = move.activity
        try:
            _, _, done = _step(system, before, move)
        except AssertionError:
            op = before.sent[index][0] if move.arrives else before.nodes[index].pending
            done = [(op, "?")] if op else []
        for op, result in done:
            if op.in_store or op.kind == "note":
                what = "arrives" if move.arrives else "" if result is None else f"-> {result}"
                who = system.activities[index].name.partition(" in ")[0]
                lines.append(f"  {who:16} {op}  {what}".rstrip())
    return lines
