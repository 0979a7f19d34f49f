"""The register that decides a phase: one number, which ranks add to as they enter.

An `add` is atomic, and its answer shows all that came before it. Each rank adds once, in three
fields: 1, the code of its call, and its own number plus one. The phase is *full* when each field
has the sum over all ranks. A duplicate or rubbish cannot replace a missing rank: it makes the
register *foul*. A negative value is *broken*: a `compare_set` negates a value that is not full, or
a rank that will never enter adds `BREAKING`. A full register cannot become broken, and a broken one
cannot become full, so the verdict of a phase is a function of this one register.
"""

from __future__ import annotations

MAX_RANKS = 1 << 14
EXECUTE, COMMIT, GATHER = range(3)
CALLS = ("execute_barrier()", "commit()", "all_gather()")

_CODE = 1 << 15
_RANK = 1 << 35
_CODES = _RANK // _CODE
# Below minus the sum of all ranks, and far enough from the least number for what is added to it.
_BROKEN = -(3 << 61)
# A rank that will never enter breaks a phase by adding this. In worlds of up to so many ranks it is
# below minus the sum of all ranks, and they all can add it.
FEW = 256
BREAKING = -(1 << 52)
_DIGITS = 20


def code(kind: int, leader: int, world_size: int) -> int:
    """The number that a call adds, so that ranks that make different calls notice it.

    The first and the last number mean `EXECUTE` and `GATHER`: only equal calls add up to so little
    or so much. Different leaders of a commit may add up to that of another one, so leaders also
    look into the log. In worlds of more than 1,023 ranks, some leaders have the same number.
    """
    leaders = _leaders(world_size)
    if kind == COMMIT:
        return 1 + leader % leaders
    return 0 if kind == EXECUTE else 1 + leaders


def _leaders(world_size: int) -> int:
    return min(world_size, (_CODES - 1) // world_size - 1)


def call_of(code: int, world_size: int) -> str:
    """The call with a code, in words."""
    leaders = _leaders(world_size)
    if 0 < code <= leaders:
        return f"commit(leader={code - 1})" if leaders == world_size else "commit()"
    return CALLS[EXECUTE if code == 0 else GATHER]


def entry(rank: int, code: int) -> int:
    """What ``rank`` adds when it enters."""
    return 1 + code * _CODE + (rank + 1) * _RANK


class Count:
    """The fields of the register.

    :ivar arrived: how many ranks entered
    :ivar codes: the sum of the codes of their calls
    :ivar ranks: the sum of their numbers, each plus one
    """

    __slots__ = ("arrived", "broken", "codes", "ranks", "value")

    def __init__(self, total: int) -> None:
        self.value = total
        self.broken = total < 0
        if self.broken:
            total -= _BROKEN
        self.arrived = total % _CODE
        self.codes = total // _CODE % _CODES
        self.ranks = total // _RANK

    def full(self, world_size: int, code: int) -> bool:
        """Whether every rank entered, with the same call."""
        return (
            self.arrived == world_size
            and not self.broken
            and self.codes == code * world_size
            and self.ranks == world_size * (world_size + 1) // 2
        )

    def differs(self, code: int) -> bool:
        """Whether a rank that entered made another call."""
        return self.codes != code * self.arrived

    def others(self, rank: int, code: int, world_size: int) -> tuple[str, str]:
        """The ranks that entered before ``rank`` did, and their call, in words."""
        many = self.arrived - 1
        who = f"rank {self.ranks - rank - 2}" if many == 1 else "others"
        same, rest = divmod(self.codes - code, max(many, 1))
        known = rest == 0 and 0 <= same <= 1 + _leaders(world_size)
        return who, call_of(same, world_size) if known else "another call"

    def foul(self, world_size: int) -> bool:
        """Whether it can never become full, since something besides the ranks was counted."""
        full = world_size * (world_size + 1) // 2
        return self.arrived > world_size or (self.arrived == world_size and self.ranks != full)

    def broken_by(self, rank: int) -> bytes:
        """The value with which ``rank`` breaks the phase.

        It is no other rank's, so that of many that break it at once each knows whether it did.
        """
        # No ranks add up to so much: something else was counted.
        return b"%d" % (min(self.value, 5 << 60) + _BROKEN + (rank + 1) * _RANK)


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
