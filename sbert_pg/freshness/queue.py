"""The queue: rows that are not fresh, what they are called, how they travel, and how many they are.

One statement with ``unnest`` writes a batch as fast as COPY into a side table and an update from it
do, without the side table. Keys go the same way, in PostgreSQL's binary array format put together
in one go, since the driver's own arrays of text cost more time than the statements that take them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.types import UserDefinedType

from sbert_pg import system
from sbert_pg.catalog import Binding, health, require_columns, tables
from sbert_pg.errors import BindingError, DeclarationError, NotBoundError
from sbert_pg.system import array_of, parts_of
from sbert_pg.types.wire import TextArray, TextArrayDumper, WireArray, WireDumper

#: New and changed rows, and rows of the backfill. Claims take them in this order.
Class = Literal[0, 1]
CHANGED: Class = 0
BACKFILL: Class = 1
#: Rows up to which a worker and ``status`` count each state.
COUNTED = 100_000
#: Rows up to which a check counts what is missing; beyond, "more than" is enough.
CHECKED = 10_000
#: As a limit: no limit.
_ALL = 2**62

#: One value of a key: type and binary form.
Part = tuple[int, bytes]
Key = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pending row as the queue has it; ``label`` is a JSON array of its key's parts as text,
    under which there may be a record of a failure (``failed_before``).
    """

    key: Key
    label: str
    failed_before: bool = False


@dataclass(frozen=True, slots=True)
class Row(Candidate):
    """A pending row as it was read, without a text where it is to have no vector; ``of`` is the
    half of its digest that names the text, as the server computes it.
    """

    text: str | None = None
    of: str | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What became of rows that were to be written, by label: fresh now (``rows``); gone or with
    another text (``changed``); locked by someone else (``busy``); written and pending again by a
    trigger (``again``); kept from the write by a trigger (``left_out``).
    """

    rows: tuple[str, ...]
    changed: tuple[str, ...]
    busy: tuple[str, ...]
    again: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __add__(self, other: Written) -> Written:
        return Written(
            self.rows + other.rows,
            self.changed + other.changed,
            self.busy + other.busy,
            self.again + other.again,
            self.left_out + other.left_out,
        )


def shown(label: str) -> str:
    """A label for people: the key itself where it has one part."""
    parts = parts_of(label) or ()
    return str(parts[0]) if len(parts) == 1 else label


def label_from(text: str) -> str:
    """The label that a key stands for: ``17``, or ``["eu", "17"]`` where it has parts."""
    parts = parts_of(text)
    return array_of([text] if parts is None else parts)


class ArrayOf(UserDefinedType[Any]):
    """The type of a parameter that is a ``WireArray`` or ``TextArray`` of elements whose type is so
    called by ``format_type`` on this server.
    """

    cache_ok = True
    render_bind_cast = True

    def __init__(self, element: str) -> None:
        self.element = element

    def get_col_spec(self, **_: object) -> str:
        """The type as a cast spells it."""
        return f"{self.element}[]"

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        """Leave the value alone."""
        return None


def driver_connection(connection: Connection) -> psycopg.Connection[Any]:
    """The psycopg connection beneath; ``DeclarationError`` for another driver."""
    driver = connection.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        raise _other_driver(connection.dialect)
    return driver


def require_psycopg(engine: sa.Engine) -> None:
    """Refuse an engine that a worker cannot use, before anything is started."""
    system.require_engine("A worker", engine)
    if (engine.dialect.name, engine.dialect.driver) != ("postgresql", "psycopg"):
        raise _other_driver(engine.dialect)


def _other_driver(dialect: Dialect) -> DeclarationError:
    return DeclarationError(
        f"The engine uses {dialect.name} with the driver {dialect.driver!r}; workers and backfills "
        "need psycopg 3, over which they listen and send vectors in binary. Create an engine for "
        "them with a URL that begins with postgresql+psycopg://; the application's own may stay."
    )


def vector_of(connection: Connection, binding: Binding) -> tuple[int, str, bool]:
    """OID and name of the type of a bound column, and whether it is ``NOT NULL``."""
    row = system.stored_types(connection, binding.relation).get(binding.column)
    if row is None:
        raise NotBoundError(
            f"Column {binding} does not exist any more. Run SELECT sbert.prune_v1() if its table "
            "was dropped; if it was renamed, bind it again under its new name."
        )
    return row.oid, row.type, row.attnotnull


def register(connection: Connection) -> None:
    """Let this connection send arrays in binary; nothing else about it changes."""
    adapters = driver_connection(connection).adapters
    adapters.register_dumper(WireArray, WireDumper)
    adapters.register_dumper(TextArray, TextArrayDumper)


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of a column that are not fresh.

    Attributes:
        pending: new and changed rows.
        backfill: rows that were there before the column was bound, and are not done yet.
        failed: rows that could not be embedded.
        skipped: failed rows that an operator has decided to leave without a vector.
        capped: whether counting stopped somewhere.
        age: seconds since a worker last found nothing new pending: every text that was committed
            before that is fresh or failed; ``None`` where no worker ever did.
    """

    pending: int
    backfill: int
    failed: int
    skipped: int
    capped: bool
    age: float | None


