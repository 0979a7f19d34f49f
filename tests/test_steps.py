"""``step=``: ranks that come for different steps are never in one phase, whatever came before."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from typing import Any

import anyio
import pytest
import torch.distributed as dist
from processes import Forge
from reports import TOLD_SECS, Programs, attempt, client, host_store, job, one, serve
from torch.distributed import HashStore
from worlds import Tasks, World, gather, until

from async_barriers import (
    BarrierError,
    BarrierResult,
    BarrierTimeoutError,
    BrokenBarrierError,
    DistBarrier,
    StoreBarrier,
)
from async_barriers._client.breaking import Breaking
from async_barriers._client.phases import Phase
from async_barriers._protocol.verdict import Broken
from async_barriers._store.future import Future
from async_barriers._store.sources import Connection
from async_barriers.blocking import BlockingBarrier

pytestmark = pytest.mark.anyio

AT_ONCE_SECS = 1.0


class Published:
    """What was published, in order: the payloads of each time."""

    def __init__(self) -> None:
        self.all: list[dict[int, bytes]] = []

    async def __call__(self, payloads: Mapping[int, bytes]) -> bytes:
        self.all.append(dict(payloads))
        return b" ".join(payloads[rank] for rank in sorted(payloads))

    def commit(self, rank: int, barrier: StoreBarrier, step: int, **options: Any) -> Any:
        """A rank's commit of ``step``, which its payload names."""
        payload = f"{rank}:{step}".encode()
        return barrier.commit(self, payload=payload, name="save", step=step, **options)


async def over_at_once(call: Awaitable[object]) -> BrokenBarrierError:
    """The break that a call ends in without waiting."""
    began = time.monotonic()
    with pytest.raises(BrokenBarrierError) as caught:
        await call
    assert time.monotonic() < began + AT_ONCE_SECS
    return caught.value


async def test_the_step_is_the_sequence() -> None:
    """It takes the place of the count, may rise by any amount, and is one name's alone."""
    async with job(serve(), 2) as ranks:
        for name, step in (("x", 0), ("x", 7), ("y", 3), ("x", 1_000_000_000), ("y", 4)):
            results = await gather(partial(rank.execute_barrier, name, step=step) for rank in ranks)
            assert {(result.name, result.sequence) for result in results} == {(name, step)}


async def test_different_steps_never_meet() -> None:
    """Two ranks that wait for different steps time out, each missing the other, and meet in the
    next one. The one of the earlier step does so first: else it is told that a later one broke."""
    async with job(serve(), 2) as ranks:
        said = await gather(
            lambda r=rank, s=step, secs=secs: attempt(  # type: ignore[misc]
                ranks[r].execute_barrier("x", step=s, timeout_secs=secs)
            )
            for rank, step, secs in ((0, 3, 0.4), (1, 4, 0.5))
        )
        for rank, error in enumerate(said):
            assert isinstance(error, BarrierTimeoutError), error
            assert error.missing_ranks == (1 - rank,)
            assert error.sequence == 3 + rank
        results = await gather(partial(rank.execute_barrier, "x", step=5) for rank in ranks)
        assert {result.sequence for result in results} == {5}


async def test_steps_may_be_awaited_at_once_in_any_order() -> None:
    """Several of one name at a time, each a phase of its own."""
    async with job(serve(), 2) as ranks, Tasks() as tasks:
        steps = [range(8), reversed(range(8))]
        waiting = [
            tasks.start(partial(rank.execute_barrier, "x", step=step))
            for rank, order in zip(ranks, steps, strict=True)
            for step in order
        ]
        sequences = [(await outcome.returned()).sequence for outcome in waiting]
        assert sorted(sequences) == sorted([*range(8)] * 2)


async def test_steps_that_broke_leave_no_keys() -> None:
    """Of a name for each: once all have learned it, each rank refuses earlier steps by itself."""
    server = serve()

    async def broken(ranks: list[StoreBarrier], names: range) -> None:
        for number in names:
            name = f"step-{number}"
            assert await ranks[0].abort("no disk", name, step=number)
            for rank in ranks[1:]:
                assert (await over_at_once(rank.execute_barrier(name, step=number))).rank == 0

    async with job(server, 3) as ranks:
        await broken(ranks, range(100, 105))
        await anyio.sleep(0.6)
        before = server.num_keys()
        await broken(ranks, range(105, 135))
        with anyio.fail_after(5):
            while server.num_keys() > before:
                await anyio.sleep(0.02)
        for rank in ranks:
            error = await over_at_once(rank.execute_barrier("step-134", step=133))
            assert "step 134, a later one" in error.reason


