"""How connections come about: hosts that are late, and ports where something else answers."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore
from worlds import free_port

from async_barriers import BarrierConnectionError
from async_barriers._protocol.store import Add
from async_barriers._store import connecting
from async_barriers._store.connecting import NotUnderstood
from async_barriers._store.connection import SocketConnection
from async_barriers._store.copies import agreed_namespace
from async_barriers._store.future import Effort
from async_barriers._store.private_loop import PrivateLoop
from async_barriers._store.sources import CannotHost, Connection, PassedIn, StoreAt
from async_barriers._store.threads import ThreadedConnection


@pytest.fixture
def loop() -> Iterator[PrivateLoop]:
    made = PrivateLoop()
    yield made
    made.close()


def finished(loop: PrivateLoop, coroutine: Any, secs: float = 10.0) -> Effort[Any]:
    """An effort that has come to something by then."""
    effort: Effort[Any] = Effort(coroutine)
    loop.run(lambda: effort.done, time.monotonic() + secs)
    assert effort.done
    return effort


def connect(loop: PrivateLoop, port: int, secs: float) -> Effort[SocketConnection]:
    """What comes of it, in that time and not much more."""
    began = loop.now()
    effort = finished(loop, connecting.connect(loop, "127.0.0.1", port, began + secs), secs + 3)
    assert loop.now() - began < secs + 0.5
    return effort


def refused(loop: PrivateLoop, port: int, secs: float = 0.3) -> BarrierConnectionError:
    """Why nobody could be connected to."""
    error = connect(loop, port, secs).error
    assert isinstance(error, BarrierConnectionError)
    return error


def test_waiting_for_a_store_ends(loop: PrivateLoop) -> None:
    """At the deadline; it says where it looked, and what was there."""
    port = free_port()
    error = refused(loop, port)
    assert str(error).startswith(f"no store answers at 127.0.0.1:{port} after 0.3")
    assert "Connection refused" in str(error)
    assert isinstance(error.__cause__, ConnectionRefusedError)


def test_a_host_that_is_late(loop: PrivateLoop) -> None:
    """It is found soon after it came."""
    port = free_port()
    stores: list[TCPStore] = []

    def host() -> None:
        stores.append(TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False))

    thread = threading.Timer(0.3, host)
    thread.start()
    began = loop.now()
    connection = connect(loop, port, 10).result()
    assert loop.now() - began < 3
    assert finished(loop, said(connection)).result() == [1]
    connection.close()
    thread.join()


async def said(connection: Connection) -> list[Any]:
    return await connection.call(Add("n", 1))


def strange(answer: Callable[[socket.socket], object]) -> tuple[socket.socket, int]:
    """A server of something else, in a thread that ends with it."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client = server.accept()[0]
            except OSError:
                return
            with client:
                answer(client)

    threading.Thread(target=serve, daemon=True).start()
    return server, server.getsockname()[1]


def stop(server: socket.socket) -> None:
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def test_a_port_where_something_else_answers(loop: PrivateLoop) -> None:
    """It is not taken for a store, and that is said soon: c10d's own client may know it."""

    def answer(client: socket.socket) -> None:
        client.recv(64)
        client.sendall(b"HTTP")
        client.recv(64)

    server, port = strange(answer)
    began = loop.now()
    error = connect(loop, port, 10).error
    assert isinstance(error, NotUnderstood)
    assert f"127.0.0.1:{port} does not answer as a TCPStore does (b'HTTP')" in str(error)
    assert loop.now() - began < 3
    stop(server)


def test_a_port_that_accepts_and_is_silent(loop: PrivateLoop) -> None:
    """It holds nobody (laws 5 and 8): c10d's own constructor would never return from it."""
    server, port = strange(lambda client: client.recv(64) and client.recv(64))
    error = refused(loop, port)
    assert "it accepts connections, but says nothing" in str(error)
    assert isinstance(error.__cause__, TimeoutError)
    stop(server)


def test_a_port_that_hangs_up(loop: PrivateLoop) -> None:
    """It is tried until the deadline: a store may be ending there, or beginning."""
    tries: list[int] = []
    server, port = strange(lambda client: tries.append(1))
    assert "ConnectionResetError" in str(refused(loop, port, 0.5))
    assert len(tries) > 2
    stop(server)


