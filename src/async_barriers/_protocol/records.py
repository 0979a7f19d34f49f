"""The log of the last released commits, for processes that ask about one or follow them.

The leader appends a record before its verdict, in the same message. So a rank that has heard the
verdict finds the record. Only a published commit has a record, since the leader writes no other
verdict after one. The log belongs to the prefix, not to a generation. A record's *number* is its
place, from 0; a first line says the number of the record after it. A leader that lost its
connection may append twice; that is one record, with one generation, name and label.

A process that waits for the next record waits for a key whose name follows from their number. The
key stays for a few more records, so a process that looks and then waits misses nothing.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import NamedTuple

from .._values import CommitRecord
from .keys import Keys, PhaseKeys
from .store import Add, Append, CompareSet, Delete, Read, Request, Set, Store
from .verdict import RUBBISH, number

KEPT = 64
# The log is cut after so many records, so it is never longer than both together.
_CUT_EVERY = 32
_TRIES = 3
# Larger results have keys of their own, so that the log can be read at once.
SMALL_RESULT_BYTES = 1024
# The end of a line whose result has a key of its own.
_ELSEWHERE = b",null]"
# How many keys there are that wake observers, and how many of them exist at a time.
_SLOTS, NEWS = 16, 8


class Record(NamedTuple):
    """A commit that was released.

    :ivar label: its sequence or step, as in the keys of its phase
    :ivar result: None if it is large: then it has a key of its own
    """

    generation: str
    name: str
    label: str
    leader: int
    world_size: int
    result: bytes | None

    @property
    def identity(self) -> tuple[str, str, str]:
        """The phase's identity: two lines with the same one are one record."""
        return self.generation, self.name, self.label

    @property
    def by_step(self) -> bool:
        """Whether its number is a step, which does not depend on earlier calls."""
        return self.label.startswith("s")

    @property
    def sequence(self) -> int:
        return int(self.label.removeprefix("s"))

    def keys(self, keys: Keys) -> PhaseKeys:
        return keys.generation(self.generation).phase(self.name, self.label)


@dataclass(frozen=True)
class Log:
    """The log as it was read.

    :ivar begin: how many records are not kept any more
    :ivar end: how many records there ever were
    :ivar records: the kept records by number, the oldest first
    """

    begin: int
    end: int
    records: dict[int, Record]


def encode(record: Record) -> bytes:
    """The record's line in the log."""
    generation, name, label, leader, world_size, result = record
    # Written by hand: json takes five times as long, and the other ranks wait for it.
    shown = "null" if result is None else f'"{b64encode(result).decode()}"'
    name = encode_basestring_ascii(name)
    return f'["{generation}",{name},"{label}",{leader},{world_size},{shown}]\n'.encode()


def _decode(line: bytes) -> Record | None:
    """The record in a line; None if something else wrote it."""
    try:
        generation, name, label, leader, world_size, result = json.loads(line)
        value = None if result is None else b64decode(result)
        found = Record(generation, name, label, leader, world_size, value)
        right = isinstance(leader, int) and isinstance(world_size, int) and found.sequence >= 0
        return found if right and isinstance(name, str) and isinstance(generation, str) else None
    except RUBBISH:
        return None


def _lines(value: bytes | None) -> tuple[int, list[bytes]]:
    """The number of the first record, and a line for each."""
    lines = (value or b"").splitlines()
    if lines and lines[0].startswith(b"@"):
        return number(lines[0][1:]) or 0, lines[1:]
    return 0, lines


def decode(value: bytes | None) -> Log:
    """The log in a value; rubbish in it is skipped."""
    first, lines = _lines(value)
    records: dict[int, Record] = {}
    known = set()
    for at, line in enumerate(lines):
        record = _decode(line)
        if record is not None and record.identity not in known:
            known.add(record.identity)
            records[first + at] = record
    begin = first
    for at in list(records)[:-KEPT]:
        del records[at]
        begin = at + 1
    return Log(begin, first + len(lines), records)


def noting(
    keys: Keys, record: Record, result: bytes, *, expected: int | None, noted: bool = False
) -> tuple[list[Request], list[Request]]:
    """What a leader writes before its verdict and after it; the answer is the number of records.

    :param expected: the answer if nobody else commits meanwhile; its key wakes observers
    :param noted: whether the log has the record already
    """
    before: list[Request] = []
    if record.result is None:
        before.append(Set(record.keys(keys).published, result))
    if not noted:
        before.append(Append(keys.commits, encode(record)))
    after: list[Request] = [Add(keys.commits_number, 0 if noted else 1)]
    if expected is not None:
        after.append(_news(keys, expected))
    return before, after


def _news(keys: Keys, count: int) -> Set:
    return Set(keys.commits_news(count % _SLOTS), b"%d" % count)


def awaited(keys: Keys, count: int) -> str:
    """The key that is written when there are more than ``count`` records."""
    return keys.commits_news((count + 1) % _SLOTS)


def announcing(keys: Keys, count: int, expected: int | None) -> list[Request]:
    """What the leader writes once it knows how many records there are."""
    old = Delete([keys.commits_news((count - NEWS) % _SLOTS)])
    return [old] if count == expected else [_news(keys, count), old]


def is_to_cut(count: int, record: Record) -> bool:
    """Whether the leader that wrote the ``count``-th record has to shorten the log."""
    return count % _CUT_EVERY == 0 or record.result is None


async def cut(store: Store, keys: Keys) -> None:
    """Drop old records; gives up if other leaders keep writing, and a later one does it."""
    (value,) = await store.call(Read(keys.commits))
    for _ in range(_TRIES):
        first, lines = _lines(value)
        gone = lines[:-KEPT]
        if not gone:
            return
        kept = b"@%d\n" % (first + len(gone)) + b"".join(line + b"\n" for line in lines[-KEPT:])
        (now,) = await store.call(CompareSet(keys.commits, value, kept))
        if now == kept:
            await store.call(Delete(_large(keys, gone)))
            return
        value = now


def _large(keys: Keys, lines: Sequence[bytes]) -> list[str]:
    """The keys of results that are not among the records."""
    # Most are small, and to decode a line takes as long as to write ten.
    records = [_decode(line) for line in lines if line.endswith(_ELSEWHERE)]
    return [each.keys(keys).published for each in records if each and each.result is None]


def looking(keys: Keys) -> list[Request]:
    """Read the number of records, then the log, so that all counted records are in the log."""
    return [Read(keys.commits_number), Read(keys.commits)]


async def public(store: Store, keys: Keys, record: Record) -> CommitRecord | None:
    """The public form of a record; None if its result is not kept any more."""
    result = record.result
    if result is None:
        (result,) = await store.call(Read(record.keys(keys).published))
        if result is None:
            return None
    return CommitRecord(record.name, record.sequence, result, record.leader, record.world_size)
