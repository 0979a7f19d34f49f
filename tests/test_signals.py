"""Exceptions that a signal handler throws, at any line of ours, in whatever a rank is doing.

A call is made again and again, each time by a barrier of its own, and struck at one line after
another that it runs through in this thread: by default at some fifteen of them, with
``ASYNC_BARRIERS_SWEEP=lines`` at every one, and with ``instructions`` at every instruction.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import pytest
import trio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from processes import until
from reports import attempt, job, one, serve
from torch.distributed import Store
from worlds import Tasks, gather, library_threads

import async_barriers
from async_barriers import BarrierError, BrokenBarrierError, StoreBarrier
from async_barriers._client.crossing import Crossing
from async_barriers._client.joining import Joining
from async_barriers._client.phases import Phase, Turns
from async_barriers._protocol import breaking as breaks
from async_barriers._protocol import count as counts
from async_barriers._protocol import phase as phases
from async_barriers._protocol.store import Append
from async_barriers._store.asyncio_loop import AsyncioLoop, AsyncioWaiter
from async_barriers._store.connection import SocketConnection
from async_barriers._store.trio_loop import TrioWaiter

OURS = str(Path(async_barriers.__file__).parent)
TRIOS = str(Path(trio.__file__).parent)
SWEEP = os.environ.get("ASYNC_BARRIERS_SWEEP", "")
EVENT = "opcode" if SWEEP == "instructions" else "line"
POINTS = 8
WAITS = {AsyncioWaiter.wait.__code__, TrioWaiter.wait.__code__, Crossing.decided.__code__}
DEADLINE_SECS = 2.0
# How long the peer waits for a rank that may have been struck before it entered, and either of
# the two for the other, afterwards.
PEER_SECS = 0.3
AGAIN_SECS = 0.6
GIVES_UP_SECS = 0.05
HANGS_SECS = 8.0

pytestmark = [
    pytest.mark.bound(3600 if SWEEP else 90),
    # What is struck while it is collected, or before it was begun, can only be reported.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]


class Struck(Exception):
    """What the handler throws."""


def of_ours(frame: FrameType) -> bool:
    # What calls back as threads end raises nowhere.
    return frame.f_code.co_filename.startswith(OURS) and frame.f_code.co_name != "_forget"


def at_our_word(frame: FrameType) -> bool:
    """Whether trio does something because we asked. Its queues are as open to a handler in any
    program, and so are the beginning and the wait of a task, of which we have one."""
    caller, code = frame.f_back, frame.f_code
    if caller is None or not code.co_filename.startswith(TRIOS):
        return False
    if code.co_name in ("reschedule", "run_sync_soon"):
        return False
    if caller.f_code.co_name in ("__init__", "_serve_until_due"):
        return False
    return of_ours(caller) or at_our_word(caller)


class Strike:
    """Raises `Struck` once, at the n-th line of such functions that the thread runs in its
    block."""

    def __init__(self, at: int, strikes: Callable[[FrameType], bool] = of_ours) -> None:
        self.at = at
        self._strikes = strikes
        self.lines = 0
        self.where = ""
        self.ended = threading.Event()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)
            self.ended.set()

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        if not self._strikes(frame):
            return None
        frame.f_trace_opcodes = EVENT == "opcode"
        return self._step

    def _step(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == EVENT:
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{frame.f_code.co_filename[len(OURS) + 1 :]}:{frame.f_lineno}"
                raise Struck(self.where)
        return self._step


class Trial:
    """A job of two: rank 0 in this thread is struck, and rank 1 in the portal's thread is not.

    All that they cross is one name, as their peers of any other kind would.
    """

    def __init__(self, portal: BlockingPortal, server: Store, kind: str, at: int) -> None:
        self._portal = portal
        self._server = server
        self._prefix = f"{kind} {at}"
        self._peer = self.rank(1)
        self.strike = Strike(at)
        # The other rank's latest call.
        self.coming: Future[Any] | None = None

    def rank(self, number: int) -> StoreBarrier:
        return one(self._server, number, 2, prefix=self._prefix, timeout_secs=DEADLINE_SECS)

    def peer_crosses(self, secs: float = AGAIN_SECS) -> Future[Any]:
        self.coming = self._portal.start_task_soon(self._cross, False, secs)
        return self.coming

    def peer_comes(self, commits: bool, late: bool) -> Future[tuple[bool, Any]]:
        """When the other rank's call has ended, which is said first, or waits."""
        self.coming = coming = self._portal.start_task_soon(self._come, commits, late)
        return coming

    def peer_closes(self) -> None:
        self._portal.call(self._peer.aclose)

    async def _cross(self, commits: bool, secs: float) -> Any:
        began = time.monotonic()
        call: Coroutine[Any, Any, Any]
        if commits:
            call = self._peer.commit(publish, payload=b"1", timeout_secs=secs)
        else:
            call = self._peer.execute_barrier(timeout_secs=secs)
        said = await attempt(call)
        assert time.monotonic() < began + secs + 1, self.says("its peer was late", said)
        return said

    async def _come(self, commits: bool, late: bool) -> tuple[bool, Any]:
        strike, before, quiet = self.strike, -1, 0
        while not strike.ended.is_set() and (late or quiet < (10 if strike.where else 1)):
            quiet = quiet + 1 if strike.lines == before and before else 0
            before = strike.lines
            await anyio.sleep(0.03)
        return strike.ended.is_set(), await self._cross(commits, PEER_SECS)

    def judge(self, ended_first: bool, of_peer: Any, mine: Any) -> None:
        """Whether rank 1 was released without rank 0, or the two learned different verdicts."""
        if ended_first:
            assert isinstance(of_peer, BarrierError), self.says("crossed alone", of_peer)
        if mine is not None and not isinstance(mine, BaseException):
            # Where its leader's word comes late, a rank knows no verdict.
            unknown = isinstance(of_peer, BarrierError) and of_peer.in_doubt
            assert unknown or not isinstance(of_peer, BarrierError), self.says(
                "two verdicts", of_peer
            )

    def says(self, what: str, said: object) -> str:
        return f"struck at {self.strike.where} (#{self.strike.at}): {what}: {said!r}"


