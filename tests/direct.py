"""The protocol's coroutines, step by step: over a store that answers before a call returns."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from torch.distributed import Store

from async_barriers._protocol.store import SILENT, Request
from async_barriers._store.blocking_store import BlockingStore
from async_barriers._store.future import Effort, Future

T = TypeVar("T")


class DirectStore:
    """As a connection whose answers are there at once; blocks."""

    def __init__(self, store: Store, *, waits: bool = True) -> None:
        self.blocking = BlockingStore(store)
        self.waits = waits

    def call(self, *requests: Request, wait: str | None = None) -> Future[list[Any]]:
        answered: Future[list[Any]] = Future()
        answers = [(request, self.blocking.do(request)) for request in requests]
        answered.resolve([a for request, a in answers if not isinstance(request, SILENT)])
        return answered

    def close(self) -> None:
        self.blocking.close()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """What it returns, or raises; it has nothing to wait for."""
    effort = Effort(coroutine)
    assert effort.done, "it waits for something else than a store"
    return effort.result()
