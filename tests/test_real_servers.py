"""A connection of our own to a TCPStore's real server, with and without libuv."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from on_a_loop import OnALoop
from torch.distributed import TCPStore

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
from async_barriers._store import copies
from async_barriers._store.blocking_store import BlockingStore
from async_barriers._store.private_loop import PrivateLoop


@pytest.fixture
def loop() -> Iterator[PrivateLoop]:
    made = PrivateLoop()
    yield made
    made.close()


@pytest.fixture(params=[True, False], ids=["libuv", "no libuv"])
def server(request: pytest.FixtureRequest) -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=request.param)


@pytest.fixture
def on(loop: PrivateLoop, server: TCPStore) -> Iterator[OnALoop]:
    made = OnALoop(loop, server)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(3))
def test_c10ds_client_says_the_same(on: OnALoop, server: TCPStore, seed: int) -> None:
    """Over a server of either kind: what our connection and c10d's client are answered, and what
    each reads of what the other wrote."""
    chosen = random.Random(seed)
    ours = on.connect()
    theirs = BlockingStore(copies.client_of(server.host, server.port))
    many = [b"", b"v", bytes(range(256)), b"x" * 100_000, b"y" * 5]

    def message(root: str) -> list[Request]:
        def one() -> Request:
            key = root + chosen.choice("abcd")
            few: list[Request] = [
                Append(key, chosen.choice(many)),
                Set(key, chosen.choice(many)),
                SetMany([root + "a", key], chosen.choice(many)),
                Add(root + "n", chosen.choice([1, -5, 1 << 40])),
                CompareSet(key, chosen.choice(many), chosen.choice(many)),
                CompareSet(root + "e", b"", chosen.choice(many)),
                Read(key),
                Read(root + "none"),
                Delete([key]),
                Delete([key, root + "e"]),
            ]
            return chosen.choice(few)

        return [one() for _ in range(chosen.randint(1, 6))]

    for _ in range(25):
        state = chosen.getstate()
        mine = message("one/")
        chosen.setstate(state)
        yours = message("two/")
        answered = [(request, theirs.do(request)) for request in yours]
        wanted = [answer for request, answer in answered if not isinstance(request, SILENT)]
        assert on.answer(ours.call(*mine)) == wanted, mine
    for name in "abcden":
        (found,) = on.answer(ours.call(Read("two/" + name)))
        assert found == theirs.do(Read("one/" + name)), name
        assert found == theirs.do(Read("two/" + name))
    theirs.close()


def test_gets_in_a_row_are_one_request(on: OnALoop) -> None:
    """Each is answered in its place, whatever stands between; also an empty and a large value."""
    ours = on.connect()
    values = {"a": b"1", "b": b"", "c": bytes(range(256)) * 400, "n": b"7"}
    on.answer(ours.call(*(Set(key, value) for key, value in values.items()), Read("a")))
    for keys in ("a", "ab", "abc", "cab a", "ab n ba", " abcn ", "a b c n"):
        requests = [Add("n", 0) if key == " " else Get(key) for key in keys]
        wanted = [7 if key == " " else values[key] for key in keys]
        assert on.answer(ours.call(*requests)) == wanted, keys
        silent = [Append("log", b"x") if key == " " else Get(key) for key in keys]
        wanted = [values[key] for key in keys if key != " "]
        assert on.answer(ours.call(*silent)) == wanted, keys


def test_what_is_awaited_comes(on: OnALoop, server: TCPStore) -> None:
    """A write by c10d's client wakes; a key that is there wakes at once; each wait once."""
    ours, woken = on.connect(), []
    ours.on_wake = lambda: woken.append(1)
    on.answer(ours.call(Read("bell"), wait="bell"))
    for _ in range(3):
        on.answer(ours.call(Read("x"), Add("n", 1)))
    assert not woken
    server.set("bell", "ding")
    on.until(lambda: woken)
    on.answer(ours.call(Read("bell")))
    assert woken == [1]
    assert on.answer(ours.call(Read("bell"), wait="bell")) == [b"ding"]
    on.until(lambda: len(woken) == 2)


def test_large_messages_wait_for_room(on: OnALoop) -> None:
    """More than the kernel takes at once, in both directions, with others behind it."""
    ours = on.connect()
    large = b"z" * (6 << 20)
    said = [ours.call(Set("l", large)), ours.call(Read("l")), ours.call(Add("n", 1), Read("l"))]
    assert ours.unsaid
    assert [on.answer(each) for each in said] == [[], [large], [1, large]]
    assert not ours.unsaid


def test_it_goes_on_on_another_loop(on: OnALoop) -> None:
    """With what has yet to be sent, and what has yet to come."""
    ours = on.connect()
    large = b"z" * (6 << 20)
    said = ours.call(Set("l", large), Read("l"), Add("n", 1))
    elsewhere = OnALoop(PrivateLoop(), on.store)
    ours.move(elsewhere.loop)
    assert elsewhere.answer(said) == [large, 1]
    with pytest.raises(TimeoutError):
        on.answer(ours.call(Read("n")), 0.05)
    assert elsewhere.answer(ours.call(Read("n"))) == [b"1"]
    ours.close()
    elsewhere.loop.close()
