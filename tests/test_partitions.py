"""Networks that lose packets without a word: every await ends in time, and no rank guesses."""

from __future__ import annotations

import re
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from networks import HUB_ADDRESS, Network, what_is_lacking
from processes import CRASHES, EXIT_SECS, GRACE_SECS, Call, Job, Rank, StartJob, until

pytestmark = pytest.mark.processes

SHORT_SECS = 2.0
# Of ranks that must see what their peers, whose deadlines are shorter, gave up.
LONGER_SECS = SHORT_SECS + 1.5
LONG_SECS = 25.0
# TCP tries a lost packet again after twice the time it waited before.
REPAIRED_SECS = 6.0

# A host gives its peers three seconds to learn their verdicts.
HOST_CLOSES_SECS = 4.5
# As the interpreter ends it, or as a shell reports it.
INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)

NEAR, FAR = (0, 1), (2, 3)
ALL = NEAR + FAR


@pytest.fixture(scope="module")
def laid() -> Iterator[Network]:
    """A hub with two spokes, for all tests here."""
    if (reason := what_is_lacking()) is not None:
        pytest.skip(reason)
    with Network(2) as made:
        yield made


@pytest.fixture
def network(laid: Network) -> Iterator[Network]:
    """A network that is whole when a test begins."""
    yield laid
    laid.heal()


@pytest.fixture
def start_far(start_job: StartJob, network: Network) -> StartJob:
    """Starts ranks 0 and 1 where the store is and the others far from it, each on its spoke."""
    homes = [network.hub, network.hub, *(spoke.name for spoke in network.spokes)]

    def start(size: int = 4, **options: Any) -> Job:
        return start_job(size, host=HUB_ADDRESS, homes=homes[:size], **options)

    return start


def no_key_stays(job: Job, *names: str) -> None:
    """Wait until all keys of phases are deleted, or all of ``names``."""
    store, marks = job.store, [f":{name}/" for name in names] or ["/phase/"]
    until(lambda: not any(mark in key for key in store.list_keys() for mark in marks))


