"""Where a change stands and what may not be done yet: the rules applied to the server's answers."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from sbert_pg import catalog
from sbert_pg.errors import BackfillIncompleteError, StillInUseError
from sbert_pg.reembedding.coverage import coverage_of
from sbert_pg.reembedding.pair import Pair, change_of
from sbert_pg.reembedding.rules import Facts, State, joined, next_step, state_of
from sbert_pg.reembedding.usage import QUIET, Usage, observe
from sbert_pg.types.guard import ColumnIdentity


@dataclass(frozen=True, slots=True)
class Status:
    """Where a change stands.

    Attributes:
        facts: what was found.
        state: the step that has been reached.
        next_step: what to do next.
        usage: who still uses the old column.
    """

    facts: Facts
    state: State
    next_step: str
    usage: Usage

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        data["facts"]["coverage"]["share"] = self.facts.coverage.share
        data["usage"]["reasons"] = self.usage.reasons()
        return data

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        f, c = self.facts, self.facts.coverage
        yield f"{f.table}: {f.old} -> {f.new}: {self.state}"
        yield (
            f"  coverage   {c.share:.2%}: {c.embedded:,} of {c.with_text:,} rows with text; "
            f"{c.pending:,} pending, {c.failed:,} failed"
        )
        built = ", ".join(f.new_indexes) or "none"
        for names, what in ((f.building, "being built"), (f.invalid_indexes, "not valid")):
            if names:
                built += f"; {what}: {', '.join(names)}"
        yield f"  index      {built}"
        reasons = self.usage.reasons()
        for reason in reasons:
            yield f"  old column {reason}"
        if not reasons:
            yield "  old column not seen in use lately"
        yield f"  next       {self.next_step}"


def status(engine: sa.Engine, column: ColumnIdentity, *, watch: float = 0.0) -> Status:
    """Where a change stands, and what to do next.

    Args:
        engine: where.
        column: the new column, or the old one.
        watch: seconds to watch the use of the old column.

    Raises:
        NotBoundError: the column is not bound.
        ReembeddingError: it takes part in no change.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        pair = change_of(connection, column)
        found = facts_of(connection, pair)
        return Status(found, state_of(found), next_step(found), observe(connection, pair, watch))


def facts_of(connection: sa.Connection, pair: Pair) -> Facts:
    """What the rules look at, counted over the whole table."""
    assert pair.old is not None
    new = pair.new.indexes
    return Facts(
        table=f"{pair.new.binding.schema}.{pair.new.binding.table}",
        old=pair.old.binding.column,
        new=pair.new.binding.column,
        coverage=coverage_of(connection, pair.new.binding),
        old_indexes=tuple(index.name for index in pair.old.indexes if index.valid),
        new_indexes=tuple(index.name for index in new if index.valid),
        invalid_indexes=tuple(i.name for i in new if not i.valid and not i.building),
        building=tuple(index.name for index in new if index.building),
    )


def require_complete(
    connection: sa.Connection,
    column: ColumnIdentity,
    *,
    max_pending: int | None = None,
    max_failed: int = 0,
) -> None:
    """Do nothing where a column has a vector for every row that has a text.

    A few rows that became pending less than ``rules.LAG`` seconds ago are not counted against it:
    an application that writes texts alone has some at any moment.

    Args:
        connection: where; the whole table is counted.
        column: the column.
        max_pending: pending rows allowed, of whatever age; any number by default.
        max_failed: rows allowed whose text could not be encoded.

    Raises:
        NotBoundError: the column is not bound.
        BackfillIncompleteError: rows are missing; with the figures and the command to run.
    """
    binding = catalog.require_binding(connection, column)
    c = coverage_of(connection, binding)
    reasons = []
    if c.late:
        reasons.append(f"{c.late:,} of {c.with_text:,} rows with text have no vector")
    if max_pending is not None and c.pending > max_pending:
        reasons.append(f"{c.pending:,} rows are pending")
    if c.failed > max_failed:
        reasons.append(f"{c.failed:,} rows have failed")
    if reasons:
        raise BackfillIncompleteError(
            f"{binding} is not complete: {joined(reasons)}. Run 'sbert-pg backfill {binding}' "
            "(or keep a worker running) until 'sbert-pg status' shows none, then try again. Failed "
            "rows: 'sbert-pg retry' or 'sbert-pg skip'."
        )


def require_unused(
    connection: sa.Connection,
    column: ColumnIdentity,
    *,
    quiet: dt.timedelta = QUIET,
    watch: float = 0.0,
) -> None:
    """Do nothing where nobody uses the old column of a change any more.

    Args:
        connection: where.
        column: the old column, or the new one.
        quiet: how long it must not have been used.
        watch: seconds to watch it now; at least ten before PostgreSQL 16.

    Raises:
        ReembeddingError: the column takes part in no change.
        StillInUseError: its index was scanned, a statement compares with it, or an older version of
            the code has written it.
    """
    pair = change_of(connection, column)
    assert pair.old is not None
    reasons = observe(connection, pair, watch).reasons(quiet)
    if reasons:
        raise StillInUseError(
            f"{pair.old.binding} is still in use: {joined(reasons)}. Wait until every process runs "
            f"the code that declares {pair.new.binding.column!r}, and for "
            f"{quiet.total_seconds():.0f} s more; or force it, and whoever still uses it will fail."
        )
