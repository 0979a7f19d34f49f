"""Finding out whether missing ranks are alive: one rank asks, for all that wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .._errors import BarrierConnectionError, describe
from .._protocol import presence
from .._protocol.heard import MOST, Heard, decode_rows, encode_rows
from .._protocol.membership import Member, Membership
from .._protocol.presence import Answer
from .._protocol.store import CompareSet, Delete, Read, Set
from .._store.future import Future
from .._store.sources import Connection
from .._store.waiting import sleep
from .._values import MissingRank
from . import process
from .state import SessionState

# How long findings serve other ranks.
_FRESH_SECS = 0.5
# When to look for answers: soon at first, and then now and then.
_SOON_SECS, _THEN_SECS = 0.005, 0.1
# When to look for another rank's findings, as shares of the time for answers. Together less than
# the time left before a deadline.
_SHARES = (1.0, 0.1, 0.1, 0.1)
# The entries of the register: a rank asks, or the findings; each with its own number.
_ASKS, _FOUND = b"?", b"="


class Presence:
    """Finds out about other ranks: asks them, or takes the findings of one that has just asked."""

    def __init__(self, session: SessionState) -> None:
        self._session = session
        self._used = b""
        self._count = 0
        # The times when ranks of this generation answered, by the loop's clock, and their answers.
        self._heard: dict[int, tuple[float, str | None]] = {}
        self._heard_in: Membership | None = None
        self._busy: Future[None] | None = None

    async def of(self, ranks: Sequence[int], within_secs: float) -> dict[int, Heard]:
        """The knowledge of ``ranks``, or of the first 1,024 of them.

        :param within_secs: how long they have to answer
        :raises BarrierConnectionError: the store cannot be asked
        """
        while self._busy is not None:
            await self._busy
        busy = self._busy = Future()
        try:
            return await self._find(tuple(ranks[:MOST]), within_secs)
        finally:
            self._busy = None
            busy.resolve(None)

    async def _find(self, ranks: tuple[int, ...], within_secs: float) -> dict[int, Heard]:
        session = self._session
        bell, membership, loop = session._bell, session.membership, session.loop
        if bell is None or membership is None or loop is None:
            raise BarrierConnectionError(f"{describe(session.prefix)} has no connection now")
        if membership is not self._heard_in:
            # A rank that has joined again is another process.
            self._heard, self._heard_in = {}, membership
        key = membership.own.heard
        (value,) = await bell.call(Read(key))
        while True:
            value = await self._when_found(bell, key, value or b"", within_secs)
            if value.startswith(_FOUND):
                number, _, rows = value.partition(b"\n")
                found = decode_rows(rows)
                if number != self._used and found.keys() >= set(ranks):
                    self._used = number
                    self._note(each.rank for each in found.values())
                    return {rank: found[rank] for rank in ranks}
            # No other claim has this token.
            self._count += 1
            number = f"{membership.claim.life.token}.{self._count}".encode()
            (now,) = await bell.call(CompareSet(key, value, _ASKS + number))
            if now == _ASKS + number:
                break
            if now == value:
                # The key is gone, and its generation over.
                return {}
            # Another rank was quicker: of many that would ask in one instant, one does.
            value = now
        heard = await self._ask(bell, membership, ranks, within_secs)
        self._note(each.rank for each in heard.values())
        self._used = _FOUND + number
        if not session.closing:  # Else its generation may be over, and the key with it.
            findings = self._used + b"\n" + encode_rows(heard.values())
            bell.call(Set(key, findings))
            loop.call_at(loop.now() + _FRESH_SECS, lambda: self._forget(bell, membership, findings))
        return heard

    async def _when_found(
        self, bell: Connection, key: str, value: bytes, within_secs: float
    ) -> bytes:
        """The findings of another rank that asks; its question, if it does not finish."""
        loop, asked = self._session.running, b""
        while value.startswith(_ASKS) and value != asked:
            asked = value
            # It may wait as long for answers, and has asked a little later.
            for share in _SHARES:
                await sleep(loop, share * within_secs)
                (found,) = await bell.call(Read(key))
                value = found or b""
                if value != asked:
                    break
        return value

    def _forget(self, bell: Connection, membership: Membership, findings: bytes) -> None:
        session = self._session
        if bell is session._bell and membership is session.membership and not session.closing:
            # The key stays, so that the number of keys is the same at any time; a question, too.
            bell.call(CompareSet(membership.own.heard, findings, b""))

    async def _ask(
        self, bell: Connection, membership: Membership, ranks: tuple[int, ...], within_secs: float
    ) -> dict[int, Heard]:
        loop = self._session.running
        claimed = await presence.claims(bell, membership, ranks)
        asked = {
            rank: member
            for rank, member in claimed.items()
            if member is not None and not member.left and process.lives(member.life) is not False
        }
        answers: dict[int, Answer] = {}
        keys: list[str] = []
        if asked:
            try:
                keys = await presence.ask(bell, membership, asked)
                until, pause = loop.now() + within_secs, _SOON_SECS
                while len(answers) < len(asked) and loop.now() < until:
                    await sleep(loop, min(pause, max(0.0, until - loop.now())))
                    pause = min(2 * pause, _THEN_SECS)
                    answers = await presence.answers(bell, keys)
                    answers = {rank: each for rank, each in answers.items() if rank in asked}
            finally:
                if keys and bell.lost is None:
                    bell.call(Delete(keys))
        return {rank: self._judge(rank, claimed[rank], answers.get(rank)) for rank in ranks}

    def _judge(self, rank: int, member: Member | None, answer: Answer | None) -> Heard:
        loop, released_at = self._session.running, self._session.tally.released_at
        if member is None:
            return Heard(MissingRank(rank, None, None, "absent"))
        host, pid = member.life.host, member.life.pid
        if answer is not None:
            ago = 0.0 if answer.said_secs is None else answer.said_secs
            return Heard(MissingRank(rank, host, pid, "alive", answer.doing, ago), answer.idle_secs)
        at, doing = self._heard.get(rank, (None, None))
        times = [each for each in (at, released_at) if each is not None]
        since = loop.now() - max(times) if times else None
        state = "left" if member.left else "silent"
        return Heard(MissingRank(rank, host, pid, state, doing, since))

    def _note(self, ranks: Iterable[MissingRank]) -> None:
        """Keep the answers of living ranks, in case they fall silent."""
        now = self._session.running.now()
        for rank in ranks:
            if rank.state == "alive":
                self._heard[rank.rank] = now, rank.doing
