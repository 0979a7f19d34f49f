"""The doctor: what it finds, what it advises, and that it ends, whatever is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import anyio
import doctor_rank
import pytest
from fork_server import python
from processes import BACKENDS, CRASHES, NO_HOST_NAME, Forge, Rank, until
from torch.distributed import HashStore, TCPStore
from worlds import Tasks, free_port, gather

from async_barriers import BarrierConnectionError, BrokenBarrierError
from async_barriers.__main__ import check, main, parser
from async_barriers._client.process import new_life
from async_barriers._doctor import measure, roll
from async_barriers._doctor.measure import Facts, Spread
from async_barriers._doctor.report import Finding, Report, of_error, of_facts, of_roll
from async_barriers._doctor.roll import Entry
from async_barriers._store.sources import PassedIn
from async_barriers.testing import FaultyStore, local_barriers

# Parsed where no event loop runs: it reads files.
IMPATIENT = parser().parse_args(["doctor", "--timeout-secs", "0.7"])
QUICK = Spread(0.001, 0.002)
TORCH = {"torch": "2.13.0"}
HEALTHY = [
    Facts(
        rank, 3, 0, "host", {"torch": "2.13.0"}, 0.01, 0.01, QUICK, QUICK, QUICK, {0: 4, 1: 3, 2: 3}
    )
    for rank in range(3)
]


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.mark.anyio
async def test_every_rank_is_examined() -> None:
    """Facts of all ranks reach rank 0, whose judgement reaches all."""
    store = HashStore()
    seen: list[list[Facts]] = []

    def judge(ranks: list[Facts]) -> bytes:
        seen.append(ranks)
        return b"%d" % len(seen)

    async with local_barriers(3, store=store) as barriers:
        for verdict in (b"1", b"2"):

            async def examine(barrier: Any) -> bytes:
                return await measure.examine(
                    barrier, PassedIn(store), judge, crossings=20, timeout_secs=10
                )

            answers = await gather(lambda b=b: examine(b) for b in barriers)  # type: ignore[misc]
            assert answers == [verdict] * 3
    assert len(seen) == 2
    for rank, facts in enumerate(seen[0]):
        assert (facts.rank, facts.world_size, facts.generation) == (rank, 3, 0)
        assert sum(facts.last_ranks.values()) == 20
        assert 0 < facts.round_trip.median <= facts.round_trip.p99 < 10
        assert 0 < facts.crossing.median <= facts.crossing.p99 < 10
        assert facts.versions["anyio"]
    report = of_facts(seen[0])
    assert report.ok
    text = report.as_text()
    assert "All is well" in text
    assert len([line for line in text.splitlines() if line.lstrip()[:1] in ("0", "1", "2")]) == 3


@pytest.mark.anyio
async def test_a_rank_that_leaves_is_a_plain_error() -> None:
    """An error of a crossing under way comes out as it is, in no group."""
    store = HashStore()
    async with local_barriers(2, store=store, timeout_secs=5) as barriers, Tasks() as tasks:
        first = tasks.start(
            lambda: measure.examine(
                barriers[0], PassedIn(store), lambda ranks: b"", crossings=5, timeout_secs=5
            )
        )
        await barriers[1].execute_barrier("hello")
        await barriers[1].abort("gone", "crossing")
        assert (await first.raised(BrokenBarrierError)).rank == 1


@pytest.mark.anyio
async def test_a_store_that_hangs_is_not_waited_for() -> None:
    """Measuring ends within its time."""
    store = FaultyStore(HashStore())
    store.hang("check")
    with anyio.fail_after(2), pytest.raises(BarrierConnectionError, match="did not answer"):
        await measure._measure_store(PassedIn(store), 0.2)
    store.heal()


def test_what_ranks_disagree_on() -> None:
    """Different versions and generations are problems that name the ranks."""
    for change, text in (
        ({"versions": {"torch": "2.14.0"}}, "version of torch: 2.13.0 on ranks 0, 2; 2.14.0 on"),
        ({"generation": 1}, "generation: 0 on ranks 0, 2; 1 on rank 1"),
    ):
        ranks = [HEALTHY[0], replace(HEALTHY[1], **change), HEALTHY[2]]
        report = of_facts(ranks)
        assert not report.ok
        assert text in only(report.problems).what
        assert "Something is wrong" in report.as_text()
    assert of_facts(HEALTHY) == Report(HEALTHY)


def test_what_is_slow() -> None:
    """Slow connections, stores and loops and a straggler are noted, and are no problem."""
    late = Spread(0.06, 0.07)
    for change, text in (
        ({"names_secs": 5.0}, "name look-ups of rank 1 took up to 5 s"),
        ({"connect_secs": 5.0}, "rank 1 took up to 5 s for a first connection"),
        ({"round_trip": late}, "a round trip to the store takes rank 1 more than 10 ms"),
        ({"loop_lag": late}, "the event loop of rank 1 was held up for more than 50 ms"),
    ):
        report = of_facts([HEALTHY[0], replace(HEALTHY[1], **change), HEALTHY[2]])
        assert report.ok
        assert text in only(report.notes).what
        assert only(report.notes).remedy in report.as_text()
    often = [replace(facts, last_ranks={0: 1, 2: 9}) for facts in HEALTHY]
    assert not of_facts(often).notes
    # All wait long, and none is to blame.
    assert not of_facts([replace(facts, crossing=late) for facts in HEALTHY]).notes
    straggling = [replace(often[0], crossing=late), replace(often[1], crossing=late), often[2]]
    assert only(of_facts(straggling).notes).what.startswith("rank 2 was the last in 9 of 10")


def test_ranks_and_worlds_that_cannot_be() -> None:
    """A rank outside its world, and a world of none, are said; no world is too large to be told."""
    life = new_life(None)
    for rank, size, what in (
        (3, 3, "rank 3 (process"),
        (0, 0, "WORLD_SIZE is 0 for rank 0"),
        (0, 1 << 60, "ranks 1, 2, 3, "),
    ):
        text = of_roll([Entry(rank, size, life)], 30.0).as_text()
        assert f"PROBLEM: {what}" in text


def test_an_error_of_another_kind() -> None:
    """What went wrong is said as it was, with where to look."""
    finding = only(of_error(BrokenBarrierError("hello", 0, 2, "it fell over")).problems)
    assert "broken by rank 2: it fell over" in finding.what
    assert "rank that is named" in finding.remedy


def test_versions_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed as a package is said to be so."""

    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(measure, "version", version)
    assert measure.versions()["torch"] == "not installed"


