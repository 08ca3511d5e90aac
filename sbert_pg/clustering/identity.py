"""Clusters keep their numbers and names from run to run, where they match."""

from __future__ import annotations

import numpy as np
import sqlalchemy as sa

from sbert_pg.clustering.declaration import Clustering
from sbert_pg.clustering.extras import need

#: Least share of the rows of two clusters, together, that they must have in common to be one.
MIN_OVERLAP = 0.3


def previous_run(connection: sa.Connection, clustering: Clustering) -> int | None:
    """The run whose clusters a new one continues: the column's current one, else the latest of
    another column's, as after a change of encoder.
    """
    run = clustering.run_table
    statement = (
        sa.select(run.c.id)
        .where(run.c.is_current)
        .order_by((run.c.column_name == clustering.column.name).desc(), run.c.id.desc())
        .limit(1)
    )
    return connection.scalar(statement)


def number_clusters(
    connection: sa.Connection,
    clustering: Clustering,
    run_id: int,
    previous: int | None,
    min_overlap: float = MIN_OVERLAP,
) -> int:
    """Give the clusters of a run their numbers: those of matching earlier clusters, else new ones.

    Old and new clusters are paired so that they share as many rows as can be (linear assignment),
    and a pair counts where the shared rows are at least ``min_overlap`` of the rows in either
    cluster. A name given by a user goes with the number.

    Args:
        connection: the run's transaction.
        clustering: what is clustered.
        run_id: the new run.
        previous: the run to continue, or ``None``.
        min_overlap: intersection over union, at least.

    Returns:
        How many clusters took over a number.
    """
    cluster = clustering.cluster_table
    pairs = _pairs(connection, clustering, run_id, previous, min_overlap) if previous else {}
    taken = connection.scalar(sa.select(sa.func.max(cluster.c.number))) or 0
    fresh = max(0, taken)
    names = _names(connection, clustering, previous) if previous else {}
    ordered = sa.select(cluster.c.id).where(cluster.c.run_id == run_id)
    values = []
    for cluster_id in connection.scalars(ordered.order_by(cluster.c.size.desc(), cluster.c.id)):
        number = pairs.get(cluster_id)
        if number is None:
            fresh += 1
            number = fresh
        values.append(
            {
                "this": cluster_id,
                "new_number": number,
                "new_label": names.get(number),
                "named": number in names,
            }
        )
    if values:
        connection.execute(
            sa.update(cluster)
            .where(cluster.c.id == sa.bindparam("this"))
            .values(
                number=sa.bindparam("new_number"),
                label=sa.bindparam("new_label"),
                is_named=sa.bindparam("named"),
            ),
            values,
        )
    return len(pairs)


def _pairs(
    connection: sa.Connection,
    clustering: Clustering,
    run_id: int,
    previous: int,
    min_overlap: float,
) -> dict[int, int]:
    """From the id of a new cluster to the number that it takes over."""
    cluster, assignment = clustering.cluster_table, clustering.assignment_table
    old, new = assignment.alias("old"), assignment.alias("new")
    same_row = sa.and_(*(old.c[key.name] == new.c[key.name] for key in clustering.row_keys))
    shared = connection.execute(
        sa.select(old.c.cluster_id, new.c.cluster_id, sa.func.count())
        .join_from(old, new, same_row)
        .where(
            old.c.run_id == previous,
            new.c.run_id == run_id,
            old.c.cluster_id.is_not(None),
            new.c.cluster_id.is_not(None),
        )
        .group_by(old.c.cluster_id, new.c.cluster_id)
    ).all()
    if not shared:
        return {}
    rows = connection.execute(
        sa.select(assignment.c.cluster_id, sa.func.count())
        .where(assignment.c.run_id.in_([previous, run_id]), assignment.c.cluster_id.is_not(None))
        .group_by(assignment.c.cluster_id)
    )
    size: dict[int, int] = {row[0]: row[1] for row in rows}
    number_of: dict[int, int] = {
        row[0]: row[1]
        for row in connection.execute(
            sa.select(cluster.c.id, cluster.c.number).where(cluster.c.run_id == previous)
        )
    }
    olds = sorted({row[0] for row in shared})
    news = sorted({row[1] for row in shared})
    matrix = np.zeros((len(olds), len(news)))
    for before, after, count in shared:
        matrix[olds.index(before), news.index(after)] = count
    optimize = need("scipy.optimize", "match the clusters of two runs")
    found: dict[int, int] = {}
    for i, j in zip(*optimize.linear_sum_assignment(matrix, maximize=True), strict=True):
        common = matrix[i, j]
        either = size[olds[i]] + size[news[j]] - common
        if common > 0 and common >= min_overlap * either:
            found[news[j]] = number_of[olds[i]]
    return found


def _names(connection: sa.Connection, clustering: Clustering, run_id: int) -> dict[int, str]:
    """Names that users gave to the clusters of a run, by number."""
    cluster = clustering.cluster_table
    rows = connection.execute(
        sa.select(cluster.c.number, cluster.c.label).where(
            cluster.c.run_id == run_id, cluster.c.is_named
        )
    )
    return {row[0]: row[1] for row in rows}
