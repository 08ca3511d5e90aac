"""``passages``: how a document is cut."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from sbert_pg.cli import common
from sbert_pg.errors import DeclarationError


def show(
    name: common.TargetArgument,
    key: Annotated[str, typer.Argument(help='Its key: 17, or ["eu", "17"] where it has parts.')],
    database: common.DatabaseOption = None,
) -> None:
    """Print a document with the borders of its passages.

    [b]sbert-pg passages show document 17[/]
    """
    from sbert_pg.cli.target import resolve
    from sbert_pg.freshness.labels import Row, label_from
    from sbert_pg.freshness.rows import rows_of

    with common.database(database) as engine, engine.begin() as connection:
        binding = resolve(connection, name).binding
        rows = rows_of(connection, binding)
        if rows.passages is None:
            raise DeclarationError(f"{binding} is not cut into passages; name a column that is.")
        found = rows.find(connection, label_from(key))
        if found is None:
            raise DeclarationError(f"{binding.table} has no document with the key {key}.")
        body = rows.table.c[binding.source.columns[-1]]
        columns = [body, binding.is_stale(rows.table), rows.passages.as_json(rows.table)]
        row = Row(found.key, found.label)
        values: list[Any] = list(rows.columns_of(connection, [row], columns)[0])
    _, text, stale, passages = values
    if stale:
        common.note("The document has changed since; a worker is to cut it again.")
    for ordinal, (start, stop, heading, _) in enumerate(passages or []):
        common.out.print(f"[bold]── {ordinal}  {start}:{stop}  {escape(heading)}[/]")
        common.out.print(escape((text or "")[start:stop]))


__all__ = ["show"]
