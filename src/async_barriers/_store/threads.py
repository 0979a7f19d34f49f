"""A connection over a store whose calls block: worker threads of ours make them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch.distributed import Store

from .._errors import BarrierConnectionError, another, caused, out_of_threads
from .._protocol.store import SILENT, Delete, Read, Request, Set
from .blocking_store import BlockingStore, lost
from .event_loop import Loop
from .future import Future
from .worker import Promise, Worker, end_at_exit

_TRIES, _TRY_SECS = 10, 0.1
_CLOSED = b"closed"


class ThreadedConnection:
    """As `SocketConnection`, over a `BlockingStore`: one thread that calls, one that waits.

    :param open_store: makes a store that nobody else uses; called in a thread, and blocks there
    """

    waits = sent = suspect = False

    def __init__(self, open_store: Callable[[], Store], loop: Loop) -> None:
        self.on_wake: Callable[[], object] | None = None
        self.on_lost: Callable[[BarrierConnectionError], object] | None = None
        self.outbox: list[tuple[list[Request], Callable[[list[Any]], object]]] = []
        self.lost: BarrierConnectionError | None = None
        self._open_store = open_store
        self._loop = loop
        self._caller = Worker("calls")
        self._waiter: Worker | None = None
        # Each is used by one thread, so that no call waits behind a wait.
        self._called: BlockingStore | None = None
        self._waited: BlockingStore | None = None
        self._awaited: str | None = None
        self._wait_over: Future[None] = Future()
        # The requests without an answer yet.
        self._due: dict[Future[list[Any]], Callable[[], None]] = {}

    def open(self) -> Future[list[Any]]:
        """Open the store; done when it is there."""
        return self.call()

    def call(self, *requests: Request, wait: str | None = None) -> Future[list[Any]]:
        """As `Store.call`; a key that is to be waited for has a thread of its own."""
        answered: Future[list[Any]] = Future()
        if self.lost is not None:
            answered.fail(BarrierConnectionError(str(self.lost)))
            return answered
        late, self.outbox = self.outbox, []
        if wait is not None:
            self._awaited = wait
        awaited = self._awaited

        def make() -> tuple[list[list[Any]], list[Any]]:
            if self._failed or self._given_up:
                # Earlier requests may not have come, so this must not come either.
                raise BarrierConnectionError("this connection to the store was lost")
            self._failed = True
            answers = make_all()
            self._failed = False
            return answers

        def make_all() -> tuple[list[list[Any]], list[Any]]:
            if self._called is None:
                self._called = BlockingStore(self._open_store())
                if self._given_up:
                    # It was closed while it opened: a call would never return, or print c10d's
                    # traces.
                    raise BarrierConnectionError("this connection to the store was closed")
            store = self._called
            done = [self._answers(store, earlier) for earlier, _ in late]
            return done, self._answers(store, requests)

        def made() -> None:
            if not promise.done() or answered not in self._due:
                return
            try:
                del self._due[answered]
                try:
                    done, answers = promise.result()
                except Exception as exc:
                    self._lose(lost(exc), answered)
                    return
                for (_, heard), answer in zip(late, done, strict=True):
                    heard(answer)
                answered.resolve(answers)
                if awaited is not None and awaited == self._awaited and self.lost is None:
                    self._wait_for(awaited)
            except BaseException as exc:
                # A signal handler raised: what was heard is not known any more.
                self._lose(lost(exc), answered)
                raise

        promise: Promise[tuple[list[list[Any]], list[Any]]] = Promise()
        try:
            self._due[answered] = made
            self._caller.submit(make, promise)
            promise.when_settled(lambda: self._loop.post(made))
        except RuntimeError as exc:
            self._lose(_no_thread(exc), answered)
        except BaseException as exc:
            # A signal handler raised: the result of the call is lost.
            self._lose(lost(exc), answered)
            raise
        return answered

    def stop_waiting(self) -> None:
        """Call back no more."""
        self._awaited = self.on_wake = None

    async def end_wait(self) -> None:
        """End the wait under way; c10d would print it if the server went before.

        :raises BarrierConnectionError: the connection was lost
        """
        self.stop_waiting()
        if self._woken is not None:
            await self.call(Set(self._waited_key, _CLOSED))
            await self._wait_over
            await self.call(Delete([self._waited_key]))
        self._waited_key = ""

    def move(self, loop: Loop) -> None:
        """Go on on another loop; what was posted to the one before may never be called there."""
        self._loop = loop
        for tell in (*self._due.values(), self._woken):
            if tell is not None:
                loop.post(tell)

    @property
    def unsaid(self) -> bool:
        return bool(self._due)

    def close(self, *, reset: bool = False) -> None:
        """End the threads after their calls; one that hangs ends when its store answers."""
        self.on_lost = None
        self._end(BarrierConnectionError("this connection to the store was closed"), reset)

    def end(self, deadline: float) -> None:
        """Before the interpreter ends, once it is closed: what hangs must not return any more."""
        if not self._given_up:
            until = (time.monotonic() + deadline) / 2
            for ended in self.ended:
                ended.wait(until - time.monotonic())
        self._at_exit = self._given_up = True
        for store, worker in ((self._called, self._caller), (self._waited, self._waiter)):
            if store is not None and worker is not None and store.never_return() and store.asks:
                worker.forget()

    def forsake(self) -> None:
        """In a forked child: there are no threads, and the store is the parent's."""
        self.lost = BarrierConnectionError("this connection is another process's")

    @property
    def ended(self) -> list[Promise[None]]:
        """Settled when its threads are gone."""
        return [worker.ended for worker in (self._caller, self._waiter) if worker is not None]

    def _wait_for(self, key: str) -> None:
        self._awaited = None
        if self._waiter is None:
            self._waiter = Worker("waits")

        def wait() -> None:
            if self._waited is None:
                self._waited = BlockingStore(self._open_store())
            # If it was closed while this opened, its key may have been written and deleted.
            if self.lost is None:
                self._waited.wait(key)

        def woken() -> None:
            if self._woken is not woken or not promise.done():
                return
            try:
                self._woken = None
                over.resolve(None)
                try:
                    promise.result()
                except Exception as exc:
                    # Opening a second store fails in as many ways as there are stores.
                    self._lose(lost(exc))
                    return
                if self.on_wake is not None:
                    self.on_wake()
            except BaseException as exc:
                # A signal handler raised: nobody may have been woken.
                self._lose(lost(exc))
                raise

        if self._woken is not None:
            return
        promise: Promise[None] = Promise()
        over = self._wait_over = Future()
        try:
            self._waiter.submit(wait, promise)
        except RuntimeError as exc:
            self._lose(_no_thread(exc))
            return
        self._woken = woken
        self._waited_key = key
        promise.when_settled(lambda: self._loop.post(woken))

    # Called when the wait under way has ended.
    _woken: Callable[[], None] | None = None
    _waited_key = ""
    # If given up, what was not said yet is not said any more.
    _given_up = _at_exit = False
    # By the thread that calls: a call has failed there, or is under way.
    _failed = False

    def _lose(
        self, error: BarrierConnectionError, answered: Future[list[Any]] | None = None
    ) -> None:
        on_lost, self.on_lost = self.on_lost, None
        self._end(error, reset=True)
        # The awaiting task goes on at once, and has to find that this connection is lost.
        if answered is not None:
            answered.fail(error)
        if on_lost is not None:
            on_lost(error)

    def _end(self, error: BarrierConnectionError, reset: bool) -> None:
        if self.lost is not None:
            return
        self.lost = error
        self.on_lost = self.on_wake = None
        due, self._due = self._due, {}
        waiter, key = self._waiter, self._waited_key
        waiting = waiter is not None and self._woken is not None

        def close_called() -> None:
            store = self._called
            if store is None:
                return
            try:
                if waiting and waiter is not None:
                    # Its own key wakes the thread that waits. Written again, in case the store only
                    # looks now and then and another client deletes it meanwhile.
                    woken = False
                    for _ in range(_TRIES):
                        store.do(Set(key, _CLOSED))
                        if (woken := waiter.ended.wait(_TRY_SECS)) or self._at_exit:
                            break
                    # A wait that hangs must find the key when it goes on, and deletes it then.
                    if woken:
                        self._take_away(store, key)
            except BarrierConnectionError:
                if self._waited is not None:
                    self._waited.interrupt()
            store.close()

        if self._waiter is not None:
            self._waiter.retire(self._close_waited)
        self._caller.retire(close_called)
        self._given_up = reset
        end_at_exit(self)
        self._wait_over.resolve(None)
        # Not when its thread returns, since it may never return.
        for answered in due:
            answered.fail(another(error))

    def _close_waited(self) -> None:
        if (store := self._waited) is not None:
            with contextlib.suppress(BarrierConnectionError):
                if self._waited_key and not self._given_up:
                    self._take_away(store, self._waited_key)
            store.close()

    @staticmethod
    def _take_away(store: BlockingStore, key: str) -> None:
        """Delete the key that ended a wait, unless another connection waits for it by now."""
        if store.do(Read(key)) == _CLOSED:
            store.do(Delete([key]))

    def _answers(self, store: BlockingStore, requests: Iterable[Request]) -> list[Any]:
        answers = []
        for request in requests:
            if self._given_up:
                # The connection was given up while a call before this one hung.
                raise BarrierConnectionError("this connection to the store was closed")
            answer = store.do(request)
            if not isinstance(request, SILENT):
                answers.append(answer)
        return answers


def _no_thread(exc: BaseException) -> BarrierConnectionError:
    return caused(exc, f"no thread can be started for a call to the store {out_of_threads(exc)}")
