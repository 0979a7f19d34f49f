"""For tests of code that uses barriers: all ranks in one process, and a store with faults on call.

    async with local_barriers(3, timeout_secs=5) as barriers:
        ...  # run your code for each of them, in tasks of one event loop

Nothing here opens a port or starts a process. See ``examples/test_saving.py``.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
from torch.distributed import HashStore, Store

from ._checks import check_world
from ._store.copies import copy_of
from .store_barrier import StoreBarrier

__all__ = ["FaultyStore", "local_barriers"]


@asynccontextmanager
async def local_barriers(
    world_size: int, *, store: Store | None = None, **options: Any
) -> AsyncIterator[list[StoreBarrier]]:
    """A connected barrier for each rank of a world that lives in this process.

    They are real barriers: deadlines, breaks and `commit` work as in a job.

    :param world_size: the number of ranks; the barrier of rank ``r`` is at index ``r``
    :param store: where they meet, such as a `FaultyStore`; None for a new HashStore
    :param options: other keyword arguments of `StoreBarrier`, the same for all ranks
    :raises TypeError, ValueError: as `StoreBarrier`
    :raises BarrierConnectionError: ``store`` does not answer

    **Cancellation:** cancels the body. Leaving closes all barriers, which breaks the phases that
    are still awaited.
    """
    check_world(0, world_size)
    meeting_point = HashStore() if store is None else store
    barriers = [
        StoreBarrier(meeting_point, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    try:
        for barrier in barriers:
            await barrier.connect()
        yield barriers
    finally:
        async with anyio.create_task_group() as tasks:
            for barrier in barriers:
                tasks.start_soon(barrier.aclose)


class FaultyStore(Store):
    """A torch store that fails, hangs or delays calls when you tell it to.

    It wraps another store, and passes on the calls that no fault stops. A barrier uses its clones,
    which have the same faults. You may use it from any thread or event loop.

    A barrier makes these calls to it: ``clone``, ``set_timeout``, ``get``, ``set``, ``add``,
    ``check``, ``compare_set``, ``wait``, ``delete_key`` and ``list_keys``.

    :param store: any torch store
    """

    # fmt: off
    CALLS = (
        "add", "append", "check", "clone", "compare_set", "delete_key", "get", "list_keys",
        "multi_get", "multi_set", "num_keys", "set", "wait",
    )
    # fmt: on
    """What can be told to fail, hang or be late."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        # torch's stubs lack half of the stores' methods.
        self._store: Any = store
        self._faults = _Faults()

    def fail(
        self,
        call: str | None = None,
        exc: BaseException | type[BaseException] | None = None,
        *,
        key: str = "",
        after: int = 0,
        times: int | None = None,
    ) -> None:
        """Have calls raise ``exc`` instead of reaching the store.

        :param call: one of `CALLS`; None for all of them
        :param exc: a `ConnectionResetError` if none is given
        :param key: only calls whose (first) key contains this
        :param after: the fault begins after so many of these calls
        :param times: so many calls fail; None for all, until `heal`
        """
        error = ConnectionResetError("FaultyStore was told to fail") if exc is None else exc
        self._faults.add(_Fault(call, key, after, times, error=error))

    def hang(
        self, call: str | None = None, *, key: str = "", after: int = 0, times: int | None = None
    ) -> None:
        """Have calls block until `heal`, and then go on; the parameters are those of `fail`."""
        self._faults.add(_Fault(call, key, after, times))

    def delay(
        self,
        call: str | None = None,
        secs: float = 0.1,
        *,
        key: str = "",
        after: int = 0,
        times: int | None = None,
    ) -> None:
        """Have calls wait ``secs`` seconds before they go on; otherwise as `fail`."""
        self._faults.add(_Fault(call, key, after, times, secs=secs))

    def heal(self) -> None:
        """End all faults, and let the calls that hang go on."""
        self._faults.heal()

    @property
    def calls(self) -> int:
        """How many calls were made by all clones together, with those that failed."""
        return self._faults.calls

    @property
    def hanging(self) -> int:
        """How many calls hang or are delayed now."""
        return self._faults.hanging

    # -- what a store can do ---------------------------------------------------------------

    def clone(self) -> FaultyStore:
        self._faults.meet("clone", "")
        clone = FaultyStore(copy_of(self._store))
        clone._faults = self._faults
        return clone

    @property
    def timeout(self) -> timedelta:
        timeout: timedelta = self._store.timeout
        return timeout

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

    def set(self, key: str, value: Any) -> None:
        self._call("set", key, value)

    def get(self, key: str) -> bytes:
        return bytes(self._call("get", key))

    def add(self, key: str, amount: int) -> int:
        return int(self._call("add", key, amount))

    def append(self, key: str, value: Any) -> None:
        self._call("append", key, value)

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._call("check", list(keys)))

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        return bytes(self._call("compare_set", key, expected, desired))

    def wait(self, keys: Sequence[str], *timeout: timedelta) -> None:
        self._call("wait", list(keys), *timeout)

    def delete_key(self, key: str) -> bool:
        return bool(self._call("delete_key", key))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return list(self._call("multi_get", list(keys)))

    def multi_set(self, keys: Sequence[str], values: Sequence[Any]) -> None:
        self._call("multi_set", list(keys), list(values))

    def num_keys(self) -> int:
        return int(self._call("num_keys"))

    def list_keys(self) -> list[str]:
        return list(self._call("list_keys"))

    # A PrefixStore around this store calls these names.
    deleteKey = delete_key
    getNumKeys = num_keys

    def _call(self, call: str, *args: Any) -> Any:
        first = args[0] if args else ""
        self._faults.meet(call, first if isinstance(first, str) else first[0])
        return getattr(self._store, call)(*args)


class _Fault:
    """The calls that a fault strikes, and its effect: they hang if it has no error and no delay."""

    def __init__(
        self,
        call: str | None,
        key: str,
        after: int,
        times: int | None,
        *,
        error: BaseException | type[BaseException] | None = None,
        secs: float | None = None,
    ) -> None:
        if call is not None and call not in FaultyStore.CALLS:
            raise ValueError(f"a store has no call {call!r}; it has {FaultyStore.CALLS}")
        self.error = error
        self.secs = secs
        self._call = call
        self._key = key
        self._after = after
        self._times = times

    def strikes(self, call: str, key: str) -> bool:
        """Whether it strikes this call; counts the calls that it could strike."""
        if self._call not in (None, call) or self._key not in key:
            return False
        if self._after > 0:
            self._after -= 1
            return False
        if self._times is not None:
            self._times -= 1
            return self._times >= 0
        return True


class _Faults:
    """The faults that all clones of a store share."""

    def __init__(self) -> None:
        self.calls = 0
        self.hanging = 0
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self._healed = threading.Event()

    def add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()
            self._healed.set()
            self._healed = threading.Event()

    def meet(self, call: str, key: str) -> None:
        """Apply the faults that strike this call, in the order in which they were set."""
        with self._lock:
            self.calls += 1
            struck = [fault for fault in self._faults if fault.strikes(call, key)]
            healed = self._healed
        for fault in struck:
            if fault.error is not None:
                raise fault.error
            with self._lock:
                self.hanging += 1
            healed.wait(fault.secs)
            with self._lock:
                self.hanging -= 1
