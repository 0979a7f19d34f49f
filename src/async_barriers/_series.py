"""Crossings of one name, one after another, that an event loop makes by itself.

Of all calls only the meeting is on the path of every crossing. c10d's client blocks in it, which
takes a thread, and two changes of thread take longer than all else. An event loop needs none: it
says and hears the same (see `_dialogue.py`), and most often nothing else happens.
"""

from __future__ import annotations

import socket
import threading
from typing import NamedTuple, Protocol

from ._connection import Connection
from ._dialogue import Dialogue, arriving, asking, emptying
from ._keys import LOGS
from ._lane import Lane
from ._life import Life
from ._protocol import LONGEST_SERIES, Turn, all_counted, stale_log
from ._verdict import Released, all_keep


class Listener(Protocol):
    """How an event loop listens to one connection."""

    copy: socket.socket
    listens: bool

    def come(self, series: Series) -> bool:
        """Have `Series.hear` called when something comes; False if the loop cannot listen."""

    def go(self) -> None:
        """On the event loop: listen no more."""


class Caller(Protocol):
    """Who crosses, and waits on an event loop."""

    def tell(self) -> object:
        """From any thread: wake it."""

    def wake(self) -> object:
        """On the event loop: wake it."""


class _Said(NamedTuple):
    """What is said of one log."""

    arriving: bytes
    emptying: bytes
    asking: bytes


class Series:
    """This rank's turns in phases of one name, as long as all are released and keep the keys.

    It is no more than where they have come to. Whatever else is to be done with the turn that goes
    on, or with the one before, the series is over and both are turns again: see `Session.unfold`.

    :param turn: the last one that was released, and has no more to do
    :param lane: where nothing is done meanwhile
    :param lock: held over nothing that waits; whoever unfolds it has it, too
    :ivar sequence: of the phase that was released last
    :ivar last_rank: the one that came last there
    :ivar waits: a phase has been entered since: there is a ``caller`` and a ``dialogue``
    :ivar over: there are turns again in its place
    :ivar turn: the one that goes on in its place, if it is over and waited
    """

    caller: Caller
    dialogue: Dialogue

    def __init__(
        self,
        life: Life,
        turn: Turn,
        lane: Lane,
        connection: Connection,
        listener: Listener,
        lock: threading.RLock,
    ) -> None:
        assert isinstance(turn.verdict, Released)
        self.name = turn.name
        self.life = life
        self.lane = lane
        self.connection = connection
        self.sequence: int = turn.sequence
        self.last_rank: int = turn.verdict.last_rank
        self.waits: bool = False
        self.over: bool = False
        self.turn: Turn | None = None
        self._listener: Listener | None = listener
        self._lock = lock
        self._began = turn
        self._index = turn.index
        self._heard = False
        self._rank = turn.rank
        self._world_size = turn.world_size
        line, count = turn.line, turn.keys.count
        self._said = [
            _Said(arriving(log, line, count), emptying(log), asking(log)) for log in turn.keys.logs
        ]

    def enter(self, caller: Caller) -> bool:
        """Enter the next phase; False if that takes a turn.

        :param caller: is woken when no more will be heard, and told once the phase is decided, if
            the series is over by then
        """
        with self._lock:
            index = self._index + 1
            listener = self._listener
            if (
                listener is None  # it is over
                or self.waits
                or index > LONGEST_SERIES
                or self.lane.idle_connection is not self.connection
                or not (listener.listens or listener.come(self))
            ):
                return False
            said = self._said[index % LOGS]
            first = said.arriving
            if self.last_rank == self._rank and (stale := stale_log(index)) is not None:
                first = self._said[stale].emptying + first
            dialogue = Dialogue(first, all_counted(self._world_size, index), said.asking)
            # Only now, as an interrupt of the program may come at any call of a function.
            self.dialogue, self.caller, self._heard, self.waits = dialogue, caller, False, True
            if not dialogue.begin(listener.copy):
                self._heard = True
                caller.tell()
            return True

    def hear(self, listener: Listener) -> None:
        """On the event loop, as something came: go on. If it came for a thread, the loop goes."""
        with self._lock:
            if self.waits and not self._heard and not self.over:
                if self.dialogue.hear(listener.copy):
                    self._heard = True
                    self.caller.wake()
                return
        listener.go()

    def met(self) -> bool:
        """Whether the phase that was entered is released, as far as the event loop has heard."""
        with self._lock:
            if self.over or not self.waits or (log := self.dialogue.log) is None:
                return False
            released = all_keep(log, self._world_size)
            if released is None:
                return False
            self.last_rank = released.last_rank
            self.sequence += 1
            self._index += 1
            self.waits = False
            return True

    def end(self) -> None:
        """There are to be turns in its place."""
        self.over = True
        # A loop that was closed then lets go of it at once.
        self._listener = None

    @property
    def before(self) -> Turn:
        """The turn in the phase that was released last."""
        return self._began.later(self._index - self._began.index, self.last_rank)
