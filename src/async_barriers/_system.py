"""All use of the operating system beyond Python's own modules: Linux, and macOS in part.

Only this module tells systems apart. If the system cannot tell, nothing fails here: the answer is
that it is unknown. docs/versions.md says what that costs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys

if sys.platform not in ("darwin", "win32"):
    import fcntl
    import termios

# No write to a closed connection ends the program.
UNHARMED = getattr(socket, "MSG_NOSIGNAL", 0)
# Python has no names for those of macOS.
_SO_NOSIGPIPE, _SO_NWRITE = 0x1022, 0x1024


def prepare(sock: socket.socket) -> None:
    """Before the first write: if `UNHARMED` is empty, set this on the socket itself."""
    if sys.platform == "darwin":
        sock.setsockopt(socket.SOL_SOCKET, _SO_NOSIGPIPE, 1)


def unsent(sock: socket.socket) -> bool:
    """Whether the kernel holds bytes that the peer has not received yet.

    :raises OSError: the socket is gone, or the kernel does not say
    """
    if sys.platform == "darwin":
        return bool(sock.getsockopt(socket.SOL_SOCKET, _SO_NWRITE))
    waiting = fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0" * 4)
    return bool(int.from_bytes(waiting, sys.byteorder))


def hosted_here(port: int) -> bool:
    """Whether this process listens at ``port``; False where the system cannot tell."""
    inodes = _listening(port)
    return bool(inodes and inodes & _opened_by("self"))


def holder_of(port: int) -> tuple[str, bool]:
    """The process that listens at ``port``, in words, if known; and whether it is this one."""
    inodes = _listening(port)
    for process in os.listdir("/proc") if inodes else ():
        if process.isdigit() and inodes & _opened_by(process):
            name = _read(f"/proc/{process}/comm").strip()
            return f"process {process} ({name})", process == str(os.getpid())
    return "another process", False


def this_machine() -> str:
    """The id of this machine since its start and of its process namespace; empty if unknown, so
    that no living process is taken for dead."""
    try:
        return _read("/proc/sys/kernel/random/boot_id").strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def started(pid: int) -> str:
    """The start time of a process; empty if there is none, or if it is a zombie."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return "" if len(fields) < 20 or fields[0] in "ZX" else fields[19]


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


def _listening(port: int) -> set[str]:
    """The sockets that listen at ``port`` on this machine, as in /proc; empty if unknown."""
    inodes = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        try:
            with open(table) as lines:
                rows = [line.split() for line in list(lines)[1:]]
        except OSError:
            continue
        for row in rows:
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{row[9]}]")
    return inodes


def _opened_by(process: str) -> set[str]:
    """The files behind a process's descriptors, as far as this process may know."""
    found = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{process}/fd"):
            # The process may close it meanwhile.
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/{process}/fd/{fd}"))
    return found
