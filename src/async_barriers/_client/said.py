"""The last text that this rank gave to `report`; kept until a peer asks."""

from __future__ import annotations

import time

from .._protocol.presence import Answer

# Longer than the part that is shown; the text is cleaned when it is shown.
_KEPT_CHARS = 1000


class Said:
    """Written by any thread, and read by the event loop's: one attribute, in one step."""

    def __init__(self) -> None:
        # The text, the time it was said, and the time since when it is the same.
        self._latest: tuple[str, float, float] | None = None

    def say(self, doing: str) -> None:
        """Keep it in place of the text before."""
        if not isinstance(doing, str):
            raise TypeError(f"doing must be a string, not {type(doing).__name__}")
        text, now, before = doing[:_KEPT_CHARS], time.monotonic(), self._latest
        since = now if before is None or before[0] != text else before[2]
        self._latest = text, now, since

    @property
    def answer(self) -> Answer:
        """The answer to a rank that asks."""
        if (latest := self._latest) is None:
            return Answer()
        text, said_at, since = latest
        now = time.monotonic()
        return Answer(text, round(now - said_at, 3), round(now - since, 3))
