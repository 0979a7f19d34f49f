"""The recorder: what it keeps of each call, and the file that it writes."""

from __future__ import annotations

import json
import pickle
import time
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from worlds import Tasks, gather, until

from async_barriers import (
    Barrier,
    BarrierClosedError,
    BarrierTimeoutError,
    BrokenBarrierError,
    DistBarrier,
    StepSignal,
)
from async_barriers.recording import Recorder, merge_traces
from async_barriers.testing import local_barriers

pytestmark = pytest.mark.anyio


async def publish(payloads: Any) -> bytes:
    await anyio.sleep(0.01)
    return b"published"


def calls(recorder: Recorder, rank: int) -> list[tuple[str, str | None]]:
    """What rank did, in the order in which it ended, and the verdicts."""
    return [
        (event["name"], event["args"].get("verdict"))
        for event in recorder.events
        if event["pid"] == rank
    ]


async def test_what_happened_is_on_the_ranks_tracks() -> None:
    """Each call is one event with its verdict; what it returned and raised is unchanged."""
    began = time.time()
    recorder = Recorder()
    async with local_barriers(2) as barriers:
        ranks = [recorder.watch(barrier) for barrier in barriers]
        assert ranks[0].barrier_type == "store"
        await gather(rank.connect for rank in ranks)
        results = await gather(rank.execute_barrier for rank in ranks)
        assert (
            await gather(partial(rank.commit, publish, name="c") for rank in ranks)
            == [b"published"] * 2
        )
        with pytest.raises(TypeError, match="name must be a string"):
            ranks[0].phase(7)  # type: ignore[arg-type]
        with pytest.raises(BarrierTimeoutError):
            async with ranks[0].phase("p", timeout_secs=0.1):
                pass
        with pytest.raises(LookupError, match="mine"):
            async with ranks[1].phase("q"):
                raise LookupError("mine")
        with pytest.raises(BrokenBarrierError):
            await ranks[0].execute_barrier("q")
        await ranks[1].abort("enough", "r")
        async with Tasks() as tasks:
            cancelled = tasks.start(partial(ranks[0].execute_barrier, "s"))
            await anyio.sleep(0.01)
            cancelled.scope.cancel()
            await cancelled.ended.wait()
        await gather(rank.aclose for rank in ranks)
        with pytest.raises(BarrierClosedError):
            await ranks[1].execute_barrier()
    assert calls(recorder, 0) == [
        ("connect ''", None),
        ("execute_barrier ''", "released"),
        ("publish 'c'", None),
        ("commit 'c'", "released"),
        ("body 'p'", "succeeded"),
        ("execute_barrier 'p'", "broken"),
        ("execute_barrier 'q'", "broken"),
        ("execute_barrier 's'", "cancelled"),
        ("aclose ''", None),
    ]
    assert calls(recorder, 1) == [
        ("connect ''", None),
        ("execute_barrier ''", "released"),
        ("commit 'c'", "released"),
        ("body 'q'", "raised"),
        ("phase failed 'q'", None),
        ("abort 'r'", None),
        ("aclose ''", None),
        ("execute_barrier ''", "error"),
    ]
    events = [event for event in recorder.events if event["pid"] == 0]
    assert events[1]["args"] == {
        "call": "execute_barrier",
        "verdict": "released",
        "sequence": 0,
        "last_rank": results[0].last_rank,
        "came_last": events[1]["args"]["came_last"],
    }
    assert events[5]["args"]["sequence"] == 0
    assert "BarrierTimeoutError" in events[5]["args"]["error"]
    assert 0.1e6 <= events[5]["dur"] < 1e6
    # Microseconds of the wall clock, to a second.
    assert all(began - 1 < event["ts"] / 1e6 < time.time() + 1 for event in events)
    # The leader's publish is within its commit, on another row.
    assert events[2]["tid"] != events[3]["tid"]
    assert events[3]["ts"] <= events[2]["ts"]


async def inside(body: AbstractAsyncContextManager[object]) -> None:
    async with body:
        pass


