"""Waiting on any loop: for times, sockets, Futures, and the results of threads."""

from __future__ import annotations

import math
import socket
from typing import Any, TypeVar

from .event_loop import Loop
from .future import Future
from .worker import Promise

T = TypeVar("T")


def sleep(loop: Loop, secs: float) -> Future[None]:
    """Done after ``secs`` seconds."""
    slept: Future[None] = Future()
    loop.call_at(loop.now() + secs, lambda: slept.resolve(None))
    return slept


def within(loop: Loop, future: Future[Any], secs: float) -> Future[bool]:
    """Wait up to ``secs`` seconds for ``future``; whether it is done then."""
    came: Future[bool] = Future()
    if future.done:
        came.resolve(True)
        return came
    timer = loop.call_at(loop.now() + max(0.0, secs), lambda: came.resolve(False))

    def is_done() -> None:
        timer.cancel()
        came.resolve(True)

    future.when_done(is_done)
    return came


def writable(loop: Loop, sock: socket.socket) -> Future[None]:
    """Done when ``sock`` can be written to, for example when it is connected."""
    ready: Future[None] = Future()

    def is_ready() -> None:
        loop.unwatch_writable(sock)
        ready.resolve(None)

    loop.watch_writable(sock, is_ready)
    return ready


async def settled(loop: Loop, future: Future[Any], until: float) -> bool:
    """In a task of the loop: wait for ``future``, until the loop's clock reaches ``until``.

    **Cancellation:** the work behind the future goes on.
    """
    if future.done:
        return True
    waiter = loop.waiter()
    future.when_done(waiter.wake)
    await waiter.wait(until)
    return future.done


async def until_done(loop: Loop, future: Future[T], secs: float) -> bool:
    """Wait up to ``secs`` seconds for ``future``; only a second cancellation ends that sooner.

    For work that undoes something: it goes on by itself if the waiting ends.
    """
    deadline = loop.now() + secs
    cancelled: BaseException | None = None
    while not future.done and loop.now() < deadline:
        try:
            await settled(loop, future, deadline)
        except BaseException as exc:
            if cancelled is not None or isinstance(exc, GeneratorExit):
                raise
            cancelled = exc
    if cancelled is not None:
        raise cancelled
    return future.done


async def told(loop: Loop, promise: Promise[Any], until: float = math.inf) -> bool:
    """In a task of the loop: wait for ``promise``, until the loop's clock says ``until``.

    True if it is settled.

    **Cancellation:** the call behind the promise goes on.
    """
    if promise.done():
        return True
    waiter = loop.waiter()
    promise.when_settled(lambda: loop.post(waiter.wake))
    await waiter.wait(until)
    return promise.done()
