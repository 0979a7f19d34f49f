"""The doctor: what it finds, what it advises, and that it ends, whatever is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from typing import Any

import anyio
import doctor_rank
import pytest
from processes import Forge, Rank
from torch.distributed import HashStore, TCPStore
from worlds import Tasks, free_port, gather

from async_barriers import BarrierConnectionError, BrokenBarrierError
from async_barriers.__main__ import main
from async_barriers._doctor import measure
from async_barriers._doctor.measure import Facts, Spread
from async_barriers._doctor.report import Finding, Report, of_error, of_facts
from async_barriers._store.sources import PassedIn
from async_barriers.testing import FaultyStore, local_barriers

QUICK = Spread(0.001, 0.002)
HEALTHY = [
    Facts(rank, 3, 0, "host", {"torch": "2.13.0"}, 0.01, QUICK, QUICK, QUICK, {0: 4, 1: 3, 2: 3})
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

    def judge(ranks: list[Facts]) -> bool:
        seen.append(ranks)
        return len(seen) == 1

    async with local_barriers(3, store=store) as barriers:
        for verdict in (True, False):

            async def examine(barrier: Any) -> bool:
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
                barriers[0], PassedIn(store), lambda ranks: True, crossings=5, timeout_secs=5
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
    """Different versions, sizes and generations are problems that name the ranks."""
    for change, text in (
        ({"versions": {"torch": "2.14.0"}}, "version of torch: 2.13.0 on ranks 0, 2; 2.14.0 on"),
        ({"world_size": 4}, "world size: 3 on ranks 0, 2; 4 on rank 1"),
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
        ({"connect_secs": 5.0}, "rank 1 took longer than 1 s to open a connection"),
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
            *(sys.executable, "-m", "async_barriers", "doctor", "--json"),
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


@pytest.mark.processes
@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_is_missing_or_looks_elsewhere(forge: Forge, missing: int) -> None:
    """Who did not come is said once, by the lowest rank there; who is cut off says so itself."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    elsewhere = free_port()
    environment = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
    }
    ranks = [
        Rank(
            forge,
            {
                "rank": rank,
                "backend": "asyncio",
                "program": doctor_rank.__name__,
                "arguments": ["--json", "--timeout-secs", "1.5"],
                "environment": {
                    **environment,
                    "RANK": str(rank),
                    "MASTER_PORT": str(elsewhere if rank == missing else server.port),
                },
            },
        )
        for rank in range(3)
    ]
    try:
        by = time.monotonic() + 10
        assert [(rank.exit(by), rank.stderr) for rank in ranks] == [(1, "")] * 3
        cut_off, speaker, silent = sorted(ranks, key=lambda rank: rank.number != missing)
        (problem,) = cut_off.event()["problems"]
        assert f"nothing answers at 127.0.0.1:{elsewhere}" in problem["remedy"]
        (problem,) = speaker.event()["problems"]
        assert f"rank {missing} had not entered" in problem["what"]
        with pytest.raises(AssertionError, match="has ended"):
            silent.event()
    finally:
        for rank in ranks:
            rank.dispose()
