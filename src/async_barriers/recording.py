"""Watching a run: the phases of barriers on a timeline, for Perfetto or chrome://tracing.

    recorder = Recorder()
    async with recorder.watch(StoreBarrier.from_env()) as barrier:
        ...
    recorder.save(f"barriers-{rank}.json")

    merge_traces(["barriers-0.json", "barriers-1.json"], "barriers.json")  # once, anywhere

Barriers that are not watched are not touched, and cost nothing.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar

from ._barrier import Barrier, Publish
from ._bodies import Body
from ._checks import CONFIGURED, Timeout, check_publish, given
from ._client.barrier import CrossingBarrier
from ._errors import BarrierError, told_by
from ._publish import is_async
from ._reasons import was_cancelled
from ._traces import DrawnBody, Event, read_events, write_events
from ._values import BarrierResult, BarrierStatistics, CommitRecord

__all__ = ["Recorder", "merge_traces"]

T = TypeVar("T")


class Recorder:
    """Records what the barriers that it watches do, with one track for each rank.

    Several barriers, event loops and threads may use it at once. Times are the machine's wall
    clock. If the clocks of two machines differ, their tracks are shifted by that.

    :param limit: keep only so many of the newest calls
    """

    def __init__(self, limit: int = 100_000) -> None:
        self._events: deque[Event] = deque(maxlen=limit)
        self._lock = Lock()
        self._rows: dict[int, set[int]] = {}
        self._recording = True
        # Wall clocks jump; the steps between events are those of the monotonic clock.
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    def watch(self, barrier: Barrier, *, rank: int | None = None) -> Barrier:
        """A barrier that does what ``barrier`` does, and is recorded; use it in its place.

        :param rank: whose track it is on; None for the barrier's own rank, or else RANK
        """
        if not isinstance(barrier, Barrier):
            raise TypeError(f"barrier must be a Barrier, not {barrier!r}")
        if rank is None and isinstance(barrier, CrossingBarrier):
            rank = barrier._session.rank
        if rank is None:
            rank = int(os.environ.get("RANK", "0"))
        return _Watched(self, barrier, rank)

    @property
    def events(self) -> list[Event]:
        """The recorded events in Chrome's trace format; they can be pickled."""
        return list(self._events)

    def merge(self, events: Iterable[Event]) -> None:
        """Add the `events` of another rank's recorder."""
        self._events.extend(events)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that opens in Perfetto and chrome://tracing. It blocks while it writes."""
        write_events(self._events, path)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Record nothing that ends from now on."""
        self._recording = False

    @contextmanager
    def _call(self, rank: int, call: str, name: str) -> Iterator[Event]:
        """Record what happens in the body, and how it ends; more facts may be added."""
        facts: Event = {"call": call}
        with self._row(rank) as row:
            began = time.perf_counter_ns()
            try:
                yield facts
            except BaseException as exc:
                facts.update(_facts_of(exc))
                raise
            finally:
                self._add(rank, row, f"{call} {name!r}", began, facts)

    @contextmanager
    def _row(self, rank: int) -> Iterator[int]:
        """A row of the rank's track without a call under way."""
        with self._lock:
            taken = self._rows.setdefault(rank, set())
            row = next(row for row in itertools.count() if row not in taken)
            taken.add(row)
        try:
            yield row
        finally:
            with self._lock:
                taken.discard(row)

    def _add(self, rank: int, row: int, title: str, began_ns: int, facts: Event) -> None:
        if self._recording:
            self._events.append(
                {
                    "name": title,
                    "cat": "barrier",
                    "ph": "X",
                    "ts": (self._epoch_ns + began_ns) / 1e3,
                    "dur": (time.perf_counter_ns() - began_ns) / 1e3,
                    "pid": rank,
                    "tid": row,
                    "args": facts,
                }
            )


def merge_traces(paths: Iterable[str | os.PathLike[str]], into: str | os.PathLike[str]) -> None:
    """Make one trace of the files that the ranks have saved. It blocks meanwhile.

    :raises OSError, ValueError: a file cannot be read, or is no trace
    """
    write_events([event for path in paths for event in read_events(path)], into)


def _facts_of(exc: BaseException) -> Event:
    if isinstance(exc, GeneratorExit):
        return {"verdict": "thrown away"}  # Its loop may be gone.
    if was_cancelled(exc):
        return {"verdict": "cancelled"}
    verdict = "broken"
    if getattr(exc, "in_doubt", False):
        verdict = "in doubt"
    elif not hasattr(exc, "sequence"):
        verdict = "error" if isinstance(exc, BarrierError) else "raised"
    facts = {"verdict": verdict, "error": told_by(exc)}
    if hasattr(exc, "sequence"):
        facts["sequence"] = exc.sequence
    return facts


