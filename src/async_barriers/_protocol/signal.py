"""The register of a signal: a rank that sends one writes there, and then rings the bells of all.

The first entry stays, so several senders make one agreement. An agreement has the number of those
before it in its generation. Only a later one takes its place.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from .keys import Keys
from .membership import Membership
from .store import CompareSet, Request, SetMany
from .verdict import RUBBISH


@dataclass(frozen=True)
class Sent:
    """A rank has sent the signal, in the agreement with this number of a generation."""

    generation: str
    number: int
    rank: int
    reason: str

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def of(self, turn: tuple[str, int]) -> bool:
        return (self.generation, self.number) == turn


def decoded(value: bytes | None) -> Sent | None:
    if not value:
        return None
    try:
        said = json.loads(value)
        return Sent(
            str(said["generation"]), int(said["number"]), int(said["rank"]), str(said["reason"])
        )
    except RUBBISH:
        return None


def sending(keys: Keys, membership: Membership, held: bytes, said: Sent) -> list[Request]:
    """Replace the entry ``held`` and wake all, in one message, so that all learn of it."""
    return [CompareSet(keys.signal, held, said.encode()), SetMany(membership.bells, b"signal")]
