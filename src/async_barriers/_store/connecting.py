"""Opens connections, and hosts a store in this process."""

from __future__ import annotations

# The codec of address names. Python would load it with the first name, on an event loop.
import encodings.idna  # noqa: F401
import errno
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from torch.distributed import Store, TCPStore

from .._errors import BarrierConnectionError, out_of_threads, seconds, told_by
from .._system import hosted_here
from . import wire
from .connection import SocketConnection
from .event_loop import Loop
from .future import Effort, Future
from .threads import ThreadedConnection
from .waiting import sleep, within, writable
from .worker import Living, in_own_thread

_RETRY_SECS = 0.1
# How long to try one address before the next one is tried as well.
_HEAD_START_SECS = 0.25
# For c10d's own client of the server that it hosts. It would look a name up, and print that it
# cannot; and the name that others know this machine by need not lead here from here.
_HERE = "127.0.0.1"
_HOSTED_TIMEOUT = timedelta(seconds=300)

Addresses = list[tuple[Any, ...]]


class NotUnderstood(BarrierConnectionError):
    """The answer is not that of a TCPStore's server."""


async def in_thread(loop: Loop, name: str, call: Callable[[], Any]) -> Any:
    """Make one blocking call in a thread of its own."""
    came: Future[Any] = Future()

    def told() -> None:
        try:
            came.resolve(promise.result())
        except BaseException as exc:
            came.fail(exc)

    try:
        promise = in_own_thread(name, call)
    except RuntimeError as exc:
        raise BarrierConnectionError(f"no thread can be started {out_of_threads(exc)}") from exc
    promise.when_settled(lambda: loop.post(told))
    return await came


async def connect(
    loop: Loop, host: str, port: int, deadline: float, failures: list[BaseException] | None = None
) -> SocketConnection:
    """Connect to the server of a TCPStore, which has proved that it is one.

    Tries until it works, or the loop's clock says ``deadline``: its host may come later.

    :param failures: the latest one is kept there, for calls that do not wait as long
    :raises NotUnderstood: another kind of server answers
    :raises BarrierConnectionError: no server answered by then; it says why
    """
    began = loop.now()
    failures = [] if failures is None else failures
    where = f"{host}:{port}"
    why: BaseException = TimeoutError("there was no time left")
    tries = 0
    while loop.now() < deadline or not tries:
        tries += 1
        try:
            for_this = max(deadline - loop.now(), 0.05)
            sock = await _first(loop, await _resolve(loop, host, port), for_this)
            connection = await _greet(loop, sock, where, max(deadline - loop.now(), 0.05))
            failures.clear()
            return connection
        except NotUnderstood as exc:
            why = exc
            if tries > 3:
                raise
        except OSError as exc:
            why = exc
        failures[:] = [why]
        await sleep(loop, min(_RETRY_SECS, max(0.0, deadline - loop.now())))
    advice = (
        "this process has no descriptors left (ulimit -n)"
        if isinstance(why, OSError) and why.errno in (errno.EMFILE, errno.ENFILE)
        else "is the process that hosts it up, and do address and port agree?"
    )
    raise BarrierConnectionError(
        f"no store answers at {where} after {seconds(loop.now() - began)} ({told_by(why)}); "
        + advice
    ) from why


async def _resolve(loop: Loop, host: str, port: int) -> Addresses:
    try:
        # An address needs no look-up.
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    return list(await in_thread(loop, "names", look_up))


