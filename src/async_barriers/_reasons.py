"""The reason of a break, as the peers of this rank get it."""

from __future__ import annotations

import anyio

from ._errors import leaves_of, told_by


def reason_of(exc: BaseException) -> str:
    """The reason in one line; describing a user's exception never fails."""
    # When a coroutine is thrown away, its event loop may be gone.
    if isinstance(exc, GeneratorExit):
        return "its coroutine or generator was thrown away (GeneratorExit)"
    return "its task was cancelled" if was_cancelled(exc) else f"it raised {told_by(exc)}"


def was_cancelled(exc: BaseException) -> bool:
    """Whether it is a cancellation, or a group of nothing else, as trio's nurseries raise."""
    try:
        cancelled = anyio.get_cancelled_exc_class()
    except Exception:  # No loop runs here.
        return False
    return all(isinstance(each, cancelled) for each in leaves_of(exc))
