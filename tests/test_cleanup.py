"""What ten thousand phases leave behind: nothing (law 10)."""

from __future__ import annotations

import gc
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from reports import attempt
from stores import keys_of
from worlds import AnyBarrier, Tasks, World, gather, knows_who_left, library_threads_gone, until

from async_barriers import BarrierError, BarrierTimeoutError, BrokenBarrierError
from async_barriers._protocol.store import Delete
from async_barriers._store.sources import PassedIn

pytestmark = pytest.mark.anyio

RANKS = 3
AT_ONCE = 8
FIRST, ALL = 500, 10_000
# One turn in each of a tenth of the phases, chosen by a generator with this seed, is not taken
# as the others take theirs.
SEED = 20020
PAYLOAD = b"shard"

Way = Callable[[Sequence[AnyBarrier], str], Awaitable[object]]


async def crossed(ranks: Sequence[AnyBarrier], name: str) -> None:
    await gather(partial(rank.execute_barrier, name) for rank in ranks)


async def committed(ranks: Sequence[AnyBarrier], name: str) -> None:
    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        return b"".join(payloads.values())

    results = await gather(
        partial(rank.commit, publish, name=name, payload=PAYLOAD) for rank in ranks
    )
    assert set(results) == {PAYLOAD * RANKS}


async def succeeded(ranks: Sequence[AnyBarrier], name: str) -> None:
    async def body(rank: AnyBarrier) -> None:
        async with rank.phase(name):
            await anyio.sleep(0)

    await gather(partial(body, rank) for rank in ranks)


async def both(*calls: Callable[[], Awaitable[object]]) -> None:
    await gather(calls)


async def is_broken(call: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(BarrierError) as caught:
        await call()
    assert not caught.value.in_doubt


async def wait_in_vain(ranks: Sequence[AnyBarrier], name: str) -> None:
    """Of these, one may come when the phase is broken, the others before."""
    first, *others = ranks
    await is_broken(partial(first.execute_barrier, name))
    await gather(partial(is_broken, partial(rank.execute_barrier, name)) for rank in others)


async def timed_out(ranks: Sequence[AnyBarrier], name: str) -> None:
    first, second, third = ranks
    await gather(
        partial(is_broken, partial(rank.execute_barrier, name, timeout_secs=0.01))
        for rank in (first, second)
    )
    await is_broken(partial(third.execute_barrier, name))


async def cancelled(ranks: Sequence[AnyBarrier], name: str) -> None:
    async def cancel() -> None:
        with anyio.move_on_after(random.uniform(0.0, 0.005)):
            await ranks[0].execute_barrier(name)
            pytest.fail("it was released")

    await both(cancel, partial(wait_in_vain, ranks[1:], name))


async def raised(ranks: Sequence[AnyBarrier], name: str) -> None:
    async def fail_beside() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ranks[0].execute_barrier, name)
            await anyio.sleep(0)
            raise LookupError("the rest of the program failed")

    async def fail() -> None:
        # A group of exceptions, which is no builtin everywhere.
        with pytest.raises(Exception) as caught:  # noqa: PT011  (a group is told by its members)
            await fail_beside()
        group: Any = caught.value
        assert [type(one) for one in group.exceptions] == [LookupError]

    await both(fail, partial(wait_in_vain, ranks[1:], name))


async def aborted(ranks: Sequence[AnyBarrier], name: str) -> None:
    await both(partial(ranks[0].abort, "no disk", name), partial(wait_in_vain, ranks[1:], name))


async def failed(ranks: Sequence[AnyBarrier], name: str) -> None:
    async def body() -> None:
        with pytest.raises(LookupError):
            async with ranks[0].phase(name):
                raise LookupError("the shard is gone")

    await both(body, partial(wait_in_vain, ranks[1:], name))


async def not_published(ranks: Sequence[AnyBarrier], name: str) -> None:
    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        raise OSError("disk full")

    async def lead() -> None:
        with pytest.raises(OSError, match="disk full"):
            await ranks[0].commit(publish, name=name, payload=PAYLOAD)

    others = [partial(is_broken, partial(r.commit, publish, name=name)) for r in ranks[1:]]
    await both(lead, *others)


RELEASED: tuple[Way, ...] = (crossed, crossed, committed, succeeded)
BROKEN: tuple[Way, ...] = (timed_out, cancelled, raised, aborted, failed, not_published)


@dataclass(frozen=True)
class Left:
    """What is there while no phase is under way."""

    keys: int
    threads: int
    sockets: int
    objects: int
    resident_kib: int

    def __str__(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in asdict(self).items())


