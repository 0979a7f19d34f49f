"""CommitObserver: follows the commits of a barrier, for processes that are no ranks."""

from __future__ import annotations

import math
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import TypeVar

from torch.distributed import Store

from . import _launch
from ._bodies import close
from ._checks import check_call_timeout, check_flag
from ._errors import BarrierError, BarrierTimeoutError, describe
from ._observer.watch import CONNECT_SECS, Watch
from ._protocol.keys import Keys, check_name, check_prefix
from ._protocol.records import KEPT, Log, Record
from ._store.event_loop import Loop
from ._store.sources import PassedIn, Source, StoreAt
from ._store.waiting import settled, sleep
from ._values import CommitRecord

CommitObserverT = TypeVar("CommitObserverT", bound="CommitObserver")
Reached = Callable[[Loop, float], Awaitable[None]]

_RETRY_SECS = 0.2


class CommitObserver:
    """Follows the commits of a barrier without being one of its ranks.

    It is for an evaluation job, a controller or a tool. It delays no rank, any number may watch,
    and none leaves anything in the store. The store keeps the records of the last 64 released
    commits of a prefix, as long as it lives, whichever ranks restart. The observer has one
    connection to the store (or two threads, if the store is no TCPStore), and is woken when there
    is a new record. It works on asyncio and trio. An observer belongs to one event loop at a time.

    :param store: leads to the same data as the ranks' store; wrapped in the same PrefixStores
    :param prefix: that of the barriers
    :param worker_threads: as in `StoreBarrier`
    :raises TypeError, ValueError: an argument is not allowed
    """

    def __init__(
        self, store: Store, *, prefix: str = "barrier", worker_threads: bool = False
    ) -> None:
        check_flag("worker_threads", worker_threads)
        source: Source
        if isinstance(store, StoreAt):
            source = store
            if worker_threads:
                store.threads = True
        elif isinstance(store, Store):
            source = PassedIn(store, worker_threads)
        else:
            raise TypeError(f"store must be a torch.distributed.Store, not {store!r}")
        check_prefix(prefix)
        self._keys = Keys(prefix)
        self._watch = Watch(source, prefix)
        # An observer that is dropped unclosed must not keep its connection.
        weakref.finalize(self, _abandon, self._watch).atexit = False

    @classmethod
    def from_env(
        cls: type[CommitObserverT], *, prefix: str = "barrier", worker_threads: bool = False
    ) -> CommitObserverT:
        """An observer of the job whose store is at MASTER_ADDR and MASTER_PORT.

        It does not read RANK and WORLD_SIZE, and never hosts the store.

        :raises ValueError: variables are missing (it names them), or a value is not allowed
        """
        store = _launch.store_from_environment()
        return cls(store, prefix=prefix, worker_threads=worker_threads)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<CommitObserver {self._watch.prefix!r}>"

    async def connect(self) -> None:
        """Reach the store, and read its records. Without this call the first other call does it.

        :raises BarrierConnectionError: the store was not reached within 60 s

        **Cancellation:** nothing has happened. Connecting again is safe.
        """
        watch = self._watch
        loop = watch.use()
        await self._reached(loop, loop.now() + CONNECT_SECS)

    async def wait_for(self, name: str, *, timeout_secs: float | None = None) -> CommitRecord:
        """The latest record of a commit of ``name``; if there is none yet, the first that comes.

        If the store is lost, it tries to connect again until the deadline, for 60 s at most.

        :param name: as given to ``commit``. The record's ``sequence`` is the ``step``, if one was
            given
        :param timeout_secs: the deadline in seconds from now; None for no deadline, 0 for what is
            there
        :raises BarrierTimeoutError: there was none by then
        :raises BarrierConnectionError: the store cannot be reached
        :raises BarrierClosedError: the observer is closed

        **Cancellation:** nothing is lost. Waiting again finds what came meanwhile.
        """
        check_name(self._keys, name)
        timeout = check_call_timeout(timeout_secs)
        watch = self._watch
        loop = watch.use()
        deadline = math.inf if timeout is None else loop.now() + timeout
        waiter, looked = loop.waiter(), False
        while True:
            # With 0, only a store that was reached can answer.
            await self._reached(loop, max(deadline, loop.now() + (0.8 if timeout == 0 else 0)))
            looked = looked or await watch.look(loop, max(deadline, loop.now() + 0.8))
            log = watch.log
            for record in reversed(log.records.values()) if log is not None and looked else ():
                if record.name == name:
                    found = await watch.told(loop, record, math.inf)
                    if found is not None:
                        return found
                    break
            if loop.now() >= deadline:
                assert timeout is not None
                raise self._in_vain(name, timeout) if looked else watch.unreached(timeout)
            if looked and watch.log is log:
                await watch.change(waiter, deadline)

    def records(self, name: str | None = None) -> AsyncIterator[CommitRecord]:
        """Each commit from now on, in the order in which they were released.

        If the observer is connected (``async with``, `connect`), these are the commits after this
        call, and perhaps one that was released just before. Otherwise they are those after you ask
        for the first one. An iterator that falls so far behind that records are no longer kept
        raises `BarrierError`, which says how many it missed. One that loses its connection raises
        `BarrierConnectionError`. After either error you may ask for the next record, and the
        iterator goes on with what there is.

        :param name: only commits of that name
        :raises BarrierClosedError: the observer is closed

        **Cancellation:** of waiting for the next one: nothing is lost.
        """
        if name is not None:
            check_name(self._keys, name)
        return _Records(self._watch, name, self._reached)

    async def aclose(self) -> None:
        """Close the connection. Idempotent; calls under way raise `BarrierClosedError`.

        **Cancellation:** it is closed all the same.
        """
        await self._watch.close()

    async def __aenter__(self: CommitObserverT) -> CommitObserverT:
        try:
            await self.connect()
        except BaseException as exc:
            await close(self.aclose(), exc)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await close(self.aclose(), exc)

    async def _reached(self, loop: Loop, deadline: float) -> None:
        """Wait for the first look, by ``deadline``.

        :raises BarrierConnectionError: there was none
        """
        watch, waiter, began = self._watch, loop.waiter(), loop.now()
        until = min(deadline, began + CONNECT_SECS)
        while True:
            watch.use()
            if watch.is_live:
                return
            if loop.now() >= until:
                raise watch.unreached(until - began)
            await watch.change(waiter, until)
            if watch.error is not None:
                await settled(loop, sleep(loop, _RETRY_SECS), until)

    def _in_vain(self, name: str, timeout_secs: float) -> BarrierTimeoutError:
        log = self._watch.log
        kept = "" if log is None else f" ({log.end} commits of this prefix are on record)"
        return BarrierTimeoutError(
            name,
            0,
            (),
            timeout_secs,
            detail=f"no commit of that name was released{kept}; do name and prefix agree with the "
            "ranks', and are they running?",
            prefix=self._watch.prefix,
        )


