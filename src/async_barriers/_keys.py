"""The names of all keys in the store; pure functions, no store in sight.

Law 9 rests on this module: user text stands behind its own length, so that no choice of
prefix and name lets two keys collide ("ckpt1" + "0" is not "ckpt" + "10" here).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

# TCPStore refuses keys over 8 KiB by dropping the connection. The rest is left for the
# prefixes of PrefixStores that wrap the store we are given.
MAX_KEY_BYTES = 7 * 1024
# What follows a phase's path: at most "/payload/" and a rank.
_LONGEST_FIELD = 32
# Phases that share their keys write to these logs in turn: while one is written, the one before
# may still be read, and the one after is being emptied.
LOGS = 3


def _measured(text: str) -> str:
    return f"{len(text.encode())}:{text}"


# Nothing changes one. But each crossing of a new name makes one, and a frozen one takes six times
# as long.
@dataclass(init=False, slots=True, unsafe_hash=True)
class PhaseKeys:
    """The keys of one phase, identified by (prefix, generation, name, sequence).

    Phases of one name that follow each other may share them, and write to the logs in turn.

    :ivar logs: every arrival and every break, in the order that decides
    :ivar count: how many ranks arrived and how many are done, in one counter
    """

    path: str
    generation: int
    logs: tuple[str, ...] = field(compare=False, repr=False)
    count: str = field(compare=False, repr=False)

    def __init__(self, path: str, generation: int) -> None:
        self.path = path
        self.generation = generation
        self.logs = tuple(f"{path}/log{number or ''}" for number in range(LOGS))
        self.count = path + "/count"

    @property
    def verdict(self) -> str:
        """Absent until the phase is decided; waiting ranks block on it."""
        return self.path + "/verdict"

    @property
    def gathered(self) -> str:
        """`commit` only: what the leader blocks on."""
        return self.path + "/gathered"

    @property
    def summary(self) -> str:
        """Who is missing, as one rank found it for all that ask."""
        return self.path + "/summary"

    def payload(self, rank: int) -> str:
        """`commit` only: what ``rank`` brought."""
        return f"{self.path}/payload/{rank}"


@dataclass(frozen=True)
class Keys:
    """All keys of one barrier prefix."""

    prefix: str

    @cached_property
    def root(self) -> str:
        return f"async_barriers/{_measured(self.prefix)}"

    @property
    def generation(self) -> str:
        """A lower bound for the generation in force."""
        return f"{self.root}/generation"

    def over(self, generation: int) -> str:
        """Present once ``generation`` is over; names the rank that ended it."""
        return f"{self.root}/over/{generation}"

    def world(self, generation: int) -> str:
        """The world size that all members of ``generation`` must share."""
        return f"{self.root}/world/{generation}"

    def roll(self, generation: int) -> str:
        """How many members joined and how many left, in one counter."""
        return f"{self.root}/roll/{generation}"

    def all_left(self, generation: int) -> str:
        """Present once no member but the host still needs the store."""
        return f"{self.root}/all_left/{generation}"

    def member(self, rank: int) -> str:
        """The generation that ``rank`` joined last, and which of its lives that was."""
        return f"{self.root}/member/{rank}"

    def mail(self, generation: int, rank: int) -> str:
        """Wakes the watcher of ``rank``."""
        return f"{self.root}/mail/{generation}/{rank}"

    @cached_property
    def overhead(self) -> int:
        """How long a key is at most, in bytes, without the name of its phase."""
        longest = self.phase(2**31, "", 2**63).path
        # "0:" grows by at most three digits.
        return len(longest.encode()) + 3 + _LONGEST_FIELD

    def phase(self, generation: int, name: str, sequence: int) -> PhaseKeys:
        path = f"{self.root}/phase/{generation}/{_measured(name)}/{sequence}"
        return PhaseKeys(path, generation)


def check_prefix(prefix: str) -> None:
    """Refuse a prefix that no key could carry."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, not {prefix!r}")
    if not prefix:
        raise ValueError("prefix is empty; it must be a non-empty string")
    # "0:" grows by at most three digits.
    _check_length("prefix", prefix, Keys("").overhead + 3)


def check_name(keys: Keys, name: str) -> None:
    """Refuse a phase name that is too long for the store."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, not {name!r}")
    _check_length("name", name, keys.overhead)


def _check_length(what: str, text: str, overhead: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as exc:
        raise ValueError(f"{what} {text!r} cannot be written as UTF-8: {exc.reason}") from exc
    allowed = MAX_KEY_BYTES - overhead
    if size > allowed:
        raise ValueError(
            f"{what} is too long for the store: {size} bytes as UTF-8 ({text[:40]!r}...), "
            f"at most {allowed} are allowed here"
        )
