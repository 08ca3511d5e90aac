"""The pages of states: a running change of encoder, and the health of all columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import sqlalchemy as sa
from starlette.datastructures import QueryParams

from sbert_pg import catalog, reembed
from sbert_pg.catalog import Binding
from sbert_pg.freshness.status import ColumnStatus, failures, status
from sbert_pg.reembed.status import change_of, status_of
from sbert_pg.serving.comparing import compared
from sbert_pg.serving.exposed import Exposed, Shown
from sbert_pg.serving.html import h, table
from sbert_pg.types.identity import ColumnIdentity

#: Failed rows of a column that are listed.
FAILED = 20
#: Rows up to which a page measures what reads both columns in full.
MEASURED_ROWS = 200_000


def changes(shown: Shown, query: QueryParams) -> Iterator[Any]:
    """Changes of encoder that are under way."""
    with shown.connected() as connection:
        new = [b for b in catalog.all_bindings(connection) if b.replaces is not None]
        states = [
            (b, status_of(connection, *change_of(connection, _identity(b)), whole=False))
            for b in new
        ]
        known = {one.column: one for one in status(connection)}
    if not states:
        yield h("p", "No change of encoder is under way.")
        yield h("p", "One begins with ", h("code", "sbert-pg reembed begin"), ".",
                class_="faint")  # fmt: skip
        return
    for binding, state in states:
        yield h("h2", f"{state.table}: {state.old} → {state.new}", dir="auto")
        yield _changing(shown, state, binding, known, query)


def _changing(
    shown: Shown,
    state: reembed.Status,
    binding: Binding,
    known: Mapping[str, ColumnStatus],
    query: QueryParams,
) -> Iterator[Any]:
    new = known.get(str(binding))
    old = known.get(f"{binding.schema}.{binding.table}.{state.old}")
    if new is not None and old is not None:
        yield h("p", f"{old.encoder} → {new.encoder}", class_="faint", dir="auto")
    steps = ["begin", "backfill", "verify", "switch", "finish"]
    reached = 1 if state.state != "ready" else 2
    yield h(
        "ol",
        [h("li", step, class_="done" if i < reached else "now" if i == reached else None)
         for i, step in enumerate(steps)],
        class_="steps",
    )  # fmt: skip
    missing = state.coverage.missing
    if new is not None and new.rows:
        share = max(0.0, 1 - missing / new.rows)
        yield h("progress", max="1", value=f"{share:.4f}")
        yield h("p", f"{share:.1%} of about {new.rows:,} rows; {missing:,} to go.")
    yield h("p", "Index: ", ", ".join(state.new_indexes) or "none that is valid", "; ",
            "being built: " + ", ".join(state.building) if state.building else "none is built",
            ".", class_="faint")  # fmt: skip
    yield h("p", "Next: ", h("code", state.next_step, class_="command", dir="auto"))
    yield _overlap(shown, binding, new, query)
    bound = {t.bound: t for t in shown.tables().values()}
    pair = [bound[one.column] for one in (old, new) if one is not None and one.column in bound]
    if len(pair) == 2:
        yield _both(shown, pair, query)


def _overlap(
    shown: Shown, binding: Binding, new: ColumnStatus | None, query: QueryParams
) -> Iterator[Any]:
    """Neighbours that both columns have in common, measured where that is asked for."""
    column = str(binding)
    if new is None or new.rows is None or new.rows > MEASURED_ROWS:
        yield h("p", "Overlap: ", h("code", f"sbert-pg reembed verify {column}"),
                " measures it; it reads both columns in full.", class_="faint")  # fmt: skip
    elif query.get("measure") != column:
        link = "/explore/change?" + urlencode({"measure": column})
        yield h("p", h("a", "Measure the overlap of neighbours", href=link))
    else:
        report = reembed.verify(shown.engine, _identity(binding), sample_size=50, texts=0)
        share = "could not be measured" if report.overlap is None else f"{report.overlap:.0%}"
        yield h("p", f"Overlap of the {report.k} nearest, old and new: ", h("b", share), ".",
                id="overlap")  # fmt: skip
        yield [h("p", note, class_="faint") for note in report.notes]


def _both(shown: Shown, tables: Sequence[Exposed], query: QueryParams) -> Iterator[Any]:
    """One question to the old and the new column, side by side."""
    question = query.get("q", "").strip()
    yield h(
        "form",
        h("input", type="search", name="q", value=question, dir="auto", required=True,
          placeholder="Ask both columns", aria_label="Question"),
        h("button", "Ask"),
    )  # fmt: skip
    if not question:
        return
    yield h(
        "div",
        [list(compared(shown, table, question, {}, only=("meaning",), title=title))
         for table, title in zip(tables, ("old", "new"), strict=True)],
        class_="columns",
    )  # fmt: skip


def health(shown: Shown, diagnose: Callable[[sa.Connection], Iterable[Any]]) -> Iterator[Any]:
    """Columns, failed rows, and what the doctor finds."""
    with shown.connected() as connection:
        columns = status(connection)
        bindings = {str(b): b for b in catalog.all_bindings(connection)}
        failed = {
            c.column: failures(connection, bindings[c.column], limit=FAILED)
            for c in columns
            if c.failed
        }
        findings = list(diagnose(connection))
    yield h("h2", "What the doctor finds")
    if not findings:
        yield h("p", "Nothing.", class_="good")
    yield [
        h("article", h("h3", f.subject, dir="auto"), h("p", f"{f.what}."),
          h("p", f.remedy, class_="command", dir="auto"), class_=f.level)
        for f in findings
    ]  # fmt: skip
    yield h("h2", "Columns")
    heads = ("column", "encoder", "state", "rows", "embedded", "pending", "backfill", "failed",
             "index", "worker")  # fmt: skip
    yield table(heads, ([
        c.column, c.encoder, c.state, _number(c.rows), _number(c.embedded),
        _number(c.pending), _number(c.backfill), _number(c.failed), c.index,
        "never" if c.age is None else f"caught up {c.age:,.0f} s ago",
    ] for c in columns))  # fmt: skip
    for column, rows in failed.items():
        yield h("h2", f"Failed rows of {column}", dir="auto")
        yield table(("key", "attempts", "reason"), ([f.key, f.attempts, f.error] for f in rows))


def _identity(binding: Binding) -> ColumnIdentity:
    return ColumnIdentity(binding.schema, binding.table, binding.column)


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


__all__ = ["changes", "health"]