async def test_who_aborted_a_step_learns_the_same_as_its_peers() -> None:
    """With the step, it can still come to the phase that it has broken."""
    async with job(serve(), 2) as ranks:
        assert await ranks[0].abort("no disk", "x", step=7)
        for rank in ranks:
            error = await over_at_once(rank.execute_barrier("x", step=7))
            assert (error.rank, error.sequence) == (0, 7)
            assert error.reason.startswith("no disk")
        error = await over_at_once(ranks[0].execute_barrier("x", step=7))
        assert "a step is decided once" in error.reason
        with pytest.raises(BarrierTimeoutError):
            await ranks[0].execute_barrier("x", step=8, timeout_secs=0)
        error = await over_at_once(ranks[0].execute_barrier("x", step=8))
        assert error.rank == 0
        assert "came for step 8 when this step was broken already" in error.reason


async def test_two_calls_of_one_rank_for_one_step() -> None:
    """The second is refused, and the first goes on: two arrivals would break it for all."""
    async with job(serve(), 2) as ranks, Tasks() as tasks:
        first = tasks.start(partial(ranks[0].execute_barrier, "x", step=3))
        await anyio.sleep(0.05)
        for call in (ranks[0].execute_barrier, partial(ranks[0].all_gather, b"")):
            error = await over_at_once(call(name="x", step=3))
            assert (error.sequence, error.rank) == (3, 0)
            assert "awaits step 3 already" in error.reason
        await ranks[1].execute_barrier("x", step=3)
        assert (await first.returned()).sequence == 3


@pytest.mark.processes
async def test_what_is_decided_now_for_who_has_not_connected(forge: Forge) -> None:
    """The store is reached, for which law 5 leaves a second; only then can it be told."""
    with Programs(forge) as programs:
        # Such a server does not look up who connects, which may take that second.
        server = client(programs.start(host_store).event()["port"])
        late = one(server, 1, 2)
        async with one(server, 0, 2) as early, Tasks() as tasks:
            waiting = tasks.start(partial(early.execute_barrier, "x"))
            await anyio.sleep(0.1)
            assert (await late.execute_barrier("x", timeout_secs=0)).sequence == 0
            await waiting.returned()
            await late.aclose()
        alone = one(server, 0, 2, prefix="alone")
        with pytest.raises(BarrierTimeoutError) as caught:
            await alone.execute_barrier(timeout_secs=0)
        assert caught.value.missing_ranks == (1,)
        await alone.aclose()


async def test_who_comes_for_a_step_when_a_later_one_is_decided() -> None:
    """It is told at once, and both steps are named; the others are not harmed."""
    async with job(serve(), 2) as ranks:
        await gather(partial(rank.execute_barrier, "x", step=300) for rank in ranks)
        for call in (
            ranks[1].execute_barrier("x", step=200),
            ranks[1].commit(Published(), name="x", step=200),
        ):
            error = await over_at_once(call)
            assert (error.name, error.sequence) == ("x", 200)
            assert "200" in str(error)
            assert "300" in str(error)
        results = await gather(partial(rank.execute_barrier, "x", step=301) for rank in ranks)
        assert {result.sequence for result in results} == {301}


async def test_a_call_for_a_later_step_has_read_what_broke() -> None:
    """What it has found is for the calls for earlier steps, too."""
    async with job(serve(), 2) as ranks, Tasks() as tasks:
        await gather(partial(rank.execute_barrier, "x", step=0) for rank in ranks)
        session = ranks[1]._session
        assert session.turns is not None
        taken = session._bells_taken

        async def has_been_rung() -> bool:
            return session._bells_taken > taken

        async def has_read() -> bool:
            assert session.turns is not None
            return session.turns.read_at["x"] == session._bells_taken

        await ranks[0].abort("no disk", "x", step=5)
        await until(has_been_rung)
        later = tasks.start(partial(ranks[1].execute_barrier, "x", step=7))
        await until(has_read)
        error = await over_at_once(ranks[1].execute_barrier("x", step=3))
        assert "step 5, a later one, was broken" in error.reason
        await ranks[0].execute_barrier("x", step=7)
        await later.returned()


