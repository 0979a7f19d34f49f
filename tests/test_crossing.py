"""What a crossing promises, for every barrier over every store on both event loops."""

from __future__ import annotations

import asyncio
import logging
import pickle
import re
import threading
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
from direct import DirectStore, run
from stores import keys_of
from worlds import (
    AnyBarrier,
    Outcome,
    Tasks,
    World,
    close,
    crash,
    gather,
    library_threads,
    library_threads_gone,
)

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierProgress,
    BarrierTimeoutError,
    BrokenBarrierError,
    TCPStoreBarrier,
)
from async_barriers._protocol import breaking as breaks
from async_barriers._protocol import phase as phases
from async_barriers._protocol.count import Count
from async_barriers._protocol.phase import Entry
from async_barriers._protocol.store import CompareSet, Request, Set
from async_barriers._protocol.verdict import Broken, Released
from async_barriers._store.copies import copy_of
from async_barriers._store.future import Future

pytestmark = pytest.mark.anyio


def starts(tasks: Tasks, ranks: list[AnyBarrier], name: str = "", **options: Any) -> list[Outcome]:
    """Have ``ranks`` enter ``name``, each in a task of its own."""
    return [
        tasks.start(lambda rank=rank: rank.execute_barrier(name, **options))  # type: ignore[misc]
        for rank in ranks
    ]


async def crosses_again(ranks: list[AnyBarrier], name: str) -> int:
    """Cross ``name`` with everyone; its sequence number, which all must agree on (law 10)."""
    results = await gather(lambda r=rank: r.execute_barrier(name) for rank in ranks)  # type: ignore[misc]
    assert len({result.sequence for result in results}) == 1
    sequence: int = results[0].sequence
    return sequence


async def test_a_deadline_names_exactly_who_is_missing(world: World) -> None:
    """On every rank, the late ones included, and the next crossing works (laws 2, 3, 6, 10)."""
    ranks = await world.barriers(4)
    async with Tasks() as tasks:
        waiting = starts(tasks, [ranks[1]], "x", timeout_secs=0.8) + starts(tasks, [ranks[3]], "x")
        errors = [await outcome.raised(BarrierTimeoutError) for outcome in waiting]
        errors += [
            await outcome.raised(BarrierTimeoutError)
            for outcome in starts(tasks, [ranks[0], ranks[2]], "x")
        ]
    for error in errors:
        assert error.missing_ranks == (0, 2)
        assert (error.name, error.sequence, error.timeout_secs) == ("x", 0, 0.8)
        assert "ranks 0, 2 had not entered" in str(error)
        assert not error.in_doubt
    assert all(outcome.own_secs < 1.8 for outcome in waiting)
    assert await crosses_again(ranks, "x") == 1


async def test_cancelling_breaks_the_phase(world: World) -> None:
    """Peers learn at once who was cancelled, however long their own deadlines (laws 3, 4, 8)."""
    ranks = await world.barriers(3)
    async with Tasks() as tasks:
        waiting = starts(tasks, ranks[:2], "x", timeout_secs=None)
        await world.entered(0, 1, name="x")
        cancelled_at = anyio.current_time()
        waiting[0].scope.cancel()
        error = await waiting[1].raised(BrokenBarrierError)
        await waiting[0].ended.wait()
        assert waiting[0].scope.cancelled_caught
        assert anyio.current_time() - cancelled_at < 1
        assert (error.rank, error.reason) == (0, "its task was cancelled")
        with pytest.raises(BrokenBarrierError, match="broken by rank 0"):
            await ranks[2].execute_barrier("x")
    assert await crosses_again(ranks, "x") == 1


async def test_a_body_that_raises_breaks_its_phase(world: World) -> None:
    """The rank's own exception goes on, and peers are told of it (law 3)."""
    ranks = await world.barriers(2)
    async with Tasks() as tasks:
        (waiting,) = starts(tasks, ranks[:1], "x")
        await world.entered(0, name="x")
        with pytest.raises(OSError, match="disk full"):
            async with ranks[1].phase("x"):
                raise OSError("disk full")
        error = await waiting.raised(BrokenBarrierError)
    assert (error.rank, error.reason) == (1, "it raised OSError: disk full")

    async def body() -> None:
        async with ranks[1].phase("x"):
            pass

    async with Tasks() as tasks:
        waiting = tasks.start(body)
        assert (await ranks[0].execute_barrier("x")).sequence == 1
        await waiting.returned()


