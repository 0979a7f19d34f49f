"""A connection of our own to a TCPStore: whatever the pieces, and whatever comes between."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from served import Served

from async_barriers._protocol.store import (
    SILENT,
    Add,
    Append,
    CompareSet,
    Delete,
    Get,
    Read,
    Request,
    Set,
    SetMany,
)
from async_barriers._store.future import Future

keys = st.sampled_from(["a", "b", "c"])
values = st.binary(max_size=5) | st.sampled_from([b"", b"\0absent\0", b"x" * 1500])
requests = st.one_of(
    st.builds(Append, keys, values),
    st.builds(Set, keys, values),
    st.builds(SetMany, st.lists(keys, min_size=1, max_size=3, unique=True), values),
    st.builds(Add, st.sampled_from(["n", "m"]), st.integers(-3, 1 << 40)),
    st.builds(CompareSet, keys, st.sampled_from([b"", b"x", b"y"]), st.sampled_from([b"x", b"y"])),
    st.builds(Read, st.sampled_from(["a", "b", "c", "none"])),
    st.builds(Get, st.sampled_from(["a", "b", "c", "none"])),
    st.builds(Delete, st.lists(st.sampled_from(["a", "b", "n", "none"]), min_size=1, max_size=3)),
)
messages = st.lists(requests, max_size=5)


class Model:
    """What the answers ought to be: a store of the simplest kind, which is asked in order."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def answers(self, message: list[Request]) -> list[Any]:
        found = [(request, self._answer(request)) for request in message]
        return [answer for request, answer in found if not isinstance(request, SILENT)]

    def _answer(self, request: Request) -> Any:
        held = self.values
        if isinstance(request, Append):
            held[request.key] = held.get(request.key, b"") + request.value
        elif isinstance(request, Set):
            held[request.key] = request.value
        elif isinstance(request, SetMany):
            held.update(dict.fromkeys(request.keys, request.value))
        elif isinstance(request, Add):
            total = int(held.get(request.key, b"0")) + request.amount
            held[request.key] = b"%d" % total
            return total
        elif isinstance(request, CompareSet):
            if held.get(request.key, None if request.expected else b"") == request.expected:
                held[request.key] = request.desired
            return held.get(request.key, request.expected)
        elif isinstance(request, Read):
            found = held.get(request.key)
            # The one value that cannot be told from none.
            return None if found == b"\0absent\0" else found
        elif isinstance(request, Get):
            return held.get(request.key, b"")
        else:
            for key in request.keys:
                held.pop(key, None)
        return None


@given(st.data(), st.lists(messages, min_size=1, max_size=6))
def test_answers_in_any_pieces(data: st.DataObject, sent: list[list[Request]]) -> None:
    """However the bytes of both directions are cut: each message gets its own answers, in order."""
    served, model = Served(), Model()
    served.socket.room = 0
    futures = [served.connection.call(*message) for message in sent]
    expected = [model.answers(message) for message in sent]
    pieces = st.integers(1, 40) | st.just(1 << 20)
    while served.connection.unsaid:
        served.send(data.draw(pieces))
        served.arrive(data.draw(pieces))
        while served.server.serve():
            pass
        served.hear(data.draw(pieces))
    assert [future.result() for future in futures] == expected
    assert served.loop.writable is None


# Of any of these, in any order: a message, with or without a key to wait for; what writes the
# awaited key and cares for it no more; no more waiting; a write by others; so many requests
# served; so many bytes that can be sent, or arrive in one direction or the other.
awaited = st.sampled_from(["w", "v"])
steps = st.one_of(
    st.tuples(st.just("call"), messages, st.none() | awaited),
    st.just(("fulfil",)),
    st.just(("stop",)),
    st.tuples(st.just("write"), awaited),
    st.tuples(st.just("delete"), awaited),
    st.tuples(st.just("send"), st.integers(0, 60), st.booleans()),
    st.tuples(st.just("serve"), st.integers(1, 4)),
    st.tuples(st.just("arrive"), st.integers(1, 60)),
    st.tuples(st.just("hear"), st.integers(1, 20)),
)


