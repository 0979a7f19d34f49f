"""One phase: what a rank writes to enter, to look and to depart, and in which order.

The verdict is a function of the phase's count (see `count`); docs/design.md argues why. The other
keys explain it: the log names the ranks that entered, and those that have departed; the reason says
which rank broke it and why.
``released`` wakes ranks. The coroutines here await a store alone, and keep nothing between calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .._errors import BarrierConnectionError
from . import count as counts
from .count import CALLS, COMMIT, EXECUTE, FEW, Count
from .keys import PhaseKeys
from .payloads import IN_LOG, SMALL_BYTES, carried
from .store import Add, Append, CompareSet, Delete, Get, Read, Request, Set, Store
from .verdict import (
    Broken,
    Released,
    Verdict,
    decode_reason,
    decode_word,
    different_call,
    encode_reason,
    number,
    show,
)


class Forgotten(BarrierConnectionError):
    """The store has lost a phase that this rank had entered, or its membership."""

    def __init__(self) -> None:
        super().__init__(
            "the store no longer knows that this rank had entered (it was built anew, or its keys "
            "were deleted)",
            in_doubt=True,
        )


class Entry:
    """One rank's part in one phase; immutable.

    :ivar kind: the kind of call: `count.EXECUTE`, `COMMIT` or `GATHER`
    :ivar code: what its count says of the call; see `count.code`
    :ivar leader: the leader of a commit
    :ivar leads: whether this rank is the leader
    :ivar awaited: the key that this rank waits for once it has entered
    :ivar world: what makes a count full: so many ranks, with this call
    """

    __slots__ = (
        "awaited", "code", "keys", "kind", "leader", "leads", "rank", "world", "world_size",
    )  # fmt: skip

    def __init__(
        self, keys: PhaseKeys, rank: int, world_size: int, kind: int = EXECUTE, leader: int = -1
    ) -> None:
        self.keys = keys
        self.rank = rank
        self.world_size = world_size
        self.kind = kind
        self.leader = leader
        self.leads = kind == COMMIT and leader == rank
        self.code = 0 if kind == EXECUTE else counts.code(kind, leader, world_size)
        self.world = world_size, self.code
        self.awaited = keys.settled if kind == COMMIT and not self.leads else keys.released

    def under(self, keys: PhaseKeys) -> Entry:
        """The same entry in another phase."""
        return Entry(keys, self.rank, self.world_size, self.kind, self.leader)

    @property
    def call(self) -> str:
        return f"commit(leader={self.leader})" if self.kind == COMMIT else CALLS[self.kind]

    @property
    def apart(self) -> bool:
        """Whether payloads stand in a log of their own."""
        return self.world_size > IN_LOG


def entering(entry: Entry, payload: bytes = b"") -> list[Request]:
    """The requests with which a rank arrives; `entered` reads the answers.

    One message writes the name into the log, and then counts it: a rank that finds a full count
    finds all names. The same message begins to wait for the key that releases the phase.
    """
    keys, line = entry.keys, b"%d" % entry.rank
    requests: list[Request] = []
    if entry.kind != EXECUTE:
        if entry.kind == COMMIT:
            line += b" c%d" % entry.leader
        if len(payload) > SMALL_BYTES:
            requests.append(Set(keys.payload(entry.rank), payload))
        brings = line + b" " + carried(payload)
        if entry.apart:
            requests.append(Append(keys.payloads, brings + b"\n"))
        else:
            line = brings
    requests.append(Append(keys.log, line + b"\n"))
    requests.append(Add(keys.count, counts.entry(entry.rank, entry.code)))
    if entry.leads and not entry.apart:
        # If its leader is the last one, it has all payloads by the answer.
        requests.append(Read(keys.log))
    return requests


def entered(entry: Entry, answers: list[Any]) -> Count | Broken:
    """The count when this rank arrived, or why its arrival breaks the phase."""
    count = counts.of_sum(answers[0])
    if count.broken:
        return count
    if count.differs(entry.code):
        who, call = count.others(entry.rank, entry.code, entry.world_size)
        return different_call(entry.rank, entry.call, who, call)
    if count.arrived >= entry.world_size and count.foul(entry.world_size):
        return Broken(
            None,
            f"{count.arrived} arrivals were counted, but not those of ranks 0 to "
            f"{entry.world_size - 1}; do two processes share a rank, or did something else write "
            "to its keys?",
        )
    return count


async def look(store: Store, entry: Entry, *, entered: bool = True) -> Verdict | Count:
    """The verdict; the count if there is none yet, or if only a commit's leader can give it.

    :raises Forgotten: this rank had entered, and the store knows nothing of that
    """
    value, reason = await store.call(Read(entry.keys.count), Read(entry.keys.reason))
    return await judge(store, entry, value, reason, entered=entered)


async def judge(
    store: Store, entry: Entry, value: bytes | None, reason: bytes | None, *, entered: bool = True
) -> Verdict | Count:
    """As `look`, from a count and a reason that were read."""
    while not counts.is_count(value):
        reason, value = await break_foul(store, entry, value or b"")
    if entered and not value:
        raise Forgotten
    count = counts.of_value(value)
    if count.broken:
        if reason is None:
            # The reason is written before the phase is broken, so it is there now.
            (reason,) = await store.call(Read(entry.keys.reason))
        return decode_reason(reason)
    if not count.full(*entry.world):
        return count
    if entry.kind != COMMIT:
        return await released(store, entry)
    (word,) = await store.call(Read(entry.keys.word))
    try:
        if word is None:
            # The last rank may have died before it could wake the leader.
            await released(store, entry)
            return count
        return decode_word(word)
    except ValueError:
        return count  # Something else wrote there; the leader may still overwrite it.


async def break_foul(
    store: Store, entry: Entry, value: bytes, tells: Sequence[Request] = ()
) -> tuple[bytes | None, bytes]:
    """Break a phase whose count is no number, so that later ranks can add to it.

    Return its reason and its count, since another rank may have entered or broken it meanwhile.

    :param tells: requests after it, in the same message
    """
    mine = encode_reason(
        Broken(None, f"something else wrote {show(value)} where its arrivals are counted")
    )
    reason, now, *_ = await store.call(
        CompareSet(entry.keys.reason, b"", mine),
        CompareSet(entry.keys.count, value, counts.of_sum(0).broken_by(entry.rank)),
        *tells,
    )
    if now == value:
        # This is the answer for an absent key: it was deleted after it was read.
        await store.call(Delete([entry.keys.reason]))
        return None, b""
    return reason, now


async def released(store: Store, entry: Entry) -> Released:
    """Which rank came last. If it died before it could wake the others, this rank wakes them."""
    (last,) = await store.call(CompareSet(entry.keys.released, b"", b"?"))
    if last == b"?":
        # Written again, since a server without libuv wakes nobody for a compare-and-set.
        await store.call(Set(entry.keys.released, last), Read(entry.keys.count))
    return Released(number(last))


async def confirm(store: Store, entry: Entry) -> Released | None:
    """Which rank came last, for a rank that was woken after a long wait.

    None if the count is not full: something else woke it.
    """
    # No `Read`: it would wake ranks that wait for this key, and they would wake this one. Gets in a
    # row are one request (see `wire`).
    value, last = await store.call(Get(entry.keys.count), Get(entry.keys.released))
    if not counts.is_count(value) or not counts.of_value(value).full(*entry.world):
        return None
    return Released(number(last))


def departing(entry: Entry) -> list[Request]:
    """What a rank writes, with its entry into another phase, when it will not look at this one any
    more; not answered. In another message it adds to `PhaseKeys.departed` instead."""
    return [Append(entry.keys.log, b"%dd\n" % entry.rank)]


def departed(log: bytes) -> set[int]:
    """The ranks that have departed with an entry into another phase, by a phase's log."""
    lines = [line[:-1] for line in log.split() if line[-1:] == b"d" and len(line) < 20]
    return {int(line) for line in lines if line.isdigit()}


def spent(
    entry: Entry, *, broken: bool, alone: bool = True, large: Iterable[int] = ()
) -> list[Request]:
    """What is deleted when all have departed; for a broken phase, all that any call may write.

    :param alone: whether any rank departed alone
    :param large: the ranks whose payloads are known to have keys of their own
    """
    keys = entry.keys
    if broken:
        return [Delete(keys.of_broken)]
    names = [keys.log, keys.count, keys.released]
    if alone:
        names.append(keys.departed)
    if entry.world_size > FEW:
        names.append(keys.summary)
    if entry.kind == COMMIT:
        names += [keys.word, keys.settled]
    if entry.kind != EXECUTE and entry.apart:
        names.append(keys.payloads)
    names += map(keys.payload, large)
    return [Delete(names)]
