"""Stores written in Python, as users write them, with a hook for faults."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import DistStoreError, HashStore, Store

Hook = Callable[[str, str], None]


# torch 2.9 cannot list the keys of a store.
LISTS_KEYS = hasattr(HashStore, "list_keys")


def keys_of(store: Any) -> list[str]:
    """All keys of a store; skips the test if torch cannot list them."""
    if not LISTS_KEYS:
        pytest.skip("this torch cannot list the keys of a store")
    return list(store.list_keys())


class Data:
    """The data that all clones of one store share."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()
        # Called as (operation, key) before each operation, without the lock; it may block
        # or raise.
        self.hook: Hook | None = None
        self._lost = False

    @property
    def lost(self) -> bool:
        return self._lost

    def lose(self) -> None:
        """Make all calls fail from now on, also those under way."""
        with self.changed:
            self._lost = True
            self.changed.notify_all()


class PlainStore(Store):
    """A complete, thread-safe store, except for `clone`, which not every store has."""

    def __init__(self, data: Data | None = None) -> None:
        super().__init__()
        self.data = data or Data()
        self._timeout = timedelta(seconds=300)

    @property
    def timeout(self) -> timedelta:
        return self._timeout

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    def set(self, key: str, value: str | bytes) -> None:
        self._call("set", key)
        with self.data.changed:
            self.data.values[key] = _bytes(value)
            self.data.changed.notify_all()

    def get(self, key: str) -> bytes:
        self._call("get", key)
        with self.data.changed:
            self._await([key], self._timeout)
            return self.data.values[key]

    def add(self, key: str, amount: int) -> int:
        self._call("add", key)
        with self.data.changed:
            total = int(self.data.values.get(key, b"0")) + amount
            self.data.values[key] = b"%d" % total
            self.data.changed.notify_all()
            return total

    def append(self, key: str, value: str | bytes) -> None:
        self._call("append", key)
        with self.data.changed:
            self.data.values[key] = self.data.values.get(key, b"") + _bytes(value)
            self.data.changed.notify_all()

    def check(self, keys: list[str]) -> bool:
        self._call("check", keys[0])
        with self.data.changed:
            return all(key in self.data.values for key in keys)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        self._call("compare_set", key)
        with self.data.changed:
            values = self.data.values
            if values.get(key, b"") == _bytes(expected) and (key in values or not expected):
                values[key] = _bytes(desired)
                self.data.changed.notify_all()
            return values.get(key, _bytes(expected))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._call("wait", keys[0])
        with self.data.changed:
            self._await(keys, timeout or self._timeout)

    def delete_key(self, key: str) -> bool:
        self._call("delete_key", key)
        with self.data.changed:
            return self.data.values.pop(key, None) is not None

    def num_keys(self) -> int:
        self._call("num_keys", "")
        with self.data.changed:
            return len(self.data.values)

    def list_keys(self) -> list[str]:
        self._call("list_keys", "")
        with self.data.changed:
            return list(self.data.values)

    def clone(self) -> Store:
        # c10d's own words for a store without one. If c10d raised this itself, it would take a
        # watch on its `clone` (see `unblocked`) for ours, and both would call each other, 339 deep:
        # there even calls of the garbage collection fail.
        raise RuntimeError('Tried to call pure virtual function "::c10d::Store::clone"')

    # C++ code, such as a PrefixStore around this store, uses these names.
    deleteKey = delete_key
    getNumKeys = num_keys

    def _call(self, operation: str, key: str) -> None:
        if self.data.lost:
            raise ConnectionResetError("the store is gone")
        if (hook := self.data.hook) is not None:
            hook(operation, key)

    def _await(self, keys: list[str], timeout: timedelta) -> None:
        def there() -> bool:
            if self.data.lost:
                raise ConnectionResetError("the store is gone")
            return all(key in self.data.values for key in keys)

        if not self.data.changed.wait_for(there, timeout.total_seconds()):
            raise DistStoreError(f"wait timeout after {timeout}, keys: {keys}")


class MemoryStore(PlainStore):
    """A `PlainStore` with clones."""

    def clone(self) -> MemoryStore:
        self._call("clone", "")
        clone = MemoryStore(self.data)
        clone.set_timeout(self.timeout)
        return clone


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
