"""The house has floors: a module imports from lower ones only, and the two wings never meet."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sbert_pg

PACKAGE = Path(sbert_pg.__file__).parent

#: Longest prefix wins. Floor, and wing where there is one.
FLOORS: dict[str, tuple[int, str | None]] = {
    "errors": (0, None),
    "distance": (0, None),
    "known": (0, None),
    "spec": (0, None),
    "probes": (0, None),
    "source": (0, None),
    "registry": (0, None),
    "encoder": (1, "encoder"),
    "encoder.convert": (2, "encoder"),
    "types": (1, "database"),
    "catalog": (1, "database"),
    "sql": (1, "database"),
    "filling": (2, "database"),
    "indexes": (2, "database"),
    "loading": (2, "database"),
    "orm": (2, "database"),
    "search": (2, "database"),
    "searching": (2, "database"),
    "ddl": (2, "database"),
    "pending": (3, "database"),
    "clustering": (3, "database"),
    "reembedding": (4, "database"),
    "worker": (5, "database"),
    "alembic": (5, "database"),
    "cli": (6, None),
    "embedded": (1, None),
    "testing": (1, None),
    # The front door: joins the wings, and imports what it exports.
    "": (6, None),
}
#: Imports inside functions that go up on purpose, with the reason.
ALLOWED_UPWARD = {
    # Loading a model that was not converted yet converts it.
    ("encoder", "encoder.convert"),
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).with_suffix("")
        parts = [part for part in relative.parts if part != "__init__"]
        if parts[:1] != ["migrations"]:
            found[".".join(parts)] = path
    return found


def room(module: str) -> str:
    """The entry of FLOORS that a module belongs to."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in FLOORS:
            return prefix
    if module == "":
        return ""
    raise AssertionError(f"sbert_pg.{module} has no floor: add it to FLOORS")


def imports(path: Path, module: str) -> set[str]:
    """Modules of this package that a file imports at run time, wherever the import stands."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    known = modules()
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name != "sbert_pg" and not name.startswith("sbert_pg."):
                continue
            inner = name.removeprefix("sbert_pg").removeprefix(".")
            while inner and inner not in known:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found - {module}


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_floor_imports_a_higher_one(module: str) -> None:
    own = room(module)
    floor, wing = FLOORS[own]
    for other in imports(modules()[module], module):
        other_room = room(other)
        if other_room == own or (own, other_room) in ALLOWED_UPWARD:
            continue
        other_floor, other_wing = FLOORS[other_room]
        assert other_floor <= floor, f"{module} (floor {floor}) imports {other} ({other_floor})"
        if floor < 6:
            assert None in (wing, other_wing) or wing == other_wing, (
                f"{module} ({wing} wing) imports {other} ({other_wing} wing)"
            )


def test_no_circles() -> None:
    graph = {module: imports(path, module) for module, path in modules().items() if module}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join([*trail, module])}"
        if module in done or module not in graph:
            return
        for other in graph[module]:
            # A package's __init__ imports what it exports; that is no circle of rooms.
            if module.startswith(f"{other}.") or other.startswith(f"{module}."):
                continue
            if (room(module), room(other)) in ALLOWED_UPWARD:
                continue
            visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_modules_stay_readable() -> None:
    """Some 400 lines; a longer module says why in its docstring, by the word "long"."""
    for module, path in modules().items():
        text = path.read_text()
        lines = text.count("\n")
        docstring = ast.get_docstring(ast.parse(text)) or ""
        assert lines <= 420 or "long" in docstring.lower(), f"{module} has {lines} lines"