class Beliefs:
    """What each rank says became of each phase."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)

    def hear(self, call: Call, name: str, within_secs: float, sequence: int = 0) -> dict[str, Any]:
        """What came of a call, ``within_secs`` of its beginning."""
        answer = call.answer()
        assert answer["ended"] - answer["began"] < within_secs, answer
        assert (answer.get("name", name), answer.get("sequence", sequence)) == (name, sequence)
        self._of[name, sequence][call.rank.number] = answer["belief"] = belief(answer)
        return answer

    def agree(self) -> None:
        """Nobody was released from a phase that others saw broken or did not enter."""
        for phase, by_rank in self._of.items():
            said = set(by_rank.values())
            assert not ("released" in said and said & {"broken", "not entered"}), (phase, by_rank)


def belief(answer: dict[str, Any]) -> str:
    """What a rank knows of a phase after a call that ended like this."""
    if answer.get("cancelled"):
        return "given up"
    if "error" not in answer:
        return "released"
    if answer.get("in_doubt"):
        return "in doubt"
    if answer["error"] in ("BarrierTimeoutError", "BrokenBarrierError"):
        return "broken"
    return "not entered"


def still_sending(rank: Rank) -> bool:
    """Whether connections that were closed where ``rank`` lives have something to deliver."""
    for table in ("tcp", "tcp6"):
        rows = Path(f"/proc/{rank.pid}/net/{table}").read_text().splitlines()[1:]
        # FIN_WAIT1, LAST_ACK and CLOSING.
        if any(row.split()[3] in ("04", "09", "0B") for row in rows):
            return True
    return False


@pytest.mark.parametrize(
    ("cut", "own_store"),
    [("both", True), ("both", False), ("deaf", True), ("mute", False)],
    ids=["both ways", "both ways, user's store", "nothing comes back", "nothing gets there"],
)
def test_two_ranks_are_cut_off(
    start_far: StartJob, network: Network, cut: str, own_store: bool
) -> None:
    """At whatever point of a phase: in time they say what they cannot know, and join again."""
    names = ["waiting", "decided", "last", "cancelled", "failed", "published"]
    job = start_far(own_store=own_store, lanes=len(names))
    beliefs = Beliefs()

    def crosses(name: str, ranks: tuple[int, ...], timeout_secs: float | None) -> list[Call]:
        return job.starts(ranks, name=name, timeout_secs=timeout_secs)

    waiting = crosses("waiting", FAR, SHORT_SECS) + crosses("waiting", (1,), LONGER_SECS)
    decided = crosses("decided", (1, *FAR), SHORT_SECS)
    last = crosses("last", NEAR, LONGER_SECS)
    cancelled = job.starts(FAR, "cross_until_cancelled", name="cancelled", timeout_secs=None)
    cancelled += crosses("cancelled", (1,), None)
    failed = crosses("failed", (1,), None)
    commit = {"name": "published", "publish": "wait", "leader": 2, "payload": "p"}
    published = [
        job.ranks[rank].start("commit", timeout_secs=secs, **commit)
        for rank, secs in ((0, SHORT_SECS), (1, None), (2, None), (3, SHORT_SECS))
    ]
    job.entered(1, *FAR, name="waiting")
    job.entered(1, *FAR, name="decided")
    job.entered(*NEAR, name="last")
    job.entered(1, *FAR, name="cancelled")
    job.entered(1, name="failed")
    assert job.ranks[2].event()["event"] == "publishing"
    # So that each has a connection to spare, for the one that will be entered last. And since a
    # rank departs with its next message: one that is lost would leave keys of these.
    job.crosses("spare")
    no_key_stays(job, "spare", *(f"warm-up {lane}" for lane in range(len(names))))

    for spoke in network.spokes:
        spoke.cut(cut)
    last += crosses("last", FAR, SHORT_SECS)
    failed += job.starts(FAR, "fail_before_entering", name="failed")
    decided += crosses("decided", (0,), SHORT_SECS)
    told = [job.ranks[2].start("give_word"), *job.starts(FAR, "cancel", name="cancelled")]

    # What a rank that is cut off sees in time.
    for call in (*waiting[:2], *decided[1:3], *last[2:]):
        name = "waiting" if call in waiting else "decided" if call in decided else "last"
        answer = beliefs.hear(call, name, SHORT_SECS + GRACE_SECS)
        # Where only the way to the store is cut, the bell is heard, but what it rings for
        # cannot be asked.
        assert answer["belief"] == "in doubt", answer
    for call, cancel in zip(cancelled[:2], told[1:], strict=True):
        answer = beliefs.hear(call, "cancelled", LONG_SECS)
        assert answer["cancelled"]
        assert answer["ended"] < cancel.answer()["began"] + GRACE_SECS
    for call in failed[1:]:
        answer = beliefs.hear(call, "failed", GRACE_SECS)
        assert (answer["error"], answer["text"]) == ("LookupError", "the body failed"), answer
    leader = beliefs.hear(published[2], "published", LONG_SECS)
    assert leader["ended"] < told[0].answer()["began"] + GRACE_SECS
    assert leader["belief"] == "in doubt"
    assert "rank 2 published" in leader["text"]
    answer = beliefs.hear(published[3], "published", SHORT_SECS + GRACE_SECS)
    assert answer["belief"] == "in doubt"

    # What those see that are not.
    (answer,) = (beliefs.hear(call, "waiting", LONGER_SECS + GRACE_SECS) for call in waiting[2:])
    assert (answer["error"], answer["missing_ranks"]) == ("BarrierTimeoutError", [0])
    for call in (decided[0], decided[3]):
        assert beliefs.hear(call, "decided", SHORT_SECS)["belief"] == "released"
    for call in last[:2]:
        answer = beliefs.hear(call, "last", LONGER_SECS + GRACE_SECS)
        if cut == "deaf":
            # Their arrivals came, and so the last one's answer alone was lost.
            assert answer["belief"] == "released"
        else:
            assert answer["missing_ranks"] == list(FAR)
            assert answer["belief"] == "broken"
    # A leader's word that came is final, though it never knew.
    answer = beliefs.hear(published[0], "published", SHORT_SECS + GRACE_SECS)
    assert answer["belief"] == ("released" if cut == "deaf" else "in doubt"), answer

    healed = time.monotonic()
    network.heal()
    # What they owe is made up for: nobody waits for ever.
    for call in (cancelled[2], failed[0], published[1]):
        name = "cancelled" if call in cancelled else "failed" if call in failed else "published"
        answer = beliefs.hear(call, name, LONG_SECS)
        assert answer["ended"] < healed + REPAIRED_SECS, answer
        if name == "published":
            assert answer["value"] == "p+p+p+p"
        else:
            assert answer["rank"] in FAR
    # Whoever comes late is told the same as all others.
    for name in ("waiting", "cancelled", "failed"):
        answer = beliefs.hear(job.ranks[0].start("cross", name=name), name, GRACE_SECS)
        assert answer["belief"] == "broken"
    calls = {name: job.starts(ALL, name=name, timeout_secs=LONG_SECS) for name in names}
    for name in names:
        for call in calls[name]:
            answer = beliefs.hear(call, name, REPAIRED_SECS, sequence=1)
            assert answer["belief"] == "released", answer
    beliefs.agree()
    # Also when all has come through that TCP still delivers: nothing that was sent too late.
    until(lambda: not any(still_sending(job.ranks[rank]) for rank in FAR))
    no_key_stays(job)
    job.ends(quietly=False)


def test_those_who_wait_are_told_that_a_rank_is_cut_off(
    start_far: StartJob, network: Network
) -> None:
    """It is silent, as its last word and for how long say; it counts as one that makes no progress,
    whatever it says where nobody hears it."""
    job = start_far(3, own_store=False, given={"warn_after_secs": 0.5, "timeout_secs": None})
    far = job.ranks[2]
    far.do("report", doing="uploaded 3 of 8 GB")
    waiting = job.starts(NEAR, name="save", timeout_secs=LONGER_SECS)
    until(lambda: "alive, 'uploaded 3 of 8 GB'" in job.ranks[0].stderr)
    network.spokes[0].cut("both")
    far.do("report", doing="uploaded all")
    for call in waiting:
        error = call.error("BarrierTimeoutError")
        ((rank, _, pid, state, doing, silent_secs),) = error["missing"]
        assert (rank, pid, state, doing) == (2, far.pid, "silent", "uploaded 3 of 8 GB"), error
        assert 1.0 < silent_secs < LONGER_SECS
        assert re.search(r"silent for [\d.]+ s, before that 'uploaded 3 of 8 GB'\)", error["text"])
    for call in job.starts(NEAR, name="hung", stalled_after_secs=1.0):
        error = call.error("BarrierTimeoutError")
        assert 1.0 <= error["ended"] - error["began"] < 2.5, error
        assert "rank 2 made no progress" in error["text"]
        assert [each[3] for each in error["missing"]] == ["silent"]


@pytest.mark.parametrize("own_store", [True, False], ids=["own store", "user's store"])
def test_a_cut_that_heals_in_time(start_far: StartJob, network: Network, own_store: bool) -> None:
    """Nobody is told of it: all are released, who waited, entered or connected meanwhile."""
    job = start_far(own_store=own_store, lanes=2)
    beliefs = Beliefs()
    waiting = job.starts((1, *FAR), name="waiting", timeout_secs=None)
    job.entered(1, *FAR, name="waiting")
    for spoke in network.spokes:
        spoke.cut("both")
    calls = {
        "waiting": waiting + job.starts((0,), name="waiting"),
        "entering": job.starts(ALL, name="entering", timeout_secs=LONG_SECS),
        # There are two connections on each rank, so that this one needs a new one.
        "connecting": job.starts(ALL, name="connecting", timeout_secs=LONG_SECS),
    }
    for call in waiting[0], calls["waiting"][3]:
        call.released()
    time.sleep(0.8)
    assert not any(call.answered for call in waiting[1:])
    healed = time.monotonic()
    network.heal()
    for name, of_all in calls.items():
        for call in of_all:
            answer = beliefs.hear(call, name, LONG_SECS)
            assert answer["belief"] == "released", answer
            assert answer["ended"] < healed + REPAIRED_SECS
    beliefs.agree()
    job.crosses("waiting")
    job.ends()


def test_ranks_close_while_cut_off(start_far: StartJob, network: Network) -> None:
    """It takes no longer; when they are built anew, those who waited for them are told."""
    job = start_far(own_store=False)
    beliefs = Beliefs()
    waiting = job.starts((1, *FAR), name="x", timeout_secs=None)
    job.entered(1, *FAR, name="x")
    for spoke in network.spokes:
        spoke.cut("both")
    for call in job.starts(FAR, "close"):
        answer = call.released()
        assert answer["ended"] - answer["began"] < 2 * GRACE_SECS
    for call in waiting[1:]:
        assert beliefs.hear(call, "x", LONG_SECS)["belief"] == "in doubt"
    network.heal()
    for call in job.starts(FAR, "build_anew"):
        call.released()
    answer = beliefs.hear(waiting[0], "x", LONG_SECS)
    assert answer["belief"] == "broken"
    assert answer["rank"] in FAR
    beliefs.agree()
    job.crosses("x")
    job.ends(quietly=False)


def test_the_host_closes_while_others_are_cut_off(start_far: StartJob, network: Network) -> None:
    """It waits for them for a moment only; they cannot know, and meet it again when it is back."""
    job = start_far(own_store=True)
    waiting = job.starts((1, *FAR), name="x", timeout_secs=SHORT_SECS)
    job.entered(1, *FAR, name="x")
    for spoke in network.spokes:
        spoke.cut("both")
    beliefs = Beliefs()
    closing = job.ranks[0].start("close")
    answer = beliefs.hear(waiting[0], "x", SHORT_SECS)
    assert (answer["belief"], answer["rank"]) == ("broken", 0)
    for call in waiting[1:]:
        answer = beliefs.hear(call, "x", SHORT_SECS + GRACE_SECS)
        assert answer["belief"] == "in doubt"
    answer = closing.released()
    assert answer["ended"] - answer["began"] < HOST_CLOSES_SECS
    network.heal()
    beliefs.agree()
    job.ranks[0].do("build_anew")
    job.crosses("x")
    job.ends(quietly=False)


def test_a_second_process_while_the_first_is_cut_off(start_far: StartJob, network: Network) -> None:
    """It is refused at once: that the first one lives can be seen, since both are on one machine,
    though neither can reach the other; and that one goes on when the network is well again."""
    job = start_far(own_store=False)
    waiting = job.starts((0, 1, 2), name="x", timeout_secs=None)
    job.entered(0, 1, 2, name="x")
    network.spokes[0].cut("both")
    job.another(2, home=network.hub).is_refused(job.ranks[2])
    job.another(2, home=network.spokes[1].name).is_refused(job.ranks[2])
    network.heal()
    waiting += job.starts((3,), name="x")
    assert {call.released()["sequence"] for call in waiting} == {0}
    job.ends()


@pytest.mark.parametrize("managed", [True, False], ids=["closed", "not closed"])
@pytest.mark.parametrize("how", ["interrupted", "exits", "raises"])
def test_ranks_exit_while_cut_off(
    start_far: StartJob, network: Network, how: str, managed: bool
) -> None:
    """However a rank ends, it does so in time, and nothing crashes (law 8)."""
    job = start_far(own_store=True, managed=managed)
    far = [job.ranks[rank] for rank in FAR]
    do = {"interrupted": "here_cross", "raises": "here_raise", "exits": "cross"}[how]
    for rank in far:
        rank.start(do, name="x")
    job.entered(*FAR, name="x")
    for spoke, cut in zip(network.spokes, ("both", "mute"), strict=True):
        spoke.cut(cut)
    told = [
        rank.signal(signal.SIGINT)
        if how == "interrupted"
        else rank.start("here_exit" if how == "exits" else "go").started
        for rank in far
    ]
    for rank, began in zip(far, told, strict=True):
        code = rank.exit(began + EXIT_SECS)
        assert code in {"exits": (3,), "raises": (1,), "interrupted": INTERRUPTED}[how]
        assert not any(crash in rank.stderr for crash in CRASHES), rank.stderr
