"""Phases whose keys a later rank has to delete, by name, in a key of their generation.

A phase is deleted by the last rank that departs from it. A broken phase may have none, since a rank
need not come to it. So the first rank that departs names it as it leaves, or joins again. The names
are those of phases of this generation, and of earlier ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from .keys import GenerationKeys, Keys, PhaseKeys
from .store import Append, DeleteMany, Request
from .verdict import RUBBISH

# For how many generations after its own a phase is kept.
KEPT = 8


def naming(own: GenerationKeys, names: Mapping[str, str]) -> list[Request]:
    """Name phases: what their keys begin with, and the key of the latest broken step."""
    lines = b"".join(json.dumps(each).encode() + b"\n" for each in names.items())
    return [Append(own.unfinished, lines)] if lines else []


def keys_of(value: bytes | None, keys: Keys) -> list[str]:
    """All keys of the phases that are named."""
    return [
        key for path, latest in _named(value, keys) for key in (*PhaseKeys(path).of_broken, latest)
    ]


def handing_on(
    value: bytes | None, keys: Keys, over: int, following: GenerationKeys
) -> list[Request]:
    """When generation ``over`` has ended: delete phases of earlier ones, and name the others in the
    one that follows.

    A rank may still break a phase of a generation that has ended for itself, and must find how it
    was broken. So phases are kept for some generations.
    """
    named = list(_named(value, keys))
    old = {path: latest for path, latest in named if over - _number(path, keys) >= KEPT}
    spent = [key for path in old for key in PhaseKeys(path).of_broken]
    others = {path: latest for path, latest in named if path not in old}
    return [*naming(following, others), DeleteMany([*spent, *old.values()])]


def _number(path: str, keys: Keys) -> int:
    """The number of the generation of a phase."""
    return int(path[len(keys.root) + 1 :].partition("-")[0])


def _named(value: bytes | None, keys: Keys) -> Iterator[tuple[str, str]]:
    """What is none of ours is passed over."""
    for line in (value or b"").splitlines():
        try:
            path, latest = json.loads(line)
            if path.startswith(keys.root) and latest.startswith(keys.root):
                _number(path, keys)
                yield path, latest
        except RUBBISH:
            continue
