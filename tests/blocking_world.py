"""Ranks whose calls block threads of this process, and a signal handler that raises in one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from processes import GRACE_SECS, until
from torch.distributed import HashStore

from async_barriers import BarrierConfig, BarrierResult, BrokenBarrierError
from async_barriers.blocking import BlockingBarrier

BOUND_SECS = 15.0
LEFT = "it closed its barrier"


class World:
    """All ranks of one job, over one store."""

    def __init__(self, size: int, **options: Any) -> None:
        store = HashStore()
        self.ranks = [
            BlockingBarrier(
                BarrierConfig(
                    "store",
                    {
                        "store": store,
                        "rank": rank,
                        "world_size": size,
                        "timeout_secs": 20,
                        **options,
                    },
                )
            )
            for rank in range(size)
        ]
        self._threads = ThreadPoolExecutor(16)

    def start(self, rank: int, *args: Any, **options: Any) -> Future[BarrierResult]:
        """Have a rank cross, in a thread."""
        return self._threads.submit(self.ranks[rank].execute_barrier, *args, **options)

    def waiting(self, rank: int, *args: Any, **options: Any) -> Future[BarrierResult]:
        """The same, when it has entered."""
        before = entered(self.ranks[rank])
        future = self.start(rank, *args, **options)
        until(lambda: bool(entered(self.ranks[rank]) - before))
        return future

    def cross(self, **options: Any) -> set[int]:
        """Have all cross; the numbers of the phases, of which there is one."""
        futures = [self.start(rank, **options) for rank in range(len(self.ranks))]
        return {future.result(BOUND_SECS).sequence for future in futures}

    def close(self) -> None:
        for barrier in self.ranks:
            barrier.close()
        self._threads.shutdown()


def entered(blocking: BlockingBarrier) -> set[Any]:
    """The phases that it waits in."""
    barrier: Any = blocking.barrier
    return {phase for phase in list(barrier._session.open) if phase.entered and not phase.decided}


@contextmanager
def interrupted(when: Callable[[], bool], exception: type[BaseException]) -> Iterator[None]:
    """A signal handler of the main thread raises ``exception``, as soon as ``when`` holds."""

    def interrupt(*_: object) -> None:
        raise exception

    def kill(main: int) -> None:
        until(when)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    killer = threading.Thread(target=kill, args=[threading.get_ident()])
    killer.start()
    try:
        yield
    finally:
        killer.join()
        signal.signal(signal.SIGUSR1, before)


def threads() -> set[str]:
    """Of the library, but not those that `threading` lists and never started."""
    alive = [thread for thread in threading.enumerate() if thread.is_alive()]
    return {thread.name for thread in alive if "async_barriers" in thread.name}


def broken(future: Future[Any], rank: int, reason: str) -> BrokenBarrierError:
    """``future`` ends within a second, told who broke the phase and why."""
    with pytest.raises(BrokenBarrierError) as caught:
        future.result(GRACE_SECS)
    assert (caught.value.rank, caught.value.reason) == (rank, reason)
    return caught.value
