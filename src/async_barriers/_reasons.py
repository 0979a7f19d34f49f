"""The reason of a break, as the peers of this rank get it."""

from __future__ import annotations

import anyio

from ._errors import told_by


def reason_of(exc: BaseException) -> str:
    """The reason in one line; describing a user's exception never fails."""
    # When a coroutine is thrown away, its event loop may be gone.
    if isinstance(exc, GeneratorExit):
        return "its coroutine or generator was thrown away (GeneratorExit)"
    try:
        cancelled = isinstance(exc, anyio.get_cancelled_exc_class())
    except Exception:
        cancelled = False
    return "its task was cancelled" if cancelled else f"it raised {told_by(exc)}"
