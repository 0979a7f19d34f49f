"""c10d's own calls, in threads of ours: errors, waits that hang, and threads that cannot be had."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from fork_server import python
from on_a_loop import OnALoop
from stores import MemoryStore, PlainStore
from torch.distributed import DistStoreError, FileStore, Store, TCPStore

from async_barriers import BarrierConnectionError
from async_barriers._protocol.store import Add, Append, Delete, Read, Set
from async_barriers._store import blocking_store, worker
from async_barriers._store.blocking_store import BlockingStore
from async_barriers._store.private_loop import PrivateLoop
from async_barriers._store.sources import Connection
from async_barriers._store.threads import ThreadedConnection
from async_barriers._store.worker import in_own_thread


def test_a_key_that_is_deleted_as_it_is_read(tmp_path: Path) -> None:
    """It is there or it is not; FileStore's get would wait for it to come again."""
    mine, theirs = (FileStore(str(tmp_path / "store"), 2) for _ in range(2))
    mine.set_timeout(timedelta(seconds=1))
    reader = BlockingStore(mine)
    for number in range(200):
        key = f"{number}"
        theirs.set(key, "v")
        # Somewhere in the midst of many reads.
        thread = threading.Timer(0.001, theirs.delete_key, args=(key,))
        thread.start()
        while reader.do(Read(key)) is not None:
            pass
        thread.join()


@pytest.fixture
def loop() -> Iterator[PrivateLoop]:
    made = PrivateLoop()
    yield made
    made.close()


def over(store: Store, loop: PrivateLoop) -> tuple[OnALoop, Connection]:
    on = OnALoop(loop, store)
    return on, on.open(worker_threads=True)


def test_a_wait_that_times_out(loop: PrivateLoop) -> None:
    """c10d knows no endless wait; its timeout is no loss of the store, and who waits looks."""
    store = MemoryStore()
    on, connection = over(store, loop)

    def hook(operation: str, key: str) -> None:
        if operation == "wait":
            store.data.hook = None
            raise DistStoreError("wait timeout after 604800000ms, keys: /bell")

    store.data.hook = hook
    woken: list[int] = []
    connection.on_wake = lambda: woken.append(1)
    on.answer(connection.call(wait="bell"))
    on.until(lambda: woken)
    assert connection.lost is None
    on.close()


def test_a_store_with_a_short_timeout(tcp: TCPStore, loop: PrivateLoop) -> None:
    """Its own is not changed, and ours waits on."""
    tcp.set_timeout(timedelta(milliseconds=100))
    on, connection = over(tcp, loop)
    woken: list[int] = []
    connection.on_wake = lambda: woken.append(1)
    on.answer(connection.call(wait="bell"))
    on.loop.run(lambda: bool(woken), time.monotonic() + 0.3)
    assert not woken
    tcp.set("bell", "ding")
    on.until(lambda: woken)
    assert tcp.timeout == timedelta(milliseconds=100)  # type: ignore[attr-defined]
    on.close()


@pytest.fixture
def tcp() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_what_was_told_to_a_loop_that_does_not_run(loop: PrivateLoop) -> None:
    """It is told to the next one: an answer, and that a key was written."""
    store = MemoryStore()
    on, connection = over(store, loop)
    assert isinstance(connection, ThreadedConnection)
    woken: list[int] = []
    connection.on_wake = lambda: woken.append(1)
    on.answer(connection.call(wait="bell"))
    store.set("bell", b"ding")
    answer = connection.call(Add("n", 1))
    for thread in (connection._caller, connection._waiter):
        # Its call before this one has ended.
        assert thread is not None
        assert thread.submit(lambda: None).wait(5)
    assert len(loop._posted) == 2
    loop._posted.clear()
    following = PrivateLoop()
    connection.move(following)
    on.loop = following
    assert on.answer(answer) == [1]
    on.until(lambda: woken)
    on.close()
    following.close()


class Struck(Exception):
    """What a signal handler throws."""


@pytest.mark.parametrize("when", ["an answer", "a wake"])
def test_a_signal_handler_raises_as_a_thread_tells(loop: PrivateLoop, when: str) -> None:
    """What was told is not known any more, so the connection is lost, and nobody waits for it."""
    store = MemoryStore()
    on, connection = over(store, loop)

    def struck(*_: object) -> None:
        raise Struck

    lost: list[object] = []
    connection.on_lost = lost.append
    connection.on_wake = struck
    on.answer(connection.call(wait="bell"))
    if when == "an answer":
        connection.outbox.append(([Read("k")], struck))
        answer = connection.call(Read("k"))
    else:
        store.set("bell", b"ding")
    with pytest.raises(Struck):
        on.until(lambda: lost)
    assert connection.lost is not None
    assert len(lost) == 1
    if when == "an answer":
        assert isinstance(answer.error, BarrierConnectionError)
    on.close()


