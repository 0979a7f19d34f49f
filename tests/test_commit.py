"""What `commit` promises: everyone's work is published once, by one rank, or not at all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import anyio
import pytest
from stores import Data, PlainStore
from worlds import AnyBarrier, Outcome, Tasks, World, gather, until

from async_barriers import (
    Barrier,
    BarrierClosedError,
    BarrierConnectionError,
    BarrierResult,
    BarrierTimeoutError,
    BrokenBarrierError,
    _crossing_barrier,
)
from async_barriers._barrier import CONFIGURED, MAX_PAYLOAD_BYTES, Timeout
from async_barriers._connecting import connect_to
from async_barriers._connection import Connection
from async_barriers._protocol import Turn
from async_barriers._verdict import Broken, Gathered, Released, encode

pytestmark = pytest.mark.anyio


class Publisher:
    """A ``publish`` that counts its calls, and parks at its start where it is told to."""

    def __init__(self, result: Any = b"published", *, parks: bool = False) -> None:
        self.result = result
        self.calls: list[dict[int, bytes]] = []
        self.started = anyio.Event()
        self.go_on = anyio.Event()
        self.was_cancelled = False
        if not parks:
            self.go_on.set()

    async def __call__(self, payloads: Mapping[int, bytes]) -> Any:
        self.calls.append(dict(payloads))
        self.started.set()
        try:
            await self.go_on.wait()
        except anyio.get_cancelled_exc_class():
            self.was_cancelled = True
            raise
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def commits(
    tasks: Tasks,
    ranks: Iterable[AnyBarrier],
    publish: Callable[[Mapping[int, bytes]], Any],
    name: str = "x",
    **options: Any,
) -> list[Outcome]:
    """Have ``ranks`` commit ``name``, each in a task of its own."""
    return [tasks.start(partial(rank.commit, publish, name=name, **options)) for rank in ranks]


async def commits_again(ranks: list[AnyBarrier], name: str = "x") -> None:
    """Commit ``name`` with everyone: what broke before must not matter (law 10)."""
    publish = Publisher(b"again")
    results = await gather(partial(rank.commit, publish, name=name) for rank in ranks)
    assert results == [b"again"] * len(ranks)
    assert len(publish.calls) == 1


async def nothing_is_left(world: World) -> None:
    """Wait until no phase has a key in the store any more (law 10)."""

    async def none() -> bool:
        return not any("/phase/" in key for key in await world.call(world.store.list_keys))

    await until(none)


async def happens(event: threading.Event) -> None:
    """Wait for what a thread of the library reports."""

    async def happened() -> bool:
        return event.is_set()

    await until(happened)


def data(world: World) -> Data:
    """What is in a store written in Python, and its hook for faults."""
    assert isinstance(world.store, PlainStore)
    return world.store.data


async def are_told(outcomes: list[Outcome], rank: int, reason: str) -> None:
    """Each ends broken by ``rank`` for ``reason``, and is in no doubt about it."""
    for outcome in outcomes:
        error = await outcome.raised(BrokenBarrierError)
        assert (error.rank, error.reason, error.in_doubt) == (rank, reason, False)
        assert (error.name, error.sequence) == ("x", 0)


# What every barrier over every store does.


async def test_the_leader_publishes_for_all(world: World) -> None:
    """Once, with everyone's payload, whoever leads and comes last; all get what it returned."""
    ranks = await world.barriers(3)
    brought = [b"\xff\0\n of rank 0", b"", b"x" * 70_000]
    for leader, last, returned in ((0, 2, b"\0\xfe\n"), (2, 2, b""), (1, 0, None)):
        publishers = [Publisher(returned) for _ in ranks]
        order = [rank for rank in range(3) if rank != last]

        def call(
            rank: int, publishers: list[Publisher] = publishers, leader: int = leader
        ) -> Callable[[], Coroutine[Any, Any, bytes]]:
            return partial(
                ranks[rank].commit,
                publishers[rank],
                payload=brought[rank],
                name=f"step {leader}",
                leader=leader,
            )

        async with Tasks() as tasks:
            outcomes = [tasks.start(call(rank)) for rank in order]
            await world.entered(*order, name=f"step {leader}")
            assert not any(publisher.calls for publisher in publishers)
            outcomes.append(tasks.start(call(last)))
            for outcome in outcomes:
                assert await outcome.returned() == (returned or b"")
        assert publishers[leader].calls == [dict(enumerate(brought))]
        assert sum(len(publisher.calls) for publisher in publishers) == 1
    await nothing_is_left(world)


async def test_a_publish_that_raises(world: World) -> None:
    """The leader gets that very exception, its peers are told, and the next commit works."""
    ranks = await world.barriers(3)
    fault = OSError("disk full")
    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks, Publisher(fault), leader=1)
        assert await outcomes.pop(1).raised(OSError) is fault
        await are_told(outcomes, 1, "publish failed: it raised OSError: disk full")
    await commits_again(ranks)
    await nothing_is_left(world)


