"""The saver: a checkpoint is complete on all ranks or on none, whatever becomes of whom."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync as in_thread
from blocking_world import World as BlockingWorld
from processes import PATIENCE_SECS, StartJob, until
from torch.distributed import HashStore
from worlds import Tasks, gather
from worlds import until as reached

from async_barriers import BarrierError, BrokenBarrierError, StoreBarrier
from async_barriers.blocking import BlockingBarrier
from async_barriers.saving import (
    BlockingSaver,
    Checkpoint,
    Directory,
    FsspecStorage,
    Part,
    Saver,
    Storage,
)
from async_barriers.testing import local_barriers

STORAGES = ("directory", "memory", "local")


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "directory":
        return Directory(tmp_path / "run")
    pytest.importorskip("fsspec", reason="needs the extra fsspec")
    if request.param == "memory":
        return FsspecStorage(f"memory://{uuid.uuid4().hex}")
    return FsspecStorage(f"file://{tmp_path}/run")


async def upload(state: Any, part: Part) -> dict[str, Any]:
    await part.write("state.json", json.dumps(state).encode())
    return {"sum": sum(state)}


def savers(barriers: list[Any], storage: Any, uploads: Any = upload, **options: Any) -> list[Saver]:
    return [
        Saver(barrier, storage, uploads, rank=rank, **options)
        for rank, barrier in enumerate(barriers)
    ]


async def save(savers: Sequence[Saver], step: int) -> list[Checkpoint]:
    return await gather([partial(saver.save, step, [step]) for saver in savers])


def text_of(storage: Storage, path: str) -> str:
    if isinstance(storage, FsspecStorage):
        return str(storage.fs.cat_file(path).decode())
    return Path(path).read_text()


def latest(storage: Storage) -> str:
    """What ``latest`` says; "" while there is none."""
    try:
        return text_of(storage, storage.path(0).removesuffix("step-0") + "latest")
    except FileNotFoundError:
        return ""


@pytest.mark.anyio
async def test_saves_are_found_and_the_last_ones_are_kept(storage: Storage) -> None:
    """All ranks find the newest complete checkpoint alike, and older ones than asked for go."""
    async with local_barriers(2, timeout_secs=10) as barriers:
        both = savers(barriers, storage, keep=2)
        assert await gather([saver.newest for saver in both]) == [None, None]
        for step in (1, 2, 3):
            await save(both, step)
            assert await in_thread(latest, storage) == f"step-{step}"
        found = await gather([saver.newest for saver in both])
        entries = ({"sum": 3}, {"sum": 3})
        assert found == [Checkpoint(3, storage.path(3), entries)] * 2
        # A complete one is not overwritten.
        async with Tasks() as tasks:
            for again in [tasks.start(partial(saver.save, 3, [9])) for saver in both]:
                await again.ended.wait()
                assert isinstance(again.error, FileExistsError | BrokenBarrierError)
        assert await in_thread(text_of, storage, f"{storage.path(3)}/rank-1/state.json") == "[3]"
    assert await in_thread(storage.steps) == [2, 3]
    with pytest.raises(FileNotFoundError):
        await in_thread(storage.manifest, 1)


@pytest.mark.anyio
async def test_a_failed_upload_leaves_the_checkpoint_before(storage: Storage) -> None:
    """Nobody's part counts, all learn why, and the next save works and tidies up."""

    async def fails(state: Any, part: Part) -> Any:
        if part.step == 2 and "rank-1" in part.path:
            raise OSError("disk full")
        return await upload(state, part)

    async with local_barriers(2, timeout_secs=10) as barriers:
        both = savers(barriers, storage, fails)
        await save(both, 1)
        async with Tasks() as tasks:
            first, second = (tasks.start(partial(saver.save, 2, [2])) for saver in both)
            assert "disk full" in (await first.raised(BrokenBarrierError)).reason
            await second.raised(OSError)
        assert (await in_thread(storage.steps), await in_thread(latest, storage)) == ([1], "step-1")
        await save(both, 3)
    assert await in_thread(storage.steps) == [1, 3]


def led(tasks: Tasks, call: Any, ended: anyio.Event, native: bool) -> Any:
    """Start it, as a task that is cancelled by a scope or by asyncio itself; how to cancel it."""
    if not native:
        outcome = tasks.start(call)
        tasks.start(partial(_forward, outcome.ended, ended))
        return outcome.scope.cancel
    task = asyncio.ensure_future(call())
    task.add_done_callback(lambda _: ended.set())
    return task.cancel


