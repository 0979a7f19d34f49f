"""One call of a DistBarrier, and the steps that a rank has come for."""

from __future__ import annotations

import math
import time
from typing import Any, Generic, TypeVar

from .._errors import BarrierConnectionError, BrokenBarrierError
from .._store.worker import Promise

T = TypeVar("T")


class Call(Generic[T]):
    """One call: it waits for its turn, then for all ranks to connect, then in the collective.

    Its waiter or its thread may be the first to decide about it. They need no lock: the first to
    append has decided.

    :ivar number: its number, from 1; its sequence number is its step, or one less
    :ivar before: the step of this rank's call before
    :ivar came: the time of the call, by the clock that ranks compare
    """

    def __init__(self, name: str, number: int, step: int | None, promise: Promise[T]) -> None:
        self.name = name
        self.number = number
        self.step = step
        self.before = -1
        self.promise = promise
        self.came = time.time()
        # None if it has entered; else the error of its waiter.
        self._decided: list[BaseException | None] = []

    @property
    def sequence(self) -> int:
        return self.number - 1 if self.step is None else self.step

    @property
    def entered(self) -> bool:
        """Whether the collective has begun; it can no longer be called back then."""
        return self._decided[:1] == [None]

    @property
    def called_off(self) -> BaseException | None:
        """The error because of which it must not begin; None if it may."""
        return self._decided[0] if self._decided else None

    def enter(self) -> None:
        """Begin the collective.

        :raises BaseException: the error with which it was called off
        """
        self._decided.append(None)
        if (why := self.called_off) is not None:
            raise why

    def call_off(self, why: BaseException | None = None) -> bool:
        """Keep it from beginning; return whether that was possible.

        :param why: None if nobody waits for it any more
        """
        self._decided.append(why or BarrierConnectionError("nobody waits for it any more"))
        return not self.entered


class Steps:
    """The latest step of each name that this rank has called with: each is decided once."""

    def __init__(self) -> None:
        self._latest: dict[str, int] = {}

    def too_late(self, name: str, step: int | None, rank: int) -> BrokenBarrierError | None:
        """The reason why ``step`` can no longer be crossed, if there is one."""
        latest = self._latest.get(name, -1)
        if step is None or step > latest:
            return None
        which = "this step" if step == latest else f"step {latest}, a later one,"
        return BrokenBarrierError(
            name,
            step,
            rank,
            f"rank {rank} came for step {step} when it had come for {which} already; a step is "
            "decided once: go on with a later one",
        )

    def take(self, call: Call[Any]) -> None:
        """Note that this rank has called with the step of ``call``."""
        if call.step is not None:
            call.before = self._latest.get(call.name, -1)
            self._latest[call.name] = call.step

    def give_back(self, call: Call[Any]) -> None:
        """Undo `take`: the step was not decided, and the ranks may still cross it together."""
        if call.step is not None and self._latest[call.name] == call.step:
            self._latest[call.name] = call.before


def or_inf(timeout_secs: float | None) -> float:
    """``timeout_secs`` as a number; infinite for None."""
    return math.inf if timeout_secs is None else timeout_secs
