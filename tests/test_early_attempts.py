"""Attempts before all ranks are back after a restart, as the last one comes back (laws 3 and 11).

A rank that has not heard of that yet stands where attempts do not count, and its peers wait where
they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import anyio
import pytest
from reports import TOLD_SECS
from stores import keys_of
from worlds import AnyBarrier, Tasks, World, crash, crosses, until

from async_barriers import BarrierConnectionError, BarrierTimeoutError, BrokenBarrierError
from async_barriers._client.early import Early
from async_barriers._protocol.verdict import Broken
from async_barriers._store.connection import SocketConnection
from async_barriers._store.future import Future

pytestmark = pytest.mark.anyio


async def one_is_back(world: World, size: int, **options: Any) -> list[AnyBarrier]:
    """Rank 0 was killed and has joined again; its peers have heard that, and have not."""
    ranks = await world.barriers(size)
    crash(ranks[0])
    ranks[0] = world.barrier(0, size, **options)
    await ranks[0].connect()
    return ranks


async def join(*ranks: AnyBarrier, number: int = 1) -> None:
    """Each joins that generation, once it has heard of it."""

    async def joins(barrier: AnyBarrier) -> bool:
        await barrier.connect()
        membership = barrier._session.membership
        return membership is not None and membership.state.number == number

    for barrier in ranks:
        await until(partial(joins, barrier))


@contextmanager
def deaf(barrier: AnyBarrier) -> Iterator[None]:
    """It does not hear its bell."""
    session = barrier._session

    async def hear_nothing() -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_look_around", hear_nothing)
        yield
    session.start(session._look_around())


async def left_of_early(world: World) -> list[str]:
    keys: list[str] = await world.call(keys_of, world.innermost)
    return [key for key in keys if ":x/e" in key]


@pytest.mark.parametrize("how", ["aborts", "fails", "is cancelled", "aborts as it is cancelled"])
async def test_who_gives_up_before_it_hears_that_all_are_back(shared: World, how: str) -> None:
    """Its peer waits where it counts by then, and is told all the same, once."""
    ranks = await one_is_back(shared, 2)
    gives_up, peer = ranks
    async with Tasks() as tasks:
        if "cancelled" in how:
            own = tasks.start(partial(gives_up.execute_barrier, "x", timeout_secs=None))
            await shared.entered(0, name="x", sequence="e0")
        with deaf(gives_up):
            await join(peer)
            waiting = tasks.start(partial(peer.execute_barrier, "x"))
            await shared.entered(1, name="x")
            began = anyio.current_time()
            if how == "fails":
                with pytest.raises(LookupError):
                    async with gives_up.phase("x"):
                        raise LookupError("no shard")
            elif how == "aborts":
                assert await gives_up.abort("no disk", "x")
            elif how == "aborts as it is cancelled":
                aborting = tasks.start(partial(gives_up.abort, "no disk", "x"))
                own.scope.cancel()
                await aborting.returned()
            else:
                own.scope.cancel()
                await own.ended.wait()
            assert (await waiting.raised(BrokenBarrierError)).rank == 0
        assert anyio.current_time() < began + TOLD_SECS
    # One turn is used up for both.
    assert await crosses(ranks) == 1
    assert not await left_of_early(shared)


async def test_it_loses_its_connection_and_is_cancelled_before_it_hears(tcp: World) -> None:
    """Two breaks of one phase are under way, and both learn that it counts elsewhere."""
    ranks = await one_is_back(tcp, 2)
    async with Tasks() as tasks:
        own = tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=None))
        await tcp.entered(0, name="x", sequence="e0")
        with deaf(ranks[0]):
            await join(ranks[1])
            waiting = tasks.start(partial(ranks[1].execute_barrier, "x"))
            await tcp.entered(1, name="x")
            (phase,) = ranks[0]._session.open
            assert isinstance(phase.connection, SocketConnection)
            phase.connection._lose(ConnectionResetError())
            own.scope.cancel()
            await own.ended.wait()
            assert (await waiting.raised(BrokenBarrierError)).rank == 0
    assert await crosses(ranks) == 1
    assert not await left_of_early(tcp)


async def test_a_break_that_all_have_heard_is_not_made_again(shared: World) -> None:
    """The last rank joins after it, and has nothing to do with it."""
    ranks = await one_is_back(shared, 3)
    await join(ranks[1])
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x"))
        await shared.entered(1, name="x", sequence="e0")
        assert await ranks[0].abort("no disk", "x")
        await waiting.raised(BrokenBarrierError)
    await join(ranks[2])
    assert await crosses(ranks) == 0
    assert not await left_of_early(shared)


@pytest.mark.parametrize("comes", [False, True])
async def test_a_deadline_before_it_hears_that_all_are_back(shared: World, comes: bool) -> None:
    """It enters where it counts before it gives up, so all who are there learn the same."""
    ranks = await one_is_back(shared, 3)
    async with Tasks() as tasks:
        waiting = [tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=1.5))]
        await shared.entered(0, name="x", sequence="e0")
        with deaf(ranks[0]):
            await join(*ranks[1:])
            for rank in ranks[1 : 3 if comes else 2]:
                waiting.append(tasks.start(partial(rank.execute_barrier, "x")))
            for call in waiting:
                if comes:
                    assert (await call.returned()).sequence == 0
                else:
                    assert (await call.raised(BarrierTimeoutError)).missing_ranks == (2,)
    if not comes:
        with pytest.raises(BarrierTimeoutError):
            await ranks[2].execute_barrier("x")
    assert await crosses(ranks) == 1
    assert not await left_of_early(shared)


async def test_one_whose_peers_know_that_its_call_broke(tcp: World) -> None:
    """It came back while they waited: they go on with their next call, and it with its own."""
    ranks = await tcp.barriers(2)
    async with Tasks() as tasks:
        first = tasks.start(partial(ranks[1].execute_barrier, "x"))
        await tcp.entered(1, name="x")
        crash(ranks[0])
        ranks[0] = tcp.barrier(0, 2)
        own = tasks.start(partial(ranks[0].execute_barrier, "x"))
        await first.raised(BrokenBarrierError)
        await join(ranks[0])
        await tcp.entered(0, name="x", sequence="e0")
        with deaf(ranks[0]):
            await join(ranks[1])
            second = tasks.start(partial(ranks[1].execute_barrier, "x"))
            await tcp.entered(1, name="x")
            own.scope.cancel()
            await own.ended.wait()
        assert (await ranks[0].execute_barrier("x")).sequence == 0
        assert (await second.returned()).sequence == 0


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Future[None]:
    """When it is resolved, a rank that broke an attempt sees what the roll said."""
    held, counts_by_now = Future[None](), Early._counts_by_now

    async def slowly(*of: Any, **more: Any) -> bool:
        await held
        return await counts_by_now(*of, **more)

    monkeypatch.setattr(Early, "_counts_by_now", slowly)
    return held


async def test_a_break_that_is_slower_than_the_next_call(
    tcp: World, held: Future[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That call meets the peers, so they need not be told."""
    ranks = await one_is_back(tcp, 2)
    # It goes on without the break.
    monkeypatch.setattr(ranks[0]._session, "worry", lambda phase: None)
    async with Tasks() as tasks:
        own = tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=None))
        await tcp.entered(0, name="x", sequence="e0")
        with deaf(ranks[0]):
            await join(ranks[1])
            own.scope.cancel()
            await own.ended.wait()
        assert await crosses(ranks) == 0
        held.resolve(None)
        assert await crosses(ranks) == 1


