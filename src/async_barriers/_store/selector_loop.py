"""Sockets and timers without an event loop of somebody else's."""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
from typing import Any

from .event_loop import Callback, Timer

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class SelectorLoop:
    """What a selector finds ready is called, and what is due.

    :ivar due: when each timer and waiter is to ring; again and again until it is not in here
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._watched: dict[int, dict[int, Callback]] = {}
        self.due: dict[Any, float] = {}

    def watch_readable(self, sock: socket.socket, callback: Callback) -> None:
        self._watched.setdefault(sock.fileno(), {})[_READ] = callback
        self._register(sock.fileno())

    def watch_writable(self, sock: socket.socket, callback: Callback) -> None:
        self._watched.setdefault(sock.fileno(), {})[_WRITE] = callback
        self._register(sock.fileno())

    def unwatch_writable(self, sock: socket.socket) -> None:
        if self._watched.get(sock.fileno(), {}).pop(_WRITE, None) is not None:
            self._register(sock.fileno())

    def unwatch(self, sock: socket.socket) -> None:
        if self._watched.pop(sock.fileno(), None) is not None:
            self._register(sock.fileno())

    def _register(self, fd: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)
        if watched := self._watched.get(fd):
            self._selector.register(fd, sum(watched))

    def close(self) -> None:
        """End it, and free its resources."""
        self._watched.clear()
        self._selector.close()

    def call_at(self, when: float, callback: Callback) -> Timer:
        timer = _Timer(self, callback)
        self.due[timer] = when
        return timer

    def next_due(self) -> float:
        return min(self.due.values(), default=math.inf)

    def serve_due(self, now: float) -> None:
        """Call what is due, the earliest first."""
        for each, at in sorted(self.due.items(), key=lambda item: item[1]):
            if at <= now and each in self.due:
                each.ring()

    def serve_ready(self, secs: float) -> None:
        """Call those whose sockets are ready, or will be within so many seconds."""
        for key, events in self._selector.select(secs):
            for event in (_READ, _WRITE):
                # One that was called before it may have changed what is watched.
                callback = self._watched.get(key.fd, {}).get(event & events)
                if callback is not None:
                    self.call(callback)

    def call(self, callback: Callback) -> None:
        callback()


class _Timer:
    def __init__(self, loop: SelectorLoop, callback: Callback) -> None:
        self._loop = loop
        self._callback = callback

    def ring(self) -> None:
        self._loop.call(self._callback)
        self.cancel()

    def cancel(self) -> None:
        self._loop.due.pop(self, None)
