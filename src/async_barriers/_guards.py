"""Bodies that are to cross a phase, on the thread that they run on, and whether they have."""

from __future__ import annotations

import threading
import weakref


class Guarded:
    """The phase that a body is to cross, and whether it has."""

    crossed = False

    def __init__(self, name: str, step: int | None) -> None:
        self.name = name
        self.step = step


class Guards:
    """The guarded bodies of each thread; each is removed when its body ends."""

    def __init__(self) -> None:
        self._here = threading.local()

    def add(self, name: str, step: int | None) -> Guarded:
        """A body begins, on this thread."""
        guarded = Guarded(name, step)
        self._of_this_thread.add(guarded)
        return guarded

    def take_turn(self, name: str, step: int | None) -> None:
        """A call crosses, or tries to, on this thread."""
        for guarded in self._of_this_thread:
            if (guarded.name, guarded.step) == (name, step):
                guarded.crossed = True

    @property
    def _of_this_thread(self) -> weakref.WeakSet[Guarded]:
        guards: weakref.WeakSet[Guarded]
        guards = self._here.__dict__.setdefault("guards", weakref.WeakSet())
        return guards
