"""Exceptions of a signal handler at any line of ours that a blocking call runs in its own thread.

And wherever Python looks for signals in what that calls of its own library: Event and Condition
have locks that such an exception leaves taken. With ``ASYNC_BARRIERS_SWEEP=instructions``, at any
instruction of ours.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from blocking_world import LEFT, World, entered, threads
from processes import GRACE_SECS, until

import async_barriers
from async_barriers import Barrier, BarrierError, BrokenBarrierError
from async_barriers._store.worker import Promise, Worker
from async_barriers.blocking import BlockingBarrier
from async_barriers.saving import BlockingSaver, Part

OURS = str(Path(async_barriers.__file__).parent)
# A thread that was started but not noted yet is the worker's to mend.
PORTAL = tuple(f"{OURS}/{name}" for name in ("_portal.py", "blocking.py"))
PYTHONS = str(Path(os.__file__).parent)
INSTRUCTIONS = os.environ.get("ASYNC_BARRIERS_SWEEP") == "instructions"
# After these, in any version of Python.
LOOKS_FOR_SIGNALS = ("CALL", "RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
# What has to undo an entered phase may take 0.9 s.
SECOND_SECS = 5.0
CLOSES_SECS = 3.0
TOO_SHORT_SECS = 0.03
# The first lines of ours come to nothing yet.
BEFORE_CLOSING = 12 if INSTRUCTIONS else 3

pytestmark = [
    pytest.mark.bound(1200 if INSTRUCTIONS else 60),
    # What is struck as it is dropped can only be reported.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Struck(Exception):
    """What the handler raises."""


class Strike:
    """Raises `Struck` in its block, once, at the n-th point that a frame of some files comes to."""

    def __init__(self, at: int, *files: str) -> None:
        self.at = at
        self.points = 0
        self.where = ""
        self.returning = False
        self._files = files

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        file = frame.f_code.co_filename
        # The block's own end is contextlib's, and what calls back as threads end raises nowhere.
        if not file.startswith(self._files) or file.endswith(("contextlib.py", "_weakrefset.py")):
            return None
        if file.endswith("worker.py") and frame.f_code.co_name == "_forget":
            return None
        ours = file.startswith(OURS)
        frame.f_trace_opcodes = not ours or INSTRUCTIONS
        looked = False

        def step(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal looked
            if event == "opcode":
                name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
                if looked or ours:
                    self._come_to(frame, name)
                looked = name.startswith(LOOKS_FOR_SIGNALS)
            elif ours and event in ("line", "return"):
                self._come_to(frame, event)
            return step

        return step

    def _come_to(self, frame: FrameType, what: str) -> None:
        self.points += 1
        if self.points == self.at:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} ({what})"
            self.returning = what.upper().startswith("RETURN")
            raise Struck(self.where)


def sweep(trial: Callable[[Strike], None], *files: str) -> None:
    """Strike at one point after another, until a call runs through."""
    for at in itertools.count(1):
        strike = Strike(at, *files)
        # What is raised where Python ends the handling of an exception leaves its thread in the
        # midst of that, for good; so each has a thread of its own.
        failures: list[Exception] = []
        thread = threading.Thread(target=tried, args=(trial, strike, failures))
        thread.start()
        thread.join()
        if failures:
            raise AssertionError(f"struck at {strike.where}") from failures[0]
        if not strike.where:
            assert at > 9
            return


def tried(trial: Callable[[Strike], None], strike: Strike, failures: list[Exception]) -> None:
    """Run a trial, and note how it failed."""
    try:
        trial(strike)
    except Exception as exc:
        failures.append(exc)


class Pair:
    """A rank that is struck in this thread, and one that crosses for as long as it is there."""

    def __init__(self, *, connected: bool = True) -> None:
        self._world = World(2)
        self.struck, self._peer = self._world.ranks
        self._peer.connect()
        self._released: Future[list[int]] = self._peer.start(crosses, self._peer.barrier)
        if connected:
            self.struck.connect()

    def waits(self, *met: int) -> None:
        """Wait until the peer waits in a later phase, or has been told."""
        last = max(met, default=-1)
        until(
            lambda: (
                self._released.done() or any(phase.sequence > last for phase in entered(self._peer))
            )
        )

    def meet(self) -> int:
        """Cross, with a peer that has crossed or been told; the number of the phase."""
        return self.struck.execute_barrier(SECOND_SECS).sequence

    def close(self, *met: int) -> None:
        """Close what was struck: its peer is told, and was released where it was."""
        self.waits(*met)
        began = time.monotonic()
        self.struck.close()
        assert time.monotonic() < began + CLOSES_SECS
        with pytest.raises(BarrierError):
            self.struck.connect()
        self.is_told(*met)
        self._world.close()

    def is_told(self, *met: int) -> None:
        """The peer is told at once that what was struck has left."""
        assert {*met} <= {*self._released.result(GRACE_SECS)}

    def peer_comes(self, step: int) -> None:
        """The peer crosses another name, and is not released."""
        with pytest.raises(BarrierError):
            self._peer.execute_barrier(TOO_SHORT_SECS, name="late", step=step)


async def crosses(barrier: Barrier) -> list[int]:
    """Cross until the other rank has left; the phases that were released."""
    released = []
    while True:
        try:
            released.append((await barrier.execute_barrier()).sequence)
        except BrokenBarrierError as exc:
            if exc.reason.startswith(LEFT):
                return released


def call(strike: Strike, function: Callable[[], object]) -> object:
    """What came of it; None where it was struck."""
    try:
        with strike():
            return function()
    except Exception as exc:
        if not is_due(exc):
            raise
        return None


def is_due(exc: BaseException | None) -> bool:
    # Python's own Condition may raise a RuntimeError that came of it.
    return exc is not None and (isinstance(exc, Struck) or is_due(exc.__context__))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threads()
    yield
    until(lambda: threads() <= before, within_secs=3)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """One that is struck again and again."""
    made = Pair()
    yield made
    made.close(made.meet())


def test_struck_in_the_first_call() -> None:
    """Which starts the loop's thread: the next one makes up for what it did not come to."""

    def trial(strike: Strike) -> None:
        pair = Pair(connected=False)
        call(strike, pair.struck.execute_barrier)
        pair.close(pair.meet())

    sweep(trial, *PORTAL)


