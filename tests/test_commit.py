"""What `commit` promises: everyone's work is published once, by one rank, or not at all."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio
from cuttable import Ways
from direct import DirectStore, run
from reports import client, one, serve
from stores import LISTS_KEYS, Data, PlainStore, keys_of
from worlds import AnyBarrier, Outcome, Tasks, World, close, crash, drop, gather, until

from async_barriers import (
    Barrier,
    BarrierClosedError,
    BarrierConnectionError,
    BarrierResult,
    BarrierTimeoutError,
    BrokenBarrierError,
)
from async_barriers._checks import CONFIGURED, MAX_PAYLOAD_BYTES, Timeout
from async_barriers._client import lifetime
from async_barriers._client.phases import Phase
from async_barriers._client.publication import Publication
from async_barriers._client.session import Session
from async_barriers._errors import causes
from async_barriers._protocol import breaking as breaks
from async_barriers._protocol import commit as settling
from async_barriers._protocol import phase as phases
from async_barriers._protocol.count import COMMIT, Count
from async_barriers._protocol.payloads import IN_LOG, SMALL_BYTES
from async_barriers._protocol.phase import Entry
from async_barriers._protocol.verdict import Broken, Released
from async_barriers._store.connection import SocketConnection
from async_barriers._store.copies import copy_of
from async_barriers._store.waiting import settled

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
    """Wait until no phase has a key in the store any more (law 10).

    A rank on a busy machine may take the store for lost. What it had to say as it departed may be
    lost with its connection then, and the keys stay until the generation ends.
    """

    async def none() -> bool:
        keys: list[str] = await world.call(keys_of, world.innermost)
        return not any("/phase/" in key for key in keys)

    if LISTS_KEYS:
        try:
            await until(none)
        except TimeoutError:
            if not any(barrier.statistics().reconnections for barrier in world.made):
                raise


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


async def test_a_deadline_that_cannot_stop_publishing(tcp: World) -> None:
    """That of a plain function's leader: all are in doubt, and told why."""
    ranks = await tcp.barriers(2)
    goes_on = threading.Event()

    def publish(payloads: Mapping[int, bytes]) -> bytes:
        goes_on.wait()
        return b"published"

    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks[1:], publish, timeout_secs=None)
        await tcp.entered(1, name="x")
        outcomes += commits(tasks, ranks[:1], publish, timeout_secs=0.4)
        for outcome in outcomes:
            error = await outcome.raised(BarrierTimeoutError)
            assert error.in_doubt
            assert "was still publishing, in a thread, and may yet publish" in str(error)
        goes_on.set()


@pytest.mark.parametrize("closes", [True, False], ids=["closes", "aborts for no reason"])
async def test_a_store_that_is_silent_as_the_leader_tells(closes: bool) -> None:
    """For longer than undoing may take: the leader waits for it, as its peers do, and all learn
    what was published. Being stopped, or closing, is not held up by that."""
    server = serve()
    ways = Ways()
    way = ways.to(server.port)
    ranks = [one(client(way.port), 0, 2), one(server, 1, 2)]
    silent = anyio.Event()

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        await anyio.to_thread.run_sync(way.cut, "hold")
        silent.set()
        return b"published"

    try:
        await gather(rank.execute_barrier for rank in ranks)
        async with Tasks() as tasks:
            outcomes = commits(tasks, ranks, publish, timeout_secs=15)
            await silent.wait()
            await anyio.sleep(1.5)
            assert not any(outcome.ended.is_set() for outcome in outcomes)
            way.heal()
            assert [await outcome.returned() for outcome in outcomes] == [b"published"] * 2
        silent = anyio.Event()
        async with Tasks() as tasks:
            leading, following = commits(tasks, ranks, publish, timeout_secs=15)
            await silent.wait()
            await (ranks[0].aclose() if closes else ranks[0].abort("", "x"))
            await leading.raised(BarrierConnectionError)
            assert leading.secs < 3
            way.heal()
            await following.ended.wait()
    finally:
        way.heal()
        await close(ranks)
        ways.close()


async def test_an_error_that_publish_raises_is_left_as_it_is(memory: World) -> None:
    """It may be of another barrier, whose ranks have other numbers, or the user's own."""
    ranks = await memory.barriers(2)
    mine = BrokenBarrierError("mine", 3, 1, "of another barrier")
    told = str(mine)
    async with Tasks() as tasks:
        leading, following = commits(tasks, ranks, Publisher(mine))
        assert await leading.raised(BrokenBarrierError) is mine
        assert (str(mine), mine.prefix, mine.global_rank) == (told, "", None)
        assert "of another barrier" in (await following.raised(BrokenBarrierError)).reason


