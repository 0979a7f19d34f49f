"""Which life of which rank takes part: generations, and who is in the present one.

Every process that builds a barrier claims its rank in the present *generation*, and phases
live in generations. A rank that is claimed already was restarted (or shares its number by
mistake): the newcomer ends the generation with one atomic write and claims its rank in the
next one. So one generation never holds two lives of a rank, which is why a count of
arrivals can be trusted, and no phase of an old life can be passed by a new one.

Members of a generation that is over are woken by a key of their own, the *mail*.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass

from ._connection import Connection, countable
from ._errors import BarrierError
from ._keys import Keys

_JOINED = (1 << 31) - 1
_LEFT = 1 << 31
_HOST_LEAVES = 1 << 62
# How many ends of generations are remembered, for members that were asleep meanwhile.
_REMEMBERED = 8
# What reading a value raises that something else wrote.
_RUBBISH = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
_MOST_GENERATIONS = 2**31
# A job that is larger could not even write to the mail of all in one message.
_MOST_RANKS = 100_000
# How long a member takes at most to say that it lives.
_ANSWERS_SECS = 1.0
_LOOKS_EVERY_SECS = 0.02

OVER = b"over"
CLOSED = b"closed"
HOST_LEAVES = b"host leaves"
LETTERS = (OVER, CLOSED, HOST_LEAVES)
# Any member that lives takes it out of its mail.
_DO_YOU_LIVE = b"do you live?"


@dataclass(frozen=True)
class Membership:
    """One life of a rank in one generation."""

    keys: Keys
    rank: int
    world_size: int
    token: str
    generation: int

    @property
    def mail(self) -> str:
        return self.keys.mail(self.generation, self.rank)

    def is_over(self, store: Connection) -> bool:
        """Whether this generation was ended."""
        return store.read(self.keys.over(self.generation)) is not None

    def successor(self, store: Connection) -> int | None:
        """The rank that ended this generation; None where the store does not say (any more)."""
        value = store.read(self.keys.over(self.generation))
        try:
            return None if value is None else int(json.loads(value)["rank"])
        except _RUBBISH:
            return None

    def holds(self, store: Connection) -> bool:
        """Whether the store still knows this life, and its generation is not over."""
        return (
            store.read(self.keys.over(self.generation)) is None
            and store.read(self.keys.member(self.rank)) == self.claim
        )

    @property
    def claim(self) -> bytes:
        """What stands at this rank's place while this life holds it."""
        return _claim(self.generation, self.token)

    def not_joined(self, store: Connection) -> tuple[int, ...]:
        """The ranks that have not joined this generation, sorted."""
        ranks = range(self.world_size)
        found = store.read_many([self.keys.member(rank) for rank in ranks])
        return tuple(r for r in ranks if _last_generation(found[r]) < self.generation)

    def leave(self, store: Connection) -> None:
        """Tell a host that waits in `host_leave` that this rank needs the store no more."""
        roll = store.add(self.keys.roll(self.generation), _LEFT)
        if roll & _HOST_LEAVES and _all_left(roll):
            store.set(self.keys.all_left(self.generation), b"1")

    def host_leave(self, store: Connection) -> None:
        """Have all other members leave, and block until they have."""
        others = [self.keys.mail(self.generation, r) for r in range(self.world_size)]
        del others[self.rank]
        store.set_many(others, HOST_LEAVES)
        roll = store.add(self.keys.roll(self.generation), _HOST_LEAVES)
        # One counter holds both facts, so either the last one to leave sees that we wait,
        # or we see that it has left.
        if not _all_left(roll):
            store.await_value(self.keys.all_left(self.generation))

    def wait_no_longer(self, store: Connection) -> None:
        """End a `host_leave` under way on another connection."""
        store.set(self.keys.all_left(self.generation), b"1")


def _all_left(roll: int) -> bool:
    return roll // _LEFT & _JOINED >= (roll & _JOINED) - 1


def join(
    store: Connection,
    keys: Keys,
    rank: int,
    world_size: int,
    token: str,
    previous: Membership | None = None,
) -> Membership | None:
    """Claim ``rank`` in the present generation, ending it first if another life holds it.

    :return: ``previous`` itself where that membership still holds; None where a later life of
        this rank took our place, which is for good
    :raises BarrierError: the members have another world size and live, or this rank was a member
        before they were; or something else wrote to our keys
    """
    try:
        return _join(store, keys, rank, world_size, token, previous)
    except _RUBBISH as exc:
        raise BarrierError(
            f"something else wrote to the keys of barrier {keys.prefix!r} in the store ({exc!r}); "
            "choose another prefix, or delete the keys under " + repr(keys.root)
        ) from exc