async def test_abort_before_and_after_entering(world: World) -> None:
    """It breaks what this rank awaits, or else uses up its next turn."""
    ranks = await world.barriers(2)
    assert await ranks[0].abort("no disk", "x")
    with pytest.raises(BrokenBarrierError, match="broken by rank 0: no disk"):
        await ranks[1].execute_barrier("x")
    async with Tasks() as tasks:
        (waiting,) = starts(tasks, ranks[:1], "x")
        await world.entered(0, name="x", sequence=1)
        assert await ranks[0].abort("second thoughts", "x")
        assert (await waiting.raised(BrokenBarrierError)).rank == 0
        with pytest.raises(BrokenBarrierError, match="second thoughts"):
            await ranks[1].execute_barrier("x")
    assert await crosses_again(ranks, "x") == 2


async def test_closing_breaks_what_is_awaited(world: World) -> None:
    """The waiting call is told so, its peers too, and later calls are refused (law 3)."""
    ranks = await world.barriers(3)
    async with Tasks() as tasks:
        own, peer = starts(tasks, ranks[1:], "x", timeout_secs=None)
        await world.entered(1, 2, name="x")
        await ranks[1].aclose()
        await ranks[1].aclose()
        await own.raised(BarrierClosedError)
        with pytest.raises(BarrierClosedError, match="is closed; build a new one"):
            await ranks[1].execute_barrier("x")
        with pytest.raises(BarrierClosedError):
            await ranks[1].connect()
        told = "broken by rank 1: it closed its barrier"
        assert told in str(await peer.raised(BrokenBarrierError))
        with pytest.raises(BrokenBarrierError, match=told):
            await ranks[0].execute_barrier("x")


async def test_who_has_left_is_waited_for_no_more(world: World) -> None:
    """Peers that wait for it where it never came learn that at once, and later ones too, until it
    joins again (law 3)."""
    ranks = await world.barriers(3)
    told = "broken by rank 1: it closed its barrier"
    async with Tasks() as tasks:
        waiting = starts(tasks, [ranks[0]], "x", timeout_secs=None)
        await world.entered(0, name="x")
        left_at = anyio.current_time()
        await ranks[1].aclose()
        assert told in str(await waiting[0].raised(BrokenBarrierError))
        assert anyio.current_time() - left_at < 1
    for rank, name in ((ranks[2], "x"), (ranks[0], "y"), (ranks[2], "y")):
        entered_at = anyio.current_time()
        with pytest.raises(BrokenBarrierError, match=told):
            await rank.execute_barrier(name, timeout_secs=None)
        assert anyio.current_time() - entered_at < 1
    again = world.barrier(1, 3)
    await crosses_again([ranks[0], again, ranks[2]], "z")


async def test_names_are_independent(world: World) -> None:
    """Sixteen phases at once, entered in opposite orders by two ranks (law 9)."""
    names = [f"n{number}" for number in range(16)]
    ranks = await world.barriers(2, lanes=4)
    orders = (names, names[::-1])
    results = await gather(
        lambda r=rank, n=name: r.execute_barrier(n)  # type: ignore[misc]
        for rank, order in zip(ranks, orders, strict=True)
        for name in order
    )
    assert sorted(result.name for result in results) == sorted(names * 2)


async def test_many_phases_leave_nothing_behind(world: World) -> None:
    """Keys and threads are as many after many phases, broken ones too, as after few (law 10)."""
    ranks = await world.barriers(2, lanes=2)
    count = 5 if world.kind == "file" else 60

    async def some(salt: str) -> None:
        for number in range(count):
            await gather(lambda r=rank: r.execute_barrier("same") for rank in ranks)  # type: ignore[misc]
            await gather(
                lambda r=rank, n=f"{salt}{number}": r.execute_barrier(n)  # type: ignore[misc]
                for rank in ranks
            )
            await ranks[0].abort("no", "broken")
            with pytest.raises(BrokenBarrierError):
                await ranks[1].execute_barrier("broken")

    async def settled() -> tuple[int, int]:
        keys = await world.call(world.store.num_keys)
        return keys, len(library_threads())

    await some("a")
    with anyio.fail_after(5):
        few = await settled()
        while (again := await settled()) != few:
            few = again
    await some("b")
    with anyio.fail_after(5):
        while await settled() > few:
            await anyio.sleep(0.01)


