"""The roll call: each process writes its rank and world size, and reads those of the others.

This comes before any barrier. A barrier refuses a process that does not agree with the first one,
and the first one may be wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .._client import process
from .._protocol.count import MAX_RANKS
from .._protocol.membership import Life
from .._protocol.store import Add, Append, Delete, Read, Set
from .._protocol.verdict import RUBBISH
from .._store.event_loop import Loop
from .._store.sources import Connection
from .._store.waiting import sleep

_ROOT = "async_barriers/doctor/"
_ROLL, _CAME, _OVER, _LEFT = (_ROOT + what for what in ("roll", "came", "over", "left"))
_PAUSE_SECS = 0.1
# If something is odd and no process has come for so long, the waiting ends.
_QUIET_SECS = 2.0
# How long the process that hosts the store waits for the others to read the roll.
_PEERS_SECS = 3.0


@dataclass(frozen=True)
class Entry:
    """The line of one process about itself."""

    rank: int
    world_size: int
    life: Life

    def encode(self) -> bytes:
        """A line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    def __str__(self) -> str:
        return f"process {self.life.pid} on {self.life.host}"


class Roll:
    """One process's part in the roll call, over a connection of its own."""

    def __init__(self, connection: Connection, loop: Loop, rank: int, world_size: int) -> None:
        self.own = Entry(rank, world_size, process.new_life(None))
        self._connection = connection
        self._loop = loop

    async def call(self, deadline: float) -> list[Entry]:
        """Come, and wait for the others: until all are there, something is odd, or ``deadline``."""
        call, now = self._connection.call, self._loop.now
        await call(Append(_ROLL, self.own.encode()), Add(_CAME, 1))
        entries: list[Entry] = []
        seen, looked, quiet_since = 0, False, now()
        while True:
            came, over = await call(Read(_CAME), Read(_OVER))
            if int(came or 0) != seen:
                seen, looked, quiet_since = int(came or 0), False, now()
            quiet = now() - quiet_since
            late = over is not None or now() >= deadline
            # Read it seldom: a thousand processes read the lines of a thousand.
            if not looked and (late or seen >= self.own.world_size or quiet > _QUIET_SECS / 2):
                entries, looked = await self.read(), True
            if looked:
                full = not absent(entries)
                if full and not odd(entries):
                    return entries
                if late or (odd(entries) and (full or quiet > _QUIET_SECS)):
                    # Then the others need not wait either.
                    seen_by_us = b"".join(entry.encode() for entry in entries)
                    await call(Set(_OVER, seen_by_us), Read(_CAME))
                    return entries
            await sleep(self._loop, _PAUSE_SECS + self.own.world_size / 5000)

    async def read(self) -> list[Entry]:
        """The lines of all that have come, in rank order.

        It leaves out processes of this machine that are gone, since a doctor that was killed
        deletes nothing; but not those that another process has found to be odd.
        """
        roll, over = await self._connection.call(Read(_ROLL), Read(_OVER))
        own = self.own.life.token
        there = {
            entry.life.token: entry
            for entry in _entries(roll)
            if entry.life.token == own or _may_live(entry.life)
        }
        there |= {entry.life.token: entry for entry in _entries(over)}
        return sorted(there.values(), key=lambda e: (e.rank, e.life.host, e.life.pid))

    async def over(self) -> None:
        """Done when another process finds something odd after this one has found nothing."""
        while (await self._connection.call(Read(_OVER)))[0] is None:
            await sleep(self._loop, 5 * _PAUSE_SECS)

    async def leave(self, *, hosts: bool) -> None:
        """Need the roll no more. The last process deletes it; the store's host waits for that."""
        deadline = self._loop.now() + _PEERS_SECS
        left, came = await self._connection.call(Add(_LEFT, 1), Read(_CAME))
        if left >= int(came or 0):
            # The one that the host looks at is the last: the store may go with it.
            await self._connection.call(Delete([_ROLL, _OVER, _LEFT, _CAME]))
            return
        while hosts and self._loop.now() < deadline:
            (came,) = await self._connection.call(Read(_CAME))
            if came is None:
                return
            await sleep(self._loop, _PAUSE_SECS)


def _may_live(life: Life) -> bool:
    # In this process it is another claim, as in a test with several ranks in one process.
    return process.lives(life) is not False or life.pid == os.getpid()


def _entries(lines: bytes | None) -> list[Entry]:
    entries = []
    for line in (lines or b"").splitlines():
        with contextlib.suppress(*RUBBISH):
            read = json.loads(line)
            entries.append(Entry(int(read["rank"]), int(read["world_size"]), Life(**read["life"])))
    return entries


def absent(entries: Sequence[Entry]) -> tuple[int, ...]:
    """The ranks that no process has, in a world of the size that most give."""
    sizes = [entry.world_size for entry in entries]
    usual = max(sorted(set(sizes), reverse=True), key=sizes.count)
    return tuple(sorted(set(range(min(usual, MAX_RANKS))) - {entry.rank for entry in entries}))


def odd(entries: Sequence[Entry]) -> bool:
    """Whether something is wrong that no further process can mend."""
    ranks = [entry.rank for entry in entries]
    return (
        len({entry.world_size for entry in entries}) > 1
        or len(set(ranks)) < len(ranks)
        or not all(0 <= entry.rank < entry.world_size for entry in entries)
    )
