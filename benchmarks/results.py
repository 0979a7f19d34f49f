"""What every benchmark does with its numbers: summarise them, print them, keep them as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
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
    """Where and with what a benchmark ran."""
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


def introduce(title: str) -> dict[str, Any]:
    """Print what is measured and where; the latter."""
    about = machine()
    packages = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
    print(f"{title}\n{about['cpu']}, {about['cores']} cores, load {about['load']:.2f}")
    print(f"{about['system']}, Python {about['python']}, commit {about['commit']}")
    print(f"{packages}\n", flush=True)
    return about


def save(name: str, about: dict[str, Any], data: dict[str, Any]) -> None:
    """Keep the numbers as ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": about, **data}, indent=1) + "\n")
    print(f"\nsaved {path.relative_to(HERE.parent)}")


def load(name: str) -> dict[str, Any] | None:
    """What `save` kept, if it did."""
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
