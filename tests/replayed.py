"""Processes of a job as values: what each of them does next follows from what it was told so far.

A coroutine cannot be copied, so a process is built anew and told the same again where the explorer
goes back. What it does then, it does always: its clock, its tokens and its event loop are the
model's. All that it was told is a path of `Node`s, and each of these is made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import modelled
from fingerprints import Walk
from modelled import Connection, Loop, Message, Waiter

from async_barriers._store.future import Future

# What a process is told: a kind, and what belongs to it.
Event = tuple[Any, ...]
# What a process does: sends, opens and closes.
Effect = tuple[Any, ...]
Program = Callable[["Host"], Coroutine[Any, Any, object]]


class Cancelled(BaseException):
    """As an event loop's own."""

    def __init__(self, scope: CancelScope | None = None) -> None:
        super().__init__()
        self.scope = scope


class CancelScope:
    """As anyio's, in the task that runs."""

    def __init__(self, *, deadline: float = math.inf, shield: bool = False) -> None:
        self.deadline = deadline
        self.shield = shield
        self.cancel_called = False
        self._task: Task | None = None

    def __enter__(self) -> CancelScope:
        self._task = Host.running.task
        assert self._task is not None
        self._task.scopes.append(self)
        if self.cancel_called:
            self._task.interrupt(Cancelled(self))
        return self

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> bool:
        assert self._task is not None
        self._task.scopes.remove(self)
        return isinstance(exc, Cancelled) and exc.scope is self

    def cancel(self) -> None:
        if not self.cancel_called:
            self.cancel_called = True
            if self._task is not None and self in self._task.scopes:
                self._task.interrupt(Cancelled(self))


def get_cancelled_exc_class() -> type[BaseException]:
    return Cancelled


@dataclass(frozen=True)
class Job:
    """What one task of a process does.

    :ivar at_once: it is under way from the beginning, and does not begin at any time
    :ivar cancels: how often it may be cancelled
    :ivar passes: how often time may pass until a moment that it waits for
    :ivar patient: it passes only when nothing else can happen
    """

    name: str
    program: Program
    at_once: bool = False
    cancels: int = 0
    passes: int = 0
    patient: bool = False


@dataclass(frozen=True)
class Spec:
    """A process.

    :ivar waits: as its connections do
    :ivar replaces: the process that is dead when this one comes
    :ivar first: what it does before the scenario begins
    :ivar losses: how many of its connections may break
    :ivar slow: whether it takes time to open one
    :ivar lives: whether another process does, as far as this one can tell
    """

    name: str
    rank: int
    jobs: tuple[Job, ...]
    first: Program | None = None
    waits: bool = True
    hosts: bool = False
    replaces: str | None = None
    losses: int = 0
    slow: bool = False
    lives: Callable[[str], bool | None] = lambda name: False


class Task:
    """A coroutine on the event loop of a process."""

    def __init__(self, host: Host, job: Job) -> None:
        self.job = job
        self.scopes: list[CancelScope] = []
        self.ended = False
        self.cancels, self.passes = job.cancels, job.passes
        self.awaited: Any = None
        self._host = host
        self._thrown: Cancelled | None = None
        self._coroutine = job.program(host)

    def run(self) -> None:
        self._host.task = self
        awaited, self.awaited = self.awaited, None
        if isinstance(awaited, Waiter):
            awaited.task = None
        try:
            while self.awaited is None:
                thrown, self._thrown = self._thrown, None
                if thrown is None:
                    self.awaited = self._coroutine.send(None)
                else:
                    self.awaited = self._coroutine.throw(thrown)
                if self._interrupted:
                    self.awaited = None
        except StopIteration:
            self.ended = True
        finally:
            self._host.task = None
        if isinstance(self.awaited, Waiter):
            self.awaited.task = self
        elif self.awaited is not None:
            self.awaited.when_done(partial(self._came, self.awaited))

    def _came(self, awaited: Any) -> None:
        # A task that was cancelled may wait for something else by now.
        if self.awaited is awaited:
            self._host.ready(self)

    @property
    def _interrupted(self) -> bool:
        thrown = self._thrown
        if thrown is None:
            return False
        inner = self.scopes
        if thrown.scope is not None and thrown.scope in inner:
            inner = inner[inner.index(thrown.scope) + 1 :]
        return not any(scope.shield for scope in inner)

    def interrupt(self, thrown: Cancelled) -> None:
        """Throw into it, when nothing shields it from that."""
        if not self.ended:
            self._thrown = thrown
            if self._host.task is not self and self._interrupted:
                self._host.ready(self)

    @property
    def until(self) -> float:
        """When it goes on by itself."""
        until = min((scope.deadline for scope in self.scopes), default=math.inf)
        return min(until, self.awaited.until) if isinstance(self.awaited, Waiter) else until

    def time_out(self) -> None:
        """It is that late."""
        self.passes -= 1
        for scope in self.scopes:
            if scope.deadline <= self._host.now:
                scope.cancel()
        if isinstance(self.awaited, Waiter) and self.awaited.until <= self._host.now:
            self._host.ready(self)

    def cancel(self) -> None:
        self.cancels -= 1
        self.interrupt(Cancelled())

    def close(self) -> None:
        self._coroutine.close()