async def test_a_peers_deadline_breaks_nothing_once_publishing_has_begun(world: World) -> None:
    """That peer is in doubt and says where to look; all others are released."""
    ranks = await world.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        released = commits(tasks, ranks[:2], publish, timeout_secs=None)
        await world.entered(0, 1, name="x")
        (late,) = commits(tasks, ranks[2:], publish, timeout_secs=0.4)
        error = await late.raised(BarrierTimeoutError)
        assert error.in_doubt
        assert (error.missing_ranks, error.timeout_secs) == ((), 0.4)
        assert "all ranks had entered and rank 0 was publishing" in str(error)
        assert not any(outcome.ended.is_set() for outcome in released)
        publish.go_on.set()
        for outcome in released:
            assert await outcome.returned() == b"published"
    await commits_again(ranks)
    await nothing_is_left(world)


async def test_the_leaders_deadline_stops_publishing(tcp: World) -> None:
    """It is everyone's timeout then, with nobody missing, and publish was cancelled."""
    ranks = await tcp.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks[1:], publish, timeout_secs=None)
        await tcp.entered(1, 2, name="x")
        outcomes += commits(tasks, ranks[:1], publish, timeout_secs=0.4)
        for outcome in outcomes:
            error = await outcome.raised(BarrierTimeoutError)
            assert (error.missing_ranks, error.timeout_secs) == ((), 0.4)
            assert not error.in_doubt
            assert "rank 0 was still publishing, and was stopped" in str(error)
    assert publish.was_cancelled
    await commits_again(ranks)
    await nothing_is_left(tcp)


async def test_the_order_of_the_log_settles_who_speaks(shared: World) -> None:
    """The leader's give-up against the beginning of its publish, both ways, step by step."""
    await shared.barriers(2)
    stores = [
        await shared.call(connect_to, shared.store, time.monotonic() + 5, threading.Event())
        for _ in range(3)
    ]
    published = Released(1, b"done")
    late = Broken(0, "late", 1.0)

    def race(name: str, steps: Callable[[Turn, Turn, Connection], list[object]]) -> list[object]:
        turns = [Turn(shared.keys(name=name), name, 0, rank, 2, leader=0) for rank in range(2)]
        for turn in turns:
            assert turn.hold()
        with ThreadPoolExecutor(2) as pool:
            entering = pool.submit(turns[0].enter, stores[0], b"brought")
            while not (stores[2].read(turns[0].log) or b"").startswith(b"c0 0"):
                pass
            # The last one in is a peer: it wakes the leader, and then waits for its word.
            following = pool.submit(turns[1].enter, stores[1])
            assert entering.result() == Gathered(1, 0)
            heard = steps(turns[0], turns[1], stores[2])
            heard.append(following.result())
        for turn in turns:
            turn.release(stores[2])
        return heard

    def publish_first(leader: Turn, peer: Turn, store: Connection) -> list[object]:
        assert leader.claim()
        assert leader.give_up(store, "late", 1.0) == Gathered(1, 0)
        assert peer.give_up(store, "late, too", 1.0) == Gathered(1, 0)
        assert leader.payloads(store) == {0: b"brought", 1: b""}
        first = leader.settle(store, published)
        return [first, leader.settle(store, late), leader.await_verdict(store)]

    def give_up_first(leader: Turn, peer: Turn, store: Connection) -> list[object]:
        gave_up = leader.give_up(store, "late", 1.0)
        assert not leader.claim()
        assert leader.give_up(store, "later", 2.0) == late
        return [gave_up, leader.settle(store, published), leader.await_verdict(store)]

    assert await shared.call(race, "a", publish_first) == [published] * 4
    assert await shared.call(race, "b", give_up_first) == [late] * 4
    for store in stores:
        await shared.call(store.close)
    await nothing_is_left(shared)


# Calls that are wrong.


async def test_a_bad_call_uses_up_no_turn(memory: World) -> None:
    """It is refused at once, before anyone is entered, and the next call is the first."""
    ranks = await memory.barriers(2)
    publish = Publisher()
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"payload": "text"}, TypeError, "payload must be bytes, not str"),
        ({"payload": b"x" * (MAX_PAYLOAD_BYTES + 1)}, ValueError, "payload has 4194305 bytes"),
        # Its length is counted in items, of eight bytes here.
        (
            {"payload": memoryview(bytes(MAX_PAYLOAD_BYTES + 8)).cast("Q")},
            ValueError,
            "payload has 4194312 bytes",
        ),
        ({"leader": 2}, ValueError, "rank 2 is outside the world; with 2 ranks"),
        ({"leader": -1}, ValueError, "rank -1 is outside the world"),
        ({"leader": True}, TypeError, "rank must be an integer, not True"),
        ({"name": 3}, TypeError, "name must be a string, not 3"),
        ({"timeout_secs": 0}, ValueError, "timeout_secs is 0"),
    ]
    for options, kind, message in bad:
        with pytest.raises(kind, match=message):
            await ranks[0].commit(publish, **{"name": "x", **options})
    assert not publish.calls
    results = await gather(partial(rank.execute_barrier, "x") for rank in ranks)
    assert [result.sequence for result in results] == [0, 0]


