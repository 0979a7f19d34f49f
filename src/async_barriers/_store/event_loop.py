"""The use of an event loop: sockets that are ready, timers, and waiting."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

Callback = Callable[[], object]


class Timer(Protocol):
    """Something that will be called, unless it is cancelled."""

    def cancel(self) -> object: ...


class Waiter(Protocol):
    """A task that waits to be woken; for one task at a time."""

    def wake(self) -> None:
        """On the loop: make `wait` return, now or when it is called next."""
        ...

    async def wait(self, until: float) -> None:
        """Wait until it is woken, or until the loop's clock reaches ``until``."""
        ...


class Loop(Protocol):
    """An event loop. Only `post` may be called from other threads."""

    @property
    def ended(self) -> bool: ...

    @property
    def elsewhere(self) -> bool:
        """Whether another thread than this one runs it."""
        ...

    def now(self) -> float: ...
    def here(self) -> bool: ...
    def watch_readable(self, sock: socket.socket, callback: Callback) -> None: ...
    def watch_writable(self, sock: socket.socket, callback: Callback) -> None: ...
    def unwatch_writable(self, sock: socket.socket) -> None: ...
    def unwatch(self, sock: socket.socket) -> None: ...
    def call_at(self, when: float, callback: Callback) -> Timer: ...
    def post(self, callback: Callback) -> None:
        """Call ``callback`` soon; if it raises, call it once more."""
        ...

    def waiter(self) -> Waiter: ...
    def at_end(self, callback: Callback) -> Callback:
        """Call ``callback`` when the loop ends; the result takes that back."""
        ...
