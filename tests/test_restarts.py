"""Ranks that come back, twice over, too late or to a store that is not there yet."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest
from direct import DirectStore, run
from reports import TOLD_SECS
from stores import Data, MemoryStore, keys_of
from worlds import (
    AnyBarrier,
    Tasks,
    World,
    close,
    crash,
    crosses,
    free_port,
    gather,
    knows_who_left,
    until,
)

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    StoreBarrier,
    TCPStoreBarrier,
)
from async_barriers._client import process
from async_barriers._client.phases import Turns
from async_barriers._protocol import claiming, leaving
from async_barriers._protocol import membership as members
from async_barriers._protocol.keys import Keys
from async_barriers._protocol.membership import Life, Membership
from async_barriers._store.future import Future
from async_barriers._store.sources import Connection
from async_barriers._store.waiting import sleep

pytestmark = pytest.mark.anyio


def own(rank: int, port: int, **options: float) -> TCPStoreBarrier:
    """A rank of two over a store of their own."""
    return TCPStoreBarrier(
        rank,
        2,
        "p",
        tcpstore_port=port,
        master_address="127.0.0.1",
        timeout_secs=10,
        timeout_barrier_init_secs=options.get("init_secs", 10),
    )


def data(world: World) -> Data:
    """What is in a store written in Python, and its hook for faults."""
    assert isinstance(world.store, MemoryStore)
    return world.store.data


async def told(*ranks: AnyBarrier) -> None:
    """Wait until ``ranks`` know that their generation is over."""

    async def all_know() -> bool:
        return not any(rank._session.stands for rank in ranks)

    await until(all_know)


# Who may join, and in which generation; step by step, over a store that answers at once.


class Joining:
    """Lives that claim ranks under one prefix.

    :ivar alive: the tokens of those that live
    :ivar silent: whether only they themselves could say so
    """

    def __init__(self, data: MemoryStore | None = None) -> None:
        self.memory = data or MemoryStore()
        self.store = DirectStore(self.memory, waits=False)
        self.keys = Keys("p")
        self.alive: set[str] = set()
        self.silent = False
        self.asked: list[str] = []

    def lives(self, life: Life) -> bool | None:
        return None if self.silent else life.token in self.alive

    def wait_for(self, key: str, secs: float) -> Future[bool]:
        """Whoever is asked answers, if it lives."""
        self.asked.append(key)
        came: Future[bool] = Future()
        came.resolve(bool(self.alive))
        return came

    def leave(self, membership: Membership) -> bool:
        """Return whether another rank is left."""
        run(leaving.tell(self.store, membership, "closed", hosts=False))
        return run(leaving.go(self.store, membership, {}))

    def join(
        self,
        rank: int,
        world_size: int = 2,
        before: Membership | None = None,
        life: Life | None = None,
        **options: Any,
    ) -> Membership:
        life = life or Life(secrets.token_hex(8), "somewhere", 1000 + rank, **options)
        joined = run(
            claiming.join(
                self.store,
                self.keys,
                rank,
                world_size,
                life,
                lives=self.lives,
                wait_for=self.wait_for,
                before=before,
            )
        )
        self.alive.add(joined.claim.life.token)
        return joined

    def die(self, joined: Membership) -> None:
        self.alive.discard(joined.claim.life.token)


def test_one_generation_never_holds_two_lives_of_a_rank() -> None:
    """A life whose place is taken is refused while that one lives, and ends its generation when it
    does not; all who come then join the next one (laws 1 and 11)."""
    place = Joining()
    first, peer = place.join(0), place.join(1)
    assert (first.state, first.complete) == (peer.state, False)
    assert peer.complete
    with pytest.raises(BarrierError, match="rank 0 of barrier 'p' is held by process 1000 on some"):
        place.join(0)
    place.die(first)
    second = place.join(0)
    assert (second.state.number, second.state.by, second.complete) == (1, 0, False)
    assert not run(members.still_holds(place.store, peer))
    again = place.join(1, before=peer)
    assert (again.state, again.complete) == (second.state, True)
    # Its own former claim is no other life's.
    assert place.join(1, before=again).state.number == 2


def test_a_store_built_anew_begins_no_first_generation() -> None:
    """Of the ranks that were members before, one comes first and may try alone: what it tries
    before all have joined leaves nobody out of step (law 11). A rank that is new counts at once."""
    place = Joining()
    before = [place.join(rank) for rank in range(2)]
    assert [Turns(each).complete for each in before] == [True, True]
    anew = Joining()
    first = anew.join(1, before=before[1])
    assert (first.state.number, Turns(first).complete) == (1, False)
    second = anew.join(0, before=before[0])
    assert second.state == first.state
    assert Turns(second).complete


@pytest.mark.parametrize("size", [3, 300])
@pytest.mark.parametrize("dies", [True, False])
def test_an_attempt_that_died_before_all_had_joined(size: int, dies: bool) -> None:
    """Who comes then begins anew, and does not wait with the dead: their successors would end its
    generation under it (law 11)."""
    place = Joining()
    last = size - 1
    first = [place.join(rank, size) for rank in range(last)]
    if dies:
        place.die(first[1])
    came = place.join(last, size)
    assert (came.state.number, came.complete) == ((1, False) if dies else (0, True))
    assert (came.state.by, came.state.died) == ((1, True) if dies else (None, False))
    if dies:
        assert not run(members.still_holds(place.store, first[0]))
        again = [place.join(rank, size, before=first[rank]) for rank in range(last) if rank != 1]
        assert not any(one.complete for one in again)
        whole = place.join(1, size)
        assert whole.complete
        assert {one.state for one in (*again, whole)} == {came.state}


@pytest.mark.parametrize("lives", [True, False])
def test_a_life_that_only_itself_can_speak_for(lives: bool) -> None:
    """On another machine it is asked, and answers or is taken for dead; nothing is left of that."""
    place = Joining()
    first = place.join(0)
    place.silent = True
    if lives:
        with pytest.raises(BarrierError, match="which is alive"):
            place.join(0)
    else:
        place.die(first)
        assert place.join(0).state.number == 1
    assert place.asked
    assert not [key for key in place.memory.data.values if "/answer/" in key]


def test_one_that_left_holds_nothing() -> None:
    """Its rank is free, though its process lives; the last one to leave takes all keys along, and
    who comes then does not count what came before."""
    place = Joining()
    first, peer = place.join(0), place.join(1)
    assert place.leave(first)
    second = place.join(0)
    assert second.state.number == 1
    third = place.join(1, before=peer)
    for one in (second, third):
        place.leave(one)
    left = [key for key in place.memory.data.values if not key.endswith("/state")]
    assert left == []
    assert place.join(0).state.number == 2


def test_of_two_that_claim_at_the_same_moment_one_is_refused() -> None:
    """The store takes one claim; the other one finds that out, whichever step it was at."""
    for operation in ("compare_set", "add"):
        place = Joining()
        key = ""

        def overtake(called: str, at: str, wanted: str = operation, place: Joining = place) -> None:
            if called == wanted and at.endswith(
                "/member/0" if wanted == "compare_set" else "/roll"
            ):
                place.memory.data.hook = None
                if wanted == "compare_set":
                    place.join(0)

        place.memory.data.hook = overtake
        if operation == "compare_set":
            with pytest.raises(BarrierError, match="which is alive"):
                place.join(0)
        else:
            assert place.join(0).state.number == 0
        assert key == ""


def test_a_generation_that_ends_while_a_rank_joins_it() -> None:
    """It was too late there, and joins the next one: no generation has half a member."""
    place = Joining()
    dead = place.join(0)
    place.die(dead)

    def overtake(operation: str, key: str) -> None:
        if operation == "add" and key.endswith("/roll"):
            place.memory.data.hook = None
            place.join(0)

    place.memory.data.hook = overtake
    life = Life("the second one's", "somewhere", 1001)
    place.alive.add(life.token)
    joined = place.join(1, life=life)
    assert (joined.state.number, joined.complete) == (1, True)


@pytest.mark.parametrize("died", [False, True], ids=["replaces it", "finds it dead"])
def test_who_ends_a_generation_is_lost_before_it_tells(died: bool) -> None:
    """It tells the members when it comes again: they wait for a rank that is gone."""
    place = Joining()
    size = 3 if died else 2
    lives = [place.join(rank, size) for rank in range(2)]
    place.die(lives[1])
    bell = lives[0].own.bell(0)

    struck: list[str] = []

    def lose(operation: str, key: str) -> None:
        if operation == "set" and key == bell and not struck:
            struck.append(key)
            raise ConnectionResetError

    place.memory.data.hook = lose
    newcomer = 2 if died else 1
    with pytest.raises(BarrierConnectionError):
        place.join(newcomer, size)
    assert struck
    assert bell not in place.memory.data.values
    joined = place.join(newcomer, size)
    assert joined.state.number == 1
    assert bell in place.memory.data.values
    # Once, since later it would only leave a key behind.
    place.memory.delete_key(bell)
    before = place.join(0, size, before=lives[0])
    assert before.state == joined.state
    assert bell not in place.memory.data.values


def test_a_newcomer_claims_its_rank_as_the_last_one_clears_up() -> None:
    """Its claim is not deleted with those of the ranks that have left (laws 1 and 11)."""
    place = Joining()
    lives = [place.join(rank) for rank in range(2)]
    claim = place.keys.member(0)

    def leave(rank: int) -> None:
        place.die(lives[rank])
        place.leave(lives[rank])

    leave(0)
    came: list[Membership] = []
    hooked = place.memory.data

    def overtake(operation: str, key: str) -> None:
        if operation == "delete_key" and not key.endswith("/bell/1") and not came:
            hooked.hook = None
            came.append(place.join(0))

    hooked.hook = overtake
    leave(1)
    assert came[0].state.number == 1
    # It waited for the key to be gone, or else took an empty one.
    assert len(place.asked) == 10
    again = place.memory.data.values.get(claim)
    assert again is None or again == came[0].claim.encoded


def test_all_of_another_world_size_are_asked_at_once() -> None:
    """A job that comes back with another size from elsewhere does not wait for each in turn."""
    place = Joining()
    for rank in range(8):
        place.die(place.join(rank, 8))
    place.silent = True
    assert place.join(0, 7).state.world_size == 7
    # All of them, and who holds the rank.
    assert len(place.asked) == 2
    place = Joining()
    for rank in range(8):
        place.join(rank, 8)
    place.silent = True
    with pytest.raises(BarrierError, match="world size 7, but its peers with 8"):
        place.join(0, 7)


def test_a_world_that_changes_its_size() -> None:
    """A job that comes back, larger or smaller, when nobody of the former size lives; one of
    another size is refused while somebody does."""
    place = Joining()
    old = [place.join(rank, 3) for rank in range(3)]
    with pytest.raises(
        BarrierError, match=r"world size 2, but its peers with 3 \(rank 0, which li"
    ):
        place.join(0, 2)
    for one in old:
        place.die(one)
    joined = [place.join(rank, 2) for rank in range(2)]
    assert [one.state.number for one in joined] == [1, 1]
    with pytest.raises(BarrierError, match="world size 3, but its peers with 2"):
        place.join(2, 3, before=old[2])


@pytest.mark.parametrize("overtaken", [True, False], ids=["as it joins", "later"])
def test_one_that_is_refused_for_its_size_holds_no_rank(overtaken: bool) -> None:
    """It had claimed it before others of another size came; it lives on, and a right one joins."""
    place = Joining()

    def overtake(operation: str, key: str) -> None:
        if operation == "add" and key.endswith("/roll"):
            place.memory.data.hook = None
            place.join(1, 3)
            place.alive.add(life.token)

    life = Life("the refused one's", "somewhere", 1)
    before = None
    if overtaken:
        place.memory.data.hook = overtake
    else:
        before = place.join(0)
        place.die(before)
        place.join(1, 3)
        place.alive.add(before.claim.life.token)
    with pytest.raises(BarrierError, match="world size 2, but its peers with 3"):
        place.join(0, 2, before=before, life=life)
    assert place.join(0, 3).state.number == 1


def test_another_run_is_never_a_restart() -> None:
    """Also where nobody of the first one lives; who names none may join any (law 11)."""
    place = Joining()
    first = place.join(0, run_id="one")
    place.die(first)
    with pytest.raises(BarrierError, match=r"of run 'two' .* are those of run 'one'"):
        place.join(0, run_id="two")
    assert place.join(0, run_id="one").state.run_id == "one"
    assert place.join(1).state.run_id == "one"


# Barriers.


async def test_the_second_of_two_with_the_same_rank_is_refused(shared: World) -> None:
    """Both are named, however often it tries; the first one goes on, and whoever waits (law 1)."""
    ranks = await shared.barriers(2)
    second = shared.barrier(0, 2)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x"))
        await shared.entered(0, name="x")
        for _ in range(2):
            with pytest.raises(BarrierError, match="which is alive") as caught:
                await second.execute_barrier("x")
            assert str(caught.value).count(f"on {socket.gethostname()}") == 2
            # Nor is a connection left, such as the one that was opened meanwhile.
            assert all(each.lost for each in second._session._opened)
        assert not waiting.ended.is_set()
        await ranks[1].execute_barrier("x")
        assert (await waiting.returned()).sequence == 0
    assert await crosses(ranks) == 1
    # Once the first one has left, the rank is free.
    await ranks[0].aclose()
    await second.connect()
    await told(ranks[1])
    assert await crosses([second, ranks[1]]) == 0


async def test_a_connection_is_lost_while_the_rank_is_claimed(
    shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that will be rung at: it opens again, so that the rank learns of what others do."""
    join, lost = claiming.join, list[Connection]()

    async def loses(store: Connection, *args: Any, **kwargs: Any) -> Membership:
        joined = await join(store, *args, **kwargs)
        session = ranks[1]._session
        while len(session._opened) < 2:
            await sleep(session.running, 0.01)
        if not lost:
            lost.extend(each for each in session._opened if each is not store)
            lost[0].close(reset=True)
        return joined

    ranks = [shared.barrier(rank, 2) for rank in range(2)]
    await ranks[0].connect()
    monkeypatch.setattr("async_barriers._client.joining.claiming.join", loses)
    await ranks[1].connect()
    assert lost
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x"))
        await shared.entered(1, name="x")
        await ranks[0].abort("no more", "x")
        with anyio.fail_after(TOLD_SECS):
            assert (await waiting.raised(BrokenBarrierError)).reason == "no more"
    await close(ranks)


