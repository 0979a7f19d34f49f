"""The gate that steps pass and an agreement closes; no lock, no store, no thread.

Each step that passes fills the *cell* at the end of a chain and adds the next cell. An agreement
stops the steps by filling the last cell itself. A cell is filled once, by `dict.setdefault`, which
is one atomic operation with and without the GIL. So either a step has passed and the agreement
knows of it, or the step waits for the agreement. There is no third case.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .._errors import BarrierError
from .._store.worker import Promise

# A cell: the last step before it, and the next cell or the round that stops here.
_LAST, _NEXT = 0, 1
_NONE_PASSED = -1


class Agreement(NamedTuple):
    """The step that all ranks agreed on: the first that none of them has passed."""

    step: int
    rank: int
    reason: str


class Round:
    """One agreement, and the steps that wait for it.

    :ivar passed: the last step that had passed here when this round stopped them; -1 for none
    :ivar final: no round comes after it, and each call gets its error
    """

    def __init__(self, *, final: bool = False) -> None:
        self.final = final
        self.passed = _NONE_PASSED
        self.agreed: Promise[Agreement] = Promise()
        self.after: dict[int, Any] = {}

    def settle(self, agreement: Agreement | None = None, error: BarrierError | None = None) -> None:
        """Let the waiting steps go on; only the first call counts."""
        if not self.agreed.done():
            self.after[_LAST] = self.passed if agreement is None else agreement.step
            self.agreed.settle(agreement, error=error)


class Gate:
    """Steps pass here in one thread, and another thread stops them."""

    def __init__(self) -> None:
        self._cell: dict[int, Any] = {_LAST: _NONE_PASSED}

    def stops(self, step: int) -> Round | None:
        """Pass ``step``; or return the round that stops it."""
        cell = self._cell
        following = {_LAST: step}
        while (found := cell.setdefault(_NEXT, following)) is not following:
            if isinstance(found, Round):
                self._cell = cell
                return found
            # A signal handler raised before the last cell was noted below.
            cell = found
        self._cell = following
        return None

    def go_on(self, stopped: Round) -> None:
        """In the thread of the steps: let them pass behind a round that is settled."""
        self._cell = stopped.after

    def stop(self, stopping: Round) -> None:
        """From the other thread: let no step pass from now on, and learn which was the last."""
        # A cell that is no longer the last leads to the last.
        cell = self._cell
        while (found := cell.setdefault(_NEXT, stopping)) is not stopping:
            cell = found.after if isinstance(found, Round) else found
        stopping.passed = cell.get(_LAST, _NONE_PASSED)
