"""A c10d store and the memory of processes, as values that a scheduler changes op by op.

What each operation does and when it can happen; a `Wire`, which the library's own connections
take for a store; and `shared`, which makes an object of the library whose fields are explored.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
# A key of the store, or a place in memory.
Key = str | tuple[str, ...]


class Table:
    """Numbers for all keys and for all that they ever hold, so that states compare quickly."""

    def __init__(self) -> None:
        self.slots: dict[Key, int] = {}
        # None is absence.
        self.things: list[Any] = [None]
        self.numbers: dict[Any, int] = {(type(None), None): 0}


class Values:
    """What is in store and memory."""

    def __init__(self, table: Table, numbers: Iterable[int] = ()) -> None:
        self._table = table
        self._numbers = list(numbers)

    def numbers(self) -> tuple[int, ...]:
        """The same for the same values, and no other."""
        while self._numbers and not self._numbers[-1]:
            del self._numbers[-1]
        return tuple(self._numbers)

    def __getitem__(self, key: Key) -> Any:
        """What ``key`` holds; None where it is absent."""
        slot = self._table.slots.get(key, len(self._numbers))
        return self._table.things[self._numbers[slot]] if slot < len(self._numbers) else None

    def __setitem__(self, key: Key, value: Any) -> None:
        table = self._table
        slot = table.slots.setdefault(key, len(table.slots))
        self._numbers += [0] * (slot + 1 - len(self._numbers))
        number = table.numbers.setdefault((type(value), value), len(table.things))
        if number == len(table.things):
            table.things.append(value)
        self._numbers[slot] = number

    def items(self) -> Iterator[tuple[Key, Any]]:
        for key, number in zip(self._table.slots, self._numbers, strict=False):
            if number:
                yield key, self._table.things[number]


class Op(NamedTuple):
    """What an activity asks for; the scheduler says when it happens."""

    kind: str
    key: Key
    args: tuple[Any, ...] = ()

    @property
    def in_store(self) -> bool:
        return isinstance(self.key, str)

    def __str__(self) -> str:
        key = self.key if isinstance(self.key, str) else " ".join(self.key[1:])
        return f"{self.kind} {key} {' '.join(map(str, self.args))}".rstrip()


Do = Callable[[Op], Any]


class Gone(NamedTuple):
    """What a deleted key of a phase held last; nobody may touch it again."""

    value: bytes


def can(values: Values, op: Op, who: int) -> bool:
    """Whether ``op`` can happen now, or has to wait."""
    if op.kind in ("wait", "get", "hear"):
        return values[op.key] is not None
    if op.kind == "woken":
        return who not in (values[_sleepers(op.key)] or ())
    return True


def apply(values: Values, op: Op, who: int, late: bool = False) -> Any:
    """Make ``op`` happen to ``values``; its result. ``late``: what is gone may be touched."""
    kind, key, args = op
    old = values[key]
    if type(old) is Gone:
        assert late, f"{op}: this key was deleted"
        return None
    if kind in ("load", "hear", "get"):
        return old
    if kind in ("save", "note"):
        values[key] = args[0]
        return None
    if kind == "add":
        return int(_write(values, key, b"%d" % (int(old or b"0") + args[0])))
    if kind == "append":
        _write(values, key, (old or b"") + args[0])
    elif kind == "set":
        _write(values, key, args[0])
    elif kind == "compare_set":
        expected, desired = args
        if old == expected or (old is None and not expected):
            return _write(values, key, desired)
        return expected if old is None else old
    elif kind == "check":
        return old is not None
    elif kind == "barrier":
        # Whoever is not the last one sleeps until the key is written again.
        total = int(old or b"0") + 1
        values[key] = b"%d" % total
        sleepers = values[_sleepers(key)] or frozenset()
        values[_sleepers(key)] = sleepers | {who} if total < args[0] else None
    elif kind == "delete" and old is not None:
        values[key] = Gone(old) if "/phase/" in str(key) else None
    elif kind == "list":
        return tuple(sorted(stored(values)))
    return None


def _write(values: Values, key: Key, value: bytes) -> bytes:
    values[key] = value
    values[_sleepers(key)] = None
    return value


def _sleepers(key: Key) -> Key:
    return ("sleepers", *([key] if isinstance(key, str) else key))


def stored(values: Values) -> list[str]:
    """The keys that the store holds."""
    return [key for key, v in values.items() if isinstance(key, str) and type(v) is not Gone]


def ever(values: Values, key: str) -> bytes:
    """What ``key`` holds, or held when it was deleted."""
    value = values[key]
    return bytes(value.value if isinstance(value, Gone) else value or b"")


class Wire:
    """A store, as far as the library's connections call it."""

    def __init__(self, do: Do) -> None:
        self._do = do

    def set_timeout(self, timeout: object) -> None: ...

    def set(self, key: str, value: str | bytes) -> None:
        self._do(Op("set", key, (_bytes(value),)))

    def append(self, key: str, value: str | bytes) -> None:
        self._do(Op("append", key, (_bytes(value),)))

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def add(self, key: str, amount: int) -> Any:
        return self._do(Op("add", key, (amount,)))

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> Any:
        return self._do(Op("compare_set", key, (_bytes(expected), _bytes(desired))))

    def check(self, keys: list[str]) -> Any:
        return self._do(Op("check", keys[0]))

    def wait(self, keys: list[str], timeout: object = None) -> None:
        self._do(Op("wait", keys[0]))

    def get(self, key: str) -> Any:
        # A TCPStore's client waits first, and then asks for the value, which is deleted meanwhile
        # only where a wait that began later would find it gone as well.
        return self._do(Op("get", key))

    def barrier(self, key: str, world_size: int, timeout: object = None) -> None:
        self._do(Op("barrier", key, (world_size,)))
        self._do(Op("woken", key))

    def delete_key(self, key: str) -> None:
        self._do(Op("delete", key))

    def list_keys(self) -> Any:
        return self._do(Op("list", ""))


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def is_value(thing: object) -> bool:
    """Whether it can be compared and cannot change."""
    try:
        hash(thing)
    except TypeError:
        return False
    return True