async def test_one_register_settles_who_speaks(shared: World) -> None:
    """Once all are in nobody breaks it, and its leader alone says what came of it."""
    await shared.barriers(2)

    def race(name: str, word: Released | Broken) -> object:
        leader, peer = (
            Entry(shared.keys(name=name), rank, 2, COMMIT, leader=0) for rank in range(2)
        )
        store = DirectStore(copy_of(shared.store))
        for entry in (leader, peer):
            came = phases.entered(entry, store.call(*phases.entering(entry, b"brought")).result())
            assert isinstance(came, Count)
        for entry in (leader, peer):
            judged, ours = run(breaks.give_up(store, entry, Broken(1, "late, too"), entered=True))
            assert isinstance(judged, Count)
            assert judged.full(*entry.world)
            assert not ours
        assert run(settling.collect(store, leader)) == {0: b"brought", 1: b"brought"}
        run(settling.settle(store, leader, word))
        judged, ours = run(breaks.give_up(store, peer, Broken(1, "late, too"), entered=True))
        assert (judged, ours) == (word, False)
        assert run(settling.hear(store, peer)) == word
        store.call(*phases.spent(leader, broken=True))
        store.close()
        return word

    for word in (Released(None, b"done"), Broken(0, "late", 1.0)):
        assert await shared.call(race, f"{word}", word) == word
    await nothing_is_left(shared)


# Calls that are wrong.


async def test_a_bad_call_uses_up_no_turn(memory: World) -> None:
    """It is refused at once, before anyone is entered, and the next call is the first."""
    ranks = await memory.barriers(2)
    publish = Publisher()
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"payload": "text"}, TypeError, "payload must be bytes, not str"),
        ({"payload": None}, TypeError, "payload must be bytes, not NoneType"),
        ({"leader": 2}, ValueError, "leader: rank 2 is outside the world; with 2 ranks"),
        ({"leader": -1}, ValueError, "leader: rank -1 is outside the world"),
        ({"leader": True}, TypeError, "leader: rank must be an integer, not True"),
        ({"name": 3}, TypeError, "name must be a string, not 3"),
        ({"timeout_secs": -1}, ValueError, "timeout_secs is -1"),
        ({"step": -1}, ValueError, "step is -1; it must be 0 or more"),
    ]
    for options, kind, message in bad:
        with pytest.raises(kind, match=message):
            await ranks[0].commit(publish, **{"name": "x", **options})
    with pytest.raises(TypeError, match="publish must be a function or a coroutine function"):
        await ranks[0].commit(b"bytes", name="x")  # type: ignore[arg-type]
    assert not publish.calls
    results = await gather(partial(rank.execute_barrier, "x") for rank in ranks)
    assert [result.sequence for result in results] == [0, 0]


async def test_payloads_as_large_as_they_may_be(tcp: World) -> None:
    """4 MiB from every rank, as bytes of any kind, and back."""
    ranks = await tcp.barriers(2)
    largest = bytes(range(256)) * (MAX_PAYLOAD_BYTES // 256)
    publish = Publisher(largest)
    payloads = (bytearray(largest), memoryview(largest))
    results = await gather(
        partial(rank.commit, publish, payload=payload)  # type: ignore[arg-type]
        for rank, payload in zip(ranks, payloads, strict=True)
    )
    assert results == [largest] * 2
    assert publish.calls == [{0: largest, 1: largest}]
    assert all(isinstance(payload, bytes) for payload in publish.calls[0].values())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("text", "publish's result must be bytes, not str"),
        (bytearray(b"text"), "publish's result must be bytes, not bytearray"),
        (b"x" * (MAX_PAYLOAD_BYTES + 1), "publish's result has 4194305 bytes"),
    ],
    ids=["no bytes", "nearly bytes", "too many"],
)
async def test_a_result_that_cannot_be_sent(memory: World, returned: object, message: str) -> None:
    """It may have published: all ranks get the same error, which says so, and are in doubt."""
    ranks = await memory.barriers(2)
    async with Tasks() as tasks:
        for outcome in commits(tasks, ranks, Publisher(returned)):
            error = await outcome.raised(BrokenBarrierError)
            assert (error.rank, error.in_doubt) == (0, True)
            assert "publish may have published, but " + message in error.reason
    await commits_again(ranks)
    await nothing_is_left(memory)


