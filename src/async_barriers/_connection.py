"""One connection to a torch store: the few operations that the protocol is made of.

The only module that calls c10d stores, but for what opens them (`_connecting.py`). They two alone
know c10d's exceptions: each becomes a `BarrierConnectionError` there, once.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store

from . import _dialogue
from ._dialogue import ABSENT, Dialogue
from ._errors import BarrierConnectionError

T = TypeVar("T")

# c10d knows no endless wait, and its milliseconds must fit a C int.
_FOREVER = timedelta(days=7)


class Connection:
    """A store of any kind, in terms that every kind has. Not for use by two threads at once."""

    interruptible = False
    # Whether `meet` works: where it does not, arrivals are counted with `add` and awaited apart.
    meets = False
    # Whether a `Dialogue` does the same, without blocking.
    direct = False

    def __init__(self, store: Store) -> None:
        # torch's stubs lack half of the stores' methods.
        self._store: Any = store
        # Whether a call has failed: a store that is still there may have hung up.
        self.failed: bool = False

    @property
    def store(self) -> Store:
        """The store itself, for what c10d does with one."""
        store: Store = self._store
        return store

    def append(self, key: str, line: bytes) -> None:
        """Add ``line`` at the end of the value, atomically."""
        # FileStore's own append is a get and a set: two ranks may lose a line to each other.
        current = self.read(key) or b""
        while (winner := self.compare_set(key, current, current + line)) != current + line:
            current = winner

    def add(self, key: str, amount: int) -> int:
        """Count up, atomically; the sum."""
        total: int = self._do(self._store.add, key, amount)
        return total

    def set(self, key: str, value: bytes) -> None:
        self._do(self._store.set, key, value)

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Set ``key`` if it holds ``expected`` (b"": is absent); what it holds afterwards."""
        return _bytes(self._do(self._store.compare_set, key, expected, desired))

    def read(self, key: str) -> bytes | None:
        """The value, or None where there is none. A key that is deleted meanwhile is waited for."""
        if not self.exists(key):
            return None
        return _bytes(self._do(self._store.get, key))

    def exists(self, key: str) -> bool:
        """Whether there is a value, also of a key that may be deleted at any moment."""
        return bool(self._do(self._store.check, [key]))

    def await_value(self, key: str) -> bytes:
        """Block until ``key`` exists; its value."""
        while True:
            try:
                self._do(self._store.wait, [key], _FOREVER)
            except BarrierConnectionError as exc:
                if _timed_out(exc.__cause__):
                    continue
                raise
            return _bytes(self._do(self._store.get, key))

    def meet(self, log: str, line: bytes, count: str, total: int) -> bytes:
        """Append ``line`` to ``log``, count up, and read the log once ``total`` is counted.

        Or before that, if anyone else writes to ``count``.
        """
        raise NotImplementedError

    def overhear(self) -> socket.socket:
        """A socket on which dialogues can be held, where `direct`; it closes when it is dropped."""
        raise NotImplementedError

    def finish(self, meeting: Dialogue) -> bytes:
        """Block until the log is there, where another thread has begun; where `direct`."""
        raise NotImplementedError

    def delete(self, key: str) -> None:
        self._do(self._store.delete_key, key)

    def set_many(self, keys: Sequence[str], value: bytes) -> None:
        for key in keys:
            self.set(key, value)

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self.read(key) for key in keys]

    def list_keys(self) -> list[str]:
        """All keys of the store; none where it cannot tell."""
        try:
            return list(self._do(self._store.list_keys))
        except BarrierConnectionError:
            return []

    def stop_waiting(self) -> None:
        """From any thread: end `await_value`, if that is under way and the store can."""

    def interrupt(self) -> None:
        """From any thread: end the call under way, where `interruptible`."""

    def remains(self) -> list[Remains]:
        """From any thread: what `close` is to leave of a connection that hangs, where it can."""
        return []

    def close(self) -> None:
        """Let go of the store."""
        del self._store

    def _do(self, operation: Callable[..., T], *args: Any) -> T:
        # Not `_translated`: a context manager costs as much as a write to the store.
        try:
            return operation(*args)
        except Exception as exc:
            # The traceback must not keep the store, and with it the socket, from being closed.
            del operation
            self.failed = True
            raise _lost(exc) from exc


class HashConnection(Connection):
    """A HashStore, whose append is atomic."""

    def append(self, key: str, line: bytes) -> None:
        self._do(self._store.append, key, line)

    def read(self, key: str) -> bytes | None:
        # One operation, and over a TCPStore one round trip, where check and get take three. An
        # absent key answers with what we expected.
        value = _bytes(self._do(self._store.compare_set, key, ABSENT, ABSENT))
        return None if value == ABSENT else value