async def test_the_generation_ends_as_it_learns_the_roll(tcp: World, held: Future[None]) -> None:
    """What it gave up there is nothing to the next generation."""
    ranks = await one_is_back(tcp, 2)
    async with Tasks() as tasks:
        with deaf(ranks[0]):
            await join(ranks[1])
            aborting = tasks.start(partial(ranks[0].abort, "no disk", "x"))
            await until(partial(_is_broken, tcp, tcp.keys("x", "e0").count))
            crash(ranks[1])
            ranks[1] = tcp.barrier(1, 2)
            await ranks[1].connect()
        await join(ranks[0], number=2)
        held.resolve(None)
        assert await aborting.returned()
    assert await crosses(ranks) == 0


async def test_an_attempt_that_was_decided_meanwhile(tcp: World, held: Future[None]) -> None:
    """Its call has a verdict, and enters nowhere."""
    ranks = await one_is_back(tcp, 2)
    session = ranks[0]._session
    async with Tasks() as tasks:
        own = tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=0.5))
        await tcp.entered(0, name="x", sequence="e0")
        (phase,) = session.open
        with deaf(ranks[0]):
            await join(ranks[1])
            await until(partial(_is_broken, tcp, tcp.keys("x", "e0").count))
            session.settle(phase, Broken(1, "no disk"))
            held.resolve(None)
            assert (await own.raised(BrokenBarrierError)).rank == 1
    assert await crosses(ranks) == 0


async def test_a_call_that_returned_enters_nowhere(tcp: World, held: Future[None]) -> None:
    """The store was slow, and its caller knows by now that it is in doubt."""
    ranks = await one_is_back(tcp, 2)
    async with Tasks() as tasks:
        own = tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=0.5))
        await tcp.entered(0, name="x", sequence="e0")
        with deaf(ranks[0]):
            await join(ranks[1])
            waiting = tasks.start(partial(ranks[1].execute_barrier, "x"))
            await own.raised(BarrierConnectionError)
            held.resolve(None)
            assert (await waiting.raised(BarrierTimeoutError)).missing_ranks == (0,)
    assert await crosses(ranks) == 1


async def _is_broken(world: World, count: str) -> bool:
    return (await world.read(count) or b"").startswith(b"-")


async def test_payloads_of_early_attempts_go(tcp: World) -> None:
    """Large ones have keys of their own."""
    ranks = await one_is_back(tcp, 2)

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        return b""

    def commit(rank: int, secs: float) -> Any:
        return partial(
            ranks[rank].commit, publish, payload=b"p" * 1000, name="x", timeout_secs=secs
        )

    with pytest.raises(BarrierTimeoutError):
        await commit(0, 0.3)()
    async with Tasks() as tasks:
        waiting = tasks.start(commit(0, 20.0))
        await tcp.entered(0, name="x", sequence="e1")
        await join(ranks[1])
        await commit(1, 20.0)()
        await waiting.returned()
    assert await crosses(ranks) == 1
    assert not await left_of_early(tcp)
