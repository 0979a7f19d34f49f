"""What the protocol asks of a store, of every kind of store."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from stores import MemoryStore, PlainStore
from torch.distributed import DistStoreError, Store, TCPStore
from worlds import OVER_A_STORE, free_port, open_store

from async_barriers import BarrierConnectionError, _connection
from async_barriers import _connecting as connections
from async_barriers._connection import Connection, TCPConnection


def connect(store: Store) -> Connection:
    return connections.connect_to(store, time.monotonic() + 10, threading.Event())


@pytest.fixture(params=OVER_A_STORE)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Connection, Connection]]:
    """Two connections to the same store."""
    store = open_store(request.param, tmp_path)
    made = connect(store), connect(store)
    yield made
    for connection in made:
        connection.close()


@pytest.fixture
def tcp() -> Iterator[TCPConnection]:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    connection = connections.clone_tcp(server, time.monotonic() + 10, threading.Event())
    yield connection
    if connection._socket is not None and connection._socket.fileno() >= 0:
        connection.close()


def test_the_operations(pair: tuple[Connection, Connection]) -> None:
    """What one connection writes the other one reads, whatever the bytes."""
    one, two = pair
    blob = bytes(range(256))
    assert two.read("k") is None
    one.set("k", blob)
    assert one.compare_set("k", b"other", b"new") == blob
    assert one.compare_set("k", blob, b"new") == b"new"
    assert one.compare_set("absent", b"", b"first") == b"first"
    assert one.compare_set("absent", b"", b"second") == b"first"
    one.append("log", b"a\n")
    one.append("log", b"b\n")
    assert one.add("count", 3) == 3
    assert one.add("count", 1 << 62) == (1 << 62) + 3
    one.set_many(["m1", "m2"], b"v")
    assert two.read_many(["k", "log", "m2", "none"]) == [b"new", b"a\nb\n", b"v", None]
    one.delete("k")
    assert two.read("k") is None


def test_appends_of_many_lose_no_line(pair: tuple[Connection, Connection]) -> None:
    """Two ranks that append at the same moment: both lines are there, whole (laws 1 and 2)."""

    def append(index: int) -> None:
        for number in range(50):
            pair[index].append("log", b"%d %d\n" % (index, number))
        # Nothing answers an append; what answers this was sent after them.
        pair[index].exists("log")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(append, range(2)))
    log = pair[0].read("log")
    assert log is not None
    lines = log.split()
    assert sorted(log.splitlines()) == sorted(
        b"%d %d" % (i, n) for i in range(2) for n in range(50)
    )
    assert len(lines) == 200


def test_a_value_is_awaited(pair: tuple[Connection, Connection]) -> None:
    """Whoever waits for a key is woken by its first write."""
    one, two = pair
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.await_value, "bell")
        two.set("bell", b"ding")
        assert waiting.result(10) == b"ding"


def test_a_wait_that_times_out_goes_on(tcp: TCPConnection) -> None:
    """c10d knows no endless wait; its timeout is not ours."""
    store = MemoryStore()
    timeouts = 0

    def hook(operation: str, key: str) -> None:
        nonlocal timeouts
        if operation == "wait":
            timeouts += 1
            if timeouts == 1:
                raise DistStoreError("wait timeout after 604800000ms, keys: /bell")
            if timeouts == 2:
                store.data.hook = None
                store.set("bell", b"ding")

    store.data.hook = hook
    assert connect(store).await_value("bell") == b"ding"
    assert timeouts == 2

    other = connect(tcp._store)
    tcp._store.set_timeout(timedelta(milliseconds=100))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tcp.await_value, "bell")
        with pytest.raises(TimeoutError):
            waiting.result(0.4)
        other.set("bell", b"ding")
        assert waiting.result(10) == b"ding"
    other.close()


def test_an_error_becomes_ours() -> None:
    """torch's exception is the cause of ours, and its first line is in it."""
    store = MemoryStore()
    connection = connect(store)

    def hook(operation: str, key: str) -> None:
        raise DistStoreError(f"{operation} failed\nand a stack that nobody reads")

    store.data.hook = hook
    with pytest.raises(BarrierConnectionError) as caught:
        connection.add("k", 1)
    assert str(caught.value) == "the store was lost (DistStoreError: add failed)"
    assert isinstance(caught.value.__cause__, DistStoreError)
    with pytest.raises(BarrierConnectionError):
        connection.await_value("k")
    # Who cannot list keys has nothing to sweep.
    assert connection.list_keys() == []


def test_a_store_in_python_may_speak_text() -> None:
    """A str where c10d has bytes is understood."""

    class Talker(PlainStore):
        def get(self, key: str) -> bytes:
            return super().get(key).decode()  # type: ignore[return-value]

    connection = connect(Talker())
    connection.set("k", b"v")
    assert connection.read("k") == b"v"


def test_a_call_that_hangs_is_interrupted(tcp: TCPConnection) -> None:
    """Shutting its socket down ends a call that nothing else would end (laws 5 and 8)."""
    assert tcp.interruptible
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tcp.await_value, "never")
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        tcp.interrupt()
        with pytest.raises(BarrierConnectionError):
            waiting.result(5)
    tcp.interrupt()


