"""Building a barrier from configuration, as torch's checkpoint code does."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ._barrier import Barrier

ClassT = TypeVar("ClassT", bound=type)

BARRIER_REGISTRY: dict[str, type] = {}


@dataclass
class BarrierConfig:
    """Which barrier to build, and with which arguments. It can be pickled if the arguments can.

    :ivar barrier_type: a key of `BARRIER_REGISTRY`, or None for no barrier
    :ivar barrier_args: keyword arguments of its class
    """

    barrier_type: str | None = None
    barrier_args: dict[str, Any] = field(default_factory=dict)


def register_barrier(barrier_class: ClassT) -> ClassT:
    """Class decorator: register ``barrier_class`` under its ``barrier_type``.

    :raises TypeError: it has no ``barrier_type``
    :raises ValueError: another class has that ``barrier_type``
    """
    barrier_type = getattr(barrier_class, "barrier_type", None)
    if not isinstance(barrier_type, str) or not barrier_type:
        raise TypeError(
            f"{barrier_class!r} cannot be registered: it needs a class attribute barrier_type, "
            f"a non-empty string, and has {barrier_type!r}"
        )
    known = BARRIER_REGISTRY.setdefault(barrier_type, barrier_class)
    if known is not barrier_class:
        raise ValueError(
            f"{barrier_class!r} cannot be registered: barrier_type {barrier_type!r} is "
            f"{known!r} already; choose another"
        )
    return barrier_class


def create_barrier_from_config(barrier_config: BarrierConfig) -> Barrier | None:
    """Build the barrier that ``barrier_config`` describes; None if its type is None.

    :raises ValueError: the type is unknown, or an argument's value is not allowed
    :raises TypeError: an argument is unknown, missing or of a wrong type
    """
    # Torch's own configuration has the same attributes.
    if not hasattr(barrier_config, "barrier_type"):
        raise TypeError(f"barrier_config must be a BarrierConfig, not {barrier_config!r}")
    barrier_type = barrier_config.barrier_type
    if barrier_type is None:
        return None
    if not isinstance(barrier_type, str) or barrier_type not in BARRIER_REGISTRY:
        raise ValueError(
            f"unknown barrier type {barrier_type!r}; known are {sorted(BARRIER_REGISTRY)}"
        )
    barrier_class = BARRIER_REGISTRY[barrier_type]
    signature = inspect.signature(barrier_class)
    try:
        signature.bind(**barrier_config.barrier_args)
    except TypeError as exc:
        raise TypeError(
            f"barrier type {barrier_type!r}: {exc}; its arguments are {list(signature.parameters)}"
        ) from exc
    barrier: Barrier = barrier_class(**barrier_config.barrier_args)
    return barrier


def built(config: Any) -> tuple[BarrierConfig, Barrier]:
    """A copy of ``config``, which may be torch's, and the barrier that it describes."""
    barrier_args = getattr(config, "barrier_args", None)
    if not isinstance(barrier_args, dict):
        raise TypeError(f"config_or_barrier must be a BarrierConfig or a Barrier, not {config!r}")
    copy = BarrierConfig(getattr(config, "barrier_type", None), dict(barrier_args))
    barrier = create_barrier_from_config(copy)
    if barrier is None:
        raise ValueError("the configuration's barrier_type is None: there is nothing to wait for")
    return copy, barrier
