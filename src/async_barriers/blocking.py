"""BlockingBarrier: any barrier, for code that cannot await."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from ._barrier import Barrier, Publish
from ._checks import (
    CONFIGURED,
    Timeout,
    check_call_timeout,
    check_publish,
    check_step,
    check_timeout,
    given,
)
from ._config import BarrierConfig, built
from ._errors import BarrierError
from ._guards import Guards
from ._portal import Portal
from ._reasons import reason_of
from ._values import BarrierResult, BarrierStatistics, CommitRecord
from .step_signal import BlockingStepSignal

__all__ = ["BlockingBarrier"]

P = ParamSpec("P")
T = TypeVar("T")

# Modules that define barriers which this class stands in for; none is imported here.
_ABSTRACT_BARRIERS = (
    "torch.distributed.checkpoint._experimental.barriers",
    "torch_checkpointing.barriers",
)


class BlockingBarrier:
    """A barrier that runs on its own event loop, in its own thread.

    torch's checkpoint code accepts it as its ``Barrier``: the ``CheckpointWriter`` of
    ``torch.distributed.checkpoint._experimental`` and that of the package ``torch_checkpointing``,
    which cross the name ``""``.

    You may use it from any thread, and from several at once. A KeyboardInterrupt, or another
    exception that a signal handler raises in the waiting thread, cancels the call. This breaks the
    phase for the peers, and the exception is raised within 1 s. Do not call it on a thread that
    runs an event loop: it would block that loop.

    It belongs to the process that built it. In a forked process, `close` does nothing, and calls
    that need the store raise an error that says so. It can be pickled if it was built from a
    configuration; the copy is built from that, in a checkpoint subprocess for example. A rank
    belongs to one process: while one that is connected lives, the other is refused. The thread and
    the connections start with the first call. They never keep the interpreter from exiting.

    When it leaves (`close`, the end of a ``with`` block, the end of the interpreter), the peers
    learn it in the phases that they wait in and in those that they enter later.

    Each call raises what `Barrier`'s call of that name raises. In all calls ``name`` and ``step``
    are as in `Barrier.execute_barrier`. ``timeout_secs`` is the deadline in seconds from now (0 for
    what is decided now), and ``stalled_after_secs`` how many seconds a missing rank may show no
    progress; None for the configured value. (For no deadline, configure ``timeout_secs=None``.)

    :param config_or_barrier: which barrier to build: a `BarrierConfig`, or torch's class of that
        name; or a barrier, which then belongs to this object and is closed with it
    :raises TypeError, ValueError: it is neither, or is a configuration of no barrier; or as
        `create_barrier_from_config`
    """

    def __init__(self, config_or_barrier: BarrierConfig | Barrier) -> None:
        self._config: BarrierConfig | None = None
        if isinstance(config_or_barrier, Barrier):
            self._barrier = config_or_barrier
        else:
            self._config, self._barrier = built(config_or_barrier)
        barrier = self._barrier
        self._portal = Portal(lambda: f"this BlockingBarrier of {barrier!r}", barrier.aclose)
        self._guards = Guards()
        # A barrier that is dropped unclosed must not leave its thread behind.
        weakref.finalize(self, self._portal.retire).atexit = False
        for module in _ABSTRACT_BARRIERS:
            if (abstract := getattr(sys.modules.get(module), "Barrier", None)) is not None:
                abstract.register(BlockingBarrier)

    def __repr__(self) -> str:
        return f"<BlockingBarrier of {self._barrier!r}>"

    @property
    def barrier(self) -> Barrier:
        """The barrier inside, for coroutines that you give to `start`."""
        return self._barrier

    def connect(self) -> None:
        """Reach the store, but not the peers. Without this call the first crossing connects.

        A writer that connects when it is built can tell its peers if its first write fails.
        """
        self._portal.call(self._barrier.connect)

    def execute_barrier(
        self,
        timeout_secs: float | None = None,
        *,
        name: str = "",
        step: int | None = None,
        stalled_after_secs: float | None = None,
    ) -> BarrierResult:
        """Enter the next phase of ``name`` and block until every rank has entered.

        **Interruption**, as by Ctrl-C: breaks the phase for all ranks, unless it was decided
        before, and is raised within 1 s. The turn is used up: the next call enters the next phase.
        """
        call = functools.partial(self._barrier.execute_barrier, name)
        return self._cross(call, name, step, timeout_secs, stalled_after_secs)

    def commit(
        self,
        publish: Publish,
        *,
        payload: bytes = b"",
        name: str = "",
        step: int | None = None,
        timeout_secs: float | None = None,
        stalled_after_secs: float | None = None,
        leader: int = 0,
    ) -> bytes:
        """Publish a checkpoint once every rank has finished its part; see `Barrier.commit`.

        :param publish: a plain function, which runs in a thread of the library's, or a coroutine
            function, which runs on the barrier's own event loop

        **Interruption:** as the cancellation of `Barrier.commit`.
        """
        check_publish(publish)
        call = functools.partial(
            self._barrier.commit, publish, payload=payload, name=name, leader=leader
        )
        return self._cross(call, name, step, timeout_secs, stalled_after_secs)

    def all_gather(
        self,
        payload: bytes,
        *,
        name: str = "",
        step: int | None = None,
        timeout_secs: float | None = None,
        stalled_after_secs: float | None = None,
    ) -> tuple[bytes, ...]:
        """Enter with a payload, and get those of all ranks; see `Barrier.all_gather`.

        **Interruption:** as `execute_barrier`.
        """
        call = functools.partial(self._barrier.all_gather, payload, name=name)
        return self._cross(call, name, step, timeout_secs, stalled_after_secs)

    def abort(self, reason: str, name: str = "", *, step: int | None = None) -> bool:
        """Break this rank's current phase of ``name``, or else its next one without entering.

        Peers get `BrokenBarrierError` with this rank and ``reason``.

        :return: True if this call broke it; False if it was decided before

        **Interruption:** the break goes on, and reaches the peers if the store can be reached.
        """
        self._guards.take_turn(name, step)
        options = given(check_step(step))
        return self._portal.call(functools.partial(self._barrier.abort, reason, name, **options))

    def report(self, doing: str) -> None:
        """Say what this rank is doing; returns at once. See `Barrier.report`."""
        self._barrier.report(doing)

    def outcome(self, name: str, sequence: int) -> CommitRecord | None:
        """The record of a commit that ended in doubt; see `Barrier.outcome`.

        **Interruption:** as the cancellation of `Barrier.outcome`.
        """
        return self._portal.call(functools.partial(self._barrier.outcome, name, sequence))

    def statistics(self) -> BarrierStatistics:
        """How this rank's phases ended so far; returns at once. See `Barrier.statistics`."""
        return self._barrier.statistics()

    def step_signal(self, name: str = "stop") -> BlockingStepSignal:
        """A `StepSignal` of this barrier, whose `reached` blocks. It ends with this barrier.

        Raises what `StepSignal` raises.
        """
        return BlockingStepSignal(self._barrier, name)

    def start(
        self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Begin a call on the barrier's own event loop, and return while it runs. ::

            saving = blocking.start(blocking.barrier.commit, publish, payload=manifest, step=step)
            ...  # train, and ask saving.done()
            saving.result()

        A Ctrl-C in ``result()`` leaves the call running. ``cancel()`` cancels it as a cancelled
        await would be. Closing this barrier breaks the phases that the call waits in, for all
        ranks, and the call ends in `BarrierClosedError`.

        :param call: a method of `barrier`, or any coroutine function. It runs on the event loop,
            which it must not block. In there, await `barrier` instead of calling this object.
        :return: a future that raises what the call raises
        :raises BarrierClosedError: this barrier is closed
        """
        if not callable(call):
            raise TypeError(f"call must be a coroutine function, not {type(call).__name__}")
        return self._portal.start(functools.partial(call, *args, **kwargs))

    @contextlib.contextmanager
    def guard(self, name: str = "", *, step: int | None = None) -> Iterator[None]:
        """Break the phase if the body raises before it crosses: for writers that cross in `write`.

        Without it, peers wait for a rank whose write failed until their deadlines, and count that
        rank's next write as the one that failed. ::

            with barrier.guard():
                # saves, then crosses the barrier
                writer.write(path, state_dict)

        The exception of the body goes on. If the body has crossed ``name`` (and ``step``, if given)
        on this thread, or tried to, or has aborted it, `guard` breaks nothing.
        """
        guarded = self._guards.add(name, check_step(step))
        try:
            yield
        except BaseException as exc:
            if not guarded.crossed:
                self._fail(exc, name, step)
            raise

    def close(self) -> None:
        """Tell the peers that this rank leaves, and end the connections and the thread.

        Phases that it waits in break for all. Idempotent; takes a few seconds at most. Calls that
        wait in other threads, or were started, raise `BarrierClosedError`, and so do later calls.

        **Interruption:** closing goes on without its caller.
        """
        self._portal.close()

    def __enter__(self) -> BlockingBarrier:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None or isinstance(exc, GeneratorExit):
            self.close()
        else:
            reason = f"it closed its barrier: {reason_of(exc)}"
            self._portal.close(functools.partial(self._barrier._leave, reason))

    def __reduce__(self) -> tuple[Any, ...]:
        if self._config is None:
            raise TypeError(
                "a BlockingBarrier that was given a barrier cannot be pickled; build it from a "
                "BarrierConfig"
            )
        return (BlockingBarrier, (self._config,))

    def _cross(
        self,
        call: Callable[..., Awaitable[T]],
        name: str,
        step: int | None,
        timeout_secs: float | None,
        stalled_after_secs: float | None,
    ) -> T:
        timeout: Timeout = CONFIGURED if timeout_secs is None else check_call_timeout(timeout_secs)
        stalled = check_timeout("stalled_after_secs", stalled_after_secs)
        options = given(check_step(step), CONFIGURED if stalled is None else stalled)
        self._guards.take_turn(name, step)
        call = functools.partial(call, **options, timeout_secs=timeout)
        return self._portal.call(call)

    def _fail(self, exc: BaseException, name: str, step: int | None) -> None:
        """Tell the peers that the work before the next crossing failed."""
        # The caller's own exception matters more.
        with contextlib.suppress(BarrierError):
            self._portal.call(functools.partial(self._barrier._fail, reason_of(exc), name, step))