async def test_what_is_given_and_asked_goes_through() -> None:
    """A call's own bound for ranks without progress, statistics, and what became of a commit."""
    async with local_barriers(2, timeout_secs=None) as barriers:
        first, second = (Recorder().watch(barrier) for barrier in barriers)
        bound: Any = {"stalled_after_secs": 0.2}
        calls: list[Any] = [
            partial(first.execute_barrier, **bound),
            partial(inside, first.phase(**bound)),
            partial(first.commit, publish, **bound),
            partial(inside, first.committing(publish, **bound)),
            partial(first.all_gather, b"", **bound),
        ]
        for call in calls:
            with pytest.raises(BarrierTimeoutError, match="no progress"):
                await call()
        commits = [partial(rank.commit, publish, name="c", step=5) for rank in (first, second)]
        await gather(commits)
        record = await second.outcome("c", 5)
        assert record is not None
        assert record.result == b"published"
        assert (first.statistics().released, first.statistics().broken) == (1, 5)


async def test_calls_at_once_are_on_rows_of_their_own() -> None:
    """Phases that overlap on one rank hide no part of each other; rows are used again."""
    recorder = Recorder()
    async with local_barriers(2) as barriers, Tasks() as tasks:
        first, second = (recorder.watch(barrier) for barrier in barriers)
        waiting = [tasks.start(partial(first.execute_barrier, name)) for name in "ab"]

        async def both_wait() -> bool:
            return len(recorder._rows.get(0, ())) == 2

        await until(both_wait)
        for name in "ab":
            await second.execute_barrier(name)
        for outcome in waiting:
            await outcome.returned()
        await gather([first.execute_barrier, second.execute_barrier])
    rows = {event["name"]: event["tid"] for event in recorder.events if event["pid"] == 0}
    # Which of the two tasks was the first is the event loop's choice.
    assert {rows["execute_barrier 'a'"], rows["execute_barrier 'b'"]} == {0, 1}
    assert rows["execute_barrier ''"] == 0


class Doubtful(Barrier):
    """Fails as a barrier does that lost its store, or as one that has an error in it."""

    barrier_type = "doubtful"

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def execute_barrier(self, name: str = "", **options: Any) -> Any:
        raise self.error


async def test_doubts_and_other_errors() -> None:
    """What is in doubt is no broken phase, and neither is an error that is not ours."""
    for error, verdict in (
        (BrokenBarrierError("x", 3, None, "lost", in_doubt=True), "in doubt"),
        (KeyError("bug"), "raised"),
    ):
        recorder = Recorder()
        with pytest.raises(type(error)):
            await recorder.watch(Doubtful(error)).execute_barrier("x")
        assert calls(recorder, 0) == [("execute_barrier 'x'", verdict)]


async def test_bodies_and_who_came_last(tmp_path: Path) -> None:
    """A body is a bar in front of its crossing; who was waited for has a mark; rows have names."""
    recorder = Recorder()
    async with local_barriers(2) as barriers:
        ranks = [recorder.watch(barrier) for barrier in barriers]

        async def work(rank: int) -> None:
            async with ranks[rank].phase("p", step=1):
                await anyio.sleep(0.05 * rank)
            async with ranks[rank].committing(publish, name="c", step=1) as part:
                await anyio.sleep(0.05 * (1 - rank))
                part.payload = b"x"
            assert part.result == b"published"
            await anyio.sleep(0.03 * rank)
            await ranks[rank].all_gather(b"x", name="g", step=1)

        await gather(partial(work, rank) for rank in range(2))

        async def is_closed() -> Any:
            async with ranks[0].phase("thrown away", step=1):
                yield

        generator = is_closed()
        await anext(generator)
        await generator.aclose()
    last = {
        (event["name"], event["pid"]) for event in recorder.events if event["args"].get("came_last")
    }
    assert last == {("execute_barrier 'p'", 1), ("commit 'c'", 0), ("all_gather 'g'", 1)}
    bodies = [event for event in recorder.events if event["args"]["call"] == "body"]
    assert [event["args"]["verdict"] for event in bodies] == ["succeeded"] * 4 + ["thrown away"]
    (slow,) = (body for body in bodies if body["name"] == "body 'p'" and body["pid"] == 1)
    assert slow["dur"] >= 0.05e6

    await anyio.to_thread.run_sync(recorder.save, tmp_path / "one.json")
    await anyio.to_thread.run_sync(merge_traces, [tmp_path / "one.json"], tmp_path / "all.json")
    trace = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    marks = {(event["name"], event["pid"]) for event in trace if event["ph"] == "i"}
    assert marks == {(f"last to enter: {name}", rank) for name, rank in last}
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace
        if event["name"] == "thread_name"
    }
    drawn = {(event["pid"], event["tid"]) for event in trace if event["ph"] == "X"}
    assert threads == {(rank, row): f"calls {row + 1}" for rank, row in drawn}


