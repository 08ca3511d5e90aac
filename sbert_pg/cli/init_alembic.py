"""``sbert-pg init --alembic``: register the plugin in an application's ``env.py``."""

from __future__ import annotations

import ast
import difflib
from pathlib import Path

import typer

from sbert_pg.cli import common
from sbert_pg.errors import DeclarationError

IMPORT = "from sbert_pg.alembic import autogenerate_plugins"
KEYWORD = "autogenerate_plugins"
ARGUMENT = "autogenerate_plugins=autogenerate_plugins()"


def register(app: typer.Typer) -> None:
    """Nothing of its own: ``sbert-pg init --alembic`` calls ``init_alembic``."""


def init_alembic(directory: Path, *, write: bool = False) -> None:
    """Print what an application's ``env.py`` needs, or write it.

    Args:
        directory: the Alembic directory, or its ``env.py``.
        write: edit the file; else print the change.

    Raises:
        DeclarationError: there is no ``env.py``, or nothing in it calls ``context.configure``.
    """
    path = directory if directory.is_file() else directory / "env.py"
    if not path.is_file():
        raise DeclarationError(
            f"There is no env.py in {directory}. Give the directory that 'alembic init' or "
            "'flask db init' made."
        )
    before = path.read_text(encoding="utf-8")
    after = edited(before, str(path))
    if after == before:
        common.note(f"{path} registers the plugin already.")
        return
    if write:
        path.write_text(after, encoding="utf-8")
        common.note(f"{path} registers the plugin now. Next: alembic revision --autogenerate")
        return
    change = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), str(path), str(path)
    )
    typer.echo("".join(change), nl=False)
    common.note("Nothing was written; --write does it, or 'patch -p0' with this output.")


def edited(source: str, name: str = "env.py") -> str:
    """The source of an ``env.py`` that registers the plugin; the same where it does already.

    Args:
        source: the source as it is.
        name: what messages call it.

    Raises:
        DeclarationError: it is no Python, or nothing in it calls ``context.configure``.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise DeclarationError(f"{name} cannot be read: {error}.") from error
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _configures(node)]
    if not calls:
        raise DeclarationError(
            f"Nothing in {name} calls context.configure(). Register the plugin by hand: write\n\n"
            f"    {IMPORT}\n\nand give {ARGUMENT} to what configures Alembic."
        )
    lines = source.splitlines(keepends=True)
    missing = [call for call in calls if not _knows(call)]
    for call in sorted(missing, key=lambda call: (call.lineno, call.col_offset), reverse=True):
        _add_argument(lines, call)
    if missing and IMPORT not in source:
        _add_import(lines, tree)
    return "".join(lines)


def _configures(node: ast.Call) -> bool:
    return (
        isinstance(node.func, ast.Attribute)
        and node.func.attr == "configure"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "context"
    )


def _knows(call: ast.Call) -> bool:
    for keyword in call.keywords:
        if keyword.arg != KEYWORD:
            continue
        if KEYWORD not in ast.unparse(keyword.value):
            raise DeclarationError(
                f"Line {call.lineno} gives {KEYWORD} to context.configure() already. Write\n\n"
                f"    {IMPORT}\n\nand give it autogenerate_plugins('the others', ...) instead of "
                f"{ast.unparse(keyword.value)}."
            )
        return True
    return False


def _add_argument(lines: list[str], call: ast.Call) -> None:
    """Put the argument first, on a line of its own where the others are."""
    function = call.func
    row = (function.end_lineno or call.lineno) - 1
    encoded = lines[row].encode()
    at = encoded.index(b"(", function.end_col_offset or 0) + 1
    head, tail = encoded[:at].decode(), encoded[at:].decode()
    first = [*call.args, *(keyword.value for keyword in call.keywords)]
    if call.args:
        # Positional arguments stay in front.
        last = call.args[-1]
        row = (last.end_lineno or call.lineno) - 1
        encoded = lines[row].encode()
        at = last.end_col_offset or 0
        lines[row] = f"{encoded[:at].decode()}, {ARGUMENT}{encoded[at:].decode()}"
    elif tail.strip():
        lines[row] = f"{head}{ARGUMENT}{', ' if first else ''}{tail}"
    else:
        following = lines[row + 1]
        indent = following[: len(following) - len(following.lstrip())]
        lines[row] = f"{head}{tail}{indent}{ARGUMENT},\n"


def _add_import(lines: list[str], tree: ast.Module) -> None:
    """Put the import after the last one at the top of the module."""
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    row = max((node.end_lineno or node.lineno for node in imports), default=0)
    if row == 0 and tree.body and ast.get_docstring(tree) is not None:
        row = tree.body[0].end_lineno or 1
    lines.insert(row, f"{IMPORT}\n")
