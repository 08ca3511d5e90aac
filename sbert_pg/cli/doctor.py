"""``sbert-pg doctor``: what is wrong with a database, and what to do about each.

Nothing here owns a fact: each is asked of its owner (status, index reader, throttle,
catalog), and this module says which of them are faults, and the remedy.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
import typer

from sbert_pg import catalog, system
from sbert_pg.catalog import Binding, tables
from sbert_pg.catalog.rows import counted
from sbert_pg.cli import common
from sbert_pg.errors import SbertPgError
from sbert_pg.freshness.listening import seen_workers
from sbert_pg.freshness.settings import replica_lag
from sbert_pg.freshness.status import ColumnStatus, status
from sbert_pg.indexes.read import StoredIndex, vector_indexes
from sbert_pg.loading.aside import names_aside
from sbert_pg.progress import duration

#: Rows from which comparing all of them takes some 25 ms and more; below, an index gains little.
LARGE = 50_000
#: Rows that autovacuum gathers no statistics of, by PostgreSQL's default.
_UNGATHERED = 50
#: Seconds that pending rows may wait, and that a replica may be behind.
LATE = 3600.0
LAG = 30.0
#: Releases of pgvector, and what they mend, from its changelog.
_MENDED = (
    ((0, 8, 2), "a buffer overflow in parallel builds of HNSW indexes (CVE-2026-3172)", "hnsw"),
    ((0, 8, 3), "HNSW indexes that vacuum may corrupt", "hnsw"),
    ((0, 8, 4), "errors in vacuum of HNSW indexes and in inserts beside it", "hnsw"),
    ((0, 8, 7), "a buffer overflow in builds of IVFFlat indexes", "ivfflat"),
)
#: Functions that make a question in which every word has to be there.
_ALL_WORDS = re.compile(r"\b(?:plainto_tsquery|websearch_to_tsquery)\s*\(", re.IGNORECASE)


class Finding(NamedTuple):
    """What is wrong, and what to do.

    Attributes:
        level: ``"fault"``, which answers suffer from, or ``"advice"``.
        subject: a column, an index, the server.
        what: what is the case.
        remedy: what to do about it.
    """

    level: Literal["fault", "advice"]
    subject: str
    what: str
    remedy: str


def doctor(database: common.DatabaseOption = None, json: common.JsonOption = False) -> None:
    """Say what is wrong with a database, and what to do about it.

    Looks at pgvector's version, the catalog, each embedding column with its indexes and statistics,
    questions of full text that want every word, replicas and settings, and says which workers it
    sees. Changes nothing. Exits with 1 if there is a fault; advice alone exits with 0.

    [b]sbert-pg doctor -d postgresql://localhost/shop[/]
    [b]sbert-pg doctor --json | jq '.findings[].remedy'[/]
    """
    with common.database(database) as engine, engine.connect() as connection:
        findings = list(diagnose(connection))
        text, workers = _workers(connection)
    if json:
        common.print_json({"findings": [one._asdict() for one in findings], "workers": workers})
    else:
        for finding in findings:
            typer.echo(f"{finding.level}: {finding.subject}: {finding.what}.\n  {finding.remedy}")
        if not findings:
            common.note("Nothing was found.")
        if text:
            typer.echo(text, err=True)
    common.fail_if(any(finding.level == "fault" for finding in findings))


def _workers(connection: sa.Connection) -> tuple[str, dict[str, Any] | None]:
    """Who works on which column, as far as the database knows: as text, and as data."""
    try:
        catalog.require_current(connection)
        columns, workers = status(connection), seen_workers(connection)
    except SbertPgError:  # which is a finding
        return "", None
    lines = [f"Workers: {workers}.", *(f"  {c.column}: {workers.of(c)}." for c in columns)]
    ages = {column.column: column.age for column in columns}
    return "\n".join(lines), asdict(workers) | {"seconds_since_caught_up": ages}


def diagnose(connection: sa.Connection, *, large: int = LARGE) -> Iterator[Finding]:
    """What is wrong with a database, server first; ``large`` rows should have an index."""
    try:
        catalog.require_current(connection)
    except SbertPgError as error:
        yield Finding("fault", "schema sbert", str(error).rstrip("."), "Run 'sbert-pg migrate'.")
        return
    bindings = sorted(catalog.all_bindings(connection), key=str)
    indexes = {
        str(b): vector_indexes(connection, b.table, b.column, schema=b.schema) for b in bindings
    }
    every = [index for each in indexes.values() for index in each]
    yield from _of_pgvector(connection, every)
    try:
        columns = {column.column: column for column in status(connection)}
    except SbertPgError as error:
        columns = {}
        yield Finding("fault", "status", str(error).rstrip("."), "Look with the owner's role.")
    for binding in bindings:
        name = str(binding)
        yield from _of_indexes(binding, indexes[name])
        if name in columns:
            yield from _of_statistics(connection, binding, columns[name])
            aside = list(_of_aside(connection, binding, columns[name]))
            yield from aside
            yield from _of_column(columns[name], large, building=any((indexes[name], aside)))
        yield from _of_precision(connection, binding)
    yield from _of_questions(connection)
    yield from _of_replicas(connection)
    yield from _of_settings(connection, every)


def _of_pgvector(connection: sa.Connection, indexes: list[StoredIndex]) -> Iterator[Finding]:
    c = system.EXTENSION.c
    version = connection.scalar(sa.select(c.extversion).where(c.extname == "vector"))
    if version is None:
        yield Finding("fault", "pgvector", "is not installed", "CREATE EXTENSION vector;")
        return
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    for mended, what, method in _MENDED:
        # Faults of IVFFlat concern those who have such an index; HNSW is what is declared here.
        concerned = method == "hnsw" or any(index.method == method for index in indexes)
        if numbers < mended and concerned:
            yield Finding(
                "fault", f"pgvector {version}",
                f"{what}; mended in {'.'.join(map(str, mended))}",
                "Install the newer package on the server, then ALTER EXTENSION vector UPDATE; and "
                "REINDEX INDEX CONCURRENTLY what was built or vacuumed before.",
            )  # fmt: skip


def _of_indexes(binding: Binding, indexes: tuple[StoredIndex, ...]) -> Iterator[Finding]:
    for index in indexes:
        if not index.valid and not index.building:
            yield Finding(
                "fault", f"{binding}, index {index.name}",
                "invalid, as a failed build leaves it: it costs every write and serves nothing",
                f"REINDEX INDEX CONCURRENTLY {system.written_name(binding.schema, index.name)};",
            )  # fmt: skip


def _of_statistics(
    connection: sa.Connection, binding: Binding, column: ColumnStatus
) -> Iterator[Finding]:
    if column.rows is not None:
        return
    if counted(connection, binding.clause(), _UNGATHERED + 1) > _UNGATHERED:
        table = system.written_name(binding.schema, binding.table)
        yield Finding(
            "advice", table, "statistics were never gathered, so plans are guesses",
            f"ANALYZE {table}; and see that autovacuum is on.",
        )  # fmt: skip


def _of_aside(
    connection: sa.Connection, binding: Binding, column: ColumnStatus
) -> Iterator[Finding]:
    # Among the problems is a queue that is missing, on which it would stand.
    aside = () if column.problems else names_aside(connection, binding)
    if aside:
        yield Finding(
            "advice", column.column,
            f"{', '.join(aside)} set aside, so that searches compare all rows, by a backfill or a "
            "load that goes on or was killed",
            f"Where none goes on: sbert-pg backfill {shlex.quote(column.column)} builds them.",
        )  # fmt: skip


def _of_column(column: ColumnStatus, large: int, *, building: bool) -> Iterator[Finding]:
    name, target = column.column, shlex.quote(column.column)
    for problem in column.problems:
        yield Finding("fault", name, problem.rstrip("."), "docs/freshness.md says what each means.")
    if column.rows is not None and column.rows >= large and not building:
        yield Finding(
            "advice", name,
            f"some {column.rows:,} rows and no vector index: every search compares all of them",
            f"Declare hnsw_index(...) and migrate; sbert-pg index advise {target} says which.",
        )  # fmt: skip
    waiting = column.pending + column.backfill
    if waiting and (column.age is None or column.age > LATE):
        since = "ever caught up" if column.age is None else f"caught up for {duration(column.age)}"
        yield Finding(
            "fault", name, f"{waiting:,} rows wait for a vector, and no worker has {since}",
            "Run 'sbert-pg worker', or 'sbert-pg worker --once' from cron.",
        )  # fmt: skip
    if column.failed:
        yield Finding(
            "fault", name, f"{column.failed:,} rows could not be embedded",
            f"sbert-pg failed {target} says why, and tries them again.",
        )  # fmt: skip


def _of_precision(connection: sa.Connection, binding: Binding) -> Iterator[Finding]:
    c = tables.compatible_encoder.c
    further = connection.scalars(sa.select(c.spec).where(c.binding_id == binding.id)).all()
    own = binding.sealed.precision if binding.sealed is not None else None
    others = {str(spec.get("precision")) for spec in further} - {str(own)}
    if others:
        yield Finding(
            "advice", str(binding),
            f"vectors of {own} and of {', '.join(sorted(others))} stand in one column: of the same "
            "space, and as far apart as the coarser of them rounds",
            "Have every writer use one precision; 'sbert-pg reembed begin' makes the column one.",
        )  # fmt: skip


def _of_questions(connection: sa.Connection) -> Iterator[Finding]:
    """Views and functions, and what is running, that ask for every word of a question."""
    sources = sa.text(
        "SELECT format('view %I.%I', schemaname, viewname), definition FROM pg_views"
        " WHERE schemaname NOT IN ('pg_catalog', 'information_schema', 'sbert')"
        " UNION ALL SELECT format('function %I.%I', nspname, proname), prosrc"
        " FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace"
        " WHERE nspname NOT IN ('pg_catalog', 'information_schema', 'sbert')"
        " UNION ALL SELECT format('statement of %s', application_name), query"
        " FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
        " AND state = 'active'"
    )
    for name, source in connection.execute(sources):
        if source and _ALL_WORDS.search(source):
            yield Finding(
                "advice", name,
                "a question of full text here finds rows that have every one of its words, which "
                "for a sentence is often none",
                "matching(...), or sbert.bm25_v1 in SQL, finds rows with any of them, best first.",
            )  # fmt: skip


def _of_replicas(connection: sa.Connection) -> Iterator[Finding]:
    try:
        lag = replica_lag(connection)
    except SbertPgError as error:
        yield Finding("advice", "replicas", str(error).partition(".")[0], "GRANT pg_monitor.")
        return
    if lag > LAG:
        yield Finding(
            "fault", "replicas",
            f"the slowest is {duration(lag)} behind, and answers from then",
            "Backfill with '--set max_replica_lag=5', and look for long statements on the replica.",
        )  # fmt: skip


def _of_settings(connection: sa.Connection, indexes: list[StoredIndex]) -> Iterator[Finding]:
    for name in ("enable_indexscan", "enable_sort"):
        if _setting(connection, name) == "off":
            yield Finding(
                "fault", name, "is off, so no search uses a vector index",
                f"ALTER DATABASE ... RESET {name}; or find the role that sets it.",
            )  # fmt: skip
    if _setting(connection, "session_replication_role") != "origin":
        yield Finding(
            "fault", "session_replication_role",
            "triggers do not fire: workers are not woken, and foreign vectors are not refused",
            "ALTER DATABASE ... RESET session_replication_role;",
        )  # fmt: skip
    largest = max((index.bytes for index in indexes), default=0)
    if _compiles(connection, largest):
        yield Finding(
            "advice", "jit", "is on: searches of many rows are compiled again each time",
            "ALTER DATABASE ... SET jit = off; or ALTER ROLE ... for the role that searches.",
        )  # fmt: skip
    for name, why in (
        ("shared_buffers", "searches read it from disk"),
        ("maintenance_work_mem", "an HNSW build beyond that memory is many times slower"),
    ):
        size = sa.func.pg_size_bytes(sa.func.current_setting(name), type_=sa.BigInteger())
        if (held := connection.scalar(sa.select(size)) or 0) < largest:
            yield Finding(
                "advice", name,
                f"{held >> 20:,} MB, and the largest vector index has {largest >> 20:,} MB: {why}",
                f"Raise {name}, or store halfvec, or index a smaller form ('index advise').",
            )  # fmt: skip


def _compiles(connection: sa.Connection, largest: int) -> bool:
    """Whether searches of the largest index are compiled before they run.

    A statement is compiled by what the planner fears that it costs, which of a search is to compare
    all rows: up to three times what reading as many pages as the index has does.
    """
    if _setting(connection, "jit") != "on" or not connection.scalar(
        sa.select(sa.func.pg_jit_available())
    ):
        return False
    least = float(_setting(connection, "jit_above_cost") or -1)
    return 0 <= least < 3 * (largest >> 13)


def _setting(connection: sa.Connection, name: str) -> str | None:
    return connection.scalar(sa.select(sa.func.current_setting(name, type_=sa.Text())))
