"""Building barriers: configuration, the registry, and what is refused."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
from torch.distributed import HashStore

import async_barriers
from async_barriers import (
    BARRIER_REGISTRY,
    Barrier,
    BarrierClosedError,
    BarrierConfig,
    BarrierConnectionError,
    BarrierError,
    BarrierTimeoutError,
    BrokenBarrierError,
    DistBarrier,
    StoreBarrier,
    TCPStoreBarrier,
    create_barrier_from_config,
    register_barrier,
)

TCP_ARGS: dict[str, Any] = {
    "global_rank": 0,
    "global_world_size": 4,
    "barrier_prefix": "test",
    "timeout_barrier_init_secs": 60,
    "use_checkpoint_barrier_tcpstore_libuv": True,
    "tcpstore_port": 12345,
    "master_address": "localhost",
    "timeout_secs": 30,
}


def test_the_known_barriers_are_registered() -> None:
    """torch's names work unchanged."""
    assert BARRIER_REGISTRY["tcp_store"] is TCPStoreBarrier
    assert BARRIER_REGISTRY["store"] is StoreBarrier
    assert BARRIER_REGISTRY["dist_barrier"] is DistBarrier


def test_torchs_configuration_builds_and_does_no_io() -> None:
    """The arguments of torch's own class are taken, and nothing connects or starts."""
    before = threading.active_count()
    config = pickle.loads(pickle.dumps(BarrierConfig("tcp_store", TCP_ARGS)))
    assert isinstance(create_barrier_from_config(config), TCPStoreBarrier)
    assert threading.active_count() == before
    assert create_barrier_from_config(BarrierConfig()) is None


def test_an_unknown_type_is_named_with_the_known_ones() -> None:
    """Who mistypes sees what there is."""
    with pytest.raises(
        ValueError, match=r"'tpc'; known are \['dist_barrier', 'store', 'tcp_store'"
    ):
        create_barrier_from_config(BarrierConfig("tpc"))
    with pytest.raises(TypeError, match="barrier_config must be a BarrierConfig, not None"):
        create_barrier_from_config(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown barrier type"):
        create_barrier_from_config(BarrierConfig(["tcp_store"]))  # type: ignore[arg-type]


def test_an_unknown_argument_is_named_with_the_known_ones() -> None:
    """The same for arguments, when it is built."""
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'port'.*'tcpstore_port'"):
        create_barrier_from_config(BarrierConfig("tcp_store", {**TCP_ARGS, "port": 1}))


def test_registering() -> None:
    """A class needs a type of its own; registering it twice is no harm."""

    class Mine(Barrier):
        barrier_type = "mine"

        async def execute_barrier(self, name: str = "", **_: Any) -> Any:
            return name

    try:
        assert register_barrier(register_barrier(Mine)) is Mine
        built = create_barrier_from_config(BarrierConfig("mine"))
        assert isinstance(built, Mine)
        with pytest.raises(ValueError, match=r"'mine' is .*Mine.* already"):
            register_barrier(type("Other", (), {"barrier_type": "mine"}))
        with pytest.raises(TypeError, match="needs a class attribute barrier_type"):
            register_barrier(type("Nameless", (), {}))
    finally:
        del BARRIER_REGISTRY["mine"]


@pytest.mark.anyio
async def test_a_barrier_of_ones_own_needs_one_method_only() -> None:
    """The rest is there, and what cannot be done says so."""

    class Mine(Barrier):
        async def execute_barrier(self, name: str = "", **_: Any) -> Any:
            return name

    async with Mine() as barrier:
        async with barrier.phase("x"):
            pass
        with pytest.raises(NotImplementedError, match="Mine cannot abort"):
            await barrier.abort("reason")
        with pytest.raises(NotImplementedError, match="Mine cannot commit"):
            await barrier.commit(lambda _: _)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("global_rank", 4, "rank 4 is outside the world; with 4 ranks it must be 0 to 3"),
        ("global_rank", -1, "rank -1 is outside"),
        ("global_rank", True, "rank must be an integer, not True"),
        ("global_world_size", 0, "world size is 0; it must be at least 1"),
        ("global_world_size", 2.0, "world size must be an integer"),
        ("barrier_prefix", "", "prefix is empty"),
        ("barrier_prefix", 3, "prefix must be a string, not 3"),
        ("barrier_prefix", "p" * 8000, "prefix is too long for the store: 8000 bytes"),
        ("barrier_prefix", "\ud800", "cannot be written as UTF-8"),
        ("timeout_barrier_init_secs", 0, "timeout_barrier_init_secs is 0; it must be positive"),
        ("timeout_barrier_init_secs", None, "timeout_barrier_init_secs must be a number"),
        ("use_checkpoint_barrier_tcpstore_libuv", 1, "must be True or False, not 1"),
        ("tcpstore_port", -1, "tcpstore_port is -1; it must be 0 to 65535"),
        ("tcpstore_port", 65536, "tcpstore_port is 65536"),
        ("tcpstore_port", "http", "tcpstore_port must be an integer"),
        ("tcpstore_port", 1.5, "tcpstore_port must be an integer, not 1.5"),
        ("master_address", "", "master_address is ''"),
        ("master_address", "node\0", "it must be a host name or an IP address"),
        ("master_address", "n" * 64, "which is no host name"),
        ("master_address", "\ud800", "which is no host name"),
        ("run_id", 3, "run_id must be a string or None, not 3"),
        ("run_id", "r" * 1025, "run_id has 1025 characters; at most 1024 are allowed"),
        ("worker_threads", "0", "worker_threads must be True or False, not '0'"),
        ("timeout_secs", 10**400, "timeout_secs is inf"),
        ("timeout_secs", -5, "timeout_secs is -5; it must be positive and finite, or None"),
        ("timeout_secs", float("nan"), "timeout_secs is nan"),
        ("timeout_secs", float("inf"), "timeout_secs is inf"),
        ("run_id", "\ud800", "run_id is '\\ud800', which no store can hold"),
        ("timeout_secs", "5", "timeout_secs must be a number of seconds or None, not '5'"),
        ("warn_after_secs", 0, "warn_after_secs is 0"),
        ("on_progress", 3, "on_progress must be callable or None, not 3"),
    ],
)
def test_bad_input_is_refused_when_it_is_built(argument: str, value: Any, message: str) -> None:
    """Each error says what was given and what is allowed."""
    with pytest.raises((TypeError, ValueError)) as caught:
        create_barrier_from_config(BarrierConfig("tcp_store", {**TCP_ARGS, argument: value}))
    assert message in str(caught.value)