async def test_payloads_as_large_as_they_may_be(tcp: World) -> None:
    """4 MiB from every rank and back, as bytes of any kind."""
    ranks = await tcp.barriers(2)
    largest = bytes(range(256)) * (MAX_PAYLOAD_BYTES // 256)
    publish = Publisher(memoryview(largest))
    payloads = (bytearray(largest), memoryview(largest))
    results = await gather(
        partial(rank.commit, publish, payload=payload)  # type: ignore[arg-type]
        for rank, payload in zip(ranks, payloads, strict=True)
    )
    assert results == [largest] * 2
    assert publish.calls == [{0: largest, 1: largest}]
    assert all(isinstance(payload, bytes) for payload in publish.calls[0].values())


@pytest.mark.parametrize(
    ("returned", "kind", "message"),
    [
        ("text", TypeError, "publish's result must be bytes, not str"),
        (b"x" * (MAX_PAYLOAD_BYTES + 1), ValueError, "publish's result has 4194305 bytes"),
    ],
    ids=["no bytes", "too many"],
)
async def test_a_result_that_cannot_be_sent_was_published(
    memory: World, returned: object, kind: type[Exception], message: str
) -> None:
    """The leader is told what is wrong with it; its peers are released, with nothing."""
    ranks = await memory.barriers(2)
    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks, Publisher(returned))
        assert message in str(await outcomes[0].raised(kind))
        assert await outcomes[1].returned() == b""
    await commits_again(ranks)
    await nothing_is_left(memory)


async def test_alone_in_the_world(memory: World) -> None:
    """The only rank gathers at once, and publishes what it brought."""
    (alone,) = await memory.barriers(1)
    publish = Publisher()
    assert await alone.commit(publish, payload=b"mine") == b"published"
    assert publish.calls == [{0: b"mine"}]
    await nothing_is_left(memory)


async def test_commits_of_different_names_at_once(memory: World) -> None:
    """Each has a leader, payloads and a result of its own, in whatever order they are entered."""
    ranks = await memory.barriers(3, lanes=3)
    names = [f"shard {leader}" for leader in range(3)]
    publishers = [Publisher(name.encode(), parks=True) for name in names]

    def call(rank: int, leader: int) -> Callable[[], Coroutine[Any, Any, bytes]]:
        return partial(
            ranks[rank].commit,
            publishers[leader],
            payload=b"%d for %d" % (rank, leader),
            name=names[leader],
            leader=leader,
        )

    async with Tasks() as tasks:
        outcomes = {
            (rank, leader): tasks.start(call(rank, leader))
            for rank in range(3)
            for leader in ([0, 1, 2], [2, 0, 1], [1, 2, 0])[rank]
        }
        for publisher in publishers:
            await publisher.started.wait()
        for publisher in publishers:
            publisher.go_on.set()
        for (_, leader), outcome in outcomes.items():
            assert await outcome.returned() == names[leader].encode()
    for leader, publisher in enumerate(publishers):
        assert publisher.calls == [{rank: b"%d for %d" % (rank, leader) for rank in range(3)}]
    await nothing_is_left(memory)


# Before all are in, a commit breaks like any other phase.


async def test_a_rank_that_does_not_come(memory: World) -> None:
    """A deadline breaks it for all, the late one too, and publish is never called."""
    ranks = await memory.barriers(3)
    publish = Publisher()
    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks[:1], publish)
        outcomes += commits(tasks, ranks[1:2], publish, timeout_secs=0.3)
        errors = [await outcome.raised(BarrierTimeoutError) for outcome in outcomes]
        (late,) = commits(tasks, ranks[2:], publish, payload=b"too late")
        errors.append(await late.raised(BarrierTimeoutError))
    for error in errors:
        assert (error.missing_ranks, error.timeout_secs, error.in_doubt) == ((2,), 0.3, False)
    assert not publish.calls
    await commits_again(ranks)
    await nothing_is_left(memory)


