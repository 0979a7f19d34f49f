"""Who is missing, and is it alive: told apart with real processes, and by one rank for all."""

from __future__ import annotations

import math
import os
import pickle
import re
import socket
import time
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any

import anyio
import pytest
from processes import StartJob
from worlds import Tasks, World, crash

from async_barriers import BarrierProgress, BarrierTimeoutError, MissingRank
from async_barriers._missing import had_not_entered
from async_barriers._protocol.store import Append, Read
from async_barriers._store.connection import SocketConnection
from async_barriers._store.waiting import settled

pytestmark = pytest.mark.anyio


def told(error: dict[str, Any]) -> dict[int, MissingRank]:
    """What an error of a rank's process says of the missing ones."""
    return {each[0]: MissingRank(*each) for each in error["missing"]}


def test_states(start_job: StartJob) -> None:
    """Busy in an upload, stopped, killed, its loop blocked: each rank that waits is told, and says
    so in its error; a rank that never started is absent."""
    job = start_job(5, lanes=0, own_store=False, world_size=6, given={"warn_after_secs": 1.0})
    busy, stopped, killed, blocked = job.ranks[1:5]
    busy.do("report", doing="uploaded 3 of 8 GB\nand\x1b[31m more")
    stopped.strike(SIGSTOP)
    killed.strike(SIGKILL)
    blocked.start("here_block", secs=8.0)
    assert blocked.event() == {"event": "blocked"}
    error = job.ranks[0].start("cross", name="save", timeout_secs=1.5).error("BarrierTimeoutError")
    assert error["missing_ranks"] == [1, 2, 3, 4, 5]
    found = told(error)
    states = [found[rank].state for rank in range(1, 6)]
    assert states == ["alive", "silent", "silent", "silent", "absent"], error
    pids = [each.pid for each in (busy, stopped, killed, blocked)]
    assert [found[rank].pid for rank in range(1, 6)] == [*pids, None]
    assert {found[rank].host for rank in range(1, 5)} == {socket.gethostname()}
    assert found[1].doing == "uploaded 3 of 8 GB and [31m more"
    assert found[1].heard_secs_ago is not None
    assert 1.0 < found[1].heard_secs_ago < 6.0
    host = re.escape(socket.gethostname())
    for text in (error["text"], job.ranks[0].stderr):
        assert re.search(
            rf"1 \({host}, alive, 'uploaded 3 of 8 GB and \[31m more' [\d.]+ s ago\), "
            rf"2 \({host}, silent\), 3 \({host}, silent\), 4 \({host}, silent\), "
            r"5 \(never joined\)",
            text,
        ), text
    assert "barrier 'processes/save' #0" in error["text"]
    assert error["ended"] - error["began"] < 2.5
    stopped.signal(SIGCONT)


def test_told_apart_by_those_who_only_hear_of_it(start_job: StartJob) -> None:
    """A rank whose own deadline is far learns the same from the one that gave up; what is known of
    a silent rank is how long ago it was last heard of."""
    job = start_job(3, lanes=1, own_store=False)
    job.ranks[2].strike(SIGSTOP)
    patient = job.ranks[1].start("cross", name="save", timeout_secs=30)
    first = job.ranks[0].start("cross", name="save", timeout_secs=1.5).error("BarrierTimeoutError")
    second = patient.error("BarrierTimeoutError")
    assert first["missing"] == second["missing"]
    (rank,) = told(first).values()
    assert (rank.rank, rank.state, rank.pid) == (2, "silent", job.ranks[2].pid)
    assert rank.heard_secs_ago is not None
    assert 0.9 < rank.heard_secs_ago < 8
    assert re.search(r"2 \(.*, silent for [\d.]+ s\)", second["text"])
    job.ranks[2].signal(SIGCONT)


def test_left_in_good_order(start_job: StartJob) -> None:
    """A rank that closed its barrier is told from one that is lost, also by those that came after
    it had left."""
    job = start_job(3, lanes=1, own_store=False)
    job.ranks[2].do("close")
    job.ranks[1].strike(SIGKILL)
    job.come_back(1)
    wait = job.ranks[1].start("cross", name="save", timeout_secs=1.0)
    error = wait.error("BarrierTimeoutError")
    assert told(error)[2].state == "left", error
    assert re.search(r"2 \(.*, left\)", error["text"])