def test_struck_in_a_call(pair: Pair) -> None:
    """Its phase breaks, or was released, or was not entered; the next call finds its peer."""

    def trial(strike: Strike) -> None:
        call(strike, pair.struck.execute_barrier)
        pair.meet()

    sweep(trial, OURS, PYTHONS)


def test_struck_before_its_peer_came(pair: Pair) -> None:
    """It makes up for nobody: the phase is broken, or waits for it still (law 1)."""

    def trial(strike: Strike) -> None:
        enter = functools.partial(
            pair.struck.execute_barrier, TOO_SHORT_SECS, name="late", step=strike.at
        )
        with contextlib.suppress(BarrierError):
            call(strike, enter)
        pair.peer_comes(strike.at)

    sweep(trial, OURS, PYTHONS)


def test_struck_in_closing() -> None:
    """It goes on by itself, or is done by the next one; neither hangs."""

    def trial(strike: Strike) -> None:
        pair = Pair()
        met = pair.meet()
        pair.waits(met)
        call(strike, pair.struck.close)
        if strike.at > BEFORE_CLOSING:
            pair.is_told(met)
        pair.close(met)

    sweep(trial, OURS, PYTHONS)


def test_struck_in_starting_a_call(pair: Pair) -> None:
    """What was not returned does not go on; what was does."""
    calls = pair.struck._portal._calls

    def trial(strike: Strike) -> None:
        before = len(calls)
        waiting = pair.struck.barrier.execute_barrier
        future = call(strike, lambda: pair.struck.start(waiting, f"alone {strike.at}"))
        pair.meet()
        until(lambda: not any(made._cancelled for made in list(calls)))
        # What strikes as it returns is its caller's to mind.
        assert len(calls) == before + (future is not None) or strike.returning

    sweep(trial, OURS, PYTHONS)


