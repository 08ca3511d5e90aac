"""Keep a clustering current: assign new and changed rows by SQL, measure drift, go on doing so."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from sbert_pg import catalog, system
from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.catalog.tables import compatible_encoder
from sbert_pg.clustering.declaration import Clustering
from sbert_pg.clustering.placing import assign_statement, centroids_of, insert_or_retry
from sbert_pg.clustering.rows import Criteria, RowSet
from sbert_pg.clustering.runs import fail_lost_runs
from sbert_pg.errors import ClusteringError, EncoderMismatchError, SbertPgError
from sbert_pg.sqlstates import words_of

logger = logging.getLogger("sbert_pg.clustering")

#: Distances that differ by less, or by less than this share, were computed from the same vector.
_SAME = 1e-4
#: A clustering is stale when so many rows lie beyond the distance that 1 in 100 exceeded at first,
FAR_SHARE = 0.05
#: or when the mean distance has grown by this share.
MEAN_GROWTH = 0.05
#: Seconds between the looks of a keeper.
INTERVAL = 10.0
#: Its passes take at most this share of the time.
_MOST_TIME = 0.05

#: What is known of a table when it was last looked at: the current run, and rows written so far.
_Seen = tuple[int, int | None]


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
    system.require_connection("assign", connection)
    run = clustering.require_current(connection)
    _check_encoder(connection, clustering, run)
    if clustering.filter_text(where) != run.filter:
        raise ClusteringError(
            f"Run {run.id} of {clustering.column} was made with the filter {run.filter!r}, and "
            f"rows were to be assigned with {clustering.filter_text(where)!r}. Give the same "
            "where=, or run again."
        )
    # The lock of the run's row makes concurrent calls take turns.
    number = clustering.run_table.c.id
    connection.execute(sa.select(number).where(number == run.id).with_for_update())
    rows = clustering.row_set(where)
    removed = _remove(connection, clustering, run.id, rows)
    changed = _forget_changed(connection, clustering, run.id)
    placed = _place(connection, clustering, run, rows)
    _count_sizes(connection, clustering, run.id)
    return Assigned(added=placed - changed, changed=changed, removed=removed)


def drift(
    connection: sa.Connection, clustering: Clustering, *, where: Criteria | None = None
) -> Drift:
    """Measure how well the current run still fits the rows.

    Cheap: it reads the recorded distances, not the vectors. Call ``assign`` first, so that new rows
    count.

    Args:
        clustering: what is clustered.
        where: the criteria that the run was given beside the declared ones.

    Raises:
        ClusteringError: there is no current run.
    """
    system.require_connection("drift", connection)
    run = clustering.require_current(connection)
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
    rows = clustering.row_set(where).count(connection)
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


def _check_encoder(connection: sa.Connection, clustering: Clustering, run: Any) -> None:
    """Refuse to hold new vectors against the centroids of another encoder."""
    bound = catalog.binding_of(connection, clustering.column)
    now: str | None = bound.fingerprint if bound is not None else None
    then: str | None = run.fingerprint
    if now is None or then is None:
        # One of them was never held against a loaded encoder: the names are what is known.
        now = clustering.spec.name if clustering.spec is not None else None
        then = run.encoder
    elif now != then and bound is not None:
        proven = compatible_encoder.c
        same = sa.and_(proven.binding_id == bound.id, proven.fingerprint == then)
        accepted = connection.scalar(sa.select(sa.func.count()).where(same))
        now = then if accepted else now
    if now == then:
        return
    raise EncoderMismatchError(
        f"Run {run.id} of {clustering.column} was made with encoder {then!r}, and the column's "
        f"encoder is {now!r} now; its centroids mean nothing to the new vectors. Run the "
        "clustering again: clusters that match keep their numbers and names."
    )


def _remove(connection: sa.Connection, clustering: Clustering, run_id: int, rows: RowSet) -> int:
    assignment = clustering.assignment_table
    takes_part = sa.exists().where(clustering.row_is_assigned(), *rows.criteria)
    mine, gone = assignment.c.run_id == run_id, sa.not_(takes_part.correlate(assignment))
    deleted = connection.execute(sa.delete(assignment).where(mine, gone))
    return int(deleted.rowcount)


def _forget_changed(connection: sa.Connection, clustering: Clustering, run_id: int) -> int:
    """Delete assignments whose row is at another distance from its centroid than recorded."""
    assignment = clustering.assignment_table
    mine = assignment.c.run_id == run_id
    rows = clustering.row_set()
    vectors, centroids = rows.vectors, centroids_of(clustering, run_id)
    same_row = clustering.row_is_assigned(vectors)

    def has_moved(rank: sa.ColumnElement[float]) -> sa.ColumnElement[bool]:
        shift = sa.func.abs(rows.distance(rank) - assignment.c.distance)
        return shift > _SAME * sa.func.greatest(1, assignment.c.distance)

    own, rank = assignment.c.cluster_id == centroids.c.id, rows.rank(centroids.c.centroid)
    moves = sa.delete(assignment).where(mine, own, same_row, has_moved(rank))
    moved = connection.execute(moves)
    # An outlier's nearest centroid is not recorded, so all are compared, for these rows only.
    is_outlier = assignment.c.cluster_id.is_(None)
    nearest = rows.nearest(centroids, centroids.c.id)
    outside = (
        sa.select(*(vectors.c[key.name] for key in clustering.keys))
        .select_from(sa.join(sa.join(vectors, assignment, same_row), nearest, sa.true()))
        .where(mine, is_outlier, has_moved(nearest.c.rank))
    )
    moved_outside = connection.execute(
        sa.delete(assignment).where(mine, is_outlier, sa.tuple_(*clustering.row_keys).in_(outside))
    )
    return int(moved.rowcount) + int(moved_outside.rowcount)


def _place(connection: sa.Connection, clustering: Clustering, run: Any, rows: RowSet) -> int:
    assignment, cluster = clustering.assignment_table, clustering.cluster_table
    unplaced = rows.only(sa.not_(clustering.is_placed(run.id).correlate(clustering.rows)))
    statement = assign_statement(clustering, unplaced, run.id, is_fitted=False)
    inserted = insert_or_retry(connection, statement)
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


class ClusterKeeper:
    """Keeps clusterings current, and marks runs as failed whose process is gone.

    It looks from time to time, and does nothing where nothing was written to the table since. A
    pass compares every row with its centroid, so passes over large tables are spaced out. Several
    processes may each have one: they take turns by the row of the run. A worker takes one along
    (``companions``), and it also runs by itself.

    Args:
        engine: an engine with the driver psycopg 3.
        clusterings: what is kept current, from ``clusters_of``; one or several.
        interval: seconds between looks.

    Attributes:
        interval: seconds between looks.
        assigned: rows that were given a place.
    """

    def __init__(
        self,
        engine: sa.Engine,
        clusterings: Clustering | Sequence[Clustering],
        interval: float = INTERVAL,
    ) -> None:
        # A row that was waited for is seen as it is then, whatever the engine's own level.
        self._engine = engine.execution_options(isolation_level="READ COMMITTED")
        if isinstance(clusterings, Clustering):
            clusterings = [clusterings]
        self._clusterings = tuple(clusterings)
        self.interval = interval
        self._seen: dict[Clustering, _Seen] = {}
        self._due: dict[Clustering, float] = {}
        #: Runs about which something was said already.
        self._refused: set[int] = set()
        self._stale: set[int] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.assigned = 0

    def start(self) -> None:
        """Begin."""
        self._stop.clear()
        if self._clusterings:
            self._thread = threading.Thread(target=self._run, name="sbert-pg-clusters", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End, and wait for the pass that is under way."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def look(self) -> list[Assigned]:
        """One look at each clustering, now; what was done where something was."""
        looks = [self._look_at(clustering) for clustering in self._clusterings]
        return [assigned for assigned in looks if assigned is not None]

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            for clustering in self._clusterings:
                if not self._stop.is_set() and time.monotonic() >= self._due.get(clustering, 0):
                    self._look_at(clustering)

    def _look_at(self, clustering: Clustering) -> Assigned | None:
        began = time.monotonic()
        try:
            return self._pass(clustering)
        except (sa.exc.SQLAlchemyError, SbertPgError) as error:
            fields = {"column": str(clustering.column), "error": words_of(error)}
            logger.warning("Cannot place rows in clusters", extra={"fields": fields})
            return None
        finally:
            now = time.monotonic()
            self._due[clustering] = now + (now - began) / _MOST_TIME

    def _pass(self, clustering: Clustering) -> Assigned | None:
        fail_lost_runs(self._engine, clustering)
        with self._engine.begin() as connection:
            # None where another process is assigning rows to it.
            current = sa.select(clustering.run_table.c.id).where(clustering.is_current())
            run_id = connection.scalar(current.with_for_update(skip_locked=True))
            if run_id is None or run_id in self._refused:
                return None
            # Read before the pass: what is counted later was written later, or is looked at again.
            seen = (run_id, written(connection, clustering.rows))
            if seen[1] is not None and self._seen.get(clustering) == seen:
                return None
            try:
                assigned = assign(connection, clustering)
            except (ClusteringError, EncoderMismatchError):
                # Nothing changes that but another run.
                self._refused.add(run_id)
                raise
            reasons = drift(connection, clustering).reasons
        self._seen[clustering] = seen
        self.assigned += assigned.added + assigned.changed
        self._report(clustering, run_id, assigned, reasons)
        return assigned

    def _report(
        self, clustering: Clustering, run_id: int, assigned: Assigned, reasons: Sequence[str]
    ) -> None:
        fields: dict[str, Any] = {"column": str(clustering.column), "run": run_id}
        if assigned != Assigned(0, 0, 0):
            logger.info("Placed rows in clusters", extra={"fields": fields | asdict(assigned)})
        if reasons and run_id not in self._stale:
            self._stale.add(run_id)
            fields |= {"reasons": "; ".join(reasons)}
            logger.warning("It is time to cluster again", extra={"fields": fields})


def written(connection: sa.Connection, table: sa.Table) -> int | None:
    """Rows of a table, or of its partitions, that were ever written, as statistics have it.

    Statistics follow a commit within seconds, so a write is never missed, only seen late. ``None``
    where the server keeps none.
    """
    if connection.scalar(sa.select(sa.func.current_setting("track_counts"))) == "off":
        return None
    relation = system.oid_of(system.name_in(connection, table.schema, table.name))
    part = catalog_rows.parts_of_table(relation).subquery()
    kinds = ("inserted", "updated", "deleted")
    counts = (getattr(sa.func, f"pg_stat_get_tuples_{kind}")(part.c.relid) for kind in kinds)
    total = sum(map(sa.func.sum, counts), sa.literal(0))
    return int(connection.scalar(sa.select(total)) or 0)
