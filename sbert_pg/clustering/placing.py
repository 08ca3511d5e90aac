"""Where rows go: assignments of a run written, from vectors in memory or by statements alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import sqlalchemy as sa
from psycopg import sql

from sbert_pg import system
from sbert_pg.clustering.declaration import Clustering
from sbert_pg.clustering.kmeans import Fit
from sbert_pg.clustering.rows import Keys, RowSet, binary_cursor, is_integer
from sbert_pg.types import Vector

#: Types whose values are copied into a column as they are.
_COPIED = {
    "SMALLINT": "int2",
    "INTEGER": "int4",
    "BIGINT": "int8",
    "TEXT": "text",
    "VARCHAR": "text",
    "REAL": "float4",
    "BOOLEAN": "bool",
}
#: Rows can be deleted again and again while others come to refer to them.
_ATTEMPTS = 5
#: Rows that are turned into Python's values at once.
_TOGETHER = 8192
_COPY_IN = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)")
_VALUES = ("run_id", "cluster_id", "distance", "is_fitted")


def store_fit(
    connection: sa.Connection, clustering: Clustering, run_id: int, keys: Keys, fit: Fit
) -> None:
    """Store clusters that were computed in this process; rows deleted meanwhile are left out."""
    numbers = _store_clusters(connection, clustering, run_id, fit.centroids)
    # Outliers, which have the label -1, are in none.
    clusters = np.ma.masked_equal(np.append(numbers, 0)[fit.labels], 0)
    runs, fitted = (np.broadcast_to(value, len(clusters)) for value in (np.int64(run_id), True))
    rows, columns = clustering.row_set(), [clustering.assignment_table.c[n] for n in _VALUES]
    values = [runs, clusters, fit.distances, fitted]
    insert_referring(connection, rows, [clustering.row_keys], keys.columns, columns, values)


def _store_clusters(
    connection: sa.Connection,
    clustering: Clustering,
    run_id: int,
    centroids: npt.NDArray[np.float32],
) -> npt.NDArray[np.int64]:
    """Store clusters without their rows, under provisional negative numbers; return their ids."""
    if not len(centroids):
        return np.empty(0, dtype=np.int64)
    table = clustering.cluster_table
    statement = sa.insert(table).returning(table.c.id, sort_by_parameter_order=True)
    values = [
        {"run_id": run_id, "number": -1 - number, "centroid": centroid, "size": 0}
        for number, centroid in enumerate(centroids)
    ]
    return np.array(list(connection.scalars(statement, values)), dtype=np.int64)


def store_in_database(
    connection: sa.Connection,
    clustering: Clustering,
    rows: RowSet,
    run_id: int,
    centroids: sa.Table,
) -> None:
    """Store clusters of a table of centroids, and assign every row by one statement."""
    table = clustering.cluster_table
    run, nothing = sa.literal(run_id, sa.BigInteger), sa.literal(0, sa.Integer)
    clusters = sa.select(run, -1 - centroids.c.number, centroids.c.centroid, nothing)
    names = ["run_id", "number", "centroid", "size"]
    connection.execute(sa.insert(table).from_select(names, clusters))
    insert_or_retry(connection, assign_statement(clustering, rows, run_id, is_fitted=True))


def assign_statement(
    clustering: Clustering, rows: RowSet, run_id: int, *, is_fitted: bool
) -> sa.Insert:
    """Assign each row to the nearest centroid of a run, set-wise."""
    nearest = rows.nearest(centroids_of(clustering, run_id), sa.column("id"))
    distance = rows.distance(nearest.c.rank)
    vectors = rows.vectors
    return sa.insert(clustering.assignment_table).from_select(
        [*(key.name for key in clustering.row_keys), *_VALUES],
        sa.select(
            *(vectors.c[key.name] for key in rows.keys),
            sa.literal(run_id, sa.BigInteger),
            nearest.c.value,
            sa.func.greatest(sa.cast(distance, sa.REAL), 0),
            sa.literal(is_fitted, sa.Boolean),
        ).select_from(sa.join(vectors, nearest, sa.true())),
    )


def centroids_of(clustering: Clustering, run_id: int) -> sa.CTE:
    """Ids, centroids and radii of a run, read once for a statement.

    A cluster's row may be long enough for its centroid to be stored apart; ``subvector`` fetches it
    here rather than at every comparison.
    """
    table = clustering.cluster_table
    whole = sa.func.subvector(table.c.centroid, 1, clustering.row_set().dimensions, type_=Vector())
    return (
        sa.select(table.c.id, table.c.radius, whole.label("centroid"))
        .where(table.c.run_id == run_id)
        .cte("centroids")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )


def _aside(keys: Sequence[sa.Column[Any]], columns: Sequence[sa.Column[Any]]) -> sa.Table:
    types: list[Any] = [sa.BigInteger() if is_integer(column) else sa.Text() for column in keys]
    own = [sa.Column(f"key_{number}", type_) for number, type_ in enumerate(types)]
    own += [sa.Column(column.name, column.type) for column in columns]
    options: dict[str, Any] = {"prefixes": ["TEMPORARY"], "postgresql_on_commit": "DROP"}
    return sa.Table("sbert_pg_staged", sa.MetaData(), *own, schema="pg_temp", **options)


def insert_referring(
    connection: sa.Connection,
    rows: RowSet,
    references: Sequence[Sequence[sa.Column[Any]]],
    keys: Sequence[npt.NDArray[Any]],
    columns: Sequence[sa.Column[Any]],
    values: Sequence[Iterable[Any]],
) -> int:
    """Insert rows that refer to others by keys, but for those whose row is gone; how many.

    They are copied to where they belong. Where a row is gone, or keys are of a type that is not
    copied as it travels, they are copied aside and joined to the rows that are there.

    Args:
        references: for each row that is referred to, the columns that hold its key.
        keys: their values as they travel, as many arrays as there are columns in ``references``.
        columns: the other columns.
    """
    own = [column for reference in references for column in reference]
    table, data = own[0].table, [*keys, *values]
    if _copied_at_once(connection, table, own, [*own, *columns], data):
        return len(keys[0])
    staged = _aside(own, columns)
    staged.create(connection, checkfirst=False)
    write_block(connection, staged, list(staged.columns), data)
    typed = [sa.cast(staged.c[f"key_{n}"], column.type) for n, column in enumerate(own)]
    statement = sa.select(*typed, *(staged.c[c.name] for c in columns)).select_from(staged)
    aliases = [rows.table.alias(f"row_{number}") for number in range(len(references))]
    parts = iter(typed)
    for alias in aliases:
        same = sa.and_(*(next(parts) == alias.c[key.name] for key in rows.keys))
        statement = statement.join(alias, same)
    names = [column.name for column in (*own, *columns)]
    # A row can be deleted between the join and the check of the foreign key: then hold them.
    locked = statement.with_for_update(key_share=True, read=True, of=aliases)
    insert = sa.insert(table)
    whole, held = insert.from_select(names, statement), insert.from_select(names, locked)
    inserted = insert_or_retry(connection, whole, held)
    staged.drop(connection)
    return inserted


def _copied_at_once(
    connection: sa.Connection,
    table: sa.Table,
    keys: Sequence[sa.Column[Any]],
    columns: Sequence[sa.Column[Any]],
    values: Sequence[Iterable[Any]],
) -> bool:
    """Copy rows into their table, all or none; tell whether it could be done."""
    for key in keys:
        type_ = _copy_type(connection, key)
        if type_ is None or is_integer(key) != type_.startswith("int"):
            return False
    try:
        with connection.begin_nested():
            write_block(connection, table, columns, values)
    except psycopg.errors.ForeignKeyViolation:
        # A row was deleted since it was read.
        return False
    return True


def insert_or_retry(
    connection: sa.Connection, statement: sa.Insert, otherwise: sa.Insert | None = None
) -> int:
    """Insert rows that refer to others; where one is deleted meanwhile, insert what still can be,
    by ``otherwise`` if given. Returns how many were inserted.
    """
    for attempt in range(_ATTEMPTS):
        try:
            with connection.begin_nested():
                chosen = statement if attempt == 0 or otherwise is None else otherwise
                counted = chosen.execution_options(preserve_rowcount=True)
                return int(connection.execute(counted).rowcount)
        except sa.exc.IntegrityError as error:
            gone = isinstance(error.orig, psycopg.errors.ForeignKeyViolation)
            if not gone or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def write_block(
    connection: sa.Connection,
    table: sa.Table,
    columns: Sequence[sa.Column[Any]],
    values: Sequence[Iterable[Any]],
) -> None:
    """Copy values of equal length into columns of whole numbers, ``text``, ``real`` or
    ``boolean``.
    """
    schema = system.schema_in(connection, table.schema)
    path = [name for name in (schema, table.name) if name is not None]
    names = sql.SQL(", ").join(sql.Identifier(column.name) for column in columns)
    # Millions of rows as Python's numbers take ten times what they do as arrays.
    lists = [_few_at_a_time(part) if isinstance(part, np.ndarray) else part for part in values]
    with binary_cursor(connection).copy(_COPY_IN.format(sql.Identifier(*path), names)) as copy:
        copy.set_types([_copy_type(connection, column) or "text" for column in columns])
        for row in zip(*lists, strict=True):
            copy.write_row(row)


def _few_at_a_time(array: npt.NDArray[Any]) -> Iterator[Any]:
    """The elements of an array as Python's, ``None`` where they are masked."""
    for start in range(0, len(array), _TOGETHER):
        yield from array[start : start + _TOGETHER].tolist()


def _copy_type(connection: sa.Connection, column: sa.ColumnElement[Any]) -> str | None:
    """The type by which values of a column are copied into it, or ``None`` where there is none."""
    name = column.type.compile(connection.dialect)
    return _COPIED.get(name.partition("(")[0])
