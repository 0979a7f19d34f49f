"""Every order of the steps of a few activities that share a store and some memory.

An *activity* is what one thread of one process does: a synchronous function that gets a
connection (the library's own classes, over an imitation of c10d's store) and touches shared
objects (`System.shared`: every access to a mutable field or a lock of theirs is an operation,
as those of the store are). Between two operations an activity computes from what its operations
have returned, and from nothing else. So its whole state is the *log* of its operations with
their results, and no thread is needed to hold it: to find out what an activity does next, it is
run again from its start, each operation of the log answering at once, and the first that is not
in the log ends the run with a private exception. That is done once per log; a `Node` remembers.

A state of the system is then a value: what is in store and memory, one node per activity, and
what each connection has sent without an answer (a TCPStore's client does not wait for one to
`set` and `append`, so these arrive at any time later, in the order of their connection, and
before that connection's next answer). `explore` visits all states that can be reached: in every
state it takes every step that is possible, once. Steps only ever add to the logs, so states can
be visited in the order of the operations made so far; what arrives at one state on several ways
is merged (and the ways are counted: they are the schedules), and the first violation found is one
with the fewest operations.

What the reduction drops:

* Orders that lead to the same state: what follows from it is the same for all of them.
* Orders of operations that nobody else can tell apart. A step is one operation that others may
  notice and those after it that none can: sending (arriving is a step of its own), memory that no
  other unfinished activity shares, what is done while the lock is held (sections are taken whole;
  they read what is also written without the lock once at most).
* Crashes as steps. A process that stops for ever cannot be told from one that is not scheduled
  any more, and what it had sent, from what never arrives. So wherever all other processes have
  come to an end, that is an end state in which this one crashed, after any of its operations.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType, FunctionType
from typing import Any, NamedTuple, TypeVar

from async_barriers._connection import Connection, TCPConnection

T = TypeVar("T")
# A key of the store, or (object, field) in memory.
Key = str | tuple[str, str]

_IN_STORE = {"add", "append", "check", "compare_set", "delete", "get", "list", "set", "wait"}
_IN_MEMORY = {"load", "save", "lock", "unlock"}
_UNANSWERED = {"append", "set"}


class Op(NamedTuple):
    """What an activity asks for; the scheduler says when it happens."""

    kind: str
    key: Key
    args: tuple[Any, ...] = ()

    def __str__(self) -> str:
        key = self.key if isinstance(self.key, str) else ".".join(self.key)
        return f"{self.kind} {key} {' '.join(map(str, self.args))}".rstrip()


@dataclass(frozen=True)
class Gone:
    """What a deleted key of a phase held last; no phase may touch it again."""

    value: bytes


class Violation(AssertionError):
    """A law was broken; with the shortest schedule that does it."""


class _Pause(BaseException):
    """Unwinds an activity whose next operation has not been made."""


class Activity(NamedTuple):
    name: str
    process: str
    run: Callable[[Connection], object]
    # Whose memory it shares, and whether it is no part of the library.
    memory: str
    stray: bool


class Node:
    """Where an activity stands."""

    __slots__ = ("after", "error", "log", "pending")

    def __init__(self, log: tuple[tuple[Op, Any], ...], pending: Op | None, error: str | None):
        self.log = log
        self.pending = pending
        self.error = error
        self.after: dict[Any, Node] = {}


class State(NamedTuple):
    # Of the store and the memory, in the order of `System.slots`; an absent key is None, too.
    values: tuple[Any, ...]
    nodes: tuple[Node, ...]
    sent: tuple[tuple[Op, ...], ...]


class View:
    """A state, as those see it who judge it."""

    def __init__(
        self, system: System, values: dict[Key, Any], nodes: Iterable[Node], crashed: str | None
    ) -> None:
        self._values = values
        self.crashed = crashed
        self.blocked = [
            activity.name
            for activity, node in zip(system.activities, nodes, strict=True)
            if node.pending is not None and activity.process != crashed
        ]

    def ever(self, key: str) -> bytes:
        """What ``key`` holds, or held when it was deleted."""
        value = self._values.get(key, b"")
        return value.value if isinstance(value, Gone) else bytes(value)

    def keys(self) -> list[str]:
        """What is in the store."""
        return [k for k, v in self._values.items() if isinstance(k, str) and type(v) is not Gone]

    def notes(self, kind: str) -> dict[str, Any]:
        """What activities noted as ``kind``, by who did."""
        return {
            key[1]: value
            for key, value in self._values.items()
            if isinstance(key, tuple) and key[0] == kind
        }


# Called with what is noted, by whom and as what.
Noted = Callable[[View, str, str, Any], None]


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
            f"{self.states} states, {self.steps} steps, {self.ends} ends, {self.crashes} ends "
            f"with a crash, {self.schedules:.2g} schedules"
        )


class System:
    """Activities, and the store and memory they share."""

    def __init__(self, *, answers_all: bool = False, fine: bool = True) -> None:
        self.values: dict[Key, Any] = {}
        self._slots: dict[Key, None] = {}
        self._fine = fine
        self.activities: list[Activity] = []
        self._unanswered = set() if answers_all else _UNANSWERED
        self._connect = _plain if answers_all else TCPConnection
        self._log: tuple[tuple[Op, Any], ...] | None = None
        self._position = 0
        self._pending: Op | None = None
        self._place: Hashable = None
        self._returned: dict[FrameType, Any] = {}
        self._connections: dict[int, Connection] = {}
        self._nodes: dict[Hashable, Node] = {}
        self.merges = True

    # -- what a scenario is made of ----------------------------------------------------

    def activity(
        self,
        name: str,
        process: str,
        run: Callable[[Connection], object],
        *,
        memory: str | None = None,
        stray: bool = False,
    ) -> None:
        self.activities.append(Activity(name, process, run, memory or process, stray))

    def connection(self) -> Connection:
        """One for the scenario itself, whose operations happen before all others."""
        return self._connect(_Wire(self))  # type: ignore[arg-type]

    def shared(self, kind: Callable[..., T], name: str, *args: Any) -> T:
        """A ``kind(*args)`` whose fields live in the memory that is explored.

        What its constructor was given are constants.
        """
        constants = inspect.signature(kind).parameters
        fields = vars(kind(*args))
        cells = [field for field in fields if field not in constants]
        shared = type(kind.__name__, (kind,), {field: _Cell(field) for field in cells})  # type: ignore[arg-type]
        instance = object.__new__(shared)
        instance.__dict__.update({f: v for f, v in fields.items() if f in constants})
        instance.__dict__.update(_system=self, _name=name)
        for field in cells:
            is_lock = isinstance(fields[field], type(threading.Lock()))
            instance.__dict__[field] = _Section(self, (name, field)) if is_lock else None
            if not is_lock and fields[field] is not None:
                self.values[name, field] = fields[field]
        return instance  # type: ignore[no-any-return]

    def note(self, kind: str, who: str, value: Any) -> None:
        """Remember something for the judges, and for `await_note`."""
        self.do(Op("note", (kind, who), (value,)))

    def await_note(self, kind: str, who: str) -> Any:
        return self.do(Op("hear", (kind, who)))

    # -- activities --------------------------------------------------------------------

    def do(self, op: Op) -> Any:
        if self._log is None:
            return self._apply(self.values, op)
        if self._pending is None and self._position < len(self._log):
            made, result = self._log[self._position]
            assert made == op, f"not the same twice: {made}, now {op}"
            self._position += 1
            return result
        # Whatever asks for more while it is unwound does not get it.
        if self._pending is None:
            self._pending = op
            self._place = self._whereabouts(sys._getframe(1)) if self.merges else self._log
        raise _Pause

    def node(self, index: int, log: tuple[tuple[Op, Any], ...]) -> Node:
        """Run an activity up to the first operation that is not in ``log``."""
        if index not in self._connections:
            self._connections[index] = self.connection()
        self._log, self._position, self._pending, self._place = log, 0, None, None
        error: str | None = None
        self._returned.clear()
        sys.setprofile(self._profile)
        try:
            self.activities[index].run(self._connections[index])
        except _Pause:
            pass
        except Exception as exc:
            error = f"{type(exc).__name__}: {exc}"
        finally:
            sys.setprofile(None)
            self._log = None
        if self._pending is not None:
            error = None
        place = (index, self._pending, self._place, error)
        return self._nodes.setdefault(place, Node(log, self._pending, error))

    def _profile(self, frame: FrameType, event: str, value: Any) -> None:
        if event == "return" and frame.f_back is not None:
            self._returned[frame.f_back] = value

    def _whereabouts(self, frame: FrameType | None) -> Hashable:
        """Where an activity is, and all that it remembers there."""
        found: list[Hashable] = [repr(sys.exc_info()[1])]
        while frame is not None and frame.f_code is not System.node.__code__:
            variables = tuple((name, _frozen(value)) for name, value in frame.f_locals.items())
            # A result that waits, unnamed, for a `finally` or for the rest of its expression.
            unnamed = _frozen(self._returned.get(frame))
            found += [frame.f_code, frame.f_lasti, variables, unnamed]
            if frame.f_code.co_name.endswith("comp>"):
                found.append(self._log)
            frame = frame.f_back
        return tuple(found)

    # -- steps -------------------------------------------------------------------------

    def _apply(self, values: dict[Key, Any], op: Op, *, stray: bool = False) -> Any:
        kind, key, args = op
        old = values.get(key)
        if kind in ("load", "hear"):
            return old
        if kind in ("save", "note", "lock", "unlock"):
            values[key] = args[0]
            if args[0] is None:
                del values[key]
            return None
        if type(old) is Gone:
            # What a stray writes late is its own affair.
            assert stray, f"{op}: this key was deleted"
            return 0
        if kind == "add":
            total = int(old or b"0") + args[0]
            values[key] = b"%d" % total
            return total
        if kind == "append":
            values[key] = (old or b"") + args[0]
        elif kind == "set":
            values[key] = args[0]
        elif kind == "compare_set":
            expected, desired = args
            if old == expected or (old is None and not expected):
                values[key] = desired
            return values.get(key, expected)
        elif kind == "delete" and old is not None:
            assert isinstance(key, str)
            values[key] = Gone(old)
            if "/phase/" not in key:
                del values[key]
        elif kind == "check":
            return old is not None
        elif kind == "get":
            return old
        elif kind == "list":
            return tuple(k for k, v in values.items() if isinstance(k, str) and type(v) is not Gone)
        return None

    def _enabled(self, state: State, values: dict[Key, Any], index: int) -> bool:
        op = state.nodes[index].pending
        if op is None or (op.kind in _IN_STORE and state.sent[index]):
            return False
        if op.kind == "lock":
            return op.key not in values
        return op.kind not in ("wait", "get", "hear") or op.key in values

    def _private(self, values: dict[Key, Any], nodes: list[Node], index: int, made: Op, op: Op) -> bool:
        """Whether ``op``, which comes after ``made``, need not be a step of its own."""
        if op.kind in self._unanswered or op.kind == "note":
            return True
        if op.kind in ("load", "save"):
            if not self._fine or values.get((op.key[0], "_lock")) == index:
                return True
        elif op.kind == "unlock":
            return True
        elif op.kind != "lock":
            return not self._fine and (made.kind, op.kind, made.key) == ("wait", "get", op.key)
        return not any(nodes[other].pending for other in self._sharing(index) if other != index)

    def _sharing(self, index: int) -> list[int]:
        """The activities with the memory of this one."""
        memory = self.activities[index].memory
        return [number for number, other in enumerate(self.activities) if other.memory == memory]

    # -- states ------------------------------------------------------------------------

    def state(
        self, values: dict[Key, Any], nodes: tuple[Node, ...], sent: tuple[tuple[Op, ...], ...]
    ) -> State:
        for key in values:
            self._slots.setdefault(key)
        found = tuple(map(values.get, self._slots))
        # One form for each, though slots are found on the way.
        while found and found[-1] is None:
            found = found[:-1]
        return State(found, nodes, sent)

    def values_in(self, state: State) -> dict[Key, Any]:
        pairs = zip(self._slots, state.values, strict=False)
        return {key: value for key, value in pairs if value is not None}

    def step(
        self, state: State, values: dict[Key, Any], index: int, arrives: bool
    ) -> tuple[State, list[tuple[Op, Any]]]:
        """The state after a step, whose store and memory ``values`` becomes."""
        stray = self.activities[index].stray
        sent = list(state.sent)
        if arrives:
            op, *rest = sent[index]
            sent[index] = tuple(rest)
            self._apply(values, op, stray=stray)
            return self.state(values, state.nodes, tuple(sent)), [(op, None)]
        made: list[tuple[Op, Any]] = []
        nodes = list(state.nodes)
        while (next_op := nodes[index].pending) is not None:
            if made and not self._private(values, nodes, index, made[-1][0], next_op):
                break
            if next_op.kind == "lock":
                next_op = next_op._replace(args=(index,))
            if next_op.kind in self._unanswered:
                sent[index] += (next_op,)
                result = None
            else:
                result = self._apply(values, next_op, stray=stray)
            made.append((next_op, result))
            node = nodes[index]
            if (after := node.after.get(result)) is None:
                assert node.pending is not None
                after = self.node(index, (*node.log, (node.pending, result)))
                node.after[result] = after
            nodes[index] = after
        return self.state(values, tuple(nodes), tuple(sent)), made

    def moves(self, state: State, values: dict[Key, Any]) -> list[tuple[int, bool]]:
        """The steps that are possible: whose, and whether it is something sent that arrives."""
        found = []
        for index in range(len(self.activities)):
            if state.sent[index]:
                found.append((index, True))
            if self._enabled(state, values, index):
                found.append((index, False))
        return found

    def persistent(
        self, state: State, moves: list[tuple[int, bool]]
    ) -> list[tuple[int, bool]]:
        """As many of ``moves`` as will do: where all that share a memory are about to use it,
        nobody else can interfere, and it does not matter what others do meanwhile."""
        for index, arrives in moves:
            if not arrives:
                sharing = self._sharing(index)
                pending = [op for i in sharing if (op := state.nodes[i].pending) is not None]
                if all(op.kind in _IN_MEMORY for op in pending):
                    return [(i, sends) for i, sends in moves if i in sharing and not sends]
        return moves


def explore(
    system: System,
    noted: Noted,
    ended: Callable[[View], None],
    *,
    may_crash: Iterable[str] = (),
) -> Report:
    """Visit all states; ``noted`` judges what is noted, when it is, and ``ended`` the ends.

    :raises Violation: one of them raised an `AssertionError`, or an activity raised anything
    """
    report = Report()
    may_crash = tuple(may_crash)
    root = system.state(
        system.values,
        tuple(system.node(index, ()) for index in range(len(system.activities))),
        ((),) * len(system.activities),
    )
    found = {root: 0}
    states = [root]
    came: list[tuple[int, tuple[int, bool]]] = [(0, (0, False))]
    graph: list[list[int]] = []
    for number, state in enumerate(states):
        values = system.values_in(state)
        moves = system.moves(state, values)
        graph.append([])
        try:
            if not moves:
                report.ends += 1
                ended(View(system, values, state.nodes, None))
            movers = {system.activities[index].process for index, _ in moves}
            if len(movers) == 1 and not movers.isdisjoint(may_crash):
                report.crashes += 1
                ended(View(system, values, state.nodes, *movers))
            for move in system.persistent(state, moves):
                after = dict(values)
                try:
                    new, made = system.step(state, after, *move)
                    _judge(system, new, after, made, noted, move[0])
                except AssertionError:
                    came.append((number, move))
                    number = len(came) - 1
                    raise
                if (to := found.setdefault(new, len(states))) == len(states):
                    states.append(new)
                    came.append((number, move))
                graph[-1].append(to)
        except AssertionError as exc:
            raise _violation(system, root, came, number, exc) from exc
    report.states = len(states)
    report.steps = sum(map(len, graph))
    report.schedules = _count_schedules(graph)
    return report


def _judge(
    system: System,
    state: State,
    values: dict[Key, Any],
    made: list[tuple[Op, Any]],
    noted: Noted,
    index: int,
) -> None:
    for op, _ in made:
        if op.kind == "note":
            noted(View(system, values, state.nodes, None), *op.key, op.args[0])
    error = state.nodes[index].error
    assert error is None, f"{system.activities[index].name} raised {error}"


def _count_schedules(graph: list[list[int]]) -> int:
    """The ways from the first state to an end."""
    ways = [1] + [0] * (len(graph) - 1)
    unseen = [0] * len(graph)
    for state in graph:
        for to in state:
            unseen[to] += 1
    ready, schedules = [0], 0
    while ready:
        state = ready.pop()
        schedules += 0 if graph[state] else ways[state]
        for to in graph[state]:
            ways[to] += ways[state]
            unseen[to] -= 1
            if not unseen[to]:
                ready.append(to)
    assert not any(unseen), "law 5: activities can go round for ever"
    return schedules


def _violation(
    system: System,
    root: State,
    came: list[tuple[int, tuple[int, bool]]],
    number: int,
    exc: AssertionError,
) -> Violation:
    """What happened, in order; memory is left out."""
    moves = []
    while number:
        number, move = came[number]
        moves.append(move)
    lines, state = [], root
    for index, arrives in reversed(moves):
        try:
            made: list[tuple[Op, Any]]
            state, made = system.step(state, system.values_in(state), index, arrives)
        except AssertionError:
            op = state.sent[index][0] if arrives else state.nodes[index].pending
            assert op is not None
            made = [(op, "?")]
        for op, result in made:
            if op.kind in _IN_STORE or op.kind == "note":
                how = (
                    "  (arrives)"
                    if arrives
                    else "  (is sent)"
                    if op.kind in system._unanswered
                    else f"  -> {result}"
                )
                lines.append(f"  {system.activities[index].name:24} {op}{how}")
    return Violation("\n".join([str(exc), *lines]))


def _frozen(value: Any) -> Hashable:
    """Equal for what cannot be told apart; objects made anew are not."""
    if isinstance(value, FunctionType):
        cells = tuple(_frozen(cell.cell_contents) for cell in value.__closure__ or ())
        return (value.__code__, cells, _frozen(value.__defaults__))
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return value if isinstance(value, Hashable) else id(value)


# -- what activities see -------------------------------------------------------------------


class _Cell:
    """A field of a shared object."""

    def __init__(self, field: str) -> None:
        self._field = field

    def __get__(self, instance: Any, owner: object) -> Any:
        inner = instance.__dict__
        if isinstance(inner[self._field], _Section):
            return inner[self._field]
        return inner["_system"].do(Op("load", (inner["_name"], self._field)))

    def __set__(self, instance: Any, value: Any) -> None:
        inner = instance.__dict__
        inner["_system"].do(Op("save", (inner["_name"], self._field), (value,)))


class _Section:
    """A lock of a shared object; it holds the number of the activity that has it."""

    def __init__(self, system: System, key: tuple[str, str]) -> None:
        self._system = system
        self._key = key

    def __enter__(self) -> None:
        self._system.do(Op("lock", self._key, (0,)))

    def __exit__(self, *_: object) -> None:
        self._system.do(Op("unlock", self._key, (None,)))


class _Wire:
    """A c10d store, as far as the library's connections call it."""

    def __init__(self, system: System) -> None:
        self._do = system.do

    def set_timeout(self, timeout: object) -> None: ...

    def set(self, key: str, value: str | bytes) -> None:
        self._do(Op("set", key, (_bytes(value),)))

    def append(self, key: str, value: str | bytes) -> None:
        self._do(Op("append", key, (_bytes(value),)))

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def add(self, key: str, amount: int) -> Any:
        return self._do(Op("add", key, (amount,)))

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> Any:
        return self._do(Op("compare_set", key, (_bytes(expected), _bytes(desired))))

    def check(self, keys: list[str]) -> Any:
        return self._do(Op("check", keys[0]))

    def wait(self, keys: list[str], timeout: object = None) -> None:
        self._do(Op("wait", keys[0]))

    def get(self, key: str) -> Any:
        # A TCPStore's client, too, waits first, and then asks again for the value.
        self.wait([key])
        return self._do(Op("get", key))

    def delete_key(self, key: str) -> None:
        self._do(Op("delete", key))

    def list_keys(self) -> Iterator[str]:
        return iter(self._do(Op("list", "")))


def _plain(store: Any) -> Connection:
    return Connection(store)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
