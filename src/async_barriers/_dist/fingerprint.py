"""How each rank describes its call before anything else, packed into two numbers.

gloo sends a message round for each number of an all-reduce, and four take twice as long as two. The
maximum of the first number is the largest call of any rank, with the rank that came last among
those. The maximum of the second, which is negative, is the smallest call. If they are the same, all
ranks make the same call.
"""

from __future__ import annotations

from typing import NamedTuple

EXECUTE, GATHER, COMMIT = 0, 1, 2
# The highest signed number of 64 bits.
_BITS = 63
# Arrival times, in milliseconds, modulo some hours: as exact as the ranks' clocks agree.
_TICKS_BITS, _TICKS_PER_SEC = 26, 1000


class Operation(NamedTuple):
    """The call that a rank makes.

    :ivar kind: EXECUTE, GATHER, or COMMIT and more by the leader's rank
    """

    kind: int
    step: int | None = None

    def __str__(self) -> str:
        step = "" if self.step is None else f"step={self.step}"
        if self.kind < COMMIT:
            return f"{'all_gather' if self.kind == GATHER else 'execute_barrier'}({step})"
        return f"commit({step}{', ' * bool(step)}leader={self.kind - COMMIT})"


class Fingerprint(NamedTuple):
    """The knowledge of all ranks about a call once they have met.

    :ivar lowest: the smallest call of any rank; None for one that does not fit into it
    :ivar highest: the largest
    :ivar last: the last rank among those with the largest call, by the ranks' own clocks
    :ivar aborted: ``last`` makes no call, but aborts
    """

    lowest: Operation | None
    highest: Operation | None
    last: int
    aborted: bool


def pack(operation: Operation | None, came: float, rank: int, size: int) -> tuple[int, int]:
    """The numbers of one rank; None for an abort.

    :param came: the time of the call, in seconds on the clock that ranks compare
    """
    code = _abort(size) if operation is None else _code(operation, size)
    ticks = int(came * _TICKS_PER_SEC) % (1 << _TICKS_BITS)
    return ((code << _TICKS_BITS) + ticks) * size + rank, -code


def unpack(largest: int, smallest: int, size: int) -> Fingerprint:
    """The meaning of the maxima over all ranks."""
    code, last = divmod(largest, size)
    code >>= _TICKS_BITS
    lowest, highest = _operation(-smallest, size), _operation(code, size)
    return Fingerprint(lowest, highest, last, code == _abort(size))


def _abort(size: int) -> int:
    """A number higher than that of any call."""
    return (1 << (_BITS - _TICKS_BITS - size.bit_length())) - 1


def _far(size: int) -> int:
    """The number of all calls with steps that are too large."""
    return _abort(size) - 1


def _code(operation: Operation, size: int) -> int:
    step = 0 if operation.step is None else operation.step + 1
    return min(step * (COMMIT + size) + operation.kind, _far(size))


def _operation(code: int, size: int) -> Operation | None:
    if code >= _far(size):
        return None
    step, kind = divmod(code, COMMIT + size)
    return Operation(kind, step - 1 if step else None)
