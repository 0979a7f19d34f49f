"""The program of ranks that tests run as processes, and of the forge that they come from.

The forge imports torch, which takes seconds, and forks a rank, which takes milliseconds, each
time it is asked. A rank reads commands from its stdin and answers on its stdout, in JSON; its
interpreter ends as that of any program does.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NoReturn

import anyio
import anyio.to_thread
import trio
from networks import enter
from torch.distributed import TCPStore
from worlds import AnyBarrier

from async_barriers import StoreBarrier, TCPStoreBarrier
from async_barriers._client import process

PREFIX = "processes"
STORE_TIMEOUT_SECS = 77


def forge_ranks(channel: socket.socket) -> dict[str, Any] | None:
    """Fork when asked to. Returns in each rank with its options, and in the forge at the end."""
    while True:
        message, fds, _, _ = socket.recv_fds(channel, 1 << 16, 3)
        if not message:
            return None
        if fds:
            options: dict[str, Any] = json.loads(message)
            for module in options.get("imports", ()):
                importlib.import_module(module)
            # What torch left is not for the ranks' collectors: going through it costs each 0.3 s
            # at exit.
            gc.freeze()
            pid = os.fork()
            if not pid:
                channel.close()
                for target, fd in enumerate(fds):
                    os.dup2(fd, target)
                    os.close(fd)
                return options
            for fd in fds:
                os.close(fd)
            channel.send(b"%d" % pid)
        else:
            status = os.waitpid(int(message), 0)[1]
            channel.send(b"%d" % os.waitstatus_to_exitcode(status))


def be_rank(options: dict[str, Any]) -> None:
    """What a rank's program does, on the event loop it was told to use."""
    # Whoever finds us hung aborts us, and reads where.
    faulthandler.enable()
    # A shell that started us in the background would have us ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.get("home") is not None:
        enter(options["home"])
    if "machine" in options:
        # What tells machines apart is the kernel's to say.
        process._MACHINE = options["machine"]
    doing = functools.partial(obey, options)
    if "program" in options:
        os.environ.update(options["environment"])
        program = importlib.import_module(options["program"])
        doing = functools.partial(program.main, *options["arguments"])
    if options["backend"] == "blocking":
        importlib.import_module("blocking_rank").main(options)
    elif options["backend"] == "trio":
        trio.run(doing)
    else:
        asyncio.run(doing())


async def obey(options: dict[str, Any]) -> None:
    """Build the barrier, and do what is asked until the end is."""
    if "default_group" in options:
        await importlib.import_module("dist_rank").obey(options)
        return
    doings = Doings(options)
    if options.get("managed", True):
        async with doings.barrier:
            await doings.obey()
    else:
        await doings.barrier.connect()
        await doings.obey()


