"""The last text that this rank gave to `report`; kept until a peer asks."""

from __future__ import annotations

import time

from .._protocol.presence import Answer

# What is shown of it is less; cleaning it can wait until it is shown.
_KEPT_CHARS = 1000


class Said:
    """Written by any thread, and read by the event loop's: one attribute, in one step."""

    def __init__(self) -> None:
        # The text, when it was said, and since when it has been the same.
        self._latest: tuple[str, float, float] | None = None

    def say(self, doing: str) -> None:
        """Keep it, in the place of what was said before."""
        if not isinstance(doing, str):
            raise TypeError(f"doing must be a string, not {type(doing).__name__}")
        text, now, before = doing[:_KEPT_CHARS], time.monotonic(), self._latest
        since = now if before is None or before[0] != text else before[2]
        self._latest = text, now, since

    @property
    def answer(self) -> Answer:
        """What there is to say to whoever asks."""
        if (latest := self._latest) is None:
            return Answer()
        text, said_at, since = latest
        now = time.monotonic()
        return Answer(text, round(now - said_at, 3), round(now - since, 3))
