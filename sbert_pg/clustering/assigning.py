"""Keep a clustering current: assign new and changed rows by SQL, and measure drift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from sbert_pg.catalog import binding
from sbert_pg.catalog.tables import compatible_encoder
from sbert_pg.clustering.declaration import Clustering, Criteria
from sbert_pg.clustering.rowset import RowSet
from sbert_pg.clustering.storing import assign_statement, centroids_of, insert_or_retry
from sbert_pg.errors import ClusteringError, EncoderMismatchError

#: Distances that differ by less were computed from the same vector.
_SAME = 1e-4
#: A clustering is stale when so many rows lie beyond the distance that 1 in 100 exceeded at first,
FAR_SHARE = 0.05
#: or when the mean distance has grown by this share.
MEAN_GROWTH = 0.05


@dataclass(frozen=True, slots=True)
class Assigned:
    """What ``assign`` did.

    Attributes:
        added: rows that had no place yet.
        changed: rows whose vector had changed, and that were placed again.
        removed: rows that have lost their vector or no longer meet the filter.
    """

    added: int
    changed: int
    removed: int


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the rows have moved from the clustering that they are in.

    Attributes:
        run_id: the current run.
        rows: rows that take part now.
        unassigned: rows among them that have no place yet.
        later: rows that were assigned after the run.
        far: rows further from their centroid than 99 of 100 rows of the run were.
        far_share: their share of the rows with a place; 0.01 when the run was made.
        mean_distance: mean distance now.
        mean_distance_then: mean distance when the run was made.
        is_stale: whether it is time to run again.
        reasons: why.
    """

    run_id: int
    rows: int
    unassigned: int
    later: int
    far: int
    far_share: float
    mean_distance: float | None
    mean_distance_then: float | None
    is_stale: bool
    reasons: tuple[str, ...]


def assign(
    connection: sa.Connection, clustering: Clustering, *, where: Criteria | None = None
) -> Assigned:
    """Place new and changed rows with the nearest centroid of the current run, set-wise.

    Three statements over the table, and no vector leaves the server. A row whose vector has changed
    is known by its distance to its centroid, which is not the recorded one any more. In the run of
    a method that knows outliers, a row beyond the radius of its nearest cluster is an outlier; for
    k-means every row has a cluster.

    Concurrent calls for one clustering wait for one another. The caller commits.

    Args:
        connection: a connection in a transaction, or an ``AsyncConnection``'s within ``run_sync``.
        clustering: what is clustered.
        where: the criteria that the run was given beside the declared ones.

    Raises:
        ClusteringError: there is no current run, or it was made with another filter.
        EncoderMismatchError: the column belongs to another encoder than when the run was made.
    """
    run = _current(connection, clustering)
    _check_encoder(connection, clustering, run)
    if clustering.filter_text(where) != run.filter:
        raise ClusteringError(
            f"Run {run.id} of {clustering.column} was made with the filter {run.filter!r}, and "
            f"rows were to be assigned with {clustering.filter_text(where)!r}. Give the same "
            "where=, or run again."
        )
    # The lock of the run's row makes concurrent calls take turns.
    table = clustering.run_table
    connection.execute(sa.select(table.c.id).where(table.c.id == run.id).with_for_update())
    criteria = clustering.criteria(where)
    removed = _remove(connection, clustering, run.id, criteria)
    changed = _forget_changed(connection, clustering, run.id)
    placed = _place(connection, clustering, run, criteria)
    _count_sizes(connection, clustering, run.id)
    return Assigned(added=placed - changed, changed=changed, removed=removed)


def drift(
    connection: sa.Connection, clustering: Clustering, *, where: Criteria | None = None
) -> Drift:
    """Measure how well the current run still fits the rows.

    Cheap: it reads the recorded distances, not the vectors. Call ``assign`` first, so that new rows
    count.

    Args:
        connection: a connection.
        clustering: what is clustered.
        where: the criteria that the run was given beside the declared ones.

    Raises:
        ClusteringError: there is no current run.
    """
    run = _current(connection, clustering)
    assignment = clustering.assignment_table
    distance = sa.cast(assignment.c.distance, sa.Double)
    inside = assignment.c.cluster_id.is_not(None)
    far = distance > run.far_distance if run.far_distance is not None else sa.false()
    placed, later, beyond, mean = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.count().filter(~assignment.c.is_fitted),
            sa.func.count().filter(far),
            sa.func.avg(distance).filter(inside),
        ).where(assignment.c.run_id == run.id)
    ).one()
    rows = RowSet(clustering, clustering.criteria(where)).count(connection)
    share = beyond / placed if placed else 0.0
    # Outliers of a density method were beyond at the time of the run already.
    expected = FAR_SHARE + (run.outliers or 0) / max(run.rows or 0, 1)
    reasons = []
    if share > expected:
        reasons.append(
            f"{share:.1%} of the rows are further from every centroid than 99 % were at first"
        )
    if mean is not None and run.mean_distance and mean > (1 + MEAN_GROWTH) * run.mean_distance:
        reasons.append(f"the mean distance has grown from {run.mean_distance:.4f} to {mean:.4f}")
    return Drift(
        run_id=run.id,
        rows=rows,
        unassigned=max(0, rows - placed),
        later=later,
        far=beyond,
        far_share=share,
        mean_distance=mean,
        mean_distance_then=run.mean_distance,
        is_stale=bool(reasons),
        reasons=tuple(reasons),
    )


