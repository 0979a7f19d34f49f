"""Leaving a generation; the last rank that is gone deletes its keys. See `membership`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .._errors import in_one_line
from .membership import FIELD, GONE, HOST, LEFT, Closed, Membership
from .store import Add, Append, CompareSet, Delete, Read, Request, Set, SetMany, Store
from .unfinished import keys_of, naming
from .verdict import number


async def tell(store: Store, membership: Membership, reason: str, *, hosts: bool) -> None:
    """Say that this rank can never be waited for again.

    Only the first rank that leaves wakes the others: no phase is released without it, so later ones
    would tell nothing new.

    :param hosts: the store ends with this process
    """
    own, closed = membership.own, Closed(membership.rank, in_one_line(reason)).encoded
    requests: list[Request] = [CompareSet(own.closed, b"", closed), Read(membership.keys.state)]
    if hosts:
        # A rank that sees that also sees which rank left first.
        requests.insert(1, Set(own.host_leaves, b"1"))
    first, found = await store.call(*requests)
    if found == membership.state.encoded and (first == closed or hosts):
        (now,) = await store.call(SetMany(membership.peers, b"left"), Read(membership.keys.state))
        if now != found:
            # A newcomer has ended the generation meanwhile.
            await store.call(Delete(membership.peers))


def last_words(membership: Membership, reason: str) -> list[Request]:
    """As `tell`, for a store that is silent: nothing here is answered.

    If the store comes back after this process has gone, it still finds them. Of two ranks that say
    them, the first one counts, as in `tell`: what is appended to it is not read. A generation that
    is over by then keeps these keys.
    """
    closed = Closed(membership.rank, in_one_line(reason)).encoded
    return [Append(membership.own.closed, closed), SetMany(membership.peers, b"left")]


async def go(
    store: Store,
    membership: Membership,
    unfinished: Mapping[str, str],
    *,
    hosts: bool = False,
    let_go: bool = False,
    again: bool = False,
) -> bool:
    """Give up the claim, and be counted as gone. It is the last that this rank writes: the store
    may end when the last rank has done so.

    :param unfinished: the phases that this rank names; see `unfinished`
    :param hosts: as for `tell`; `host_no_more` comes after it then
    :param let_go: after `let_host_go`
    :param again: it may have been done before, when a signal handler interrupted this rank
    :return: whether a rank is left that may still need the store
    """
    keys, rank, own = membership.keys, membership.rank, membership.own
    gone = replace(membership.claim, left=True).encoded
    counts: Request = Add(own.roll, GONE + (0 if let_go else LEFT) + (HOST if hosts else 0))
    if again and await store.call(Read(keys.member(rank))) == [gone]:
        # One counted twice would pass for another rank, and the keys would go under that one.
        counts = Read(own.roll)
    _, found, counted = await store.call(
        *naming(own, unfinished),
        # Not a plain write: another life may hold the rank by now.
        CompareSet(keys.member(rank), membership.claim.encoded, gone),
        Delete([own.bell(rank)]),
        Read(keys.state),
        counts,
    )
    roll = counted if isinstance(counted, int) else number(counted) or 0
    joined = roll & FIELD
    if found != membership.state.encoded or not joined:
        # The generation is over, so no rank uses what was just written.
        await store.call(Delete([own.roll, own.closed, own.unfinished, own.bell(rank)]))
        return False
    # In the first generation a rank may come later that has to learn that others have left.
    if roll // GONE & FIELD >= (joined if membership.state.number else membership.world_size):
        hosted = bool(roll // HOST & FIELD)
        await clear(store, membership, everyone=joined >= membership.world_size, hosted=hosted)
    await _tell_host(store, membership, roll)
    return roll // LEFT & FIELD < joined


async def let_host_go(store: Store, membership: Membership) -> None:
    """Need the store no more, without being gone: this rank still holds its claim."""
    (roll,) = await store.call(Add(membership.own.roll, LEFT))
    await _tell_host(store, membership, roll)


async def _tell_host(store: Store, membership: Membership, roll: int) -> None:
    if roll // HOST & FIELD and roll // LEFT & FIELD >= roll & FIELD:
        await store.call(Set(membership.own.all_left, b"1"))


async def host_no_more(store: Store, membership: Membership) -> None:
    """Wait no more to be let go; the last host that does deletes what it waited for."""
    own = membership.own
    roll, found = await store.call(Add(own.roll, -HOST), Read(membership.keys.state))
    # Nobody has joined a roll that was deleted.
    last = not (roll // HOST & FIELD and roll & FIELD)
    if last and found != membership.state.encoded:
        await store.call(Delete([own.roll, own.all_left]))


async def clear(store: Store, membership: Membership, *, everyone: bool, hosted: bool) -> None:
    """Delete the keys of a generation that all its members have left.

    :param everyone: all ranks had joined it; else some may still be in an earlier one, and must
        find there how their phases were broken
    :param hosted: a host waits for the roll to be complete, and deletes that; see `host_no_more`
    The state becomes the number of the next generation. It is not deleted: a newcomer may just have
    put its own there.
    """
    keys, own = membership.keys, membership.own
    after = b"%d" % (membership.state.number + 1)
    ranks = range(membership.world_size)
    unfinished, *found = await store.call(
        Read(own.unfinished), *(Read(keys.member(rank)) for rank in ranks)
    )
    awaited = (own.roll, own.all_left) if hosted else ()
    spent = [key for key in own.common if key not in awaited]
    spent += keys_of(unfinished, keys.root if everyone else own.root)
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
