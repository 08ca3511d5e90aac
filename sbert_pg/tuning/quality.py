"""How well and how fast an encoder does on given texts.

The measures are those of MTEB.

Spearman's correlation for pairs with scores; nDCG@10, recall and reciprocal rank for questions with
answers, as ``evaluate`` has them of a table.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sbert_pg.distance import similarity_matrix
from sbert_pg.search import exact
from sbert_pg.spec import TextEncoder, Vectors
from sbert_pg.tuning.adapters import Candidates

if TYPE_CHECKING:
    from sbert_pg.encoder import Encoder

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Means over questions, each between 0 and 1."""

    ndcg_at_10: float
    recall_at_1: float
    recall_at_10: float
    reciprocal_rank: float


def ranks(values: Floats) -> Floats:
    """Ranks from 1, ties at their mean."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(values)])
    result = np.empty(len(values))
    result[order] = np.repeat(starts + (lengths + 1) / 2, lengths)
    return result


def spearman(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Spearman's rank correlation; ``nan`` where one side is constant."""
    x, y = (ranks(np.asarray(side, dtype=np.float64)) for side in (a, b))
    x, y = x - x.mean(), y - y.mean()
    length = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / length) if length else float("nan")


def score_pairs(
    encoder: TextEncoder, left: Sequence[str], right: Sequence[str], scores: Sequence[float]
) -> float:
    """Spearman's correlation of given scores and the encoder's own similarity of each pair."""
    a, b = encoder.encode_document(left), encoder.encode_document(right)
    kind = encoder.spec.similarity
    similarities = [
        float(similarity_matrix(one[None], other[None], kind)[0, 0])
        for one, other in zip(a, b, strict=True)
    ]
    return spearman(similarities, scores)


def score_retrieval(
    questions: Vectors, texts: Vectors, relevant: Sequence[set[int]], similarity: str
) -> Retrieval:
    """Measures of finding the relevant texts, by their positions, of each question."""
    rows = Candidates([str(number) for number in range(len(texts))], texts, similarity)
    sums = np.zeros(4)
    for keys, answers in zip(rows.ranked(questions, 10), relevant, strict=True):
        gains = dict.fromkeys(map(str, answers), 1.0)
        measures = exact.ndcg, exact.recall_of, exact.reciprocal_rank
        of_ten = [measure(keys, gains, 10) for measure in measures]
        sums += (of_ten[0], float(keys[0] in gains), *of_ten[1:])
    return Retrieval(*(float(value) for value in sums / max(1, len(questions))))


def retrieval(encoder: TextEncoder, questions: Sequence[str], answers: Sequence[str]) -> Retrieval:
    """Questions, each with one answer, against all the different answers."""
    positions: dict[str, int] = {}
    for answer in answers:
        positions.setdefault(answer, len(positions))
    relevant: dict[str, set[int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        relevant.setdefault(question, set()).add(positions[answer])
    return score_retrieval(
        encoder.encode_query(list(relevant)),
        encoder.encode_document(list(positions)),
        list(relevant.values()),
        encoder.spec.similarity,
    )


def compare_on_pairs(
    name: str, encoder: Encoder, rows: Sequence[tuple[str, str, float]]
) -> dict[str, Any]:
    """Spearman's correlation with given scores, and speed."""
    left, right, scores = zip(*rows, strict=True)
    started = time.perf_counter()
    quality = {"spearman": score_pairs(encoder, left, right, scores)}
    return _row(name, encoder, quality, 2 * len(rows) / (time.perf_counter() - started))


def compare_on_questions(
    name: str, encoder: Encoder, rows: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """How well each question finds its answer among all answers, and speed."""
    questions, answers = zip(*rows, strict=True)
    started, before = time.perf_counter(), encoder.statistics.texts
    measures = retrieval(encoder, questions, answers)
    texts = encoder.statistics.texts - before
    quality = {
        "ndcg@10": measures.ndcg_at_10,
        "recall@1": measures.recall_at_1,
        "recall@10": measures.recall_at_10,
        "mrr": measures.reciprocal_rank,
    }
    return _row(name, encoder, quality, texts / (time.perf_counter() - started))


def _row(name: str, encoder: Encoder, quality: dict[str, float], speed: float) -> dict[str, Any]:
    return {
        "encoder": name,
        "precision": encoder.manifest.precision,
        "dimensions": encoder.dimensions,
        **quality,
        "texts/s": speed,
        "truncated": encoder.statistics.truncated,
        "MB": round(encoder.megabytes, 1),
    }