class Host:
    """One process; tells the explorer what it does.

    :ivar running: the one whose code runs
    :ivar barrier: of its program
    :ivar signal: and its signal, with the thread that listens
    """

    running: Host

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.name = spec.name
        self.rank = spec.rank
        self.now = 0.0
        self.loop = Loop(self)
        self.task: Task | None = None
        self.barrier: Any = None
        self.signal: Any = None
        self.portal: Any = None
        self.effects: list[Effect] = []
        self.notes: dict[Event, None] = {}
        self.ended = False
        self._losses = spec.losses
        self._tokens = 0
        self._connections: dict[int, Connection] = {}
        self._opening: dict[int, Future[Connection]] = {}
        self._tasks: dict[str, Task] = {}
        self._ready: list[Task] = []
        self._paused: dict[str, Future[None]] = {}

    # -- for its programs ----------------------------------------------------------------

    def note(self, *note: Any) -> None:
        """Something that a law is about."""
        self.notes[note] = None

    def token(self) -> str:
        """What no other process says."""
        self._tokens += 1
        return f"{self.name}.{self._tokens}"

    def pause(self, what: str) -> Future[None]:
        """Done when the scheduler says so."""
        self._paused[what] = Future()
        return self._paused[what]

    def open(self) -> Future[Connection]:
        """A connection to the store."""
        number = 1 + len(self._connections) + len(self._opening)
        opened = self._opening[number] = Future()
        if self.spec.slow:
            self.effects.append(("opens", number))
        else:
            self._open(number)
        return opened

    # -- what its connections and tasks do -----------------------------------------------

    def sends(self, connection: int, message: Message) -> None:
        self.effects.append(("sends", connection, message))

    def closes(self, connection: int, reset: bool) -> None:
        self.effects.append(("closes", connection, reset))

    def ready(self, task: Task) -> None:
        if task not in self._ready and not task.ended:
            self._ready.append(task)

    # -- what happens to it --------------------------------------------------------------

    def take(self, event: Event) -> tuple[Effect, ...]:
        """What it does when it is told that."""
        Host.running = self
        self.effects = []
        kind, *args = event
        getattr(self, f"_{kind}")(*args)
        while self._ready:
            self._ready.pop(0).run()
        return tuple(self.effects)

    def _hears(self, connection: int, number: int, answers: tuple[Any, ...]) -> None:
        self._connections[connection].hears(number, answers)

    def _wakes(self, connection: int, number: int) -> None:
        self._connections[abs(connection)].wakes(number)

    def _open(self, connection: int) -> None:
        opened = Connection(self, connection, waits=self.spec.waits)
        self._connections[connection] = opened
        self._opening.pop(connection).resolve(opened)

    def _lose(self, connection: int) -> None:
        self._losses -= 1
        self._connections[connection].lose()

    def _ring(self, when: float) -> None:
        timer = self.loop.next_timer()
        assert timer is not None
        assert timer.callback is not None
        self.now = max(self.now, timer.when)
        callback, timer.callback = timer.callback, None
        callback()

    def _begin(self, name: str) -> None:
        job = next(job for job in self.spec.jobs if job.name == name)
        self._start(job)

    def _first(self) -> None:
        if self.spec.first is not None:
            self._start(Job("first", self.spec.first))

    def _start(self, job: Job) -> None:
        self._tasks[job.name] = Task(self, job)
        self.ready(self._tasks[job.name])

    def _cancel(self, name: str) -> None:
        self._tasks[name].cancel()

    def _pass(self, until: float, name: str) -> None:
        task = self._tasks[name]
        self.now = max(self.now, task.until)
        task.time_out()

    def _go_on(self, what: str) -> None:
        self._paused.pop(what).resolve(None)

    # -- what can happen to it -----------------------------------------------------------

    def options(self) -> tuple[tuple[str, Event], ...]:
        """Each with whether it has to happen, may, or does when nothing else can."""
        found: list[tuple[str, Event]] = []
        for job in self.spec.jobs:
            task = self._tasks.get(job.name)
            if task is None:
                found.append(("must", ("begin", job.name)))
            elif not task.ended:
                if task.cancels:
                    found.append(("may", ("cancel", job.name)))
                if task.passes and self.now <= task.until < math.inf:
                    how = "late" if job.patient else "may"
                    found.append((how, ("pass", task.until, job.name)))
        found += [("must", ("go_on", what)) for what in self._paused]
        if self._losses:
            open_ones = [c.number for c in self._connections.values() if c.lost is None]
            found += [("may", ("lose", number)) for number in open_ones]
        if (timer := self.loop.next_timer()) is not None:
            found.append(("late", ("ring", timer.when)))
        return tuple(found)

    def waiting(self) -> tuple[str, ...]:
        """The tasks that have not ended."""
        return tuple(name for name, task in self._tasks.items() if not task.ended)

    def fingerprint(self) -> Any:
        """The same where it will do the same from now on, and no other."""
        self.loop.next_timer()
        self.loop.timers.sort(key=lambda timer: timer.when)
        # What effort is under way is known from what it waits for.
        walk = Walk([("ObservedSession", "_efforts"), ("Host", "notes"), ("Host", "effects")])
        return walk.value(self), frozenset(self.notes)

    def end(self) -> None:
        """It is not needed any more."""
        self.ended = True
        if self.barrier is not None:
            # Or it would leave.
            self.barrier._session.closing = True
        for task in self._tasks.values():
            Host.running, self.task = self, task
            task.close()


