"""Names that are crossed again and again: the ranks meet in one call, and keep the keys."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import anyio
import anyio.lowlevel
import pytest
from torch.distributed import Store
from worlds import AnyBarrier, Tasks, World, gather

from async_barriers import BarrierResult, BarrierTimeoutError, BrokenBarrierError
from async_barriers._connecting import connect_to
from async_barriers._connection import Connection, TCPConnection
from async_barriers._keys import LOGS, Keys, PhaseKeys
from async_barriers._protocol import _MEETING, LONGEST_SERIES, Forgotten, Turn
from async_barriers._verdict import Gathered, Released, Verdict, breaking, listening

pytestmark = pytest.mark.anyio


async def cross(ranks: list[AnyBarrier], name: str = "") -> set[tuple[int, int]]:
    results = await gather([partial(rank.execute_barrier, name) for rank in ranks])
    return {(result.sequence, result.last_rank) for result in results}


def phase_keys(world: World) -> set[str]:
    store = world.store
    return {key for key in store.list_keys() if "/phase/" in key}


async def test_a_name_in_use_keeps_few_keys(tcp: World) -> None:
    """However often it is crossed, and none of them once all ranks have closed (law 10)."""
    ranks = await tcp.barriers(3)
    for sequence in range(4 * LOGS):
        found = await cross(ranks)
        assert len(found) == 1
        assert found.pop()[0] == sequence
    kept = await tcp.call(phase_keys, tcp)
    assert len(kept) == LOGS + 1
    for name in ("a", "b", "c", "d", "e", "f"):
        for _ in range(3):
            await cross(ranks, name)
    # Of the names that were crossed in a row, some keep their keys; the last ones do not.
    while any("/1:f/" in key for key in await tcp.call(phase_keys, tcp)):
        await anyio.lowlevel.checkpoint()
    for rank in ranks:
        await rank.aclose()
    assert await tcp.call(phase_keys, tcp) == set()


async def test_a_commit_in_the_keys_of_crossings(tcp: World) -> None:
    """It waits for all of its own arrivals, not for as many as were counted before."""

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        return b"".join(payloads[rank] for rank in sorted(payloads))

    ranks = await tcp.barriers(3)
    for crossings in (1, 3):
        for _ in range(crossings):
            await cross(ranks)
        async with Tasks() as tasks:
            waiting = [
                tasks.start(partial(rank.commit, publish, payload=b"%d" % number))
                for number, rank in enumerate(ranks[:2])
            ]
            await anyio.sleep(0.1)
            assert not any(outcome.ended.is_set() for outcome in waiting)
            assert await ranks[2].commit(publish, payload=b"2") == b"012"
            for outcome in waiting:
                assert await outcome.returned() == b"012"


async def test_breaks_between_phases_that_share_keys(tcp: World) -> None:
    """A deadline, an abort and a late rank are what they are elsewhere, and keys do not pile up."""
    ranks = await tcp.barriers(2)
    for _ in range(3):
        for _ in range(LOGS + 2):
            await cross(ranks)
        with pytest.raises(BarrierTimeoutError) as timeout:
            await ranks[0].execute_barrier(timeout_secs=0.1)
        with pytest.raises(BarrierTimeoutError) as late:
            await ranks[1].execute_barrier()
        assert timeout.value.missing_ranks == late.value.missing_ranks == (1,)
        for _ in range(LOGS - 1):
            await cross(ranks)
        await ranks[1].abort("no more")
        with pytest.raises(BrokenBarrierError, match="no more"):
            await ranks[0].execute_barrier()
    for rank in ranks:
        await rank.aclose()
    assert await tcp.call(phase_keys, tcp) == set()


async def test_several_crossings_of_a_name_in_use_at_once(shared: World) -> None:
    """A rank that does not wait for one crossing before it starts the next is in step, too."""
    ranks = await shared.barriers(2)
    sequences: list[int] = []

    async def once(rank: AnyBarrier) -> BarrierResult:
        return await rank.execute_barrier()

    for _ in range(8):
        await cross(ranks)
        results = await gather([partial(once, rank) for rank in ranks for _ in range(3)])
        sequences += sorted(result.sequence for result in results)
    assert len(sequences) == 48
    assert {sequences.count(sequence) for sequence in sequences} == {2}


async def test_a_deadline_of_a_crossing_that_began_too_early(tcp: World) -> None:
    """It breaks its own phase and not the one before, which it did not wait for."""
    ranks = await tcp.barriers(2, lanes=2)
    for _ in range(3):
        await cross(ranks)
    async with Tasks() as tasks:
        first = tasks.start(ranks[0].execute_barrier)
        await tcp.call(lambda: None)
        second = tasks.start(partial(ranks[0].execute_barrier, timeout_secs=0.2))
        await second.raised(BarrierTimeoutError)
        assert not first.ended.is_set()
        assert (await ranks[1].execute_barrier()).sequence == (await first.returned()).sequence
        with pytest.raises(BarrierTimeoutError):
            await ranks[1].execute_barrier()
    assert len(await cross(ranks)) == 1


async def open_at(world: World) -> Connection:
    return await world.call(connect_to, world.store, time.monotonic() + 5, threading.Event())


def turn_of(keys: PhaseKeys, rank: int, *, keeps: bool = True, follows: Turn | None = None) -> Turn:
    return Turn(keys, "x", 5 if follows is None else 6, rank, 2, keeps=keeps, follows=follows)


async def test_one_that_calls_too_early_and_the_keys(tcp: World) -> None:
    """Whoever wants to know the next phase's keys before this one is decided leaves them behind,
    for all ranks; after that it takes them over, as all do."""
    keys = Keys("kept").phase(0, "x", 5)
    stores = [await open_at(tcp) for _ in range(3)]

    def early(before_the_last: bool) -> list[str]:
        turns = [turn_of(keys, rank) for rank in range(2)]
        turns[0].hold()
        thread = threading.Thread(target=turns[0].enter, args=(stores[0],))
        thread.start()
        while stores[2].read(keys.logs[0]) != b"k0\n":
            pass
        following = turn_of(Keys("kept").phase(0, "x", 6), 0, follows=turns[0])
        if before_the_last:
            following.locate(stores[2])
        turns[1].enter(stores[1])
        thread.join()
        if not before_the_last:
            following.locate(stores[2])
        other = turn_of(Keys("kept").phase(0, "x", 6), 1, follows=turns[1])
        for key in (*keys.logs, keys.count, keys.verdict):
            stores[2].delete(key)
        return [following.log, other.log]

    fresh = Keys("kept").phase(0, "x", 6).logs[0]
    assert await tcp.call(early, True) == [fresh, fresh]
    assert await tcp.call(early, False) == [keys.logs[1]] * 2
    for store in stores:
        await tcp.call(store.close)


class SlowReader(TCPConnection):
    """Falls asleep when it is called from the meeting, before it reads the log."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.asleep, self.goes_on = threading.Event(), threading.Event()

    def meet(self, log: str, line: bytes, count: str, total: int) -> bytes:
        super().meet(log, line, count, total)
        self.asleep.set()
        self.goes_on.wait()
        return self.read(log) or b""