def _current(connection: sa.Connection, clustering: Clustering) -> Any:
    run = clustering.run_table
    found = connection.execute(
        sa.select(run).where(run.c.is_current, run.c.column_name == clustering.column.name)
    ).first()
    if found is None:
        raise ClusteringError(
            f"{clustering.column} has no current clustering. Make one with cluster(engine, ...) "
            "or 'sbert-pg cluster run'."
        )
    return found


def _check_encoder(connection: sa.Connection, clustering: Clustering, run: Any) -> None:
    """Refuse to hold new vectors against the centroids of another encoder."""
    bound = binding.binding_of(connection, clustering.column)
    now: str | None = bound.fingerprint if bound is not None else None
    then: str | None = run.fingerprint
    if now is None or then is None:
        # One of them was never held against a loaded encoder: the names are what is known.
        now = clustering.spec.name if clustering.spec is not None else None
        then = run.encoder
    elif now != then and bound is not None:
        proven = compatible_encoder.c
        accepted = connection.scalar(
            sa.select(sa.func.count()).where(
                proven.column_id == bound.id, proven.fingerprint == then
            )
        )
        now = then if accepted else now
    if now == then:
        return
    raise EncoderMismatchError(
        f"Run {run.id} of {clustering.column} was made with encoder {then!r}, and the column's "
        f"encoder is {now!r} now; its centroids mean nothing to the new vectors. Run the "
        "clustering again: clusters that match keep their numbers and names."
    )


def _remove(
    connection: sa.Connection,
    clustering: Clustering,
    run_id: int,
    criteria: list[sa.ColumnElement[bool]],
) -> int:
    assignment = clustering.assignment_table
    takes_part = sa.exists().where(clustering.row_is_assigned(), *criteria).correlate(assignment)
    deleted = connection.execute(
        sa.delete(assignment).where(assignment.c.run_id == run_id, sa.not_(takes_part))
    )
    return int(deleted.rowcount)


def _forget_changed(connection: sa.Connection, clustering: Clustering, run_id: int) -> int:
    """Delete assignments whose row is at another distance from its centroid than recorded."""
    assignment = clustering.assignment_table
    rows = RowSet(clustering, [sa.true()])
    centroids = centroids_of(clustering, run_id)
    vectors = rows.vectors
    same_row = sa.and_(
        *(
            left == vectors.c[key.name]
            for left, key in zip(clustering.row_keys, clustering.keys, strict=True)
        )
    )
    now = rows.distance(rows.rank(centroids.c.centroid))
    moved = connection.execute(
        sa.delete(assignment).where(
            assignment.c.run_id == run_id,
            assignment.c.cluster_id == centroids.c.id,
            same_row,
            sa.func.abs(now - assignment.c.distance) > _SAME,
        )
    )
    changed = int(moved.rowcount)
    # An outlier's nearest centroid is not recorded, so all are compared, for these rows only.
    nearest = rows.nearest(centroids, centroids.c.id)
    outside = (
        sa.select(*(vectors.c[key.name] for key in clustering.keys))
        .select_from(
            sa.join(
                sa.join(vectors, assignment, same_row),
                nearest,
                sa.true(),
            )
        )
        .where(
            assignment.c.run_id == run_id,
            assignment.c.cluster_id.is_(None),
            sa.func.abs(rows.distance(nearest.c.rank) - assignment.c.distance) > _SAME,
        )
    )
    again = connection.execute(
        sa.delete(assignment).where(
            assignment.c.run_id == run_id,
            assignment.c.cluster_id.is_(None),
            sa.tuple_(*clustering.row_keys).in_(outside),
        )
    )
    return changed + int(again.rowcount)


def _place(
    connection: sa.Connection,
    clustering: Clustering,
    run: Any,
    criteria: list[sa.ColumnElement[bool]],
) -> int:
    """Assign the rows that have no place."""
    assignment, cluster = clustering.assignment_table, clustering.cluster_table
    placed = sa.exists().where(clustering.row_is_assigned(), assignment.c.run_id == run.id)
    rows = RowSet(clustering, [*criteria, sa.not_(placed.correlate(clustering.rows))])
    inserted = insert_or_retry(connection, assign_statement(rows, run.id, is_fitted=False))
    if run.algorithm != "kmeans":
        connection.execute(
            sa.update(assignment)
            .where(
                assignment.c.run_id == run.id,
                sa.not_(assignment.c.is_fitted),
                assignment.c.cluster_id == cluster.c.id,
                assignment.c.distance > cluster.c.radius,
            )
            .values(cluster_id=None)
        )
    return inserted


def _count_sizes(connection: sa.Connection, clustering: Clustering, run_id: int) -> None:
    assignment, cluster = clustering.assignment_table, clustering.cluster_table
    size = (
        sa.select(sa.func.count())
        .where(assignment.c.cluster_id == cluster.c.id)
        .correlate(cluster)
        .scalar_subquery()
    )
    connection.execute(
        sa.update(cluster)
        .where(cluster.c.run_id == run_id, cluster.c.size.is_distinct_from(size))
        .values(size=size)
    )


__all__ = ["Assigned", "Drift", "assign", "drift"]
