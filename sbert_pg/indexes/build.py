"""The one way to build an index beside live traffic, with all precautions.

``CREATE INDEX CONCURRENTLY`` stops neither readers nor writers, but it waits for every older
transaction, however long that takes; a time-out of the session would end it, after the work is
done. A build that was ended leaves an invalid index behind, which is dropped by the next. It serves
vector indexes and any other kind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles

from sbert_pg import system
from sbert_pg.errors import DeclarationError, StepStoppedError, TableBusyError
from sbert_pg.indexes.partitioned import build_on_partitions, create_as, create_only, is_partitioned
from sbert_pg.indexes.read import StoredIndex, index_state, same_index, vector_indexes
from sbert_pg.progress import Advance
from sbert_pg.system import ATTEMPTS, LOCK_TIMEOUT, milliseconds, settings
from sbert_pg.types.indexed import VectorIndex

T = TypeVar("T")

log = logging.getLogger("sbert_pg.indexes")

#: Seconds between looks at a build.
INTERVAL = 0.5
#: Version that has a time-out for whole transactions.
_TRANSACTION_TIMEOUT = (17,)


def build_index(
    engine: sa.Engine,
    index: sa.Index,
    *,
    maintenance_work_mem: str | None = None,
    parallel_workers: int | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    attempts: int = ATTEMPTS,
    wait: float = 0.0,
    on_progress: Advance | None = None,
    stop: threading.Event | None = None,
) -> bool:
    """Build an index with ``CREATE INDEX CONCURRENTLY``, unless a valid one of this name is there.

    Readers and writers go on throughout (``SHARE UPDATE EXCLUSIVE``); the server waits for older
    transactions, however long they take. An invalid index of this name, as a killed build leaves
    behind, is dropped first. Of a partitioned table the index is built on each partition and
    attached; what a killed build has built of it is kept.

    Args:
        index: the index, with its table; of any access method.
        maintenance_work_mem: memory for the build, as in ``"2GB"``; an HNSW graph that fits builds
            several times faster. The server's own setting by default.
        parallel_workers: ``max_parallel_maintenance_workers`` for the build.
        lock_timeout: seconds to wait for the table's lock at an attempt, before the build.
        attempts: how often to try.
        wait: seconds to wait for another session that is building this index, such as one whose
            client was killed.
        on_progress: called with the phase, and blocks or tuples done and in all, in a thread.
        stop: once it is set the build is cancelled, and its invalid index dropped.

    Returns:
        Whether it was built now; ``False`` where a valid index of this name was there.

    Raises:
        TableBusyError: the lock was not to be had, or another session is building this index.
        StepStoppedError: ``stop`` was set.
        DeclarationError: the index has no name or no table.
    """
    table = index.table
    if table is None or index.name is None:
        raise DeclarationError("build_index needs an index with a name, attached to its table.")
    lock = system.ddl("LOCK TABLE %(fullname)s IN SHARE UPDATE EXCLUSIVE MODE", table)
    # Its own connection, which goes when the build has been cancelled.
    with engine.connect() as plain:
        connection = plain.execution_options(isolation_level="AUTOCOMMIT")
        try:
            with index_builder(
                connection,
                table.name,
                system.schema_in(connection, table.schema),
                attempts=attempts,
                maintenance_work_mem=maintenance_work_mem,
                parallel_workers=parallel_workers,
                on_progress=on_progress,
                stop=stop,
            ) as builder:
                builder.wait_for_others([str(index.name)], wait)
                if builder.state(str(index.name)) == "valid":
                    return False
                system.in_short_transactions(
                    engine,
                    lambda locked: locked.execute(lock),
                    relation=builder.relation,
                    lock_timeout=lock_timeout,
                    attempts=attempts,
                )
                return builder.create(index)
        finally:
            plain.invalidate()


@contextmanager
def index_builder(
    connection: sa.Connection,
    table: str,
    schema: str | None = None,
    *,
    lock_timeout: float | None = None,
    attempts: int = ATTEMPTS,
    maintenance_work_mem: str | None = None,
    parallel_workers: int | None = None,
    on_progress: Advance | None = None,
    stop: threading.Event | None = None,
) -> Iterator[IndexBuilder]:
    """Build and drop indexes of one table, with the session's time-outs set aside.

    Every statement of the connection commits itself. Without ``lock_timeout`` one waits for its
    lock as long as it takes, which holds up only other DDL and vacuum; other arguments as of
    ``build_index``.
    """
    values = {
        "lock_timeout": "0" if lock_timeout is None else milliseconds(lock_timeout),
        "statement_timeout": "0",
    }
    if (connection.dialect.server_version_info or (0,)) >= _TRANSACTION_TIMEOUT:
        values["transaction_timeout"] = "0"
    if maintenance_work_mem is not None:
        values["maintenance_work_mem"] = maintenance_work_mem
    if parallel_workers is not None:
        values["max_parallel_maintenance_workers"] = str(parallel_workers)
    with settings(connection, values):
        yield IndexBuilder(
            connection, table, schema, lock_timeout or 0.0, attempts, on_progress, stop
        )


@dataclass
class IndexBuilder:
    """Builds, replaces and drops indexes of one table; made by ``index_builder``."""

    connection: sa.Connection
    table: str
    schema: str | None
    lock_timeout: float
    attempts: int
    on_progress: Advance | None
    stop: threading.Event | None

    def __post_init__(self) -> None:
        self.relation = system.name_of(self.schema, self.table)
        self.partitioned = is_partitioned(self.connection, self.relation)

    def state(self, name: str) -> str:
        """See ``index_state``."""
        return index_state(self.connection, self.relation, name)

    def create(self, index: sa.Index) -> bool:
        """Build an index of any kind; ``False`` where a valid one of its name is there."""
        if self.partitioned:
            return self._create_on_partitions(str(index.name), index)
        return self._create(str(index.name), CreateIndexConcurrently(index))

    def _create_on_partitions(self, name: str, index: sa.Index) -> bool:
        """The same for a partitioned table; one that a build left incomplete is completed."""
        state = self.state(name)
        if state == "valid":
            return False

        def execute(statement: sa.Executable) -> None:
            self._retried(lambda: self.connection.execute(statement))

        def build(schema: str, table: str, part: str, definition: str, unique: bool) -> None:
            replace(self, schema=schema, table=table).create_as(part, definition, unique)

        if state == "absent":
            execute(create_only(index))
        build_on_partitions(self.connection, self.schema, self.relation, name, build, execute)
        return True

    def create_as(self, name: str, definition: str, unique: bool = False) -> bool:
        """As ``create``, of an index by what stands behind ``CREATE INDEX name``, as SQL."""
        return self._create(name, create_as(name, "CONCURRENTLY {}", definition, unique))

    def _create(self, name: str, statement: sa.Executable) -> bool:
        def attempt() -> bool:
            state = self.state(name)
            if state == "valid":
                return False
            if state == "building":
                raise TableBusyError(self._others(name))
            if state == "invalid":
                self._drop(name)
            self.connection.execute(statement)
            return True

        try:
            with self._watched():
                return self._retried(attempt)
        except (sa.exc.DBAPIError, TableBusyError) as error:
            self._drop_leftover(name)
            if self.stop is not None and self.stop.is_set():
                raise StepStoppedError(
                    f"The build of index {name!r} was called off. Run the same command again to "
                    "build it."
                ) from error
            raise

    def replace(self, declared: VectorIndex, *, keep_valid: bool = False) -> bool:
        """Build an index beside that of its name, which is then dropped; whether anything was built
        now.

        Goes on from wherever an earlier call was ended; ``keep_valid`` leaves a valid one alone.
        """
        beside = name_beside(declared.name)
        stored = vector_indexes(self.connection, self.table, schema=self.schema)
        by_name = {index.name: index for index in stored}
        old, new = (self._valid(by_name, name, declared) for name in (declared.name, beside))
        if old is not None and (keep_valid or same_index(self.connection, declared, old)):
            self.drop(beside)
            return False
        if new is not None and not same_index(self.connection, declared, new):
            self.drop(beside)
            new = None
        if new is None:
            if old is None:
                return self.create(declared.to_index())
            self.create(declared.to_index(name=beside))
        if old is not None:
            self.drop(declared.name)
        rename = _rename_index(beside, self.schema, declared.name)
        self._retried(lambda: self.connection.execute(rename))
        return True

    def _valid(
        self, stored: Mapping[str, StoredIndex], name: str, declared: VectorIndex
    ) -> StoredIndex | None:
        """The index of a name; one that is not valid is dropped, if it will not be completed."""
        index = stored.get(name)
        if index is None or index.valid:
            return index
        if not (self.partitioned and same_index(self.connection, declared, index)):
            self.drop(name)
        return None

    def drop(self, name: str) -> None:
        """Drop an index, if it is there, without stopping readers and writers."""
        if self.state(name) != "absent":
            self._retried(lambda: self._drop(name))

    def wait_for_others(self, names: list[str], seconds: float) -> None:
        """Wait while another session, as a killed process leaves one, builds one of the indexes."""
        ends = time.monotonic() + seconds
        said = False
        while building := [name for name in names if self.state(name) == "building"]:
            if self.stop is not None and self.stop.is_set():
                raise StepStoppedError("The wait for another session's build was called off.")
            if time.monotonic() >= ends:
                raise TableBusyError(self._others(building[0]))
            phase = phase_of(self.connection, self.relation)
            if phase is not None and self.on_progress is not None:
                self.on_progress(f"by another session: {phase[1]}", *phase[2:])
            elif not said:
                log.warning("Another session is building index %r; waiting for it.", building[0])
                said = True
            time.sleep(INTERVAL)

    def _retried(self, attempt: Callable[[], T]) -> T:
        def busy() -> str:
            return system.busy_message(
                self.connection, self.relation, self.attempts, self.lock_timeout
            )

        return system.retried(attempt, busy=busy, attempts=self.attempts)

    def _drop(self, name: str) -> None:
        # PostgreSQL drops the index of a partitioned table under a lock, for a moment.
        concurrently = not self.partitioned
        self.connection.execute(drop_index(name, self.schema, concurrently=concurrently))

    def _drop_leftover(self, name: str) -> None:
        """Leave no invalid index, where the connection still lives and the lock can be had."""
        if self.connection.invalidated:
            return
        try:
            with settings(self.connection, {"lock_timeout": milliseconds(LOCK_TIMEOUT)}):
                if self.state(name) == "invalid":
                    self._drop(name)
        except sa.exc.DBAPIError:
            # The next call meets the invalid index and drops it.
            return

    def _others(self, name: str) -> str:
        phase = phase_of(self.connection, self.relation)
        who = "Another session" if phase is None else f"Process {phase[0]}"
        return (
            f"{who} is building index {name!r} now; wait for it, or end it with "
            "pg_terminate_backend, and run the same command again."
        )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Show the progress of a build, and cancel it once it is called off, from a thread."""
        if self.on_progress is None and self.stop is None:
            yield
            return
        pid = self.connection.execute(sa.select(sa.func.pg_backend_pid())).scalar_one()
        ended = threading.Event()
        thread = threading.Thread(
            target=self._watch, args=(pid, ended), name="sbert-pg-index", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=10)

    def _watch(self, pid: int, ended: threading.Event) -> None:
        engine = self.connection.engine
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not ended.wait(INTERVAL):
                phase = phase_of(connection, self.relation)
                if phase is None or phase[0] != pid:
                    # Nothing to cancel: the cleaning up after a cancellation is not a build.
                    continue
                if self.stop is not None and self.stop.is_set():
                    connection.execute(sa.select(sa.func.pg_cancel_backend(pid)))
                elif self.on_progress is not None:
                    self.on_progress(*phase[1:])


