"""Verify: is the new column complete, does its index find what exact search finds, is it as good?

Everything is read from one snapshot. Exact neighbours of all sampled rows, under all filters and in
both columns, come from one pass over the table's vectors, which are compared here in blocks: for a
few hundred queries that is many times faster than as many sequential scans by the server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sqlalchemy as sa

from sbert_pg.catalog import tables
from sbert_pg.distance import similarity_matrix
from sbert_pg.errors import EncoderError
from sbert_pg.probes import agreement_of
from sbert_pg.reembedding import measures
from sbert_pg.reembedding.coverage import coverage_of
from sbert_pg.reembedding.measures import Nearest
from sbert_pg.reembedding.pair import Pair, pair_of
from sbert_pg.reembedding.reading import blocks, sample
from sbert_pg.reembedding.report import (
    Coverage,
    IndexRecall,
    Quality,
    TextAgreement,
    Thresholds,
    Verification,
    judge,
)
from sbert_pg.registry import get_encoder
from sbert_pg.search import nearest
from sbert_pg.spec import Vectors
from sbert_pg.types.guard import ColumnIdentity

#: Rows of the new column that are searched for.
SAMPLE = 200
#: Rows whose text is encoded again.
TEXTS = 64
K = 10


@dataclass(frozen=True)
class LabelledQuery:
    """A query with the rows that answer it.

    Attributes:
        text: the query.
        gains: key of each relevant row, as text, with its gain; a JSON array for several columns.
    """

    text: str
    gains: Mapping[str, float]


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
    seed: int = 0,
) -> Verification:
    """Measure a new column, and the one that it replaces beside it.

    Args:
        engine: where.
        column: the new column, or the old one.
        filters: the application's usual criteria, by name, on its own table or as SQL.
        queries: labelled queries.
        thresholds: what has to be reached; ``Thresholds()`` by default.
        k: neighbours compared.
        sample_size: rows to search for.
        texts: rows whose text is encoded again, 0 for none.
        ef_search: as the application searches with; ``nearest``'s default otherwise.
        seed: another seed samples other rows.

    Returns:
        The report; ``report.require()`` raises where a threshold was missed.

    Raises:
        NotBoundError: the column is not bound.
    """
    started = time.perf_counter()
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        pair = pair_of(connection, column)
        measuring = _Measuring(connection, pair, k, ef_search, seed, filters or {})
        found = measuring.report(sample_size, texts, queries)
        connection.rollback()
    old_has_index = pair.old is not None and pair.old.valid_index is not None
    found = replace(found, seconds=time.perf_counter() - started)
    return replace(
        found, failures=judge(found, thresholds or Thresholds(), old_has_index=old_has_index)
    )


class _Measuring:
    """One verification at work."""

    def __init__(
        self,
        connection: sa.Connection,
        pair: Pair,
        k: int,
        ef_search: int | None,
        seed: int,
        filters: Mapping[str, sa.ColumnElement[bool]],
    ) -> None:
        self.connection = connection
        self.pair = pair
        self.k = k
        self.ef_search = ef_search
        self.seed = seed
        self.filters = {name: pair.on_table(each) for name, each in filters.items()}
        self.sides = [pair.new] + ([pair.old] if pair.old is not None else [])
        self.notes: list[str] = []

    def report(
        self, sample_size: int, texts: int, queries: Sequence[LabelledQuery]
    ) -> Verification:
        pair = self.pair
        covered = coverage_of(self.connection, pair.new.binding)
        keys, rows = self._sampled(sample_size, covered)
        labelled = self._encoded(queries)
        exact = _Exact(self, keys, rows, labelled)
        index = pair.new.valid_index
        answers = self._answers(keys, rows[0]) if index is not None else {}
        exact.read({key for found in answers.values() for answer in found for key in answer})
        if index is None:
            self.notes.append("no recall was measured: the new column has no valid index")
        return Verification(
            table=f"{pair.new.binding.schema}.{pair.new.binding.table}",
            old=None if pair.old is None else pair.old.binding.column,
            new=pair.new.binding.column,
            old_encoder=None if pair.old is None else pair.old.spec.name,
            new_encoder=pair.new.spec.name,
            k=self.k,
            coverage=covered,
            index=None if index is None else index.name,
            recalls=tuple(exact.recall(name, found) for name, found in answers.items()),
            agreement=self._agreement(texts, covered),
            overlap=exact.overlap(),
            quality=exact.quality(queries),
            notes=tuple(self.notes),
        )

    def _sampled(self, size: int, covered: Coverage) -> tuple[list[str], list[Vectors]]:
        """Keys of random rows, and their vectors in each column that all of them have."""
        columns = [side.column for side in self.sides]
        found = sample(
            self.connection,
            self.pair.table,
            self.pair.new.binding,
            columns,
            [column.is_not(None) for column in columns],
            size,
            covered.rows,
            self.seed,
        )
        if not found:
            self.notes.append("no row has a vector to search for")
        widths = [side.binding.dimensions for side in self.sides]
        vectors = [
            np.stack([row[i + 1] for row in found])
            if found
            else np.empty((0, width), dtype=np.float32)
            for i, width in enumerate(widths)
        ]
        return [row[0] for row in found], vectors

    def _encoded(self, queries: Sequence[LabelledQuery]) -> list[Vectors | None]:
        """The labelled queries' vectors in each column's space."""
        if not queries:
            return [None for _ in self.sides]
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
        key = self.pair.new.binding.key_text(self.pair.table)
        answers: dict[str | None, list[list[str]]] = {}
        criteria: dict[str | None, list[sa.ColumnElement[bool]]] = {None: []}
        criteria.update({name: [each] for name, each in self.filters.items()})
        for name, where in criteria.items():
            found = []
            for own, vector in zip(keys, vectors, strict=True):
                statement = nearest(
                    self.pair.new.column,
                    vector,
                    limit=self.k + 1,
                    where=where,
                    ef_search=self.ef_search,
                ).with_only_columns(key)
                rows = self.connection.scalars(statement).all()
                found.append([other for other in rows if other != own][: self.k])
            answers[name] = found
        return answers

    def _agreement(self, texts: int, covered: Coverage) -> TextAgreement | None:
        side, pending = self.pair.new, tables.pending
        if not texts:
            return None
        try:
            encoder = get_encoder(side.spec)
        except EncoderError as error:
            self.notes.append(f"no text was encoded again: {error}")
            return None
        table, source = self.pair.table, side.binding.source
        marked = sa.exists().where(
            pending.c.column_id == side.binding.id,
            pending.c.key == side.binding.key_text(table),
        )
        found = sample(
            self.connection,
            table,
            side.binding,
            [side.column, *(table.c[name] for name in source.columns)],
            [side.column.is_not(None), sa.not_(marked)],
            texts,
            covered.rows,
            self.seed + 1,
        )
        if not found:
            return None
        join = source.joiner()
        encoded = encoder.encode_document([join(row[2:]) for row in found])
        stored = np.stack([row[1] for row in found])
        cosines = [
            agreement_of(a[None], b[None]).mean_cosine for a, b in zip(stored, encoded, strict=True)
        ]
        doubtful = [row[0] for row, cosine in zip(found, cosines, strict=True) if cosine < 0.97]
        return TextAgreement(
            rows=len(found),
            mean=float(np.mean(cosines)),
            worst=float(np.min(cosines)),
            doubtful=tuple(doubtful[:20]),
        )


class _Exact:
    """Exact neighbours, from one pass over the vectors of both columns."""

    def __init__(
        self,
        of: _Measuring,
        keys: Sequence[str],
        rows: Sequence[Vectors],
        labelled: Sequence[Vectors | None],
    ) -> None:
        self.of = of
        self.keys = list(keys)
        self.rows = rows
        self.labelled = labelled
        wanted = of.k + 1
        self.by_filter: dict[str | None, Nearest] = {
            name: Nearest(len(keys), wanted) for name in (None, *of.filters)
        }
        self.old = Nearest(len(keys), wanted)
        self.by_query = [
            None if vectors is None else Nearest(len(vectors), of.k) for vectors in labelled
        ]
        self.read_keys: list[str] = []
        self.passing = dict.fromkeys(of.filters, 0)
        self.vectors: dict[str, Vectors] = {}

    def read(self, wanted: set[str]) -> None:
        """Read the table once; keep the vectors of the wanted keys."""
        of = self.of
        columns: list[sa.Column[Any]] = [side.column for side in of.sides]
        first = 0
        for block in blocks(
            of.connection, of.pair.table, of.pair.new.binding, columns, list(of.filters.values())
        ):
            self._take_new(block.vectors[0], block.flags, first)
            if len(of.sides) > 1:
                similarity = of.sides[1].spec.similarity
                scores = similarity_matrix(self.rows[1], block.vectors[1], similarity)
                self.old.add(scores, first, block.present[1])
            for side, vectors, nearest_, stored, present in zip(
                of.sides, self.labelled, self.by_query, block.vectors, block.present, strict=True
            ):
                if vectors is not None and nearest_ is not None:
                    scores = similarity_matrix(vectors, stored, side.spec.similarity)
                    nearest_.add(scores, first, present)
            for position, key in enumerate(block.keys):
                if key in wanted:
                    self.vectors[key] = block.vectors[0][position]
            self.read_keys.extend(block.keys)
            first += len(block.keys)

    def _take_new(self, vectors: Vectors, flags: Sequence[Any], first: int) -> None:
        similarity = self.of.pair.new.spec.similarity
        scores = similarity_matrix(self.rows[0], vectors, similarity)
        self.by_filter[None].add(scores, first)
        for name, flag in zip(self.of.filters, flags, strict=True):
            self.by_filter[name].add(scores, first, flag)
            self.passing[name] += int(flag.sum())

    def recall(self, name: str | None, answers: Sequence[Sequence[str]]) -> IndexRecall:
        """Recall of the index's answers under one filter."""
        similarity = self.of.pair.new.spec.similarity
        exact, values = self.by_filter[name], []
        for i, found in enumerate(answers):
            others = self._others(exact, i)
            nearest_ = exact.similarities[i][others]
            scores: list[float] = []
            known = [self.vectors[key] for key in found if key in self.vectors]
            if known:
                scores = similarity_matrix(self.rows[0][i : i + 1], np.stack(known), similarity)[
                    0
                ].tolist()
            value = measures.recall(scores, nearest_, self.of.k)
            if value is not None:
                values.append(value)
        total = len(self.read_keys)
        share = 1.0 if name is None else self.passing[name] / total if total else 0.0
        return IndexRecall(
            filter=name,
            selectivity=share,
            queries=len(values),
            mean=float(np.mean(values)) if values else 1.0,
            worst=min(values, default=1.0),
        )

    def _others(self, exact: Nearest, i: int) -> Any:
        """The neighbours of sampled row ``i`` without itself, at most ``k``."""
        own = self.keys[i]
        places = exact.positions[i]
        keep = [j for j, p in enumerate(places) if p >= 0 and self.read_keys[int(p)] != own]
        return np.array(keep[: self.of.k], dtype=np.int64)

    def overlap(self) -> float | None:
        """Share of neighbours that both columns' exact answers have in common."""
        if len(self.of.sides) < 2:
            return None
        new = self.by_filter[None]
        return measures.mean(
            [
                measures.overlap(
                    new.positions[i][self._others(new, i)],
                    self.old.positions[i][self._others(self.old, i)],
                )
                for i in range(len(self.keys))
            ]
        )

    def quality(self, queries: Sequence[LabelledQuery]) -> tuple[Quality, ...]:
        """Ranking quality of each column whose encoder was at hand."""
        found, k = [], self.of.k
        for side, exact in zip(self.of.sides, self.by_query, strict=True):
            if exact is None or not queries:
                continue
            ranked = [[self.read_keys[int(p)] for p in row if p >= 0] for row in exact.positions]
            pairs = list(zip(ranked, (query.gains for query in queries), strict=True))
            found.append(
                Quality(
                    column=side.binding.column,
                    encoder=side.spec.name,
                    queries=len(queries),
                    ndcg=float(np.mean([measures.ndcg(r, g, k) for r, g in pairs])),
                    recall=float(np.mean([measures.recall_of(r, g, k) for r, g in pairs])),
                    mrr=float(np.mean([measures.reciprocal_rank(r, g, k) for r, g in pairs])),
                )
            )
        return tuple(found)
