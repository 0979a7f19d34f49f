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

import contextlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .count import MAX_RANKS
from .keys import GenerationKeys, Keys
from .store import Append, CompareSet, Delete, Read, Request, Store
from .verdict import RUBBISH, number, show

# The fields of a generation's roll: how many ranks joined, no longer need the store, host it and
# wait for that, and are gone for good.
FIELD = (1 << 15) - 1
JOINED, LEFT, HOST, GONE = 1, 1 << 15, 1 << 30, 1 << 45


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


class Record:
    """What is written as JSON."""

    @cached_property
    def encoded(self) -> bytes:
        return json.dumps(vars(self), default=vars).encode()


@dataclass(frozen=True)
class Member(Record):
    """The entry of a rank: the life that holds it, and the generation that it joined last."""

    life: Life
    generation: str
    left: bool = False


@dataclass(frozen=True)
class State(Record):
    """The generation in force.

    :ivar number: counts generations, for people
    :ivar by: the rank that ended the generation before, or whose process had died
    :ivar died: the latter
    """

    number: int
    identity: str
    world_size: int
    run_id: str | None = None
    by: int | None = None
    life: Life | None = None
    died: bool = False


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
        return bells_of(self.keys, self.state)

    @property
    def peers(self) -> list[str]:
        """The bells of all other ranks."""
        return [bell for rank, bell in enumerate(self.bells) if rank != self.rank]


@dataclass(frozen=True)
class Closed(Record):
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


def bells_of(keys: Keys, state: State) -> list[str]:
    own = keys.generation(state.identity)
    return [own.bell(rank) for rank in range(state.world_size)]


def around(membership: Membership) -> list[Request]:
    """The requests that look around: the first takes the bell, the last one reads the roll."""
    own = membership.own
    return [
        Delete([own.bell(membership.rank)]),
        Read(membership.keys.state),
        Read(own.host_leaves),
        Read(own.closed),
        Read(own.asked(membership.rank)),
        Read(own.roll),
    ]


def surroundings(membership: Membership, replies: list[Any]) -> Surroundings:
    """The meaning of the answers to `around`."""
    found, host_leaves, closed, asked, roll = replies
    over = found != membership.state.encoded
    successor = None
    if found and over:
        with contextlib.suppress(*RUBBISH):
            successor = state_of(found)
    return Surroundings(
        over, successor, all_joined(membership, roll), None if closed is None else _closed(closed),
        host_leaves is not None, asked or b"",
    )  # fmt: skip


def all_joined(membership: Membership, roll: bytes | None) -> bool:
    """Whether all ranks have joined, by the roll as read."""
    return (number(roll) or 0) & FIELD >= membership.world_size


class RollReader:
    """A store that reads the roll at the end of each message.

    :ivar complete: all ranks had joined when the latest one was carried out
    """

    def __init__(self, store: Store, membership: Membership) -> None:
        self._store, self._membership = store, membership
        self.waits = store.waits
        self.complete = False

    async def call(self, *requests: Request, wait: str | None = None) -> list[Any]:
        read = Read(self._membership.own.roll)
        *answers, roll = await self._store.call(*requests, read, wait=wait)
        self.complete = all_joined(self._membership, roll)
        return answers


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
    # Not decoded, which takes long in large worlds.
    joined = membership.state.identity.encode()
    each = zip(ranks, found, strict=True)
    return tuple(rank for rank, held in each if held is None or joined not in held)


async def still_holds(store: Store, membership: Membership) -> bool:
    """Whether the store still knows this life, and its generation is in force."""
    keys = membership.keys
    found, held = await store.call(Read(keys.state), Read(keys.member(membership.rank)))
    return bool(found == membership.state.encoded and held == membership.claim.encoded)


def state_of(value: bytes) -> State:
    entry = json.loads(value)
    life = entry["life"]
    state = State(
        int(entry["number"]),
        str(entry["identity"]),
        int(entry["world_size"]),
        entry["run_id"],
        entry["by"],
        None if life is None else Life(**life),
        bool(entry["died"]),
    )
    if not 0 < state.world_size <= MAX_RANKS or state.encoded != value:
        raise ValueError(show(value))
    return state


def member_of(value: bytes) -> Member:
    entry = json.loads(value)
    return Member(Life(**entry["life"]), str(entry["generation"]), bool(entry["left"]))


def _closed(value: bytes) -> Closed:
    try:
        # The first one: see `leaving.last_words`.
        entry, _ = json.JSONDecoder().raw_decode(value.decode())
        return Closed(int(entry["rank"]), str(entry["reason"]))
    except RUBBISH:
        return Closed(-1, f"something else wrote {show(value)} where its members leave")
