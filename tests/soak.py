"""A soak: processes cross phases in random order while a driver gets in their way.

``python tests/soak.py --minutes 30 --seed S --ranks 4``, or ``make soak MINUTES=30``. The seed
decides which faults hit which rank and when, not how the processes' steps interleave. judge.py
judges the logs, which are kept if a law was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cuttable import Cut, Way, Ways
from judge import EXIT_SECS, SLACK_SECS, Record, Violation, judge_record
from processes import BACKENDS, CRASHES, PATIENCE_SECS, Forge, Rank
from soak_rank import NAMES
from worlds import free_port

# How ranks speak to their store.
CARRIERS = ("sockets", "threads")
INIT_SECS = 3.0
EPISODE_SECS = 45.0
HOSTED_SECS = 8.0
# A rank whose host is gone has this long to find out before it is told to end.
AFTER_HOST_SECS = 2.0
# By then the second process of a rank has been refused, and its interpreter has ended.
REFUSED_SECS = 4.0
HOST_EXIT_SECS = 3.0 + EXIT_SECS
# If the driver wakes up later than this, the machine is overloaded.
LATE_SECS = 0.2


@dataclass
class Tally:
    """The results of all episodes."""

    phases: int = 0
    generations: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.phases += other.phases
        self.generations += other.generations
        self.faults += other.faults
        self.outcomes += other.outcomes
        self.violations += other.violations

    def __str__(self) -> str:
        def listed(counts: Counter[str]) -> str:
            return ", ".join(f"{counts[what]} {what}" for what in sorted(counts))

        return (
            f"{self.phases} phases in {self.generations} generations; "
            f"faults: {listed(self.faults)}; calls: {listed(self.outcomes)}"
        )


class Episode:
    """One job of some ranks, from its start to its end."""

    def __init__(
        self,
        forge: Forge,
        logs: Path,
        seed: str,
        size: int,
        backends: Sequence[str],
        carriers: Sequence[str],
        hosted: bool,
    ) -> None:
        self.faults: Counter[str] = Counter()
        self.violations: list[Violation] = []
        self._forge = forge
        self._logs = logs
        self._seed = seed
        self._size = size
        self._backends = backends
        self._carriers = carriers
        self._hosted = hosted
        self._random = random.Random(seed)
        self._lives = 0
        self._ranks: dict[int, Rank] = {}
        self._life_of: dict[Rank, int] = {}
        self._all: list[Rank] = []
        # Ranks that are stopped, cut off or not there yet are not in it, and get no other fault.
        self._ready: set[int] = set()
        self._starting: set[int] = set()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._undone: list[Callable[[], None]] = []
        self._ways = Ways()
        self._way: dict[int, Way] = {}
        self._log = (logs / "driver.jsonl").open("a", buffering=1)
        self._server: Rank | None = None

    def run(self, secs: float) -> None:
        """Start all ranks, disturb them for ``secs``, and end all."""
        try:
            self._say("soak", size=self._size, init_secs=INIT_SECS, seed=self._seed)
            self._start_all()
            until = time.monotonic() + secs
            while time.monotonic() < until:
                self._sleep(self._random.uniform(0.0, self._random.choice(_PAUSES_SECS)))
                self._fault()
            while self._due:
                self._sleep(0.05)
            if self._hosted:
                self._end_host()
            self._end_all()
        finally:
            for rank in self._all:
                rank.dispose()
            self._ways.close()
            self._log.close()

    # -- processes ---------------------------------------------------------------------

    def _start_all(self) -> None:
        if self._hosted:
            port = free_port()
            self._start(0, port)
            self._await_ready()
        else:
            self._server = self._fork(-1, "asyncio", serves=True)
            port = int(self._server.event()["port"])
        for number in range(self._size):
            self._way[number] = self._ways.to(port)
            if number not in self._ranks:
                self._start(number)
        self._await_ready()

    def _await_ready(self) -> None:
        for number in self._starting:
            assert self._ranks[number].event() == {"event": "ready"}
        self._ready |= self._starting
        self._starting.clear()

    def _start(self, number: int, port: int | None = None) -> None:
        life, self._lives = self._lives, self._lives + 1
        self._say("start", rank=number, life=life)
        # So that each backend meets each carrier.
        carrier = self._carriers[(number + life // 2) % len(self._carriers)]
        rank = self._fork(
            number,
            self._backends[(number + life) % len(self._backends)],
            carrier,
            serves=False,
            rank=number,
            life=life,
            size=self._size,
            port=port or self._way[number].port,
            own_store=self._hosted,
            init_secs=INIT_SECS,
            log=str(self._logs / f"rank{number}-life{life}.jsonl"),
            steps=str(self._logs / "steps"),
            seed=f"{self._seed}/{number}/{life}",
        )
        self._ranks[number] = rank
        self._ready.discard(number)
        self._starting.add(number)
        self._life_of[rank] = life

    def _fork(self, number: int, backend: str, carrier: str = "sockets", **options: Any) -> Rank:
        threads = {"ASYNC_BARRIERS_WORKER_THREADS": f"{int(carrier == 'threads')}"}
        program = {"program": "soak_rank", "environment": threads, "arguments": [options]}
        rank = Rank(self._forge, {"rank": number, "backend": backend, **program})
        self._all.append(rank)
        return rank

    def _tell(self, number: int, do: str, **arguments: object) -> None:
        # A rank that has ended by itself is noticed later.
        try:
            self._ranks[number].start(do, **arguments)
        except BrokenPipeError:
            self._ready.discard(number)

    def _end_all(self) -> None:
        # One after another, since the machine decides how long an interpreter takes to end.
        for rank in self._all:
            if rank.exit_code is not None or rank is self._server:
                continue
            allowed = HOST_EXIT_SECS if self._hosted and rank.number == 0 else EXIT_SECS
            with contextlib.suppress(BrokenPipeError):
                rank.start("end")
            try:
                code = rank.exit(time.monotonic() + allowed + SLACK_SECS)
            except AssertionError:
                # It prints the stack of each of its threads.
                rank.signal(signal.SIGUSR1)
                self._sleep(0.2)
                self._complain(rank, f"did not exit within {allowed:g} s\n{_last_words(rank)}")
            else:
                if code:
                    self._complain(rank, f"exited with {code}\n{_last_words(rank)}")
        for rank in self._all:
            if any(crash in rank.stderr for crash in CRASHES):
                self._complain(rank, _last_words(rank))

    def _complain(self, rank: Rank, what: str, law: int = 8) -> None:
        life = self._life_of.get(rank)
        self.violations.append(Violation(law, f"rank {rank.number} (life {life}) {what}"))

    # -- faults ------------------------------------------------------------------------

    def _fault(self) -> None:
        """Cause one fault at one rank, or at all."""
        for number, rank in self._ranks.items():
            if number in self._starting and rank.has_said("ready"):
                self._starting.discard(number)
                self._ready.add(number)
        targets = sorted(self._ready - ({0} if self._hosted else set()))
        if not targets:
            return
        number = self._random.choice(targets)
        (what,) = self._random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
        if what == "freeze" and (self._hosted or len(targets) < self._size):
            return
        if not self._ranks[number].running:
            self._complain(self._ranks[number], "has ended by itself")
            self._ready.discard(number)
            return
        self.faults[what] += 1
        getattr(self, f"_{what}")(number)

    def _later(self, numbers: Iterable[int], secs: float, what: Callable[[], None]) -> None:
        """Undo a fault later; until then these ranks get no other one."""
        self._ready.difference_update(numbers)
        heapq.heappush(self._due, (time.monotonic() + secs, len(self._undone), what))
        self._undone.append(what)

    def _cancel(self, number: int) -> None:
        self._tell(number, "cancel", which=self._random.randrange(100))

    def _abort(self, number: int) -> None:
        self._tell(number, "abort", name=self._random.choice(NAMES))

    def _fail(self, number: int) -> None:
        self._tell(number, "fail", name=self._random.choice(NAMES[2:]))

    def _rebuild(self, number: int) -> None:
        # Nobody holds the rank until its barrier is built.
        self._ready.discard(number)
        self._starting.add(number)
        self._ranks[number].events.clear()
        self._tell(number, "rebuild")

    def _stop(self, number: int) -> None:
        rank = self._ranks[number]
        self._say("stop", rank=number)
        rank.stop()

        def go_on() -> None:
            rank.signal(signal.SIGCONT)
            self._say("continue", rank=number)
            self._ready.add(number)

        self._later([number], self._random.uniform(0.05, 2.5), go_on)

    def _cut(self, number: int) -> None:
        how: Cut = self._random.choice(("hold", "hole", "reset"))
        self.faults[f"cut ({how})"] += 1
        self._say("cut", rank=number, how=how)
        self._way[number].cut(how)

        def heal() -> None:
            self._way[number].heal()
            self._say("healed", rank=number)
            self._ready.add(number)

        self._later([number], self._random.uniform(0.0, 2.5), heal)

    def _freeze(self, number: int) -> None:
        """Stop the store itself."""
        server = self._server
        assert server is not None
        self._say("cut", rank=None, how="freeze")
        server.stop()

        def thaw() -> None:
            server.signal(signal.SIGCONT)
            self._say("healed", rank=None)
            self._ready.update(range(self._size))

        self._later(range(self._size), self._random.uniform(0.05, 2.0), thaw)

    def _kill(self, number: int) -> None:
        self._sigkill(number)
        self._later([number], self._random.uniform(0.0, 1.5), lambda: self._start(number))

    def _sigkill(self, number: int) -> None:
        rank = self._ranks[number]
        killed = rank.signal(signal.SIGKILL)
        rank.exit(killed + PATIENCE_SECS)
        self._say("kill", rank=number, life=self._life_of[rank])

    def _leave(self, number: int) -> None:
        rank = self._ranks[number]
        self._tell(number, "end")

        def start_again() -> None:
            # A process that lives may still hold its rank.
            if rank.running:
                self._later([number], 0.1, start_again)
            else:
                self._start(number)

        self._later([number], self._random.uniform(0.0, 1.5), start_again)

    def _usurp(self, number: int) -> None:
        """Start a second process with a rank's number; it must be refused."""
        holder = self._ranks[number]
        self._start(number)
        usurper, self._ranks[number] = self._ranks[number], holder
        self._say("usurp", rank=number, life=self._life_of[usurper])
        self._starting.discard(number)

        def look() -> None:
            if usurper.running or usurper.has_said("ready"):
                self._complain(usurper, "shares its number with another process", law=1)
            self._ready.add(number)

        self._later([number], REFUSED_SECS, look)

    def _end_host(self) -> None:
        """End rank 0, and with it the store that it hosts."""
        what = self._random.choice(("kill", "leave"))
        self.faults[f"host: {what}"] += 1
        self._say("cut", rank=None, how="host")
        if what == "kill":
            self._sigkill(0)
        else:
            self._tell(0, "end")
        self._sleep(AFTER_HOST_SECS)

    # -- time --------------------------------------------------------------------------

    def _sleep(self, secs: float) -> None:
        """Sleep, and undo the faults that are due meanwhile."""
        until = time.monotonic() + secs
        while (now := time.monotonic()) < until:
            time.sleep(min(0.02, until - now))
            if (woke := time.monotonic()) > now + LATE_SECS:
                self._say("late", since=now, t=woke)
            while self._due and self._due[0][0] <= time.monotonic():
                heapq.heappop(self._due)[2]()

    def _say(self, event: str, **facts: Any) -> None:
        self._log.write(json.dumps({"t": time.monotonic(), "event": event, **facts}) + "\n")


