"""What one crossing of a new name runs through, and says: so that nobody adds to it unawares.

The goal is at most 30 functions of ours in 8 rooms (modules), one message for a rank that enters,
one more for the last one, and bytes that do not depend on the number of ranks. Today it is 85
functions in 16 rooms (95 in 17 where a rank has waited for so long that it asks who came last), and
9 bytes received. The last rank receives 41, and one phase's log, which it looks after: 11 bytes for
each rank at most. The ceilings are a little above; whoever needs less lowers them.
"""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median_low
from types import CodeType, FrameType
from typing import Any

import anyio
import pytest
from worlds import AnyBarrier, World

import async_barriers
from async_barriers import BarrierResult, BrokenBarrierError
from async_barriers._client import hearing
from async_barriers._store.connection import SocketConnection

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

PACKAGE = str(Path(async_barriers.__file__).parent)
CROSSINGS = 12
# Of a rank that waits and of the last one together: functions, rooms.
AT_ONCE = (85, 16)
LATE = (95, 17)
# For a rank that waits, and for the last one, in any world.
MESSAGES = (1, 2)
BYTES_RECEIVED = (10, 42)
# More for the last one, for each rank of so small a world.
LOG_BYTES = 8


class Taken:
    """What crossings ran through, each by itself.

    :ivar seen: in how many crossings each function did
    :ivar sent: messages by rank, of all crossings
    :ivar received: bytes by rank, of all crossings
    :ivar each: messages and bytes by rank, of one crossing each
    """

    def __init__(self, ranks: list[AnyBarrier]) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()
        self.each: list[tuple[Counter[int], Counter[int]]] = []
        self._ranks = ranks
        self._codes: set[CodeType] = set()

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        # No more here: it makes those wait for long that are to wait for a moment.
        if event == "call":
            self._codes.add(frame.f_code)

    def functions(self) -> Iterator[tuple[str, str]]:
        """Those of ours that ran."""
        for code in self._codes:
            # A comprehension is part of its function, and has a frame in some Pythons only.
            inner = code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
            if code.co_filename.startswith(PACKAGE) and not inner:
                room = str(Path(code.co_filename).relative_to(PACKAGE).with_suffix(""))
                yield room, f"{code.co_name}:{code.co_firstlineno}"

    @contextmanager
    def crossing(self) -> Iterator[None]:
        """One of them."""
        self._codes = set()
        sys.setprofile(self.profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            self.seen.update(set(self.functions()))

    def count(self, patch: pytest.MonkeyPatch) -> None:
        """Count what is sent and received."""
        send, recv = socket.socket.send, socket.socket.recv
        rank_of = {
            id(connection._socket): number
            for number, rank in enumerate(self._ranks)
            for connection in rank._session._connections()
            if isinstance(connection, SocketConnection)
        }

        def sending(sock: socket.socket, *args: Any) -> int:
            self.sent[rank_of.get(id(sock), -1)] += 1
            return send(sock, *args)

        def receiving(sock: socket.socket, *args: Any) -> bytes:
            data = recv(sock, *args)
            self.received[rank_of.get(id(sock), -1)] += len(data)
            return data

        patch.setattr(socket.socket, "send", sending)
        patch.setattr(socket.socket, "recv", receiving)

    def usual(self) -> list[tuple[str, str]]:
        """What ran in most of the crossings: timers come between others."""
        return sorted(each for each, times in self.seen.items() if times > CROSSINGS // 2)


def has_entered(rank: AnyBarrier) -> bool:
    """Whether nothing is due to it but the byte that releases it."""
    used = [phase.connection for phase in rank._session.open]
    return bool(used) and all(
        isinstance(each, SocketConnection) and len(each._due) == 1 for each in used
    )


async def cross(
    path: Taken, ranks: list[AnyBarrier], name: str, *, late: bool
) -> list[BarrierResult]:
    """All ranks, the last one after all others are known to have entered; what those got."""
    entered = anyio.Event()
    results: list[BarrierResult] = []

    async def first(rank: AnyBarrier) -> None:
        results.append(await rank.execute_barrier(name))

    async def last() -> None:
        await entered.wait()
        await ranks[-1].execute_barrier(name)

    async def let_it() -> None:
        while not all(map(has_entered, ranks[:-1])):
            await anyio.sleep(0)
        if late:
            await anyio.sleep(0.03)
        entered.set()

    with path.crossing():
        async with anyio.create_task_group() as tasks:
            for rank in ranks[:-1]:
                tasks.start_soon(first, rank)
            tasks.start_soon(last)
            tasks.start_soon(let_it)
    return results


async def crossed(ranks: list[AnyBarrier], patch: pytest.MonkeyPatch, *, late: bool) -> Taken:
    """Some crossings of new names, in which who waited did so for a moment, or for long."""
    path = Taken(ranks)
    for number in range(5):
        await cross(path, ranks, f"before {number}", late=False)
    path = Taken(ranks)
    path.count(patch)
    if not late:
        # On a busy machine, most waits are long.
        patch.setattr(hearing, "WAITED_SECS", 5.0)
    done = tries = 0
    while done < CROSSINGS:
        tries += 1
        assert tries < 20 * CROSSINGS
        before = path.seen.copy(), path.sent.copy(), path.received.copy()
        results = await cross(path, ranks, f"step {tries}", late=late)
        if any((result.last_rank is None) == late for result in results):
            # The machine was busy.
            path.seen, path.sent, path.received = before
        else:
            done += 1
            path.each.append((path.sent - before[1], path.received - before[2]))
    return path


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
async def test_functions(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: str, late: bool
) -> None:
    """How many there are of ours, and in how many rooms."""
    path = await crossed(await tcp.barriers(2), monkeypatch, late=late)
    functions = path.usual()
    rooms = sorted({room for room, _ in functions})
    most_functions, most_rooms = LATE if late else AT_ONCE
    assert len(functions) <= most_functions, functions
    assert len(rooms) <= most_rooms, rooms


@pytest.mark.parametrize("world_size", [2, 5])
async def test_messages(
    tcp: World, monkeypatch: pytest.MonkeyPatch, anyio_backend: str, world_size: int
) -> None:
    """One to enter; the last one says one more, that releases the others. What is received is the
    same in any world."""
    path = await crossed(await tcp.barriers(world_size), monkeypatch, late=False)
    assert set(path.sent) == set(path.received) == set(range(world_size))
    for rank in range(world_size):
        is_last = rank == world_size - 1
        # What waits for company may be sent on its own, four times a second: on a busy machine that
        # is in some of the crossings.
        assert median_low(sent[rank] for sent, _ in path.each) == MESSAGES[is_last]
        log = LOG_BYTES * world_size * is_last
        most = BYTES_RECEIVED[is_last] + log
        assert median_low(received[rank] for _, received in path.each) <= most


@pytest.mark.parametrize("step", [None, 3], ids=["", "step"])
async def test_messages_of_a_break(
    tcp: World,
    monkeypatch: pytest.MonkeyPatch,
    anyio_backend: str,
    step: int | None,
) -> None:
    """A rank that has not entered breaks the phase and rings in one message, so that no break is
    left unsaid if the rank dies; with steps there is a note in it. Each of those that wait looks
    once."""
    ranks = await tcp.barriers(3)
    path = Taken(ranks)

    async def waits(rank: AnyBarrier) -> None:
        with pytest.raises(BrokenBarrierError):
            await rank.execute_barrier("x", step=step)

    async with anyio.create_task_group() as tasks:
        for rank in ranks[:-1]:
            tasks.start_soon(waits, rank)
        while not all(map(has_entered, ranks[:-1])):
            await anyio.sleep(0)
        with monkeypatch.context() as patched:
            path.count(patched)
            await ranks[-1].abort("no space", "x", step=step)
            while any(rank._session.open for rank in ranks[:-1]):
                await anyio.sleep(0)
    assert path.sent == {0: 1, 1: 1, 2: 1}, path.sent


@pytest.mark.parametrize(
    ("leader", "messages"),
    [(2, {0: 2, 1: 2, 2: 3}), (0, {0: 4, 1: 2, 2: 3})],
    ids=["leader comes last", "leader comes first"],
)
async def test_messages_of_a_commit(
    tcp: World,
    monkeypatch: pytest.MonkeyPatch,
    anyio_backend: str,
    leader: int,
    messages: dict[int, int],
) -> None:
    """Each rank enters, and reads the verdict that the leader writes. A leader that comes last has
    the payloads with the answer to its entry; another one is woken by the last, and reads them.
    The leader then wakes observers."""
    ranks = await tcp.barriers(3)

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        return b"".join(payloads.values())

    async def commits(rank: AnyBarrier) -> None:
        payload = b"%d" % ranks.index(rank)
        told = await rank.commit(publish, payload=payload, name="x", leader=leader)
        assert told == b"012"

    path = Taken(ranks)
    with monkeypatch.context() as patched:
        path.count(patched)
        async with anyio.create_task_group() as tasks:
            for rank in ranks[:-1]:
                tasks.start_soon(commits, rank)
            while not all(map(has_entered, ranks[:-1])):
                await anyio.sleep(0)
            tasks.start_soon(commits, ranks[-1])
    assert path.sent == messages, path.sent
