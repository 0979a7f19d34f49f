"""What ranks write about a phase, and what follows from it; pure functions.

A phase has one log. Ranks append a line when they arrive and a line when they give up, and
the store puts the lines in one order. The verdict is a function of that order alone: all
ranks before any break, and the phase is released; a break before that, and it is broken.
So one append decides, whoever makes it, and everyone who reads the log comes to the same
end (state machine replication, Lamport 1978, with the store's key as the ordered log).
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

_MAX_REASON = 2000
_COMMITS = re.compile(rb"c[0-9]{1,9} [0-9]{1,9}")
_BREAK = re.compile(rb"^b.*", re.MULTILINE)
_RELEASES = re.compile(rb"r[0-9]{1,9}")


@dataclass(frozen=True)
class Released:
    """Every rank arrived (and, in a commit, the leader published ``result``).

    :ivar listeners: ranks may be waiting for the bell, and not at the meeting
    :ivar shared: all ranks met, and keep the keys for the next phase of the name
    """

    last_rank: int
    result: bytes = b""
    listeners: bool = True
    shared: bool = False


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
    # No other phase has its keys.
    shared: ClassVar[bool] = False


Verdict = Released | Broken


def arrival(rank: int, leader: int | None, *, meets: bool = False, keeps: bool = False) -> bytes:
    """The line of a rank that enters.

    :param leader: where it enters a commit
    :param meets: where it will read the log itself when all have arrived, and needs no bell
    :param keeps: where it also wants the next phase of the name to have these keys
    """
    if leader is not None:
        return b"c%d %d\n" % (rank, leader)
    return (b"k%d\n" if keeps else b"m%d\n" if meets else b"a%d\n") % rank


def listening(rank: int) -> bytes:
    """The line of a rank that was called from the meeting too early, and listens for the bell.

    Also of one that cannot wait for the verdict to know the keys of the next phase: a phase
    that somebody listens in before it is decided shares its keys with none.
    """
    return b"l%d\n" % rank


def breaking(
    rank: int | None,
    sequence: int,
    reason: str,
    timeout_secs: float | None = None,
    missing: tuple[int, ...] | None = None,
) -> bytes:
    """The line of a rank that gives up.

    :param sequence: of the phase; a line that was held up must not break a later one
    :param missing: where the rank knows better than the log who is to blame (law 11)
    """
    entry: dict[str, object] = {
        "rank": rank,
        "sequence": sequence,
        "reason": reason[:_MAX_REASON],
        "timeout_secs": timeout_secs,
    }
    if missing is not None:
        entry["missing"] = missing
    return b"b%s\n" % json.dumps(entry).encode()


def judge(log: bytes, world_size: int, sequence: int) -> Released | Gathered | Broken | None:
    """What the log decides; None while it decides nothing."""
    # Where many give up at once, each of them finds a longer log, and one that begins the same.
    first_break = _BREAK.search(log)
    if first_break is not None:
        judged = _judge(log[: first_break.end()], world_size, sequence)
        if judged is not None:
            return judged
    return _judge(log, world_size, sequence)


# All ranks of a process come to the same.
@functools.lru_cache(maxsize=64)
def _judge(log: bytes, world_size: int, sequence: int) -> Released | Gathered | Broken | None:
    lines = log.splitlines()
    arrived: set[int] = set()
    terms: tuple[int, int | None] | None = None
    kinds = set()
    for line in lines:
        kind = line[:1]
        if kind == b"b":
            broken = _judge_break(line, arrived, world_size, sequence)
            if broken is None:
                continue
            return broken
        kinds.add(kind)
        if kind == b"l" and line[1:].isdigit():
            continue
        try:
            rank, leader = _read_arrival(line)
        except ValueError:
            rank, leader = world_size, None
        if rank >= world_size:
            return Broken(None, f"something else wrote {show(line)} among this phase's arrivals")
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
            if leader is None:
                return Released(rank, listeners=not kinds <= {b"m", b"k"}, shared=kinds == {b"k"})
            return Gathered(rank, leader)
    return None


# On every rank's path once per crossing. A few ranks come in few orders.
@functools.lru_cache(maxsize=64)
def all_keep(log: bytes, world_size: int) -> Released | None:
    """What `judge` says in the common case, where all ranks keep the keys; else None."""
    lines = log.splitlines()
    if len(lines) == world_size and _everyone(world_size).issubset(lines):
        return Released(int(lines[-1][1:]), listeners=False, shared=True)
    return None


@functools.lru_cache
def _everyone(world_size: int) -> frozenset[bytes]:
    """The lines of all ranks, where all of them keep the keys."""
    return frozenset(b"k%d" % rank for rank in range(world_size))


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
    if line[:1] in (b"a", b"m", b"k") and line[1:].isdigit():
        return int(line[1:]), None
    if not _COMMITS.fullmatch(line):
        raise ValueError(line)
    rank, leader = line[1:].split()
    return int(rank), int(leader)


def _judge_break(line: bytes, arrived: set[int], world_size: int, sequence: int) -> Broken | None:
    try:
        entry, broken = _read_break(line[1:])
    except ValueError:
        return Broken(None, f"something else wrote {show(line)} among this phase's arrivals")
    if entry.get("sequence") != sequence:
        return None
    if broken.timeout_secs is None:
        return Broken(broken.rank, broken.reason)
    if "missing" not in entry:
        named = tuple(rank for rank in range(world_size) if rank not in arrived)
        return replace(broken, missing=named)
    return broken


def _read_break(text: bytes) -> tuple[dict[str, Any], Broken]:
    """What a rank wrote that gave up, as it stands and as it is meant.

    :raises ValueError: something else wrote it
    """
    try:
        entry = json.loads(text)
        broken = Broken(
            entry["rank"], entry["reason"], entry["timeout_secs"], tuple(entry.get("missing", ()))
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ValueError(f"no break: {show(text)}") from exc
    if not (
        isinstance(broken.rank, int | None)
        and isinstance(broken.reason, str)
        and isinstance(broken.timeout_secs, int | float | None)
        and all(isinstance(rank, int) for rank in broken.missing)
    ):
        raise ValueError(f"no break: {show(text)}")
    return entry, broken


def _call(leader: int | None) -> str:
    return "execute_barrier()" if leader is None else f"commit(leader={leader})"


def show(line: bytes) -> str:
    """For messages: what stands somewhere, or how it begins."""
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
    said, newline, result = value.partition(b"\n")
    if newline and _RELEASES.fullmatch(said):
        return Released(int(said[1:]), result)
    if value[:1] != b"b":
        raise ValueError(f"no verdict: {show(value)}")
    return _read_break(value[1:])[1]
