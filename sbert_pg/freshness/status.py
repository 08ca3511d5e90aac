"""How each bound column is doing, which rows failed, and what to do about them by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg import catalog
from sbert_pg.catalog import Binding, tables
from sbert_pg.freshness import claims
from sbert_pg.freshness.queue import (
    COUNTED,
    Counts,
    counts,
    label_from,
    queue_fault,
    require_all_rows,
    shown,
)
from sbert_pg.freshness.rows import SET_FORMATS, rows_of
from sbert_pg.registry import token_counter
from sbert_pg.row_vectors import count_cut
from sbert_pg.system import array_label, require_connection

IndexState = Literal["ready", "not ready", "none"]
#: About half as many texts as ``status`` counts the tokens of, to say how many are cut.
LENGTHS = 200
_failure = tables.failure.c


@dataclass(frozen=True, slots=True)
class ColumnStatus:
    """One bound column.

    Attributes:
        column: schema, table and column.
        encoder: name of the encoder that it was declared with.
        fingerprint: fingerprint of its encoder; ``None`` before its first use.
        state: ``"filling"``, ``"active"`` or ``"replaced"``.
        rows: rows of the table, estimated by the planner unless counted; ``None`` where the table
            was never analysed.
        embedded: rows with a vector; see ``rows``.
        pending: new and changed rows that wait for a vector.
        backfill: rows that were there before the column was bound and wait for a vector.
        capped: whether counting ``pending``, ``backfill`` or ``failed`` stopped at 100,000.
        failed: rows that could not be embedded.
        skipped: failed rows that an operator has decided to leave without a vector.
        age: seconds since a worker last found nothing new pending; every text that was committed
            before that is fresh or failed. ``None`` where no worker ever did.
        truncated: rows whose text is longer than the encoder reads, estimated from the share that
            the last audit saw; before one, from some texts of the table, where the encoder is at
            hand in this process or was converted on this machine; else ``None``.
        problems: what is wrong with the column's queue, triggers or names, in words.
        index: whether a vector index on the column is valid.
        counted: whether everything was counted.
    """

    column: str
    encoder: str
    fingerprint: str | None
    state: str
    rows: int | None
    embedded: int | None
    pending: int
    backfill: int
    capped: bool
    failed: int
    skipped: int
    age: float | None
    truncated: int | None
    problems: tuple[str, ...]
    index: IndexState
    counted: bool


def status(connection: Connection, *, exact: bool = False) -> list[ColumnStatus]:
    """The state of every bound column, in the order of their names; nothing without a catalog.

    Costs a few milliseconds a column, whatever the size of its table: rows and vectors are the
    planner's estimates, and what is not fresh is counted up to 100,000.

    Args:
        exact: count instead. Reads every bound table in full: seconds for each million rows.

    Raises:
        CatalogError: this role may not use the catalog.
        BindingError: row-level security hides rows from this role.
    """
    require_connection("status", connection)
    if not catalog.installed(connection):
        return []
    # Its only moment says what ``counts`` does, and a driver may not read it in every DateStyle.
    columns = [column for column in tables.status.c if column.name != "caught_up_at"]
    rows = {row.id: row for row in connection.execute(sa.select(*columns))}
    bindings = sorted(catalog.all_bindings(connection), key=str)
    return [
        _status(connection, binding, rows[binding.id], exact)
        for binding in bindings
        if binding.id in rows
    ]


def _status(
    connection: Connection, binding: Binding, row: sa.Row[Any], exact: bool
) -> ColumnStatus:
    # Without its index a count would read the whole table; without a column there is none.
    lost = queue_fault(connection, binding) is not None and (
        not exact or bool(catalog.missing_columns(connection, binding))
    )
    counted = (
        Counts(0, 0, 0, 0, True, None)
        if lost
        else counts(connection, binding, None if exact else COUNTED)
    )
    index: IndexState = "none"
    if row.index_names:
        index = "ready" if row.index_ready else "not ready"
    status = ColumnStatus(
        column=str(binding),
        encoder=row.encoder_name,
        fingerprint=row.fingerprint,
        state=row.state,
        rows=row.estimated_rows,
        embedded=row.estimated_embedded,
        **asdict(counted),
        truncated=_truncated(connection, binding, row),
        problems=tuple(row.problems or ()),
        index=index,
        counted=exact and not lost,
    )
    if not status.counted:
        return status
    table = binding.clause()
    whole = sa.select(sa.func.count(), sa.func.count(table.c[binding.column])).select_from(table)
    total, embedded = connection.execute(whole).one()
    return replace(status, rows=total, embedded=embedded)


def _truncated(connection: Connection, binding: Binding, row: sa.Row[Any]) -> int | None:
    """About how many texts are longer than the encoder reads, by a sample."""
    if row.estimated_rows is None:
        return None
    audit = row.last_audit or {}
    if audit.get("truncated") is not None and audit.get("rows"):
        share: float | None = audit["truncated"] / audit["rows"]
    else:
        share = _cut_share(connection, binding, row)
    return None if share is None else round(float(row.estimated_rows) * share)


def _cut_share(connection: Connection, binding: Binding, row: sa.Row[Any]) -> float | None:
    """Share of cut texts among some of the table, from whole pages, so that few are read."""
    counter = token_counter(row.encoder_name)
    # Of a document that is cut into passages nothing is lost.
    if counter is None or binding.source.passages is not None:
        return None
    limit = counter.spec.max_seq_length
    percent = min(100.0, 200 * LENGTHS / max(float(row.estimated_rows), 1.0))
    drawn = binding.clause().tablesample(sa.func.system(sa.literal_column(f"{percent:.6f}")))
    text = binding.expressions.on(drawn, "text")
    # Beyond this a text is cut whatever it says, as good as certainly.
    text = text if limit is None else sa.func.left(text, 20 * limit)
    filled = sa.select(text).where(text.is_not(None)).limit(4 * LENGTHS)
    texts = list(connection.execute(filled).scalars())
    cut = count_cut(counter, texts)
    return None if cut is None or not texts else cut / len(texts)


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that could not be embedded.

    Attributes:
        key: its key; a JSON array where it has several parts.
        attempts: how often it was tried; 0 where there is no record of it.
        error: why it failed the last time.
        at: when that was.
        failed: whether it is failed for good, until its text changes; else it is tried again.
        skipped: whether an operator has decided to leave it.
    """

    key: str
    attempts: int
    error: str | None
    at: datetime | None
    failed: bool
    skipped: bool