async def test_who_breaks_a_step_comes_for_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told at once, also while it tells the others."""
    told: Future[None] = Future()
    held: Future[None] = Future()
    tell = Breaking._break_unentered

    async def slow(self: Breaking, connection: Connection, phase: Phase, broken: Broken) -> Any:
        ours = await tell(self, connection, phase, broken)
        told.resolve(None)
        await held
        return ours

    async def has_told() -> bool:
        return told.done

    async with job(serve(), 2) as ranks, Tasks() as tasks:
        await gather(partial(rank.execute_barrier, "x", step=0) for rank in ranks)
        monkeypatch.setattr(Breaking, "_break_unentered", slow)
        aborting = tasks.start(partial(ranks[0].abort, "no disk", "x", step=5))
        await until(has_told)
        error = await over_at_once(ranks[0].execute_barrier("x", step=3))
        assert "step 5, a later one, was broken" in error.reason
        held.resolve(None)
        assert await aborting.returned()


async def test_the_note_of_a_broken_step_never_goes_back(memory: World) -> None:
    """Whatever a rank last saw there: a note of a later step, or one that was deleted since."""
    ranks = await memory.barriers(2)
    note = memory.membership().own.latest("x")
    assert await ranks[1].abort("no disk", "x", step=12)
    assert await ranks[0].abort("no disk", "x", step=10)
    assert await ranks[0].abort("no disk", "x", step=11)
    assert await memory.read(note) == b"12"
    for step in (13, 14):
        await gather(partial(rank.execute_barrier, "x", step=step) for rank in ranks)
    assert await ranks[0].abort("no disk", "x", step=15)
    assert await memory.read(note) == b"15"


async def test_the_note_goes_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if no other rank has heard of it: the one that wrote it remembers (law 10)."""
    server = serve()
    async with job(server, 2) as ranks:
        await gather(partial(rank.execute_barrier, "x", step=1) for rank in ranks)
        membership, bell = ranks[0]._session.membership, ranks[1]._session._bell
        assert membership is not None
        assert bell is not None
        monkeypatch.setattr(bell, "on_wake", None)
        assert await ranks[0].abort("no disk", "x", step=2)
        await gather(partial(rank.execute_barrier, "x", step=3) for rank in ranks)
        latest = membership.own.latest("x")

        async def is_gone() -> bool:
            return not await anyio.to_thread.run_sync(server.check, [latest])

        assert not await is_gone()
        await until(is_gone)


@pytest.mark.parametrize("how", ["deadline", "body"])
async def test_who_comes_late_for_several_steps_that_broke(how: str) -> None:
    """It learns of each what its peers have learned, also of one that it was told of before."""
    async with job(serve(), 2) as ranks:
        for step in (10, 20):
            if how == "deadline":
                with pytest.raises(BarrierTimeoutError):
                    await ranks[0].execute_barrier("x", step=step, timeout_secs=0.1)
            else:
                with pytest.raises(LookupError):
                    async with ranks[0].phase("x", step=step):
                        raise LookupError(f"no shard of {step}")
        for step in (10, 20):
            error = await attempt(ranks[1].execute_barrier("x", step=step))
            assert isinstance(error, BarrierTimeoutError | BrokenBarrierError), error
            assert error.sequence == step
            if isinstance(error, BarrierTimeoutError):
                assert error.missing_ranks == (1,)
            else:
                assert (error.rank, f"no shard of {step}" in error.reason) == (0, True)
            assert isinstance(error, BarrierTimeoutError) is (how == "deadline")
        error = await over_at_once(ranks[1].execute_barrier("x", step=20))
        assert "a step is decided once" in error.reason
        await gather(partial(rank.execute_barrier, "x", step=30) for rank in ranks)


