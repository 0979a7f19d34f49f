"""Breaking a phase, and finding out for whom it waits; see `phase`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from . import count as counts
from . import phase
from .count import COMMIT, FEW, Count
from .phase import Entry
from .store import Add, CompareSet, Delete, Read, Request, SetMany, Store
from .verdict import (
    Broken,
    Verdict,
    decode_reason,
    differing,
    encode_reason,
    missing,
    ranges,
    unranged,
)


async def give_up(
    store: Store,
    entry: Entry,
    broken: Broken,
    *,
    entered: bool,
    names_missing: bool = False,
    tells: Sequence[Request] = (),
) -> tuple[Verdict | Count, bool]:
    """Break the phase, unless it is decided. Return the verdict, and whether this call broke it.

    If all are in a commit, the count stands for the verdict, since only its leader can settle it.

    :param names_missing: name the missing ranks from the log; else ``broken`` names them, and
        nothing is looked up
    :param tells: requests after the break, in the same message
    """
    keys = entry.keys
    reads: list[Request] = [Read(keys.count), Read(keys.reason)]
    if names_missing:
        reads.append(Read(keys.log))
    value, reason, *log = await store.call(*reads)
    while True:
        if not counts.is_count(value):
            reason, value = await phase.break_foul(store, entry, value or b"", tells)
            if value == counts.of_sum(0).broken_by(entry.rank):
                return decode_reason(reason), True
            continue
        judged = await phase.judge(store, entry, value, reason, entered=entered)
        if not isinstance(judged, Count) or judged.full(*entry.world):
            if reason is not None and not isinstance(judged, Broken):
                # The last rank entered meanwhile: nobody asks for a reason, unless leaders differ.
                differ = entry.kind == COMMIT and differing(*await store.call(Read(keys.log)))
                if not differ:
                    await store.call(Delete([keys.reason]))
            return judged, False
        if log:
            broken = replace(broken, missing=missing(log[0], entry.world_size))
            log = []
        held, wanted = value or b"", judged.broken_by(entry.rank)
        # One message, so that a rank that is killed here leaves no reason without a break.
        reason, value, *_ = await store.call(
            CompareSet(keys.reason, b"", encode_reason(broken)),
            CompareSet(keys.count, held, wanted),
            *tells,
        )
        if value == wanted:
            return decode_reason(reason), True
        if value == held:
            # This is the answer for an absent key: it was deleted after it was read.
            await store.call(Delete([keys.reason]))
            raise phase.Forgotten
        # Another rank entered or broke it meanwhile: look again.


async def break_unentered(
    store: Store, entry: Entry, broken: Broken, tells: Sequence[Request]
) -> tuple[Verdict | Count, bool, list[Any]]:
    """As `give_up`, for a rank that has not entered and never will; and the answers to ``tells``.

    Without it no count is full, so nothing is read before. In worlds of up to `count.FEW` ranks.
    """
    reason, total, *told = await store.call(
        CompareSet(entry.keys.reason, b"", encode_reason(broken)),
        Add(entry.keys.count, counts.BREAKING),
        *tells,
    )
    if total >= 0:
        # Something else wrote there.
        return *await give_up(store, entry, broken, entered=False, tells=tells), told
    return decode_reason(reason), not counts.of_sum(total - counts.BREAKING).broken, told


def telling(bells: list[str], entry: Entry) -> tuple[Request, ...]:
    """Ring these bells, since the phase is broken; the last request is answered."""
    return SetMany(bells, b"broken"), Read(entry.keys.count)


async def survey(store: Store, entry: Entry) -> tuple[int, ...]:
    """The ranks that have not entered.

    In worlds of up to `count.FEW` ranks, each rank reads the log. In larger ones one rank reads it
    and leaves a summary, which the others use until another rank enters.
    """
    keys = entry.keys
    if entry.world_size <= FEW:
        (log,) = await store.call(Read(keys.log))
        return missing(log, entry.world_size)
    value, summary = await store.call(Read(keys.count), Read(keys.summary))
    arrived, _, ranked = (summary or b"").partition(b":")
    try:
        if arrived == b"%d" % counts.of_value(value).arrived:
            return unranged(ranked.decode())
    except ValueError:
        pass  # Something else wrote it.
    value, log = await store.call(Read(keys.count), Read(keys.log))
    absent = missing(log, entry.world_size)
    try:
        arrived = b"%d" % counts.of_value(value).arrived
    except ValueError:
        return absent
    await store.call(
        CompareSet(keys.summary, summary or b"", arrived + b":" + ranges(absent).encode())
    )
    return absent
