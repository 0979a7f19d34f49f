"""The connections of one rank: the spare ones, and the requests that wait for the next message."""

from __future__ import annotations

import contextlib
from functools import partial

from .._errors import BarrierConnectionError
from .._protocol.count import Count
from .._protocol.membership import Membership
from .._protocol.phase import Entry
from .._protocol.store import Read, Set, SetMany
from .._store.event_loop import Loop
from .._store.future import Future
from .._store.sources import Connection
from .._store.threads import ThreadedConnection
from .._store.waiting import sleep, within
from .phases import Phase
from .state import RETRY_SECS, SessionState

# How long the last departure of a burst waits for a next message, and spare connections are kept.
_IDLE_SECS = 0.25


class Pool(SessionState):
    """Hands out connections, and takes them back."""

    def _put_back(self, connection: Connection) -> None:
        if connection.lost is not None:
            return
        if self._over:
            connection.close()
            return
        if connection.suspect:
            # Heard out, if it can be: an answer may say that this rank was the last one to enter.
            self._salvage(connection)
            self.start(self._retire(connection))
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
        """Send what a lost connection had in its outbox on another one, and wake again the ranks
        that this rank woke there."""
        self._adrift += connection.outbox
        connection.outbox.clear()
        announced = self._announced.pop(connection, None)
        if announced is not None and not self.closing:
            self.owe(partial(self._wake_again, *announced))

    def _reset(self, connection: Connection) -> None:
        """Close it so that nothing that was sent there arrives later."""
        connection.on_lost = None
        connection.close(reset=True)
        self._salvage(connection)

    def worry(self, phase: Phase) -> None:
        """The store left a call unanswered: close what hangs; new connections take what is owed."""
        self._doubtful = True
        # The bell first: salvaging the other one asks on it, and would make it look as if it hung.
        bell = self._bell
        if bell is not None and bell.unsaid:
            bell.close(reset=True)
            self._bell_lost(bell, BarrierConnectionError("the store did not answer in time"))
        hang = [each for each in self._idle if each.unsaid]
        self._idle = [each for each in self._idle if each not in hang]
        for connection in (phase.connection, *hang):
            if connection is not None and connection.lost is None:
                self._reset(connection)
        if not self.closing:
            self.join()

    async def _wake_again(self, entry: Entry, membership: Membership) -> None:
        """Wake the others again: this rank entered last, and cannot know whether it woke them."""
        loop = self.running
        until = self._now() + self.init_secs
        while not self.closing and self._now() < until:
            bell = self._bell
            try:
                if bell is not None:
                    (value,) = await bell.call(Read(entry.keys.count))
                    # The count is deleted once all have departed.
                    if value and Count(int(value)).full(*entry.world):
                        bells = SetMany(membership.bells, b"all in")
                        await bell.call(Set(entry.keys.released, b"%d" % self.rank), bells)
                    return
            except (BarrierConnectionError, ValueError):
                pass
            await sleep(loop, RETRY_SECS)

    def _tidy_soon(self) -> None:
        if not self._tidying and self.loop is not None:
            self._tidying = True
            self.loop.call_at(self.loop.now() + _IDLE_SECS, lambda: self.start(self._tidy()))

    async def _tidy(self) -> None:
        """Send what still waits in the outboxes, and keep only one of the unused connections."""
        self._tidying = False
        if self.closing:
            return
        await self._flush()
        for connection in self._idle[:-1]:
            if not connection.unsaid and not connection.outbox:
                self._idle.remove(connection)
                self._announced.pop(connection, None)
                connection.close()

    async def _flush(self) -> None:
        """Send what waits in the outboxes, and what follows from the answers."""
        for connection in self._connections():
            with contextlib.suppress(BarrierConnectionError):
                while connection.outbox and connection.lost is None:
                    await connection.call()

    async def _end_waits(self) -> None:
        """Let no thread wait for the store, which ends soon."""
        for connection in self._connections():
            if isinstance(connection, ThreadedConnection):
                with contextlib.suppress(BarrierConnectionError):
                    await connection.end_wait()

    async def _hear_out(self, loop: Loop, connection: Connection, deadline: float) -> None:
        """End its wait, and hear all answers, departures and what follows them too."""
        connection.stop_waiting()
        while connection.lost is None:
            answered = connection.call(Read(self.keys.state))
            heard = await within(loop, answered, deadline - self._now())
            if not heard or not (connection.unsaid or connection.outbox):
                return

    async def _retire(self, connection: Connection) -> None:
        """Close it when it was heard out. The connections that hang were closed before."""
        if connection.unsaid or connection.outbox:
            await self._hear_out(self.running, connection, self._now() + self.init_secs)
        connection.close(reset=connection.unsaid)
        self._salvage(connection)

    async def _wait_for(self, store: Connection, key: str, secs: float) -> bool:
        """Whether ``key`` was written within ``secs`` seconds."""
        loop = self.running
        if not store.waits:
            deadline = self._now() + secs
            while self._now() < deadline:
                if (await store.call(Read(key)))[0] is not None:
                    return True
                await sleep(loop, 0.02)
            return False
        came: Future[None] = Future()
        store.on_wake = lambda: came.resolve(None)
        await store.call(Read(self.keys.state), wait=key)
        try:
            return await within(loop, came, secs)
        finally:
            store.stop_waiting()