def calling(kind: Callable[..., T], call: Callable[..., Any]) -> Callable[..., T]:
    """``kind``, whose methods are called by ``call``."""
    methods = {
        name: called(function, call)
        for name, function in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith(("__", "_do"))
    }
    return type(kind.__name__, (kind,), methods)  # type: ignore[arg-type]


def called(function: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, called by ``call``."""

    def method(*args: Any, **options: Any) -> Any:
        return call(function, args, options)

    return method


def shared(
    do: Do,
    name: str,
    kind: Callable[..., T],
    *args: Any,
    changing: Collection[str] = (),
    **options: Any,
) -> T:
    """A ``kind(*args, **options)`` whose fields are places in memory.

    What it was given are constants, but for those ``changing``.
    """
    plain = kind(*args, **options)
    constants = set(inspect.signature(kind).parameters).difference(changing)
    fields = {**_beginnings(type(plain)), **vars(plain)}
    cells = {field: _Cell(field) for field in fields if field not in constants}
    made: Any = object.__new__(type(kind.__name__, (type(plain),), cells))
    vars(made).update({field: value for field, value in fields.items() if field in constants})
    vars(made).update(__do=do, __name=name)
    for field in cells:
        value = fields[field]
        if isinstance(value, type(threading.Lock())):
            vars(made)[field] = _Section(do, ("lock", name, field))
        else:
            setattr(made, field, value)
    result: T = made
    return result


def _beginnings(kind: type) -> dict[str, Any]:
    """What the fields of all instances begin with, where that stands in their class."""
    return {
        field: value
        for base in reversed(kind.__mro__[:-1])
        for field, value in vars(base).items()
        if not (field.startswith("__") or callable(value) or hasattr(value, "__get__"))
    }


class _Cell:
    """A field of a shared object."""

    def __init__(self, field: str) -> None:
        self._field = field

    def __get__(self, instance: Any, owner: object) -> Any:
        inner = vars(instance)
        if self._field in inner:
            return inner[self._field]
        return inner["__do"](Op("load", ("memory", inner["__name"], self._field)))

    def __set__(self, instance: Any, value: Any) -> None:
        inner = vars(instance)
        inner["__do"](Op("save", ("memory", inner["__name"], self._field), (value,)))


class _Section:
    """A lock of a shared object. Nothing else happens while it is held, so it is never busy."""

    def __init__(self, do: Do, key: Key) -> None:
        self._do = do
        self._key = key

    def __enter__(self) -> None:
        self._do(Op("lock", self._key))

    def __exit__(self, *_: object) -> None: ...
