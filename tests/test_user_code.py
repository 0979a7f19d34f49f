"""What users hand in and get back: exceptions of any kind, ``publish``, ``on_progress``."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio
from reports import TOLD_SECS, job, one, serve
from worlds import Tasks, gather

from async_barriers import (
    BarrierClosedError,
    BarrierError,
    BarrierProgress,
    BarrierTimeoutError,
    BrokenBarrierError,
)

pytestmark = pytest.mark.anyio

# A reason, with what stands around it.
LONGEST = 2000


# -- Exceptions ------------------------------------------------------------------------------------


async def upload() -> None:
    raise OSError(28, "No space left on device", "/ckpt/shard-1")


async def in_an_anyio_group() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(upload)


async def in_a_group_of_a_group() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep, 30)
        tasks.start_soon(in_an_anyio_group)


async def in_asyncios_group() -> None:
    async with asyncio.TaskGroup() as tasks:  # type: ignore[attr-defined,unused-ignore]
        tasks.create_task(upload())


async def in_a_nursery() -> None:
    async with trio.open_nursery() as tasks:
        tasks.start_soon(upload)


class Wicked(Exception):
    """Cannot be described."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Exits(Exception):
    """Ends the program of whoever describes it."""

    def __str__(self) -> str:
        raise SystemExit(3)