async def test_a_reader_that_sleeps(tcp: World) -> None:
    """Another thread of its rank has judged the phase; three phases later it finds their log."""
    slow = SlowReader(await tcp.call(tcp.store.clone))  # type: ignore[attr-defined]
    stores = [await open_at(tcp) for _ in range(2)]

    def meet(turns: list[Turn], last: int, first_on: Connection) -> Future[Verdict | Gathered]:
        first = pool.submit(turns[1 - last].enter, first_on)
        while not stores[last].read(turns[0].log):
            pass
        turns[last].enter(stores[last])
        return first

    def run() -> list[object]:
        keys = Keys("kept").phase(0, "x", 5)
        turns = [turn_of(keys, rank) for rank in range(2)]
        sleeper = turns[0]
        late = meet(turns, 1, slow)
        slow.asleep.wait()
        known = sleeper._decide(stores[0])
        for last in (1, 1, 0):
            turns = [turn_of(keys, turn.rank, follows=turn) for turn in turns]
            meet(turns, last, stores[1 - last]).result()
        assert turns[0].log == sleeper.log
        slow.goes_on.set()
        return [known, late.result(), sleeper.verdict]

    with ThreadPoolExecutor(2) as pool:
        told = await tcp.call(run)
    assert told == [Released(1, listeners=False, shared=True)] * 3
    for store in (slow, *stores):
        await tcp.call(store.close)


