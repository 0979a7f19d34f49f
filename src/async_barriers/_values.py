"""What a crossing hands to its caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BarrierResult:
    """A phase that was released.

    :ivar name: the name given at the call
    :ivar sequence: which crossing of that name it was, from 0; or the step that was given
    :ivar waited_secs: how long this rank waited, in seconds
    :ivar last_rank: the rank whose arrival released everyone; None where this rank waited less
        than 10 ms for it and nobody was asked, or where that rank could not say so
    """

    name: str
    sequence: int
    waited_secs: float
    last_rank: int | None

    def __init__(self, name: str, sequence: int, waited_secs: float, last_rank: int | None) -> None:
        # What dataclass makes for a frozen class takes four times as long.
        self.__dict__.update(
            name=name, sequence=sequence, waited_secs=waited_secs, last_rank=last_rank
        )


@dataclass(frozen=True)
class BarrierProgress:
    """How far a phase has come that this rank still waits in.

    :ivar name: the name given at the call
    :ivar sequence: which crossing of that name it is, from 0
    :ivar arrived: how many ranks had entered
    :ivar world_size: how many have to
    :ivar missing_ranks: the ranks that had not entered, sorted
    :ivar waited_secs: how long this rank has waited, in seconds
    """

    name: str
    sequence: int
    arrived: int
    world_size: int
    missing_ranks: tuple[int, ...]
    waited_secs: float


@dataclass(frozen=True)
class CommitRecord:
    """A commit that was released: its leader has published.

    :ivar name: the name given at the call
    :ivar sequence: which crossing of that name it was, from 0; or the step that was given
    :ivar result: what ``publish`` returned, ``b""`` for None
    :ivar leader: the rank that published
    :ivar world_size: how many ranks took part
    """

    name: str
    sequence: int
    result: bytes
    leader: int
    world_size: int


@dataclass(frozen=True)
class BarrierStatistics:
    """What became of this rank's phases since its barrier was built.

    :ivar released: how many were
    :ivar broken: how many ended otherwise for this rank; the sum of ``broken_by``
    :ivar broken_by: of those, how many by each of the following, all of which are always there:
        ``"timeout"`` (a deadline, of whichever rank), ``"gave_up"`` (this rank was cancelled,
        raised or aborted), ``"peer"`` (another rank did), ``"left"`` (a rank closed its barrier),
        ``"restart"`` (a rank joined again), ``"connection"`` (the store was lost or not reached)
        and ``"closed"`` (this barrier was)
    :ivar waited_secs: how long this rank waited in all of them together, in seconds; a leader's
        publishing included
    :ivar waited_secs_at_most: in the longest of them
    :ivar came_last: how many of the released ones waited for this rank: it was the last to enter
    :ivar reconnections: how often a connection to the store was lost and another one took its
        place
    """

    released: int
    broken: int
    broken_by: Mapping[str, int]
    waited_secs: float
    waited_secs_at_most: float
    came_last: int
    reconnections: int