def test_an_error_becomes_ours(loop: PrivateLoop) -> None:
    """torch's exception is the cause of ours, and its first line is in it; all that comes later
    fails, too."""
    store = MemoryStore()
    on, connection = over(store, loop)
    lost: list[BarrierConnectionError] = []
    connection.on_lost = lost.append

    def hook(operation: str, key: str) -> None:
        raise DistStoreError(f"{operation} failed\nand a stack that nobody reads")

    store.data.hook = hook
    with pytest.raises(BarrierConnectionError) as caught:
        on.answer(connection.call(Add("k", 1)))
    assert str(caught.value) == "the store was lost (DistStoreError: add failed)"
    assert isinstance(caught.value.__cause__, DistStoreError)
    assert lost == [caught.value]
    with pytest.raises(BarrierConnectionError, match="add failed"):
        on.answer(connection.call(Read("k")))
    with pytest.raises(BarrierConnectionError, match="wait failed"):
        BlockingStore(store).wait("k")


def test_losing_it_while_it_waits(loop: PrivateLoop) -> None:
    """It is said once, and the threads end."""
    store = MemoryStore()
    on, connection = over(store, loop)
    assert isinstance(connection, ThreadedConnection)
    lost: list[BarrierConnectionError] = []
    connection.on_lost = lost.append
    connection.on_wake = pytest.fail
    on.answer(connection.call(wait="bell"))
    store.data.lose()
    on.until(lambda: lost)
    assert "the store is gone" in str(lost[0])
    on.until(lambda: all(ended.done() for ended in connection.ended))
    assert len(lost) == 1


def test_a_store_in_python_may_speak_text() -> None:
    """A str where c10d has bytes is understood."""

    class Talker(PlainStore):
        def get(self, key: str) -> bytes:
            return super().get(key).decode()  # type: ignore[return-value]

    store = BlockingStore(Talker())
    store.do(Set("k", b"v"))
    assert store.do(Read("k")) == b"v"


@pytest.mark.parametrize("waits", [True, False], ids=["it waits", "its store is being opened"])
def test_a_wait_whose_connection_is_closed(tcp: TCPStore, loop: PrivateLoop, waits: bool) -> None:
    """Its own key ends it, though a connection that is lost says nothing else any more."""
    on, connection = over(tcp, loop)
    assert isinstance(connection, ThreadedConnection)
    on.answer(connection.call(wait="never"))
    if waits:
        on.until(lambda: connection._waited is not None)
        time.sleep(0.05)
    connection.close(reset=True)
    on.until(lambda: all(ended.done() for ended in connection.ended), 2)


def test_a_wait_whose_key_cannot_be_written(tcp: TCPStore, loop: PrivateLoop) -> None:
    """The connection that would do so is lost, and that of the wait is not."""
    on, connection = over(tcp, loop)
    assert isinstance(connection, ThreadedConnection)
    on.answer(connection.call(wait="never"))
    on.until(lambda: connection._waited is not None)
    assert connection._called is not None
    connection._called.interrupt()
    with pytest.raises(BarrierConnectionError):
        on.answer(connection.call(Read("k")))
    on.until(lambda: all(ended.done() for ended in connection.ended), 2)


def test_a_call_that_never_returns(tcp: TCPStore) -> None:
    """Not even when its server answers: so it may be left alone when the interpreter ends."""
    store = BlockingStore(tcp.clone())  # type: ignore[attr-defined]
    waiting = in_own_thread("waits", lambda: store.wait("k"))
    time.sleep(0.1)
    store.never_return()
    tcp.set("k", "v")
    assert not waiting.wait(0.5)


def test_a_wait_that_goes_on_long_after_closing(loop: PrivateLoop) -> None:
    """Its thread ends as soon as the store answers, and does not wait for a key that nobody
    writes any more."""
    store, hangs, goes_on = MemoryStore(), threading.Event(), threading.Event()

    def hook(operation: str, key: str) -> None:
        if operation == "wait":
            hangs.set()
            assert goes_on.wait(10)

    on, connection = over(store, loop)
    assert isinstance(connection, ThreadedConnection)
    store.data.hook = hook
    on.answer(connection.call(wait="bell"))
    on.until(hangs.is_set)
    connection.close(reset=True)
    on.until(connection._caller.ended.done)
    goes_on.set()
    on.until(lambda: all(ended.done() for ended in connection.ended), 2)


def test_a_thread_that_hangs_and_may_return(loop: PrivateLoop) -> None:
    """Nothing can keep it there but a socket, so the end of the interpreter waits for it."""
    store, hangs, goes_on = MemoryStore(), threading.Event(), threading.Event()

    def hook(operation: str, key: str) -> None:
        hangs.set()
        assert goes_on.wait(10)

    on, connection = over(store, loop)
    assert isinstance(connection, ThreadedConnection)
    store.data.hook = hook
    connection.call(Read("k"))
    on.until(hangs.is_set)
    connection.close(reset=True)
    connection.end(time.monotonic())
    assert connection._caller._running[0] in worker._threads.latest_first()
    goes_on.set()
    on.until(connection._caller.ended.done)