class TCPConnection(HashConnection):
    """A TCPStore, bare or in PrefixStores, in as few round trips as it allows."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        store.set_timeout(_FOREVER)
        # c10d tells its socket's descriptor in its repr only. A copy of it lets us end a call
        # that c10d itself would never return from.
        found = re.search(r"fd=(\d+)", repr(innermost(store)))
        self._socket = _share(int(found[1])) if found else None
        self.interruptible = found is not None
        self._lock = threading.Lock()
        self._waiting = False
        self._stopped = False
        self._overheard = False
        # A PrefixStore has a barrier of its own, made of the other operations.
        self.meets = not isinstance(store, PrefixStore)

    def meet(self, log: str, line: bytes, count: str, total: int) -> bytes:
        # On every crossing's path: one after the other without a breath, since a server that
        # fell asleep in between takes longer to answer than all of this to run.
        store = self._store
        try:
            store.append(log, line)
            try:
                store.barrier(count, total, _FOREVER)
            except Exception as exc:
                # A wait of a week is like any other that something ended too early.
                if not _timed_out(exc):
                    raise
            arrivals: bytes = store.compare_set(log, ABSENT, ABSENT)
            return arrivals
        except Exception as exc:
            del store  # as in `_do`
            self.failed = True
            raise _lost(exc) from exc

    def overhear(self) -> socket.socket:
        assert self._socket is not None
        self._overheard = True
        return _share(self._socket.fileno())

    def finish(self, meeting: Dialogue) -> bytes:
        assert self._socket is not None
        try:
            return meeting.finish(self._socket)
        except OSError as exc:
            self.failed = True
            raise _lost(exc) from exc

    def understood(self, tried: str) -> bool:
        """Try a dialogue with the server; if it failed, the connection is of no more use."""
        assert self._socket is not None
        return _dialogue.understood(self._socket, tried)

    def await_value(self, key: str) -> bytes:
        with self._lock:
            self._waiting = True
        try:
            while True:
                try:
                    value: bytes = self._do(self._store.get, key)
                    break
                except BarrierConnectionError as exc:
                    if not _timed_out(exc.__cause__):
                        raise
        finally:
            with self._lock:
                self._waiting = False
        # The answer to the byte below may still be on its way, among those to other calls.
        if self._stopped:
            raise BarrierConnectionError("the connection to the store was given up")
        return value

    def stop_waiting(self) -> None:
        with self._lock:
            if self._waiting and self._socket is not None:
                self._stopped = True
                # What c10d's own client sends when a wait of its times out (CANCEL_WAIT); the
                # wait ends without the warnings that a lost connection makes c10d print.
                with contextlib.suppress(OSError):
                    self._socket.send(b"\x0c", _dialogue.SAID_NOW)

    def set_many(self, keys: Sequence[str], value: bytes) -> None:
        self._do(self._store.multi_set, list(keys), [value.decode()] * len(keys))

    def interrupt(self) -> None:
        if self._socket is not None:
            # The other side may have been faster.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def remains(self) -> list[Remains]:
        if self._socket is None:
            return []
        try:
            return [Remains(_share(self._socket.fileno()))]
        except OSError:
            # Its thread has hung up already.
            return []

    def close(self) -> None:
        super().close()
        if self._socket is not None:
            if self._overheard:
                # Who listens has a descriptor of its own, and lets go of it when it hears this.
                self.interrupt()
            self._socket.close()


class Remains:
    """The socket of a connection that was given up, which may still have something to send.

    TCP goes on trying long after it is closed. What comes through then is older than all that
    was sent on the connections that followed.
    """

    def __init__(self, copy: socket.socket) -> None:
        self._socket = copy

    def reset(self) -> None:
        """Send nothing any more, and have the other side know; once that can be reached."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self) -> None:
        """Let it try."""
        self._socket.close()


def _share(descriptor: int) -> socket.socket:
    """A socket with a copy of another one's descriptor, whose mode stays as it is.

    Python would make it non-blocking for both of them where `socket.setdefaulttimeout` was called.
    With this flag it believes that it is so already. (Other systems than Linux have no such flag.)
    """
    kind = socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0)
    return _Copy(socket.AF_INET, kind, fileno=os.dup(descriptor))


class _Copy(socket.socket):
    """One that closes when it is dropped, be it with an event loop and all that belongs to it."""

    def __del__(self) -> None:
        self.close()


def innermost(store: Store) -> Store:
    """The store that PrefixStores are around, if they are."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def _timed_out(exc: BaseException | None) -> bool:
    # c10d and FileStore say it in words only, and each in its own class.
    said = str(exc).lower()
    return exc is not None and "timeout" in said and ("wait" in said or "barrier" in said)


def _lost(exc: BaseException) -> BarrierConnectionError:
    return BarrierConnectionError(f"the store was lost ({first_line(exc)})")


def first_line(exc: BaseException) -> str:
    """What it says, without c10d's stack traces."""
    return f"{type(exc).__name__}: {str(exc).partition(chr(10))[0]}"


def countable(value: bytes) -> bool:
    """Whether it can be added to: a TCPStore hangs up on whoever adds to what is no number."""
    return value.isdigit() and len(value) < 20


def _bytes(value: bytes | str) -> bytes:
    # A store written in Python may hand back what c10d never would.
    return value.encode() if isinstance(value, str) else value
