"""Network namespaces that silently lose packets: a hub, and spokes that are joined to it.

All packets between two namespaces cross a pair of virtual interfaces. A cut drops them where they
arrive: there is no reset and no error, as with a cable that is cut.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

# On the hub's loopback interface, so that it has the same address for all spokes.
HUB_ADDRESS = "10.77.0.1"
_CLONE_NEWNET = 0x40000000
# A user's PATH may lack the directories of root's tools.
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


class Network:
    """A namespace with the store, and ``spokes`` others; leaving the context removes them."""

    def __init__(self, spokes: int) -> None:
        unique = uuid.uuid4().hex[:8]
        self.hub = f"async-barriers-{unique}-hub"
        self.spokes = [Spoke(self.hub, f"async-barriers-{unique}-{n}", n) for n in range(spokes)]
        self._undo = ExitStack()

    def __enter__(self) -> Network:
        with ExitStack() as undo:
            for name in (self.hub, *(spoke.name for spoke in self.spokes)):
                _run("ip", "netns", "add", name)
                undo.callback(_run, "ip", "netns", "delete", name)
                _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", self.hub, "address", "add", f"{HUB_ADDRESS}/32", "dev", "lo")
            for spoke in self.spokes:
                spoke.join()
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.close()

    def heal(self) -> None:
        """Stop losing packets, in every namespace."""
        for spoke in self.spokes:
            spoke.heal()


class Spoke:
    """A namespace with one way out, to the hub."""

    def __init__(self, hub: str, name: str, number: int) -> None:
        self.name = name
        self._hub = hub
        self._port = f"spoke{number}"
        self._address = f"10.77.0.{number + 2}"
        self._lossy: list[tuple[str, str]] = []

    def join(self) -> None:
        """Connect it to the hub. Each end is made in its own namespace, so names cannot clash."""
        far = ("dev", "far")
        near = ("dev", self._port)
        _run(
            *("ip", "-n", self._hub, "link", "add", "name", self._port, "type", "veth"),
            *("peer", "name", "far", "netns", self.name),
        )
        _run("ip", "-n", self.name, "address", "add", f"{self._address}/32", *far)
        _run("ip", "-n", self._hub, "link", "set", self._port, "up")
        _run("ip", "-n", self.name, "link", "set", "far", "up")
        _run("ip", "-n", self._hub, "route", "add", self._address, *near, "src", HUB_ADDRESS)
        _run("ip", "-n", self.name, "route", "add", HUB_ADDRESS, *far, "src", self._address)

    def cut(self, how: str) -> None:
        """Lose the packets of the hub ("deaf"), of this spoke ("mute"), or of "both"."""
        ends = {"deaf": (self.name, "far"), "mute": (self._hub, self._port)}
        for end in ends.values() if how == "both" else [ends[how]]:
            _lose("--append", *end)
            self._lossy.append(end)

    def heal(self) -> None:
        """Stop losing packets."""
        while self._lossy:
            _lose("--delete", *self._lossy.pop())


def enter(namespace: str) -> None:
    """Move this thread, and the threads that it starts, into ``namespace`` for new sockets."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as handle:
        # Python has os.setns only from 3.12 on.
        if libc.setns(handle.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def inside(namespace: str, call: Callable[[], T]) -> T:
    """Make ``call`` in ``namespace``; the sockets that it opens stay there."""
    results: list[T] = []

    def run() -> None:
        enter(namespace)
        results.append(call())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (result,) = results
    return result


def what_is_lacking() -> str | None:
    """Why no network can be made here; None if one can."""
    for tool in ("ip", "iptables"):
        if shutil.which(tool, path=_PATH) is None:
            return f"{tool} is not installed"
    if os.geteuid():
        return "only root may make network namespaces"
    try:
        with Network(1) as network:
            network.spokes[0].cut("both")
    except OSError as exc:
        return f"no network namespace can be made: {exc}"
    return None


def _lose(do: str, namespace: str, interface: str) -> None:
    # Enter the namespace with `ip netns`, since iptables looks for its tables there.
    _run(
        *("ip", "netns", "exec", namespace, "iptables", "--wait", do, "INPUT"),
        *("--in-interface", interface, "--jump", "DROP"),
    )


def _run(*command: str) -> None:
    done = subprocess.run(
        command, env={**os.environ, "PATH": _PATH}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
