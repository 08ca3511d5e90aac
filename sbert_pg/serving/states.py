"""The pages of states: a running change of encoder, and the health of all columns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

import sqlalchemy as sa
from starlette.datastructures import QueryParams

from sbert_pg import catalog, reembed
from sbert_pg.catalog import Binding
from sbert_pg.catalog.rows import counted
from sbert_pg.freshness.listening import seen_workers
from sbert_pg.freshness.status import ColumnStatus, failures, status
from sbert_pg.reembed.status import change_of, status_of
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.serving.comparing import compared
from sbert_pg.serving.exposed import Exposed, Question, Shown
from sbert_pg.serving.html import h, table

#: Failed rows of a column that are listed.
FAILED = 20
#: Rows up to which a page measures what reads both columns in full.
MEASURED_ROWS = 200_000
#: Questions that a page asks both columns, and those that are listed.
ASKED, CHANGED = 100, 10


class Pace:
    """How long a backfill still takes, from what was to go when a page last saw more of it."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}

    def left(self, column: str, missing: int) -> str:
        """A sentence on the time that is left; nothing where nothing is to go."""
        if missing == 0:
            self._first.pop(column, None)
            return ""
        now = time.monotonic()
        start, most = self._first.setdefault(column, (now, missing))
        if missing > most:
            start, most = self._first[column] = now, missing
        if missing == most:
            return "Reload this page for the time that is left."
        seconds = round(missing * (now - start) / (most - missing))
        return f"About {timedelta(seconds=seconds)} left, at the pace since this page saw {most:,}."


def changes(
    shown: Shown, query: QueryParams, pace: Pace, queries: Sequence[LabelledQuery] = ()
) -> Iterator[Any]:
    """Changes of encoder that are under way; labelled questions are asked of both columns."""
    with shown.connected() as connection:
        new = [b for b in catalog.all_bindings(connection) if b.replaces is not None]
        states = [
            (b, status_of(connection, *change_of(connection, b.identity), whole=False)) for b in new
        ]
        known = {one.column: one for one in status(connection)}
        rows = {str(b): _rows(connection, b, known.get(str(b))) for b in new}
    if not states:
        yield h("p", "No change of encoder is under way.")
        yield h("p", "One begins with ", h("code", "sbert-pg reembed begin"), ".",
                class_="faint")  # fmt: skip
        return
    for binding, state in states:
        yield h("h2", f"{state.table}: {state.old} → {state.new}", dir="auto")
        left = pace.left(str(binding), state.coverage.missing)
        yield _changing(shown, state, binding, known, rows[str(binding)], left, query, queries)


def _changing(
    shown: Shown,
    state: reembed.Status,
    binding: Binding,
    known: Mapping[str, ColumnStatus],
    rows: int | None,
    left: str,
    query: QueryParams,
    queries: Sequence[LabelledQuery],
) -> Iterator[Any]:
    new = known.get(str(binding))
    old = known.get(f"{binding.schema}.{binding.table}.{state.old}")
    if new is not None and old is not None:
        yield h("p", f"{old.encoder} → {new.encoder}", class_="faint", dir="auto")
    yield _progress(state, rows, left)
    bound = {t.bound: t for t in shown.tables().values()}
    pair = [bound[one.column] for one in (old, new) if one is not None and one.column in bound]
    measured = query.get("measure") == str(binding)
    yield _overlap(shown, binding, rows, queries, measured)
    if measured and queries and len(pair) == 2:
        yield _changed(shown, pair, queries[:ASKED])
    if len(pair) == 2:
        yield _both(shown, pair, query)


def _progress(state: reembed.Status, rows: int | None, left: str) -> Iterator[Any]:
    """The steps, what is to go, and the command for the next step."""
    steps = ["begin", "backfill", "verify", "switch", "finish"]
    reached = 1 if state.state != "ready" else 2
    yield h(
        "ol",
        [h("li", step, class_="done" if i < reached else "now" if i == reached else None)
         for i, step in enumerate(steps)],
        class_="steps",
    )  # fmt: skip
    missing = state.coverage.missing
    if rows:
        share = max(0.0, 1 - missing / rows)
        yield h("progress", max="1", value=f"{share:.4f}")
        yield h("p", f"{share:.1%} of about {rows:,} rows; {missing:,} to go.")
    if left:
        yield h("p", left, class_="faint", id="left")
    built = ", ".join(state.new_indexes) or "none yet"
    building = f"; being built: {', '.join(state.building)}" if state.building else ""
    yield h("p", f"Index: {built}{building}.", class_="faint", dir="auto")
    yield h("p", "Next: ", h("code", state.next_step, class_="command", dir="auto"))


