"""The register that decides a phase: one number, which ranks add to as they enter.

An `add` is atomic, and its answer shows all that came before it. Each rank adds once: 1, its own
number and one, and the kind of its call, each in a field of its own. So the phase is *full* when
all fields are what all ranks together come to; a duplicate or rubbish does not stand in for a rank
that is missing, but makes the register *foul*. Broken is the sign: a `compare_set` from a value
that is not full to the same value below zero. What is full cannot become broken, and what is broken
cannot become full, so the verdict of a phase is a function of this one register.
"""

from __future__ import annotations

MAX_RANKS = 1 << 14
EXECUTE, COMMIT, GATHER = range(3)
CALLS = ("execute_barrier()", "commit()", "all_gather()")

_KIND = 1 << 15
_RANK = 1 << 32
_RANKS = _RANK // _KIND
_BROKEN = -(1 << 63)
_DIGITS = 20


def entry(rank: int, kind: int) -> int:
    """What ``rank`` adds when it enters."""
    return 1 + kind * _KIND + (rank + 1) * _RANK


class Count:
    """What the register says.

    :ivar arrived: how many entered
    :ivar kinds: the sum of their kinds of call
    :ivar ranks: the sum of their numbers, each and one
    """

    __slots__ = ("arrived", "broken", "kinds", "ranks", "value")

    def __init__(self, total: int) -> None:
        self.value = total
        self.broken = total < 0
        if self.broken:
            total -= _BROKEN
        self.arrived = total % _KIND
        self.kinds = total // _KIND % _RANKS
        self.ranks = total // _RANK

    def full(self, world_size: int, kind: int) -> bool:
        """Whether every rank entered, with the same call."""
        return (
            self.arrived == world_size
            and not self.broken
            and self.kinds == kind * world_size
            and self.ranks == world_size * (world_size + 1) // 2
        )

    def differs(self, kind: int) -> bool:
        """Whether a rank that entered made another kind of call."""
        return self.kinds != kind * self.arrived

    def foul(self, world_size: int) -> bool:
        """Whether it can never become full, since something else was counted."""
        full = world_size * (world_size + 1) // 2
        return self.arrived > world_size or (self.arrived == world_size and self.ranks != full)

    @property
    def broken_value(self) -> bytes:
        """What it is set to by a rank that breaks the phase."""
        return b"%d" % (self.value + _BROKEN)


of_sum = Count


def of_value(value: bytes | None) -> Count:
    """What was read; an absent register is empty.

    :raises ValueError: something else wrote it
    """
    if not is_count(value):
        raise ValueError(value)
    return of_sum(int(value or b"0"))


def is_count(value: bytes | None) -> bool:
    """Whether it may be read as one; an absent register may."""
    return not value or (len(value) <= _DIGITS and value.removeprefix(b"-").isdigit())