async def left(world: World) -> Left:
    """Take stock, when the last ranks have departed."""
    store: Any = world.store

    async def quiet() -> bool:
        # Connections of many phases at once are kept for a moment, for the next ones.
        spare = any(len(barrier._session._idle) > 1 for barrier in world.made)
        # A bell is there until its rank has looked around.
        busy = re.compile("/phase/|/bell/")
        return not spare and not any(map(busy.search, await world.call(keys_of, store)))

    await until(quiet)
    gc.collect()
    descriptors = Path("/proc/self/fd")
    return Left(
        # Of the numbered keys that wake observers there are 16 at most; one for each rank that was
        # ever asked whether it is alive, one for each that asked, where an answer came late, and
        # one for what was found.
        keys=sum(
            not re.search("/commits/news/|/asked/|/answer/[0-9]$|/heard$", key)
            for key in await world.call(keys_of, store)
        ),
        threads=threading.active_count(),
        sockets=sum(
            os.readlink(fd).startswith("socket:") for fd in descriptors.iterdir() if fd.is_symlink()
        ),
        objects=len(gc.get_objects()),
        resident_kib=int(Path("/proc/self/statm").read_text().split()[1])
        * (os.sysconf("SC_PAGE_SIZE") // 1024),
    )


async def test_barriers_of_one_process_that_are_built_anew(tcp: World) -> None:
    """Nothing stays of the generations before, although all ranks are of the process that ended
    them."""
    ranks = await tcp.barriers(3)

    async def crosses_anew(rank: AnyBarrier) -> None:
        while True:
            if not isinstance(await attempt(rank.execute_barrier("x")), BrokenBarrierError):
                return

    async def keys() -> int:
        await gather(partial(crosses_anew, rank) for rank in ranks)
        await anyio.sleep(0.6)
        return len(await tcp.call(keys_of, tcp.innermost))

    before = await keys()
    for number in range(6):
        await ranks[number % 3].aclose()
        ranks[number % 3] = tcp.barrier(number % 3, 3)
        await gather(partial(crosses_anew, rank) for rank in ranks)
    assert await keys() == before


# What it runs is measured elsewhere; tracing every line here takes as long again as the test.
@pytest.mark.no_cover
@pytest.mark.bound(110)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_ten_thousand_phases(
    tcp: World, record_property: Callable[[str, object], None]
) -> None:
    """Keys, threads, sockets, objects and memory stay what they were, whatever breaks phases."""
    ranks = await tcp.barriers(RANKS, lanes=AT_ONCE)
    at_random = random.Random(SEED)
    numbers = iter(range(ALL))
    broken = 0

    async def work(upto: int, mine: str) -> None:
        nonlocal broken
        for number in numbers:
            breaks = at_random.random() < 0.1
            broken += breaks
            way = at_random.choice(BROKEN if breaks else RELEASED)
            name = mine if at_random.random() < 0.5 else f"step {number}"
            await way(at_random.sample(ranks, RANKS) if way is not not_published else ranks, name)
            if number >= upto - AT_ONCE:
                return

    stock = []
    for upto in (FIRST, ALL):
        began = time.monotonic()
        await gather(partial(work, upto, f"worker {number}") for number in range(AT_ONCE))
        # The keys of a name that is in use are kept for its next phase, until one is broken.
        await gather(partial(failed, ranks, f"worker {number}") for number in range(AT_ONCE))
        stock.append(await left(tcp))
        record_property(
            f"after {upto} phases, {broken} of them broken",
            f"{stock[-1]} ({time.monotonic() - began:.1f} s)",
        )
    before, after = stock
    assert after.keys == before.keys
    # As many as there ever were calls at once on a rank; that may be one more, late.
    assert after.threads <= before.threads + RANKS
    assert after.sockets <= before.sockets + 4 * RANKS
    # One for each phase would be 9,500 more.
    assert after.objects < before.objects + 2000
    assert after.resident_kib < before.resident_kib + 8 * 1024


def parks(memory: World, at: tuple[str, str], goes_on_at: tuple[str, str]) -> threading.Event:
    """Have a call wait for another one, each given by its operation and the end of its key.

    :return: set when the first one waits
    """
    parked, goes_on = threading.Event(), threading.Event()

    def hook(operation: str, key: str) -> None:
        if operation == at[0] and key.endswith(at[1]):
            parked.set()
            goes_on.wait(5)
        elif operation == goes_on_at[0] and key.endswith(goes_on_at[1]):
            goes_on.set()

    store: Any = memory.store
    store.data.hook = hook
    return parked


async def test_a_departure_under_way_as_its_rank_leaves(memory: World) -> None:
    """The rank cannot know yet that it is the first to depart, and names the phase all the same."""
    first, second = await memory.barriers(2)
    parked = parks(memory, ("add", "1:x/0/departed"), ("compare_set", "/unfinished"))
    with pytest.raises(BarrierTimeoutError):
        await first.execute_barrier("x", timeout_secs=0.1)
    await memory.call(parked.wait, 5)
    await first.aclose()
    await second.aclose()
    await library_threads_gone()
    assert [key for key in keys_of(memory.innermost) if "/phase/" in key] == []


async def two_that_crossed(memory: World) -> list[AnyBarrier]:
    """Two ranks, the second of which was the last to enter "a"."""
    first, second = await memory.barriers(2)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(first.execute_barrier, "a"))
        await memory.entered(0, name="a")
        await second.execute_barrier("a")
        await waiting.returned()
    return [first, second]


