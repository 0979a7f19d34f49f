"""The server of a TCPStore, which a test moves byte by byte; no socket, no thread, no time."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, cast

from async_barriers._store.connection import SocketConnection

_SIZE = struct.Struct("=Q")


class Server:
    """A server with one client; `write` stands for the writes of others.

    :ivar values: by key, with a slash before each key
    :ivar waiting: the key that the client waits for
    :ivar woken: the keys whose waits got their byte
    """

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.waiting: bytes | None = None
        self.woken: set[bytes] = set()
        self.heard = bytearray()
        self.said = bytearray()

    def write(self, key: bytes, value: bytes) -> None:
        """Set a key, and wake the client if it waits for it."""
        self.values[key] = value
        if self.waiting == key:
            self._end_wait(key)

    def serve(self) -> bool:
        """Answer the next request; return whether there was a whole one."""
        at = 1

        def text() -> bytes:
            nonlocal at
            (size,) = _SIZE.unpack_from(self.heard, at)
            at += 8 + size
            if at > len(self.heard):
                raise struct.error
            return bytes(self.heard[at - size : at])

        def number() -> int:
            nonlocal at
            at += 8
            return int(struct.unpack_from("=q", self.heard, at - 8)[0])

        if not self.heard:
            return False
        try:
            fields = self._fields(self.heard[0], text, number)
        except struct.error:
            return False
        kind = self.heard[0]
        del self.heard[:at]
        self._do(kind, *fields)
        return True

    @staticmethod
    def _fields(kind: int, text: Callable[[], bytes], number: Callable[[], int]) -> list[Any]:
        if kind in (1, 9):  # set, append
            return [text(), text()]
        if kind == 2:  # compare_set
            return [text(), text(), text()]
        if kind == 4:  # add
            return [text(), number()]
        if kind in (6, 10, 11):  # wait, multi_get, multi_set
            return [text() for _ in range(number() * (2 if kind == 11 else 1))]
        assert kind in (3, 8, 12), f"request {kind}"  # get, delete, cancel_wait
        return [] if kind == 12 else [text()]

    def _do(self, kind: int, *fields: Any) -> None:
        key = fields[0] if fields else b""
        if kind == 1:
            self.write(key, fields[1])
        elif kind == 9:
            self.write(key, self.values.get(key, b"") + fields[1])
        elif kind == 2:
            before = self.values.get(key, b"")
            if before == fields[1] and (key in self.values or not before):
                self.write(key, fields[2])
            now = self.values.get(key, fields[1])
            self.said += _SIZE.pack(len(now)) + now
        elif kind in (3, 10):
            for each in fields:
                now = self.values.get(each, b"")
                self.said += _SIZE.pack(len(now)) + now
        elif kind == 4:
            total = int(self.values.get(key, b"0")) + fields[1]
            self.write(key, b"%d" % total)
            self.said += struct.pack("=q", total)
        elif kind == 11:
            for each, value in zip(fields[::2], fields[1::2], strict=True):
                self.write(each, value)
        elif kind == 8:
            self.said += struct.pack("=q", self.values.pop(key, None) is not None)
        elif kind == 12:
            self.waiting = None
            self.said += b"\1"
        else:
            # A second wait would overwrite the first, which would never get its answer.
            assert self.waiting is None
            self.waiting = key
            if key in self.values:
                self._end_wait(key)

    def _end_wait(self, key: bytes) -> None:
        self.waiting = None
        self.woken.add(key)
        self.said += b"\0"


class HandSocket:
    """A non-blocking socket that sends and receives as many bytes as the test says.

    :ivar room: how many bytes can be sent
    :ivar arrived: the bytes that can be received
    """

    def __init__(self) -> None:
        self.room = 1 << 30
        self.sent = bytearray()
        self.arrived = bytearray()

    def send(self, data: bytes, flags: int = 0) -> int:
        size = min(self.room, len(data))
        if not size:
            raise BlockingIOError
        self.sent += data[:size]
        self.room -= size
        return size

    def recv(self, most: int) -> bytes:
        if not self.arrived:
            raise BlockingIOError
        data = bytes(self.arrived[:most])
        del self.arrived[:most]
        return data


class HandLoop:
    """A loop that calls no callback; the test does."""

    ended = False

    def __init__(self) -> None:
        self.readable: Callable[[], object] | None = None
        self.writable: Callable[[], object] | None = None

    def watch_readable(self, sock: object, callback: Callable[[], object]) -> None:
        self.readable = callback

    def watch_writable(self, sock: object, callback: Callable[[], object]) -> None:
        self.writable = callback

    def unwatch_writable(self, sock: object) -> None:
        self.writable = None

    def unwatch(self, sock: object) -> None:
        self.readable = self.writable = None


class Served:
    """A connection, its server, and what is on its way between them."""

    def __init__(self) -> None:
        self.server = Server()
        self.socket = HandSocket()
        self.loop = HandLoop()
        self.connection = SocketConnection(cast(Any, self.socket), cast(Any, self.loop), "the test")

    def arrive(self, most: int = 1 << 30) -> None:
        """Let up to ``most`` bytes reach the server."""
        self.server.heard += self.socket.sent[:most]
        del self.socket.sent[:most]

    def hear(self, most: int = 1 << 30) -> None:
        """Let up to ``most`` bytes reach the client, which reads them."""
        self.socket.arrived += self.server.said[:most]
        del self.server.said[:most]
        if self.loop.readable is not None:
            self.loop.readable()

    def send(self, room: int = 1 << 30, *, told: bool = True) -> None:
        """Let the client send ``room`` more bytes; it hears of that now if ``told``."""
        self.socket.room = room
        if told and self.loop.writable is not None:
            self.loop.writable()

    def exchange(self) -> None:
        """Let everything under way arrive."""
        self.send()
        self.arrive()
        while self.server.serve():
            pass
        self.hear()
