"""The bytes that go to the server of a TCPStore and come from it; without a socket.

The format is c10d's own, and c10d does not promise it (TCPStoreBackend.hpp; requests up to 17 are
as old as torch 2.8). So a client checks the server first: see `hello`. Answers carry no name and
come in the order of the requests, but for one: the one byte that answers a wait may come at any
time. So only its cancellation follows a wait, and its answer marks where other answers begin.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

from .._errors import BarrierConnectionError
from .._protocol.store import Add, Append, CompareSet, Delete, Get, Read, Request, Set, SetMany
from .future import Future

Heard = Callable[[list[Any]], object]

_VALIDATE, _SET, _COMPARE_SET, _GET = b"\x00", b"\x01", b"\x02", b"\x03"
_ADD, _WAIT = b"\x04", b"\x06"
_DELETE, _APPEND, _MULTI_GET, _MULTI_SET = b"\x08", b"\x09", b"\x0a", b"\x0b"
CANCEL_WAIT, _PING = b"\x0c", b"\x0d"
_MAGIC = struct.pack("=I", 0x3C85F7CE)
_SIZE = struct.Struct("=Q")
_NUMBER = struct.Struct("=q")
# A read is a compare-and-set of this value to itself, since a server without libuv hangs up on a
# client that gets an absent key. An absent key answers with it. No value of ours looks like it, nor
# does anything that another program may write by mistake.
ABSENT = b"\0absent\0"
_READ_IT = 2 * (_SIZE.pack(len(ABSENT)) + ABSENT)
CANCELLED = 1
# c10d's server drops a connection that sends more in one value.
MOST_BYTES = 8 * 1024 * 1024

# Kinds of answers. A number below zero stands for that many answers of 8 bytes that nobody wants.
NUMBER, VALUE, READ, ECHO, SILENT = range(5)
UNWANTED = -1
_SIZES = tuple(_SIZE.pack(size) for size in range(1024))
# c10d's client puts a slash before each key.
_KEYS = tuple(_SIZE.pack(size + 1) + b"/" for size in range(1024))


def _key(key: str) -> bytes:
    raw = key.encode()
    size = len(raw)
    return (_KEYS[size] if size < 1024 else _SIZE.pack(size + 1) + b"/") + raw


def _text(value: bytes) -> bytes:
    size = len(value)
    return (_SIZES[size] if size < 1024 else _SIZE.pack(size)) + value


def wait(key: str) -> bytes:
    """Have one byte come when ``key`` is written, or at once if it exists."""
    return _WAIT + _SIZE.pack(1) + _key(key)


def hello(number: int) -> bytes:
    """A client's first message; the server sends the number back."""
    return _VALIDATE + _MAGIC + _PING + struct.pack("=I", number)


def echo(number: int) -> bytes:
    """The answer to `hello`."""
    return struct.pack("=I", number)


def _set_many(request: SetMany) -> bytes:
    value = _text(request.value)
    pairs = b"".join([_key(key) + value for key in request.keys])
    return _MULTI_SET + _SIZE.pack(len(request.keys)) + pairs


# How each request is encoded, and what kind of answer it gets.
_SAID: dict[type, tuple[Callable[[Any], bytes], int]] = {
    Append: (lambda s: _APPEND + _key(s[0]) + _text(s[1]), SILENT),
    Set: (lambda s: _SET + _key(s[0]) + _text(s[1]), SILENT),
    SetMany: (_set_many, SILENT),
    Add: (lambda s: _ADD + _key(s[0]) + _NUMBER.pack(s[1]), NUMBER),
    CompareSet: (lambda s: _COMPARE_SET + _key(s[0]) + _text(s[1]) + _text(s[2]), VALUE),
    Read: (lambda s: _COMPARE_SET + _key(s[0]) + _READ_IT, READ),
    Get: (lambda s: _GET + _key(s[0]), VALUE),
    Delete: (lambda s: b"".join([_DELETE + _key(key) for key in s[0]]), UNWANTED),
}


class Message(Future[list[Any]]):
    """Requests under way, whose answers come in their order.

    :ivar kinds: the kinds of the answers that have yet to come
    :ivar late: for each entry of the outbox in it: where its answers end, and its callback
    """

    __slots__ = ("answers", "kinds", "late")

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[int] = []
        self.answers: list[Any] = []
        self.late: list[tuple[int, Heard]] = []

    def say(self, requests: Iterable[Request], said: list[bytes]) -> int:
        """Add requests to it, and their bytes to ``said``; return how many answers are wanted."""
        kinds, answered = self.kinds, 0
        got: list[bytes] = []
        for request in requests:
            encode, kind = _SAID[type(request)]
            if type(request) is Get:
                got.append(_key(request.key))
            elif got:
                got = []
            if len(got) > 1:
                # As one request: the server writes all values at once, which is most of its work.
                said[-1] = _MULTI_GET + _SIZE.pack(len(got)) + b"".join(got)
            else:
                said.append(encode(request))
            if kind == UNWANTED:
                many = len(request.keys) if type(request) is Delete else 1
                if kinds and kinds[-1] < 0:
                    kinds[-1] -= many
                elif many:
                    kinds.append(-many)
            elif kind != SILENT:
                answered += 1
                kinds.append(kind)
        return answered

    def hear(self, heard: bytes, at: int) -> tuple[int, int]:
        """Take its answers from ``heard``, where they go on at ``at``.

        Return where they end, and how far ``heard`` has to reach for the next; 0 if none is due.

        :raises ValueError: no server sends that
        """
        answers, size = self.answers, len(heard)
        for index, kind in enumerate(self.kinds):  # noqa: B007  (where it broke off is used)
            end = at + (8 if kind >= 0 else -8 * kind)
            if kind == ECHO:
                end = at + 4
            if end > size:
                break
            if kind == NUMBER:
                answers.append(_NUMBER.unpack_from(heard, at)[0])
            elif kind == ECHO:
                answers.append(heard[at:end])
            elif kind >= 0:
                length = _NUMBER.unpack_from(heard, at)[0]
                if not 0 <= length <= 4 * MOST_BYTES:
                    raise ValueError(f"a value of {length} bytes")
                begin, end = end, end + length
                if end > size:
                    break
                value = heard[begin:end]
                answers.append(None if kind == READ and value == ABSENT else value)
            at = end
        else:
            return at, 0
        del self.kinds[:index]
        return at, end

    def answer(self) -> None:
        """Resolve it: all answers are there."""
        begin, answers = 0, self.answers
        try:
            for end, heard in self.late:
                heard(answers[begin:end])
                begin = end
            self.resolve(answers[begin:] if begin else answers)
        except BaseException:
            # A signal handler raised: nobody may wait for this for ever.
            self.fail(BarrierConnectionError("an exception interrupted the answer"))
            raise