@pytest.mark.parametrize("culprit", [0, 2], ids=["leader", "peer"])
@pytest.mark.parametrize("how", ["abort", "abort first", "phase", "cancel", "close"])
async def test_broken_before_all_are_in(memory: World, how: str, culprit: int) -> None:
    """Everyone is told by whom and why, and publish is never called."""
    ranks = await memory.barriers(3)
    publish = Publisher()
    peers = [rank for rank in range(3) if rank not in (1, culprit)]
    async with Tasks() as tasks:
        outcomes = commits(tasks, [ranks[rank] for rank in peers], publish, payload=b"mine")
        await memory.entered(*peers, name="x")
        if how == "abort first":
            await ranks[culprit].abort("no", "x")
            reason = "no"
        elif how == "phase":
            with pytest.raises(OSError, match="no"):
                async with ranks[culprit].phase("x"):
                    raise OSError("no")
            reason = "it raised OSError: no"
        else:
            (own,) = commits(tasks, [ranks[culprit]], publish)
            await memory.entered(culprit, name="x")
            if how == "abort":
                await ranks[culprit].abort("no", "x")
                reason = "no"
                await are_told([own], culprit, reason)
            elif how == "cancel":
                own.scope.cancel()
                reason = "its task was cancelled"
                await own.ended.wait()
                assert own.scope.cancelled_caught
            else:
                await ranks[culprit].aclose()
                reason = "it closed its barrier"
                assert not (await own.raised(BarrierClosedError)).in_doubt
        await are_told(outcomes, culprit, reason)
        await are_told(commits(tasks, [ranks[1]], publish), culprit, reason)
    assert not publish.calls
    await nothing_is_left(memory)
    if how != "close":
        await commits_again(ranks)


async def test_ranks_must_make_the_same_call(memory: World) -> None:
    """Two leaders, or a commit that meets execute_barrier: broken for all, who are told why."""
    ranks = await memory.barriers(2)
    publish = Publisher()
    as_leader = [
        partial(rank.commit, publish, payload=b"p", leader=n) for n, rank in enumerate(ranks)
    ]
    others: list[tuple[Callable[[], Coroutine[Any, Any, Any]], str]] = [
        (as_leader[1], "commit(leader=1)"),
        (ranks[1].execute_barrier, "execute_barrier()"),
    ]
    for sequence, (other, said) in enumerate(others):
        async with Tasks() as tasks:
            outcomes = [tasks.start(as_leader[0])]
            await memory.entered(0, sequence=sequence)
            outcomes.append(tasks.start(other))
            for outcome in outcomes:
                error = await outcome.raised(BrokenBarrierError)
                assert error.rank == 1
                assert f"it called {said} where rank 0 called commit(leader=0)" in error.reason
    assert not publish.calls
    await commits_again(ranks, "")
    await nothing_is_left(memory)


# Once it publishes, only the leader settles.


@pytest.mark.parametrize("how", ["cancel", "abort", "close"])
async def test_a_peer_that_leaves_breaks_nothing_once_publishing_has_begun(
    memory: World, how: str
) -> None:
    """The leader and the others are released, the one that aborted as well."""
    ranks = await memory.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks, publish)
        await publish.started.wait()
        if how == "cancel":
            leaving = outcomes.pop()
            leaving.scope.cancel()
            await leaving.ended.wait()
            assert leaving.scope.cancelled_caught
        elif how == "abort":
            await ranks[2].abort("no", "x")
        else:
            await ranks[2].aclose()
            assert (await outcomes.pop().raised(BarrierClosedError)).in_doubt
        assert not any(outcome.ended.is_set() for outcome in outcomes)
        publish.go_on.set()
        for outcome in outcomes:
            assert await outcome.returned() == b"published"
    await nothing_is_left(memory)
    if how != "close":
        await commits_again(ranks)


async def test_cancelling_the_leader_cancels_publish(memory: World) -> None:
    """Its cancellation goes on at once, and its peers learn that nothing was published."""
    ranks = await memory.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks, publish, timeout_secs=None)
        await publish.started.wait()
        leading = outcomes.pop(0)
        leading.scope.cancel()
        await leading.ended.wait()
        assert leading.scope.cancelled_caught
        assert publish.was_cancelled
        await are_told(outcomes, 0, "publish failed: its task was cancelled")
    await commits_again(ranks)
    await nothing_is_left(memory)


@pytest.mark.parametrize("timeout_secs", [None, 20.0], ids=["no deadline", "in time"])
@pytest.mark.parametrize("how", ["abort", "close"])
async def test_stopping_the_leader_stops_publish(
    memory: World, how: str, timeout_secs: float | None
) -> None:
    """abort() and aclose() on the leader return when the phase is broken, for their reason."""
    ranks = await memory.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        leading, *following = commits(tasks, ranks, publish, timeout_secs=timeout_secs)
        await publish.started.wait()
        if how == "abort":
            await ranks[0].abort("second thoughts", "x")
            await are_told([leading, *following], 0, "second thoughts")
        else:
            await ranks[0].aclose()
            assert not (await leading.raised(BarrierClosedError)).in_doubt
            await are_told(following, 0, "it closed its barrier")
        assert publish.was_cancelled
    await nothing_is_left(memory)
    if how == "abort":
        await commits_again(ranks)


