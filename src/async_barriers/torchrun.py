"""Have torchrun show the rank that failed as the root cause, not one that waited for it. ::

from async_barriers.torchrun import record


@record
def main() -> None:
    asyncio.run(train())
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from torch.distributed.elastic.multiprocessing import errors

from ._errors import BarrierTimeoutError, BrokenBarrierError, causes, plural_ranks, told_by

__all__ = ["record"]

P = ParamSpec("P")
R = TypeVar("R")

# A rank that only waited ends so many seconds after the one that failed, at least: torchrun kills
# all others as soon as one has ended.
_GRACE_SECS = 2.0


def record(fn: Callable[P, R]) -> Callable[P, R | None]:
    """Decorator of a program's ``main``; use it instead of torch's decorator of the same name.

    torchrun shows the earliest error of a job's processes as the root cause. A rank that fails
    breaks the phase for its peers, and they end as soon as it does, or sooner. Say a process ends
    by a `BrokenBarrierError` or `BarrierTimeoutError` that names other ranks. Its entry then begins
    with those ranks. It waits for 2 to 3 s, or until torchrun kills it, so that the other rank's
    entry is the first. Every other error is recorded as torch does it. Without torchrun it records
    nothing and waits for nothing.
    """
    return errors.record(fn, _ErrorHandler())


class _ErrorHandler(errors.ErrorHandler):
    def record_exception(self, e: BaseException) -> None:
        path = self._get_error_file_path()
        cause = _cause_elsewhere(e)
        if not path or cause is None:
            super().record_exception(e)
            return
        told = f"{cause}; this rank waited for it ({told_by(e)})"
        # Its time is after that of a rank that failed by itself, and not after that of ranks that
        # torchrun kills when this one has ended. torchrun compares whole seconds.
        ends = int(time.time() + _GRACE_SECS) + 1
        extra = {"py_callstack": f"{told}\n\n{traceback.format_exc()}", "timestamp": str(ends)}
        self._write_error_file(path, json.dumps({"message": {"message": told, "extraInfo": extra}}))
        time.sleep(max(0.0, ends - time.time()))


def _cause_elsewhere(exc: BaseException) -> str | None:
    """The other rank because of which this process ends, in words; None if the cause is here."""
    own = os.environ.get("RANK", "")
    found: str | None = None
    for leaf in _leaves(exc):
        blamed: tuple[int, ...] = ()
        why = "had not entered"
        for each in causes(leaf):
            if isinstance(each, BarrierTimeoutError):
                blamed = each.missing_ranks
            elif isinstance(each, BrokenBarrierError) and each.rank is not None:
                blamed, why = (each.rank,), each.reason
        if not blamed or own in map(str, blamed):
            return None
        found = found or f"{plural_ranks(blamed)} caused this: {why}"
    return found


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    inner = getattr(exc, "exceptions", None)
    if isinstance(inner, tuple) and inner:
        for each in inner:
            yield from _leaves(each)
    else:
        yield exc
