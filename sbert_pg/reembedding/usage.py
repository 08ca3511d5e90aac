"""Who still reads or writes the old column: its index's scans, its writers, running statements.

Three sources, none of which costs a reader anything:

- the server counts index scans (``pg_stat_user_indexes``), and since PostgreSQL 16 says when the
  last one began;
- ``sbert.old_writer`` is kept by a trigger from *expand* on: it fires where text and old vector are
  written together, as the old version of the code does and workers do not;
- ``pg_stat_activity`` shows statements that order by a distance to the column, which also finds
  readers that use no index. It only shows other roles' statements to members of
  ``pg_read_all_stats``.
"""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from sbert_pg.catalog import system, tables
from sbert_pg.reembedding.pair import Pair
from sbert_pg.reembedding.vector_index import vector_indexes

#: How long nobody may have used the old column.
QUIET = dt.timedelta(minutes=5)
#: Seconds to watch where the server does not say when an index was last scanned.
WATCH = 10.0
_POLL = 0.2
#: Version whose statistics know the time of the last scan.
_KNOWS_LAST_SCAN = (16,)
_DISTANCES = ("<=>", "<->", "<#>", "<+>", "<~>", "<%>")


@dataclass(frozen=True, slots=True)
class Scans:
    """Scans of one index.

    Attributes:
        index: name of the index.
        during: scans while it was watched.
        seconds_ago: age of the last scan, ``None`` where unknown or never.
    """

    index: str
    during: int
    seconds_ago: float | None


@dataclass(frozen=True, slots=True)
class Writer:
    """A session that wrote the old column together with its text.

    Attributes:
        pid: its backend process.
        role: its role.
        application: its ``application_name``.
        seconds_ago: when it was last seen to; exact to ten seconds.
    """

    pid: int
    role: str
    application: str
    seconds_ago: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What was seen of the old column's use.

    Attributes:
        column: the old column.
        watched: seconds that it was watched.
        scans: of each of its indexes.
        writers: sessions that wrote it, the most recent first.
        statements: running statements that compare vectors with it.
        knows_last_scan: whether the server says when an index was last scanned.
    """

    column: str
    watched: float
    scans: tuple[Scans, ...]
    writers: tuple[Writer, ...]
    statements: tuple[str, ...]
    knows_last_scan: bool

    def reasons(self, quiet: dt.timedelta = QUIET) -> list[str]:
        """Why the column counts as in use, in words; empty where it does not."""
        limit, found = quiet.total_seconds(), []
        for scan in self.scans:
            if scan.during:
                found.append(
                    f"index {scan.index} was scanned {scan.during} times in {self.watched:.0f} s"
                )
            elif scan.seconds_ago is not None and scan.seconds_ago < limit:
                found.append(f"index {scan.index} was scanned {ago(scan.seconds_ago)}")
        found.extend(f"a running statement compares with it: {s}" for s in self.statements)
        recent = [writer for writer in self.writers if writer.seconds_ago < limit]
        if recent:
            last = recent[0]
            name = last.application or last.role
            found.append(
                f"{len(recent)} sessions of an older version wrote it, the last ({name}, process "
                f"{last.pid}) {ago(last.seconds_ago)}"
            )
        return found


def ago(seconds: float) -> str:
    """A length of time in the past, in words."""
    if seconds < 90:
        return f"{seconds:.0f} s ago"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min ago"
    return f"{seconds / 3600:.0f} h ago"


def observe(connection: sa.Connection, pair: Pair, watch: float = 0.0) -> Usage:
    """Look at the use of a change's old column.

    Args:
        connection: where. Inside a transaction too, statistics are read anew.
        pair: the change; its old column has to be there.
        watch: seconds to watch; at least ``WATCH`` before PostgreSQL 16, which does not say when
            an index was last scanned.
    """
    assert pair.old is not None
    column = pair.old.binding.column
    knows = (connection.dialect.server_version_info or (0,)) >= _KNOWS_LAST_SCAN
    if not knows:
        watch = max(watch, WATCH)
    before = {index.name: index.scans for index in _indexes(connection, pair)}
    statements: dict[int, str] = {}
    ends = time.monotonic() + watch
    while True:
        statements.update(_statements(connection, pair.new.binding.table, column))
        if time.monotonic() >= ends:
            break
        time.sleep(min(_POLL, max(0.0, ends - time.monotonic())))
    now = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    scans = tuple(
        Scans(
            index.name,
            max(0, index.scans - before.get(index.name, index.scans)),
            None if index.last_scan is None else (now - index.last_scan).total_seconds(),
        )
        for index in _indexes(connection, pair)
    )
    return Usage(
        column=column,
        watched=watch,
        scans=scans,
        writers=tuple(_writers(connection, pair.new.binding.id)),
        statements=tuple(statements.values()),
        knows_last_scan=knows,
    )


def _indexes(connection: sa.Connection, pair: Pair) -> Any:
    assert pair.old is not None
    connection.execute(sa.select(sa.func.pg_stat_clear_snapshot()))
    return vector_indexes(connection, pair.relation, pair.old.binding.column)


def _writers(connection: sa.Connection, column_id: int) -> Iterable[Writer]:
    seen = tables.old_writer.c
    age = sa.extract("epoch", sa.func.clock_timestamp() - seen.seen_at)
    statement = (
        sa.select(seen.pid, seen.role, seen.application, age)
        .where(seen.column_id == column_id)
        .order_by(seen.seen_at.desc())
    )
    for pid, role, application, seconds in connection.execute(statement):
        yield Writer(pid, role, application, float(seconds))


def _statements(connection: sa.Connection, table: str, column: str) -> dict[int, str]:
    """Running statements of others that compare vectors with the column, by process."""
    activity = system.ACTIVITY
    statement = sa.select(activity.c.pid, activity.c.query).where(
        activity.c.datname == sa.func.current_database(),
        activity.c.state == "active",
        activity.c.pid != sa.func.pg_backend_pid(),
    )
    return {
        pid: " ".join(query.split())[:120]
        for pid, query in connection.execute(statement)
        if query and compares(query, table, column)
    }


def compares(query: str, table: str, column: str) -> bool:
    """Whether a statement names the table and the column, and uses a distance operator."""
    return (
        any(operator in query for operator in _DISTANCES)
        and _names(query, column)
        and _names(query, table)
    )


def _names(query: str, name: str) -> bool:
    return re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", query) is not None
