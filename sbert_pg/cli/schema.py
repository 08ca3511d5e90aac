"""``init``, ``migrate`` and ``status``: the library's own schema in a database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import sqlalchemy as sa
import typer

from sbert_pg.cli import common

if TYPE_CHECKING:
    from sbert_pg.pending.status import ColumnStatus


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(init)
    app.command()(migrate)
    app.command()(status)


def init(
    database: common.DatabaseOption = None,
    alembic: Annotated[
        Path | None,
        typer.Option(
            help="An Alembic directory: print the lines that its env.py needs, or edit it with "
            "--write.",
            show_default=False,
        ),
    ] = None,
    write: Annotated[bool, typer.Option(help="Edit env.py instead of printing.")] = False,
) -> None:
    """Prepare a database: the extension [b]vector[/] and the schema [b]sbert[/].

    With --alembic it prepares an application's Alembic environment instead, and touches no
    database.

    [b]sbert-pg init -d postgresql://localhost/shop[/]
    [b]sbert-pg init --alembic migrations --write[/]
    """
    if alembic is not None:
        from sbert_pg.cli.init_alembic import init_alembic

        init_alembic(alembic, write=write)
        return
    from sbert_pg import catalog

    with common.database(database) as engine, engine.begin() as connection:
        connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS vector"))
        catalog.upgrade(connection)
        common.note(f"The schema sbert is at revision {catalog.current(connection)}.")


def migrate(
    database: common.DatabaseOption = None,
    revision: Annotated[
        str, typer.Argument(help="Revision to bring the schema to.", metavar="[REVISION]")
    ] = "head",
    down: Annotated[
        bool, typer.Option("--down", help="Go down to the revision; 'base' removes the schema.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; fail unless the schema is current.")
    ] = False,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the statements for someone else to run.")
    ] = False,
) -> None:
    """Bring the library's schema [b]sbert[/] to a version.

    [b]sbert-pg migrate[/]               to the newest version
    [b]sbert-pg migrate --check[/]       for deployments: exit 1 unless it is there already
    [b]sbert-pg migrate base --down[/]   remove it, with all bindings
    """
    from sbert_pg import catalog

    if sql:
        typer.echo(catalog.upgrade_sql(revision))
        return
    with common.database(database) as engine, engine.begin() as connection:
        if check:
            catalog.require_current(connection)
        elif down:
            catalog.downgrade(connection, revision)
        else:
            catalog.upgrade(connection, revision)
        after = catalog.current(connection)
    common.note(f"The schema sbert is at revision {after or 'base (not installed)'}.")


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

    from sbert_pg.pending.status import status as column_status

    with common.database(database) as engine, engine.connect() as connection:
        found = column_status(connection, exact=exact)
    if json:
        common.print_json([asdict(column) for column in found])
        return
    if not found:
        common.note("No column is bound to an encoder yet.")
        return
    headers = ("column", "encoder", "rows", "embedded", "pending", "failed", "index")
    common.print_table(headers, [_status_row(column) for column in found])
    for column in found:
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
        f"{column.pending:,}{'+' if column.pending_is_capped else ''}",
        f"{column.failed:,}",
        column.index,
    )


def _remarks(column: ColumnStatus) -> Iterator[str]:
    """What is worth a line because it is not as usual."""
    if column.state != "active":
        yield f"is {column.state}"
    if not column.noticing:
        yield "triggers are missing or disabled, so changes of its texts are not noticed"
    if column.oldest_pending is not None:
        yield f"a row has been pending for {common.duration(column.oldest_pending)}"
    if column.skipped:
        yield f"{column.skipped:,} rows are skipped"
    if column.truncated:
        yield f"about {column.truncated:,} texts are longer than the encoder reads"
    if column.embedded is None:
        yield "the table was not analyzed since it has vectors; --exact counts"
