"""What an encoder is fitted to and judged by, and what is proven of it: questions, split, rows."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.errors import NoGainError, TooFewPairsError
from sbert_pg.search import exact
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.spec import EncoderSpec, Vectors, json_digest
from sbert_pg.tuning.adapters import NEGATIVES, Candidates
from sbert_pg.tuning.evaluation import CONFIDENCE, Figure, grouped_figures
from sbert_pg.tuning.pairs import Split, hard_negatives, of_keys, split_pairs, values_of


class Rows:
    """The rows that questions are ranked against; of more than ``most`` a sample."""

    def __init__(
        self, engine: sa.Engine, base: Any, where: Sequence[sa.ColumnElement[bool]], most: int
    ) -> None:
        self.engine, self.base, self.where, self.most = engine, base, list(where), most
        self.table: sa.Table = base.table
        self.name = f"{self.table.fullname}.{base.name}"
        self.label = catalog_rows.label(list(self.table.primary_key))
        self.total = 0
        #: Keys that a question was labelled with as wrong (a gain of 0), by its text.
        self.wrong: dict[str, list[str]] = {}

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

    def texts(self, keys: Iterable[str]) -> dict[str, str]:
        """What is embedded of each of these rows; rows that have gone are left out."""
        text = sa.func.nullif(self.base.type.source.expression(self.table), "")
        return values_of(self.engine, self.table, text, keys)

    def known(self, queries: Sequence[LabelledQuery]) -> list[LabelledQuery]:
        """The questions, each with those of its answers that are there and have a vector."""
        keys = {key for query in queries for key in query.gains}
        labels, vectors = self.read(catalog_rows.is_one_of(self.label, keys))
        self.digests = {k: v.tobytes() for k, v in zip(labels, vectors, strict=True)}
        self.wrong = {query.text: self._wrong(query) for query in queries}
        kept = [replace(q, gains=gains) for q in queries if (gains := q.answers_in(self.digests))]
        if not kept:
            raise TooFewPairsError(
                f"None of the {len(queries)} labelled questions names a row of {self.name} that "
                "has a vector. Pairs name rows by their primary key."
            )
        return kept

    def _wrong(self, query: LabelledQuery) -> list[str]:
        """What is labelled as no answer, of the rows that are there."""
        return [key for key, gain in query.gains.items() if gain == 0 and key in self.digests]

    def negatives(self, queries: Sequence[LabelledQuery]) -> list[list[str]]:
        """Of each question the rows that are labelled as wrong, then those that are near it."""
        near = hard_negatives(self.engine, self.base, queries, count=NEGATIVES, where=self.where)
        both = ([*self.wrong.get(q.text, ()), *keys] for q, keys in zip(queries, near, strict=True))
        return [list(dict.fromkeys(keys))[:NEGATIVES] for keys in both]

    def candidates(self, negatives: set[str], seed: int) -> Candidates:
        """All rows; of many a sample, with the labelled ones and some others."""
        count = sa.select(sa.func.count()).where(self.base.is_not(None), *self.where)
        with self.engine.connect() as connection:
            self.total = connection.execute(count).scalar_one()
        chosen = []
        if self.total > self.most:
            labelled = catalog_rows.is_one_of(self.label, negatives | set(self.digests))
            drawn = catalog_rows.drawn(self.label, self.most, self.total, seed)
            chosen = [sa.or_(drawn, labelled)]
        keys, vectors = self.read(*chosen)
        # In an order that does not depend on how the table lies on the disk.
        order = sorted(range(len(keys)), key=keys.__getitem__)
        similarity = self.base.type.encoder.similarity
        return Candidates([keys[i] for i in order], vectors[order], similarity)

    def split(
        self,
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
            values = of_keys(self.engine, self.table, name, queries)
            return [{key: values[key] for key in q.gains if key in values} for q in queries]

        same: list[Mapping[str, Any]] = [self.digests]
        if document is not None:
            same.append({key: value for of_one in said(document) for key, value in of_one.items()})
        times = None if time is None else [max(v.values(), default=None) for v in said(time)]
        return split_pairs(queries, same, times, held_out=held_out, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """A fitted encoder, and what was proven of it; printed, a report.

    Attributes:
        spec: the new encoder as a class would declare it, named by its directory.
        side: ``"query"`` where documents keep their vectors, so that the column accepts the
            encoder; ``"both"`` where it takes its own column.
        rows: rows that these were ranked against, of ``total``.
        compared: the encoder that it is compared with: the column's, for ``distill`` the student.
        settings: of the method; for a matrix those that cross-validation chose.
    """

    column: str
    spec: EncoderSpec
    method: str
    side: str
    split: str
    learning: int
    held_out: int
    rows: int
    total: int
    k: int
    compared: str
    before: Figure
    after: Figure
    gain: Figure
    settings: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)
    pairs: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"spec": self.spec.to_json()}

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return "\n".join(
            [
                f"{self.column}: {self.method} ({settings}), {self.seconds:.1f} s",
                f"  learned from {self.learning} questions",
                f"  {self.judged_by}",
                f"  nDCG@{self.k} {self.before} before ({self.compared}), {self.after} after",
                f"  gain {self.gain:+}",
                *(f"  {name}: {value}" for name, value in self.notes.items()),
                f"  written to {self.spec.name}; the questions kept back to {self.pairs}",
            ]
        )

    @property
    def judged_by(self) -> str:
        """By how many questions it was judged, and among how many rows."""
        of = "" if self.rows == self.total else f" of {self.total:,}"
        return (
            f"judged by {self.held_out} questions kept back by {self.split}, among "
            f"{self.rows:,}{of} rows"
        )

    def require_gain(self, hint: str = "") -> None:
        """Refuse an encoder of which nothing is proven; ``hint`` is what else is known."""
        if self.gain.low > 0:
            return
        raise NoGainError(
            f"{self.method} does not make {self.compared!r} better for {self.column}: "
            f"nDCG@{self.k} {self.before} before, {self.after} after, gain {self.gain:+}, an "
            f"interval of {CONFIDENCE:.0%} that includes zero or lies below; {self.judged_by}. "
            f"{hint}Nothing was written. Label more questions, try another method, or compare "
            "other encoders and the words arm by 'sbert-pg evaluate'."
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """Questions to learn from and to be judged by; ``before`` is nDCG with the column's encoder."""

    rows: Rows
    encoder: Any
    place: Path
    queries: Sequence[LabelledQuery]
    split: Split
    candidates: Candidates
    wrong: Sequence[Sequence[str]]
    asked: Vectors
    k: int
    seed: int
    before: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        own = self.asked[self.split.held_out]
        object.__setattr__(self, "before", self.candidates.ndcg(own, self.judged, self.k))

    @property
    def learning(self) -> list[LabelledQuery]:
        """The questions that are learned from."""
        return [self.queries[i] for i in self.split.learning]

    @property
    def judged(self) -> list[LabelledQuery]:
        """The questions kept back."""
        return [self.queries[i] for i in self.split.held_out]

    def figures(
        self, before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]
    ) -> list[Figure]:
        """Means and intervals of two lists of nDCG of the questions kept back, and of the gain."""
        values = np.stack([before, after, after - before], axis=1)
        return grouped_figures(values, self.split.groups[self.split.held_out], self.seed)

    def proof(
        self,
        encoder: EncoderSpec,
        before: npt.NDArray[np.float64],
        after: npt.NDArray[np.float64],
        **facts: Any,
    ) -> Tuning:
        """What nDCG of the questions kept back, before and after, says of a fitted encoder."""
        was, is_, gain = self.figures(before, after)
        return Tuning(
            column=self.rows.name,
            spec=EncoderSpec(
                name=str(self.place), dimensions=encoder.dimensions, similarity=encoder.similarity
            ),
            split=self.split.by,
            learning=len(self.split.learning),
            held_out=len(self.split.held_out),
            rows=len(self.candidates.keys),
            total=self.rows.total,
            k=self.k,
            before=was,
            after=is_,
            gain=gain,
            **facts,
        )

    def record(self, tuning: Tuning, examples: int) -> dict[str, Any]:
        """How an encoder came about, for its manifest: digests of texts and no text."""
        spec, rows = self.encoder.spec, hashlib.sha256(self.candidates.vectors.tobytes())
        rows.update(json.dumps(list(self.candidates.keys)).encode())
        return {
            "method": tuning.method,
            "side": tuning.side,
            "base": {"name": spec.name, "fingerprint": spec.fingerprint},
            "compared_with": tuning.compared,
            "column": tuning.column,
            "source": self.rows.base.type.source.to_json(),
            "settings": dict(tuning.settings),
            "seed": self.seed,
            "split": {"by": self.split.by, "groups": int(self.split.groups.max()) + 1},
            "learned_from": {
                "questions": len(self.learning),
                "digest": _digest(self.learning),
                "examples": examples,
            },
            "kept_back": {"questions": len(self.judged), "digest": _digest(self.judged)},
            "rows": {"ranked": tuning.rows, "all": tuning.total, "digest": rows.hexdigest()[:32]},
            f"ndcg@{self.k}": {
                name: asdict(getattr(tuning, name)) for name in ("before", "after", "gain")
            },
            "notes": dict(tuning.notes),
            "versions": {
                "sbert-pg": version("sbert-pg"),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }


def _digest(queries: Sequence[LabelledQuery]) -> str:
    """SHA-256 of questions and their answers, 32 hexadecimal digits, in whatever order they are."""
    return json_digest(sorted([q.text, sorted(q.gains.items())] for q in queries))[:32]
