"""What is needed of an event loop: the same of asyncio, uvloop, trio and the one that blocks."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from types import BuiltinMethodType, SimpleNamespace
from typing import Any

import anyio
import pytest
from worlds import Tasks

from async_barriers._store.asyncio_loop import AsyncioLoop
from async_barriers._store.event_loop import Loop
from async_barriers._store.future import Future
from async_barriers._store.loops import loop_here
from async_barriers._store.waiting import settled, told, until_done
from async_barriers._store.worker import Promise

Test = Callable[[], Awaitable[None]]


def on_uvloop(test: Test) -> None:
    # It is not built for every Python.
    pytest.importorskip("uvloop")
    anyio.run(test, backend="asyncio", backend_options={"use_uvloop": True})


LOOPS: dict[str, Callable[[Test], Any]] = {
    "asyncio": partial(anyio.run, backend="asyncio"),
    "uvloop": on_uvloop,
    "trio": partial(anyio.run, backend="trio"),
}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Test], Any]:
    return LOOPS[request.param]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two that are connected to each other, and do not block."""
    here, there = socket.socketpair()
    for sock in (here, there):
        sock.setblocking(False)
    yield here, there
    here.close()
    there.close()


async def a_while(loop: Loop, done: Callable[[], object], secs: float = 5.0) -> None:
    """Let the loop run until it is ``done``."""
    until = loop.now() + secs
    while not done():
        assert loop.now() < until
        await anyio.sleep(0.001)


def test_the_loop_that_runs_here(run: Callable[[Test], Any]) -> None:
    """The same one again in one loop, another in the next, and none where none runs."""
    found: list[Loop] = []

    async def look() -> None:
        for _ in range(2):
            found.append(loop_here(found[-1] if found else None))
        assert found[-1].here()
        assert not found[-1].ended
        found[-1].at_end(lambda: None)
        # Not in another thread.
        assert not await anyio.to_thread.run_sync(found[-1].here)

    run(look)
    assert len({id(loop) for loop in found}) == 1
    assert not found[0].here()
    assert found[0].ended
    run(look)
    assert len({id(loop) for loop in found}) == 2
    with pytest.raises(RuntimeError):
        loop_here(found[-1])


def test_sockets_are_watched(
    run: Callable[[Test], Any], ends: tuple[socket.socket, socket.socket]
) -> None:
    """For as long as they are; reading and writing apart from each other."""
    here, there = ends

    async def watch() -> None:
        loop = loop_here(None)
        read, written = [], []
        loop.watch_readable(here, lambda: read.append(here.recv(1)))
        await anyio.sleep(0.02)
        assert read == []
        there.send(b"ab")
        await a_while(loop, lambda: len(read) == 2)

        def write() -> None:
            written.append(here.send(b"x"))
            loop.unwatch_writable(here)

        loop.watch_writable(here, write)
        await a_while(loop, lambda: written)
        there.send(b"c")
        await a_while(loop, lambda: len(read) == 3)
        await anyio.sleep(0.02)
        assert written == [1]
        loop.unwatch(here)
        there.send(b"d")
        await anyio.sleep(0.02)
        assert read == [b"a", b"b", b"c"]
        # And again: connections are moved back.
        loop.watch_readable(here, lambda: read.append(here.recv(1)))
        await a_while(loop, lambda: len(read) == 4)
        loop.unwatch(here)
        loop.unwatch(here)

    run(watch)


def test_moments_come_in_order(run: Callable[[Test], Any]) -> None:
    """Those that were not cancelled; what other threads post comes at once."""
    came: list[str] = []

    async def wait() -> None:
        loop = loop_here(None)
        for secs, name in ((0.5, "last"), (0.2, "first"), (0.35, "second"), (0.25, "never")):
            timer = loop.call_at(loop.now() + secs, partial(came.append, name))
            if name == "never":
                timer.cancel()
        thread = threading.Thread(target=loop.post, args=(lambda: came.append("posted"),))
        thread.start()
        await a_while(loop, lambda: len(came) == 4)
        thread.join()

    run(wait)
    assert came == ["posted", "first", "second", "last"]


