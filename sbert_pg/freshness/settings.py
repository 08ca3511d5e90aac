"""What a worker is given and what it says: settings, a database, its counts and its log.

A backfill is held back by a rate, and while replicas fall behind. A log line is a sentence for
people and fields for machines, one record a line. Names of columns, keys and errors are data: what
is not printable in them is written as an escape, so that no row can end a line, begin another, or
drive a terminal.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, ClassVar, Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg import system
from sbert_pg.errors import CatalogError, DeclarationError
from sbert_pg.freshness.queue import Counts


def worker_name() -> str:
    """A name that no other worker has: host, process, and a few random digits."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Settings of a worker or a backfill; the defaults suit a machine of two to eight cores.

    Attributes:
        columns: columns to keep fresh, as ``table``, ``table.column`` or ``schema.table.column``;
            all that are bound where it is empty.
        batch_size: rows claimed at a time.
        encoders: threads that call the encoder; with two, one batch is tokenised while the other is
            computed.
        lease: how long other workers leave claimed rows alone. It is renewed while they are worked
            on, so it only has to be longer than a pause of the process.
        poll_interval: seconds between looks for new and changed rows when nothing is heard of any.
            Where LISTEN does not work it is at most one second.
        rescan_interval: seconds between looks at the catalog for new columns, and at the backfill
            of columns where it was empty.
        max_attempts: attempts after which a row counts as failed, until its text changes.
        backoff: time before the second attempt; it doubles with each further one, up to an hour.
        busy_wait: how long to leave alone a row that another transaction holds locked.
        rows_per_second: most rows of the backfill a second and process; no limit by default. New
            and changed rows are never held back.
        max_replica_lag: seconds that the slowest replica may be behind in replaying before the
            backfill pauses; no limit by default.
        shutdown_timeout: seconds that a stopping worker waits for a database that is away.
        listen: whether to LISTEN at all.
        cache_rows: vectors kept in ``sbert.vector_cache``; none where it is 0.
        name: name of the worker, in leases and logs.
    """

    columns: tuple[str, ...] = ()
    batch_size: int = 256
    encoders: int = 2
    lease: timedelta = timedelta(seconds=60)
    poll_interval: float = 5.0
    rescan_interval: float = 30.0
    max_attempts: int = 5
    backoff: timedelta = timedelta(seconds=10)
    busy_wait: timedelta = timedelta(seconds=1)
    rows_per_second: float | None = None
    max_replica_lag: float | None = None
    shutdown_timeout: float = 30.0
    listen: bool = True
    cache_rows: int = 0
    name: str = field(default_factory=worker_name)

    def __post_init__(self) -> None:
        for words, fits, names in _RULES:
            for name in names:
                if not fits(getattr(self, name)):
                    raise DeclarationError(f"{name} of a worker is {words}.")
        if self.lease < timedelta(seconds=1):
            raise DeclarationError("The lease of a worker is at least one second.")


#: What settings are, whether a value is that, and which settings.
_RULES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "a whole number from 1 on",
        lambda value: isinstance(value, int) and value >= 1,
        ("batch_size", "encoders", "max_attempts"),
    ),
    (
        "a number above 0",
        lambda value: value is None or (isinstance(value, (int, float)) and value > 0),
        ("poll_interval", "rescan_interval", "rows_per_second"),
    ),
    (
        "a timedelta(seconds=...)",
        lambda value: isinstance(value, timedelta),
        ("lease", "backoff", "busy_wait"),
    ),
)


class Companion(Protocol):
    """Something that keeps up with the columns beside a worker, such as assignments to clusters."""

    def start(self) -> None:
        """Begin, in its own thread."""

    def stop(self) -> None:
        """End, and wait for it."""

    def look(self) -> object:
        """Do once what is to be done now."""


class Background:
    """Work in a thread of its own, from ``start`` to ``stop``, which waits for it.

    A subclass does it in ``_run``, and returns from that soon after ``_stop`` is set.
    """

    #: Name of the thread, and seconds for which its end is waited for.
    thread_name: ClassVar[str]
    patience: ClassVar[float] = 10.0

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name=self.thread_name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self.patience)

    def _run(self) -> None:
        raise NotImplementedError


class Database:
    """An engine used at READ COMMITTED, whatever its own isolation level is.

    Each statement has to see what was committed before it: the check that a text is unchanged comes
    after the row is locked. The isolation level goes back with the connection to the pool.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """A connection, for several transactions one after the other."""
        with self.engine.connect() as connection:
            yield connection.execution_options(isolation_level="READ COMMITTED")

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A connection in a transaction that is committed at the end."""
        with self.connect() as connection, connection.begin():
            yield connection


#: Seconds between looks at the replicas.
_INTERVAL = 1.0


class Throttle:
    """Asked by the thread that claims, before it claims rows of a backfill.

    Bursts are of at most one second's worth. ``reason`` is why the backfill is paused, while it is.
    """

    def __init__(
        self, database: Database, rows_per_second: float | None, max_replica_lag: float | None
    ) -> None:
        self._database = database
        self._rate = rows_per_second
        self._lag = max_replica_lag
        self._next = self._look_at = time.monotonic()
        self.reason: str | None = None

    def wait(self) -> float:
        """Seconds until rows may be claimed; 0 where they may be now."""
        now = time.monotonic()
        if self._lag is not None and now >= self._look_at:
            with self._database.begin() as connection:
                lag = replica_lag(connection)
            behind = lag > self._lag
            self.reason = f"a replica is {lag:.1f} s behind" if behind else None
            self._look_at = time.monotonic() + _INTERVAL
        if self.reason is not None:
            return max(self._look_at - now, 0.01)
        return max(self._next - now, 0.0) if self._rate is not None else 0.0

    def spend(self, rows: int) -> None:
        """Take rows that were claimed into account."""
        if self._rate is not None:
            self._next = max(self._next, time.monotonic() - 1.0) + rows / self._rate


def replica_lag(connection: Connection) -> float:
    """Seconds that the slowest replica is behind in replaying; 0 where there is none."""
    c = system.REPLICATION.c
    total, visible, lag = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.count(c.state),
            sa.func.coalesce(sa.func.max(sa.extract("epoch", c.replay_lag)), 0),
        )
    ).one()
    if total and not visible:
        raise CatalogError(
            "This role cannot see how far the replicas are behind. Grant it pg_monitor (or "
            "pg_read_all_stats), or run without a limit on the lag."
        )
    return float(lag)


#: Upper bounds of the buckets of all durations, in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(slots=True)
class Durations:
    """A histogram of durations, in seconds: a count for each of ``BUCKETS``, one for what is
    longer.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


