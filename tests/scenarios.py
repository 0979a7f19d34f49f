"""Programs that the ranks of a job run, with the library's own barriers on a modelled store."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
from explorer import Avoids, Report, System, Violation, explore, wander
from phase_laws import PhaseLaws
from replayed import Cancelled, CancelScope, Host, Job, Spec, get_cancelled_exc_class

from async_barriers import BarrierError
from async_barriers._client import joining, lifetime, session, state
from async_barriers._client.barrier import CrossingBarrier
from async_barriers._client.phases import Phase, Turns
from async_barriers._client.session import Session
from async_barriers._protocol import claiming
from async_barriers._protocol.keys import Keys
from async_barriers._protocol.membership import Life, State
from async_barriers._protocol.store import Set
from async_barriers._protocol.verdict import Broken, Released

INIT_SECS = 10.0
KEYS = Keys("p")


class Source:
    """Opens connections to the modelled store."""

    namespace = ""

    def __init__(self, host: Host) -> None:
        self.failures: list[str] = []
        self._host = host

    async def open(self, loop: object, deadline: float) -> Any:
        return await self._host.open()

    async def hosts(self, loop: object) -> bool:
        return self._host.spec.hosts

    def let_go(self) -> None: ...


class ObservedSession(Session):
    """A session that notes what it learns, for the laws."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._host = Host.running
        # An ordered set, so that every run has the same order.
        self._efforts: Any = _Ordered()

    def settle(self, phase: Phase, verdict: Any = None, *, error: Any = None) -> None:
        decided = phase.decided
        super().settle(phase, verdict, error=error)
        path = phase.entry.keys.path
        if not decided and isinstance(phase.verdict, Released):
            self._host.note("learns", path, True, phase.verdict.result)
            self._host.note("released", path)
        elif not decided and isinstance(phase.verdict, Broken):
            self._host.note("learns", path, False, phase.verdict)

    async def _give_up(self, phase: Phase, *args: Any, **kwargs: Any) -> bool:
        ours = await super()._give_up(phase, *args, **kwargs)
        if ours:
            self._host.note("broke", phase.entry.keys.path)
        return ours

    async def _stand(self, store: Any, turns: Turns, opening: Any) -> None:
        claim = turns.membership.claim
        self._host.note("joined", claim.generation, self.rank, claim.life.token)
        await super()._stand(store, turns, opening)


class _Ordered(dict[Any, None]):
    def add(self, thing: Any) -> None:
        self[thing] = None

    def discard(self, thing: Any) -> None:
        self.pop(thing, None)


def _new_life(run_id: str | None) -> Life:
    return Life(Host.running.token(), "host", Host.running.rank)


def _lives(life: Life) -> bool | None:
    host = Host.running
    if life.pid != host.rank:
        return True  # No process of another rank dies before a newcomer joins.
    name = life.token.rpartition(".")[0]
    return (name == host.name and not host.barrier._closed) or host.spec.lives(name)


