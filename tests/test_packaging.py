"""What is published: the sdist, the wheel, and the wheel in an environment of its own."""

from __future__ import annotations

import email
import importlib
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PATIENCE_SECS = 60.0

# Two ranks cross, in one process; and where what they import comes from.
USE = """
import anyio, async_barriers
from async_barriers.testing import local_barriers

async def main():
    async with local_barriers(2) as barriers, anyio.create_task_group() as ranks:
        for barrier in barriers:
            ranks.start_soon(barrier.execute_barrier)

anyio.run(main)
print(async_barriers.__file__)
"""


class Built(NamedTuple):
    sdist: Path
    wheel_of_the_sdist: Path
    wheel: Path


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a Python command prints, in no environment but its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_SECS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """What `python -m build` makes, offline."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*build, first)  # the wheel from the sdist
    run(*build, second, "--wheel")  # the wheel from this tree
    (sdist,) = first.glob("*.tar.gz")
    (wheel_of_the_sdist,) = first.glob("*.whl")
    (wheel,) = second.glob("*.whl")
    return Built(sdist, wheel_of_the_sdist, wheel)


def needed(name: str, found: set[str]) -> Iterator[Path]:
    """The packages and modules of an installed distribution and of all that it requires."""
    if name in found:
        return
    found.add(name)
    dist = distribution(name)
    for file in dist.files or ():
        if file.parts[0] not in ("..", "__pycache__") and file.suffix != ".pth":
            yield Path(str(dist.locate_file(file.parts[0])))
    for requirement in map(Requirement, dist.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from needed(requirement.name, found)


@pytest.mark.processes
def test_the_wheel_needs_torch_and_anyio_alone(built: Built, tmp_path: Path) -> None:
    """In an environment with torch, anyio and what those require, the wheel installs without a
    download, is typed, crosses a barrier and has its command."""
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin" / "python"
    (site,) = tmp_path.glob("lib/python*/site-packages")
    found: set[str] = set()
    for path in {*needed("torch", found), *needed("anyio", found)}:
        (site / path.name).symlink_to(path)
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "-q", "--no-index", "--no-compile", built.wheel)

    package = site / "async_barriers"
    assert run(python, "-c", USE, cwd=tmp_path) == f"{package / '__init__.py'}\n"
    assert (package / "py.typed").is_file()
    assert "doctor" in run(python, "-m", "async_barriers", "--help", cwd=tmp_path)


def test_what_the_wheel_says_of_itself(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """It requires what `make versions` runs the oldest of, and names each Python that it runs."""
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        said = email.message_from_bytes(archive.read(name))
    monkeypatch.syspath_prepend(ROOT / "tools")
    rows = importlib.import_module("versions").ROWS
    oldest = rows["oldest"]
    needed = {require for require in said.get_all("Requires-Dist", []) if "extra" not in require}
    for requirement in map(Requirement, needed):
        # At least that minor version.
        (least,) = requirement.specifier
        assert least.operator == ">="
        assert f"{getattr(oldest, requirement.name)}.".startswith(f"{least.version}.")
    assert {Requirement(each).name for each in needed} == {"torch", "anyio"}
    assert said["Requires-Python"] == f">={oldest.pythons}"
    tried = {each.rstrip("t") for row in rows.values() for each in row.pythons.split()}
    language = "Programming Language :: Python :: "
    told = {each.removeprefix(language) for each in said.get_all("Classifier", [])}
    assert tried == {each for each in told if each.startswith("3.")}
    assert f'\nversion = "{said["Version"]}"\n' in (ROOT / "pyproject.toml").read_text()
    assert said["License-Expression"] == "BSD-3-Clause"


def test_the_sdist_is_the_whole_project(built: Built) -> None:
    """The sdist holds the tests, documents, examples and benchmarks, and makes the same wheel."""
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("src", "tests", "examples", "benchmarks", "tools", "docs")
    texts = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for suffix in ("py", "md")
        for path in ROOT.joinpath(folder).rglob(f"*.{suffix}")
    }
    assert {name.partition("/")[0] for name in texts} == {*folders}
    texts |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile"}
    assert texts | {"constraints.txt", "pyproject.toml"} <= names
    assert built.wheel_of_the_sdist.read_bytes() == built.wheel.read_bytes()


def test_the_wheel_holds_the_package_alone(built: Built) -> None:
    """The wheel holds every file of the package, its licence, and nothing beside them."""
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    source = ROOT / "src"
    package = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    (info,) = {name.partition("/")[0] for name in names - package}
    described = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    assert names == package | {f"{info}/{name}" for name in described}