async def test_rubbish_in_the_store_breaks_and_never_releases(shared: World) -> None:
    """A client that writes where arrivals are counted gets nobody released (law 1)."""
    ranks = await shared.barriers(2, lanes=2)
    said = {
        "set": ("rubbish", "something else wrote 'rubbish' where its arrivals are counted"),
        "add": (5, "do two processes share a rank, or did something else write to its keys"),
    }
    for call, (value, told) in said.items():
        async with Tasks() as tasks:
            first = starts(tasks, ranks[:1], call)
            await shared.entered(0, name=call)
            await shared.call(getattr(shared.innermost, call), shared.keys(name=call).count, value)
            errors = [
                await outcome.raised(BarrierError)
                for outcome in first + starts(tasks, ranks[1:], call)
            ]
        assert any(told in str(error) for error in errors), errors
        for error in errors:
            assert error.in_doubt or isinstance(error, BrokenBarrierError)
    # What explains is read by people only.
    await shared.call(shared.innermost.set, shared.keys(name="log").log, "rubbish\n")
    async with Tasks() as tasks:
        (waiting,) = starts(tasks, ranks[:1], "log")
        await shared.entered(0, name="log")
        assert not waiting.ended.is_set()
        await ranks[1].execute_barrier("log")
        await waiting.returned()


async def test_one_register_settles_a_race(shared: World) -> None:
    """The last arrival against a deadline, in both orders, step by step (law 2)."""
    await shared.barriers(2)

    def race(name: str, *, deadline_first: bool) -> list[object]:
        entries = [Entry(shared.keys(name=name), rank, 2) for rank in range(2)]
        store = DirectStore(copy_of(shared.store))

        def give_up() -> object:
            late = Broken(0, "", 1.0)
            return run(breaks.give_up(store, entries[0], late, entered=True, names_missing=True))[0]

        def arrive(entry: Entry) -> Count:
            came = phases.entered(entry, store.call(*phases.entering(entry)).result())
            assert isinstance(came, Count)
            return came

        def arrive_last() -> object:
            assert arrive(entries[1]).full(2, 0) != deadline_first
            return run(phases.look(store, entries[1]))

        arrive(entries[0])
        steps = (give_up, arrive_last) if deadline_first else (arrive_last, give_up)
        came = [step() for step in steps]
        came.append(run(phases.look(store, entries[0])))
        store.close()
        return came

    broken = await shared.call(lambda: race("broken", deadline_first=True))
    assert broken == [Broken(0, "", 1.0, (1,))] * 3
    released = await shared.call(lambda: race("released", deadline_first=False))
    assert released == [Released(None)] * 3


@pytest.mark.parametrize("entered", [True, False])
@pytest.mark.parametrize("gives_up", [True, False])
async def test_rubbish_that_is_deleted_meanwhile(
    memory: World, entered: bool, gives_up: bool
) -> None:
    """Where arrivals are counted: a rank that had entered is in doubt, another one begins anew, and
    none asks again and again."""
    await memory.barriers(2)

    def meets() -> object:
        entry = Entry(memory.keys(name="x"), 0, 2)
        store = DirectStore(memory.store)
        store.call(Set(entry.keys.count, b"rubbish"))

        class Deleting:
            """Deletes the phase between what is read and what is written."""

            waits = True
            written = 0

            def call(self, *requests: Request, wait: str | None = None) -> Future[list[Any]]:
                self.written += isinstance(requests[0], CompareSet)
                assert self.written < 4
                if self.written == 1:
                    store.call(*phases.spent(entry, broken=True))
                return store.call(*requests)

        try:
            if gives_up:
                broken = Broken(0, "late")
                return run(breaks.give_up(Deleting(), entry, broken, entered=entered))
            return run(phases.look(Deleting(), entry, entered=entered))
        except phases.Forgotten:
            left = [key for key in keys_of(memory.innermost) if key.startswith(entry.keys.path)]
            return left or None

    came = await memory.call(meets)
    if entered:
        assert came is None
    elif gives_up:
        assert came == (Broken(0, "late"), True)
    else:
        assert isinstance(came, Count)
        assert not came.arrived


