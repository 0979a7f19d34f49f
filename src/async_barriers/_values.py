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
class MissingRank:
    """A rank that a phase waits for, and whether it is there.

    :ivar rank: its number, within the barrier
    :ivar host: of the process that has joined with this rank, by its own name; None if none has
    :ivar pid: of that process, there
    :ivar state: ``"alive"`` (it answered), ``"silent"`` (it joined, and does not answer: stopped,
        dead, cut off, or its event loop is blocked), ``"left"`` (it closed its barrier) or
        ``"absent"`` (it never joined)
    :ivar doing: what it last said by `Barrier.report`, in one line of at most 200 characters
    :ivar heard_secs_ago: how many seconds ago that was; where there is no such word, how long ago
        the rank was heard of; None where it never was
    """

    rank: int
    host: str | None
    pid: int | None
    state: str
    doing: str | None = None
    heard_secs_ago: float | None = None


@dataclass(frozen=True)
class BarrierProgress:
    """How far a phase has come that this rank still waits in.

    :ivar name: the name given at the call
    :ivar sequence: which crossing of that name it is, from 0
    :ivar arrived: how many ranks had entered
    :ivar world_size: how many have to
    :ivar missing_ranks: the ranks that had not entered, sorted
    :ivar waited_secs: how long this rank has waited, in seconds
    :ivar missing: what is known of the missing ranks; of the first 1,024 of them
    """

    name: str
    sequence: int
    arrived: int
    world_size: int
    missing_ranks: tuple[int, ...]
    waited_secs: float
    missing: tuple[MissingRank, ...] = ()


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
