"""Activities that are values: what one thread does, run again from its start at each operation.

An *activity* is a chain of *stages*: synchronous functions whose operations on store and memory
(see `modelled`) go through `System.do`. Between two of them a stage computes from what they
returned, and from nothing else. So its arguments and the *log* of its operations and their
results are its whole state, and no thread has to hold it: to learn what it does next, it is run
from its start, the operations in the log answer at once, and the first that is not in the log
unwinds it. That is done once for each log; a `Node` remembers the answer.

Of a call that has returned (`System.call`) only its result is kept, and of a stage that has ended
nothing but the next one, so that what comes to the same is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import modelled
from modelled import Op

from async_barriers._connection import Connection

T = TypeVar("T")

# Operations, and calls (function, arguments, options), with their results.
Log = tuple[tuple[Any, Any], ...]
# A function of the connection and of the rest of the tuple, which returns the next stage.
Stage = tuple[Any, ...]
END: Stage = ()


class Activity(NamedTuple):
    """What one thread does; ``memory`` is what it shares with others, ``stray`` that it is none
    of the library's."""

    name: str
    process: str
    memory: str
    stray: bool
    store: Connection
    first: Stage


class Node:
    """Where an activity stands; without a ``pending`` operation, it has ended."""

    __slots__ = ("after", "error", "log", "pending", "stage")

    def __init__(self, stage: Stage, log: Log, pending: Op | None, error: str) -> None:
        self.stage = stage
        self.log = log
        self.pending = pending
        self.error = error
        self.after: dict[Any, Node] = {}


class System:
    """Activities, and the store and memory they share."""

    def __init__(self, connect: Callable[..., Connection], *, in_flight: bool) -> None:
        """``in_flight``: connections do not wait for what needs no answer."""
        self.in_flight = in_flight
        self.table = modelled.Table()
        # What is there before all activities.
        self.initial = modelled.Values(self.table)
        self.activities: list[Activity] = []
        self._connect = modelled.calling(connect, self.call)
        # What is being run: its log, how far it is in it, and what it asks for then.
        self._log: Log | None = None
        self._position = 0
        self._pending: Op | None = None
        self._nodes: dict[tuple[int, Stage, Log], Node] = {}

    def connection(self) -> Connection:
        return self._connect(modelled.Wire(self.do))

    def shared(self, name: str, kind: Callable[..., T], *args: Any, **options: Any) -> T:
        """A ``kind`` that activities share; see `modelled.shared`."""
        made = modelled.calling(kind, self.call)
        return modelled.shared(self.do, name, made, *args, **options)

    def activity(
        self,
        name: str,
        process: str,
        first: Stage,
        *,
        memory: str | None = None,
        stray: bool = False,
    ) -> None:
        """Something that ``process`` does on a connection of its own."""
        made = Activity(name, process, memory or process, stray, self.connection(), first)
        self.activities.append(made)

    def note(self, kind: str, about: str, value: Any = True) -> None:
        """Remember something for the laws, and for `await_note`."""
        self.do(Op("note", ("note", kind, about), (value,)))

    def await_note(self, kind: str, about: str) -> Any:
        return self.do(Op("hear", ("note", kind, about)))

    def begin(self) -> tuple[Node, ...]:
        """Where all activities stand at first."""
        return tuple(self._run(i, each.first, ()) for i, each in enumerate(self.activities))

    def after(self, index: int, node: Node, result: Any) -> Node:
        """Where an activity comes to when its pending operation has returned ``result``."""
        if result not in node.after:
            log = (*node.log, (node.pending, result))
            node.after[result] = self._run(index, node.stage, log)
        return node.after[result]

    def do(self, op: Op) -> Any:
        """Every operation of every activity."""
        if self._log is None:
            return modelled.apply(self.initial, op, -1)
        if self._pending is None and self._position < len(self._log):
            made, result = self._log[self._position]
            assert made == op, f"not the same twice: {made}, now {op}"
            self._position += 1
            return result
        # Whatever asks for more while it is unwound does not get it.
        self._pending = self._pending or op
        raise _Pause

    def call(self, function: Callable[..., T], args: tuple[Any, ...], options: Any) -> T:
        """``function(*args, **options)``, which has no effects and no memory but by operations."""
        if self._log is None or any(isinstance(arg, FunctionType) for arg in args):
            # A function that is made anew in each run cannot be told to be the same.
            return function(*args, **options)
        began, call = self._position, (function, args, tuple(options.items()))
        if self._pending is None and began < len(self._log) and self._log[began][0] == call:
            self._position += 1
            known: T = self._log[began][1]
            return known
        result = function(*args, **options)
        if modelled.is_value((call, result)):
            self._log = (*self._log[:began], (call, result), *self._log[self._position :])
            self._position = began + 1
        return result

    def _run(self, index: int, stage: Stage, log: Log) -> Node:
        """Where ``stage`` comes to from ``log``."""
        self._log, self._position, self._pending = log, 0, None
        error = ""
        try:
            if stage:
                call, *args = stage
                following = call(self.activities[index].store, *args)
                return self._run(index, following, ())
        except _Pause:
            log = self._log
        except Exception as exc:
            error = f"{type(exc).__name__}: {exc}"
        finally:
            self._log = None
        node = Node(stage, log, self._pending, error)
        return self._nodes.setdefault((index, stage, log), node)


class _Pause(BaseException):
    """Unwinds an activity whose next operation has not been made."""
