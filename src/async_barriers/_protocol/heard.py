"""The findings about missing ranks, and how they are written; pure functions, frozen values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .._errors import in_one_line
from .._missing import DOING_CHARS
from .._values import MissingRank

# So many ranks are described in detail; if they are more than a few, each in few words.
MOST = 1024
_FEW, _FEW_CHARS = 64, 60


@dataclass(frozen=True)
class Heard:
    """The knowledge of a missing rank.

    :ivar idle_secs: for how long it has reported nothing new, as it says itself; None if it did not
        answer, or never reported anything
    """

    rank: MissingRank
    idle_secs: float | None = None


def encode_rows(heard: Iterable[Heard]) -> bytes:
    """The findings about ranks, as the store has them."""
    rows = list(heard)[:MOST]
    chars = DOING_CHARS if len(rows) <= _FEW else _FEW_CHARS
    return json.dumps([_row(each, chars) for each in rows], separators=(",", ":")).encode()


def _row(heard: Heard, chars: int) -> list[object]:
    facts = asdict(heard.rank)
    if facts["doing"] is not None:
        facts["doing"] = in_one_line(facts["doing"], chars)
    idle = None if heard.idle_secs is None else round(heard.idle_secs, 3)
    if facts["heard_secs_ago"] is not None:
        facts["heard_secs_ago"] = round(facts["heard_secs_ago"], 3)
    return [*facts.values(), idle]


def decode_rows(value: bytes | str) -> dict[int, Heard]:
    """The inverse, by rank; empty if another client wrote it."""
    try:
        return {row.rank.rank: row for row in map(_heard, json.loads(value)[:MOST])}
    except (ValueError, TypeError, RecursionError):
        return {}


def _heard(row: list[object]) -> Heard:
    rank, host, pid, state, doing, ago, idle = row
    right = (
        isinstance(rank, int)
        and isinstance(host, str | None)
        and isinstance(pid, int | None)
        and state in ("alive", "silent", "left", "absent")
        and isinstance(doing, str | None)
        and isinstance(ago, int | float | None)
        and isinstance(idle, int | float | None)
    )
    if not right:
        raise ValueError(row)
    return Heard(MissingRank(rank, host, pid, state, doing, ago), idle)  # type: ignore[arg-type]
