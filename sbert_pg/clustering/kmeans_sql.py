"""k-means inside PostgreSQL: no vector of a row leaves the server.

The algorithm is that of ``kmeans``, with the same seeds from the same draws and the same rules, so
that both give the same clusters up to single precision. Only counts, distances and sums of
distances reach the client. Each iteration is one statement over the rows: the nearest of the
centroids by a lateral join, and pgvector's ``avg`` by cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by
from sqlalchemy.ext.compiler import compiles

from sbert_pg.clustering.rowset import RowSet
from sbert_pg.clustering.seeding import choose_seeds, generator, sample_positions
from sbert_pg.clustering.transfer import fetch_binary
from sbert_pg.types import Vector

_NOTHING = sa.literal_column("''::bytea", sa.LargeBinary)
Progress = Callable[[str, int, int | None], None]


def fit_kmeans_in_database(
    connection: sa.Connection,
    rows: RowSet,
    n_clusters: int,
    *,
    seed: int = 0,
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    progress: Progress | None = None,
) -> tuple[sa.Table, int]:
    """Cluster rows by statements; arguments as those of ``kmeans.fit_kmeans``.

    Returns:
        A temporary table with ``number`` and ``centroid``, which lives as long as the transaction,
        and the number of iterations made.
    """
    # Compiling costs more than it saves where one statement is run with ever new tables.
    connection.execute(sa.select(sa.func.set_config("jit", "off", True)))
    _TABLES.create_all(connection, checkfirst=False)
    total = rows.count(connection)
    variance = _variance(connection, rows)
    least, made = None, 0
    for start in range(n_init):
        state = _InDatabase(connection, rows)
        state.seed(generator(seed, start), total, n_clusters)
        for iterations in range(1, max_iter + 1):
            shift = state.iterate()
            if progress is not None:
                progress("iterations", iterations, max_iter)
            if shift <= tol * variance:
                break
        inertia = state.inertia() if n_init > 1 else 0.0
        if least is None or inertia < least:
            least, made = inertia, iterations
            _replace(connection, best, centroids)
    return best, made


def centroid_table(name: str, metadata: sa.MetaData) -> sa.Table:
    """A temporary table of numbered centroids."""
    return sa.Table(
        name,
        metadata,
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("centroid", Vector(), nullable=False),
        prefixes=["TEMPORARY"],
        postgresql_on_commit="DROP",
    )


_TABLES = sa.MetaData()
sample = sa.Table(
    "sbert_pg_sample",
    _TABLES,
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("vector", Vector(), nullable=False),
    prefixes=["TEMPORARY"],
    postgresql_on_commit="DROP",
)
centroids = centroid_table("sbert_pg_centroid", _TABLES)
moved = centroid_table("sbert_pg_moved", _TABLES)
best = centroid_table("sbert_pg_best", _TABLES)


def _variance(connection: sa.Connection, rows: RowSet) -> float:
    """Mean variance of the columns of the vectors' matrix."""
    norm = sa.func.vector_norm(rows.vectors.c.unit)
    mean_norm = sa.func.vector_norm(sa.func.avg(rows.vectors.c.unit))
    statement = sa.select(sa.func.avg(norm * norm) - mean_norm * mean_norm).select_from(
        rows.vectors
    )
    return max(0.0, float(connection.scalar(statement) or 0.0)) / rows.clustering.dimensions


def _replace(connection: sa.Connection, table: sa.Table, by: sa.Table) -> None:
    _empty(connection, table)
    connection.execute(sa.insert(table).from_select(["number", "centroid"], sa.select(by)))


def _empty(connection: sa.Connection, table: sa.Table) -> None:
    # Deleted rows would stay in the table until the end of the transaction and be passed over by
    # every scan of it; truncating a table that this transaction made leaves nothing behind.
    connection.execute(_Truncate(table))


class _Truncate(sa.schema.ExecutableDDLElement):
    """Empty a table."""

    def __init__(self, table: sa.Table) -> None:
        self.table = table


@compiles(_Truncate)
def _compile_truncate(element: _Truncate, compiler: Any, **_: Any) -> str:
    return f"TRUNCATE {compiler.preparer.format_table(element.table)}"