async def test_of_all_that_break_it_one_did(shared: World) -> None:
    """With one deadline for all, each reads before any of them writes; one then tells the others,
    and not each tells each."""
    await shared.barriers(3)

    def race() -> list[tuple[object, bool]]:
        entries = [Entry(shared.keys(name="x"), rank, 4) for rank in range(3)]
        store = DirectStore(copy_of(shared.store))
        found: list[tuple[object, bool]] = []

        def give_up(rank: int) -> None:
            late = Broken(rank, "", 1.0)
            call = breaks.give_up(
                AfterReading(rank), entries[rank], late, entered=True, names_missing=True
            )
            found.append(run(call))

        class AfterReading:
            """Has the next rank give up between what one reads and what it writes."""

            waits = True

            def __init__(self, rank: int) -> None:
                self._rank = rank

            def call(self, *requests: Request, wait: str | None = None) -> Future[list[Any]]:
                if isinstance(requests[0], CompareSet) and self._rank < 2:
                    rank, self._rank = self._rank, 2
                    give_up(rank + 1)
                return store.call(*requests)

        for entry in entries:
            store.call(*phases.entering(entry))
        give_up(0)
        store.call(*phases.spent(entries[0], broken=True))
        store.close()
        return found

    # The last one to begin was the first to write.
    broken = Broken(2, "", 1.0, (3,))
    assert await shared.call(race) == [(broken, True), (broken, False), (broken, False)]


async def test_a_full_house_does_not_matter(tcp: World) -> None:
    """Programs that have filled asyncio's and anyio's thread pools still cross (law 7)."""
    ranks = await tcp.barriers(2)
    over = threading.Event()
    async with anyio.create_task_group() as tasks:
        limiter = anyio.to_thread.current_default_thread_limiter()
        for _ in range(int(limiter.total_tokens)):
            tasks.start_soon(anyio.to_thread.run_sync, over.wait)  # type: ignore[arg-type]
        while limiter.available_tokens:
            await anyio.sleep(0)
        await crosses_again(ranks, "x")
        over.set()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncios_own_cancellation(tcp: World) -> None:
    """task.cancel(), twice in a row, is asyncio.CancelledError at once, and breaks the phase."""
    ranks = await tcp.barriers(2)
    task = asyncio.create_task(ranks[0].execute_barrier("x"))
    await tcp.entered(0, name="x")
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # It did not wait for the break, which may still be on its way.
    await tcp.exists(tcp.keys(name="x").reason)
    with pytest.raises(BrokenBarrierError, match="its task was cancelled"):
        await ranks[1].execute_barrier("x")


