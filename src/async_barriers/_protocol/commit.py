"""What ranks bring to a phase, and what a commit's leader answers; see `phase`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import count as counts
from .count import COMMIT
from .payloads import brought
from .phase import Entry
from .store import CompareSet, Get, Read, Request, Set, Store
from .verdict import (
    Broken,
    Verdict,
    decode_reason,
    decode_word,
    differing,
    encode_reason,
    encode_word,
)


async def settle(
    store: Store,
    entry: Entry,
    verdict: Verdict,
    before: Iterable[Request] = (),
    after: Iterable[Request] = (),
) -> list[Any]:
    """Write the leader's verdict on a commit in which all are in; it may be written again.

    :param before: requests before the verdict, in the same message
    :param after: requests after it; their answers, which show that the verdict is there
    """
    # Plain writes: nobody else writes there, and an answer would bring the whole verdict back.
    word, settled = Set(entry.keys.word, encode_word(verdict)), Set(entry.keys.settled, b"1")
    return await store.call(*before, word, settled, *after)


async def hear(store: Store, entry: Entry) -> Verdict | None:
    """The verdict of a commit's leader; None if there is none yet."""
    (word,) = await store.call(Read(entry.keys.word))
    return None if word is None else decode_word(word)


async def collect(store: Store, entry: Entry) -> dict[int, bytes] | Broken | None:
    """Every rank's payload; how the phase is broken, if it is; None if not all are in.

    The count cannot say that all are in a commit but name different leaders. The log can: it is
    complete by then, so that all ranks that read it find the same.

    :raises BarrierError: something else wrote there
    """
    keys = entry.keys
    # Gets in a row are one request with one answer; see `wire`.
    apart = [Get(keys.payloads)] if entry.apart else []
    value, *logs = await store.call(Get(keys.count), Get(keys.log), *apart)
    if not counts.is_count(value):
        return None
    count = counts.of_value(value)
    if count.broken:
        # Its ranks name different leaders, which add up to this one.
        return decode_reason(*await store.call(Read(keys.reason)))
    if not count.full(*entry.world):
        return None
    return await collected(store, entry, *logs)


async def collected(
    store: Store, entry: Entry, log: bytes | None, apart: bytes | None = None
) -> dict[int, bytes] | Broken:
    """As `collect`, when all are in.

    :param apart: the payloads of a large world
    """
    keys = entry.keys
    if entry.kind == COMMIT and (disagreement := differing(log)) is not None:
        # Another rank may have found it out before; see `entered`.
        (reason,) = await store.call(CompareSet(keys.reason, b"", encode_reason(disagreement)))
        return decode_reason(reason)
    payloads, large = brought(apart if entry.apart else log, entry.world_size)
    if large:
        values = await store.call(*[Read(keys.payload(rank)) for rank in large])
        payloads |= {rank: value or b"" for rank, value in zip(large, values, strict=True)}
    return {rank: payloads[rank] for rank in range(entry.world_size)}
