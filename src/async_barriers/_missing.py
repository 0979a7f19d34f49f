"""How messages name the ranks that a phase waits for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ._errors import in_one_line, plural_ranks, seconds
from ._values import MissingRank

# A message has so many characters of a rank's report.
DOING_CHARS = 200
# Messages describe so many ranks; the attributes have more.
_MOST = 20


def told(missing: Sequence[MissingRank], global_ranks: Sequence[int] | None = None) -> str:
    """``3 (node7, alive, 'uploaded 3 of 8 GB' 2 s ago), 5 (node9, silent for 28 s)``.

    :param global_ranks: of the ranks of a subgroup, in the job
    """
    shown = ", ".join(_one(each, global_ranks) for each in missing[:_MOST])
    rest = len(missing) - _MOST
    return f"{shown} and {rest} more" if rest > 0 else shown


def _one(rank: MissingRank, global_ranks: Sequence[int] | None) -> str:
    facts = []
    if global_ranks is not None:
        facts.append(f"global rank {global_ranks[rank.rank]}")
    if rank.host is not None:
        facts.append(in_one_line(rank.host, DOING_CHARS))
    secs = rank.heard_secs_ago
    if rank.state == "absent":
        facts.append("never joined")
    elif rank.state == "silent" and secs is not None:
        facts.append(f"silent for {_rounded(secs)}")
    else:
        facts.append(rank.state)
    if rank.doing is not None:
        ago = f" {_rounded(secs)} ago" if rank.state == "alive" and secs is not None else ""
        before = "" if rank.state == "alive" else "before that "
        facts.append(f"{before}'{in_one_line(rank.doing, DOING_CHARS)}'{ago}")
    return f"{rank.rank} ({', '.join(facts)})"


def _rounded(secs: float) -> str:
    return seconds(round(secs, 1) if secs < 10 else round(secs))


def had_not_entered(
    ranks: tuple[int, ...],
    missing: Sequence[MissingRank],
    global_ranks: Iterable[int] | None = None,
) -> str:
    """The part of a timeout's message about them."""
    subgroup = None if global_ranks is None else tuple(global_ranks)
    text = f"{plural_ranks(ranks)} had not entered"
    if missing:
        text += f": {told(missing, subgroup)}"
    else:
        text += in_job(ranks, subgroup)
    return f"{text}; look for a crash or a stall there, or allow a longer timeout_secs"


def in_job(ranks: Iterable[int], global_ranks: Sequence[int] | None) -> str:
    """`` (global ranks 2, 3)`` behind the ranks of a subgroup; else nothing."""
    known = [global_rank(rank, global_ranks) for rank in ranks]
    numbers = tuple(number for number in known if number is not None)
    return f" (global {plural_ranks(numbers)})" if numbers else ""


def global_rank(rank: int | None, global_ranks: Sequence[int] | None) -> int | None:
    """The number of a subgroup's rank in the job. What a peer says of a rank may be wrong."""
    if rank is None or global_ranks is None or not 0 <= rank < len(global_ranks):
        return None
    return global_ranks[rank]
