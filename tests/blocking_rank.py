"""What a rank does that cannot await; see rank_process.py, which it answers like."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from rank_process import PREFIX, say
from torch.distributed import TCPStore

from async_barriers import BarrierConfig, BarrierError
from async_barriers.blocking import BlockingBarrier

HOST = "127.0.0.1"


def main(options: Mapping[str, Any]) -> None:
    """Build the barrier, and do what is asked, in threads, until the end is."""
    program = importlib.import_module(options.get("doings", __name__))
    doings = program.Doings(BlockingBarrier(configuration(options)), options)
    doings.barrier.connect()
    say(event="connected")
    for line in sys.stdin:
        command = json.loads(line)
        number, do = command.pop("ask"), command.pop("do")
        if do == "end":
            break
        function = getattr(doings, do)
        if do.startswith("here_"):
            answer(number, function, command)
        else:
            threading.Thread(target=answer, args=(number, function, command), daemon=True).start()


def configuration(options: Mapping[str, Any]) -> BarrierConfig:
    """How this rank's barrier is built, as a checkpoint process is told."""
    rank, size, port = options["rank"], options["size"], options["port"]
    given = {"timeout_secs": 20.0, "timeout_barrier_init_secs": 20.0, **options.get("given", {})}
    if options["own_store"]:
        own = {"global_rank": rank, "global_world_size": size, "barrier_prefix": PREFIX}
        where = {"tcpstore_port": port, "master_address": HOST}
        return BarrierConfig("tcp_store", {**own, **where, **given})
    store = TCPStore(HOST, port, wait_for_workers=False)
    here = {"store": store, "rank": rank, "world_size": size, "prefix": PREFIX}
    return BarrierConfig("store", {**here, **given})


class Doings:
    """What it can be asked to do; ``here_`` is the main thread."""

    def __init__(self, barrier: BlockingBarrier, options: Mapping[str, Any]) -> None:
        self.barrier = barrier
        self.options = options

    def cross(self, name: str = "", **given: Any) -> dict[str, Any]:
        """Enter the next phase of a name."""
        entered = time.monotonic()
        result = self.barrier.execute_barrier(name=name, **given)
        return {**asdict(result), "entered": entered, "released": time.monotonic()}

    def here_cross(self) -> dict[str, Any]:
        try:
            return self.cross()
        except KeyboardInterrupt:
            say(event="interrupted", at=time.monotonic())
            raise

    def here_fail(self) -> None:
        """Leave a ``with`` block by an exception."""
        with self.barrier:
            raise OSError("disk full")

    def here_close(self) -> None:
        self.barrier.close()

    def here_fork(self) -> dict[str, Any]:
        """What a forked child is told that uses the barrier of its parent, and how soon."""
        reader, writer = os.pipe()
        if child := os.fork():
            os.close(writer)
            os.waitpid(child, 0)
            with open(reader) as said:
                told: dict[str, Any] = json.load(said)
            return {**told, "parent": os.getpid(), "child": child}
        barrier = self.barrier
        calls: list[Callable[[], object]] = [
            barrier.connect,
            barrier.execute_barrier,
            lambda: barrier.all_gather(b""),
            lambda: barrier.commit(lambda payloads: b""),
            lambda: barrier.abort("a child's whim"),
            lambda: barrier.start(barrier.barrier.connect),
        ]
        began = time.monotonic()
        told = {"errors": [error_of(call) for call in calls]}
        barrier.close()
        told["secs"] = time.monotonic() - began
        os.write(writer, json.dumps(told).encode())
        # As any other program: its end does not reach the parent either.
        sys.exit()


def error_of(call: Callable[[], object]) -> str:
    try:
        return f"nothing, but returned {call()!r}"
    except BarrierError as exc:
        return str(exc)


def answer(number: int, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Make the call, and say what came of it and when."""
    began = time.monotonic()
    facts: dict[str, Any]
    try:
        value = function(**arguments)
    except Exception as exc:
        facts = {"error": type(exc).__name__, "text": str(exc), **vars(exc)}
    else:
        facts = value if isinstance(value, dict) else {"value": value}
    say(to=number, began=began, ended=time.monotonic(), **facts)
