"""Runs the tests with the oldest and the newest of what the library takes: `make versions`.

`python tools/versions.py [--in FOLDER] [--within SECS] [ROW ...]`, by default the usual rows. Each has
an environment of its own, made with pip alone: the built wheel, the versions that the row names, and
a torch from `fetch_torch`. It is deleted before the next one, so that 2 GB are enough. A row whose
Python is not on this machine, or that there is no time for, is not run, and that is said.

Pythons are looked for on the PATH, among pyenv's, and in the folders that PYTHONS names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fetch_torch import fetch

ROOT = Path(__file__).resolve().parents[1]
TESTED = [
    "test_versions",
    "test_crossing",
    "test_commit",
    "test_steps",
    "test_every_store",
    "test_loops",
    "test_lost_connections",
    "test_connection",
    "test_real_servers",
    "test_testing_kit",
    "test_config",
    "test_verdict",
    "test_threads_at_once",
]
# Those over one rank's processes, and the slow ones, do not depend on a version.
WITHIN_A_PROCESS = ("-m", "not processes and not bound")
TOOLS = ("pytest>=8", "blockbuster", "hypothesis", "packaging", "numpy")
ROW_SECS = 420.0


class Row(NamedTuple):
    """What to run with; "" is the newest there is.

    :ivar pythons: the first that this machine has, oldest compatible first where an end is meant
    """

    torch: str
    pythons: str
    anyio: str
    trio: str


ROWS = {
    "oldest": Row("2.9.0", "3.10", "4.0.0", "0.31.0"),
    "2.10": Row("2.10.0", "3.11", "4.5.2", "0.31.0"),
    "2.11": Row("2.11.0", "3.12", "4.8.0", "0.32.0"),
    "2.12": Row("2.12.1", "3.13", "", ""),
    "2.13": Row("2.13.0", "3.13", "", ""),
    "2.14": Row("2.14.1", "3.10", "", ""),
    "newest": Row("", "3.14 3.13 3.12 3.11", "", ""),
    "no-gil": Row("2.12.0", "3.13t", "", ""),
    "no-gil-newest": Row("", "3.14t", "", ""),
}
USUAL = ("oldest", "2.11", "newest", "no-gil")


class NotRun(Exception):
    """A row cannot be run here, and why."""


def pythons() -> Iterator[Path]:
    """Where interpreters may be."""
    named = os.environ.get("PYTHONS", "").split(os.pathsep)
    yield from (
        Path(folder) for folder in [*named, *os.environ["PATH"].split(os.pathsep)] if folder
    )
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(pyenv.glob("versions/*/bin"))


def find(python: str) -> Path | None:
    """An interpreter of that version, with or without a GIL as asked."""
    ask = (
        "import sys, sysconfig as s; print('%d.%d' % sys.version_info[:2] + "
        "('t' if s.get_config_var('Py_GIL_DISABLED') else ''))"
    )
    for folder in pythons():
        path = folder / f"python{python}"
        if os.access(path, os.X_OK):
            # pyenv's shims are there for versions that are not active.
            said = subprocess.run([path, "-c", ask], capture_output=True, text=True)
            if said.returncode == 0 and said.stdout.strip() == python:
                return path
    return None


class Environment:
    """An interpreter with one torch, the wheel, and what tests need.

    :param wheel: of the library
    :param requirements: besides it
    """

    def __init__(self, folder: Path, torch: str, python: str, wheel: Path, *requirements: str):
        interpreter = find(python)
        if interpreter is None:
            raise NotRun(f"there is no Python {python} on this machine")
        fetch(torch, python, folder / "torch")
        self.folder = folder
        self.python = folder / "env" / "bin" / "python"
        subprocess.run([interpreter, "-m", "venv", "--without-pip", folder / "env"], check=True)
        (site,) = folder.glob("env/lib/python*/site-packages")
        (site / "torch.pth").write_text(f"{folder / 'torch'}\n")
        self._pip(folder, str(wheel), *requirements)

    def _pip(self, folder: Path, *requirements: str) -> None:
        """Install into it, by a pip that works on every Python."""
        quiet = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "pip"]
        subprocess.run(quiet, check=True, stderr=subprocess.DEVNULL)
        (pip,) = folder.glob("pip-*.whl")
        environment = {**clean(), "PYTHONPATH": str(pip), "PIP_CONSTRAINT": os.devnull}
        command = [self.python, "-m", "pip", "install", "-q", "--no-compile", *requirements]
        installed = subprocess.run(command, env=environment, capture_output=True, text=True)
        if installed.returncode:
            raise NotRun(f"pip could not install it: {installed.stderr.strip()[-500:]}")

    def has(self) -> str:
        """What is in it, in words."""
        ask = (
            "import platform, sys, sysconfig, torch; from importlib.metadata import version as v;"
            "print('torch', torch.__version__, '· Python', platform.python_version() + "
            "('t' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''), "
            "'· anyio', v('anyio'), '· trio', v('trio'))"
        )
        return subprocess.run(
            [self.python, "-c", ask], env=clean(), check=True, capture_output=True, text=True
        ).stdout.strip()


def clean() -> dict[str, str]:
    """The environment variables, without those that lead Python elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def build_wheel(folder: Path) -> Path:
    """The library's wheel, from this tree."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def run(row: Row, folder: Path, wheel: Path, tested: list[str], within_secs: float) -> str:
    """Run the tests; what it was that passed, in words.

    :raises NotRun: it could not be tried
    :raises AssertionError: a test failed
    """
    began = time.monotonic()
    python = next((each for each in row.pythons.split() if find(each)), row.pythons.split()[0])
    requirements = [
        f"{name}=={version}" if version else name
        for name, version in (("anyio", row.anyio), ("trio", row.trio))
    ]
    environment = Environment(folder, row.torch, python, wheel, *requirements, *TOOLS)
    command: list[str | Path] = [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [*WITHIN_A_PROCESS, "-o", "addopts=", "-o", "testpaths=tests"]
    command += [*tested]
    left = within_secs - (time.monotonic() - began)
    what = environment.has()
    env = {**clean(), "RES_OPTIONS": "timeout:1 attempts:1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=left, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"{what}: the tests did not end within {within_secs:.0f} s") from None
    passed = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode == 0, f"{what}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    return f"{what}: {passed}"


def main() -> int:
    """Run rows; 1 if one failed, or was asked for by name and not run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--in", dest="folder", type=Path, help="where downloads go, 2 GB")
    parser.add_argument("--within", type=float, default=20 * 60.0, help="seconds for all rows")
    parser.add_argument("--tests", nargs="+", help="test files, in place of the usual ones")
    asked = parser.parse_args()
    if unknown := set(asked.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    tested = asked.tests or [f"tests/{name}.py" for name in TESTED]
    ends = time.monotonic() + asked.within
    failed = False
    with tempfile.TemporaryDirectory(prefix="versions-", dir=asked.folder) as scratch:
        wheel = build_wheel(Path(scratch))
        for name in asked.rows or USUAL:
            folder = Path(scratch, name)
            left = min(ROW_SECS, ends - time.monotonic())
            try:
                if left < 30:
                    raise NotRun("there was no time left")
                print(f"{name}: {run(ROWS[name], folder, wheel, tested, left)}", flush=True)
            except NotRun as exc:
                failed |= bool(asked.rows)
                print(f"{name}: not run: {exc}", flush=True)
            except AssertionError as exc:
                failed = True
                print(f"{name}: FAILED: {exc}", flush=True)
            except subprocess.CalledProcessError as exc:
                failed |= bool(asked.rows)
                print(f"{name}: not run: {exc}", flush=True)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