@pytest.mark.parametrize("how", ["comes", "commits", "aborts"])
async def test_who_waits_in_a_step_when_a_later_one_is_decided(how: str) -> None:
    """It learns at once that no other rank comes any more; and no key is left of that."""
    server = serve()
    async with job(server, 2) as ranks, Tasks() as tasks:
        await gather(partial(rank.execute_barrier, "x", step=4) for rank in ranks)
        await anyio.sleep(0.6)
        keys = server.num_keys()
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x", step=5))

        async def has_entered() -> bool:
            phase = ranks[0]._session.awaited("x", 5)
            return phase is not None and phase.counted

        await until(has_entered)
        await gather(partial(rank.execute_barrier, "x", step=6) for rank in ranks)
        if how == "aborts":
            assert await ranks[1].abort("a shard is missing", "x", step=5) is True
            assert await ranks[1].abort("a shard is missing", "x", step=4) is False
        elif how == "comes":
            await over_at_once(ranks[1].execute_barrier("x", step=5))
        else:
            await over_at_once(ranks[1].commit(Published(), name="x", step=5))
        with anyio.fail_after(TOLD_SECS):
            error = await waiting.raised(BrokenBarrierError)
        assert (error.rank, error.sequence) == (1, 5)
        assert ("a shard is missing" if how == "aborts" else "step 6, a later") in error.reason
        for step in (7, 8):
            await gather(partial(rank.execute_barrier, "x", step=step) for rank in ranks)
        with anyio.fail_after(5):
            while server.num_keys() > keys:
                await anyio.sleep(0.02)


@pytest.mark.parametrize("how", ["deadline", "abort", "body"])
async def test_a_step_is_decided_once(how: str) -> None:
    """Who tries again what was broken is told so at once, each time, and so is its peer."""
    async with job(serve(), 2) as ranks:
        if how == "deadline":
            with pytest.raises(BarrierTimeoutError):
                await ranks[0].execute_barrier("x", step=3, timeout_secs=0.1)
        elif how == "abort":
            assert await ranks[0].abort("a shard is missing", "x", step=3)
        else:
            with pytest.raises(LookupError):
                async with ranks[0].phase("x", step=3):
                    raise LookupError("a shard is missing")
        for rank in (1, 1, 0):
            began = time.monotonic()
            error = await attempt(ranks[rank].execute_barrier("x", step=3))
            assert isinstance(error, BarrierTimeoutError | BrokenBarrierError), error
            assert error.sequence == 3
            assert time.monotonic() < began + AT_ONCE_SECS
        await gather(partial(rank.execute_barrier, "x", step=4) for rank in ranks)


async def test_abort_says_whether_it_broke_anything() -> None:
    """True where the phase is broken by it, which its peers are told; False where it was
    released before."""
    async with job(serve(), 2) as ranks, Tasks() as tasks:
        waiting = tasks.start(partial(ranks[1].execute_barrier, "x", step=3))
        await anyio.sleep(0.1)
        began = time.monotonic()
        assert await ranks[0].abort("a shard is missing", "x", step=3) is True
        error = await waiting.raised(BrokenBarrierError)
        assert time.monotonic() < began + TOLD_SECS
        assert (error.rank, error.sequence, error.reason) == (0, 3, "a shard is missing")
        await gather(partial(rank.execute_barrier, "x", step=4) for rank in ranks)
        assert await ranks[0].abort("too late", "x", step=4) is False
        await gather(partial(rank.execute_barrier, "x", step=5) for rank in ranks)
        # And where the calls are counted, it is the next one's turn that is used up.
        assert await ranks[0].abort("a shard is missing", "counted") is True
        assert (await over_at_once(ranks[1].execute_barrier("counted"))).rank == 0


@pytest.mark.parametrize("how", ["aborts", "times out", "is cancelled", "is built anew"])
async def test_a_commit_never_publishes_shards_of_different_steps(how: str) -> None:
    """One rank falls a step behind, in whatever way: what is published from then on is of one
    step, and the two are together again by themselves."""
    published, server = Published(), serve()
    async with job(server, 2, timeout_secs=3.0) as ranks:
        await gather(partial(published.commit, n, rank, 1) for n, rank in enumerate(ranks))
        if how == "aborts":
            await ranks[1].abort("a shard is missing", "save", step=2)
        elif how == "is built anew":
            await ranks[1].aclose()
            ranks[1] = one(server, 1, 2, timeout_secs=3.0)
        else:
            with anyio.move_on_after(0.2 if how == "is cancelled" else 9):
                await attempt(published.commit(1, ranks[1], 2, timeout_secs=0.3))

        # Rank 0 goes on with the next step, and rank 1 with that one again, as a training loop
        # does that has loaded its checkpoint.
        async def goes_on(number: int, step: int) -> int:
            while isinstance(
                await attempt(published.commit(number, ranks[number], step, timeout_secs=0.6)),
                BarrierError,
            ):
                step += 1
                assert step < 12
            return step

        met = await gather([partial(goes_on, 0, 3), partial(goes_on, 1, 2)])
        assert met[0] == met[1]
        for payloads in published.all:
            assert len({payload.partition(b":")[2] for payload in payloads.values()}) == 1
        assert len(published.all) == 2


