"""How peers are told what went wrong here."""

from __future__ import annotations

import anyio

from ._errors import told_by


def reason_of(exc: BaseException) -> str:
    """In one line; it never fails, whatever a user's exception does."""
    # Where a coroutine is thrown away, there may be no event loop any more.
    if isinstance(exc, GeneratorExit):
        return "its coroutine or generator was thrown away (GeneratorExit)"
    try:
        cancelled = isinstance(exc, anyio.get_cancelled_exc_class())
    except Exception:
        cancelled = False
    return "its task was cancelled" if cancelled else f"it raised {told_by(exc)}"