class Node(NamedTuple):
    """A process that was told something."""

    parent: int
    event: Event
    notes: tuple[Event, ...]
    options: tuple[tuple[str, Event], ...]
    waiting: tuple[str, ...]
    stands: str | None
    open: tuple[str, ...]


class Process:
    """All that may become of one process.

    :ivar merges: whether it is at one node, whatever the way there, if all that can follow is the
        same; to find that out takes ten times as long as to go on
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.nodes: list[Node] = []
        self.replays = 0
        self.merges = True
        self._after: dict[tuple[int, Event], tuple[int, tuple[Effect, ...]]] = {}
        self._live: dict[int, Host] = {}
        self._known: dict[int, int] = {}
        self.start_over()

    def start_over(self) -> None:
        """Forget all nodes but the first."""
        self.end()
        for known in (self.nodes, self._after, self._known):
            known.clear()
        self._live[0] = Host(self.spec)
        self._add(-1, (), self._live[0])

    def after(self, node: int, event: Event) -> tuple[int, tuple[Effect, ...]]:
        """What becomes of it when it is told ``event``, and what it does then."""
        known = self._after.get((node, event))
        if known is None:
            host = self._host_at(node)
            effects = host.take(event)
            mark = hash(host.fingerprint()) if self.merges else len(self.nodes)
            child = self._known.get(mark)
            if child is None:
                child = self._known[mark] = self._add(node, event, host)
            known = self._after[node, event] = child, effects
            self._live[child] = host
        return known

    def _add(self, parent: int, event: Event, host: Host) -> int:
        session = getattr(host.barrier, "_session", None)
        membership = None if session is None else session.membership
        stands = None if membership is None else membership.state.identity
        awaited = () if session is None else [p for p in session.open if not p.decided]
        paths = tuple(phase.entry.keys.path for phase in awaited)
        notes, options, waiting = tuple(host.notes), host.options(), host.waiting()
        self.nodes.append(Node(parent, event, notes, options, waiting, stands, paths))
        return len(self.nodes) - 1

    def _host_at(self, node: int) -> Host:
        host = self._live.pop(node, None)
        if host is not None:
            return host
        while len(self._live) > 8:
            self._live.pop(next(iter(self._live))).end()
        self.replays += 1
        path: list[int] = []
        at = node
        while at:
            path.append(at)
            at = self.nodes[at].parent
        host = Host(self.spec)
        for step in reversed(path):
            told = self.nodes[step]
            effects = host.take(told.event)
            assert self._after[told.parent, told.event] == (step, effects), "not the same again"
        return host

    def end(self) -> None:
        """Let go of what is kept to go on from."""
        for host in self._live.values():
            host.end()
        self._live.clear()


__all__ = ["Cancelled", "Host", "Job", "Process", "Spec", "contextmanager", "modelled"]
