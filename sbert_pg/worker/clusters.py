"""A thread that gives new and changed rows their place in the current clusters.

It looks from time to time, and does nothing where nothing was written to the table since. A pass
compares every row with its centroid, so passes over large tables are spaced out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import OID

from sbert_pg.clustering import Assigned, Clustering, assign, drift, fail_lost_runs
from sbert_pg.errors import ClusteringError, EncoderMismatchError, SbertPgError
from sbert_pg.pending.database import Database
from sbert_pg.pending.faults import words_of
from sbert_pg.worker.logs import LOGGER, say

logger = logging.getLogger(LOGGER)

#: Seconds between looks.
INTERVAL = 10.0
#: Passes take at most this share of the time.
_MOST_TIME = 0.05

#: What is known of a table when it was last looked at: the current run, and rows written so far.
_Seen = tuple[int, int | None]


class ClusterKeeper:
    """Keeps clusterings current, and marks runs as failed whose process is gone.

    Several processes may each have one: they take turns by the row of the run.

    Args:
        database: the database.
        clusterings: what is kept current, from ``clusters_of``.
        interval: seconds between looks.

    Attributes:
        interval: seconds between looks.
        assigned: rows that were given a place.
    """

    def __init__(
        self,
        database: Database,
        clusterings: Sequence[Clustering],
        interval: float = INTERVAL,
    ) -> None:
        self._database = database
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
        found = []
        for clustering in self._clusterings:
            done = self._look_at(clustering)
            if done is not None:
                found.append(done)
        return found

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
            say(logger, logging.WARNING, "Cannot place rows in clusters", fields)
            return None
        finally:
            now = time.monotonic()
            self._due[clustering] = now + (now - began) / _MOST_TIME

    def _pass(self, clustering: Clustering) -> Assigned | None:
        fail_lost_runs(self._database.engine, clustering)
        with self._database.begin() as connection:
            run_id = self._take_current(connection, clustering)
            if run_id is None or run_id in self._refused:
                return None
            # Read before the pass: what is counted later was written later, or is looked at again.
            seen = (run_id, written(connection, clustering.rows))
            if seen[1] is not None and self._seen.get(clustering) == seen:
                return None
            try:
                done = assign(connection, clustering)
            except (ClusteringError, EncoderMismatchError):
                # Nothing changes that but another run.
                self._refused.add(run_id)
                raise
            reasons = drift(connection, clustering).reasons
        self._seen[clustering] = seen
        self.assigned += done.added + done.changed
        self._report(clustering, run_id, done, reasons)
        return done

    def _take_current(self, connection: sa.Connection, clustering: Clustering) -> int | None:
        """The current run, unless somebody else is assigning rows to it."""
        run = clustering.run_table
        found: int | None = connection.scalar(
            sa.select(run.c.id)
            .where(run.c.is_current, run.c.column_name == clustering.column.name)
            .with_for_update(skip_locked=True)
        )
        return found

    def _report(
        self, clustering: Clustering, run_id: int, done: Assigned, reasons: Sequence[str]
    ) -> None:
        fields: dict[str, Any] = {"column": str(clustering.column), "run": run_id}
        if done != Assigned(0, 0, 0):
            counts = {"added": done.added, "changed": done.changed, "removed": done.removed}
            say(logger, logging.INFO, "Placed rows in clusters", fields | counts)
        if reasons and run_id not in self._stale:
            self._stale.add(run_id)
            say(
                logger,
                logging.WARNING,
                "It is time to cluster again",
                fields | {"reasons": "; ".join(reasons)},
            )


def written(connection: sa.Connection, table: sa.Table) -> int | None:
    """Rows of a table, or of its partitions, that were ever written, as statistics have it.

    Statistics follow a commit within seconds, so a write is never missed, only seen late. ``None``
    where the server keeps none.
    """
    if connection.scalar(sa.select(sa.func.current_setting("track_counts"))) == "off":
        return None
    name = connection.dialect.identifier_preparer.format_table(table)
    relid = sa.column("relid", OID)
    tree = sa.func.pg_partition_tree(sa.func.to_regclass(name)).table_valued(relid)
    # Of a table that has nothing to do with partitions there is no tree.
    part = sa.union(
        sa.select(sa.cast(sa.func.to_regclass(name), OID).label("relid")),
        sa.select(sa.cast(tree.c.relid, OID)),
    ).subquery()
    counts = (
        sa.func.pg_stat_get_tuples_inserted,
        sa.func.pg_stat_get_tuples_updated,
        sa.func.pg_stat_get_tuples_deleted,
    )
    written = sum((sa.func.sum(count(part.c.relid)) for count in counts), sa.literal(0))
    return int(connection.scalar(sa.select(written)) or 0)


__all__ = ["INTERVAL", "ClusterKeeper", "written"]
