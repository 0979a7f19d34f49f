"""Claiming this rank in the present generation, and taking part in it."""

from __future__ import annotations

import contextlib
from functools import partial

from .._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BrokenBarrierError,
    another,
    describe,
    unanswered,
)
from .._protocol import claiming
from .._protocol import membership as members
from .._protocol.keys import Keys
from .._protocol.membership import Closed, Membership
from .._protocol.store import Read
from .._store.future import Effort
from .._store.sources import CannotHost, Connection
from .._store.waiting import sleep, within
from . import process
from .listening import Listening
from .phases import Turns
from .state import RETRY_SECS, RETRY_SECS_AT_MOST

# How long a call waits for a rank that has left to come back.
_GRACE_SECS = 0.5


class Joining(Listening):
    """Connects and joins; tries until it has joined or the time is over."""

    def join(self) -> Effort[None]:
        """Connect, and claim this rank in the present generation; one attempt serves all calls."""
        joining = self.joining
        if joining is None:
            # Two at once would take each other for another process, so it is noted first.
            joining = self._joining = self.start(self._join(), begins=False)
        # A signal handler may have raised before it began.
        joining.begin()
        return joining

    @property
    def joining(self) -> Effort[None] | None:
        """The attempt to join that is under way."""
        return None if self._joining is None or self._joining.done else self._joining

    async def _join(self) -> None:
        loop = self.running
        deadline = self._now() + self.init_secs
        # The store may have gone with a rank that has left.
        until = deadline if self.closed_by is None else min(deadline, self._now() + _GRACE_SECS)
        pause, before = RETRY_SECS, None
        while True:
            store: Connection | None = None
            try:
                store = await self._open(loop, until)
                if self.closing:
                    raise BarrierConnectionError(f"{describe(self.prefix)} was closed meanwhile")
                self.keys = Keys(self.prefix, self._source.namespace)
                joined = self._joining_on = self.start(self._join_on(store))
                if not await within(loop, joined, deadline - self._now()):
                    # A connection that hangs must not delay the next attempt; perhaps another one
                    # is missing.
                    joined.stop(unanswered(self.why_not))
                joined.result()
                self._source.failures.clear()
                return
            except BarrierError as exc:
                lost = isinstance(exc, BarrierConnectionError) and not isinstance(exc, CannotHost)
                # The last attempt may have had little time; the one before may know why.
                why = before if before and lost and exc.__cause__ is None else exc
                # To learn that a rank has left, it has reached the store.
                self._source.failures[:] = [] if isinstance(exc, BrokenBarrierError) else [why]
                if store is not None:
                    store.close(reset=store.unsaid)
                if not lost or self.closing or self._now() >= deadline:
                    raise why from why.__cause__
                before = exc
                slow = exc.__cause__ is None or isinstance(exc.__cause__, TimeoutError)
                if store is None and not slow and (closed := self.closed_by) is not None:
                    raise self._left_error(closed) from exc
                until = deadline  # It is slow, or there: not refused.
            await sleep(loop, pause)
            pause = min(2 * pause, RETRY_SECS_AT_MOST)

    async def _join_on(self, store: Connection) -> None:
        before = self.membership or self._claimed or self._before
        closed_by = self.closed_by
        if before is not None and closed_by is None:
            # The same store, which did not answer for a while.
            turns = Turns(before) if before is self._claimed else self.turns
            if turns is not None and await members.still_holds(store, before):
                await self._stand(store, turns, self._opening())
                return
        elif before is not None and closed_by is not None:
            await self._await_return(store, before, closed_by)
        if before is not None:
            around = members.surroundings(before, await store.call(*members.around(before)))
            self._break_all(before, store, around.successor)
        life = process.new_life(self.run_id)
        # The server accepts it meanwhile.
        opening = self._opening()
        self._claiming = True
        try:
            of = self.keys, self.rank, self.world_size, life
            waits = partial(self._wait_for, store)
            joined = await claiming.join(
                store, *of, lives=process.lives, wait_for=waits, before=before
            )
            self._claimed = joined
            if before is not None:
                process.holders.pop(before.claim.life.token, None)
            process.holders[joined.claim.life.token] = self
        except BaseException:
            _forgo(opening)
            raise
        finally:
            self._claiming = False
        # None enters the generation before, if a connection is still missing.
        self.turns = self.closed_by = None
        self.host_left, self._rings = False, True
        await self._stand(store, Turns(joined), opening)

    def _opening(self) -> Effort[Connection]:
        return self.start(self._open(self.running, self._now() + self.init_secs))

    async def _stand(self, store: Connection, turns: Turns, opening: Effort[Connection]) -> None:
        """Take part, with connections that work."""
        for connection in (self._bell, *self._idle):
            if connection is not None and connection is not store:
                connection.on_lost = None
                self.start(self._retire(connection))
        self._idle, self._bell = [], None
        try:
            bell = await opening
            if bell.lost is not None:
                raise another(bell.lost)
            if self.closing:
                raise BarrierClosedError(describe(self.prefix))
        except BaseException:
            _forgo(opening)
            raise
        self.turns = turns
        self._before, self._claimed = turns.membership, None
        self.tally.reconnections += self._doubtful
        self._doubtful = False
        self._listen(bell)
        await self._look_around()
        while self._owed and self.stands:
            name, step, reason = self._owed[0]
            with contextlib.suppress(BrokenBarrierError):
                phase = self.begin(name, step)
                self.give_up(phase, reason)
                self.forget(phase)
            del self._owed[0]
        # Last, since it is closed if there is no time left for this.
        self._put_back(store)

    async def _await_return(self, store: Connection, before: Membership, closed_by: Closed) -> None:
        """Wait a moment for the rank that left to come back, which ends the generation.

        :raises BrokenBarrierError: it does not
        """
        until = self._now() + _GRACE_SECS
        while True:
            (found,) = await store.call(Read(self.keys.state))
            # A number: the last rank has cleared up, and none has come since. An empty store is a
            # new one.
            if found is None or not (found.isdigit() or found == before.state.encoded):
                return
            if self._now() >= until:
                raise self._left_error(closed_by)
            # Its bell may be at another connection, which is gone; this wait is short, and rare.
            await sleep(self.running, 0.05)

    def _left_error(self, closed: Closed) -> BrokenBarrierError:
        return BrokenBarrierError("", 0, closed.rank, closed.reason, prefix=self.prefix)

    def owe_turn(self, name: str, step: int | None, reason: str) -> None:
        """Break the next turn of ``name`` when the store can be reached again."""
        self._owed.append((name, step, reason))


def _forgo(opening: Effort[Connection]) -> None:
    """Close the connection, or do not open it."""
    opening.stop(BarrierConnectionError("it is not needed any more"))
    if opening.error is None:
        opening.result().close()
