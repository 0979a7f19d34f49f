"""The verdict of a phase, and how it is written; pure functions and frozen values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .._errors import in_one_line
from .._values import MissingRank
from .heard import Heard, decode_rows, encode_rows

# The beginning of a leader's word; rubbish has another.
_PUBLISHED, _NOT_PUBLISHED = b"published\n", b"broken\n"
# A line of a phase's log: a rank, the leader that it names in a commit, and its payload.
_ARRIVAL = re.compile(rb"([0-9]{1,5})(?: c([0-9]{1,5}))?(?: [=-].*)?")
# The errors of reading a value that another client wrote.
RUBBISH = (ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError)


@dataclass(frozen=True)
class Released:
    """Every rank entered (and, in a commit, the leader published ``result``).

    :ivar last_rank: the rank that came last; None if that is not known
    """

    last_rank: int | None = None
    result: bytes = b""


@dataclass(frozen=True)
class Broken:
    """``rank`` broke it. With ``timeout_secs`` it was a deadline, and ``missing`` had not entered.

    :ivar known: what was known of the missing ranks before the break
    """

    rank: int | None
    reason: str
    timeout_secs: float | None = None
    missing: tuple[int, ...] = ()
    in_doubt: bool = False
    known: tuple[MissingRank, ...] = ()


Verdict = Released | Broken


def encode_reason(broken: Broken) -> bytes:
    """The reason of a break, as the store has it."""
    entry: dict[str, object] = {"rank": broken.rank, "reason": in_one_line(broken.reason)}
    if broken.timeout_secs is not None:
        entry |= {"timeout_secs": broken.timeout_secs, "missing": ranges(broken.missing)}
    lacked = set(broken.missing)
    known = [Heard(each) for each in broken.known if each.rank in lacked]
    if known:
        entry["known"] = encode_rows(known).decode()
    if broken.in_doubt:
        entry["in_doubt"] = True
    return json.dumps(entry).encode()


def decode_reason(value: bytes | None) -> Broken:
    """The inverse; a value that another client wrote becomes a reason that says so."""
    if value is None:
        return Broken(None, "no reason was given")
    try:
        entry: dict[str, Any] = json.loads(value)
        known = decode_rows(entry["known"]) if "known" in entry else {}
        broken = Broken(
            entry["rank"],
            entry["reason"],
            entry.get("timeout_secs"),
            unranged(entry.get("missing", "")),
            bool(entry.get("in_doubt", False)),
            tuple(each.rank for each in known.values()),
        )
        if not (
            isinstance(broken.rank, int | None)
            and isinstance(broken.reason, str)
            and isinstance(broken.timeout_secs, int | float | None)
        ):
            raise ValueError(value)
    except RUBBISH:
        return Broken(None, f"something else wrote {show(value)} where the reason stands")
    return broken


def encode_word(verdict: Verdict) -> bytes:
    """The word of a commit's leader."""
    if isinstance(verdict, Released):
        return _PUBLISHED + verdict.result
    return _NOT_PUBLISHED + encode_reason(verdict)


def decode_word(value: bytes) -> Verdict:
    """The inverse.

    :raises ValueError: something else wrote it
    """
    if value.startswith(_PUBLISHED):
        return Released(None, value[len(_PUBLISHED) :])
    if value.startswith(_NOT_PUBLISHED):
        return decode_reason(value[len(_NOT_PUBLISHED) :])
    raise ValueError(show(value))


def missing(log: bytes | None, world_size: int) -> tuple[int, ...]:
    """The ranks without a line in a phase's log, sorted; ignores lines that are wrong."""
    entered = set((log or b"").split())
    return tuple(rank for rank in range(world_size) if b"%d" % rank not in entered)


def differing(log: bytes | None) -> Broken | None:
    """Why a commit is broken whose ranks do not name one leader; None if they do."""
    log = log or b""
    words = log.partition(b"\n")[0].split(b" ", 2)
    leader = b" " + b"".join(words[1:2])
    if log.count(leader + b" ") + log.count(leader + b"\n") == log.count(b"\n"):
        return None  # Most often all lines name the leader of the first one.
    first: tuple[str, str] | None = None
    for line in log.splitlines():
        if (match := _ARRIVAL.fullmatch(line)) is None:
            continue
        rank, leader = match[1].decode(), match[2]
        call = "another call" if leader is None else f"commit(leader={leader.decode()})"
        if first is None:
            first = rank, call
        elif call != first[1]:
            return different_call(int(rank), call, f"rank {first[0]}", first[1])
    return None


def different_call(rank: int, call: str, others: str, other: str) -> Broken:
    return Broken(
        rank, f"it called {call} where {others} called {other}; all ranks must make the same call"
    )


def ranges(ranks: Iterable[int]) -> str:
    """``3,5-9``: thousands of missing ranks are mostly neighbours."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def unranged(text: str) -> tuple[int, ...]:
    """The inverse.

    :raises ValueError: it is wrong, or names more ranks than any world has
    """
    ranks: list[int] = []
    for span in text.split(",") if text else ():
        first, _, last = span.partition("-")
        if int(last or first) > 1 << 20:
            raise ValueError(text)
        ranks.extend(range(int(first), int(last or first) + 1))
    return tuple(ranks)


def number(value: bytes | None) -> int | None:
    """The number in a value; None if there is none, or another client wrote it."""
    if value and len(value) < 20 and value.isdigit():
        return int(value)
    return None


def show(value: bytes) -> str:
    """A value for a message, or its beginning."""
    return repr(value[:60].decode(errors="replace"))
