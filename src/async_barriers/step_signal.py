"""StepSignal: one rank sends it, and all ranks act at one step."""

from __future__ import annotations

import copy
import math
import weakref

from ._barrier import Barrier
from ._checks import MAX_STEP, check_step
from ._client.barrier import CrossingBarrier
from ._errors import BarrierError
from ._signal.agreeing import Agent
from ._signal.gate import Round
from ._store.loops import loop_here
from ._store.waiting import told

__all__ = ["BlockingStepSignal", "StepSignal"]


class _Signal:
    """The common part of both kinds: all but how they wait."""

    step: int | None
    rank: int | None
    reason: str | None

    def __init__(self, barrier: Barrier, name: str = "stop") -> None:
        while (watched := getattr(barrier, "_watches", None)) is not None:
            barrier = watched  # A recorder's has all of the barrier that it watches.
        if not isinstance(barrier, CrossingBarrier):
            raise TypeError(
                "barrier must be a StoreBarrier or a TCPStoreBarrier, since ranks agree over "
                f"their store; not {barrier!r}"
            )
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, not {name!r}")
        companions = barrier._companions
        before = companions.get(name)
        if isinstance(before, Agent) and not before.closed:
            raise ValueError(f"{barrier!r} has a signal {name!r} already; use that, or close it")
        self.step = self.rank = self.reason = None
        self.name = name
        # The signal keeps its barrier alive, so that a program may hold the signal alone.
        self._barrier = barrier
        self._agent = companions[name] = Agent(barrier, name)
        self._pass = self._agent.gate.stops
        # Until it listens, no step is as high.
        self._last: float = math.inf
        weakref.finalize(self, self._agent.retire).atexit = False
        if barrier._closed:
            self._agent.retire()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} of {self._barrier!r}>"

    def send(self, reason: str = "") -> None:
        """Have all ranks act, at a step that none of them has passed.

        Returns at once, from any thread and also from a signal handler: it takes no lock and does
        no I/O of its own. A signal that is sent before this rank has called `reached` for the first
        time is told to the others then. After the barrier is closed it does nothing. Several ranks
        may send, or one may send several times, before the step is reached. That makes one
        agreement, and all ranks are told the first rank that the store heard of.

        :param reason: in words, for `reason` on all ranks; up to 600 characters are told
        :raises TypeError: ``reason`` is not a string
        :raises BarrierError: this process was forked from the one that the signal belongs to
        """
        if not isinstance(reason, str):
            raise TypeError(f"reason must be a string, not {reason!r}")
        self._agent.send(reason)

    def _begin(self, step: int) -> None:
        """Refuse all but a higher step; begin to listen with the first one."""
        if step is None or check_step(step) is None:
            raise TypeError("step must be an integer, not None")
        if not self._agent.started:
            if not self._agent.closed:
                self._agent.start()
            self._last = -1
        if step <= self._last:
            raise ValueError(f"step is {step}, after {int(self._last)}; steps must rise")

    def _answer(self, stopped: Round, step: int) -> bool:
        """Whether ``step`` is the agreed one, if that is known."""
        try:
            agreed = stopped.agreed.result()
        except BarrierError as exc:
            if stopped.final:
                # A new error for each caller, so that its traceback does not grow.
                raise copy.copy(exc) from None
            self._agent.take(stopped)
            raise
        self.step, self.rank, self.reason = agreed
        reached = step >= agreed.step
        if reached:
            self.step = step
            self._agent.take(stopped)
        self._last = step
        return reached


class StepSignal(_Signal):
    """Has all ranks act at one step, once one of them says so; usually to save and stop. ::

        stop = StepSignal(barrier)
        signal.signal(signal.SIGTERM, lambda *_: stop.send("SIGTERM"))
        for step in range(first, last):
            if await stop.reached(step):
                save_and_exit()  # on all ranks
            train(step)

    Every rank calls `reached` with the same rising numbers. The first call starts a thread of the
    library's that connects to the barrier's store (two connections on a TCPStore, as one more
    barrier would) and listens. The thread does not need this rank's main thread or event loop,
    which may both be blocked in a collective. It ends when the barrier is closed.

    :param barrier: a `StoreBarrier` or `TCPStoreBarrier`; its timeout is that of the agreement
    :param name: signals of different names are independent; a barrier has one of each
    :ivar step: the agreed step, from the first `reached` that knows it; None before. If the ranks'
        steps leave out numbers, it is the first one from the agreed step on that they call with
    :ivar rank: the rank that sent it
    :ivar reason: why
    :raises TypeError: ``barrier`` has no store, or ``name`` is not a string
    :raises ValueError: ``barrier`` has a signal of this name, or it is too long
    """

    async def reached(self, step: int) -> bool:
        """Whether this is the step at which all ranks act: True on each of them, once.

        Until a rank sends, it is False at once and sends nothing to the store. When this rank
        learns of the signal, the call waits until all ranks have agreed. It waits as a phase does,
        with the barrier's ``timeout_secs`` and reports. After it was True, you may send the signal
        again.

        :param step: 0 or more, and higher than that of the last call that returned
        :raises BarrierTimeoutError: ranks did not take part in the agreement (it names them): they
            have not called `reached` yet, or their process hangs
        :raises BrokenBarrierError: a rank left, or was started again, before all had agreed
        :raises BarrierConnectionError: the signal was sent, and the store was lost, or not reached
            within ``timeout_secs``
        :raises BarrierClosedError: the barrier is closed, or was closed while this call waited
        :raises TypeError, ValueError: ``step`` is no step, or not higher

        All ranks get such an error, each once, and may then send the signal again. If a rank loses
        the store in that instant, the others may have agreed.

        **Cancellation:** ends the waiting, not the agreement. Unlike a phase, it breaks nothing for
        the peers: this rank still takes part, in its thread. The step has not been passed. Call
        again with the same step.
        """
        if step.__class__ is not int or not self._last < step <= MAX_STEP:
            self._begin(step)
        stopped = self._pass(step)
        if stopped is None:
            self._last = step
            return False
        await told(loop_here(None), stopped.agreed)
        return self._answer(stopped, step)


class BlockingStepSignal(_Signal):
    """`StepSignal` for code that cannot await; see `BlockingBarrier.step_signal`."""

    def reached(self, step: int) -> bool:
        """As `StepSignal.reached`, but blocks this thread where that one waits.

        Raises what `StepSignal.reached` raises.

        **Interruption**, as by Ctrl-C: as the cancellation of `StepSignal.reached`.
        """
        if step.__class__ is not int or not self._last < step <= MAX_STEP:
            self._begin(step)
        stopped = self._pass(step)
        if stopped is None:
            self._last = step
            return False
        stopped.agreed.wait(None)
        return self._answer(stopped, step)
