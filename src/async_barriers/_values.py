"""The values that a crossing gives to its caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BarrierResult:
    """A phase that was released.

    :ivar name: the name given at the call
    :ivar sequence: which crossing of that name it was, from 0; or the step that was given
    :ivar waited_secs: how long this rank waited, in seconds
    :ivar last_rank: the rank that entered last and so released all. It may be None if this rank
        waited less than 10 ms, or if that rank could not say that it was the last
    """

    name: str
    sequence: int
    waited_secs: float
    last_rank: int | None

    def __init__(self, name: str, sequence: int, waited_secs: float, last_rank: int | None) -> None:
        # The constructor that dataclass makes for a frozen class takes four times as long.
        self.__dict__.update(
            name=name, sequence=sequence, waited_secs=waited_secs, last_rank=last_rank
        )


@dataclass(frozen=True)
class MissingRank:
    """A rank that a phase waits for, and whether it is alive.

    :ivar rank: its number, within the barrier
    :ivar host: the host name of the process that joined with this rank; None if none has
    :ivar pid: the process id of that process, on its host
    :ivar state: ``"alive"`` (it answered), ``"silent"`` (it joined, and does not answer: it is
        stopped, dead, cut off, or its event loop is blocked), ``"left"`` (it closed its barrier) or
        ``"absent"`` (it never joined)
    :ivar doing: what it last said by `Barrier.report`, in one line of at most 200 characters. Of a
        rank that does not answer, its last text from when it did, if a rank asked then
    :ivar heard_secs_ago: how many seconds ago it said that, if it is alive. If it said nothing, or
        does not answer, how long ago it was last heard of; None if it never was
    """

    rank: int
    host: str | None
    pid: int | None
    state: str
    doing: str | None = None
    heard_secs_ago: float | None = None


@dataclass(frozen=True)
class BarrierProgress:
    """How far a phase has come in which this rank still waits.

    :ivar name: the name given at the call
    :ivar sequence: which crossing of that name it is, from 0; or the step that was given
    :ivar arrived: how many ranks had entered
    :ivar world_size: how many have to enter
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
    """How this rank's phases ended since its barrier was built, in numbers.

    :ivar released: how many were released
    :ivar broken: how many ended otherwise for this rank; the sum of ``broken_by``
    :ivar broken_by: how many broke for each reason. These are always present: ``"timeout"`` (a
        deadline, of any rank), ``"gave_up"`` (this rank was cancelled, raised or aborted),
        ``"peer"`` (another rank did), ``"left"`` (a rank closed its barrier), ``"restart"`` (a rank
        joined again), ``"connection"`` (the store was lost or not reached) and ``"closed"`` (this
        barrier was closed)
    :ivar waited_secs: how long this rank waited in all of them together, in seconds; it includes a
        leader's publishing
    :ivar waited_secs_at_most: the longest of these waits, in seconds
    :ivar came_last: in how many of the released ones this rank entered last
    :ivar reconnections: how often another connection to the store replaced a lost one
    """

    released: int
    broken: int
    broken_by: Mapping[str, int]
    waited_secs: float
    waited_secs_at_most: float
    came_last: int
    reconnections: int
