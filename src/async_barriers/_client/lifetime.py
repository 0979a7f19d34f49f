"""One rank's barrier over a store: how it is built, and how it leaves."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import anyio

from .._barrier import Barrier
from .._checks import check_run_id, check_timeout, check_world
from .._protocol.count import MAX_RANKS
from .._protocol.keys import Keys, check_prefix
from .._protocol.membership import Closed
from .._publish import is_async
from .._store.loops import loop_here
from .._store.sources import Source
from .._store.waiting import settled, told, until_done
from .._store.worker import Promise
from .._values import BarrierProgress, BarrierStatistics
from .session import Session
from .state import PEERS_SECS, UNDO_SECS
from .watching import watching_for

_CLOSED = "it closed its barrier"
# How long closing waits for a publish to heed its cancellation, even if the caller is cancelled.
_STOP_SECS = 0.4
# How long closing waits for a companion's thread.
_COMPANION_SECS = 2.0


class RankBarrier(Barrier):
    """A barrier without its crossings."""

    def __init__(
        self,
        source: Source,
        rank: int,
        world_size: int,
        prefix: str,
        timeout_barrier_init_secs: float,
        timeout_secs: float | None,
        warn_after_secs: float | None,
        on_progress: Callable[[BarrierProgress], object] | None,
        run_id: str | None = None,
        stalled_after_secs: float | None = None,
        global_ranks: Sequence[int] | None = None,
    ) -> None:
        check_world(rank, world_size)
        if world_size > MAX_RANKS:
            raise ValueError(f"world size is {world_size}; at most {MAX_RANKS} ranks can meet")
        check_prefix(prefix)
        init_secs = check_timeout("timeout_barrier_init_secs", timeout_barrier_init_secs)
        if init_secs is None:
            raise TypeError("timeout_barrier_init_secs must be a number of seconds, not None")
        if on_progress is not None and not callable(on_progress):
            raise TypeError(f"on_progress must be callable or None, not {on_progress!r}")
        if is_async(on_progress):
            raise TypeError(f"on_progress is not awaited: {on_progress!r} is a coroutine function")
        check_run_id(run_id)
        self.prefix = prefix
        self._source = source
        self._keys = Keys(prefix, source.namespace)
        self._session = Session(
            source, prefix, rank, world_size, init_secs=init_secs, run_id=run_id
        )
        self._timeout_secs = check_timeout("timeout_secs", timeout_secs)
        self._watch = watching_for(
            check_timeout("warn_after_secs", warn_after_secs),
            check_timeout("stalled_after_secs", stalled_after_secs),
            on_progress,
            global_ranks,
        )
        self._closed = False
        # Objects with a thread and a barrier of their own, which end with this barrier.
        self._companions: dict[str, Companion] = {}
        weakref.finalize(self, _retire_all, self._companions).atexit = False
        self._session.on_left = partial(_tell_all, self._companions)
        # The name of most calls is the same as before.
        self._checked_name = ""
        # A barrier that is dropped without aclose() leaves, too.
        weakref.finalize(self, _abandon, self._session).atexit = False

    def __repr__(self) -> str:
        session = self._session
        state = "closed" if self._closed else "connected" if session.stands else "not connected"
        return (
            f"<{type(self).__name__} {session.prefix!r}, rank {session.rank} of "
            f"{session.world_size}, {state}>"
        )

    def report(self, doing: str) -> None:
        self._session.said.say(doing)

    def statistics(self) -> BarrierStatistics:
        return self._session.tally.statistics()

    async def aclose(self) -> None:
        await self._leave(_CLOSED)

    async def _leave(self, reason: str) -> None:
        session = self._session
        self._closed = True
        if session.foreign:
            return
        try:
            await self._end_companions(reason)
        except BaseException:
            # Leaving goes on by itself.
            session.leave(reason)
            raise
        if session.loop is None:
            session.leave(reason)
            return
        if session.busy_elsewhere:
            # Which ends the calls that are under way there.
            session.loop.post(partial(session.leave, reason))
            return
        loop = session.use()
        began = loop.now()
        try:
            await self._stop_publishing(reason)
            leaving = session.leave(reason, loop.now() - began)
            # A host gives its peers a moment to hear their verdicts; the rest is short.
            await settled(loop, leaving, loop.now() + PEERS_SECS + UNDO_SECS)
        except BaseException as exc:
            # Leaving goes on by itself, and a cancelled caller waits for most of it. A coroutine
            # that is thrown away cannot wait.
            leaving = session.leave(reason, loop.now() - began)
            if not isinstance(exc, GeneratorExit):
                with anyio.CancelScope(shield=True):
                    await until_done(loop, leaving, UNDO_SECS)
            raise

    async def _end_companions(self, reason: str) -> None:
        companions = list(self._companions.values())
        for companion in companions:
            companion.retire(reason)
        for companion in companions:
            if (ended := companion.ended) is not None:
                loop = loop_here(None)
                await told(loop, ended, loop.now() + _COMPANION_SECS)

    async def _stop_publishing(self, reason: str) -> None:
        # A phase that was published must not be declared broken, so publish has to end first.
        publications = [p.publishing for p in self._session.open if p.publishing is not None]
        for publication in publications:
            publication.stop(reason, closing=True)
        # A publish that heeds its cancellation ends soon, so a cancelled caller waits for it, too.
        loop = self._session.running
        deadline = loop.now() + PEERS_SECS
        for publication in publications:
            with anyio.CancelScope(shield=True):
                until = min(deadline, loop.now() + _STOP_SECS)
                await settled(loop, publication.settled, until)
            await settled(loop, publication.settled, deadline)


class Companion(Protocol):
    """Something with a thread of its own that ends with a barrier."""

    @property
    def ended(self) -> Promise[None] | None: ...
    def retire(self, reason: str | None = None) -> None: ...
    def peer_left(self, closed: Closed) -> None: ...


def _retire_all(companions: dict[str, Companion]) -> None:
    for companion in companions.values():
        companion.retire()


def _tell_all(companions: dict[str, Companion], closed: Closed) -> None:
    for companion in list(companions.values()):  # Another thread may build one just now.
        companion.peer_left(closed)


def _abandon(session: Session) -> None:
    """Leave for a barrier that was dropped, in whatever thread this runs."""
    if session.foreign or session.closing:
        return
    loop = session.loop
    if loop is not None and loop.here():
        session.leave(_CLOSED)
    elif loop is not None and not loop.ended:
        loop.post(lambda: session.leave(_CLOSED))
    else:
        session.end_with_loop()
