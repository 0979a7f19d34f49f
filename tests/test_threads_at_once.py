"""What several threads may touch, they may touch at once: with a GIL, and without one."""

from __future__ import annotations

import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial

import anyio
import pytest
from torch.distributed import HashStore, TCPStore

from async_barriers import BrokenBarrierError, StoreBarrier
from async_barriers._store.worker import Living, Promise, Worker
from async_barriers.blocking import BlockingBarrier

THREADS = 4
ROUNDS = 400
CROSSINGS = 60
PATIENCE_SECS = 30.0


@pytest.fixture(autouse=True)
def in_small_turns() -> Iterator[None]:
    """With a GIL, threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(doings: list[Callable[[], object]], rounds: int = 1) -> None:
    """Do each in a thread of its own, all beginning together, round by round."""
    start = threading.Barrier(len(doings), timeout=PATIENCE_SECS)

    def do(doing: Callable[[], object]) -> None:
        for _ in range(rounds):
            start.wait()
            doing()

    with ThreadPoolExecutor(len(doings)) as pool:
        done, _ = wait([pool.submit(do, doing) for doing in doings], PATIENCE_SECS, FIRST_EXCEPTION)
        for each in done:
            each.result()
        assert len(done) == len(doings)


def test_a_promise_tells_all_the_same_and_wakes_each_once() -> None:
    """Some tell, others ask to be woken, at once: nobody sleeps on, nobody is woken twice."""
    promises: list[Promise[int]] = [Promise() for _ in range(ROUNDS)]
    turns = [iter(promises) for _ in range(2 * THREADS)]
    told: list[list[int]] = [[] for _ in range(THREADS)]

    def tell(number: int) -> None:
        next(turns[number]).settle(number)

    def ask(number: int) -> None:
        promise = next(turns[THREADS + number])
        promise.when_settled(lambda: told[number].append(promise.result()))

    doings: list[Callable[[], object]] = []
    for number in range(THREADS):
        doings += [partial(tell, number), partial(ask, number)]
    at_once(doings, ROUNDS)
    assert all(len(each) == ROUNDS for each in told)
    assert [sorted(each) for each in zip(*told, strict=True)] == [
        [promise.result()] * THREADS for promise in promises
    ]


def submit_to(worker: Worker, taken: list[Promise[threading.Thread]]) -> None:
    """Have it tell, some times, which thread it is."""

    def who() -> threading.Thread:
        time.sleep(0)  # lets another go first, if there is one
        return threading.current_thread()

    for _ in range(10):
        with suppress(RuntimeError):
            taken.append(worker.submit(who))


def test_a_worker_makes_each_call_that_it_took() -> None:
    """Several threads submit while one retires it: what was taken is done, in one thread."""
    for _ in range(ROUNDS // 8):
        worker = Worker()
        taken: list[Promise[threading.Thread]] = []
        at_once([*[partial(submit_to, worker, taken)] * THREADS, worker.retire])
        assert len({promise.result(PATIENCE_SECS) for promise in taken}) <= 1
        assert worker.ended.wait(PATIENCE_SECS)


def test_who_lives_is_told_while_others_come_and_go() -> None:
    """The registry of those to be ended at exit is gone through while it changes."""

    class Thing:
        pass

    living: Living[Thing] = Living()
    stay = [Thing() for _ in range(300)]
    for thing in stay:
        living.add(thing)

    def come_and_go() -> None:
        for thing in [Thing() for _ in range(100)]:
            living.add(thing)

    def look() -> None:
        assert stay[0] in living.latest_first()

    at_once([come_and_go, come_and_go, look, look], ROUNDS // 8)
    assert living.latest_first() == stay[::-1]


def test_threads_cross_one_ranks_barrier_at_once() -> None:
    """Each rank's barrier is used by all threads, each with a name of its own: no thread is
    released before its name's other ranks have come, and no call is lost."""
    store = HashStore()
    ranks = range(2)
    entered = {(rank, thread): 0 for rank in ranks for thread in range(THREADS)}
    barriers = [
        BlockingBarrier(StoreBarrier(store, rank=rank, world_size=2, timeout_secs=PATIENCE_SECS))
        for rank in ranks
    ]

    def cross(rank: int, thread: int) -> None:
        for step in range(1, CROSSINGS // 2 + 1):
            entered[rank, thread] = step
            barriers[rank].execute_barrier(name=f"of {thread}", step=step)
            assert entered[1 - rank, thread] >= step

    at_once([partial(cross, *key) for key in entered])
    at_once([barrier.close for barrier in barriers])


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("worker_threads", [False, True], ids=["sockets", "threads"])
def test_ranks_in_threads_cross(backend: str, worker_threads: bool) -> None:
    """Each rank has a thread and a loop; nobody is released early, whatever breaks in between."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    entered = [0] * THREADS
    broken = [0] * THREADS

    async def be(rank: int) -> None:
        async with StoreBarrier(
            server,
            rank=rank,
            world_size=THREADS,
            timeout_secs=PATIENCE_SECS,
            worker_threads=worker_threads,
        ) as barrier:
            for step in range(1, CROSSINGS + 1):
                if step % 10 == rank:
                    await barrier.abort("its turn", step=step)
                    continue
                entered[rank] = step
                try:
                    await barrier.execute_barrier(step=step)
                except BrokenBarrierError:
                    broken[rank] += 1
                else:
                    assert step % 10 >= THREADS
                    assert min(entered) >= step
                    gathered = await barrier.all_gather(b"%d" % rank, name="all", step=step)
                    assert gathered == tuple(b"%d" % each for each in range(THREADS))

    def run(rank: int) -> None:
        anyio.run(be, rank, backend=backend)

    # An anyio before 4.5 or so cannot load what it has for a loop in two threads at once.
    anyio.run(anyio.sleep, 0, backend=backend)
    at_once([partial(run, rank) for rank in range(THREADS)])
    steps = range(1, CROSSINGS + 1)
    for rank in range(THREADS):
        assert broken[rank] == sum(step % 10 < THREADS and step % 10 != rank for step in steps)


def test_what_was_run_had_no_gil() -> None:
    """On a build without a GIL, importing the library did not bring it back."""
    enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
    assert enabled != bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
