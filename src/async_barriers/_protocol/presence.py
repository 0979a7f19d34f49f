"""Asking the ranks that a phase waits for whether they are there, and what they do.

A rank asks as a newcomer asks the holder of its rank: it adds a key to those that the other has to
answer, and rings the other's bell. All answers to one rank's question stand in one key. Their times
are relative, so no clocks are compared. A register has one rank's findings for a moment, for all
others: asking costs the same for any number of waiting ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .._errors import in_one_line
from .._missing import DOING_CHARS
from .membership import Member, Membership, member_of
from .store import Append, Delete, Read, Request, SetMany, Store
from .verdict import RUBBISH


@dataclass(frozen=True)
class Answer:
    """The answer of a rank.

    :ivar doing: the text of its last report, if there is one
    :ivar said_secs: how long ago that was
    :ivar idle_secs: how long ago it first said that
    """

    doing: str | None = None
    said_secs: float | None = None
    idle_secs: float | None = None


def encode_answer(rank: int, answer: Answer) -> bytes:
    """One line."""
    doing = None if answer.doing is None else in_one_line(answer.doing, DOING_CHARS)
    return json.dumps([rank, doing, answer.said_secs, answer.idle_secs]).encode() + b"\n"


def decode_answers(value: bytes | None) -> dict[int, Answer]:
    """The latest answer of each rank; ignores rubbish."""
    found = {}
    for line in (value or b"").splitlines():
        try:
            rank, doing, said, idle = json.loads(line)
            shown = None if doing is None else in_one_line(str(doing), DOING_CHARS)
            times = [None if secs is None else max(0.0, float(secs)) for secs in (said, idle)]
            found[int(rank)] = Answer(shown, *times)
        except RUBBISH:
            continue
    return found


async def claims(
    store: Store, membership: Membership, ranks: Sequence[int]
) -> dict[int, Member | None]:
    """The life that has joined with each rank; None if none has."""
    found = await store.call(*(Read(membership.keys.member(rank)) for rank in ranks))
    claimed: dict[int, Member | None] = {}
    for rank, held in zip(ranks, found, strict=True):
        try:
            claimed[rank] = None if held is None else member_of(held)
        except RUBBISH:
            claimed[rank] = None
    return claimed


async def ask(store: Store, membership: Membership, members: Mapping[int, Member]) -> list[str]:
    """Ask ranks whether they are there; return the keys of their answers, for `answers`.

    Each is asked in the generation that it joined last: if that is over, it answers there until it
    joins again. One that does not answer is asked only once, however often this is called.
    """
    mine = {}
    reads: list[Request] = []
    for rank, each in members.items():
        own = membership.keys.generation(each.generation)
        mine[each.generation] = own.answer(f"{membership.rank}")
        reads.append(Read(own.asked(rank)))
    asked = await store.call(Delete(list(mine.values())), *reads)
    requests: list[Request] = []
    bells = []
    for (rank, each), before in zip(members.items(), asked, strict=True):
        own = membership.keys.generation(each.generation)
        line = mine[each.generation].encode() + b"\n"
        if line not in (before or b""):
            requests.append(Append(own.asked(rank), line))
        bells.append(own.bell(rank))
    await store.call(*requests, SetMany(bells, b"?"), Read(membership.keys.state))
    return list(mine.values())


async def answers(store: Store, keys: Sequence[str]) -> dict[int, Answer]:
    """The answers that have come by now."""
    said = await store.call(*map(Read, keys))
    return decode_answers(b"".join(value or b"" for value in said))
