"""``migrate`` and ``status``: the library's own schema, and an application's Alembic."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbert_pg.cli import common
from sbert_pg.errors import DeclarationError
from sbert_pg.progress import duration

if TYPE_CHECKING:
    from sbert_pg.freshness.status import ColumnStatus

IMPORT = "from sbert_pg.alembic import autogenerate_plugins"
KEYWORD = "autogenerate_plugins"
ARGUMENT = "autogenerate_plugins=autogenerate_plugins()"


def migrate(
    database: common.DatabaseOption = None,
    check: common.CheckOption = False,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the statements for someone else to run.")
    ] = False,
    alembic: Annotated[
        Path | None,
        typer.Option(
            help="An Alembic directory: print the lines that its env.py needs, or edit it with "
            "--write."
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Edit env.py instead of printing.")
    ] = False,
) -> None:
    """Prepare a database: the extension [b]vector[/] and the library's schema [b]sbert[/].

    It brings the schema to the newest version, whatever is there. With --alembic it prepares an
    application's Alembic environment instead, and touches no database.

    [b]sbert-pg migrate -d postgresql://localhost/shop[/]
    [b]sbert-pg migrate --check[/]       for deployments: exit 1 unless it is there already
    [b]sbert-pg migrate --alembic migrations --write[/]
    """
    from sbert_pg import catalog

    if alembic is not None:
        prepare_alembic(alembic, write=write)
        return
    if write:
        raise DeclarationError("--write edits an env.py: name its directory by --alembic.")
    if sql:
        typer.echo(catalog.upgrade_sql())
        return
    with common.database(database) as engine, engine.begin() as connection:
        if check:
            catalog.require_current(connection)
        else:
            catalog.upgrade(connection)
        common.note(f"The schema sbert is at revision {catalog.current(connection)}.")


def status(
    database: common.DatabaseOption = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Count rows instead of estimating; reads every table.")
    ] = False,
    json: common.JsonOption = False,
) -> None:
    """Show each embedding column: rows, embedded, pending, failed, encoder, index.

    [b]sbert-pg status[/]                 in a moment, with the planner's estimates (~)
    [b]sbert-pg status --exact[/]         counted
    [b]sbert-pg status --json | jq '.[].pending'[/]
    """
    from dataclasses import asdict

    from sbert_pg.freshness.status import status as column_status

    with common.database(database) as engine, engine.connect() as connection:
        columns = column_status(connection, exact=exact)
    if json:
        common.print_json([asdict(column) for column in columns])
        return
    if not columns:
        common.note("No column is bound to an encoder yet.")
        return
    headers = ("column", "encoder", "rows", "embedded", "pending", "failed", "index")
    common.print_table(headers, [_status_row(column) for column in columns])
    for column in columns:
        for remark in _remarks(column):
            typer.echo(f"{column.column.removeprefix('public.')}: {remark}")


def _status_row(column: ColumnStatus) -> tuple[str, ...]:
    """What fits a terminal's line; ``--json`` has the rest."""

    def estimate(count: int | None) -> str:
        return "?" if count is None else f"{'' if column.counted else '~'}{count:,}"

    return (
        column.column.removeprefix("public."),
        column.encoder.rpartition("/")[2],
        estimate(column.rows),
        estimate(column.embedded),
        f"{column.pending + column.backfill:,}{'+' if column.capped else ''}",
        f"{column.failed:,}",
        column.index,
    )


def _remarks(column: ColumnStatus) -> Iterator[str]:
    """What is worth a line because it is not as usual."""
    if column.state != "active":
        yield f"is {column.state}"
    yield from column.problems
    if column.age is not None and column.pending:
        yield f"something has been pending for at most {duration(column.age)}"
    if column.backfill:
        yield f"{column.backfill:,} of its pending rows are a backfill's"
    if column.skipped:
        yield f"{column.skipped:,} rows are skipped"
    if column.truncated:
        yield f"about {column.truncated:,} texts are longer than the encoder reads"
    if column.embedded is None:
        yield "the table was not analyzed since it has vectors; --exact counts"


def prepare_alembic(directory: Path, *, write: bool) -> None:
    """Print what the ``env.py`` of an Alembic directory needs, or write it."""
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
    """The source of an ``env.py`` that registers the plugin; the same where it does already."""
    tree = _parsed(source, name)
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "context.configure"
    ]
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


def _parsed(source: str, name: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise DeclarationError(f"{name} cannot be read: {error}.") from error


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
    """Put the argument first, on a separate line where the others are."""
    if call.args:
        # Positional arguments stay in front.
        last = call.args[-1]
        row, at = (last.end_lineno or call.lineno) - 1, last.end_col_offset or 0
        encoded = lines[row].encode()
        lines[row] = f"{encoded[:at].decode()}, {ARGUMENT}{encoded[at:].decode()}"
        return
    row = (call.func.end_lineno or call.lineno) - 1
    encoded = lines[row].encode()
    at = encoded.index(b"(", call.func.end_col_offset or 0) + 1
    head, tail = encoded[:at].decode(), encoded[at:].decode()
    if tail.strip():
        lines[row] = f"{head}{ARGUMENT}{', ' if call.keywords else ''}{tail}"
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
