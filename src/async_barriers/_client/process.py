"""Who this process is, and whether another one lives, as far as its machine can tell."""

from __future__ import annotations

import os
import secrets
import socket
import weakref
from typing import Any

from .._protocol.membership import Life

# Those of this process that hold a rank, by the token of their claim.
holders: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def new_life(run_id: str | None) -> Life:
    """A claim of this process that nobody has made before."""
    return Life(
        secrets.token_hex(8),
        socket.gethostname(),
        os.getpid(),
        _MACHINE,
        _started(os.getpid()),
        run_id,
    )


def lives(life: Life) -> bool | None:
    """Whether the process of ``life`` runs; None where only it could say so."""
    if life.machine != _MACHINE or not life.machine:
        return None
    if life.pid == os.getpid() and life.started == _started(life.pid):
        # Of this process's own claims those live whose barrier is open.
        return life.token in holders
    started = _started(life.pid)
    return started != "" and started == life.started


def _read(path: str) -> str:
    """A small file of /proc, which is in memory and takes microseconds; empty if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 4096).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def _this_machine() -> str:
    """Names this machine since it started, and the namespace that process ids count in."""
    try:
        return _read("/proc/sys/kernel/random/boot_id").strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


# Read once, when nobody's event loop waits.
_MACHINE = _this_machine()


def _started(pid: int) -> str:
    """When a process was started; empty if there is none, or it is dead and not yet buried."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return "" if len(fields) < 20 or fields[0] in "ZX" else fields[19]
