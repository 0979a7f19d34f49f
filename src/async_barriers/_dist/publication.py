"""A commit's leader: gather, publish, and tell the others the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import anyio

from .._barrier import Publish
from .._checks import checked_result
from .._errors import (
    BarrierClosedError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    describe,
    seconds,
)
from .._protocol.verdict import ranges
from .._publish import Publishing
from .._reasons import reason_of
from .._store.worker import Promise
from .call import or_inf
from .calls import Calls
from .collectives import FAILED, IN_DOUBT, PUBLISHED, TIMED_OUT, TIMED_OUT_IN_DOUBT, Word


class Publication:
    """One commit that this rank leads."""

    def __init__(self, calls: Calls, name: str, step: int | None, timeout: float | None) -> None:
        self._calls = calls
        self._name = name
        self._step = step
        self._timeout = or_inf(timeout)
        self._scope = anyio.CancelScope()
        self._closed = self._published = False
        # The collectives' thread tells the peers. Not awaited: the leader's knowledge does not
        # depend on which peer gets it. The next call waits behind it.
        self._word: Promise[Word] = Promise()

    def stop(self) -> None:
        """Cancel it, because the barrier is closed."""
        self._closed = True
        self._scope.cancel()

    async def run(self, publish: Publish, payload: bytes) -> bytes:
        """Publish, and return the result."""
        self._scope.deadline = anyio.current_time() + self._timeout
        try:
            sequence, payloads = await self._gathered(payload)
            about = partial(describe, self._name, sequence)
            publishing = Publishing(publish, self._calls.use(), about)
            return await self._publish(publishing, payloads, sequence)
        except BaseException as exc:
            # The peers know it, unless a signal handler raised in between.
            self._tell_failed(f"publish failed: {reason_of(exc)}", self._published)
            raise

    async def _gathered(self, payload: bytes) -> tuple[int, dict[int, bytes]]:
        collectives, step = self._calls.collectives, self._step
        gathered: Promise[dict[int, bytes]] = Promise()
        try:
            return await self._calls.run(
                self._name,
                step,
                None if self._timeout == math.inf else self._timeout,
                lambda: collectives.lead(payload, step, gathered, self._word),
                gathered,
            )
        except BarrierError as exc:
            # The leader knows that it has not published.
            exc.in_doubt = False
            if isinstance(exc, BarrierTimeoutError):
                self._tell_timed_out(TIMED_OUT, exc.missing_ranks)
            raise

    async def _publish(
        self, publishing: Publishing, payloads: Mapping[int, bytes], sequence: int
    ) -> bytes:
        calls, rank = self._calls, self._calls.group.rank
        if self._closed:
            # In the moment in which all had entered.
            raise self._stopped(publishing, sequence)
        try:
            with self._scope:
                returned = await publishing.call(payloads)
        except BaseException as exc:
            self._tell_failed(f"publish failed: {reason_of(exc)}", publishing.in_thread)
            if not isinstance(exc, Exception):
                calls.break_for_good(f"a commit ended early ({reason_of(exc)})")
            raise
        if self._scope.cancelled_caught:
            raise self._stopped(publishing, sequence)
        self._published = True
        try:
            result = checked_result(returned)
        except (TypeError, ValueError) as exc:
            reason = f"publish may have published, but {exc}"
            self._word.settle(Word(IN_DOUBT, reason.encode()))
            raise BrokenBarrierError(self._name, sequence, rank, reason, in_doubt=True) from exc
        self._word.settle(Word(PUBLISHED, result))
        return result

    def _stopped(self, publishing: Publishing, sequence: int) -> BarrierError:
        """The reason, once its scope was cancelled."""
        name, calls, in_doubt = self._name, self._calls, publishing.in_thread
        error: BarrierError
        if self._closed:
            self._tell_failed("it closed its barrier while it was publishing", in_doubt)
            error = BarrierClosedError(describe(name, sequence))
            error.in_doubt = in_doubt
            return error
        reason = publishing.out_of_time(calls.group.rank)
        error = BarrierTimeoutError(
            name, sequence, (), self._timeout, detail=reason, in_doubt=in_doubt
        )
        how = TIMED_OUT_IN_DOUBT if in_doubt else TIMED_OUT
        self._tell_timed_out(how, (), reason)
        calls.break_for_good(f"a commit timed out after {seconds(self._timeout)}")
        return error

    def _tell_timed_out(self, how: int, missing: tuple[int, ...], reason: str = "") -> None:
        message = f"{self._timeout} {ranges(missing) or '-'} {reason}"
        self._word.settle(Word(how, message.encode()))

    def _tell_failed(self, reason: str, in_doubt: bool) -> None:
        self._word.settle(Word(IN_DOUBT if in_doubt else FAILED, reason.encode()))