@pytest.mark.parametrize("cancels", [False, True], ids=["waiting", "cancelling"])
def test_struck_with_a_future(pair: Pair, cancels: bool) -> None:
    """Waiting for it in vain, or cancelling it, leaves no lock that the loop would wait for."""

    def trial(strike: Strike) -> None:
        future = pair.struck.start(pair.struck.barrier.execute_barrier, f"alone {strike.at}")

        def wait() -> None:
            with pytest.raises(TimeoutError):
                future.result(0.01)

        call(strike, future.cancel if cancels else wait)
        pair.meet()
        # It may end just then.
        assert not future.done() or future.cancelled()
        assert future.cancel()
        pair.meet()

    sweep(trial, OURS, PYTHONS)


def test_struck_in_starting_a_save(pair: Pair, tmp_path: Path) -> None:
    """While it waits until the state is copied: no lock is left that the loop would wait for."""

    async def upload(state: object, part: Part) -> None: ...

    def trial(strike: Strike) -> None:
        # What was struck as it returned goes on, and this saver would wait for it.
        saver = BlockingSaver(pair.struck, tmp_path, upload, rank=0)
        future = call(strike, lambda: saver.start(strike.at, {}))
        pair.meet()
        if future is not None:
            assert isinstance(future, Future)
            assert future.cancel()

    sweep(trial, OURS, PYTHONS)


@pytest.mark.parametrize("slow", [False, True], ids=["quick", "slow"])
def test_struck_in_handing_a_call_to_a_thread(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    """Before or after its thread has started, or while that begins: the next call is made."""
    if slow:
        if not hasattr(threading.Thread, "_set_tstate_lock"):
            pytest.skip("this Python begins its threads in another way")
        note = threading.Thread._set_tstate_lock

        def noted(thread: threading.Thread) -> None:
            if thread.name.startswith("async_barriers"):
                began.settle()
                struck.wait(0.02)
            note(thread)

        monkeypatch.setattr(threading.Thread, "_set_tstate_lock", noted)
    began: Promise[None] = Promise()
    struck: Promise[None] = Promise()

    def trial(strike: Strike) -> None:
        nonlocal began, struck
        began, struck, worker = Promise(), Promise(), Worker()
        call(strike, lambda: worker.submit(lambda: 1))
        if slow:
            began.wait(0.02)
        struck.settle()
        assert worker.submit(lambda: 2).result(SECOND_SECS) == 2
        worker.retire()
        assert worker.ended.wait(SECOND_SECS)

    sweep(trial, OURS, PYTHONS)


def test_struck_in_a_guard(pair: Pair) -> None:
    """As its body was, which has not crossed: the peer is told, or does not wait for anybody."""

    def guarded() -> None:
        with pair.struck.guard():
            pair.struck.execute_barrier()

    def trial(strike: Strike) -> None:
        call(strike, guarded)
        pair.meet()

    sweep(trial, *PORTAL)


def test_struck_in_leaving_a_block() -> None:
    """It is closed, or can be."""

    def trial(strike: Strike) -> None:
        pair = Pair()

        def block() -> None:
            with pair.struck:
                pass

        call(strike, block)
        pair.close()

    sweep(trial, *PORTAL)


def test_struck_in_building(pair: Pair) -> None:
    """Nothing is left of it."""
    sweep(lambda strike: build(strike, pair.struck.barrier), *PORTAL)


def build(strike: Strike, barrier: Barrier) -> None:
    call(strike, lambda: BlockingBarrier(barrier))
