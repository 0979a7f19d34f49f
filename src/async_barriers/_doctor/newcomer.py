"""The first steps of a process that has just started: name look-ups, and a first connection."""

from __future__ import annotations

import contextlib
import socket
import time
from itertools import pairwise
from typing import Any

from .._store import connecting
from .._store.connecting import in_thread
from .._store.event_loop import Loop
from .._store.future import Effort
from .._store.sources import Connection, Source, StoreAt, by_threads
from .._store.waiting import settled

Address = tuple[str, int]


class LookUps:
    """Two look-ups of names, timed in a thread of their own, beside everything else.

    A process that connects looks up the store's name. The server looks up the name of that process
    for each connection, and so does c10d's client.
    """

    def __init__(self, loop: Loop, address: Address) -> None:
        self.address = address
        self._loop = loop
        self._began = time.perf_counter()
        self._ends: list[float] = []
        # It goes on by itself, so a silent resolver delays no rank.
        self._effort = Effort(in_thread(loop, "look-ups", self._measure))

    async def end(self, secs: float) -> None:
        """Wait for them, for some seconds at most; one that still goes on is reported so."""
        await settled(self._loop, self._effort, self._loop.now() + secs)

    @property
    def secs(self) -> tuple[float, float]:
        """The seconds for the store's name, and back; those so far, for one that goes on."""
        times = [self._began, *self._ends]
        if not self._effort.done:
            times.append(time.perf_counter())
        spent = [end - start for start, end in pairwise(times)]
        forward, reverse, *_ = [*spent, 0.0, 0.0]
        return forward, reverse

    def _measure(self) -> None:
        # A failure is reported when the name is needed; the time is known by then.
        with contextlib.suppress(OSError):
            try:
                found = socket.getaddrinfo(*self.address, type=socket.SOCK_STREAM)
            finally:
                self._ends.append(time.perf_counter())
            try:
                socket.getnameinfo(_own_address(found[0]), 0)
            finally:
                self._ends.append(time.perf_counter())


def _own_address(target: tuple[Any, ...]) -> tuple[str, int]:
    """The own address as the server sees it, which listens on IPv6."""
    with socket.socket(target[0], socket.SOCK_DGRAM) as probe:
        # The address of a datagram socket that sends nothing.
        probe.connect(target[4])
        own: str = probe.getsockname()[0]
    return (own if ":" in own else f"::ffff:{own}", 1)


async def first_connection(source: Source, loop: Loop, deadline: float) -> Connection:
    """Connect as the barrier does, but say so if no TCPStore answers.

    :raises NotUnderstood: something else listens there
    :raises BarrierConnectionError: as `Source.open`
    """
    if isinstance(source, StoreAt) and not await source.hosts(loop) and not by_threads(False):
        return await connecting.connect(loop, *source.address, deadline)
    return await source.open(loop, deadline)
