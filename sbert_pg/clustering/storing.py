"""Write the result of a run: clusters, assignments, and what is summed over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import sqlalchemy as sa

from sbert_pg.clustering.declaration import Clustering
from sbert_pg.clustering.rowset import RowSet
from sbert_pg.clustering.tables import EXEMPLAR_PREFIX
from sbert_pg.clustering.transfer import Keys, copy_type, is_integer, write_block
from sbert_pg.types import Vector

#: Share of the rows that lie within a cluster's radius and within a run's ``far_distance``.
WITHIN = 0.99
#: Rows can be deleted again and again while they are assigned.
_ATTEMPTS = 5


def store_fit(
    connection: sa.Connection,
    clustering: Clustering,
    run_id: int,
    keys: Keys,
    labels: npt.NDArray[np.int32],
    centroids: npt.NDArray[np.float32],
    distances: npt.NDArray[np.float32],
) -> None:
    """Store clusters that were computed in this process; rows deleted meanwhile are left out.

    Assignments are copied to where they belong. Where a row is gone, or keys are of a type that is
    not copied as it travels, they are copied aside and joined to the rows that are there.
    """
    numbers = store_clusters(connection, clustering, run_id, centroids)
    ids = np.append(numbers, 0)[labels]
    if _copied_at_once(connection, clustering, run_id, keys, ids, distances):
        return
    table = _staging(clustering)
    table.create(connection, checkfirst=False)
    write_block(connection, table, list(table.columns), [*keys.columns, ids, distances])
    insert_or_retry(
        connection,
        _from_staging(clustering, run_id, table, lock=False),
        # A row was deleted between the join and the check of the foreign key: hold them this time.
        _from_staging(clustering, run_id, table, lock=True),
    )
    table.drop(connection)


def _copied_at_once(
    connection: sa.Connection,
    clustering: Clustering,
    run_id: int,
    keys: Keys,
    ids: npt.NDArray[np.int64],
    distances: npt.NDArray[np.float32],
) -> bool:
    """Copy assignments into their table, all or none; tell whether it could be done."""
    types = [copy_type(connection, key) for key in clustering.row_keys]
    for key, type_ in zip(clustering.keys, types, strict=True):
        if type_ is None or is_integer(key) != type_.startswith("int"):
            return False
    table = clustering.assignment_table
    columns = [*clustering.row_keys, *(table.c[name] for name in _VALUES)]
    clusters = [number or None for number in ids.tolist()]
    values = [*keys.columns, [run_id] * len(ids), clusters, distances, [True] * len(ids)]
    try:
        with connection.begin_nested():
            write_block(connection, table, columns, values)
    except psycopg.errors.ForeignKeyViolation:
        # A row was deleted since it was read.
        return False
    return True


def store_clusters(
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
    connection: sa.Connection, rows: RowSet, run_id: int, centroids: sa.Table
) -> None:
    """Store clusters of a table of centroids, and assign every row by one statement."""
    table = rows.clustering.cluster_table
    connection.execute(
        sa.insert(table).from_select(
            ["run_id", "number", "centroid", "size"],
            sa.select(
                sa.literal(run_id, sa.BigInteger),
                -1 - centroids.c.number,
                centroids.c.centroid,
                sa.literal(0, sa.Integer),
            ),
        )
    )
    insert_or_retry(connection, assign_statement(rows, run_id, is_fitted=True))


def insert_or_retry(
    connection: sa.Connection, statement: sa.Insert, otherwise: sa.Insert | None = None
) -> int:
    """Insert rows that refer to others; where one is deleted meanwhile, insert what still can be.

    Args:
        connection: a connection in a transaction.
        statement: the insert.
        otherwise: what to execute when rows vanish under the first; the same again by default.

    Returns:
        How many were inserted.
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


def assign_statement(rows: RowSet, run_id: int, *, is_fitted: bool) -> sa.Insert:
    """Assign each row to the nearest centroid of a run, set-wise."""
    clustering = rows.clustering
    nearest = rows.nearest(centroids_of(clustering, run_id), sa.column("id"))
    distance = rows.distance(nearest.c.rank)
    vectors = rows.vectors
    return sa.insert(clustering.assignment_table).from_select(
        [*(key.name for key in clustering.row_keys), *_VALUES],
        sa.select(
            *(vectors.c[key.name] for key in clustering.keys),
            sa.literal(run_id, sa.BigInteger),
            nearest.c.value,
            sa.func.greatest(sa.cast(distance, sa.REAL), 0),
            sa.literal(is_fitted, sa.Boolean),
        ).select_from(sa.join(vectors, nearest, sa.true())),
    )


_VALUES = ("run_id", "cluster_id", "distance", "is_fitted")