@pytest.mark.parametrize("raises", [False, True])
async def test_a_plain_function_publishes_in_a_thread(memory: World, raises: bool) -> None:
    """It may block: the event loop goes on meanwhile, and all get what it returned (law 7)."""
    ranks = await memory.barriers(2)
    inside, go_on = threading.Event(), threading.Event()
    published: list[threading.Thread] = []

    def publish(payloads: Mapping[int, bytes]) -> bytes:
        inside.set()
        go_on.wait()
        published.append(threading.current_thread())
        if raises:
            raise OSError("disk full")
        return b"".join(payloads.values())

    async with Tasks() as tasks:
        outcomes = [
            tasks.start(partial(rank.commit, publish, name="x", payload=b"p")) for rank in ranks
        ]
        await happens(inside)
        assert not any(outcome.ended.is_set() for outcome in outcomes)
        go_on.set()
        if raises:
            await outcomes.pop(0).raised(OSError)
            await are_told(outcomes, 0, "publish failed: it raised OSError: disk full")
        else:
            assert [await outcome.returned() for outcome in outcomes] == [b"pp"] * 2
    assert [thread.name.partition("-")[0] for thread in published] == ["async_barriers"]
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
    if how != "close":
        await nothing_is_left(memory)
        await commits_again(ranks)


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0)], ids=str)
async def test_ranks_must_make_the_same_call(memory: World, order: tuple[int, ...]) -> None:
    """Two leaders, or a commit that meets another call: broken for all, who are told why, whoever
    comes last, and nobody publishes."""
    ranks = await memory.barriers(3)
    publish = Publisher()
    others: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        partial(ranks[1].commit, publish, payload=b"p", leader=1),
        partial(ranks[1].commit, publish, payload=b"p", leader=2),
        ranks[1].execute_barrier,
        partial(ranks[1].all_gather, b"p"),
    ]
    for sequence, other in enumerate(others):
        calls = [partial(rank.commit, publish, payload=b"p") for rank in ranks]
        reasons = set()
        async with Tasks() as tasks:
            outcomes = []
            for rank in order:
                outcomes.append(tasks.start(other if rank == 1 else calls[rank]))
                if rank != order[-1]:
                    await memory.entered(rank, sequence=sequence)
            for outcome in outcomes:
                error = await outcome.raised(BrokenBarrierError)
                assert not error.in_doubt
                assert error.sequence == sequence
                reasons.add((error.rank, error.reason))
        ((culprit, reason),) = reasons
        assert "all ranks must make the same call" in reason
        assert culprit is not None
    assert not publish.calls
    await commits_again(ranks, "")
    await nothing_is_left(memory)


async def test_leaders_that_add_up_to_one_of_them(shared: World) -> None:
    """The one in the middle takes the phase for full, reads that it is broken, and says so too."""
    ranks = await shared.barriers(3)
    publish = Publisher()
    async with Tasks() as tasks:
        outcomes = [
            tasks.start(partial(rank.commit, publish, leader=leader))
            for leader, rank in enumerate(ranks)
        ]
        errors = [await outcome.raised(BrokenBarrierError) for outcome in outcomes]
    assert len({(error.rank, error.reason, error.in_doubt) for error in errors}) == 1
    assert "all ranks must make the same call" in errors[0].reason
    assert not publish.calls
    await nothing_is_left(shared)


async def test_what_is_said_where_ranks_make_different_calls(memory: World) -> None:
    """Who called what, and what others called."""
    ranks = await memory.barriers(2)
    publish = Publisher()
    others: list[tuple[Callable[[], Coroutine[Any, Any, Any]], str]] = [
        (
            partial(ranks[1].commit, publish, leader=1),
            "it called commit(leader=1) where rank 0 called commit(leader=0)",
        ),
        (
            ranks[1].execute_barrier,
            "it called execute_barrier() where rank 0 called commit(leader=0)",
        ),
        (
            partial(ranks[1].all_gather, b""),
            "it called all_gather() where rank 0 called commit(leader=0)",
        ),
    ]
    for sequence, (other, said) in enumerate(others):
        async with Tasks() as tasks:
            outcomes = [tasks.start(partial(ranks[0].commit, publish))]
            await memory.entered(0, sequence=sequence)
            outcomes.append(tasks.start(other))
            for outcome in outcomes:
                error = await outcome.raised(BrokenBarrierError)
                assert error.rank == 1
                assert said in error.reason
    assert not publish.calls


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


