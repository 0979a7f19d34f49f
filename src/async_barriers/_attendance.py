"""Who has entered which call of a DistBarrier, so that a timeout can name who has not.

A collective cannot tell who is missing, and gloo's own `monitored_barrier` tells rank 0 alone
and ends the group. So each rank notes its arrivals in the group's store, without waiting for
that. Nothing is ever released because of a note.
"""

from __future__ import annotations

import threading

from ._connecting import connect_to
from ._connection import Connection
from ._errors import BarrierConnectionError
from ._lane import Lane
from ._meeting import Meeting
from ._worker import Promise, end_at_exit, wait_for_ends

# What comes before all calls, which count from 1.
CONNECTING = 0
# The barrier works without the store, too.
_INIT_SECS = 5.0
# How many notes, roughly, go into one log.
_LOG_NOTES = 1024


class Attendance:
    """Logs, one after another, that ranks append "<call> <rank>" to.

    A thread of its own writes and reads them, since that of the group is in the collective when a
    deadline fires, and must not wait for a store that does not answer.
    """

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._lane = Lane(self._open, _INIT_SECS)
        self.ended = self._lane.ended
        self.latest = CONNECTING - 1
        self._noting = False
        # The oldest log that rank 0 has not deleted.
        self._oldest = 0
        end_at_exit(self)

    def enter(self, call: int) -> None:
        """From any thread: note that this rank has entered ``call``, and all before it."""
        if call <= self.latest:
            return
        self.latest = call
        # One note tells of all calls so far: a store that hangs leaves a single one behind.
        if not self._noting:
            self._noting = True
            self._lane.submit(self._note, again=True)

    def missing(self, call: int) -> Promise[tuple[int, ...]]:
        """The ranks that have not entered ``call``, which this rank has.

        The promise fails with `BarrierConnectionError` where that cannot be told.
        """
        return self._lane.submit(lambda store: self._absent(store, call))

    def retire(self) -> None:
        """Let go of the store; `ended` tells when. The last rank to do so deletes the keys."""
        if self.latest >= CONNECTING:
            self._lane.submit(self._depart)
        self._lane.retire()

    def abandon(self) -> None:
        """From any thread: give up a store that does not answer."""
        self._lane.abandon()

    def end(self, deadline: float) -> None:
        """Leave before the interpreter does; see `_worker.end_at_exit`."""
        self.retire()
        wait_for_ends([self.ended], deadline, self.abandon)

    def _open(self, deadline: float, stop: threading.Event) -> Connection:
        return connect_to(self._meeting.store, deadline, stop)

    def _number(self, call: int) -> int:
        """Of the log that has the notes of ``call``."""
        return call // max(1, _LOG_NOTES // self._meeting.size)

    def _log(self, number: int) -> str:
        return f"{self._meeting.root}log/{number}"

    def _note(self, store: Connection) -> None:
        self._noting = False
        call = self.latest
        number = self._number(call)
        store.append(self._log(number), b"%d %d\n" % (call, self._meeting.rank))
        # All ranks have entered all calls of the log before this one, and are long past those of
        # the one before that.
        while not self._meeting.rank and self._oldest < number - 1:
            store.delete(self._log(self._oldest))
            self._oldest += 1

    def _absent(self, store: Connection, call: int) -> tuple[int, ...]:
        # A rank that was released in this very instant may be one call ahead.
        logs = {self._log(self._number(call)), self._log(self._number(call + 1))}
        notes = b"".join(log or b"" for log in store.read_many(sorted(logs))).splitlines()
        entered = {int(note.split()[1]) for note in notes if int(note.split()[0]) >= call}
        if self._meeting.rank not in entered:
            raise BarrierConnectionError("not even this rank's own arrival was noted")
        return tuple(rank for rank in range(self._meeting.size) if rank not in entered)

    def _depart(self, store: Connection) -> None:
        # What a rank has noted came before, on the same connection.
        root = self._meeting.root
        if store.add(root + "departed", 1) == self._meeting.size:
            for key in store.list_keys():
                if key.startswith(root):
                    store.delete(key)
