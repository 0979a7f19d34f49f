"""A connection of our own to a TCPStore: requests out, answers in, never a blocking call."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import Any

from .._errors import BarrierConnectionError, another, caused, told_by
from .._protocol.store import Request
from .._system import UNHARMED, prepare, unsent
from . import wire
from .event_loop import Loop
from .future import Future
from .linger import MOST_READ, Linger
from .wire import Heard, Message

_RESET = struct.pack("ii", 1, 0)

# Due in place of a message's answers: the byte of a wait, or of a cancellation.
_WAKE, _CANCELLATION = Message(), Message()
_BYTES = (_WAKE, _CANCELLATION)


class SocketConnection:
    """Speaks to the server of a TCPStore over a non-blocking socket, on any loop.

    Answers are told apart by their order alone. It waits for at most one key. The wait's one byte
    may come at any time, and must not be taken for the beginning of another answer. So a request
    that is answered cancels the wait and asks for it anew.

    :ivar on_wake: called when the awaited key is written
    :ivar on_lost: called once, when the connection is lost
    :ivar outbox: requests that may go out with the next message, each with its callback
    """

    waits, suspect = True, False

    def __init__(self, sock: socket.socket, loop: Loop, where: str) -> None:
        self.on_wake: Callable[[], object] | None = None
        self.on_lost: Callable[[BarrierConnectionError], object] | None = None
        self.outbox: list[tuple[list[Request], Heard]] = []
        self.lost: BarrierConnectionError | None = None
        prepare(sock)
        self._socket = sock
        self._loop = loop
        self._where = where
        # Messages whose answers will come, in order; a wait's byte last. (A deque has 600 bytes.)
        self._due: list[Message] = []
        self._awaited: str | None = None
        # How often it was told for which key to wait; and which of those waits are being cancelled.
        self._waits = 0
        self._cancelled: list[int] = []
        self._unsaid = bytearray()
        # The bytes of an incomplete answer, and how many it takes to go on.
        self._heard: list[bytes] = []
        self._needed = 0
        # The latest message whose answers have all come.
        self._answered: Message | None = None
        self._writing = False
        loop.watch_readable(sock, self.read)

    # -- out ---------------------------------------------------------------------------

    def call(self, *requests: Request, wait: str | None = None) -> Future[list[Any]]:
        """As `Store.call`; the outbox goes out before."""
        message = Message()
        if self.lost is not None:
            message.fail(another(self.lost))
            return message
        due, kinds = self._due, message.kinds
        said: list[bytes] = []
        try:
            if self.outbox:
                end = 0
                for late, heard in self.outbox:
                    end += message.say(late, said)
                    message.late.append((end, heard))
                self.outbox.clear()
            message.say(requests, said)
            # Requests that are not answered do not disturb a wait.
            if kinds or wait is not None:
                if due and due[-1] is _WAKE:
                    due[-1] = _CANCELLATION
                    said.insert(0, wire.CANCEL_WAIT)
                    self._cancelled.append(self._waits)
                if kinds:
                    due.append(message)
                if wait is not None:
                    self._awaited = wait
                    self._waits += 1
                if self._awaited is not None:
                    said.append(wire.wait(self._awaited))
                    due.append(_WAKE)
            self._send(b"".join(said))
        except BaseException as exc:
            # A signal handler raised: the answers due may not match what was sent.
            self._lose(exc)
            raise
        if not kinds:
            message.answer()
        return message

    def stop_waiting(self) -> None:
        """Call nobody back any more; the next message cancels the wait itself."""
        self._awaited = None
        self.on_wake = None

    def say_hello(self, number: int) -> Future[list[Any]]:
        """Begin as c10d's client does; the answer is the `wire.echo`."""
        message = Message()
        message.kinds.append(wire.ECHO)
        self._due.append(message)
        self._send(wire.hello(number))
        return message

    def _send(self, said: bytes) -> None:
        if self.lost is not None:
            return
        if self._unsaid:
            self._unsaid += said
            return
        try:
            sent = self._socket.send(said, UNHARMED)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._lose(exc)
            return
        if sent < len(said):
            self._unsaid += said[sent:]
            self._writing = True
            self._loop.watch_writable(self._socket, self.write)

    def write(self) -> None:
        """The socket can be written to."""
        try:
            if self._unsaid:
                del self._unsaid[: self._socket.send(self._unsaid, UNHARMED)]
        except BlockingIOError:
            return
        except OSError as exc:
            self._lose(exc)
            return
        except BaseException as exc:
            # A part of the message may have been sent.
            self._lose(exc)
            raise
        if not self._unsaid and self._writing:
            self._writing = False
            self._loop.unwatch_writable(self._socket)

    # -- in ----------------------------------------------------------------------------

    def read(self) -> None:
        """The socket can be read from."""
        try:
            heard = self._socket.recv(MOST_READ)
            if not heard:
                raise ConnectionResetError(errno.ECONNRESET, "the server hung up")
            if self._heard:
                # Not parsed before there is enough: a large value comes in many pieces.
                self._heard.append(heard)
                self._needed -= len(heard)
                if self._needed > 0:
                    return
                heard = b"".join(self._heard)
                self._heard.clear()
            self._hear(heard)
        except BlockingIOError:
            return
        except (OSError, ValueError) as exc:
            self._lose(exc)
        except BaseException as exc:
            # A signal handler raised in the middle of an answer, so what was heard is not known
            # any more. The calls of this connection are settled on another one.
            answered = self._answered
            self._lose(exc)
            if answered is not None and self.lost is not None:
                answered.fail(another(self.lost))
            raise

    def _hear(self, heard: bytes) -> None:
        due = self._due
        at, end = 0, len(heard)
        while due and at < end and self.lost is None:
            message = due[0]
            if message in _BYTES:
                byte = heard[at]
                at += 1
                if byte > wire.CANCELLED:
                    raise ValueError(f"byte {byte} where a wait ends")
                woken = message is _WAKE
                if woken:
                    del due[0]
                elif byte == wire.CANCELLED:
                    del due[0]
                    del self._cancelled[0]
                else:
                    # The wait ended by itself just before its cancellation, so two bytes come. If
                    # it was asked for anew, that one may not end: the key may be gone by now.
                    woken = self._cancelled[0] == self._waits
                if woken and self._awaited is not None:
                    self._awaited = None
                    if self.on_wake is not None:
                        self.on_wake()
                continue
            at, needed = message.hear(heard, at)
            if needed:
                self._needed = needed - end
                break
            self._answered = message
            del due[0]
            message.answer()
        if at < end and self.lost is None:
            if not due:
                raise ValueError("more came than was asked for")
            self._heard.append(heard[at:])

    # -- its end -----------------------------------------------------------------------

    def move(self, loop: Loop) -> None:
        """Continue on another loop."""
        if self.lost is None and loop is not self._loop:
            self._loop.unwatch(self._socket)
            self._loop = loop
            loop.watch_readable(self._socket, self.read)
            if self._unsaid:
                self._writing = True
                loop.watch_writable(self._socket, self.write)

    @property
    def unsaid(self) -> bool:
        """Whether something has yet to be sent or answered."""
        return bool(self._unsaid or any(m is not _WAKE for m in self._due))

    @property
    def sent(self) -> bool:
        """Whether the system has taken all that was said; the server may not have heard it."""
        return self.lost is None and not self._unsaid

    def close(self, *, reset: bool = False) -> None:
        """Close the connection.

        :param reset: drop what was sent and has not arrived, so that it does not arrive later
        """
        self.on_lost = None
        self._end(BarrierConnectionError("this connection to the store was closed"), reset=reset)

    def _lose(self, exc: BaseException) -> None:
        text = f"the connection to the store at {self._where} was lost ({told_by(exc)})"
        self._end(caused(exc if isinstance(exc, Exception) else None, text), reset=True)

    def _end(self, error: BarrierConnectionError, *, reset: bool) -> None:
        if self.lost is not None:
            return
        self.lost = error
        self._loop.unwatch(self._socket)
        self._let_go(reset=reset)
        self._unsaid.clear()
        due, self._due = self._due, []
        on_lost, self.on_lost, self.on_wake = self.on_lost, None, None
        for message in due:
            if message not in _BYTES:
                message.fail(another(error))
        if on_lost is not None:
            on_lost(error)

    def _let_go(self, *, reset: bool) -> None:
        """Close the socket; if answers will still come, read them first, for a moment.

        A server that cannot deliver an answer prints that on its stderr.
        """
        sock, loop = self._socket, self._loop
        answers = any(message is not _WAKE for message in self._due)
        try:
            pending = bool(self._unsaid) or unsent(sock)
            if pending and reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            elif answers and not loop.ended:
                sock.shutdown(socket.SHUT_WR)
                Linger(sock, loop)
                return
        except OSError:
            pass  # It is gone already.
        sock.close()

    def forsake(self) -> None:
        """In a forked child: close the descriptor, which stays open in the parent; send nothing."""
        self.lost = BarrierConnectionError("this connection is another process's")
        self._socket.close()
