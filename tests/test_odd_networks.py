"""Networks as they are: names with a dead address, IPv6, bytes that come in pieces, resets."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import pytest
from cuttable import Ways
from processes import PATIENCE_SECS
from rank_process import say
from reports import attempt, client, interpreter, one, relay, serve
from worlds import Tasks, close, free_port, gather, until

from async_barriers import BarrierResult, TCPStoreBarrier

# A network of its own, where what is sent to the first of the host's two addresses is lost: it goes
# into a cable whose other end is not meant.
GOOD, DEAD = "10.98.0.1", "2001:db8:9::2"
NETWORK = f"""
PATH="$PATH:/usr/sbin:/sbin"
ip link set lo up &&
ip address add {GOOD}/32 dev lo &&
ip link add near type veth peer name far && ip link set near up && ip link set far up &&
ip -6 address add 2001:db8:9::1/64 dev near nodad &&
ip -6 neighbour add {DEAD} lladdr 02:00:00:00:00:02 nud permanent dev near &&
mount --bind "$1" /etc/hosts && shift && exec "$@"
"""
NAME = "master.test"


def in_a_network(hosts: str) -> tuple[str, ...]:
    """What starts a program there."""
    return ("unshare", "--net", "--mount", "sh", "-c", NETWORK, "sh", hosts)


@pytest.fixture(scope="module")
def hosts() -> Iterator[str]:
    """A file with the name's addresses; skips where no network can be made."""
    if os.geteuid() or not (
        shutil.which("unshare") and shutil.which("ip", path="/usr/sbin:/sbin:/bin")
    ):
        pytest.skip("no network namespace can be made")
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(f"127.0.0.1 localhost\n{DEAD} {NAME}\n{GOOD} {NAME}\n")
        file.flush()
        tried = subprocess.run([*in_a_network(file.name), "true"], capture_output=True, check=False)
        if tried.returncode:
            pytest.skip(f"no network namespace can be made: {tried.stderr.decode()}")
        yield file.name


def two(addresses: tuple[str, str], port: int) -> list[TCPStoreBarrier]:
    """Ranks that know their store by different addresses."""
    return [
        TCPStoreBarrier(
            rank,
            2,
            tcpstore_port=port,
            master_address=address,
            timeout_secs=15,
            timeout_barrier_init_secs=10,
        )
        for rank, address in enumerate(addresses)
    ]


async def meets_by_name() -> None:
    """A program: rank 1 knows the host by its name."""
    addresses = [info[4][0] for info in socket.getaddrinfo(NAME, 1, type=socket.SOCK_STREAM)]
    began = time.monotonic()
    ranks = two((GOOD, NAME), 29611)
    await ranks[0].connect()
    ends = await gather(partial(attempt, rank.execute_barrier()) for rank in ranks)
    said = [None if isinstance(end, BarrierResult) else str(end) for end in ends]
    say(addresses=addresses, errors=said, secs=time.monotonic() - began)
    await close(ranks)


@pytest.mark.processes
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_name_whose_first_address_is_dead(hosts: str, backend: str) -> None:
    """The other one is tried in time to connect."""
    program = interpreter(meets_by_name, backend=backend, wrapper=in_a_network(hosts))
    out, errors = program.communicate(timeout=2 * PATIENCE_SECS)
    assert program.returncode == 0, errors
    said = json.loads(out)
    assert said["addresses"] == [DEAD, GOOD]
    assert said["errors"] == [None, None]
    assert said["secs"] < 10


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.anyio
@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 here")
@pytest.mark.parametrize("addresses", [("::1", "::1"), ("localhost", "::1")], ids="-".join)
async def test_an_ipv6_address(addresses: tuple[str, str]) -> None:
    """The host and its peers may know it by one."""
    ranks = two(addresses, free_port())
    await ranks[0].connect()
    results = await gather(rank.execute_barrier for rank in ranks)
    assert {result.sequence for result in results} == {0}
    await close(ranks)


def in_pieces(size: int, secs: float) -> Callable[[bytes], Iterator[bytes]]:
    """Passes on so many bytes at a time, with a pause after them."""

    def hook(chunk: bytes) -> Iterator[bytes]:
        for start in range(0, len(chunk), size):
            yield chunk[start : start + size]
            time.sleep(secs)

    return hook


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("up", "down"),
    [
        *((None, (size, 0.001)) for size in (1, 3, 4, 5, 8, 11)),
        ((7, 0.0003), None),
        ((50, 0.001), None),
        ((20, 0.001), (20, 0.001)),
    ],
    ids=str,
)
async def test_bytes_that_come_in_pieces(
    up: tuple[int, float] | None, down: tuple[int, float] | None
) -> None:
    """However few at a time, either way: what c10d's own client works through, a barrier does."""

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        return b"".join(payloads.values())

    # One by one, more bytes would take longer than a rank waits for the store.
    size = 200 if down is not None and down[0] == 1 else 500
    server = serve()
    with relay(server.port, up and in_pieces(*up), down and in_pieces(*down)) as way:
        ranks = [one(client(way.port), 0, 2), one(server, 1, 2)]
        await gather(rank.connect for rank in ranks)
        for _ in range(10):
            await gather(rank.execute_barrier for rank in ranks)
        published = await gather(
            partial(rank.commit, publish, payload=b"x" * size) for rank in ranks
        )
        assert published == [b"x" * 2 * size] * 2
        await close(ranks)


@pytest.mark.anyio
async def test_a_reset_that_threads_notice_late() -> None:
    """It costs no phase: c10d's client learns of it only as it is used, so none is used again that
    was there when the one that listens was lost."""
    server = serve()
    ways = Ways()
    way = ways.to(server.port)
    ranks = [one(client(way.port), 0, 2, worker_threads=True), one(server, 1, 2)]

    async def publish(payloads: Mapping[int, bytes]) -> bytes:
        return b"published"

    async def counted() -> bool:
        return any(phase.counted for phase in ranks[0]._session.open)

    async def listens_again() -> bool:
        return ranks[0].statistics().reconnections > 0 and ranks[0]._session._bell is not None

    try:
        # One connection that is spare, and one that a phase uses.
        async with Tasks() as tasks:
            waiting = tasks.start(partial(ranks[0].execute_barrier, "x"))
            await gather(partial(rank.execute_barrier, "y") for rank in ranks)
            await until(counted)
            way.cut("reset")
            way.heal()
            await until(listens_again)
            await ranks[1].execute_barrier("x")
            await waiting.returned()
        for name in ("x", "y"):
            await gather(partial(rank.execute_barrier, name) for rank in ranks)
            await gather(partial(rank.commit, publish, name=name) for rank in ranks)
        assert [rank.statistics().broken for rank in ranks] == [0, 0]
    finally:
        await close(ranks)
        ways.close()
