"""Where a change stands, who still uses its old column, and whether columns can be served.

Rows are counted by what they say themselves, through the queue's index. Three sources say who uses
the old column, and none of them costs a reader anything worth measuring:

- this library's own readers and writers leave a trace in ``sbert.reader``, once a process and
  ten seconds, whatever plan their statements have;
- the server counts index scans (``pg_stat_user_indexes``), and since PostgreSQL 16 says when the
  last one began;
- ``pg_stat_activity`` shows statements at work that compare vectors with the column. It shows other
  roles' statements only to members of ``pg_read_all_stats``.

What none of them sees is said in ``Status.unseen``.
"""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from sbert_pg import catalog, system
from sbert_pg.catalog import Binding, tables
from sbert_pg.errors import BackfillIncompleteError, NotBoundError, ReembeddingError
from sbert_pg.freshness.queue import Coverage, coverage_of
from sbert_pg.indexes import StoredIndex, vector_indexes
from sbert_pg.indexes.read import knows_last_scan
from sbert_pg.progress import duration
from sbert_pg.row_vectors import EmbeddingColumn, embedding_columns
from sbert_pg.system import ColumnIdentity, require_connection
from sbert_pg.types.indexed import VectorIndex, declared_index, declared_indexes

if TYPE_CHECKING:
    from alembic.operations import Operations

#: How long the old column must not have been used.
QUIET = dt.timedelta(minutes=5)
#: Seconds to watch where the server does not say when an index was last scanned.
WATCH = 10.0
_POLL = 0.2
_DISTANCES = ("<=>", "<->", "<#>", "<+>", "<~>", "<%>")

#: ``filling``: rows lack their vector; ``filled``: the index is missing; ``ready``: nothing is.
State = Literal["filling", "filled", "ready"]


def replacement_of(connection: sa.Connection, old: Binding) -> Binding | None:
    """The binding that is to replace a column, where a change has begun."""
    for candidate in catalog.all_bindings(connection):
        if candidate.relation == old.relation and candidate.replaces == old.column:
            return candidate
    return None


def sides_of(connection: sa.Connection, column: ColumnIdentity) -> tuple[Binding, Binding | None]:
    """The new column of a change that a column takes part in, and the old one if still there."""
    binding = catalog.require_binding(connection, column)
    new = catalog.require_columns(connection, replacement_of(connection, binding) or binding)
    if new.replaces is None:
        return new, None
    old = catalog.binding_of(connection, ColumnIdentity(new.schema, new.table, new.replaces))
    return new, old and catalog.require_columns(connection, old)


def change_of(connection: sa.Connection, column: ColumnIdentity) -> tuple[Binding, Binding]:
    """As ``sides_of``, where both columns have to be there."""
    new, old = sides_of(connection, column)
    if old is None:
        raise ReembeddingError(
            f"{column} replaces no column and none replaces it, so there is no change to "
            "continue. 'sbert-pg reembed begin' begins one."
        )
    return new, old


def operations_on(connection: sa.Connection) -> Operations:
    """Alembic's operations, for DDL that SQLAlchemy itself lacks."""
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    return Operations(MigrationContext.configure(connection))


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Where a change stands.

    Attributes:
        table: the table, for messages.
        old: the old column.
        new: the new column.
        coverage: rows of the new column.
        old_indexes: names of the old column's valid indexes.
        new_indexes: names of the new column's valid indexes.
        invalid_indexes: names of the new column's indexes that are not valid and not being built.
        building: names of the new column's indexes that are being built.
        in_use: what was seen of the old column's use lately, in words.
        unseen: kinds of use that could not have been seen, in words.
    """

    table: str
    old: str
    new: str
    coverage: Coverage
    old_indexes: tuple[str, ...]
    new_indexes: tuple[str, ...]
    invalid_indexes: tuple[str, ...]
    building: tuple[str, ...]
    in_use: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def index_missing(self) -> bool:
        """Whether the old column has an index and the new one has none."""
        return bool(self.old_indexes) and not self.new_indexes

    @property
    def state(self) -> State:
        """The step that has been reached."""
        if self.coverage.missing or self.coverage.faults:
            return "filling"
        return "filled" if self.index_missing else "ready"

    @property
    def next_step(self) -> str:
        """What to do next, with the command."""
        names = quote(f"{self.table}.{self.new}")
        if self.coverage.faults:
            return f"mend the binding: {'; '.join(self.coverage.faults)}"
        if self.state == "filling":
            rows = self.coverage.count(self.coverage.missing)
            return (
                f"let workers fill {self.new}, or run: sbert-pg backfill {names} ({rows} rows "
                "to go)"
            )
        if self.state == "filled":
            if self.building:
                return f"wait for index {self.building[0]}, which is being built"
            return f"build its index: sbert-pg backfill {names}"
        return (
            f"sbert-pg reembed verify {names}; then deploy the code that declares {self.new}; when "
            f"no older version runs any more: sbert-pg reembed finish {names}"
        )

    def reasons(self, max_pending: int | None = 0, max_failed: int | None = 0) -> list[str]:
        """Why the new column cannot stand alone yet, in words; empty where it can."""
        reasons = list(self.coverage.reasons(max_pending, max_failed))
        if self.index_missing:
            state = "is being built" if self.building else "does not exist"
            reasons.append(f"{self.old} has an index, and the one on {self.new} {state}")
        return reasons

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self) | {"state": self.state, "next_step": self.next_step}
        data["coverage"]["share"] = self.coverage.share
        return data

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.table}: {self.old} -> {self.new}: {self.state}"
        yield f"  coverage   {self.coverage}"
        built = ", ".join(self.new_indexes) or "none"
        for names, what in ((self.building, "being built"), (self.invalid_indexes, "not valid")):
            if names:
                built += f"; {what}: {', '.join(names)}"
        yield f"  index      {built}"
        for use in self.in_use:
            yield f"  old column {use}"
        if not self.in_use:
            yield "  old column not seen in use lately"
            yield f"  not seen   {'; '.join(self.unseen)}"
        yield f"  next       {self.next_step}"


def status(engine: sa.Engine, column: ColumnIdentity) -> Status:
    """Where a change stands, named by its new or its old column, and what to do next.

    Raises:
        NotBoundError: the column is not bound.
        ReembeddingError: it takes part in no change.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        new, old = change_of(connection, column)
        use = use_of(connection, old)
        return status_of(connection, new, old, in_use=use, unseen=tuple(_unseen(connection)))