def test_a_torch_that_hides_its_descriptor(
    tcp: TCPConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the connection works, and cannot be interrupted."""
    monkeypatch.setattr(_connection, "innermost", lambda store: "TCPStore()")
    plain = TCPConnection(tcp._store.clone())
    assert not plain.interruptible
    assert plain.remains() == []
    plain.interrupt()
    plain.set("k", b"v")
    assert plain.read("k") == b"v"
    plain.close()


def test_waiting_for_a_store_ends() -> None:
    """At the deadline, or when it is called off; it says where it looked."""
    port = free_port()
    with pytest.raises(BarrierConnectionError, match=f"no store answers at 127.0.0.1:{port}"):
        connections.await_store("127.0.0.1", port, time.monotonic() + 0.3, threading.Event())
    called_off = threading.Event()
    called_off.set()
    with pytest.raises(BarrierConnectionError):
        connections.await_store("127.0.0.1", port, time.monotonic() + 60, called_off)


def test_a_port_where_no_store_answers() -> None:
    """What accepts and is silent, or is no store, holds nobody (laws 5 and 8): c10d's own
    constructor never returns from the one, and aborts an interpreter that ends meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
        host, port = silent.getsockname()
        with pytest.raises(BarrierConnectionError, match="timed out"):
            connections.await_store(host, port, time.monotonic() + 0.2, threading.Event())
        silent.accept()[0].close()
        called_off = threading.Event()
        waiting = pool.submit(
            connections.await_store, host, port, time.monotonic() + 60, called_off
        )
        with silent.accept()[0]:
            called_off.set()
            with pytest.raises(BarrierConnectionError, match="timed out"):
                waiting.result(5)
        called_off = threading.Event()
        waiting = pool.submit(
            connections.await_store, host, port, time.monotonic() + 60, called_off
        )
        with silent.accept()[0] as stranger:
            stranger.sendall(b"HTTP")
            # It hangs up when it has heard that.
            while stranger.recv(64):
                pass
            called_off.set()
            with pytest.raises(BarrierConnectionError, match="answers b'HTTP', which no TCPStore"):
                waiting.result(5)


def test_a_port_that_says_nothing() -> None:
    """One that neither accepts nor refuses is knocked at until that is called off."""
    with socket.socket() as full, socket.socket() as guest:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        guest.connect(full.getsockname())
        called_off = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            began = time.monotonic()
            port = full.getsockname()[1]
            waiting = pool.submit(
                connections.await_store, "127.0.0.1", port, began + 60, called_off
            )
            with pytest.raises(TimeoutError):
                waiting.result(0.4)
            called_off.set()
            with pytest.raises(BarrierConnectionError, match="timed out"):
                waiting.result(connections._ATTEMPT_SECS / 2)


def test_what_remains_of_a_connection_that_hung(tcp: TCPConnection) -> None:
    """It is kept apart, and ended, after the connection was closed; or there is nothing left."""
    reset, closed = tcp.remains() + tcp.remains()
    tcp.interrupt()
    tcp.close()
    for remains in (reset, closed):
        assert remains._socket.fileno() >= 0
    reset.reset()
    closed.close()
    assert reset._socket.fileno() == closed._socket.fileno() == -1
    assert tcp.remains() == []


def test_a_connection_that_was_lost_is_let_go_of(tcp: TCPConnection) -> None:
    """Though its error lives on: a socket that is not closed goes on sending what is too late."""
    found = re.search(r"fd=(\d+)", repr(tcp._store))
    assert found
    file = os.readlink(f"/proc/self/fd/{found[1]}")
    tcp.interrupt()
    with pytest.raises(BarrierConnectionError) as caught:
        # Not a call that the watch on event loops wraps: its frames would hold the store.
        tcp._do(tcp._store.queue_len, "queue")
    tcp.close()
    still_open = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            still_open.append(os.readlink(f"/proc/self/fd/{fd}"))
    assert file not in still_open, caught


def test_a_store_that_goes_away_as_it_is_connected_to() -> None:
    """It is tried until the deadline, or until that is called off, which c10d would not hear."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(2) as pool:
        host, port = server.getsockname()

        def answer_once() -> None:
            with server.accept()[0] as hailed:
                hailed.sendall(hailed.recv(64)[-4:])
                hailed.recv(1)
            server.close()

        answering = pool.submit(answer_once)
        began = time.monotonic()
        with pytest.raises(BarrierConnectionError, match=f"no store .* at {host}:{port}"):
            connections.connect_to_port(host, port, True, began + 0.4, threading.Event())
        answering.result(5)
        assert time.monotonic() - began < 3


def test_a_wait_that_was_ended_as_its_value_came(tcp: TCPConnection) -> None:
    """The connection is done for: an answer that nobody expects may be on its way."""
    tcp.stop_waiting()
    tcp.set("bell", b"ding")
    assert tcp.await_value("bell") == b"ding"
    tcp._stopped = True
    with pytest.raises(BarrierConnectionError, match="given up"):
        tcp.await_value("bell")
