"""A commit's leader: publish, and tell the others the result."""

from __future__ import annotations

from typing import Any

import anyio

from .._barrier import Publish
from .._checks import checked_result
from .._errors import BarrierClosedError, BarrierConnectionError, BarrierError, another, describe
from .._protocol.verdict import Broken, Released, Verdict
from .._publish import Publishing
from .._reasons import reason_of
from .._store.future import Future
from .._store.waiting import settled, until_done
from .crossing import Crossing
from .phases import Phase


class Publication:
    """One publish under way on this rank.

    :ivar settled: done when the leader has sent the verdict, or goes on sending it by itself
    :ivar verdict: the leader's verdict
    """

    def __init__(self, crossing: Crossing, phase: Phase) -> None:
        self._crossing = crossing
        self._phase = phase
        self._scope = anyio.CancelScope(deadline=crossing.deadline)
        self._stopped_for = ""
        self._closing = False
        self.verdict: Verdict | None = None
        self.settled: Future[None] = Future()

    @property
    def _about(self) -> str:
        phase = self._phase
        return describe(phase.name, phase.sequence, self._crossing.session.prefix)

    @property
    def stopped(self) -> bool:
        """Whether it was settled as broken."""
        return isinstance(self.verdict, Broken)

    def stop(self, reason: str, *, closing: bool = False) -> None:
        """Cancel it, for ``reason``; with ``closing``, because the barrier is closed."""
        self._stopped_for = reason
        self._closing = closing
        self._scope.cancel()
        self._phase.wake()

    async def run(self, publish: Publish) -> bytes:
        """Publish, and settle the phase by the result."""
        crossing, phase = self._crossing, self._phase
        session, loop = crossing.session, crossing.loop
        rank = session.rank
        publishing = Publishing(publish, loop, lambda: self._about)
        returned: Any = None
        published = False
        verdict: Verdict
        try:
            with self._scope:
                payloads = phase.brought
                if payloads is None:
                    fetching = session.start(session.payloads(phase))
                    while not await settled(loop, fetching, crossing.deadline):
                        pass
                    self._check(fetching)
                    payloads = fetching.result()
                returned = await publishing.call(payloads)
                published = True
        except BaseException as exc:
            crossing.foreign, publishing.raised = publishing.raised, None
            if isinstance(phase.verdict, Broken):
                raise  # It was settled already, since the ranks named different leaders.
            verdict = Broken(
                rank, f"publish failed: {reason_of(exc)}", in_doubt=publishing.in_thread
            )
            self.verdict = verdict
            settling = session.give_word(phase, verdict)
            if not isinstance(exc, GeneratorExit):
                with anyio.CancelScope(shield=True):
                    if not await until_done(loop, settling, session.patience_secs):
                        session.worry(phase)
            raise
        if published:
            try:
                verdict = Released(rank, checked_result(returned))
            except (TypeError, ValueError) as exc:
                verdict = Broken(rank, f"publish may have published, but {exc}", in_doubt=True)
        elif crossing.timeout_secs is not None and loop.now() >= crossing.deadline:
            reason = publishing.out_of_time(rank)
            verdict = Broken(rank, reason, crossing.timeout_secs, in_doubt=publishing.in_thread)
        else:
            verdict = Broken(rank, self._stopped_for, in_doubt=publishing.in_thread)
        return await self._settle(verdict, published)

    async def _settle(self, verdict: Verdict, published: bool) -> bytes:
        crossing, phase = self._crossing, self._phase
        session = crossing.session
        settling = session.give_word(phase, verdict)
        loop, patience_secs = crossing.loop, session.patience_secs
        waiter, until = phase.waiter, loop.now() + patience_secs
        assert waiter is not None
        if published and crossing.timeout_secs is not None:
            # A store that is silent may answer yet, and tell its peers.
            until = max(until, crossing.deadline)
        settling.when_done(phase.wake)
        try:
            while not settling.done and loop.now() < until:
                if phase.lost is not None or self._scope.cancel_called:
                    until = min(until, loop.now() + patience_secs)
                await waiter.wait(until)
        except BaseException as exc:
            # Shielded only now, since a scope for each commit costs as much as a round trip.
            if not isinstance(exc, GeneratorExit):
                with anyio.CancelScope(shield=True):
                    await until_done(loop, settling, patience_secs)
            raise
        if not settling.done or settling.error is not None:
            if not settling.done:
                session.worry(phase)
            raise BarrierConnectionError(
                f"{self._about}: rank {session.rank} "
                f"{'published' if published else 'did not publish'}, but "
                f"{'this barrier was closed' if self._closing else 'the store was lost'} before "
                "its peers could be told",
                in_doubt=True,
            )
        self.verdict = settling.result()
        if self._closing and self.verdict == Broken(session.rank, self._stopped_for):
            raise BarrierClosedError(self._about)
        return crossing.accept(phase).result

    def _check(self, ours: Future[Any]) -> None:
        """Raise its error, if it has one, as an error of this phase."""
        error = ours.error
        if isinstance(error, BarrierConnectionError):
            raise another(error, self._about)
        if type(error) is BarrierError:
            raise BarrierError(f"{self._about}: {error}") from error
