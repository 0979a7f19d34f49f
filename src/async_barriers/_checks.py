"""Checks of arguments: a wrong one is refused before anything is entered."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any, Final

# c10d drops a connection that sends more than 8 MiB; half of it is a round figure.
MAX_PAYLOAD_BYTES = 4 * 1024 * 1024

MAX_RUN_ID = 1024
MAX_STEP = (1 << 63) - 1


class Configured(Enum):
    """Stands for "the timeout the barrier was built with", since None means "no deadline"."""

    TIMEOUT = "as configured"

    def __repr__(self) -> str:
        return "..."  # what a signature shows


CONFIGURED: Final = Configured.TIMEOUT
Timeout = float | None | Configured


def given(step: int | None, stalled_after_secs: Timeout = CONFIGURED) -> dict[str, Any]:
    """The arguments of a call that were given: a user's own barrier may not take the others."""
    arguments: dict[str, Any] = {} if step is None else {"step": step}
    if stalled_after_secs is not CONFIGURED:
        arguments["stalled_after_secs"] = stalled_after_secs
    return arguments


def check_timeout(what: str, value: float | None) -> float | None:
    """Refuse all but a positive, finite number of seconds, or None for no deadline."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number of seconds or None, not {value!r}")
    try:
        secs = float(value)
    except OverflowError:  # An integer that no float can hold.
        secs = math.inf
    if not (secs > 0 and math.isfinite(secs)):
        raise ValueError(f"{what} is {secs:g}; it must be positive and finite, or None")
    return secs


def check_call_timeout(value: float | None) -> float | None:
    """As `check_timeout`, for one call, which may also have 0: the verdict of this moment."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
        return 0.0
    return check_timeout("timeout_secs", value)


def check_step(step: int | None, what: str = "step") -> int | None:
    """Refuse all but a step."""
    if step is None:
        return None
    if type(step) is not int:  # The text of an enumeration's member is no number.
        raise TypeError(f"{what} must be an integer or None, not {step!r}")
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"{what} is {step}; it must be 0 or more, and less than 2**63")
    return step


def check_publish(publish: object) -> None:
    """Refuse a ``publish`` that is not callable, before anything is entered."""
    check_callable("publish", publish)


def check_callable(what: str, function: object) -> None:
    """Refuse what is not callable."""
    if not callable(function):
        raise TypeError(
            f"{what} must be a function or a coroutine function, not {type(function).__name__}"
        )


def check_number(what: str, value: int, least: int = 0) -> int:
    """Refuse all but an integer that is ``least`` or more."""
    if type(value) is not int:
        raise TypeError(f"{what} must be an integer, not {value!r}")
    if value < least:
        raise ValueError(f"{what} is {value}; it must be {least} or more")
    return value


def check_flag(what: str, value: bool) -> bool:
    """Refuse what is neither True nor False: the text "0" would be taken for True."""
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, not {value!r}")
    return value


def check_address(what: str, host: str) -> str:
    """Refuse what no name look-up takes, without looking it up."""
    if not (isinstance(host, str) and host and "\0" not in host):
        raise ValueError(f"{what} is {host!r}; it must be a host name or an IP address")
    try:
        host.encode("idna")
    except UnicodeError as exc:
        raise ValueError(f"{what} is {host!r}, which is no host name: {exc}") from exc
    return host


def check_run_id(run_id: str | None) -> str | None:
    """Refuse what is no name for a run; each process of the job writes it to the store."""
    if run_id is None:
        return None
    if not isinstance(run_id, str):
        raise TypeError(f"run_id must be a string or None, not {run_id!r}")
    if len(run_id) > MAX_RUN_ID:
        raise ValueError(f"run_id has {len(run_id)} characters; at most {MAX_RUN_ID} are allowed")
    try:
        run_id.encode()
    except UnicodeError as exc:
        raise ValueError(f"run_id is {run_id!r}, which no store can hold: {exc}") from exc
    return run_id


def check_world(rank: int, world_size: int, what: str = "") -> None:
    """Refuse a rank outside its world.

    :param what: the argument that is this rank, if it is another one than ``rank``
    """
    if type(rank) is type(world_size) is int and 0 <= rank < world_size:
        return  # Most often.
    about = f"{what}: " if what else ""
    for each, value in (("rank", rank), ("world size", world_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{about}{each} must be an integer, not {value!r}")
    if world_size < 1:
        raise ValueError(f"world size is {world_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(
            f"{about}rank {rank} is outside the world; with {world_size} ranks it must be "
            f"0 to {world_size - 1}"
        )


def checked_blob(what: str, value: bytes) -> bytes:
    """Refuse all but bytes, and too many of them."""
    if type(value) is bytes and len(value) <= MAX_PAYLOAD_BYTES:
        return value  # Most often.
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"{what} must be bytes, not {type(value).__name__}")
    # The len() of a memoryview counts its items, which may be wider than a byte.
    size = memoryview(value).nbytes
    if size > MAX_PAYLOAD_BYTES:
        raise ValueError(f"{what} has {size} bytes; at most {MAX_PAYLOAD_BYTES} are allowed")
    return bytes(value)


def checked_result(value: object) -> bytes:
    """Refuse what publish returned, if it is not bytes themselves, or too many."""
    if not isinstance(value, bytes):
        raise TypeError(f"publish's result must be bytes, not {type(value).__name__}")
    return checked_blob("publish's result", value)
