"""Counts and verdicts, by their properties."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from async_barriers._errors import in_one_line
from async_barriers._protocol import count as counts
from async_barriers._protocol import verdict as verdicts
from async_barriers._protocol.count import COMMIT, EXECUTE, GATHER, MAX_RANKS, Count
from async_barriers._protocol.keys import Keys
from async_barriers._protocol.phase import Entry, entered
from async_barriers._protocol.verdict import Broken, Released, differing

WORLD = 5
KINDS = (EXECUTE, COMMIT, GATHER)
texts = st.text(max_size=12).map(in_one_line)
worlds = st.integers(1, 40) | st.just(MAX_RANKS)
kinds = st.sampled_from(KINDS)


@settings(max_examples=50)
@given(worlds, kinds, st.integers())
def test_full_when_every_rank_entered_once(world_size: int, kind: int, seed: int) -> None:
    """In whatever order, and at no time before; nothing looks foul or different meanwhile."""
    ranks = list(range(world_size))
    random.Random(seed).shuffle(ranks)
    total = 0
    # Of the largest world, its beginning and its end.
    for number, rank in enumerate(ranks):
        if 20 < number < world_size - 20:
            total += counts.entry(rank, kind)
            continue
        count = counts.of_sum(total)
        assert count.arrived == number
        assert not count.full(world_size, kind)
        assert not count.foul(world_size)
        assert not count.differs(kind)
        total += counts.entry(rank, kind)
    count = counts.of_sum(total)
    assert count.full(world_size, kind)
    assert not count.foul(world_size)
    assert not count.broken
    assert not any(count.full(world_size, other) for other in KINDS if other != kind)
    assert 0 < total < 1 << 63
    assert counts.of_value(b"%d" % total).value == total


@given(worlds, st.data())
def test_a_different_call_is_noticed(world_size: int, data: st.DataObject) -> None:
    """By the first rank that differs; and who calls no commit never takes the count for full."""
    size = min(world_size, 12)
    calls = data.draw(
        st.lists(
            st.tuples(st.sampled_from(KINDS), st.integers(0, size - 1)),
            min_size=size,
            max_size=size,
        )
    )
    calls = [(kind, leader if kind == counts.COMMIT else -1) for kind, leader in calls]
    codes = [counts.code(*call, size) for call in calls]
    total, noticed = 0, []
    for rank, code in enumerate(codes):
        total += counts.entry(rank, code)
        count = counts.of_sum(total)
        if count.differs(code):
            noticed.append(rank)
    first = next((rank for rank in range(size) if calls[rank] != calls[0]), None)
    assert noticed[:1] == ([] if first is None else [first])
    if first is not None:
        at = counts.of_sum(sum(map(counts.entry, range(first + 1), codes)))
        kind, leader = calls[0]
        call = f"commit(leader={leader})" if kind == counts.COMMIT else counts.CALLS[kind]
        assert at.others(first, codes[first], size) == ("rank 0" if first == 1 else "others", call)
        full = [calls[rank] for rank, code in enumerate(codes) if count.full(size, code)]
        assert all(kind == counts.COMMIT for kind, _ in full)


@given(worlds)
def test_no_field_runs_over(world_size: int) -> None:
    """Whatever all ranks call, and whichever leader they name."""
    leaders = {0, world_size - 1, world_size // 2}
    calls = [(counts.EXECUTE, -1), (counts.GATHER, -1), *((counts.COMMIT, at) for at in leaders)]
    for call in calls:
        code = counts.code(*call, world_size)
        count = counts.of_sum(sum(counts.entry(rank, code) for rank in range(world_size)))
        assert count.full(world_size, code)
        assert 0 < count.value < 1 << 63
    known = len({counts.code(counts.COMMIT, leader, world_size) for leader in range(world_size)})
    assert known == world_size or world_size > 1023


arrivals = st.lists(st.tuples(st.integers(0, WORLD - 1), kinds), max_size=8)


@given(arrivals, kinds)
def test_no_duplicate_makes_up_for_who_is_missing(
    arrived: list[tuple[int, int]], kind: int
) -> None:
    """Of as many arrivals as there are ranks, those of all with one call are full; of others, it
    is known that they never will be (laws 1 and 2)."""
    count = counts.of_sum(sum(counts.entry(*arrival) for arrival in arrived))
    ranks = sorted(rank for rank, _ in arrived)
    alike = all(each == kind for _, each in arrived)
    if count.full(WORLD, kind) and ranks != list(range(WORLD)):
        # What a sum of ranks cannot tell: 1 and 1 for 0 and 2. Two lives of a rank are never in
        # one generation, so one duplicate is the most that a mistake makes.
        assert len(ranks) == WORLD
        assert sum(ranks) == sum(range(WORLD))
        assert WORLD - len(set(ranks)) > 1 or len(set(ranks)) < WORLD
    if ranks == list(range(WORLD)) and alike:
        assert count.full(WORLD, kind)
    if len(ranks) != WORLD or sum(ranks) != sum(range(WORLD)):
        assert not count.full(WORLD, kind)
    if len(ranks) > WORLD:
        assert count.foul(WORLD)
    if alike:
        assert not count.differs(kind)


@given(worlds.filter(lambda size: size > 1), kinds, st.data())
def test_one_rank_twice_is_found(world_size: int, kind: int, data: st.DataObject) -> None:
    """It stands in for nobody, whoever is missing."""
    ranks = st.integers(0, world_size - 1)
    missing, twice = data.draw(ranks), data.draw(ranks)
    assume(missing != twice)
    total = sum(counts.entry(rank, kind) for rank in range(world_size) if rank != missing)
    count = counts.of_sum(total + counts.entry(twice, kind))
    assert not count.full(world_size, kind)
    assert count.foul(world_size)


class Register:
    """A count as a store keeps it, and what a rank that breaks does with it."""

    def __init__(self) -> None:
        self.value = 0

    @property
    def count(self) -> Count:
        return counts.of_value(b"%d" % self.value)

    def enter(self, rank: int, kind: int) -> Count:
        self.value += counts.entry(rank, kind)
        return counts.of_sum(self.value)

    def break_from(self, seen: Count, rank: int) -> bool:
        """As `phase.give_up`, from what was read; whether the compare-and-set was done."""
        if seen.value != self.value:
            return False
        self.value = int(seen.broken_by(rank))
        return True

    def break_unentered(self) -> bool:
        """As `breaking.break_unentered`; whether this broke it."""
        self.value += counts.BREAKING
        assert -(1 << 63) <= self.value < 0
        return not counts.of_sum(self.value - counts.BREAKING).broken


@given(kinds, st.permutations(range(WORLD)), st.lists(st.booleans(), min_size=9, max_size=9))
def test_what_is_full_is_not_broken_nor_the_reverse(
    kind: int, order: list[int], gives_up: list[bool]
) -> None:
    """By those operations: a verdict, once there, stays (law 2); all that come see it."""
    register, broke = Register(), False
    stale = register.count
    for rank, gives in zip(order, gives_up, strict=False):
        if gives and not register.count.broken and not register.count.full(WORLD, kind):
            # One that has read before somebody entered breaks nothing.
            seen = stale if stale.value != register.value else register.count
            broke = register.break_from(seen, rank)
            broke = broke or register.count.broken
        stale = register.count
        seen = register.enter(rank, kind)
        assert seen.broken == broke == register.count.broken
        assert not (seen.broken and seen.full(WORLD, kind))
        assert seen.arrived == counts.of_sum(register.value).arrived
    assert register.count.full(WORLD, kind) != broke
    # All have entered: whoever breaks it now has read what it was before.
    assert register.count.full(WORLD, kind) or not register.break_from(stale, 0)


@example((counts.FEW, [0] * (counts.FEW - 1)), counts.EXECUTE)
@given(
    st.sampled_from([1, 2, 3, WORLD, counts.FEW]).flatmap(
        lambda size: st.tuples(st.just(size), st.lists(st.integers(0, 2), max_size=size))
    ),
    kinds,
)
def test_who_has_not_entered_breaks_without_looking(
    world: tuple[int, list[int]], kind: int
) -> None:
    """Whatever the others do meanwhile, and all of them: it never is full, and one broke it."""
    size, does = world
    code = counts.code(kind, 0, size)
    register, ours, entered = Register(), 0, 0
    for rank, what in enumerate([*does, *[1] * (size - len(does))]):
        if what == 0:
            register.enter(rank, code)
            entered += 1
        elif what == 1:
            ours += register.break_unentered()
        elif not register.count.broken:
            ours += register.break_from(register.count, rank)
        assert not register.count.full(size, code) or entered == size
        assert register.count.arrived == entered
    assert ours == (entered < size) == register.count.broken


@given(
    st.integers(0, MAX_RANKS),
    kinds,
    st.lists(st.integers(0, MAX_RANKS - 1), min_size=2, max_size=9, unique=True),
)
def test_breaking_keeps_who_arrived(size: int, kind: int, by: list[int]) -> None:
    """Later arrivals can be counted, and tell from it; and of all that break it, one did."""
    total = sum(counts.entry(rank, kind) for rank in range(size))
    before = counts.of_sum(total)
    values = [before.broken_by(rank) for rank in by]
    assert len({*values}) == len(by)
    broken = counts.of_value(values[0])
    assert broken.broken
    assert (broken.arrived, broken.codes) == (before.arrived, before.codes)
    assert -(1 << 63) <= broken.value < 0
    later = counts.of_sum(broken.value + counts.entry(MAX_RANKS - 1, kind))
    assert later.broken
    assert later.arrived == size + 1


@given(st.integers(0, (1 << 63) - 1), st.integers(0, MAX_RANKS - 1))
def test_whatever_was_counted_can_be_broken(total: int, by: int) -> None:
    """Also a number that no ranks add up to."""
    broken = counts.of_value(counts.of_sum(total).broken_by(by))
    assert broken.broken
    assert broken.value >= -(1 << 63)


@given(st.binary(max_size=25) | st.integers().map(lambda n: b"%d" % n))
def test_what_is_no_count(value: bytes) -> None:
    """It is not read as one; what is, is a number that a store could add to."""
    try:
        count = counts.of_value(value)
    except ValueError:
        assert not counts.is_count(value)
        return
    assert counts.is_count(value)
    assert count.value == int(value or b"0")
    assert not Count(count.value).full(WORLD, EXECUTE) or count.arrived == WORLD


def test_an_absent_count_is_empty() -> None:
    """As `add` takes it."""
    assert counts.of_value(None).value == counts.of_value(b"").value == 0


def entry(rank: int, kind: int = EXECUTE, leader: int = -1) -> Entry:
    phase = Keys("p").generation("0-ab").phase("", "0")
    return Entry(phase, rank, WORLD, kind, leader)


def test_calls_that_differ_break() -> None:
    """A commit here and a barrier there, or two leaders, are told from each other."""
    mine = entry(2, COMMIT, 0)
    total = counts.entry(1, counts.code(EXECUTE, -1, WORLD)) + counts.entry(2, mine.code)
    judged = entered(mine, [total])
    assert isinstance(judged, Broken)
    assert judged.rank == 2
    assert "commit(leader=0) where rank 1 called execute_barrier()" in judged.reason
    total = counts.entry(2, mine.code)
    total += sum(counts.entry(rank, counts.code(COMMIT, 1, WORLD)) for rank in (0, 3))
    judged = entered(mine, [total])
    assert isinstance(judged, Broken)
    assert "commit(leader=0) where others called commit(leader=1)" in judged.reason
    assert differing(b"1 c0 =YQ==\nrubbish\n3 c0 -\n3d\n") is None
    differs = differing(b"1 c0 =\n3 c2 =\n")
    assert differs is not None
    assert "commit(leader=2) where rank 1 called commit(leader=0)" in differs.reason


ranks = st.integers(0, WORLD - 1)
broken = st.builds(
    Broken,
    st.none() | ranks,
    texts,
    st.none(),
    st.just(()),
    st.booleans(),
) | st.builds(
    Broken,
    st.none() | ranks,
    texts,
    st.floats(0.1, 1e6),
    st.sets(ranks).map(lambda found: tuple(sorted(found))),
    st.booleans(),
)


@given(st.builds(Released, st.none(), st.binary()) | broken)
def test_verdicts_survive_the_store(verdict: Released | Broken) -> None:
    """Decoding is the inverse of encoding, and no verdict looks like an absent key."""
    word = verdicts.encode_word(verdict)
    assert word
    assert verdicts.decode_word(word) == verdict
    if isinstance(verdict, Broken):
        assert verdicts.decode_reason(verdicts.encode_reason(verdict)) == verdict


@given(st.binary(max_size=40))
@example(b"rubbish")
@example(b"broken")
@example(b"")
def test_rubbish_is_no_word(value: bytes) -> None:
    """What no leader wrote is not taken for its release, nor for its refusal."""
    assume(not value.startswith((b"published\n", b"broken\n")))
    with pytest.raises(ValueError):  # noqa: PT011
        verdicts.decode_word(value)


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rank", "reason", "timeout_secs", "missing", "x"]), inner
        )
    ),
    max_leaves=6,
)


@given(st.binary(max_size=30) | json_values.map(lambda value: json.dumps(value).encode()))
@example(b"{}")
@example(b'{"rank": 1, "reason": "x", "missing": "0-99999999999"}')
def test_rubbish_is_a_reason_that_says_so(value: bytes) -> None:
    """A phase whose reason was overwritten is broken all the same, and says by what."""
    reason = verdicts.decode_reason(value)
    assert isinstance(reason.reason, str)
    if not reason.reason.startswith("something else wrote"):
        assert json.loads(value)["reason"] == reason.reason


@given(st.sets(ranks), st.binary(max_size=20))
def test_a_log_names_exactly_who_is_missing(arrived: set[int], rubbish: bytes) -> None:
    """Whatever else stands there (law 6)."""
    lines = [b"%d\n" % rank for rank in arrived]
    absent = tuple(sorted(set(range(WORLD)) - arrived))
    assert verdicts.missing(b"".join(lines), WORLD) == absent
    assume(not any(word.isdigit() for word in rubbish.split()))
    assert verdicts.missing(b"".join([*lines, rubbish, b"\n"]), WORLD) == absent


@given(st.sets(st.integers(0, 60) | st.integers(0, MAX_RANKS)))
def test_ranges_survive_the_store(found: set[int]) -> None:
    """A list of missing ranks is short where they are neighbours, and exact."""
    absent = tuple(sorted(found))
    assert verdicts.unranged(verdicts.ranges(absent)) == absent
    assert verdicts.ranges(range(MAX_RANKS)) == f"0-{MAX_RANKS - 1}"


@pytest.mark.parametrize("text", ["x", "1-x", "-1", "1,,2", "0-99999999", "99999999"])
def test_what_is_no_range(text: str) -> None:
    """Nor may rubbish take all memory there is."""
    with pytest.raises(ValueError):  # noqa: PT011
        verdicts.unranged(text)