RETURNS_LATE = """
import sys, threading, time
from torch.distributed import PrefixStore, Store, TCPStore
from async_barriers._protocol.store import Set
from async_barriers._store.private_loop import PrivateLoop
from async_barriers._store.threads import ThreadedConnection

class Slow(Store):
    def set(self, key, value):
        began.set()
        time.sleep(0.8)

class EndsLate:
    def __del__(self, sleep=time.sleep):
        sleep(0.6)  # Where the interpreter finalises, and no daemon thread may come from C++.

began = threading.Event()
server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
loop = PrivateLoop()
connection = ThreadedConnection(server.clone, loop)
opened = connection.open()
loop.run(lambda: opened.done, time.monotonic() + 60)
slow = Slow()
connection._called._store = PrefixStore("slow", slow)  # Called by C++, as c10d's own are.
connection.call(Set("k", b"v"))
began.wait()
connection.close(reset=True)
sys.ends_late = EndsLate()
"""


@pytest.mark.processes
def test_a_call_that_returns_as_the_interpreter_ends() -> None:
    """A call that expects no answer cannot be kept from returning, so the end waits for it."""
    ran = subprocess.run(
        [python(), "-c", RETURNS_LATE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_closing_while_its_first_store_is_opened(loop: PrivateLoop) -> None:
    """Nothing is said there any more, and nothing is left."""
    store, opened = MemoryStore(), threading.Event()

    def slowly() -> Store:
        assert opened.wait(5)
        return store

    connection = ThreadedConnection(slowly, loop)
    answer = connection.call(Add("n", 1))
    connection.close(reset=True)
    opened.set()
    on = OnALoop(loop, store)
    with pytest.raises(BarrierConnectionError, match="closed"):
        on.answer(answer)
    on.until(lambda: all(ended.done() for ended in connection.ended))
    assert store.data.values == {}


def test_a_torch_that_hides_its_descriptor(tcp: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the store works, and cannot be interrupted."""
    monkeypatch.setattr(blocking_store, "_shared_socket", lambda store: None)
    plain = BlockingStore(tcp.clone())  # type: ignore[attr-defined]
    plain.interrupt()
    plain.never_return()
    plain.do(Set("k", b"v"))
    assert plain.do(Read("k")) == b"v"
    plain.close()


def test_a_store_that_was_lost_is_let_go_of(tcp: TCPStore) -> None:
    """Though its error lives on: a socket that is not closed goes on sending what is too late."""
    clone = tcp.clone()  # type: ignore[attr-defined]
    found = re.search(r"fd=(\d+)", repr(clone))
    assert found
    file = os.readlink(f"/proc/self/fd/{found[1]}")
    store = BlockingStore(clone)
    # A call that the watch on event loops does not wrap, since its frames would hold the store.
    store._store = SimpleNamespace(delete_key=clone.queue_len)
    del clone
    store.interrupt()
    with pytest.raises(BarrierConnectionError) as caught:
        store.do(Delete(["k"]))
    store.close()
    still_open = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            still_open.append(os.readlink(f"/proc/self/fd/{fd}"))
    assert file not in still_open, caught


def test_threads_that_cannot_be_had(loop: PrivateLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, with what to do, and that connection is of no more use; the next one works."""
    on, connection = over(MemoryStore(), loop)
    start: Callable[[threading.Thread], None] = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    lost: list[BarrierConnectionError] = []
    connection.on_lost = lost.append
    fresh = ThreadedConnection(MemoryStore, loop)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(BarrierConnectionError, match="a limit of threads"):
        on.answer(fresh.open())
    # Nor one that waits.
    on.answer(connection.call(wait="bell"))
    on.until(lambda: lost)
    assert "a limit of threads" in str(lost[0])
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(BarrierConnectionError, match="a limit of threads"):
        on.answer(fresh.call(Add("n", 1)))
    assert on.answer(on.open().call(Add("n", 1))) == [1]
    on.close()


def test_a_server_that_has_closed_the_connection(capfd: pytest.CaptureFixture[str]) -> None:
    """The next call says so; c10d, which prints stack traces about it, is not called."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    store = BlockingStore(client)
    store.do(Set("k", b"v"))
    assert store.do(Read("k")) == b"v"
    del server
    seen = store._socket
    assert seen is not None
    seen.setblocking(True)
    seen.recv(1, socket.MSG_PEEK)  # Until its end is there.
    for _ in range(3):  # c10d notices a second call at the latest.
        with pytest.raises(BarrierConnectionError, match="closed the connection"):
            store.do(Append("k", b"more"))
    with pytest.raises(BarrierConnectionError, match="closed the connection"):
        store.wait("never")
    store.close()
    assert capfd.readouterr() == ("", "")
