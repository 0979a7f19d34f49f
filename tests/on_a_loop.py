"""What is done on an event loop, step by step: on one that blocks the test until it is done."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from torch.distributed import Store, TCPStore

from async_barriers._store import connecting
from async_barriers._store.connection import SocketConnection
from async_barriers._store.future import Effort, Future
from async_barriers._store.private_loop import PrivateLoop
from async_barriers._store.sources import Connection, PassedIn

T = TypeVar("T")
WITHIN_SECS = 10.0


class OnALoop:
    """Connections to one store, and what they are asked."""

    def __init__(self, loop: PrivateLoop, store: Store) -> None:
        self.loop = loop
        self.store = store
        self.made: list[Connection] = []

    def connect(self) -> SocketConnection:
        """A connection of our own to a TCPStore."""
        assert isinstance(self.store, TCPStore)
        until = self.loop.now() + WITHIN_SECS
        host, port = self.store.host, self.store.port
        made = self.run(connecting.connect(self.loop, host, port, until))
        self.made.append(made)
        return made

    def open(self, *, worker_threads: bool = False) -> Connection:
        """A connection of the kind that a barrier has."""
        source = PassedIn(self.store, worker_threads)
        made = self.run(source.open(self.loop, self.loop.now() + WITHIN_SECS))
        self.made.append(made)
        return made

    def run(self, coroutine: Coroutine[Any, None, T], secs: float = WITHIN_SECS) -> T:
        """What a coroutine that awaits our Futures returns, or raises."""
        return self.answer(Effort(coroutine), secs)

    def answer(self, future: Future[T], secs: float = WITHIN_SECS) -> T:
        """What a Future comes to.

        :raises TimeoutError: nothing yet
        """
        self.loop.run(lambda: future.done, time.monotonic() + secs)
        if not future.done:
            raise TimeoutError(f"nothing came within {secs} s")
        return future.result()

    def until(self, condition: Any, secs: float = WITHIN_SECS) -> None:
        """Work until it holds, also of what no callback tells."""
        deadline = time.monotonic() + secs
        while not condition():
            assert time.monotonic() < deadline
            self.loop.run(condition, time.monotonic() + 0.01)

    def close(self) -> None:
        for made in self.made:
            made.close()
