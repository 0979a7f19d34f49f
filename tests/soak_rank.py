"""The program of a rank in a soak, which crosses phases of its own accord and logs them.

What it writes is described in judge.py, and what it is told to do in soak.py.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import random
import re
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import anyio
import rank_process
from torch.distributed import TCPStore
from worlds import AnyBarrier

from async_barriers import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BarrierResult,
    BarrierTimeoutError,
    BrokenBarrierError,
    StoreBarrier,
    TCPStoreBarrier,
)
from async_barriers._client.phases import Phase, Turns

PREFIX = "soak"
# What each name is crossed by, on all ranks. Commits are led by the first and the last rank.
NAMES = (
    "execute 0", "execute 1", "phase 0", "phase 1", "commit 0", "commit -1",
    "execute 0 by step", "phase 0 by step", "commit 0 by step",
)  # fmt: skip
# How often a rank leaves a step out, which the others come for.
SKIPPED = 0.005
CLOSE_SECS = 2.0
# A host waits for its peers besides.
CLOSE_HOST_SECS = 5.0
_PASSED = re.compile(r"came for step \d+ when step (\d+), a later one, was")


class Planned(Exception):
    """A failure of a body or of a publish that the driver asked for."""


@dataclass(eq=False)
class Call:
    """A call under way."""

    number: int
    do: str
    name: str
    step: int | None
    scope: anyio.CancelScope
    breaks_only: bool = False


_current: ContextVar[Call | None] = ContextVar("current", default=None)


async def serve() -> None:
    """Host the store, and say where, until told to end."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rank_process.say(event="serving", port=server.port)
    await anyio.wait_readable(0)


class Steps:
    """The steps for which this rank comes, each once, and those that any rank has come for.

    A process that begins goes on behind those, as one that has read the latest checkpoint.
    """

    _DIGITS = 12

    def __init__(self, path: str) -> None:
        self._shared = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._present: dict[str, int] = {}

    def present(self, name: str) -> int | None:
        """The step that it has come for."""
        return self._present.get(name, 0) if name.endswith("by step") else None

    def next(self, name: str, *, skips: bool) -> int | None:
        """The next one; None for a name that is crossed without."""
        if self.present(name) is None:
            return None
        at = self._DIGITS * NAMES.index(name)
        latest = int(os.pread(self._shared, self._DIGITS, at).strip(b"\0 \n") or b"0")
        step = self._present.get(name, latest) + 1 + skips
        self._present[name] = step
        if step > latest:
            os.pwrite(self._shared, b"%*d\n" % (self._DIGITS - 1, step), at)
        return step

    def passed(self, name: str, step: int) -> None:
        """The ranks are at a later one."""
        self._present[name] = max(step, self._present[name])


