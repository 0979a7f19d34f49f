"""Keys and verdicts, by their properties."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from async_barriers import _verdict
from async_barriers._keys import MAX_KEY_BYTES, Keys, check_name, check_prefix
from async_barriers._protocol import _ranges, _read_summary
from async_barriers._verdict import Broken, Gathered, Released

WORLD = 4
PHASE = 7
texts = st.text(max_size=12)
# Pieces of keys, which could be mistaken for each other where texts meet.
pieces = st.lists(st.sampled_from(["p", "q", "/", "/phase/0/", "0", "1:", "/log"]), max_size=4)
parts = texts | pieces.map("".join)
phases = st.tuples(parts, st.integers(0, 3), parts, st.integers(0, 30))
ranks = st.integers(0, WORLD - 1)
lines = st.one_of(
    ranks.map(lambda rank: _verdict.arrival(rank, None)),
    st.tuples(ranks, ranks).map(lambda pair: _verdict.arrival(*pair)),
    ranks.map(lambda rank: _verdict.arrival(rank, None, meets=True)),
    ranks.map(lambda rank: _verdict.arrival(rank, None, meets=True, keeps=True)),
    ranks.map(_verdict.listening),
    st.tuples(ranks, texts).map(lambda pair: _verdict.breaking(pair[0], PHASE, pair[1])),
    ranks.map(lambda rank: _verdict.breaking(rank, PHASE, "", 1.5)),
    # Of an earlier phase, and held up on its way here.
    ranks.map(lambda rank: _verdict.breaking(rank, PHASE - 3, "", 1.5)),
    st.binary(max_size=8).map(lambda rubbish: rubbish.replace(b"\n", b"") + b"\n"),
)
logs = st.lists(lines, max_size=12)


@given(phases, phases)
@example(("ckpt1", 0, "0", 0), ("ckpt", 0, "10", 0))
@example(("p", 0, "q/phase/0/x", 0), ("p/phase/0/q", 0, "x", 0))
@example(("p", 0, "", 0), ("p", 0, "/0", 0))
def test_no_two_phases_share_a_key(
    one: tuple[str, int, str, int], other: tuple[str, int, str, int]
) -> None:
    """No choice of prefix and name makes keys collide, nor one contain the other's (law 9)."""

    def fields(prefix: str, generation: int, name: str, sequence: int) -> set[str]:
        keys = Keys(prefix).phase(generation, name, sequence)
        return {*keys.logs, keys.count, keys.verdict, keys.gathered, keys.summary, keys.payload(1)}

    assert (one == other) or not (fields(*one) & fields(*other))
    membership = Keys(one[0])
    own = {
        membership.generation,
        membership.member(1),
        membership.mail(0, 1),
        membership.over(0),
        membership.world(0),
        membership.roll(0),
        membership.all_left(0),
    }
    assert len(own) == 7
    assert not own & fields(*other)


def test_classic_collision() -> None:
    """ "ckpt1" + "0" and "ckpt" + "10" were one key in torch's barriers."""
    assert Keys("ckpt1").phase(0, "", 0) != Keys("ckpt").phase(0, "", 10)
    assert Keys("a").phase(0, "b/0", 0) != Keys("a").phase(0, "b", 0)


@given(st.text(min_size=1, max_size=9000), st.text(max_size=9000))
def test_what_is_accepted_fits_the_store(prefix: str, name: str) -> None:
    """Whatever passes the checks makes keys that a TCPStore takes."""
    try:
        check_prefix(prefix)
        check_name(Keys(prefix), name)
    except ValueError:
        return
    longest = Keys(prefix).phase(2**20, name, 2**40).payload(2**20)
    assert len(longest.encode()) <= MAX_KEY_BYTES


@given(
    st.one_of(
        st.builds(Released, ranks, st.binary(max_size=30)),
        st.builds(
            Broken,
            st.none() | ranks,
            texts,
            st.none() | st.floats(0.1, 1e6),
            st.lists(ranks, unique=True).map(tuple),
        ),
    )
)
def test_verdicts_survive_the_store(verdict: Released | Broken) -> None:
    """Decoding is the inverse of encoding, and no verdict looks like an absent key."""
    value = _verdict.encode(verdict)
    assert value
    assert _verdict.decode(value) == verdict


