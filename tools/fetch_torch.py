"""Fetches a build of torch for any Python, with pip alone, and makes it import here.

`python tools/fetch_torch.py VERSION PYTHON FOLDER`, PYTHON being "3.12", or "3.13t" without a GIL.
It leaves out the packages that torch needs for a GPU, about 3 GB; see `stand_in`. It does not
install torch's other requirements, which its metadata names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from stand_in import read, stand_in

# The section of a library with the code for GPUs, most of its size. It is never loaded here.
_FOR_GPUS = ".nv_fatbin"
_NEEDS_GPUS = ("Requires-Dist: nvidia-", "Requires-Dist: cuda-", "Requires-Dist: triton")
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_28_aarch64")
# Only compilers read these.
_UNUSED = ("torch/include/", "torch/bin/protoc")


def download(what: list[str], python: str, folder: Path) -> None:
    """Have pip fetch wheels for some Python, without their requirements.

    :raises subprocess.CalledProcessError: there are none, or the download fails
    """
    platform = _PLATFORMS[os.uname().machine == "aarch64"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--platform", platform]
    command += ["--python-version", python.rstrip("t"), "--abi", "cp" + python.replace(".", "")]
    # The constraints of this machine's pip are about another torch.
    env = {**os.environ, "PIP_CONSTRAINT": os.devnull, "TMPDIR": str(folder)}
    command += ["-d", str(folder), *what]
    subprocess.run(command, check=True, env=env, capture_output=True, text=True)


def drop_gpu_code(library: Path) -> None:
    """Make a hole in the file in place of the code for GPUs, which then reads as zeros."""
    for line in read("readelf", "-SW", library).splitlines():
        fields = line.partition("] ")[2].split()
        if fields and fields[0] == _FOR_GPUS:
            offset, size = (str(int(field, 16)) for field in fields[3:5])
            hole = ["--punch-hole", "--offset", offset, "--length", size]
            subprocess.run(["fallocate", *hole, library], check=True)


def need_no_gpu(folder: Path) -> None:
    """Have pip believe that torch requires nothing for a GPU."""
    (metadata,) = folder.glob("torch-*.dist-info/METADATA")
    lines = metadata.read_text().splitlines(keepends=True)
    metadata.write_text("".join(line for line in lines if not line.startswith(_NEEDS_GPUS)))


def fetch(version: str, python: str, folder: Path) -> None:
    """Put a torch into ``folder`` if there is none; the newest if ``version`` is empty."""
    if (folder / "torch").is_dir():
        return
    wheels = folder.with_name(folder.name + ".wheels")
    part = folder.with_name(folder.name + ".part")
    for each in (wheels, part):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir(parents=True)
    try:
        download([f"torch=={version}" if version else "torch"], python, wheels)
        (wheel,) = wheels.glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not name.startswith(_UNUSED):
                    path = Path(archive.extract(name, part))
                    if name.startswith("torch/lib/libtorch_cuda"):
                        drop_gpu_code(path)
        shutil.rmtree(wheels)
        stand_in(part)
        need_no_gpu(part)
        part.rename(folder)
    finally:
        for each in (wheels, part):
            shutil.rmtree(each, ignore_errors=True)


if __name__ == "__main__":
    fetch(sys.argv[1], sys.argv[2], Path(sys.argv[3]).absolute())