def is_due(exc: BaseException | None) -> bool:
    """Whether an exception is ours, or the one that was thrown, or came of it."""
    if exc is None or isinstance(exc, Struck | BarrierError):
        return exc is not None
    leaves = getattr(exc, "exceptions", ())
    return any(map(is_due, (*leaves, exc.__cause__, exc.__context__)))


async def publish(payloads: object) -> bytes:
    await anyio.sleep(0)
    return b"published"


async def cross(barrier: StoreBarrier) -> object:
    return await barrier.execute_barrier()


async def commit(barrier: StoreBarrier) -> object:
    return await barrier.commit(publish, payload=b"0")


async def time_out(barrier: StoreBarrier) -> object:
    return await attempt(barrier.execute_barrier(timeout_secs=GIVES_UP_SECS))


async def cancel(barrier: StoreBarrier) -> None:
    with anyio.move_on_after(GIVES_UP_SECS):
        await barrier.execute_barrier()


async def close_in_mid_phase(barrier: StoreBarrier) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(attempt, barrier.execute_barrier())
        await anyio.sleep(GIVES_UP_SECS)
        await barrier.aclose()


async def abort_x(barrier: StoreBarrier) -> None:
    await barrier.abort("no disk", "x")


async def fail_in_x(barrier: StoreBarrier) -> None:
    async with barrier.phase("x"):
        raise LookupError("no disk")


