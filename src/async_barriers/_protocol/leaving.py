"""Leaving a generation; the last rank that is gone deletes its keys. See `membership`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from .._errors import in_one_line
from .membership import FIELD, GONE, HOST, LEFT, Membership
from .store import Add, CompareSet, Delete, Read, Request, Set, SetMany, Store
from .unfinished import keys_of, naming
from .verdict import number


async def leave(
    store: Store,
    membership: Membership,
    reason: str,
    *,
    hosts: bool,
    unfinished: Mapping[str, str],
    again: bool = False,
) -> bool:
    """Say that this rank can never be waited for again.

    Only the first rank that leaves wakes the others: no phase is released without it, so later ones
    would tell nothing new.

    :param hosts: the store ends with this process
    :param unfinished: the phases that this rank names; see `unfinished`
    :param again: it may have been said before, when a signal handler interrupted this rank
    :return: whether a rank is left that may still need the store
    """
    keys, rank, own = membership.keys, membership.rank, membership.own
    gone = replace(membership.claim, left=True).encoded
    counts: Request = Add(own.roll, LEFT + GONE + (HOST if hosts else 0))
    if again and await store.call(Read(keys.member(rank))) == [gone]:
        # One counted twice would pass for another rank, and the keys would go under that one.
        counts = Read(own.roll)
    closed = json.dumps({"rank": rank, "reason": in_one_line(reason)}).encode()
    requests: list[Request] = [
        # Not a plain write: another life may hold the rank by now.
        CompareSet(keys.member(rank), membership.claim.encoded, gone),
        CompareSet(own.closed, b"", closed),
        counts,
        Read(keys.state),
    ]
    if hosts:
        # A rank that sees that also sees which rank left first.
        requests.insert(2, Set(own.host_leaves, b"1"))
    requests[:0] = naming(own, unfinished)
    _, first, counted, found = await store.call(*requests)
    roll = counted if isinstance(counted, int) else number(counted) or 0
    if found != membership.state.encoded:
        # The generation is over, so no rank uses what was just written.
        spent = [own.roll, own.closed, own.unfinished, own.bell(rank)]
        await store.call(Delete(spent))
        return False
    if await _counted(store, membership, roll):
        return False
    if first == closed or hosts:
        (now,) = await store.call(SetMany(membership.bells, b"left"), Read(keys.state))
        if now != found:
            # The last rank has cleared up meanwhile.
            await store.call(Delete(membership.bells))
    return bool(roll // LEFT & FIELD < roll & FIELD)


async def release_host(store: Store, membership: Membership) -> None:
    """Need the store no more, without having left; see `leave`."""
    (roll,) = await store.call(Add(membership.own.roll, LEFT))
    await _counted(store, membership, roll)


async def part(store: Store, membership: Membership, unfinished: Mapping[str, str]) -> None:
    """Be gone, after `release_host`."""
    (roll,) = await store.call(*naming(membership.own, unfinished), Add(membership.own.roll, GONE))
    await _counted(store, membership, roll)


async def _counted(store: Store, membership: Membership, roll: int) -> bool:
    """Do the work of the last rank that leaves; return whether that is this rank."""
    joined = roll & FIELD
    if roll // HOST & FIELD and roll // LEFT & FIELD >= joined:
        await store.call(Set(membership.own.all_left, b"1"))
    # In the first generation a rank may come later that has to learn that others have left.
    members = joined if membership.state.number else membership.world_size
    if roll // GONE & FIELD < members:
        return False
    await clear(store, membership, everyone=joined >= membership.world_size)
    return True


async def clear(store: Store, membership: Membership, *, everyone: bool) -> None:
    """Delete the keys of a generation that all its members have left.

    :param everyone: all ranks had joined it; else some may still be in an earlier one, and must
        find there how their phases were broken
    The state becomes the number of the next generation. It is not deleted: a newcomer may just have
    put its own there.
    """
    keys, own = membership.keys, membership.own
    after = b"%d" % (membership.state.number + 1)
    ranks = range(membership.world_size)
    unfinished, *found = await store.call(
        Read(own.unfinished), *(Read(keys.member(rank)) for rank in ranks)
    )
    spent = own.common + keys_of(unfinished, keys.root if everyone else own.root)
    for rank in ranks:
        spent += [own.bell(rank), own.asked(rank), own.answer(f"{rank}")]
    identity = membership.state.identity.encode()
    claims = {keys.member(r): held for r, held in enumerate(found) if held and identity in held}
    # Emptied in the same message, so that what is deleted after it is no newcomer's claim.
    empty = [CompareSet(key, held, b"") for key, held in claims.items()]
    now, *emptied = await store.call(
        CompareSet(keys.state, membership.state.encoded, after), *empty
    )
    if now != after:
        spent = []  # A newcomer was faster.
    spent += [key for key, held in zip(claims, emptied, strict=True) if held == b""]
    await store.call(Delete(spent))
