"""Claiming a rank in the present generation, or in the next; see `membership`.

A newcomer asks the life that holds its rank, where the machine cannot tell whether it is there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .._errors import BarrierConnectionError, BarrierError
from .keys import Keys
from .membership import (
    FIELD,
    JOINED,
    Life,
    Member,
    Membership,
    State,
    bells_of,
    member_of,
    state_of,
)
from .presence import decode_answers
from .store import Add, Append, CompareSet, Delete, Read, Request, SetMany, Store
from .verdict import RUBBISH, number

# Whether the process of a life lives; None if only that process can tell.
Lives = Callable[["Life"], bool | None]
# Wait for a key, so many seconds at most; return whether it came.
WaitFor = Callable[[str, float], Any]

ANSWERS_SECS = 1.0
# In worlds of up to so many ranks, each looks whether a member that joined before it has died; in
# larger ones, the rank that joins last.
_FEW = 256
# How often, and how long, to wait for a claim that is being deleted.
_DELETED_TRIES, _DELETED_SECS = 10, 0.05


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
    claims = [] if before is None else [before.claim]
    try:
        return await _join(store, keys, rank, world_size, life, lives, wait_for, before, claims)
    except BarrierError as exc:
        if claims and not isinstance(exc, BarrierConnectionError):
            # It was refused and lives on, but not as this rank: another process may claim that.
            left = [(claim, replace(claim, left=True)) for claim in claims]
            key = keys.member(rank)
            await store.call(*(CompareSet(key, was.encoded, now.encoded) for was, now in left))
        raise
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
    claims: list[Member],
) -> Membership:
    """:param claims: gets each claim that it writes"""
    # The state that this call has put there, and told the members before it of.
    told: str | None = None
    waits = _DELETED_TRIES
    while True:
        looks = world_size if world_size <= _FEW else 0
        found, held, *others = await store.call(
            Read(keys.state), Read(keys.member(rank)), *_members(keys, looks)
        )
        if not found or number(found) is not None:
            # No rank is there. If all have left, as `clear` says, this is a restart.
            # If this rank was a member in another store, its peers may have been, too.
            first = number(found) or (0 if before is None else before.state.number + 1)
            by = rank if first else None
            identity = f"{first}-{secrets.token_hex(8)}"
            state = State(first, identity, world_size, life.run_id, by, life)
            if await _replaced(store, keys, found, state) is None:
                continue
            found, told = state.encoded, state.identity
        state = state_of(found)
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
            told = await _end(store, keys, state, rank, world_size, life)
            continue
        if held == b"" and waits:
            # The last rank that left has emptied it, and deletes it now.
            waits -= 1
            await wait_for(keys.member(rank) + "/deleted", _DELETED_SECS)
            continue
        holder = member_of(held) if held else None
        ours = holder is None or holder.left or holder == (before and before.claim)
        taken = {} if holder is None or ours else {rank: holder}
        if await _living(store, keys, taken, lives, wait_for) is not None:
            raise BarrierError(
                f"rank {rank} of barrier {keys.prefix!r} is held by {taken[rank].life}, which is "
                f"alive; {life} is refused. Look for two processes with this rank, or for another "
                "job on this port; close a barrier before you build it again"
            )
        if holder is not None and holder.generation == state.identity:
            told = await _end(store, keys, state, rank, world_size, life)
            continue
        if (dead := _dead(others, state, life, lives)) is not None:
            told = await _end(store, keys, state, dead, world_size, life, died=True)
            continue
        claim = Member(life, state.identity)
        claims.append(claim)
        mine = claim.encoded
        (now,) = await store.call(CompareSet(keys.member(rank), held or b"", mine))
        if now != mine:
            continue
        own = keys.generation(state.identity)
        requests: list[Request] = [Add(own.roll, JOINED)]
        if not store.waits:
            requests.append(Add(own.threaded, 1))
        if state.identity != told and _ended(state, rank, life):
            # It was lost before it could tell the members.
            ended = {member_of(each).generation for each in (held, *others) if each}
            for generation in ended - {state.identity}:
                bells = bells_of(keys, replace(state, identity=generation))
                requests.append(SetMany(bells, b"over"))
        if holder is not None:
            # No other process deletes those of a life that is gone.
            old = keys.generation(holder.generation)
            spent = [old.bell(rank), old.asked(rank), old.answer(f"{rank}")]
            requests.append(Delete(spent))
        roll, *_, current = await store.call(*requests, Read(keys.state))
        complete = roll & FIELD == world_size
        if complete and not looks:
            others = await store.call(*_members(keys, world_size))
            if (dead := _dead(others, state, life, lives)) is not None:
                await _end(store, keys, state, dead, world_size, life, died=True)
                current = None
        if current != found:
            # The generation ended meanwhile, and our claim with it.
            await store.call(Delete([own.roll, own.threaded]))
            before = Membership(keys, rank, world_size, claim, state, False)
            life = replace(life, token=secrets.token_hex(8))
            continue
        if complete and state.number:
            # Ranks that joined before wait for that.
            await store.call(SetMany(bells_of(keys, state), b"all"), Read(keys.state))
        return Membership(keys, rank, world_size, claim, state, complete)


def _check_run(keys: Keys, rank: int, life: Life, state: State) -> None:
    if None not in (life.run_id, state.run_id) and life.run_id != state.run_id:
        who = "" if state.life is None else f" ({state.life} began it)"
        raise BarrierError(
            f"rank {rank} of barrier {keys.prefix!r} is of run {life.run_id!r} ({life}), but its "
            f"keys are those of run {state.run_id!r}{who}; it is refused. Is this another job's "
            "store? Give each job a port or a prefix of its own"
        )


async def _replaced(store: Store, keys: Keys, found: bytes | None, state: State) -> State | None:
    """Put ``state`` in place of the one found; None if another process was faster."""
    (now,) = await store.call(CompareSet(keys.state, found or b"", state.encoded))
    return state if now == state.encoded else None


def _members(keys: Keys, world_size: int) -> list[Request]:
    return [Read(keys.member(rank)) for rank in range(world_size)]


def _dead(found: list[Any], state: State, life: Life, lives: Lives) -> int | None:
    """A member whose process is known to have ended: its successor would end the generation under
    this rank, which never met it. None if there is none; another machine's cannot be known."""
    identity, machine = state.identity.encode(), life.machine.encode()
    for rank, held in enumerate(found):
        # To decode thousands of them takes long.
        if held is None or identity not in held or machine not in held:
            continue
        member = member_of(held)
        ours = (member.life.machine, member.life.pid) == (life.machine, life.pid)
        if not member.left and not ours and lives(member.life) is False:
            return rank
    return None