@pytest.mark.parametrize("where", ["publish", "body", "barrier"])
async def test_a_cancellation_is_told_as_one(
    memory: World, where: str, anyio_backend_name: str
) -> None:
    """Also where tasks of the user's end in it, which trio raises as a group of cancellations."""
    ranks = await memory.barriers(2)
    working = anyio.Event()

    async def works(payloads: object = None) -> bytes:
        on_trio = anyio_backend_name == "trio"
        async with trio.open_nursery() if on_trio else anyio.create_task_group() as workers:
            for _ in range(2):
                workers.start_soon(anyio.sleep, 20)
            working.set()
        return b"done"

    async def leads() -> None:
        async with AsyncExitStack() as stack:
            if where == "barrier":
                await stack.enter_async_context(ranks[0])
            elif where == "body":
                await stack.enter_async_context(ranks[0].committing(works, name="x"))
            await (ranks[0].commit(works, name="x") if where == "publish" else works())

    async with Tasks() as tasks:
        leading = tasks.start(leads)
        following = tasks.start(partial(ranks[1].commit, works, name="x"))
        await working.wait()
        await memory.entered(1, name="x")
        leading.scope.cancel()
        error = await following.raised(BrokenBarrierError)
    said = {"publish": "publish failed: ", "body": "", "barrier": "it closed its barrier: "}
    assert error.reason == said[where] + "its task was cancelled"


async def test_the_leader_leaves_its_block_as_it_publishes(memory: World) -> None:
    """Its peers learn the exception that ended its program (law 3)."""
    ranks = await memory.barriers(2)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:

        async def leads() -> None:
            async with ranks[0]:
                tasks.start(partial(ranks[0].commit, publish, name="x"))
                await publish.started.wait()
                raise ValueError("loss is nan")

        following = tasks.start(partial(ranks[1].commit, publish, name="x"))
        with pytest.raises(ValueError, match="loss is nan"):
            await leads()
        error = await following.raised(BrokenBarrierError)
    assert (error.rank, error.in_doubt) == (0, False)
    assert error.reason == "it closed its barrier: it raised ValueError: loss is nan"


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
    monkeypatch.setattr(lifetime, "PEERS_SECS", 0.5)
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
        told = await following.raised(BrokenBarrierError)
        assert (told.rank, told.reason, told.in_doubt) == (0, "it closed its barrier", True)
        publish.go_on.set()
        error = await leading.raised(BarrierConnectionError)
        assert error.in_doubt
        assert "rank 0 published, but this barrier was closed before its peers" in str(error)


def parks(
    world: World, operation: str, key: str, *, where_log: str | None = None
) -> tuple[threading.Event, threading.Event]:
    """Hold up the next such call to a store in memory: when it is made, and to let it go on.

    :param where_log: only on the connection on which a rank entered the phase with this log; a bell
        that was rung for an earlier phase may be looked after at any time, and reads the same keys
    """
    reached, go_on = threading.Event(), threading.Event()
    entered = set()

    def hook(called: str, at: str) -> None:
        thread = threading.current_thread()
        if (called, at) == ("compare_set", where_log):
            entered.add(thread)
        here = where_log is None or thread in entered
        if (called, at) == (operation, key) and here and not reached.is_set():
            reached.set()
            go_on.wait()

    data(world).hook = hook
    return reached, go_on


