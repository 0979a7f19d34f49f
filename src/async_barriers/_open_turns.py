"""The turns that one rank has open, and the calls that it makes for them, each on a lane."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from ._connection import Connection
from ._dialogue import Dialogue
from ._errors import BarrierClosedError, BarrierConnectionError
from ._lane import Lane
from ._lanes import Lanes
from ._protocol import Turn
from ._verdict import Gathered, Verdict
from ._worker import Promise

T = TypeVar("T")

# What a lane needs to know to enter a phase.
_Entry = tuple[Turn, bytes, Lane, Promise[Verdict | Gathered]]


class OpenTurns:
    """Those that somebody on this rank waits for; thread-safe.

    :ivar closing: no more lanes are taken, since this rank takes leave
    """

    def __init__(self, lanes: Lanes, prefix: str) -> None:
        self.closing = False
        self._lanes = lanes
        self._prefix = prefix
        self._promises: dict[Turn, Promise[Verdict | Gathered]] = {}
        self._entered_on: dict[Turn, Lane] = {}

    def __bool__(self) -> bool:
        return bool(self._promises)

    def items(self) -> list[tuple[Turn, Promise[Verdict | Gathered]]]:
        """The turns, the oldest first, each with what settles it."""
        return list(self._promises.items())

    def named(self, name: str) -> Turn | None:
        """The oldest one of ``name``."""
        return next((turn for turn, _ in self.items() if turn.name == name), None)

    def open(self, turn: Turn, lane: Lane | None = None) -> None:
        """From now on, somebody waits for it.

        :param lane: on which it has been entered
        """
        self._promises[turn] = Promise()
        if lane is not None:
            self._entered_on[turn] = lane

    def forget(self, turn: Turn) -> None:
        """Nobody on this rank waits for ``turn`` any more."""
        self._promises.pop(turn, None)

    def promised(self, turn: Turn) -> Promise[Verdict | Gathered]:
        """What `enter` will be settled by."""
        return self._promises[turn]

    def lane_of(self, turn: Turn) -> Lane | None:
        """Where a call for ``turn`` is under way that waits."""
        return self._entered_on.get(turn)

    def give_lane_up(self, turn: Turn) -> Lane | None:
        """The same; that call's end is nobody's business any more."""
        return self._entered_on.pop(turn, None)

    def stop_doubting(self) -> None:
        """End the waits for commits that their leader has not settled, and may be dead."""
        for turn, lane in list(self._entered_on.items()):
            if turn.verdict is None:
                lane.stop_waiting()

    # -- entering --------------------------------------------------------------------

    def enter(self, turn: Turn, payload: bytes = b"") -> None:
        """Enter the phase on a lane that is free."""
        promise = self._promises[turn]
        lane = self._entered_on[turn] = self._free_lane()
        lane.post(self._enter, self._not_entered, (turn, payload, lane, promise))

    def finish(self, turn: Turn, lane: Lane, meeting: Dialogue, connection: Connection) -> None:
        """Go on with one that an event loop has entered on ``connection``, which ``lane`` has."""
        entry = turn, b"", lane, self._promises[turn]
        lane.post(functools.partial(self._finish, meeting), self._not_entered, entry, connection)

    def _not_entered(self, error: BaseException, entry: _Entry) -> None:
        turn, _, lane, promise = entry
        # Not where the verdict was told, and only what follows it failed.
        if self._entered_on.pop(turn, None) is lane:
            self._lanes.discard(lane)
            promise.settle(error=error)

    def _enter(self, store: Connection, entry: _Entry) -> Callable[[], object] | None:
        turn, payload, lane, promise = entry
        # A turn that was given up before its lane could open is not entered any more.
        if not turn.hold():
            self._free(turn, lane, promise, turn.parting_word)
            return promise.wake
        return self._decide(store, entry, lambda: turn.enter(store, payload))

    def _finish(
        self, meeting: Dialogue, store: Connection, entry: _Entry
    ) -> Callable[[], object] | None:
        turn = entry[0]
        return self._decide(store, entry, lambda: turn.judge_meeting(store, store.finish(meeting)))

    def _decide(
        self, store: Connection, entry: _Entry, decide: Callable[[], Verdict | Gathered]
    ) -> Callable[[], object] | None:
        turn, _, lane, promise = entry
        try:
            outcome = decide()
        except BaseException:
            turn.release(store)
            raise
        departs = turn.let_go(if_last=True)
        # The caller goes on now, and may use this lane again.
        self._free(turn, lane, promise, outcome)
        if departs is False:
            return promise.wake
        # Off the caller's path, and short.
        promise.wake()
        _part(store, turn, departs)
        return None

    def _free(self, turn: Turn, lane: Lane, promise: Promise[T], outcome: T) -> None:
        # If the lane was given up meanwhile, it is nobody's any more.
        if self._entered_on.pop(turn, None) is lane:
            self._lanes.put_back(lane)
        promise.tell(outcome)

    # -- other calls -----------------------------------------------------------------

    def give_up(
        self,
        turn: Turn,
        reason: str,
        timeout_secs: float | None = None,
        missing: tuple[int, ...] | None = None,
    ) -> Promise[Verdict | Gathered]:
        """Break the phase of ``turn`` unless it is decided; settled by what was decided."""
        return self._lanes.control.submit(
            lambda store: break_phase(store, turn, reason, timeout_secs, missing)
        )

    def give_up_lost(self, turn: Turn, reason: str) -> Promise[Verdict | Gathered]:
        """As `give_up`, after the connection was lost on which this rank had entered."""
        return self._lanes.control.submit(
            lambda store: turn.during(
                store,
                lambda store: turn.give_up_lost(store, reason),
                lambda: turn.parting_word,
            )
        )

    def survey(self, turn: Turn) -> Promise[tuple[int, tuple[int, ...]] | None]:
        """Who has arrived; None where the phase is over."""
        return self._lanes.control.submit(
            lambda store: turn.during(store, turn.survey, lambda: None)
        )

    def payloads(self, turn: Turn) -> Promise[dict[int, bytes]]:
        """What all brought, for the leader of a commit in which everyone has arrived."""
        return self._on_free_lane(turn, lambda store: turn.during(store, turn.payloads, dict))

    def settle(self, turn: Turn, verdict: Verdict) -> Promise[Verdict | Gathered]:
        """The leader's word on such a commit; settled by the first word it gave."""
        try:
            return self._on_free_lane(turn, lambda store: settle_commit(store, turn, verdict))
        except BarrierClosedError as exc:
            refused: Promise[Verdict | Gathered] = Promise()
            refused.settle(error=BarrierConnectionError(str(exc)))
            return refused

    def hear(self, turn: Turn) -> Promise[Verdict | Gathered]:
        """Wait for the verdict, without entering."""
        return self._on_free_lane(
            turn, lambda store: turn.during(store, turn.await_verdict, lambda: turn.parting_word)
        )

    def _on_free_lane(self, turn: Turn, call: Callable[[Connection], T]) -> Promise[T]:
        lane = self._entered_on[turn] = self._free_lane()

        def ended() -> None:
            if self._entered_on.get(turn) is lane:
                del self._entered_on[turn]
                self._lanes.put_back(lane)
            else:
                # It was given up, or another call for this turn did not wait for it.
                self._lanes.discard(lane)

        promise = lane.submit(call)
        promise.when_settled(ended)
        return promise

    def _free_lane(self) -> Lane:
        if self.closing:
            raise closed(self._prefix)
        return self._lanes.take()


def break_phase(
    store: Connection,
    turn: Turn,
    reason: str,
    timeout_secs: float | None = None,
    missing: tuple[int, ...] | None = None,
    by: int | None = None,
) -> Verdict | Gathered:
    """What `Turn.give_up` comes to, or what this rank knew when it departed."""
    return turn.during(
        store,
        lambda store: turn.give_up(store, reason, timeout_secs, missing, by),
        lambda: turn.parting_word,
    )


def settle_commit(store: Connection, turn: Turn, verdict: Verdict) -> Verdict | Gathered:
    """What `Turn.settle` comes to, or what this rank knew when it departed."""
    return turn.during(store, lambda store: turn.settle(store, verdict), lambda: turn.parting_word)


def closed(prefix: str, *, in_doubt: bool = False) -> BarrierClosedError:
    """What a call ends with when its barrier is closed meanwhile."""
    error = BarrierClosedError(f"barrier {prefix!r}")
    error.in_doubt = in_doubt
    return error


def _part(store: Connection, turn: Turn, departs: bool | None) -> None:
    if departs:
        turn.depart(store)
    else:
        turn.release(store, spoke=True)
