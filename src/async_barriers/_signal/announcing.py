"""The register that announces the agreements of a signal, as one rank writes and reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .._client.barrier import CrossingBarrier
from .._client.crossing import Crossing
from .._errors import BarrierConnectionError, BrokenBarrierError, in_one_line
from .._protocol.signal import Sent, decoded, sending
from .._protocol.store import Read, Request
from .._store.event_loop import Loop, Waiter
from .._store.waiting import settled

_AGAIN_SECS = 0.1
# How long a store may take to answer one request before it is asked again.
_ANSWER_SECS = 5.0


class Register:
    """Who has sent a signal, in which generation of its barrier, and in which agreement of that.

    :param about: names the signal, for errors
    :ivar turn: the generation of this rank, and the number of its next agreement there
    """

    def __init__(self, barrier: CrossingBarrier, name: str, about: str) -> None:
        self.turn = ("", 0)
        self._session = barrier._session
        self._watch = barrier._watch
        self._name = name
        self._about = about

    async def join(self, within_secs: float | None = None) -> None:
        """Be a member of the present generation.

        :param within_secs: None for as long as connecting may take
        """
        session = self._session
        if not session.stands:
            await Crossing(session, self._name, None, within_secs, self._watch).ready()
        membership = session.membership
        if membership is not None and membership.state.identity != self.turn[0]:
            self.turn = (membership.state.identity, 0)

    def is_of(self, turn: tuple[str, int]) -> bool:
        """Whether this rank is, or was last, in the generation of ``turn``."""
        membership = self._session.membership
        return turn[0] == ("" if membership is None else membership.state.identity)

    def stands_at(self, turn: tuple[str, int]) -> bool:
        """Whether ``turn`` is the next one; in a later generation no rank would come for it."""
        return self._session.stands and self.turn == turn and self.is_of(turn)

    async def read(self, loop: Loop) -> Sent | None:
        (value,) = await self._ask(loop, Read(self._session.keys.signal))
        return decoded(value)

    async def write(
        self, loop: Loop, reason: str, deadline: float, waiter: Waiter, closed: Callable[[], bool]
    ) -> Sent:
        """Tell all ranks that this one sends; return the first sender, maybe another rank."""
        session, turn = self._session, self.turn
        membership = session.membership
        if membership is None:
            raise self.over(turn[1])
        mine = Sent(*turn, session.rank, in_one_line(reason))
        deadline = min(deadline, loop.now() + session.init_secs)
        held = b""
        while True:
            requests = sending(session.keys, membership, held, mine)
            try:
                (now,) = await self._ask(loop, *requests, deadline=deadline)
            except BarrierConnectionError:
                # The message may have come all the same; to repeat it then changes nothing.
                if closed() or loop.now() >= deadline:
                    raise
                await waiter.wait(min(deadline, loop.now() + _AGAIN_SECS))
                continue
            said = decoded(now)
            if said is not None and said.of(turn):
                return said
            # An absent key answers so.
            held = b"" if now == held else now

    def over(self, number: int) -> BrokenBarrierError:
        """The error of an agreement whose generation has ended."""
        session = self._session
        by = None if session.membership is None else session.membership.state.by
        who = "a rank" if by is None else f"rank {by}"
        reason = f"{who} joined again: it was restarted, or its barrier was built again"
        if (closed := session.closed_by) is not None:
            by, reason = closed.rank, closed.reason
        return BrokenBarrierError(self._name, number, by, reason, prefix=session.prefix)

    async def _ask(self, loop: Loop, *requests: Request, deadline: float = math.inf) -> list[Any]:
        session = self._session
        asking = session.start(session.ask(*requests))
        if not await settled(loop, asking, min(loop.now() + _ANSWER_SECS, deadline)):
            raise BarrierConnectionError(f"{self._about}: the store did not answer in time")
        answers: list[Any] = asking.result()
        return answers
