"""A loop of the library's own, for the last work when no event loop runs any more."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from .event_loop import Callback, Waiter
from .selector_loop import SelectorLoop


class PrivateLoop(SelectorLoop):
    """A loop that blocks its thread, for the last work when there is no other loop."""

    ended = False

    def __init__(self) -> None:
        # It takes no descriptor.
        super().__init__(selectors.PollSelector())
        self._thread = threading.get_ident()
        self._posted: deque[Callback] = deque()
        self._ends: dict[Callback, None] = {}
        self._here, self._there = socket.socketpair()
        self._here.setblocking(False)
        self._there.setblocking(False)
        self.watch_readable(self._here, self._call_posted)

    @property
    def elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    now = staticmethod(time.monotonic)

    def here(self) -> bool:
        return False

    def post(self, callback: Callback) -> None:
        self._posted.append(callback)
        with contextlib.suppress(OSError):
            self._there.send(b"!")

    def _call_posted(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._here.recv(4096)
        while self._posted:
            self._posted.popleft()()

    def waiter(self) -> Waiter:
        raise NotImplementedError

    def at_end(self, callback: Callback) -> Callback:
        self._ends[callback] = None
        return lambda: self._ends.pop(callback, None)

    def run(self, done: Callable[[], bool], deadline: float) -> None:
        """Work until it is ``done``, or `time.monotonic` says ``deadline``."""
        while not done() and (now := time.monotonic()) < deadline:
            self.serve_due(now)
            if not done():
                self.serve_ready(max(0.0, min(deadline, self.next_due()) - time.monotonic()))

    def close(self) -> None:
        for callback in list(self._ends):
            callback()
        super().close()
        self._here.close()
        self._there.close()
