"""The house: floors, no circles, no hooks upwards, nothing of others that is private, and its size.

Each module is read once. docs/architecture.md draws what is checked here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa
from alembic.migration import MigrationContext
from sqlalchemy.engine.default import DefaultExecutionContext

import sbert_pg
from sbert_pg.embedded import EmbeddedServer

PACKAGE = Path(sbert_pg.__file__).parent

#: Floor of each room, a folder or a module of the top level. Rooms of one floor are wings, and do
#: not import each other; floor 0 is excepted, whose modules are small and stand on each other.
FLOORS: dict[str, float] = {
    "errors": 0, "distance": 0, "source": 0, "spec": 0, "process": 0, "progress": 0,
    "probes": 0, "system": 0, "sqlstates": 0,
    "encoder": 1,
    # The encoders of this process: loads one that a column names, and imports its wing then.
    "registry": 1.1,
    "types": 1.2,
    # An index is declared on columns of the types.
    "indexes": 1.5,
    "catalog": 2, "sql": 0,
    # What the flush, bulk statements and the loader share: the texts and vectors of rows.
    "row_vectors": 2.5,
    # How texts are cut, and how a class declares it: for the search, the flush and workers.
    "passages": 2.7,
    "orm": 3, "search": 3, "loading": 3, "reranking": 3,
    "freshness": 4, "clustering": 4,
    "reembed": 5, "tuning": 5,
    "alembic": 6, "adapters": 6, "serving": 6,
    "cli": 7,
    # At the side: servers and encoders for tests and first steps.
    "embedded": 1, "testing": 1.15,
    # The front door imports what it exports, when it is first asked for.
    "": 8,
}  # fmt: skip

#: Imports between wings or upwards that are meant, with the reason.
ALLOWED: dict[tuple[str, str], str] = {}

#: Private names of others, with the reason; each has a test that fails when it disappears.
PRIVATE_NAMES: dict[str, str] = {
    "_expanded_parameters": "names of a list's values, which is gone once a statement is compiled",
    "_in_external_transaction": "whether Alembic began the transaction, which it does not say else",
    "_is_clone_of": "whether a parameter is one of a lambda, whose value changes with each call",
    "_lock": "the embedded server's lock on its directory, which its own start does not hold",
}

#: Attributes with an underscore that are documented as public.
_PUBLIC = {"_asdict", "_replace", "_fields", "_make", "_mapping", "_tuple", "_sa_class_manager"}

#: Most modules and lines of each room: a new capability raises its own, and nobody else's.
ROOMS: dict[str, tuple[int, int]] = {
    "adapters": (10, 1892),
    "alembic": (8, 2660),
    "catalog": (9, 2594),
    "cli": (16, 4275),
    "clustering": (15, 4802),
    "encoder": (22, 6556),
    "freshness": (15, 4876),
    "indexes": (5, 1206),
    "loading": (5, 1154),
    "orm": (4, 875),
    "passages": (4, 1082),
    "reembed": (11, 2866),
    "search": (14, 4548),
    "serving": (14, 3325),
    "sql": (1, 24),
    "tuning": (14, 3861),
    "types": (7, 1652),
}
#: All rooms that are one module.
MOST_LINES_OF_THE_REST = 3533
#: A longer module says why in its docstring, by the word "long".
MOST_LINES_OF_A_MODULE = 420
MOST_LINES_OF_A_FUNCTION = 60
#: Functions with more ways through them than ten; this number only falls.
MOST_BRANCHED_FUNCTIONS = 11


class Module(NamedTuple):
    """A module as it was read."""

    name: str
    text: str
    tree: ast.Module
    imports: frozenset[str]
    room: str


@cache
def house() -> dict[str, Module]:
    """Every module of the package by its name, ``""`` for the front door."""
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [p for p in path.relative_to(PACKAGE).with_suffix("").parts if p != "__init__"]
        if parts[:1] != ["migrations"]:
            paths[".".join(parts)] = path
    read = {}
    for name, path in paths.items():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        imports = frozenset(_imports(tree, paths) - {name})
        read[name] = Module(name, text, tree, imports, _room(name))
    return read


def _room(name: str) -> str:
    return name.partition(".")[0]


def _imports(tree: ast.Module, known: dict[str, Path]) -> set[str]:
    """What a module imports of this package: at its top, inside functions, for type checkers."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "sbert_pg":
                inner = name.removeprefix("sbert_pg").removeprefix(".")
                while inner and inner not in known:
                    inner = inner.rpartition(".")[0]
                imported.add(inner)
    return imported


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_every_room_has_a_floor() -> None:
    rooms = {module.room for module in house().values()}
    assert rooms <= set(FLOORS), f"rooms without a floor: {sorted(rooms - set(FLOORS))}"
    assert set(FLOORS) <= rooms, f"floors without a room: {sorted(set(FLOORS) - rooms)}"