async def _first(loop: Loop, addresses: Addresses, secs: float) -> socket.socket:
    """A socket to the first address that accepts one; tries several at the same time."""
    deadline = loop.now() + secs
    opened: Future[socket.socket] = Future()
    failed: list[OSError] = []
    attempts: list[Effort[None]] = []

    async def attempt(address: tuple[Any, ...]) -> None:
        family, kind, protocol, _, at = address
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as exc:
            failed.append(exc)
            return
        try:
            sock.setblocking(False)
            if family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = sock.connect_ex(at)
            if code == errno.EINPROGRESS:
                if not await within(loop, writable(loop, sock), deadline - loop.now()):
                    raise TimeoutError(errno.ETIMEDOUT, "connecting timed out")
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            loop.unwatch(sock)
            if opened.done:
                sock.close()
            else:
                opened.resolve(sock)
        except OSError as exc:
            loop.unwatch(sock)
            sock.close()
            failed.append(exc)
            if len(failed) == len(addresses):
                opened.fail(failed[0])
        except BaseException as exc:
            # A signal handler raised, perhaps after it was handed over.
            if not (opened.done and opened.error is None and opened.result() is sock):
                loop.unwatch(sock)
                sock.close()
                opened.fail(exc)
            raise

    try:
        for number, address in enumerate(addresses):
            attempts.append(Effort(attempt(address)))
            if number + 1 < len(addresses):
                head_start = min(_HEAD_START_SECS, secs / len(addresses))
                await within(loop, attempts[-1], head_start)
                if opened.done:
                    break
        if not opened.done:
            if len(failed) == len(addresses):
                raise failed[0]
            if not await within(loop, opened, deadline - loop.now()):
                raise failed[0] if failed else TimeoutError(errno.ETIMEDOUT, "connecting timed out")
        return opened.result()
    finally:
        for other in attempts:
            other.stop(BarrierConnectionError("another address was quicker"))


async def _greet(loop: Loop, sock: socket.socket, where: str, secs: float) -> SocketConnection:
    connection = SocketConnection(sock, loop, where)
    number = os.getpid() & 0x7FFFFFFF
    try:
        answer = connection.say_hello(number)
        if not await within(loop, answer, secs):
            raise TimeoutError(errno.ETIMEDOUT, "it accepts connections, but says nothing")
        if answer.error is not None or answer.result()[0] != wire.echo(number):
            cause = answer.error and answer.error.__cause__
            if isinstance(cause, ConnectionError):
                # The server hung up: perhaps it ends or begins just now.
                raise cause
            said = "" if answer.error is not None else f" ({answer.result()[0]!r})"
            raise NotUnderstood(f"what listens at {where} does not answer as a TCPStore does{said}")
    except BaseException:
        connection.close(reset=True)
        raise
    return connection


async def connect_by_threads(
    loop: Loop,
    open_store: Callable[[], Store],
    deadline: float,
    what: str,
    clients: Living[ThreadedConnection],
) -> ThreadedConnection:
    """Open a connection whose calls c10d's own client makes, in threads.

    :param clients: it is one of these from now on
    :raises BarrierConnectionError: it was not open by ``deadline``
    """
    connection = ThreadedConnection(open_store, loop)
    clients.add(connection)
    try:
        opened = connection.open()
        if not await within(loop, opened, deadline - loop.now()):
            raise BarrierConnectionError(f"{what} did not answer in time")
        if (error := opened.error) is not None:
            raise BarrierConnectionError(f"{what} cannot be reached ({error})") from error.__cause__
    except BaseException:
        connection.close(reset=True)
        raise
    return connection


def host_store(port: int, use_libuv: bool, *, shared: bool) -> TCPStore:
    """The server of a TCPStore in this process, at all its addresses; blocks.

    :param shared: whether others in this process may host at the same port: all get one server
    :raises OSError: the port is taken, or cannot be listened at
    """
    # If the port is taken, c10d writes a trace to stderr. So look before.
    if port and not (shared and hosted_here(port)):
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        socket.create_server(("", port), family=family, backlog=1, dualstack_ipv6=dual).close()
    try:
        return TCPStore(
            _HERE,
            port,
            is_master=True,
            timeout=_HOSTED_TIMEOUT,
            wait_for_workers=False,
            use_libuv=use_libuv,
            multi_tenant=shared,
        )
    except Exception as exc:
        taken = "EADDRINUSE" in str(exc) or "already in use" in str(exc)
        raise OSError(errno.EADDRINUSE if taken else errno.EIO, told_by(exc)) from exc
