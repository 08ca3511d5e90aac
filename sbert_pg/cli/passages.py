"""Documents that are cut: their passages shown, made, filled and found by the commands."""

from __future__ import annotations

from typing import Annotated, Any

import sqlalchemy as sa
import typer
from rich.markup import escape
from sqlalchemy.orm import Session, registry

from sbert_pg.catalog import create_all
from sbert_pg.cli import common
from sbert_pg.cli.target import resolve
from sbert_pg.errors import DeclarationError
from sbert_pg.freshness import Progress
from sbert_pg.indexes import hnsw_index
from sbert_pg.passages import add_passages, declared_passages, passages_of
from sbert_pg.passages.declaring import passages_between
from sbert_pg.progress import bar
from sbert_pg.reembed.change import Side, reflect, side_of
from sbert_pg.row_vectors import embedding_columns
from sbert_pg.source import Source
from sbert_pg.spec import EncoderSpec


def show(
    target: common.TargetArgument,
    key: Annotated[str, typer.Argument(help='Its key: 17, or ["eu", "17"] where it has parts.')],
    database: common.DatabaseOption = None,
) -> None:
    """Print a document with the borders of its passages.

    [b]sbert-pg passages show document 17[/]
    """
    from sbert_pg.freshness.queue import Row, label_from
    from sbert_pg.freshness.rows import rows_of

    with common.database(database) as engine, engine.begin() as connection:
        binding = resolve(connection, target).binding
        rows = rows_of(connection, binding)
        if rows.passages is None:
            raise DeclarationError(f"{binding} is not cut into passages; name a column that is.")
        document = rows.find(connection, label_from(key))
        if document is None:
            raise DeclarationError(f"{binding.table} has no document with the key {key}.")
        body = rows.table.c[binding.source.columns[-1]]
        columns = [body, binding.is_stale(rows.table), rows.passages.as_json(rows.table)]
        row = Row(document.key, document.label)
        values: list[Any] = list(rows.columns_of(connection, [row], columns)[0])
    _, text, stale, passages = values
    if stale:
        common.note("The document has changed since; a worker is to cut it again.")
    for ordinal, (start, stop, heading, _) in enumerate(passages or []):
        common.out.print(f"[bold]── {ordinal}  {start}:{stop}  {escape(heading)}[/]")
        common.out.print(escape((text or "")[start:stop]))


def create(
    connection: sa.Connection,
    table: sa.Table,
    source: Source,
    encoder: EncoderSpec,
) -> None:
    """A table of documents with its passages: those of the last source column, bound.

    Raises:
        DeclarationError: the source is a template, whose text nothing could cut.
    """
    if source.pattern is not None:
        raise DeclarationError(
            "--passages cuts a column: name it by --source, after those that are headings, and "
            "without braces."
        )
    document = type("Document", (), {})
    registry(metadata=table.metadata).map_imperatively(document, table)
    index = hnsw_index(f"{table.name}_passage_embedding", "embedding")
    *headings, text = source.columns
    declared = passages_of(encoder, text, heading=headings, table_args=[index])
    add_passages(document, "passages", declared)
    create_all(connection, table.metadata)


def cut_all(engine: sa.Engine, table: sa.Table) -> None:
    """Cut and embed the documents of a table that wait for it, where it has passages."""
    from sbert_pg.freshness import backfill

    for embedded in embedding_columns(table):
        if embedded.is_cut:
            with bar() as advance:

                def show(progress: Progress) -> None:
                    advance("cutting and encoding", progress.rows, progress.total)

                backfill(engine, embedded.column, on_progress=show)


def attribute_of(connection: sa.Connection, documents: Side) -> Any:
    """The attribute of passages of a table of documents, for searching it."""
    from sbert_pg.freshness.passages import stored_passages

    binding = stored_passages(connection, documents.binding).binding
    table = reflect(connection, binding.schema, binding.table)
    return passages_between(documents.column, side_of(connection, table, binding).table)


def found(session: Session, attribute: Any, statement: sa.Select[Any]) -> list[dict[str, Any]]:
    """What a search for documents finds: scores, keys, headings, and best passages."""
    declared = declared_passages(attribute)
    assert declared is not None
    names = [theirs.key for _, theirs in declared.keys]
    names += [name for name in declared.source_keys[:-1] if name not in names]
    rows = []
    for document, *others in session.execute(statement):
        passage = others.pop(0) if isinstance(others[0], declared.passage) else None
        row = dict(zip(statement.selected_columns.keys()[-len(others) :], others, strict=True))
        row |= {name: getattr(document, name) for name in names}
        if passage is not None:
            row |= {name: getattr(passage, name) for name in ("heading", "start", "stop", "text")}
        rows.append(row)
    return rows
