"""One rank's presence at one store: its connections, its membership, and the phases it awaits.

Everything here runs in callbacks of one event loop, never blocks and takes no lock. What was begun
for the peers (a break, a leader's word) goes on by itself, whatever becomes of the caller.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from .._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BrokenBarrierError,
    describe,
)
from .._protocol import membership as members
from .._protocol import phase as phases
from .._protocol.count import COMMIT, EXECUTE, GATHER, Count
from .._protocol.keys import Keys
from .._protocol.membership import Closed, Membership, State
from .._protocol.phase import Entry, Forgotten
from .._protocol.store import Add, Append, CompareSet, Delete, Read, Request, Set, SetMany
from .._protocol.verdict import Broken, Released, Verdict, number
from .._store.future import Effort, Future
from .._store.loops import Loop, PrivateLoop, loop_here
from .._store.sources import CannotHost, Connection, Source
from .._store.waiting import sleep, within
from .._store.worker import end_at_exit
from . import process
from .outcomes import Outcomes
from .phases import Phase, Turns
from .tally import Tally

T = TypeVar("T")
logger = logging.getLogger(__name__)

# How long what has to be undone may hold up its caller; law 5 and law 8 leave a second in all.
UNDO_SECS = 0.8
_SILENT_SECS = 0.3
# How long a rank that calls when another has left waits for that one to come back.
_GRACE_SECS = 0.5
# How long a host waits for its peers.
PEERS_SECS = 3.0
# How long what leaves waits for a store that does not answer; less where it has not for a while,
# since law 8 leaves two seconds in all.
_LEAVE_SECS = 1.0
_LEAVE_SILENT_SECS = 0.6
_LAST_SECS = 0.1
_EXIT_SECS = 0.5
# How often a connection that was lost is tried again.
_RETRY_SECS = 0.2
_RETRY_SECS_AT_MOST = 2.0
# Who waited for less did not wait for anybody.
WAITED_SECS = 0.01
# What the last departure of a burst waits for; and how long spare connections are kept.
_IDLE_SECS = 0.25


class Session:
    """All that a connected barrier has.

    :ivar turns: of the generation that this rank has joined; None before it has
    :ivar open: the phases that somebody on this rank waits for, or that are owed a break
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
        self.outcomes = Outcomes()
        self.tally = Tally()
        self.loop: Loop | None = None
        self._source = source
        self._run_id = run_id
        self._pid = os.getpid()
        self._closed_by: Closed | None = None
        # Whether a rank may be there, in this generation, that only hears its bell.
        self._rings = True
        # Its membership is not known to hold any more.
        self._doubtful = False
        self._before: Membership | None = None
        # One that this rank has claimed, and does not take part in yet; and whether it is at that.
        self._claimed: Membership | None = None
        self._claiming = False
        self._joining: Effort[None] | None = None
        self._joining_on: Effort[None] | None = None
        # The phase that this rank was the last one to enter, on each connection.
        self._announced: dict[Connection, Phase] = {}
        self._opened: list[Connection] = []
        self._idle: list[Connection] = []
        self._bell: Connection | None = None
        self._reopening: Effort[None] | None = None
        # Breaks of turns that were used up where no store could be reached.
        self._owed: list[tuple[str, int | None, str]] = []
        # What was to go out with the next message of a connection that was lost.
        self._adrift: list[tuple[list[Request], Callable[[list[Any]], object]]] = []
        self._efforts: set[Effort[Any]] = set()
        self._leaving: Effort[None] | None = None
        # All is closed, and nothing may be begun any more.
        self._over = False
        self._drained = False
        self._tidying = False
        self._not_at_end: Callable[[], object] = lambda: None

    # -- the loop it runs on -------------------------------------------------------------

    def use(self) -> Loop:
        """The loop that runs here; connections move with their barrier."""
        loop = self.loop
        if loop is not None and loop.here():
            return loop
        if os.getpid() != self._pid:
            raise BarrierError(
                f"barrier {self.prefix!r} was built in process {self._pid} and belongs to it; this "
                f"is process {os.getpid()}, forked from there: build a barrier in the process "
                "that uses it"
            )
        return self._move(loop_here(loop))

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
        """Whether this is a process that was forked from the one it belongs to."""
        return os.getpid() != self._pid

    def _connections(self) -> list[Connection]:
        used = [phase.connection for phase in self.open if phase.connection is not None]
        own = [self._bell] if self._bell is not None else []
        return list(dict.fromkeys([*own, *self._idle, *used]))

    async def _open(self, loop: Loop, deadline: float) -> Connection:
        """A new connection, which is closed with this at the latest."""
        if self._over:
            raise BarrierConnectionError(f"{describe(self.prefix)} is closed")
        connection = await self._source.open(loop, deadline)
        self._opened = [each for each in self._opened if each.lost is None]
        self._opened.append(connection)
        return connection

    open_another = _open

    @property
    def namespace(self) -> str:
        """What all our keys begin with; known once a connection is open."""
        return self._source.namespace

    def _now(self) -> float:
        assert self.loop is not None
        return self.loop.now()

    def start(self, coroutine: Any) -> Effort[Any]:
        """Begin what goes on by itself."""
        effort: Effort[Any] = Effort(coroutine)
        if not effort.done:
            self._efforts.add(effort)
            effort.when_done(lambda: self._efforts.discard(effort))
        return effort

    def owe(self, begin: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Have the peers told something; done when they are, or cannot be.

        A signal handler may raise in the middle of it. It is begun anew then, so it has to be
        something that may be said twice.
        """
        owed: Future[T] = Future()

        def attempt() -> None:
            if owed.done or self._over:
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
            elif isinstance(effort.error, BarrierError):
                owed.fail(effort.error)
            else:
                self._post(attempt)

        attempt()
        return owed

    def _post(self, callback: Callable[[], object]) -> None:
        if self.loop is not None:
            self.loop.post(callback)

    # -- joining -------------------------------------------------------------------------

    @property
    def stands(self) -> bool:
        """Whether phases can be begun: joined, the generation not known to be over, not closed."""
        known = self.turns is not None and self._closed_by is None
        return known and not (self._doubtful or self.closing)

    @property
    def has_joined(self) -> bool:
        """Whether this barrier ever has."""
        return self._before is not None

    @property
    def membership(self) -> Membership | None:
        return None if self.turns is None else self.turns.membership

    @property
    def why_not(self) -> BaseException | None:
        """What the latest attempt to connect failed by, where none has worked since."""
        return self._source.failures[-1] if self._source.failures else None

    def join(self) -> Effort[None]:
        """Connect, and claim this rank in the present generation; one attempt serves all."""
        if self.joining is None:
            self._joining = self.start(self._join())
        assert self._joining is not None
        return self._joining

    @property
    def joining(self) -> Effort[None] | None:
        """The attempt to join that is under way."""
        return None if self._joining is None or self._joining.done else self._joining

    async def _join(self) -> None:
        loop = self.loop
        assert loop is not None
        deadline = self._now() + self.init_secs
        pause = _RETRY_SECS
        while True:
            store: Connection | None = None
            try:
                store = await self._open(loop, deadline)
                if self.closing:
                    raise BarrierConnectionError(f"{describe(self.prefix)} was closed meanwhile")
                self.keys = Keys(self.prefix, self._source.namespace)
                joined = self._joining_on = self.start(self._join_on(store))
                if not await within(loop, joined, deadline - self._now()):
                    # What hangs must not hold up the next attempt.
                    joined.stop(BarrierConnectionError("the store did not answer in time"))
                joined.result()
                self._source.failures.clear()
                return
            except BarrierError as exc:
                self._source.failures[:] = [exc]
                if store is not None:
                    store.close(reset=store.unsaid)
                lost = isinstance(exc, BarrierConnectionError) and not isinstance(exc, CannotHost)
                if not lost or self.closing or self._now() >= deadline:
                    raise
            await sleep(loop, pause)
            pause = min(2 * pause, _RETRY_SECS_AT_MOST)

    async def _join_on(self, store: Connection) -> None:
        loop = self.loop
        assert loop is not None
        before = self.membership or self._claimed or self._before
        closed_by = self._closed_by
        if before is not None and closed_by is None:
            # A store that was not heard of for a while, but is the same.
            turns = Turns(before) if before is self._claimed else self.turns
            if turns is not None and await members.still_holds(store, before):
                await self._stand(store, turns)
                return
        elif before is not None and closed_by is not None:
            await self._await_return(store, before, closed_by)
        if before is not None:
            self._break_all(before, store, await self._successor(store, before))
        life = process.new_life(self._run_id)
        self._claiming = True
        try:
            joined = await members.join(
                store,
                self.keys,
                self.rank,
                self.world_size,
                life,
                lives=process.lives,
                wait_for=partial(self._wait_for, store),
                before=before,
            )
            self._claimed = joined
            if before is not None:
                process.holders.pop(before.claim.life.token, None)
            process.holders[joined.claim.life.token] = self
        finally:
            self._claiming = False
        self._closed_by = None
        self._drained = False
        self._rings = True
        await self._stand(store, Turns(joined))

    async def _successor(self, store: Connection, before: Membership) -> State | None:
        found = await store.call(*members.around(before))
        return members.surroundings(before, found).successor

    async def _stand(self, store: Connection, turns: Turns) -> None:
        """Take part, with connections that work."""
        loop = self.loop
        assert loop is not None
        for connection in (self._bell, *self._idle):
            if connection is not None and connection is not store:
                connection.on_lost = None
                self.start(self._retire(connection))
        self._idle, self._bell = [], None
        bell = await self._open(loop, self._now() + self.init_secs)
        if self.closing:
            bell.close()
            raise BarrierClosedError(describe(self.prefix))
        self.turns = turns
        self._before, self._claimed = turns.membership, None
        self.tally.reconnections += self._doubtful
        self._doubtful = False
        self._listen(bell)
        await self._look_around()
        if store.lost is None:
            self._put_back(store)
        while self._owed and self.stands:
            name, step, reason = self._owed[0]
            with contextlib.suppress(BrokenBarrierError):
                phase = self.begin(name, step)
                await self._give_up(phase, Broken(self.rank, reason), False)
                self.forget(phase)
            del self._owed[0]

    async def _retire(self, connection: Connection) -> None:
        """Close it when what is on its way there was answered: departures, and what they lead to.

        Those that hang were left behind before.
        """
        loop = self.loop
        assert loop is not None
        deadline = self._now() + self.init_secs
        connection.stop_waiting()
        while connection.lost is None and (connection.unsaid or connection.outbox):
            answered = connection.call(Read(self.keys.state))
            if not await within(loop, answered, deadline - self._now()):
                break
        connection.close(reset=connection.unsaid)
        self._salvage(connection)

    async def _await_return(self, store: Connection, before: Membership, closed_by: Closed) -> None:
        """Wait a moment for the rank that left to come back; it ends the generation then.

        :raises BrokenBarrierError: it does not
        """
        until = self._now() + _GRACE_SECS
        assert self.loop is not None
        while True:
            (found,) = await store.call(Read(self.keys.state))
            # A number: the last one has cleared up, and nobody has come since. A store that knows
            # nothing is a new one.
            if found is None or not (found.isdigit() or found == before.state.encode()):
                return
            if self._now() >= until:
                raise self._left_error(closed_by)
            # Its bell may be another connection's, which is gone; this is short, and rare.
            await sleep(self.loop, 0.05)

    def _left_error(self, closed_by: Closed) -> BrokenBarrierError:
        return BrokenBarrierError(self.prefix, 0, closed_by.rank, closed_by.reason)

    @property
    def closed_by(self) -> Closed | None:
        """Who left the generation first, so that nothing in it can be released any more."""
        return self._closed_by

    async def _wait_for(
        self, store: Connection, key: str, secs: float, state: bytes | None = None
    ) -> bool:
        """Whether ``key`` was written in ``secs`` seconds, or ``state``, if given, has changed."""
        loop = self.loop
        assert loop is not None
        if not store.waits:
            deadline = self._now() + secs
            while self._now() < deadline:
                now, found = await store.call(Read(self.keys.state), Read(key))
                if found is not None or state not in (None, now):
                    return True
                await sleep(loop, 0.02)
            return False
        came: Future[None] = Future()
        store.on_wake = lambda: came.resolve(None)
        (now,) = await store.call(Read(self.keys.state), wait=key)
        try:
            return state not in (None, now) or await within(loop, came, secs)
        finally:
            store.stop_waiting()

    # -- the bell ------------------------------------------------------------------------

    def _listen(self, bell: Connection) -> None:
        self._bell = bell
        bell.on_wake = lambda: self.start(self._look_around())
        bell.on_lost = partial(self._bell_lost, bell)

    def _bell_lost(self, bell: Connection, error: BarrierConnectionError) -> None:
        if bell is not self._bell:
            return
        self._bell = None
        self._salvage(bell)
        for phase in self.open if not bell.waits else ():
            # It hears of nothing any more, and waits for nothing else.
            phase.lost = phase.lost or error
            phase.wake()
        if not self.closing and self.turns is not None and self._closed_by is None:
            self._reopening = self.start(self._reopen_bell())

    async def _reopen_bell(self) -> None:
        """Listen again: a rank that waits must hear of what concerns it."""
        loop = self.loop
        pause = _RETRY_SECS
        gone_at = self._now() + self.init_secs
        while loop is not None and not self.closing and self._bell is None:
            try:
                bell = await self._open(loop, self._now() + UNDO_SECS)
            except BarrierError as exc:
                logger.debug("rank %d cannot listen: %s", self.rank, exc)
                if not self.open and self._now() >= gone_at:
                    self._doubtful = True
                    return
                await sleep(loop, pause)
                pause = min(2 * pause, _RETRY_SECS_AT_MOST)
                continue
            if self._bell is not None or self.closing or self.turns is None:
                bell.close()
                return
            self._listen(bell)
            self.tally.reconnections += 1
            for phase in self.open if not bell.waits else ():
                if phase.connection is not None and phase.connection.lost is None:
                    phase.lost = None
            with contextlib.suppress(BarrierConnectionError):
                await self._look_around(first=True)

    async def _look_around(self, *, first: bool = False) -> None:
        """Take the bell, and see what it was rung for."""
        bell, turns = self._bell, self.turns
        if bell is None or turns is None:
            return
        membership = turns.membership
        # Each with whether the store has counted it in: its arrival is on another connection, and
        # need not have come when this is answered.
        waiting = [
            (phase, phase.entry, not self._arrives(phase))
            for phase in self.open
            if phase.entered and not phase.decided and not phase.giving_up
        ]
        requests = members.around(membership)
        for _, entry, _ in waiting:
            requests += [Read(entry.keys.count), Read(entry.keys.reason)]
        for phase, _, _ in waiting:
            if phase.step is not None:
                requests.append(Read(phase.membership.own.latest(phase.name)))
        try:
            found = await bell.call(*requests, wait=membership.own.bell(self.rank))
            around = members.surroundings(membership, found[:5])
            if first and not await members.still_holds(bell, membership):
                around = replace(around, over=True)
            if around.asked:
                await members.answer(bell, membership, around.asked)
            if around.complete and not around.over:
                # What was tried too early is moved, whatever had become of it.
                await self._all_joined(turns, bell)
            counted = found[5:]
            latest = iter(counted[2 * len(waiting) :])
            for number, (phase, entry, arrived) in enumerate(waiting):
                value, reason = counted[2 * number : 2 * number + 2]
                seen = next(latest) if phase.step is not None else None
                # What was begun too early may have got another number meanwhile.
                if phase.entry is entry:
                    await self._see(bell, phase, arrived, value, reason, seen)
        except BarrierConnectionError:
            return  # Another one will be opened, and look.
        if turns is not self.turns:
            return
        if around.over:
            self._generation_over(membership, around.successor, bell)
            return
        if around.closed is not None and around.closed.rank != self.rank and not self.closing:
            self._left(membership, around.closed, bell)
        if around.host_leaves and not self.closing and not self._drained:
            self._drained = True
            self.start(self._drain(membership))

    async def _see(
        self,
        bell: Connection,
        phase: Phase,
        arrived: bool,
        value: bytes | None,
        reason: bytes | None,
        latest: bytes | None,
    ) -> None:
        if phase.decided:
            return
        entry = phase.entry
        try:
            judged = await self._using(
                phase, phases.judge(bell, entry, value, reason, entered=arrived)
            )
        except Forgotten as exc:
            self._doubtful = True
            self.settle(phase, error=exc)
            return
        if phase.entry is not entry:
            return
        if not isinstance(judged, Count):
            self.settle(phase, judged)
        elif judged.full(phase.entry.world_size, phase.entry.kind):
            self._all_in(phase)
        elif (later := number(latest)) is not None and phase.step is not None:
            await self._past(phase, later)

    async def _using(self, phase: Phase, call: Coroutine[Any, Any, T]) -> T:
        """Make a call on another connection than the phase's own, and depart only after that: what
        it writes must not come after the keys were deleted."""
        phase.users += 1
        try:
            return await call
        finally:
            phase.users -= 1
            if phase.abandoned:
                self.forget(phase)

    def _arrives(self, phase: Phase) -> bool:
        """Whether the store need not know of its arrival: not yet, or never. It does where all are
        in; and what was begun too early is deleted when all have joined."""
        on = phase.entered_on
        return phase.early or (not phase.full and (on is None or on.unsaid or on.lost is not None))

    async def _past(self, phase: Phase, latest: int) -> None:
        """A later step of the name was decided: this one will not be."""
        assert phase.step is not None
        turns = self.turns
        if turns is None or turns.membership is not phase.membership or latest <= phase.step:
            return
        turns.decided(phase.name, latest, "broken")
        late = turns.too_late(phase.name, phase.step)
        if late is not None and not phase.decided:
            self._begin_giving_up(phase, Broken(self.rank, late.reason), False)

    # -- what happens to a generation ----------------------------------------------------

    def _generation_over(
        self, membership: Membership, successor: State | None, bell: Connection
    ) -> None:
        if self.turns is None or self.turns.membership is not membership:
            return
        self.turns = None
        self._before = membership
        bell.stop_waiting()
        if successor is not None:
            self._note_interrupted(bell, membership, successor)
        self._break_all(membership, bell, successor)
        self.start(self._tidy_bell(bell, membership))

    def _note_interrupted(self, bell: Connection, over: Membership, successor: State) -> None:
        """Tell a rank that joined again in which phases it was waited for; see `_all_joined`."""
        names = {
            _named(phase.name)
            for phase in self.open
            if phase.membership is over and phase.entered and phase.step is None
        }
        if names:
            own = self.keys.generation(successor.identity)
            bell.call(Append(own.interrupted, b" ".join(names) + b"\n"))

    async def _tidy_bell(self, bell: Connection, membership: Membership) -> None:
        with contextlib.suppress(BarrierConnectionError):
            await bell.call(Delete(membership.own.bell(self.rank)))

    def _break_all(
        self, membership: Membership, store: Connection, successor: State | None
    ) -> None:
        """Break what is awaited in a generation that is over."""
        by = None if successor is None else successor.by
        who = "another rank" if by is None else f"rank {by}"
        broken = Broken(by, f"{who} joined again: it was restarted, or its barrier was built anew")
        logger.info("barrier %r: %s", self.prefix, broken.reason)
        for phase in list(self.open):
            if phase.membership is membership and not phase.decided:
                self.start(self._break_for(phase, store, broken))

    def _left(self, membership: Membership, closed: Closed, bell: Connection) -> None:
        """A rank left: nothing in its generation will be released any more."""
        if self._closed_by is not None:
            return
        self._closed_by = closed
        for phase in list(self.open):
            if phase.membership is membership and not phase.decided:
                self.start(self._break_for(phase, bell, Broken(closed.rank, closed.reason)))

    async def _break_for(self, phase: Phase, store: Connection, broken: Broken) -> None:
        """Break a phase for what another rank did."""
        entry = phase.entry
        try:
            arrived = phase.entered and not self._arrives(phase)
            giving_up = phases.give_up(store, entry, broken, entered=arrived)
            judged, _ = await self._using(phase, giving_up)
        except Forgotten as exc:
            if phase.early or phase.entry is not entry:
                await self._break_for(phase, store, broken)
            else:
                self.settle(phase, error=exc)
            return
        except BarrierConnectionError:
            await self._break_elsewhere(phase, broken)
            return
        if phase.entry is not entry:
            # It got another number meanwhile.
            await self._break_for(phase, store, broken)
        elif not isinstance(judged, Count):
            self.settle(phase, judged)
        elif phase.entry.leader == broken.rank:
            # It may have published before it went; nobody else can say.
            self.settle(
                phase,
                error=BrokenBarrierError(
                    phase.name, phase.sequence, broken.rank, broken.reason, in_doubt=True
                ),
            )
        else:
            self._all_in(phase)
            self._wait_alone(phase)

    def _wait_alone(self, phase: Phase) -> None:
        """Wait for the leader's word where no bell of this generation is heard any more."""
        connection = phase.connection
        if connection is not None and not connection.waits and not phase.entry.leads:
            phase.alone = True
            connection.call(wait=phase.entry.awaited)

    async def _break_elsewhere(self, phase: Phase, broken: Broken) -> None:
        """The bell was lost, and perhaps none is opened any more: the phase's own connection will do,
        or one that takes its place."""
        if phase.decided or phase.giving_up or self.closing:
            return
        try:
            connection = await self._reopen_for(phase)
        except BarrierConnectionError as exc:
            self.settle(phase, error=_in_doubt(phase, exc))
        else:
            await self._break_for(phase, connection, broken)

    async def _all_joined(self, turns: Turns, bell: Connection) -> None:
        """All ranks have joined: what was tried before does not count."""
        if turns.complete:
            return
        membership = turns.membership
        turns.count_from_now()
        interrupted: bytes | None = None
        early = [p for p in self.open if p.membership is membership and p.early]
        if any(phase.rejoined for phase in early):
            with contextlib.suppress(BarrierConnectionError):
                (interrupted,) = await bell.call(Read(membership.own.interrupted))
        self._clear_early(turns)
        for phase in early:
            if phase.decided or phase.giving_up:
                continue
            if phase.rejoined and _named(phase.name) in (interrupted or b"").split():
                # Its peers were told that this one broke, and go on with the next.
                self.settle(
                    phase,
                    error=BrokenBarrierError(
                        phase.name,
                        phase.sequence,
                        self.rank,
                        f"rank {self.rank} joined again while its peers waited in this phase",
                    ),
                )
                continue
            phase.full = False
            before = phase.entry
            turns.renumber(phase)
            connection = phase.connection
            if connection is not None and connection.lost is None:
                connection.stop_waiting()
                connection.outbox.append((phases.spent(before, broken=True), _nothing))
                self._enter_on(connection, phase, phase.payload)

    def _clear_early(self, turns: Turns) -> None:
        """Delete what was tried too early, on the connection where it was, or what took its place.

        Not before all have joined: until then, others learn there what became of it.
        """
        spares = [c for c in (*self._idle, self._bell) if c is not None and c.lost is None]
        for entry, connection in turns.tried_early if spares else ():
            on = connection if connection.lost is None else spares[0]
            on.outbox.append((phases.spent(entry, broken=True), _nothing))
            self._tidy_soon()
        turns.tried_early.clear()

    async def _drain(self, membership: Membership) -> None:
        """The host wants to leave: let it, once nothing here depends on it."""
        assert self.loop is not None
        deadline = self._now() + PEERS_SECS
        # Also of what is decided something may have to be fetched yet.
        while self._now() < deadline and any(p.membership is membership for p in self.open):
            await sleep(self.loop, 0.01)
        bell = self._bell
        if bell is None:
            return
        with contextlib.suppress(BarrierConnectionError):
            await self._flush()
            await members.release_host(bell, membership)

    # -- phases --------------------------------------------------------------------------

    def begin(
        self,
        name: str,
        step: int | None = None,
        kind: int = EXECUTE,
        leader: int = -1,
        hold: Callable[[Phase], object] | None = None,
    ) -> Phase:
        """This rank's next phase of ``name``, or that of ``step``; where it `stands`.

        :param hold: called with it before anything else can come between
        """
        assert self.turns is not None
        phase = self.turns.begin(name, step, kind, leader)
        if hold is not None:
            hold(phase)
        self.open[phase] = None
        self.turns.use(phase)
        return phase

    def hold(self, phase: Phase) -> None:
        """See that a turn is counted, and known, wherever `begin` was interrupted."""
        self.open[phase] = None
        if self.turns is not None and self.turns.membership is phase.membership:
            self.turns.use(phase)

    def enter(self, phase: Phase, payload: bytes = b"") -> None:
        """Enter it; what comes of that wakes the phase's waiter."""
        if phase.early:
            phase.payload = payload
        if self._idle:
            self._enter_on(self._idle.pop(), phase, payload)
        else:
            self.start(self._open_and_enter(phase, payload))

    async def _open_and_enter(self, phase: Phase, payload: bytes) -> None:
        loop = self.loop
        assert loop is not None
        try:
            connection = await self._open(loop, self._now() + self.init_secs)
        except BarrierConnectionError as exc:
            if not phase.decided:
                phase.lost = exc
                self._begin_giving_up(
                    phase, Broken(self.rank, "it could not reach the store"), False
                )
                phase.wake()
            return
        if phase.decided or phase.giving_up:
            self._put_back(connection)
        else:
            self._enter_on(connection, phase, payload)

    def _enter_on(self, connection: Connection, phase: Phase, payload: bytes) -> None:
        phase.connection = phase.entered_on = connection
        connection.on_lost = partial(self._phase_lost, phase)
        connection.on_wake = partial(self._woken, phase)
        phase.entered = True
        phase.large = len(payload) > phases.SMALL_BYTES
        entry = phase.entry
        if phase.step is not None:
            connection.outbox.append(
                ([Read(phase.membership.own.latest(phase.name))], partial(self._seen, phase))
            )
        said = connection.call(
            *phases.entering(entry, payload), wait=entry.awaited if connection.waits else None
        )
        said.when_done(partial(self._arrived, phase, entry, connection, said))

    def _arrived(
        self, phase: Phase, entry: Entry, connection: Connection, said: Future[list[Any]]
    ) -> None:
        """The store has counted this rank in."""
        if said.error is not None or phase.entry is not entry:
            return
        if phase.connection is not connection:
            # It was decided and has departed; another phase may wait on this connection.
            return
        count = phases.entered(entry, said.result())
        stopping = phase.decided or phase.giving_up
        if stopping and (isinstance(count, Broken) or not count.full(*entry.world)):
            return
        # The last one to enter wakes the others, also where it does not wait any more.
        if isinstance(count, Broken):
            phase.differs = entry.kind == COMMIT
            self._begin_giving_up(phase, count, False)
        elif count.broken:
            self.start(self._look(phase, connection, came_late=True))
        elif count.full(*entry.world):
            me = b"%d" % self.rank
            self._announced[connection] = phase
            phase.last = True
            if entry.kind != COMMIT:
                if not self._rings:
                    connection.fulfil(Set(entry.keys.released, me))
                else:
                    connection.stop_waiting()
                    self._announce(phase, connection, Set(entry.keys.released, me))
                self.settle(phase, Released(self.rank))
            elif entry.leads and not stopping:
                self.start(self._collect(phase, connection))
            else:
                self._announce(phase, connection, Set(entry.keys.released, me))

    async def _look(
        self, phase: Phase, connection: Connection, *, came_late: bool = False
    ) -> None:
        """See what was decided.

        :param came_late: it was broken when this rank came
        """
        with contextlib.suppress(BarrierConnectionError):
            entry = phase.entry
            judged = await phases.look(connection, entry)
            turns = self.turns
            if phase.early and turns is not None and turns.membership is phase.membership:
                # Before its bell was heard, all may have joined.
                (roll,) = await connection.call(Read(phase.membership.own.roll))
                if members.all_joined(phase.membership, roll):
                    await self._all_joined(turns, connection)
            # What was begun too early may have got another number meanwhile.
            if phase.entry is not entry or phase.decided or phase.giving_up:
                return
            if came_late and phase.early and turns is not None and not phase.full:
                # Tried in vain before all had joined, which puts nobody out of step: this call
                # waits with those that are still there.
                turns.tried_early.append((entry, connection))
                turns.renumber(phase)
                self._enter_on(connection, phase, phase.payload)
            elif not isinstance(judged, Count):
                self.settle(phase, judged)
            elif judged.full(*entry.world):
                self._all_in(phase)

    def _seen(self, phase: Phase, found: list[Any]) -> None:
        if (later := number(found[0])) is not None:
            self.start(self._past(phase, later))

    def _announce(self, phase: Phase, connection: Connection, *requests: Request) -> None:
        """Wake those who wait, and ring for those who only hear their bell."""
        membership = phase.membership
        told = connection.call(*requests, Read(membership.own.threaded))

        def ring() -> None:
            if told.error is not None:
                return
            if told.result()[0] is not None:
                connection.call(SetMany(membership.bells, b"all in"))
            elif membership is self.membership:
                # All have joined, so that nobody will be there to ring for.
                self._rings = False

        told.when_done(ring)

    def _woken(self, phase: Phase) -> None:
        entry, connection = phase.entry, phase.connection
        if phase.decided or connection is None:
            return
        if entry.kind != COMMIT:
            if self._now() - phase.since < WAITED_SECS:
                self.settle(phase, Released())
            else:
                self.start(self._confirm(phase, connection))
        elif entry.leads:
            self.start(self._collect(phase, connection))
        else:
            self.start(self._hear(phase))

    async def _confirm(self, phase: Phase, connection: Connection) -> None:
        """A rank that has waited for long asks who came last, and whether that is what woke it."""
        with contextlib.suppress(BarrierConnectionError):
            confirmed = await phases.confirm(connection, phase.entry)
            if confirmed is not None:
                self.settle(phase, confirmed)
                return
        await self._woken_by_others(phase, connection)

    async def _woken_by_others(self, phase: Phase, connection: Connection) -> None:
        """Something else wrote to what this rank waits for, or it is broken."""
        await self._look(phase, connection)
        waits_on = (connection.waits or phase.alone) and connection.lost is None
        if waits_on and not (phase.decided or phase.giving_up):
            connection.call(Delete(phase.entry.awaited), wait=phase.entry.awaited)
            # What was awaited may have come just before that.
            await self._look(phase, connection)

    async def _collect(self, phase: Phase, connection: Connection) -> None:
        """The leader of a commit was told that all are in: take what they brought."""
        with contextlib.suppress(BarrierConnectionError):
            try:
                brought = await phases.collect(connection, phase.entry)
            except BarrierConnectionError:
                raise
            except BarrierError:
                # Said where it is asked for again, by the publication.
                self._all_in(phase)
                return
            if isinstance(brought, Broken):
                await self.settle_commit(phase, brought)
                return
            if phase.decided or phase.full:
                return
            if brought is not None:
                phase.brought = brought
                self._all_in(phase)
            elif connection.waits and not phase.giving_up:
                await self._woken_by_others(phase, connection)

    async def _hear(self, phase: Phase) -> None:
        connection = phase.connection
        assert connection is not None
        try:
            judged = await phases.hear(connection, phase.entry)
        except ValueError as exc:
            error = BarrierConnectionError(
                f"{describe(phase.name, phase.sequence, self.prefix)}: the verdict of this "
                f"commit was overwritten ({exc})", in_doubt=True,
            )  # fmt: skip
            self.settle(phase, error=error)
            return
        except BarrierConnectionError:
            return
        if judged is not None:
            self.settle(phase, judged)
        elif connection.lost is None and not phase.decided:
            await self._woken_by_others(phase, connection)

    def _all_in(self, phase: Phase) -> None:
        """A commit in which all are in; its leader goes on, the others wait for its word."""
        if not phase.full and not phase.decided:
            phase.full = True
            connection = phase.connection
            if phase.differs and connection is not None:
                # The register cannot be broken any more, but nothing will be published either.
                self.start(self._collect(phase, connection))
            follows = not phase.entry.leads and connection is not None and connection.lost is None
            if follows and connection is not None and connection.waits:
                self.start(self._hear(phase))
            phase.wake()

    def settle(
        self, phase: Phase, verdict: Verdict | None = None, *, error: BarrierError | None = None
    ) -> None:
        """What came of it; the first to be known stays."""
        if not phase.decided:
            phase.verdict, phase.error, phase.decided = verdict, error, True
            turns = self.turns
            if phase.step is not None and turns is not None and verdict is not None:
                how = "released" if isinstance(verdict, Released) else "broken"
                if turns.membership is phase.membership:
                    turns.decided(phase.name, phase.step, how)
            if phase.abandoned and not phase.giving_up:
                self.forget(phase)
            phase.wake()

    def forget(self, phase: Phase) -> None:
        """Nobody on this rank waits for it any more: depart, and let its connection go.

        Not while its peers are still owed a word about it.
        """
        unsettled = not (phase.decided or (phase.full and not phase.entry.leads))
        if phase.giving_up or phase.users or unsettled:
            phase.abandoned = True
            if unsettled and not (phase.giving_up or phase.users):
                # Its call was interrupted before it could give up.
                reason = "its call was interrupted"
                broken = Broken(self.rank, reason, in_doubt=phase.full)
                self._begin_giving_up(phase, broken, False, final=True)
            return
        if self.open.pop(phase, True) is True:
            return
        connection, phase.connection = phase.connection, None
        if connection is not None and connection.lost is None:
            connection.on_lost = None
            connection.stop_waiting()
            self._depart(phase, connection)
            self._put_back(connection)
        elif (bell := self._bell) is not None and bell.lost is None:
            self._depart(phase, bell)
            self._tidy_soon()

    def _depart(self, phase: Phase, connection: Connection) -> None:
        """Count this rank out, with the next message; the last one to be deletes the keys."""
        turns = self.turns
        if phase.early and turns is not None and turns.membership is phase.membership:
            turns.tried_early.append((phase.entry, connection))
            if turns.complete:
                self._clear_early(turns)
        if phase.early or isinstance(phase.error, Forgotten):
            return
        departed = partial(self._departed, phase, connection)
        connection.outbox.append(([Add(phase.entry.keys.departed, 1)], departed))
        if phase.large and not (phase.entry.kind == GATHER and isinstance(phase.verdict, Released)):
            own = phase.entry.keys.payload(self.rank)
            connection.outbox.append(([Delete(own)], _nothing))
        if phase.step is not None and isinstance(phase.verdict, Released):
            # All are past the steps before it.
            latest = phase.membership.own.latest(phase.name)
            connection.outbox.append(([Delete(latest)], _nothing))

    def _departed(self, phase: Phase, connection: Connection, answers: list[Any]) -> None:
        if answers[0] >= phase.entry.world_size:
            broken = not isinstance(phase.verdict, Released)
            large: list[int] = []
            if phase.entry.kind == GATHER and not broken:
                small = phases.SMALL_BYTES
                large = [r for r, p in (phase.brought or {}).items() if len(p) > small]
            spent = phases.spent(phase.entry, broken=broken, large=large)
            if connection.lost is not None and self._idle:
                # What was due there goes out here; see `_stand`.
                connection = self._idle[-1]
            connection.outbox.append((spent, _nothing))
            self._tidy_soon()

    def _put_back(self, connection: Connection) -> None:
        if connection.lost is not None:
            return
        if self._over:
            connection.close()
            return
        connection.on_lost = lambda error: self._idle_lost(connection)
        connection.outbox += self._adrift
        self._adrift.clear()
        self._idle.append(connection)
        self._tidy_soon()

    def _idle_lost(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
        self._salvage(connection)

    def _salvage(self, connection: Connection) -> None:
        """What was to go out with the next message of a lost connection goes out on another; and
        whom this rank has woken there is woken once more."""
        self._adrift += connection.outbox
        connection.outbox.clear()
        phase = self._announced.pop(connection, None)
        if phase is not None and not self.closing:
            self.start(self._wake_again(phase))

    async def _wake_again(self, phase: Phase) -> None:
        """This rank was the last one to enter, and cannot know whether it has woken the others."""
        loop, entry = self.loop, phase.entry
        assert loop is not None
        until = self._now() + self.init_secs
        while not self.closing and self._now() < until:
            bell = self._bell
            try:
                if bell is not None:
                    (value,) = await bell.call(Read(entry.keys.count))
                    # It is not there any more where all have departed.
                    if value and Count(int(value)).full(*entry.world):
                        bells = SetMany(phase.membership.bells, b"all in")
                        await bell.call(Set(entry.keys.released, b"%d" % self.rank), bells)
                    return
            except (BarrierConnectionError, ValueError):
                pass
            await sleep(loop, _RETRY_SECS)

    def _tidy_soon(self) -> None:
        if not self._tidying and self.loop is not None:
            self._tidying = True
            self.loop.call_at(self.loop.now() + _IDLE_SECS, self._tidy)

    def _tidy(self) -> None:
        """Send what waits for company, and keep one connection of those that nobody uses."""
        self._tidying = False
        for connection in self._connections():
            if connection.outbox and connection.lost is None:
                connection.call()
                self._tidy_soon()
        for connection in self._idle[:-1]:
            if not connection.unsaid and not connection.outbox:
                self._idle.remove(connection)
                self._announced.pop(connection, None)
                connection.close()

    async def _flush(self) -> None:
        for connection in self._connections():
            while connection.outbox and connection.lost is None:
                await connection.call(Read(self.keys.state))

    # -- giving up -----------------------------------------------------------------------

    def give_up(
        self,
        phase: Phase,
        reason: str,
        timeout_secs: float | None = None,
        missing: tuple[int, ...] | None = None,
        by: int | None = None,
    ) -> Future[bool]:
        """Break it, unless it is decided; done when that is known, and whether this call broke it.

        :param by: the rank to blame, if not this one

        Goes on by itself until the store has been told, or this rank has lost its membership.
        """
        blamed = self.rank if by is None else by
        broken = Broken(blamed, reason, timeout_secs, missing or ())
        names = timeout_secs is not None and missing is None
        return self._begin_giving_up(phase, broken, names, final=missing is None)

    def _begin_giving_up(
        self, phase: Phase, broken: Broken, names: bool, *, final: bool = False
    ) -> Future[bool]:
        phase.giving_up = True
        return self.owe(lambda: self._give_up(phase, broken, names, final=final))

    async def _give_up(
        self, phase: Phase, broken: Broken, names: bool, *, final: bool = False
    ) -> bool:
        """As `give_up`.

        :param final: the caller goes, whoever has come: a commit's leader then says so
        """
        connection = phase.connection or self._bell
        again = False
        while True:
            try:
                if connection is None or connection.lost is not None:
                    connection = None
                    connection = await self._reopen_for(phase)
                # On the connection that it entered on, its arrival comes first. What was begun too
                # early is deleted when all have joined.
                sure = phase.entered and connection is phase.entered_on and not phase.early
                judged, ours = await phases.give_up(
                    connection, phase.entry, broken, entered=sure, names_missing=names
                )
                # One that was made on a connection that was lost may not have been told.
                ours = ours or (again and isinstance(judged, Broken) and judged.rank == self.rank)
                if ours:
                    await self._tell_of_break(connection, phase)
                if isinstance(judged, Broken) and phase.early and phase.entered:
                    # The log may have been deleted just then.
                    others = tuple(rank for rank in judged.missing if rank != self.rank)
                    judged = replace(judged, missing=others)
                break
            except Forgotten as exc:
                if phase.early and connection is not None:
                    # All have joined, and deleted it between two looks.
                    continue
                phase.giving_up = False
                self.settle(phase, error=exc)
                return False
            except BarrierConnectionError as exc:
                # What was sent there may or may not have come; it is asked anew elsewhere.
                logger.debug("rank %d gives up anew: %s", self.rank, exc)
                if self._over:
                    raise
                connection, again = None, True
        if isinstance(judged, Count) and final and phase.entry.leads and not phase.differs:
            # It has not begun to publish, and does not while it gives up. Nobody else can say so.
            judged, ours = await self.settle_commit(phase, broken), True
        if self._rings and not (ours or isinstance(judged, Broken)):
            # Where all are in, the last one of them may not have come to say so.
            connection.call(SetMany(phase.membership.bells, b"all in"))
        phase.giving_up = False
        if not isinstance(judged, Count):
            self.settle(phase, judged)
        else:
            self._all_in(phase)
            phase.wake()
        if phase.abandoned:
            self.forget(phase)
        return ours

    async def _reopen_for(self, phase: Phase) -> Connection:
        """A connection for a phase whose own was lost; one for all that need it."""
        if phase.reopening is None or phase.reopening.done:
            if phase.connection is not None and phase.connection.lost is None:
                return phase.connection
            phase.reopening = self.start(self._reopen(phase))
        return await phase.reopening

    async def _reopen(self, phase: Phase) -> Connection:
        loop = self.loop
        assert loop is not None
        old = phase.connection
        if old is not None:
            old.on_lost = None
            old.close(reset=True)
            self._salvage(old)
        began = self._now()
        while True:
            try:
                connection = await self._open(loop, self._now() + self.init_secs)
                break
            except BarrierConnectionError:
                if self._now() > began + self.init_secs or self.closing:
                    raise
                await sleep(loop, _RETRY_SECS)
        phase.connection = connection
        self.tally.reconnections += 1
        connection.on_lost = None
        if phase not in self.open:
            # It was forgotten meanwhile; what is under way for it may use this as long as it is.
            self._put_back(connection)
        if not await members.still_holds(connection, phase.membership):
            found = await connection.call(Read(self.keys.state), Read(phase.entry.keys.count))
            if not found[0] or (phase.entered and not found[1]):
                raise Forgotten
        return connection

    async def _tell_of_break(self, connection: Connection, phase: Phase) -> None:
        membership = phase.membership
        requests: list[Request] = []
        if phase.step is not None:
            # Whoever comes for an earlier step learns it; until all are past this one.
            key = membership.own.latest(phase.name)
            held = b""
            while True:
                (now,) = await connection.call(CompareSet(key, held, b"%d" % phase.step))
                if (number(now) or 0) >= phase.step:
                    break
                # So answers a key that is absent: it was deleted meanwhile.
                held = b"" if now == held else now
        requests.append(SetMany(membership.bells, b"broken"))
        await connection.call(*requests, Read(phase.entry.keys.count))

    def _phase_lost(self, phase: Phase, error: BarrierConnectionError) -> None:
        if phase.decided:
            if phase.connection is not None:
                self._salvage(phase.connection)
            return
        phase.lost = error
        if not phase.giving_up:
            self.start(self._recover(phase, error))
        phase.wake()

    async def _recover(self, phase: Phase, error: BarrierConnectionError) -> None:
        """The connection was lost on which this rank had entered: it cannot know whether it has."""
        broken = Broken(self.rank, "it lost its connection to the store")
        phase.giving_up = True
        try:
            await self._give_up(phase, broken, False)
        except BarrierConnectionError as exc:
            self.settle(phase, error=_in_doubt(phase, exc))
            return
        connection = phase.connection
        if phase.full and not phase.decided and connection is not None:
            connection.on_lost = partial(self._phase_lost, phase)
            connection.on_wake = partial(self._woken, phase)
            phase.lost = None
            if connection.waits and not phase.entry.leads:
                connection.call(wait=phase.entry.awaited)
        elif isinstance(phase.verdict, Broken) and phase.verdict.rank == self.rank:
            phase.error = error

    def worry(self, phase: Phase) -> None:
        """The store left a call unanswered: leave the connections behind that hang.

        What this rank owes is said on new ones, once the store can be reached.
        """
        self._doubtful = True
        phase.worried = True
        old = phase.connection
        if old is not None and old.lost is None:
            old.on_lost = None
            old.close(reset=True)
            self._salvage(old)
        bell = self._bell
        if bell is not None and bell.unsaid:
            bell.close(reset=True)
            self._bell_lost(bell, BarrierConnectionError("the store did not answer in time"))
        for connection in list(self._idle):
            if connection.unsaid:
                self._idle.remove(connection)
                connection.close(reset=True)
                self._salvage(connection)
        if not self.closing:
            self.join()

    @property
    def patience_secs(self) -> float:
        """How long what has to be undone may hold up its caller.

        Less where the store has left a call unanswered: law 8 leaves two seconds in all.
        """
        return _SILENT_SECS if self._doubtful else UNDO_SECS

    def owe_turn(self, name: str, step: int | None, reason: str) -> None:
        """The store could not be reached: break the next turn of ``name`` when it can."""
        self._owed.append((name, step, reason))

    def awaited(self, name: str, step: int | None) -> Phase | None:
        """The oldest phase of ``name``, or of its ``step``, that this rank has begun."""
        for phase in self.open:
            if phase.decided or phase.giving_up:
                continue
            if phase.name == name and (step is None or phase.step == step):
                return phase
        return None

    def too_late(self, name: str, step: int | None) -> bool:
        """Whether ``step`` of ``name`` was decided."""
        if step is None or self.turns is None:
            return False
        return self.turns.too_late(name, step) is not None

    # -- what callers ask ----------------------------------------------------------------

    async def ask_missing(self, phase: Phase) -> tuple[int, ...] | None:
        bell = self._bell
        if bell is None:
            return None
        return await self._using(phase, phases.survey(bell, phase.entry))

    async def ask_not_joined(self) -> tuple[int, ...]:
        bell, membership = self._bell, self.membership
        if bell is None or membership is None:
            return ()
        return await members.not_joined(bell, membership)

    async def payloads(self, phase: Phase) -> dict[int, bytes]:
        """What all brought."""
        if phase.brought is not None:
            return phase.brought
        connection = phase.connection or self._bell
        if connection is None:
            raise BarrierConnectionError("there is no connection to the store")
        brought = await phases.collect(connection, phase.entry)
        if brought is None:
            raise Forgotten
        if isinstance(brought, Broken):
            await self.settle_commit(phase, brought)
            raise BrokenBarrierError(phase.name, phase.sequence, brought.rank, brought.reason)
        phase.brought = brought
        return brought

    def give_word(self, phase: Phase, verdict: Verdict) -> Future[Verdict]:
        """Settle a commit as its leader; goes on until the store knows, or has what was said first."""
        return self.owe(lambda: self.settle_commit(phase, verdict))

    async def settle_commit(self, phase: Phase, verdict: Verdict) -> Verdict:
        """As `give_word`."""
        return await self._using(phase, self._settle_commit(phase, verdict))

    async def _settle_commit(self, phase: Phase, verdict: Verdict) -> Verdict:
        connection = phase.connection or self._bell
        while True:
            try:
                if connection is None or connection.lost is not None:
                    connection = await self._reopen_for(phase)
                membership, outcomes = phase.membership, self.outcomes
                noting = await outcomes.noting(connection, phase, verdict)
                rings, noted = await phases.settle(
                    connection, phase.entry, verdict, membership.own.threaded, noting
                )
                if noted:
                    outcomes.noted(connection, phase, verdict, noted[0], self.start)
                if rings:
                    await connection.call(SetMany(membership.bells, b"settled"))
                self.settle(phase, verdict)
                return verdict
            except Forgotten:
                raise
            except BarrierConnectionError:
                if self._over:
                    raise
                connection = None

    # -- leaving -------------------------------------------------------------------------

    def leave(self, reason: str, spent_secs: float = 0.0) -> Effort[None]:
        """Break what is awaited, say that this rank is gone, and close; done when all of it is.

        :param spent_secs: of the time that closing has
        """
        if self._leaving is None:
            self.closing = True
            self._leaving = self.start(self._leave(reason, spent_secs))
        return self._leaving

    async def _leave(self, reason: str, spent_secs: float) -> None:
        loop = self.loop
        if loop is None:
            self._source.let_go()
            return
        try:
            began = self._now()
            within_secs = _LEAVE_SILENT_SECS if self._doubtful else _LEAVE_SECS
            deadline = began + max(within_secs / 2, within_secs - spent_secs)
            breaks = [
                self.give_up(phase, reason)
                for phase in list(self.open)
                if not phase.decided and not phase.giving_up and phase.publishing is None
            ]
            # Whoever is about to claim its rank says that it leaves when it has.
            joins = () if self._claiming else (self._joining, self._joining_on)
            others = [one for one in self._efforts if one not in (self._leaving, *joins)]
            for effort in (*breaks, *others):
                await within(loop, effort, deadline - self._now())
            for phase in list(self.open):
                # One that is being published is settled by what comes of that.
                if not phase.decided and phase.publishing is None:
                    self.settle(phase, error=self._closed_error(phase))
            try:
                if self._drained:
                    await self._part(loop, deadline)
                else:
                    await self._say_goodbye(loop, reason, deadline, began + PEERS_SECS)
            except BarrierError as exc:
                logger.debug("%s closed without its store: %s", describe(self.prefix), exc)
            # A host may have waited for its peers past the deadline.
            await self._hear_out(loop, max(deadline, self._now() + _LAST_SECS))
        finally:
            self._close()

    async def _hear_out(self, loop: Loop, deadline: float) -> None:
        """Have all be answered that was asked, and say what follows from that: the last one to
        depart deletes the keys. And c10d's server complains of who hangs up before."""
        for connection in self._connections():
            connection.stop_waiting()
            answered = connection.call(Read(self.keys.state))
            while await within(loop, answered, deadline - self._now()) and (
                connection.unsaid or (connection.outbox and connection.lost is None)
            ):
                answered = connection.call(Read(self.keys.state))

    async def _say_goodbye(
        self, loop: Loop, reason: str, deadline: float, peers_deadline: float
    ) -> None:
        membership = self.membership or self._claimed
        if membership is None and self._closed_by is not None:
            membership = self._before
        if membership is None:
            return
        bell = self._bell
        if bell is None or bell.lost is not None or bell.unsaid:
            opened = self.start(self._open(loop, deadline))
            if not await within(loop, opened, deadline - self._now()):
                opened.stop(BarrierConnectionError("there is no time left"))
            if bell is not None:
                bell.close(reset=True)
            bell = self._bell = opened.result()
        flushed = self.start(self._flush())
        if not await within(loop, flushed, deadline - self._now()):
            return
        hosts = await self._source.hosts(loop)
        if self._drained:
            return
        # It rings its own bell, too, and then has something else to wait for.
        bell.stop_waiting()
        goodbye = self.start(members.leave(bell, membership, reason, hosts=hosts))
        if not await within(loop, goodbye, deadline - self._now()):
            return
        if goodbye.result() and hosts:
            # Who clears up ends the state first.
            all_left, state = membership.own.all_left, membership.state.encode()
            await self._wait_for(bell, all_left, peers_deadline - self._now(), state)
        with contextlib.suppress(BarrierConnectionError):
            await within(
                loop, bell.call(Delete(membership.own.bell(self.rank))), deadline - self._now()
            )

    async def _part(self, loop: Loop, deadline: float) -> None:
        """Be gone, where the host was let go before; its store need not be there any more."""
        bell, membership = self._bell, self.membership
        if bell is not None and bell.lost is None and membership is not None:
            await within(loop, self.start(self._flush()), deadline - self._now())
            parting = self.start(members.part(bell, membership))
            await within(loop, parting, deadline - self._now())

    def _closed_error(self, phase: Phase) -> BarrierClosedError:
        error = BarrierClosedError(describe(phase.name, phase.sequence, self.prefix))
        error.in_doubt = phase.entered
        return error

    def _close(self) -> None:
        self._not_at_end()
        # What could not be said by now is not said later; nor by those that await what is stopped.
        self._over = True
        for effort in list(self._efforts):
            if effort is not self._leaving:
                effort.stop(BarrierConnectionError(f"{describe(self.prefix)} was closed meanwhile"))
        for connection in list(self._opened):
            if connection.lost is None:
                connection.close(reset=connection.unsaid)
        self._idle, self._bell = [], None
        self._announced.clear()
        self.open.clear()
        for membership in (self.membership, self._claimed):
            if membership is not None:
                process.holders.pop(membership.claim.life.token, None)
        self.turns = self._claimed = None
        self._source.let_go()

    def end_with_loop(self) -> None:
        """Its loop ends: leave, in the time that is left."""
        if not self.foreign:
            self._leave_now(time.monotonic() + _EXIT_SECS, "its event loop ended")
            # Another loop may use the barrier; it joins again then.
            self._leaving, self.closing, self._over = None, False, False
            self.loop = None

    def end(self, deadline: float) -> None:
        """Leave before the interpreter does; see `worker.end_at_exit`."""
        if not self.foreign and (self._leaving is None or not self._leaving.done):
            self._leave_now(min(deadline, time.monotonic() + 2 * _EXIT_SECS), "its program ended")

    def forsake(self) -> None:
        """In a forked child: nothing here reaches the parent's connections, and no call is made."""
        for connection in list(self._opened):
            connection.forsake()
        # The child may go on on a copy of the same loop; `use` looks at the process then.
        self.loop = None

    def _leave_now(self, deadline: float, how: str) -> None:
        if self.membership is None and not self.open:
            self._close_quietly()
            return
        private = PrivateLoop()
        with contextlib.suppress(RuntimeError, OSError):
            self._not_at_end()
            self._not_at_end = _nothing_at_end
            self.loop = private
            for connection in self._connections():
                connection.move(private)
            leaving = self.leave(f"it closed its barrier ({how})")
            private.run(lambda: leaving.done, deadline)
            if not leaving.done:
                self._close()
        private.close()

    def _close_quietly(self) -> None:
        with contextlib.suppress(RuntimeError, OSError):
            self._close()


def _in_doubt(phase: Phase, exc: BarrierConnectionError) -> BarrierConnectionError:
    error = BarrierConnectionError(
        f"{describe(phase.name, phase.sequence, phase.membership.keys.prefix)}: {exc}",
        in_doubt=phase.entered,
    )
    error.__cause__ = exc.__cause__
    return error


def _named(name: str) -> bytes:
    return name.encode().hex().encode() or b"-"


def _nothing(answers: list[Any]) -> None:
    pass


def _nothing_at_end() -> None:
    pass


__all__ = ["UNDO_SECS", "Session"]
