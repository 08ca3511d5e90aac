"""A worker inside another program: in a thread for small applications, once for cron."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from sbert_pg.catalog.tables import pending
from sbert_pg.worker.logs import LOGGER
from sbert_pg.worker.settings import WorkerSettings
from sbert_pg.worker.worker import Worker

if TYPE_CHECKING:
    from sbert_pg.clustering import Clustering

logger = logging.getLogger(LOGGER)


@contextmanager
def worker_thread(
    engine: sa.Engine,
    settings: WorkerSettings | None = None,
    *,
    clusterings: Sequence[Clustering] = (),
) -> Iterator[Worker]:
    """Keep columns fresh while the block runs, in threads of this process.

    For applications of one process; several processes that each do this share the work. On leaving,
    what is under way is finished.

    Args:
        engine: the application's engine, with the driver psycopg 3. Up to four of its pool's
            connections are used for moments at a time, and one outside it listens.
        settings: see ``WorkerSettings``.
        clusterings: clusterings in which new and changed rows are placed.

    Yields:
        The worker; ``worker.health()`` says how it is.
    """
    worker = Worker(engine, settings, clusterings)

    def run() -> None:
        try:
            worker.run()
        except Exception:
            logger.exception("The worker thread has ended")

    thread = threading.Thread(target=run, name="sbert-pg-worker", daemon=True)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join()


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What ``refresh`` did.

    Attributes:
        embedded: rows whose vector was written.
        errors: attempts that ended with an error.
        failed: rows that ended as failed.
        left: rows that are still pending: put off, or being worked on by somebody else.
        blocked: columns that cannot be served, with the reason.
        assigned: rows that were placed in clusters.
    """

    embedded: int
    errors: int
    failed: int
    left: int
    blocked: dict[str, str]
    assigned: int = 0


def refresh(
    engine: sa.Engine,
    settings: WorkerSettings | None = None,
    *,
    timeout: float | None = None,
    clusterings: Sequence[Clustering] = (),
) -> Refreshed:
    """Embed what is pending now, and return.

    Args:
        engine: an engine with the driver psycopg 3.
        settings: see ``WorkerSettings``.
        timeout: seconds after which no more rows are claimed.
        clusterings: clusterings in which new and changed rows are placed.

    Raises:
        NotBoundError: the settings name a column that is not bound.
        CatalogError: the catalog is missing or of another version.
    """
    worker = Worker(engine, settings, clusterings)
    tally = worker.run(until_empty=True, timeout=timeout)
    with engine.begin() as connection:
        left = connection.execute(
            sa.select(sa.func.count())
            .select_from(pending)
            .where(~pending.c.failed, pending.c.column_id.in_(worker.column_ids()))
        ).scalar_one()
    return Refreshed(
        tally.total("embedded"),
        tally.total("errors"),
        tally.total("failed"),
        left,
        worker.blocked(),
        worker.clusters.assigned,
    )


__all__ = ["Refreshed", "refresh", "worker_thread"]
