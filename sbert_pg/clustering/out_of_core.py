"""k-means whose vectors do not come into memory: inside the server, or block by block.

Inside PostgreSQL no vector of a row leaves it. The algorithm is that of ``kmeans``, with the same
seeds from the same draws and the same rules, so that both give the same clusters up to single
precision. Only counts, distances and sums of distances reach the client. Each iteration is one
statement over the rows: the nearest of the centroids by a lateral join, and pgvector's ``avg`` by
cluster.

Block by block, for tables larger than memory, a sample is clustered as in ``kmeans``, and a few
iterations over all rows follow.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by

from sbert_pg.clustering.algorithms import KMeans, fit_in_memory
from sbert_pg.clustering.kmeans import (
    SAMPLE_PER_CLUSTER,
    Fit,
    Positions,
    choose_seeds,
    generator,
    nearest_centroids,
    normalize,
    sample_positions,
)
from sbert_pg.clustering.rows import Keys, RowSet, fetch_binary, read_blocks, read_rows
from sbert_pg.progress import Advance
from sbert_pg.spec import Vectors
from sbert_pg.system import configure
from sbert_pg.types import Vector

#: Rows of the sample that blocks begin with, at least.
BLOCK_SAMPLE = 65_536
#: Passes over the table at most, whatever ``max_iter`` says: each reads every vector again.
MAX_PASSES = 5
#: The passes end when one improves the inertia by less than this share.
_IMPROVEMENT = 1e-3
#: Chance that ``excess_bound`` is too small, and the largest squared distance of unit vectors.
_RISK, _RANGE = 0.01, 4.0

_NOTHING = sa.literal_column("''::bytea", sa.LargeBinary)
_TABLES = sa.MetaData(schema="pg_temp")


def _temporary(name: str, *columns: sa.Column[Any]) -> sa.Table:
    """A table that lives as long as the transaction, as do its rows."""
    return sa.Table(name, _TABLES, *columns, prefixes=["TEMPORARY"], postgresql_on_commit="DROP")


def _centroid_table(name: str) -> sa.Table:
    number = sa.Column("number", sa.Integer, primary_key=True, autoincrement=False)
    return _temporary(name, number, sa.Column("centroid", Vector(), nullable=False))


_sample = _temporary(
    "sbert_pg_sample",
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("vector", Vector(), nullable=False),
)
_centroids = _centroid_table("sbert_pg_centroid")
_moved = _centroid_table("sbert_pg_moved")
_best = _centroid_table("sbert_pg_best")


def fit_in_database(
    connection: sa.Connection,
    rows: RowSet,
    algorithm: KMeans,
    seed: int,
    total: int,
    progress: Advance,
) -> tuple[sa.Table, int]:
    """Cluster rows by statements inside the server.

    Returns a temporary table with ``number`` and ``centroid``, which lives as long as the run's
    transaction, and the number of iterations made.
    """
    # Compiling costs more than it saves where one statement is run with ever new tables.
    configure(connection, {"jit": "off"})
    _TABLES.create_all(connection, checkfirst=False)
    tolerance = algorithm.tol * _variance(connection, rows)
    least, iterations_of_best = None, 0
    for start in range(algorithm.n_init):
        state = _InDatabase(connection, rows)
        state.seed(generator(seed, start), total, min(cast("int", algorithm.n_clusters), total))
        for iterations in range(1, algorithm.max_iter + 1):
            shift = state.iterate()
            progress("iterations", iterations, algorithm.max_iter)
            if shift <= tolerance:
                break
        inertia = state.inertia() if algorithm.n_init > 1 else 0.0
        if least is None or inertia < least:
            least, iterations_of_best = inertia, iterations
            _replace(connection, _best, _centroids)
    return _best, iterations_of_best


def _variance(connection: sa.Connection, rows: RowSet) -> float:
    """Mean variance of the columns of the vectors' matrix."""
    unit = rows.vectors.c.sbert_pg_unit
    norm, mean_norm = sa.func.vector_norm(unit), sa.func.vector_norm(sa.func.avg(unit))
    statement = sa.select(sa.func.avg(norm * norm) - mean_norm * mean_norm)
    variance = connection.scalar(statement.select_from(rows.vectors))
    return max(0.0, float(variance or 0.0)) / rows.dimensions


