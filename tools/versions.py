"""Runs the tests with the oldest and the newest of what the library takes: `make versions`.

`python tools/versions.py [ROW ...]`, by default the usual rows. Each has an environment of its own,
made with pip alone: the built wheel, the versions that the row names, and a torch from
`fetch_torch`. It is deleted before the next one, so that 2 GB are enough. If a row's Python is not
on this machine, or the time is over, the row is not run, and the output says so.

It looks for Pythons in the folders that PYTHONS names, on the PATH, and among pyenv's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from across import cross
from fetch_torch import fetch

ROOT = Path(__file__).resolve().parents[1]
# Tests of each capability that start no processes; the others would find no more differences.
TESTED = [
    f"tests/test_{name}.py"
    for name in (
        *("crossing", "commit", "steps", "every_store", "connection", "loops", "real_servers"),
        *("lost_connections", "blocking", "dist_barrier", "recording", "config", "verdict"),
        *("testing_kit", "threads_at_once"),
    )
]
TOOLS = ("pytest>=8", "pytest-xdist", "blockbuster", "hypothesis", "packaging", "numpy")


class NotRun(Exception):
    """A row cannot be run here; the message says why."""


class Row(NamedTuple):
    """The versions to run with; "" is the newest.

    :ivar pythons: the first of them that this machine has
    :ivar types: whether type checkers are run, too
    """

    torch: str
    pythons: str
    anyio: str = ""
    trio: str = ""
    types: bool = False


ROWS = {
    "oldest": Row("2.9.0", "3.10", "4.1.0", "0.31.0"),
    "2.10": Row("2.10.0", "3.11", "4.5.2", "0.31.0"),
    "2.11": Row("2.11.0", "3.12", "4.8.0", "0.32.0"),
    "2.12": Row("2.12.1", "3.13"),
    "2.13": Row("2.13.0", "3.12"),
    "2.14": Row("2.14.1", "3.10"),
    "newest": Row("", "3.14 3.13 3.12 3.11", types=True),
    "no-gil": Row("", "3.14t"),
    "no-gil-3.13": Row("2.12.0", "3.13t"),
}
# In addition to the rows with one torch: ranks on three.
ACROSS = "across"
USUAL = ("oldest", "2.11", "newest", "no-gil-3.13", ACROSS)


def pythons() -> Iterator[Path]:
    """The folders in which to look for interpreters."""
    named = [*os.environ.get("PYTHONS", "").split(os.pathsep), *os.get_exec_path()]
    yield from map(Path, filter(None, named))
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(pyenv.glob("versions/*/bin"))


def find(python: str) -> Path | None:
    """An interpreter of that version; one without a GIL where it ends in "t"."""
    ask = (
        "import sys, sysconfig as s; print('%d.%d' % sys.version_info[:2] + "
        "('t' if s.get_config_var('Py_GIL_DISABLED') else ''))"
    )
    for folder in pythons():
        path = folder / f"python{python}"
        if os.access(path, os.X_OK):
            # pyenv has shims for versions that are not active, too.
            said = subprocess.run([path, "-c", ask], capture_output=True, text=True)
            if said.stdout.strip() == python:
                return path
    return None


def clean() -> dict[str, str]:
    """The environment variables, without those that change where Python imports from."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**env, "RES_OPTIONS": "timeout:1 attempts:1", "OMP_NUM_THREADS": "1"}


class Environment:
    """An interpreter with one torch, the wheel, and what tests need.

    :raises NotRun: there is no such interpreter, or an install failed
    """

    def __init__(self, folder: Path, torch: str, python: str, *requirements: str | Path) -> None:
        interpreter = find(python)
        if interpreter is None:
            raise NotRun(f"there is no Python {python} on this machine")
        try:
            fetch(torch, python, folder / "torch")
        except subprocess.CalledProcessError as exc:
            why = (exc.stderr or str(exc)).strip()[-300:]
            raise NotRun(f"torch cannot be had ({why})") from exc
        self.python = folder / "env" / "bin" / "python"
        subprocess.run([interpreter, "-m", "venv", "--without-pip", folder / "env"], check=True)
        (site,) = folder.glob("env/lib/python*/site-packages")
        (site / "torch.pth").write_text(f"{folder / 'torch'}\n")
        # A pip that works on every Python, from its wheel.
        get: list[str | Path] = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            folder,
            "pip",
        ]
        subprocess.run(get, check=True, stderr=subprocess.DEVNULL)
        (pip,) = folder.glob("pip-*.whl")
        installed = subprocess.run(
            [self.python, "-m", "pip", "install", "-q", "--prefer-binary", *requirements],
            env={**clean(), "PYTHONPATH": str(pip), "PIP_CONSTRAINT": os.devnull},
            capture_output=True,
            text=True,
        )
        if installed.returncode:
            raise NotRun(f"pip cannot install it: {installed.stderr.strip()[-600:]}")

    def check_types(self) -> None:
        """Run type checkers on the library's source and on a user's program, with this torch.

        :raises AssertionError: one of them found an error
        """
        tools = Path(sys.executable).parent
        sources = [ROOT / "src", ROOT / "tests" / "typed_uses.py"]
        public = ["--verifytypes", "async_barriers", "--ignoreexternal"]
        executable: list[str | Path] = ["--python-executable", self.python]
        path: list[str | Path] = ["--pythonpath", self.python]
        check([tools / "mypy", "--cache-dir", os.devnull, *executable, *sources], 240.0)
        check([tools / "pyright", *path, sources[1]], 240.0)
        # This looks for packages where the first python on the PATH does.
        its_own = f"PATH={self.python.parent}{os.pathsep}{os.environ['PATH']}"
        check(["env", its_own, tools / "pyright", *public], 240.0)


