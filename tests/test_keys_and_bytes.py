"""What stands in a store and goes over the wire, byte by byte: keys, payloads, answers."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from async_barriers import BarrierError
from async_barriers._protocol.count import COMMIT, GATHER, MAX_RANKS
from async_barriers._protocol.keys import MAX_KEY_BYTES, Keys, PhaseKeys, check_name, check_prefix
from async_barriers._protocol.payloads import SMALL_BYTES, brought, carried
from async_barriers._protocol.phase import Entry, departed, departing, entering
from async_barriers._protocol.store import Append, Set
from async_barriers._protocol.verdict import missing
from async_barriers._store import wire

texts = st.text(max_size=12)
# Pieces of keys, which could be mistaken for each other where texts meet.
pieces = st.lists(
    st.sampled_from(["p", "q", "/", "/phase/0:/", "0", "1:", "/log", "0-ab", "state", "async_"]),
    max_size=4,
)
parts = texts | pieces.map("".join)
phases = st.tuples(
    parts, st.sampled_from(["0-ab", "1-ab", "0-b"]), parts, st.sampled_from(["0", "1", "s0", "e0"])
)
WORLD = 5


def keys_of(phase: PhaseKeys) -> set[str]:
    return {
        phase.log, phase.count, phase.released, phase.departed, phase.reason, phase.word,
        phase.settled, phase.summary, phase.payload(0), phase.payload(11), phase.published,
    }  # fmt: skip


@given(phases, phases)
@example(("ckpt1", "0-ab", "0", "0"), ("ckpt", "0-ab", "10", "0"))
@example(("p", "0-ab", "q/phase/0:x", "0"), ("p/phase/1:q", "0-ab", "x", "0"))
@example(("p", "0-ab", "", "0"), ("p", "0-ab", "/0", "0"))
@example(("p", "0-ab", "n/1-ab/phase/m", "0"), ("p/0-ab/phase/n", "1-ab", "m", "0"))
@example(("p", "0-ab", "n/0", "0"), ("p", "0-ab", "n", "0/0"))
def test_no_two_phases_share_a_key(
    one: tuple[str, str, str, str], other: tuple[str, str, str, str]
) -> None:
    """No choice of prefix and name makes keys collide (law 9), nor with those of a membership."""

    def fields(prefix: str, identity: str, name: str, sequence: str) -> set[str]:
        return keys_of(Keys(prefix).generation(identity).phase(name, sequence))

    assert len(fields(*one)) == 11
    assert (one == other) or not (fields(*one) & fields(*other))
    keys = Keys(one[0])
    own = keys.generation(one[1])
    members = {
        keys.state, keys.commits, keys.member(0), keys.member(1), own.roll, own.closed,
        own.host_leaves, own.all_left, own.threaded, own.bell(0), own.asked(0), own.answer("ab"),
        own.latest(one[2]), own.latest(one[2] + "0"),
        keys.commits_number, keys.commits_news(0), keys.commits_news(15),
    }  # fmt: skip
    assert len(members) == 17
    assert not members & fields(*other)
    elsewhere = Keys(one[0], "namespace/").generation(one[1]).phase(one[2], one[3])
    assert not keys_of(elsewhere) & fields(*other)


@given(st.text(min_size=1, max_size=9000), st.text(max_size=9000))
@example("p" * 6900, "")
@example("p", "n" * 7000)
def test_what_is_accepted_fits_the_store(prefix: str, name: str) -> None:
    """Whatever passes the checks makes keys that a TCPStore takes."""
    keys = Keys(prefix, "async_barriers.0123456789abcdef/")
    try:
        check_prefix(prefix)
        check_name(keys, name)
    except ValueError:
        return
    own = keys.generation("9" * 10 + "-" + "f" * 16)
    longest = own.phase(name, "s" + "9" * 19).payload(MAX_RANKS - 1)
    assert len(longest.encode()) <= MAX_KEY_BYTES
    assert len(own.latest(name).encode()) <= MAX_KEY_BYTES


payloads = st.binary(max_size=20) | st.sampled_from(
    [b"", b"0 3\nabc", b"1 -\n", b"z" * SMALL_BYTES, b"z" * (SMALL_BYTES + 1)]
)


@given(st.lists(payloads, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_payloads_survive_the_store(given_: list[bytes], chosen: random.Random) -> None:
    """Whatever their bytes, in whatever order; the large ones stand in keys of their own."""
    phase = Keys("p").generation("0-ab").phase("", "0")
    order = list(range(len(given_)))
    chosen.shuffle(order)
    log, stored, gone = b"", {}, set()
    for rank in order:
        entry = Entry(phase, rank, len(given_), chosen.choice([COMMIT, GATHER]), 0)
        for request in entering(entry, given_[rank]):
            if isinstance(request, Append):
                assert request.key == phase.log
                log += request.value
                if chosen.random() < 0.2:
                    (left,) = departing(entry)
                    assert isinstance(left, Append)
                    log += left.value
                    gone.add(rank)
            elif isinstance(request, Set):
                stored[request.key] = request.value
    found, large = brought(log or None, len(given_))
    assert sorted(large) == [r for r, each in enumerate(given_) if len(each) > SMALL_BYTES]
    found |= {rank: stored[phase.payload(rank)] for rank in large}
    assert [found[rank] for rank in range(len(given_))] == given_
    assert missing(log, len(given_)) == ()
    assert departed(log) == gone


REFUSED = "something else wrote to the payloads"


@given(st.binary(max_size=20))
def test_rubbish_among_payloads(value: bytes) -> None:
    """So few bytes are not those of so many ranks, whatever they are."""
    with pytest.raises(BarrierError, match=REFUSED):
        brought(value, 7)


@pytest.mark.parametrize(
    "value",
    [
        b"0 =YQ==\n1 =Y",
        b"0 =YQ==\n1 YQ==\n",
        b"0 -\n0 -\n",
        b"0 =\n1\n",
        b"0 =\n1 c0\n",
        b"0 =\n11 -\n",
    ],
)
def test_what_two_ranks_did_not_say(value: bytes) -> None:
    """One rank twice is not another's, and half of a payload is none."""
    with pytest.raises(BarrierError, match=REFUSED):
        brought(value, 2)