def _insert(
    connection: sa.Connection, table: sa.Table, statement: sa.Select[Any], *, empty: bool = False
) -> None:
    """Insert into all columns of a temporary table, in their order."""
    if empty:
        # Deleted rows would stay in the table until the end of the transaction and be passed over
        # by every scan of it; truncating a table that this transaction made leaves nothing behind.
        truncate = sa.DDL("TRUNCATE %(fullname)s")  # type: ignore[no-untyped-call]
        connection.execute(truncate.against(table))
    names = [column.name for column in table.columns]
    connection.execute(sa.insert(table).from_select(names, statement))


def _replace(connection: sa.Connection, table: sa.Table, by: sa.Table) -> None:
    _insert(connection, table, sa.select(by), empty=True)


class _InDatabase:
    """One start: the statements over the temporary tables."""

    def __init__(self, connection: sa.Connection, rows: RowSet) -> None:
        self.connection, self.rows = connection, rows
        self.unit = rows.vectors.c.sbert_pg_unit
        self.nearest = rows.nearest(_centroids, _centroids.c.number)
        self.each_row = sa.join(rows.vectors, self.nearest, sa.true())
        self.n_clusters = 0

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
            sa.cast(numbered.c.number, sa.Integer) - 1, _sample.c.vector
        ).join_from(_sample, numbered, numbered.c.position == _sample.c.position)
        _insert(self.connection, _centroids, statement, empty=True)

    def _draw_sample(self, positions: Positions, total: int) -> None:
        rows = self.rows
        number = sa.func.row_number().over(order_by=rows.order(rows.table))
        place = (number - 1).label("sbert_pg_place")
        numbered = sa.select(*rows.keys, place).where(*rows.criteria).subquery()
        same = sa.and_(*(numbered.c[key.name] == key for key in rows.keys))
        at = numbered.c.sbert_pg_place
        statement = (
            sa.select(sa.func.row_number().over(order_by=at) - 1, rows.unit)
            .select_from(rows.table)
            .join(numbered, same)
        )
        if len(positions) < total:
            drawn = sa.cast(positions.tolist(), ARRAY(sa.BigInteger))
            statement = statement.where(at == sa.func.any(drawn))
        _insert(self.connection, _sample, statement, empty=True)

    def _distances(self, chosen: Positions) -> np.typing.NDArray[np.floating]:
        """Squared distances of some rows of the sample to all of it, packed as binary."""
        candidate = _sample.alias("candidate")
        value = sa.func.vector_l2_squared_distance(_sample.c.vector, candidate.c.vector)
        packed = sa.func.string_agg(
            sa.func.float8send(value), aggregate_order_by(_NOTHING, _sample.c.position)
        )
        statement = (
            sa.select(candidate.c.position, packed)
            .select_from(sa.join(candidate, _sample, sa.true()))
            .where(candidate.c.position.in_(sorted(set(chosen.tolist()))))
            .group_by(candidate.c.position)
        )
        # A row may have been drawn twice.
        distances = {
            position: np.frombuffer(data, dtype=">f8").astype(np.float64)
            for position, data in fetch_binary(self.connection, statement)
        }
        return np.stack([distances[position] for position in chosen.tolist()])

    def iterate(self) -> float:
        """Assign every row and move the centroids; return the sum of their squared shifts."""
        mean: sa.ColumnElement[Any] = sa.func.avg(self.unit, type_=Vector())
        centroid = sa.func.l2_normalize(mean) if self.rows.spherical else mean
        statement = (
            sa.select(self.nearest.c.value, centroid)
            .select_from(self.each_row)
            .group_by(self.nearest.c.value)
        )
        if self.rows.spherical:
            # A mean of zeros has no direction.
            statement = statement.having(sa.func.vector_norm(mean) > 0)
        _insert(self.connection, _moved, statement, empty=True)
        self._restart_empty()
        shift = sa.func.vector_l2_squared_distance(_centroids.c.centroid, _moved.c.centroid)
        total = self.connection.scalar(
            sa.select(sa.func.sum(shift)).join_from(
                _centroids, _moved, _centroids.c.number == _moved.c.number
            )
        )
        _replace(self.connection, _centroids, _moved)
        return float(total or 0.0)

    def _restart_empty(self) -> None:
        """Let clusters without rows start again in the rows furthest from their centroids."""
        present = set(self.connection.scalars(sa.select(_moved.c.number)))
        empty = [number for number in range(self.n_clusters) if number not in present]
        for offset, number in enumerate(empty):
            furthest = (
                sa.select(sa.literal(number, sa.Integer), self.unit)
                .select_from(self.each_row)
                .order_by(self.nearest.c.rank.desc(), *self.rows.order(self.rows.vectors))
                .limit(1)
                .offset(offset)
            )
            _insert(self.connection, _moved, furthest)

    def inertia(self) -> float:
        """Sum of squared euclidean distances to the nearest centroids."""
        rank = self.nearest.c.rank
        squared = 2 + 2 * rank if self.rows.spherical else rank * rank
        statement = sa.select(sa.func.sum(squared)).select_from(self.each_row)
        return float(self.connection.scalar(statement) or 0.0)