@dataclass(slots=True)
class ColumnTally:
    """Counts of one column. Rows of one text count once a batch in ``texts``; ``errors`` are
    attempts; the text of ``changed`` ones changed meanwhile; ``busy`` ones someone else held
    locked.
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


class Tally:
    """All counts of a worker; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._columns: dict[str, ColumnTally] = {}
        #: What is pending by column, counted up to 100,000, as last looked at.
        self.backlog: dict[str, Counts] = {}
        self.database_errors = 0
        self.listening = False

    @contextmanager
    def of(self, column: str) -> Iterator[ColumnTally]:
        """The counts of a column, to change them."""
        with self._lock:
            yield self._columns.setdefault(column, ColumnTally())

    def count_database_error(self) -> None:
        """Count one loss of the database."""
        with self._lock:
            self.database_errors += 1

    def columns(self) -> dict[str, ColumnTally]:
        """The counts by column."""
        with self._lock:
            return dict(self._columns)

    def total(self, name: str) -> int:
        """One count, summed over the columns."""
        return sum(int(getattr(column, name)) for column in self.columns().values())


#: Logger of everything a worker says.
LOGGER = "sbert_pg.worker"


def say(
    logger: logging.Logger, level: int, message: str, fields: Mapping[str, Any] | None = None
) -> None:
    """Log a sentence with fields; they are ``record.fields`` for handlers of the application's."""
    # The sentence may hold a per cent sign, and is not a format.
    logger.log(level, "%s", message, extra={"fields": dict(fields or {})})


def printable(text: str) -> str:
    r"""The text with everything that is not printable as ``\x1b``, ``\u2028`` and so on."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.000Z INFO message (name=value ...)``.

    A value with a blank, a quote or an equals sign in it is quoted as in JSON.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, and further ones for a traceback only."""
        fields = getattr(record, "fields", {})
        shown = " ".join(f"{printable(str(name))}={_value(v)}" for name, v in fields.items())
        line = f"{_time(record)} {record.levelname} {printable(record.getMessage())}"
        line += f" ({shown})" if shown else ""
        if record.exc_info is None:
            return line
        trace = [f"  {printable(one)}" for one in _traceback(self, record)]
        return "\n".join([line, *trace])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        data: dict[str, Any] = {
            **getattr(record, "fields", {}),
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info is not None:
            data["traceback"] = "\n".join(_traceback(self, record))
        line = json.dumps(data, ensure_ascii=False, default=str)
        # JSON leaves line separators and characters of control beyond ASCII as they are.
        return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def configure_logs(*, as_json: bool = False, level: int = logging.INFO) -> None:
    """Send what workers say to standard error; for processes that are workers and nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logger = logging.getLogger("sbert_pg")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def _value(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and not any(c in ' "=\\' for c in text) and text != ""
    return text if plain else printable(json.dumps(text, ensure_ascii=False))


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    # Not splitlines(), which also ends lines at characters that data may hold.
    return [] if record.exc_info is None else formatter.formatException(record.exc_info).split("\n")


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, timezone.utc)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
