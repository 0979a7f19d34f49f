"""Generations: which process of a rank takes part, and which ranks are in the current one.

Every process that builds a barrier claims its rank in the present *generation*, and phases belong
to generations. If a process that has died (or left) holds the rank, the newcomer ends the
generation with one atomic write and claims its rank in the next. If that process answers, the
newcomer is refused. So one generation never holds two processes ("lives") of a rank. That is why a
count of arrivals can be trusted, and why a new process cannot pass a phase of an old one. A
generation's identity is never used again: a late message for an old one writes no key of a new one.

A member has a *bell*, a key that wakes it. Being woken says only: look around.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from .._errors import BarrierError, in_one_line
from .count import MAX_RANKS
from .keys import GenerationKeys, Keys
from .store import Add, Append, CompareSet, Delete, DeleteMany, Read, Request, Set, SetMany, Store
from .verdict import RUBBISH, number, show

# The fields of a generation's roll: how many ranks joined, no longer need the store, host it and
# wait for that, and are gone for good.
_FIELD = (1 << 15) - 1
_JOINED, _LEFT, _HOST, _GONE = 1, 1 << 15, 1 << 30, 1 << 45

# Whether the process of a life lives; None if only that process can tell.
Lives = Callable[["Life"], bool | None]
# Wait for a key, so many seconds at most; return whether it came.
WaitFor = Callable[[str, float], Any]

ANSWERS_SECS = 1.0


@dataclass(frozen=True)
class Life:
    """One process's claim to a rank.

    :ivar token: the id of this claim alone
    :ivar machine: tells machines, and process namespaces on them, apart
    :ivar started: the start time of the process, by its machine's clock; tells it from one with the
        same id
    """

    token: str
    host: str
    pid: int
    machine: str = ""
    started: str = ""
    run_id: str | None = None

    def __str__(self) -> str:
        run = "" if self.run_id is None else f", run {self.run_id!r}"
        return f"process {self.pid} on {self.host}{run}"


@dataclass(frozen=True)
class Member:
    """The entry of a rank: the life that holds it, and the generation that it joined last."""

    life: Life
    generation: str
    left: bool = False

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class State:
    """The generation in force.

    :ivar number: counts generations, for people
    :ivar by: the rank that ended the generation before
    """

    number: int
    identity: str
    world_size: int
    run_id: str | None = None
    by: int | None = None
    life: Life | None = None

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class Membership:
    """One life of a rank in one generation.

    :ivar complete: all ranks had joined when this one had
    """

    keys: Keys
    rank: int
    world_size: int
    claim: Member
    state: State
    complete: bool

    @cached_property
    def own(self) -> GenerationKeys:
        return self.keys.generation(self.state.identity)

    @property
    def bells(self) -> list[str]:
        """The bells of all ranks."""
        return _bells(self.keys, self.state)


@dataclass(frozen=True)
class Closed:
    """A rank left first: no phase of its generation will be released any more."""

    rank: int
    reason: str


@dataclass(frozen=True)
class Surroundings:
    """The findings of a member that looks around.

    :ivar successor: the generation in force now, if it is not its own; None if there is none
    :ivar over: its own generation is over
    :ivar complete: all ranks have joined it
    """

    over: bool
    successor: State | None
    complete: bool
    closed: Closed | None
    host_leaves: bool
    asked: bytes


def _bells(keys: Keys, state: State) -> list[str]:
    own = keys.generation(state.identity)
    return [own.bell(rank) for rank in range(state.world_size)]


async def join(
    store: Store,
    keys: Keys,
    rank: int,
    world_size: int,
    life: Life,
    *,
    lives: Lives,
    wait_for: WaitFor,
    before: Membership | None = None,
) -> Membership:
    """Claim ``rank`` in the present generation; end that first if another life held the rank there.

    :param life: a life that has not claimed a rank yet
    :param before: the membership that this process had before, if any
    :raises BarrierError: another living process holds the rank, or the ranks have another world
        size or run; or something else wrote to our keys
    """
    try:
        return await _join(store, keys, rank, world_size, life, lives, wait_for, before)
    except RUBBISH as exc:
        raise BarrierError(
            f"something else wrote to the keys of barrier {keys.prefix!r} in the store ({exc!r}); "
            "choose another prefix, or delete the keys under " + repr(keys.root)
        ) from exc


async def _join(
    store: Store,
    keys: Keys,
    rank: int,
    world_size: int,
    life: Life,
    lives: Lives,
    wait_for: WaitFor,
    before: Membership | None,
) -> Membership:
    while True:
        found, held = await store.call(Read(keys.state), Read(keys.member(rank)))
        if not found or number(found) is not None:
            # No rank is there. If all have left, as `clear` says, this is a restart.
            first = number(found) or 0
            by = rank if first else None
            state = State(first, _identity(first), world_size, life.run_id, by, life)
            if await _replaced(store, keys, found, state) is None:
                continue
            found = state.encode()
        state = _state(found)
        _check_run(keys, rank, life, state)
        if state.world_size != world_size:
            # If no process with the other size lives, the whole job came back with this size.
            other = await _anyone(store, keys, state, lives, wait_for)
            if other is not None:
                raise BarrierError(
                    f"rank {rank} of barrier {keys.prefix!r} was built with world size "
                    f"{world_size}, but its peers with {state.world_size} (rank {other}, which "
                    "lives, is one of them); all ranks must give the same"
                )
            await _end(store, keys, state, found, rank, world_size, life)
            continue
        holder = None if held is None else member_of(held)
        ours = holder is None or holder.left or holder == (before and before.claim)
        if (
            holder is not None
            and not ours
            and await _answers(store, keys, rank, holder, lives, wait_for)
        ):
            raise BarrierError(
                f"rank {rank} of barrier {keys.prefix!r} is held by {holder.life}, which is alive; "
                f"{life} is refused. Look for two processes with this rank, or for another job on "
                "this port; close a barrier before you build it again"
            )
        if holder is not None and holder.generation == state.identity:
            await _end(store, keys, state, found, rank, world_size, life)
            continue
        claim = Member(life, state.identity)
        mine = claim.encode()
        (now,) = await store.call(CompareSet(keys.member(rank), held or b"", mine))
        if now != mine:
            continue
        own = keys.generation(state.identity)
        requests: list[Request] = [Add(own.roll, _JOINED)]
        if not store.waits:
            requests.append(Add(own.threaded, 1))
        if holder is not None:
            # No other process deletes those of a life that is gone.
            old = keys.generation(holder.generation)
            spent = [old.bell(rank), old.asked(rank), old.answer(f"{rank}")]
            requests.append(DeleteMany(spent))
        roll, *_, current = await store.call(*requests, Read(keys.state))
        if current != found:
            # The generation ended meanwhile, and our claim with it.
            await store.call(DeleteMany([own.roll, own.threaded]))
            before = Membership(keys, rank, world_size, claim, state, False)
            life = replace(life, token=secrets.token_hex(8))
            continue
        complete = roll & _FIELD == world_size
        if complete and state.number:
            # Ranks that joined before wait for that.
            await store.call(SetMany(_bells(keys, state), b"all"))
        return Membership(keys, rank, world_size, claim, state, complete)


def _check_run(keys: Keys, rank: int, life: Life, state: State) -> None:
    if None not in (life.run_id, state.run_id) and life.run_id != state.run_id:
        who = "" if state.life is None else f" ({state.life} began it)"
        raise BarrierError(
            f"rank {rank} of barrier {keys.prefix!r} is of run {life.run_id!r} ({life}), but its "
            f"keys are those of run {state.run_id!r}{who}; it is refused. Is this another job's "
            "store? Give each job a port or a prefix of its own"
        )


def _identity(number: int) -> str:
    return f"{number}-{secrets.token_hex(8)}"


async def _replaced(store: Store, keys: Keys, found: bytes | None, state: State) -> State | None:
    """Put ``state`` in place of the one found; None if another process was faster."""
    (now,) = await store.call(CompareSet(keys.state, found or b"", state.encode()))
    return state if now == state.encode() else None


async def _end(
    store: Store, keys: Keys, state: State, found: bytes, rank: int, world_size: int, life: Life
) -> None:
    after_it = state.number + 1
    # A run's name outlives its generations.
    run_id = state.run_id if life.run_id is None else life.run_id
    after = State(after_it, _identity(after_it), world_size, run_id, rank, life)
    if await _replaced(store, keys, found, after) is not None:
        own = keys.generation(state.identity)
        await store.call(
            SetMany(_bells(keys, state), b"over"),
            DeleteMany(own.common),
        )


async def _anyone(
    store: Store, keys: Keys, state: State, lives: Lives, wait_for: WaitFor
) -> int | None:
    """A member of the generation that lives and has an open barrier."""
    ranks = range(state.world_size)
    for rank, held in zip(
        ranks, await store.call(*(Read(keys.member(r)) for r in ranks)), strict=True
    ):
        member = None if held is None else member_of(held)
        if member is None or member.left or member.generation != state.identity:
            continue
        if await _answers(store, keys, rank, member, lives, wait_for):
            return rank
    return None


async def _answers(
    store: Store, keys: Keys, rank: int, member: Member, lives: Lives, wait_for: WaitFor
) -> bool:
    """Whether a life is there: by this machine's knowledge, or by its own answer."""
    known = lives(member.life)
    if known is not None:
        return known
    own = keys.generation(member.generation)
    answer = own.answer(secrets.token_hex(8))
    await store.call(Append(own.asked(rank), answer.encode() + b"\n"), Set(own.bell(rank), b"?"))
    came = bool(await wait_for(answer, ANSWERS_SECS))
    await store.call(Delete(answer))
    return came


