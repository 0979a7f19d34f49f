"""Empty CUDA libraries, so that a CUDA build of torch imports on a machine that has none.

`python tools/stand_in.py FOLDER`, which has torch/ in it. If torch's own libraries need one that
cannot be loaded here, a stand-in is put beside them, with the symbols that they need. Each of its
functions returns "no device" (100), which is enough to import torch. Needs gcc and binutils.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

# torch calls these at import, and reads what they write.
_SAID = {
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int *n) { *n = 0; return 100; }",
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int *n) { *n = 0; return 0; }",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int *n) { *n = 0; return 0; }",
    "cudaGetLastError": "int cudaGetLastError(void) { return 0; }",
    "cudaPeekAtLastError": "int cudaPeekAtLastError(void) { return 0; }",
    "cudaGetErrorString": 'const char *cudaGetErrorString(int e) { return "no CUDA here"; }',
    "cudaGetErrorName": 'const char *cudaGetErrorName(int e) { return "cudaErrorNoDevice"; }',
}


def read(*command: str | Path) -> str:
    """The output of a command of binutils."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loads(library: str) -> bool:
    """Whether this machine can load it."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


class Wanted:
    """The symbols that torch's libraries need of libraries that are not here.

    :ivar symbols: of each such library, by the version of the symbol ("" for none)
    """

    def __init__(self, libraries: list[Path]) -> None:
        self.symbols: dict[str, dict[str, set[str]]] = {}
        here = {path.name for path in libraries}
        defined: set[str] = set()
        plain: set[str] = set()
        by_version: dict[str, set[str]] = defaultdict(set)
        home: dict[str, str] = {}
        for path in libraries:
            for name in re.findall(r"\(NEEDED\).*\[(.+)\]", read("readelf", "-dW", path)):
                if name not in here and name not in self.symbols and not loads(name):
                    self.symbols[name] = defaultdict(set)
            file = ""
            for line in read("readelf", "-VW", path).splitlines():
                if found := re.search(r" File: (\S+)", line):
                    file = found[1]
                elif found := re.search(r" Name: (\S+) +Flags: ", line):
                    home[found[1]] = file
            for line in read("readelf", "-W", "--dyn-syms", path).splitlines():
                fields = line.split()
                if len(fields) < 8 or not fields[0].rstrip(":").isdigit():
                    continue
                name, _, version = fields[7].partition("@")
                if fields[6] != "UND":
                    defined.add(name)
                elif version:
                    by_version[version.strip("@")].add(name)
                elif fields[4] == "GLOBAL":
                    plain.add(name)
        for version, names in by_version.items():
            if (library := home.get(version, "")) in self.symbols:
                self.symbols[library][version] |= names
        if self.symbols:
            # The loader takes a symbol without a version from any library, so the first one gets
            # all of them. Python has those that begin with Py.
            first = min(self.symbols)
            self.symbols[first][""] |= {name for name in plain - defined if "Py" not in name[:4]}


def build(library: Path, symbols: dict[str, set[str]]) -> None:
    """Make one stand-in."""
    code, script = [], []
    for version, names in symbols.items():
        for name in sorted(names):
            code.append(_SAID.get(name, f"long {name}(void) {{ return 100; }}"))
        if version:
            exported = "".join(f" {name};" for name in sorted(names))
            script.append(f"{version} {{ {f'global:{exported} ' if exported else ''}}};")
    with tempfile.TemporaryDirectory() as folder:
        source, versions = Path(folder, "stand_in.c"), Path(folder, "versions")
        source.write_text("\n".join([*code, "int stands_in = 1;", ""]))
        versions.write_text("\n".join(script))
        command: list[str | Path] = [
            "gcc",
            "-w",
            "-fno-builtin",
            "-shared",
            "-fPIC",
            "-o",
            library,
            source,
        ]
        command += [f"-Wl,-soname,{library.name}"]
        command += [f"-Wl,--version-script={versions}"] if script else []
        subprocess.run(command, check=True)


def stand_in(folder: Path) -> list[str]:
    """Make all missing libraries for the torch in ``folder``; return their names."""
    torch = folder / "torch"
    libraries = [path for path in torch.glob("lib/*.so*") if not path.is_symlink()]
    wanted = Wanted([*libraries, *torch.glob("_C*.so")])
    for name, symbols in wanted.symbols.items():
        build(torch / "lib" / name, symbols)
    return sorted(wanted.symbols)


if __name__ == "__main__":
    print("\n".join(stand_in(Path(sys.argv[1]))))
