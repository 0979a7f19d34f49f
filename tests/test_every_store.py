"""What the protocol asks of a store, of every kind of store."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import python
from on_a_loop import OnALoop
from worlds import OVER_A_STORE, library_threads, open_store

from async_barriers import BarrierConnectionError
from async_barriers._protocol.store import (
    Add,
    Append,
    CompareSet,
    Delete,
    Get,
    Read,
    Set,
    SetMany,
)
from async_barriers._store.blocking_store import BlockingStore
from async_barriers._store.private_loop import PrivateLoop
from async_barriers._store.sources import Connection
from async_barriers._store.threads import ThreadedConnection


@pytest.fixture
def loop() -> Iterator[PrivateLoop]:
    made = PrivateLoop()
    yield made
    made.close()


@pytest.fixture(params=OVER_A_STORE)
def on(request: pytest.FixtureRequest, loop: PrivateLoop, tmp_path: Path) -> Iterator[OnALoop]:
    """A store of some kind, and connections to it as a barrier has them."""
    made = OnALoop(loop, open_store(request.param, tmp_path))
    yield made
    made.close()
    gone = time.monotonic() + 5
    while library_threads() and time.monotonic() < gone:
        time.sleep(0.01)
    assert not library_threads()


@pytest.fixture
def pair(on: OnALoop, request: pytest.FixtureRequest) -> tuple[Connection, Connection]:
    """Two connections to the same store."""
    by_threads = "threads" in request.node.name
    return on.open(worker_threads=by_threads), on.open(worker_threads=by_threads)


def test_the_operations(on: OnALoop, pair: tuple[Connection, Connection]) -> None:
    """What one connection writes the other one reads, whatever the bytes."""
    one, two = pair
    blob = bytes(range(256))
    assert on.answer(two.call(Read("k"))) == [None]
    assert on.answer(one.call(Set("k", blob))) == []
    assert on.answer(
        one.call(CompareSet("k", b"other", b"new"), CompareSet("k", blob, b"new"))
    ) == [blob, b"new"]
    assert on.answer(
        one.call(
            CompareSet("absent", b"", b"first"),
            CompareSet("absent", b"", b"second"),
            CompareSet("none", b"expected", b"new"),
        )
    ) == [b"first", b"first", b"expected"]
    assert on.answer(
        one.call(
            Append("log", b"a\n"),
            Append("log", b"b\n"),
            Add("count", 3),
            Add("count", 1 << 62),
            SetMany(["m1", "m2"], b"v"),
            Set("empty", b""),
            Read("log"),
        )
    ) == [3, (1 << 62) + 3, b"a\nb\n"]
    names = ("k", "log", "count", "m2", "empty", "none")
    held = [b"new", b"a\nb\n", b"%d" % ((1 << 62) + 3), b"v", b"", None]
    assert on.answer(two.call(*map(Read, names))) == held
    assert on.answer(two.call(*map(Get, names[:5]))) == held[:5]
    assert on.answer(one.call(Delete(["k"]), Delete(["m1", "log", "none"]), Read("m2"))) == [b"v"]
    assert on.answer(two.call(Read("k"), Read("log"))) == [None, None]


def test_appends_of_many_lose_no_line(on: OnALoop, pair: tuple[Connection, Connection]) -> None:
    """Two ranks that append at the same moment: both lines are there, whole (laws 1 and 2)."""
    lines = [[b"%d %d\n" % (index, number) for number in range(50)] for index in range(2)]
    said = [
        connection.call(*(Append("log", line) for line in mine), Read("log"))
        for connection, mine in zip(pair, lines, strict=True)
    ]
    for each in said:
        on.answer(each)
    (log,) = on.answer(pair[0].call(Read("log")))
    assert sorted(log.splitlines(keepends=True)) == sorted(lines[0] + lines[1])
    assert [line for line in log.splitlines(keepends=True) if line in lines[1]] == lines[1]


def test_an_append_to_what_is_deleted_meanwhile(
    on: OnALoop, pair: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a store has no append of its own: the line is the first one then."""
    one, two = pair
    on.answer(one.call(Append("log", b"a\n"), Read("log")))
    read = BlockingStore._read

    def and_is_deleted(self: BlockingStore, key: str) -> bytes | None:
        found = read(self, key)
        monkeypatch.undo()
        self.do(Delete([key]))
        return found

    monkeypatch.setattr(BlockingStore, "_read", and_is_deleted)
    on.answer(one.call(Append("log", b"b\n"), Add("n", 1)))
    monkeypatch.undo()
    assert on.answer(two.call(Read("log"))) in ([b"b\n"], [b"a\nb\n"])


def test_whoever_waits_is_woken(on: OnALoop, pair: tuple[Connection, Connection]) -> None:
    """By the first write, while other calls are made; and once."""
    one, two = pair
    woken: list[str] = []
    one.on_wake = lambda: woken.append("bell")
    on.answer(one.call(Read("x"), wait="bell"))
    assert on.answer(one.call(Add("n", 1))) == [1]
    on.loop.run(lambda: bool(woken), time.monotonic() + 0.1)
    assert not woken
    on.answer(two.call(Set("bell", b"ding"), Read("bell")))
    on.until(lambda: woken)
    on.answer(one.call(Read("x")))
    on.loop.run(lambda: len(woken) > 1, time.monotonic() + 0.05)
    assert woken == ["bell"]
    # One that is there already wakes, too.
    on.answer(one.call(Read("x"), wait="bell"))
    on.until(lambda: len(woken) == 2)