class Doings:
    """What a rank can be asked to do."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self.store = None
        if not options["own_store"]:
            self.store = TCPStore(
                options["host"],
                options["port"],
                wait_for_workers=False,
                timeout=timedelta(seconds=STORE_TIMEOUT_SECS),
            )
        self.barrier = self._build()
        self._tasks: set[object] = set()
        self._scopes: dict[str, anyio.CancelScope] = {}
        self._word = anyio.Event()
        self._partial = b""

    def _build(self) -> AnyBarrier:
        options = self._options
        rank, size = options["rank"], options["size"]
        given = {
            **{"timeout_secs": 20.0, "timeout_barrier_init_secs": 20.0},
            **options.get("given", {}),
        }
        if self.store is not None:
            return StoreBarrier(self.store, rank=rank, world_size=size, prefix=PREFIX, **given)
        where = {"tcpstore_port": options["port"], "master_address": options["host"]}
        return TCPStoreBarrier(rank, size, PREFIX, **where, **given)

    async def obey(self) -> None:
        say(event="connected")
        while True:
            await anyio.wait_readable(0)
            chunk = os.read(0, 1 << 16)
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            if not chunk:
                return
            for line in lines:
                command = json.loads(line)
                number, do = command.pop("ask"), command.pop("do")
                if do == "end":
                    return
                if do.startswith("here_"):
                    await getattr(self, do)(**command)
                else:
                    call = functools.partial(getattr(self, do), **command)
                    self._spawn(functools.partial(answer, number, call))

    def _spawn(self, function: Callable[[], Awaitable[None]]) -> None:
        """A task of nobody's: it is cancelled when the event loop ends."""
        if trio.lowlevel.in_trio_run():
            trio.lowlevel.spawn_system_task(function)
        else:
            self._tasks.add(asyncio.ensure_future(function()))

    # What the main task does itself, and does not come back from.

    async def here_exit(self) -> NoReturn:
        sys.exit(3)

    async def here_raise(self, name: str) -> None:
        """Fail beside a task that waits."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.barrier.execute_barrier, name)
            await anyio.wait_readable(0)
            raise LookupError("the rest of the program failed")

    async def here_cross(self, name: str) -> None:
        """Wait in the main task."""
        await self.barrier.execute_barrier(name)

    async def here_block(self, secs: float) -> None:
        """Keep the event loop from running."""
        say(event="blocked")
        time.sleep(secs)

    # What tasks of their own do.

    async def cross(self, name: str = "", sleep: float = 0.0, **given: Any) -> dict[str, Any]:
        if sleep:
            await anyio.sleep(sleep)
        entered = time.monotonic()
        result = await self.barrier.execute_barrier(name, **given)
        return {**asdict(result), "entered": entered, "released": time.monotonic()}

    async def cross_until_cancelled(self, name: str, **given: Any) -> dict[str, Any]:
        with anyio.CancelScope() as scope:
            self._scopes[name] = scope
            await self.barrier.execute_barrier(name, **given)
        return {"cancelled": scope.cancelled_caught}

    async def cancel(self, name: str) -> dict[str, Any]:
        self._scopes[name].cancel()
        return {}

    async def fail_before_entering(self, name: str) -> None:
        async with self.barrier.phase(name):
            raise LookupError("the body failed")

    async def report(self, doing: str) -> dict[str, Any]:
        self.barrier.report(doing)
        return {}

    async def abort(self, name: str) -> dict[str, Any]:
        await self.barrier.abort("the disk is full", name)
        return {}

    async def close(self) -> dict[str, Any]:
        await self.barrier.aclose()
        return {}

    async def build_anew(self) -> dict[str, Any]:
        """Of the same arguments."""
        self.barrier = self._build()
        await self.barrier.connect()
        return {}

    async def give_word(self) -> dict[str, Any]:
        """Have the publish that waits for it return."""
        self._word.set()
        return {}

    async def connect(self) -> dict[str, Any]:
        await self.barrier.connect()
        return {}

    async def commit(self, publish: str, payload: str, **given: Any) -> bytes:
        async def act(payloads: Mapping[int, bytes]) -> bytes:
            told = {rank: value.decode() for rank, value in payloads.items()}
            say(event="publishing", payloads=told)
            if publish == "hang":
                await anyio.sleep_forever()
            if publish == "wait":
                await self._word.wait()
            if publish == "fail":
                raise OSError("disk full")
            return b"+".join(payloads[rank] for rank in sorted(payloads))

        return await self.barrier.commit(act, payload=payload.encode(), **given)

    async def outcome(self, name: str, sequence: int) -> dict[str, Any]:
        """What became of a commit."""
        record = await self.barrier.outcome(name, sequence)
        if record is None:
            return {"record": None}
        return {"record": {**asdict(record), "result": record.result.decode()}}

    async def use_store(self, key: str) -> dict[str, Any]:
        """Use the store that the barrier was given, in a thread, as its owner would."""

        def use() -> dict[str, Any]:
            store: Any = self.store
            began = time.monotonic()
            store.set(key, "theirs")
            found = store.get(key).decode()
            count = store.add(key + "/count", 1)
            timeout = store.timeout / timedelta(seconds=1)
            secs = time.monotonic() - began
            return {"found": found, "count": count, "timeout": timeout, "secs": secs}

        return await anyio.to_thread.run_sync(use)


async def answer(number: int, call: Callable[[], Awaitable[Any]]) -> None:
    """Make the call, and say what came of it and when."""
    began = time.monotonic()
    facts: dict[str, Any]
    try:
        value = await call()
    except Exception as exc:
        facts = {"error": type(exc).__name__, "text": str(exc), **vars(exc)}
        facts["missing"] = [list(vars(each).values()) for each in facts.get("missing", ())]
    else:
        facts = {"value": value.decode()} if isinstance(value, bytes) else value
    say(to=number, began=began, ended=time.monotonic(), **facts)


def say(**facts: Any) -> None:
    # One write, which no other thread's can come between.
    os.write(1, json.dumps(facts).encode() + b"\n")


if __name__ == "__main__":
    with contextlib.closing(socket.socket(fileno=int(sys.argv[1]))) as forge_channel:
        rank_options = forge_ranks(forge_channel)
    if rank_options is not None:
        be_rank(rank_options)