def around(membership: Membership) -> list[Request]:
    """The requests that look around, after taking the bell."""
    own = membership.own
    return [
        Delete(own.bell(membership.rank)),
        Read(membership.keys.state),
        Read(own.roll),
        Read(own.closed),
        Read(own.host_leaves),
        Read(own.asked(membership.rank)),
    ]


def surroundings(membership: Membership, replies: list[Any]) -> Surroundings:
    """The meaning of the answers to `around`."""
    found, roll, closed, host_leaves, asked = replies
    over = found != membership.state.encode()
    successor = None
    if found and over:
        try:
            successor = _state(found)
        except RUBBISH:
            successor = None
    return Surroundings(
        over,
        successor,
        all_joined(membership, roll),
        None if closed is None else _closed(closed),
        host_leaves is not None,
        asked or b"",
    )


def all_joined(membership: Membership, roll: bytes | None) -> bool:
    """Whether all ranks have joined, by the roll as read."""
    return (number(roll) or 0) & _FIELD >= membership.world_size


async def answer(store: Store, membership: Membership, asked: bytes, said: bytes) -> None:
    """Show all ranks that asked that this one lives.

    :param said: one line about what this rank does; see `presence`
    """
    own = membership.own
    root = own.answer("")
    answers = [key for key in asked.decode(errors="replace").split() if key.startswith(root)]
    if answers:
        await store.call(
            *(Append(key, said) for key in answers),
            CompareSet(own.asked(membership.rank), asked, b""),
        )