def describe(python: str | Path) -> str:
    """The versions in an environment, in words."""
    ask = (
        "import platform as p, sysconfig as s, torch; from importlib.metadata import version;"
        "gil = '' if not s.get_config_var('Py_GIL_DISABLED') else ' without a GIL';"
        "print(f'torch {torch.__version__}, Python {p.python_version()}{gil}, '"
        'f\'anyio {version("anyio")}, trio {version("trio")}\')'
    )
    said = subprocess.run([python, "-c", ask], env=clean(), check=True, capture_output=True)
    return said.stdout.decode().strip()


def check(command: list[str | Path], within_secs: float) -> str:
    """The last line that a command prints.

    :raises AssertionError: it failed
    :raises NotRun: it did not end
    """
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=clean(), timeout=within_secs, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"{command[0]} did not end within {within_secs:.0f} s") from None
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout.strip().rpartition("\n")[2]


def run(
    row: Row, folder: Path, wheel: Path, tested: list[str], until: float, *, types: bool
) -> str:
    """Run the tests; return what passed, in words.

    :raises NotRun: they could not be started
    :raises AssertionError: a test failed
    """
    known = row.pythons.split()
    python = next((each for each in known if find(each)), known[0])
    chosen = (("anyio", row.anyio), ("trio", row.trio))
    named = [f"{name}=={version}" if version else name for name, version in chosen]
    # Type checkers need this package, and the tests do not.
    named += ["torch_checkpointing"] if row.types and types else []
    # There are no builds of it without a GIL.
    named += [] if python.endswith("t") else ["uvloop"]
    environment = Environment(folder, row.torch, python, wheel, *named, *TOOLS)
    what = describe(environment.python)
    command: list[str | Path] = [environment.python, "-m", "pytest", "-q", "--tb=short"]
    command += ["-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    command += ["-m", "not processes and not bound", *tested]
    passed = check(command, until - time.monotonic())
    if row.types and types:
        environment.check_types()
        passed += "; mypy and pyright have nothing to say"
    return f"{what}: {passed}"


def run_across(folder: Path) -> str:
    """Have ranks on three torches cross; return what passed, in words."""
    python = "{}.{}".format(*sys.version_info)
    older = Environment(folder / "older", "2.11.0", python, "anyio", "trio", "numpy")
    newest = Environment(folder / "newest", "", python, "anyio", "trio", "numpy")
    ranks = [older.python, Path(sys.executable), newest.python]
    env = {**clean(), "PYTHONPATH": str(ROOT / "src")}
    versions = []
    for first, backend, threads in product(range(3), ("asyncio", "trio"), (False, True)):
        versions = cross(ranks[first:] + ranks[:first], backend, threads, env)
    return f"torch {', '.join(sorted(versions))}: each hosted the others"


def outcome(name: str, run_it: Callable[[], str]) -> bool | None:
    """Run a row and print its result; True, False, or None if it was not run."""
    began = time.monotonic()
    try:
        said, passed = run_it(), True
    except NotRun as exc:
        print(f"{name}: not run: {exc}", flush=True)
        return None
    except AssertionError as exc:
        said, passed = f"FAILED: {exc}", False
    print(f"{name}: {said} ({time.monotonic() - began:.0f} s in all)", flush=True)
    return passed


def main() -> int:
    """Run rows; return 1 if one failed, 2 if one that was given by name was not run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*ROWS, ACROSS]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(names)}")
    parser.add_argument("--in", dest="folder", help="where downloads go, up to 2 GB")
    parser.add_argument("--within", type=float, default=1200.0, help="seconds for all rows")
    parser.add_argument("--tests", nargs="+", default=TESTED, help="in place of the usual ones")
    parser.add_argument("--no-types", dest="types", action="store_false", help="no type checkers")
    parser.add_argument("--here", action="store_true", help="say what this environment has")
    asked = parser.parse_args()
    if asked.here:
        print(f"here: {describe(sys.executable)}")
        return 0
    if unknown := set(asked.rows) - set(names):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    until = time.monotonic() + asked.within
    came: list[bool | None] = []
    with tempfile.TemporaryDirectory(prefix="versions-", dir=asked.folder) as scratch:
        build: list[str | Path] = [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--wheel",
            "-o",
            scratch,
            ROOT,
        ]
        check(build, 60.0)
        (wheel,) = Path(scratch).glob("*.whl")

        def run_row(name: str, folder: Path) -> str:
            if time.monotonic() > until:
                raise NotRun("there was no time left")
            if name == ACROSS:
                return run_across(folder)
            return run(ROWS[name], folder, wheel, asked.tests, until, types=asked.types)

        for name in asked.rows or USUAL:
            folder = Path(scratch, name)
            came.append(outcome(name, partial(run_row, name, folder)))
            shutil.rmtree(folder, ignore_errors=True)
    if False in came:
        return 1
    return 2 if asked.rows and None in came else 0


if __name__ == "__main__":
    sys.exit(main())