def test_one_rank_reads_its_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A world of one is examined; a variable that is missing is named; a bad option is refused."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert main(["doctor"]) == 1
    assert "PROBLEM: MASTER_ADDR is not set" in capsys.readouterr().out
    # torchrun would end the other ranks; who wants that says so.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert main(["doctor", "--strict"]) == 1
    assert "PROBLEM: MASTER_ADDR is not set" in capsys.readouterr().out
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main(["doctor", "--crossings", "5"]) == 0
    assert "All is well" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["doctor", "--ranks", "0"])


@pytest.mark.processes
def test_alone_it_starts_ranks_of_its_own() -> None:
    """Outside a job it examines this machine; the exit status says whether all is well."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    ended = subprocess.run(
        [
            *(python(), "-m", "async_barriers", "doctor", "--json"),
            *("--ranks", "2", "--crossings", "20"),
        ],
        env={**environment, "OMP_NUM_THREADS": "1", "RES_OPTIONS": "attempts:0"},
        capture_output=True,
        text=True,
        timeout=35,
    )
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said["ok"]
    assert [facts["rank"] for facts in said["ranks"]] == [0, 1]


class Doctors:
    """Ranks of one job that run the doctor, each in a process, with variables set by hand."""

    def __init__(self, forge: Forge, variables: list[dict[str, Any]], *options: str) -> None:
        self.ranks: list[Rank] = []
        self._forge = forge
        self._options = options
        self.start(variables)

    def start(self, variables: list[dict[str, Any]]) -> None:
        """One process for each."""
        for own in variables:
            given = {
                "rank": int(own["RANK"]),
                "backend": BACKENDS[len(self.ranks) % 2],
                "program": doctor_rank.__name__,
                "arguments": ["--json", "--crossings", "20", *self._options],
                "environment": {name: str(value) for name, value in own.items()},
            }
            self.ranks.append(Rank(self._forge, given))

    def __enter__(self) -> Doctors:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.dispose()

    def problems(self) -> list[dict[str, str]]:
        """The one that each of them names; each fails, and prints one object and nothing else."""
        by = time.monotonic() + 15
        assert [(rank.exit(by), rank.stderr) for rank in self.ranks] == [(1, "")] * len(self.ranks)
        found = []
        for rank in self.ranks:
            said = rank.event()
            assert (said["ok"], said["rank"]) == (False, rank.number)
            (problem,) = said["problems"]
            found.append(problem)
            assert not rank.events
        return found


def job(*ranks: int, hosted: bool = True, port: int = 0, **changed: Any) -> list[dict[str, Any]]:
    """The variables of the ranks of a job of three."""
    whole = {"WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or free_port()}
    if not hosted:
        whole["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return [{**whole, "RANK": rank, **changed} for rank in ranks]


@pytest.mark.processes
@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_is_missing_or_looks_elsewhere(forge: Forge, missing: int) -> None:
    """Who did not come is said by every rank that did; who is cut off says so itself."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    elsewhere = free_port()
    variables = job(0, 1, 2, hosted=False, port=server.port)
    variables[missing]["MASTER_PORT"] = elsewhere
    with Doctors(forge, variables, "--timeout-secs", "1.5") as doctors:
        problems = doctors.problems()
    cut_off = problems.pop(missing)
    assert f"127.0.0.1:{elsewhere}" in cut_off["what"]
    assert cut_off["remedy"].startswith("refused: ")
    for problem in problems:
        assert f"rank {missing} did not come to the store within " in problem["what"]


