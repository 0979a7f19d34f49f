"""The interface that the protocol uses: requests, and a store that answers them."""

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
    """Add to a number, atomically; the answer is the sum."""

    key: str
    amount: int


class CompareSet(NamedTuple):
    """Set a key if it holds ``expected`` (b"": is absent or empty); the answer is its value then.

    If the key is absent and something else was expected, the answer is ``expected``.
    """

    key: str
    expected: bytes
    desired: bytes


class Read(NamedTuple):
    """Read a key; the answer is its value, or None if there is none."""

    key: str


class Get(NamedTuple):
    """Read a key that was written; the answer is its value, or b"" if it was deleted since.

    Unlike `Read`, it never wakes those that wait for the key. If the key is not there, a server
    without libuv ends the connection.
    """

    key: str


class Delete(NamedTuple):
    """Delete keys, if they are there. Not answered."""

    keys: list[str]


Request = Append | Set | SetMany | Add | CompareSet | Read | Get | Delete
SILENT = (Append, Set, SetMany, Delete)


class Store(Protocol):
    """A connection that carries requests to a store.

    It applies the requests of one connection in the order in which they were made.
    """

    @property
    def waits(self) -> bool:
        """Whether `call` takes any key to wait for; if not, a rank waits for its bell alone."""
        ...

    def call(self, *requests: Request, wait: str | None = None) -> Awaitable[list[Any]]:
        """Send requests in one message; return the answers of those that are answered.

        :param wait: a key; the connection calls ``on_wake`` when it is written, or if it
            exists
        :raises BarrierConnectionError: the store was lost
        """
        ...