class SoakRank:
    """All that one process of one rank does."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.rank: int = options["rank"]
        self.size: int = options["size"]
        self._log = os.open(options["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._random = random.Random(options["seed"])
        self._numbers = itertools.count()
        self._open: dict[int, Call] = {}
        self._failing: set[str] = set()
        self._steps = Steps(options["steps"])
        self._calls: WeakKeyDictionary[Phase, Call] = WeakKeyDictionary()
        self._refused = False
        self._leaving = False
        self._rebuilding = anyio.Lock()
        self._store: TCPStore | None = None
        self.barrier: AnyBarrier

    def say(self, event: str, **facts: Any) -> None:
        # One write, so that a kill does not leave half of it, if it can be helped.
        line = {"t": time.monotonic(), "rank": self.rank, "life": self.options["life"]}
        os.write(self._log, json.dumps({**line, "event": event, **facts}).encode() + b"\n")

    async def run(self) -> None:
        """Cross until told to end."""
        self._watch_moves()
        async with anyio.create_task_group() as tasks:
            if not await self._build():
                return
            rank_process.say(event="ready")
            for name in NAMES:
                tasks.start_soon(self._cross_on, name)
            await self._obey(tasks)
            self._leaving = True
            for call in list(self._open.values()):
                self.say("cancel", call=call.number)
            tasks.cancel_scope.cancel()
        await self._close()
        self.say("ended")

    # -- what it is told ---------------------------------------------------------------

    async def _obey(self, tasks: anyio.abc.TaskGroup) -> None:
        partial = b""
        while True:
            await anyio.wait_readable(0)
            chunk = os.read(0, 1 << 16)
            *lines, partial = (partial + chunk).split(b"\n")
            if not chunk:
                return
            for line in lines:
                command = json.loads(line)
                do = command["do"]
                if do == "end":
                    return
                if do == "cancel" and self._open:
                    call = list(self._open.values())[command["which"] % len(self._open)]
                    self.say("cancel", call=call.number)
                    call.scope.cancel()
                elif do == "fail":
                    self._failing.add(command["name"])
                elif do == "abort":
                    tasks.start_soon(self._abort, command["name"])
                elif do == "rebuild":
                    tasks.start_soon(self._rebuild)

    async def _abort(self, name: str) -> None:
        barrier, reason = self.barrier, f"told to abort by {self.options['seed']}"
        within = 2 * self.options["init_secs"]
        step = self._steps.present(name)
        await self._call(
            "abort", name, within, lambda _: barrier.abort(reason, name, step=step), step
        )

    async def _rebuild(self) -> None:
        # The former one has to be closed, or it would hold the rank.
        async with self._rebuilding:
            await self._close()
            await self._build()
        rank_process.say(event="ready")

    async def _close(self) -> None:
        within = CLOSE_HOST_SECS if self.options["own_store"] else CLOSE_SECS
        await self._call("close", "", within, lambda _: self.barrier.aclose())

    async def _build(self) -> bool:
        """Build the barrier, and connect it; False where it was refused."""
        init_secs, port = self.options["init_secs"], self.options["port"]
        given = {"timeout_secs": None, "timeout_barrier_init_secs": init_secs}
        if self.options["own_store"]:
            self.barrier = TCPStoreBarrier(
                self.rank,
                self.size,
                PREFIX,
                tcpstore_port=port,
                master_address="127.0.0.1",
                warn_after_secs=0.5,
                **given,
            )
        else:
            if self._store is None:
                self._store = TCPStore(
                    "127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=5)
                )
            self.barrier = StoreBarrier(
                self._store,
                rank=self.rank,
                world_size=self.size,
                prefix=PREFIX,
                warn_after_secs=0.5,
                **given,
            )
        self._watch_turns(self.barrier)
        self.say("joining")
        barrier = self.barrier
        connected = await self._call("connect", "", init_secs, lambda _: barrier.connect())
        membership = barrier._session.membership
        if connected and membership is not None:
            self.say("joined", generation=membership.state.number)
        return not self._refused

    def _watch_turns(self, barrier: AnyBarrier) -> None:
        """Log in which phase a call takes part, before the store hears of it."""
        session = barrier._session
        begin = session.begin

        def logged(name: str, step: int | None = None, *of: Any, **more: Any) -> Phase:
            # A turn that is owed is nobody's call.
            owed = [(name, step) for name, step, _ in session._owed[:1]]
            call = None if (name, step) in owed and not of else _current.get()
            phase = begin(name, step, *of, **more)
            if call is not None:
                self._calls[phase] = call
                self._takes_part(phase)
            return phase

        session.begin = logged  # type: ignore[method-assign]

    def _watch_moves(self) -> None:
        """As `_watch_turns`, for what was tried before all had joined, and now counts."""
        renumber = Turns.renumber

        def logged(turns: Turns, phase: Phase, connection: Any) -> None:
            renumber(turns, phase, connection)
            if phase in self._calls:
                self._takes_part(phase)

        Turns.renumber = logged  # type: ignore[method-assign,assignment]

    def _takes_part(self, phase: Phase) -> None:
        call = self._calls[phase]
        self.say(
            "forgo" if call.breaks_only else "enter",
            call=call.number,
            generation=phase.membership.state.number,
            # What is tried too early is numbered apart.
            sequence=-1 - phase.sequence if phase.early else phase.sequence,
        )

    def _forgo(self, call: Call) -> None:
        """It took a turn in which the store never heard of it: who had left was known before."""
        for phase in [phase for phase, whose in self._calls.items() if whose is call]:
            if not (phase.entered or phase.decided):
                call.breaks_only = True
                self._takes_part(phase)
            if phase.early and phase.giving_up:
                # Its break goes on, and may yet move to where it counts.
                call.breaks_only = True
            else:
                del self._calls[phase]

    # -- crossing ----------------------------------------------------------------------

    async def _cross_on(self, name: str) -> None:
        while True:
            await anyio.sleep(self._pause())
            step = self._steps.next(name, skips=self._random.random() < SKIPPED)
            await self._cross(self.barrier, name, step, self._deadline())

    def _pause(self) -> float:
        return self._random.uniform(0.0, 0.05 if self._random.random() < 0.98 else 1.0)

    def _deadline(self) -> float | None:
        at_random = self._random.random()
        if at_random < 0.05:
            return None
        return self._random.uniform(0.01, 0.2) if at_random < 0.08 else self._random.uniform(1, 5)

    async def _cross(
        self, barrier: AnyBarrier, name: str, step: int | None, within: float | None
    ) -> None:
        do, index, *_ = name.split()
        fails = name in self._failing
        self._failing.discard(name)
        if do == "execute":

            async def execute(call: Call) -> BarrierResult:
                return await barrier.execute_barrier(name, step=step, timeout_secs=within)

            await self._call(do, name, within, execute, step)
        elif do == "phase":

            async def body(call: Call) -> None:
                async with barrier.phase(name, step=step, timeout_secs=within):
                    if fails:
                        call.breaks_only = True
                        self.say("fail", call=call.number)
                        raise Planned("the body failed")

            await self._call(do, name, within, body, step)
        else:
            leader = int(index) % self.size

            async def commit(call: Call) -> bytes:
                async def publish(payloads: Mapping[int, bytes]) -> bytes:
                    self.say("publishing", call=call.number)
                    assert sorted(payloads) == list(range(self.size))
                    await anyio.sleep(self._random.choice((0.0, 0.0, 0.01, 0.3)))
                    if fails:
                        self.say("fail", call=call.number)
                        raise Planned("publish failed")
                    return b"%d" % call.number

                return await barrier.commit(
                    publish,
                    payload=b"%d" % self.rank,
                    name=name,
                    step=step,
                    timeout_secs=within,
                    leader=leader,
                )

            await self._call(do, name, within, commit, step)

    async def _call(
        self,
        do: str,
        name: str,
        within: float | None,
        make: Callable[[Call], Any],
        step: int | None = None,
    ) -> bool:
        """Make one call and log it; whether it went well."""
        with anyio.CancelScope() as scope:
            call = Call(next(self._numbers), do, name, step, scope, breaks_only=do == "abort")
            if do not in ("close", "connect"):
                self._open[call.number] = call
            _current.set(call)
            facts: dict[str, Any]
            self.say("call", call=call.number, do=do, name=name, step=step, within=within)
            if self._leaving and call.number in self._open:
                # Its task was about to begin it when it was cancelled.
                self.say("cancel", call=call.number)
            try:
                value = await make(call)
            except BarrierError as exc:
                facts = _facts(exc)
                if "passed" in facts:
                    self._steps.passed(name, facts["passed"])
                self._refused = self._refused or facts["outcome"] == "refused"
                self.say("exit", call=call.number, in_doubt=exc.in_doubt, **facts)
                return False
            except Planned:
                self.say("exit", call=call.number, in_doubt=False, outcome="failed")
                return False
            except anyio.get_cancelled_exc_class():
                self.say("exit", call=call.number, in_doubt=False, outcome="cancelled")
                raise
            except Exception as exc:
                where = "".join(traceback.format_exception(exc))
                self.say("exit", call=call.number, in_doubt=False, outcome="foreign", detail=where)
                return False
            finally:
                self._open.pop(call.number, None)
                _current.set(None)
                self._forgo(call)
            facts = {"outcome": "done"}
            if do == "execute":
                facts = {"outcome": "released"}
                if value.last_rank is not None:
                    facts["detail"] = f"released, last rank {value.last_rank}"
            elif do == "phase":
                facts = {"outcome": "released"}
            elif do == "commit":
                facts = {"outcome": "released", "detail": f"released, {value!r}"}
            self.say("exit", call=call.number, in_doubt=False, **facts)
            return True
        return False


def _facts(exc: BarrierError) -> dict[str, Any]:
    if isinstance(exc, BarrierTimeoutError):
        return {
            "outcome": "broken",
            "detail": f"timed out after {exc.timeout_secs:g} s without {exc.missing_ranks}",
            "timeout_secs": exc.timeout_secs,
        }
    if isinstance(exc, BrokenBarrierError):
        found = _PASSED.search(exc.reason)
        return {
            "outcome": "broken",
            "detail": f"broken by {exc.rank}: {exc.reason}",
            "blamed": exc.rank,
            **({} if found is None else {"passed": int(found[1])}),
        }
    if isinstance(exc, BarrierConnectionError | BarrierClosedError):
        kind = "closed" if isinstance(exc, BarrierClosedError) else "lost"
        return {"outcome": kind, "error": str(exc)}
    return {"outcome": "refused", "error": str(exc)}


async def main(options: dict[str, Any]) -> None:
    """What a process of the forge does: host the store of all others, or be a rank."""
    faulthandler.register(signal.SIGUSR1)
    await (serve() if options["serves"] else SoakRank(options).run())
