"""A matrix for the vectors of queries, learned in numpy; the documents' vectors stay as they are.

``linear`` is a ridge regression in closed form. A query shall come out where its answer is, less a
part of where the rows are that are wrongly near; what the questions do not say stays as it was,
since the penalty is on the difference from a multiple of the identity. ``contrastive`` goes from
the identity by gradient steps on the loss of InfoNCE (van den Oord et al., 2018): among its answer,
its hard negatives and the answers of the other questions, a query shall choose its answer.

How strongly the data may move the matrix is chosen on parts of the questions that it is not
learned from; parts share no document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from sbert_pg.distance import lengths, similarity_matrix, unit
from sbert_pg.search import exact
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.spec import Vectors

Method = Literal["linear", "contrastive"]
METHODS = get_args(Method)
Matrix = npt.NDArray[np.float64]

#: Parts of the questions; each is judged by what the others say.
PARTS = 4
#: Weight of the penalty, and of the hard negatives, that are tried.
PENALTIES = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0)
PUSHES = (0.0, 0.3, 0.6, 0.8)
#: Rows, and questions of a part, by which settings are chosen: a choice needs no more.
_ROWS, _QUESTIONS = 10_000, 500
#: Hard negatives of a question.
NEGATIVES = 10
#: Passes over the questions that are tried, and how a step is made. Measured on 829 questions: ten
#: times that rate remembers its documents within one pass.
PASSES = (1, 2, 4, 8, 16, 32)
_BATCH, _RATE, _TEMPERATURE = 128, 2e-4, 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Questions in vectors of length one, the mean of each one's answers, and its hard negatives.

    The latter are ``(questions, count, dimensions)``, zeros where there are fewer.
    """

    queries: Vectors
    positives: Vectors
    negatives: Vectors
    parts: npt.NDArray[np.int64]
    labelled: Sequence[LabelledQuery]

    def of(self, rows: npt.NDArray[np.bool_], most: int | None = None) -> Examples:
        """Some of the questions, the first of them where there are many."""
        some = np.flatnonzero(rows)[:most]
        vectors = (self.queries, self.positives, self.negatives)
        queries, positives, negatives = (each[some] for each in vectors)
        labelled = [self.labelled[i] for i in some]
        return Examples(queries, positives, negatives, self.parts[some], labelled)


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The rows that questions are ranked against: keys, and vectors of ``(rows, dimensions)``."""

    keys: Sequence[str]
    vectors: Vectors
    similarity: Any

    def some(self, labelled: Sequence[LabelledQuery], most: int, seed: int) -> Candidates:
        """At most so many rows by chance, and all that are labelled."""
        if len(self.keys) <= most:
            return self
        answers = {key for query in labelled for key in query.gains}
        drawn = np.random.default_rng(seed).random(len(self.keys)) < most / len(self.keys)
        kept = [i for i, key in enumerate(self.keys) if drawn[i] or key in answers]
        return Candidates([self.keys[i] for i in kept], self.vectors[kept], self.similarity)

    def nearest(self, queries: Vectors, k: int) -> exact.Nearest:
        """The k rows nearest to each question, compared with all."""
        best = exact.Nearest(len(queries), k)
        for first in range(0, len(self.keys), exact.BLOCK):
            block = self.vectors[first : first + exact.BLOCK]
            best.add(similarity_matrix(queries, block, self.similarity), first)
        return best

    def ranked(self, queries: Vectors, k: int) -> list[list[str]]:
        """Their keys, nearest first."""
        places = self.nearest(queries, k).positions.tolist()
        return [[self.keys[i] for i in of_one if i >= 0] for of_one in places]

    def ndcg(
        self, queries: Vectors, labelled: Sequence[LabelledQuery], k: int
    ) -> npt.NDArray[np.float64]:
        """nDCG@k of each question by exact search."""
        answers = zip(self.ranked(queries, k), labelled, strict=True)
        return np.array([exact.ndcg(keys, query.gains, k) for keys, query in answers])


def examples_of(
    candidates: Candidates,
    learning: Sequence[LabelledQuery],
    asked: Vectors,
    wrong: Sequence[Sequence[str]],
    parts: npt.NDArray[np.int64],
) -> Examples:
    """Questions with the vectors of their answers and of the rows that are wrongly near.

    Penalties and rates are for vectors of length one, which not every encoder gives. Where lengths
    of rows rank, they keep their proportions.
    """
    place = {key: i for i, key in enumerate(candidates.keys)}
    long = lengths(candidates.vectors)
    if candidates.similarity != "cosine":
        long = np.full_like(long, np.sqrt((long**2).mean()))
    vectors = candidates.vectors / long
    answers = (([vectors[place[key]] for key in q.gains], [*q.gains.values()]) for q in learning)
    means = [np.average(rows, axis=0, weights=gains) for rows, gains in answers]
    positives = np.stack(means).astype(np.float32)
    negatives = np.zeros((len(learning), NEGATIVES, vectors.shape[1]), np.float32)
    for row, keys in zip(negatives, wrong, strict=True):
        # A row that has come or gone meanwhile is passed over.
        there = [place[key] for key in keys if key in place]
        row[: len(there)] = vectors[there]
    return Examples(unit(asked), positives, negatives, parts, learning)


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """A matrix, by which a query is ``matrix @ vector``; its settings; nDCG with it and without."""

    matrix: Matrix
    settings: dict[str, float]
    validation: tuple[float, float]


def learn(
    method: Method, examples: Examples, candidates: Candidates, *, k: int, seed: int
) -> Learned:
    """Learn a matrix, its settings chosen by cross-validation, from all of the questions."""
    candidates = candidates.some(examples.labelled, _ROWS, seed)
    fit = _ridges if method == "linear" else _contrasted(seed)
    scores: dict[tuple[float, ...], list[npt.NDArray[np.float64]]] = {}
    plain = []
    for part in range(PARTS):
        kept = examples.of(examples.parts == part, _QUESTIONS)
        plain.append(candidates.ndcg(kept.queries, kept.labelled, k))
        for settings, matrix in fit(examples.of(examples.parts != part)):
            moved = apply(matrix, kept.queries)
            scores.setdefault(settings, []).append(candidates.ndcg(moved, kept.labelled, k))
    means = {settings: float(np.concatenate(each).mean()) for settings, each in scores.items()}
    # Of equals the first, which moves least.
    best = max(means, key=means.__getitem__)
    matrix = next(matrix for settings, matrix in fit(examples) if settings == best)
    names = ("penalty", "push") if method == "linear" else ("passes",)
    validation = means[best], float(np.concatenate(plain).mean())
    return Learned(matrix, dict(zip(names, best, strict=True)), validation)


def apply(matrix: Matrix, queries: Vectors) -> Vectors:
    """Vectors of queries after the matrix, of the length that they had."""
    moved = queries @ matrix.T.astype(np.float32)
    return unit(moved) * lengths(queries)


#: What comes of settings, for each that is tried.
_Fits = Iterator[tuple[tuple[float, ...], Matrix]]


def _ridges(examples: Examples) -> _Fits:
    queries = examples.queries.astype(np.float64)
    identity = np.eye(queries.shape[1])
    values, axes = np.linalg.eigh(queries.T @ queries)
    wrong = examples.negatives.astype(np.float64).mean(axis=1)
    for push in PUSHES:
        targets = examples.positives - push * wrong
        # Lengths play no part, so the multiple of the identity that fits best is not a change.
        scale = max(float((queries * targets).sum() / (queries**2).sum()), 1e-3)
        turned = axes.T @ (queries.T @ (targets - scale * queries))
        for penalty in PENALTIES:
            moved = axes @ (turned / (values + penalty)[:, None])
            yield (penalty, push), identity + moved.T / scale


def _contrasted(seed: int) -> Callable[[Examples], _Fits]:
    def fit(examples: Examples) -> _Fits:
        random = np.random.default_rng(seed)
        matrix = np.eye(examples.queries.shape[1], dtype=np.float32)
        mean, square = np.zeros_like(matrix), np.zeros_like(matrix)
        step = 0
        for number in range(1, max(PASSES) + 1):
            order = random.permutation(len(examples.queries))
            for first in range(0, len(order), _BATCH):
                batch = order[first : first + _BATCH]
                slope = _slope(matrix, examples, batch)
                step += 1
                # Adam (Kingma and Ba, 2015), with its own defaults.
                mean += 0.1 * (slope - mean)
                square += 0.001 * (slope**2 - square)
                size = (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
                matrix = matrix - _RATE * size
            if number in PASSES:
                yield (float(number),), matrix.astype(np.float64)

    return fit


def _slope(matrix: Vectors, examples: Examples, batch: npt.NDArray[np.int64]) -> Vectors:
    """Gradient of InfoNCE by the matrix, for some questions."""
    queries = examples.queries[batch]
    moved = queries @ matrix.T
    long = lengths(moved)
    units = moved / long
    positives, negatives = examples.positives[batch], examples.negatives[batch]
    among = units @ positives.T
    # Questions of one answer do not push each other away.
    among[(positives @ positives.T > 0.999) & ~np.eye(len(batch), dtype=bool)] = -np.inf
    hard = (negatives @ units[:, :, None])[:, :, 0]
    scores = np.concatenate([among, hard], axis=1) / _TEMPERATURE
    chosen = np.exp(scores - scores.max(axis=1, keepdims=True))
    chosen /= chosen.sum(axis=1, keepdims=True)
    chosen[np.arange(len(batch)), np.arange(len(batch))] -= 1
    count = len(batch)
    pull = chosen[:, :count] @ positives + (chosen[:, None, count:] @ negatives)[:, 0]
    pull /= _TEMPERATURE * count
    across = (pull - units * (pull * units).sum(axis=1, keepdims=True)) / long
    slope: Vectors = across.T @ queries
    return slope