def fit_in_blocks(
    connection: sa.Connection,
    rows: RowSet,
    algorithm: KMeans,
    seed: int,
    total: int,
    progress: Advance,
) -> tuple[Keys, Fit]:
    """Cluster a sample in memory, then iterate over all rows block by block; arguments as above.

    Where the number of clusters is to be chosen, the sample decides. Memory is that of the sample,
    of a block, and of a key, a label and a distance for each row.
    """
    numbers = algorithm.n_clusters
    # The number is chosen on fewer rows than the least sample has.
    most = numbers if isinstance(numbers, int) else 0 if numbers == "auto" else max(numbers)
    drawn = rows.sample(max(SAMPLE_PER_CLUSTER * most, BLOCK_SAMPLE), total, seed)
    _, sample = read_rows(connection, drawn)
    first = fit_in_memory(
        sample, algorithm, seed=seed, spherical=rows.spherical, max_memory=0, progress=progress
    )
    centroids, size, before = first.centroids, len(sample), np.inf
    del sample
    last = min(algorithm.max_iter, MAX_PASSES)
    for passes in range(1, last + 1):
        progress(f"pass {passes}", 0, total)
        keys, fit, means = _assigned(connection, rows, centroids)
        if passes == last or fit.inertia > (1 - _IMPROVEMENT) * before:
            break
        before, centroids = fit.inertia, means
    details: dict[str, Any] = {"method": "blocks", "passes": passes, "sample": size}
    if rows.spherical:
        details["excess_bound"] = excess_bound(
            fit.inertia / len(keys), first.inertia / size, size, len(keys)
        )
    return keys, replace(fit, details=details, score=first.score, curve=first.curve)


def excess_bound(inertia: float, of_sample: float, sample: int, total: int) -> float | None:
    """By what share the inertia of unit vectors can lie above that of a fit to all of them.

    The centroids of a fit to all rows do not depend on the sample, so their mean squared distance
    over it is that over all rows within ``4 * sqrt(ln(100) / (2 * sample))``, but for one sample in
    a hundred: Hoeffding's inequality (1963, section 6 for draws without replacement). The sample's
    own fit is at least as near to it as they are, so far as k-means, which finds local optima,
    found one that is. Chance alone is bounded, then, and not what better starts would do.

    Inertias are mean squared distances, ``of_sample`` to the centroids that were fitted to it. The
    share is ``None`` where the sample is too small to say anything.
    """
    if sample >= total:
        return 0.0
    least = of_sample - _RANGE * math.sqrt(math.log(1 / _RISK) / (2 * sample))
    return max(inertia / least - 1, 0.0) if least > 0 else None


def _assigned(
    connection: sa.Connection, rows: RowSet, centroids: Vectors
) -> tuple[Keys, Fit, Vectors]:
    """Where every row goes; and the means of the clusters that this gives."""
    if rows.spherical:
        normalize(centroids)
    keys: list[Keys] = []
    labels: list[Any] = [np.empty(0, np.int32)]
    distances: list[Any] = [np.empty(0, np.float32)]
    sums = np.zeros(centroids.shape)
    counts = np.zeros(len(centroids), dtype=np.int64)
    for part, vectors in read_blocks(connection, rows):
        if rows.spherical:
            normalize(vectors)
        nearest, distance = nearest_centroids(vectors, centroids, spherical=rows.spherical)
        keys.append(part)
        labels.append(nearest)
        distances.append(distance)
        counts += np.bincount(nearest, minlength=len(centroids))
        for number in np.unique(nearest):
            sums[number] += vectors[nearest == number].sum(axis=0, dtype=np.float64)
    means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids)
    together = np.concatenate(distances)
    squared = (2 * together if rows.spherical else together**2).sum(dtype=np.float64)
    fit = Fit(np.concatenate(labels), centroids, together, float(squared))
    return Keys.joined(keys, len(rows.keys)), fit, means.astype(np.float32)
