"""What a rank that meets says to the server of a TCPStore and hears from it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import TCPStore
from worlds import World, gather

from async_barriers import (
    BarrierConnectionError,
)
from async_barriers import _connecting as connections
from async_barriers import _dialogue as dialogues
from async_barriers._connection import TCPConnection
from async_barriers._dialogue import Dialogue

pytestmark = pytest.mark.anyio


def alone(log: str = "log", count: str = "count", total: int = 1) -> Dialogue:
    return Dialogue(dialogues.arriving(log, b"me\n", count), total, dialogues.asking(log))


def connect(server: TCPStore) -> TCPConnection:
    return connections.clone_tcp(server, time.monotonic() + 10, threading.Event())


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A rank's side of a connection, and the store's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


# -- what is said --------------------------------------------------------------------------


def test_what_comes_in_pieces(pair: tuple[socket.socket, socket.socket]) -> None:
    """It is put together; and being called for nothing ends nothing."""
    ours, theirs = pair
    dialogue = alone()
    assert dialogue.begin(ours)
    assert not dialogue.hear(ours)
    assert b"count" in theirs.recv(4096)
    theirs.send(b"\0")
    assert not dialogue.hear(ours)
    assert b"log" in theirs.recv(4096)
    for byte in b"\x05\0\0\0\0\0\0\0me\nk":
        assert not dialogue.hear(ours)
        theirs.send(bytes([byte]))
        assert not dialogue.hear(ours)
    theirs.send(b"0")
    assert dialogue.hear(ours)
    assert dialogue.log == b"me\nk0"
    assert dialogue.finish(ours) == dialogue.log


@pytest.mark.parametrize("asked", [False, True])
def test_a_server_that_hangs_up(pair: tuple[socket.socket, socket.socket], asked: bool) -> None:
    """The loop is done with it, and who goes on finds out why."""
    ours, theirs = pair
    dialogue = alone()
    assert dialogue.begin(ours)
    theirs.recv(4096)
    if asked:
        theirs.send(b"\0")
        assert not dialogue.hear(ours)
        theirs.recv(4096)
    theirs.close()
    assert dialogue.hear(ours)
    with pytest.raises(OSError, match=r"hung up|reset"):
        dialogue.finish(ours)


@pytest.mark.parametrize("long", ["count", "log"])
def test_no_room_for_what_is_to_be_said(
    pair: tuple[socket.socket, socket.socket], long: str
) -> None:
    """The loop does not wait for it, and who goes on says the rest, in order."""
    ours, theirs = pair
    keys = {"log": "log", "count": "count", long: 500_000 * "x"}

    def heard(last: bytes) -> bytes:
        said = b""
        while not said.endswith(last):
            said += theirs.recv(1 << 16)
        return said

    dialogue = alone(keys["log"], keys["count"])
    assert not dialogue.begin(ours)
    assert dialogue.hear(ours)
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(dialogue.finish, ours)
        said = heard(struct.pack("=q", 1))
        theirs.send(b"\0")
        said += heard(b"\0absent\0")
        assert said.count(b"x" * 500_000) == (2 if long == "log" else 1)
        theirs.send(b"\x03\0\0\0\0\0\0\0me\n")
        assert finished.result() == b"me\n"


def test_no_room_for_what_is_asked(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, when the first half was said."""
    ours, theirs = pair
    monkeypatch.setattr(dialogues, "ABSENT", 500_000 * b"x")
    dialogue = alone()
    assert dialogue.begin(ours)
    theirs.recv(4096)
    theirs.send(b"\0")
    assert dialogue.hear(ours)
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(dialogue.finish, ours)
        asked = 0
        while asked < 1_000_000:
            asked += theirs.recv(1 << 16).count(b"x")
        theirs.send(b"\x03\0\0\0\0\0\0\0me\n")
        assert finished.result() == b"me\n"


