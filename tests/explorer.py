"""Explores every order in which a few processes' messages and a store's answers can arrive.

A state is a value: what the store holds, what is under way on each connection, how far each
process has come (`replayed`), and what the laws remember. `explore` visits every state that can be
reached, depth first, and shows a violation as its schedule. Steps are

* a message reaches the store, which applies it as a whole (a TCPStore) or request by request;
* an answer, or the news that an awaited key was written, reaches the process, which goes on until
  it can only wait;
* a process begins a task, a task is cancelled, its deadline passes, a connection breaks, or a
  process replaces a dead one: whenever that is possible;
* the earliest timer rings, when no message is under way.

Not explored are

* other ways to a state that was seen before, since the same follows;
* steps of other processes before an answer, if the process can only receive that answer;
* crashes as steps of their own. A crashed process looks like one that is not scheduled any more,
  and its lost messages look like messages that never arrive. So a state in which only one process
  can still move is an end in which that process crashed.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple, Protocol

from modelled import Contents, Message, answered
from replayed import Effect, Event, Node, Process, Spec

from async_barriers._protocol.store import SILENT, CompareSet, Request

# Far more than any scenario needs; an endless loop stops here.
_MAX_STEPS = 1000
_MAX_STATES = 5_000_000


class Violation(AssertionError):
    """A law is broken; the message has a schedule that breaks it."""


class Link(NamedTuple):
    """What is under way on a connection.

    :ivar queue: messages that have not reached the store, and how far the first one has come
    :ivar replies: answers and news that have not reached the process
    :ivar waits: the key that the server watches for it, and the message that asked for it
    """

    process: int
    number: int
    queue: tuple[int, ...] = ()
    begun: tuple[Any, ...] = ()
    replies: tuple[int, ...] = ()
    waits: tuple[str, int] | None = None
    closed: bool = False


class State(NamedTuple):
    """The whole state; each number stands for a value in the `System`'s table."""

    store: int
    links: tuple[Link, ...]
    nodes: tuple[int, ...]
    # Of each process: whether it has yet to come, lives or is dead.
    lives: tuple[str, ...]
    remembered: int


class Move(NamedTuple):
    """One step of one process."""

    kind: str
    process: int
    link: int = 0
    event: Event = ()


Avoids = Callable[[Move, tuple[int, int]], bool]


class View(NamedTuple):
    """A state, as the laws see it."""

    specs: Sequence[Spec]
    store: Contents
    nodes: Sequence[Node]
    lives: Sequence[str]
    remembered: Any
    crashed: Collection[str] = ()


class Laws(Protocol):
    """The laws; each method raises an `AssertionError` if one is broken."""

    def served(self, remembered: Any, spec: Spec, request: Request, store: Contents) -> Any:
        """Judge what a request did to the store; return what to remember from then on."""

    def noted(self, view: View, spec: Spec, note: Event) -> None:
        """Judge what a process did in the last step."""

    def at_end(self, view: View) -> None:
        """Judge a state in which everything may stop for ever."""


@dataclass
class Report:
    """How much was explored."""

    states: int = 0
    steps: int = 0
    ends: int = 0
    crashes: int = 0
    longest: int = 0
    nodes: int = 0
    replays: int = 0

    def __str__(self) -> str:
        return (
            f"{self.states} states, {self.steps} steps, {self.ends} ends, {self.crashes} ends with "
            f"a crash, at most {self.longest} steps long, {self.nodes} local states, "
            f"{self.replays} replays"
        )