def status_of(
    connection: sa.Connection,
    new: Binding,
    old: Binding,
    *,
    whole: bool = True,
    in_use: tuple[str, ...] = (),
    unseen: tuple[str, ...] = (),
) -> Status:
    """Where a change stands; see ``coverage_of`` for ``whole``."""
    indexes = _indexes(connection, new)
    return Status(
        table=f"{new.schema}.{new.table}",
        old=old.column,
        new=new.column,
        coverage=coverage_of(connection, new, whole=whole),
        old_indexes=tuple(index.name for index in _indexes(connection, old) if index.valid),
        new_indexes=tuple(index.name for index in indexes if index.valid),
        invalid_indexes=tuple(i.name for i in indexes if not i.valid and not i.building),
        building=tuple(index.name for index in indexes if index.building),
        in_use=in_use,
        unseen=unseen,
    )


def use_of(
    connection: sa.Connection, old: Binding, quiet: dt.timedelta = QUIET, watch: float = 0.0
) -> tuple[str, ...]:
    """What was seen of the old column's use, in words; empty where none was seen.

    Before PostgreSQL 16, which does not say when an index was last scanned, it is watched for
    ``WATCH`` seconds. Inside a transaction too, statistics are read afresh.
    """
    if not knows_last_scan(connection):
        watch = max(watch, WATCH)
    before = {index.name: index.scans for index in _indexes(connection, old)}
    statements: dict[int, str] = {}
    ends = time.monotonic() + watch
    while True:
        statements.update(_statements(connection, old.table, old.column))
        if time.monotonic() >= ends:
            break
        time.sleep(min(_POLL, max(0.0, ends - time.monotonic())))
    return (
        *_scans(connection, old, before, quiet, watch),
        *(f"a running statement compares with it: {each}" for each in statements.values()),
        *_processes(connection, old, quiet),
    )


def _scans(
    connection: sa.Connection,
    old: Binding,
    before: dict[str, int],
    quiet: dt.timedelta,
    watch: float,
) -> Iterator[str]:
    """Scans of the column's indexes, since they were counted or lately."""
    now = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    for index in _indexes(connection, old):
        during = index.scans - before.get(index.name, index.scans)
        if during > 0:
            yield f"index {index.name} was scanned {during} times in {watch:.0f} s"
        elif index.last_scan is not None and now - index.last_scan < quiet:
            yield f"index {index.name} was scanned {_ago(now - index.last_scan)}"


def _ago(age: dt.timedelta) -> str:
    return f"{duration(age.total_seconds())} ago"


def _indexes(connection: sa.Connection, binding: Binding) -> tuple[StoredIndex, ...]:
    connection.execute(sa.select(sa.func.pg_stat_clear_snapshot()))
    return vector_indexes(connection, binding.table, binding.column, schema=binding.schema)