def test_no_room_for_any_of_it(pair: tuple[socket.socket, socket.socket]) -> None:
    """Nothing at all can be asked at once: the loop does not wait, but leaves it to a thread."""
    ours, theirs = pair
    dialogue = alone()
    assert dialogue.begin(ours)
    theirs.recv(4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(1 << 16), socket.MSG_DONTWAIT)
    theirs.send(b"\0")
    assert dialogue.hear(ours)
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(dialogue.finish, ours)
        asked = b""
        while asked.count(dialogues.ABSENT) < 2:
            asked = asked[-100:] + theirs.recv(1 << 16)
        theirs.send(b"\x03\0\0\0\0\0\0\0me\n")
        assert finished.result() == b"me\n"


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_thread_takes_over_at_any_step(server: TCPStore, steps: int) -> None:
    """It goes on from there, with a real store."""
    connection = connect(server)
    ears = connection.overhear()
    dialogue = alone(total=2)
    if steps:
        assert dialogue.begin(ears)
    if steps > 1:
        server.barrier("count", 2)  # type: ignore[attr-defined]
        while not dialogue._asked:
            assert not dialogue.hear(ears)
    if steps > 2:
        while not dialogue.hear(ears):
            pass
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(connection.finish, dialogue)
        if steps <= 1:
            server.barrier("count", 2)  # type: ignore[attr-defined]
        assert finished.result() == b"me\n"
    # The connection is as it was.
    assert connection.read("log") == b"me\n"
    ears.close()
    connection.close()


# -- with whom -----------------------------------------------------------------------------


@pytest.mark.parametrize("use_libuv", [True, False])
def test_a_server_is_tried_once(use_libuv: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written for that is gone."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=use_libuv)
    keys = server.num_keys()
    first = connect(server)
    assert first.direct
    assert server.num_keys() == keys
    monkeypatch.setattr(dialogues, "understood", None)
    second = connect(server)
    assert second.direct
    for connection in (first, second):
        connection.close()


@pytest.mark.parametrize(
    ("what", "opcode"),
    [("_BARRIER", b"\x63"), ("_BARRIER", b"\x0d"), ("_BARRIER", b"\x05"), ("_SET", b"\x0d")],
)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_server_that_does_not_understand(
    tcp: World, monkeypatch: pytest.MonkeyPatch, what: str, opcode: bytes, anyio_backend: Any
) -> None:
    """It hangs up, is silent or answers something else; then threads make the calls."""
    monkeypatch.setattr(dialogues, what, opcode)
    ranks = await tcp.barriers(2)
    for sequence in range(5):
        results = await gather(rank.execute_barrier for rank in ranks)
        assert {result.sequence for result in results} == {sequence}
    assert not ranks[0]._session._series
    monkeypatch.undo()
    assert not connections._understand[tcp.store.host, tcp.store.port]  # type: ignore[attr-defined]


def test_a_server_that_was_held_up(server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it was tried first; it is tried once more, and what was written is gone."""
    trials = 0
    understood = dialogues.understood

    def at_the_second(connection: socket.socket, tried: str) -> bool:
        nonlocal trials
        trials += 1
        return understood(connection, tried) and trials > 1

    monkeypatch.setattr(dialogues, "understood", at_the_second)
    keys = server.num_keys()
    connection = connect(server)
    assert connection.direct
    assert trials == 2
    assert server.num_keys() == keys
    connection.close()


def test_a_server_that_stays_silent(server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on: connecting ends in time, and not in c10d's constructor, which would not."""
    monkeypatch.setattr(dialogues, "understood", lambda *_: False)

    def silent(host: str, port: int, deadline: float, stop: threading.Event) -> None:
        if server in opened:
            raise BarrierConnectionError("no store answers")

    opened: list[TCPStore] = []

    def clone(store: TCPStore) -> Any:
        opened.append(store)
        return store.clone()  # type: ignore[attr-defined]

    monkeypatch.setattr(connections, "_clone", clone)
    monkeypatch.setattr(connections, "await_store", silent)
    with pytest.raises(BarrierConnectionError, match="no store answers"):
        connect(server)
    assert len(opened) == 1


def test_a_program_that_signals_end(pair: tuple[socket.socket, socket.socket]) -> None:
    """Where writing to who has hung up would end the process, it does not."""
    ours, theirs = pair
    theirs.close()
    assert not alone().begin(ours)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os._exit(0 if not alone().begin(ours) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_default_timeout_for_sockets(server: TCPStore) -> None:
    """A program that sets one changes nothing for the connections that we look into."""
    socket.setdefaulttimeout(0.05)
    try:
        connection = connect(server)
        ears = connection.overhear()
    finally:
        socket.setdefaulttimeout(None)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(connection.await_value, "key")
        with pytest.raises(TimeoutError):
            waits.result(0.3)
        server.set("key", "value")
        assert waits.result() == b"value"
    ears.close()
    connection.close()
