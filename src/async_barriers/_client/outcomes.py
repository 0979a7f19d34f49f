"""The records of commits: those that this rank writes as their leader, and those it asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from .._errors import describe
from .._protocol import records
from .._protocol.records import Log, Record
from .._protocol.store import Read, Request, Store
from .._protocol.verdict import Released, Verdict
from .._store.sources import Connection
from .phases import Phase, nothing

logger = logging.getLogger(__name__)

# A rank remembers the generations of so many of its latest commits.
_REMEMBERED = 256


class Outcomes:
    """The commits that one rank has led or taken part in.

    :ivar counted: how many records there were when this rank wrote its last one
    """

    def __init__(self) -> None:
        self.counted: int | None = None
        # The identities of this rank's latest commits by name and sequence.
        self._generations: dict[tuple[str, int], tuple[str, bool]] = {}

    async def noting(
        self, store: Store, phase: Phase, verdict: Verdict
    ) -> tuple[list[Request], list[Request]]:
        """What the leader writes before its verdict and after it; nothing if it is no release."""
        if not isinstance(verdict, Released):
            return [], []
        keys, record, noted = phase.membership.keys, phase.record, False
        if record is None:
            record = phase.record = _record_of(phase, verdict.result)
        else:
            # The record may be there, though the connection was lost before the answer came.
            (log,) = await store.call(Read(keys.commits))
            known = records.decode(log).records.values()
            noted = record.identity in {each.identity for each in known}
        expected = None if self.counted is None else self.counted + 1
        return records.noting(keys, record, verdict.result, expected=expected, noted=noted)

    def noted(
        self, connection: Connection, phase: Phase, count: int, start: Callable[[Any], object]
    ) -> None:
        """The store has ``count`` records: wake the observers that wait, and drop old records."""
        keys, record = phase.membership.keys, phase.record
        assert record is not None
        expected = None if self.counted is None else self.counted + 1
        self.counted = count
        requests = records.announcing(keys, count, expected)
        if count == expected:
            connection.outbox.append((requests, nothing))
        else:
            connection.call(*requests)
        if records.is_to_cut(count, record):
            start(records.cut(connection, keys))

    def remember(self, phase: Phase) -> None:
        """This rank takes part in a commit, and may have to ask for its outcome later."""
        known = self._generations
        at = phase.name, phase.sequence
        known.pop(at, None)
        known[at] = phase.membership.state.identity, phase.step is not None
        if len(known) > _REMEMBERED:
            del known[next(iter(known))]

    def find(self, log: Log, name: str, sequence: int) -> Record | None:
        """The latest record of that commit. A number that was counted, not given, means something
        only to the ranks of the same generation."""
        generation, by_step = self._generations.get((name, sequence), (None, True))
        for record in reversed(log.records.values()):
            if (record.name, record.sequence, record.by_step) != (name, sequence, by_step):
                continue
            if by_step or record.generation == generation:
                return record
        return None

    def explain(self, log: Log, prefix: str, name: str, sequence: int) -> None:
        """Log why there is no record of the commit."""
        what = describe(name, sequence, prefix)
        if (name, sequence) not in self._generations:
            why = (
                "this barrier took no part in it, and no step of that number was recorded; a count "
                "of an earlier process or barrier means nothing here, so give commits a step"
            )
        else:
            why = (
                "its leader has not said that it published: it broke, is being published still, or "
                "its leader was lost before it could say so"
            )
        if log.begin:
            why += f"; of {log.end} records the last {len(log.records)} are kept"
        logger.info("%s: no record that this commit was released: %s", what, why)


def _record_of(phase: Phase, result: bytes) -> Record:
    entry = phase.entry
    label = f"{phase.sequence}" if phase.step is None else f"s{phase.sequence}"
    small = len(result) <= records.SMALL_RESULT_BYTES
    return Record(
        phase.membership.state.identity, phase.name, label, entry.rank, entry.world_size,
        result if small else None,
    )  # fmt: skip