def centroids_of(clustering: Clustering, run_id: int) -> sa.CTE:
    """Ids, centroids and radii of a run, read once for a statement.

    A cluster's row may be long enough for its centroid to be stored apart; ``subvector`` fetches it
    here rather than at every comparison.
    """
    table = clustering.cluster_table
    whole = sa.func.subvector(table.c.centroid, 1, clustering.dimensions, type_=Vector())
    return (
        sa.select(table.c.id, table.c.radius, whole.label("centroid"))
        .where(table.c.run_id == run_id)
        .cte("centroids")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )


def summarize(connection: sa.Connection, clustering: Clustering, run_id: int) -> dict[str, Any]:
    """Fill in sizes, cohesion, radius and exemplars; drop clusters without rows; sum up the run.

    Returns:
        Values of the run: ``rows``, ``n_clusters``, ``outliers``, ``inertia``, ``mean_distance``,
        ``far_distance``.
    """
    cluster, assignment = clustering.cluster_table, clustering.assignment_table
    mine = assignment.c.run_id == run_id
    distance = sa.cast(assignment.c.distance, sa.Double)
    total = (
        sa.select(
            assignment.c.cluster_id,
            sa.func.count().label("size"),
            sa.func.avg(distance).label("mean"),
            sa.func.percentile_cont(WITHIN).within_group(distance).label("radius"),
        )
        .where(mine, assignment.c.cluster_id.is_not(None))
        .group_by(assignment.c.cluster_id)
        .subquery("total")
    )
    place = sa.func.row_number().over(
        partition_by=assignment.c.cluster_id,
        order_by=[assignment.c.distance, *clustering.row_keys],
    )
    ranked = (
        sa.select(assignment.c.cluster_id, *clustering.row_keys, place.label("sbert_pg_place"))
        .where(mine, assignment.c.cluster_id.is_not(None))
        .subquery()
    )
    first = sa.select(ranked).where(ranked.c.sbert_pg_place == 1).subquery("first")
    cohesion = 1 - total.c.mean if clustering.metric == "cosine" else -total.c.mean
    exemplar = {
        EXEMPLAR_PREFIX + key.name: first.c[row.name]
        for key, row in zip(clustering.keys, clustering.row_keys, strict=True)
    }
    connection.execute(
        sa.update(cluster)
        .where(total.c.cluster_id == cluster.c.id, first.c.cluster_id == cluster.c.id)
        .values(size=total.c.size, cohesion=cohesion, radius=total.c.radius, **exemplar)
    )
    connection.execute(sa.delete(cluster).where(cluster.c.run_id == run_id, cluster.c.size == 0))
    return _totals(connection, clustering, run_id)


def _totals(connection: sa.Connection, clustering: Clustering, run_id: int) -> dict[str, Any]:
    assignment, cluster = clustering.assignment_table, clustering.cluster_table
    distance = sa.cast(assignment.c.distance, sa.Double)
    inside = assignment.c.cluster_id.is_not(None)
    squared = 2 * distance if clustering.metric == "cosine" else distance * distance
    statement = sa.select(
        sa.func.count().label("rows"),
        sa.func.count().filter(~inside).label("outliers"),
        sa.func.coalesce(sa.func.sum(squared).filter(inside), 0.0).label("inertia"),
        sa.func.avg(distance).filter(inside).label("mean_distance"),
        sa.func.percentile_cont(WITHIN).within_group(distance).filter(inside).label("far_distance"),
        sa.select(sa.func.count())
        .where(cluster.c.run_id == run_id)
        .scalar_subquery()
        .label("n_clusters"),
    ).where(assignment.c.run_id == run_id)
    return dict(connection.execute(statement).mappings().one())


def _staging(clustering: Clustering) -> sa.Table:
    return sa.Table(
        "sbert_pg_assigned",
        sa.MetaData(),
        *(
            sa.Column(f"key_{number}", sa.BigInteger() if is_integer(key) else sa.Text())
            for number, key in enumerate(clustering.keys)
        ),
        sa.Column("cluster_id", sa.BigInteger),
        sa.Column("distance", sa.REAL),
        prefixes=["TEMPORARY"],
        postgresql_on_commit="DROP",
    )


def _from_staging(
    clustering: Clustering, run_id: int, staged: sa.Table, *, lock: bool
) -> sa.Insert:
    same = sa.and_(
        *(
            sa.cast(staged.c[f"key_{number}"], key.type) == key
            for number, key in enumerate(clustering.keys)
        )
    )
    statement = sa.select(
        *clustering.keys,
        sa.literal(run_id, sa.BigInteger),
        sa.func.nullif(staged.c.cluster_id, 0),
        staged.c.distance,
        sa.true(),
    ).join_from(staged, clustering.rows, same)
    if lock:
        statement = statement.with_for_update(key_share=True, read=True, of=clustering.rows)
    columns = [*(key.name for key in clustering.row_keys), *_VALUES]
    return sa.insert(clustering.assignment_table).from_select(columns, statement)