def test_not_back_yet_and_alive(start_job: StartJob) -> None:
    """A rank that is busy while a peer restarts has not joined again yet, but is there."""
    job = start_job(3, lanes=1, own_store=False)
    job.ranks[2].do("report", doing="uploading")
    job.ranks[1].strike(SIGKILL)
    job.come_back(1)
    error = job.ranks[1].start("cross", name="save", timeout_secs=1.0).error("BarrierTimeoutError")
    found = told(error)
    assert (found[2].state, found[2].doing) == ("alive", "uploading"), error
    assert job.ranks[0].start("cross", name="save", timeout_secs=0.5).error("BarrierTimeoutError")
    job.starts((0, 1, 2), name="again")
    for call in job.starts((0, 1, 2), name="and again"):
        call.released()


@pytest.mark.parametrize("waiting", ["asyncio", "trio"])
def test_stalled(start_job: StartJob, waiting: str) -> None:
    """An upload that reports is waited for; when it reports nothing new any more, the phase ends
    for all, not sooner than asked, nor much later."""
    stalled = 1.2
    given = {"timeout_secs": None, "stalled_after_secs": stalled}
    job = start_job(3, lanes=1, own_store=False, backends=[waiting], given=given)
    calls = job.starts((0, 1), name="save")
    began = time.monotonic()
    number = 0
    while time.monotonic() < began + 2 * stalled:
        number += 1
        job.ranks[2].do("report", doing=f"uploaded {number}")
        last = time.monotonic()
        assert not any(call.answered for call in calls)
        time.sleep(0.1)
    # The same again is no progress.
    for _ in range(5):
        job.ranks[2].do("report", doing=f"uploaded {number}")
        time.sleep(0.05)
    for call in calls:
        error = call.error("BarrierTimeoutError")
        assert stalled <= error["ended"] - last + 0.1 < stalled + 1.3, error
        assert error["timeout_secs"] == stalled
        assert error["missing_ranks"] == [2]
        assert told(error)[2].doing == f"uploaded {number}"
        assert "rank 2 made no progress" in error["text"]
    assert job.ranks[2].start("cross", name="save").error("BarrierTimeoutError")


@pytest.mark.parametrize("blow", ["SIGSTOP", "blocked"])
def test_stalled_and_silent(start_job: StartJob, blow: str) -> None:
    """A rank whose process or event loop stands still makes no progress, whatever it said."""
    given = {"timeout_secs": 60, "stalled_after_secs": 1.0}
    job = start_job(2, lanes=1, own_store=False, given=given)
    job.ranks[1].do("report", doing="uploaded all")
    if blow == "SIGSTOP":
        job.ranks[1].strike(SIGSTOP)
    else:
        job.ranks[1].start("here_block", secs=6.0)
        assert job.ranks[1].event() == {"event": "blocked"}
    error = job.ranks[0].start("cross", name="save").error("BarrierTimeoutError")
    assert 1.0 <= error["ended"] - error["began"] < 2.6
    assert told(error)[1].state == "silent"
    if blow == "SIGSTOP":
        job.ranks[1].signal(SIGCONT)


async def test_the_deadline_may_come_first(tcp: World) -> None:
    """Whichever is first ends the phase."""
    ranks = await tcp.barriers(2, stalled_after_secs=30)
    with pytest.raises(BarrierTimeoutError, match=r"timed out after 0\.3 s: rank 1 had not") as got:
        await ranks[0].execute_barrier("x", timeout_secs=0.3)
    (missing,) = got.value.missing
    assert missing.state == "alive"
    again = pickle.loads(pickle.dumps(got.value))
    assert again.missing == got.value.missing
    assert str(again) == str(got.value)


