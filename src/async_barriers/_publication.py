"""A commit's leader: publish, and tell the others what came of it."""

from __future__ import annotations

import anyio

from ._barrier import Publish, checked_blob, reason_of
from ._crossing import Crossing, answer, patience_secs
from ._errors import BarrierClosedError, BarrierConnectionError, describe
from ._session import Session
from ._verdict import Broken, Gathered, Released, Verdict
from ._waiting import outcome


class Publication:
    """One publish under way on this rank.

    :ivar settled: set when the leader's word is given, or owed
    """

    def __init__(self, session: Session, crossing: Crossing) -> None:
        self._session = session
        self._crossing = crossing
        self._scope = anyio.CancelScope(deadline=crossing.deadline)
        self._stopped_for = ""
        self._closing = False
        self.settled = anyio.Event()

    def stop(self, reason: str, *, closing: bool = False) -> None:
        """Cancel it, for ``reason``; because the barrier is closed, if that is why."""
        self._stopped_for = reason
        self._closing = closing
        self._scope.cancel()

    async def run(self, publish: Publish, gathered: Gathered) -> bytes:
        """Publish, and settle the phase by what came of that."""
        session, crossing = self._session, self._crossing
        turn, rank = crossing.turn, session.rank
        returned: bytes | None = None
        published = False
        complaint: Exception | None = None
        verdict: Verdict
        try:
            with self._scope:
                payloads = await outcome(session.turns.payloads(turn))
                returned = await publish(payloads)
                published = True
        except BaseException as exc:
            verdict = Broken(rank, f"publish failed: {reason_of(exc)}")
            settled = session.turns.settle(turn, verdict)
            if isinstance(exc, GeneratorExit):
                raise
            if await answer(settled, within_secs=patience_secs(session)) is None:
                session.owe(turn, verdict)
            raise
        if published:
            try:
                verdict = Released(gathered.last_rank, checked_blob("publish's result", returned))
            except (TypeError, ValueError) as exc:
                # Published it is, and its peers may rely on that.
                complaint, verdict = exc, Released(gathered.last_rank)
        elif crossing.timeout_secs is not None and anyio.current_time() >= crossing.deadline:
            reason = f"rank {rank} was still publishing, and was stopped"
            verdict = Broken(rank, reason, crossing.timeout_secs)
        else:
            verdict = Broken(rank, self._stopped_for)
        told = await answer(session.turns.settle(turn, verdict), within_secs=patience_secs(session))
        if told is None:
            session.owe(turn, verdict)
            raise BarrierConnectionError(
                f"{describe(turn.name, turn.sequence)}: rank {rank} "
                f"{'published' if published else 'did not publish'}, but "
                f"{'this barrier was closed' if self._closing else 'the store was lost'} before "
                "its peers could be told",
                in_doubt=True,
            )
        if complaint is not None:
            raise complaint
        if self._closing and told == Broken(rank, self._stopped_for):
            raise BarrierClosedError(describe(turn.name, turn.sequence))
        return crossing.accept(told).result
