"""How each bound column is doing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sbert_pg.catalog import Binding, all_bindings, tables
from sbert_pg.catalog.reading import installed

IndexState = Literal["ready", "not ready", "none"]


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
        pending: rows that wait for a vector.
        pending_is_capped: whether ``pending`` is where counting stopped, 100,000.
        oldest_pending: seconds since the row that waits longest became stale, or ``None``.
        failed: rows that could not be embedded.
        skipped: failed rows that an operator has decided to leave without a vector.
        truncated: rows whose text is longer than the encoder reads, estimated from the share that
            the last audit saw; ``None`` before one.
        noticing: whether the triggers are there and enabled.
        index: whether a vector index on the column is valid.
        counted: whether ``rows``, ``embedded`` and ``pending`` were counted.
    """

    column: str
    encoder: str
    fingerprint: str | None
    state: str
    rows: int | None
    embedded: int | None
    pending: int
    pending_is_capped: bool
    oldest_pending: float | None
    failed: int
    skipped: int
    truncated: int | None
    noticing: bool
    index: IndexState
    counted: bool


def status(connection: Connection, *, exact: bool = False) -> list[ColumnStatus]:
    """The state of every bound column, by number of the binding; nothing without a catalog.

    Costs a few milliseconds a column, whatever the size of its table: rows and vectors are the
    planner's estimates, and marks are counted up to 100,000.

    Args:
        connection: a connection.
        exact: count instead. Reads every bound table in full: seconds for each million rows.

    Raises:
        CatalogError: this role may not use the catalog.
    """
    if not installed(connection):
        return []
    columns = (*tables.status.c, sa.func.clock_timestamp().label("now"))
    rows = connection.execute(sa.select(*columns).order_by(tables.status.c.id)).all()
    found = {row.id: _status(row) for row in rows}
    if exact:
        for binding in all_bindings(connection):
            if binding.id in found:
                found[binding.id] = _counted(connection, binding, found[binding.id])
    return list(found.values())


def _status(row: sa.Row[Any]) -> ColumnStatus:
    audit = row.last_audit or {}
    truncated = None
    if audit.get("truncated") is not None and audit.get("rows") and row.estimated_rows is not None:
        truncated = round(row.estimated_rows * audit["truncated"] / audit["rows"])
    oldest: datetime | None = row.oldest_pending
    index: IndexState = "none"
    if row.index_names:
        index = "ready" if row.index_ready else "not ready"
    return ColumnStatus(
        column=f"{row.schema_name}.{row.table_name}.{row.column_name}",
        encoder=row.encoder_name,
        fingerprint=row.fingerprint,
        state=row.state,
        rows=row.estimated_rows,
        embedded=row.estimated_embedded,
        pending=row.pending,
        pending_is_capped=row.pending_is_capped,
        oldest_pending=None if oldest is None else max((row.now - oldest).total_seconds(), 0.0),
        failed=row.failed,
        skipped=row.skipped,
        truncated=truncated,
        noticing=row.noticing,
        index=index,
        counted=False,
    )


def _counted(connection: Connection, binding: Binding, estimate: ColumnStatus) -> ColumnStatus:
    table, mark = binding.clause(), tables.pending.c
    counts = sa.select(sa.func.count(), sa.func.count(table.c[binding.column])).select_from(table)
    rows, embedded = connection.execute(counts).one()
    pending = connection.execute(
        sa.select(sa.func.count()).where(mark.column_id == binding.id, ~mark.failed)
    ).scalar_one()
    return replace(
        estimate,
        rows=rows,
        embedded=embedded,
        pending=pending,
        pending_is_capped=False,
        counted=True,
    )


__all__ = ["ColumnStatus", "status"]