class _InDatabase:
    """One start: the statements over the temporary tables."""

    def __init__(self, connection: sa.Connection, rows: RowSet) -> None:
        self.connection, self.rows = connection, rows
        self.n_clusters = 0
        for table in (sample, centroids, moved):
            _empty(connection, table)

    def seed(self, random: np.random.Generator, total: int, n_clusters: int) -> None:
        """Draw the sample, and start the clusters from rows of it."""
        positions = sample_positions(random, total, n_clusters)
        self._draw_sample(positions, total)
        chosen = choose_seeds(random, len(positions), n_clusters, self._distances)
        self.n_clusters = len(chosen)
        numbered = (
            sa.func.unnest(sa.cast(chosen.tolist(), ARRAY(sa.Integer)))
            .table_valued(sa.column("position", sa.Integer), with_ordinality="number")
            .render_derived()
        )
        statement = sa.select(
            sa.cast(numbered.c.number, sa.Integer) - 1, sample.c.vector
        ).join_from(sample, numbered, numbered.c.position == sample.c.position)
        self._insert(centroids, ["number", "centroid"], statement)

    def _draw_sample(self, positions: npt.NDArray[np.int64], total: int) -> None:
        clustering = self.rows.clustering
        number = sa.func.row_number().over(order_by=self.rows.order(clustering.rows))
        place = (number - 1).label("sbert_pg_place")
        numbered = sa.select(*clustering.keys, place).where(*self.rows.criteria).subquery()
        same = sa.and_(*(numbered.c[key.name] == key for key in clustering.keys))
        at = numbered.c.sbert_pg_place
        statement = (
            sa.select(sa.func.row_number().over(order_by=at) - 1, self.rows.unit)
            .select_from(clustering.rows)
            .join(numbered, same)
            .where(*self.rows.criteria)
        )
        if len(positions) < total:
            wanted = sa.cast(positions.tolist(), ARRAY(sa.BigInteger))
            statement = statement.where(at == sa.func.any(wanted))
        self._insert(sample, ["position", "vector"], statement)

    def _distances(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        """Squared distances of some rows of the sample to all of it, packed as binary."""
        candidate = sample.alias("candidate")
        value = sa.func.vector_l2_squared_distance(sample.c.vector, candidate.c.vector)
        packed = sa.func.string_agg(
            sa.func.float8send(value), aggregate_order_by(_NOTHING, sample.c.position)
        )
        statement = (
            sa.select(candidate.c.position, packed)
            .select_from(sa.join(candidate, sample, sa.true()))
            .where(candidate.c.position.in_(sorted(set(chosen.tolist()))))
            .group_by(candidate.c.position)
        )
        # A row may have been drawn twice.
        found = {
            position: np.frombuffer(data, dtype=">f8").astype(np.float64)
            for position, data in fetch_binary(self.connection, statement)
        }
        return np.stack([found[position] for position in chosen.tolist()])

    def iterate(self) -> float:
        """Assign every row and move the centroids; return the sum of their squared shifts."""
        nearest = self.rows.nearest(centroids, centroids.c.number)
        mean: sa.ColumnElement[Any] = sa.func.avg(self.rows.vectors.c.unit, type_=Vector())
        statement = (
            sa.select(nearest.c.value, sa.func.l2_normalize(mean) if self.rows.spherical else mean)
            .select_from(sa.join(self.rows.vectors, nearest, sa.true()))
            .group_by(nearest.c.value)
        )
        if self.rows.spherical:
            # A mean of zeros has no direction.
            statement = statement.having(sa.func.vector_norm(mean) > 0)
        _empty(self.connection, moved)
        self._insert(moved, ["number", "centroid"], statement)
        self._restart_empty()
        shift = sa.func.vector_l2_squared_distance(centroids.c.centroid, moved.c.centroid)
        total = self.connection.scalar(
            sa.select(sa.func.sum(shift)).join_from(
                centroids, moved, centroids.c.number == moved.c.number
            )
        )
        _replace(self.connection, centroids, moved)
        return float(total or 0.0)

    def _restart_empty(self) -> None:
        """Let clusters without rows start again in the rows furthest from their centroids."""
        present = set(self.connection.scalars(sa.select(moved.c.number)))
        empty = [number for number in range(self.n_clusters) if number not in present]
        nearest = self.rows.nearest(centroids, centroids.c.number)
        for offset, number in enumerate(empty):
            furthest = (
                sa.select(sa.literal(number, sa.Integer), self.rows.vectors.c.unit)
                .select_from(sa.join(self.rows.vectors, nearest, sa.true()))
                .order_by(nearest.c.rank.desc(), *self.rows.order(self.rows.vectors))
                .limit(1)
                .offset(offset)
            )
            self._insert(moved, ["number", "centroid"], furthest)

    def inertia(self) -> float:
        """Sum of squared euclidean distances to the nearest centroids."""
        nearest = self.rows.nearest(centroids, centroids.c.number)
        rank = nearest.c.rank
        squared = 2 + 2 * rank if self.rows.spherical else rank * rank
        statement = sa.select(sa.func.sum(squared)).select_from(
            sa.join(self.rows.vectors, nearest, sa.true())
        )
        return float(self.connection.scalar(statement) or 0.0)

    def _insert(self, table: sa.Table, columns: list[str], statement: sa.Select[Any]) -> None:
        self.connection.execute(sa.insert(table).from_select(columns, statement))
