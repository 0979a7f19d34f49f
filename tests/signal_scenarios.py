"""Programs of ranks with a `StepSignal`: the library's own agreement, on a modelled store.

The thread that listens is a task here, beside the one that trains. `test_step_signal` tests `gate`,
where both meet without a store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
from explorer import View
from replayed import Cancelled, CancelScope, Event, Host, Job, Spec, get_cancelled_exc_class
from scenarios import INIT_SECS, Scenario, Source, modelled_world

from async_barriers import BarrierClosedError, BarrierError, StepSignal, step_signal
from async_barriers._client import lifetime
from async_barriers._client.barrier import CrossingBarrier
from async_barriers._signal import agreeing
from async_barriers._signal.gate import _LAST, _NEXT, Gate, Round
from async_barriers._store.future import Future
from async_barriers._store.worker import Promise

LISTENS = "listens"


class Barrier(CrossingBarrier):
    """A barrier whose companion is at the same store."""

    def __init__(self, host: Host, world_size: int) -> None:
        source: Any = Source(host)
        super().__init__(source, host.rank, world_size, "p", INIT_SECS, 60.0, None, None)
        self._host = host

    def beside(self, what: str) -> CrossingBarrier:
        beside = self._host.barrier = Barrier(self._host, self._session.world_size)
        return beside


class Portal:
    """A portal whose thread is a task."""

    def __init__(self, name: object, last: Callable[[], Any]) -> None:
        self.ended: Promise[None] = Promise()
        self._last = last
        self._host = Host.running
        self._scope = CancelScope()
        self._serving = Serving()
        self._serve: Callable[[], Any] | None = None
        self._host.portal = self

    def start(self, function: Callable[[], Any]) -> Serving:
        self._serve = function
        if LISTENS not in self._host._tasks:
            self._host._start(next(job for job in self._host.spec.jobs if job.name == LISTENS))
        return self._serving

    def retire(self) -> None:
        if self._serve is not None and not self._host.ended and "leaves" not in self._host._tasks:
            self._host._start(Job("leaves", self._leave))

    async def run(self) -> None:
        assert self._serve is not None
        with self._scope:
            await self._serve()
        self._serving.end()

    async def _leave(self, host: Host) -> None:
        await self._last()
        self._scope.cancel()
        self.ended.settle()
        host.note("left", "all", host.rank)


class Serving:
    """Whether its thread has ended."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[Any], object]] = []

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        self._callbacks.append(callback)

    def end(self) -> None:
        for callback in self._callbacks:
            callback(self)

    def cancelled(self) -> bool:
        return True