async def left_and_back(world: World) -> list[AnyBarrier]:
    """Two ranks. The second has left, which the first has heard, and has joined again."""
    ranks = await world.barriers(2)
    await ranks[1].aclose()
    await until(partial(knows_who_left, ranks[0]))
    ranks[1] = world.barrier(1, 2)
    await ranks[1].connect()
    return ranks


@pytest.mark.parametrize("secs", [0.3, 0.8], ids=["soon", "after the time for its return"])
async def test_a_connection_is_missing_as_one_that_left_is_back(
    tcp: World, monkeypatch: pytest.MonkeyPatch, secs: float
) -> None:
    """No call enters the generation before meanwhile, and the rank is not refused for its own claim
    when it tries again."""
    ranks = await left_and_back(tcp)
    session = ranks[0]._session
    open_second, missing = session._opening, [True]

    async def none() -> Connection:
        await sleep(session.running, secs)
        raise BarrierConnectionError("there are no descriptors left")

    def opening() -> Any:
        return session.start(none()) if missing and missing.pop() else open_second()

    monkeypatch.setattr(session, "_opening", opening)
    async with Tasks() as tasks:
        calls = [tasks.start(partial(rank.execute_barrier, "a")) for rank in ranks]
        await anyio.sleep(0.15)
        assert not missing
        calls += [tasks.start(partial(rank.execute_barrier, "b")) for rank in ranks]
        for call in calls:
            assert (await call.returned()).sequence == 0
            assert call.secs < 3


