"""What ranks write about a phase, and what follows from it; pure functions.

A phase has one log. Ranks append a line when they arrive and a line when they give up, and
the store puts the lines in one order. The verdict is a function of that order alone: all
ranks before any break, and the phase is released; a break before that, and it is broken.
So one append decides, whoever makes it, and everyone who reads the log comes to the same
end (state machine replication, Lamport 1978, with the store's key as the ordered log).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

_MAX_REASON = 2000
_COMMITS = re.compile(rb"c[0-9]+ [0-9]+")


@dataclass(frozen=True)
class Released:
    """Every rank arrived (and, in a commit, the leader published ``result``)."""

    last_rank: int
    result: bytes = b""


@dataclass(frozen=True)
class Gathered:
    """Every rank arrived for a commit; from now on only ``leader`` settles it."""

    last_rank: int
    leader: int


@dataclass(frozen=True)
class Broken:
    """``rank`` broke it. With ``timeout_secs`` it was a deadline, and ``missing`` is who lacked."""

    rank: int | None
    reason: str
    timeout_secs: float | None = None
    missing: tuple[int, ...] = ()


Verdict = Released | Broken


def arrival(rank: int, leader: int | None) -> bytes:
    """The line of a rank that enters; ``leader`` where it enters a commit."""
    return b"a%d\n" % rank if leader is None else b"c%d %d\n" % (rank, leader)


def breaking(
    rank: int,
    reason: str,
    timeout_secs: float | None = None,
    missing: tuple[int, ...] | None = None,
) -> bytes:
    """The line of a rank that gives up.

    ``missing`` where the rank knows better than the log who is to blame (law 11).
    """
    entry = {"rank": rank, "reason": reason[:_MAX_REASON], "timeout_secs": timeout_secs}
    if missing is not None:
        entry["missing"] = missing
    return b"b%s\n" % json.dumps(entry).encode()


def judge(log: bytes, world_size: int) -> Released | Gathered | Broken | None:
    """What the log decides; None while it decides nothing."""
    arrived: set[int] = set()
    terms: tuple[int, int | None] | None = None
    for line in log.splitlines():
        if line[:1] == b"b":
            return _judge_break(line, arrived, world_size)
        try:
            rank, leader = _read_arrival(line)
        except ValueError:
            rank, leader = world_size, None
        if rank >= world_size:
            return Broken(None, f"something else wrote {_show(line)} among this phase's arrivals")
        if terms is None:
            terms = (rank, leader)
        elif leader != terms[1]:
            return Broken(
                rank,
                f"it called {_call(leader)} where rank {terms[0]} called {_call(terms[1])}; "
                "all ranks must make the same call",
            )
        arrived.add(rank)
        if len(arrived) == world_size:
            return Released(rank) if leader is None else Gathered(rank, leader)
    return None


def missing(log: bytes, world_size: int) -> tuple[int, ...]:
    """The ranks without an arrival line, sorted. Lines that are none are passed over."""
    arrived: set[int] = set()
    for line in log.splitlines():
        try:
            arrived.add(_read_arrival(line)[0])
        except ValueError:
            continue
    return tuple(rank for rank in range(world_size) if rank not in arrived)


def committing(log: bytes) -> set[int]:
    """The ranks that came for a commit, who may have brought a payload."""
    return {int(line[1:].split()[0]) for line in log.splitlines() if _COMMITS.fullmatch(line)}


def _read_arrival(line: bytes) -> tuple[int, int | None]:
    if line[:1] == b"a" and line[1:].isdigit():
        return int(line[1:]), None
    if not _COMMITS.fullmatch(line):
        raise ValueError(line)
    rank, leader = line[1:].split()
    return int(rank), int(leader)


def _judge_break(line: bytes, arrived: set[int], world_size: int) -> Broken:
    try:
        entry = json.loads(line[1:])
        rank, reason, timeout_secs = entry["rank"], entry["reason"], entry["timeout_secs"]
        named = entry.get("missing")
    except (ValueError, KeyError, TypeError, AttributeError):
        return Broken(None, f"something else wrote {_show(line)} among this phase's arrivals")
    if timeout_secs is None:
        return Broken(rank, reason)
    if named is None:
        named = [rank for rank in range(world_size) if rank not in arrived]
    return Broken(rank, reason, timeout_secs, tuple(named))


def _call(leader: int | None) -> str:
    return "execute_barrier()" if leader is None else f"commit(leader={leader})"


def _show(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))


def encode(verdict: Verdict) -> bytes:
    """The verdict as it stands in the store. Never empty: an empty value is an absent key."""
    if isinstance(verdict, Released):
        return b"r%d\n" % verdict.last_rank + verdict.result
    return b"b" + json.dumps(asdict(verdict)).encode()


def decode(value: bytes) -> Verdict:
    """The inverse of `encode`.

    :raises ValueError: for anything that `encode` did not make
    """
    if value[:1] == b"r":
        last_rank, _, result = value[1:].partition(b"\n")
        return Released(int(last_rank), result)
    if value[:1] != b"b":
        raise ValueError(f"no verdict: {_show(value)}")
    try:
        fields = json.loads(value[1:])
        return Broken(**{**fields, "missing": tuple(fields["missing"])})
    except (KeyError, TypeError) as exc:
        raise ValueError(f"no verdict: {_show(value)}") from exc
