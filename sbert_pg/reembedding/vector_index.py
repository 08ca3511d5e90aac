"""Vector indexes: as the database has them, as SQLAlchemy objects, and built in live traffic."""

from __future__ import annotations

import datetime as dt
import re
import threading
from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy.dialects.postgresql import OID
from sqlalchemy.ext.compiler import compiles

from sbert_pg.catalog import system
from sbert_pg.distance import INDEX_METHODS, METRICS, IndexMethod, Similarity
from sbert_pg.errors import DeclarationError, StepStoppedError, TableBusyError
from sbert_pg.indexes import hnsw_index, ivfflat_index
from sbert_pg.reembedding.building import BuildProgress, wait_for_other, watched
from sbert_pg.reembedding.locks import (
    ATTEMPTS,
    LOCK_TIMEOUT,
    LockTable,
    in_short_transactions,
    operations_on,
    pause,
    set_lock_timeout,
    sqlstate,
)
from sbert_pg.types.indexed import Form

#: Index options that SQLAlchemy and pgvector share.
_M, _EF, _LISTS = "m", "ef_construction", "lists"
#: pgvector's defaults, which an index without options has.
_DEFAULTS = {_M: 16, _EF: 64, _LISTS: 100}


@dataclass(frozen=True, slots=True)
class VectorIndex:
    """An index on a vector column, read off the server's catalogs.

    Attributes:
        name: its name.
        schema: its schema.
        valid: whether queries may use it; ``False`` after a concurrent build that failed.
        building: whether some session is building it now.
        method: ``"hnsw"`` or ``"ivfflat"``.
        form: what is indexed: the column, its cast to ``halfvec``, or its signs.
        opclass: operator class.
        options: storage parameters, as text.
        predicate: predicate of a partial index, as SQL.
        definition: the statement that makes it.
        bytes: its size.
        scans: scans since the statistics were reset.
        last_scan: time of the last one; ``None`` where unknown (before PostgreSQL 16) or never.
    """

    name: str
    schema: str
    valid: bool
    building: bool
    method: IndexMethod
    form: Form
    opclass: str
    options: dict[str, int]
    predicate: str | None
    definition: str
    bytes: int
    scans: int
    last_scan: dt.datetime | None

    @property
    def similarity(self) -> Similarity | None:
        """Similarity function that it orders by, ``None`` for an index over bits."""
        for name, metric in METRICS.items():
            if self.opclass.endswith(metric.opclass_suffix):
                return name
        return None

    def on(self, column: sa.Column[Any], name: str) -> sa.Index:
        """An index of the same kind on another column, with the metric of that column's encoder."""
        where = None if self.predicate is None else sa.literal_column(self.predicate, sa.Boolean())
        option = {**_DEFAULTS, **self.options}
        if self.method == "hnsw":
            return hnsw_index(
                name,
                column,
                form=self.form,
                m=option[_M],
                ef_construction=max(option[_EF], 2 * option[_M]),
                where=where,
            )
        return ivfflat_index(name, column, lists=option[_LISTS], form=self.form, where=where)


def vector_indexes(
    connection: sa.Connection, relation: str, column: str
) -> tuple[VectorIndex, ...]:
    """The HNSW and IVFFlat indexes that involve a column, by name.

    Args:
        connection: where.
        relation: the table, as text for ``to_regclass``.
        column: the column's name.
    """
    rows = connection.execute(_indexes(connection, relation, column))
    return tuple(_read(row) for row in rows)