def counts(connection: Connection, binding: Binding, cap: int | None = None) -> Counts:
    """Count by the queue's own index, at a cost that depends on what is counted alone.

    Args:
        binding: the column.
        cap: where to stop counting each; by default everything is counted, about 90 to 300 ms for a
            million pending rows.

    Raises:
        BindingError: row-level security hides rows from this role.
    """
    require_all_rows(connection, binding)
    table = binding.clause()
    most = _ALL if cap is None else cap + 1
    stale, class_ = binding.is_stale(table), binding.class_of(table)
    states = (
        sa.and_(stale, class_ == CHANGED),
        sa.and_(stale, class_ == BACKFILL),
        binding.expressions.on(table, "failed"),
    )
    counted = [_count(binding, table, state, most) for state in states]
    failure = tables.failure.c
    mine = failure.binding_id == binding.id
    recorded = sa.select(sa.func.count()).where(mine, failure.failed)
    b = tables.binding.c
    age = sa.extract("epoch", sa.func.clock_timestamp() - b.caught_up_at)
    statement: sa.Select[Any] = sa.select(
        *counted,
        recorded.where(failure.skipped).scalar_subquery(),
        recorded.scalar_subquery(),
        sa.select(age).where(b.id == binding.id).scalar_subquery(),
    )
    pending, backfill, failed, skipped, of_record, seconds = connection.execute(statement).one()
    if failed == 0 and of_record:
        # A column that is NOT NULL cannot say of a row that it failed.
        failed = min(of_record, pending + backfill)
        pending, backfill = max(pending - failed, 0), max(backfill - max(failed - pending, 0), 0)
    numbers = [pending, backfill, failed]
    capped = cap is not None and max(numbers) > cap
    if cap is not None:
        numbers = [min(count, cap) for count in numbers]
    return Counts(
        numbers[0], numbers[1], max(numbers[2] - skipped, 0), skipped, capped,
        None if seconds is None else max(float(seconds), 0.0),
    )  # fmt: skip


