"""Connections that are lost, or let go of: nothing stays unanswered, and nothing comes later."""

from __future__ import annotations

import gc
import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from test_signals import Strike, Struck

from async_barriers import BarrierConnectionError
from async_barriers._protocol.store import Add, Read, Set
from async_barriers._store.connection import SocketConnection
from async_barriers._store.linger import LINGER_SECS
from async_barriers._store.private_loop import PrivateLoop

LARGE = b"z" * (16 << 20)


class Pair:
    """A connection, and the server's end of it, in the test's hands.

    :ivar lost: with which errors the connection said that it was
    """

    def __init__(self) -> None:
        self.loop = PrivateLoop()
        with socket.create_server(("127.0.0.1", 0)) as server:
            here = socket.create_connection(server.getsockname())
            self.there = server.accept()[0]
        here.setblocking(False)
        self.there.settimeout(5)
        self.connection = SocketConnection(here, self.loop, "host:1")
        self.lost: list[BarrierConnectionError] = []
        self.connection.on_lost = self.lost.append

    def heard(self) -> bool:
        return self.connection.lost is not None

    def work(self, done: Callable[[], bool], secs: float = 5.0) -> None:
        self.loop.run(done, time.monotonic() + secs)
        assert done()

    def say(self, said: bytes) -> None:
        """Have the server say something, and the connection hear it."""
        self.there.sendall(said)
        sock = self.connection._socket
        self.work(lambda: sock.fileno() < 0 or not select.select([sock], [], [], 0)[0])

    def end(self) -> None:
        self.connection.close(reset=True)
        self.loop.close()
        self.there.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.end()


def hang_up(pair: Pair) -> None:
    pair.there.shutdown(socket.SHUT_WR)


def reset(pair: Pair) -> None:
    pair.there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.there.close()


def test_struck_at_any_line_as_an_answer_comes() -> None:
    """By a signal handler's exception: the answer is there then, or its call has failed."""
    for at in itertools.count(1):
        pair = Pair()
        answered = pair.connection.call(Add("n", 1))
        pair.there.sendall(struct.pack("=q", 5))
        select.select([pair.connection._socket], [], [], 5)
        strike = Strike(at)
        with suppress(Struck), strike():
            pair.connection.read()
        # What was not read yet is read the next time.
        pair.work(lambda: answered.done or pair.heard())  # noqa: B023  (called in this round)
        assert answered.done, strike.where
        pair.end()
        if not strike.where:
            break
    assert at > 20


