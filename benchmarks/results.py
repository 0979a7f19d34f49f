"""Summarises, prints and saves the numbers of every benchmark."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = [
    *("async-barriers", "torch", "anyio", "trio", "uvloop"),
    *("torch_checkpointing", "torchsnapshot", "numpy"),
]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    ordered = sorted(values)
    if len(ordered) > 1:
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    else:
        low = high = ordered[0]
    return {
        "median": statistics.median(ordered),
        "q1": low,
        "q3": high,
        "min": ordered[0],
        "max": ordered[-1],
        "n": len(ordered),
    }


def shown(of: dict[str, float], unit: float = 1.0, digits: int = 0) -> str:
    """``median (q1-q3)``, in multiples of ``unit``."""
    median, low, high = (of[key] / unit for key in ("median", "q1", "q3"))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    texts = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def machine() -> dict[str, Any]:
    """The machine and the versions that a benchmark ran on."""
    return {
        "when": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


class Report:
    """The report of one benchmark: printed, and saved as ``results/<name>.json`` and ``.txt``."""

    def __init__(self, title: str) -> None:
        self._machine = machine()
        self._said: list[str] = []
        about = self._machine
        packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
        self.say(
            f"{title}\n{about['when']}, {about['cpu']}, {about['cores']} cores, "
            f"load {about['load']:.2f}\n{about['system']}, Python {about['python']}, "
            f"commit {about['commit']}\n{packages}\n"
        )

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self._said.append(text)

    def save(self, name: str, data: dict[str, Any]) -> None:
        """Save it, with the numbers behind it."""
        RESULTS.mkdir(exist_ok=True)
        whole = json.dumps({"machine": self._machine, **data}, indent=1)
        (RESULTS / f"{name}.json").write_text(whole + "\n")
        (RESULTS / f"{name}.txt").write_text("\n".join(self._said).rstrip() + "\n")
        print(f"\nsaved results/{name}.json")


def numbers(text: str) -> list[int]:
    """``2,8,32``, as an argument."""
    return [int(number) for number in text.split(",")]


def progress(what: str) -> None:
    """Say on stderr how far it is."""
    print(f"... {what}", file=sys.stderr, flush=True)


def load(name: str) -> dict[str, Any] | None:
    """The numbers that `Report.save` wrote, if there are any."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _commit() -> str:
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