def failures(
    connection: Connection, binding: Binding, *, limit: int = 100, skipped: bool = False
) -> list[Failure]:
    """Rows of a column that could not be embedded, in the order of their keys.

    Values are spelt as workers spell them for the rest of the transaction (``DateStyle`` and such).

    Args:
        binding: the column.
        limit: most rows to return.
        skipped: include rows that an operator has decided to leave.
    """
    require_all_rows(connection, binding)
    connection.execute(SET_FORMATS)
    table = binding.clause()
    keys = [table.c[name] for name in binding.key_columns]
    failed = (
        sa.select(array_label(keys).label("label"))
        .where(binding.expressions.on(table, "failed"))
        .order_by(*keys)
        .limit(limit)
        .subquery()
    )
    record = (
        sa.select(*tables.failure.c)
        .where(_failure.binding_id == binding.id, _failure.attempts > 0)
        .subquery()
    )
    statement = (
        sa.select(
            sa.func.coalesce(failed.c.label, record.c.key),
            sa.func.coalesce(record.c.attempts, 0), record.c.error, record.c.at,
            sa.or_(failed.c.label.is_not(None), record.c.failed),
            sa.func.coalesce(record.c.skipped, sa.false()).label("skipped"),
        )
        .select_from(failed.outerjoin(record, record.c.key == failed.c.label, full=True))
        .order_by(sa.text("1"))
        .limit(limit)
    )  # fmt: skip
    if not skipped:
        statement = statement.where(~sa.func.coalesce(record.c.skipped, sa.false()))
    return [Failure(shown(label), *rest) for label, *rest in connection.execute(statement)]


def retry(connection: Connection, binding: Binding, keys: Sequence[str] | None = None) -> int:
    """Let workers try rows again that could not be embedded, and count them; the caller commits.

    Args:
        connection: a connection of a role that may update the table.
        binding: the column.
        keys: which rows, skipped ones too, as ``failures`` names them; by default all that have
            failed and are not skipped.
    """
    rows = rows_of(connection, binding)
    rows.prepare(connection)
    chosen = _chosen(keys)
    again = connection.execute(
        sa.delete(tables.failure)
        .where(_failure.binding_id == binding.id, _failure.attempts > 0, chosen)
        .returning(_failure.key)
    ).scalars()
    labels = set(again)
    failed = binding.expressions.on(rows.table, "failed")
    if keys is not None:
        named = rows.label.in_([label_from(key) for key in keys])
        count = rows.requeue(connection, failed, named)
    else:
        kept = sa.select(_failure.key).where(_failure.binding_id == binding.id, _failure.skipped)
        count = rows.requeue(connection, failed, rows.label.not_in(kept))
    count = max(count, len(labels))
    if count:
        wake(connection, binding)
    return count


def skip(connection: Connection, binding: Binding, keys: Sequence[str] | None = None) -> int:
    """Leave rows that cannot be embedded without a vector, and count them; the caller commits.

    An older vector is cleared, so that a search does not find the row by a text it no longer has.
    The row stays visible as skipped until its text changes or it is tried again.

    Args:
        connection: a connection of a role that may update the table.
        binding: the column.
        keys: which rows, pending or failed; by default all that could not be embedded.
    """
    rows = rows_of(connection, binding)
    rows.prepare(connection)
    if keys is None:
        labels = [label_from(one.key) for one in failures(connection, binding, limit=COUNTED)]
    else:
        labels = [label_from(key) for key in keys]
    return claims.skip(connection, rows, labels)


def wake(connection: Connection, binding: Binding) -> None:
    """Tell workers, at the commit, that rows of a column may be pending."""
    notify: Any = sa.func.pg_notify(catalog.PENDING_CHANNEL, str(binding.id))
    connection.execute(sa.select(notify))


def _chosen(keys: Sequence[str] | None) -> sa.ColumnElement[bool]:
    if keys is None:
        return ~_failure.skipped
    return _failure.key.in_([label_from(key) for key in keys])
