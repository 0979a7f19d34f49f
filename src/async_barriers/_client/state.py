"""What one rank has at one store: its loop, its efforts, its membership, its open phases.

A session is built in layers, one module and one class each; each layer knows those below it:

    state < pool < departing < entering < early < hearing < breaking < listening < joining < session
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from .._errors import BarrierConnectionError, BarrierError, describe, of_another_process
from .._protocol.keys import Keys
from .._protocol.membership import Closed, Membership
from .._protocol.phase import Entry
from .._protocol.store import Request
from .._protocol.verdict import Verdict
from .._store.event_loop import Loop
from .._store.future import Effort, Future
from .._store.loops import loop_here
from .._store.sources import Connection, Source
from .._store.worker import end_at_exit
from .outcomes import Outcomes
from .phases import Departure, Phase, Turns
from .said import Said
from .tally import Tally

T = TypeVar("T")

# How long undoing something may hold up its caller; laws 5 and 8 leave a second in all.
UNDO_SECS = 0.8
_SILENT_SECS = 0.3
# How often a message that is owed to the peers begins again after a signal handler interrupts it.
_ATTEMPTS = 10
# The first pause between two attempts to connect again.
RETRY_SECS = 0.2
# How long a host waits for its peers.
PEERS_SECS = 3.0
RETRY_SECS_AT_MOST = 2.0


class SessionState:
    """The attributes of a session, and how it starts work that goes on by itself.

    :ivar turns: the turns of the generation that this rank has joined; None before it joins
    :ivar unfinished: see `_protocol.leaving.go`
    :ivar open: the phases that this rank waits for, or still has to break
    """

    def __init__(
        self,
        source: Source,
        prefix: str,
        rank: int,
        world_size: int,
        *,
        init_secs: float,
        run_id: str | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.init_secs = init_secs
        self.prefix = prefix
        self.keys = Keys(prefix)
        self.closing = False
        self.turns: Turns | None = None
        self.open: dict[Phase, None] = {}
        self.unfinished: dict[str, str] = {}
        self.outcomes = Outcomes()
        self.tally = Tally()
        self.said = Said()
        self.loop: Loop | None = None
        self._source = source
        self.run_id = run_id
        self._pid = os.getpid()
        # The rank that left the generation first; after it nothing there can be released.
        self.closed_by: Closed | None = None
        # Whether this generation may have a rank that waits for its bell alone.
        self._rings = True
        # How often it has taken its bell; what it had read before, it may have to read again.
        self._bells_taken = 0
        # Whether its membership may not hold any more.
        self._doubtful = False
        self._before: Membership | None = None
        # A membership that this rank has claimed but not taken up; and whether it is claiming one.
        self._claimed: Membership | None = None
        self._claiming = False
        self._joining: Effort[None] | None = None
        self._joining_on: Effort[None] | None = None
        # What this rank was the last one to enter, on each connection.
        self._announced: dict[Connection, tuple[Entry, Membership]] = {}
        self._opened: list[Connection] = []
        self._idle: list[Connection] = []
        self._bell: Connection | None = None
        # Turns that were used up while no store could be reached, and have yet to be broken.
        self._owed: list[tuple[str, int | None, str]] = []
        # Requests from the outboxes of lost connections.
        self._adrift: list[tuple[list[Request], Callable[[list[Any]], object]]] = []
        # The phases that this rank looks after, and at which number of its entries.
        self._after: dict[Departure, int] = {}
        self._entries = 0
        self._efforts: set[Effort[Any]] = set()
        self._leaving: Future[None] | None = None
        # All is closed, and nothing may begin any more.
        self._over = False
        # Whether this rank has let the rank go that hosts the store, and the store with it.
        self.host_left = False
        self._tidying = False
        self._not_at_end: Callable[[], object] = lambda: None
        self.on_left: Callable[[Closed], object] = lambda closed: None  # If another rank leaves.
        # Called after this rank's bell rang, or when the session does not stand any more.
        self.on_look: Callable[[], object] = lambda: None

    def use(self) -> Loop:
        """The loop that runs here; the connections move to it."""
        loop = self.loop
        if loop is not None and loop.here():
            return loop
        if self.foreign:
            raise of_another_process(f"barrier {self.prefix!r}", self._pid)
        if self.busy_elsewhere:
            raise RuntimeError(
                f"barrier {self.prefix!r} is in use on the event loop of another thread, and "
                "belongs to one at a time: await it there, or build another barrier for this one"
            )
        return self._move(loop_here(loop))

    @property
    def busy_elsewhere(self) -> bool:
        """Whether calls are under way on a loop that another thread runs."""
        loop = self.loop
        if loop is None or not loop.elsewhere:
            return False
        awaited = any(p.waiter is not None and not p.decided for p in list(self.open))
        return awaited or not self.stands

    def _move(self, loop: Loop) -> Loop:
        self._not_at_end()
        self.loop = loop
        for connection in self._connections():
            connection.move(loop)
        self._not_at_end = loop.at_end(self.end_with_loop)
        end_at_exit(self)
        return loop

    @property
    def foreign(self) -> bool:
        """Whether this process was forked from the one that the barrier belongs to."""
        return os.getpid() != self._pid

    @property
    def running(self) -> Loop:
        """The event loop, where one is known to run this."""
        assert self.loop is not None
        return self.loop

    def _now(self) -> float:
        return self.running.now()

    def start(self, coroutine: Any, *, begins: bool = True) -> Effort[Any]:
        """Start a coroutine that goes on without its caller."""
        effort: Effort[Any] = Effort(coroutine, begins=begins)
        if not effort.done:
            self._efforts.add(effort)
            effort.when_done(partial(self._efforts.discard, effort))
        return effort

    def owe(self, begin: Callable[[], Coroutine[Any, Any, T]], *, last: bool = False) -> Future[T]:
        """Tell the peers something; done when they are told, or cannot be.

        A signal handler may raise in the middle of it. Then it begins anew, so it must be
        something that may be said twice.

        :param last: nothing comes after it, so it is still owed when all is closed
        """
        owed: Future[T] = Future()
        attempts = itertools.count(1)

        def attempt() -> None:
            if owed.done or (self._over and not last):
                return
            try:
                effort: Effort[T] = self.start(begin())
                effort.when_done(partial(ended, effort))
            except BaseException:
                self._post(attempt)
                raise

        def ended(effort: Effort[T]) -> None:
            if effort.error is None:
                owed.resolve(effort.result())
            elif isinstance(effort.error, BarrierError) or next(attempts) > _ATTEMPTS:
                owed.fail(effort.error)
            else:
                self._post(attempt)

        attempt()
        return owed

    def _post(self, callback: Callable[[], object]) -> None:
        if self.loop is not None:
            self.loop.post(callback)

    @property
    def stands(self) -> bool:
        """Whether phases can begin: joined, not closed, and the generation not known to be over."""
        known = self.turns is not None and self.closed_by is None
        return known and not (self._doubtful or self.closing)

    @property
    def has_joined(self) -> bool:
        """Whether this barrier has ever joined."""
        return self._before is not None

    @property
    def membership(self) -> Membership | None:
        return None if self.turns is None else self.turns.membership

    @property
    def why_not(self) -> BaseException | None:
        """The error of the latest attempt to connect, if none has worked since."""
        return self._source.failures[-1] if self._source.failures else None

    @property
    def patience_secs(self) -> float:
        """How long undoing something may hold up its caller.

        Less if the store has left a call unanswered: law 8 leaves two seconds in all.
        """
        return _SILENT_SECS if self._doubtful else UNDO_SECS

    def _connections(self) -> list[Connection]:
        used = [phase.connection for phase in self.open if phase.connection is not None]
        own = [self._bell] if self._bell is not None else []
        return list(dict.fromkeys([*own, *self._idle, *used]))

    async def _open(self, loop: Loop, deadline: float) -> Connection:
        """A new connection, which is closed with the session at the latest."""
        if self._over:
            raise BarrierConnectionError(f"{describe(self.prefix)} is closed")
        connection = await self._source.open(loop, deadline)
        self._opened = [each for each in self._opened if each.lost is None]
        self._opened.append(connection)
        return connection

    # Methods of the layers above.
    join: Callable[[], Effort[None]]
    end_with_loop: Callable[[], None]
    _woken: Callable[[Phase], None]
    _look: Callable[..., Coroutine[Any, Any, None]]
    _collect: Callable[..., Coroutine[Any, Any, None]]
    _begin_giving_up: Callable[..., Future[bool]]
    settle_commit: Callable[[Phase, Verdict], Coroutine[Any, Any, Verdict]]
    _phase_lost: Callable[[Phase, BarrierConnectionError], None]
    _bell_lost: Callable[[Connection, BarrierConnectionError], None]