async def test_publish_may_abort_its_own_commit(memory: World) -> None:
    """abort() inside publish stops it there, and all are told."""
    ranks = await memory.barriers(2)

    async def publish(_: Mapping[int, bytes]) -> bytes:
        await ranks[0].abort("second thoughts", "x")
        raise AssertionError("publish went on")

    async with Tasks() as tasks:
        await are_told(commits(tasks, ranks, publish), 0, "second thoughts")
    await commits_again(ranks)
    await nothing_is_left(memory)


async def test_closing_is_cancelled_while_the_leader_publishes(memory: World) -> None:
    """Publish is stopped and its peers are told all the same."""
    ranks = await memory.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        leading, *following = commits(tasks, ranks, publish, timeout_secs=None)
        await publish.started.wait()
        closing = tasks.start(ranks[0].aclose)
        closing.scope.cancel()
        await closing.ended.wait()
        assert closing.secs < 1
        assert not (await leading.raised(BarrierClosedError)).in_doubt
        await are_told(following, 0, "it closed its barrier")
    await nothing_is_left(memory)


async def test_a_publish_that_outlasts_its_barrier(
    memory: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing does not wait for ever; the leader says that it published and could not tell."""
    monkeypatch.setattr(_crossing_barrier, "_PEERS_SECS", 0.5)
    ranks = await memory.barriers(2)
    publish = Publisher(parks=True)

    async def stubborn(payloads: Mapping[int, bytes]) -> Any:
        with anyio.CancelScope(shield=True):
            return await publish(payloads)

    async with Tasks() as tasks:
        leading, following = commits(tasks, ranks, stubborn, timeout_secs=1.5)
        await publish.started.wait()
        await ranks[0].aclose()
        assert not leading.ended.is_set()
        publish.go_on.set()
        error = await leading.raised(BarrierConnectionError)
        assert error.in_doubt
        assert "rank 0 published, but this barrier was closed before its peers" in str(error)
        assert (await following.raised(BarrierTimeoutError)).in_doubt
    # Ends the thread that still waits for it, as the end of a real connection would.
    await memory.call(memory.store.set, memory.keys(name="x").verdict, encode(Released(1)))


async def test_the_leader_closes_as_the_last_rank_comes_in(memory: World) -> None:
    """It learns that all are in when it is closing: it does not publish, and its peer is told."""
    ranks = await memory.barriers(2)
    keys = memory.keys(name="x")
    publish = Publisher()
    control = ranks[0]._session._lanes.control._worker._thread
    closing, all_in = threading.Event(), threading.Event()

    def hook(operation: str, key: str) -> None:
        if key == keys.logs[0] and threading.current_thread() is control:
            closing.set()
            all_in.wait()

    data(memory).hook = hook
    async with Tasks() as tasks:
        (leading,) = commits(tasks, ranks[:1], publish)
        await memory.entered(0, name="x")
        tasks.start(ranks[0].aclose)
        await happens(closing)
        (following,) = commits(tasks, ranks[1:], publish)
        await leading.raised(BarrierClosedError)
        all_in.set()
        await are_told([following], 0, "it closed its barrier")
    assert not publish.calls
    await nothing_is_left(memory)


@pytest.mark.parametrize("how", ["deadline", "abort"])
async def test_a_publish_that_ends_all_the_same_has_published(memory: World, how: str) -> None:
    """One that is stopped, and returns normally in spite of it, releases everyone."""
    ranks = await memory.barriers(2)
    inside = anyio.Event()

    async def publish(_: Mapping[int, bytes]) -> bytes:
        inside.set()
        try:
            await anyio.sleep_forever()
        finally:
            return b"all the same"  # noqa: B012

    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks[1:], publish, timeout_secs=None)
        await memory.entered(1, name="x")
        limit = 0.3 if how == "deadline" else None
        outcomes += commits(tasks, ranks[:1], publish, timeout_secs=limit)
        if how == "abort":
            await inside.wait()
            await ranks[0].abort("no", "x")
        for outcome in outcomes:
            assert await outcome.returned() == b"all the same"
    await nothing_is_left(memory)


@pytest.mark.parametrize("told", ["early", "late", "never"])
async def test_the_leader_gives_up_before_it_begins_to_publish(memory: World, told: str) -> None:
    """All are in, but it was aborted before it knew: it does not publish, and all are told."""
    ranks = await memory.barriers(2)
    keys = memory.keys(name="x")
    publish = Publisher()
    asleep, aborted, settling, awaited = (threading.Event() for _ in range(4))
    leaders_lane: list[threading.Thread] = []

    def hook(operation: str, key: str) -> None:
        thread = threading.current_thread()
        if (operation, key) == ("wait", keys.gathered):
            leaders_lane.append(thread)
            asleep.set()
        elif key == keys.logs[0] and thread in leaders_lane:
            aborted.wait()
        elif (operation, key) == ("wait", keys.verdict) and aborted.is_set():
            awaited.set()
            if told == "never":
                raise ConnectionResetError("gone")
        elif (operation, key) == ("compare_set", keys.verdict) and told != "early":
            settling.set()
            awaited.wait()

    data(memory).hook = hook
    async with Tasks() as tasks:
        (leading,) = commits(tasks, ranks[:1], publish)
        await memory.entered(0, name="x")
        await happens(asleep)
        (following,) = commits(tasks, ranks[1:], publish)
        await memory.exists(keys.gathered)
        aborting = tasks.start(lambda: ranks[0].abort("second thoughts", "x"))
        if told == "early":
            # The verdict is known, and its keys may be gone before the leader asks for it.
            await aborting.returned()
        else:
            # The leader waits for the verdict before there is one.
            await happens(settling)
        aborted.set()
        if told == "never":
            assert (await leading.raised(BarrierConnectionError)).in_doubt
        else:
            await are_told([leading], 0, "second thoughts")
        await are_told([following], 0, "second thoughts")
    assert not publish.calls
    await nothing_is_left(memory)
    await ranks[0].abort("once more", "x")
    with pytest.raises(BrokenBarrierError, match="once more"):
        await ranks[1].commit(publish, name="x")
    await commits_again(ranks)


async def test_nobody_tells_the_leader_that_all_are_in(memory: World) -> None:
    """The last one in hangs before it can: the leader's deadline says that nobody was missing."""
    ranks = await memory.barriers(2)
    keys = memory.keys(name="x")
    publish = Publisher()
    over = threading.Event()
    hung: list[str] = []

    def hook(operation: str, key: str) -> None:
        if (operation, key) == ("set", keys.gathered) and not hung:
            hung.append(key)
            over.wait()

    data(memory).hook = hook
    async with Tasks() as tasks:
        (leading,) = commits(tasks, ranks[:1], publish, timeout_secs=1.0)
        await memory.entered(0, name="x")
        (following,) = commits(tasks, ranks[1:], publish)
        error = await leading.raised(BarrierTimeoutError)
        assert hung
        assert (error.missing_ranks, error.in_doubt) == ((), False)
        assert "timed out after 1 s: no rank was missing" in str(error)
        over.set()
        assert (await following.raised(BarrierTimeoutError)).missing_ranks == ()
    assert not publish.calls
    await nothing_is_left(memory)


# The store is lost, or a process is.


@pytest.mark.parametrize("ending", ["published", "stopped", "failed"])
async def test_the_store_is_lost_while_the_leader_publishes(memory: World, ending: str) -> None:
    """The leader says whether it published, its peers are in doubt, and later commits work."""
    lost = threading.Event()

    def hook(operation: str, key: str) -> None:
        if operation == "wait" and "/mail/" in key:
            # In a store in memory, only what hangs here can be ended.
            lost.wait()
        if lost.is_set():
            raise ConnectionResetError("gone")

    data(memory).hook = hook
    ranks = await memory.barriers(2)
    fault = OSError("disk full")
    publish = Publisher(fault if ending == "failed" else b"published", parks=True)
    async with Tasks() as tasks:
        (following,) = commits(tasks, ranks[1:], publish, timeout_secs=1.0)
        await memory.entered(1, name="x")
        limit = 0.5 if ending == "stopped" else None
        (leading,) = commits(tasks, ranks[:1], publish, timeout_secs=limit)
        await publish.started.wait()
        lost.set()
        if ending == "failed":
            publish.go_on.set()
            assert await leading.raised(OSError) is fault
        else:
            if ending == "published":
                publish.go_on.set()
            error = await leading.raised(BarrierConnectionError)
            assert error.in_doubt
            did = "published" if ending == "published" else "did not publish"
            assert f"barrier 'x' #0: rank 0 {did}, but the store was lost" in str(error)
        error = await following.raised(BarrierConnectionError)
        assert error.in_doubt
        assert "barrier 'x' #0: rank 1 waited 1." in str(error)
    data(memory).hook = None
    # Ends the thread that still waits for it, as the end of a real connection would.
    await memory.call(memory.store.set, memory.keys(name="x").verdict, encode(Broken(0, "lost")))
    await commits_again(ranks)


async def test_a_peers_connection_is_lost_while_the_leader_publishes(memory: World) -> None:
    """That peer is in doubt and breaks nothing; the leader and the other are released."""
    ranks = await memory.barriers(3)
    keys = memory.keys(name="x")
    publish = Publisher(parks=True)
    cut = threading.Event()
    parted: list[str] = []

    def hook(operation: str, key: str) -> None:
        if (operation, key) == ("wait", keys.verdict) and not parted:
            parted.append(key)
            cut.wait()
            raise ConnectionResetError("gone")

    data(memory).hook = hook
    async with Tasks() as tasks:
        (losing,) = commits(tasks, ranks[1:2], publish)

        async def waiting() -> bool:
            return bool(parted)

        await until(waiting)
        outcomes = commits(tasks, [ranks[0], ranks[2]], publish)
        await publish.started.wait()
        cut.set()
        error = await losing.raised(BarrierConnectionError)
        assert error.in_doubt
        assert isinstance(error.__cause__, ConnectionResetError)
        assert not any(outcome.ended.is_set() for outcome in outcomes)
        publish.go_on.set()
        for outcome in outcomes:
            assert await outcome.returned() == b"published"
    await commits_again(ranks)


async def test_the_payloads_cannot_be_read(memory: World) -> None:
    """The leader's connection is lost before publish: it is not called, and all are told."""
    ranks = await memory.barriers(2)
    publish = Publisher()

    def hook(operation: str, key: str) -> None:
        if operation == "check" and "/payload/" in key:
            raise ConnectionResetError("gone")

    data(memory).hook = hook
    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks, publish)
        error = await outcomes[0].raised(BarrierConnectionError)
        assert not error.in_doubt
        assert isinstance(error.__cause__, ConnectionResetError)
        assert "publish failed" in (await outcomes[1].raised(BrokenBarrierError)).reason
    assert not publish.calls
    data(memory).hook = None
    await commits_again(ranks)
    await nothing_is_left(memory)