def phase_of(connection: sa.Connection, relation: str) -> tuple[int, str, int, int] | None:
    """Process, phase, done and total of a build under way on a table; ``None`` if there is none."""
    progress = system.INDEX_PROGRESS.c
    row = connection.execute(
        sa.select(
            progress.pid,
            progress.phase,
            sa.func.greatest(progress.blocks_done, progress.tuples_done),
            sa.func.greatest(progress.blocks_total, progress.tuples_total),
        ).where(progress.relid == system.oid_of(relation))
    ).first()
    return None if row is None else (row[0], row[1], row[2], row[3])


def name_beside(name: str) -> str:
    """Name under which a replacement is built; within PostgreSQL's 63 bytes."""
    return name.encode()[:59].decode(errors="ignore") + "_new"


class CreateIndexConcurrently(sa.schema.CreateIndex):
    """``CREATE INDEX CONCURRENTLY``, whatever the index's own options say."""


@compiles(CreateIndexConcurrently, "postgresql")
def _create_index_concurrently(element: Any, compiler: Any, **kw: Any) -> str:
    text: str = compiler.visit_create_index(element, **kw)
    already = " INDEX CONCURRENTLY " in text
    return text if already else text.replace(" INDEX ", " INDEX CONCURRENTLY ", 1)


def drop_index(name: str, schema: str | None, *, concurrently: bool) -> system.Statement:
    """``DROP INDEX IF EXISTS``, by name alone."""
    drop = "DROP INDEX CONCURRENTLY" if concurrently else "DROP INDEX"
    return system.Statement(lambda c: f"{drop} IF EXISTS {system.ddl_name(c, schema, name)}")


def _rename_index(name: str, schema: str | None, new_name: str) -> system.Statement:
    def write(compiler: Any) -> str:
        old = system.ddl_name(compiler, schema, name)
        return f"ALTER INDEX {old} RENAME TO {compiler.preparer.quote(new_name)}"

    return system.Statement(write)
