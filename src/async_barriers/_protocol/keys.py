"""The names of all keys in the store; pure functions, no store in sight.

Law 9 rests on this module. User text stands behind its own length, so no choice of prefix and name
makes two keys collide ("ckpt1" + "0" is not "ckpt" + "10" here). Every generation has an identity
that is never used again, so that no key of one is ever a key of another.
"""

from __future__ import annotations

from functools import cached_property

# TCPStore refuses keys over 8 KiB by dropping the connection. The rest is left for the
# prefixes of PrefixStores that wrap the store we are given.
MAX_KEY_BYTES = 7 * 1024
# The longest text after a phase's path: "/payload/" and a rank.
_LONGEST_FIELD = 32
_LONGEST_SEQUENCE = "s" + "9" * 20
_LONGEST_GENERATION = "9" * 10 + "-" + "f" * 16


def measured(text: str) -> str:
    """Text behind its own length, so that it can be followed by other text."""
    return f"{len(text.encode())}:{text}"


class PhaseKeys:
    """The keys of one phase.

    :ivar path: what all of them begin with
    :ivar log: the ranks that entered, and those that departed, one a line
    :ivar count: the register that decides; see `count`
    :ivar departed: how many ranks departed, but for some that entered another phase as they did
    :ivar released: written by the last rank when all have entered; ranks wait for it, in a commit
        the leader
    """

    __slots__ = ("count", "departed", "log", "path", "released")

    def __init__(self, path: str) -> None:
        self.path = path
        self.log = path + "/log"
        self.count = path + "/count"
        self.released = path + "/released"
        self.departed = path + "/departed"

    @property
    def reason(self) -> str:
        """The reason of a break; written before the break, and the first one stays."""
        return self.path + "/reason"

    @property
    def word(self) -> str:
        """`commit` only: the verdict of the leader."""
        return self.path + "/word"

    @property
    def settled(self) -> str:
        """`commit` only: written with the word; all but the leader wait for it.

        A key that no rank reads, since reading one (see `wire`) wakes those that wait for it.
        """
        return self.path + "/settled"

    @property
    def summary(self) -> str:
        """The ranks that had entered, as one rank found it for all that ask."""
        return self.path + "/summary"

    @property
    def published(self) -> str:
        """`commit` only: its result, if that is too large to stand in the word."""
        return self.path + "/published"

    @property
    def payloads(self) -> str:
        """In large worlds, what the ranks of a commit or an `all_gather` bring, one a line."""
        return self.path + "/payloads"

    @property
    def of_broken(self) -> list[str]:
        """All that may be there of a phase that broke, but for large payloads."""
        return [
            self.log, self.count, self.released, self.departed, self.reason, self.summary,
            self.word, self.settled, self.payloads,
        ]  # fmt: skip

    def payload(self, rank: int) -> str:
        """The payload of ``rank``, if it is too large to stand among the others'."""
        return f"{self.path}/payload/{rank}"


class Keys:
    """All keys of one barrier prefix.

    :param namespace: the beginning of all keys, if other ranks name the same store differently
    """

    def __init__(self, prefix: str, namespace: str = "") -> None:
        self.prefix = prefix
        self.root = f"{namespace}async_barriers/{measured(prefix)}"

    @property
    def state(self) -> str:
        """The generation in force: a register that only `compare_set` changes."""
        return f"{self.root}/state"

    def member(self, rank: int) -> str:
        """The life that holds ``rank``, and the generation that it joined last."""
        return f"{self.root}/member/{rank}"

    @property
    def signal(self) -> str:
        """The rank that has sent this prefix's signal, and the number of the agreement."""
        return f"{self.root}/signal"

    @property
    def commits(self) -> str:
        """The records of the last released commits, in their order; see `records`."""
        return f"{self.root}/commits"

    @property
    def commits_number(self) -> str:
        """How many commits were ever released."""
        return f"{self.root}/commits/number"

    def commits_news(self, slot: int) -> str:
        """Wakes observers that wait for another record; a few are there at a time."""
        return f"{self.root}/commits/news/{slot}"

    def generation(self, identity: str) -> GenerationKeys:
        return GenerationKeys(f"{self.root}/{identity}")

    @cached_property
    def overhead(self) -> int:
        """The largest size of a key, in bytes, without the name of its phase."""
        longest = self.generation(_LONGEST_GENERATION).phase("", _LONGEST_SEQUENCE).path
        # "0:" grows by at most three digits.
        return len(longest.encode()) + 3 + _LONGEST_FIELD


class GenerationKeys:
    """The keys of one generation."""

    def __init__(self, root: str) -> None:
        self.root = root

    @property
    def roll(self) -> str:
        """One counter: how many joined, how many left, and whether a host waits for that."""
        return f"{self.root}/roll"

    @property
    def closed(self) -> str:
        """The rank that left first, and its reason; written once."""
        return f"{self.root}/closed"

    @property
    def host_leaves(self) -> str:
        """Written when the process that hosts the store wants to leave."""
        return f"{self.root}/host_leaves"

    @property
    def all_left(self) -> str:
        """Written when none of the ranks that a host waits for needs the store any more."""
        return f"{self.root}/all_left"

    @property
    def interrupted(self) -> str:
        """The names in which ranks waited when the generation before ended."""
        return f"{self.root}/interrupted"

    @property
    def threaded(self) -> str:
        """How many ranks wait only for their bell, and not for the key that releases a phase."""
        return f"{self.root}/threaded"

    @property
    def unfinished(self) -> str:
        """Broken phases that some rank never came to; see `leaving`."""
        return f"{self.root}/unfinished"

    @property
    def common(self) -> list[str]:
        """All keys of the generation that are neither of one rank nor of a phase."""
        return [
            self.roll, self.closed, self.host_leaves, self.all_left, self.threaded,
            self.interrupted, self.heard, self.unfinished,
        ]  # fmt: skip

    @property
    def heard(self) -> str:
        """One rank's findings about missing ranks, for a moment; see `presence`."""
        return f"{self.root}/heard"

    def bell(self, rank: int) -> str:
        """Has ``rank`` look around."""
        return f"{self.root}/bell/{rank}"

    def asked(self, rank: int) -> str:
        """The keys that ``rank`` is to write, to show that it lives."""
        return f"{self.root}/asked/{rank}"

    def answer(self, token: str) -> str:
        return f"{self.root}/answer/{token}"

    def latest(self, name: str) -> str:
        """The latest step of ``name`` that was broken, until all ranks are past it."""
        return f"{self.root}/latest/{measured(name)}"

    def phase(self, name: str, sequence: str) -> PhaseKeys:
        return PhaseKeys(f"{self.root}/phase/{measured(name)}/{sequence}")


def check_prefix(prefix: str) -> None:
    """Refuse a prefix that does not fit into a key."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, not {prefix!r}")
    if not prefix:
        raise ValueError("prefix is empty; it must be a non-empty string")
    # "0:" grows by at most three digits.
    _check_length("prefix", prefix, Keys("").overhead + 3)


def check_name(keys: Keys, name: str) -> None:
    """Refuse a phase name that is too long for the store."""
    if type(name) is str and len(name) < 256 and name.isascii() and len(keys.prefix) < 1024:
        return  # Most often.
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
