"""``init``, ``migrate`` and ``status``: the library's own schema in a database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import sqlalchemy as sa
import typer

from sbert_pg.cli import common


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
    json: common.JsonOption = False,
) -> None:
    """Show each embedding column: rows, embedded, pending, failed, encoder, index.

    [b]sbert-pg status --json | jq '.[].pending'[/]
    """
    from dataclasses import asdict

    from sbert_pg.pending.status import status as column_status

    with common.database(database) as engine, engine.connect() as connection:
        found = [asdict(column) for column in column_status(connection)]
    if json:
        common.print_json(found)
        return
    if not found:
        common.note("No column is bound to an encoder yet.")
        return
    common.print_table(list(found[0]), [list(row.values()) for row in found])