def test_a_port_that_neither_accepts_nor_refuses(loop: PrivateLoop) -> None:
    """As behind a firewall that drops packets."""
    with socket.socket() as full, socket.socket() as guest:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        guest.connect(full.getsockname())
        assert "timed out" in str(refused(loop, full.getsockname()[1]))


def test_no_descriptor_left(loop: PrivateLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and not that the host is to blame."""

    def refuse(*_: Any) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", refuse)
        error = refused(loop, 1)
    assert "no descriptors left (ulimit -n)" in str(error)


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("threads", [False, True], ids=["sockets", "threads"])
def test_a_store_that_is_hosted_here(loop: PrivateLoop, threads: bool) -> None:
    """By the first that opens it; it ends when that lets go of it."""
    port = free_port()
    host = StoreAt("127.0.0.1", port, True, hosts=True, worker_threads=threads)
    guest = StoreAt("127.0.0.1", port, True, hosts=False, worker_threads=threads)
    opened: list[Connection] = []
    for source in (host, host, guest):
        opened.append(finished(loop, source.open(loop, loop.now() + 5)).result())
    assert [finished(loop, said(each)).result() for each in opened] == [[1], [2], [3]]
    kind = ThreadedConnection if threads else SocketConnection
    assert all(isinstance(each, kind) for each in opened)
    hosts = [finished(loop, source.hosts(loop)).result() for source in (host, guest)]
    assert hosts == [True, False]
    assert is_open(port)
    for each in opened:
        each.close()
        if isinstance(each, ThreadedConnection):
            assert all(ended.wait(5) for ended in each.ended)
    host.let_go()
    assert not is_open(port)


def test_a_port_that_is_taken(loop: PrivateLoop) -> None:
    """By whom is said, and trying again is of no use after the deadline."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        source = StoreAt("127.0.0.1", port, True, hosts=True)
        error = finished(loop, source.open(loop, loop.now() + 0.3)).error
    assert isinstance(error, CannotHost)
    assert f"could not host the store at 127.0.0.1:{port} after" in str(error)
    assert "the port is held by process" in str(error)


def test_hosting_under_a_name_that_does_not_resolve(
    loop: PrivateLoop, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is an error that says so, and c10d prints nothing of it: its client needs no name."""
    source = StoreAt("no-such-host.invalid", free_port(), True, hosts=True)
    error = finished(loop, source.open(loop, loop.now() + 1.0), 5.0).error
    assert isinstance(error, BarrierConnectionError)
    assert "no store answers at no-such-host.invalid" in str(error)
    source.let_go()
    assert capfd.readouterr().err == ""


def test_a_wrapped_store_in_which_another_thread_waits(loop: PrivateLoop) -> None:
    """The user's client makes one call at a time; ours are made elsewhere (laws 12 and 14)."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    user = PrefixStore("theirs", TCPStore("127.0.0.1", server.port, wait_for_workers=False))
    waits = threading.Thread(target=user.wait, args=(["never"], timedelta(seconds=20)))
    waits.start()
    try:
        time.sleep(0.1)
        source = PassedIn(user)
        opened = finished(loop, source.open(loop, loop.now() + 10), 15)
        opened.result().close()
    finally:
        server.set("theirs/never", "1")
        waits.join()
    # All ranks have the same.
    assert source.namespace == agreed_namespace(user)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in a PrefixStore"])
def test_a_store_whose_server_has_gone(
    loop: PrivateLoop, capfd: pytest.CaptureFixture[str], wrapped: bool
) -> None:
    """c10d's client would print what it says to it, in each attempt (law 12)."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    user = TCPStore("127.0.0.1", server.port, wait_for_workers=False)
    source = PassedIn(PrefixStore("theirs", user) if wrapped else user)
    capfd.readouterr()
    del server
    error = finished(loop, source.open(loop, loop.now() + 0.5)).error
    assert isinstance(error, BarrierConnectionError)
    assert "no store answers" in str(error)
    assert not capfd.readouterr().err
