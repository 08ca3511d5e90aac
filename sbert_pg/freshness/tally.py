"""What a worker has done, counted: for logs, health, reports and metrics."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

#: Upper bounds of the buckets of all durations, in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(slots=True)
class Durations:
    """A histogram of durations, in seconds.

    Attributes:
        counts: one count for each of ``BUCKETS``, and one for what is longer.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    @property
    def count(self) -> int:
        """Number of durations."""
        return sum(self.counts)


@dataclass(slots=True)
class ColumnTally:
    """Counts of one column.

    Attributes:
        texts: texts that were encoded; rows that share a text count once per batch.
        errors: attempts that ended with an error.
        changed: rows whose text changed while it was being encoded.
        busy: rows that someone else held locked.
    """

    embedded: int = 0
    texts: int = 0
    errors: int = 0
    failed: int = 0
    changed: int = 0
    busy: int = 0
    batches: int = 0
    claim: Durations = field(default_factory=Durations)
    encode: Durations = field(default_factory=Durations)
    write: Durations = field(default_factory=Durations)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is pending of one column, as last looked at.

    Attributes:
        pending: new and changed rows that are pending; counted up to 100,000.
        backfill: rows of the backfill; counted as far.
        age: seconds since a round that left nothing new pending; ``None`` before the first.
    """

    pending: int
    backfill: int
    failed: int
    age: float | None


class Tally:
    """All counts of a worker; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._columns: dict[str, ColumnTally] = {}
        self._backlog: dict[str, Backlog] = {}
        self.started = time.time()
        self.database_errors = 0
        self.listening = False

    @contextmanager
    def of(self, column: str) -> Iterator[ColumnTally]:
        """The counts of a column, to change them."""
        with self._lock:
            yield self._columns.setdefault(column, ColumnTally())

    def set_backlog(self, backlog: dict[str, Backlog]) -> None:
        """Take note of what is pending."""
        with self._lock:
            self._backlog = backlog

    def count_database_error(self) -> None:
        """Count one loss of the database."""
        with self._lock:
            self.database_errors += 1

    def columns(self) -> dict[str, ColumnTally]:
        """The counts by column."""
        with self._lock:
            return dict(self._columns)

    def backlog(self) -> dict[str, Backlog]:
        """What is pending by column, as last looked at."""
        with self._lock:
            return dict(self._backlog)

    def total(self, name: str) -> int:
        """One count, summed over the columns."""
        return sum(int(getattr(column, name)) for column in self.columns().values())