class Interrupts(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


class NoGroup(Exception):
    """Has what a group has, and cannot be looked at."""

    @property
    def exceptions(self) -> Any:
        raise RuntimeError("no parts")


class Circle(Exception):
    """A group of itself."""

    @property
    def exceptions(self) -> Any:
        return (self,)


async def raises_no_group() -> None:
    raise NoGroup("the disk is full")


async def raises_a_circle() -> None:
    raise Circle("round")


async def raises_what_cannot_be_described() -> None:
    raise Wicked


async def raises_what_exits() -> None:
    raise Exits


async def raises_what_interrupts() -> None:
    raise Interrupts


async def raises_a_novel() -> None:
    raise ValueError("line one\nline two\r\x1b[31m\0" + "x" * 1_000_000)


async def raises_a_chain() -> None:
    try:
        await upload()
    except OSError as exc:
        raise RuntimeError("the save failed") from exc


def fails(body: Callable[[], Awaitable[None]], said: str, *loops: str) -> list[Any]:
    return [
        pytest.param(loop, body, said, id=f"{body.__name__}-{loop}")
        for loop in loops or ("asyncio", "trio")
    ]


@pytest.mark.parametrize(
    ("anyio_backend", "body", "said"),
    [
        *fails(in_an_anyio_group, "No space left on device"),
        *fails(in_a_group_of_a_group, "No space left on device"),
        *(
            fails(in_asyncios_group, "No space left", "asyncio")
            if sys.version_info >= (3, 11)
            else []
        ),
        *fails(in_a_nursery, "No space left on device", "trio"),
        *fails(raises_what_cannot_be_described, "Wicked"),
        *fails(raises_what_exits, "Exits: (it cannot be described"),
        *fails(raises_what_interrupts, "Interrupts: (it cannot be described"),
        *fails(raises_no_group, "NoGroup: the disk is full"),
        *fails(raises_a_circle, "Circle: round"),
        *fails(raises_a_novel, "ValueError: line one"),
        *fails(raises_a_chain, "the save failed"),
    ],
)
@pytest.mark.parametrize("where", ["phase", "publish", "async with"])
async def test_what_failed_is_what_peers_are_told(
    body: Callable[[], Awaitable[None]], said: str, where: str
) -> None:
    """At once, in one line that is not too long; and whose body it was gets its own exception."""
    async with job(serve(), 2) as ranks, Tasks() as tasks:

        async def publish(payloads: object) -> None:
            await body()

        async def program() -> None:
            if where == "publish":
                await ranks[0].commit(publish, name="saved")
            elif where == "phase":
                async with ranks[0].phase("saved"):
                    await body()
            else:
                async with ranks[0]:
                    await body()

        if where == "publish":
            waiting = tasks.start(partial(ranks[1].commit, publish, name="saved"))
        else:
            waiting = tasks.start(partial(ranks[1].execute_barrier, "saved"))
        await anyio.sleep(0.05)
        began = time.monotonic()
        failed = tasks.start(program)
        error = await waiting.raised(BrokenBarrierError)
        assert time.monotonic() < began + TOLD_SECS
        assert error.rank == 0
        for text in (error.reason, str(error)):
            assert said in text
            assert len(text) < LONGEST
            assert text.isprintable()
        own = await failed.raised(Exception)  # type: ignore[type-abstract,unused-ignore]
        assert not isinstance(own, BarrierError)


# -- publish ---------------------------------------------------------------------------------------


async def test_a_plain_function_publishes() -> None:
    """It runs once, on the leader, in a thread of the library's; what it returns is what all
    get, and the loop goes on meanwhile."""
    ran: list[str] = []

    def publish(payloads: Mapping[int, bytes]) -> bytes:
        ran.append(threading.current_thread().name)
        time.sleep(0.2)
        return b"+".join(payloads[rank] for rank in sorted(payloads))

    async with job(serve(), 2) as ranks:
        results = await gather(
            partial(rank.commit, publish, payload=b"%d" % number)
            for number, rank in enumerate(ranks)
        )
        assert results == [b"0+1"] * 2
        (thread,) = ran
        assert thread.startswith("async_barriers")


async def test_what_publishes_sees_its_callers_context() -> None:
    """A plain function too, as in `asyncio.to_thread`: a trace or a logging id stays."""
    job_id = contextvars.ContextVar("job_id", default="none")
    job_id.set("job 7")

    async def awaited(payloads: object) -> bytes:
        return job_id.get().encode()

    def plain(payloads: object) -> bytes:
        return job_id.get().encode()

    async with job(serve(), 2) as ranks:
        for publish in (awaited, plain):
            results = await gather(partial(rank.commit, publish) for rank in ranks)
            assert results == [b"job 7"] * 2


async def test_a_plain_function_that_fails() -> None:
    """Its exception is the leader's, and its peers are told."""

    def publish(payloads: object) -> None:
        raise OSError(28, "No space left on device")

    async with job(serve(), 2) as ranks, Tasks() as tasks:
        calls = [tasks.start(partial(rank.commit, publish)) for rank in ranks]
        assert (await calls[0].raised(OSError)).errno == 28
        error = await calls[1].raised(BrokenBarrierError)
        assert error.rank == 0
        assert "No space left on device" in error.reason


@pytest.mark.parametrize("publish", [None, b"published", 42])
async def test_what_cannot_publish(publish: Any) -> None:
    """It is refused before anything is entered, on whichever rank."""
    async with job(serve(), 2) as ranks:
        for rank in ranks:
            with pytest.raises(TypeError, match="publish"):
                await rank.commit(publish)

        async def publishes(payloads: object) -> bytes:
            return b"published"

        results = await gather(partial(rank.commit, publishes) for rank in ranks)
        assert results == [b"published"] * 2


async def returns_text(payloads: object) -> Any:
    return "step-1"


def returns_a_number(payloads: object) -> Any:
    return 42


class Callee:
    """What is called is the object."""

    async def __call__(self, payloads: object) -> Any:
        return [b"step-1"]


@pytest.mark.parametrize("publish", [returns_text, returns_a_number, Callee()])
async def test_what_is_no_result(publish: Any) -> None:
    """All ranks get the same error, which says so and leaves it in doubt: it may have published."""
    async with job(serve(), 3) as ranks, Tasks() as tasks:
        calls = [tasks.start(partial(rank.commit, publish, leader=1)) for rank in ranks]
        errors = [await call.raised(BarrierError) for call in calls]
        assert [error.in_doubt for error in errors] == [True] * 3
        assert len({(type(error), str(error)) for error in errors}) == 1
        assert "publish" in str(errors[0])
        assert {"str", "int", "list"} & set(str(errors[0]).replace("'", " ").split())
        results = await gather(rank.execute_barrier for rank in ranks)
        assert len({result.sequence for result in results}) == 1


@pytest.mark.parametrize("result", [None, b"", b"\0\n", b"x" * 100_000], ids=["0", "1", "2", "3"])
async def test_what_is_a_result(result: bytes | None) -> None:
    """Bytes of any kind, or None, which is none."""

    async def publish(payloads: object) -> bytes | None:
        return result

    async with job(serve(), 2) as ranks:
        results = await gather(partial(rank.commit, publish) for rank in ranks)
        assert results == [result or b""] * 2


async def test_a_publish_that_fails_by_another_barrier() -> None:
    """Its error says of which barrier it is, on the leader too."""
    server = serve()
    async with job(server, 2, prefix="save") as ranks, Tasks() as tasks:
        inner = one(server, 0, 2, prefix="index")

        async def publish(payloads: object) -> None:
            await inner.execute_barrier("x", timeout_secs=0.3)

        calls = [tasks.start(partial(rank.commit, publish)) for rank in ranks]
        error = await calls[0].raised(BarrierTimeoutError)
        assert (error.prefix, error.name) == ("index", "x")
        assert str(error).startswith("barrier 'index/x' #0")
        assert "'index/x'" in (await calls[1].raised(BrokenBarrierError)).reason
        await inner.aclose()


# -- on_progress -----------------------------------------------------------------------------------


async def test_on_progress_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    """The phase goes on, it is called again, and the log says what it raised."""
    calls: list[BarrierProgress] = []

    def on_progress(progress: BarrierProgress) -> None:
        calls.append(progress)
        raise Wicked

    options = {"warn_after_secs": 0.1, "on_progress": on_progress}
    async with job(serve(), 2, **options) as ranks, Tasks() as tasks:
        waiting = tasks.start(partial(ranks[0].execute_barrier, "x"))
        with anyio.fail_after(5):
            while len(calls) < 2:
                await anyio.sleep(0.01)
        await ranks[1].execute_barrier("x")
        assert (await waiting.returned()).sequence == 0
    assert calls[0].missing_ranks == (1,)
    assert "Wicked" in caplog.text or "on_progress" in caplog.text


async def test_what_cannot_be_called_on_progress() -> None:
    """It is refused where the barrier is built."""
    for wrong in ("often", upload):
        with pytest.raises(TypeError, match="on_progress"):
            one(serve(), 0, 2, on_progress=wrong)


# -- event loops -----------------------------------------------------------------------------------


async def test_two_loops_at_once() -> None:
    """The second is told so while the first waits, which goes on. Closing there ends the wait."""
    async with job(serve(), 2) as ranks, Tasks() as tasks:

        async def elsewhere(call: Callable[[], Awaitable[object]]) -> object:
            async def main() -> object:
                return await call()

            return await anyio.to_thread.run_sync(anyio.run, main)

        waiting = tasks.start(partial(ranks[0].execute_barrier, "x"))
        await anyio.sleep(0.05)
        with pytest.raises(RuntimeError, match="in use on the event loop of another thread"):
            await elsewhere(partial(ranks[0].execute_barrier, "y"))
        await ranks[1].execute_barrier("x")
        assert (await waiting.returned()).sequence == 0
        waiting = tasks.start(partial(ranks[1].execute_barrier, "z"))
        await anyio.sleep(0.05)
        await elsewhere(ranks[1].aclose)
        await waiting.raised(BarrierClosedError)
