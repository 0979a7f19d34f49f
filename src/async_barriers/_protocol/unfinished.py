"""Phases whose keys a later rank has to delete, by name, in a key of their generation.

A phase is deleted by the last rank that departs from it. A broken phase may have none, since a rank
need not come to it. So the first rank that departs names it as it leaves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from .keys import GenerationKeys, PhaseKeys
from .store import Append, Request
from .verdict import RUBBISH


def naming(own: GenerationKeys, names: Mapping[str, str]) -> list[Request]:
    """Name phases: what their keys begin with, and the key of the latest broken step."""
    lines = b"".join(json.dumps(each).encode() + b"\n" for each in names.items())
    return [Append(own.unfinished, lines)] if lines else []


def keys_of(value: bytes | None, beneath: str) -> list[str]:
    """All keys of the phases that are named, if they are ``beneath`` a key."""
    found = []
    for line in (value or b"").splitlines():
        try:
            path, latest = json.loads(line)
            if path.startswith(beneath) and latest.startswith(beneath):
                found += [*PhaseKeys(path).of_broken, latest]
        except RUBBISH:
            continue  # None of ours.
    return found
