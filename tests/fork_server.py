"""What stands in for the interpreter where a test starts a program that uses torch.

To import torch takes three seconds of a slow machine's processor, and is most of what such a
program costs. Here one process, the server, has imported it, and forks for each program. What
`python` names is a small client. It takes an interpreter's arguments, hands them to the server with
its environment, its directory and its open files, passes signals on, and ends as the program does.

The program has an interpreter's whole life, with a ``__main__`` of its own, also at the end. What
differs: it is not the client's process, so who kills the client kills it a moment later, and to
stop the client does not stop it. It has the server's namespaces, limits, session and process group.
Its streams are buffered, whatever its options say; what torch reads of the environment when it is
imported is the server's. And it ends faster, unless it calls ``gc.unfreeze``.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import marshal
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

CLIENT = """#!{real} -IS
import marshal, os, signal, socket, sys

rest = sys.argv[1:]
while rest and rest[0] in ("-u", "-B"):
    rest = rest[1:]
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    if not rest or (rest[0].startswith("-") and rest[0] not in ("-c", "-m")):
        raise ConnectionRefusedError("this takes an interpreter of its own")
    server.connect({address!r})
except OSError:
    os.execv({real!r}, [{real!r}, *sys.argv[1:]])

numbers = [int(name) for name in os.listdir("/proc/self/fd")]
# Without the listing's own.
numbers = [n for n in numbers if n != server.fileno() and os.path.exists(f"/proc/self/fd/{{n}}")]

def pass_on(number, frame):
    try:
        server.send(b"%d" % number)
    except OSError:
        pass  # The program has ended.

passed = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
signal.pthread_sigmask(signal.SIG_BLOCK, passed)
for number in passed:
    signal.signal(number, pass_on)
socket.send_fds(
    server, [marshal.dumps((rest, dict(os.environ), os.getcwd(), numbers))], numbers
)
signal.pthread_sigmask(signal.SIG_UNBLOCK, passed)
code = int(server.recv(16) or b"1")
if code < 0:
    # Without a dump of this process, whose fault it is not.
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if code not in (-signal.SIGKILL, -signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""

# Imported for those who are forked.
MODULES = (
    *("torch.distributed", "torch.distributed.run", "torch.distributed.checkpoint", "trio"),
    *("async_barriers", "async_barriers.blocking", "async_barriers.testing"),
)
# Above all that a program opens, or is handed.
_HIGH = 500
_MESSAGE_BYTES = 1 << 18
_CLIENT_AT = "TESTS_FORK_SERVER"


def python() -> str:
    """The path of a program that takes an interpreter's arguments; the first call starts it."""
    if _CLIENT_AT not in os.environ:
        place = tempfile.TemporaryDirectory(prefix="fork-server-")
        server = subprocess.Popen(
            [sys.executable, __file__, place.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        atexit.register(place.cleanup)
        atexit.register(server.wait, 10)
        # It ends then.
        atexit.register(server.stdin.close)
        os.environ[_CLIENT_AT] = str(Path(place.name, "python"))
    return os.environ[_CLIENT_AT]


def run(client: str, argv: list[str], environment: dict[str, str], directory: str) -> None:
    """As the interpreter would; this returns to its end."""
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    ours = {str(Path(__file__).parent), *map(os.path.abspath, paths)}
    kept = [path for path in sys.path if os.path.abspath(path) not in ours]
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = client
    multiprocessing.set_executable(client)
    theirs = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [*map(os.path.abspath, theirs), *kept]
    for option in filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")):
        warnings._setoption(option)  # type: ignore[attr-defined]
    how, *rest = argv
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if how == "-m":
        sys.argv = ["-m", *rest[1:]]
        sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    elif how == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec", dont_inherit=True), main.__dict__)
    else:
        sys.argv = [how, *rest]
        sys.path.insert(0, str(Path(how).resolve().parent))
        main.__file__ = how
        exec(compile(Path(how).read_bytes(), how, "exec", dont_inherit=True), main.__dict__)


def serve(place: str) -> Callable[[], None] | None:
    """Fork when asked to. Returns in each program, and in the server at its end."""
    for module in MODULES:
        importlib.import_module(module)
    # A module that is run had better not be there already.
    del sys.modules["torch.distributed.run"]
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    address = str(Path(place, "socket"))
    listening.bind(address)
    listening.listen(64)
    client = Path(place, "python")
    client.write_text(CLIENT.format(real=sys.executable, address=address))
    client.chmod(0o700)
    # What torch left is not for the programs' collectors: going through it costs each 0.3 s at its
    # exit.
    gc.collect()
    gc.freeze()
    # Its children need not be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        if 0 in select.select([listening.fileno(), 0], [], [])[0]:
            return None
        connection = listening.accept()[0]
        if not os.fork():
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _keep(connection, str(client))
        connection.close()


def _keep(connection: socket.socket, client: str) -> Callable[[], None]:
    """Fork the program, in which this returns, and see to it."""
    message, fds, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, _HIGH)
    if not message:
        os._exit(0)  # Its client was killed.
    argv, environment, directory, numbers = marshal.loads(message)
    child = os.fork()
    if not child:
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, _HIGH) for fd in fds]
        connection.detach()
        os.closerange(0, _HIGH)
        for fd, number in zip(high, numbers, strict=True):
            os.dup2(fd, number)
            os.close(fd)
        return partial(run, client, argv, environment, directory)
    os.closerange(0, 3)
    for fd in fds:
        os.close(fd)
    process, watched = os.pidfd_open(child), [connection.fileno()]
    while True:
        ready = select.select([process, *watched], [], [])[0]
        if process in ready:
            break
        if said := connection.recv(16):
            os.kill(child, int(said))
        else:
            os.kill(child, signal.SIGKILL)
            watched.clear()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.send(b"%d" % code)
    finally:
        os._exit(0)


if __name__ == "__main__":
    if program := serve(sys.argv[1]):
        program()