async def test_the_leader_restarts_while_it_publishes(memory: World) -> None:
    """Its peers cannot know whether it published, and are told so at once."""
    ranks = await memory.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        leading, *following = commits(tasks, ranks, publish)
        await publish.started.wait()
        again = memory.barrier(0, 3)
        await again.connect()
        for outcome in following:
            error = await outcome.raised(BrokenBarrierError)
            assert error.in_doubt
            assert error.rank == 0
            assert "rank 0 joined again" in error.reason
        # The old life may live on, and then its word stands.
        assert not leading.ended.is_set()
        publish.go_on.set()
        assert await leading.returned() == b"published"
    await commits_again([again, *ranks[1:]], "y")
    await nothing_is_left(memory)


async def test_a_peer_restarts_while_the_leader_publishes(memory: World) -> None:
    """It had brought its part: the others are released."""
    ranks = await memory.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks, publish)
        await publish.started.wait()
        again = memory.barrier(2, 3)
        await again.connect()

        async def told() -> bool:
            return not any(rank._session.stands for rank in ranks)

        await until(told)
        publish.go_on.set()
        for outcome in outcomes:
            assert await outcome.returned() == b"published"
    await commits_again([*ranks[:2], again], "y")
    await nothing_is_left(memory)


@pytest.mark.parametrize("world", ["own, libuv"], indirect=True)
async def test_the_host_closes_while_another_rank_publishes(world: World) -> None:
    """The store goes with it: the peers are in doubt, and the leader says that it published."""
    ranks = await world.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        hosting, leading, following = commits(tasks, ranks, publish, leader=1)
        await publish.started.wait()
        await ranks[0].aclose()
        assert (await hosting.raised(BarrierClosedError)).in_doubt
        error = await following.raised(BrokenBarrierError)
        assert error.in_doubt
        assert error.rank == 0
        assert "rank 0 closed its barrier, and with it the store" in error.reason
        assert not leading.ended.is_set()
        publish.go_on.set()
        lost = await leading.raised(BarrierConnectionError)
        assert lost.in_doubt
        assert "rank 1 published, but the store was lost" in str(lost)