# Pauses between faults, equally often: some leave the ranks time to make progress.
_PAUSES_SECS = (0.1, 0.2, 1.0)
# How often each fault happens, relative to the others.
_WEIGHTS = {
    "cancel": 10,
    "abort": 5,
    "fail": 5,
    "stop": 2,
    "cut": 3,
    "freeze": 0.5,
    "kill": 1.5,
    "leave": 1,
    "rebuild": 1.5,
    "usurp": 0.5,
}


def _last_words(rank: Rank) -> str:
    """The end of its stderr, without c10d's complaints about connections that were cut."""
    said = [line for line in rank.stderr.splitlines() if "frame #" not in line]
    return "\n".join(said[-60:])


def lines(logs: Path) -> Iterator[str]:
    """Every line of every log."""
    for path in sorted(logs.iterdir()):
        with path.open(errors="replace") as log:
            yield from log


def episode(
    forge: Forge,
    logs: Path,
    seed: str,
    secs: float,
    size: int,
    backends: Sequence[str] = BACKENDS,
    carriers: Sequence[str] = CARRIERS[:1],
    *,
    hosted: bool,
) -> Tally:
    """Run one job with its logs in the directory ``logs``, and judge them."""
    logs.mkdir()
    job = Episode(forge, logs, seed, size, backends, carriers, hosted)
    job.run(secs)
    record = Record(lines(logs))
    return Tally(
        phases=len(record.phases),
        generations=len({generation for _, generation, _ in record.phases}),
        faults=job.faults,
        outcomes=Counter(
            f"{call.outcome or 'unfinished'}{' in doubt' * bool(call.exit.get('in_doubt'))}"
            for call in record.calls.values()
        ),
        violations=job.violations + judge_record(record),
    )