def test_waiting_until(run: Callable[[Test], Any]) -> None:
    """A waiter goes on when it is woken, also beforehand, and when its time has come; each of
    many at its own."""
    order: list[int] = []

    async def wait() -> None:
        loop = loop_here(None)
        waiters = [loop.waiter() for _ in range(5)]

        async def one(index: int, secs: float) -> None:
            await waiters[index].wait(loop.now() + secs)
            order.append(index)

        waiters[3].wake()
        async with anyio.create_task_group() as tasks:
            for index, secs in enumerate((0.12, 0.04, 0.08, 5.0, 5.0)):
                tasks.start_soon(one, index, secs)
            await anyio.sleep(0.01)
            assert order == [3]
            waiters[4].wake()
            waiters[4].wake()
        assert order == [3, 4, 1, 2, 0]
        # What woke it before wakes it once.
        began = loop.now()
        await waiters[3].wait(began + 0.03)
        assert loop.now() - began > 0.02
        # A time that has passed is no time.
        await waiters[3].wait(loop.now() - 1)

    run(wait)


class Struck(Exception):
    """What a signal handler throws."""


def test_a_task_that_begins_to_wait_is_noted_in_c(run: Callable[[Test], Any]) -> None:
    """No signal handler runs in between: asyncio would never run such a task again."""

    async def wait() -> None:
        loop = loop_here(None)
        if not isinstance(loop, AsyncioLoop):
            pytest.skip("trio notes its tasks itself")
        waiter = loop.waiter()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waiter.wait, loop.now() + 5)
            await anyio.sleep(0)
            assert isinstance(waiter.add_done_callback, BuiltinMethodType)
            waiter.wake()

    run(wait)


@pytest.mark.parametrize("then", ["woken again", "cancelled", "late"])
def test_a_wake_that_is_interrupted(run: Callable[[Test], Any], then: str) -> None:
    """A signal handler raises in the midst of it: the next wake, a cancellation or the time ends
    the wait all the same, and once."""

    async def wait() -> None:
        loop = loop_here(None)
        if not isinstance(loop, AsyncioLoop):
            pytest.skip("what trio does with an exception of a signal handler ends it")
        waiter = loop.waiter()
        ended: list[bool] = []

        async def one() -> None:
            try:
                await waiter.wait(loop.now() + 0.3)
            finally:
                ended.append(True)
            await anyio.sleep(0.05)

        def interrupted(*args: Any, **options: Any) -> None:
            call_soon(*args, **options)
            raise Struck

        for noted in (False, True):
            ended.clear()
            began = loop.now()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one)
                await anyio.sleep(0.01)
                call_soon = loop.loop.call_soon if noted else lambda *_, **__: None
                real = waiter._loop
                waiter._loop = SimpleNamespace(call_soon=interrupted)  # type: ignore[assignment]
                with pytest.raises(Struck):
                    waiter.wake()
                waiter._loop = real
                if then == "woken again":
                    waiter.wake()
                    waiter.wake()
                elif then == "cancelled":
                    tasks.cancel_scope.cancel()
            assert ended == [True]
            assert loop.now() < began + 0.6

    run(wait)


@pytest.mark.parametrize("first", ["woken", "cancelled", "late"])
def test_all_that_can_end_it_in_the_same_moment(run: Callable[[Test], Any], first: str) -> None:
    """The task goes on once, and what comes of it is one of what happened."""

    async def all_at_once() -> None:
        loop = loop_here(None)
        future: Future[str] = Future()
        went_on: list[bool] = []

        async def wait() -> None:
            went_on.append(await settled(loop, future, loop.now() + 0.05))
            # Woken twice, it would not get past here.
            await anyio.sleep(0.05)
            went_on.append(True)

        async with Tasks() as tasks:
            outcome = tasks.start(wait)
            await anyio.sleep(0.01)
            happens: dict[str, Callable[[], object]] = {
                "woken": partial(future.resolve, "told"),
                "cancelled": outcome.scope.cancel,
                "late": partial(time.sleep, 0.1),
            }
            happens.pop(first)()
            for happen in happens.values():
                happen()
            await outcome.ended.wait()
        assert outcome.error is None
        assert went_on in ([], [True])

    run(all_at_once)


