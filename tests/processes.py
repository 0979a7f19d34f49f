"""Ranks as real processes that do what a test tells them, line by line; see rank_process.py."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from signal import Signals
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any, TypeVar

import networks
import rank_process
from rank_process import PREFIX
from torch.distributed import TCPStore
from worlds import free_port, waited_for_processor

from async_barriers._protocol.keys import GenerationKeys, Keys

T = TypeVar("T")

BACKENDS = ("asyncio", "trio")
# No process may leave these on its stderr, however it ends.
CRASHES = (
    "terminate called",
    "Fatal Python error",
    "Exception in thread",
    "Exception ignored",
    "never retrieved",
)
NO_HOST_NAME = "The hostname of the client socket cannot be retrieved"
# Law 8 says two seconds. A process that is traced also saves its coverage as it ends.
EXIT_SECS = 2.7 if "COVERAGE_PROCESS_CONFIG" in os.environ else 2.0
# Laws 4, 5 and 8: how long after a break, a deadline or a cancellation an await may end.
GRACE_SECS = 1.0
# For waits that have no bound of their own; a busy machine needs some of it.
PATIENCE_SECS = 15.0


class Forge:
    """The process that forks all ranks; one for all tests."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, rank_process.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # c10d looks its peers' names up; without attempts no slow resolver holds it up.
                env={**os.environ, "OMP_NUM_THREADS": "1", "RES_OPTIONS": "attempts:0"},
            )

    def fork(self, options: Mapping[str, Any], fds: Sequence[int]) -> int:
        """Start a process, with ``fds`` as its stdin, stdout and stderr; return its id."""
        socket.send_fds(self._channel, [json.dumps(options).encode()], fds)
        return int(self._channel.recv(64))

    def reap(self, pid: int) -> int:
        """The exit code of a process that has ended, as `subprocess` has it."""
        self._channel.send(b"%d" % pid)
        return int(self._channel.recv(64))

    def close(self) -> None:
        self._channel.close()
        self._process.wait(PATIENCE_SECS)


