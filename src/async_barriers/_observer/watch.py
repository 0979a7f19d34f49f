"""Following the records of commits over one connection, for all calls of one observer.

It looks, waits for the key that follows from the number of records, and looks again when that key
is written. If a leader was killed between a record and that key, nothing wakes the observer. So it
also looks now and then, which shows whether the store is there, too.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from .._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    caused,
    describe,
    of_another_process,
    seconds,
)
from .._protocol import records
from .._protocol.keys import Keys
from .._protocol.records import Log, Record, public
from .._protocol.store import Read
from .._protocol.verdict import number
from .._store.connection import SocketConnection
from .._store.event_loop import Loop, Waiter
from .._store.future import Effort, Future
from .._store.loops import loop_here
from .._store.sources import Connection, Source
from .._store.threads import ThreadedConnection
from .._store.waiting import settled, sleep, told, within
from .._store.worker import end_at_exit
from .._values import CommitRecord

# How long the store may take to be reached, or to answer.
CONNECT_SECS = 60.0
_ANSWER_SECS = 10.0
_LOOK_SECS = 5.0
# After being woken for nothing.
_PAUSE_SECS = 0.05
_CLOSE_SECS = 0.3
_THREAD_SECS = 0.5


class Watch:
    """The latest knowledge of a prefix's records.

    :ivar log: the log as last read; None before the store was reached
    :ivar error: the error that ended the watching, until it begins again
    :ivar losses: how often a connection was lost
    """

    def __init__(self, source: Source, prefix: str) -> None:
        self.prefix = prefix
        self.log: Log | None = None
        self.error: BarrierError | None = None
        self.losses = 0
        self._source = source
        self._pid = os.getpid()
        self._loop: Loop | None = None
        self._running: Effort[None] | None = None
        self._connection: Connection | None = None
        self._waiters: dict[Waiter, None] = {}
        self._closed = False
        # Whether `log` was read on this connection.
        self._looked = False
        self._not_at_end: Any = None

    # -- what callers ask ----------------------------------------------------------------

    def use(self) -> Loop:
        """Return the loop that runs here; begin to watch on it, if it does not yet.

        :raises BarrierClosedError: it was closed
        """
        if self._closed:
            raise BarrierClosedError(f"the observer of {describe(self.prefix)}")
        if os.getpid() != self._pid:
            raise of_another_process(f"the observer of {describe(self.prefix)}", self._pid)
        loop = self._loop
        if loop is None or not loop.here():
            self._stop(BarrierConnectionError("the observer moved to another event loop"))
            loop = self._loop = loop_here(loop)
            self._not_at_end = loop.at_end(self._loop_ended)
            end_at_exit(self)
        if self._running is None or self._running.done:
            self._running = Effort(self._run(loop))
            if not self._running.done:
                self._running.when_done(self._ended)
        return loop

    @property
    def is_live(self) -> bool:
        """Whether `log` is kept up to date."""
        return self._looked

    async def change(self, waiter: Waiter, until: float) -> None:
        """Wait for a change, or until the loop's clock says ``until``.

        :param waiter: one of the loop's, which this task keeps for all its waiting
        """
        self._waiters[waiter] = None
        try:
            await waiter.wait(until)
        finally:
            self._waiters.pop(waiter, None)

    async def look(self, loop: Loop, until: float) -> bool:
        """Read `log` anew; False if the store cannot be asked, or not in time."""
        connection = self._connection
        if connection is None or not self._looked:
            return False
        keys = self._keys()
        looking: Future[list[Any]] = connection.call(*records.looking(keys))
        if not await settled(loop, looking, until) or looking.error is not None:
            return False
        self._see(looking.result()[1])
        return True

    async def told(self, loop: Loop, record: Record, until: float) -> CommitRecord | None:
        """The record as users get it; None if its result is gone.

        :raises BarrierConnectionError: the store did not answer
        """
        if record.result is not None:
            connection: Any = None
        elif (connection := self._connection) is None:
            raise self.unreached()
        telling = Effort(public(connection, self._keys(), record))
        if not await settled(loop, telling, min(until, loop.now() + _ANSWER_SECS)):
            raise self.unreached()
        return telling.result()

    def unreached(self, secs: float | None = None) -> BarrierConnectionError:
        """The error that the store cannot be reached, with the cause."""
        failures = self._source.failures
        why: BaseException | None = failures[-1] if failures else self.error
        within_secs = "" if secs is None else f" within {seconds(secs)}"
        return caused(
            why,
            f"the observer of {describe(self.prefix)} had no answer from the store{within_secs}"
            + ("" if why is None else f" ({why})")
            + "; is the process that hosts it up?",
        )

    # -- watching ------------------------------------------------------------------------

    def _keys(self) -> Keys:
        return Keys(self.prefix, self._source.namespace)

    async def _run(self, loop: Loop) -> None:
        while True:
            connection = await self._source.open(loop, loop.now() + CONNECT_SECS)
            self._source.failures.clear()
            self._connection = connection
            try:
                await self._follow(loop, connection)
            finally:
                self._connection, self._looked = None, False
                connection.on_wake = connection.on_lost = None
                connection.close(reset=connection.unsaid)

    async def _follow(self, loop: Loop, connection: Connection) -> None:
        """Follow until a key was missed: to wait for the next one takes another connection."""
        keys = self._keys()
        while True:
            woken: Future[None] = Future()
            connection.on_wake = lambda woken=woken: woken.resolve(None)
            connection.on_lost = woken.fail
            before, value = await self._answer(loop, connection, *records.looking(keys))
            self._see(value)
            count = number(before) or 0
            (now,) = await self._answer(
                loop, connection, Read(keys.commits_number), wait=records.awaited(keys, count)
            )
            if (number(now) or 0) - count >= records.NEWS:
                return  # Its key may be gone again.
            while not await within(loop, woken, _LOOK_SECS):
                (now,) = await self._answer(loop, connection, Read(keys.commits_number))
                if (number(now) or 0) != count and not woken.done:
                    return  # No leader wrote it.
            woken.result()
            (now,) = await self._answer(loop, connection, Read(keys.commits_number))
            if (number(now) or 0) == count:
                # Another observer that closes has to wake its own thread.
                await sleep(loop, _PAUSE_SECS)

    async def _answer(self, loop: Loop, connection: Connection, *requests: Any, **wait: str) -> Any:
        answered = connection.call(*requests, **wait)
        if not await within(loop, answered, _ANSWER_SECS):
            raise BarrierConnectionError(f"it did not answer within {seconds(_ANSWER_SECS)}")
        return answered.result()

    def _see(self, value: bytes | None) -> None:
        log = records.decode(value)
        if log != self.log or not self._looked:
            self.log, self.error, self._looked = log, None, True
            self._wake()

    def _wake(self) -> None:
        for waiter in list(self._waiters):
            waiter.wake()

    # -- its end -------------------------------------------------------------------------

    def _ended(self) -> None:
        error = self._running.error if self._running is not None else None
        if isinstance(error, BarrierError):
            self.error = error
            self.losses += 1
        self._wake()

    def _stop(self, error: BarrierError) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.stop(error)
        if self._not_at_end is not None:
            self._not_at_end()
            self._not_at_end = None

    async def close(self) -> None:
        """Close the connection; calls under way raise `BarrierClosedError`."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        connection, loop = self._connection, self._loop
        try:
            if isinstance(connection, SocketConnection) and loop is not None and loop.here():
                # c10d's server complains if a client hangs up before its answer.
                connection.stop_waiting()
                answered = connection.call(Read(self._keys().commits_number))
                await settled(loop, answered, loop.now() + _CLOSE_SECS)
        finally:
            self._stop(BarrierClosedError(f"the observer of {describe(self.prefix)}"))
            self._source.let_go()
            self._wake()
        if isinstance(connection, ThreadedConnection) and loop is not None and loop.here():
            # Its thread is woken by a key, which is deleted then.
            for ended in connection.ended:
                await told(loop, ended, loop.now() + _THREAD_SECS)

    def abandon(self) -> None:
        """End it: the observer was dropped, in any thread."""
        loop = self._loop
        if loop is not None and not self._closed and os.getpid() == self._pid:
            error = BarrierClosedError(f"the observer of {describe(self.prefix)}")
            if loop.here():
                self._stop(error)
            elif not loop.ended:
                loop.post(lambda: self._stop(error))

    def _loop_ended(self) -> None:
        self._not_at_end = None
        self._stop(BarrierConnectionError("the observer's event loop ended"))
        self._loop = None

    def end(self, deadline: float) -> None:
        """Before the interpreter does; see `worker.end_at_exit`."""
        with contextlib.suppress(RuntimeError, OSError):
            self._stop(BarrierConnectionError("the program ended"))

    def forsake(self) -> None:
        """In a forked child: nothing here reaches the parent's connection."""
        if self._connection is not None:
            self._connection.forsake()
        self._loop = None