async def test_a_phase_and_a_commit_of_one_step() -> None:
    """`phase` takes the step, too, and enters it when its body has succeeded."""
    published = Published()
    async with job(serve(), 2) as ranks:

        async def save(rank: int) -> Any:
            async with ranks[rank].phase("written", step=12):
                await anyio.sleep(0)
            return await published.commit(rank, ranks[rank], 12)

        assert await gather(partial(save, rank) for rank in range(2)) == [b"0:12 1:12"] * 2
        error = await over_at_once(ranks[0].execute_barrier("written", step=11))
        assert "12" in str(error)


CALLS: dict[str, Callable[[StoreBarrier, Any], Awaitable[object]]] = {
    "execute_barrier": lambda barrier, step: barrier.execute_barrier("x", step=step),
    "commit": lambda barrier, step: barrier.commit(Published(), name="x", step=step),
    "abort": lambda barrier, step: barrier.abort("no reason", "x", step=step),
}


async def enter_a_phase(barrier: StoreBarrier, step: Any) -> None:
    async with barrier.phase("x", step=step):
        raise AssertionError("its body is not run")


CALLS["phase"] = enter_a_phase


class Mark(int, Enum):
    """Its text is no number."""

    A = 7


@pytest.mark.parametrize("step", [-1, True, 1.5, "3", Mark.A, 1 << 63], ids=repr)
@pytest.mark.parametrize("call", CALLS)
async def test_what_is_no_step(call: str, step: object) -> None:
    """It is refused before anything is entered or broken."""
    async with job(serve(), 2) as ranks:
        with pytest.raises((TypeError, ValueError), match=f"step.*{re.escape(repr(step))}"):
            await CALLS[call](ranks[0], step)
        results = await gather(partial(rank.execute_barrier, "x") for rank in ranks)
        assert {result.sequence for result in results} == {0}


# -- The other barriers ----------------------------------------------------------------------------


def test_steps_for_code_that_cannot_await() -> None:
    """`BlockingBarrier` has them as well."""
    with BlockingBarrier(StoreBarrier(HashStore(), rank=0, world_size=1)) as barrier:
        assert barrier.execute_barrier(step=7).sequence == 7
        assert barrier.abort("no reason", step=7) is False
        assert barrier.abort("no reason", step=8) is True
        with pytest.raises(BrokenBarrierError):
            barrier.execute_barrier(step=6)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
async def test_steps_of_a_collective() -> None:
    """A `DistBarrier` says the step in its results."""
    async with DistBarrier(timeout_secs=10) as barrier:
        result = await barrier.execute_barrier("x", step=7)
        assert result == BarrierResult("x", 7, result.waited_secs, result.last_rank)


async def test_who_gave_a_step_up_comes_for_it_again(memory: World) -> None:
    """It is refused while its break is under way: arrivals of two ranks that came twice would pass
    for those of all four (law 1)."""
    ranks = await memory.barriers(4, timeout_barrier_init_secs=5.0)
    store: Any = memory.store
    goes_on = threading.Event()

    def hook(operation: str, key: str) -> None:
        if operation == "compare_set" and key.endswith("/count"):
            assert goes_on.wait(10)

    async with Tasks() as tasks:
        given_up = [
            tasks.start(partial(ranks[rank].execute_barrier, "x", step=1)) for rank in (1, 2)
        ]
        await memory.entered(1, 2, name="x", sequence="s1")
        store.data.hook = hook
        for call in given_up:
            call.scope.cancel()
        for call in given_up:
            await call.ended.wait()
        for rank in (1, 2):
            error = await over_at_once(ranks[rank].execute_barrier("x", step=1))
            assert error.in_doubt
            assert "came for step 1 before" in error.reason
        late = tasks.start(partial(ranks[0].execute_barrier, "x", step=1, timeout_secs=0.3))
        goes_on.set()
        await late.raised(BarrierError)
        await gather(partial(rank.execute_barrier, "x", step=2) for rank in ranks)