def test_no_floor_imports_a_higher_one_and_wings_do_not_meet() -> None:
    wrong = []
    for module in house().values():
        own = FLOORS[module.room]
        for name in module.imports:
            room = _room(name)
            if room == module.room or (module.room, room) in ALLOWED:
                continue
            if FLOORS[room] > own or (FLOORS[room] == own > 0):
                wrong.append(f"{module.name} (floor {own}) imports {name} ({FLOORS[room]})")
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    """None among modules, imports for type checkers included."""
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        if name in done:
            return
        for other in house()[name].imports:
            # A package's face imports what it exports: its own modules may name the package.
            if other and not name.startswith(f"{other}.") and not other.startswith(f"{name}."):
                visit(other, (*trail, name))
        done.add(name)

    for name in house():
        if name:
            visit(name, ())


def test_nothing_is_called_at_import() -> None:
    """No module gives a function of its own to a lower one when it is imported.

    Such a hook is an import upwards that no reader of imports sees.
    """
    wrong = []
    for module in house().values():
        imported = {
            alias.asname or alias.name
            for node in module.tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sbert_pg")
            for alias in node.names
        }
        for node in module.tree.body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                called = ast.unparse(node.value.func)
                if called.partition(".")[0] in imported:
                    wrong.append(f"{module.name or '__init__'}:{node.lineno} calls {called}()")
    assert not wrong, "\n".join(wrong)


def test_private_names_of_others_are_few_and_have_a_reason() -> None:
    used = {}
    for module in house().values():
        pattern = r"\b(?:def|class)\s+(_\w+)|self\.(_\w+)\s*[:=]|^\s*(_\w+)\s*[:=]"
        own = {name for group in re.findall(pattern, module.text, re.MULTILINE) for name in group}
        for node in ast.walk(module.tree):
            name = _attribute(node)
            if name and re.match(r"_[a-z]", name) and name not in own | _PUBLIC:
                used[name] = f"{module.name}:{getattr(node, 'lineno', 0)} uses {name}"
    unexplained = [place for name, place in used.items() if name not in PRIVATE_NAMES]
    assert not unexplained, "\n".join(unexplained)
    assert set(PRIVATE_NAMES) == set(used), "PRIVATE_NAMES lists a name that is not used any more"
    assert len(PRIVATE_NAMES) <= 10


def test_private_names_are_still_there(embedded: EmbeddedServer) -> None:
    context = MigrationContext.configure(dialect_name="postgresql")
    assert hasattr(context, "_in_external_transaction")
    assert hasattr(sa.literal(1), "_is_clone_of")
    assert hasattr(DefaultExecutionContext, "_expanded_parameters")
    assert hasattr(embedded._server, "_lock")


def _attribute(node: ast.AST) -> str | None:
    """The attribute that an expression reads, by a dot or by ``getattr``, of another object."""
    if isinstance(node, ast.Attribute):
        return None if ast.unparse(node.value) in ("self", "cls") else node.attr
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
        name = node.args[1] if len(node.args) > 1 else None
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            return name.value
    return None


def test_size() -> None:
    modules = house().values()
    lines = {module.name: module.text.count("\n") for module in modules}
    for room, (most_modules, most_lines) in ROOMS.items():
        own = [lines[module.name] for module in modules if module.room == room]
        assert len(own) <= most_modules, f"{room}: {len(own)} modules"
        assert sum(own) <= most_lines, f"{room}: {sum(own)} lines"
    rest = [module.name for module in modules if module.room not in ROOMS]
    assert all("." not in name for name in rest), f"rooms without a ceiling: {rest}"
    assert sum(lines[name] for name in rest) <= MOST_LINES_OF_THE_REST
    long = {
        module.name: lines[module.name]
        for module in modules
        if lines[module.name] > MOST_LINES_OF_A_MODULE
        and "long" not in (ast.get_docstring(module.tree) or "").lower()
    }
    assert not long, f"modules longer than {MOST_LINES_OF_A_MODULE} lines: {long}"


def test_functions_stay_readable() -> None:
    long = []
    for module in house().values():
        for function in _functions(module.tree):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if ast.get_docstring(function, clean=False) is not None:
                docstring = function.body[0]
                lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                long.append(f"{module.name}.{function.name}: {lines} lines")
    assert not long, "\n".join(long)


def _ways(function: ast.AST) -> int:
    """Cyclomatic complexity as radon counts it: boolean operators and comprehensions count."""
    ways, nodes = 1, list(ast.iter_child_nodes(function))
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, (ast.If, ast.IfExp, ast.Assert, ast.match_case)):
            ways += 1
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
            ways += 1 + bool(node.orelse)
        elif isinstance(node, ast.Try):
            ways += len(node.handlers) + bool(node.orelse)
        elif isinstance(node, ast.BoolOp):
            ways += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            ways += 1 + len(node.ifs)
    return ways


def test_few_functions_have_many_branches() -> None:
    branched = [
        f"{module.name}.{function.name}: {_ways(function)}"
        for module in house().values()
        for function in _functions(module.tree)
        if _ways(function) > 10
    ]
    assert len(branched) <= MOST_BRANCHED_FUNCTIONS, "\n".join(branched)


def test_ways_are_counted() -> None:
    source = """
def f(rows):
    for row in rows if rows or True else []:
        try:
            return [x for x in row if x and row]
        except ValueError:
            pass
    else:
        assert rows
"""
    (function,) = _functions(ast.parse(source))
    assert _ways(function) == 10
