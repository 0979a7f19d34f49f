"""A client that writes rubbish under our prefix: errors of ours, and never a false release."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import anyio
import pytest
from worlds import AnyBarrier, Outcome, Tasks, World, close, crash, gather, share

from async_barriers import BarrierError, BrokenBarrierError
from async_barriers._protocol.keys import PhaseKeys

pytestmark = pytest.mark.anyio

DEADLINE_SECS = 0.6
BOUND_SECS = DEADLINE_SECS + 1 + 0.3
# How many cases share the processors, so that their deadlines mean something.
AT_ONCE = 8
SIZE = 3

Vandal = Callable[[Any, str], object]


def _overwrite(value: bytes, store: Any, key: str) -> None:
    store.set(key, value)


def _extend(store: Any, key: str) -> None:
    store.append(key, "\x00rubbish")


TEXTS = (b"rubbish", b"\xff\x00\xfe", b"", b"2", b"-5", b"9" * 5000, b"b{}", b"[" * 5000)
VANDALS: dict[str, Vandal] = {
    **{repr(text[:9]): partial(_overwrite, text) for text in TEXTS},
    "extended": _extend,
}
# Not what a phase is released by: who has waited for less than 10 ms believes it.
FIELDS: dict[str, Callable[[PhaseKeys], str]] = {
    "log": lambda keys: keys.log,
    "count": lambda keys: keys.count,
    "reason": lambda keys: keys.reason,
    "word": lambda keys: keys.word,
    "summary": lambda keys: keys.summary,
    "departed": lambda keys: keys.departed,
}
# When it comes: before anyone enters, while two of three wait for the last one, who comes then,
# and while they wait in vain.
MOMENTS = ("first", "meanwhile", "in vain")


async def ended(outcomes: Iterable[Outcome]) -> list[BarrierError | None]:
    """The errors that calls raised, None where one was released; ours, and in time."""
    errors = []
    for outcome in outcomes:
        await outcome.ended.wait()
        assert outcome.error is None or isinstance(outcome.error, BarrierError), outcome.error
        assert outcome.own_secs < BOUND_SECS, (outcome.secs, outcome.error)
        errors.append(outcome.error)
    return errors


async def run_all(cases: Iterable[tuple[str, ...]], run: Callable[..., Awaitable[None]]) -> None:
    """Run every case, some at once; say which failed and how."""
    limiter = anyio.CapacityLimiter(AT_ONCE)
    failures: list[object] = []

    async def run_one(*case: str) -> None:
        async with limiter:
            try:
                await run(*case)
            except Exception as exc:
                failures.append((case, exc))

    async with anyio.create_task_group() as tasks:
        for case in cases:
            tasks.start_soon(run_one, *case)
    assert not failures, "\n".join(map(str, failures))


async def entered(world: World, outcomes: list[Outcome], **phase: Any) -> None:
    """Wait until the first ranks are in, or, where the machine is slow, their deadline is over."""
    async with anyio.create_task_group() as tasks:

        async def is_over() -> None:
            await outcomes[0].ended.wait()
            tasks.cancel_scope.cancel()

        tasks.start_soon(is_over)
        await world.entered(*range(len(outcomes)), **phase)
        tasks.cancel_scope.cancel()


def base(world: World) -> Any:
    """The store that has the keys; ours stand outside of the user's prefix."""
    store: Any = world.store
    return store.underlying_store if world.kind == "prefix" else store


def crossing(rank: AnyBarrier, name: str) -> Callable[[], Awaitable[object]]:
    return partial(rank.execute_barrier, name, timeout_secs=DEADLINE_SECS)


def committing(rank: AnyBarrier, name: str) -> Callable[[], Awaitable[object]]:
    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        assert payloads == {0: b"p", 1: b"p", 2: b"p"}
        assert "in vain" not in name
        return b"published"

    return partial(rank.commit, publish, payload=b"p", name=name, timeout_secs=DEADLINE_SECS)


CALLS = {"crosses": crossing, "commits": committing}


@pytest.mark.parametrize(
    ("kind", "anyio_backend", "calls"),
    [
        ("tcp", "asyncio", CALLS),
        ("tcp", "trio", CALLS),
        ("prefix", "asyncio", ["crosses"]),
        ("hash", "trio", ["crosses"]),
    ],
)
async def test_rubbish_in_the_keys_of_one_phase(
    kind: str, anyio_backend: str, calls: Iterable[str], tmp_path: Path
) -> None:
    """One verdict at most; none is released alone; other phases of the same ranks go on."""
    world = World(kind, tmp_path)
    ranks = await world.barriers(SIZE, lanes=AT_ONCE, warn_after_secs=0.15)

    async def attack(moment: str, call: str, field: str, vandal: str) -> None:
        name = f"{moment} {call} {field} {vandal}"
        entering = [CALLS[call](rank, name) for rank in ranks]
        async with Tasks() as tasks:
            early = [] if moment == "first" else [tasks.start(one) for one in entering[:2]]
            if early:
                await entered(world, early, name=name)
            await world.call(VANDALS[vandal], base(world), FIELDS[field](world.keys(name=name)))
            late = [] if moment == "in vain" else entering[len(early) :]
            errors = await ended([*early, *map(tasks.start, late)])
        told = {error is None for error in errors if error is None or not error.in_doubt}
        assert len(told) <= 1, errors
        assert moment != "in vain" or None not in errors

    fields = list(FIELDS) if kind == "tcp" else ["log", "count", "reason"]
    cases = list(product(MOMENTS, calls, fields, VANDALS))
    async with Tasks() as tasks:
        undisturbed = [tasks.start(partial(rank.execute_barrier, "other")) for rank in ranks[:2]]
        await world.entered(0, 1, name="other")
        await run_all(share(cases, anyio_backend), attack)
        assert not any(outcome.ended.is_set() for outcome in undisturbed)
        result = await ranks[2].execute_barrier("other")
        assert {(await outcome.returned()).sequence for outcome in undisturbed} == {result.sequence}
    assert world.membership().state.number == 0
    await world.aclose()