def _count(
    binding: Binding, table: sa.TableClause, state: sa.ColumnElement[bool], most: int
) -> sa.ScalarSelect[Any]:
    """How many rows are in a state, up to a number."""
    keys = [table.c[name] for name in binding.key_columns]
    # Ordered and limited, since PostgreSQL would else read the table of a count or an EXISTS.
    rows = sa.select(*keys).where(state).order_by(*keys).limit(most).subquery()
    return sa.select(sa.func.count()).select_from(rows).scalar_subquery()


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How many rows of a column are as they should be, by what the rows themselves say.

    ``rows`` of the table is ``None`` where they were not counted; ``failed`` includes skipped ones;
    counts are ``capped`` at ``CHECKED``; ``faults`` are those of queue and binding, in words.
    """

    rows: int | None
    backfill: int
    pending: int
    failed: int
    capped: bool = False
    faults: tuple[str, ...] = ()

    @property
    def missing(self) -> int:
        """Rows that wait for a vector."""
        return self.backfill + self.pending

    @property
    def share(self) -> float:
        """Share of the rows that are fresh; 1 for a table without any."""
        if not self.rows:
            return 1.0 if self.rows == 0 else float("nan")
        return max(0.0, 1 - (self.missing + self.failed) / self.rows)

    @property
    def fresh(self) -> int:
        """Rows that have the vector of their text, or no text."""
        return max(0, (self.rows or 0) - self.missing - self.failed)

    def __str__(self) -> str:
        parts = [f"{self.share:.2%}: {self.fresh:,} of {self.rows:,} rows fresh"]
        parts += [
            f"{number:,} {what}"
            for number, what in (
                (self.backfill, "not filled yet"),
                (self.pending, "pending"),
                (self.failed, "failed"),
            )
            if number
        ]
        return "; ".join([", ".join(parts), *self.faults])

    def count(self, number: int) -> str:
        """A number of rows in words, of how many where that is known."""
        words = f"more than {number:,}" if self.capped and number == CHECKED else f"{number:,}"
        return words if self.rows is None else f"{words} of {self.rows:,}"

    def reasons(self, max_pending: int | None = 0, max_failed: int | None = 0) -> Iterator[str]:
        """Why the column is not complete, in words; any number may wait or have failed for
        ``None``.
        """
        yield from self.faults
        if self.backfill:
            yield f"{self.count(self.backfill)} rows have no vector yet"
        if max_pending is not None and self.pending > max_pending:
            yield f"{self.count(self.pending)} rows are pending"
        if max_failed is not None and self.failed > max_failed:
            yield (
                f"the text of {self.count(self.failed)} rows could not be encoded (see 'sbert-pg "
                "failed', with --retry or --skip)"
            )


def coverage_of(connection: Connection, binding: Binding, *, whole: bool = True) -> Coverage:
    """Count a column's rows by their state.

    Unless ``whole``, only what is missing, up to ``CHECKED`` rows, from two small indexes.
    """
    faults = tuple(health(connection, binding))
    counted = counts(connection, binding, None if whole else CHECKED)
    total = sa.select(sa.func.count()).select_from(binding.clause())
    return Coverage(
        rows=connection.execute(total).scalar_one() if whole else None,
        backfill=counted.backfill,
        pending=counted.pending,
        failed=counted.failed + counted.skipped,
        capped=counted.capped,
        faults=faults,
    )


def note_caught_up(connection: Connection, binding: Binding) -> bool:
    """Note that nothing new is pending, if that is so; the caller commits.

    Every text that was committed before the statement began is fresh or failed.
    """
    table = binding.clause()
    changed = sa.and_(binding.is_stale(table), binding.class_of(table) == CHANGED)
    nothing = _count(binding, table, changed, 1) == 0
    note = sa.func.sbert.note_v1(binding.id, sa.func.statement_timestamp())
    return connection.execute(sa.select(note).where(nothing, binding.is_here())).first() is not None


def queue_fault(connection: Connection, binding: Binding) -> str | None:
    """Why a column's queue cannot be trusted or would be read in full, or ``None``."""
    fault = sa.func.sbert.faults_v1(binding.id).column_valued("fault")
    return connection.execute(sa.select(fault)).scalars().first()


def require_all_rows(connection: Connection, binding: Binding) -> None:
    """Refuse to speak of a table of which this role sees a part, or which lacks bound columns."""
    require_columns(connection, binding)
    active = sa.func.row_security_active(sa.cast(binding.relation, pg.OID))
    if connection.execute(sa.select(active)).scalar_one():
        raise BindingError(
            f"Row-level security applies to this role on {binding.schema}.{binding.table}, so rows "
            "could be left out unnoticed. Run as the table's owner or as a role with BYPASSRLS."
        )
