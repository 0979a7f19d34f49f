"""What is not there yet, coroutines that wait for nothing else, and the loop that blocks."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from test_signals import Strike, Struck

from async_barriers import BarrierError
from async_barriers._store.future import Effort, Future
from async_barriers._store.private_loop import PrivateLoop
from async_barriers._store.waiting import sleep, within, writable


def test_a_future_comes_once() -> None:
    """What it was first stays, and whoever waits is called once, in order."""
    future: Future[int] = Future()
    called: list[str] = []
    future.when_done(lambda: called.append("one"))
    future.when_done(lambda: called.append("two"))
    assert not future.done
    future.resolve(1)
    future.resolve(2)
    future.fail(BarrierError("late"))
    assert future.result() == 1
    assert future.error is None
    future.when_done(lambda: called.append("at once"))
    assert called == ["one", "two", "at once"]


def test_a_callback_that_raises_spares_the_others() -> None:
    """A signal handler's exception goes on; who was not called yet is called the next time."""
    future: Future[int] = Future()
    called: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    future.when_done(interrupt)
    future.when_done(lambda: called.append("other"))
    with pytest.raises(KeyboardInterrupt):
        future.resolve(1)
    assert future.done
    assert future.result() == 1


def test_struck_at_any_line_of_coming() -> None:
    """It has not come then, or everybody is called: nobody waits for ever for what is there."""
    for at in itertools.count(1):
        future: Future[int] = Future()
        called: list[str] = []
        future.when_done(lambda: called.append("one"))  # noqa: B023  (called in this round)
        future.when_done(lambda: called.append("two"))  # noqa: B023
        strike = Strike(at)
        with suppress(Struck), strike():
            future.resolve(1)
        assert set(called) == ({"one", "two"} if future.done else set()), strike.where
        if not strike.where:
            break
    assert at > 5


def test_a_coroutine_struck_at_any_line() -> None:
    """It goes on to its end, or has failed by what struck it; it never goes on too early."""

    async def add(first: Future[int], second: Future[int]) -> int:
        return await first + await second

    for at in itertools.count(1):
        first, second = Future[int](), Future[int]()
        effort = Effort(add(first, second))
        strike = Strike(at)
        with suppress(Struck), strike():
            first.resolve(1)
        first.resolve(1)
        second.resolve(2)
        assert effort.done, strike.where
        assert isinstance(effort.error, Struck) or effort.result() == 3, strike.where
        if not strike.where:
            break
    assert at > 10


def test_a_coroutine_is_driven_by_what_it_awaits() -> None:
    """It begins at once, and goes on where the Future is resolved; its errors come out."""
    first: Future[int] = Future()
    second: Future[int] = Future()
    order: list[int] = []

    async def add() -> int:
        order.append(1)
        a = await first
        order.append(2)
        return a + await second

    effort = Effort(add())
    assert order == [1]
    second.resolve(20)
    assert not effort.done
    first.resolve(1)
    assert order == [1, 2]
    assert effort.result() == 21


def test_errors_of_ours_are_what_it_comes_to() -> None:
    """Whoever awaits it gets them; one that is none of ours goes to whoever drives it, as well."""
    future: Future[int] = Future()

    async def wait() -> int:
        return await future

    inner = Effort(wait())

    async def outer() -> int:
        return await inner

    effort = Effort(outer())
    future.fail(BarrierError("it broke"))
    for failed in (inner, effort):
        with pytest.raises(BarrierError, match="it broke"):
            failed.result()

    trigger: Future[int] = Future()

    async def interrupted() -> None:
        await trigger
        raise KeyboardInterrupt

    effort2 = Effort(interrupted())
    with pytest.raises(KeyboardInterrupt):
        trigger.resolve(1)
    assert isinstance(effort2.error, KeyboardInterrupt)


def test_a_coroutine_is_ended_where_it_is() -> None:
    """What it has to clear up is cleared up; what it waited for may come."""
    future: Future[int] = Future()
    ended: list[str] = []

    async def wait() -> None:
        try:
            await future
        finally:
            ended.append("cleared up")

    effort = Effort(wait())
    effort.stop(BarrierError("no time"))
    assert ended == ["cleared up"]
    with pytest.raises(BarrierError, match="no time"):
        effort.result()
    future.resolve(1)
    effort.stop(BarrierError("again"))
    assert str(effort.error) == "no time"


@pytest.fixture
def loop() -> Iterator[PrivateLoop]:
    made = PrivateLoop()
    yield made
    made.close()


def came(loop: PrivateLoop, future: Future[Any], secs: float = 5.0) -> float:
    """How long it took."""
    began = time.monotonic()
    loop.run(lambda: future.done, began + secs)
    assert future.done
    return time.monotonic() - began


def test_moments(loop: PrivateLoop) -> None:
    """Sleeping takes its time; waiting within a time ends with it or with what came."""
    assert 0.02 <= came(loop, sleep(loop, 0.02)) < 1
    never: Future[int] = Future()
    waited = within(loop, never, 0.02)
    assert 0.02 <= came(loop, waited) < 1
    assert waited.result() is False
    waited = within(loop, never, 30)
    loop.post(lambda: never.resolve(1))
    assert came(loop, waited) < 1
    assert waited.result() is True
    assert within(loop, never, -1).result() is True
    waited = within(loop, Future(), -1)
    came(loop, waited)
    assert waited.result() is False


def test_a_socket_that_is_connected(loop: PrivateLoop) -> None:
    """As many times as it is asked."""
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        for _ in range(2):
            came(loop, writable(loop, here))


def test_the_loop_that_blocks(loop: PrivateLoop) -> None:
    """It does as the others, and stops as soon as it is done, whatever did that."""
    here, there = socket.socketpair()
    here.setblocking(False)
    came: list[Any] = []

    def read() -> None:
        # It may be called in vain, as when the socket can be written to.
        with suppress(BlockingIOError):
            came.append(here.recv(1))

    def done_in(done: Callable[[], bool], secs: float = 5.0) -> float:
        began = time.monotonic()
        loop.run(done, began + secs)
        return time.monotonic() - began

    loop.watch_writable(here, lambda: loop.unwatch_writable(here))
    loop.watch_readable(here, read)
    loop.call_at(loop.now() + 0.05, lambda: came.append("late"))
    loop.call_at(loop.now() + 0.02, lambda: came.append("early"))
    loop.call_at(loop.now() + 0.01, lambda: came.append("never")).cancel()
    assert done_in(lambda: len(came) == 2) < 1
    assert came == ["early", "late"]
    there.send(b"a")
    assert done_in(lambda: len(came) == 3) < 1
    threading.Timer(0.02, loop.post, [lambda: came.append("posted")]).start()
    assert done_in(lambda: len(came) == 4) < 1
    assert came[2:] == [b"a", "posted"]
    loop.unwatch(here)
    loop.unwatch(here)
    there.send(b"b")
    assert done_in(lambda: False, 0.05) >= 0.05
    assert len(came) == 4
    assert not loop.here()
    loop.at_end(lambda: came.append("not"))()
    loop.at_end(lambda: came.append("end"))
    loop.close()
    here.close()
    there.close()
    assert came[4:] == ["end"]
