"""Waiting on an event loop for what a thread tells."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from functools import partial

import anyio
import pytest
from worlds import Tasks

from async_barriers._waiting import waiting_here
from async_barriers._worker import Promise

pytestmark = pytest.mark.anyio

_request: contextvars.ContextVar[str] = contextvars.ContextVar("request")


def in_a_thread(promise: Promise[str]) -> None:
    threading.Thread(target=promise.settle, args=("told",)).start()


async def test_what_a_thread_tells(anyio_backend: str) -> None:
    """It wakes the task that waits, in the task's own context."""
    promise: Promise[str] = Promise()
    _request.set("mine")
    assert await waiting_here(None).settled(promise, start=partial(in_a_thread, promise))
    assert promise.result() == "told"
    assert _request.get() == "mine"
    # And again, of what was told before.
    assert await waiting_here(None).settled(promise)


async def test_deadlines_pass_one_by_one(anyio_backend: str) -> None:
    """Each at its time, whichever came first; and what they waited for can be had later."""
    waiting = waiting_here(None)
    promises: list[Promise[str]] = [Promise() for _ in range(3)]
    order: list[int] = []

    async def wait(index: int, secs: float) -> None:
        assert not await waiting.settled(promises[index], waiting.now() + secs)
        order.append(index)

    async with anyio.create_task_group() as tasks:
        for index, secs in enumerate((0.2, 0.1, 0.15)):
            tasks.start_soon(wait, index, secs)
    assert order == [1, 2, 0]
    promises[0].settle("late")
    assert await waiting.settled(promises[0])


@pytest.mark.parametrize("first", ["told", "cancelled", "late"])
async def test_all_that_can_end_it_in_the_same_moment(anyio_backend: str, first: str) -> None:
    """The task goes on once, and what comes of it is one of what happened."""
    promise: Promise[str] = Promise()
    waiting = waiting_here(None)
    went_on: list[bool] = []
    begun = anyio.Event()

    async def wait() -> None:
        deadline = waiting.now() + 0.05
        went_on.append(await waiting.settled(promise, deadline, begun.set))
        # Woken twice, it would not get past here.
        await anyio.sleep(0.05)
        went_on.append(True)

    async with Tasks() as tasks:
        outcome = tasks.start(wait)
        await begun.wait()
        happens: dict[str, Callable[[], object]] = {
            "told": partial(promise.settle, "told"),
            "cancelled": outcome.scope.cancel,
            "late": partial(time.sleep, 0.1),
        }
        happens.pop(first)()
        for happen in happens.values():
            happen()
        await outcome.ended.wait()
    assert outcome.error is None or isinstance(outcome.error, anyio.get_cancelled_exc_class())
    assert went_on in ([], [True])


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_is_cancelled(anyio_backend: str) -> None:
    """As any other task of asyncio: the message arrives."""
    promise: Promise[str] = Promise()

    async def wait() -> str:
        try:
            await waiting_here(None).settled(promise)
        except asyncio.CancelledError as exc:
            return f"{exc.args[0]} is enough"
        return "not cancelled"

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert "wait_for=" in repr(task)
    task.cancel("this")
    assert await task == "this is enough"
    # Told by then, it is cancelled all the same, and no more than that.
    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    promise.settle("told")
    task.cancel("this")
    assert await task == "this is enough"


def test_a_loop_that_has_ended() -> None:
    """Nobody waits there any more, and the thread that tells goes on."""
    promise: Promise[str] = Promise()

    async def wait() -> None:
        await waiting_here(None).settled(promise)

    loop = asyncio.new_event_loop()
    waiting = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    promise.settle("told")
    assert not waiting.done()
    waiting.get_coro().close()