class _Records(AsyncIterator[CommitRecord]):
    """An iterator of `CommitObserver.records`.

    On another connection it goes on where it was. If the records that it has seen are gone, the
    store was built again, and all are new.
    """

    def __init__(self, watch: Watch, name: str | None, reached: Reached) -> None:
        self._watch = watch
        self._name = name
        self._reached = reached
        self._losses = watch.losses
        # The number of the first record that it has not seen, and the record before that in the
        # log.
        self._next: int | None = None
        self._seen: tuple[int, Record] | None = None
        if watch.is_live and watch.log is not None:
            self._begin_after(watch.log)

    async def __anext__(self) -> CommitRecord:
        watch = self._watch
        loop = watch.use()
        waiter = loop.waiter()
        while True:
            if self._losses != watch.losses:
                self._losses = watch.losses
                if self._next is not None:
                    raise watch.unreached()
            await self._reached(loop, math.inf)
            self._losses = watch.losses
            log = watch.log
            assert log is not None
            begin = self._place(log)
            for number, record in log.records.items():
                if number >= begin and self._name in (None, record.name):
                    found = await watch.told(loop, record, math.inf)
                    self._next = number + 1
                    self._seen = number, record
                    if found is None:
                        raise self._behind(1)
                    return found
            self._begin_after(log)
            await watch.change(waiter, math.inf)

    def _begin_after(self, log: Log) -> None:
        self._next = log.end
        if log.records:
            self._seen = next(reversed(log.records.items()))

    def _place(self, log: Log) -> int:
        """The number of the first record that is new.

        :raises BarrierError: there were others before it, which are not kept any more
        """
        if self._next is None:
            self._begin_after(log)
        assert self._next is not None
        number, seen = self._seen or (-1, None)
        if log.end < self._next or log.records.get(number, seen) != seen:
            self._next, self._seen = 0, None
        missed = log.begin - self._next
        if missed > 0:
            self._next = log.begin
            raise self._behind(missed)
        return self._next

    def _behind(self, missed: int) -> BarrierError:
        return BarrierError(
            f"the observer of {describe(self._watch.prefix)} fell behind: {missed} records are not "
            f"kept any more ({KEPT} are); ask for the next one to go on with what there is, and do "
            "slow work elsewhere"
        )


def _abandon(watch: Watch) -> None:
    watch.abandon()


__all__ = ["CommitObserver"]
