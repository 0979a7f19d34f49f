"""A TCPStore's server, and a proxy in front of it that counts what each rank sends and gets."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing.sharedctypes
import struct
import threading
import time
from collections import Counter
from collections.abc import Generator
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

HOST = "127.0.0.1"
# c10d's wire format: what follows each opcode. s: a string, q: a 64-bit integer, I: a 32-bit
# one, and behind * a list of what follows.
_REQUESTS = {
    0: ("validate", "I"),
    1: ("set", "ss"),
    2: ("compare_set", "sss"),
    3: ("get", "s"),
    4: ("add", "sq"),
    5: ("check", "*s"),
    6: ("wait", "*s"),
    7: ("num_keys", ""),
    8: ("delete", "s"),
    9: ("append", "ss"),
    10: ("multi_get", "*s"),
    11: ("multi_set", "*ss"),
    12: ("cancel_wait", ""),
    13: ("ping", "I"),
    17: ("list_keys", ""),
    18: ("barrier", "sq"),
}


class Server:
    """A TCPStore's server in a process of its own; see `fleet.Fleet`."""

    def __init__(self, _: int) -> None:
        self._store = TCPStore(
            HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )

    def port(self) -> int:
        return self._store.port

    def cpu_secs(self) -> float:
        """Of all threads of this process so far, as in /proc/<pid>/stat, but finer."""
        return time.process_time()

    def bytes_sent(self) -> int:
        """To all ranks so far, and a few to the driver."""
        fields = Path("/proc/self/io").read_text().split()
        return int(fields[fields.index("wchar:") + 1])


class Traffic:
    """The traffic through the proxies of ``size`` ranks so far, in memory that processes share.

    A round trip is counted when the reply to at least one request comes back to the rank.
    """

    FIELDS = ("requests", "round_trips", "bytes_sent", "bytes_received")

    def __init__(self, size: int) -> None:
        self.size = size
        self._counts = multiprocessing.sharedctypes.RawArray(
            ctypes.c_longlong, size * len(self.FIELDS)
        )

    def add(self, rank: int, field: str, amount: int) -> None:
        self._counts[rank * len(self.FIELDS) + self.FIELDS.index(field)] += amount

    def of(self, rank: int) -> dict[str, int]:
        first = rank * len(self.FIELDS)
        return dict(zip(self.FIELDS, self._counts[first : first + len(self.FIELDS)], strict=True))

    def all(self) -> list[dict[str, int]]:
        return [self.of(rank) for rank in range(self.size)]

    def settled(self, still_secs: float) -> list[dict[str, int]]:
        """Block until there was no traffic for so long; return the counts."""
        before, since = self.all(), time.monotonic()
        while time.monotonic() - since < still_secs:
            time.sleep(still_secs / 10)
            if (now := self.all()) != before:
                before, since = now, time.monotonic()
        return before


def difference(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {field: after[field] - before[field] for field in after}


class Proxy:
    """A port for each rank, in a process of its own; see `fleet.Fleet`."""

    def __init__(self, _: int, server_port: int, traffic: Traffic) -> None:
        self.kinds: Counter[str] = Counter()
        self._server_port = server_port
        self._traffic = traffic
        self.delay_secs = 0.0
        self._ports: list[int] = []
        self._listening = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()

    def ports(self) -> list[int]:
        self._listening.wait()
        return self._ports

    def requests(self) -> dict[str, int]:
        """The number of requests of each kind so far."""
        return dict(self.kinds)

    def hold_back(self, delay_secs: float) -> None:
        """From now on, delay each reply by so much."""
        self.delay_secs = delay_secs

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        for rank in range(self._traffic.size):
            server = await loop.create_server(
                lambda rank=rank: _Client(self, rank),  # type: ignore[misc]
                HOST,
                0,
                backlog=64,
            )
            self._ports.append(server.sockets[0].getsockname()[1])
        self._listening.set()
        await asyncio.Event().wait()

    async def connect(self, client: _Client) -> _Upstream:
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(
            lambda: _Upstream(client, self), HOST, self._server_port
        )
        return upstream

    def count(self, rank: int, field: str, amount: int) -> None:
        self._traffic.add(rank, field, amount)


class _Client(asyncio.Protocol):
    """The rank's side of a connection."""

    def __init__(self, proxy: Proxy, rank: int) -> None:
        self._proxy = proxy
        self._rank = rank
        self._early = b""
        self._upstream: _Upstream | None = None
        self._parser = requests()
        next(self._parser)
        self._unanswered = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        self._upstream = await self._proxy.connect(self)
        if self.transport.is_closing():
            self._upstream.transport.close()
        elif self._early:
            self._upstream.transport.write(self._early)

    def data_received(self, data: bytes) -> None:
        self._unanswered = True
        kinds = self._parser.send(data)
        self._proxy.kinds.update(kinds)
        self._proxy.count(self._rank, "requests", len(kinds))
        self._proxy.count(self._rank, "bytes_sent", len(data))
        if self._upstream is None:
            self._early += data
        else:
            self._upstream.transport.write(data)

    def replied(self, data: bytes) -> None:
        if self._unanswered:
            self._unanswered = False
            self._proxy.count(self._rank, "round_trips", 1)
        self._proxy.count(self._rank, "bytes_received", len(data))
        self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._upstream is not None:
            self._upstream.transport.close()


class _Upstream(asyncio.Protocol):
    """The server's side of a connection."""

    def __init__(self, client: _Client, proxy: Proxy) -> None:
        self._client = client
        self._proxy = proxy

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if delay_secs := self._proxy.delay_secs:
            asyncio.get_running_loop().call_later(delay_secs, self._client.replied, data)
        else:
            self._client.replied(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.transport.close()


def requests() -> Generator[list[str], bytes, None]:
    """A coroutine that gets a client's bytes by ``send`` and yields the kinds of whole requests."""
    data = bytearray()
    kinds: list[str] = []
    while True:
        sent = yield kinds
        data += sent
        kinds = []
        while data and (end := _end_of_request(data)) is not None:
            kinds.append(_REQUESTS[data[0]][0])
            del data[:end]


def _end_of_request(data: bytearray) -> int | None:
    """Where the first request ends; None if it is not whole."""
    if data[0] not in _REQUESTS:
        raise ValueError(f"c10d sent an opcode that is new: {data[0]}")
    _, form = _REQUESTS[data[0]]
    at = 1
    try:
        if form.startswith("*"):
            form = form[1:] * int(struct.unpack_from("<Q", data, at)[0])
            at += 8
        for part in form:
            if part == "s":
                at += 8 + int(struct.unpack_from("<Q", data, at)[0])
            else:
                at += struct.calcsize(f"<{part}")
    except struct.error:
        return None
    return at if at <= len(data) else None
