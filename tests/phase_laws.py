"""The laws of a phase, judged from what ranks did and learned and from what the store holds."""

from __future__ import annotations

import json
from typing import Any

import modelled
from explorer import View

from async_barriers._verdict import Broken, Gathered, Released, Verdict


class PhaseLaws:
    """Notes are about "<process> <what> in <phase>", or about a phase."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        # Who settles a commit, by phase.
        self.leaders: dict[str, int] = {}
        self.has_stray = False

    def noted(self, view: View, kind: str, about: str, value: Any) -> None:
        if kind == "learned":
            log, verdict = value
            if self._agreed(view, about, verdict):
                # The log was looked at then, and may serve a later phase by now.
                return
            if isinstance(verdict, Broken):
                self._broken(view, about, verdict, self._first_break(view, log, about))
            else:
                self._released(view, about, verdict, self._first_break(view, log, about))
        elif kind == "publishing":
            log, payloads = value
            assert self._first_break(view, log, about) is None, "law 1: published without all"
            assert dict(payloads) == {r: b"of %d" % r for r in range(self.world_size)}, payloads
        elif kind == "in doubt":
            raise AssertionError(f"{about} is in doubt: {value}")

    def at_end(self, view: View) -> None:
        told = {phase_of(w) for w in view.notes("gave up") if w.split(" in ")[0] != view.crashed}
        for waiting in view.waiting:
            phase = phase_of(waiting)
            # Nobody can tell what a leader that died had published.
            in_doubt = view.crashed == str(self.leaders.get(phase))
            excused = view.crashed is not None and (phase not in told or in_doubt)
            assert excused or self.may_wait(waiting), f"law 3: {waiting}, for ever"
        left = self.left_behind(view)
        assert not left, f"law 10: left behind: {left}"

    def may_wait(self, activity: str) -> bool:
        """Whether it may be left waiting; a stray may, for an arrival that does not come."""
        return activity.startswith("stray")

    def left_behind(self, view: View) -> list[str]:
        """Keys that nobody needs any more; what a dead rank has not read has to stay."""
        if view.crashed is not None:
            return []
        keys = modelled.stored(view.values)
        # Somebody may be left waiting in a phase that does not end.
        still_open = tuple(phase_of(waiting) for waiting in view.waiting if phase_of(waiting))
        return [key for key in keys if "/phase/" in key and not key.startswith(still_open)]

    def _agreed(self, view: View, who: str, verdict: Verdict | Gathered) -> bool:
        """Whether this was learned before."""
        if isinstance(verdict, Gathered):
            return False
        before = {
            other: known
            for other, (_, known) in view.notes("learned").items()
            if other != who and phase_of(other) == phase_of(who) and not isinstance(known, Gathered)
        }
        for other, known in before.items():
            assert known == verdict, f"law 2: {who}: {verdict}, but {other}: {known}"
        return bool(before)

    def _released(
        self, view: View, who: str, verdict: Released | Gathered, broken: dict[str, Any] | None
    ) -> None:
        phase = phase_of(who)
        entered = [w.partition(" in ")[0] for w in view.notes("entered") if phase_of(w) == phase]
        ranks = sorted(int(process.split()[0]) for process in entered)
        everyone = list(range(self.world_size))
        assert ranks == everyone, f"law 1: {who}: {verdict}, but entered had {entered}"
        assert broken != {}, f"law 1: {who}: {verdict}, but not all arrivals are in the log"
        assert broken is None, f"law 3: {who}: {verdict}, but first was {broken}"

    def _broken(self, view: View, who: str, verdict: Broken, broken: dict[str, Any] | None) -> None:
        phase = phase_of(who)
        assert phase not in view.notes("published"), f"law 2: published, but {who}: {verdict}"
        if broken is None:
            # Only a leader can, where all are in.
            assert verdict.rank == self.leaders.get(phase), f"law 2: {who}: {verdict}, too late"
        else:
            assert broken, f"law 3: {who}: {verdict}, but nobody broke it"
            if verdict.timeout_secs is not None:
                missing = list(verdict.missing)
                assert missing == broken["missing"], f"law 6: {who}: {verdict}, not {broken}"
        if not (self.has_stray and "share a rank" in verdict.reason):
            gave_up = [w for w in view.notes("gave up") if phase_of(w) == phase]
            by = f"{verdict.rank} in {phase}"
            assert by in gave_up, f"law 3: {who}: {verdict}, but those who gave up: {gave_up}"

    def _first_break(self, view: View, log: str, about: str) -> dict[str, Any] | None:
        """None if everyone arrived first, {} while nothing is decided; told otherwise than the
        library does."""
        sequence = sequence_of(about)
        arrived: set[int] = set()
        for line in modelled.ever(view.values, log).decode().splitlines():
            if line[0] == "b":
                said: dict[str, Any] = json.loads(line[1:])
                if said["sequence"] == sequence:
                    return {**said, "missing": sorted(set(range(self.world_size)) - arrived)}
            elif line[0] != "l":
                arrived.add(int(line[1:].split()[0]))
            if len(arrived) == self.world_size:
                return None
        return {}


def sequence_of(phase: str) -> int:
    """The number at its end."""
    return int(phase[len(phase.rstrip("0123456789")) :])


def phase_of(about: str) -> str:
    """The phase in "1 again enters in <phase>"; that in "<phase>" itself."""
    return about.rpartition(" in ")[2] if " in " in about else ""
