"""The payloads of a commit or an `all_gather`, in the lines with which the ranks arrive.

A rank that needs them reads one key. In a small world that is the phase's log. At a deadline each
rank reads the log, for the names alone, so in a larger one the payloads stand apart from it. A
large payload has a key of its own, and its line says so. Pure functions.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode

from .._errors import BarrierError

# With payloads of this size, 16,384 ranks fill three quarters of what c10d's server takes in one
# value.
SMALL_BYTES = 256
# In worlds up to this size, payloads stand in the log: for all ranks to read 1.4 MiB is little.
IN_LOG = 64
_LINES = re.compile(rb"^([0-9]{1,5})(?: c[0-9]{1,5})? (=[A-Za-z0-9+/]*=*|-)$", re.MULTILINE)


def carried(payload: bytes) -> bytes:
    """The end of the line with which a rank brings ``payload``."""
    return b"=" + b64encode(payload) if len(payload) <= SMALL_BYTES else b"-"


def brought(log: bytes | None, world_size: int) -> tuple[dict[int, bytes], list[int]]:
    """The small payloads, and the ranks whose payloads have keys of their own; ignores other lines.

    :raises BarrierError: something else wrote there
    """
    found: dict[int, bytes] = {}
    large: list[int] = []
    for rank, brings in _LINES.findall(log or b""):
        try:
            if brings == b"-":
                large.append(int(rank))
            else:
                found.setdefault(int(rank), b64decode(brings[1:]))
        except ValueError:
            continue
    here = {*found, *large}
    if here != set(range(world_size)):
        raise BarrierError(
            "something else wrote to the payloads of this phase in the store "
            f"({len(here)} of {world_size} are there)"
        )
    return found, large