async def test_what_is_said_of_rubbish(tcp: World) -> None:
    """What was found, and where."""
    ranks = await tcp.barriers(2, lanes=1)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x"))
        await tcp.entered(0, name="x")
        await tcp.call(tcp.store.set, tcp.keys(name="x").count, "rubbish")
        late = tasks.start(partial(ranks[1].execute_barrier, "x", timeout_secs=DEADLINE_SECS))
        found = "something else wrote 'rubbish' where its arrivals are counted"
        for outcome in (late, waiting):
            assert found in str(await outcome.raised(BrokenBarrierError))


MEMBERSHIP = (
    *("state", "member/0", "member/1", "roll", "closed", "host_leaves", "all_left", "threaded"),
    *("bell/0", "bell/1", "asked/0", "asked/1"),
)


async def test_rubbish_in_the_membership(tcp: World, anyio_backend: str) -> None:
    """Under each of its keys, before and after a rank restarts: errors of ours, no release."""

    def barrier(prefix: str, rank: int) -> AnyBarrier:
        return tcp.barrier(rank, SIZE, prefix, timeout_secs=DEADLINE_SECS, warn_after_secs=0.15)

    async def attack(key: str, vandal: str) -> None:
        prefix = f"{key} {vandal}"
        ranks = [barrier(prefix, rank) for rank in range(SIZE)]
        await gather(rank.connect for rank in ranks)
        membership = tcp.membership(prefix)
        of_all = key == "state" or key.startswith("member")
        root = membership.keys.root if of_all else membership.own.root

        async def stray() -> None:
            await tcp.call(VANDALS[vandal], tcp.store, f"{root}/{key}")

        async with Tasks() as tasks:
            outcomes = [tasks.start(partial(ranks[0].execute_barrier, "x"))]
            await entered(tcp, outcomes, name="x", prefix=prefix)
            await stray()
            outcomes.append(tasks.start(partial(ranks[1].execute_barrier, "x")))
            assert None not in await ended(outcomes)
            # Rank 1 comes back, and waits for peers that may not have heard of it.
            crash(ranks[1])
            again = barrier(prefix, 1)
            await ended([tasks.start(again.connect)])
            alone = tasks.start(partial(again.execute_barrier, "x"))
            await stray()
            assert None not in await ended([alone])
            # What it gave up is broken for who comes now, if it still comes to the same place.
            await ended([tasks.start(partial(ranks[2].execute_barrier, "x"))])
        await close([again, *ranks])

    cases = list(product(MEMBERSHIP, VANDALS))
    await run_all(share(cases, anyio_backend), attack)
    # The store itself is none the worse for it.
    elsewhere = await tcp.barriers(2, prefix="elsewhere")
    results = await gather(partial(rank.execute_barrier, "x") for rank in elsewhere)
    assert {result.sequence for result in results} == {0}


async def test_a_bell_that_strangers_ring_disturbs_nobody(shared: World) -> None:
    """A generation ends when somebody ended it, not when somebody rings."""
    ranks = await shared.barriers(2)
    bell = shared.membership().own.bell(0)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x"))
        await shared.entered(0, name="x")
        for text in ("rubbish", "-5"):
            await shared.call(base(shared).set, bell, text)
            await shared.gone(bell)
        await ranks[1].execute_barrier("x")
        assert (await waiting.returned()).sequence == 0


async def test_a_stranger_to_a_job_that_lives(shared: World) -> None:
    """Whatever rank it says it is, of another size it is refused, and disturbs nobody (law 1)."""
    ranks = await shared.barriers(2)
    async with Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x"))
        await shared.entered(0, name="x")
        for rank, size in ((0, 1), (1, 3), (2, 3)):
            with pytest.raises(BarrierError, match=f"world size {size}, but its peers with 2"):
                await shared.barrier(rank, size).execute_barrier("x")
        assert not waiting.ended.is_set()
        await ranks[1].execute_barrier("x")
        assert (await waiting.returned()).sequence == 0


async def test_a_job_that_came_back_with_another_size(memory: World) -> None:
    """Where nobody of the former size is left, the new one is that of all."""
    for rank in await memory.barriers(3):
        crash(rank)
    ranks = [memory.barrier(rank, 2) for rank in range(2)]
    results = await gather(partial(rank.execute_barrier, "x") for rank in ranks)
    assert {result.sequence for result in results} == {0}
    with pytest.raises(BarrierError, match="world size 3, but its peers with 2"):
        await memory.barrier(2, 3).execute_barrier("x", timeout_secs=5)