async def _end(
    store: Store, keys: Keys, state: State, by: int, world_size: int, life: Life, died: bool = False
) -> str | None:
    """End a generation, and tell its members; the one after it, unless another rank was faster."""
    identity = f"{state.number + 1}-{secrets.token_hex(8)}"
    # A run's name outlives its generations.
    run_id = state.run_id if life.run_id is None else life.run_id
    after = State(state.number + 1, identity, world_size, run_id, by, life, died)
    if await _replaced(store, keys, state.encoded, after) is None:
        return None
    own = keys.generation(state.identity)
    over = SetMany(bells_of(keys, state), b"over")
    await store.call(over, Delete(own.common), Read(keys.state))
    return after.identity


def _ended(state: State, rank: int, life: Life) -> bool:
    """Whether this rank ended the generation before, or this process, as a member had died."""
    by = state.life
    ours = by is not None and (by.machine, by.pid) == (life.machine, life.pid)
    return state.number > 0 and (state.by == rank or (state.died and ours))


async def _anyone(
    store: Store, keys: Keys, state: State, lives: Lives, wait_for: WaitFor
) -> int | None:
    """A member of the generation that lives and has an open barrier."""
    members = {}
    for rank, held in enumerate(await store.call(*_members(keys, state.world_size))):
        if held and state.identity.encode() in held and not (member := member_of(held)).left:
            members[rank] = member
    return await _living(store, keys, members, lives, wait_for)


async def _living(
    store: Store, keys: Keys, members: Mapping[int, Member], lives: Lives, wait_for: WaitFor
) -> int | None:
    """One of these members of one generation whose life is there: by this machine's knowledge, or
    by its own answer."""
    asked: list[int] = []
    for rank, member in members.items():
        known = lives(member.life)
        if known:
            return rank
        if known is None:
            asked.append(rank)
    if not asked:
        return None
    own = keys.generation(members[asked[0]].generation)
    answer = own.answer(secrets.token_hex(8))
    ask = [Append(own.asked(rank), answer.encode() + b"\n") for rank in asked]
    await store.call(*ask, SetMany([own.bell(rank) for rank in asked], b"?"))
    came = bool(await wait_for(answer, ANSWERS_SECS))
    said, _ = await store.call(Read(answer), Delete([answer]), Read(keys.state))
    return min(decode_answers(said), default=asked[0]) if came else None
