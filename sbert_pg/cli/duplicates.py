"""``duplicates``: rows that are nearly the same."""

from __future__ import annotations

from typing import Annotated, Any, cast

import sqlalchemy as sa
import typer

from sbert_pg import clustering as lib
from sbert_pg.catalog.system import relation_name
from sbert_pg.cli import common
from sbert_pg.cli.cluster import (
    ColumnOption,
    LimitOption,
    TableArgument,
    WhereOption,
    criterion_of,
)
from sbert_pg.cli.tables import embedding_of, table_of
from sbert_pg.clustering.duplicates import NEIGHBOURS, DuplicateMethod
from sbert_pg.errors import ClusteringError
from sbert_pg.reembedding.vector_index import vector_indexes
from sbert_pg.types import Embedding


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(duplicates)


def duplicates(
    table: TableArgument,
    database: common.DatabaseOption = None,
    column: ColumnOption = None,
    threshold: Annotated[float, typer.Option(min=-1, max=1, help="Least similarity.")] = 0.9,
    where: WhereOption = None,
    method: Annotated[
        DuplicateMethod,
        typer.Option(help="Compare all rows with all, or ask the vector index, which misses some."),
    ] = "exact",
    neighbours: Annotated[
        int, typer.Option(min=1, help="index: rows that are compared with each row.")
    ] = NEIGHBOURS,
    groups: Annotated[bool, typer.Option("--groups", help="Show groups instead of pairs.")] = False,
    limit: LimitOption = 20,
    json: common.JsonOption = False,
) -> None:
    """Find rows that are nearly the same.

    [b]sbert-pg duplicates article --threshold 0.95[/]
    [b]sbert-pg duplicates article --method index[/]
    [b]sbert-pg duplicates article --groups --json[/]
    """
    with common.database(database) as engine, engine.connect() as connection:
        target = table_of(connection, table)
        vectors = embedding_of(target, column)
        criterion = criterion_of(where)
        if method == "index":
            _attach_index(connection, target, vectors)
        pairs = list(
            lib.duplicate_pairs(
                connection,
                vectors,
                threshold=threshold,
                where=criterion,
                method=method,
                neighbours=neighbours,
            )
        )
        if method == "index":
            recall = lib.index_recall(
                connection, vectors, threshold=threshold, where=criterion, neighbours=neighbours
            )
            common.note(_told(recall))
        found: list[dict[str, Any]]
        if groups:
            found = [{"rows": len(group), "keys": group} for group in lib.groups_of(pairs)]
        else:
            pairs.sort(key=lambda pair: -pair.similarity)
            shown = pairs if json else pairs[:limit]
            texts = {} if json else _texts(connection, target, vectors, shown)
            found = [
                {
                    "similarity": round(pair.similarity, 4),
                    "a": pair.a,
                    "b": pair.b,
                    **({} if json else {"texts": f"{texts[pair.a]}\n{texts[pair.b]}"}),
                }
                for pair in shown
            ]
    if json:
        common.print_json(found)
        return
    common.note(f"{len(pairs):,} pairs above {threshold}.")
    if found:
        common.print_table(list(found[0]), [list(row.values()) for row in found[:limit]])


def _attach_index(connection: sa.Connection, table: sa.Table, column: sa.Column[Any]) -> None:
    """Declare the column's index on the reflected table, where queries look for it.

    Raises:
        ClusteringError: there is none that serves every row by the encoder's metric.
    """
    similarity = cast("Embedding", column.type).encoder.similarity
    # Reflection reads neither operator classes nor expressions in every release of SQLAlchemy.
    table.indexes.clear()
    for index in vector_indexes(connection, relation_name(table, connection), column.name):
        if index.valid and index.predicate is None and index.similarity == similarity:
            index.on(column, index.name)
    if not table.indexes:
        raise ClusteringError(
            f"Column {table.name}.{column.name} has no valid HNSW or IVFFlat index over all rows "
            f"that ranks by {similarity}. Create one, or use --method exact."
        )


def _told(recall: float | None) -> str:
    if recall is None:
        return "Recall of the index is not known: no row of the sample is in a pair."
    return f"Recall of the index, on a sample of rows: {recall:.1%}."


def _texts(
    connection: sa.Connection, table: sa.Table, column: sa.Column[Any], pairs: list[lib.Pair]
) -> dict[Any, str]:
    """The beginning of the texts of some rows, by key."""
    keys = list(table.primary_key)
    wanted = {key for pair in pairs for key in (pair.a, pair.b)}
    if not wanted:
        return {}
    left = keys[0] if len(keys) == 1 else sa.tuple_(*keys)
    text = column.type.source.expression(table)  # type: ignore[attr-defined]
    rows = connection.execute(
        sa.select(*keys, sa.func.left(text, 80)).where(left.in_(list(wanted)))
    )
    return {
        row[0] if len(keys) == 1 else tuple(row[: len(keys)]): " ".join(row[-1].split())
        for row in rows
    }
