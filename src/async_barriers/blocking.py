"""BlockingBarrier: any barrier, for code that cannot await."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from ._barrier import CONFIGURED, Barrier, check_timeout, reason_of
from ._config import BarrierConfig, create_barrier_from_config
from ._crossing_barrier import CrossingBarrier
from ._errors import BarrierClosedError
from ._portal import Portal, PortalClosed
from ._values import BarrierResult

__all__ = ["BlockingBarrier"]

T = TypeVar("T")

# Where others define the barriers that they take. Known to them as one of theirs, without
# importing any of them here.
_ABSTRACT_BARRIERS = (
    "torch.distributed.checkpoint._experimental.barriers",
    "torch_checkpointing.barriers",
)


class BlockingBarrier:
    """A barrier on an event loop of its own, in a thread of its own.

    It is accepted wherever torch's checkpoint code takes its ``Barrier``: the ``CheckpointWriter``
    of ``torch.distributed.checkpoint._experimental`` and that of the package
    ``torch_checkpointing``. All crossings are of one name, ``""``.

    Usable from any thread, and from several at once: each call enters a phase of its own. A
    KeyboardInterrupt, or whatever else a signal handler raises in the waiting thread, cancels the
    call, which breaks the phase for the peers; it is raised within 1 s. A call must not be made
    on a thread that runs an event loop: that loop would stand still meanwhile.

    It can be pickled if it was built from a configuration, and is then built anew from it, in a
    checkpoint subprocess, say. One rank is one process's alone: once the copy connects, the
    original is of no more use. The thread and the connections start with the first call. They keep
    no interpreter from exiting, also if it was not closed.

    Leaving breaks the next phase for peers that would wait in it, if this barrier was connected:
    by `close`, at the end of a ``with`` block, or when the interpreter exits.

    :param config_or_barrier: which barrier to build: a `BarrierConfig`, or torch's class of that
        name; or a barrier, which is this one's from then on and is closed with it
    :raises TypeError, ValueError: it is neither, is a configuration of no barrier, or as
        `create_barrier_from_config`
    """

    def __init__(self, config_or_barrier: BarrierConfig | Barrier) -> None:
        self._config: BarrierConfig | None = None
        if isinstance(config_or_barrier, Barrier):
            self._barrier = config_or_barrier
        else:
            self._config = _copied(config_or_barrier)
            self._barrier = _built(self._config)
        self._portal = Portal(functools.partial(_part, self._barrier))
        self._here = threading.local()
        # One that is dropped unclosed must not leave its thread behind.
        weakref.finalize(self, self._portal.retire).atexit = False
        for module in _ABSTRACT_BARRIERS:
            if (abstract := getattr(sys.modules.get(module), "Barrier", None)) is not None:
                abstract.register(BlockingBarrier)

    def connect(self) -> None:
        """Reach the store, but not the peers; the first crossing does it otherwise.

        A writer that connects when it is built can tell its peers if its first write fails.

        :raises: as `Barrier.connect`
        """
        self._call(self._barrier.connect)

    def execute_barrier(self, timeout_secs: float | None = None) -> BarrierResult:
        """Enter the next phase and block until every rank has.

        :param timeout_secs: the deadline in seconds from now; None for the one configured. (For
            no deadline at all, configure ``timeout_secs=None``.)
        :raises: as `Barrier.execute_barrier`

        **Interruption**, as by Ctrl-C: breaks the phase for everyone, unless it was decided
        before, and is raised within 1 s. The turn is used up: the next call enters the next phase.
        """
        check_timeout("timeout_secs", timeout_secs)
        self._here.turns = self._turns_taken + 1
        timeout = CONFIGURED if timeout_secs is None else timeout_secs
        return self._call(functools.partial(self._barrier.execute_barrier, timeout_secs=timeout))

    def abort(self, reason: str) -> None:
        """Break this rank's current phase, or else its next one without entering.

        Peers get `BrokenBarrierError` with this rank and ``reason``.
        """
        self._here.turns = self._turns_taken + 1
        self._call(functools.partial(self._barrier.abort, reason))

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Break the phase if the body raises before it crosses: for writers that cross in `write`.

        Without it, peers wait for a rank whose write failed until their deadlines, and that rank's
        next write would be taken for the one that failed. ::

            with barrier.guard():
                writer.write(path, state_dict)  # saves, then calls barrier.execute_barrier()

        What the body raises goes on. If it has called `execute_barrier` or `abort` on this thread,
        there is nothing left to break.
        """
        turns = self._turns_taken
        try:
            yield
        except BaseException as exc:
            if self._turns_taken == turns:
                self._fail(exc)
            raise

    def close(self) -> None:
        """Break the phases that are awaited, and the next one, and let go of the thread.

        Idempotent, and bounded by a few seconds. Calls that wait in other threads raise
        `BarrierClosedError`, as later ones do.

        **Interruption:** closing goes on without waiting for it.
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
        try:
            if exc is not None:
                self._fail(exc)
        finally:
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._config is None:
            raise TypeError(
                "a BlockingBarrier that was given a barrier cannot be pickled; build it from a "
                "BarrierConfig"
            )
        return (BlockingBarrier, (self._config,))

    @property
    def _turns_taken(self) -> int:
        """By this thread."""
        turns: int = getattr(self._here, "turns", 0)
        return turns

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        try:
            return self._portal.call(function)
        except PortalClosed as exc:
            raise BarrierClosedError(f"this BlockingBarrier ({exc})") from exc

    def _fail(self, exc: BaseException) -> None:
        """Tell the peers that what should have come before the next crossing failed."""
        barrier = self._barrier

        async def fail() -> None:
            await barrier._fail(reason_of(exc), "")

        # The caller's own exception is on its way, and matters more.
        with contextlib.suppress(PortalClosed):
            self._portal.call(fail)


async def _part(barrier: Barrier) -> None:
    # A collective cannot be told without waiting for it.
    if isinstance(barrier, CrossingBarrier):
        await barrier.part("")
    await barrier.aclose()


def _copied(config: Any) -> BarrierConfig:
    barrier_type = getattr(config, "barrier_type", None)
    barrier_args = getattr(config, "barrier_args", None)
    if not isinstance(barrier_args, dict):
        raise TypeError(f"config_or_barrier must be a BarrierConfig or a Barrier, not {config!r}")
    return BarrierConfig(barrier_type, dict(barrier_args))


def _built(config: BarrierConfig) -> Barrier:
    barrier = create_barrier_from_config(config)
    if barrier is None:
        raise ValueError("the configuration's barrier_type is None: there is nothing to wait for")
    return barrier
