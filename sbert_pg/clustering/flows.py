"""What became of the clusters of one run in a later one."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from sbert_pg.clustering.declaration import Clustering
from sbert_pg.errors import ClusteringError


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
    earlier, later = _runs(connection, clustering, earlier, later)
    before, after = (clustering.assignment_table.alias(name) for name in ("earlier", "later"))
    same = (before.c[key.name] == after.c[key.name] for key in clustering.row_keys)
    moved = connection.execute(
        sa.select(before.c.cluster_id, after.c.cluster_id, sa.func.count())
        .select_from(before.join(after, sa.and_(*same)))
        .where(before.c.run_id == earlier, after.c.run_id == later)
        .group_by(before.c.cluster_id, after.c.cluster_id)
    ).all()
    clusters = _labels(connection, clustering, [earlier, later])
    totals: dict[int | None, int] = {}
    for was, _, rows in moved:
        totals[was] = totals.get(was, 0) + rows
    moves = [
        Flow(clusters.get(was), clusters.get(now), rows, rows / totals[was])
        for was, now, rows in moved
    ]
    return sorted(moves, key=lambda flow: (-flow.rows, flow.earlier or (), flow.later or ()))


def _runs(
    connection: sa.Connection, clustering: Clustering, earlier: int | None, later: int | None
) -> tuple[int, int]:
    later = clustering.require_current(connection).id if later is None else later
    earlier = run_before(connection, clustering, later) if earlier is None else earlier
    if earlier is None:
        raise ClusteringError(f"Run {later} of {clustering.column} is the first one.")
    return earlier, later


def _labels(
    connection: sa.Connection, clustering: Clustering, runs: list[int]
) -> dict[int | None, tuple[int, str]]:
    """Number and label of the clusters of some runs, by their keys."""
    cluster = clustering.cluster_table.c
    named = sa.select(cluster.id, cluster.number, cluster.label).where(cluster.run_id.in_(runs))
    return {
        id_: (number, label or f"cluster {number}")
        for id_, number, label in connection.execute(named)
    }