def soak(
    minutes: float,
    seed: str,
    size: int,
    backends: Sequence[str],
    carriers: Sequence[str],
    logs: Path,
) -> Iterator[Tally]:
    """Run episodes of less than a minute until the time is over; rank 0 hosts every fourth.

    All ranks use sockets, then all use threads, then both are in one job.
    """
    over = time.monotonic() + minutes * 60
    forge = Forge()
    try:
        for number in itertools.count():
            if (left := over - time.monotonic()) <= 0:
                return
            hosted = number % 4 == 3
            secs = min(left, HOSTED_SECS if hosted else EPISODE_SECS)
            place = logs / f"episode{number}"
            by = carriers[number % 3 : number % 3 + 1] or carriers
            of = f"{seed}/{number}"
            tally = episode(forge, place, of, secs, size, backends, by, hosted=hosted)
            if not tally.violations:
                shutil.rmtree(place)
            yield tally
    finally:
        forge.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", default=str(random.randrange(10**6)))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--backend", choices=BACKENDS, help="of all ranks; else they are mixed")
    parser.add_argument("--carrier", choices=CARRIERS, help="of all ranks; else they change")
    options = parser.parse_args()
    backends = (options.backend,) if options.backend else BACKENDS
    carriers = (options.carrier,) if options.carrier else CARRIERS
    used = " and ".join((*backends, *carriers))
    print(f"seed {options.seed}, {options.ranks} ranks, {used}", flush=True)
    logs = Path(tempfile.mkdtemp(prefix=f"soak-{options.seed}-"))
    total, began = Tally(), time.monotonic()
    for tally in soak(options.minutes, options.seed, options.ranks, backends, carriers, logs):
        total.add(tally)
        print(f"{time.monotonic() - began:5.0f} s: {total}", flush=True)
        for violation in tally.violations:
            print(f"  {violation}", flush=True)
    if total.violations:
        print(f"{len(total.violations)} violations; the logs are in {logs}")
        return 1
    logs.rmdir()
    print("no violation of any law")
    return 0


if __name__ == "__main__":
    sys.exit(main())
