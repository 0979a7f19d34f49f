"""A thread that listens for a signal and agrees on its step, without the rank's other threads.

It has an event loop and a barrier of its own, at the same store. One register names the generation
and the number of the agreement in it. A rank that writes it rings the bells of all. The agreement
itself is an `all_gather` of that number.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

import anyio

from .._client.barrier import CrossingBarrier
from .._errors import (
    BarrierClosedError,
    BarrierConnectionError,
    BarrierError,
    BrokenBarrierError,
    describe,
    of_another_process,
    told_by,
)
from .._portal import Portal
from .._protocol.keys import check_name
from .._protocol.membership import Closed
from .._protocol.signal import Sent
from .._store.event_loop import Loop, Waiter
from .._store.loops import loop_here
from .._store.worker import Promise
from .announcing import Register
from .gate import Agreement, Gate, Round

_RETRY_SECS = 1.0
# How long a sender may take before the agreement without a cut of its timeout: the rest of the
# second that an await may take longer.
_SPARE_SECS = 0.2

logger = logging.getLogger(__name__)


class Agent:
    """One rank's part in the agreements of one signal; begins with `start`.

    :ivar closed: no step passes any more
    """

    def __init__(self, beside: CrossingBarrier, name: str) -> None:
        check_name(beside._keys, name)
        self._barrier = beside.beside(f"signal {name}")
        check_name(self._barrier._keys, name)
        self._beside = beside._session
        self.gate = Gate()
        self.closed = False
        self._name = name
        self._about = f"signal {name!r} of {describe(beside.prefix)}"
        self._register = Register(self._barrier, name, self._about)
        self._pid = os.getpid()
        _agents.add(self)
        self._portal = Portal(lambda: self._about, self._leave)
        self._serving: Future[None] | None = None
        # The signal that was sent, and how many rounds this rank's caller had seen end by then.
        self._sent: deque[tuple[int, str]] = deque()
        self._taken = 0
        self._reason = "it closed its barrier"
        # Only the thread changes these.
        self._loop: Loop | None = None
        self._waiter: Waiter
        self._round: Round | None = None
        self._rounds = 0
        self._connecting: anyio.CancelScope | None = None

    # -- in any thread -------------------------------------------------------------------

    @property
    def started(self) -> bool:
        return self._serving is not None

    @property
    def ended(self) -> Promise[None] | None:
        """Settled when its thread is gone; None if there was none."""
        return self._portal.ended if self.started else None

    def start(self) -> None:
        """Begin to listen, unless that was done; returns at once."""
        if self._serving is None:
            self._serving = self._portal.start(self._serve)
            self._serving.add_done_callback(self._has_ended)

    def send(self, reason: str) -> None:
        """As `StepSignal.send`: nothing here takes a lock."""
        if os.getpid() != self._pid:
            raise of_another_process(self._about, self._pid)
        self._sent.append((self._taken, reason))
        loop = self._loop
        if loop is not None:
            loop.post(self._hear)

    def take(self, taken: Round) -> None:
        """In the caller's thread: note that it has seen a round end; the next one may come."""
        self.gate.go_on(taken)
        self._taken += 1

    def retire(self, reason: str | None = None) -> None:
        """End, without waiting for it; calls that wait here get `BarrierClosedError`."""
        if os.getpid() != self._pid:
            return
        self._reason = reason or self._reason
        self.closed = True
        self._portal.retire()
        self._end(BarrierClosedError(self._about))

    def peer_left(self, closed: Closed) -> None:
        """A rank has left the barrier: it will not come, also if it never had this signal."""
        loop = self._loop
        if loop is not None:
            loop.post(partial(self._barrier._session.break_for_leaver, closed))

    def forsake(self) -> None:
        """In a forked child: its thread is the parent's, and every call says so."""
        self._end(of_another_process(self._about, self._pid))

    def _has_ended(self, serving: Future[None]) -> None:
        """No call may wait for a thread that is gone."""
        if self.closed or serving.cancelled():
            self._end(BarrierClosedError(self._about))
        elif (exc := serving.exception()) is not None:
            self._end(
                exc
                if isinstance(exc, BarrierError)
                else BarrierError(f"{self._about}: {told_by(exc)}")
            )

    def _end(self, error: BarrierError) -> None:
        """Let no step pass any more."""
        last = Round(final=True)
        last.settle(error=error)
        self.gate.stop(last)
        stopped = self._round
        if stopped is not None and not stopped.agreed.done():
            stopped.final = True
            stopped.settle(error=error)

    # -- in the thread -------------------------------------------------------------------

    async def _leave(self) -> None:
        await self._barrier._leave(self._reason)

    async def _serve(self) -> None:
        loop = loop_here(None)
        self._waiter = loop.waiter()
        self._loop = loop
        self._barrier._session.on_look = self._waiter.wake
        while not self.closed:
            pause = 0.0
            while self._sent:
                taken, reason = self._sent.popleft()
                # A signal sent before the latest round ended here was a part of that round.
                if taken >= self._rounds:
                    await self._agree(loop, reason)
            try:
                pause = await self._look(loop)
            except BarrierConnectionError as exc:
                # Its host may come, or come back. A sender learns of it.
                logger.debug("%s cannot listen: %s", self._about, exc)
                pause = _RETRY_SECS
            except BarrierError as exc:
                # Refused, most likely.
                pause = _RETRY_SECS
                if self._taken >= self._rounds:
                    self._fail(exc)
            if not self._sent:
                await self._waiter.wait(loop.now() + pause)

    def _hear(self) -> None:
        """Send this rank's signal, also if the store was not reached yet."""
        self._waiter.wake()
        if self._connecting is not None:
            self._connecting.cancel()

    async def _look(self, loop: Loop) -> float:
        """See whether a rank has sent; return for how long there is nothing to do."""
        before = self._register.turn
        left: BrokenBarrierError | None = None
        try:
            with anyio.CancelScope() as self._connecting:
                if not self._sent:
                    await self._register.join()
        except BrokenBarrierError as exc:
            left = exc
        finally:
            self._connecting = None
        if self._sent:
            return 0.0
        said = await self._register.read(loop)
        if said is None:
            return math.inf
        if said.of(self._register.turn):
            await self._agree(loop, said)
            return 0.0
        if before != self._register.turn and said.of(before):
            # It was sent, and that generation ended before this rank learned of it.
            self._fail(self._register.over(before[1]))
        return _RETRY_SECS if left is not None and not self._barrier._session.turns else math.inf

    async def _agree(self, loop: Loop, said: Sent | str) -> None:
        """Stop this rank's steps, and agree with the others on the first one that none has passed.

        :param said: the reason, if this rank sends
        """
        stopped = self._round = Round()
        # This rank knows of the signal; it tells the others the last step that passed before.
        self.gate.stop(stopped)
        began, timeout_secs = loop.now(), self._barrier._timeout_secs
        turn = self._register.turn
        try:
            if isinstance(said, str):
                deadline = math.inf if timeout_secs is None else began + timeout_secs
                try:
                    await self._register.join(timeout_secs)
                except BrokenBarrierError:
                    # A rank has left and is not back: all others learn it as they look around.
                    if self._register.is_of(turn):
                        with suppress(BarrierError):
                            await self._publish(loop, said, deadline)
                    raise
                turn = self._register.turn
                said = await self._publish(loop, said, deadline)
                if timeout_secs is not None and loop.now() - began > _SPARE_SECS:
                    timeout_secs = max(0.0, deadline - loop.now())
            if not self._register.stands_at(turn):
                raise self._register.over(turn[1])
            left = self._beside.closed_by
            if left is not None and self._beside.turns is not None:
                # Posted, so that the others learn it with the phase that begins now.
                self.peer_left(left)
            passed = await self._barrier.all_gather(
                b"%d" % stopped.passed, name=self._name, step=turn[1], timeout_secs=timeout_secs
            )
            step = max(map(int, passed)) + 1
            self._end_round(turn)
            stopped.settle(Agreement(step, said.rank, said.reason))
        except BarrierError as exc:
            self._end_round(turn)
            stopped.settle(error=exc)
        except BaseException:
            stopped.final = True
            stopped.settle(error=BarrierClosedError(self._about))
            raise

    async def _publish(self, loop: Loop, reason: str, deadline: float) -> Sent:
        return await self._register.write(loop, reason, deadline, self._waiter, lambda: self.closed)

    def _end_round(self, turn: tuple[str, int]) -> None:
        # Before a waiting call goes on, and sends again.
        self._rounds += 1
        if self._register.turn == turn:
            self._register.turn = (turn[0], turn[1] + 1)

    def _fail(self, exc: BarrierError) -> None:
        """Have the caller's next step raise it."""
        stopped = self._round = Round()
        self.gate.stop(stopped)
        self._rounds += 1
        stopped.settle(error=exc)


_agents: weakref.WeakSet[Agent] = weakref.WeakSet()


def _in_child() -> None:
    for agent in list(_agents):
        agent.forsake()


os.register_at_fork(after_in_child=_in_child)