def _processes(connection: sa.Connection, old: Binding, quiet: dt.timedelta) -> Iterator[str]:
    """Use of the column by means of this library, with the last process where it is known.

    A reader's transaction is often rolled back, and its word with it; the time of the last search
    is kept all the same.
    """
    seen = tables.reader.c
    now = sa.func.clock_timestamp()
    last_read = sa.func.sbert.last_read_v1(old.id, type_=sa.DateTime(timezone=True))
    searched = connection.scalar(sa.select(now - last_read))
    recent = (
        sa.select(seen.pid, seen.role, seen.application, (now - seen.seen_at).label("age"))
        .where(seen.binding_id == old.id, now - seen.seen_at < quiet)
        .order_by(seen.seen_at.desc())
    )
    for wrote, did in ((False, "searched"), (True, "wrote")):
        rows = connection.execute(recent.where(seen.wrote.is_(wrote))).all()
        if rows:
            last = rows[0]
            yield (
                f"{len(rows)} processes of an older version {did} it, the last "
                f"({last.application or last.role}, process {last.pid}) {_ago(last.age)}"
            )
        elif not wrote and searched is not None and searched < quiet:
            yield f"an older version searched it {_ago(searched)}"


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
        if query
        and any(operator in query for operator in _DISTANCES)
        and _names(query, column)
        and _names(query, table)
    }


def _names(query: str, name: str) -> bool:
    return re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", query) is not None


def _unseen(connection: sa.Connection) -> Iterator[str]:
    yield "searches on replicas"
    yield "searches without this library that use no index, unless they run at this moment"
    sees_all = sa.func.pg_has_role(sa.literal("pg_read_all_stats", sa.Text), "USAGE")
    if not connection.execute(sa.select(sees_all)).scalar_one():
        yield "running statements of other roles (grant pg_read_all_stats to see them)"


def require_ready(
    bind: sa.Engine | sa.Connection,
    declared: Any,
    *,
    max_pending: int | None = 0,
    max_failed: int | None = None,
) -> None:
    """Do nothing where every declared embedding column can be served; else say what is missing.

    For the start of a process, or its readiness probe: a deployment that switches to a column whose
    backfill is not complete stops here, and the old version keeps serving. A column can be served
    where it is bound to the declared encoder, every row has the vector of its text, and each
    declared vector index is there and valid. It takes some milliseconds, however large the table.

    Nothing is written. Async callers use ``await connection.run_sync(require_ready, Base)``.

    Args:
        bind: an engine or a connection.
        declared: a declarative base, a mapped class, a table, ``MetaData``, an embedding column, or
            several of these.
        max_pending: new and changed rows that may wait for their vector. An application that leaves
            all encoding to workers has some at any moment, and should say how many are normal. Any
            number for ``None``.
        max_failed: rows allowed whose text could not be encoded; any number by default, since one
            odd text should not stop a deployment.

    Raises:
        DeclarationError: ``bind`` is asynchronous.
        EncoderMismatchError: a column belongs to another encoder than the code declares.
        NotBoundError: a column is not bound, or does not exist.
        BackfillIncompleteError: rows or indexes are missing; all columns' reasons together.
    """
    require_connection("require_ready", bind, or_engine=True)
    columns = embedding_columns(declared)
    if not columns:
        raise NotBoundError(
            f"{declared!r} declares no embedding column, so there is nothing to check. Give the "
            "declarative base, a mapped class, a table or its metadata."
        )
    reasons: list[str] = []
    with ExitStack() as stack:
        if isinstance(bind, sa.Engine):
            bind = stack.enter_context(bind.connect())
            bind.execution_options(postgresql_readonly=True)
        for column in columns:
            reasons.extend(_missing(bind, column, max_pending, max_failed))
    if reasons:
        raise BackfillIncompleteError(
            f"This code cannot serve what it declares yet: {'; '.join(reasons)}. Keep the version "
            "that serves now until 'sbert-pg reembed status' says ready."
        )


def _missing(
    connection: sa.Connection,
    column: EmbeddingColumn,
    max_pending: int | None,
    max_failed: int | None,
) -> Iterator[str]:
    identity = column.identity
    binding = catalog.require_binding(connection, identity)
    catalog.hold(connection, identity, column.spec)
    for reason in coverage_of(connection, binding, whole=False).reasons(max_pending, max_failed):
        yield f"{binding}: {reason}"
    stored = vector_indexes(connection, identity.table, identity.column, schema=identity.schema)
    for index in declared_indexes(column.column):
        declared = declared_index(index, str(index.name), identity.schema)
        # *Backfill* names an index after that of the old column: what it is counts.
        valid = [each.valid for each in stored if each.name == index.name or _alike(each, declared)]
        if not any(valid):
            yield f"index {index.name} {'is not valid' if valid else 'does not exist'}"


def _alike(stored: VectorIndex, declared: VectorIndex) -> bool:
    """Whether an index of a database serves the searches of all rows that a declared one does."""
    if stored.partial or declared.partial:
        return False
    one, other = ((i.method, i.form, i.opclass, i.width, i.mean) for i in (stored, declared))
    return one == other