WAYS: dict[str, tuple[Callable[[Pair], object], str]] = {
    "it hangs up": (hang_up, "ConnectionResetError: .*the server hung up"),
    "it is reset": (reset, "ConnectionResetError"),
    "no server has such values": (
        lambda pair: pair.there.sendall(b"\xff" * 16),
        "ValueError: a value of -1 bytes",
    ),
    "nor so large ones": (
        lambda pair: pair.there.sendall(struct.pack("=q", 1 << 40)),
        f"ValueError: a value of {1 << 40} bytes",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_that_is_under_way_fails(pair: Pair, way: str) -> None:
    """Each with an error of its own that says where and why; and what is said later, at once."""
    connection = pair.connection
    connection.on_wake = pytest.fail
    heard: list[object] = []
    connection.outbox.append(([Read("late")], heard.append))
    one = connection.call(Read("a"), wait="w")
    two = connection.call(Add("n", 1))
    happens, why = WAYS[way]
    happens(pair)
    pair.work(pair.heard)
    later = connection.call(Read("b"), wait="v")
    for failed in (one, two, later):
        assert failed.done
        with pytest.raises(
            BarrierConnectionError, match=rf"^the connection to the store at host:1 .*\({why}"
        ):
            failed.result()
    assert len({id(error) for error in (one.error, two.error, later.error)}) == 3
    causes = [getattr(each.error, "__cause__", None) for each in (one, two, later)]
    assert causes[0] is not None
    assert causes == 3 * [causes[0]]
    assert [str(error) for error in pair.lost] == [str(one.error)]
    assert heard == []
    # No more use, and no harm.
    connection.call(Set("w", b""))
    connection.stop_waiting()
    connection.move(pair.loop)
    connection.close()
    assert not connection.unsaid
    with suppress(OSError):
        hang_up(pair)
    pair.work(lambda: connection._socket.fileno() == -1)


def test_a_wait_ends_with_a_byte_of_its_own(pair: Pair) -> None:
    """Anything else is another server's."""
    pair.connection.call(wait="w")
    pair.say(b"\7")
    assert str(pair.lost[0]).endswith("was lost (ValueError: byte 7 where a wait ends)")


def test_what_nobody_asked_for(pair: Pair) -> None:
    """The answers are out of step: none of them can be trusted any more."""
    answer = pair.connection.call(Add("n", 1))
    pair.say(struct.pack("=q", 3) + b"\0")
    assert answer.result() == [3]
    assert str(pair.lost[0]).endswith("was lost (ValueError: more came than was asked for)")


def test_writing_to_who_has_hung_up(pair: Pair) -> None:
    """It fails as reading does, and no signal ends the program."""
    reset(pair)
    select.select([pair.connection._socket], [], [], 5)
    answer = pair.connection.call(Read("a"))
    assert isinstance(answer.error, BarrierConnectionError)
    assert pair.heard()


def test_being_lost_while_much_has_yet_to_be_sent(pair: Pair) -> None:
    """What is found when the socket is written to fails all the same."""
    answer = pair.connection.call(Set("l", LARGE), Read("l"))
    assert pair.connection.unsaid
    reset(pair)
    pair.connection._loop.unwatch(pair.connection._socket)
    pair.connection.write()
    assert isinstance(answer.error, BarrierConnectionError)


def test_a_signal_handler_that_raises_among_answers(pair: Pair) -> None:
    """What was heard is not known any more, so that this connection is of no more use; the
    exception goes on."""
    connection = pair.connection
    one, two = connection.call(Add("n", 1)), connection.call(Add("n", 1))

    def interrupt() -> None:
        raise KeyboardInterrupt

    one.when_done(interrupt)
    pair.there.sendall(struct.pack("=qq", 1, 2))
    with pytest.raises(KeyboardInterrupt):
        pair.work(lambda: two.done)
    assert one.result() == [1]
    assert isinstance(two.error, BarrierConnectionError)
    assert "KeyboardInterrupt" in str(pair.lost[0])


def test_closing_fails_what_is_under_way(pair: Pair) -> None:
    """Without saying that it was lost: who closes knows."""
    answer = pair.connection.call(Read("a"))
    pair.connection.close()
    with pytest.raises(BarrierConnectionError, match="this connection to the store was closed"):
        answer.result()
    assert pair.lost == []


def test_answers_are_heard_after_closing(pair: Pair) -> None:
    """A server whose answer finds nobody complains; and none of it holds anything up."""
    sock = pair.connection._socket
    pair.connection.call(Read("a"))
    pair.connection.close()
    assert sock.fileno() != -1
    assert pair.there.recv(4096)
    # All was sent, and no more will be.
    assert pair.there.recv(1) == b""
    pair.there.sendall(struct.pack("=q", 0))
    pair.loop.run(lambda: False, time.monotonic() + 0.05)
    pair.there.close()
    pair.work(lambda: sock.fileno() == -1)


@pytest.mark.parametrize("ends", [False, True], ids=["for a moment", "while the loop runs"])
def test_a_server_that_never_answers_is_not_waited_for(pair: Pair, ends: bool) -> None:
    """Longer than a moment, or after the loop's end."""
    sock = pair.connection._socket
    pair.connection.call(Read("a"))
    pair.connection.close()
    if ends:
        pair.loop.close()
        assert sock.fileno() == -1
        return
    began = time.monotonic()
    pair.work(lambda: sock.fileno() == -1)
    assert time.monotonic() - began > 0.9 * LINGER_SECS


def test_an_idle_connection_closes_at_once(pair: Pair) -> None:
    """Also while it waits: the wait's byte may come, or not."""
    sock = pair.connection._socket
    pair.connection.call(wait="w")
    pair.connection.close()
    assert sock.fileno() == -1


def test_what_was_not_sent_does_not_come_later(pair: Pair) -> None:
    """A connection that is reset takes back what the kernel still has."""
    pair.connection.call(Set("l", LARGE), Read("l"))
    pair.connection.close(reset=True)
    came = 0
    with pytest.raises(ConnectionResetError):  # noqa: PT012  (it may come after some pieces)
        while piece := pair.there.recv(1 << 20):
            came += len(piece)
    assert came < len(LARGE)


def test_a_forked_child_says_nothing(pair: Pair) -> None:
    """It closes its own descriptor; the parent's connection is as it was."""
    answer = pair.connection.call(Read("a"))
    # The child must not collect what other tests left: the threads of c10d objects are gone.
    gc.collect()
    child = os.fork()
    if not child:
        pair.connection.forsake()
        pair.connection.call(Read("b"))
        pair.connection.call(Set("c", b""))
        pair.connection.close(reset=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    size = len(pair.there.recv(4096))
    pair.say(struct.pack("=q", 1) + b"x")
    assert answer.result() == [b"x"]
    pair.connection.close()
    assert pair.there.recv(4096) == b""
    assert size < 100