async def test_a_reader_whose_line_is_gone(tcp: World) -> None:
    """What others wrote in its place does not release it."""
    slow = SlowReader(await tcp.call(tcp.store.clone))  # type: ignore[attr-defined]
    store = await open_at(tcp)

    def run() -> Verdict | Gathered:
        keys = Keys("kept").phase(0, "x", 5)
        late = pool.submit(turn_of(keys, 0, keeps=False).enter, slow)
        pool.submit(turn_of(keys, 1).enter, store).result()
        slow.asleep.wait()
        store.set(keys.logs[0], b"k0\nk1\n")
        slow.goes_on.set()
        return late.result()

    with ThreadPoolExecutor(2) as pool, pytest.raises(Forgotten):
        await tcp.call(run)
    for connection in (slow, store):
        await tcp.call(connection.close)


async def test_what_was_held_up_on_its_way(tcp: World) -> None:
    """Lines of a phase long over, in a log that serves another one now, break nothing."""
    keys = Keys("kept").phase(0, "x", 5)
    store = await open_at(tcp)
    other = await open_at(tcp)

    def run() -> list[object]:
        store.append(keys.logs[0], breaking(1, 2, "it was cancelled") + listening(1))
        turns = [turn_of(keys, rank) for rank in range(2)]
        with_thread: list[object] = []
        thread = threading.Thread(target=lambda: with_thread.append(turns[0].enter(other)))
        thread.start()
        with_thread.append(turns[1].enter(store))
        thread.join()
        return with_thread

    first, second = await tcp.call(run)
    assert first == second
    assert isinstance(first, Released)
    assert not first.shared
    await tcp.call(store.close)
    await tcp.call(other.close)


async def test_a_wait_that_ended_too_early(tcp: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """c10d knows no endless wait: a rank whose wait it ends listens for the bell."""
    monkeypatch.setattr("async_barriers._dialogue.understood", lambda *_: False)
    ranks = await tcp.barriers(2)
    monkeypatch.setattr("async_barriers._connection._FOREVER", timedelta(milliseconds=300))
    async with Tasks() as tasks:
        waiting = tasks.start(ranks[0].execute_barrier)
        with anyio.fail_after(10):
            while b"l0" not in (await tcp.read(tcp.keys().logs[0]) or b""):
                pass
        monkeypatch.undo()
        await ranks[1].execute_barrier()
        assert (await waiting.returned()).last_rank == 1


@pytest.mark.parametrize("world_size", [2, _MEETING])
async def test_the_last_commit_in_the_keys_of_a_long_series(tcp: World, world_size: int) -> None:
    """All its arrivals are counted, as many as there were before, and told from who gives up."""
    store = await open_at(tcp)
    turn = Turn(Keys("long").phase(0, "x", 0), "x", 0, 0, world_size, leader=0)
    turn.index = LONGEST_SERIES + 1

    def commit() -> Verdict | Gathered:
        arrivals = [b"c%d 0\n" % rank for rank in range(1, world_size)]
        store.append(turn.log, b"".join(arrivals))
        store.add(turn.keys.count, world_size * (turn.index + 1) - 1)
        return turn.enter(store)

    assert await tcp.call(commit) == Gathered(0, 0)
