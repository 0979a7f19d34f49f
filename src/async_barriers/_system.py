"""All use of the operating system beyond Python's own modules: Linux, and macOS in part.

Only this module tells systems apart. If the system cannot tell, nothing fails here: the answer is
that it is unknown. docs/versions.md says what that costs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator

if sys.platform not in ("darwin", "win32"):
    import fcntl
    import termios

# No write to a closed connection ends the program.
UNHARMED = getattr(socket, "MSG_NOSIGNAL", 0)
# Python has no names for those of macOS.
_SO_NOSIGPIPE, _SO_NWRITE = 0x1022, 0x1024
# Nor for this one of Linux.
_SO_ATTACH_FILTER = 26


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


def deafen(sock: socket.socket) -> bool:
    """Have the kernel drop all that comes to a socket, so that a read there never returns.

    :return: whether this system can do that
    :raises OSError: the socket is gone
    """
    if sys.platform != "linux":
        return False
    # One instruction of BPF: return, having accepted no byte.
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    attached = struct.pack("HP", 1, ctypes.addressof(program))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)
    return True


def why_unusable(path: str, secs: float = 0.5) -> str:
    """Why a file cannot be opened, or that another process keeps it locked for so long; blocks.

    Empty if it can be used. Where the system does not tell locks, as for some network file systems,
    they are not noticed.
    """
    try:
        os.close(os.open(path, os.O_RDWR))
        at = os.stat(path)
    except OSError as exc:
        return str(exc)
    where = f"{os.major(at.st_dev):02x}:{os.minor(at.st_dev):02x}:{at.st_ino}"
    until = time.monotonic() + secs
    while where in _locked_by_others():
        # Not found out by locking it: to let go of it takes the GIL, and another thread may wait in
        # c10d for that lock, with the GIL.
        if time.monotonic() >= until:
            return "another process keeps it locked"
        time.sleep(0.01)
    return ""


def _locked_by_others() -> set[str]:
    """The files that other processes have locked, as in /proc/locks."""
    own = str(os.getpid())
    try:
        with open("/proc/locks") as lines:
            rows = [line.split() for line in lines]
    except OSError:
        return set()
    return {row[5] for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[4] != own}


def never_destroy(thing: object) -> None:
    """Keep ``thing``, also when the interpreter ends: its destructor would end the process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def hosted_here(port: int) -> bool:
    """Whether this process listens at ``port``; False where the system cannot tell.

    Asks each of its own sockets, since the table of all connections of a machine may be long.
    """
    libc = ctypes.CDLL(None)
    for descriptor, leads_to in _descriptors("self"):
        if leads_to.startswith("socket:") and _listens(libc, int(descriptor), port):
            return True
    return False


def _listens(libc: ctypes.CDLL, descriptor: int, port: int) -> bool:
    # Not through a Python socket, which would close what is not ours, and may change its mode.
    listens, size = ctypes.c_int(), ctypes.c_uint(ctypes.sizeof(ctypes.c_int))
    name, length = ctypes.create_string_buffer(128), ctypes.c_uint(128)
    asked = ctypes.byref(listens), ctypes.byref(size)
    if libc.getsockopt(descriptor, socket.SOL_SOCKET, socket.SO_ACCEPTCONN, *asked):
        return False  # It was closed meanwhile.
    if not listens.value or libc.getsockname(descriptor, name, ctypes.byref(length)):
        return False
    family, at = int.from_bytes(name.raw[:2], sys.byteorder), int.from_bytes(name.raw[2:4], "big")
    return family in (socket.AF_INET, socket.AF_INET6) and at == port


def holder_of(port: int) -> tuple[str, bool]:
    """The process that listens at ``port``, in words, if known; and whether it is this one."""
    inodes = _listening(port)
    for process in os.listdir("/proc") if inodes else ():
        if process.isdigit() and any(at in inodes for _, at in _descriptors(process)):
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


def _descriptors(process: str) -> Iterator[tuple[str, str]]:
    """The descriptors of a process, and the files behind them, as far as this process may know."""
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{process}/fd"):
            # The process may close it meanwhile.
            with contextlib.suppress(OSError):
                yield descriptor, os.readlink(f"/proc/{process}/fd/{descriptor}")
