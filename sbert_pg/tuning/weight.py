"""``fit_weight``: the weight of meaning in ``hybrid``, learnt from labelled questions.

Both arms are asked once for each question; every weight is then tried here. What is found on some
questions is judged on others: a weight is advised only where it does better than the default on
questions that it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.search import exact, hybrid
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.search.fusion import DEPTH
from sbert_pg.tuning.files import pairs_of
from sbert_pg.tuning.searches import by_question, encode_together, in_batches

#: Parts that the questions are split into; each is judged by the weight of the others.
FOLDS = 5
WEIGHTS = tuple(round(i / 20, 2) for i in range(21))


@dataclass(frozen=True, slots=True)
class FittedWeight:
    """The weight that labelled questions ask for; printed, it is the curve of nDCG@k.

    ``weight`` is ``None`` where the default, which follows the question, does as well on questions
    that the weight was not fitted on; ``best`` is the best fixed one on all.
    """

    weight: float | None
    best: float
    questions: int
    k: int
    curve: dict[float, float]
    default: float
    held_out: float

    def __str__(self) -> str:
        low, high = min(self.curve.values()), max(self.curve.values())
        lines = [f"weight  nDCG@{self.k}  ({self.questions} questions)"]
        for weight, value in self.curve.items():
            bar = "#" * (1 + round(30 * (value - low) / ((high - low) or 1)))
            mark = "  <- best" if weight == self.best else ""
            lines.append(f"  {weight:.2f}    {value:.4f}  {bar}{mark}")
        lines.append(f"default   {self.default:.4f}  (follows the question)")
        lines.append(f"held out  {self.held_out:.4f}  (fitted weights, on other questions)")
        advice = "leave the default" if self.weight is None else f"weight={self.weight:g}"
        return "\n".join([*lines, f"advice    {advice}"])


def fit_weight(
    engine: sa.Engine,
    column: Any,
    words: Any,
    pairs: Any,
    *,
    where: Sequence[sa.ColumnElement[bool]] = (),
    k: int = 10,
    weights: Sequence[float] = WEIGHTS,
    language: str | None = None,
) -> FittedWeight:
    """Fit ``hybrid``'s weight to labelled questions.

    Args:
        column: an embedding column.
        words: a text column of the same class or table.
        pairs: labelled questions, as for ``evaluate``. Fifty or more of them say something.
        where: criteria of the searches.
        k: rows of an answer that count.
        weights: weights to try.
        language: as for ``hybrid``.

    Raises:
        LoadError: the pairs are not readable, or there are none.
        DeclarationError: a column is not of its kind.
    """
    queries = pairs_of(engine, pairs)
    rows: list[_Rows] = []
    with engine.connect() as connection:
        for batch in in_batches([query.text for query in queries]):
            options: dict[str, Any] = {"where": where, "language": language, "depth": DEPTH}
            statement = hybrid(column, words, batch, limit=2 * DEPTH, **options)
            rows += _asked(connection, statement, batch)
    asked = list(zip(rows, queries, strict=True))
    curves = np.array([[_ndcg(o.fused(w), o, q, k) for w in weights] for o, q in asked])
    default = np.array([_ndcg(one.score, one, query, k) for one, query in asked])
    best = float(weights[_best(curves)])
    usual, held_out = float(default.mean()), float(_held_out(curves, queries).mean())
    curve = {float(w): float(v) for w, v in zip(weights, curves.mean(axis=0), strict=True)}
    weight = best if held_out > usual + 1e-9 else None
    return FittedWeight(weight, best, len(queries), k, curve, usual, held_out)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What both arms found for a question: keys, the default's scores, and each arm's share."""

    keys: list[str]
    score: npt.NDArray[np.float64]
    meaning: npt.NDArray[np.float64]
    words: npt.NDArray[np.float64]

    def fused(self, weight: float) -> npt.NDArray[np.float64]:
        # An arm that finds nothing takes nothing away.
        if not self.meaning.any() or not self.words.any():
            return self.meaning + self.words
        return weight * self.meaning + (1 - weight) * self.words


def _asked(connection: sa.Connection, statement: Any, questions: Sequence[str]) -> list[_Rows]:
    search = statement.search
    encode_together(statement, questions)
    # By their places, behind those of the class, which may have the same names.
    score, similarity, _, words_score, _, query = list(statement.selected_columns)[-6:]
    values = {"query": query, "score": score, "similarity": similarity, "words_score": words_score}
    chosen = [value.label(name) for name, value in values.items()]
    label = catalog_rows.label(search.key).label("key")
    place = sa.func.row_number().over(order_by=search.key).label("place")
    # Of this very statement: the method of a search would make another, with other columns.
    select = sa.Select.with_only_columns(statement, label, place, *chosen)
    answers = by_question(connection, select, len(questions))
    for of_one in answers:
        of_one.sort(key=lambda row: row.place)
    return [
        _Rows(
            [row.key for row in of_one],
            np.array([row.score for row in of_one], dtype=float),
            _share([row.similarity for row in of_one]),
            _share([row.words_score for row in of_one]),
        )
        for of_one in answers
    ]


def _share(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    """Scores of an arm as parts of 1, as ``hybrid`` makes them; 0 for rows it did not find."""
    array = np.array([np.nan if value is None else value for value in values], dtype=float)
    known = array[~np.isnan(array)]
    if not known.size:
        return np.zeros(len(array))
    low, high = known.min(), known.max()
    share = (array - low) / (high - low) if high > low else np.ones(len(array))
    return np.where(np.isnan(array), 0.0, share)


def _ndcg(scores: npt.NDArray[np.float64], rows: _Rows, query: LabelledQuery, k: int) -> float:
    # Rows come in the order of their keys, which stays among equals.
    order = np.argsort(-scores, kind="stable")[:k]
    return exact.ndcg([rows.keys[i] for i in order], query.gains, k)


def _best(curves: npt.NDArray[np.float64]) -> int:
    """The best weight; of equals the middle one, which is safest."""
    means = curves.mean(axis=0)
    equal = np.flatnonzero(means >= means.max() - 1e-9)
    return int(equal[len(equal) // 2])


def _held_out(
    curves: npt.NDArray[np.float64], queries: Sequence[LabelledQuery]
) -> npt.NDArray[np.float64]:
    """NDCG of each question by the weight that the other parts' questions ask for.

    Questions of one row stay in one part: their wordings resemble each other.
    """
    first = [min(query.gains, default="") for query in queries]
    rows = sorted(set(first))
    part_of = dict(zip(rows, np.random.default_rng(0).permutation(len(rows)) % FOLDS, strict=True))
    parts = np.array([part_of[row] for row in first])
    values = np.zeros(len(queries))
    for part in set(parts.tolist()):
        others = curves[parts != part]
        chosen = _best(others if len(others) else curves)
        values[parts == part] = curves[parts == part, chosen]
    return values