@pytest.mark.parametrize("value", [b"", b"x", b"r", b"rx\n", b"b", b"b{}", b"b[]", b'b{"a": 1}'])
def test_rubbish_is_no_verdict(value: bytes) -> None:
    """What no barrier wrote is not taken for a verdict."""
    with pytest.raises(ValueError):  # noqa: PT011
        _verdict.decode(value)


@given(logs, logs)
def test_a_decided_log_stays_decided(log: list[bytes], more: list[bytes]) -> None:
    """Appending never changes a verdict: the order decides once (law 2)."""
    decided = _verdict.judge(b"".join(log), WORLD, PHASE)
    if decided is not None:
        assert _verdict.judge(b"".join(log + more), WORLD, PHASE) == decided


@given(logs)
def test_what_follows_the_break_is_not_read(log: list[bytes]) -> None:
    """It is spared where it decides nothing, and nowhere else."""
    whole = b"".join(log)
    assert _verdict.judge(whole, WORLD, PHASE) == _verdict._judge.__wrapped__(whole, WORLD, PHASE)


@given(logs)
def test_released_means_that_all_arrived_before_any_break(log: list[bytes]) -> None:
    """No rubbish, duplicate or break makes up for a rank that is missing (laws 1 and 3)."""
    judged = _verdict.judge(b"".join(log), WORLD, PHASE)
    if not isinstance(judged, Released | Gathered):
        return
    arrived = set()
    for line in log:
        if line[:1] == b"l" or b'"sequence": 4' in line:
            continue
        assert line[:1] in b"acmk"
        arrived.add(int(line[1:].split()[0]))
        if len(arrived) == WORLD:
            break
    assert arrived == set(range(WORLD))


@given(st.sets(ranks))
def test_a_deadline_names_exactly_who_is_missing(arrived: set[int]) -> None:
    """Those that arrived before the break are not missing, those after it are (law 6)."""
    before = [_verdict.arrival(rank, None) for rank in arrived]
    after = [_verdict.arrival(rank, None) for rank in range(WORLD)]
    judged = _verdict.judge(
        b"".join([*before, _verdict.breaking(0, PHASE, "", 2.0), *after]), WORLD, PHASE
    )
    if len(arrived) == WORLD:
        assert isinstance(judged, Released)
    else:
        assert isinstance(judged, Broken)
        assert judged.missing == tuple(sorted(set(range(WORLD)) - arrived))
        assert _verdict.missing(b"x\n" + b"".join(before), WORLD) == judged.missing


def test_calls_that_differ_break() -> None:
    """A commit here and a barrier there, or two leaders, are told from each other."""
    judged = _verdict.judge(_verdict.arrival(1, None) + _verdict.arrival(2, 0), WORLD, PHASE)
    assert isinstance(judged, Broken)
    assert judged.rank == 2
    assert "commit(leader=0) where rank 1 called execute_barrier()" in judged.reason


@pytest.mark.parametrize(
    "line", [b"rubbish\n", b"a9\n", b"ax\n", b"c1\n", b"b\n", b"b[]\n", b"b{}\n"]
)
def test_foreign_lines_break(line: bytes) -> None:
    """What no barrier wrote breaks the phase, and says what it read."""
    judged = _verdict.judge(line, WORLD, PHASE)
    assert isinstance(judged, Broken)
    assert "something else wrote" in judged.reason


@given(st.sets(st.integers(0, 60)).map(lambda found: tuple(sorted(found))))
def test_summaries_survive_the_store(missing: tuple[int, ...]) -> None:
    """A list of missing ranks is short where they are neighbours, and exact."""
    assert _read_summary(b"7:" + _ranges(missing), 61) == (7, missing)
    assert _read_summary(b"7 by 3", 61) == (7, None)