@pytest.mark.processes
def test_a_rank_that_was_started_with_another_world_size(forge: Forge) -> None:
    """All ranks name the one that is off, also where it came first, or hosts the store."""
    for wrong in (0, 2):
        variables = job(0, 1, 2)
        variables[wrong]["WORLD_SIZE"] = 4
        with Doctors(forge, variables, "--timeout-secs", "10") as doctors:
            problems = doctors.problems()
            pid = doctors.ranks[wrong].pid
        for problem in problems:
            assert problem["what"].startswith(f"rank {wrong} (process {pid} on ")
            assert problem["what"].endswith(") was started with WORLD_SIZE=4, the other 2 with 3")


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [(0, 1, 1), (0, 1, 2, 1)])
def test_two_processes_with_one_rank(forge: Forge, ranks: tuple[int, ...]) -> None:
    """All processes name both of those, whether a rank is missing for that or not."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    hosted = 2 not in ranks
    variables = job(*ranks, hosted=hosted, port=0 if hosted else server.port)
    with Doctors(forge, [v for v in variables if v["RANK"] != 2], "--timeout-secs", "2") as doctors:
        if not hosted:
            # A world that is whole before the second one comes has no fault yet.
            until(lambda: server.add(roll._CAME, 0) == 3)
            doctors.start([v for v in variables if v["RANK"] == 2])
        by = time.monotonic() + 15
        assert [(rank.exit(by), rank.stderr) for rank in doctors.ranks] == [(1, "")] * len(ranks)
        for rank in doctors.ranks:
            problem, *more = rank.event()["problems"]
            assert problem["what"].startswith("2 processes are rank 1: ")
            assert problem["remedy"].startswith("duplicate rank: ")
            for other in doctors.ranks:
                if other.number == 1:
                    assert f"process {other.pid} on " in problem["what"]
            assert len(more) == (2 not in ranks)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ("name", "name: 'no-such-host.invalid' is not known"),
        ("refused", "refused: the machine 127.0.0.1 answers, but nothing listens"),
        ("no answer", "time-out: packets to 127.0.0.1:"),
        ("silent", "stays silent"),
        ("another service", "wrong service: another program listens"),
        ("taken", "end the process that holds the port"),
    ],
)
async def test_each_fault_has_its_advice(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str, advice: str
) -> None:
    """What a rank meets where the store should be is told apart, on one line."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(fault != "taken"))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if fault != "refused":
            listener.listen(0 if fault == "no answer" else 8)
        if fault == "no answer":
            # Its queue is full, so that what others send is dropped.
            for _ in range(2):
                other = stack.enter_context(socket.socket())
                other.setblocking(False)
                other.connect_ex(("127.0.0.1", port))
        if fault == "another service":
            stack.enter_context(talking(listener))
        variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": str(port)}
        variables["MASTER_ADDR"] = "no-such-host.invalid" if fault == "name" else "127.0.0.1"
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with anyio.fail_after(10):
            assert await check(IMPATIENT) == 1
    said = capfd.readouterr()
    assert said.err == ""
    (line,) = said.out.splitlines()
    assert line.startswith(f"rank 0 on {socket.gethostname()}: PROBLEM: ")
    assert advice in line