def _join(
    store: Connection,
    keys: Keys,
    rank: int,
    world_size: int,
    token: str,
    previous: Membership | None,
) -> Membership | None:
    if previous is not None and _ousted(store, previous):
        return None
    while True:
        generation = _present(store, keys, world_size)
        mine = store.read(keys.member(rank))
        # Another life may have been faster, and be in a later one by now.
        generation = max(generation, _generation_of(mine))
        claim = _claim(generation, token)
        # Not where only our claim is of this generation: an attempt to join again that we gave
        # up on may have been carried out later, and we have not lived in it yet.
        if mine == claim and previous is not None and previous.generation == generation:
            return previous
        if previous is not None and mine is not None and _token_of(mine) != token:
            # The later life wins, or two processes that share a rank would oust each other
            # for ever.
            return None
        agreed = _size(store.compare_set(keys.world(generation), b"", b"%d" % world_size))
        # Where nobody lives who has the other size, the whole job came back with this one.
        if agreed != world_size and (
            previous is not None or _anyone_lives(store, keys, generation, agreed)
        ):
            raise BarrierError(
                f"rank {rank} of barrier {keys.prefix!r} was built with world size "
                f"{world_size}, but its peers with {agreed}; all ranks must give the same"
            )
        if agreed != world_size or (_generation_of(mine) == generation and mine != claim):
            _end(store, keys, generation, rank, token, world_size)
            continue
        if store.compare_set(keys.member(rank), mine or b"", claim) != claim:
            continue
        roll = store.read(keys.roll(generation)) or b"0"
        if not countable(roll):
            raise ValueError(roll)
        store.add(keys.roll(generation), 1)
        # The mail of a former life stays: it may live on, a duplicate that has to be told. If
        # this generation ended meanwhile, our mail says so already: no need to look.
        return Membership(keys, rank, world_size, token, generation)


def _present(store: Connection, keys: Keys, world_size: int) -> int:
    generation = _number(store.read(keys.generation) or b"0", _MOST_GENERATIONS)
    while store.read(keys.over(generation)) is not None:
        # Whoever ended it died before it could tell (or is just about to; twice is no harm).
        _tell(store, keys, generation, world_size)
        generation += 1
    return generation


def _ousted(store: Connection, membership: Membership) -> bool:
    """Whether a later life of this rank has ended the generation, to take our place."""
    value = store.read(membership.keys.over(membership.generation))
    if value is None:
        return False
    try:
        entry = json.loads(value)
        return bool(entry["rank"] == membership.rank and entry["token"] != membership.token)
    except _RUBBISH:
        return False


def _anyone_lives(store: Connection, keys: Keys, generation: int, size: int) -> bool:
    """Whether a member of ``generation``, which has ``size`` ranks, is there to answer."""
    mails = [keys.mail(generation, rank) for rank in range(size)]
    store.set_many(mails, _DO_YOU_LIVE)
    deadline = time.monotonic() + _ANSWERS_SECS
    while time.monotonic() < deadline:
        # Not read: it may go between being looked for and being got, which would wait for it.
        if not all(map(store.exists, mails)):
            return True
        time.sleep(_LOOKS_EVERY_SECS)  # no store tells when a key is deleted
    return False


def _end(
    store: Connection, keys: Keys, generation: int, rank: int, token: str, world_size: int
) -> None:
    entry = json.dumps({"rank": rank, "token": token}).encode()
    store.compare_set(keys.over(generation), b"", entry)
    _tell(store, keys, generation, world_size)
    if generation >= _REMEMBERED:
        for spent in (keys.over, keys.world, keys.roll, keys.all_left):
            store.delete(spent(generation - _REMEMBERED))
    _sweep(store, keys, generation - 1, world_size)


def _tell(store: Connection, keys: Keys, generation: int, world_size: int) -> None:
    # Its members may be more than the newcomer has peers.
    with contextlib.suppress(ValueError):
        world_size = max(world_size, _size(store.read(keys.world(generation)) or b""))
    store.set_many([keys.mail(generation, rank) for rank in range(world_size)], OVER)
    store.set(keys.generation, b"%d" % (generation + 1))


def _sweep(store: Connection, keys: Keys, upto: int, world_size: int) -> None:
    """Delete what the dead of generations before ``upto`` left behind, where keys can be listed.

    Not where a rank has yet to leave: one that is cut off or asleep may still come to a phase
    there, and has to find what was decided, not a log without the lines of the others.
    """
    marks = (f"{keys.root}/phase/", f"{keys.root}/mail/")
    found = [
        (int(number), key)
        for key in store.list_keys()
        for mark in marks
        if key.startswith(mark) and (number := key[len(mark) :].partition("/")[0]).isdecimal()
    ]
    if not any(generation < upto for generation, _ in found):
        return
    members = store.read_many([keys.member(rank) for rank in range(world_size)])
    upto = min([upto, *(_last_generation(member) for member in members if member is not None)])
    for generation, key in found:
        if generation < upto:
            store.delete(key)


def _claim(generation: int, token: str) -> bytes:
    return json.dumps({"generation": generation, "token": token}).encode()


def _token_of(member: bytes) -> str:
    return str(json.loads(member)["token"])


def _generation_of(member: bytes | None) -> int:
    if member is None:
        return -1
    generation = int(json.loads(member)["generation"])
    if generation > _MOST_GENERATIONS:
        raise ValueError(member)
    return generation


def _last_generation(member: bytes | None) -> int:
    """As `_generation_of`, for another rank; what something else wrote there is none of it."""
    try:
        return _generation_of(member)
    except _RUBBISH:
        return -1


def _size(value: bytes) -> int:
    return _number(value, _MOST_RANKS)


def _number(value: bytes, most: int) -> int:
    if not (countable(value) and int(value) <= most):
        raise ValueError(value)
    return int(value)
