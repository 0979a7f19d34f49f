"""The identity of this process, and whether another process is alive, if known."""

from __future__ import annotations

import os
import secrets
import socket
import weakref
from typing import Any

from .._protocol.membership import Life
from .._system import started, this_machine

# The claims of this process that hold a rank, by their tokens.
holders: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
# Read once, when no event loop waits.
_MACHINE = this_machine()


def new_life(run_id: str | None) -> Life:
    """A new claim of this process."""
    pid = os.getpid()
    return Life(secrets.token_hex(8), socket.gethostname(), pid, _MACHINE, started(pid), run_id)


def lives(life: Life) -> bool | None:
    """Whether the process of ``life`` runs; None if only it can say so."""
    if life.machine != _MACHINE or not life.machine:
        return None
    if life.pid == os.getpid() and life.started == started(life.pid):
        # A claim of this process lives if its barrier is open.
        return life.token in holders
    began = started(life.pid)
    return began != "" and began == life.started