@contextlib.contextmanager
def talking(listener: socket.socket) -> Iterator[None]:
    """Has whoever connects told something that no store says."""

    def talk() -> None:
        with contextlib.suppress(OSError):
            while True:
                with listener.accept()[0] as accepted:
                    accepted.recv(4096)
                    accepted.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_help_says_what_the_defaults_are(capsys: pytest.CaptureFixture[str]) -> None:
    """And a time that is none is refused."""
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for default in ("(default: 30.0)", "(default: 200)", "(default: 3)"):
        assert default in shown
    with pytest.raises(SystemExit):
        main(["doctor", "--timeout-secs", "-1"])


@pytest.mark.processes
def test_under_torchrun_its_answer_is_the_last_word() -> None:
    """Every rank says its line before its launcher can end it, and no trace follows."""
    ended = subprocess.run(
        [
            *(python(), "-m", "torch.distributed.run", "--standalone", "--no-python"),
            *("--local-addr", "127.0.0.1", "--nproc-per-node", "2", "sh", "-c"),
            f"WORLD_SIZE=$((WORLD_SIZE + RANK)) exec {python()} -m async_barriers doctor",
        ],
        env={
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "RES_OPTIONS": "attempts:0"},
        },
        capture_output=True,
        text=True,
        timeout=35,
    )
    trace = [line for line in ended.stderr.splitlines() if NO_HOST_NAME not in line]
    assert (ended.returncode, trace) == (0, [])
    lines = sorted(ended.stdout.splitlines())
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert line.startswith(f"rank {rank} on ")
        assert "was started with WORLD_SIZE=2; rank 1 (" in line


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount another resolv.conf")
def test_a_resolver_that_is_silent_shows(tmp_path: Path) -> None:
    """Look-ups of names and first connections take as long as they do, and no process aborts."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.77.0.53\n")
    doctor = "-m async_barriers doctor --json --ranks 2 --crossings 20"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.77.0.53", 53))
        ended = subprocess.run(
            [
                *("unshare", "--mount", "sh", "-c"),
                f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && "
                f"exec {sys.executable} {doctor}",
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1"},
            capture_output=True,
            text=True,
            timeout=35,
        )
    assert ended.returncode == 0, ended.stderr
    assert not any(crash in ended.stderr for crash in CRASHES)
    said = json.loads(ended.stdout)
    assert all(facts["names_secs"] > 0.9 for facts in said["ranks"])
    assert any("name look-ups of ranks 0, 1 took up to" in note["what"] for note in said["notes"])
