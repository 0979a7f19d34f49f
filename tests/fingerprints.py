"""When two processes will do the same: a value for all that one of them has, coroutines included.

Two processes that were told the same in another order often end up the same. Objects are walked
from a root; what is walked in the same order, with the same values, is the same. Objects are told
apart by when they were met first, and code by where it is in memory.
"""

from __future__ import annotations

import enum
import functools
import gc
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

_PLAIN = (int, float, str, bytes, bool, type(None), complex)
# Modules' own, and what is never changed.
_BY_PLACE = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, enum.Enum)
_MADE: tuple[Any, ...] = ([], (), {}, {}.keys(), {}.values(), {}.items(), range(0))
_ITERATORS: tuple[type, ...] = (
    *(type(iter(one)) for one in _MADE),
    *(enumerate, zip, map, reversed),
)

Value = tuple[Any, ...]


class Walk:
    """One walk.

    :param skipped: attributes that are not looked at, by the name of their class
    """

    def __init__(self, skipped: Iterable[tuple[str, str]] = ()) -> None:
        self._skipped = set(skipped)
        self._met: dict[int, int] = {}
        # So that no object takes the place of one that was met.
        self._kept: list[Any] = []

    def value(self, thing: Any) -> Any:
        kind = type(thing)
        if kind in _PLAIN:
            return thing if kind is not bool else ("bool", thing)
        if isinstance(thing, _BY_PLACE):
            return ("at", id(thing))
        number = self._met.setdefault(id(thing), len(self._met))
        if number < len(self._kept):
            return ("again", number)
        self._kept.append(thing)
        return self._inside(thing, kind)

    def _inside(self, thing: Any, kind: type) -> Value:
        value = self.value
        if isinstance(thing, tuple | list | deque):
            return (kind.__name__, *map(value, thing))
        if isinstance(thing, dict):
            return (kind.__name__, *((value(k), value(v)) for k, v in thing.items()))
        if isinstance(thing, set | frozenset):
            return (kind.__name__, *sorted(map(repr, map(value, thing))))
        if isinstance(thing, types.CoroutineType):
            return ("coroutine", *self._suspended(thing))
        if isinstance(thing, types.FunctionType):
            cells = [cell.cell_contents for cell in thing.__closure__ or ()]
            return ("function", id(thing.__code__), value(cells), value(thing.__defaults__))
        if isinstance(thing, types.MethodType):
            return ("method", value(thing.__func__), value(thing.__self__))
        if isinstance(thing, functools.partial):
            return ("partial", value(thing.func), value(thing.args), value(thing.keywords))
        if isinstance(thing, types.CellType):
            try:
                return ("cell", value(thing.cell_contents))
            except ValueError:
                return ("cell",)  # Nothing was put there yet.
        if isinstance(thing, _ITERATORS):
            return ("iterator", *map(value, thing.__reduce__()[1:]), thing.__reduce__()[0].__name__)  # type: ignore[union-attr]
        if kind.__module__ == "builtins" and not isinstance(thing, BaseException):
            return (kind.__name__, *map(value, gc.get_referents(thing)))
        return self._object(thing, kind)

    def _object(self, thing: Any, kind: type) -> Value:
        found: list[Any] = [id(kind)]
        if isinstance(thing, BaseException):
            found += [self.value(thing.args), self.value(thing.__cause__)]
        skipped = self._skipped
        for base in kind.__mro__:
            for name in _slots(base):
                if hasattr(thing, name) and (base.__name__, name) not in skipped:
                    found.append((name, self.value(getattr(thing, name))))
        for name, attribute in getattr(thing, "__dict__", {}).items():
            if not any((base.__name__, name) in skipped for base in kind.__mro__):
                found.append((name, self.value(attribute)))
        return tuple(found)

    def _suspended(self, coroutine: types.CoroutineType[Any, Any, Any]) -> Value:
        """Where it is, its variables, and what it is in the middle of."""
        frame = coroutine.cr_frame
        if frame is None:
            return ("ended",)
        variables = dict(frame.f_locals)
        modules = (frame.f_globals, frame.f_builtins, frame.f_locals)
        every = gc.get_referents(coroutine)
        if frame in every:
            every += gc.get_referents(frame)
        stack = [
            one
            for one in every
            if not isinstance(one, types.FrameType) and not any(one is module for module in modules)
        ]
        return (id(coroutine.cr_code), frame.f_lasti, self._of(variables), *map(self.value, stack))

    def _of(self, variables: dict[str, Any]) -> Value:
        return tuple((name, self.value(one)) for name, one in variables.items())


def _slots(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


__all__ = ["Callable", "Walk"]