def _indexes(connection: sa.Connection, relation: str, column: str) -> sa.Select[Any]:
    index, klass, statistics = system.INDEX, system.CLASS, system.INDEX_STATISTICS
    knows_last = (connection.dialect.server_version_info or (0,)) >= (16,)
    last: sa.ColumnElement[Any] = (
        statistics.c.last_idx_scan if knows_last else sa.null().cast(sa.DateTime(timezone=True))
    )
    depends = (
        sa.select(sa.literal(1))
        .join_from(
            system.DEPEND,
            system.ATTRIBUTE,
            system.ATTRIBUTE.c.attnum == system.DEPEND.c.refobjsubid,
        )
        .where(
            system.DEPEND.c.classid == system.oid_of("pg_catalog.pg_class"),
            system.DEPEND.c.objid == index.c.indexrelid,
            system.DEPEND.c.refobjid == index.c.indrelid,
            system.ATTRIBUTE.c.attrelid == index.c.indrelid,
            system.ATTRIBUTE.c.attname == column,
        )
        .exists()
    )
    progress = system.INDEX_PROGRESS
    building = sa.select(sa.literal(1)).where(progress.c.index_relid == index.c.indexrelid).exists()
    opclass = (
        sa.select(system.OPCLASS.c.opcname)
        .where(system.OPCLASS.c.oid == sa.literal_column("indclass[0]", OID))
        .scalar_subquery()
    )
    return (
        sa.select(
            klass.c.relname,
            system.NAMESPACE.c.nspname,
            index.c.indisvalid,
            building.label("building"),
            system.AM.c.amname,
            opclass.label("opclass"),
            klass.c.reloptions,
            sa.func.pg_get_expr(
                sa.literal_column("indpred"), index.c.indrelid, type_=sa.Text()
            ).label("predicate"),
            sa.func.pg_get_indexdef(index.c.indexrelid, 1, True, type_=sa.Text()).label(
                "expression"
            ),
            sa.func.pg_get_indexdef(index.c.indexrelid, type_=sa.Text()).label("definition"),
            sa.func.pg_relation_size(index.c.indexrelid, type_=sa.BigInteger()).label("bytes"),
            sa.func.coalesce(statistics.c.idx_scan, 0).label("scans"),
            last.label("last_scan"),
        )
        .select_from(index)
        .join(klass, klass.c.oid == index.c.indexrelid)
        .join(system.NAMESPACE, system.NAMESPACE.c.oid == klass.c.relnamespace)
        .join(system.AM, system.AM.c.oid == klass.c.relam)
        .outerjoin(statistics, statistics.c.indexrelid == index.c.indexrelid)
        .where(
            index.c.indrelid == system.oid_of(relation),
            system.AM.c.amname.in_(INDEX_METHODS),
            depends,
        )
        .order_by(klass.c.relname)
    )


def _read(row: Any) -> VectorIndex:
    options = dict(option.split("=", 1) for option in row.reloptions or ())
    expression = row.expression or ""
    form: Form = "column"
    if "binary_quantize" in expression:
        form = "binary"
    elif "::halfvec" in expression:
        form = "halfvec"
    return VectorIndex(
        name=row.relname,
        schema=row.nspname,
        valid=row.indisvalid,
        building=row.building,
        method=cast("IndexMethod", row.amname),
        form=form,
        opclass=row.opclass,
        options={key: int(value) for key, value in options.items() if value.isdigit()},
        predicate=row.predicate,
        definition=row.definition,
        bytes=row.bytes,
        scans=row.scans,
        last_scan=row.last_scan,
    )


def build_index(
    engine: sa.Engine,
    index: sa.Index,
    *,
    maintenance_work_mem: str | None = None,
    parallel_workers: int | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
    wait: float = 0.0,
    on_progress: BuildProgress | None = None,
    stop: threading.Event | None = None,
) -> bool:
    """Build an index with ``CREATE INDEX CONCURRENTLY``, unless a valid one of this name is there.

    Readers and writers go on throughout (``SHARE UPDATE EXCLUSIVE``); the server waits for older
    transactions, however long they take. An invalid index of this name, as a killed build leaves
    behind, is dropped and built anew.

    Args:
        engine: where.
        index: the index, with its table.
        maintenance_work_mem: memory for the build, as in ``"2GB"``; an HNSW graph that fits builds
            several times faster. The server's own setting by default.
        parallel_workers: ``max_parallel_maintenance_workers`` for the build.
        lock_timeout: seconds to wait for the table's lock at an attempt, before the build.
        attempts: how often to try.
        wait: seconds to wait for another session that is building this index, such as one whose
            client was killed.
        on_progress: told the phase, and blocks or tuples done and in all, in a thread.
        stop: once it is set the build is cancelled, and its invalid index dropped.

    Returns:
        Whether it was built now; ``False`` where a valid index of this name was there.

    Raises:
        TableBusyError: the lock was not to be had, or another session is building this index.
        StepStoppedError: ``stop`` was set.
        DeclarationError: the index has no name or no table.
    """
    if index.table is None or index.name is None:
        raise DeclarationError("build_index needs an index with a name, attached to its table.")
    table = index.table
    workers = None if parallel_workers is None else str(parallel_workers)
    settings = {
        # Both would end a build that merely waits for older transactions, after the work is done.
        # While it waits it holds up nobody but other DDL and vacuum.
        "lock_timeout": "0",
        "statement_timeout": "0",
        "maintenance_work_mem": maintenance_work_mem,
        "max_parallel_maintenance_workers": workers,
    }
    # A connection of its own: settings of the session go with it.
    with engine.connect() as plain:
        connection = plain.execution_options(isolation_level="AUTOCOMMIT")
        try:
            for name, value in settings.items():
                if value is not None:
                    connection.execute(sa.select(sa.func.set_config(name, value, False)))
            relation = system.relation_name(table, connection)
            if not wait_for_other(
                connection,
                lambda: index_state(connection, index) == "building",
                relation,
                wait,
                on_progress,
                stop,
            ):
                raise TableBusyError(_others(index))
            if index_state(connection, index) == "valid":
                return False
            in_short_transactions(
                engine,
                lambda held: held.execute(LockTable(table, "SHARE UPDATE EXCLUSIVE")),
                relation=relation,
                lock_timeout=lock_timeout,
                attempts=attempts,
            )
            pid = connection.execute(sa.select(sa.func.pg_backend_pid())).scalar_one()
            with watched(engine, pid, relation, on_progress, stop):
                return _build(connection, index, attempts, stop)
        finally:
            plain.invalidate()


