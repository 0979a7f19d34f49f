"""The library's own shape: what it imports, in which direction, how large it is, what it documents.

`src/async_barriers` has wings (folders), and rooms in them (modules). What a rank says to a store
is in `_protocol`, what carries that in `_store`, and one rank at one store in `_client`: the core.
"""

from __future__ import annotations

import ast
import inspect
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import async_barriers

PACKAGE = Path(async_barriers.__file__).parent


def name_of(path: Path) -> str:
    """`_store.wire` of `_store/wire.py`, and `_store` of `_store/__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


TEXTS = {name_of(path): path.read_text() for path in PACKAGE.rglob("*.py")}
MODULES = {name: ast.parse(text) for name, text in TEXTS.items()}
WINGS = {name.partition(".")[0] for name in MODULES if "." in name}
# Which other wings each may import.
MAY_IMPORT: dict[str, set[str]] = {
    "_protocol": set(),
    "_store": {"_protocol"},
    "_client": {"_protocol", "_store"},
    "_dist": {"_protocol", "_store"},
    "_doctor": {"_protocol", "_store", "_client"},
    "_observer": {"_protocol", "_store"},
    "_signal": {"_protocol", "_store", "_client"},
}
CORE = ("_protocol", "_store", "_client")
ROOM_LINES = 300
# What the core should have, and what it has today.
CORE_GOAL_LINES = 3_300
CORE_LINES = 9_404


def wing_of(name: str) -> str:
    wing = name.partition(".")[0]
    return wing if wing in WINGS else ""


def imported(name: str) -> set[str]:
    """Modules that a module imports anywhere, those of this package with a leading dot."""
    found: set[str] = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            # Of a wing's room, one dot is its wing and two are the package.
            inside = node.level == 1 and wing_of(name)
            base = [inside] if inside else []
            base += [node.module] if node.module else []
            within = [".".join([*base, alias.name]) for alias in node.names]
            rooms = [each for each in within if each in MODULES]
            found |= {f".{each}" for each in (rooms or [".".join(base) or "__init__"])}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def ours(name: str) -> set[str]:
    """Modules of this package that a module of it imports."""
    return {other[1:] for other in imported(name) if other.startswith(".")}


def lines_of(name: str) -> int:
    return len(TEXTS[name].splitlines())


def test_imports_go_one_way() -> None:
    """No circle, and nothing private imports what is public."""
    graph = {name: ours(name) for name in MODULES}
    for name, others in graph.items():
        assert others <= set(MODULES), name
    TopologicalSorter(graph).prepare()  # raises CycleError
    for name, others in graph.items():
        if name.startswith("_") and not name.startswith("__"):
            assert all(other.startswith("_") for other in others), name
            assert "__init__" not in others, name


def test_wings_are_imported_one_way() -> None:
    """Each wing imports those below it alone; so none of them is a part of a circle."""
    assert set(MAY_IMPORT) == WINGS
    TopologicalSorter(MAY_IMPORT).prepare()
    for name in MODULES:
        wing = wing_of(name)
        if wing:
            others = {wing_of(other) for other in ours(name)} - {wing, ""}
            assert others <= MAY_IMPORT[wing], f"{name} imports {others}"


def reached(name: str) -> set[str]:
    """All modules of the package that are imported with a module, and it."""
    found, todo = set(), [name]
    while todo:
        if (each := todo.pop()) not in found:
            found.add(each)
            todo += ours(each)
    return found


def test_the_protocol_knows_no_loop_no_thread_and_no_torch() -> None:
    """What ranks say to a store can be read, tried and explored without any of them; neither does
    what it imports know one."""
    known = {"anyio", "asyncio", "concurrent", "socket", "threading", "torch", "trio"}
    for name in MODULES:
        if wing_of(name) == "_protocol":
            for each in reached(name):
                roots = {module.partition(".")[0] for module in imported(each)}
                assert not roots & known, f"{each}, by {name}"


def test_bytes_and_futures_know_no_loop_no_thread_and_no_torch() -> None:
    """The wire's bytes are pure, and what waits for nothing but a store needs no event loop."""
    known = {"anyio", "asyncio", "concurrent", "socket", "threading", "torch", "trio"}
    for name in ("_store.wire", "_store.future"):
        for each in reached(name):
            roots = {module.partition(".")[0] for module in imported(each)}
            assert not roots & known, f"{each}, by {name}"


def test_only_torch_and_anyio_are_needed() -> None:
    """Nothing but the two runtime dependencies and the standard library is imported, other than
    for a package of the module's own name, and no module needs one of those."""
    integrations = {"torch_checkpointing"}
    # Imported when a storage of it is made.
    extras = {"_fsspec": {"fsspec"}}
    # Whose program runs on it has it.
    loops = {"_store.trio_loop": {"trio"}}
    for name in MODULES:
        assert not imported(name) & {f".{each}" for each in integrations}
        # It takes a second, and part of it changes from one torch to the next.
        assert not any("torch.distributed.checkpoint" in each for each in imported(name))
    roots = {
        root
        for name in MODULES
        for module in imported(name)
        if (root := module.partition(".")[0]) not in integrations & {name}
        and root not in loops.get(name, set()) | extras.get(name, set())
        and not module.startswith(".")
    }
    assert roots - sys.stdlib_module_names == {"torch", "anyio"}


def test_trio_is_imported_where_it_runs_alone() -> None:
    """A program on asyncio need not have it, nor wait for its import."""
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"trio"}, name


def using(what: str) -> set[str]:
    """The modules that use a name, or an attribute, that is called so."""
    return {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if what == getattr(node, "attr", None) or what == getattr(node, "id", None)
    }


def test_each_thing_is_known_in_one_place() -> None:
    """Threads and event loops: one room each knows them."""
    assert using("Thread") == {"_store.worker"}
    for of_a_loop in ("add_reader", "call_soon_threadsafe"):
        assert using(of_a_loop) == {"_store.asyncio_loop"}, of_a_loop
    assert using("spawn_system_task") == {"_store.trio_loop"}
    in_core = {name for name in MODULES if wing_of(name) in CORE}
    assert {name for name in in_core if "asyncio" in imported(name)} == {"_store.asyncio_loop"}
    # What c10d's stores are: who opens one, calls one, and is passed one.
    speak = {name for name in in_core if any(m.startswith("torch") for m in imported(name))}
    assert speak == {
        "_store.blocking_store",
        "_store.connecting",
        "_store.copies",
        "_store.sources",
        "_store.threads",
    }


def test_nothing_is_printed_by_the_source() -> None:
    """The logger is the only way the library speaks."""
    for name, tree in MODULES.items():
        if name == "__main__":  # a command, whose output this is
            continue
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [c for c in calls if isinstance(c, ast.Name) and c.id == "print"], name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_room_is_too_large(name: str) -> None:
    """A room can be read at once."""
    assert lines_of(name) <= ROOM_LINES


def test_the_core_does_not_grow() -> None:
    """The three wings of the core together are a few thousand lines."""
    lines = sum(lines_of(name) for name in MODULES if wing_of(name) in CORE)
    assert lines <= max(CORE_LINES, CORE_GOAL_LINES)


def test_everything_public_is_listed_and_documented() -> None:
    """`__all__` is what `__init__` imports; classes and their public methods say what they do."""
    from async_barriers import blocking

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