@pytest.fixture
def portal() -> Iterator[BlockingPortal]:
    """A loop in another thread."""
    # asyncio logs what is thrown in a callback, hundreds of times here.
    log = logging.getLogger("asyncio")
    log.disabled = True
    with start_blocking_portal() as made:
        yield made
        # Where a test failed, what the other rank waits for may never come.
        made.start_task_soon(made.stop, True)
    log.disabled = False


@pytest.fixture
def begin(portal: BlockingPortal, request: pytest.FixtureRequest) -> Callable[[int], Trial]:
    server = serve()
    return lambda at: Trial(portal, server, request.node.name, at)


def sweep(run: Callable[[int], Strike]) -> None:
    """Strike at one line after another, until a call runs through; nothing is left of them."""

    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    lines = run(0).lines
    before = descriptors()
    for at in range(1, 3 * lines, 1 if SWEEP else max(1, lines // POINTS)):
        if not run(at).where:
            break
    until(lambda: descriptors() <= before + 2, within_secs=3)
    until(lambda: not library_threads(), within_secs=8, else_say=library_threads)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("call", [cross, commit, time_out, cancel, close_in_mid_phase])
def test_struck_in_an_awaited_call(
    begin: Callable[[int], Trial], backend: str, call: Callable[[StoreBarrier], Awaitable[Any]]
) -> None:
    """Who was interrupted counts for nothing that is decided later, its peer's calls end in time,
    nothing hangs, and the two meet again (laws 1, 2, 3 and 5)."""

    def run(at: int) -> Strike:
        trial = begin(at)
        again = False
        try:
            again = anyio.run(struck, trial, call, backend=backend)
        except trio.TrioInternalError as exc:
            # It ends if what it calls back raises, and the barrier has left with it.
            if not is_due(exc):
                raise
        except Exception as exc:
            raise AssertionError(trial.says("a hang, or none of ours", exc)) from exc
        if not again:
            anyio.run(comes_back, trial, backend=backend)
        trial.peer_closes()
        return trial.strike

    sweep(run)


def of_trios_task(frame: FrameType) -> bool:
    return of_ours(frame) and frame.f_code.co_name in ("_serve", "_serve_until_due")


def test_struck_in_the_task_that_serves_trio(begin: Callable[[int], Trial]) -> None:
    """Its loop goes on, also if it was about to leave a wait whose time was over."""

    def run(at: int) -> Strike:
        trial = begin(at)
        trial.strike = Strike(at, of_trios_task)
        try:
            again = anyio.run(struck, trial, time_out, backend="trio")
        except BaseException as exc:
            raise AssertionError(trial.says("the end of all", exc)) from exc
        assert again, trial.says("they do not meet", again)
        trial.peer_closes()
        return trial.strike

    lines = run(0).lines
    for at in range(2, 2 * lines, 1 if SWEEP else 3):
        if not run(at).where:
            break


async def result_of(future: Future[Any]) -> Any:
    while not future.done():
        await anyio.sleep(0.003)
    return future.result()


async def struck(trial: Trial, call: Callable[[StoreBarrier], Awaitable[Any]]) -> bool:
    """Rank 0 makes a call that is struck, crosses again, and leaves; whether they met again."""
    barrier = trial.rank(0)
    with anyio.fail_after(2 * HANGS_SECS):
        first = trial.peer_crosses(HANGS_SECS)
        await barrier.execute_barrier(timeout_secs=HANGS_SECS)
        await result_of(first)
        coming = trial.peer_comes(call is commit, late=call in (time_out, cancel))
        mine = None
        try:
            with anyio.fail_after(HANGS_SECS), trial.strike():
                mine = await call(barrier)
        except Exception as exc:
            if not is_due(exc):
                raise
        ended_first, of_peer = await result_of(coming)
        trial.judge(ended_first, of_peer, mine)
        met = call is not close_in_mid_phase and await meets(trial, barrier)
        await barrier.aclose()
    return met


async def comes_back(trial: Trial) -> None:
    """Rank 0 is built anew."""
    barrier = trial.rank(0)
    with anyio.fail_after(HANGS_SECS):
        if trial.coming is not None:
            # Where the loop ended under it, the call has not said that it did.
            trial.strike.ended.set()
            await result_of(trial.coming)
        assert await meets(trial, barrier), trial.says("they never meet again", barrier)
        await barrier.aclose()


async def meets(trial: Trial, barrier: StoreBarrier) -> bool:
    """Whether two ranks that cross once per round do meet."""
    for _ in range(3):
        coming = trial.peer_crosses()
        mine = await attempt(barrier.execute_barrier(timeout_secs=AGAIN_SECS))
        of_peer = await result_of(coming)
        trial.judge(False, of_peer, mine)
        if not isinstance(mine, BarrierError):
            return True
    return False


@pytest.mark.parametrize(
    ("backend", "call"), [("asyncio", cancel), ("trio", cancel), ("trio", time_out)]
)
def test_struck_as_a_wait_ends(
    begin: Callable[[int], Trial], backend: str, call: Callable[[StoreBarrier], Awaitable[Any]]
) -> None:
    """At each line of a task's waiting, and of the call around it: its peer is not released alone,
    and what is left of a wait keeps nothing from being served."""
    for at in itertools.count(1):
        trial = begin(at)
        trial.strike = Strike(at, lambda frame: frame.f_code in WAITS)
        if not anyio.run(struck, trial, call, backend=backend):
            anyio.run(comes_back, trial, backend=backend)
        trial.peer_closes()
        if not trial.strike.where:
            break
    assert at > 10


def test_struck_inside_trio(begin: Callable[[int], Trial]) -> None:
    """While trio does something for us: its loop ends all the same. It would wait without end for a
    task that was struck as it was begun or cancelled, so none is."""

    def run(at: int) -> Strike:
        strike, said = Strike(at, at_our_word), list[BaseException]()

        async def times_out_and_leaves() -> None:
            barrier = begin(at).rank(0)
            with strike():
                await attempt(barrier.execute_barrier(timeout_secs=GIVES_UP_SECS))
                await barrier.aclose()

        def program() -> None:
            try:
                trio.run(times_out_and_leaves)
            except BaseException as exc:
                said.append(exc)

        thread = threading.Thread(target=program, daemon=True)
        thread.start()
        thread.join(HANGS_SECS)
        assert not thread.is_alive(), f"a hang: struck at {strike.where} (#{at})"
        assert all(map(is_due, said)), said
        return strike

    sweep(run)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("where", [(Joining, "start"), (SocketConnection, "say_hello")])
def test_struck_as_it_connects(
    begin: Callable[[int], Trial],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    where: tuple[Any, str],
) -> None:
    """The next call connects: it does not get the exception again, nor takes the attempt that was
    interrupted for another process of its rank."""
    call = getattr(*where)

    def strike(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        call(*args, **options)
        raise Struck

    async def test() -> None:
        barrier = begin(0).rank(0)
        monkeypatch.setattr(*where, strike)
        with pytest.raises(Struck):
            await barrier.connect()
        with anyio.fail_after(HANGS_SECS):
            await barrier.connect()
            await barrier.aclose()

    anyio.run(test, backend=backend)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("where", ["told", "opening", "connecting", "entering"])
async def test_struck_where_nothing_else_wakes_it(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """As a rank is told its verdict, or opens a further connection for its call: without any
    deadline the call is released all the same, or breaks for both at once (laws 4 and 5)."""
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    struck: tuple[Any, str] = {
        "told": (Phase, "wake"),
        "opening": (SocketConnection, "say_hello"),
        "connecting": (AsyncioLoop, "unwatch"),
        "entering": (phases, "entering"),
    }[where]
    call = getattr(*struck)

    def strike(first: Any, *args: Any, **options: Any) -> Any:
        if where == "told" and first.entry.rank != 0:
            return call(first, *args, **options)
        if where == "connecting" and not sys._getframe(1).f_code.co_filename.endswith(
            f"{where}.py"
        ):
            return call(first, *args, **options)  # A spare connection is closed just now.
        monkeypatch.undo()
        raise Struck

    async with job(serve(), 2) as ranks, Tasks() as tasks:
        await gather(rank.execute_barrier for rank in ranks)
        cross = partial(ranks[0].execute_barrier, "x", timeout_secs=None)
        if where in ("opening", "connecting"):
            tasks.start(partial(ranks[0].execute_barrier, "other", timeout_secs=None))
            while not ranks[0]._session.open:
                await anyio.sleep(0)
        if where != "told":
            monkeypatch.setattr(*struck, strike)
        crossing = tasks.start(cross)
        if where == "told":
            while not ranks[0]._session.open:
                await anyio.sleep(0)
            monkeypatch.setattr(*struck, strike)
        if where == "entering":
            with pytest.raises(Struck):
                raise await crossing.raised(Exception)
        peer = tasks.start(partial(ranks[1].execute_barrier, "x", timeout_secs=None))
        with anyio.fail_after(HANGS_SECS):
            if where == "told":
                assert (await crossing.returned()).sequence == 0
                assert (await peer.returned()).sequence == 0
            else:
                broken = [peer] if where == "entering" else [crossing, peer]
                errors = [await each.raised(BrokenBarrierError) for each in broken]
                assert {error.rank for error in errors} == {0}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("step", [None, 1], ids=["counted", "a step"])
@pytest.mark.parametrize("how", ["give_up", "break_unentered"])
async def test_struck_as_it_tells_of_a_break(
    monkeypatch: pytest.MonkeyPatch, how: str, step: int | None
) -> None:
    """It is told again, and who broke the phase knows that it did (laws 3 and 4)."""
    breaks_it = getattr(breaks, how)

    async def struck_after(*args: Any, **options: Any) -> Any:
        await breaks_it(*args, **options)
        monkeypatch.undo()
        raise Struck

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    server = serve()
    async with job(server, 3) as ranks, Tasks() as tasks:
        await gather(rank.execute_barrier for rank in ranks)
        # Who has entered looks whether all are in.
        waiting = [
            tasks.start(partial(rank.execute_barrier, "x", step=step))
            for rank in ranks[how == "break_unentered" : 2]
        ]
        await anyio.sleep(0.2)
        monkeypatch.setattr(breaks, how, struck_after)
        assert await attempt(ranks[0].abort("because", "x", step=step)) is True
        assert getattr(breaks, how) is breaks_it, "it was not struck"
        if how == "break_unentered":
            # It was added once.
            membership = ranks[0]._session.membership
            assert membership is not None
            label = "0" if step is None else f"s{step}"
            count = membership.own.phase("x", label).count
            value = await anyio.to_thread.run_sync(server.get, count)
            assert value == b"%d" % (counts.entry(1, 0) + counts.BREAKING)
        for each in waiting:
            error = await each.raised(BrokenBarrierError)
            assert each.secs < 1.2
            assert (error.rank, error.reason) == (0, "because")


def test_struck_as_it_has_entered(portal: BlockingPortal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arrival has been sent, and all are in before it gives up: what was published stays
    published, on all other ranks (laws 1 to 3)."""
    server = serve()
    ranks = [one(server, number, 3, timeout_secs=DEADLINE_SECS) for number in range(3)]
    call, said_at, steps = SocketConnection.call, list[float](), set[str]()

    async def publish_slowly(payloads: object) -> bytes:
        steps.add("published")
        while "struck" not in steps:
            await anyio.sleep(0.003)
        return b"done"

    async def commits(number: int) -> bytes:
        while number and not said_at:
            await anyio.sleep(0.003)
        return await ranks[number].commit(publish_slowly, leader=1)

    def has_entered(connection: SocketConnection, *requests: Any, **options: Any) -> Any:
        said = call(connection, *requests, **options)
        if any(isinstance(each, Append) for each in requests) and not said_at:
            said_at.append(time.monotonic())
            # A handler that takes its time; the peers have another loop.
            while "published" not in steps and time.monotonic() < said_at[0] + 10:
                pass
            raise Struck
        return said

    async def program() -> None:
        await ranks[0].connect()
        of_peers = [portal.start_task_soon(commits, number) for number in (1, 2)]
        monkeypatch.setattr(SocketConnection, "call", has_entered)
        with pytest.raises(Struck):
            await commits(0)
        steps.add("struck")
        assert [await result_of(each) for each in of_peers] == [b"done", b"done"]
        await ranks[0].aclose()

    for rank in ranks[1:]:
        portal.call(rank.connect)
    anyio.run(program)
    for rank in ranks[1:]:
        portal.call(rank.aclose)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("gives_up", [abort_x, fail_in_x])
async def test_struck_as_a_turn_is_counted(
    monkeypatch: pytest.MonkeyPatch, gives_up: Callable[[StoreBarrier], Awaitable[Any]]
) -> None:
    """The turn is used up, once, and its peer learns that (laws 2, 5 and 11)."""

    def strike(*_: Any) -> Any:
        monkeypatch.undo()
        raise Struck

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    async with job(serve(), 2) as ranks:
        await gather(rank.execute_barrier for rank in ranks)
        monkeypatch.setattr(Turns, "use", strike)
        with pytest.raises(Struck):
            await gives_up(ranks[0])
        with pytest.raises(BrokenBarrierError, match="by rank 0: it was interrupted"):
            await ranks[1].execute_barrier("x", timeout_secs=None)
        results = await gather(partial(rank.execute_barrier, "x") for rank in ranks)
        assert [result.sequence for result in results] == [1, 1]
        # Nor is another turn to be broken when the store is reached again.
        assert not ranks[0]._session._owed


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("lost", ["bell", "phase"])
async def test_struck_as_it_connects_again(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """A rank that lost a connection hears of a break all the same, or tells of its own (law 5)."""
    hello = SocketConnection.say_hello

    def strike(*_: Any) -> Any:
        monkeypatch.undo()
        raise Struck

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    async with job(serve(), 3) as ranks, Tasks() as tasks:
        await gather(rank.execute_barrier for rank in ranks)
        crosses = [partial(rank.execute_barrier, "x", timeout_secs=None) for rank in ranks]
        mine, peer = map(tasks.start, crosses[:2])
        await anyio.sleep(0.2)
        (phase,) = ranks[0]._session.open
        connection = ranks[0]._session._bell if lost == "bell" else phase.connection
        assert isinstance(connection, SocketConnection)
        monkeypatch.setattr(SocketConnection, "say_hello", strike)
        connection._socket.shutdown(socket.SHUT_RDWR)
        while SocketConnection.say_hello is not hello:
            await anyio.sleep(0)
        if lost == "bell":
            assert await ranks[2].abort("because", "x")
            told = mine, (2, "because")
        else:
            told = peer, (0, "it lost its connection to the store")
        error = await told[0].raised(BrokenBarrierError)
        assert (error.rank, error.reason) == told[1]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_struck_as_it_hears_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller is woken all the same, and the step is known to be over (law 5)."""
    decided = Turns.decided

    def struck(*_: Any) -> None:
        monkeypatch.setattr(Turns, "decided", decided)
        raise Struck

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    async with job(serve(), 2) as ranks, Tasks() as tasks:
        await gather(rank.execute_barrier for rank in ranks)
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x", step=1))
        await anyio.sleep(0.2)
        monkeypatch.setattr(Turns, "decided", struck)
        began = time.monotonic()
        await attempt(ranks[0].execute_barrier("x", step=1))
        await waiting.returned()
        assert time.monotonic() < began + 1
        assert await ranks[0].abort("late", "x", step=1) is False
