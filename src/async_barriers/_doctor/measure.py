"""Measures the store, the crossings and the event loop of one rank; rank 0 gathers the results."""

from __future__ import annotations

import json
import math
import platform
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import anyio
from anyio.abc import TaskStatus

from .._client.barrier import CrossingBarrier
from .._errors import BarrierConnectionError, BarrierError, seconds
from .._protocol.store import Read
from .._store.connecting import in_thread
from .._store.event_loop import Loop
from .._store.future import Effort
from .._store.loops import loop_here
from .._store.sources import Connection, Source
from .._store.waiting import settled
from .newcomer import LookUps

_ROUND_TRIPS = 100
_LAG_SECS = 0.005
_KEY = "async_barriers/doctor"


@dataclass(frozen=True)
class Spread:
    """The usual and the rare value of many measurements, in seconds."""

    median: float
    p99: float


@dataclass(frozen=True)
class Facts:
    """The measurements of one rank.

    No clocks of ranks are compared. The last rank of each phase shows which rank is late, and the
    waits of the others show by how much.
    """

    rank: int
    world_size: int
    generation: int
    host: str
    versions: dict[str, str]
    names_secs: float
    connect_secs: float
    round_trip: Spread
    crossing: Spread
    loop_lag: Spread
    last_ranks: dict[int, int]
    """How often each rank was the last to enter; those that never were are left out."""

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def decode(payload: bytes) -> Facts:
    """The inverse of `Facts.encode`."""
    read = json.loads(payload)
    for name in ("round_trip", "crossing", "loop_lag"):
        read[name] = Spread(**read[name])
    read["last_ranks"] = {int(rank): times for rank, times in read["last_ranks"].items()}
    return Facts(**read)


def spread(samples: Sequence[float]) -> Spread:
    """The spread of at least one sample."""
    ordered = sorted(samples)
    return Spread(ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100])


async def examine(
    barrier: CrossingBarrier,
    source: Source,
    judge: Callable[[list[Facts]], bytes],
    *,
    look_ups: LookUps | None = None,
    crossings: int,
    timeout_secs: float,
) -> bytes:
    """Measure, together with all other ranks.

    :param source: the place of the barrier's store
    :param look_ups: the look-ups that this rank began with
    :param judge: called on rank 0 alone, with the facts of all ranks
    :return: the result of ``judge``, on every rank
    :raises BarrierError: the store was not reached, a rank did not come, or one gave up
    """
    if look_ups is not None:
        # Its peers wait for it as long in the first crossing.
        await look_ups.end(timeout_secs / 2)
    await barrier.connect()
    # All ranks are there, with all connections, before anything is timed.
    await barrier.execute_barrier("hello")
    connect_secs, round_trip, installed = await _measure_store(source, timeout_secs)
    waited, lags, last_ranks = await _measure_crossings(barrier, crossings)
    session = barrier._session
    membership = session.membership
    facts = Facts(
        session.rank,
        session.world_size,
        # None if the time is over in this moment, as the next call will say.
        -1 if membership is None else membership.state.number,
        socket.gethostname(),
        installed,
        sum(look_ups.secs) if look_ups is not None else 0.0,
        connect_secs,
        round_trip,
        spread(waited),
        spread(lags),
        dict(last_ranks),
    )

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        return judge(_joined([decode(payloads[rank]) for rank in sorted(payloads)]))

    return await barrier.commit(publish, payload=facts.encode(), name="facts")


def _joined(ranks: list[Facts]) -> list[Facts]:
    """The rank that came last knows it; others know it only if they had to wait."""
    last_ranks = {facts.rank: facts.last_ranks.get(facts.rank, 0) for facts in ranks}
    last_ranks = {rank: times for rank, times in last_ranks.items() if times}
    return [replace(facts, last_ranks=last_ranks) for facts in ranks]


async def _measure_crossings(
    barrier: CrossingBarrier, crossings: int
) -> tuple[list[float], list[float], Counter[int]]:
    waited: list[float] = []
    lags: list[float] = []
    last_ranks: Counter[int] = Counter()
    failed: BarrierError | None = None
    async with anyio.create_task_group() as tasks:
        await tasks.start(_watch_loop, lags)
        # An error that left the task group would come out in an ExceptionGroup.
        try:
            for _ in range(crossings):
                result = await barrier.execute_barrier("crossing")
                waited.append(result.waited_secs)
                if result.last_rank is not None:
                    last_ranks[result.last_rank] += 1
        except BarrierError as exc:
            failed = exc
        tasks.cancel_scope.cancel()
    if failed is not None:
        raise failed
    return waited, lags, last_ranks


async def _measure_store(
    source: Source, timeout_secs: float
) -> tuple[float, Spread, dict[str, str]]:
    loop = loop_here(None)
    began = loop.now()
    deadline = began + timeout_secs
    opening = Effort(source.open(loop, deadline))
    if await settled(loop, opening, deadline):
        connection = opening.result()
        connect_secs = loop.now() - began
        try:
            trips = Effort(_measure_trips(connection))
            if await settled(loop, trips, deadline):
                return connect_secs, spread(trips.result()), await _found_versions(loop)
        finally:
            connection.close(reset=connection.unsaid)
    raise BarrierConnectionError(f"the store did not answer within {seconds(timeout_secs)}")


async def _measure_trips(connection: Connection) -> list[float]:
    trips = []
    for _ in range(_ROUND_TRIPS):
        started = time.perf_counter()
        await connection.call(Read(_KEY))
        trips.append(time.perf_counter() - started)
    return trips


async def _found_versions(loop: Loop) -> dict[str, str]:
    # In a thread, because looking for packages reads the disk.
    found: Effort[dict[str, str]] = Effort(in_thread(loop, "versions", versions))
    await settled(loop, found, math.inf)
    return found.result()


async def _watch_loop(lags: list[float], *, task_status: TaskStatus[None]) -> None:
    """How much later than it asked for this task goes on."""
    while True:
        due = anyio.current_time() + _LAG_SECS
        await anyio.sleep_until(due)
        if not lags:
            task_status.started()
        lags.append(anyio.current_time() - due)


def versions() -> dict[str, str]:
    """The versions, which should be the same on all ranks."""
    found = {"python": platform.python_version()}
    for package in ("torch", "anyio", "async-barriers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout on PYTHONPATH
            found[package] = "not installed"
    return found
