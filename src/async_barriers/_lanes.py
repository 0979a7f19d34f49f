"""The lanes of one rank, so that none of its calls waits for another.

*Control* makes short calls (join, break, survey), the *watcher* blocks on the rank's mail, idle for
most of its life, and each phase that is awaited has a lane of its own meanwhile.
"""

from __future__ import annotations

import time
from collections import deque

from ._connection import Remains
from ._lane import Lane, Open

# What an open connection has not done by then may hang.
HANGS_SECS = 0.8


class Lanes:
    """All lanes that are in use; those that were discarded end by themselves."""

    def __init__(self, open_connection: Open, init_secs: float) -> None:
        self._open_connection = open_connection
        self._init_secs = init_secs
        self._idle: deque[tuple[Lane, float]] = deque()
        self._remains: list[Remains] = []
        self.all: list[Lane] = []
        self.control: Lane = self._lane()
        self.watcher: Lane = self._lane()

    def _lane(self) -> Lane:
        lane = Lane(self._open_connection, self._init_secs)
        self.all.append(lane)
        return lane

    def take(self) -> Lane:
        """One that is free, for a phase."""
        return self.take_idle() or self._lane()

    def take_idle(self) -> Lane | None:
        """The same, if there is one that was used before."""
        while self._idle:
            lane, since = self._idle.pop()
            # One that has not yet got rid of its last phase hangs.
            if not lane.busy or time.monotonic() - since < HANGS_SECS:
                return lane
            self.discard(lane)
        return None

    def put_back(self, lane: Lane) -> None:
        """It is free again."""
        self._idle.append((lane, time.monotonic()))

    def discard(self, lane: Lane) -> None:
        """Give up a lane, and the call that it makes."""
        if lane in self.all:
            self.all.remove(lane)
        lane.abandon()
        lane.retire()

    def renew(self) -> None:
        """Have each open another connection before its next call."""
        for lane in list(self.all):
            lane.renew()

    def replace_control(self) -> Lane:
        """Another one from now on; the one before."""
        before, self.control = self.control, self._lane()
        return before

    def replace_watcher(self) -> Lane:
        """Another one from now on; the one before."""
        before, self.watcher = self.watcher, self._lane()
        return before

    def leave_behind(self, lane: Lane) -> None:
        """Discard one that hangs; what it still had to send may arrive, until `reset_remains`."""
        self._remains += lane.remains()
        self.discard(lane)

    def reset_remains(self) -> None:
        """See to it that nothing arrives any more of what was left behind.

        Before this rank departs from the phases that it gave up, and their keys are deleted: an
        arrival that came late would bring them back.
        """
        while self._remains:
            self._remains.pop().reset()

    def retire(self) -> list[Lane]:
        """End all after what they are doing."""
        while self._remains:
            self._remains.pop().close()
        lanes = list(self.all)
        for lane in lanes:
            lane.retire()
        return lanes

    def stop_connecting(self) -> None:
        """End those that have no connection, and are waiting for a store at most."""
        for lane in list(self.all):
            if not lane.connected:
                lane.abandon()

    def abandon(self) -> None:
        """End the calls of those that did not end by themselves."""
        for lane in list(self.all):
            if not lane.ended.done():
                lane.abandon()
