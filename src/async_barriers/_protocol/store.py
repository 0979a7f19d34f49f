"""The interface that the protocol speaks: requests, and a store that answers them."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, NamedTuple, Protocol


class Append(NamedTuple):
    """Add ``value`` at the end of a key's value, atomically. Not answered."""

    key: str
    value: bytes


class Set(NamedTuple):
    """Give a key a value. Not answered."""

    key: str
    value: bytes


class SetMany(NamedTuple):
    """Give several keys one value. Not answered."""

    keys: list[str]
    value: bytes


class Add(NamedTuple):
    """Count up, atomically; answered by the sum."""

    key: str
    amount: int


class CompareSet(NamedTuple):
    """Set a key if it holds ``expected`` (b"": is absent or empty); answered by what it holds then.

    Where the key is absent and something else was expected, the answer is what was expected.
    """

    key: str
    expected: bytes
    desired: bytes


class Read(NamedTuple):
    """Answered by the value, or None where there is none."""

    key: str


class Delete(NamedTuple):
    """Delete a key, if it is there. Not answered."""

    key: str


class DeleteMany(NamedTuple):
    """Delete several keys. Not answered."""

    keys: list[str]


Request = Append | Set | SetMany | Add | CompareSet | Read | Delete | DeleteMany
SILENT = (Append, Set, SetMany, Delete, DeleteMany)


class Store(Protocol):
    """What carries requests to a store: a connection of some kind.

    It applies the requests of one connection in the order in which they were made.
    """

    @property
    def waits(self) -> bool:
        """Whether `call` takes a key to wait for; if not, a rank's bell is all it waits for."""
        ...

    def call(self, *requests: Request, wait: str | None = None) -> Awaitable[list[Any]]:
        """Send requests in one message; what those that are answered are answered by.

        :param wait: a key; the connection's ``on_wake`` is called when it is written, or if it
            exists
        :raises BarrierConnectionError: the store was lost
        """
        ...
