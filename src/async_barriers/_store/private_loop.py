"""A loop of the library's own, for the last work when no event loop runs any more."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import select
import socket
import time
from collections import deque
from collections.abc import Callable

from .event_loop import Callback, Waiter


class _PrivateTimer:
    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None


class PrivateLoop:
    """A loop that blocks its thread, for the last work when there is no other loop."""

    ended = elsewhere = False
    lets_go = True

    def __init__(self) -> None:
        self._poll = select.poll()
        self._sockets: dict[int, dict[str, Callback]] = {}
        self._timers: list[tuple[float, int, _PrivateTimer]] = []
        self._numbers = itertools.count()
        self._posted: deque[Callback] = deque()
        self._ends: dict[Callback, None] = {}
        self._here, self._there = socket.socketpair()
        self._here.setblocking(False)
        self._there.setblocking(False)
        self._poll.register(self._here, select.POLLIN)

    now = staticmethod(time.monotonic)

    def here(self) -> bool:
        return False

    def watch_readable(self, sock: socket.socket, callback: Callback) -> None:
        self._watch(sock, "read", callback)

    def watch_writable(self, sock: socket.socket, callback: Callback) -> None:
        self._watch(sock, "write", callback)

    def _watch(self, sock: socket.socket, what: str, callback: Callback) -> None:
        self._sockets.setdefault(sock.fileno(), {})[what] = callback
        self._register(sock.fileno())

    def _register(self, fd: int) -> None:
        flags = {"read": select.POLLIN, "write": select.POLLOUT}
        self._poll.register(fd, sum(flags[what] for what in self._sockets[fd]))

    def unwatch_writable(self, sock: socket.socket) -> None:
        if self._sockets.get(sock.fileno(), {}).pop("write", None) is not None:
            self._register(sock.fileno())

    def unwatch(self, sock: socket.socket) -> None:
        if self._sockets.pop(sock.fileno(), None) is not None:
            self._poll.unregister(sock.fileno())

    def call_at(self, when: float, callback: Callback) -> _PrivateTimer:
        timer = _PrivateTimer(callback)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def post(self, callback: Callback) -> None:
        self._posted.append(callback)
        with contextlib.suppress(OSError):
            self._there.send(b"!")

    def waiter(self) -> Waiter:
        raise NotImplementedError

    def at_end(self, callback: Callback) -> Callback:
        self._ends[callback] = None
        return lambda: self._ends.pop(callback, None)

    def run(self, done: Callable[[], bool], deadline: float) -> None:
        """Work until it is ``done``, or `time.monotonic` says ``deadline``."""
        while not done() and (now := time.monotonic()) < deadline:
            while self._timers and self._timers[0][0] <= now:
                timer = heapq.heappop(self._timers)[2]
                if timer.callback is not None:
                    timer.callback()
            if done():
                return
            until = min(deadline, self._timers[0][0] if self._timers else deadline)
            for fd, _ in self._poll.poll(max(0.0, until - time.monotonic()) * 1000):
                if fd == self._here.fileno():
                    self._here.recv(4096)
                for callback in list(self._sockets.get(fd, {}).values()):
                    callback()
            while self._posted:
                self._posted.popleft()()

    def close(self) -> None:
        """End it, and free its resources."""
        for callback in list(self._ends):
            callback()
        self._here.close()
        self._there.close()
