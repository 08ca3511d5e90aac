"""A run summed up, and held against an earlier one: sizes, numbers, names, rows that moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from sbert_pg.clustering.declaration import Clustering
from sbert_pg.clustering.kmeans import need
from sbert_pg.clustering.tables import EXEMPLAR_PREFIX, title_of
from sbert_pg.errors import ClusteringError

#: Share of the rows that lie within a cluster's radius and within a run's ``far_distance``.
WITHIN = 0.99
#: Least share of the rows of two clusters, together, that they must have in common to be one.
MIN_OVERLAP = 0.3


def summarize(connection: sa.Connection, clustering: Clustering, run_id: int) -> dict[str, Any]:
    """Fill in sizes, cohesion, radius and exemplars; drop clusters without rows; sum up the run.

    Returns columns of the run, and ``largest``, the size of its largest cluster.
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
        partition_by=assignment.c.cluster_id, order_by=[assignment.c.distance, *clustering.row_keys]
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
        *(
            sa.select(value).where(cluster.c.run_id == run_id).scalar_subquery().label(name)
            for name, value in (
                ("n_clusters", sa.func.count()),
                ("largest", sa.func.max(cluster.c.size)),
            )
        ),
    ).where(assignment.c.run_id == run_id)
    return dict(connection.execute(statement).mappings().one())


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
    connection: sa.Connection, clustering: Clustering, run_id: int, previous: int | None
) -> int:
    """Give the clusters of a run their numbers: those of matching earlier clusters, else new ones.

    Old and new clusters are paired so that they share as many rows as can be (linear assignment),
    and a pair counts where the shared rows are at least ``MIN_OVERLAP`` of the rows in either
    cluster. A name given by a user goes with the number. Returns how many took over a number.
    """
    cluster = clustering.cluster_table
    known = sa.select(*cluster.c["id", "number", "label", "is_named"])
    earlier = {row.id: row for row in connection.execute(known.where(cluster.c.run_id == previous))}
    pairs = _pairs(connection, clustering, run_id, previous) if previous else {}
    # A run has provisional, negative numbers until now.
    last = max(0, connection.scalar(sa.select(sa.func.max(cluster.c.number))) or 0)
    ordered = sa.select(cluster.c.id).where(cluster.c.run_id == run_id)
    values = []
    for cluster_id in connection.scalars(ordered.order_by(cluster.c.size.desc(), cluster.c.id)):
        before = earlier.get(pairs.get(cluster_id))
        name = before.label if before is not None and before.is_named else None
        last += before is None
        new = {"new_number": last if before is None else before.number, "new_label": name}
        values.append({"this": cluster_id, **new, "named": name is not None})
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


def _shared(
    connection: sa.Connection, clustering: Clustering, earlier: int, later: int
) -> Sequence[Any]:
    """Rows that two runs have in common: the cluster in either, ``None`` for outliers, how many."""
    before, after = (clustering.assignment_table.alias(name) for name in ("earlier", "later"))
    same = (before.c[key.name] == after.c[key.name] for key in clustering.row_keys)
    statement = (
        sa.select(before.c.cluster_id, after.c.cluster_id, sa.func.count())
        .select_from(before.join(after, sa.and_(*same)))
        .where(before.c.run_id == earlier, after.c.run_id == later)
        .group_by(before.c.cluster_id, after.c.cluster_id)
    )
    return connection.execute(statement).all()


def _pairs(
    connection: sa.Connection, clustering: Clustering, run_id: int, previous: int
) -> dict[int, int]:
    """The earlier cluster that a new one continues, by their ids."""
    # Without outliers, whose cluster is None.
    shared = list(filter(all, _shared(connection, clustering, previous, run_id)))
    if not shared:
        return {}
    assignment = clustering.assignment_table
    rows = connection.execute(
        sa.select(assignment.c.cluster_id, sa.func.count())
        .where(assignment.c.run_id.in_([previous, run_id]), assignment.c.cluster_id.is_not(None))
        .group_by(assignment.c.cluster_id)
    )
    size: dict[int, int] = {row[0]: row[1] for row in rows}
    olds = sorted({row[0] for row in shared})
    news = sorted({row[1] for row in shared})
    matrix = np.zeros((len(olds), len(news)))
    for before, after, count in shared:
        matrix[olds.index(before), news.index(after)] = count
    optimize = need("scipy.optimize", "match the clusters of two runs")
    continued: dict[int, int] = {}
    for i, j in zip(*optimize.linear_sum_assignment(matrix, maximize=True), strict=True):
        common = matrix[i, j]
        either = size[olds[i]] + size[news[j]] - common
        if common > 0 and common >= MIN_OVERLAP * either:
            continued[news[j]] = olds[i]
    return continued


@dataclass(frozen=True, slots=True)
class Flow:
    """Rows that went from a cluster of one run to a cluster of another.

    Attributes:
        earlier: number and label of the cluster that they were in; ``None`` for outliers.
        later: the same of the cluster that they are in now.
        rows: how many.
        share: their share of the rows of the earlier cluster that both runs have.
    """

    earlier: tuple[int, str] | None
    later: tuple[int, str] | None
    rows: int
    share: float


def run_before(connection: sa.Connection, clustering: Clustering, run_id: int) -> int | None:
    """The last run before another that is done, of any column that shares the tables."""
    run = clustering.run_table.c
    statement = sa.select(sa.func.max(run.id)).where(run.id < run_id, run.state == "done")
    number: int | None = connection.scalar(statement)
    return number


def flows(
    connection: sa.Connection,
    clustering: Clustering,
    earlier: int | None = None,
    later: int | None = None,
) -> list[Flow]:
    """Where the rows of a run's clusters are in a later run, most rows first.

    Rows that one of the runs does not have are not counted. One join of the assignments of both.

    Args:
        clustering: what is clustered.
        earlier: a run; by default the last one that was done before ``later``.
        later: a run; the current one by default.

    Raises:
        ClusteringError: there is no current run, or none before it.
    """
    later = clustering.require_current(connection).id if later is None else later
    earlier = run_before(connection, clustering, later) if earlier is None else earlier
    if earlier is None:
        raise ClusteringError(f"Run {later} of {clustering.column} is the first one.")
    moved = _shared(connection, clustering, earlier, later)
    c = clustering.cluster_table.c
    named = sa.select(c.id, c.number, c.label).where(c.run_id.in_([earlier, later]))
    clusters: dict[int | None, tuple[int, str]] = {
        row.id: (row.number, title_of(row)) for row in connection.execute(named)
    }
    totals: dict[int | None, int] = {}
    for was, _, rows in moved:
        totals[was] = totals.get(was, 0) + rows
    moves = [
        Flow(clusters.get(was), clusters.get(now), rows, rows / totals[was])
        for was, now, rows in moved
    ]
    return sorted(moves, key=lambda flow: (-flow.rows, flow.earlier or (), flow.later or ()))
