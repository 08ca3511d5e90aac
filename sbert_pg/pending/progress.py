"""How far a backfill has come, how fast, and how long it will take; over all processes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg.catalog.tables import status
from sbert_pg.pending import ranges
from sbert_pg.pending.database import Database
from sbert_pg.pending.faults import words_of
from sbert_pg.pending.rows import Rows
from sbert_pg.pending.throttle import Gate

logger = logging.getLogger("sbert_pg.backfill")

#: Seconds between looks.
INTERVAL = 1.0
#: Seconds over which the rate is taken.
_WINDOW = 60.0
#: Up to so many rows, by the planner's estimate, what is to be done is counted and not estimated.
_COUNTED = 1_000_000


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a backfill has come.

    Attributes:
        rows: rows written, by all processes, since the backfill was begun.
        total: rows that were to be written, counted or estimated; ``None`` where unknown.
        rows_per_second: rate of all processes over the last minute.
        seconds_left: at that rate; ``None`` where unknown.
        ranges: ranges so far.
        ranges_done: how many of them are done.
        paused: why this process is paused, or ``None``.
        complete: whether nothing is left.
    """

    rows: int
    total: int | None
    rows_per_second: float
    seconds_left: float | None
    ranges: int
    ranges_done: int
    paused: str | None
    complete: bool


class Watch:
    """A thread that looks at the progress.

    Args:
        database: the database.
        rows: the rows of the column.
        gate: says whether this process is paused.
        on_progress: called with every look.
    """

    def __init__(
        self,
        database: Database,
        rows: Rows,
        gate: Gate,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._database = database
        self._rows = rows
        self._gate = gate
        self._on_progress = on_progress
        self._total: int | None = None
        self._seen: deque[tuple[float, int]] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sbert-pg-progress", daemon=True)
        self.last = Progress(0, None, 0.0, None, 0, 0, None, False)

    def start(self) -> None:
        """Begin."""
        try:
            with self._database.begin() as connection:
                warn_of_index(connection, self._rows)
                done = ranges.extent(connection, self._rows.binding.id).rows
                left = rows_left(connection, self._rows)
            self._total = None if left is None else done + left
        except sa.exc.SQLAlchemyError as error:
            # The total is for people; the reader and the writer wait for a database that is away.
            logger.debug("Cannot count what is to be done: %s", words_of(error))
        self._look()
        self._thread.start()

    def stop(self) -> None:
        """Look a last time, and end."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        # A connection that was dropped while it lay in the pool is noticed by the first use.
        if not self._look():
            self._look()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> bool:
        """Whether the database answered."""
        try:
            with self._database.begin() as connection:
                extent = ranges.extent(connection, self._rows.binding.id)
        except sa.exc.SQLAlchemyError as error:
            logger.debug("Cannot look at the progress: %s", words_of(error))
            return False
        self.last = self._progress(extent, time.monotonic())
        if self._on_progress is not None:
            self._on_progress(self.last)
        return True

    def _progress(self, extent: ranges.Extent, now: float) -> Progress:
        self._seen.append((now, extent.rows))
        while now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        seconds = now - self._seen[0][0]
        rate = (extent.rows - self._seen[0][1]) / seconds if seconds > 0 else 0.0
        left = None
        if self._total is not None and rate > 0:
            left = max(self._total - extent.rows, 0) / rate
        return Progress(
            extent.rows,
            extent.rows if extent.complete else self._total,
            max(rate, 0.0),
            0.0 if extent.complete else left,
            extent.planned,
            extent.done,
            self._gate.reason,
            extent.complete,
        )


def rows_left(connection: Connection, rows: Rows) -> int | None:
    """Rows without a vector: counted on small tables, else estimated from statistics."""
    c = status.c
    estimated = connection.execute(
        sa.select(c.estimated_rows, c.estimated_embedded).where(c.id == rows.binding.id)
    ).first()
    total = None if estimated is None else estimated.estimated_rows
    if total is not None and total > _COUNTED:
        return int(total - (estimated.estimated_embedded or 0)) if estimated is not None else None
    missing = rows.table.c[rows.binding.column].is_(None)
    limited = sa.select(sa.literal(1)).select_from(rows.table).where(missing).limit(_COUNTED)
    count: int = connection.execute(
        sa.select(sa.func.count()).select_from(limited.subquery())
    ).scalar_one()
    return count if count < _COUNTED else None


def warn_of_index(connection: Connection, rows: Rows) -> None:
    """Say so where a vector index makes every row some seventy times as dear to write."""
    c = status.c
    names = connection.execute(sa.select(c.index_names).where(c.id == rows.binding.id)).scalar()
    if names:
        logger.warning(
            "Column %s has the vector index %s, which every row has to be put into while it is "
            "filled. Filling first and building the index after is many times faster",
            rows.binding,
            ", ".join(names),
        )


__all__ = ["Progress", "Watch", "rows_left", "warn_of_index"]
