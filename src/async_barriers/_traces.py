"""The drawings of a recorder: files in Chrome's trace format, and bodies as calls."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Event = dict[str, Any]

# Events that a merge draws again: names of tracks, and marks.
_DRAWN = ("M", "i")


def read_events(path: str | os.PathLike[str]) -> list[Event]:
    """Read the events of a recorder's file; blocks.

    :raises OSError, ValueError: it cannot be read, or is no trace
    """
    with open(path, encoding="utf-8") as file:
        trace = json.load(file)
    try:
        events = [event for event in trace["traceEvents"] if event["ph"] not in _DRAWN]
        for event in events:
            _ = event["ts"] + event["pid"] + event["tid"], event["name"], event["cat"]
            event["args"].get("came_last")
    except (AttributeError, KeyError, TypeError) as exc:
        raise ValueError(f"{os.fspath(path)} is no trace of a recorder") from exc
    return events


def write_events(events: Iterable[Event], path: str | os.PathLike[str]) -> None:
    """Write a file that opens in Perfetto and chrome://tracing; blocks."""
    events = sorted(events, key=lambda event: (event["pid"], event["ts"]))
    drawn: list[Event] = []
    for rank in sorted({event["pid"] for event in events}):
        drawn.append(_named("process_name", rank, 0, name=f"rank {rank}"))
        drawn.append(_named("process_sort_index", rank, 0, sort_index=rank))
    for rank, row in sorted({(event["pid"], event["tid"]) for event in events}):
        drawn.append(_named("thread_name", rank, row, name=f"calls {row + 1}"))
        drawn.append(_named("thread_sort_index", rank, row, sort_index=row))
    marks = [_mark(event) for event in events if event["args"].get("came_last")]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": drawn + events + marks, "displayTimeUnit": "ms"}, file)


def _named(what: str, rank: int, row: int, **value: object) -> Event:
    return {"name": what, "ph": "M", "pid": rank, "tid": row, "args": value}


def _mark(event: Event) -> Event:
    """Mark where the rank entered that all others waited for."""
    at = {key: event[key] for key in ("cat", "ts", "pid", "tid")}
    return {**at, "name": f"last to enter: {event['name']}", "ph": "i", "s": "t", "args": {}}


class DrawnBody(AbstractAsyncContextManager[T], Generic[T]):
    """The body of `phase` or `committing`, drawn as a call is."""

    def __init__(
        self, body: AbstractAsyncContextManager[T], drawn: AbstractContextManager[Event]
    ) -> None:
        self._body = body
        self._drawn = drawn
        self._facts: Event = {}

    async def __aenter__(self) -> T:
        value = await self._body.__aenter__()
        self._facts = self._drawn.__enter__()
        return value

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if exc is None:
            self._facts["verdict"] = "succeeded"
        self._drawn.__exit__(exc_type, exc, traceback)
        return await self._body.__aexit__(exc_type, exc, traceback)