def _rows(connection: sa.Connection, binding: Binding, state: ColumnStatus | None) -> int | None:
    """About how many rows a table has; counted where it has no statistics and is small."""
    if state is not None and state.rows is not None:
        return state.rows
    rows = counted(connection, binding.clause(), MEASURED_ROWS + 1)
    return rows if rows <= MEASURED_ROWS else None


def _overlap(
    shown: Shown,
    binding: Binding,
    rows: int | None,
    queries: Sequence[LabelledQuery],
    measured: bool,
) -> Iterator[Any]:
    """Neighbours that both columns have in common and quality, measured where that is asked for."""
    column = str(binding)
    if rows is None or rows > MEASURED_ROWS:
        yield h("p", "Overlap: ", h("code", f"sbert-pg reembed verify {column}"),
                " measures it; it reads both columns in full.", class_="faint")  # fmt: skip
        return
    if not measured:
        link = "/explore/change?" + urlencode({"measure": column})
        yield h("p", h("a", "Measure the overlap of neighbours", href=link))
        return
    report = reembed.verify(
        shown.engine, binding.identity, queries=queries, sample_size=50, texts=0
    )
    share = "could not be measured" if report.overlap is None else f"{report.overlap:.0%}"
    yield h("p", f"Overlap of the {report.k} nearest, old and new: ", h("b", share), ".",
            id="overlap")  # fmt: skip
    if report.quality:
        heads = ("column", "encoder", f"nDCG@{report.k}", f"recall@{report.k}", "MRR")
        yield h("h3", f"On {len(queries):,} labelled questions, exactly")
        yield table(heads, (
            [q.column, q.encoder, f"{q.ndcg:.3f}", f"{q.recall:.3f}", f"{q.mrr:.3f}"]
            for q in reversed(report.quality)
        ))  # fmt: skip
    yield [h("p", note, class_="faint") for note in report.notes]


def _changed(
    shown: Shown, pair: Sequence[Exposed], queries: Sequence[LabelledQuery]
) -> Iterator[Any]:
    """The questions whose answers have the least in common, each a link that asks both columns."""

    def answers(exposed: Exposed) -> list[set[str]]:
        return shown.within(
            exposed.name,
            lambda connection, table: [
                {hit.key for hit in table.hits(connection, Question(one.text))} for one in queries
            ],
        )

    same = [
        (len(old & new), max(len(old), len(new)), one.text)
        for old, new, one in zip(*map(answers, pair), queries, strict=True)
    ]
    same.sort(key=lambda one: one[0] / max(one[1], 1))
    yield h("h3", f"Answers that change most, of {len(queries):,} questions")
    yield h(
        "ol",
        [h("li", h("a", text, href="/explore/change?" + urlencode({"q": text}), dir="auto"),
           h("small", f" {common} of {most} rows in common", class_="faint"))
         for common, most, text in same[:CHANGED]],
        id="changed",
    )  # fmt: skip


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
        columns, workers = status(connection), seen_workers(connection)
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
             "cut texts", "index", "worker")  # fmt: skip
    yield table(heads, ([
        c.column, c.encoder, c.state, _number(c.rows), _number(c.embedded),
        _number(c.pending), _number(c.backfill), _number(c.failed), _number(c.truncated), c.index,
        workers.of(c),
    ] for c in columns))  # fmt: skip
    yield h("p", "Workers: ", str(workers), ".", id="workers", dir="auto")
    for column, rows in failed.items():
        yield h("h2", f"Failed rows of {column}", dir="auto")
        yield table(("key", "attempts", "reason"), ([f.key, f.attempts, f.error] for f in rows))


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