class ObservedGate(Gate):
    """Wakes a task that has nothing more to do until the gate is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self._told: Future[None] = Future()

    def stop(self, stopping: Round) -> None:
        super().stop(stopping)
        self._told.resolve(None)

    def stopped(self) -> Future[None]:
        self._told = Future()
        if isinstance(self._cell.get(_NEXT), Round):
            self._told.resolve(None)
        return self._told

    @property
    def last(self) -> int:
        """The step that passed last."""
        passed: int = self._cell[_LAST]
        return passed


@contextlib.contextmanager
def modelled_signals(gate: type[ObservedGate]) -> Iterator[None]:
    anyio = SimpleNamespace(
        CancelScope=CancelScope, get_cancelled_exc_class=get_cancelled_exc_class
    )
    with modelled_world(), pytest.MonkeyPatch.context() as patch:
        for module in (agreeing, lifetime, step_signal):
            patch.setattr(module, "loop_here", lambda before: Host.running.loop)
        patch.setattr(agreeing, "anyio", anyio)
        patch.setattr(agreeing, "Portal", Portal)
        patch.setattr(agreeing, "Gate", gate)
        yield


class SignalScenario(Scenario):
    """Ranks train, some send, and all have to learn one step.

    The result of a rank's n-th agreement is noted with n. Each reason is sent once.

    :ivar restarts: a rank comes back, so that one rank's n-th agreement may not be another's n-th
    """

    restarts = False
    gate = ObservedGate

    def world(self) -> AbstractContextManager[None]:
        return modelled_signals(self.gate)

    def signal(self, host: Host) -> StepSignal:
        """The signal of a process."""
        if host.signal is None:
            host.signal = StepSignal(Barrier(host, self.world_size))
        found: StepSignal = host.signal
        return found

    async def connect(self, host: Host) -> None:
        self.signal(host)._begin(0)
        await self.barrier(host).connect()

    def rank(self, name: str, *jobs: Job, passes: int = 0, **options: Any) -> None:
        """:param passes: how often its thread may wait out a deadline"""

        async def listens(host: Host) -> None:
            signal = self.signal(host)
            if not signal._agent.started:
                signal._begin(0)
            await host.portal.run()

        super().rank(name, *jobs, Job(LISTENS, listens, passes=passes, patient=True), **options)

    def trains(
        self,
        ahead: int = 2,
        times: int = 1,
        away: bool = False,
        again: bool = False,
        **options: Any,
    ) -> Job:
        """Call `reached` with rising steps until so many agreements have ended.

        :param ahead: how many steps it may pass before it hears of each agreement
        :param away: it then never calls again, as if a collective blocked it
        :param again: it sends once more after each step that is reached
        """

        async def run(host: Host) -> None:
            signal = self.signal(host)
            gate = signal._agent.gate
            assert isinstance(gate, ObservedGate)
            step, left, seen = 0, ahead, 0
            while seen < times:
                try:
                    if left:
                        left -= 1
                        await host.pause("trains")
                    elif away:
                        return
                    else:
                        await gate.stopped()
                    reached = await signal.reached(step)
                except Cancelled:
                    # The step has not passed.
                    continue
                except BarrierError as exc:
                    host.note("told", seen, type(exc).__name__, str(exc))
                    seen += 1
                    if isinstance(exc, BarrierClosedError):
                        return
                    continue
                if not reached:
                    host.note("passed", seen, step)
                else:
                    host.note("reached", seen, signal.step, signal.rank, signal.reason)
                    assert signal.step == step
                    seen, left = seen + 1, ahead
                    if again and seen < times:
                        self.send(host, seen)
                step += 1

        return Job("trains", run, at_once=True, **options)

    def sends(self) -> Job:
        async def run(host: Host) -> None:
            self.send(host, 0)

        return Job("sends", run)

    def send(self, host: Host, number: int) -> None:
        reason = f"{host.name} {number}"
        host.note("sent", host.rank, reason)
        self.signal(host).send(reason)

    def dies(self, name: str) -> None:
        """Let this process die at any time."""
        self.specs.append(Spec(f"{name} is dead", int(name), (), replaces=name))

    def closes(self, later: int = 0, **options: Any) -> Job:
        async def run(host: Host) -> None:
            for _ in range(later):
                await host.pause("stays")
            await self.signal(host)._barrier.aclose()

        return Job("closes", run, **options)

    # -- laws ------------------------------------------------------------------------------

    def noted(self, view: View, spec: Spec, note: Event) -> None:
        kind, *args = note
        if kind == "reached":
            self._reached(view, spec, *args)
        elif kind == "told" and not self.restarts and args[1] != "BarrierClosedError":
            for other, *found in _all(view, "reached"):
                assert found[0] != args[0], (
                    f"{other} reached {found}, but {spec.name} was told {args}"
                )
        elif kind == "passed" and not self.restarts:
            for other, number, step, *_ in _all(view, "reached"):
                assert number < args[0] or args[1] < step, (
                    f"{spec.name} passes {args[1]}; {other} reached {step}"
                )
        super().noted(view, spec, note)

    def _reached(
        self, view: View, spec: Spec, number: int, step: int, rank: int, reason: str
    ) -> None:
        assert (rank, reason) in [sent[1:] for sent in _all(view, "sent")], f"nobody sent {reason}"
        for other, *found in _all(view, "reached"):
            same = (found[0] == number and not self.restarts) or found[3] == reason
            assert not same or found[1:] == [step, rank, reason], (
                f"{spec.name} reached {step} for {reason!r}, but {other} {found}"
            )
        if not self.restarts:
            for other, passed_in, passed in _all(view, "passed"):
                assert passed_in > number or passed < step, (
                    f"{spec.name} reached {step}, but {other} had passed {passed}"
                )
            for other, told_in, error, said in _all(view, "told"):
                assert told_in != number or error == "BarrierClosedError", (
                    f"{spec.name} reached {step}, but {other} was told {said}"
                )

    def waiting(self, view: View) -> list[tuple[str, str]]:
        """The tasks that wait, without those that listen: they may do so for ever."""
        return [(name, task) for name, task in super().waiting(view) if task != LISTENS]

    def left_behind(self, view: View) -> list[str]:
        """A dead rank departs from no phase; its next life would end the generation."""
        return [] if "dead" in view.lives else super().left_behind(view)


def _all(view: View, kind: str) -> list[tuple[Any, ...]]:
    return [
        (spec.name, *note[1:])
        for spec, node in zip(view.specs, view.nodes, strict=True)
        for note in node.notes
        if note[0] == kind
    ]
