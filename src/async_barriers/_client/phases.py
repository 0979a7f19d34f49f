"""The phases that one rank has begun, and the count of its turns."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .._errors import BarrierConnectionError, BarrierError, BrokenBarrierError, another, describe
from .._protocol.count import GATHER
from .._protocol.keys import PhaseKeys
from .._protocol.membership import Membership
from .._protocol.payloads import SMALL_BYTES
from .._protocol.phase import Entry
from .._protocol.records import Record
from .._protocol.store import CompareSet
from .._protocol.verdict import Broken, Released, Verdict, number
from .._store.event_loop import Waiter
from .._store.future import Effort
from .._store.sources import Connection

# Of a name without a step that was decided: the step, how it was, the rank that broke it, and why.
_NONE = (-1, "", None, "")
# How a step ended of which this rank knows only that it was broken: the store knows more.
_UNKNOWN = ("broken", None, "")


class Phase:
    """One phase, as this rank knows it.

    :ivar turns: those of its generation, which may be over
    :ivar sequence: which crossing of the name it is for this rank, or its step
    :ivar early: begun before all ranks had joined again, so that it does not count
    :ivar alone: its own connection waits for the verdict, since the bell is not heard any more
    :ivar payload: of an early phase; the rank enters again with it
    :ivar decided: the verdict or the error is known
    :ivar entered: whether this rank may have arrived
    :ivar entered_on: the connection on which it did; requests there come after its arrival
    :ivar full: all are in a commit, so only its leader settles it
    :ivar differs: this rank named another leader of a commit than some other rank did
    :ivar brought: the payloads of all ranks, once this rank has read them
    :ivar word: the verdict that this rank, as the leader of a commit, has begun to write
    :ivar error: the caller's error, if that is not what the verdict says
    :ivar quits: its call ends before it, and not at its deadline: this rank enters no more
    :ivar giving_up: its break is under way; it goes on whatever becomes of the caller
    :ivar abandoned: nobody waits for it any more
    :ivar users: how many calls on other connections than its own may still write to its keys
    :ivar since: when its call began, by the loop's clock
    :ivar counted: this rank has learned whether it was the last one to enter
    :ivar last: it was
    :ivar latest: the latest step of its name that was broken, as this rank knew when it entered
    :ivar departure: what is left of it, once nobody waits for it any more
    :ivar record: what its leader writes in the log of commits, once it has begun to
    :ivar lost: the error that ended the connection on which this rank had entered
    """

    # Class attributes, since most phases never change them.
    connection: Connection | None = None
    entered_on: Connection | None = None
    waiter: Waiter | None = None
    since = 0.0
    early = False
    alone = False
    decided = entered = False
    abandoned = giving_up = quits = False
    full = rejoined = differs = False
    counted = last = False
    latest: int | None = None
    departure: Departure | None = None
    large = False
    gave_up_before = False
    users = 0
    verdict: Verdict | None = None
    word: Verdict | None = None
    record: Record | None = None
    error: BarrierError | None = None
    lost: BarrierError | None = None
    payload = b""
    publishing: Any = None
    reopening: Effort[Connection] | None = None
    reopened = False
    brought: dict[int, bytes] | None = None

    def __init__(
        self, turns: Turns, name: str, sequence: int, step: int | None, entry: Entry
    ) -> None:
        self.turns = turns
        self.membership = turns.membership
        self.name = name
        self.sequence = sequence
        self.step = step
        self.entry = entry

    @property
    def token(self) -> bytes:
        """Its name, for a list in the store."""
        return self.name.encode().hex().encode() or b"-"

    @property
    def to_publish(self) -> bool:
        """Whether all are in a commit that this rank leads and has to publish."""
        return self.full and self.entry.leads and not (self.giving_up or self.decided)

    @property
    def hears(self) -> bool:
        """Whether this rank has entered and waits to hear the verdict."""
        return self.entered and not self.decided and not self.giving_up

    @property
    def unsure(self) -> bool:
        """Whether the store may not have counted this rank. If all are in, it has. A phase that
        began too early is deleted when all have joined."""
        on = self.entered_on
        return self.early or (not self.full and (on is None or on.unsaid or on.lost is not None))

    def is_settled(self) -> bool:
        """Whether its caller has nothing more to wait for."""
        return self.decided or self.to_publish

    def wake(self) -> None:
        if self.waiter is not None:
            self.waiter.wake()


class Departure:
    """A phase that this rank does not look at any more, until its keys are deleted.

    It keeps nothing of the caller's, such as payloads, since that may take a while.

    :ivar broken: it was not released, as far as this rank knows
    :ivar last: this rank entered last
    :ivar looks_after: it has to see to the end of the phase: it entered last, or does not know
    :ivar added: how many departures of others it has added to `PhaseKeys.departed`
    :ivar adding: that is under way
    :ivar deleted: its keys are, or are about to be
    :ivar patience: how often this rank enters phases, for each that it awaits, until it looks again
    :ivar large: the ranks whose payloads are known to have keys of their own
    """

    __slots__ = (
        "added", "adding", "broken", "deleted", "entry", "large", "last", "looks_after",
        "name", "patience", "step", "turns",
    )  # fmt: skip

    def __init__(self, phase: Phase) -> None:
        self.turns = phase.turns
        self.name = phase.name
        self.step = phase.step
        self.entry = phase.entry
        self.broken = not isinstance(phase.verdict, Released)
        self.added = 0
        self.adding = self.deleted = False
        self.patience = 1
        self.last = phase.last
        self.looks_after = phase.last or not (phase.counted or isinstance(phase.verdict, Broken))
        self.large: list[int] = []
        if phase.entry.kind == GATHER and not self.broken and phase.brought is not None:
            self.large = [rank for rank, one in phase.brought.items() if len(one) > SMALL_BYTES]

    @property
    def latest(self) -> str:
        """The key of the latest step of its name that was broken."""
        return self.turns.membership.own.latest(self.name)


class Turns:
    """Which crossing of each name comes next, in one generation.

    An attempt before all ranks have joined again does not count: it is numbered apart. So a rank
    that joins later is not behind those that tried in vain.
    """

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        # The first generation counts from its beginning: nobody has crossed anything before.
        self.complete = membership.complete or membership.state.number == 0
        # Phases that were tried before all had joined; nobody needs them after that.
        self.tried_early: list[tuple[Entry, Connection]] = []
        # The tokens of the names in which this rank's peers waited for it; see `_note_interrupted`.
        self.interrupted: list[bytes] = []
        # By name: the number that its next crossing would have.
        self.next: Counter[str] = Counter()
        self._decided: dict[str, tuple[int, str, int | None, str]] = {}
        # By name: the latest step that was released, and that this rank has departed from.
        self.passed: dict[str, int] = {}
        # By name: how many bells were taken when the latest broken step was last read.
        self.read_at: dict[str, int] = {}
        # By name: the note of the latest broken step, as this rank last saw it.
        self.noted: dict[str, bytes] = {}
        # By name: steps that were begun, and whose verdict is not known.
        self._begun: dict[str, set[int]] = {}

    def begin(self, name: str, step: int | None, kind: int, leader: int) -> Phase:
        """This rank's next phase of ``name``.

        :raises BrokenBarrierError: ``step`` is not later than one that was decided
        """
        membership = self.membership
        if step is None:
            sequence = self.next[name]
            keys = self._keys(name, sequence)
        else:
            if (late := self.too_late(name, step)) is not None:
                raise late
            sequence, keys = step, membership.own.phase(name, f"s{step}")
        entry = Entry(keys, membership.rank, membership.world_size, kind, leader)
        phase = Phase(self, name, sequence, step, entry)
        phase.early = step is None and not self.complete
        phase.latest = number(self.noted[name]) if name in self.noted else None
        return phase

    def use(self, phase: Phase) -> None:
        """Count the turn: the next phase of the name comes after this one, and a step is once."""
        if phase.step is not None:
            self._begun.setdefault(phase.name, set()).add(phase.step)
        elif not (phase.early and self.complete):
            self.next[phase.name] = max(self.next[phase.name], phase.sequence + 1)

    def renumber(self, phase: Phase, connection: Connection | None) -> None:
        """Give a phase that began too early another number; it counts if all have joined.

        :param connection: deletes the keys that it had
        """
        if connection is not None:
            self.tried_early.append((phase.entry, connection))
        sequence = self.next[phase.name]
        entry = phase.entry.under(self._keys(phase.name, sequence))
        phase.entered = phase.counted = phase.last = phase.full = phase.differs = False
        phase.sequence, phase.early, phase.entry = sequence, not self.complete, entry
        self.next[phase.name] = sequence + 1

    def interrupts(self, phase: Phase) -> bool:
        """Whether its peers know that it broke as this rank joined, and go on with the next."""
        return phase.rejoined and phase.token in self.interrupted

    def _keys(self, name: str, sequence: int) -> PhaseKeys:
        return self.membership.own.phase(name, f"{sequence}" if self.complete else f"e{sequence}")

    def decided(self, name: str, step: int, verdict: Verdict | None = None) -> None:
        """A step of ``name`` was decided, here or at another rank.

        :param verdict: if this rank knows it; else it was broken
        """
        latest = self._decided.get(name, _NONE)[0]
        if step > latest or (step == latest and verdict is not None):
            # Not the verdict itself, which may have megabytes.
            how = "released" if isinstance(verdict, Released) else "broken"
            by, why = (verdict.rank, verdict.reason) if isinstance(verdict, Broken) else (None, "")
            self._decided[name] = step, how, by, why
            first = step + (verdict is not None)  # Another call may still tell of the step itself.
            self._begun[name] = {each for each in self._begun.get(name, ()) if each >= first}

    def note(self, name: str, step: int | None) -> list[CompareSet]:
        """For ranks that come for an earlier step: ``step`` broke. Until all are past this one."""
        if step is None:
            return []
        self.decided(name, step)  # This rank does not ring for itself.
        held = self.noted.get(name, b"")
        expected = held if (number(held) or 0) <= step else b""  # A later one stays.
        return [CompareSet(self.membership.own.latest(name), expected, b"%d" % step)]

    def take_noted(self, name: str, note: CompareSet, now: bytes) -> bool:
        """Remember the answer to ``note``; return whether its step, or a later one, is noted."""
        # What was expected is the answer for an absent key, too: it was deleted meanwhile.
        self.noted[name] = b"" if now == note.expected else now
        return (number(now) or 0) >= int(note.desired)

    def had_begun(self, name: str, step: int) -> bool:
        """Whether an earlier call began this step."""
        return step in self._begun.get(name, ())

    def too_late(self, name: str, step: int) -> BrokenBarrierError | None:
        """The error that ``step`` comes too late, or None if it can still be crossed."""
        decided, how, by, why = self._decided.get(name, _NONE)
        unknown = (how, by, why) == _UNKNOWN and not self.had_begun(name, step)
        if step > decided or (step == decided and unknown):
            return None
        which = "this step" if step == decided else f"step {decided}, a later one,"
        rank: int | None = self.membership.rank
        reason = (
            f"rank {rank} came for step {step} when {which} was {how} already; a step is decided "
            "once: go on with a later one"
        )
        if step == decided and why:
            # The peers that come for it learn that reason, too.
            rank, reason = by, f"{why} ({reason})"
        return BrokenBarrierError(name, step, rank, reason, prefix=self.membership.keys.prefix)


def in_doubt(phase: Phase, exc: BarrierConnectionError) -> BarrierConnectionError:
    what = describe(phase.name, phase.sequence, phase.membership.keys.prefix)
    return another(exc, what, in_doubt=phase.entered)


def nothing(answers: list[Any]) -> None:
    """For requests whose answers tell nothing."""
