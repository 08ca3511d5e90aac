"""Verify: is the new column complete, does its index find what exact search finds, is it as good?

Everything is read from one snapshot, with the session's time-outs set aside. Exact neighbours of
all sampled rows, under all filters and in both columns, come from one pass over the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import sqlalchemy as sa

from sbert_pg.catalog import rows
from sbert_pg.distance import similarity_matrix
from sbert_pg.errors import EncoderError
from sbert_pg.freshness.audit import Comparison, compare_rows
from sbert_pg.freshness.queue import coverage_of
from sbert_pg.reembed.change import Pair, Side, pair_of
from sbert_pg.reembed.report import IndexRecall, Quality, Thresholds, Verification, judge
from sbert_pg.registry import get_encoder
from sbert_pg.search import exact, nearest
from sbert_pg.search.exact import LabelledQuery, Nearest
from sbert_pg.spec import Vectors
from sbert_pg.system import ColumnIdentity, set_timeouts_aside

#: Rows of the new column that are searched for.
SAMPLE = 200
#: Rows whose text is encoded again.
TEXTS = 64
K = 10


def verify(
    engine: sa.Engine,
    column: ColumnIdentity,
    *,
    filters: Mapping[str, sa.ColumnElement[bool]] | None = None,
    queries: Sequence[LabelledQuery] = (),
    thresholds: Thresholds | None = None,
    k: int = K,
    sample_size: int = SAMPLE,
    texts: int = TEXTS,
    ef_search: int | None = None,
) -> Verification:
    """Measure a new column, and the one that it replaces beside it.

    Args:
        column: the new column, or the old one.
        filters: the application's usual criteria, by name, on its own table or as SQL.
        queries: labelled queries.
        thresholds: what has to be reached; ``Thresholds()`` by default.
        k: neighbours compared.
        sample_size: rows to search for.
        texts: rows whose text is encoded again, 0 for none.
        ef_search: as the application searches with; ``nearest``'s default otherwise.

    Returns:
        The report; ``report.require()`` raises where a threshold was missed.

    Raises:
        NotBoundError: the column is not bound.
        LoadError: no row that the labelled queries name is in the table.
    """
    started = time.perf_counter()
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        set_timeouts_aside(connection)
        pair = pair_of(connection, column)
        moved = {name: pair.on_table(each) for name, each in (filters or {}).items()}
        measuring = _Measuring(connection, pair, k, ef_search, moved)
        report = measuring.report(sample_size, texts, queries)
    old_has_index = pair.old is not None and pair.old.valid_index is not None
    report = replace(report, seconds=time.perf_counter() - started)
    missed = judge(report, thresholds or Thresholds(), old_has_index=old_has_index)
    return replace(report, failures=missed)


@dataclass
class _Measuring:
    """One verification at work; its filters are those of the table as it was reflected."""

    connection: sa.Connection
    pair: Pair
    k: int
    ef_search: int | None
    filters: Mapping[str, sa.ColumnElement[bool]]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        new, old = self.pair.new, self.pair.old
        self.sides = [new] if old is None else [new, old]
        self.label = rows.label([self.pair.table.c[name] for name in new.binding.key_columns])

    def report(
        self, sample_size: int, texts: int, queries: Sequence[LabelledQuery]
    ) -> Verification:
        pair = self.pair
        keys, vectors = self._sampled(sample_size)
        exact_ = _Exact(self, keys, vectors, self._encoded(queries))
        index = pair.new.valid_index
        answers = self._answers(keys, vectors[0]) if index is not None else {}
        exact_.read({key for lists in answers.values() for answer in lists for key in answer})
        if index is None:
            self.notes.append("no recall was measured: the new column has no valid index")
        return Verification(
            table=f"{pair.new.binding.schema}.{pair.new.binding.table}",
            old=None if pair.old is None else pair.old.binding.column,
            new=pair.new.binding.column,
            old_encoder=None if pair.old is None else pair.old.spec.name,
            new_encoder=pair.new.spec.name,
            k=self.k,
            coverage=coverage_of(self.connection, pair.new.binding),
            index=None if index is None else index.name,
            recalls=tuple(exact_.recall(name, lists) for name, lists in answers.items()),
            agreement=self._agreement(texts),
            overlap=exact_.overlap(),
            quality=exact_.quality(queries),
            notes=tuple(self.notes),
        )

    def proven(self, side: Side) -> sa.ColumnElement[bool]:
        """Rows that a search of this column can find."""
        return side.binding.is_proven(self.pair.table)

    def _sampled(self, size: int) -> tuple[list[str], list[Vectors]]:
        """Labels of random rows, and their vectors in each column that all of them have."""
        drawn = rows.sample(
            self.connection,
            self.pair.table,
            self.pair.new.binding.key_columns,
            [self.label, *(side.column for side in self.sides)],
            where=[self.proven(side) for side in self.sides],
            size=size,
        )
        if not drawn:
            self.notes.append("no row has a vector to search for")
        vectors = [
            np.stack([row[i + 1] for row in drawn])
            if drawn
            else np.empty((0, side.binding.dimensions), dtype=np.float32)
            for i, side in enumerate(self.sides)
        ]
        return [row[0] for row in drawn], vectors

    def _encoded(self, queries: Sequence[LabelledQuery]) -> list[Vectors | None]:
        if not queries:
            return [None for _ in self.sides]
        rows.require_one_of(self.connection, self.label, {k for q in queries for k in q.gains})
        encoded: list[Vectors | None] = []
        for side in self.sides:
            try:
                encoder = get_encoder(side.spec)
                encoded.append(encoder.encode_query([query.text for query in queries]))
            except EncoderError as error:
                encoded.append(None)
                self.notes.append(f"no quality was measured for {side.binding.column}: {error}")
        return encoded

    def _answers(self, keys: Sequence[str], vectors: Vectors) -> dict[str | None, list[list[str]]]:
        """Keys that the new column's index finds for each sampled row, under each filter."""
        answers: dict[str | None, list[list[str]]] = {}
        criteria: dict[str | None, list[sa.ColumnElement[bool]]] = {None: []}
        criteria.update({name: [each] for name, each in self.filters.items()})
        for name, where in criteria.items():
            lists = []
            for own, vector in zip(keys, vectors, strict=True):
                statement = nearest(
                    self.pair.new.column,
                    vector,
                    limit=self.k + 1,
                    where=where,
                    ef_search=self.ef_search,
                ).with_only_columns(self.label)
                others = [other for other in self.connection.scalars(statement) if other != own]
                lists.append(others[: self.k])
            answers[name] = lists
        return answers

    def _agreement(self, texts: int) -> Comparison | None:
        side = self.pair.new
        if not texts:
            return None
        try:
            encoder = get_encoder(side.spec)
        except EncoderError as error:
            self.notes.append(f"no text was encoded again: {error}")
            return None
        comparison = compare_rows(self.connection, side.binding, encoder, size=texts, seed=1)
        return comparison if comparison.rows else None


