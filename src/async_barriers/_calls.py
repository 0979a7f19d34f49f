"""The calls of one DistBarrier: one at a time, and one that ends early is the last."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import anyio
import torch.distributed as dist

from ._attendance import CONNECTING, Attendance
from ._barrier import UNDO_SECS, reason_of
from ._collectives import Aborted, Collectives, DifferentCalls
from ._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    describe,
    plural_ranks,
)
from ._meeting import Meeting
from ._waiting import Waiting, outcome, waiting_here
from ._worker import Promise

T = TypeVar("T")


class Call(Generic[T]):
    """One call: it waits for its turn, then for all ranks to connect, then in the collective.

    :ivar number: which one it is, from 1; its sequence number is one less
    :ivar came: when it was made, by the clock that ranks compare
    :ivar entered: the collective has begun, so that it can no longer be called back
    :ivar over: nobody waits for it any more, so that it must not begin
    """

    def __init__(self, name: str, number: int, promise: Promise[T]) -> None:
        self.name = name
        self.number = number
        self.promise = promise
        self.came = time.time()
        self.entered = False
        self.over = False

    @property
    def sequence(self) -> int:
        return self.number - 1


class Calls:
    """Hands calls to the group's thread in their order, until one of them ends early."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.meeting = Meeting(process_group)
        self.group = Collectives(self.meeting, process_group)
        self._attendance = Attendance(self.meeting)
        # Held for moments only: what becomes of a call is decided by its waiter or its thread.
        self._lock = threading.Lock()
        self._pending: dict[int, Call[Any]] = {}
        self.sequence = 0
        self._unusable: str | None = None
        self._closed = False
        self._waiting: Waiting | None = None

    def check(self, name: str) -> None:
        """Refuse a call that cannot work."""
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, not {name!r}")
        if self._closed:
            raise BarrierClosedError("this DistBarrier")
        if self._unusable is not None:
            raise self._broken(name, self.sequence)
        if self._attendance.latest < CONNECTING:
            self.meeting.convene()

    async def connect(self, timeout: float | None) -> None:
        """Make the group, as `DistBarrier.connect` has it."""
        self.check("")
        self._attendance.enter(CONNECTING)
        connecting = self.group.submit(self.group.connect)
        try:
            if await self._settled(connecting, anyio.current_time() + or_inf(timeout)):
                return connecting.result()
        except BarrierConnectionError as exc:
            self.break_for_good(str(exc))
            raise
        self.break_for_good("its group never came about")
        why, missing = await self._who_is_missing(CONNECTING)
        raise BarrierConnectionError(
            f"no gloo group came about within {timeout:g} s: "
            + (f"{plural_ranks(missing)} had not connected a DistBarrier" if missing else why)
        )

    async def run(
        self,
        name: str,
        timeout: float | None,
        collective: Callable[[], T],
        promise: Promise[T] | None = None,
    ) -> tuple[int, T]:
        """Make one call after those before it; one that ends early is the last.

        :param collective: the call, made in the group's thread
        :param promise: settled by ``collective``, where it goes on after that
        :return: the call's sequence number, and what came of it
        """
        deadline = anyio.current_time() + or_inf(timeout)
        call = self._take_number(name, promise or Promise())
        try:
            if not await self._settled(
                call.promise, deadline, lambda: self._submit(call, collective)
            ):
                assert timeout is not None
                await self._time_out(call, timeout)
        except BaseException as exc:
            if not call.promise.done():
                self._stop(call)
                self.break_for_good(f"a call ended early ({reason_of(exc)})")
            raise
        return call.sequence, call.promise.result()

    async def try_for(self, secs: float, name: str, collective: Callable[[], None]) -> None:
        """As `run`, but the call goes on by itself if it takes longer; the next waits for it."""
        call: Call[None] = self._take_number(name, Promise())
        deadline = anyio.current_time() + secs
        if await self._settled(call.promise, deadline, lambda: self._submit(call, collective)):
            call.promise.result()

    def break_for_good(self, why: str) -> None:
        """From any thread: no other call; those that wait for their turn learn of it at once."""
        with self._lock:
            self._unusable = self._unusable or why
            queued = [call for call in self._pending.values() if call.number > self._begun]
            for call in queued:
                call.over = True
        for call in queued:
            call.promise.settle(error=self._broken(call.name, call.sequence))

    async def aclose(self) -> None:
        """End the calls under way, and let go of the group and of its store."""
        if self._closed:
            return
        with self._lock:
            self._closed = True
            pending = list(self._pending.values())
            for call in pending:
                call.over = True
        for call in pending:
            error = BarrierClosedError(describe(call.name, call.sequence))
            error.in_doubt = call.entered
            call.promise.settle(error=error)
        # What its thread waits for may never come; but what is on its way comes.
        self.group.give_up()
        self.group.retire()
        self._attendance.retire()
        with anyio.move_on_after(UNDO_SECS, shield=True):
            await outcome(self.group.ended)
            await outcome(self._attendance.ended)
        self.group.abandon()
        self._attendance.abandon()

    @property
    def _begun(self) -> int:
        """The latest call whose turn it was."""
        return max(CONNECTING, self._attendance.latest)

    def _take_number(self, name: str, promise: Promise[T]) -> Call[T]:
        self.check(name)
        self.sequence += 1
        call = Call(name, self.sequence, promise)
        with self._lock:
            self._pending[call.number] = call
            if len(self._pending) == 1:
                # Before all ranks have connected, perhaps, so that they do not find it missing.
                self._attendance.enter(call.number)
        return call

    def _submit(self, call: Call[T], collective: Callable[[], T]) -> None:
        self.group.submit(lambda: self._make(call, collective), call.promise)

    def _make(self, call: Call[T], collective: Callable[[], T]) -> T:
        """In the group's thread: it is the turn of ``call``."""
        try:
            self._may_go_on(call)
            self._attendance.enter(call.number)
            self.group.connect()
            self._may_go_on(call, entered=True)
            self.group.came = call.came
            return collective()
        except Aborted as exc:
            raise BrokenBarrierError(call.name, call.sequence, exc.rank, str(exc)) from None
        except DifferentCalls as exc:
            raise BrokenBarrierError(call.name, call.sequence, None, str(exc)) from None
        except BarrierConnectionError as exc:
            exc.in_doubt = call.entered
            self.break_for_good(str(exc))
            raise
        finally:
            with self._lock:
                del self._pending[call.number]

    def _may_go_on(self, call: Call[Any], *, entered: bool = False) -> None:
        with self._lock:
            if call.over:
                raise BarrierConnectionError("nobody waits for it any more")
            call.entered = entered

    async def _settled(
        self, promise: Promise[T], deadline: float, start: Callable[[], object] | None = None
    ) -> bool:
        self._waiting = waiting_here(self._waiting)
        return await self._waiting.settled(promise, deadline, start)

    def _stop(self, call: Call[Any]) -> bool:
        """Keep it from beginning; whether it had not begun."""
        with self._lock:
            call.over = True
            return not call.entered

    async def _time_out(self, call: Call[Any], timeout: float) -> None:
        """Raise, unless the verdict comes while we look who is missing."""
        why = f"a call timed out after {timeout:g} s"
        if called_back := self._stop(call):
            self.break_for_good(why)
        detail, missing = await self._who_is_missing(call.number)
        if called_back or not call.promise.done():
            self.break_for_good(why)
            raise BarrierTimeoutError(
                call.name,
                call.sequence,
                missing,
                timeout,
                detail=detail,
                in_doubt=not called_back,
            )

    async def _who_is_missing(self, number: int) -> tuple[str, tuple[int, ...]]:
        """In words, where an error does not find its own, and the ranks."""
        begun = min(number, self._begun)
        why, missing = "the group's store does not answer", None
        with anyio.move_on_after(UNDO_SECS):
            try:
                missing = await outcome(self._attendance.missing(begun))
            except BarrierConnectionError as exc:
                why = str(exc)
        if missing is None:
            return f"who is missing cannot be told ({why})", ()
        if not missing:
            return "every rank had entered, so look for one that is stopped or has given up", ()
        if begun < number:
            return f"a call before it still waited for {plural_ranks(missing)}", missing
        return "", missing

    def _broken(self, name: str, sequence: int) -> BarrierError:
        return BrokenBarrierError(
            name,
            sequence,
            None,
            f"this DistBarrier is of no more use: {self._unusable}, and a collective cannot "
            "be called back; build a new one on every rank, or use a StoreBarrier, which "
            "outlives deadlines and cancellations",
        )


def or_inf(timeout_secs: float | None) -> float:
    """``timeout_secs`` as a number; None is none."""
    return math.inf if timeout_secs is None else timeout_secs
