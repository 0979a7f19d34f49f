"""The library's own shape: what it imports, in which direction, and what it documents."""

from __future__ import annotations

import ast
import inspect
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import async_barriers
from async_barriers import blocking

PACKAGE = Path(async_barriers.__file__).parent
MODULES = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")}


def imported(tree: ast.Module) -> set[str]:
    """Modules that ``tree`` imports anywhere, those of this package with a leading dot."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {f".{node.module or alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def test_imports_go_one_way() -> None:
    """No circle, and nothing private imports what is public."""
    graph = {
        name: {other[1:] for other in imported(tree) if other.startswith(".")}
        for name, tree in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError
    for name, others in graph.items():
        if name.startswith("_") and not name.startswith("__"):
            assert all(other.startswith("_") for other in others), name


def test_only_torch_and_anyio_are_needed() -> None:
    """Nothing but the two runtime dependencies and the standard library is imported, other than
    for a package of the module's own name, and no module needs one of those."""
    integrations = {"torch_checkpointing"}
    for tree in MODULES.values():
        assert not imported(tree) & {f".{name}" for name in integrations}
        # It takes a second, and part of it changes from one torch to the next.
        assert not any("torch.distributed.checkpoint" in name for name in imported(tree))
    roots = {
        module.partition(".")[0]
        for name, tree in MODULES.items()
        for module in imported(tree)
        if module.partition(".")[0] not in integrations & {name} and not module.startswith(".")
    }
    assert roots - sys.stdlib_module_names == {"torch", "anyio"}


def test_each_thing_is_known_in_one_place() -> None:
    """Threads, c10d's stores and the protocol: one module each knows them."""
    starts_threads = {
        name
        for name, tree in MODULES.items()
        if any(isinstance(n, ast.Attribute) and n.attr == "Thread" for n in ast.walk(tree))
    }
    assert starts_threads == {"_worker"}
    for module in ("_verdict", "_keys", "_protocol", "_membership"):
        assert not imported(MODULES[module]) & {"anyio", "asyncio", "concurrent.futures", "torch"}


def test_nothing_is_printed_by_the_source() -> None:
    """The logger is the only way the library speaks."""
    for name, tree in MODULES.items():
        if name == "__main__":  # a command, whose output this is
            continue
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [c for c in calls if isinstance(c, ast.Name) and c.id == "print"], name


def test_everything_public_is_listed_and_documented() -> None:
    """`__all__` is what `__init__` imports; classes and their public methods say what they do."""
    tree = MODULES["__init__"]
    defined = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert sorted(async_barriers.__all__) == sorted(defined)
    public = {name: getattr(async_barriers, name) for name in async_barriers.__all__}
    public |= {name: getattr(blocking, name) for name in blocking.__all__}
    for name, thing in public.items():
        if not callable(thing):
            continue
        assert inspect.getdoc(thing), name
        for method, value in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(value) and not method.startswith("_"):
                assert inspect.getdoc(getattr(thing, method)), f"{name}.{method}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_say_what_they_are_for(name: str) -> None:
    """Each first docstring line is one responsibility in one line."""
    docstring = ast.get_docstring(MODULES[name])
    assert docstring is not None
    assert docstring.partition("\n")[0].endswith((".", ":")), docstring