class Waits:
    """Takes the steps, and sees that no answer is another's and no wake is lost or made up."""

    def __init__(self) -> None:
        self.served = Served()
        self.model = Model()
        self.asked: list[tuple[Future[list[Any]], list[Any]]] = []
        self.awaited: str | None = None

    def call(self, message: list[Request], wait: str | None) -> None:
        if wait is not None:
            self.awaited = wait
            self.served.server.woken.discard(b"/" + wait.encode())
            self.served.connection.on_wake = self.wake
        said = self.served.connection.call(*message, wait=wait)
        self.asked.append((said, self.model.answers(message)))

    def wake(self) -> None:
        assert self.awaited is not None
        assert b"/" + self.awaited.encode() in self.served.server.woken
        self.awaited = None

    def fulfil(self) -> None:
        if self.awaited is not None:
            key = self.awaited
            self.stop()
            self.served.connection.call(Set(key, b""))

    def stop(self) -> None:
        self.served.connection.stop_waiting()
        self.awaited = None

    def write(self, key: str) -> None:
        self.served.server.write(b"/" + key.encode(), b"")

    def delete(self, key: str) -> None:
        self.served.server.values.pop(b"/" + key.encode(), None)

    def serve(self, most: int) -> None:
        while most and self.served.server.serve():
            most -= 1

    def send(self, room: int, told: bool) -> None:
        self.served.send(room, told=told)

    def arrive(self, most: int) -> None:
        self.served.arrive(most)

    def hear(self, most: int) -> None:
        self.served.hear(most)

    def end(self) -> None:
        for _ in range(3):
            self.served.exchange()
        assert self.served.connection.lost is None
        assert [said.result() for said, _ in self.asked] == [wanted for _, wanted in self.asked]
        assert not self.served.connection.unsaid
        if self.awaited is not None:
            key = b"/" + self.awaited.encode()
            assert self.served.server.waiting == key
            # Also if it was deleted at once.
            assert key not in self.served.server.woken


WAITS: list[tuple[Any, ...]] = [("call", [], "w"), ("send", 60, True), ("arrive", 60), ("serve", 4)]


@given(st.lists(steps, max_size=25))
@example([*WAITS, ("call", [], "v"), ("write", "w"), ("call", [Read("a")], None)])
@example([*WAITS, ("write", "w"), ("call", [Read("a")], None), ("delete", "w")])
@example([*WAITS, ("write", "w"), ("call", [Read("a")], None), ("call", [], "w")])
def test_waits_among_messages(taken: list[tuple[Any, ...]]) -> None:
    """A wait is cancelled and asked anew with each message, and its byte may be on its way then:
    no byte is taken for another, and whoever waits is woken."""
    waits = Waits()
    for name, *arguments in taken:
        getattr(waits, name)(*arguments)
    waits.end()


def woken_unheard() -> tuple[Served, list[str]]:
    """A connection whose wait for "w" has ended, which it has not heard; and whom it has woken."""
    served, woken = Served(), list[str]()
    served.connection.on_wake = lambda: woken.append("w")
    served.connection.call(wait="w")
    served.exchange()
    served.server.write(b"/w", b"1")
    return served, woken


def test_a_wake_just_before_its_cancellation() -> None:
    """Two bytes come: of the wait's end, and of its cancellation, which ends nothing any more."""
    served, woken = woken_unheard()
    answer = served.connection.call(Read("w"))
    served.arrive()
    while served.server.serve():
        pass
    # Asked anew, of a key that is there, it ends at once.
    assert bytes(served.server.said) == b"\0\1" + b"\1" + b"\0" * 7 + b"1" + b"\0"
    served.hear(2)
    assert woken == ["w"]
    served.hear()
    assert answer.result() == [b"1"]
    assert woken == ["w"]


def test_a_key_that_is_deleted_as_its_wait_is_asked_for_anew() -> None:
    """As the bell of a rank that was stopped, and is taken for dead: the wait ends no more."""
    served, woken = woken_unheard()
    answer = served.connection.call(Read("x"))
    del served.server.values[b"/w"]
    served.exchange()
    assert answer.result() == [None]
    assert woken == ["w"]
    # What it waits for next is another matter.
    served.connection.call(wait="v")
    served.exchange()
    served.server.write(b"/v", b"1")
    served.connection.call(Read("x"), wait="u")
    served.exchange()
    assert woken == ["w"]


def test_who_writes_what_it_waits_for_itself() -> None:
    """Nobody is called, and the next answer is not the wait's byte."""
    served = Served()
    served.connection.on_wake = pytest.fail
    served.connection.call(Add("n", 1), wait="w")
    served.exchange()
    served.connection.stop_waiting()
    served.connection.call(Set("w", b"1"))
    assert not served.connection.unsaid
    answer = served.connection.call(Read("w"))
    served.exchange()
    assert answer.result() == [b"1"]
    # Where another one was faster, too.
    served.server.values.clear()
    served.connection.call(wait="w")
    served.exchange()
    served.server.write(b"/w", b"2")
    served.connection.stop_waiting()
    served.connection.call(Set("w", b"3"))
    answer = served.connection.call(Read("w"), wait="v")
    served.exchange()
    assert answer.result() == [b"3"]
    assert served.server.waiting == b"/v"


def test_the_outbox_goes_with_the_next_message() -> None:
    """Before it, in one send; what hears its answers is called before the message's own are
    there."""
    served = Served()
    order: list[Any] = []
    served.connection.outbox += [
        ([Add("n", 1), Delete(["x"])], order.append),
        ([Set("y", b"1")], order.append),
        ([Delete(["x"]), Add("n", 5), Read("y")], order.append),
    ]
    assert not served.socket.sent
    told = served.connection.call(Add("n", 10))
    told.when_done(lambda: order.append(told.result()))
    assert served.connection.outbox == []
    served.exchange()
    assert order == [[1], [], [6, b"1"], [16]]
