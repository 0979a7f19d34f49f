"""What every test gets: both event loops, a bound, and a watch on the event loop."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import trio
from blockbuster import BlockBuster, BlockBusterFunction
from hypothesis import settings
from processes import Forge, Job, StartJob
from torch.distributed import Store, TCPStore
from worlds import KINDS, OVER_A_STORE, World, begin_of_test

# A busy machine is no fault; a test is bounded as a whole.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")
BOUND_SECS = 40
CLEARING_UP_SECS = 10
LOOPS = ("asyncio", "trio")
# Of what starts processes, what has time: these run beside those of which each second counts.
PROGRAMS = [
    *("test_benchmarks", "test_checkpoint_writers", "test_dcp_example", "test_docs"),
    *("test_doctor", "test_launch", "test_packaging", "test_saver", "test_system"),
    "test_torchrun",
]
# Everything of a store that talks to it.
STORE_CALLS = (
    "add append barrier check clone compare_set delete_key get list_keys multi_get multi_set "
    "num_keys set wait"
)


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-loop", action="store_true", help="every kind of store under every event loop"
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    # Now, since xdist looks for groups before `pytest_collection_modifyitems` is called here.
    if _needs_processes(item):
        group = "programs" if item.path.stem in PROGRAMS else "processes"
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A TCPStore is tried under both event loops; the other stores under one each, in turns.

    What differs between the loops does not depend on the store, and the time is short.
    """
    # If several tests run at a time (-n 3): those that start processes do so one by one (in two
    # groups), beside the others, and begin at once, since they take the longest.
    items.sort(key=lambda item: not _needs_processes(item))
    if not config.getoption("every_loop"):
        spared = [item for item in items if _spared(getattr(item, "callspec", None))]
        config.hook.pytest_deselected(items=spared)
        items[:] = [item for item in items if item not in spared]


def pytest_collection_finish() -> None:
    """What torch left is not for the collector: going through it stops a slow machine for 0.4 s."""
    gc.collect()
    gc.freeze()


def _needs_processes(item: pytest.Item) -> bool:
    return item.get_closest_marker("processes") is not None


def _spared(case: Any) -> bool:
    params = case.params if case else {}
    kind = params.get("world", params.get("shared", "tcp"))
    if kind == "tcp" or "anyio_backend" not in params:
        return False
    return bool(LOOPS[KINDS.index(kind) % 2] != params["anyio_backend"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the numbers that tests which passed have recorded."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid}: {name}: {value}")


@pytest.fixture(autouse=True)
def bounded(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that hangs fails, with the stacks of all threads; and what an earlier one left behind
    is not held against it."""

    marker = request.node.get_closest_marker("bound")
    bound_secs = marker.args[0] if marker else BOUND_SECS

    def fail(signum: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(all_threads=True)
        raise TimeoutError(f"{request.node.nodeid} did not end within {bound_secs} s")

    begin_of_test()
    before = signal.signal(signal.SIGALRM, fail)
    # Again and again: what clears up after a test that hung may hang, too.
    signal.setitimer(signal.ITIMER_REAL, bound_secs, CLEARING_UP_SECS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="session")
def unblocked() -> Iterator[None]:
    """A blocking call that the library makes on an event loop's thread raises (law 7).

    Once for all tests: what is put on and off C types again and again wraps itself at times.
    """
    watch = BlockBuster("async_barriers")
    # Older torches have no clone, list_keys and barrier.
    calls = [(Store, name) for name in STORE_CALLS.split() if hasattr(Store, name)]
    for owner, name in [*calls, (TCPStore, "__init__")]:
        watch.functions[f"{owner.__name__}.{name}"] = BlockBusterFunction(
            owner, name, scanned_modules="async_barriers"
        )
    # A thread that said it ended is gone in microseconds, and waited for 10 ms at most.
    lock = watch.functions["threading.Lock.acquire"].can_block_in(
        "async_barriers/_store/worker.py", "join"
    )
    # What measures the coverage has a lock of its own.
    lock.can_block_in("coverage/collector.py", "lock_data")
    with pytest.MonkeyPatch.context() as patch:
        # blockbuster asks asyncio only whether this thread runs a loop.
        patch.setattr(
            "blockbuster.blockbuster.asyncio", SimpleNamespace(get_running_loop=_running_loop)
        )
        watch.activate()
        yield
        watch.deactivate()


def _running_loop() -> object:
    if trio.lowlevel.in_trio_run():
        return trio.lowlevel.current_trio_token()
    return asyncio.get_running_loop()


async def _world(kind: str, tmp_path: Path) -> AsyncIterator[World]:
    world = World(kind, tmp_path)
    try:
        yield world
    finally:
        await world.aclose()


@pytest.fixture(params=KINDS)
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """Every kind of barrier over every kind of store."""
    async for made in _world(request.param, tmp_path):
        yield made


@pytest.fixture(params=OVER_A_STORE)
async def shared(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """A store that outlives every barrier over it."""
    async for made in _world(request.param, tmp_path):
        yield made


@pytest.fixture
async def memory(tmp_path: Path) -> AsyncIterator[World]:
    """The quickest store, with a hook for faults."""
    async for made in _world("python", tmp_path):
        yield made


@pytest.fixture
async def tcp(tmp_path: Path) -> AsyncIterator[World]:
    """The store that training jobs use."""
    async for made in _world("tcp", tmp_path):
        yield made


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    """One process that has imported torch."""
    made = Forge()
    yield made
    made.close()


@pytest.fixture
def start_job(forge: Forge) -> Iterator[StartJob]:
    """Starts all ranks of a world; those that are left are killed after the test."""
    with ExitStack() as jobs:

        def start(size: int, *, lanes: int = 1, **options: Any) -> Job:
            return jobs.enter_context(Job(forge, size, **options)).start(lanes)

        yield start
