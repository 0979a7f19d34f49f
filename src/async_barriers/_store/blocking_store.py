"""A torch store of any kind, with the operations of the protocol; each call blocks.

Only this module and `connecting` call c10d stores. Only they know c10d's exceptions, and turn each
into a `BarrierConnectionError`.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from datetime import timedelta
from typing import Any

from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore

from .._errors import BarrierConnectionError, caused, told_by
from .._protocol.store import Add, Append, CompareSet, Delete, Get, Read, Request, Set, SetMany
from .._system import deafen, never_destroy, why_unusable
from .wire import ABSENT
from .worker import ends_by

# c10d knows no endless timeout, and its milliseconds must fit a C int.
_FOREVER = timedelta(days=7)
# How long to wait where nothing but the key ends it, which may never come or be gone by then. Less
# than `worker.EXIT_SECS`, since the interpreter cannot end before it.
_AT_A_TIME = timedelta(seconds=0.9)
# None where a look at a socket may block.
_LOOK = socket.MSG_PEEK | socket.MSG_DONTWAIT if hasattr(socket, "MSG_DONTWAIT") else None


class BlockingStore:
    """A torch store of any kind, with the operations of the protocol; each call blocks.

    :ivar asks: whether a call is under way that returns with its answer, and no sooner
    """

    def __init__(self, store: Store) -> None:
        # torch's stubs lack half of the stores' methods.
        self._store: Any = store
        self._base = innermost(store)
        # One operation, and over a TCPStore one round trip; check and get take three. And get
        # waits, without end, for a key that is deleted between the two.
        self._reads_at_once = isinstance(self._base, TCPStore | HashStore | FileStore)
        # FileStore's own append is a get and a set: two ranks may lose a line to each other.
        self._appends = isinstance(self._base, TCPStore | HashStore)
        self._socket = _shared_socket(self._base) if isinstance(self._base, TCPStore) else None
        self.asks = self._failed = False
        if self._socket is not None:
            store.set_timeout(_FOREVER)

    def do(self, request: Request) -> Any:
        """The answer to the request."""
        store = self._store
        self.asks = not isinstance(request, Append | Set | SetMany)
        try:
            self._look_before_call()
            if isinstance(request, Append):
                return self._append(request)
            if isinstance(request, Set):
                return store.set(request.key, request.value)
            if isinstance(request, SetMany):
                for key in request.keys:
                    store.set(key, request.value)
                return None
            if isinstance(request, Add):
                return int(store.add(request.key, request.amount))
            if isinstance(request, CompareSet):
                return _bytes(store.compare_set(request.key, request.expected, request.desired))
            if isinstance(request, Read):
                return self._read(request.key)
            if isinstance(request, Get):
                return self._read(request.key) or b""
            assert isinstance(request, Delete)
            for key in request.keys:
                store.delete_key(key)
            return None
        except Exception as exc:
            self._failed = True
            # The traceback must not keep the store, and with it the socket, from being closed.
            del store
            raise lost(exc) from exc
        finally:
            self.asks = False

    def wait(self, key: str) -> None:
        """Block until ``key`` exists; for a second at most over other stores than a TCPStore.

        So a process that was stopped while the key was written and deleted misses nothing there. A
        TCPStore's server remembers for it, and its client prints that a wait timed out.
        """
        timeout = _AT_A_TIME if self._socket is None else _FOREVER
        began = time.monotonic()
        self.asks = True
        try:
            self._look_before_call()
            ends_by(began + timeout.total_seconds())
            self._store.wait([key], timeout)
        except Exception as exc:
            # A store written in Python may say it in other words than c10d.
            over = time.monotonic() - began >= timeout.total_seconds()
            if not (over or _timed_out(exc)):
                self._failed = True
                raise lost(exc) from exc
        finally:
            ends_by(None)
            self.asks = False

    def interrupt(self) -> None:
        """From any thread: end the call under way, if that is possible; c10d prints a trace."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def never_return(self) -> bool:
        """From any thread: have a call that hangs hang until the process ends; whether it does.

        If it returned to an interpreter that finalises, that would end with SIGABRT.
        """
        try:
            return self._socket is not None and deafen(self._socket)
        except OSError:
            return False

    def close(self) -> None:
        # The destructor of a FileStore opens and locks its file. It holds the GIL until it can, and
        # ends the process if it cannot.
        path: str = getattr(self._base, "path", "")
        if isinstance(self._base, FileStore) and (self._failed or why_unusable(path)):
            never_destroy(self._store)
        del self._store, self._base
        if self._socket is not None:
            self._socket.close()

    def _look_before_call(self) -> None:
        # c10d prints stack traces if it writes to a server that has closed the connection.
        if self._socket is not None and _LOOK is not None:
            with contextlib.suppress(BlockingIOError):
                if not self._socket.recv(1, _LOOK):
                    raise ConnectionResetError("its server has closed the connection")

    def _append(self, request: Append) -> None:
        if self._appends:
            self._store.append(request.key, request.value)
            return
        current = self._read(request.key) or b""
        while True:
            wanted = current + request.value
            winner = _bytes(self._store.compare_set(request.key, current, wanted))
            if winner == wanted:
                return
            # This is the answer for an absent key: it was deleted after it was read.
            current = b"" if winner == current else winner

    def _read(self, key: str) -> bytes | None:
        if self._reads_at_once:
            value = _bytes(self._store.compare_set(key, ABSENT, ABSENT))
            return None if value == ABSENT else value
        if not self._store.check([key]):
            return None
        return _bytes(self._store.get(key))


def _shared_socket(store: TCPStore) -> socket.socket | None:
    """A copy of c10d's own descriptor, which only its repr has."""
    found = re.search(r"fd=(\d+)", repr(store))
    if found is None:
        return None
    # After `socket.setdefaulttimeout` Python would make it non-blocking for both; with this flag it
    # believes that it is so already.
    kind = socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0)
    return socket.socket(socket.AF_INET, kind, fileno=os.dup(int(found[1])))


def innermost(store: Store) -> Store:
    """The store that PrefixStores are around, if they are."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def _timed_out(exc: BaseException | None) -> bool:
    # c10d and FileStore say it only in words, each in an error class of its own.
    said = str(exc).lower()
    return exc is not None and "timeout" in said and "wait" in said


def lost(exc: BaseException) -> BarrierConnectionError:
    """The error that means ``exc``; itself, if it is one."""
    if isinstance(exc, BarrierConnectionError):
        return exc
    return caused(exc, f"the store was lost ({told_by(exc)})")


def _bytes(value: bytes | str) -> bytes:
    # A store written in Python may return other values than c10d.
    return value.encode() if isinstance(value, str) else bytes(value)