class _Watched(Barrier):
    """A barrier, and the recorder of what it does; a `StepSignal` is one of the barrier itself."""

    def __init__(self, recorder: Recorder, barrier: Barrier, rank: int) -> None:
        self.barrier_type = barrier.barrier_type  # type: ignore[misc]  # as that one's
        self._recorder = recorder
        self._watches = self._barrier = barrier
        self._rank = rank

    async def execute_barrier(
        self,
        name: str = "",
        *,
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        stalled_after_secs: Timeout = CONFIGURED,
    ) -> BarrierResult:
        with self._recorder._call(self._rank, "execute_barrier", name) as facts:
            result = await self._barrier.execute_barrier(
                name, **given(step, stalled_after_secs), timeout_secs=timeout_secs
            )
            facts.update(verdict="released", sequence=result.sequence, last_rank=result.last_rank)
            facts["came_last"] = self._came_last(result.last_rank)
            return result

    async def connect(self) -> None:
        with self._recorder._call(self._rank, "connect", ""):
            await self._barrier.connect()

    async def commit(
        self,
        publish: Publish,
        *,
        payload: bytes = b"",
        name: str = "",
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        stalled_after_secs: Timeout = CONFIGURED,
        leader: int = 0,
    ) -> bytes:
        check_publish(publish)
        with self._recorder._call(self._rank, "commit", name) as facts:
            facts["leader"] = leader
            result = await self._barrier.commit(
                self._watched(publish, name),
                payload=payload,
                name=name,
                **given(step, stalled_after_secs),
                timeout_secs=timeout_secs,
                leader=leader,
            )
            facts.update(verdict="released", came_last=self._came_last())
            return result

    def _came_last(self, last_rank: int | None = None) -> bool:
        """Whether the others waited for this rank in the phase that it was just released from."""
        if isinstance(self._barrier, CrossingBarrier):
            # No other code has run since that was counted.
            return self._barrier._session.tally.came_last_just_now
        return last_rank == self._rank

    def _watched(self, publish: Publish, name: str) -> Publish:
        """Draw ``publish`` on a row of its own, beside the commit; a plain function stays one."""
        call: Any = publish
        record = self._recorder._call

        async def awaited(payloads: Mapping[int, bytes]) -> Any:
            with record(self._rank, "publish", name):
                return await call(payloads)

        def called(payloads: Mapping[int, bytes]) -> Any:
            with record(self._rank, "publish", name):
                return call(payloads)

        return awaited if is_async(publish) else called

    async def all_gather(
        self,
        payload: bytes,
        *,
        name: str = "",
        step: int | None = None,
        timeout_secs: Timeout = CONFIGURED,
        stalled_after_secs: Timeout = CONFIGURED,
    ) -> tuple[bytes, ...]:
        with self._recorder._call(self._rank, "all_gather", name) as facts:
            options = given(step, stalled_after_secs)
            gathered = await self._barrier.all_gather(
                payload, name=name, **options, timeout_secs=timeout_secs
            )
            facts.update(verdict="released", came_last=self._came_last())
            return gathered

    async def abort(self, reason: str, name: str = "", *, step: int | None = None) -> bool:
        with self._recorder._call(self._rank, "abort", name) as facts:
            # What is no string is refused below, and must not be kept.
            facts["reason"] = reason if isinstance(reason, str) else type(reason).__name__
            return await self._barrier.abort(reason, name, **given(step))

    def report(self, doing: str) -> None:
        self._barrier.report(doing)

    async def outcome(self, name: str, sequence: int) -> CommitRecord | None:
        return await self._barrier.outcome(name, sequence)

    def statistics(self) -> BarrierStatistics:
        return self._barrier.statistics()

    async def aclose(self) -> None:
        with self._recorder._call(self._rank, "aclose", ""):
            await self._barrier.aclose()

    async def _leave(self, reason: str) -> None:
        with self._recorder._call(self._rank, "aclose", "") as facts:
            facts["reason"] = reason
            await self._barrier._leave(reason)

    def _check_body(
        self,
        name: str,
        step: int | None,
        timeout_secs: Timeout,
        stalled_after_secs: Timeout,
        leader: int = 0,
    ) -> None:
        self._barrier._check_body(name, step, timeout_secs, stalled_after_secs, leader)

    def _body(self, body: Body[T], name: str) -> AbstractAsyncContextManager[T]:
        return DrawnBody(body, self._recorder._call(self._rank, "body", name))

    async def _fail(self, reason: str, name: str, step: int | None = None) -> None:
        with self._recorder._call(self._rank, "phase failed", name) as facts:
            facts["reason"] = reason
            await self._barrier._fail(reason, name, step)

    def _fail_soon(self, reason: str, name: str, step: int | None = None) -> None:
        self._barrier._fail_soon(reason, name, step)
