"""One rank's presence at one store: its connections, its membership, and the phases it awaits.

Everything here runs in callbacks of one event loop, never blocks and takes no lock. A message to
the peers (a break, a leader's word) goes on by itself, also if its caller ends. This is the topmost
layer, which leaves; `state` names the layers below.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from functools import cached_property, partial

from .._errors import BarrierClosedError, BarrierConnectionError, BarrierError, describe
from .._protocol import leaving
from .._protocol.count import FEW
from .._protocol.membership import Membership
from .._protocol.store import Read
from .._store.event_loop import Loop
from .._store.future import Future
from .._store.private_loop import PrivateLoop
from .._store.sources import Connection
from .._store.waiting import sleep, within
from .._store.worker import Promise
from . import process
from .joining import Joining
from .presence import Presence
from .state import PEERS_SECS

logger = logging.getLogger(__name__)

# How long leaving waits for a store that does not answer; less if it has not answered for a while,
# since law 8 leaves two seconds in all.
_LEAVE_SECS = 1.0
_LEAVE_SILENT_SECS, _WORD_LEFT_SECS = 0.3, 0.15
_LAST_SECS = 0.1
_MOMENT_SECS, _AGAIN_SECS = 0.25, 0.05
_EXIT_SECS = 0.5
# How long another thread's event loop has to begin to leave, before this thread does it.
_TAKEN_SECS = 0.2


class Session(Joining):
    """All that a connected barrier has."""

    # What this rank was when it last wrote that it is gone.
    _gone_as: Membership | None = None
    # And when it last told its peers that it leaves.
    _told_as: Membership | None = None

    @cached_property
    def presence(self) -> Presence:
        """Finds out whether missing ranks are there."""
        return Presence(self)

    def leave(self, reason: str, spent_secs: float = 0.0) -> Future[None]:
        """Break the awaited phases, tell that this rank is gone, and close; done when all of it is.

        :param spent_secs: the part of the time for closing that is over
        """
        if self._leaving is None:
            self.closing = True
            self._leaving = self.owe(partial(self._leave, reason, spent_secs), last=True)
            self._leaving.when_done(self._close)
        return self._leaving

    async def _leave(self, reason: str, spent_secs: float) -> None:
        loop = self.loop
        if loop is None or self._over:
            return
        began = self._now()
        within_secs = _LEAVE_SILENT_SECS if self._doubtful else _LEAVE_SECS
        breaks = [
            self.give_up(phase, reason)
            for phase in list(self.open)
            if not phase.decided and not phase.giving_up and phase.publishing is None
        ]
        # An attempt to claim the rank tells that it leaves when it has it. This effort is none of
        # those yet: it has not come to its first await.
        joins = () if self._claiming else (self._joining, self._joining_on)
        others = [one for one in self._efforts if one not in joins]
        if self._doubtful and await self._may_leave_word(loop) and self._leave_word(reason):
            within_secs = _WORD_LEFT_SECS
        deadline = began + max(within_secs / 2, within_secs - spent_secs)
        # The rest of the time is for saying goodbye.
        until = (began + deadline) / 2
        for effort in (*breaks, *others):
            await within(loop, effort, until - self._now())
        for phase in list(self.open):
            # A commit that is being published is settled by its result.
            if not phase.decided and phase.publishing is None:
                error = BarrierClosedError(describe(phase.name, phase.sequence, self.prefix))
                error.in_doubt = phase.entered
                self.settle(phase, error=error)
        while True:
            try:
                await self._say_goodbye(loop, reason, deadline, began + PEERS_SECS)
                break
            except BarrierError as exc:
                logger.debug("%s closes without its store: %s", describe(self.prefix), exc)
                if self.host_left or self._now() >= deadline - _AGAIN_SECS:
                    break
            # Its connection was lost just then. The store may still be there.
            await sleep(loop, _AGAIN_SECS)
        if self._told_as is not self.membership:
            self._leave_word(reason)
        if any(connection.unsaid for connection in self._connections()):
            # A host may have waited for its peers past the deadline.
            last_secs = 0.0 if self._doubtful else _LAST_SECS
            await self._hear_all_out(loop, max(deadline, self._now() + last_secs))

    async def _may_leave_word(self, loop: Loop) -> bool:
        """Whether nothing has to be said before; a host also waits for its peers."""
        if any(phase.entry.leads and not phase.decided for phase in self.open):
            return False
        with contextlib.suppress(BarrierError):
            return not await self._source.hosts(loop)
        return False

    def _leave_word(self, reason: str) -> bool:
        """Tell the peers on a connection that is silent; whether there is one that takes it.

        The system delivers it when the store is there again, also once this process has ended. Not
        in a large world: each rank would ring for all others, and the system may not take so much.
        """
        membership, bell = self.membership, self._bell
        if membership is None or bell is None or not bell.waits or self.world_size > FEW:
            return False
        bell.call(*leaving.last_words(membership, reason))
        self._bell = None
        if not bell.sent:
            # Half of it would be worse: who leaves later would not ring, and nobody has.
            bell.close(reset=True)
            return False
        bell.close()
        self._told_as = membership
        return True

    async def _hear_all_out(self, loop: Loop, deadline: float) -> None:
        """Wait for all answers, since c10d's server complains of clients that hang up before; and
        send what follows: the last rank to depart deletes the keys."""
        for connection in self._connections():
            await self._hear_out(loop, connection, deadline)
        await within(loop, self.start(self._end_waits()), deadline - self._now())

    async def _say_goodbye(
        self, loop: Loop, reason: str, deadline: float, peers_deadline: float
    ) -> None:
        # The one before holds its rank also if its generation is over.
        membership = self.membership or self._claimed or self._before
        if membership is None or membership is self._gone_as:
            return
        bell = await self._bell_at_end(loop, deadline)
        flushed = self.start(self._flush())
        if bell is None or not await within(loop, flushed, deadline - self._now()):
            return
        hosts, let_go = await self._source.hosts(loop), membership is self._let_go_as
        if let_go and not (bell.waits or hosts):
            return  # In threads, c10d prints what it writes to a server that has gone.
        # It waits for something else then.
        bell.stop_waiting()
        told = self.start(leaving.tell(bell, membership, reason, hosts=hosts))
        if not await within(loop, told, deadline - self._now()):
            return
        told.result()
        self._told_as = membership
        await self._hear_all_out(loop, (self._now() + deadline) / 2)
        # Others depart from these after this rank is gone, or never.
        for left in self._after:
            self._name(left)
        turns = self.turns
        for entry, _ in turns.tried_early if turns is not None else ():
            self.unfinished[entry.keys.path] = membership.own.latest("")
        again, self._goes_as = self._goes_as is membership, membership
        go = partial(leaving.go, hosts=hosts, let_go=let_go, again=again)
        gone = self.start(go(bell, membership, self.unfinished))
        said = await within(loop, gone, deadline - self._now())
        needed = said and gone.result()
        # Not after it was interrupted: then it begins anew.
        self._gone_as = membership
        if not (said and hosts):
            return
        if needed:
            await self._wait_for(bell, membership.own.all_left, peers_deadline - self._now())
        ended = self.start(leaving.host_no_more(bell, membership))
        await within(loop, ended, max(deadline, self._now() + _LAST_SECS) - self._now())

    async def _bell_at_end(self, loop: Loop, deadline: float) -> Connection | None:
        """The connection to say goodbye on; another one, if the one that listens was lost."""
        bell = self._bell
        # What was asked last need not hang; and c10d complains of a wait that is cut off.
        until = self._now() + min(_MOMENT_SECS, (deadline - self._now()) / 2)
        while bell is not None and bell.lost is None and bell.unsaid and self._now() < until:
            answered = bell.call(Read(self.keys.state))
            await within(loop, answered, until - self._now())
        if bell is None or bell.lost is not None or bell.unsaid:
            if self.host_left:
                return None
            opened = self.start(self._open(loop, deadline))
            if not await within(loop, opened, deadline - self._now()):
                opened.stop(BarrierConnectionError("there is no time left"))
            if bell is not None:
                bell.close(reset=True)
            bell = self._bell = opened.result()
        return bell

    def _close(self) -> None:
        self._not_at_end()
        # A message that was not sent by now is not sent later, nor by the calls that are stopped.
        self._over = True
        for effort in list(self._efforts):
            effort.stop(BarrierConnectionError(f"{describe(self.prefix)} was closed meanwhile"))
        for connection in list(self._opened):
            if connection.lost is None:
                connection.close(reset=connection.unsaid)
        self._idle, self._bell = [], None
        self._announced.clear()
        self.open.clear()
        for membership in (self.membership, self._claimed, self._before):
            if membership is not None:
                process.holders.pop(membership.claim.life.token, None)
        self.turns = self._claimed = None
        self._source.let_go()

    def end_with_loop(self) -> None:
        """Leave in the time that is left, since the loop ends."""
        if not self.foreign:
            self._leave_now(time.monotonic() + _EXIT_SECS, "its event loop ended")
            # Another loop may use the barrier; it joins again then.
            self._leaving, self.closing, self._over = None, False, False
            self.loop = None

    def end(self, deadline: float) -> None:
        """Leave before the interpreter does; see `worker.end_at_exit`."""
        if self.foreign or (self._leaving is not None and self._leaving.done):
            return
        by = min(deadline, time.monotonic() + 2 * _EXIT_SECS)
        once = threading.Lock()
        taken: Promise[None] = Promise()
        left: Promise[None] = Promise()

        def leave() -> None:
            if once.acquire(blocking=False):
                taken.settle()
                try:
                    self._leave_now(by, "its program ended")
                finally:
                    left.settle()

        loop = self.loop
        if loop is not None and loop.elsewhere:
            # Its own thread, a daemon, would go on with the calls there, so it has to leave itself,
            # unless it is blocked.
            loop.post(leave)
            taken.wait(_TAKEN_SECS)
        leave()
        left.wait(by - time.monotonic())

    def forsake(self) -> None:
        """In a forked child: nothing here reaches the parent's connections, and no call is made."""
        for connection in list(self._opened):
            connection.forsake()
        # The child may go on with a copy of the same loop; `use` then checks the process.
        self.loop = None

    def _leave_now(self, deadline: float, how: str) -> None:
        # An attempt to join may have claimed the rank, and peers know it by its claim.
        claims = self._claiming or self._claimed is not None
        if self.membership is None and not (claims or self.open):
            with contextlib.suppress(RuntimeError, OSError):
                self._close()
            return
        private = PrivateLoop()
        with contextlib.suppress(RuntimeError, OSError):
            self._not_at_end()
            self._not_at_end = lambda: None
            # No call of another thread takes the connections back.
            self.closing = True
            self.loop = private
            for connection in [each for each in self._opened if each.lost is None]:
                connection.move(private)
            spent_secs = _LEAVE_SECS - (deadline - time.monotonic())
            leaving = self.leave(f"it closed its barrier ({how})", spent_secs)
            # A moment more, for its last words to a store that is silent.
            private.run(lambda: leaving.done, deadline + _AGAIN_SECS)
            if not leaving.done:
                self._close()
        private.close()