def test_the_end_of_a_loop_is_told(run: Callable[[Test], Any]) -> None:
    """To all that asked, once, and not to those that took it back."""
    told_: list[str] = []

    async def ask() -> None:
        loop = loop_here(None)
        for name in ("one", "two", "not"):
            taken_back = loop.at_end(partial(told_.append, name))
        taken_back()
        taken_back()
        # All of them, and then one more.
        loop_here(loop).at_end(partial(told_.append, "three"))
        await anyio.sleep(0)
        assert told_ == []

    run(ask)
    assert sorted(told_) == ["one", "three", "two"]


def test_a_loop_that_has_ended_calls_nobody(
    run: Callable[[Test], Any], ends: tuple[socket.socket, socket.socket]
) -> None:
    """And what is taken back from it, or posted to it, does no harm."""
    made: list[Loop] = []

    async def make() -> None:
        loop = loop_here(None)
        loop.watch_readable(ends[0], pytest.fail)
        loop.watch_writable(ends[1], lambda: loop.unwatch_writable(ends[1]))
        made.append(loop)
        await a_while(loop, lambda: True)
        loop.at_end(lambda: None)

    run(make)
    (loop,) = made
    loop.post(pytest.fail)
    loop.unwatch_writable(ends[1])
    loop.unwatch(ends[0])
    assert loop.ended


def test_what_a_thread_tells(run: Callable[[Test], Any]) -> None:
    """It wakes the task that waits; and of what was told before, at once; or not in time."""

    async def wait() -> None:
        loop = loop_here(None)
        promise: Promise[str] = Promise()
        threading.Timer(0.02, promise.settle, ["told"]).start()
        assert not await told(loop, promise, loop.now() + 0.005)
        assert await told(loop, promise)
        assert promise.result() == "told"
        assert await told(loop, promise)

    run(wait)


@pytest.mark.parametrize("how", ["done", "late", "cancelled again"])
def test_undoing_goes_on_when_it_is_cancelled(how: str) -> None:
    """Until it is done, for its time, or until the second cancellation; the exception comes
    afterwards. Only asyncio's own cancellation comes through a shield."""

    async def wait() -> None:
        loop = loop_here(None)
        undone: Future[None] = Future()
        task = asyncio.create_task(until_done(loop, undone, 0.1))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
        began = loop.now()
        if how == "done":
            undone.resolve(None)
        elif how == "cancelled again":
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (loop.now() - began > 0.05) == (how == "late")

    asyncio.run(wait())


def test_undoing_that_is_not_cancelled(run: Callable[[Test], Any]) -> None:
    """Whether it was done in its time."""

    async def wait() -> None:
        loop = loop_here(None)
        undone: Future[None] = Future()
        assert not await until_done(loop, undone, 0.02)
        undone.resolve(None)
        assert await until_done(loop, undone, 0.02)

    run(wait)


def test_what_is_posted_and_interrupted(run: Callable[[Test], Any]) -> None:
    """By a signal handler's exception: it is called once more, and what was posted after it too."""

    async def test() -> None:
        loop = loop_here(None)
        called: list[str] = []

        def interrupted() -> None:
            called.append("first")
            if len(called) == 1:
                raise KeyError("a signal handler's")

        loop.post(interrupted)
        loop.post(lambda: called.append("second"))
        await a_while(loop, lambda: len(called) == 3)
        assert called == ["first", "first", "second"]

    run(test)