async def test_the_leaders_word_is_overwritten(shared: World) -> None:
    """A peer that reads rubbish instead cannot know it, and says so; the leader puts it right."""
    ranks = await shared.barriers(2)
    keys = shared.keys(name="x")
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        leading, following = commits(tasks, ranks, publish)
        await publish.started.wait()
        await shared.call(shared.store.set, keys.verdict, "rubbish")
        error = await following.raised(BarrierConnectionError)
        assert error.in_doubt
        assert "the verdict of this commit was overwritten" in str(error)
        publish.go_on.set()
        assert await leading.returned() == b"published"
    await commits_again(ranks)


async def test_all_come_in_while_a_rank_is_about_to_be_missed(memory: World) -> None:
    """After a restart, the last to rejoin comes just then: the others wait on, and are released."""
    await memory.barriers(2)
    ranks = [memory.barrier(rank, 2, timeout_barrier_init_secs=0.3) for rank in range(2)]
    await ranks[0].connect()
    generation = ranks[0]._session.generation
    assert generation > 0
    keys = memory.keys(name="x", generation=generation)
    control = ranks[0]._session._lanes.control._worker._thread
    missing, all_in = threading.Event(), threading.Event()

    def hook(operation: str, key: str) -> None:
        if key == keys.logs[0] and threading.current_thread() is control:
            missing.set()
            all_in.wait()

    data(memory).hook = hook
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        (waiting,) = commits(tasks, ranks[:1], publish, leader=1)
        await happens(missing)
        # It may join now, but has a deadline to say that it is not there.
        (leading,) = commits(tasks, ranks[1:], publish, leader=1)
        await publish.started.wait()
        all_in.set()
        publish.go_on.set()
        assert await leading.returned() == b"published"
        assert await waiting.returned() == b"published"
    await nothing_is_left(memory)