async def test_progress_is_reported(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Each waiting rank warns and calls back, with who is missing, each period (law 6)."""
    seen: list[BarrierProgress] = []

    def on_progress(progress: BarrierProgress) -> None:
        seen.append(progress)
        raise ValueError("a callback of the user's that is wrong")

    ranks = await world.barriers(3, warn_after_secs=0.3, on_progress=on_progress)
    with caplog.at_level(logging.WARNING, "async_barriers"):
        async with Tasks() as tasks:
            waiting = starts(tasks, ranks[:2], "x")
            with anyio.fail_after(10):
                while sum(progress.arrived == 2 for progress in seen) < 4:
                    await anyio.sleep(0.01)
            # Later ones may come while those that wait have yet to be woken.
            before = list(seen)
            await ranks[2].execute_barrier("x")
            for outcome in waiting:
                await outcome.returned()
    for progress in before:
        # On a slow machine the first one may come before the other rank has entered.
        assert progress.world_size == progress.arrived + len(progress.missing_ranks) == 3
        assert 2 in progress.missing_ranks
        assert progress.waited_secs >= 0.3
    text = caplog.text
    assert re.search(
        r"barrier 'tests/x' #0: 2 of 3 ranks after 0\.\d s, missing 2 \(.*, alive\)\n", text
    )
    assert "on_progress raised" in text
    assert {record.name.partition(".")[0] for record in caplog.records} <= {"async_barriers"}


async def test_a_restarted_rank_breaks_what_waits_for_it(shared: World) -> None:
    """Its peers are told, alone it is told who lacks, and with all back it works (law 11)."""
    ranks = await shared.barriers(3, timeout_barrier_init_secs=1.5)
    async with Tasks() as tasks:
        waiting = starts(tasks, ranks[1:], "x", timeout_secs=None)
        await shared.entered(1, 2, name="x")
        crash(ranks[0])
        again = shared.barrier(0, 3, timeout_barrier_init_secs=1.5)
        await again.connect()
        for outcome in waiting:
            error = await outcome.raised(BrokenBarrierError)
            assert error.rank == 0
            assert "joined again" in error.reason
    with pytest.raises(BarrierTimeoutError, match="did not join again") as caught:
        await again.execute_barrier("x")
    assert caught.value.missing_ranks == (1, 2)
    await gather(rank.connect for rank in ranks[1:])
    assert await crosses_again([again, *ranks[1:]], "x") == 0
    assert await crosses_again([again, *ranks[1:]], "y") == 0


async def test_closed_and_built_anew_many_times(shared: World) -> None:
    """A barrier may be replaced again and again, and keys do not pile up (laws 10 and 11)."""
    keys = []
    for round_ in range(100 if shared.kind == "prefix" else 12):
        ranks = [shared.barrier(rank, 2) for rank in range(2)]
        assert await crosses_again(ranks, "x") == 0
        await close(ranks)
        if round_ < 2 or round_ % 10 == 9:
            # Threads that waited for a key end by it, and delete it, a moment later.
            await library_threads_gone()
            keys.append(await shared.call(shared.store.num_keys))
    assert keys[-1] <= max(keys[:2]) + 1


async def test_world_sizes_must_agree(shared: World) -> None:
    """A rank of another world is refused; a whole job that comes back smaller is not."""
    ranks = await shared.barriers(2)
    stray = shared.barrier(2, 3)
    with pytest.raises(Exception, match="world size 3, but its peers with 2"):
        await stray.connect()
    await close(ranks)
    alone = shared.barrier(0, 1)
    assert (await alone.execute_barrier()).sequence == 0


async def test_rubbish_in_the_membership_is_an_error(shared: World) -> None:
    """It says which keys to look at."""
    await shared.barrier(0, 1).connect()
    member = shared.membership().keys.member(0)
    await shared.call(shared.innermost.set, member, "rubbish")
    with pytest.raises(Exception, match="something else wrote to the keys of barrier 'tests'"):
        await shared.barrier(0, 1).connect()


async def test_the_users_store_is_left_alone(tcp: World) -> None:
    """Its timeout and its keys stay, and it answers while phases wait (law 12)."""
    before = tcp.store.timeout  # type: ignore[attr-defined]
    await tcp.call(tcp.store.set, "mine", "1")
    ranks = await tcp.barriers(2)
    async with Tasks() as tasks:
        (waiting,) = starts(tasks, ranks[:1], "x")
        await tcp.entered(0, name="x")
        assert await tcp.call(tcp.store.get, "mine") == b"1"
        await ranks[1].execute_barrier("x")
        await waiting.returned()
    assert tcp.store.timeout == before  # type: ignore[attr-defined]


async def test_bad_calls_use_up_no_turn(tcp: World) -> None:
    """What is wrong with a call is said at once, and the next call is the first."""
    ranks = await tcp.barriers(2)
    for call, message in (
        (lambda: ranks[0].execute_barrier("n" * 8000), "name is too long for the store: 8000"),
        (lambda: ranks[0].execute_barrier(3), "name must be a string, not 3"),  # type: ignore[arg-type]
        (lambda: ranks[0].execute_barrier("x", timeout_secs=-1), "timeout_secs is -1"),
        (lambda: ranks[0].execute_barrier("x", step=-1), "step is -1; it must be 0 or more"),
        (lambda: ranks[0].execute_barrier("x", step="3"), "step must be an integer or None"),  # type: ignore[arg-type]
        (lambda: ranks[0].abort(OSError(), "x"), "reason must be a string"),  # type: ignore[arg-type]
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            await call()
    with pytest.raises(ValueError, match="name is too long"):
        ranks[0].phase("n" * 8000)
    assert await crosses_again(ranks, "x") == 0


async def test_a_store_that_is_not_there() -> None:
    """Connecting and crossing end in time, and say what to look at (law 5)."""
    with anyio.fail_after(5):
        barrier = TCPStoreBarrier(
            1, 2, "x", timeout_barrier_init_secs=1, tcpstore_port=9, master_address="127.0.0.1"
        )
        with pytest.raises(BarrierConnectionError, match=r"127\.0\.0\.1:9|within 1 s"):
            await barrier.connect()
        with pytest.raises(BarrierConnectionError) as caught:
            await barrier.execute_barrier(timeout_secs=0.3)
        assert not caught.value.in_doubt
        with pytest.raises(OSError, match="body"):
            async with barrier.phase():
                raise OSError("body")
        with pytest.raises(BarrierConnectionError):
            async with barrier:
                raise AssertionError("never entered")


async def test_a_port_that_is_taken(tcp: World) -> None:
    """Rank 0 tries for as long as connecting may take, and says who holds it (law 6)."""
    port = tcp.store.port  # type: ignore[attr-defined]
    barrier = TCPStoreBarrier(
        0,
        1,
        "x",
        tcpstore_port=port,
        master_address="127.0.0.1",
        timeout_barrier_init_secs=1.0,
    )
    began = anyio.current_time()
    with pytest.raises(
        BarrierConnectionError,
        match=r"could not host the store at .* held by process",
    ):
        await barrier.connect()
    assert 0.9 < anyio.current_time() - began < 2
    await barrier.aclose()


async def test_of_two_that_abort_at_once_one_did(shared: World) -> None:
    """The one that all are told of, on every store (law 2)."""
    ranks = await shared.barriers(2)
    for number in range(20):
        name = f"x{number}"
        did = await gather(partial(rank.abort, f"by {i}", name) for i, rank in enumerate(ranks))
        assert sorted(did) == [False, True], did


async def test_a_barrier_of_a_subgroup_names_the_global_rank(memory: World) -> None:
    """Of who broke a phase, as a reader would look at the wrong process."""
    ranks: list[Any] = await memory.barriers(2)
    for rank in ranks:
        rank._watch = rank._watch._replace(global_ranks=(3, 7))
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x"))
        await ranks[1].abort("why", "x")
        error = await waiting.raised(BrokenBarrierError)
    assert (error.rank, error.global_rank) == (1, 7)
    told = "barrier 'tests/x' #0 was broken by rank 1 (global rank 7): why"
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == told


async def test_a_rank_in_threads_looks_as_often_as_it_is_rung(memory: World) -> None:
    """Also for what it enters while it looks. Each look is many calls, and delays the next one."""
    rank, peer = await memory.barriers(2)
    bell, state = memory.membership().own.bell(0), memory.membership().keys.state
    done: list[str] = []
    looks, go_on = threading.Event(), threading.Event()

    def hook(operation: str, key: str) -> None:
        if key == bell and operation in ("set", "delete_key"):
            done.append(operation)
        elif key == state and "delete_key" in done and not looks.is_set():
            looks.set()
            go_on.wait(10)

    store: Any = memory.store
    store.data.hook = hook
    async with Tasks() as tasks:
        one = tasks.start(partial(rank.execute_barrier, "one"))
        await memory.entered(0, name="one")
        await memory.call(store.set, bell, b"")
        await memory.call(looks.wait, 10)
        two = tasks.start(partial(rank.execute_barrier, "two"))
        await memory.entered(0, name="two")
        go_on.set()
        for waiting, name in ((one, "one"), (two, "two")):
            await peer.execute_barrier(name)
            await waiting.returned()
            await memory.gone(bell)
    assert done == 3 * ["set", "delete_key"]