@contextlib.contextmanager
def modelled_world() -> Iterator[None]:
    """Give the library the model's event loop and processes in place of the real ones."""
    anyio = SimpleNamespace(
        CancelScope=CancelScope, get_cancelled_exc_class=get_cancelled_exc_class
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in (
            "_bodies", "_reasons", "_client.attempt", "_client.crossing", "_client.lifetime",
            "_client.publication",
        ):  # fmt: skip
            patch.setattr(f"async_barriers.{module}.anyio", anyio)
        patch.setattr(lifetime, "Session", ObservedSession)
        patch.setattr(state, "loop_here", lambda before: Host.running.loop)
        patch.setattr(state, "end_at_exit", lambda session: None)
        for each in (joining, session):
            patch.setattr(
                each,
                "process",
                SimpleNamespace(new_life=_new_life, lives=_lives, holders=_Nobody()),
            )
        patch.setattr(
            claiming, "secrets", SimpleNamespace(token_hex=lambda n: Host.running.token())
        )
        yield


class _Nobody(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None: ...


class Scenario(PhaseLaws):
    """The processes of a job, and what each of them does.

    :ivar threads: the ranks that reach the store through worker threads, such as "02"
    """

    def __init__(self, world_size: int, threads: str = "") -> None:
        super().__init__(world_size)
        self.specs: list[Spec] = []
        self.threads = threads

    def world(self) -> AbstractContextManager[None]:
        return modelled_world()

    def barrier(self, host: Host) -> Any:
        """The barrier of a process; all its tasks share it."""
        if host.barrier is None:
            host.barrier = CrossingBarrier(
                Source(host),  # type: ignore[arg-type]
                host.rank,
                self.world_size,
                "p",
                INIT_SECS,
                60.0,
                None,
                None,
            )
        return host.barrier

    async def connect(self, host: Host) -> None:
        await self.barrier(host).connect()

    def rank(self, name: str, *jobs: Job, joined: bool = True, **options: Any) -> None:
        options.setdefault("first", self.connect if joined else None)
        options.setdefault("waits", name[0] not in self.threads)
        self.specs.append(Spec(name, int(name.split()[0]), jobs, **options))

    def restarted(self) -> None:
        """Begin with a generation that a restarted rank began, and that nobody has joined yet."""

        async def first(host: Host) -> None:
            state = State(1, "1-past", self.world_size, None, 1)
            store = await host.open()
            store.call(Set(KEYS.state, state.encoded))

        self.specs.append(Spec("past", 0, (), first))

    def crosses(self, *names: str, times: int = 1, aborts: bool = False, **options: Any) -> Job:
        """Cross phases one after the other, and note the result of each; or abort the first."""

        async def run(host: Host) -> None:
            if aborts:
                await self.ends(host, "abort", self.barrier(host).abort("no disk", "x"))
            for number in range(aborts, times):
                for name in names or ("x",):
                    call = self.barrier(host).execute_barrier(name)
                    await self.ends(host, f"{name} {number}", call)

        options.setdefault("at_once", True)
        return Job(" ".join(("crosses", *names)), run, **options)

    def crosses_steps(self, *calls: str, **options: Any) -> Job:
        """Cross steps, such as "x 3", or abort one of x; the last one has to be released."""

        async def run(host: Host) -> None:
            barrier, result = self.barrier(host), None
            for what in calls:
                name, step = what.split()
                if name == "abort":
                    call = barrier.abort("no disk", "x", step=int(step))
                else:
                    call = barrier.execute_barrier(name, step=int(step))
                result = await self.ends(host, what, call)
            assert not isinstance(result, BaseException), f"{host.name} is out of step: {result}"

        options.setdefault("at_once", True)
        return Job("crosses", run, **options)

    def commits(self, *, steps: bool = False, **options: Any) -> Job:
        """Commit three times."""

        async def run(host: Host) -> None:
            barrier = self.barrier(host)

            async def publish(payloads: Mapping[int, bytes]) -> bytes:
                leading = (each.entry for each in barrier._session.open if each.entry.leads)
                path = next(leading).keys.path
                host.note("publishing", path, tuple(payloads.items()))
                host.note("published", path)
                return b""

            for number in range(3):
                step = number if steps else None
                call = barrier.commit(publish, payload=b"of %d" % host.rank, name="x", step=step)
                await self.ends(host, f"commit {number}", call)

        options.setdefault("at_once", True)
        return Job("commits", run, **options)

    def gathers(self, **options: Any) -> Job:
        """Gather three times: each learns all payloads, or none does."""

        async def run(host: Host) -> None:
            everyone = tuple(b"of %d" % rank for rank in range(self.world_size))
            for number in range(3):
                call = self.barrier(host).all_gather(b"of %d" % host.rank, name="x")
                gathered = await self.ends(host, f"gather {number}", call)
                if isinstance(gathered, tuple):
                    assert gathered == everyone

        options.setdefault("at_once", True)
        return Job("gathers", run, **options)

    def crosses_anew(
        self, times: int = 1, *, aborts: bool = False, tries_at_most: int = 7, **options: Any
    ) -> Job:
        """Cross phases until so many are released after a restart; abort one before, or do not."""

        async def run(host: Host) -> None:
            tries = 0
            if aborts:
                await self.ends(host, "abort", self.barrier(host).abort("no disk", "x"))
            while len(self.released_anew(host)) < times:
                call = self.barrier(host).execute_barrier("x")
                await self.ends(host, f"x {tries}", call)
                tries += 1
                assert tries <= tries_at_most, f"law 11: {host.name} tries in vain"

        options.setdefault("at_once", True)
        return Job("crosses", run, **options)

    def released_anew(self, host: Host) -> list[str]:
        """The phases after the first generation that this process was released from."""
        paths = [note[1] for note in host.notes if note[0] == "released"]
        return [path for path in paths if not path.partition("/1:p/")[2].startswith("0-")]

    def closes(self, *, in_doubt: bool = False, **options: Any) -> Job:
        """:param in_doubt: the store was silent before, so it does not wait to be heard"""

        async def run(host: Host) -> None:
            barrier = self.barrier(host)
            barrier._session._doubtful |= in_doubt
            await barrier.aclose()
            host.note("left", "all", host.rank)

        return Job("closes", run, **options)

    async def ends(self, host: Host, what: str, call: Any) -> Any:
        """Note how a call ends."""
        try:
            result = await call
        except BarrierError as exc:
            host.note("ends", what, type(exc).__name__, exc.in_doubt, str(exc))
            return exc
        except Cancelled:
            host.note("ends", what, "cancelled")
            return None
        host.note("ends", what, "released")
        return result

    def explore(
        self, *, shortest: bool = False, switches: int | None = None, **options: Any
    ) -> Report:
        with self.world():
            report = explore(
                System(self.specs, self, **options), shortest=shortest, switches=switches
            )
        print(f"\n  {self.world_size} ranks: {report}")
        return report

    def wander(
        self, *, runs: int, seed: int = 0, avoids: Avoids | None = None, **options: Any
    ) -> Report:
        with self.world():
            system = System(self.specs, self, **options)
            report = wander(system, runs=runs, seed=seed, avoids=avoids)
        print(f"\n  {self.world_size} ranks: {report}")
        return report


__all__ = ["Callable", "Collection", "Scenario", "Violation"]