async def test_a_call_gives_its_own(tcp: World) -> None:
    """Every kind of call takes it, in the place of what the barrier was built with; None is any
    time; and what is no number of seconds is refused before anything is entered."""
    ranks = await tcp.barriers(2, lanes=5, timeout_secs=None)
    await tcp.barriers(2, prefix="built with", stalled_after_secs=0.3, timeout_secs=None)
    first, built_with = ranks[0], tcp.made[2]

    async def in_phase(**given: Any) -> None:
        async with first.phase(**given):
            pass

    def publish(payloads: Mapping[int, bytes]) -> None: ...

    async def committing(**given: Any) -> None:
        async with first.committing(publish, **given):
            pass

    calls: list[Any] = [
        first.execute_barrier,
        in_phase,
        partial(first.commit, publish),
        committing,
        partial(first.all_gather, b""),
    ]
    wrong: list[tuple[Any, type[Exception]]] = [(0, ValueError), ("1", TypeError)]
    for call in calls:
        for value, refused in wrong:
            with pytest.raises(refused, match="stalled_after_secs"):
                await call(name="wrong", stalled_after_secs=value)
    assert first._session.turns is not None
    assert first._session.turns.next["wrong"] == 0
    async with Tasks() as tasks:
        under_way = [
            tasks.start(partial(call, name=f"{number}", stalled_after_secs=0.5))
            for number, call in enumerate(calls)
        ]
        any_time = tasks.start(
            partial(built_with.execute_barrier, stalled_after_secs=None, timeout_secs=1.5)
        )
        for each in under_way:
            error = await each.raised(BarrierTimeoutError)
            assert (error.timeout_secs, error.missing_ranks) == (0.5, (1,))
            assert each.secs >= 0.5
            assert each.own_secs < 1.5
        assert (await any_time.raised(BarrierTimeoutError)).timeout_secs == 1.5


@pytest.mark.parametrize("timeout_secs", [0, 0.05, 0.15])
async def test_no_deadline_is_too_short_to_tell(tcp: World, timeout_secs: float) -> None:
    """Not even one of no time: whoever learns of it learns who is missing, and whether it lives."""
    ranks = await tcp.barriers(4)
    ranks[3].report("saving")
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x"))
        await tcp.entered(1, name="x")
        with pytest.raises(BarrierTimeoutError) as got:
            await ranks[0].execute_barrier("x", timeout_secs=timeout_secs)
        errors = [got.value, await waiting.raised(BarrierTimeoutError)]
    with pytest.raises(BarrierTimeoutError) as came_late:
        await ranks[2].execute_barrier("x")
    for error in (*errors, came_late.value):
        assert error.missing_ranks == (2, 3)
        told = [(each.rank, each.state, each.doing) for each in error.missing]
        assert told == [(2, "alive", None), (3, "alive", "saving")]


async def test_findings_are_forgotten_as_another_rank_asks(tcp: World) -> None:
    """Its question stays, or all that wait would ask in its place, each in turn."""
    ranks = await tcp.barriers(3)
    session, key = ranks[0]._session, tcp.membership().own.heard
    loop = session.running
    asking = session.start(session.presence.of((2,), 0.3))
    assert await settled(loop, asking, loop.now() + 5)
    assert 2 in asking.result()
    await tcp.call(tcp.innermost.set, key, "?another")
    await anyio.sleep(0.7)
    assert await tcp.read(key) == b"?another"


async def test_reports_that_were_missed_are_not_made_up_for(tcp: World) -> None:
    """After a stop, as by SIGSTOP or a debugger, a rank reports once, and then at its pace."""
    reported: list[BarrierProgress] = []
    ranks = await tcp.barriers(2, warn_after_secs=0.4, on_progress=reported.append)
    async with Tasks() as tasks:
        tasks.start(partial(ranks[0].execute_barrier, "x"))
        await tcp.entered(0, name="x")
        time.sleep(1.3)  # Nothing runs on this loop meanwhile.
        with anyio.fail_after(20):
            while len(reported) < 3:
                await anyio.sleep(0.01)
    waited = [each.waited_secs for each in reported[:3]]
    assert waited[0] >= 1.3
    assert all(later - before >= 0.4 for before, later in pairwise(waited)), waited