async def test_a_store_is_slow_as_one_that_left_is_back(
    shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not gone with that rank, as one would that refuses: the call waits for it."""
    ranks = await left_and_back(shared)
    session = ranks[0]._session
    opens = session._source.open

    async def slowly(loop: Any, deadline: float) -> Connection:
        left_secs = deadline - loop.now()
        await sleep(loop, max(0.0, min(left_secs, 0.8)))
        if left_secs < 0.8:
            raise BarrierConnectionError("the store did not answer in time") from TimeoutError()
        return await opens(loop, deadline)

    monkeypatch.setattr(session._source, "open", slowly)
    assert await crosses(ranks) == 0


async def test_a_life_elsewhere_is_asked(shared: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this machine cannot tell whether it lives: it answers, or it is taken for dead."""
    ranks = await shared.barriers(2)
    monkeypatch.setattr(process, "lives", lambda life: None)
    second = shared.barrier(0, 2)
    with pytest.raises(BarrierError, match="which is alive"):
        await second.connect()
    assert await crosses(ranks) == 0
    crash(ranks[0])
    with anyio.fail_after(4):
        await second.connect()
        await told(ranks[1])
    assert await crosses([second, ranks[1]]) == 0


@pytest.mark.parametrize("by", ["its process", "another process"])
async def test_closing_after_the_end_of_its_generation(
    memory: World, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """It gives up its rank then, too: a new barrier takes it."""
    ranks = await memory.barriers(2)
    crash(ranks[1])
    ranks[1] = memory.barrier(1, 2)
    await ranks[1].connect()

    async def over() -> bool:
        return ranks[0]._session.turns is None

    await until(over)
    await ranks[0].aclose()
    if by == "another process":
        # Which sees that this one lives.
        monkeypatch.setattr(process, "lives", lambda life: True)
    ranks[0] = memory.barrier(0, 2)
    await ranks[0].connect()
    assert await crosses(ranks) == 0


@pytest.mark.parametrize("do", ["execute_barrier", "commit", "all_gather"])
async def test_who_waits_for_the_others_to_come_back(memory: World, do: str) -> None:
    """It meets them with what it had brought, though that was numbered otherwise (law 11)."""
    ranks = await memory.barriers(3)
    crash(ranks[1])
    ranks[1] = memory.barrier(1, 3)

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        return b"+".join(payloads.values())

    def call(rank: int) -> Any:
        payload = b"p%d" % rank * (1 if rank else 200)
        if do == "execute_barrier":
            return partial(ranks[rank].execute_barrier, "x")
        if do == "all_gather":
            return partial(ranks[rank].all_gather, payload, name="x")
        return partial(ranks[rank].commit, publish, payload=payload, name="x", leader=2)

    async with Tasks() as tasks:
        outcomes = {1: tasks.start(call(1))}
        await until(partial(_joined, ranks[1], 1))
        await memory.entered(1, name="x", sequence="e0")
        await ranks[0].connect()
        outcomes[0] = tasks.start(call(0))
        await memory.entered(0, name="x", sequence="e0")
        assert not any(outcome.ended.is_set() for outcome in outcomes.values())
        outcomes[2] = tasks.start(call(2))
        answers = [await outcomes[rank].returned() for rank in range(3)]
    brought = [b"p%d" % rank * (1 if rank else 200) for rank in range(3)]
    if do == "execute_barrier":
        assert [answer.sequence for answer in answers] == [0, 0, 0]
    elif do == "all_gather":
        assert answers == [tuple(brought)] * 3
    else:
        assert answers == [b"+".join(brought)] * 3
    assert await crosses(ranks) == 1


async def _joined(barrier: AnyBarrier, generation: int) -> bool:
    membership = barrier._session.membership
    return membership is not None and membership.state.number == generation


async def test_what_is_tried_before_all_are_back_puts_nobody_out_of_step(shared: World) -> None:
    """Deadlines, aborts and bodies that fail, alone or by two of three (law 11)."""
    ranks = await shared.barriers(3)
    crash(ranks[0])
    ranks[0] = shared.barrier(0, 3, timeout_barrier_init_secs=0.4)
    for _ in range(2):
        with pytest.raises(BarrierTimeoutError, match="did not join again") as caught:
            await ranks[0].execute_barrier("x")
        assert caught.value.missing_ranks == (1, 2)
    assert await ranks[0].abort("no disk", "x")
    with pytest.raises(LookupError):
        async with ranks[0].phase("x"):
            raise LookupError("no shard")
    await ranks[1].connect()
    async with Tasks() as tasks:
        for outcome in [
            tasks.start(partial(rank.execute_barrier, "x", timeout_secs=0.3)) for rank in ranks[:2]
        ]:
            assert (await outcome.raised(BarrierTimeoutError)).missing_ranks[-1] == 2
    # How often each has tried by now is nobody's concern.
    await ranks[2].connect()
    for sequence in range(2):
        assert await crosses(ranks) == sequence
    keys: list[str] = await shared.call(keys_of, shared.innermost)
    assert not [key for key in keys if ":x/e" in key]


async def test_a_break_of_the_gone_is_not_learned(shared: World) -> None:
    """Both processes of a broken phase are gone: those that come start with a clean slate."""
    ranks = await shared.barriers(2)
    assert await ranks[0].abort("no disk", "x")
    for rank in ranks:
        crash(rank)
    assert await crosses([shared.barrier(rank, 2) for rank in range(2)]) == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
async def test_all_come_back_one_by_one(shared: World, order: tuple[int, ...]) -> None:
    """In whatever order, each in the middle of a phase; what they cross then is one phase."""
    ranks = await shared.barriers(3)
    for rank in order:
        async with Tasks() as tasks:
            waiting = [
                tasks.start(partial(ranks[other].execute_barrier, "x", timeout_secs=None))
                for other in range(3)
                if other != rank
            ]
            await until(lambda w=waiting: _all_wait(ranks, rank))  # type: ignore[misc]  # noqa: B023
            crash(ranks[rank])
            ranks[rank] = shared.barrier(rank, 3)
            await ranks[rank].connect()
            for outcome in waiting:
                assert (await outcome.raised(BrokenBarrierError)).rank == rank
        await gather(one.connect for one in ranks)
        for sequence in range(2):
            assert await crosses(ranks) == sequence


async def _all_wait(ranks: list[AnyBarrier], but: int) -> bool:
    others = [rank for rank in range(3) if rank != but]
    return all(
        any(phase.name == "x" and phase.entered for phase in ranks[other]._session.open)
        for other in others
    )


async def test_a_host_that_is_built_anew() -> None:
    """Its peers keep their objects, and wait for it as if they had just begun (law 11)."""
    port = free_port()
    host, peer = own(0, port), own(1, port)
    await gather([host.execute_barrier, peer.execute_barrier])
    with anyio.fail_after(2):
        await host.aclose()
    again = own(0, port)
    async with Tasks() as tasks:
        waiting = tasks.start(peer.execute_barrier)
        await again.execute_barrier()
        assert (await waiting.returned()).sequence == 0
    with anyio.fail_after(2):
        await peer.aclose()
        await again.aclose()


async def test_a_break_that_is_owed_is_not_for_a_new_store() -> None:
    """The phase that it was for went with the old store (law 11)."""
    port = free_port()
    host, peer = own(0, port), own(1, port)
    await gather([host.connect, peer.connect])
    async with Tasks() as tasks:
        waiting = tasks.start(partial(peer.execute_barrier, "x"))
        await until(partial(_waits, peer))
        crash(host)
        await waiting.ended.wait()
    again = own(0, port)
    assert await crosses([again, peer]) == 0
    await peer.aclose()
    await again.aclose()


async def _waits(barrier: AnyBarrier) -> bool:
    return any(phase.entered for phase in barrier._session.open)


async def test_a_body_that_fails_before_there_is_a_store() -> None:
    """Its turn is broken when the store can be reached: nobody takes the next for it (law 3)."""
    port = free_port()
    host, peer = own(0, port), own(1, port)
    with pytest.raises(OSError, match="disk full"):
        async with peer.phase("save"):
            raise OSError("disk full")
    with pytest.raises(BrokenBarrierError, match="disk full"):
        await host.execute_barrier("save")
    assert await crosses([host, peer], "save") == 1
    await peer.aclose()
    await host.aclose()


async def test_a_phase_that_the_store_forgot(memory: World) -> None:
    """Whoever waits in it is in doubt, at the latest when a rank restarts (laws 2 and 5)."""
    ranks = await memory.barriers(2)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x"))
        await memory.entered(1, name="x")
        await memory.call(memory.store.delete_key, memory.keys(name="x").count)
        crash(ranks[0])
        again = memory.barrier(0, 2)
        await again.connect()
        error = await waiting.raised(BarrierConnectionError)
        assert error.in_doubt
        assert "the store no longer knows that this rank had entered" in str(error)
    assert await crosses([again, ranks[1]]) == 0


async def test_a_break_that_is_owed_to_a_phase_that_is_forgotten(tcp: World) -> None:
    """It is given up; a rank is not kept from going on by it."""
    ranks = await tcp.barriers(2, lanes=2)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x", timeout_secs=None))
        await tcp.entered(0, name="x")
        await tcp.call(tcp.store.delete_key, tcp.keys("x").count)
        (phase,) = ranks[0]._session.open
        connection: Any = phase.connection
        connection._socket.shutdown(socket.SHUT_RDWR)
        await waiting.raised(BarrierConnectionError)
        assert await crosses(ranks, "y") == 0


async def test_a_join_that_hangs_is_left_behind(memory: World) -> None:
    """One call that never returns does not end the barrier: a later attempt works."""
    for operation in ("clone", "check"):
        hung = threading.Event()
        hang = [True]

        def hook(
            called: str,
            key: str,
            wanted: str = operation,
            hung: threading.Event = hung,
            hang: list[bool] = hang,
        ) -> None:
            if called == wanted and key in ("", f"async_barriers/5:{wanted}/state") and hang:
                hang.pop()
                hung.wait()

        data(memory).hook = hook
        barrier = memory.barrier(0, 1, prefix=operation, timeout_barrier_init_secs=0.5)
        with pytest.raises(BarrierConnectionError):
            await barrier.execute_barrier()

        async def works(barrier: AnyBarrier = barrier) -> bool:
            with suppress(BarrierConnectionError):
                await barrier.execute_barrier()
                return True
            return False

        await until(works, within_secs=5)
        hung.set()
        assert (await barrier.execute_barrier()).sequence == 1
        data(memory).hook = None


@pytest.mark.parametrize("at", ["/state", "/roll", "clone"])
async def test_closing_while_it_joins(memory: World, at: str) -> None:
    """The join ends in BarrierClosedError; of what it had claimed nothing is left, and nobody
    waits for it (law 13)."""
    barrier = memory.barrier(0, 2)
    started, go_on = threading.Event(), threading.Event()
    clones: list[str] = []

    def hook(operation: str, key: str) -> None:
        if operation == "clone":
            clones.append(key)
        # The second clone is the connection that listens.
        here = len(clones) == 2 and operation == "clone" if at == "clone" else key.endswith(at)
        if here and not started.is_set():
            started.set()
            go_on.wait()

    await memory.read("anything")  # over a clone of its own
    data(memory).hook = hook
    async with Tasks() as tasks:
        connecting = tasks.start(barrier.connect)

        async def under_way() -> bool:
            return started.is_set()

        await until(under_way)
        closing = tasks.start(barrier.aclose)

        async def closed() -> bool:
            return barrier._session.closing

        await until(closed)
        go_on.set()
        await connecting.raised(BarrierClosedError)
        await closing.returned()
    with pytest.raises(BarrierClosedError):
        async with barrier.phase("late"):
            raise AssertionError("never entered")
    again = memory.barrier(0, 2)
    await again.connect()
    assert await crosses([again, memory.barrier(1, 2)]) == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_one_loop_after_the_other(memory: World) -> None:
    """A barrier may move from one event loop to another, of another kind even; with each loop it
    leaves, and joins anew with the next (law 3)."""
    barrier = StoreBarrier(memory.store, rank=0, world_size=1, prefix="moves")

    def cross(backend: str) -> int:
        return anyio.run(barrier.execute_barrier, "x", backend=backend).sequence

    sequences = [await memory.call(cross, backend) for backend in ("trio", "asyncio", "trio")]
    assert sequences == [0, 0, 0]
    await barrier.aclose()


async def test_a_bell_that_was_cut_off_is_heard_again(tcp: World) -> None:
    """Who waits without a deadline hears of a restart also over its second connection (law 11)."""
    ranks = await tcp.barriers(2)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x", timeout_secs=None))
        await tcp.entered(1, name="x")
        bell: Any = ranks[1]._session._bell
        bell._socket.shutdown(socket.SHUT_RDWR)
        crash(ranks[0])
        again = tcp.barrier(0, 2)
        await again.connect()
        assert "joined again" in str(await waiting.raised(BrokenBarrierError))
    assert await crosses([again, ranks[1]]) == 0


async def test_a_phase_that_a_new_store_never_knew(memory: World) -> None:
    """Its arrival was sent on a connection that is lost, and perhaps all were released: whoever
    then finds an empty store is in doubt, and breaks nothing there (law 2)."""
    ranks = await memory.barriers(2)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x"))
        await memory.entered(1, name="x")
        session = ranks[1]._session
        (phase,) = session.open
        connection, bell, membership = phase.connection, session._bell, session.membership
        assert connection is not None
        assert bell is not None
        assert membership is not None
        store: Any = memory.store
        store.data.values.clear()
        connection.on_lost = None
        connection.close(reset=True)
        session._break_all(membership, bell, None)
        error = await waiting.raised(BarrierConnectionError)
        assert error.in_doubt
        assert phase.entry.keys.count not in store.data.values
