"""The calls of one DistBarrier: one at a time. A call that ends early is the last."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from .._checks import check_step
from .._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    another,
    describe,
    of_another_process,
    seconds,
)
from .._reasons import reason_of
from .._store.event_loop import Loop
from .._store.loops import loop_here
from .._store.waiting import told
from .._store.worker import Promise, end_at_exit
from .arrivals import CONNECTING, ArrivalLog
from .call import Call, Steps, or_inf
from .collectives import Aborted, Collectives, DifferentCalls
from .departures import Departed
from .group import Group

T = TypeVar("T")

# How long giving up a call may delay its caller; and the least time for a call, whatever its
# deadline, since only the collective decides.
UNDO_SECS, _LEAST_SECS = 0.8, 0.2


class Calls:
    """Hands calls to the collectives' thread in their order, until one of them ends early."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.group = Group(process_group)
        self.log = ArrivalLog(self.group)
        self.collectives = Collectives(self.group, self.log, process_group)
        self.loop: Loop | None = None
        self._pid = os.getpid()
        self._pending: dict[int, Call[Any]] = {}
        self._number = 0
        self._steps = Steps()
        # The last call whose collective has begun, and the last that goes on to its end.
        self._entered = self._served = CONNECTING
        self._unusable: str | None = None
        self.closed = False
        end_at_exit(self)

    def use(self) -> Loop:
        """Return the event loop that runs here, and use it."""
        self.loop = loop_here(self.loop)
        return self.loop

    @property
    def foreign(self) -> bool:
        """Whether this process was forked from the one that the barrier belongs to."""
        return os.getpid() != self._pid

    def check(self, name: str, step: int | None = None) -> None:
        """Refuse a call that cannot work."""
        self.check_open(name, step)
        if self._unusable is not None:
            raise self._broken(name, self.next(step))
        if self.log.latest < CONNECTING:
            self.group.identify()

    def check_open(self, name: str, step: int | None) -> None:
        """Refuse a call that is wrong in any state of the group."""
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, not {name!r}")
        check_step(step)
        if self.foreign:
            raise of_another_process("this DistBarrier", self._pid)
        if self.closed:
            raise BarrierClosedError("this DistBarrier")

    def next(self, step: int | None) -> int:
        """The sequence number of the next call."""
        return self._number if step is None else step

    def too_late(self, name: str, step: int | None) -> BrokenBarrierError | None:
        """Why ``step`` can be crossed no more, if it cannot."""
        return self._steps.too_late(name, step, self.group.rank)

    async def connect(self, timeout: float | None) -> None:
        """Make the group; see `DistBarrier.connect`."""
        self.check("")
        loop = self.use()
        self.log.enter(CONNECTING)
        connecting = self.collectives.submit(self._connect)
        try:
            if await told(loop, connecting, loop.now() + or_inf(timeout)):
                return connecting.result()
        except BarrierConnectionError as exc:
            self.break_for_good(str(exc))
            raise another(exc, "this DistBarrier") from exc.__cause__
        assert timeout is not None
        self.break_for_good("its group was not made")
        why, missing = await self.log.explain(CONNECTING, loop, loop.now() + UNDO_SECS)
        raise BarrierConnectionError(
            f"no gloo group was made within {seconds(timeout)}: "
            + (f"{self.group.told(missing)} had not connected a DistBarrier" if missing else why)
        )

    async def run(
        self,
        name: str,
        step: int | None,
        timeout: float | None,
        collective: Callable[[], T],
        promise: Promise[T] | None = None,
    ) -> tuple[int, T]:
        """Make one call after those before it; one that ends early is the last.

        :param collective: the call, made in the collectives' thread
        :param promise: settled by ``collective``, if that has a later result
        :return: the call's sequence number, and its result
        """
        loop = self.use()
        deadline = loop.now() + max(or_inf(timeout), _LEAST_SECS)
        call = self.begin(name, step, collective, promise)
        try:
            if not await told(loop, call.promise, deadline):
                assert timeout is not None
                await self._time_out(loop, call, timeout)
        except BaseException as exc:
            if not call.promise.done():
                self._stop(call, exc)
            raise
        return call.sequence, call.promise.result()

    def begin(
        self,
        name: str,
        step: int | None,
        collective: Callable[[], T],
        promise: Promise[T] | None = None,
    ) -> Call[T]:
        """Make a call after those before it, also if no task waits for it."""
        self.check(name, step)
        if (late := self.too_late(name, step)) is not None:
            raise late
        call: Call[T] = Call(name, self._number + 1, step, promise or Promise())
        try:
            self._number += 1
            self._steps.take(call)
            self._pending[call.number] = call
            if len(self._pending) == 1:
                # Noted also before all ranks have connected, so that they do not miss this rank.
                self.log.enter(call.number)
            self.collectives.submit(lambda: self._make(call, collective), call.promise)
        except BaseException as exc:
            # A signal handler raised in between: the ranks may no longer count alike.
            self._stop(call, exc)
            raise
        return call

    def _stop(self, call: Call[Any], exc: BaseException) -> None:
        call.call_off()
        self.break_for_good(f"a call ended early ({reason_of(exc)})")

    def break_for_good(self, why: str, *, serves: bool = True) -> None:
        """From any thread: make no further call; those that wait for their turn end at once.

        :param serves: whether the collective under way goes on without a waiter
        """
        self._unusable = self._unusable or why
        pending = list(self._pending.values())
        for call in pending:
            error = self._broken(call.name, call.sequence)
            if call.number > self.log.begun and call.call_off(error):
                call.promise.settle(error=error)
        entered = max([self._entered, *(c.number for c in pending if c.called_off is None)])
        served = entered if serves else self._served
        if not self.closed:
            # Peers would wait in vain for the calls after that.
            self.log.note_gone(entered, served, f"it gave up its DistBarrier: {self._unusable}")

    def leave(self, reason: str) -> None:
        """From any thread: take no more calls, and have the threads tell the peers and end."""
        if self.foreign:
            return
        # Done again before the interpreter ends, in case a signal handler raised in between.
        self.closed = True
        for call in list(self._pending.values()):
            error = BarrierClosedError(describe(call.name, call.sequence))
            error.in_doubt = not call.call_off(error)
            call.promise.settle(error=error)
        # Its thread may wait for a peer that never comes; give what is on its way a moment.
        self.collectives.give_up()
        self.collectives.retire(
            lambda: self.log.note_left(self._entered, self._served, reason), self.log.retire
        )

    def end(self, deadline: float) -> None:
        """Leave before the interpreter does; see `worker.end_at_exit`."""
        self.leave("it closed its barrier (its program ended)")
        self.log.ended.wait((deadline - time.monotonic()) / 2)
        self.abandon(at_exit=True)

    def forsake(self) -> None:
        """In a forked child: nothing here reaches the parent's group."""
        self.collectives.forsake()

    def abandon(self, *, at_exit: bool = False) -> None:
        """From any thread: end the waiting of its threads."""
        self.collectives.abandon()
        self.log.abandon(at_exit=at_exit)

    # -- in the collectives' thread --------------------------------------------------------

    def _connect(self) -> None:
        try:
            self.collectives.connect()
        except Departed as exc:
            raise self._told_gone(exc, "", 0, in_doubt=False) from None

    def _make(self, call: Call[T], collective: Callable[[], T]) -> T:
        """Make ``call``, whose turn it is."""
        try:
            if call.called_off is None:
                self.log.enter(call.number)
                self.collectives.connect()
            call.enter()
            self._entered = call.number
            self.collectives.begin(call.number, call.came)
            result = collective()
            self._serve(call)
            return result
        except Aborted as exc:
            self._serve(call, decided=exc.step == call.step)
            raise self.group.broken(call.name, call.sequence, exc.rank, str(exc)) from None
        except DifferentCalls as exc:
            self._serve(call, decided=False)
            raise BrokenBarrierError(call.name, call.sequence, None, str(exc)) from None
        except Departed as exc:
            in_doubt = exc.gone.entered >= call.number
            raise self._told_gone(exc, call.name, call.sequence, in_doubt=in_doubt) from None
        except BarrierConnectionError as exc:
            if call.called_off is None:
                exc.in_doubt = call.entered
                self.break_for_good(str(exc), serves=False)
            raise another(exc, describe(call.name, call.sequence)) from exc.__cause__
        finally:
            del self._pending[call.number]

    def _serve(self, call: Call[Any], *, decided: bool = True) -> None:
        """Settle ``call``, whose result all ranks know."""
        self._served = call.number
        self.log.tidy()
        if not decided:
            self._steps.give_back(call)

    def _told_gone(
        self, departed: Departed, name: str, sequence: int, *, in_doubt: bool
    ) -> BrokenBarrierError:
        gone = departed.gone
        self.break_for_good(f"rank {gone.rank} is gone from it ({gone.reason})", serves=False)
        return self.group.broken(name, sequence, gone.rank, gone.reason, in_doubt=in_doubt)

    # -- explaining ------------------------------------------------------------------------

    async def _time_out(self, loop: Loop, call: Call[Any], timeout: float) -> None:
        """Raise, unless the verdict comes while this looks which ranks are missing."""
        why = f"a call timed out after {seconds(timeout)}"
        if called_back := call.call_off():
            self.break_for_good(why)
        until = loop.now() + UNDO_SECS
        detail, missing = await self.log.explain(call.number, loop, until)
        if not (called_back or missing):
            # All ranks have entered: most often the verdict is on its way.
            await told(loop, call.promise, until)
        if called_back or not call.promise.done():
            self.break_for_good(why)
            raise BarrierTimeoutError(
                call.name, call.sequence, missing, timeout, detail=detail, in_doubt=not called_back
            )

    def _broken(self, name: str, sequence: int) -> BarrierError:
        return BrokenBarrierError(
            name,
            sequence,
            None,
            f"this DistBarrier can no longer be used: {self._unusable}, and a collective cannot "
            "be called back; build a new one on every rank, or use a StoreBarrier, which "
            "outlives deadlines and cancellations",
        )