async def _forward(first: anyio.Event, then: anyio.Event) -> None:
    await first.wait()
    then.set()


@pytest.mark.anyio
@pytest.mark.parametrize("native", [False, True], ids=["scope", "task"])
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_cancelled_leader_completes_nothing_late(
    storage: Storage, native: bool, anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What peers are told is what readers see, wherever the leader is cancelled in its publish."""
    if native and anyio_backend == "trio":
        pytest.skip("trio has no cancellation of its own beside scopes")
    for step, where in enumerate(("prepare", "complete"), start=1):
        at, go_on = threading.Event(), threading.Event()
        real = getattr(storage, where)

        def slow(*args: Any, real: Any = real, at: Any = at, go_on: Any = go_on) -> None:
            at.set()
            go_on.wait(10)
            real(*args)

        monkeypatch.setattr(storage, where, slow)
        async with local_barriers(2, timeout_secs=10) as barriers:
            both = savers(barriers, storage)
            async with Tasks() as tasks:
                peer = tasks.start(partial(both[1].save, step, [1]))
                ended = anyio.Event()
                cancel = led(tasks, partial(both[0].save, step, [1]), ended, native)
                await in_thread(at.wait)
                cancel()
                if where == "prepare":
                    await ended.wait()
                    await peer.raised(BrokenBarrierError)
                    go_on.set()
                    await anyio.sleep(0.05)  # the thread may do now whatever it will
                    assert await in_thread(storage.steps) == []
                    assert await in_thread(latest, storage) == ""
                else:
                    await anyio.sleep(0.05)  # time for a save that does not wait to end
                    assert not ended.is_set()
                    go_on.set()
                    await ended.wait()
                    assert await peer.returned() == Checkpoint(step, storage.path(step))
                    assert await in_thread(storage.steps) == [step]

                    async def moved(step: int = step) -> bool:
                        return await in_thread(latest, storage) == f"step-{step}"

                    # In the background: a cancelled save does not wait for that.
                    await reached(moved)
        monkeypatch.setattr(storage, where, real)


@pytest.mark.anyio
async def test_a_save_that_overlaps_is_refused_for_all_ranks(tmp_path: Path) -> None:
    """It breaks the later step in its turn, and the save under way is completed."""
    hold = anyio.Event()

    async def slowly(state: Any, part: Part) -> None:
        if part.step == 1 and "rank-0" in part.path:
            await hold.wait()

    async with local_barriers(2, timeout_secs=10) as barriers, Tasks() as tasks:
        refusing, queueing = savers(barriers, tmp_path, slowly)
        queueing._queues = True
        first = [tasks.start(partial(saver.save, 1, 0)) for saver in (refusing, queueing)]
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="step 2 is refused: step 1 is still being saved"):
            await refusing.save(2, 0)
        second = tasks.start(partial(queueing.save, 2, 0))
        hold.set()
        for each in first:
            assert (await each.returned()).step == 1
        assert "step 2 is refused" in (await second.raised(BrokenBarrierError)).reason
        await save([refusing, queueing], 3)
    assert await in_thread(Directory(tmp_path).steps) == [1, 3]


@pytest.mark.anyio
async def test_two_savers_that_share_a_directory(tmp_path: Path) -> None:
    """One may clear away what the other has not completed: that one fails, and is not complete."""
    hold = anyio.Event()

    async def slowly(state: Any, part: Part) -> None:
        await part.write("state", b"x")
        if "rank-1" in part.path:
            await hold.wait()
            await part.write("state", b"x")

    async with local_barriers(2, timeout_secs=10) as barriers, Tasks() as tasks:
        slow, quick = savers(barriers, tmp_path, slowly), savers(barriers, tmp_path, name="other")
        first = [tasks.start(partial(saver.save, 5, [5])) for saver in slow]
        await reached(
            partial(in_thread, lambda: any(tmp_path.glob(".step-5.partial/rank-1.*/state")))
        )
        await save(quick, 6)
        hold.set()
        for each in first:
            await each.raised(Exception)
    assert await in_thread(Directory(tmp_path).steps) == [6]


def test_saves_on_a_loop_that_ended_hold_up_none_on_the_next(tmp_path: Path) -> None:
    """Nobody may wait for their turn for ever."""
    barrier = StoreBarrier(HashStore(), rank=0, world_size=1)
    saver = Saver(barrier, tmp_path, upload, rank=0, queue=True)
    forever = Saver(barrier, tmp_path, lambda state, part: hold.wait(PATIENCE_SECS), rank=0)
    saver._upload, hold = forever._upload, threading.Event()
    loop = asyncio.new_event_loop()
    held = loop.create_task(saver.save(1, [1]))
    loop.run_until_complete(asyncio.sleep(0.2))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    saver._upload = upload

    async def again() -> Checkpoint:
        with anyio.fail_after(10):
            checkpoint = await saver.save(2, [2])
        await barrier.aclose()
        return checkpoint

    try:
        assert asyncio.run(again()).step == 2
    finally:
        hold.set()
        held.get_coro().close()


@pytest.mark.anyio
async def test_what_cannot_be_removed_does_not_keep_the_rest(tmp_path: Path) -> None:
    """Else a disk fills up."""

    class Stuck(Directory):
        def remove(self, step: int) -> None:
            if step == 1:
                raise OSError("busy")
            super().remove(step)

    stuck = Stuck(tmp_path)
    async with local_barriers(2, timeout_secs=10) as barriers:
        both = savers(barriers, stuck, keep=1)
        for step in (1, 2, 3):
            await save(both, step)
    assert await in_thread(stuck.steps) == [1, 3]


class Held(Directory):
    """A directory in which old checkpoints are removed when the test says so."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.removing, self.go_on = threading.Event(), threading.Event()

    def remove(self, step: int) -> None:
        self.removing.set()
        assert self.go_on.wait(PATIENCE_SECS)
        super().remove(step)


@pytest.mark.anyio
async def test_a_slow_clean_up_delays_neither_the_next_save_nor_a_cancellation(
    tmp_path: Path,
) -> None:
    """The checkpoint is complete by then. ``latest`` never moves back."""
    held = Held(tmp_path)
    async with local_barriers(2, timeout_secs=10) as barriers, Tasks() as tasks:
        both = savers(barriers, held, keep=1)
        await save(both, 1)
        leading = tasks.start(partial(both[0].save, 2, [2]))
        await both[1].save(2, [2])
        await in_thread(held.removing.wait, PATIENCE_SECS)
        third = [tasks.start(partial(saver.save, 3, [3])) for saver in both]
        assert (await third[1].returned()).step == 3
        leading.scope.cancel()
        with anyio.fail_after(1):
            await leading.ended.wait()
        held.go_on.set()
        assert (await third[0].returned()).step == 3
    assert latest(held) == "step-3"
    assert await in_thread(held.steps) == [3]


@pytest.mark.anyio
async def test_a_step_is_not_saved_again_while_an_earlier_attempt_writes(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that hangs outlives its cancellation, and would write into a later attempt."""
    write, writing, go_on = storage.write, threading.Event(), threading.Event()

    def hangs(path: str, data: bytes) -> None:
        writing.set()
        assert go_on.wait(PATIENCE_SECS)
        write(path, data)

    async with local_barriers(1, timeout_secs=10) as barriers, Tasks() as tasks:
        (saver,) = savers(barriers, storage)
        monkeypatch.setattr(storage, "write", hangs)
        first = tasks.start(partial(saver.save, 1, [1]))
        await in_thread(writing.wait, PATIENCE_SECS)
        first.scope.cancel()
        await first.ended.wait()
        monkeypatch.undo()
    try:
        async with local_barriers(1, timeout_secs=10) as barriers:
            (again,) = savers(barriers, storage)
            with pytest.raises(RuntimeError, match="an earlier attempt still writes to"):
                await again.save(1, [1])
            await again.save(2, [2])
    finally:
        go_on.set()
    assert await in_thread(storage.steps) == [2]


@pytest.mark.anyio
async def test_a_store_of_objects_that_refuses_to_delete() -> None:
    """A checkpoint that readers see is complete for all ranks."""
    pytest.importorskip("fsspec", reason="needs the extra fsspec")
    storage = FsspecStorage(f"memory://{uuid.uuid4().hex}")

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("AccessDenied: DeleteObject")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rm", "rm_file", "_rm"):
            patch.setattr(storage.fs, name, refused, raising=False)
        async with local_barriers(2, timeout_secs=10) as barriers:
            await save(savers(barriers, storage), 1)
    assert await in_thread(storage.steps) == [1]


@pytest.mark.anyio
async def test_a_blocking_saver_that_is_built_on_an_event_loop(tmp_path: Path) -> None:
    """Whichever it is: the saver works on that of its barrier."""
    barrier = StoreBarrier(HashStore(), rank=0, world_size=1)
    blocking = BlockingBarrier(barrier)
    saver = BlockingSaver(blocking, tmp_path, upload, rank=0)
    try:
        assert (await in_thread(saver.save, 1, [1])).step == 1
    finally:
        await in_thread(blocking.close)


@pytest.mark.anyio
async def test_queued_saves_are_done_in_order(tmp_path: Path) -> None:
    """Each saves what the state was when it was called; one that is cancelled while it waits is
    incomplete for all, and those before and after it are complete."""
    hold = anyio.Event()
    saved: list[tuple[int, Any]] = []

    async def slowly(state: Any, part: Part) -> None:
        await hold.wait()
        saved.append((part.step, state))

    async with local_barriers(2, timeout_secs=10) as barriers, Tasks() as tasks:
        both = savers(barriers, tmp_path, slowly, queue=True, stage=lambda of: copies(of))
        state = [0]
        saves: dict[int, list[Any]] = {}
        copied: list[Any] = []

        def copies(of: list[int]) -> list[int]:
            copied.append(of)
            return list(of)

        async def all_copied() -> bool:
            return len(copied) == 2 * len(saves)

        for step in (1, 2, 3):
            state[0] = step
            saves[step] = [tasks.start(partial(saver.save, step, state)) for saver in both]
            await reached(all_copied)
        saves[2][0].scope.cancel()
        hold.set()
        for step in (1, 3):
            for each in saves[step]:
                assert (await each.returned()).step == step
        await saves[2][1].raised(BrokenBarrierError)
    assert await in_thread(Directory(tmp_path).steps) == [1, 3]
    assert [of for step, of in saved if step == 3] == [[3], [3]]


class Indescribable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.anyio
async def test_a_state_that_cannot_be_copied(tmp_path: Path) -> None:
    """Its peers learn it at once, whatever the exception, and the next save works."""

    def stage(state: Any) -> Any:
        if state == [1]:
            raise Indescribable
        return state

    async with local_barriers(2, timeout_secs=10) as barriers:
        both = savers(barriers, tmp_path, stage=stage)
        both[1]._stage = list
        async with Tasks() as tasks:
            first, second = (tasks.start(partial(saver.save, 1, [1])) for saver in both)
            await first.raised(Indescribable)
            assert "Indescribable" in (await second.raised(BrokenBarrierError)).reason
        assert [each.step for each in await save(both, 2)] == [2, 2]


@pytest.mark.anyio
async def test_only_what_it_has_saved_is_a_checkpoint(storage: Storage, tmp_path: Path) -> None:
    """Files of an earlier attempt with more ranks are not in it, and directories of the user's are
    neither found nor removed."""

    def leave() -> None:
        storage.write(storage.begin(1, 2) + "/layers/0", b"of an earlier attempt")
        storage.write(storage.path(0) + "/results.csv", b"the user's")
        storage.write(storage.path(0).removesuffix("0") + "007/results.csv", b"the user's")

    await in_thread(leave)
    async with local_barriers(2, timeout_secs=10) as barriers:
        both = savers(barriers, storage, keep=1)
        assert await gather([saver.newest for saver in both]) == [None, None]
        await save(both, 1)
        with pytest.raises(FileNotFoundError):
            await in_thread(text_of, storage, storage.path(1) + "/rank-2/layers/0")
        await save(both, 2)
        assert await in_thread(storage.steps) == [2]
    for step in ("0", "007"):
        path = storage.path(0).removesuffix("0") + f"{step}/results.csv"
        assert await in_thread(text_of, storage, path) == "the user's"


@pytest.mark.anyio
async def test_a_step_is_saved_again_while_it_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a rank that gave it up in doubt, or by its new process: the checkpoint has the files that
    its peers know of."""
    at, go_on, written = threading.Event(), threading.Event(), anyio.Event()
    storage = Directory(tmp_path)
    prepare = storage.prepare

    def slow(*args: Any) -> None:
        at.set()
        go_on.wait(10)
        prepare(*args)

    async def noted(state: Any, part: Part) -> Any:
        if state == [2]:
            written.set()
        return await upload(state, part)

    monkeypatch.setattr(storage, "prepare", slow)
    async with local_barriers(2, timeout_secs=10) as barriers, Tasks() as tasks:
        both = savers(barriers, storage, noted)
        leading, following = (tasks.start(partial(saver.save, 1, [1])) for saver in both)
        await in_thread(at.wait)
        following.scope.cancel()
        await following.ended.wait()
        again = tasks.start(partial(both[1].save, 1, [2]))
        await written.wait()
        go_on.set()
        assert (await leading.returned()).step == 1
        await again.ended.wait()
        assert again.error is not None
    assert (tmp_path / "step-1/rank-1/state.json").read_text() == "[1]"


@pytest.mark.anyio
async def test_saves_that_fail_leave_no_files(tmp_path: Path) -> None:
    """Neither their own, nor for long those of ranks that were killed: else there is no room for
    any other."""

    async def fails(state: Any, part: Part) -> Any:
        await upload(state, part)
        if part.step < 5 and "rank-1" in part.path:
            raise OSError("disk full")

    killed = tmp_path / ".step-1.partial/rank-1.ab"
    killed.mkdir(parents=True)
    async with local_barriers(2, timeout_secs=10) as barriers, Tasks() as tasks:
        both = savers(barriers, tmp_path, fails)
        for step in (2, 3, 4):
            first, second = (tasks.start(partial(saver.save, step, [1])) for saver in both)
            await first.raised(BrokenBarrierError)
            await second.raised(OSError)

        async def none_left() -> bool:
            return not list(tmp_path.glob(".step-*"))

        await reached(none_left)
        assert [each.step for each in await save(both, 5)] == [5, 5]


@pytest.mark.anyio
async def test_a_second_process_of_a_rank_writes_nothing(tmp_path: Path) -> None:
    """It is refused before it begins."""
    store = HashStore()
    async with StoreBarrier(store, rank=0, world_size=1, timeout_barrier_init_secs=3):
        second = StoreBarrier(store, rank=0, world_size=1, timeout_barrier_init_secs=3)
        with pytest.raises(BarrierError):
            await Saver(second, tmp_path, upload, rank=0).save(1, [1])
        await second.aclose()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.anyio
async def test_two_savers_of_one_rank(storage: Storage) -> None:
    """Built so by mistake, one writes over the files of the other: no rank completes that."""

    async def in_turn(state: Any, part: Part) -> None:
        if state == "first":
            there.set()
        elif state == "second":
            await part.write("state", b"")

    there = anyio.Event()
    async with local_barriers(2, timeout_secs=10) as barriers, Tasks() as tasks:
        first, second = (Saver(barrier, storage, in_turn, rank=0) for barrier in barriers)
        leading = tasks.start(partial(first.save, 1, "first"))
        await there.wait()

        async def has_entered() -> bool:
            # Until then, one might find that the other has moved its files.
            return any(phase.counted for phase in barriers[0]._session.open)

        await reached(has_entered)
        follower = tasks.start(partial(second.save, 1, "second"))
        assert "rank 1 was built with rank=0" in str(await leading.raised(ValueError))
        await follower.raised(BrokenBarrierError)
        assert await in_thread(storage.steps) == []


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_save_that_is_cancelled_twice_leaves_the_next_its_turn(tmp_path: Path) -> None:
    """Also where the second one, asyncio's own, strikes while it breaks a save behind it."""

    async def hangs(state: Any, part: Part) -> None:
        if part.step == 1:
            await anyio.sleep_forever()

    async with local_barriers(1, timeout_secs=10) as (barrier,):
        breaking = anyio.Event()
        saver = Saver(barrier, tmp_path, hangs, rank=0)
        first = asyncio.ensure_future(saver.save(1, 0))
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="refused"):
            await saver.save(2, 0)

        async def abort(*_: Any, **__: Any) -> bool:
            breaking.set()
            await anyio.sleep_forever()
            return True

        real, barrier.abort = barrier.abort, abort  # type: ignore[method-assign]
        first.cancel()
        await breaking.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        barrier.abort = real  # type: ignore[method-assign]
        with anyio.fail_after(5):
            assert (await saver.save(3, 0)).step == 3


def test_wrong_arguments_are_refused_when_it_is_built(tmp_path: Path) -> None:
    """Not by the first save, which other ranks wait for."""
    given: dict[str, Any] = {
        "barrier": None, "storage": tmp_path, "upload": upload, "rank": 0
    }  # fmt: skip
    wrong: list[dict[str, Any]] = [
        {"upload": 1}, {"stage": 1}, {"keep": "2"}, {"keep": 2.5}, {"rank": "0"}, {"leader": None}
    ]  # fmt: skip
    for each in wrong:
        with pytest.raises(TypeError, match=next(iter(each))):
            Saver(**{**given, **each})
    worse: dict[str, Any]
    for worse in ({"keep": 0}, {"rank": -1}, {"storage": "s3://bucket/run"}):
        with pytest.raises(ValueError, match=r"rank|keep|FsspecStorage"):
            Saver(**{**given, **worse})
    pytest.importorskip("fsspec", reason="needs the extra fsspec")
    with pytest.raises(ValueError, match="pattern"):
        FsspecStorage("memory://run[1]")


@pytest.mark.anyio
async def test_wrong_arguments_of_calls(storage: Storage) -> None:
    """No step, or a file that is not in the rank's own directory."""

    async def writes(state: str, part: Part) -> None:
        await part.write(state, b"")

    async with local_barriers(1, timeout_secs=10) as (barrier,):
        saver = Saver(barrier, storage, writes, rank=0)
        wrong: Any
        for wrong in (None, "1", True):
            with pytest.raises(TypeError, match="step"):
                await saver.save(wrong, "state")
        for step, name in enumerate(("../rank-1/state", "/etc/state", "a//b", "")):
            with pytest.raises(ValueError, match="no name of a file"):
                await saver.save(step, name)
        assert await in_thread(storage.steps) == []


HANGING = """
import sys, time, anyio
from async_barriers.saving import Saver
from async_barriers.testing import local_barriers

def hang(*_):
    time.sleep(60)

async def main():
    async with local_barriers(1, timeout_secs=30) as (barrier,):
        saver = Saver(barrier, sys.argv[2], hang, rank=0)
        with anyio.move_on_after(0.1):
            await (saver.save(1, None) if sys.argv[1] == "upload" else barrier.commit(hang))
    print(time.time())

anyio.run(main)
"""


@pytest.mark.processes
@pytest.mark.parametrize("what", ["upload", "publish"])
def test_a_plain_function_that_hangs_does_not_keep_the_process(what: str, tmp_path: Path) -> None:
    """The interpreter exits within 2 s of the cancellation (law 8)."""
    command = [sys.executable, "-c", HANGING, what, str(tmp_path)]

    def secs_to_exit() -> float:
        ran = subprocess.run(command, capture_output=True, timeout=30, check=True, text=True)
        assert ran.stderr == ""
        return time.time() - float(ran.stdout)

    # The best of three, since other tests may have the processors.
    assert any(secs_to_exit() < 2 for _ in range(3))


def test_blocking(tmp_path: Path) -> None:
    """`start` returns when the state is copied, and a newest checkpoint is found; a complete one
    is not overwritten."""
    world = BlockingWorld(2)
    go_on = threading.Event()

    def blocks(state: Any, part: Part) -> int:
        go_on.wait(10)
        Path(part.path, "state").write_text(str(state))
        return len(state)

    both = [
        BlockingSaver(barrier, tmp_path, blocks, rank=rank)
        for rank, barrier in enumerate(world.ranks)
    ]
    state = [1]
    saving = [saver.start(1, state) for saver in both]
    state.append(2)
    go_on.set()
    assert [each.result(10).step for each in saving] == [1, 1]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(BlockingSaver.newest, both))
        assert found == [Checkpoint(1, str(tmp_path / "step-1"), (1, 1))] * 2
        assert (tmp_path / "step-1" / "rank-1" / "state").read_text() == "[1]"
        for end in [pool.submit(saver.save, 1, state) for saver in both]:
            with pytest.raises((FileExistsError, BrokenBarrierError)):
                end.result(10)
    world.close()


@pytest.mark.processes
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_in_mid_save(start_job: StartJob, tmp_path: Path, victim: int) -> None:
    """Its peers learn it, the checkpoint before stays the newest for all when it is back, and the
    next save works."""
    job = start_job(2, own_store=False, backends=["blocking"], doings="saving_rank")

    def each(do: str, **given: Any) -> list[Any]:
        calls = job.starts(range(2), do, root=str(tmp_path), **given)
        return [call.released(PATIENCE_SECS)["value"] for call in calls]

    assert each("save", step=1) == [1, 1]
    saving = job.starts(range(2), "save", root=str(tmp_path), step=2, hang_on=victim)
    until(lambda: any(tmp_path.glob(f".step-2.partial/rank-{victim}.*/begun")))
    job.ranks[victim].strike(signal.SIGKILL)
    job.come_back(victim)
    saving[1 - victim].error("BrokenBarrierError")
    assert each("newest") == [1, 1]
    assert (tmp_path / "latest").read_text() == "step-1"
    assert each("save", step=3) == [3, 3]
    assert each("newest") == [3, 3]
    assert not list(tmp_path.glob(".step-*"))
    job.ends()