def test_a_store_barrier_needs_a_store() -> None:
    """Anything else is refused at once, as is what would be taken for a flag that is set."""
    for wrong in ("0", 1, None):
        with pytest.raises(TypeError, match="worker_threads must be True or False"):
            StoreBarrier(HashStore(), rank=0, world_size=1, worker_threads=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"store must be a torch\.distributed\.Store"):
        StoreBarrier("localhost", rank=0, world_size=1)  # type: ignore[arg-type]
    StoreBarrier(HashStore(), rank=0, world_size=1)


@pytest.mark.parametrize(
    "error",
    [
        BarrierTimeoutError("x", 3, (1, 2), 5.0, in_doubt=True),
        BrokenBarrierError("x", 3, 1, "disk full"),
        BarrierConnectionError("gone"),
        BarrierClosedError("barrier 'x'"),
    ],
)
def test_errors_survive_pickling(error: BarrierError) -> None:
    """A checkpoint subprocess can send them home, facts and all."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__


def test_errors_are_also_what_python_calls_them() -> None:
    """`except TimeoutError` and `except ConnectionError` catch ours."""
    assert issubclass(BarrierTimeoutError, TimeoutError)
    assert issubclass(BarrierConnectionError, ConnectionError)
    assert "no rank was missing" in str(BarrierTimeoutError("", 0, (), 1.0))
    assert "and 80 more" in str(BarrierTimeoutError("", 0, tuple(range(100)), 1.0))


def test_all_is_what_is_defined() -> None:
    """Everything public is exported, documented, and nothing else is."""
    for name in async_barriers.__all__:
        assert name == "BARRIER_REGISTRY" or getattr(async_barriers, name).__doc__
    public = {
        name
        for name, value in vars(async_barriers).items()
        if getattr(value, "__module__", "").startswith("async_barriers.")
    }
    assert public | {"BARRIER_REGISTRY"} == set(async_barriers.__all__)