def test_the_outbox_goes_first(on: OnALoop, pair: tuple[Connection, Connection]) -> None:
    """What waited for company is done before, and its answers are heard before."""
    one, _ = pair
    heard: list[object] = []
    one.outbox += [([Add("n", 1)], heard.append), ([Set("y", b"1")], heard.append)]
    told = one.call(Add("n", 5), Read("y"))
    told.when_done(lambda: heard.append(told.result()))
    on.answer(told)
    assert heard == [[1], [], [6, b"1"]]
    assert not one.outbox


def test_closing_while_it_waits(on: OnALoop, pair: tuple[Connection, Connection]) -> None:
    """Nothing is left behind, no thread and no key, and nobody is called (law 8)."""
    one, two = pair
    one.on_wake = pytest.fail
    one.on_lost = lambda error: pytest.fail(str(error))
    on.answer(one.call(Read("x"), wait="bell"))
    one.close()
    with pytest.raises(BarrierConnectionError, match="closed"):
        on.answer(one.call(Read("x")))
    if isinstance(one, ThreadedConnection):
        on.until(lambda: all(ended.done() for ended in one.ended))
    assert on.answer(two.call(Read("bell"))) == [None]


GONE = """
import shutil, sys, tempfile, anyio
from torch.distributed import FileStore
from async_barriers import BarrierConnectionError, StoreBarrier

place = tempfile.mkdtemp()
store = FileStore(place + "/store", 1)

async def main():
    barrier = StoreBarrier(store, rank=0, world_size=2, timeout_barrier_init_secs=1)
    shutil.rmtree(place)
    try:
        await barrier.connect()
    except BarrierConnectionError as exc:
        assert "No such file" in str(exc), exc
    else:
        raise AssertionError("it connected")
    await barrier.aclose()

anyio.run(main, backend=sys.argv[1])
"""


LOCKED = """
import fcntl, subprocess, sys, tempfile, anyio
from torch.distributed import FileStore
from async_barriers import BarrierConnectionError, StoreBarrier

path = tempfile.mkdtemp() + "/store"
store = FileStore(path, 1)
hold = '''
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.readline()
'''
ticks = []

async def ticking():
    while True:
        ticks.append(anyio.current_time())
        await anyio.sleep(0.01)

async def main():
    barrier = StoreBarrier(store, rank=0, world_size=2, timeout_barrier_init_secs=2)
    if sys.argv[2] == "open":
        await barrier.connect()
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ticking)
        if sys.argv[2] == "open":
            await barrier.aclose()
            await anyio.sleep(1)  # its threads end in the background
        else:
            try:
                await barrier.connect()
            except BarrierConnectionError as exc:
                assert "keeps it locked" in str(exc), exc
            else:
                raise AssertionError("it connected")
        tasks.cancel_scope.cancel()
    gaps = [later - one for one, later in zip(ticks, ticks[1:])]
    holder.communicate(b"\\n")
    assert len(ticks) > 20 and max(gaps) < 0.4, (len(ticks), max(gaps))

anyio.run(main, backend=sys.argv[1])
"""
READ_ONLY = """
import subprocess, tempfile
from torch.distributed import FileStore
from async_barriers import BarrierConnectionError
from async_barriers._protocol.store import Set
from async_barriers._store.blocking_store import BlockingStore

place = tempfile.mkdtemp()
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
used, unused = (BlockingStore(FileStore(place + "/store")) for _ in range(2))
used.do(Set("k", b"v"))
subprocess.run(["mount", "-o", "remount,ro", place], check=True)
try:
    used.do(Set("k", b"w"))
except BarrierConnectionError:
    used.close()
    unused.close()
else:
    raise AssertionError("it could write")
"""


def runs(program: str, *arguments: str, within: tuple[str, ...] = ()) -> None:
    """A program of its own ends well, in time."""
    # The fork server is not in the namespaces of others.
    command = [*within, sys.executable if within else python(), "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
@pytest.mark.parametrize(("backend", "at"), [("asyncio", "opening"), ("trio", "open")])
def test_a_file_store_that_is_locked(backend: str, at: str) -> None:
    """c10d would wait for the lock with the GIL in its hands: nothing of the process would run."""
    runs(LOCKED, backend, at)


@pytest.mark.processes
def test_a_file_store_that_becomes_read_only() -> None:
    """c10d's destructor opens the file once more, and would end the process."""
    apart = ("unshare", "--mount")
    if subprocess.run([*apart, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    runs(READ_ONLY, within=apart)


@pytest.mark.processes
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_file_store_whose_directory_is_gone(backend: str) -> None:
    """c10d's constructor would hold the GIL and try on: nothing of the process would run."""
    runs(GONE, backend)
