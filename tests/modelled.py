"""A modelled store and event loop, which a scheduler moves and the library uses as real ones.

`answered` is what a store does with one request. `Connection`, `Loop` and `Waiter` replace the
library's sockets or threads, and its event loop. Messages leave through a `Host` (see `replayed`),
which is one process of the job; answers arrive when the scheduler says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from async_barriers._errors import BarrierConnectionError
from async_barriers._protocol.store import (
    SILENT,
    Add,
    Append,
    CompareSet,
    Delete,
    Get,
    Read,
    Request,
    SetMany,
)
from async_barriers._store.future import Future

Contents = dict[str, bytes]


class Message(NamedTuple):
    """Requests that go out in one piece.

    :ivar wait: a key to wait for from then on, in place of the former one
    :ivar answered: whether an answer comes back
    """

    number: int
    requests: tuple[Request, ...]
    wait: str | None
    answered: bool


def answered(contents: Contents, request: Request) -> tuple[Any, list[str]]:
    """Apply a request; return its answer, and the keys whose waiters it wakes."""
    if isinstance(request, SetMany):
        for key in request.keys:
            contents[key] = request.value
        return None, request.keys
    if isinstance(request, Delete):
        for key in request.keys:
            contents.pop(key, None)
        return None, []
    key = request.key
    old = contents.get(key)
    if isinstance(request, Read):
        return old, []
    if isinstance(request, Get):
        return old or b"", []
    if isinstance(request, CompareSet):
        if (old or b"") == request.expected:
            contents[key] = request.desired
        elif old is None:
            return request.expected, []
        return contents[key], [key]
    if isinstance(request, Add):
        total = int(old or b"0") + request.amount
        contents[key] = b"%d" % total
        return total, [key]
    contents[key] = (old or b"") + request.value if isinstance(request, Append) else request.value
    return None, [key]


class Host(Protocol):
    """The process that connections and loops belong to."""

    now: float

    def sends(self, connection: int, message: Message) -> None: ...
    def closes(self, connection: int, reset: bool) -> None: ...
    def ready(self, task: Any) -> None: ...


class Connection:
    """As `SocketConnection`; if it does not wait, as `ThreadedConnection`."""

    def __init__(self, host: Host, number: int, *, waits: bool) -> None:
        self.number = number
        self.waits, self.suspect = waits, False
        self.on_wake: Callable[[], object] | None = None
        self.on_lost: Callable[[BarrierConnectionError], object] | None = None
        self.outbox: list[tuple[list[Request], Callable[[list[Any]], object]]] = []
        self.lost: BarrierConnectionError | None = None
        self._host = host
        self._awaited: str | None = None
        # The message that began to wait for it; later ones go on with that.
        self._awaited_since = 0
        # The number of messages, and those without an answer yet.
        self._sent = 0
        self._due: dict[int, tuple[Any, Future[list[Any]], str | None]] = {}
        # Whether a thread waits, on a connection of its own.
        self._thread_waits = False

    def call(self, *requests: Request, wait: str | None = None) -> Future[list[Any]]:
        said: Future[list[Any]] = Future()
        if self.lost is not None:
            said.fail(BarrierConnectionError(str(self.lost)))
            return said
        late, self.outbox = self.outbox, []
        if wait is not None:
            self._awaited, self._awaited_since = wait, self._sent
        every = [*(request for earlier, _ in late for request in earlier), *requests]
        # A deletion is answered, although nobody wants to know.
        silent = [isinstance(each, SILENT) and not isinstance(each, Delete) for each in every]
        replies = not all(silent)
        number, self._sent = self._sent, self._sent + 1
        if replies or not self.waits:
            sizes = [(_answers(earlier), heard) for earlier, heard in late]
            self._due[number] = (sizes, said, self._awaited)
        awaited = self._awaited if self.waits else None
        message = Message(number, tuple(map(_frozen, every)), awaited, replies or not self.waits)
        self._host.sends(self.number, message)
        if not message.answered:
            for _, heard in late:
                heard([])
            said.resolve([])
        return said

    def hears(self, number: int, answers: tuple[Any, ...]) -> None:
        """Take the answers to a message."""
        late, said, awaited = self._due.pop(number)
        rest = list(answers)
        for size, heard in late:
            heard(rest[:size])
            del rest[:size]
        said.resolve(rest)
        if not self.waits and awaited is not None and awaited == self._awaited and not self.lost:
            self._awaited = None
            if not self._thread_waits:
                self._thread_waits = True
                self._host.sends(-self.number, Message(number, (), awaited, False))

    def wakes(self, number: int) -> None:
        """The key that a message waits for was written; a later one may have begun another wait."""
        if not self.waits:
            self._thread_waits = False
            if self.on_wake is not None:
                self.on_wake()
        elif number >= self._awaited_since and self._awaited is not None:
            self._awaited = None
            if self.on_wake is not None:
                self.on_wake()

    def stop_waiting(self) -> None:
        self._awaited = None
        self.on_wake = None

    def move(self, loop: object) -> None:
        """Does nothing, since there is one loop."""

    @property
    def unsaid(self) -> bool:
        return bool(self._due)

    @property
    def sent(self) -> bool:
        return self.lost is None

    def close(self, *, reset: bool = False) -> None:
        self.on_lost = None
        self._end(BarrierConnectionError("this connection to the store was closed"), reset)

    def lose(self) -> None:
        """Break the connection."""
        self._end(BarrierConnectionError("the connection to the store was lost"), True)

    def _end(self, error: BarrierConnectionError, reset: bool) -> None:
        if self.lost is not None:
            return
        self.lost = error
        due, self._due = self._due, {}
        on_lost, self.on_lost, self.on_wake = self.on_lost, None, None
        self._host.closes(self.number, reset)
        for _, said, _ in due.values():
            said.fail(BarrierConnectionError(str(error)))
        if on_lost is not None:
            on_lost(error)


def _answers(requests: list[Request]) -> int:
    return sum(not isinstance(request, SILENT) for request in requests)


def _frozen(request: Request) -> Request:
    if isinstance(request, SetMany | Delete):
        keys: Any = tuple(request.keys)
        return request._replace(keys=keys)
    return request


class Timer:
    """A callback and the time when it is called."""

    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        self.when = when
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """The event loop of a process; the scheduler moves its clock."""

    ended = elsewhere = False

    def __init__(self, host: Host) -> None:
        self._host = host
        self.timers: list[Timer] = []

    def now(self) -> float:
        return self._host.now

    def here(self) -> bool:
        return True

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        timer = Timer(when, callback)
        self.timers.append(timer)
        return timer

    def next_timer(self) -> Timer | None:
        """The timer that rings first."""
        self.timers = [timer for timer in self.timers if timer.callback is not None]
        return min(self.timers, key=lambda timer: timer.when, default=None)

    def post(self, callback: Callable[[], object]) -> None:
        callback()

    def waiter(self) -> Waiter:
        return Waiter(self._host)

    def at_end(self, callback: Callable[[], object]) -> Callable[[], object]:
        return lambda: None


class Waiter:
    """A task that waits to be woken."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._woken = False
        self.until = 0.0
        self.task: Any = None

    def wake(self) -> None:
        if self.task is None:
            self._woken = True
        else:
            self._host.ready(self.task)

    async def wait(self, until: float) -> None:
        if not self._woken:
            self.until = until
            await _Pause(self)
        self._woken = False


class _Pause:
    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter

    def __await__(self) -> Any:
        yield self._waiter