async def test_a_rank_leaves_that_looks_after_a_phase(memory: World) -> None:
    """The other one departs from the phase a moment later, with its entry into the next one."""
    first, second = await two_that_crossed(memory)
    leaves = parks(memory, ("compare_set", "/closed"), ("add", "1:b/0/count"))
    async with Tasks() as tasks:
        tasks.start(second.aclose)
        await memory.call(leaves.wait, 5)
        waiting = tasks.start(partial(first.execute_barrier, "b"))
        assert (await waiting.raised(BrokenBarrierError)).rank == 1
    await first.aclose()
    await library_threads_gone()
    assert [key for key in keys_of(memory.innermost) if "/phase/" in key] == []


async def test_a_late_answer_about_a_phase_that_is_deleted(memory: World) -> None:
    """Two looks may be under way at once; the older one adds no departures to what is gone."""
    _, second = await two_that_crossed(memory)
    session = second._session
    (gone,) = (each for each in session._after if each.name == "a")
    (connection,) = session._idle
    said = len(connection.outbox)
    session._looked(gone, connection, False, [b"0\n1\n0d\n1d\n"])
    session._looked(gone, connection, True, [b"0\n1\n1d\n", None])
    requests = [request for each, _ in connection.outbox[said:] for request in each]
    assert [type(request) for request in requests] == [Delete]


async def test_phases_that_a_rank_never_came_to(shared: World) -> None:
    """They are deleted when all ranks have left, however often barriers are built anew."""
    counts = []
    for _ in range(3):
        first, second = ranks = await shared.barriers(2)
        for call in (
            partial(first.execute_barrier, "x", timeout_secs=0.1),
            partial(first.all_gather, b"large" * 100, name="y", step=3, timeout_secs=0.1),
        ):
            with pytest.raises(BarrierTimeoutError):
                await call()
        assert await second.abort("no", "z")
        await gather(rank.aclose for rank in ranks)
        # Threads that waited for a key end by it, and delete it, a moment later.
        await library_threads_gone()
        counts.append(await shared.call(shared.store.num_keys))
    # A thread of a FileStore may be late with the key that ended its wait.
    assert counts[2] <= counts[0] + 1, keys_of(shared.innermost)


@pytest.mark.parametrize("first", [0, 1])
async def test_one_rank_closes_after_the_other(tcp: World, first: int) -> None:
    """Also after the host of the store: then nothing is left but what one job leaves."""
    left = []
    for _ in range(2):
        ranks = await tcp.barriers(2)
        for name in ("x", "y", "z"):
            with pytest.raises(BarrierTimeoutError):
                await ranks[1].execute_barrier(name, timeout_secs=0.05)
        async with Tasks() as tasks:
            # A host waits for its peers.
            tasks.start(ranks[first].aclose)
            await until(partial(knows_who_left, ranks[1 - first]))
            await ranks[1 - first].aclose()
            tasks.start(ranks[first].aclose)
        left.append(keys_of(tcp.innermost))
    assert len(left[1]) == len(left[0]) == 1, left


async def test_a_job_that_never_comes_back_as_a_whole(memory: World) -> None:
    """What its ranks tried in vain is deleted when they have left."""
    counts = []
    for rank in await memory.barriers(3):
        await rank.aclose()
    for _ in range(3):
        ranks = [memory.barrier(rank, 3, timeout_barrier_init_secs=0.3) for rank in range(2)]
        outcomes = await gather(partial(attempt, rank.execute_barrier("x")) for rank in ranks)
        assert all(isinstance(each, BarrierError) for each in outcomes)
        await gather(rank.aclose for rank in ranks)
        await library_threads_gone()
        counts.append(len(keys_of(memory.innermost)))
    assert counts[2] == counts[0], keys_of(memory.innermost)


@pytest.mark.parametrize("first", [False, True], ids=["at once", "the host first"])
async def test_nothing_is_written_once_the_host_may_go(
    memory: World, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """With the store goes its server, and c10d prints what comes to it too late (law 12)."""
    host, *peers = ranks = await memory.barriers(3)
    calls: list[tuple[str, str]] = []
    told, counted = threading.Event(), threading.Event()
    hosts: list[str] = []

    async def is_host(source: PassedIn, loop: object) -> bool:
        return source is host._session._source

    def hook(operation: str, key: str) -> None:
        thread = threading.current_thread().name
        if operation == "set" and key.endswith("/host_leaves"):
            hosts.append(thread)
        if operation == "add" and key.endswith("/roll"):
            # The host is counted first, and waits.
            if thread in hosts:
                counted.set()
            else:
                counted.wait(5)
        if told.is_set() and thread not in hosts and operation != "list_keys":
            calls.append((operation, key))
        if operation == "set" and key.endswith("/all_left"):
            told.set()

    monkeypatch.setattr(PassedIn, "hosts", is_host)
    await gather(rank.execute_barrier for rank in ranks)
    store: Any = memory.store
    store.data.hook = hook
    if first:
        await host.aclose()
    await gather(rank.aclose for rank in (peers if first else ranks))
    await library_threads_gone()
    assert told.is_set()
    assert not calls
    if not first:
        # Else its store has most likely gone before they could say so.
        assert [key.rpartition("/")[2] for key in keys_of(memory.innermost)] == ["state"]