@pytest.mark.parametrize("how", ["close", "abort", "cancel", "deadline"])
async def test_the_leader_gives_up_as_the_last_rank_comes_in(
    memory: World, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """All are in before it can break the phase: it does not publish, and its peers are told so at
    once, since nobody else can say it."""
    # The last rank comes before the leader says that it has left, or stops asking the store,
    # however busy the machine is.
    monkeypatch.setattr("async_barriers._client.session._LEAVE_SECS", 8.0)
    monkeypatch.setattr("async_barriers._client.crossing.UNDO_SECS", 8.0)
    ranks = await memory.barriers(2)
    publish = Publisher()
    keys = memory.keys(name="x")
    reached, go_on = parks(memory, "check", keys.count, where_log=keys.log)
    async with Tasks() as tasks:
        limit = 1.0 if how == "deadline" else None
        (leading,) = commits(tasks, ranks[:1], publish, timeout_secs=limit)
        over = anyio.current_time() + (limit or 0)
        await memory.entered(0, name="x")
        giving_up = None
        if how == "close":
            giving_up = tasks.start(ranks[0].aclose)
        elif how == "abort":
            giving_up = tasks.start(partial(ranks[0].abort, "second thoughts", "x"))
        elif how == "cancel":
            leading.scope.cancel()
        await happens(reached)
        (following,) = commits(tasks, ranks[1:], publish, timeout_secs=None)
        # It is told that all are in, over its other connection.
        await memory.exists(keys.released)
        await anyio.sleep(max(0.0, over - anyio.current_time()) + 0.1)
        assert not leading.ended.is_set()
        go_on.set()
        if how == "close":
            await leading.raised(BarrierClosedError)
            await are_told([following], 0, "it closed its barrier")
        elif how == "abort":
            assert giving_up is not None
            assert await giving_up.returned()
            await are_told([leading, following], 0, "second thoughts")
        elif how == "cancel":
            await leading.ended.wait()
            assert leading.scope.cancelled_caught
            await are_told([following], 0, "its task was cancelled")
        else:
            for outcome in (leading, following):
                error = await outcome.raised(BarrierTimeoutError)
                assert (error.missing_ranks, error.in_doubt) == ((), False)
                assert "timed out after 1 s: no rank was missing" in str(error)
    assert not publish.calls
    await nothing_is_left(memory)
    if how != "close":
        await commits_again(ranks)


@pytest.mark.parametrize("how", ["deadline", "abort"])
async def test_a_publish_that_ends_all_the_same_has_published(memory: World, how: str) -> None:
    """One that is stopped, and returns normally in spite of it, releases everyone."""
    ranks = await memory.barriers(2)
    inside = anyio.Event()

    async def publish(_: Mapping[int, bytes]) -> bytes:
        inside.set()
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        return b"all the same"

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


async def test_nobody_tells_the_leader_that_all_are_in(
    memory: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one in hangs before it can: the leader's deadline says that nobody was missing."""
    # A wait that is over looks around, and would find it.
    monkeypatch.setattr("async_barriers._store.blocking_store._AT_A_TIME", timedelta(seconds=60))
    ranks = await memory.barriers(2)
    publish = Publisher()
    reached, go_on = parks(memory, "set", memory.keys(name="x").released)
    async with Tasks() as tasks:
        (leading,) = commits(tasks, ranks[:1], publish, timeout_secs=1.0)
        await memory.entered(0, name="x")
        (following,) = commits(tasks, ranks[1:], publish)
        error = await leading.raised(BarrierTimeoutError)
        assert reached.is_set()
        assert (error.missing_ranks, error.in_doubt) == ((), False)
        assert "timed out after 1 s: no rank was missing" in str(error)
        assert (await following.raised(BarrierTimeoutError)).missing_ranks == ()
        go_on.set()
    assert not publish.calls
    await nothing_is_left(memory)


async def test_a_bell_that_is_rung_before_it_was_taken(memory: World) -> None:
    """A rank looks around, enters a phase, and takes its bell only after all were in and rang it:
    what it looked at did not contain that phase, and nobody rings again."""
    ranks = await memory.barriers(2)
    await nothing_is_left(memory)
    bell = memory.membership().own.bell(1)
    reached, go_on = parks(memory, "delete_key", bell)
    await memory.call(memory.innermost.set, bell, "?")
    await happens(reached)

    async def rung() -> bool:
        return await memory.read(bell) == b"all in"

    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x"))
        await memory.entered(1, name="x")
        coming = tasks.start(partial(ranks[0].execute_barrier, "x"))
        await until(rung)
        go_on.set()
        for outcome in (waiting, coming):
            await outcome.returned()
            assert outcome.secs < 5


# The store is lost, or a process is.


@pytest.mark.parametrize("ending", ["published", "stopped", "failed"])
async def test_the_store_is_lost_while_the_leader_publishes(memory: World, ending: str) -> None:
    """The leader says whether it published, its peers are in doubt, and later commits work."""
    lost = threading.Event()

    def hook(operation: str, key: str) -> None:
        if lost.is_set():
            raise ConnectionResetError("gone")

    data(memory).hook = hook
    ranks = await memory.barriers(2)
    # What is said of phases that are over goes out with later messages.
    await nothing_is_left(memory)
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
            assert f"barrier 'tests/x' #0: rank 0 {did}, but the store was lost" in str(error)
        error = await following.raised(BarrierConnectionError)
        assert error.in_doubt
        assert "barrier 'tests/x' #0: rank 1 waited 1." in str(error)
    data(memory).hook = None
    await commits_again(ranks)
    # The leader's word is given as soon as the store takes it.
    await nothing_is_left(memory)


@pytest.mark.parametrize("connected", [True, False])
async def test_what_a_store_raises_is_the_cause(memory: World, connected: bool) -> None:
    """Of a call that breaks a phase, and of one that asks what became of it."""
    lost = threading.Event()

    def hook(operation: str, key: str) -> None:
        if lost.is_set():
            raise OSError(errno.EIO, "the disk is gone")

    data(memory).hook = hook
    rank = memory.barrier(0, 1, timeout_barrier_init_secs=0.5)
    if connected:
        await rank.execute_barrier("x", step=5)
    lost.set()
    for call in (
        partial(rank.abort, "no disk", "x", step=6),
        partial(rank.abort, "no disk", "x", step=4),
        partial(rank.outcome, "x", 5),
    ):
        with pytest.raises(BarrierConnectionError, match="the disk is gone") as raised:
            await call()
        assert errno.EIO in {getattr(each, "errno", None) for each in causes(raised.value)}
    data(memory).hook = None


async def test_a_silent_store_is_not_explained_by_what_the_call_closes(memory: World) -> None:
    """`abort` closes the connection that hangs, and that is no cause."""
    go_on = threading.Event()

    def hook(operation: str, key: str) -> None:
        go_on.wait(20)

    rank = memory.barrier(0, 1, timeout_barrier_init_secs=0.5)
    await rank.execute_barrier("x", step=5)
    data(memory).hook = hook
    try:
        with pytest.raises(BarrierConnectionError, match="did not answer in time;") as silent:
            await rank.abort("no disk", "x", step=6)
        assert silent.value.__cause__ is None
    finally:
        data(memory).hook = None
        go_on.set()


@pytest.mark.parametrize("how", ["is lost", "was lost before"])
async def test_an_abort_of_a_passed_step_says_that_it_told_nobody(
    tcp: World, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot know whether peers wait there, and may be called again."""
    rank, peer = await tcp.barriers(2)
    await gather(partial(each.execute_barrier, "x", step=5) for each in (rank, peer))
    session = rank._session
    bell = session._bell
    assert isinstance(bell, SocketConnection)
    call = bell.call

    def lose(*requests: Any, **wait: Any) -> Any:
        bell.close(reset=True)
        return call(*requests, **wait)

    monkeypatch.setattr(bell, "call", lose)
    if how == "was lost before":
        session._bell = None
    with pytest.raises(BarrierConnectionError, match="did not answer in time") as lost:
        await rank.abort("no disk", "x", step=4)
    assert "told" not in str(lost.value)
    session._bell = bell


async def test_a_peers_connection_is_lost_while_the_leader_publishes(tcp: World) -> None:
    """It breaks nothing, asks over another one, and is released with the others."""
    ranks = await tcp.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks, publish)
        await publish.started.wait()
        (phase,) = ranks[1]._session.open
        cut: Any = phase.connection
        cut._socket.shutdown(socket.SHUT_RDWR)

        async def reconnected() -> bool:
            return phase.connection not in (None, cut) and phase.lost is None

        await until(reconnected)
        assert not any(outcome.ended.is_set() for outcome in outcomes)
        publish.go_on.set()
        for outcome in outcomes:
            assert await outcome.returned() == b"published"
    await commits_again(ranks)
    await nothing_is_left(tcp)


async def test_the_payloads_cannot_be_read(memory: World) -> None:
    """The leader's connection is lost before publish: it is not called, and all are told."""
    ranks = await memory.barriers(2)
    publish = Publisher()

    all_in: list[str] = []

    def hook(operation: str, key: str) -> None:
        if (operation, key) == ("set", keys.released):
            all_in.append(key)
        elif all_in and (operation, key) == ("get", keys.log):
            raise ConnectionResetError("gone")

    keys = memory.keys(name="x")
    data(memory).hook = hook
    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks[:1], publish, payload=b"p")
        await memory.entered(0, name="x")
        outcomes += commits(tasks, ranks[1:], publish, payload=b"p")
        error = await outcomes[0].raised(BarrierConnectionError)
        assert not error.in_doubt
        assert isinstance(error.__cause__, ConnectionResetError)
        assert "publish failed" in (await outcomes[1].raised(BrokenBarrierError)).reason
    assert not publish.calls
    data(memory).hook = None
    await commits_again(ranks)
    await nothing_is_left(memory)


async def test_the_leader_dies_while_it_publishes(memory: World) -> None:
    """When it comes back, its peers, who cannot know whether it published, are told so at once."""
    ranks = await memory.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        _, *following = commits(tasks, ranks, publish)
        await publish.started.wait()
        crash(ranks[0])
        again = memory.barrier(0, 3)
        await again.connect()
        for outcome in following:
            error = await outcome.raised(BrokenBarrierError)
            assert error.in_doubt
            assert error.rank == 0
            assert "rank 0 joined again" in error.reason
    await commits_again([again, *ranks[1:]], "y")


async def test_a_peer_dies_while_the_leader_publishes(memory: World) -> None:
    """It had brought its part: the others are released."""
    ranks = await memory.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        outcomes = commits(tasks, ranks, publish)[:2]
        await publish.started.wait()
        crash(ranks[2])
        again = memory.barrier(2, 3)
        await again.connect()

        async def told() -> bool:
            return not any(rank._session.stands for rank in ranks)

        await until(told)
        publish.go_on.set()
        for outcome in outcomes:
            assert await outcome.returned() == b"published"
    await commits_again([*ranks[:2], again], "y")


@pytest.mark.parametrize("world", ["own, libuv"], indirect=True)
async def test_the_host_closes_while_another_rank_publishes(world: World) -> None:
    """It waits until the leader has said what came of it (law 13)."""
    ranks = await world.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        hosting, leading, following = commits(tasks, ranks, publish, leader=1)
        await publish.started.wait()
        closing = tasks.start(ranks[0].aclose)
        assert (await hosting.raised(BarrierClosedError)).in_doubt
        await anyio.sleep(0.3)
        for outcome in (closing, leading, following):
            assert not outcome.ended.is_set()
        publish.go_on.set()
        for outcome in (leading, following):
            assert await outcome.returned() == b"published"
        await closing.returned()


@pytest.mark.parametrize("world", ["own, libuv"], indirect=True)
async def test_a_publish_that_outlasts_its_host(world: World) -> None:
    """The store goes with it, after a while: peers are in doubt, the leader says what it did."""
    ranks = await world.barriers(3)
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        _, leading, following = commits(tasks, ranks, publish, leader=1)
        await publish.started.wait()
        closing = tasks.start(ranks[0].aclose)
        await closing.returned()
        assert closing.secs < 5
        assert (await following.raised(BarrierConnectionError)).in_doubt
        assert not leading.ended.is_set()
        publish.go_on.set()
        lost = await leading.raised(BarrierConnectionError)
        assert lost.in_doubt
        assert "rank 1 published, but the store was lost" in str(lost)


async def test_the_leaders_word_is_overwritten(shared: World) -> None:
    """A peer that reads rubbish instead cannot know it, and says so; the leader puts it right."""
    ranks = await shared.barriers(3)
    keys = shared.keys(name="x")
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        leading, following, later = commits(tasks, ranks, publish)
        await publish.started.wait()
        await shared.call(shared.innermost.set, keys.word, "rubbish")
        await shared.call(shared.innermost.set, keys.settled, "rubbish")
        await shared.call(shared.innermost.set, shared.membership().own.bell(1), "rubbish")
        if shared.kind in ("tcp", "prefix"):
            error = await following.raised(BarrierConnectionError)
            assert error.in_doubt
            assert "the verdict of this commit was overwritten" in str(error)
            outcomes = [leading]
        else:
            # It is looked at only when its bell rings.
            outcomes = [leading, following, later]
        publish.go_on.set()
        for outcome in outcomes:
            assert await outcome.returned() == b"published"
    await commits_again(ranks)


async def test_who_is_about_to_be_missed_comes(memory: World) -> None:
    """After a restart, the last to rejoin comes just then: that attempt does not count, and the
    next one of both is the same."""
    for rank in range(2):
        before = memory.barrier(rank, 2)
        await before.connect()
        crash(before)
    ranks = [memory.barrier(rank, 2, timeout_barrier_init_secs=0.5) for rank in range(2)]
    await ranks[0].connect()
    publish = Publisher()
    async with Tasks() as tasks:
        early = memory.keys(name="x", sequence="e0")
        reached, go_on = parks(memory, "check", early.count, where_log=early.log)
        (waiting,) = commits(tasks, ranks[:1], publish, leader=1)
        await happens(reached)
        (leading,) = commits(tasks, ranks[1:], publish, leader=1)
        await memory.entered(1, name="x")
        go_on.set()
        assert (await waiting.raised(BarrierTimeoutError)).missing_ranks == (1,)
        assert not publish.calls
        (waiting,) = commits(tasks, ranks[:1], publish, leader=1)
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


async def test_payloads_of_many_ranks(tcp: World) -> None:
    """In a world that is not small they stand apart from the names, and are deleted with them."""
    ranks = await tcp.barriers(IN_LOG + 2)
    brought = [b"", b"p" * (SMALL_BYTES + 1), *(b"%d" % rank for rank in range(IN_LOG))]
    publish = Publisher()

    def calls(of: Callable[[AnyBarrier, bytes], Any]) -> list[Any]:
        return [of(rank, payload) for rank, payload in zip(ranks, brought, strict=True)]

    await gather(calls(lambda rank, one: partial(rank.commit, publish, payload=one, leader=1)))
    assert publish.calls == [dict(enumerate(brought))]
    told = await gather(calls(lambda rank, one: partial(rank.all_gather, one)))
    assert told == [tuple(brought)] * len(ranks)
    # The log, which each rank reads at a deadline, has the names alone.
    log = await tcp.read(tcp.keys(name="", sequence=1).log)
    assert log is not None
    assert len(log) < 5 * len(ranks)
    async with Tasks() as tasks:
        # The other half names another leader.
        half = len(ranks) // 2
        outcomes = commits(tasks, ranks[:half], publish, leader=0)
        outcomes += commits(tasks, ranks[half:], publish, leader=1)
        for outcome in outcomes:
            error = await outcome.raised(BrokenBarrierError)
            assert "all ranks must make the same call" in str(error)
    await commits_again(ranks)
    await nothing_is_left(tcp)


# Coroutines that are thrown away; see also test_thrown_away.


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
    """It cannot await any more, but it uses up its turn, and its peers are told (law 3)."""
    ranks = await memory.barriers(2)
    when = asyncio.Event()

    async def body() -> None:
        async with ranks[0].phase("x"):
            await anyio.sleep_forever()

    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x", timeout_secs=None))
        await memory.entered(1, name="x")
        dropping = tasks.start(lambda: drop(body(), when))
        when_idle = asyncio.get_running_loop().call_soon
        when_idle(when.set)
        await dropping.returned()
        error = await waiting.raised(BrokenBarrierError)
        assert error.rank == 0
        assert "GeneratorExit" in error.reason
    results = await gather(partial(rank.execute_barrier, "x") for rank in ranks)
    assert [result.sequence for result in results] == [1, 1]


# A barrier that a user writes, with no more than it must have.


class Alone(Barrier):
    """For a world of one."""

    barrier_type = "alone"

    def __init__(self) -> None:
        self.crossed: list[tuple[str, Timeout]] = []

    # It knows no stalled_after_secs, and need not.
    async def execute_barrier(  # type: ignore[override]
        self, name: str = "", *, step: int | None = None, timeout_secs: Timeout = CONFIGURED
    ) -> BarrierResult:
        self.crossed.append((name, timeout_secs))
        return BarrierResult(name, len(self.crossed) - 1, 0.0, 0)


class AloneWithAbort(Alone):
    """One that can do that, too."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted: list[tuple[str, str]] = []

    async def abort(self, reason: str, name: str = "", *, step: int | None = None) -> bool:
        self.aborted.append((reason, name))
        return True


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


class Struck(Exception):
    """As a signal handler's."""


async def test_a_leader_that_is_struck_before_it_publishes(
    shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers learn at once that it will not (law 3)."""
    ranks = await shared.barriers(2)

    def struck(*_: object) -> None:
        raise Struck

    with monkeypatch.context() as patched:
        patched.setattr(Publication, "__init__", struck)
        async with Tasks() as tasks:
            waiting = tasks.start(partial(ranks[1].commit, Publisher(), name="x"))
            with pytest.raises(Struck):
                await ranks[0].commit(Publisher(), name="x")
            error = await waiting.raised(BrokenBarrierError)
            assert error.rank == 0
            assert waiting.secs < 3
    await gather(partial(rank.commit, Publisher(), name="x") for rank in ranks)


async def test_payloads_whose_connection_is_lost(
    shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All were released, so they are read over another one, and nobody is in doubt."""
    ranks = await shared.barriers(2)
    payloads = Session.payloads

    def lost(session: Session, phase: Phase) -> Any:
        connection = phase.connection
        if session.rank and connection is not None:
            connection._lose(BarrierConnectionError("cut"))
        return payloads(session, phase)

    monkeypatch.setattr(Session, "payloads", lost)
    found = await gather(partial(rank.all_gather, b"%d" % i) for i, rank in enumerate(ranks))
    assert found == [(b"0", b"1")] * 2


async def test_a_late_look_at_a_commit_that_was_given_up(tcp: World) -> None:
    """Its connection serves another phase by then, which waits there for its own key: the leader's
    word on the first one releases nobody from the other (law 1)."""
    ranks = await tcp.barriers(2)
    session = ranks[1]._session
    publish = Publisher(parks=True)
    async with Tasks() as tasks:
        leading, following = commits(tasks, ranks, publish)
        await publish.started.wait()
        (phase,) = session.open
        connection = phase.connection
        assert connection is not None
        following.scope.cancel()
        await following.ended.wait()
        assert connection in session._idle
        waiting = tasks.start(partial(ranks[1].execute_barrier, "y"))
        await tcp.entered(1, name="y")
        (other,) = session.open
        assert other.connection is connection
        other.since = session._now() + 60  # It trusts what wakes it.
        await settled(
            session.use(), session.start(session._woken_by_others(phase, connection)), 1e9
        )
        publish.go_on.set()
        await leading.returned()
        await anyio.sleep(0.2)
        assert not waiting.ended.is_set()
        await ranks[0].execute_barrier("y")
        await waiting.returned()
