"""``tune``: an encoder fitted to labelled questions, written only where it is proven to be better.

What is proven is the gain of nDCG@k on questions that were kept back, against all rows. Its
interval is by bootstrap over groups of questions that share a document (Davison and Hinkley, 1997,
section 3.8), since these are right or wrong together.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time as clock
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import DeclarationError, NoGainError, TooFewPairsError
from sbert_pg.registry import get_encoder
from sbert_pg.search import exact
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.spec import EncoderSpec, Vectors, json_digest
from sbert_pg.tuning.adapters import (
    NEGATIVES,
    PARTS,
    Candidates,
    Learned,
    Method,
    apply,
    examples_of,
    learn,
)
from sbert_pg.tuning.evaluation import CONFIDENCE, Figure, grouped_figures
from sbert_pg.tuning.files import pairs_of, write_queries
from sbert_pg.tuning.pairs import HELD_OUT, Split, hard_negatives, of_keys, split_pairs
from sbert_pg.types.comparator import base_of, clause_of

#: Rows that questions are ranked against; of a larger table a sample, labelled rows in any case.
MOST_ROWS = 50_000
#: Questions that are used; more of them say nothing new about a matrix.
MOST_QUESTIONS = 20_000
#: What a matrix for queries can learn to please: the length of a query plays no part in these.
_SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """A fitted encoder, and what was proven of it; printed, a report.

    Attributes:
        column: the column, ``table.column``.
        spec: the new encoder as a class would declare it, named by its directory.
        method: how it was fitted.
        split: what the questions were split by, ``"document"`` or ``"document and time"``.
        learning: questions that were learned from.
        held_out: questions that it was judged on.
        rows: rows that these were ranked against, of ``total``.
        total: rows of the table with a vector.
        k: rows of an answer that count.
        before: nDCG@k of the column's encoder on the questions kept back.
        after: nDCG@k of the new one.
        gain: the difference.
        settings: the settings that cross-validation chose.
        pairs: the file of the questions kept back, for ``evaluate`` and ``verify``.
        seconds: time that it took.
    """

    column: str
    spec: EncoderSpec
    method: str
    split: str
    learning: int
    held_out: int
    rows: int
    total: int
    k: int
    before: Figure
    after: Figure
    gain: Figure
    settings: Mapping[str, float]
    pairs: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"spec": self.spec.to_json()}

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value:g}" for name, value in self.settings.items())
        return "\n".join(
            [
                f"{self.column}: {self.method} ({settings}), {self.seconds:.1f} s",
                f"  learned from {self.learning} questions",
                f"  {_judged(self.held_out, self.split, self.rows, self.total)}",
                f"  nDCG@{self.k} {self.before} before, {self.after} after",
                f"  gain {self.gain:+}",
                f"  written to {self.spec.name}; the questions kept back to {self.pairs}",
            ]
        )


def _judged(held_out: int, split: str, rows: int, total: int) -> str:
    among = f"{rows:,} rows" if rows == total else f"{rows:,} of {total:,} rows"
    return f"judged by {held_out} questions kept back by {split}, among {among}"


def tune(
    engine: sa.Engine,
    column: Any,
    pairs: Any,
    *,
    out: Path | str,
    method: Method = "linear",
    where: Sequence[sa.ColumnElement[bool]] = (),
    document: str | None = None,
    time: str | None = None,
    held_out: float = HELD_OUT,
    k: int = 10,
    seed: int = 0,
) -> Tuning:
    """Fit a column's encoder to labelled questions, on the side of queries alone.

    Documents keep their vectors, so the column accepts the new encoder as it is. The same
    questions, rows and seed give the same encoder. Nothing is written unless the gain on questions
    kept back is above zero with 95 % confidence.

    Args:
        engine: where; nothing is changed there.
        column: the embedding column; its encoder is loaded.
        pairs: labelled questions, as for ``evaluate``; ``own_pairs`` takes them from the table.
        out: the new encoder's directory, which must not exist. The questions kept back are written
            beside it, as ``<out>-held-out.jsonl``.
        method: ``"linear"`` (a ridge regression, seconds) or ``"contrastive"`` (gradient steps).
        where: criteria of the rows that questions are ranked against.
        document: an attribute of the pairs, or a column of the table, that says which document a
            row is a part of: rows of one document stay on one side of the split.
        time: an attribute of the pairs, or a column of the table, with the time by which questions
            are split: the latest are kept back.
        held_out: share of the questions to keep back.
        k: rows of an answer that count.
        seed: of the split and of the order of learning.

    Raises:
        NoGainError: the interval of the gain includes zero.
        TooFewPairsError: there are too few questions or documents to learn and to judge by.
        DeclarationError: the column has no encoder that can be fitted, or the directory exists.
        LoadError: the pairs are not readable, or there are none.
    """
    from sbert_pg.encoder.adapting import adapt_queries, refuse_taken

    started = clock.perf_counter()
    place = Path(out)
    refuse_taken(place)
    table = _Table(engine, base_of(clause_of(column)), list(where))
    encoder = _fitting_encoder(table.base)
    queries = table.known(pairs_of(engine, pairs))
    if len(queries) > MOST_QUESTIONS:
        drawn = np.random.default_rng(seed).choice(len(queries), MOST_QUESTIONS, replace=False)
        queries = [queries[i] for i in np.sort(drawn)]
    split = _split(table, queries, document, time, held_out, seed)
    proof = _prove(table, encoder, queries, split, method, k, seed)
    if proof.gain.low <= 0:
        raise NoGainError(_refusal(table, encoder, proof))
    beside = place.with_name(f"{place.name}-held-out.jsonl")
    adapt_queries(encoder, proof.learned.matrix, place, training=_record(table, encoder, proof))
    write_queries(beside, proof.judged)
    spec = encoder.spec
    return Tuning(
        column=table.name,
        spec=EncoderSpec(name=str(place), dimensions=spec.dimensions, similarity=spec.similarity),
        method=method,
        split=split.by,
        learning=len(split.learning),
        held_out=len(split.held_out),
        rows=len(proof.candidates.keys),
        total=table.total,
        k=k,
        before=proof.before,
        after=proof.after,
        gain=proof.gain,
        settings=proof.learned.settings,
        pairs=str(beside),
        seconds=clock.perf_counter() - started,
    )


def _fitting_encoder(base: Any) -> Any:
    """The encoder of a column, where a matrix can be fitted to it.

    Raises:
        DeclarationError: it cannot; the message says why.
    """
    from sbert_pg.encoder import Encoder

    if not isinstance(getattr(base, "type", None), Embedding):
        raise DeclarationError(f"tune() was given {base!r}, which is no embedding column.")
    encoder = get_encoder(base.type.encoder)
    if not isinstance(encoder, Encoder):
        raise DeclarationError(
            f"The encoder of {base} is a {type(encoder).__name__}; only a converted one "
            "(Encoder.load) has a graph that a matrix can be folded into."
        )
    if encoder.spec.similarity not in _SIMILARITIES:
        raise DeclarationError(
            f"{encoder!r} compares by {encoder.spec.similarity!r}; a matrix is fitted to "
            f"{' or '.join(_SIMILARITIES)} only."
        )
    return encoder


class _Table:
    """The rows that questions are ranked against: their keys and vectors.

    Args:
        base: the embedding column.
        where: criteria of the rows.
    """

    def __init__(self, engine: sa.Engine, base: Any, where: list[Any]) -> None:
        self.engine, self.base, self.where = engine, base, where
        self.table: sa.Table = base.table
        self.name = f"{self.table.fullname}.{base.name}"
        self.label = catalog_rows.label(list(self.table.primary_key))
        self.total = 0

    def read(self, *chosen: sa.ColumnElement[bool]) -> tuple[list[str], Vectors]:
        """Keys and vectors of the rows that meet the criteria and these."""
        where = sa.and_(self.base.is_not(None), *self.where, *chosen)
        keys: list[str] = []
        vectors = [np.empty((0, self.base.type.encoder.dimensions), np.float32)]
        with self.engine.connect() as connection:
            for block in exact.blocks(connection, self.label, [self.base], where):
                keys += block.labels
                vectors += block.vectors
        return keys, np.concatenate(vectors)

    def among(self, keys: Iterable[str]) -> sa.ColumnElement[bool]:
        """Whether a row is one of these."""
        array = sa.cast(sa.literal(sorted(keys), ARRAY(sa.Text)), ARRAY(sa.Text))
        return self.label == sa.any_(array)

    def known(self, queries: Sequence[LabelledQuery]) -> list[LabelledQuery]:
        """The questions, each with those of its answers that are there and have a vector.

        Raises:
            TooFewPairsError: no question has one.
        """
        labels, vectors = self.read(self.among({key for query in queries for key in query.gains}))
        self.digests = {k: v.tobytes() for k, v in zip(labels, vectors, strict=True)}
        kept = []
        for query in queries:
            gains = {key: g for key, g in query.gains.items() if g > 0 and key in self.digests}
            if gains:
                kept.append(replace(query, gains=gains))
        if not kept:
            raise TooFewPairsError(
                f"None of the {len(queries)} labelled questions names a row of {self.name} that "
                "has a vector. Pairs name rows by their primary key."
            )
        return kept

    def candidates(self, wanted: set[str], seed: int) -> Candidates:
        """All rows; of many a sample, with the labelled ones and some others."""
        count = sa.select(sa.func.count()).where(self.base.is_not(None), *self.where)
        with self.engine.connect() as connection:
            self.total = connection.execute(count).scalar_one()
        chosen = []
        if self.total > MOST_ROWS:
            drawn = sa.func.abs(sa.func.hashtextextended(self.label, seed) % self.total) < MOST_ROWS
            chosen = [sa.or_(drawn, self.among(wanted | set(self.digests)))]
        keys, vectors = self.read(*chosen)
        # In an order that does not depend on how the table lies on the disk.
        order = sorted(range(len(keys)), key=keys.__getitem__)
        similarity = self.base.type.encoder.similarity
        return Candidates([keys[i] for i in order], vectors[order], similarity)


def _split(
    table: _Table,
    queries: Sequence[LabelledQuery],
    document: str | None,
    time: str | None,
    held_out: float,
    seed: int,
) -> Split:
    """The split by document, and by time where that is asked for."""

    def said(name: str) -> list[dict[str, str]]:
        """What an attribute of each question, else a column of its rows, says."""
        if any(name in query.attributes for query in queries):
            return [dict.fromkeys(q.gains, q.attributes.get(name, "")) for q in queries]
        values = of_keys(table.engine, table.table, name, queries)
        return [{key: values[key] for key in q.gains if key in values} for q in queries]

    same: list[Mapping[str, Any]] = [table.digests]
    if document is not None:
        same.append({key: value for of_one in said(document) for key, value in of_one.items()})
    times = None if time is None else [max(v.values(), default=None) for v in said(time)]
    return split_pairs(queries, same, times, held_out=held_out, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Proof:
    """What was learned, and how it does on the questions kept back."""

    method: str
    learned: Learned
    split: Split
    learning: list[LabelledQuery]
    judged: list[LabelledQuery]
    candidates: Candidates
    before: Figure
    after: Figure
    gain: Figure
    k: int
    seed: int


def _prove(
    table: _Table,
    encoder: Any,
    queries: Sequence[LabelledQuery],
    split: Split,
    method: Method,
    k: int,
    seed: int,
) -> _Proof:
    asked = encoder.encode_query([query.text for query in queries])
    learning = [queries[i] for i in split.learning]
    judged = [queries[i] for i in split.held_out]
    wrong = hard_negatives(table.engine, table.base, learning, count=NEGATIVES, where=table.where)
    candidates = table.candidates({key for keys in wrong for key in keys}, seed)
    parts = split.parts(PARTS, seed)
    examples = examples_of(candidates, learning, asked[split.learning], wrong, parts)
    learned = learn(method, examples, candidates, k=k, seed=seed)
    own = asked[split.held_out]
    before = candidates.ndcg(own, judged, k)
    after = candidates.ndcg(apply(learned.matrix, own), judged, k)
    values = np.stack([before, after, after - before], axis=1)
    figures = grouped_figures(values, split.groups[split.held_out], seed)
    return _Proof(
        method=method,
        learned=learned,
        split=split,
        learning=learning,
        judged=judged,
        candidates=candidates,
        before=figures[0],
        after=figures[1],
        gain=figures[2],
        k=k,
        seed=seed,
    )


def _refusal(table: _Table, encoder: Any, proof: _Proof) -> str:
    promised, plain = proof.learned.validation
    judged = _judged(len(proof.judged), proof.split.by, len(proof.candidates.keys), table.total)
    return (
        f"{proof.method} does not make {encoder.spec.name!r} better for {table.name}: "
        f"nDCG@{proof.k} {proof.before} before, {proof.after} after, gain {proof.gain:+}, an "
        f"interval of {CONFIDENCE:.0%} that includes zero or lies below; {judged}. By "
        f"cross-validation {plain:.3f} became {promised:.3f}. Nothing was written. Label more "
        "questions, try another method, or compare other encoders and the words arm by 'sbert-pg "
        "evaluate'."
    )


def _record(table: _Table, encoder: Any, proof: _Proof) -> dict[str, Any]:
    """How an encoder came about, for its manifest: digests of texts and no text."""
    split, rows = proof.split, proof.candidates
    content = hashlib.sha256(rows.vectors.tobytes())
    content.update(json.dumps(list(rows.keys)).encode())
    figures = {"before": proof.before, "after": proof.after, "gain": proof.gain}
    return {
        "method": proof.method,
        "side": "query",
        "base": {"name": encoder.spec.name, "fingerprint": encoder.spec.fingerprint},
        "column": table.name,
        "source": table.base.type.source.to_json(),
        "settings": proof.learned.settings,
        "seed": proof.seed,
        "split": {"by": split.by, "groups": int(split.groups.max()) + 1},
        "learned_from": {"questions": len(proof.learning), "digest": _digest(proof.learning)},
        "kept_back": {"questions": len(proof.judged), "digest": _digest(proof.judged)},
        "rows": {"ranked": len(rows.keys), "all": table.total, "digest": content.hexdigest()[:32]},
        f"ndcg@{proof.k}": {name: asdict(figure) for name, figure in figures.items()},
        "versions": {
            "sbert-pg": version("sbert-pg"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _digest(queries: Sequence[LabelledQuery]) -> str:
    """SHA-256 of questions and their answers, 32 hexadecimal digits, in whatever order they are."""
    return json_digest(sorted([q.text, sorted(q.gains.items())] for q in queries))[:32]


__all__ = ["Tuning", "tune"]