class System:
    """Processes that share a store.

    :param whole: whether the store applies a message as one
    :param wakes: whether a `CompareSet` wakes those who wait, as in a server with libuv
    :param may_crash: the processes of which one may stop for ever
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        laws: Laws,
        *,
        whole: bool = True,
        wakes: bool = True,
        may_crash: Collection[str] = (),
        hasty: bool = False,
    ) -> None:
        self.specs = list(specs)
        self.processes = [Process(spec) for spec in specs]
        self.laws = laws
        self._whole = whole
        self._wakes = wakes
        self._hasty = hasty
        self._may_crash = [i for i, spec in enumerate(specs) if spec.name in may_crash]
        self._index = {spec.name: index for index, spec in enumerate(specs)}
        self._things: list[Any] = []
        self._numbers: dict[Any, int] = {}
        self._served: dict[Any, tuple[int, tuple[Any, ...], tuple[str, ...], int]] = {}

    # -- values ----------------------------------------------------------------------------

    def _number(self, thing: Any) -> int:
        number = self._numbers.setdefault(thing, len(self._things))
        if number == len(self._things):
            self._things.append(thing)
        return number

    def _store(self, state: State) -> Contents:
        return dict(self._things[state.store])

    def view(self, state: State, crashed: Collection[str] = ()) -> View:
        nodes = [p.nodes[n] for p, n in zip(self.processes, state.nodes, strict=True)]
        return View(
            self.specs, self._store(state), nodes, state.lives, self._things[state.remembered],
            crashed,
        )  # fmt: skip

    # -- the beginning ---------------------------------------------------------------------

    def begin(self) -> State:
        """Run all that happens before the scenario begins, in one order."""
        count = len(self.specs)
        lives = tuple("comes" if spec.replaces else "lives" for spec in self.specs)
        state = State(self._number(()), (), (0,) * count, lives, self._number(None))
        for index, spec in enumerate(self.specs):
            if not spec.replaces:
                state = self._tell(state, index, ("first",))
                state = self._settle(state)
        for index, spec in enumerate(self.specs):
            if not spec.replaces:
                state = self._begin_jobs(state, index)
        return state

    def _settle(self, state: State) -> State:
        while moves := [m for m in self.moves(state) if m.kind in ("serve", "deliver", "late")]:
            state = self.step(state, moves[0])
        return state

    def _begin_jobs(self, state: State, index: int) -> State:
        for job in self.specs[index].jobs:
            if job.at_once:
                state = self._tell(state, index, ("begin", job.name))
        return state

    # -- moves -----------------------------------------------------------------------------

    def moves(self, state: State) -> list[Move]:
        """All possible steps; if one commutes with all others, it alone is enough."""
        found: list[Move] = []
        late: list[Move] = []
        earliest = math.inf
        busy = [0] * len(self.specs)
        for at, link in enumerate(state.links):
            if link.queue:
                found.append(Move("serve", link.process, at))
            busy[link.process] += bool(link.queue) or bool(link.replies) or link.waits is not None
            if link.replies and state.lives[link.process] == "lives":
                found.append(Move("deliver", link.process, at))
        for index, (process, node) in enumerate(zip(self.processes, state.nodes, strict=True)):
            spec = process.spec  # noqa: F841
            if state.lives[index] == "comes":
                found.append(Move("comes", index))
            if state.lives[index] != "lives":
                continue
            options = process.nodes[node].options
            if not options and busy[index] == 1:
                alone = [m for m in found if m.kind == "deliver" and m.process == index]
                if alone:
                    return alone
            for how, event in options:
                move = Move(how, index, event=event)
                if how != "late":
                    found.append(move)
                elif self._hasty:
                    late.append(move)
                elif event[1] < earliest:
                    earliest, late = event[1], [move]
        quiet = not any(
            m.kind in ("serve", "deliver") and state.lives[m.process] == "lives" for m in found
        )
        return found + late if quiet or self._hasty else found

    def place(self, state: State, move: Move) -> tuple[int, int]:
        """The process and the connection of a step; 0 if it uses none."""
        on = move.kind in ("serve", "deliver")
        return move.process, state.links[move.link].number if on else 0

    def crashed(self, state: State, moves: list[Move]) -> list[tuple[str, ...]]:
        """The processes that may have crashed if this is an end; () stands for none."""
        movers = {m.process for m in moves if m.kind != "may" and state.lives[m.process] != "dead"}
        if not movers:
            return [()]
        if len(movers) == 1 and not movers.isdisjoint(self._may_crash):
            return [tuple(self.specs[index].name for index in movers)]
        return []

    # -- steps -----------------------------------------------------------------------------

    def step(self, state: State, move: Move) -> State:
        """The state after ``move``."""
        if move.kind == "serve":
            return self._serve(state, move.link)
        if move.kind == "deliver":
            link = state.links[move.link]
            event = self._things[link.replies[0]]
            links = _with(state.links, link, link._replace(replies=link.replies[1:]))
            return self._tell(state._replace(links=links), move.process, event)
        if move.kind == "comes":
            lives = list(state.lives)
            lives[move.process] = "lives"
            lives[self._index[str(self.specs[move.process].replaces)]] = "dead"
            state = self._tell(state._replace(lives=tuple(lives)), move.process, ("first",))
            return self._begin_jobs(state, move.process)
        return self._tell(state, move.process, move.event)

    def _serve(self, state: State, at: int) -> State:
        link = state.links[at]
        key = (state.store, link.queue[0], link.begun, state.remembered, link.process)
        known = self._served.get(key)
        if known is None:
            known = self._served[key] = self._apply(*key)
        store, answers, written, remembered = known
        message: Message = self._things[link.queue[0]]
        if len(answers) < len(message.requests):
            served = link._replace(begun=answers, waits=None)
        else:
            served = link._replace(queue=link.queue[1:], begun=(), waits=None)
            if message.answered and not link.closed:
                replies = tuple(
                    a for a, r in zip(answers, message.requests, strict=True)
                    if not isinstance(r, SILENT)
                )  # fmt: skip
                event = ("hears", link.number, message.number, replies)
                served = served._replace(replies=(*served.replies, self._number(event)))
            if message.wait is not None and not link.closed:
                served = served._replace(waits=(message.wait, message.number))
                written = (*written, message.wait)
        links = _with(state.links, link, served)
        contents: Any = None
        for key_written in written:
            for other in links:
                if other.waits is not None and other.waits[0] == key_written:
                    if contents is None:
                        contents = dict(self._things[store])
                    if key_written in contents:
                        event = ("wakes", other.number, other.waits[1])  # type: ignore[assignment]
                        replies = (*other.replies, self._number(event))
                        links = _with(links, other, other._replace(waits=None, replies=replies))
        return State(store, links, state.nodes, state.lives, remembered)

    def _apply(
        self, store: int, message: int, begun: tuple[Any, ...], remembered: int, process: int
    ) -> tuple[int, tuple[Any, ...], tuple[str, ...], int]:
        """Apply a message, or its next request."""
        contents: Contents = dict(self._things[store])
        memory = self._things[remembered]
        requests = self._things[message].requests[len(begun) :]
        answers, written = list(begun), list[str]()
        for request in requests if self._whole else requests[:1]:
            answer, keys = answered(contents, request)
            answers.append(answer)
            if self._wakes or not isinstance(request, CompareSet):
                written += keys
            memory = self.laws.served(memory, self.specs[process], request, contents)
        number = self._number(tuple(sorted(contents.items())))
        return number, tuple(answers), tuple(written), self._number(memory)

    def told(self, state: State, move: Move) -> str:
        """A step in words."""
        if move.kind == "deliver":
            return _in_words(self._things[state.links[move.link].replies[0]])
        if move.kind != "serve":
            return " ".join(map(str, move.event)) or move.kind
        link = state.links[move.link]
        message: Message = self._things[link.queue[0]]
        key = (state.store, link.queue[0], link.begun, state.remembered, link.process)
        answers = self._served[key][1] if key in self._served else ()
        said = []
        for request, answer in list(zip(message.requests, answers, strict=False))[
            len(link.begun) :
        ]:
            fields = " ".join(str(field) for field in request)
            reply = "" if isinstance(request, SILENT) else f" -> {answer}"
            said.append(f"{type(request).__name__} {fields}{reply}")
        wait = f"; waits for {message.wait}" if message.wait is not None else ""
        return _short(f"@{link.number} {'; '.join(said)}{wait}")

    def _tell(self, state: State, index: int, event: Event) -> State:
        process = self.processes[index]
        before = state.nodes[index]
        after, effects = process.after(before, event)
        nodes = (*state.nodes[:index], after, *state.nodes[index + 1 :])
        links = self._carried_out(state.links, index, effects)
        if event[0] == "lose":
            links = tuple(x for x in links if x[:2] != (index, event[1]))
        state = state._replace(nodes=nodes, links=links)
        old, new = process.nodes[before].notes, process.nodes[after].notes
        if len(old) < len(new):
            view = self.view(state)
            for note in new:
                if note not in old:
                    self.laws.noted(view, process.spec, note)
        return state

    def _carried_out(
        self, links: tuple[Link, ...], index: int, effects: tuple[Effect, ...]
    ) -> tuple[Link, ...]:
        for kind, number, *rest in effects:
            link = next((x for x in links if x[:2] == (index, number)), Link(index, number))
            if kind == "sends":
                changed = link._replace(queue=(*link.queue, self._number(rest[0])))
            elif kind == "opens":
                changed = link._replace(replies=(self._number(("open", number)),))
            else:
                changed = Link(index, number, closed=True)
                if not rest[0]:
                    changed = changed._replace(queue=link.queue, begun=link.begun)
                links = tuple(x for x in links if x[:2] != (index, -number))
            links = _with(links, link, changed)
        return links


def _with(links: tuple[Link, ...], old: Link, new: Link) -> tuple[Link, ...]:
    """Put ``new`` in the place of ``old``; drop it if nothing is under way on it."""
    if new.queue or new.replies or new.waits is not None:
        if old in links:
            at = links.index(old)
            return (*links[:at], new, *links[at + 1 :])
        return tuple(sorted((*links, new), key=lambda link: link[:2]))
    return tuple(link for link in links if link is not old and link != old)


def _in_words(event: Event) -> str:
    kind, connection, *rest = event
    return _short(f"@{connection} {kind} {' '.join(map(str, rest))}")


def _short(told: str) -> str:
    told = re.sub(r"async_barriers/\d+:\w+/", "", told)
    told = re.sub(r'{"number": [^{]*"identity": "(.+?)".*?("life": null|{.*?})}', r"state \1", told)
    return re.sub(
        r'{"life": {"token": "(.+?)".*?}, "generation": "(.+?)", "left": (.+?)}',
        r"member \1 in \2, left: \3",
        told,
    )


Path = tuple[Any, Move] | None


def explore(system: System, *, shortest: bool = False, switches: int | None = None) -> Report:
    """Visit all states.

    :param shortest: breadth first, so that a violation has the fewest steps
    :param switches: how often a schedule may leave a connection that has something under way for
        another one or another process; without limit if None (Musuvathi and Qadeer 2007)
    :raises Violation: a law does not hold, or a process raised
    """
    report = Report()
    bounded = switches is not None
    left = switches or 0
    frontier: deque[tuple[State, Path, int, tuple[int, int], int]] = deque()
    frontier.append((system.begin(), None, 0, (0, 0), left))
    # For each state, how many switches were left when it was met.
    seen: dict[int, int] = {}
    while frontier:
        state, path, depth, at, left = frontier.popleft() if shortest else frontier.pop()
        report.states += 1
        report.longest = max(report.longest, depth)
        moves = system.moves(state)
        last: Move | None = None
        try:
            for crashed in system.crashed(state, moves):
                report.ends += not crashed
                report.crashes += bool(crashed)
                system.laws.at_end(system.view(state, crashed))
            stays = bounded and any(system.place(state, move) == at for move in moves)
            for last in moves:
                place = system.place(state, last) if bounded else at
                rest = left - (stays and place != at)
                if rest < 0:
                    continue
                report.steps += 1
                after = system.step(state, last)
                mark = hash((after, place))
                if seen.get(mark, -1) < rest:
                    seen[mark] = rest
                    frontier.append((after, (path, last), depth + 1, place, rest))
        except Exception as exc:
            told = [str(exc) or type(exc).__name__, *_story(system, path, last)]
            raise Violation("\n".join(told)) from exc
        assert depth < _MAX_STEPS, f"law 5: after {depth} steps there is no end"
        assert report.states < _MAX_STATES
    report.nodes = sum(len(process.nodes) for process in system.processes)
    report.replays = sum(process.replays for process in system.processes)
    return report


def wander(system: System, *, runs: int, seed: int, avoids: Avoids | None = None) -> Report:
    """Follow random schedules, for scenarios with too many states to visit all.

    :param avoids: whether a step, with the process and connection of an answer, is put off for as
        long as there is another one
    :raises Violation: as `explore`
    """
    report = Report()
    random = Random(seed)
    for process in system.processes:
        # It never comes back to a state, so it need not know one again.
        process.merges = False
    for _ in range(runs):
        for process in system.processes:
            process.start_over()
        state, path, depth = system.begin(), None, 0
        last: Move | None = None
        try:
            while moves := system.moves(state):
                for crashed in system.crashed(state, moves):
                    report.crashes += bool(crashed)
                    system.laws.at_end(system.view(state, crashed))
                if avoids is not None:
                    moves = [m for m in moves if not avoids(m, system.place(state, m))] or moves
                last = random.choice(moves)
                state = system.step(state, last)
                path, last, depth = (path, last), None, depth + 1  # type: ignore[assignment]
                assert depth < _MAX_STEPS, f"law 5: after {depth} steps there is no end"
            report.ends += 1
            system.laws.at_end(system.view(state))
        except Exception as exc:
            told = [str(exc) or type(exc).__name__, *_story(system, path, last)]
            raise Violation("\n".join(told)) from exc
        report.steps += depth
        report.longest = max(report.longest, depth)
        report.nodes += sum(len(process.nodes) for process in system.processes)
    return report


def _story(system: System, path: Path, last: Move | None) -> Iterator[str]:
    """What happened up to the end of ``path`` and in ``last``."""
    moves = [] if last is None else [last]
    while path is not None:
        path, move = path
        moves.append(move)
    state = system.begin()
    for move in reversed(moves):
        yield f"  {system.specs[move.process].name:10} {system.told(state, move)}"
        if move is not last:
            state = system.step(state, move)
