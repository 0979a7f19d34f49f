"""How a rank in doubt asks the store for the record of a commit."""

from __future__ import annotations

from .._checks import check_step
from .._errors import BarrierConnectionError, describe, seconds, told_by
from .._protocol import records
from .._protocol.keys import Keys
from .._protocol.store import Read
from .._store.event_loop import Loop
from .._store.sources import Connection
from .._store.waiting import settled, sleep
from .._values import CommitRecord
from .attempt import SAYS_WHY_SECS
from .session import Session

_RETRY_SECS = 0.2


async def became(session: Session, name: str, sequence: int) -> CommitRecord | None:
    """As `Barrier.outcome`."""
    if check_step(sequence, "sequence") is None:
        raise TypeError("sequence must be an integer, not None")
    loop = session.use()
    deadline = loop.now() + session.init_secs
    asking = session.start(_ask(session, loop, name, sequence, deadline))
    try:
        await settled(loop, asking, deadline + SAYS_WHY_SECS)
    finally:
        asking.stop(BarrierConnectionError("nobody waits for the answer any more"))
    if asking.error is None:
        found: CommitRecord | None = asking.result()
        return found
    why = session.why_not or asking.error
    raise BarrierConnectionError(
        f"{describe(name, sequence, session.prefix)}: rank {session.rank} asked the store for "
        f"its outcome, and had no answer within {seconds(session.init_secs)} ({told_by(why)}); "
        "ask again once the process that hosts the store can be reached"
    ) from why


async def _ask(
    session: Session, loop: Loop, name: str, sequence: int, deadline: float
) -> CommitRecord | None:
    while True:
        connection: Connection | None = None
        try:
            # A connection of its own: a call that hangs on one of the session's does not delay it.
            connection = await session._open(loop, deadline)
            keys = Keys(session.prefix, session._source.namespace)
            (value,) = await connection.call(Read(keys.commits))
            log = records.decode(value)
            record = session.outcomes.find(log, name, sequence)
            found = None if record is None else await records.public(connection, keys, record)
            if found is None:
                session.outcomes.explain(log, session.prefix, name, sequence)
            return found
        except BarrierConnectionError:
            # An attempt without time would only say that it had none.
            if loop.now() + _RETRY_SECS >= deadline or session.closing:
                raise
        finally:
            if connection is not None:
                connection.close(reset=connection.unsaid)
        await sleep(loop, _RETRY_SECS)
