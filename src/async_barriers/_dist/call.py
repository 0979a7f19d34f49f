"""One call of a DistBarrier, and the steps that a rank has come for."""

from __future__ import annotations

import math
import time
from typing import Any, Generic, TypeVar

from .._errors import BrokenBarrierError
from .._store.worker import Promise

T = TypeVar("T")


class Call(Generic[T]):
    """One call: it waits for its turn, then for all ranks to connect, then in the collective.

    Its waiter and its thread may each be the first to decide what becomes of it; they have no lock,
    since the first one to append has decided.

    :ivar number: which one it is, from 1; its sequence number is its step, or one less
    :ivar before: the step that this rank had come for before
    :ivar came: when it was made, by the clock that ranks compare
    """

    def __init__(self, name: str, number: int, step: int | None, promise: Promise[T]) -> None:
        self.name = name
        self.number = number
        self.step = step
        self.before = -1
        self.promise = promise
        self.came = time.time()
        # None: it has entered; else what its waiter is told.
        self._decided: list[BaseException | None] = []

    @property
    def sequence(self) -> int:
        return self.number - 1 if self.step is None else self.step

    @property
    def entered(self) -> bool:
        """The collective has begun, so that it can no longer be called back."""
        return self._decided[:1] == [None]

    @property
    def called_off(self) -> BaseException | None:
        """Why it must not begin; None where it may."""
        return self._decided[0] if self._decided else None

    def enter(self) -> None:
        """Begin the collective.

        :raises BaseException: why it was called off
        """
        self._decided.append(None)
        if (why := self.called_off) is not None:
            raise why

    def call_off(self, why: BaseException) -> bool:
        """Keep it from beginning; whether it had not begun."""
        self._decided.append(why)
        return not self.entered


class Steps:
    """The latest step of each name that this rank has come for: each is decided once."""

    def __init__(self) -> None:
        self._latest: dict[str, int] = {}

    def too_late(self, name: str, step: int | None, rank: int) -> BrokenBarrierError | None:
        """Why ``step`` can be crossed no more, if it cannot."""
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
        """This rank has come for the step of ``call``."""
        if call.step is not None:
            call.before = self._latest.get(call.name, -1)
            self._latest[call.name] = call.step

    def give_back(self, call: Call[Any]) -> None:
        """It was not decided: the ranks may come for it together yet."""
        if call.step is not None and self._latest[call.name] == call.step:
            self._latest[call.name] = call.before


def or_inf(timeout_secs: float | None) -> float:
    """``timeout_secs`` as a number; None is none."""
    return math.inf if timeout_secs is None else timeout_secs
