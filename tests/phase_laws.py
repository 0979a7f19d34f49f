"""The laws of phases and generations, judged from what reaches the store and ranks learn."""

from __future__ import annotations

from typing import Any, NamedTuple

from explorer import View
from modelled import Contents
from replayed import Event, Spec

from async_barriers._protocol import count as counts
from async_barriers._protocol.store import Add, Request


class Seen(NamedTuple):
    """What the laws remember of a phase, whatever becomes of its keys."""

    entered: tuple[tuple[int, str], ...] = ()
    full: bool = False
    broken: bool = False


Memory = tuple[tuple[str, Seen], ...]


class PhaseLaws:
    """A phase is told by the path of its keys.

    :ivar idle: tasks that may be left waiting
    """

    # Who notes that has told the others, or will.
    telling = ("broke", "released", "left")

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.idle: set[str] = set()
        # Whether a rank may be in doubt.
        self.doubts = False

    # -- what reaches the store ------------------------------------------------------------

    def served(
        self, remembered: Memory | None, spec: Spec, request: Request, store: Contents
    ) -> Memory:
        memory = remembered or ()
        key = getattr(request, "key", "")
        if not (key.endswith("/count") and "/phase/" in key):
            return memory
        path = key.removesuffix("/count")
        phases = dict(memory)
        seen = phases.get(path, Seen())
        if isinstance(request, Add):
            seen = seen._replace(entered=(*seen.entered, (spec.rank, spec.name)))
        value = store.get(key)
        if value is not None:
            count = counts.of_value(value)
            highest = counts.code(counts.GATHER, -1, self.world_size)
            full = any(count.full(self.world_size, code) for code in range(highest + 1))
            assert not (count.broken and seen.full), f"law 2: {path} was full, and was broken then"
            assert not (full and seen.broken), f"law 2: {path} was broken, and became full"
            if full:
                self._all_entered(path, seen)
            seen = seen._replace(full=seen.full or full, broken=seen.broken or count.broken)
        phases[path] = seen
        return tuple(sorted(phases.items()))

    def _all_entered(self, path: str, seen: Seen) -> None:
        ranks = sorted(rank for rank, _ in seen.entered)
        everyone = list(range(self.world_size))
        assert ranks == everyone, f"law 1: {path} is full, but entered had {seen.entered}"

    # -- what ranks learn ------------------------------------------------------------------

    def noted(self, view: View, spec: Spec, note: Event) -> None:
        kind, *args = note
        if kind == "learns":
            self._learned(view, spec, *args)
        elif kind == "broke":
            self._broke(view, spec, *args)
        elif kind == "joined":
            self._joined(view, spec, *args)
        elif kind == "publishing":
            path, payloads = args
            seen = dict(view.remembered).get(path, Seen())
            assert seen.full, f"law 1: {spec.name} publishes {path} without all"
            assert dict(payloads) == {r: b"of %d" % r for r in range(self.world_size)}, payloads
        elif kind == "ends" and args[1] == "BarrierConnectionError" and args[2]:
            assert self.doubts, f"law 5: {spec.name} is in doubt: {args}"

    def _learned(self, view: View, spec: Spec, path: str, released: bool, what: Any) -> None:
        seen = dict(view.remembered or ()).get(path, Seen())
        if released:
            assert seen.full, f"law 1: {spec.name} learns that {path} is released: {seen}"
        for other, node in zip(view.specs, view.nodes, strict=True):
            for kind, *args in node.notes:
                if kind == "learns" and args[0] == path:
                    assert args[1:] == [released, what], (
                        f"law 2: of {path} {spec.name} learns {what}, but {other.name} {args[2]}"
                    )
                if kind == "broke" and args[0] == path:
                    assert not released, f"law 3: {other.name} broke {path}, which is released"
                if kind == "published" and args[0] == path:
                    assert released, f"law 2: {other.name} published, but {path} is broken: {what}"

    def _broke(self, view: View, spec: Spec, path: str) -> None:
        for other, node in zip(view.specs, view.nodes, strict=True):
            for kind, *args in node.notes:
                if kind == "learns" and args[0] == path:
                    assert not args[1], f"law 3: {spec.name} broke {path}; {other.name}: released"
                if kind == "published" and args[0] == path:
                    raise AssertionError(f"law 2: {spec.name} broke {path}, which is published")

    def _joined(self, view: View, spec: Spec, identity: str, rank: int, token: str) -> None:
        for other, node in zip(view.specs, view.nodes, strict=True):
            for kind, *args in node.notes:
                if kind == "joined" and args[:2] == [identity, rank]:
                    assert args[2] == token, (
                        f"law 1: two lives of rank {rank} in {identity}: {spec.name}, {other.name}"
                    )

    # -- where it ends ---------------------------------------------------------------------

    def at_end(self, view: View) -> None:
        waiting = self.waiting(view)
        for name, task in waiting:
            if name not in view.crashed and f"{name} {task}" not in self.idle:
                assert self.may_wait(view, name), f"law 3: {name} {task} waits for ever"
        self.nobody_is_left_behind(view)
        # A departure that was lost with its connection cannot be made up for.
        if not view.crashed and not waiting and not self.doubts:
            left = self.left_behind(view)
            assert not left, f"law 10: left behind: {left}"

    def waiting(self, view: View) -> list[tuple[str, str]]:
        return [
            (spec.name, task)
            for spec, node, lives in zip(view.specs, view.nodes, view.lives, strict=True)
            for task in node.waiting
            if lives == "lives"
        ]

    def may_wait(self, view: View, name: str) -> bool:
        """Only where a rank crashed, and nobody who lives knows what came of the phase, or left."""
        if not view.crashed:
            return False
        awaited: set[str] = set()
        known: set[str] = set()
        for spec, node in zip(view.specs, view.nodes, strict=True):
            if spec.name == name:
                awaited = set(node.open)
            elif spec.name not in view.crashed:
                known |= {note[1] for note in node.notes if note[0] in self.telling}
        return not awaited & known and "all" not in known

    def nobody_is_left_behind(self, view: View) -> None:
        """Who has joined is in the generation in force, or knows that it is not."""
        states = [value for key, value in view.store.items() if key.endswith("/state")]
        for spec, node, lives in zip(view.specs, view.nodes, view.lives, strict=True):
            if lives == "lives" and node.stands is not None and spec.name not in view.crashed:
                assert any(f'"{node.stands}"'.encode() in state for state in states), (
                    f"law 11: {spec.name} was left in {node.stands}"
                )

    def left_behind(self, view: View) -> list[str]:
        """Keys of phases, but for those that ended with a rank that left, or in which one died: it
        can depart from them no more."""
        left = {note[2] for node in view.nodes for note in node.notes if note[0] == "left"}
        ended = tuple(
            note[1]
            for node in view.nodes
            for note in node.notes
            if note[0] == "learns" and not note[2] and note[3].rank in left
        )
        over = () if "dead" not in view.lives else self.past(view)
        return [
            key for key in view.store if "/phase/" in key and not key.startswith((*ended, *over))
        ]

    def past(self, view: View) -> tuple[str, ...]:
        """What the keys of generations begin with that are over."""
        state = next(v.decode() for key, v in view.store.items() if key.endswith("/state"))
        roots = {key.partition("/phase/")[0] for key in view.store if "/phase/" in key}
        return tuple(root for root in roots if f'"{root.rpartition("/")[2]}"' not in state)
