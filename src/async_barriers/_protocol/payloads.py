"""The payloads of a commit or an `all_gather`, in one key for all ranks; pure functions.

Each rank appends its own, so a rank that needs them reads one key. A large payload has a key of its
own, and is announced here.
"""

from __future__ import annotations

import re

from .._errors import BarrierError
from .keys import PhaseKeys
from .store import Append, Request, Set

# With payloads of this size, 16,384 ranks fill half of what c10d's server takes in one value.
SMALL_BYTES = 256
_HEAD = re.compile(rb"([0-9]{1,5}) ([0-9]{1,3}|-)\n")


def bringing(keys: PhaseKeys, rank: int, payload: bytes) -> list[Request]:
    """The requests with which a rank brings ``payload``, before it arrives."""
    if len(payload) <= SMALL_BYTES:
        return [Append(keys.brought, b"%d %d\n%s" % (rank, len(payload), payload))]
    return [Set(keys.payload(rank), payload), Append(keys.brought, b"%d -\n" % rank)]


def brought(value: bytes | None, world_size: int) -> tuple[dict[int, bytes], list[int]]:
    """The small payloads, and the ranks whose payloads have keys of their own.

    :raises BarrierError: something else wrote there
    """
    found: dict[int, bytes] = {}
    large: list[int] = []
    at, value = 0, value or b""
    while at < len(value):
        head = _HEAD.match(value, at)
        if head is None or int(head[1]) >= world_size:
            break
        rank, at = int(head[1]), head.end()
        if head[2] == b"-":
            large.append(rank)
        else:
            found[rank] = value[at : at + int(head[2])]
            at += int(head[2])
    if at != len(value) or len({*found, *large}) != world_size:
        raise BarrierError(
            "something else wrote to the payloads of this phase in the store "
            f"({value[at : at + 40]!r}, {len({*found, *large})} of {world_size} are there)"
        )
    return found, large
