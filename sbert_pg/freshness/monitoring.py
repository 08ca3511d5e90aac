"""What a worker says of itself: its counts, and its log.

A log line is a sentence for people and fields for machines, one record a line. Names of columns,
keys and errors are data: what is not printable in them is written as an escape, so that no row can
end a line, begin another, or drive a terminal.
"""

from __future__ import annotations

import bisect
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from sbert_pg.freshness.queue import Counts

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


class Tally:
    """All counts of a worker; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._columns: dict[str, ColumnTally] = {}
        self._backlog: dict[str, Counts] = {}
        self.started = time.time()
        self.database_errors = 0
        self.listening = False

    @contextmanager
    def of(self, column: str) -> Iterator[ColumnTally]:
        """The counts of a column, to change them."""
        with self._lock:
            yield self._columns.setdefault(column, ColumnTally())

    def set_backlog(self, backlog: dict[str, Counts]) -> None:
        """Take note of what is pending, counted up to 100,000 a column."""
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

    def backlog(self) -> dict[str, Counts]:
        """What is pending by column, as last looked at."""
        with self._lock:
            return dict(self._backlog)

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