async def test_one_asks_for_all(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend_name: str
) -> None:
    """However many wait, and begin to in one instant, each missing rank is asked once, and none of
    the others sends more than a few reads; also where one does not answer."""
    many = 1024 if "EVERY_CASE" in os.environ else 256
    size = many if anyio_backend_name == "asyncio" else 64
    waiting, missing = size - 4, tuple(range(size - 4, size))
    sent: list[Any] = []
    call = SocketConnection.call

    def counted(self: SocketConnection, *requests: Any, wait: str | None = None) -> Any:
        sent.extend(requests)
        # The last one answers where nobody looks.
        mute = f"[{size - 1},".encode()
        requests = tuple(
            each._replace(key="nowhere")
            if isinstance(each, Append) and "/answer/" in each.key and each.value.startswith(mute)
            else each
            for each in requests
        )
        return call(self, *requests, wait=wait)

    reported: list[BarrierProgress] = []
    warn_secs = 1.5
    ranks = await tcp.barriers(
        size, warn_after_secs=warn_secs, on_progress=reported.append, timeout_secs=60
    )
    try:
        async with Tasks() as tasks:
            for rank in ranks[:waiting]:
                tasks.start(partial(rank.execute_barrier, "x"))
            await tcp.entered(*range(waiting), name="x")
            own = tcp.membership().own
            due = anyio.current_time() + warn_secs
            with monkeypatch.context() as patched, anyio.fail_after(20):
                patched.setattr(SocketConnection, "call", counted)
                while anyio.current_time() < due:
                    pass  # So that all find at once that they are to report.
                while len(reported) < waiting:
                    await anyio.sleep(0.01)
                took_secs = anyio.current_time() - due
    finally:
        # To close so many takes longer than a test may.
        for rank in ranks:
            crash(rank)
    asked = [each.key for each in sent if isinstance(each, Append) and "/asked/" in each.key]
    assert set(asked) == {own.asked(rank) for rank in missing}
    # What one rank finds serves the others for half a second; a slow machine takes longer.
    assert len(asked) <= len(missing) * (1 + math.floor(took_secs / 0.5))
    assert sum(isinstance(each, Read) for each in sent) < 9 * waiting
    states = ["alive", "alive", "alive", "silent"]
    for each in reported[:waiting]:
        assert each.missing_ranks == missing
        assert [rank.state for rank in each.missing] == states


async def test_report_costs_nothing(tcp: World) -> None:
    """A thousand in a moment, from another thread, and none is sent; what is no text is refused."""
    ranks = await tcp.barriers(2)

    def say() -> float:
        began = time.perf_counter()
        for number in range(1000):
            ranks[1].report(f"uploaded {number}" + "x" * 5000)
        return time.perf_counter() - began

    assert await tcp.call(say) < 0.2
    with pytest.raises(TypeError, match="doing must be a string, not int"):
        ranks[1].report(3)  # type: ignore[arg-type]
    with pytest.raises(BarrierTimeoutError) as got:
        await ranks[0].execute_barrier(timeout_secs=0.4)
    doing = got.value.missing[0].doing
    assert doing is not None
    assert doing.startswith("uploaded 999xxx")
    assert len(doing) == 200


def test_a_subgroup_s_ranks_are_told_with_those_of_the_job() -> None:
    """And what is silent, gone or never came, as the specification words it."""
    missing = (
        MissingRank(1, "node7", 4, "alive", "uploaded 3 of 8 GB", 2.04),
        MissingRank(2, "node9", 5, "silent", None, 27.8),
        MissingRank(3, None, None, "absent"),
    )
    assert had_not_entered((1, 2, 3), missing, (0, 4, 5, 7)).startswith(
        "ranks 1, 2, 3 had not entered: 1 (global rank 4, node7, alive, 'uploaded 3 of 8 GB' 2 s "
        "ago), 2 (global rank 5, node9, silent for 28 s), 3 (global rank 7, never joined); look"
    )
