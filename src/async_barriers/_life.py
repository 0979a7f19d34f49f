"""The turns that one rank takes in one generation."""

from __future__ import annotations

from collections import Counter

from ._membership import Membership
from ._protocol import LONGEST_SERIES, Turn

# Of so many names the keys stay in the store between two crossings.
_KEPT_NAMES = 4


class Life:
    """A membership, and how many turns of each name were taken in it."""

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self._sequences: Counter[str] = Counter()
        # The latest turns of names whose keys may serve the next phase, too.
        self._kept: dict[str, Turn] = {}
        self._last_name: str | None = None

    @property
    def kept(self) -> list[Turn]:
        """Those that may not have departed from keys which they kept."""
        return list(self._kept.values())

    def next_sequence(self, name: str) -> int:
        """The sequence number that the next turn of ``name`` will have."""
        return self._sequences[name]

    def latest(self, name: str) -> Turn | None:
        """The latest turn of ``name``, if it wanted to keep its keys."""
        return self._kept.get(name)

    def resume(self, turn: Turn) -> None:
        """The latest turn of its name is one that `next_turn` has not made."""
        self._kept[turn.name] = turn
        self._sequences[turn.name] = turn.sequence + 1

    def next_turn(self, name: str, leader: int | None = None, *, goes_on: bool = False) -> Turn:
        """This rank's turn in the next phase of ``name``; not thread-safe.

        :param goes_on: where it has been said already that the keys are kept
        """
        membership = self.membership
        sequence = self._sequences[name]
        self._sequences[name] = sequence + 1
        before = self._kept.pop(name, None)
        # A name that is crossed again and again, one crossing after the other.
        in_a_row = goes_on or name == self._last_name
        keeps = leader is None and in_a_row and len(self._kept) < _KEPT_NAMES
        if before is not None and before.shared:
            keys = before.keys
            keeps = keeps and before.index < LONGEST_SERIES
        else:
            keys = membership.keys.phase(membership.generation, name, sequence)
            keeps = keeps and (before is None or before.verdict is not None)
        turn = Turn(
            keys,
            name,
            sequence,
            membership.rank,
            membership.world_size,
            leader,
            keeps,
            before,
            membership.holds,
        )
        self._last_name = name
        if keeps:
            self._kept[name] = turn
        return turn