def _others(index: sa.Index) -> str:
    return (
        f"Another session is building index {index.name!r} now; wait for it, or end it with "
        "pg_terminate_backend and run the same command again."
    )


def _build(
    connection: sa.Connection, index: sa.Index, attempts: int, stop: threading.Event | None
) -> bool:
    assert index.table is not None
    operations = operations_on(connection)
    for attempt in range(1, attempts + 1):
        state = index_state(connection, index)
        if state == "valid":
            return attempt > 1
        if state == "building":
            raise TableBusyError(_others(index))
        try:
            if state == "invalid":
                operations.drop_index(
                    str(index.name),
                    table_name=index.table.name,
                    schema=index.table.schema,
                    postgresql_concurrently=True,
                    if_exists=True,
                )
            connection.execute(CreateIndexConcurrently(index))
            return True
        except sa.exc.DBAPIError as error:
            stopped = stop is not None and stop.is_set()
            if stopped or sqlstate(error) != "40P01" or attempt == attempts:
                _drop_leftover(operations, connection, index)
                if stopped:
                    raise StepStoppedError(
                        f"The build of index {index.name!r} was called off. Run the same command "
                        "again to build it."
                    ) from error
                raise
        pause(attempt)
    raise AssertionError("unreachable")


def _drop_leftover(operations: Operations, connection: sa.Connection, index: sa.Index) -> None:
    """Leave no invalid index behind, where the connection still lives and the lock can be had."""
    assert index.table is not None
    if connection.invalidated:
        return
    try:
        set_lock_timeout(connection, LOCK_TIMEOUT, local=False)
        if index_state(connection, index) == "invalid":
            operations.drop_index(
                str(index.name),
                table_name=index.table.name,
                schema=index.table.schema,
                postgresql_concurrently=True,
                if_exists=True,
            )
    except sa.exc.DBAPIError:
        # The next run meets the invalid index and drops it.
        return


def index_state(connection: sa.Connection, index: sa.Index) -> str:
    """``"absent"``, ``"valid"``, ``"invalid"`` or ``"building"``, by the index's name and table."""
    assert index.table is not None
    relation = system.relation_name(index.table, connection)
    progress = system.INDEX_PROGRESS
    building = (
        sa.select(sa.literal(1)).where(progress.c.index_relid == system.INDEX.c.indexrelid).exists()
    )
    row = connection.execute(
        sa.select(system.INDEX.c.indisvalid, building)
        .join(system.CLASS, system.CLASS.c.oid == system.INDEX.c.indexrelid)
        .where(
            system.INDEX.c.indrelid == system.oid_of(relation),
            system.CLASS.c.relname == str(index.name),
        )
    ).one_or_none()
    if row is None:
        return "absent"
    if row[0]:
        return "valid"
    return "building" if row[1] else "invalid"


class CreateIndexConcurrently(sa.schema.CreateIndex):
    """``CREATE INDEX CONCURRENTLY``, whatever the index's own options say."""


@compiles(CreateIndexConcurrently, "postgresql")
def _create_index_concurrently(element: Any, compiler: Any, **kw: Any) -> str:
    text: str = compiler.visit_create_index(element, **kw)
    already = " INDEX CONCURRENTLY " in text
    return text if already else text.replace(" INDEX ", " INDEX CONCURRENTLY ", 1)


def index_name(existing: str, old: str, new: str, table: str) -> str:
    """A name for the new column's index: the old one's with the column's name put in place.

    Cut to PostgreSQL's 63 bytes with the column's end kept, since that is what differs.
    """
    if re.search(rf"(?<![a-z0-9]){re.escape(old)}(?![a-z0-9])", existing):
        name = re.sub(rf"(?<![a-z0-9]){re.escape(old)}(?![a-z0-9])", new, existing)
    else:
        name = f"ix_{table}_{new}"
    if name == existing or len(name.encode()) > 63:
        name = f"ix_{table}"[: 62 - len(new)] + f"_{new}"
    return name[-63:]
