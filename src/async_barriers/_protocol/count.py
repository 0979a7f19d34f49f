"""The register that decides a phase: one number, which ranks add to as they enter.

An `add` is atomic, and its answer shows all that came before it. Each rank adds once, in three
fields: 1, its own number plus one, and the kind of its call. The phase is *full* when each field
has the sum over all ranks. A duplicate or rubbish cannot replace a missing rank: it makes the
register *foul*. A negative value is *broken*: a `compare_set` negates a value that is not full. A
full register cannot become broken, and a broken one cannot become full, so the verdict of a phase
is a function of this one register.
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
    """The fields of the register.

    :ivar arrived: how many ranks entered
    :ivar kinds: the sum of their kinds of call
    :ivar ranks: the sum of their numbers, each plus one
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
        """Whether it can never become full, since something besides the ranks was counted."""
        full = world_size * (world_size + 1) // 2
        return self.arrived > world_size or (self.arrived == world_size and self.ranks != full)

    @property
    def broken_value(self) -> bytes:
        """The value that a rank writes to break the phase."""
        return b"%d" % (self.value + _BROKEN)


of_sum = Count


def of_value(value: bytes | None) -> Count:
    """The count in a value that was read; an absent register is empty.

    :raises ValueError: something else wrote it
    """
    if not is_count(value):
        raise ValueError(value)
    return of_sum(int(value or b"0"))


def is_count(value: bytes | None) -> bool:
    """Whether `of_value` can read it; it can read an absent register."""
    return not value or (len(value) <= _DIGITS and value.removeprefix(b"-").isdigit())
