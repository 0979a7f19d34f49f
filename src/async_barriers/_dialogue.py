"""What a rank that meets says to the server of a TCPStore and hears from it, byte by byte.

c10d's client blocks in each call, so it takes a thread, and each crossing two changes of thread.
The same requests take none when we say them ourselves, on the same connection: an event loop does
what can be done without waiting whenever something came (see `_series.py`). The format is c10d's
own and promised nowhere (torch 2.13 has it in TCPStoreBackend.hpp), so a server is tried first
(`understood`). With one that does not understand, all goes through threads, as on other stores.
"""

from __future__ import annotations

import select
import socket
import struct
import time

_SET, _COMPARE_SET, _APPEND, _BARRIER = b"\x01", b"\x02", b"\x09", b"\x12"
_SIZE = struct.Struct("=Q")
_NUMBER = struct.Struct("=q")
_MOST = 1 << 12
# For reading and for writing; c10d's calls on the same socket have to block.
_NOW = socket.MSG_DONTWAIT
# Nor is a program ended that would be by writing to who has hung up.
_UNHARMED = getattr(socket, "MSG_NOSIGNAL", 0)
SAID_NOW = socket.MSG_DONTWAIT | _UNHARMED
# What a read expects of a key, and gets for one that is absent: no value of ours looks like this,
# nor what something else may write by mistake.
ABSENT = b"\0absent\0"
_TRIED_SECS = 1.0


class Dialogue:
    """One meeting: I say that I arrived; a byte comes; I ask for the log, and that comes.

    On an event loop it is `begin` and then `hear`, until that says that this is all; where the log
    is not there by then, or not to be waited for, a thread can `finish` it. One at a time.

    :param arriving: what `arriving` made, after what `emptying` made if that is due
    :param total: what is to be counted before the log is read; who writes to the count ends the
        waiting, too
    :param asking: what `asking` made for the same log
    :ivar log: what was read of the log, whole; None until then
    """

    log: bytes | None = None
    _asked = False
    _heard = b""

    def __init__(self, arriving: bytes, total: int, asking: bytes) -> None:
        self._unsaid = arriving + _NUMBER.pack(total)
        self._asking = asking

    def begin(self, connection: socket.socket) -> bool:
        """Say what is next; whether all of it was said, and something will come."""
        try:
            self._unsaid = self._unsaid[connection.send(self._unsaid, SAID_NOW) :]
        except OSError:
            return False  # If the connection is lost, who finishes finds out, too.
        return not self._unsaid

    def hear(self, connection: socket.socket) -> bool:
        """Do what can be done without waiting; True if there is no more of that."""
        if self._unsaid:
            return True
        try:
            heard = connection.recv(_MOST, _NOW)
            if heard and not self._asked:
                # The count is full, or somebody wrote to it.
                self._asked = True
                self._unsaid = self._asking
                self._unsaid = self._asking[connection.send(self._asking, SAID_NOW) :]
                return bool(self._unsaid)
        except BlockingIOError:
            return bool(self._unsaid)  # if there is nothing to be said: called for nothing
        except OSError:
            return True
        return not heard or self._read(heard)

    def finish(self, connection: socket.socket) -> bytes:
        """Go on, and block until the log is there.

        :raises OSError: the connection is lost
        """
        while self.log is None:
            if self._unsaid:
                connection.sendall(self._unsaid, _UNHARMED)
                self._unsaid = b""
            elif not (heard := connection.recv(_MOST)):
                raise ConnectionResetError("the server hung up")
            elif self._asked:
                self._read(heard)
            else:
                self._asked = True
                self._unsaid = self._asking
        return self.log

    def _read(self, heard: bytes) -> bool:
        """Take in a part of the answer; whether it is whole."""
        if self._heard:
            heard = self._heard + heard
        if len(heard) >= 8 and len(heard) >= 8 + _SIZE.unpack_from(heard)[0]:
            self.log = heard[8:]
            return True
        self._heard = heard
        return False


def arriving(log: str, line: bytes, count: str) -> bytes:
    """Append ``line`` to a log, count it, and wait until as many are counted as is said next."""
    return _APPEND + _key(log) + _text(line) + _BARRIER + _key(count)


def emptying(log: str) -> bytes:
    """Have a log empty."""
    return _SET + _key(log) + _text(b"")


def asking(log: str) -> bytes:
    """Read a log."""
    return _COMPARE_SET + _key(log) + _text(ABSENT) + _text(ABSENT)


def _key(key: str) -> bytes:
    # c10d's client puts a prefix before each.
    return _text(b"/" + key.encode())


def _text(text: bytes) -> bytes:
    return _SIZE.pack(len(text)) + text


def keys(tried: str) -> tuple[str, str]:
    """The keys that `understood` leaves behind."""
    return f"{tried}/log", f"{tried}/count"


def understood(connection: socket.socket, tried: str) -> bool:
    """Whether a meeting of one goes as it should, within a second. Blocks for as long.

    If not, the connection is of no more use.

    :param tried: what no key begins with yet
    """
    log, count = keys(tried)
    line = b"understood?"
    said = Dialogue(emptying(log) + arriving(log, line, count), 1, asking(log))
    readable = select.poll()
    readable.register(connection, select.POLLIN)
    by = time.monotonic() + _TRIED_SECS
    said.begin(connection)
    while not said.hear(connection):
        if not readable.poll(1000 * max(0.0, by - time.monotonic())):
            return False
    return said.log == line