def test_lines_among_payloads() -> None:
    """Lines that are none of ours are passed over, and so is a payload of a rank that has one."""
    value = b"0 c1 =YQ==\nrubbish\n1d\n0 c1 =Yg==\n\xff\n1 c1 -\n"
    assert brought(value, 2) == ({0: b"a"}, [1])


@given(st.lists(payloads, min_size=2, max_size=5), st.integers(0, 3))
def test_payloads_that_are_missing(given_: list[bytes], absent: int) -> None:
    """An absent key, or one rank's share of it, is not taken for empty payloads."""
    lines = [b"%d %b\n" % (rank, carried(each)) for rank, each in enumerate(given_)]
    del lines[absent % len(lines)]
    with pytest.raises(BarrierError, match=REFUSED):
        brought(b"".join(lines), len(given_))
    with pytest.raises(BarrierError, match=REFUSED):
        brought(None, len(given_))


# No value of ours is the one that stands for an absent key.
held = st.binary(max_size=20).filter(lambda value: value != wire.ABSENT)
answers = st.one_of(
    st.tuples(st.just(wire.NUMBER), st.integers(-(1 << 63), (1 << 63) - 1)),
    st.tuples(st.just(wire.VALUE), st.binary(max_size=20)),
    st.tuples(st.just(wire.READ), st.none() | held),
    st.tuples(st.just(wire.ECHO), st.binary(min_size=4, max_size=4)),
    st.tuples(st.integers(-3, -1), st.none()),
)


def said(kind: int, value: Any) -> bytes:
    if kind == wire.NUMBER:
        return struct.pack("=q", value)
    if kind < 0:
        return struct.pack("=q", 1) * -kind
    if kind == wire.ECHO:
        return bytes(value)
    value = wire.ABSENT if value is None else value
    return struct.pack("=q", len(value)) + bytes(value)


@given(st.lists(answers, max_size=6), st.binary(max_size=9), st.binary(max_size=9))
def test_answers_as_they_come(told: list[tuple[int, Any]], before: bytes, after: bytes) -> None:
    """All are heard when the last byte is there, and not sooner; what follows is left alone. Where
    they come in two pieces, nothing is lost."""
    kinds, whole = [kind for kind, _ in told], b"".join(said(*each) for each in told)
    end = len(before) + len(whole)
    heard = [value for kind, value in told if kind >= 0]
    for cut in range(len(whole) + 1):
        message = wire.Message()
        message.kinds = list(kinds)
        at, needed = len(before), 0
        if cut < len(whole):
            at, needed = message.hear(before + whole[:cut], at)
            assert len(before) + cut < needed <= end
        assert message.hear(before + whole + after, at) == (end, 0)
        assert message.answers == heard


def test_greeting() -> None:
    """A server says the number back, whatever it is."""
    for number in (0, 1, 0x7FFFFFFF):
        assert wire.hello(number).endswith(wire.echo(number))
        greeting = wire.Message()
        greeting.kinds.append(wire.ECHO)
        assert greeting.hear(wire.echo(number), 0) == (4, 0)
        assert greeting.answers == [wire.echo(number)]
