"""What ranks do that have a default process group and `DistBarrier`s; see rank_process.py."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
import torch
import torch.distributed as dist
from rank_process import Doings, say

from async_barriers import DistBarrier, StoreBarrier

# How often the event loop's pulse is felt.
_PULSE_SECS = 0.005


class Foreign(dist.ProcessGroup):
    """A group of a backend that is not gloo's, and that nobody may touch."""

    touched: list[str] = []  # noqa: RUF012  (of the process)

    def getBackendName(self) -> str:
        return "foreign"


def _untouchable(name: str) -> Callable[..., Any]:
    def touch(self: Foreign, *args: Any) -> Any:
        Foreign.touched.append(name)
        raise AssertionError(f"{name} of the default group was called")

    return touch


# What could be called on it, collectives and timeouts.
_TOUCHES = (
    "allreduce allreduce_coalesced allgather _allgather_base alltoall alltoall_base barrier "
    "broadcast gather monitored_barrier recv reduce reduce_scatter scatter send set_timeout "
    "_set_default_timeout abort shutdown"
)
for _name in re.findall(r"\w+", _TOUCHES):
    setattr(Foreign, _name, _untouchable(_name))


async def _fail() -> None:
    raise OSError("disk full")


def _foreign(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    return Foreign(rank, size)  # type: ignore[call-arg]


async def obey(options: dict[str, Any]) -> None:
    """Do what is asked until the end is, and then close what was built."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    doings = DistDoings(options)
    await doings.obey()
    await doings.close()


class DistDoings(Doings):
    """Each command names the barrier that it is for."""

    def _build(self) -> Any:
        """The default group, and no barrier yet."""
        self.barriers: dict[str, DistBarrier] = {}
        options = self._options
        if (backend := options["default_group"]) == "foreign":
            dist.Backend.register_backend("foreign", _foreign, devices=["cpu"])
        dist.init_process_group(
            backend, store=self.store, rank=options["rank"], world_size=options["size"]
        )

    async def build(
        self, barrier: str = "", members: list[int] | None = None, **given: Any
    ) -> dict[str, Any]:
        """A barrier for all, or over a gloo group of ``members``."""
        group = None if members is None else dist.new_group(members, backend="gloo")
        self.barriers[barrier] = DistBarrier(group, **given)
        return {}

    async def connect(self, barrier: str = "", scope: str = "") -> dict[str, Any]:
        with self._scopes.setdefault(scope, anyio.CancelScope()) if scope else anyio.CancelScope():
            await self.barriers[barrier].connect()
            return {}
        return {"cancelled": True}

    async def cross(  # type: ignore[override]
        self, name: str = "", barrier: str = "", scope: str = "", **given: Any
    ) -> dict[str, Any]:
        with anyio.CancelScope() as made:
            self._scopes[scope] = made
            result = await self.barriers[barrier].execute_barrier(name, **given)
            return {**asdict(result), "released": time.monotonic()}
        return {"cancelled": True}

    async def cancel(self, scope: str) -> dict[str, Any]:
        self._scopes[scope].cancel()
        return {}

    async def abort(  # type: ignore[override]
        self, reason: str, name: str = "", barrier: str = "", **given: Any
    ) -> dict[str, Any]:
        return {"broke": await self.barriers[barrier].abort(reason, name, **given)}

    async def fail(self, name: str = "", barrier: str = "", **given: Any) -> dict[str, Any]:
        """A phase whose body fails."""
        async with self.barriers[barrier].phase(name, **given):
            raise OSError("disk full")

    async def gather(self, payload: str, barrier: str = "", **given: Any) -> dict[str, Any]:
        gathered = await self.barriers[barrier].all_gather(payload.encode(), **given)
        return {"gathered": [value.decode() for value in gathered]}

    async def commit(self, publish: str, payload: str, barrier: str = "", **given: Any) -> bytes:
        def joined(payloads: Mapping[int, bytes]) -> Any:
            on_loop = threading.current_thread() is threading.main_thread()
            say(event="publishing", on_loop=on_loop)
            if publish == "wrong":
                return "text"
            return b",".join(payloads[rank] for rank in sorted(payloads))

        async def act(payloads: Mapping[int, bytes]) -> bytes:
            if publish == "fail":
                raise OSError("disk full")
            if publish == "hang":
                await anyio.sleep_forever()
            return bytes(joined(payloads))

        plain = publish in ("plain", "wrong")
        return await self.barriers[barrier].commit(
            joined if plain else act, payload=payload.encode(), **given
        )

    async def committing(self, body: str, barrier: str = "", **given: Any) -> dict[str, Any]:
        """A part of a commit whose body ends as it is told; else it brings ``body``."""

        async def publish(payloads: Mapping[int, bytes]) -> bytes:
            say(event="publishing")
            return b",".join(payloads[rank] for rank in sorted(payloads))

        committing = self.barriers[barrier].committing(publish, **given)
        result = ""

        async def parts() -> AsyncIterator[None]:
            nonlocal result
            async with committing as part:
                if body == "cancel":
                    cancelled.cancel()
                    await anyio.sleep_forever()
                elif body == "fail":
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(_fail)
                elif body == "throw":
                    yield
                elif body != "none":
                    wrong: dict[str, Any] = {"text": "text", "large": bytes(5 << 20)}
                    part.payload = wrong.get(body, body.encode())
            result = part.result.decode()
            yield

        with anyio.CancelScope() as cancelled:
            generator: Any = parts()
            await generator.__anext__()
            await generator.aclose()
        return {"result": result, "cancelled": cancelled.cancelled_caught}

    async def leave(self, barrier: str = "") -> dict[str, Any]:
        """As a program that fails."""
        with contextlib.suppress(LookupError):
            async with self.barriers[barrier]:
                raise LookupError("no such shard")
        return {}

    async def fork(self, does: str, barrier: str = "") -> dict[str, Any]:
        """A child uses what it inherited, or drops it; what it says."""
        here, there = os.pipe()
        pid = os.fork()
        if not pid:
            signal.alarm(8)
            os.write(there, self._in_child(does, barrier).encode())
            os._exit(0)
        os.close(there)
        _, status = await anyio.to_thread.run_sync(os.waitpid, pid, 0)
        said = os.read(here, 1 << 16).decode()
        os.close(here)
        return {"said": said, "status": status}

    def _in_child(self, does: str, barrier: str) -> str:
        used = self.barriers[barrier]
        calls: dict[str, Callable[[], Any]] = {
            "cross": used.execute_barrier,
            "abort": lambda: used.abort("a child's whim"),
            "connect": used.connect,
            "close": used.aclose,
        }
        try:
            if does == "drop":
                del used, calls
                self.barriers.clear()
                gc.collect()
            else:
                asyncio.run(calls[does]())
            return "no error"
        except BaseException as exc:
            return f"{type(exc).__name__}: {exc}"

    async def cross_its_store(self) -> dict[str, Any]:
        async with StoreBarrier.from_process_group(timeout_secs=10.0) as barrier:
            return asdict(await barrier.execute_barrier())

    async def train(self, steps: int) -> dict[str, Any]:
        """Collectives on the default group, one after another, in a thread."""

        def reduce() -> None:
            for step in range(steps):
                tensor = torch.full((1000,), step)
                dist.all_reduce(tensor)
                assert tensor[0].item() == step * dist.get_world_size()

        await anyio.to_thread.run_sync(reduce)
        return {}

    async def close(self, barrier: str | None = None) -> dict[str, Any]:
        """Close one, or all."""
        began = time.monotonic()
        for name in list(self.barriers) if barrier is None else [barrier]:
            await self.barriers[name].aclose()
        return {"secs": time.monotonic() - began}

    async def feel_pulse(self, secs: float) -> dict[str, Any]:
        """The longest that the event loop did not run in ``secs``."""
        longest, last = 0.0, time.monotonic()
        until = last + secs
        while last < until:
            await anyio.sleep(_PULSE_SECS)
            now = time.monotonic()
            longest, last = max(longest, now - last - _PULSE_SECS), now
        return {"longest": longest}

    async def facts(self) -> dict[str, Any]:
        """What a guest must not change, and what it may not leave."""
        store: Any = self.store
        return {
            "touched": Foreign.touched,
            "groups": dist.distributed_c10d._world.group_count,
            "timeout": store.timeout / timedelta(seconds=1),
            "cuda": torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]
            "threads": len(os.listdir("/proc/self/task")),
        }