class Rank:
    """One rank's process."""

    def __init__(self, forge: Forge, options: Mapping[str, Any]) -> None:
        self.number: int = options["rank"]
        self.exit_code: int | None = None
        self._forge = forge
        self._answers: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self._asked = 0
        self._partial = b""
        self._stderr: IO[bytes] = TemporaryFile()  # noqa: SIM115  (closed in dispose)
        stdin, self._stdin = os.pipe()
        self._stdout, stdout = os.pipe()
        self.pid = forge.fork(options, [stdin, stdout, self._stderr.fileno()])
        os.close(stdin)
        os.close(stdout)

    def connects(self) -> None:
        """Wait until its barrier has reached the store."""
        assert self.event() == {"event": "connected"}, self.stderr

    def start(self, do: str, **arguments: Any) -> Call:
        """Tell it to do something; it takes other commands meanwhile."""
        self._asked += 1
        command = {"ask": self._asked, "do": do, **arguments}
        os.write(self._stdin, json.dumps(command).encode() + b"\n")
        return Call(self, self._asked)

    def do(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Tell it to do something, and return the answer."""
        return self.start(do, **arguments).answer()

    def answer_to(self, number: int, within_secs: float) -> dict[str, Any]:
        self._hear(lambda: number in self._answers, within_secs)
        return self._answers[number]

    def answered(self, number: int) -> bool:
        """Whether it has answered command ``number`` already."""
        self._read(0.0)
        return number in self._answers

    def event(self, within_secs: float = PATIENCE_SECS) -> dict[str, Any]:
        """The next event that it reports by itself."""
        self._hear(lambda: bool(self.events), within_secs)
        return self.events.pop(0)

    def has_said(self, event: str) -> bool:
        """Whether it has reported ``event`` by now."""
        self._read(0.0)
        return {"event": event} in self.events

    @property
    def running(self) -> bool:
        """Whether its process has not ended, by itself or by a signal."""
        return ") Z " not in Path(f"/proc/{self.pid}/stat").read_text()

    def signal(self, number: signal.Signals) -> float:
        """Send it a signal; return the time, on the monotonic clock."""
        # Only this class reaps the process, so the id cannot be another process's.
        assert self.exit_code is None
        os.kill(self.pid, number)
        return time.monotonic()

    def stop(self) -> None:
        """Stop it, and wait until no thread of it runs."""
        self.signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")

        def none_runs() -> bool:
            try:
                states = [(task / "stat").read_text() for task in tasks.iterdir()]
            except (FileNotFoundError, ProcessLookupError):
                return False  # one that has just ended
            # The state follows the command, which is in brackets and may contain anything. A
            # process that was about to end may be dead instead.
            return all(state.rpartition(")")[2].split()[0] in "TZX" for state in states)

        until(none_runs)

    def strike(self, blow: Signals) -> float:
        """Kill or stop it, and wait until it is; return the time before that."""
        began = time.monotonic()
        if blow == signal.SIGSTOP:
            self.stop()
        else:
            self.signal(blow)
            assert self.exit(began + EXIT_SECS) == -blow
        return began

    def exit(self, by: float) -> int:
        """Its exit code; fails if it still runs at ``by`` (on the monotonic clock)."""
        if self.exit_code is None:
            if not self._ended(by):
                last_words = self._last_words()
                raise AssertionError(f"rank {self.number} did not exit in time\n{last_words}")
            self.exit_code = self._forge.reap(self.pid)
        return self.exit_code

    def is_refused(self, first: Rank) -> None:
        """Check that it ends with an error that names it and the process that has its rank."""
        assert self.exit(time.monotonic() + EXIT_SECS + GRACE_SECS) == 1
        host = socket.gethostname()
        for said in (
            f"is held by process {first.pid} on {host}",
            f"process {self.pid} on {host} is refused",
        ):
            assert said in self.stderr, self.stderr

    def _ended(self, by: float) -> bool:
        process = os.pidfd_open(self.pid)
        try:
            # The process is not to blame for a busy machine.
            for until in (by, by + waited_for_processor(self.pid)):
                if select.select([process], [], [], max(0.0, until - time.monotonic()))[0]:
                    return True
            return False
        finally:
            os.close(process)

    def _last_words(self) -> str:
        """Its stderr; if it still runs, abort it first, so that its threads' stacks come last."""
        if self.exit_code is None:
            self.signal(signal.SIGABRT)
            self.signal(signal.SIGCONT)
            self._ended(time.monotonic() + PATIENCE_SECS)
        return self.stderr

    @property
    def stderr(self) -> str:
        """Its stderr, without c10d's complaints about a resolver that knows no names."""
        lines = os.pread(self._stderr.fileno(), 1 << 20, 0).decode().splitlines(keepends=True)
        return "".join(line for line in lines if NO_HOST_NAME not in line)

    def dispose(self) -> None:
        """End it, if it has not ended, and close its files."""
        if self.exit_code is None:
            self.signal(signal.SIGKILL)
            self.exit(time.monotonic() + PATIENCE_SECS)
        for fd in (self._stdin, self._stdout):
            os.close(fd)
        self._stderr.close()

    def _hear(self, heard: Callable[[], bool], within_secs: float) -> None:
        deadline = time.monotonic() + within_secs
        while not heard():
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not self._read(remaining):
                how = "says nothing" if remaining <= 0 else "has ended"
                raise AssertionError(f"rank {self.number} {how}\n{self._last_words()}")

    def _read(self, within_secs: float) -> bool:
        """Read what it reported; False at the end of its stdout."""
        if not select.select([self._stdout], [], [], within_secs)[0]:
            return True
        chunk = os.read(self._stdout, 1 << 20)
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        for line in lines:
            # Anything else that is printed is not JSON, and fails here.
            said = json.loads(line)
            if "to" in said:
                self._answers[said.pop("to")] = said
            else:
                self.events.append(said)
        return bool(chunk)


class Call:
    """A command to a rank."""

    def __init__(self, rank: Rank, number: int) -> None:
        self.rank = rank
        self.number = number
        self.started = time.monotonic()

    @property
    def answered(self) -> bool:
        return self.rank.answered(self.number)

    def answer(self, within_secs: float = PATIENCE_SECS) -> dict[str, Any]:
        """The result or the facts of the error, with the times when the call began and ended."""
        return self.rank.answer_to(self.number, within_secs)

    def released(self, within_secs: float = PATIENCE_SECS) -> dict[str, Any]:
        """The result; fails if it ended in an error."""
        answer = self.answer(within_secs)
        assert "error" not in answer, answer
        return answer

    def error(self, kind: str, within_secs: float = PATIENCE_SECS) -> dict[str, Any]:
        """The facts of the error of ``kind`` that it must end in."""
        answer = self.answer(within_secs)
        assert answer.get("error") == kind, answer
        return answer


class Job:
    """All ranks of one world, and the store where they meet.

    ``homes`` are the network namespaces of the ranks, if not this process's. The store is where
    rank 0 is, at ``host``. With a larger ``world_size``, the last ranks never come.
    """

    def __init__(
        self,
        forge: Forge,
        size: int,
        *,
        own_store: bool,
        backends: Sequence[str] = BACKENDS,
        host: str = "127.0.0.1",
        homes: Sequence[str | None] = (),
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        self.size = size
        self._homes = list(homes) or [None] * size
        self.ranks: list[Rank] = []
        self._former: list[Rank] = []
        self._forge = forge
        self._observer: TCPStore | None = None
        if own_store:
            port = free_port()
        else:
            self._observer = self._by_the_store(
                lambda: TCPStore(host, 0, is_master=True, wait_for_workers=False)
            )
            port = self._observer.port
        self._backends = backends
        self._host = host
        self._options = {
            **{"host": host, "port": port, "size": world_size or size, "own_store": own_store},
            **options,
        }

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for rank in (*self.ranks, *self._former):
            rank.dispose()

    def start(self, lanes: int) -> Job:
        """Fork all ranks, on alternating backends. Each opens ``lanes`` connections, so that no
        deadline in a test depends on the time to connect."""
        self.ranks = [self._fork(number) for number in range(self.size)]
        for rank in self.ranks:
            rank.connects()
        if self._observer is None:
            self._observer = self._by_the_store(
                lambda: TCPStore(self._host, self._options["port"], wait_for_workers=False)
            )
        calls = [self.starts(range(self.size), name=f"warm-up {lane}") for lane in range(lanes)]
        for call in itertools.chain(*calls):
            call.released()
        return self

    def _fork(self, number: int, **options: Any) -> Rank:
        backend = self._backends[number % len(self._backends)]
        who = {"rank": number, "backend": backend, "home": self._homes[number]}
        return Rank(self._forge, {**who, **self._options, **options})

    def another(self, number: int, **options: Any) -> Rank:
        """A second process with the number of a rank."""
        rank = self._fork(number, **options)
        self._former.append(rank)
        return rank

    def _by_the_store(self, call: Callable[[], T]) -> T:
        home = self._homes[0]
        return call() if home is None else networks.inside(home, call)

    @property
    def store(self) -> Any:
        """The test's own handle of the store."""
        # torch's stubs lack half of the stores' methods.
        assert self._observer is not None
        return self._observer

    def lose_store(self) -> None:
        """End the server of the store, which runs in this process."""
        self._observer = None

    def starts(self, ranks: Iterable[int], do: str = "cross", **arguments: Any) -> list[Call]:
        """Tell several ranks to start the same."""
        return [self.ranks[number].start(do, **arguments) for number in ranks]

    def state(self) -> dict[str, Any]:
        """The generation in force."""
        found: dict[str, Any] = json.loads(self.store.get(Keys(PREFIX).state))
        return found

    def own(self) -> GenerationKeys:
        """The keys of the generation in force."""
        return Keys(PREFIX).generation(self.state()["identity"])

    def entered(
        self, *ranks: int, name: str = "", sequence: int = 0, generation: int | None = None
    ) -> None:
        """Wait until ``ranks`` have arrived in a phase that is not over.

        Until all have joined a generation, its phases are numbered apart.
        """
        store = self.store

        def they_have() -> bool:
            state = self.state()
            if generation is not None and state["number"] != generation:
                return False
            own = Keys(PREFIX).generation(state["identity"])
            for label in (f"{sequence}", f"e{sequence}"):
                log = own.phase(name, label).log
                value = store.compare_set(log, "?", "?")
                # The kind of call may follow the rank's number.
                if value != b"?" and {*ranks} <= {int(x.split()[0]) for x in value.splitlines()}:
                    return True
            return False

        until(they_have)

    def crosses(self, name: str = "") -> list[dict[str, Any]]:
        """Tell all to cross ``name``; return their results, which agree on the phase."""
        calls = self.starts(range(self.size), name=name)
        answers = [call.released() for call in calls]
        assert len({(a["name"], a["sequence"]) for a in answers}) == 1, answers
        # A rank that waited for nobody may not know which rank came last.
        assert len({a["last_rank"] for a in answers} - {None}) <= 1, answers
        return answers

    def come_back(self, *numbers: int, **options: Any) -> None:
        """Start the ranks' processes anew, all at once, whether the former ones live or not."""
        self._former += [self.ranks[number] for number in numbers]
        for number in numbers:
            self.ranks[number] = self._fork(number, **options)
        for number in numbers:
            self.ranks[number].connects()

    def all_join(self, generation: int, *, but: int | None = None) -> None:
        """Make every rank that has not joined yet hear that its generation is over, and join."""
        store = self.store
        numbers = [number for number in range(self.size) if number != but]
        keys = [Keys(PREFIX).member(number) for number in numbers]

        def they_have() -> bool:
            for call in self.starts(numbers, "connect"):
                call.answer()
            state = self.state()
            return state["number"] == generation and all(
                json.loads(store.get(key))["generation"] == state["identity"] for key in keys
            )

        until(they_have)

    def ends(self, within_secs: float | None = None, *, quietly: bool = True) -> None:
        """Tell all living ranks to end; each must exit with 0 and print nothing."""
        left = [rank for rank in self.ranks if rank.exit_code is None]
        if within_secs is None:
            # Two processors need time to end many interpreters at once.
            within_secs = EXIT_SECS * max(1, (len(left) + 1) // 2)
        for rank in left:
            rank.start("end")
        by = time.monotonic() + within_secs
        for rank in left:
            assert rank.exit(by) == 0, rank.stderr
        for rank in left:
            assert not any(crash in rank.stderr for crash in CRASHES), rank.stderr
            assert not (quietly and rank.stderr), rank.stderr


# Forks all ranks of a world. They end with the test.
StartJob = Callable[..., Job]


def until(
    condition: Callable[[], bool],
    within_secs: float = PATIENCE_SECS,
    else_say: Callable[[], object] = str,
) -> None:
    """Wait for ``condition``; a bound that is missed is an error, never luck.

    :param else_say: the text of that error
    """
    deadline = time.monotonic() + within_secs
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_secs:g} s {else_say()}")
        time.sleep(0.003)