async def not_joined(store: Store, membership: Membership) -> tuple[int, ...]:
    """The ranks that have not joined this generation, sorted."""
    ranks = range(membership.world_size)
    found = await store.call(*(Read(membership.keys.member(rank)) for rank in ranks))
    absent = []
    for rank, held in zip(ranks, found, strict=True):
        try:
            if held is not None and member_of(held).generation == membership.state.identity:
                continue
        except RUBBISH:
            pass
        absent.append(rank)
    return tuple(absent)


async def still_holds(store: Store, membership: Membership) -> bool:
    """Whether the store still knows this life, and its generation is in force."""
    found, held = await store.call(
        Read(membership.keys.state), Read(membership.keys.member(membership.rank))
    )
    return bool(found == membership.state.encode() and held == membership.claim.encode())


async def leave(store: Store, membership: Membership, reason: str, *, hosts: bool) -> bool:
    """Say that this rank can never be waited for again.

    Only the first rank that leaves wakes the others: no phase is released without it, so later ones
    would tell nothing new.

    :param hosts: the store ends with this process
    :return: whether a rank is left that may still need the store
    """
    keys, rank, own = membership.keys, membership.rank, membership.own
    gone = replace(membership.claim, left=True).encode()
    closed = json.dumps({"rank": rank, "reason": in_one_line(reason)}).encode()
    requests: list[Request] = [
        # Not a plain write: another life may hold the rank by now.
        CompareSet(keys.member(rank), membership.claim.encode(), gone),
        CompareSet(own.closed, b"", closed),
        Add(own.roll, _LEFT + _GONE + (_HOST if hosts else 0)),
        Read(keys.state),
    ]
    if hosts:
        # A rank that sees that also sees which rank left first.
        requests.insert(2, Set(own.host_leaves, b"1"))
    _, first, roll, found = await store.call(*requests)
    if found != membership.state.encode():
        # The generation is over, so no rank uses what was just written.
        await store.call(Delete(own.roll), Delete(own.closed), Delete(own.bell(rank)))
        return False
    if await _counted(store, membership, roll):
        return False
    if first == closed or hosts:
        (now,) = await store.call(SetMany(membership.bells, b"left"), Read(keys.state))
        if now != found:
            # The last rank has cleared up meanwhile.
            await store.call(DeleteMany(membership.bells))
    return bool(roll // _LEFT & _FIELD < roll & _FIELD)


async def release_host(store: Store, membership: Membership) -> None:
    """Need the store no more, without having left; see `leave`."""
    (roll,) = await store.call(Add(membership.own.roll, _LEFT))
    await _counted(store, membership, roll)


async def part(store: Store, membership: Membership) -> None:
    """Be gone, after `release_host`."""
    (roll,) = await store.call(Add(membership.own.roll, _GONE))
    await _counted(store, membership, roll)


async def _counted(store: Store, membership: Membership, roll: int) -> bool:
    """Do the work of the last rank that leaves; return whether that is this rank."""
    joined = roll & _FIELD
    if roll // _HOST & _FIELD and roll // _LEFT & _FIELD >= joined:
        await store.call(Set(membership.own.all_left, b"1"))
    # In the first generation a rank may come later that has to learn that others have left.
    members = joined if membership.state.number else membership.world_size
    if roll // _GONE & _FIELD < members:
        return False
    await clear(store, membership)
    return True


async def clear(store: Store, membership: Membership) -> None:
    """Delete the keys of a generation that all its members have left.

    The state becomes the number of the next generation. It is not deleted: a newcomer may just have
    put its own there.
    """
    keys, own = membership.keys, membership.own
    after = b"%d" % (membership.state.number + 1)
    (now,) = await store.call(CompareSet(keys.state, membership.state.encode(), after))
    if now != after:
        return  # A newcomer was faster.
    spent = own.common
    for rank in range(membership.world_size):
        spent += [own.bell(rank), own.asked(rank), own.answer(f"{rank}")]
    await store.call(DeleteMany(spent))
    # Delete the claims, if they are still those of this generation.
    ranks = range(membership.world_size)
    found = await store.call(*(Read(keys.member(rank)) for rank in ranks))
    old = [
        keys.member(rank)
        for rank, held in zip(ranks, found, strict=True)
        if held is not None and membership.state.identity.encode() in held
    ]
    await store.call(DeleteMany(old))


def _state(value: bytes) -> State:
    entry = json.loads(value)
    life = entry["life"]
    state = State(
        int(entry["number"]),
        str(entry["identity"]),
        int(entry["world_size"]),
        entry["run_id"],
        entry["by"],
        None if life is None else Life(**life),
    )
    if not 0 < state.world_size <= MAX_RANKS or state.encode() != value:
        raise ValueError(show(value))
    return state


def member_of(value: bytes) -> Member:
    entry = json.loads(value)
    return Member(Life(**entry["life"]), str(entry["generation"]), bool(entry["left"]))


def _closed(value: bytes) -> Closed:
    try:
        entry = json.loads(value)
        return Closed(int(entry["rank"]), str(entry["reason"]))
    except RUBBISH:
        return Closed(-1, f"something else wrote {show(value)} where its members leave")