async def test_a_payload_is_what_was_brought(tcp: World) -> None:
    """Also where it looks like what the protocol itself writes."""
    ranks = await tcp.barriers(4)
    brought = [b"\0", b"p", b"-", b"r0\n"]
    publish = Publisher(b"\0")
    results = await gather(
        partial(rank.commit, publish, payload=payload)
        for rank, payload in zip(ranks, brought, strict=True)
    )
    assert results == [b"\0"] * 4
    assert publish.calls == [dict(enumerate(brought))]


# Coroutines that are thrown away; on asyncio alone can a coroutine be stepped by hand.


async def drop(coroutine: Coroutine[Any, Any, Any], when: asyncio.Event) -> None:
    """Run ``coroutine`` in this task, and throw it away where it stands when told to."""
    told = asyncio.ensure_future(when.wait())
    while not when.is_set():
        awaited = coroutine.send(None)
        awaited._asyncio_future_blocking = False
        await asyncio.wait((awaited, told), return_when=asyncio.FIRST_COMPLETED)
    coroutine.close()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("publishing", [True, False])
async def test_a_commit_that_is_thrown_away(memory: World, publishing: bool) -> None:
    """Nobody waits for the break, but it reaches the peers."""
    ranks = await memory.barriers(2)
    publish = Publisher(parks=True)
    when = asyncio.Event()
    async with Tasks() as tasks:
        tasks.start(lambda: drop(ranks[0].commit(publish, name="x"), when))
        await memory.entered(0, name="x")
        if publishing:
            (following,) = commits(tasks, ranks[1:], publish)
            await publish.started.wait()
        when.set()
        if not publishing:
            (following,) = commits(tasks, ranks[1:], publish)
        error = await following.raised(BrokenBarrierError)
        assert error.rank == 0
        assert "GeneratorExit" in error.reason
    await commits_again(ranks)
    await nothing_is_left(memory)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_phase_that_is_thrown_away(memory: World) -> None:
    """It cannot await any more, so it uses up no turn; whoever drops it is not disturbed."""
    ranks = await memory.barriers(2)
    when = asyncio.Event()

    async def body() -> None:
        async with ranks[0].phase("x"):
            await anyio.sleep_forever()

    async with Tasks() as tasks:
        dropping = tasks.start(lambda: drop(body(), when))
        when_idle = asyncio.get_running_loop().call_soon
        when_idle(when.set)
        await dropping.returned()
    results = await gather(partial(rank.execute_barrier, "x") for rank in ranks)
    assert [result.sequence for result in results] == [0, 0]


# A barrier that a user writes, with no more than it must have.


class Alone(Barrier):
    """For a world of one."""

    barrier_type = "alone"

    def __init__(self) -> None:
        self.crossed: list[tuple[str, Timeout]] = []

    async def execute_barrier(
        self, name: str = "", *, timeout_secs: Timeout = CONFIGURED
    ) -> BarrierResult:
        self.crossed.append((name, timeout_secs))
        return BarrierResult(name, len(self.crossed) - 1, 0.0, 0)


class AloneWithAbort(Alone):
    """One that can do that, too."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted: list[tuple[str, str]] = []

    async def abort(self, reason: str, name: str = "") -> None:
        self.aborted.append((reason, name))


async def test_what_a_barrier_of_the_users_inherits() -> None:
    """Connecting, closing and phases work; commit and abort say that they are not there."""
    async with Alone() as barrier:
        await barrier.connect()
        async with barrier.phase("x", timeout_secs=3.0):
            assert not barrier.crossed
        assert barrier.crossed == [("x", 3.0)]
        with pytest.raises(NotImplementedError, match="Alone cannot commit"):
            await barrier.commit(Publisher())
        with pytest.raises(NotImplementedError, match="Alone cannot abort"):
            await barrier.abort("no")


@pytest.mark.parametrize("made", [Alone, AloneWithAbort])
async def test_a_body_that_raises_in_a_phase_of_the_users(made: type[Alone]) -> None:
    """Its exception goes on, whether or not the barrier can abort; with abort it is told why."""
    barrier = made()
    with pytest.raises(OSError, match="disk full"):
        async with barrier.phase("x"):
            raise OSError("disk full")
    assert not barrier.crossed
    if isinstance(barrier, AloneWithAbort):
        assert barrier.aborted == [("it raised OSError: disk full", "x")]


async def test_a_barrier_that_cannot_connect_is_closed() -> None:
    """`async with` closes what it could not open, and its error goes on."""
    closed: list[bool] = []

    class Unreachable(Alone):
        async def connect(self) -> None:
            raise ConnectionError("no route")

        async def aclose(self) -> None:
            closed.append(True)

    with pytest.raises(ConnectionError, match="no route"):
        async with Unreachable():
            raise AssertionError("never entered")
    assert closed == [True]
