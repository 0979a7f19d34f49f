"""Ranks as forked processes that do what the driver asks of them, all at the same time."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

# Forked, since importing torch costs each process seconds; so nothing that starts threads may
# run in the driver before.
_context = multiprocessing.get_context("fork")
_PATIENCE_SECS = 120.0
# c10d looks up its peers' host names in the DNS; where that is slow it takes seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


class Fleet:
    """``size`` processes; ``program(number)`` makes an object in each, whose methods you call."""

    def __init__(self, size: int, program: Callable[[int], Any]) -> None:
        self.size = size
        self._channels: list[Connection] = []
        self._processes: list[BaseProcess] = []
        # Keep torch's objects out of the ranks' garbage collections.
        gc.freeze()
        for number in range(size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_serve, args=(number, program, theirs, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            self._channels.append(ours)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def ask(self, what: str, *args: Any, ranks: Iterable[int] | None = None) -> list[Any]:
        """Have ``ranks`` (by default all) call one method at once; return each result."""
        asked = self.start(what, *args, ranks=ranks)
        return [self.answer(number) for number in asked]

    def start(self, what: str, *args: Any, ranks: Iterable[int] | None = None) -> list[int]:
        """Only ask; call `answer` for each of the ranks returned."""
        asked = list(range(self.size) if ranks is None else ranks)
        for number in asked:
            self._channels[number].send((what, args))
        return asked

    def answer(self, number: int) -> Any:
        """The result of one rank."""
        if not self._channels[number].poll(_PATIENCE_SECS):
            raise TimeoutError(f"rank {number} did not answer within {_PATIENCE_SECS:g} s")
        error, value = self._channels[number].recv()
        if error is not None:
            raise RuntimeError(f"rank {number} failed:\n{error}")
        return value

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for channel in self._channels:
            with contextlib.suppress(OSError):
                channel.send(None)
        for process in self._processes:
            process.join(10.0 if exc is None else 0.5)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(number: int, program: Callable[[int], Any], channel: Connection, driver: int) -> None:
    # Only the driver reacts to Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    target: Any = None
    while (asked := _next(channel, driver)) is not None:
        what, args = asked
        error = value = None
        try:
            if target is None:
                target = program(number)
            value = getattr(target, what)(*args)
        except Exception:
            error = traceback.format_exc()
        channel.send((error, value))
    # Some of what is measured hangs at exit, or aborts.
    os._exit(0)


def _next(channel: Connection, driver: int) -> Any:
    # Not by the end of the channel: processes forked later hold it open, too.
    while not channel.poll(2.0):
        if os.getppid() != driver:
            return None
    return channel.recv()


def free_port() -> int:
    """A port at which no process listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
