"""What a crossing hands to its caller."""

from __future__ import annotations

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