async def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's file can be opened alone, and all of them can be made one."""
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        with Recorder(limit=2) as recorder:
            barrier = recorder.watch(DistBarrier())
            for _ in range(3):
                await barrier.aclose()
        recorded = recorder.events
        assert len(recorded) == 2
        await barrier.aclose()  # recorded no more
        assert recorder.events == recorded
        await anyio.to_thread.run_sync(recorder.save, tmp_path / f"{rank}.json")
    both = [tmp_path / "1.json", tmp_path / "0.json"]
    await anyio.to_thread.run_sync(merge_traces, both, tmp_path / "all.json")
    trace = json.loads((tmp_path / "all.json").read_text())
    assert trace["displayTimeUnit"] == "ms"
    named = {
        e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"
    }
    assert named == {0: "rank 0", 1: "rank 1"}
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [event["pid"] for event in events] == [0, 0, 1, 1]
    assert all({"name", "ts", "dur", "tid", "args"} <= event.keys() for event in events)

    # What ranks send to each other instead of files.
    whole = Recorder()
    whole.merge(pickle.loads(pickle.dumps(recorder.events)))
    assert whole.events == recorder.events
    await anyio.to_thread.run_sync(whole.save, tmp_path / "whole.json")
    assert (tmp_path / "whole.json").read_text() == (tmp_path / "0.json").read_text()


class Indescribable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


async def test_a_body_that_fails_is_told_whatever_its_exception() -> None:
    """The exception goes on, and peers learn it as they do without a recorder."""
    recorder = Recorder()
    async with local_barriers(2, timeout_secs=10) as barriers, Tasks() as tasks:
        watched = recorder.watch(barriers[0])
        with pytest.raises(Indescribable):
            async with watched.phase("x", step=1):
                raise Indescribable
        peer = tasks.start(partial(barriers[1].execute_barrier, "x", step=1))
        assert "Indescribable" in (await peer.raised(BrokenBarrierError)).reason


async def test_a_signal_of_a_watched_barrier() -> None:
    """It is one of the barrier that is watched, also by two."""
    async with local_barriers(1, timeout_secs=10) as (barrier,):
        stop = StepSignal(Recorder().watch(Recorder().watch(barrier)))
        stop.send("enough")
        step = 0
        with anyio.fail_after(10):
            while not await stop.reached(step):
                step += 1
                await anyio.sleep(0.001)
        assert (stop.step, stop.reason) == (step, "enough")
    with pytest.raises(TypeError, match="must be a Barrier"):
        Recorder().watch("barrier")  # type: ignore[arg-type]


@pytest.mark.parametrize("events", [None, 3, [3], [{}], [{"ph": "X"}]])
async def test_a_file_that_is_no_trace(events: Any, tmp_path: Path) -> None:
    """Merging says so, and writes nothing."""
    await anyio.to_thread.run_sync(merge_what_is_no_trace, events, tmp_path)


def merge_what_is_no_trace(events: Any, tmp_path: Path) -> None:
    path = tmp_path / "barriers-0.json"
    path.write_text(json.dumps({"traceEvents": events} if events else []))
    with pytest.raises(ValueError, match=r"barriers-0\.json is no trace"):
        merge_traces([path], tmp_path / "merged.json")
    assert not (tmp_path / "merged.json").exists()
