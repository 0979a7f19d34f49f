"""Crossings of one name, one after another, that an event loop makes by itself.

Of all calls only the meeting is on the path of every crossing. c10d's client blocks in it, which
takes a thread, and two changes of thread take longer than all else. An event loop needs none: it
says and hears the same (see `_dialogue.py`), and most often nothing else happens.
"""

from __future__ import annotations

import socket
import threading
from typing import Protocol

from ._connection import Connection
from ._dialogue import Dialogue, arriving, asking, emptying
from ._keys import LOGS
from ._lane import Lane
from ._life import LONGEST_SERIES, Life
from ._protocol import Turn
from ._verdict import Released, all_keep


class Ear(Protocol):
    """How an event loop listens to one connection."""

    connection: socket.socket
    series: Series | None

    def come(self, series: Series) -> bool:
        """Hear what comes in a series; False if the loop cannot listen."""


class Waiter(Protocol):
    """Who waits on an event loop."""

    def tell(self) -> object:
        """From any thread: wake it."""

    def wake(self) -> object:
        """On the event loop: wake it."""


class Series:
    """This rank's turns in phases of one name, as long as all are released and keep the keys.

    It is no more than where they have come to. Whatever else is to be done with the turn that goes
    on, or with the one before, the series is over and both are turns again: see `Session.unfold`.

    :param turn: the last one that was released, and has no more to do
    :param lane: where nothing is done meanwhile
    :param lock: held over nothing that waits; whoever unfolds it has it, too
    :ivar sequence: of the phase that was released last
    :ivar last_rank: the one that came last there
    :ivar waits: a phase has been entered since
    :ivar over: there are turns again in its place
    :ivar turn: the one that goes on in its place, if it is over and waited
    """

    def __init__(
        self,
        life: Life,
        turn: Turn,
        lane: Lane,
        connection: Connection,
        ear: Ear,
        lock: threading.RLock,
    ) -> None:
        assert isinstance(turn.verdict, Released)
        self.name = turn.name
        self.life = life
        self.lane = lane
        self.connection = connection
        self.ear = ear
        self.sequence: int = turn.sequence
        self.last_rank: int = turn.verdict.last_rank
        self.waits: bool = False
        self.over: bool = False
        self.turn: Turn | None = None
        self.dialogue: Dialogue
        self.waiter: Waiter
        self._lock = lock
        self._began = turn
        self._index = turn.index
        self._rank = turn.rank
        self._world_size = turn.world_size
        self._line = line = turn.line
        logs, count = turn.keys.logs, turn.keys.count
        self._said = [(arriving(log, line, count), emptying(log), asking(log)) for log in logs]

    def enter(self, waiter: Waiter) -> bool:
        """Enter the next phase; False if that takes a turn.

        :param waiter: is told when there is no more to be heard, or if the series is over by then,
            when the phase is decided
        """
        with self._lock:
            index = self._index + 1
            if (
                self.over
                or self.waits
                or index > LONGEST_SERIES
                or self.lane.idle_connection is not self.connection
                or not (self.ear.series is self or self.ear.come(self))
            ):
                return False
            arriving, _, asking = self._said[index % LOGS]
            if self.last_rank == self._rank and index >= LOGS - 1:
                arriving = self._said[(index + 1) % LOGS][1] + arriving
            self.waiter = waiter
            self.waits = True
            self.dialogue = dialogue = Dialogue(arriving, self._world_size * (index + 1), asking)
            if not dialogue.begin(self.ear.connection):
                waiter.tell()
            return True

    def hear(self, connection: socket.socket) -> bool:
        """On the event loop, as something came: go on. False if it came for a thread."""
        with self._lock:
            if self.over or not self.waits:
                return False
            if self.dialogue.hear(connection):
                self.waiter.wake()
            return True

    def met(self) -> bool:
        """Whether the phase that was entered is released, as far as the event loop has heard."""
        with self._lock:
            if self.over or not self.waits or (log := self.dialogue.log) is None:
                return False
            released = all_keep(log, self._world_size)
            if released is None or self._line not in log:
                return False
            self.last_rank = released.last_rank
            self.sequence += 1
            self._index += 1
            self.waits = False
            return True

    @property
    def before(self) -> Turn:
        """The turn in the phase that was released last."""
        return self._began.later(self._index - self._began.index, self.last_rank)