class _Exact:
    """Exact neighbours, from one pass over the vectors of both columns."""

    def __init__(
        self,
        of: _Measuring,
        keys: Sequence[str],
        sampled: Sequence[Vectors],
        labelled: Sequence[Vectors | None],
    ) -> None:
        self.of = of
        self.keys = list(keys)
        self.sampled = sampled
        self.labelled = labelled
        size = of.k + 1  # each row finds itself as well
        self.by_filter: dict[str | None, Nearest] = {
            name: Nearest(len(keys), size) for name in (None, *of.filters)
        }
        self.old = Nearest(len(keys), size)
        self.by_query = [
            None if vectors is None else Nearest(len(vectors), of.k) for vectors in labelled
        ]
        self.read_labels: list[str] = []
        self.passing = dict.fromkeys(of.filters, 0)
        self.vectors: dict[str, Vectors] = {}

    def _keep(self, block: exact.Block, kept: set[str]) -> None:
        for label, vector in zip(block.labels, block.vectors[0], strict=True):
            if label in kept:
                self.vectors[label] = vector

    def read(self, kept: set[str]) -> None:
        """Read the table once; keep the vectors of some keys."""
        of, first = self.of, 0
        findable = [of.proven(side) for side in of.sides]
        for block in exact.blocks(
            of.connection,
            of.label,
            [side.column for side in of.sides],
            sa.or_(*findable),
            [*findable, *of.filters.values()],
        ):
            proven, filters = block.flags[: len(of.sides)], block.flags[len(of.sides) :]
            scores = self._scores(0, self.sampled[0], block)
            self.by_filter[None].add(scores, first, proven[0])
            for name, flag in zip(of.filters, filters, strict=True):
                self.by_filter[name].add(scores, first, flag & proven[0])
                self.passing[name] += int(flag.sum())
            if len(of.sides) > 1:
                self.old.add(self._scores(1, self.sampled[1], block), first, proven[1])
            for i, (vectors, best) in enumerate(zip(self.labelled, self.by_query, strict=True)):
                if vectors is not None and best is not None:
                    best.add(self._scores(i, vectors, block), first, proven[i])
            self._keep(block, kept)
            self.read_labels.extend(block.labels)
            first += len(block.labels)

    def _scores(self, side: int, vectors: Vectors, block: exact.Block) -> exact.Floats:
        similarity = self.of.sides[side].spec.similarity
        return similarity_matrix(vectors, block.vectors[side], similarity)

    def recall(self, name: str | None, answers: Sequence[Sequence[str]]) -> IndexRecall:
        """Recall of the index's answers under one filter."""
        similarity = self.of.pair.new.spec.similarity
        best, values = self.by_filter[name], []
        for i, answer in enumerate(answers):
            others = self._others(best, i)
            nearest_ = best.similarities[i][others]
            scores: list[float] = []
            known = [self.vectors[key] for key in answer if key in self.vectors]
            if known:
                scores = similarity_matrix(self.sampled[0][i : i + 1], np.stack(known), similarity)[
                    0
                ].tolist()
            value = exact.recall(scores, nearest_, self.of.k)
            if value is not None:
                values.append(value)
        total = len(self.read_labels)
        share = 1.0 if name is None else self.passing[name] / total if total else 0.0
        return IndexRecall(
            filter=name,
            selectivity=share,
            queries=len(values),
            mean=float(np.mean(values)) if values else 1.0,
            worst=min(values, default=1.0),
        )

    def _others(self, best: Nearest, i: int) -> Any:
        """The neighbours of sampled row ``i`` without itself, at most ``k``."""
        own = self.keys[i]
        places = best.positions[i]
        keep = [j for j, p in enumerate(places) if p >= 0 and self.read_labels[int(p)] != own]
        return np.array(keep[: self.of.k], dtype=np.int64)

    def overlap(self) -> float | None:
        """Share of neighbours that both columns' exact answers have in common."""
        if len(self.of.sides) < 2:
            return None
        new = self.by_filter[None]
        return exact.mean(
            [
                exact.overlap(
                    new.positions[i][self._others(new, i)],
                    self.old.positions[i][self._others(self.old, i)],
                )
                for i in range(len(self.keys))
            ]
        )

    def quality(self, queries: Sequence[LabelledQuery]) -> tuple[Quality, ...]:
        """Ranking quality of each column whose encoder was at hand."""
        sides = zip(self.of.sides, self.by_query, strict=True)
        return tuple(
            self._quality(side, best, queries)
            for side, best in sides
            if best is not None and queries
        )

    def _quality(self, side: Side, best: Nearest, queries: Sequence[LabelledQuery]) -> Quality:
        ranked = [[self.read_labels[int(p)] for p in row if p >= 0] for row in best.positions]
        pairs = list(zip(ranked, (query.gains for query in queries), strict=True))

        def mean(measure: Callable[[Sequence[str], Mapping[str, float], int], float]) -> float:
            return float(np.mean([measure(rows, gains, self.of.k) for rows, gains in pairs]))

        return Quality(
            column=side.binding.column,
            encoder=side.spec.name,
            queries=len(queries),
            ndcg=mean(exact.ndcg),
            recall=mean(exact.recall_of),
            mrr=mean(exact.reciprocal_rank),
        )
