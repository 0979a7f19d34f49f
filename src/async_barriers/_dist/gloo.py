"""Making a gloo group of our own, with a store whose waits can be given up."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import Store

from .._errors import BarrierConnectionError
from .._store.worker import Promise
from .arrivals import ArrivalLog
from .departures import Departed, Lookout
from .group import Group

T = TypeVar("T")

# gloo waits so long for a peer that dies while it connects. Operations have their own deadlines.
_CONNECT = timedelta(seconds=60)
_LOOK_UP_SECS = 0.25
# How soon to ask again for the peers, and by how much later each time: a peer may come minutes
# late, and thousands of ranks may ask.
_ASK_SECS, _SLOWER, _ASK_SECS_AT_MOST = 0.003, 1.3, 1.0


def make_group(group: Group, log: ArrivalLog, given_up: Promise[None]) -> dist.ProcessGroupGloo:
    """Block until every rank makes it.

    It is gloo, whatever the default group is: it must never touch a GPU, nor stand between the
    collectives of the training.

    :raises BarrierConnectionError: the group's store was lost, or this was ``given_up``
    :raises Departed: a rank has given up before
    :raises RuntimeError: gloo failed
    """
    asking = _Asking(log, given_up)
    # gloo's own wait for the others cannot be called off.
    asking.answer(log.join())
    asking.until(lambda: int(asking.answer(log.read("joined")) or 0) >= group.size)
    for gone in asking.answer(log.gone()):
        raise Departed(gone)
    store = _Addresses(log, asking)
    try:
        return dist.ProcessGroupGloo(store, group.rank, group.size, _CONNECT)
    except Exception:
        # It has come through C++.
        if store.error is not None:
            raise store.error from None
        raise


class _Asking:
    """Waits, in another thread, for answers of the arrival log's thread."""

    def __init__(self, log: ArrivalLog, given_up: Promise[None]) -> None:
        self._given_up = given_up
        # A rank that has given up before the first call will not be in it.
        self._lookout = Lookout(log.gone, lambda gone: gone.entered <= 0)

    def answer(self, promise: Promise[T]) -> T:
        """The answer of the promise."""
        while not promise.wait(_LOOK_UP_SECS) and not self._given_up.done():
            pass
        if self._given_up.done():
            raise BarrierConnectionError("connecting was stopped")
        self._lookout.look()
        return promise.result()

    def until(self, condition: Callable[[], bool]) -> None:
        """Ask until it is so."""
        pause = _ASK_SECS
        while not condition():
            self._given_up.wait(pause)
            pause = min(_SLOWER * pause, _ASK_SECS_AT_MOST)


class _Addresses(Store):
    """The part of a store that gloo uses: the address of each rank."""

    def __init__(self, log: ArrivalLog, asking: _Asking) -> None:
        super().__init__()
        self.error: Exception | None = None
        self._log = log
        self._asking = asking

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._do(lambda: self._asking.answer(self._log.write(f"gloo/{key}", value)))

    def get(self, key: str) -> bytes:
        return self._do(lambda: self._read(key)) or b""

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        there = (partial(self._has, key) for key in keys)

        def wait_for_all() -> None:
            for condition in there:
                self._asking.until(condition)

        self._do(wait_for_all)

    def _has(self, key: str) -> bool:
        return self._read(key) is not None

    def _read(self, key: str) -> bytes | None:
        return self._asking.answer(self._log.read(f"gloo/{key}"))

    def _do(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as exc:
            self.error = exc
            raise
