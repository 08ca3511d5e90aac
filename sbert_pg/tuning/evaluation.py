"""``evaluate``: how well searches answer labelled questions, side by side.

nDCG has linear gains and ``1 / log2(rank + 1)``, as in BEIR and MTEB. Intervals are by bootstrap
over the questions (Efron, 1979), with the same draws for every search, so that the interval of a
difference is that of paired questions.

Of an encoder on given texts, without a table: Spearman's correlation for pairs with scores, and the
same measures for questions with answers, as MTEB has them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from sbert_pg.distance import similarity_matrix
from sbert_pg.errors import DeclarationError, LoadError
from sbert_pg.search import exact
from sbert_pg.search.exact import LabelledQuery
from sbert_pg.spec import TextEncoder, Vectors
from sbert_pg.tuning.adapters import Candidates
from sbert_pg.tuning.files import Run, in_columns, names_of, pairs_of
from sbert_pg.tuning.searches import (
    Answer,
    Search,
    by_question,
    encode_together,
    in_batches,
    require_rows,
    with_answers,
)

if TYPE_CHECKING:
    from sbert_pg.encoder import Encoder

#: Draws of the bootstrap; its share that an interval holds.
DRAWS, CONFIDENCE = 1000, 0.95
_MEASURES = ("ndcg", "recall", "mrr", "precision_at_1")


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over questions, and the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self:}"

    def __format__(self, sign: str) -> str:
        return f"{self.value:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a search reached at k on the questions of a slice; ``None`` for all.

    ``difference`` is nDCG less that of the first search; ``milliseconds`` leave encoding out.
    """

    search: str
    slice: str | None
    questions: int
    ndcg: Figure
    recall: Figure
    mrr: Figure
    precision_at_1: Figure
    difference: Figure
    milliseconds: float | None


@dataclass(frozen=True, slots=True)
class Miss:
    """A question that a search answers badly, with the right keys and what came instead."""

    question: str
    relevant: tuple[str, ...]
    ndcg: float
    answers: tuple[Answer, ...]

    def __str__(self) -> str:
        came = (f"  {a.key}  {a.score:.3f}  {' '.join(a.text.split())[:90]}" for a in self.answers)
        question = f"{self.question!r} wants {', '.join(self.relevant)}; came:"
        return "\n".join([question, *list(came)[:3]])


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Searches side by side, then by slice, and what each found; printed, a table."""

    k: int
    queries: tuple[LabelledQuery, ...]
    scores: tuple[Score, ...]
    answers: Mapping[str, Sequence[Sequence[Answer]]]

    def worst(self, search: str, count: int = 10) -> list[Miss]:
        """The questions of the lowest nDCG, with what came instead of the relevant rows."""
        misses = [
            Miss(query.text, tuple(query.answers), _measured(rows, query, self.k)[0], tuple(rows))
            for query, rows in zip(self.queries, self.answers[search], strict=True)
        ]
        return sorted((m for m in misses if m.ndcg < 1), key=lambda miss: miss.ndcg)[:count]

    def run(self, search: str) -> Run:
        """The answers of a search, as ``write_run`` takes them."""
        pairs = zip(names_of(self.queries), self.answers[search], strict=True)
        return {name: [(a.key, a.score) for a in answers] for name, answers in pairs}

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the answers."""
        return {"k": self.k, "scores": [asdict(score) for score in self.scores]}

    def __str__(self) -> str:
        header = ["search", f"nDCG@{self.k}", "vs first", f"recall@{self.k}", "MRR", "P@1", "ms"]
        table = []
        for s in self.scores:
            name = s.search if s.slice is None else f"{s.search}, {s.slice} ({s.questions})"
            versus = "" if s.search == self.scores[0].search else f"{s.difference:+}"
            time_ = "" if s.milliseconds is None else f"{s.milliseconds:.1f}"
            figures = [str(s.recall), str(s.mrr), str(s.precision_at_1), time_]
            table.append([name, str(s.ndcg), versus, *figures])
        head = f"{len(self.queries)} questions, intervals of {CONFIDENCE:.0%}"
        return "\n".join([head, *in_columns([header, *table])])


def evaluate(
    engine: sa.Engine,
    searches: Mapping[str, Search | Run],
    pairs: Any,
    *,
    k: int = 10,
    slices: str | None = None,
) -> Evaluation:
    """Measure how well searches answer labelled questions.

    Questions go to the database some 200 in one statement, in one snapshot.

    Args:
        searches: by name, each a function from a list of questions to its statement, such as
            ``lambda q: nearest(Article.embedding, q)`` (a select of other making has the columns
            ``query``, ``key`` and ``score``); or a run as ``read_run`` gives it. ``searches_for``
            makes the usual ones.
        pairs: labelled questions: pairs of a question and the key of a row that answers it, with a
            gain perhaps; mappings of those and attributes; ``LabelledQuery``; what ``read_pairs``
            gives; or a select or ``text()`` with the columns ``question`` and ``id``.
        k: rows of an answer that count.
        slices: name of an attribute of the pairs; each of its values is reported by itself.

    Raises:
        LoadError: the pairs are not readable, or there are none; a run answers none of them.
        DeclarationError: a search gives something else than answers; the engine is asynchronous.
    """
    queries = pairs_of(engine, pairs)
    answers: dict[str, list[list[Answer]]] = {}
    times: dict[str, float] = {}
    with ExitStack() as stack:
        connection = None
        for name, search in searches.items():
            if isinstance(search, Mapping):
                answers[name] = _of_run(name, search, queries)
                continue
            if not callable(search):
                raise DeclarationError(
                    f"The search {name!r} is a statement; give a function that makes it of a list "
                    "of questions, as in lambda questions: nearest(Article.embedding, questions)."
                )
            if connection is None:
                opened = engine.connect().execution_options(isolation_level="REPEATABLE READ")
                connection = stack.enter_context(opened)
            answers[name], seconds = _answers(connection, name, search, queries)
            times[name] = 1000 * seconds / len(queries)
    scores = _scores(queries, answers, times, k, slices)
    return Evaluation(k, tuple(queries), tuple(scores), answers)


def _of_run(name: str, run: Run, queries: Sequence[LabelledQuery]) -> list[list[Answer]]:
    """The answers of a run, which calls each question by its name or its text."""
    named = names_of(queries)
    lists = [run.get(called, run.get(query.text)) for called, query in named.items()]
    if all(rows is None for rows in lists):
        raise LoadError(
            f"The run {name!r} answers none of the questions. It has to call them as the pairs do: "
            f"{', '.join(list(named)[:3])}, ..."
        )
    return [[Answer(*row[:2]) for row in rows or ()] for rows in lists]


def _answers(
    connection: sa.Connection, name: str, search: Search, queries: Sequence[LabelledQuery]
) -> tuple[list[list[Answer]], float]:
    """What a search finds for each question, and the seconds that it took."""
    answers: list[list[Answer]] = []
    seconds = 0.0
    questions = [query.text for query in queries]
    for batch in in_batches(questions):
        statement = search(batch)
        if not isinstance(statement, sa.Select):
            answers += [[Answer(*row) for row in rows] for rows in statement]
            continue
        encode_together(statement, batch)
        started = time.perf_counter()
        of_batch = by_question(connection, with_answers(statement), len(batch))
        seconds += time.perf_counter() - started
        answers += [
            [Answer(str(r.key), float(r.score), getattr(r, "text", "") or "") for r in rows]
            for rows in of_batch
        ]
    if len(answers) != len(questions):
        raise DeclarationError(
            f"Search {name!r} answers {len(answers)} of {len(questions)} questions."
        )
    require_rows(connection, statement, queries, answers)
    return answers, seconds


def _measured(answers: Sequence[Answer], query: LabelledQuery, k: int) -> list[float]:
    """The measures of one answer, in their order."""
    keys = list(dict.fromkeys(answer.key for answer in answers))
    return [
        exact.ndcg(keys, query.gains, k),
        exact.recall_of(keys, query.gains, k),
        exact.reciprocal_rank(keys, query.gains, k),
        exact.reciprocal_rank(keys, query.gains, 1),
    ]


def _groups(
    queries: Sequence[LabelledQuery], slices: str | None
) -> dict[str | None, npt.NDArray[np.bool_]]:
    """The questions of each value of an attribute, after all of them."""
    every: dict[str | None, npt.NDArray[np.bool_]] = {None: np.ones(len(queries), dtype=bool)}
    if slices is None:
        return every
    if not any(slices in query.attributes for query in queries):
        raise DeclarationError(f"No pair has an attribute {slices!r} to slice by.")
    of = np.array([query.attributes.get(slices) or "(none)" for query in queries])
    return every | {str(value): of == value for value in sorted(set(of))}


def _scores(
    queries: Sequence[LabelledQuery],
    answers: Mapping[str, list[list[Answer]]],
    times: Mapping[str, float],
    k: int,
    slices: str | None,
) -> list[Score]:
    random = np.random.default_rng(0)
    values = {
        name: np.array([_measured(a, q, k) for a, q in zip(rows, queries, strict=True)])
        for name, rows in answers.items()
    }
    groups = _groups(queries, slices)
    scores = []
    for group, members in groups.items():
        count = int(members.sum())
        draws = _draws(count, random) / count
        first: Any = next(iter(values.values()))[members]
        for name, all_ in values.items():
            own = all_[members]
            facts: dict[str, Any] = dict(zip(_MEASURES, _figures(own, draws @ own), strict=True))
            apart = own[:, :1] - first[:, :1]
            (difference,) = _figures(apart, draws @ apart)
            facts |= {"search": name, "slice": group, "questions": count, "difference": difference}
            milliseconds = times.get(name) if group is None else None
            scores.append(Score(milliseconds=milliseconds, **facts))
    return scores


def _draws(count: int, random: np.random.Generator) -> Any:
    """How often each of so many is in each draw of the bootstrap, ``(draws, count)``."""
    return random.multinomial(count, np.full(count, 1 / count), size=DRAWS)


def _figures(values: Any, means: Any) -> list[Figure]:
    """Mean of each column of ``(questions, measures)``, and its interval by the means of draws."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return [Figure(*map(float, each)) for each in zip(values.mean(axis=0), low, high, strict=True)]


def grouped_figures(
    values: npt.NDArray[np.float64], groups: npt.NDArray[np.int64], seed: int
) -> list[Figure]:
    """Mean and interval of each column of ``(questions, measures)``, by draws of whole groups.

    Questions of one document are right or wrong together (Davison and Hinkley, 1997, section 3.8).
    """
    names, group = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, group, values)
    draws = _draws(len(names), np.random.default_rng(seed))
    return _figures(values, (draws @ sums) / (draws @ np.bincount(group))[:, None])


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; ``nan`` where one side is constant."""
    x, y = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    length = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / length) if length else float("nan")


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Ranks from 1, ties at their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def score_pairs(
    encoder: TextEncoder, left: Sequence[str], right: Sequence[str], scores: Sequence[float]
) -> float:
    """Spearman's correlation of given scores and the encoder's own similarity of each pair."""
    pairs = zip(encoder.encode_document(left), encoder.encode_document(right), strict=True)
    kind = encoder.spec.similarity
    alike = [float(similarity_matrix(a[None], b[None], kind)[0, 0]) for a, b in pairs]
    return spearman(alike, scores)


def score_retrieval(
    questions: Vectors, texts: Vectors, relevant: Sequence[set[int]], similarity: str
) -> dict[str, float]:
    """Mean measures of finding the relevant texts, by their positions, of each question."""
    rows = Candidates([str(number) for number in range(len(texts))], texts, similarity)
    sums = np.zeros(4)
    for keys, answers in zip(rows.ranked(questions, 10), relevant, strict=True):
        gains = dict.fromkeys(map(str, answers), 1.0)
        measures = exact.ndcg, exact.recall_of, exact.reciprocal_rank
        of_ten = [measure(keys, gains, 10) for measure in measures]
        sums += (of_ten[0], float(keys[0] in gains), *of_ten[1:])
    names = ("ndcg@10", "recall@1", "recall@10", "mrr")
    return dict(zip(names, map(float, sums / max(1, len(questions))), strict=True))


def compare_on_pairs(
    name: str, encoder: Encoder, rows: Sequence[tuple[str, str, float]]
) -> dict[str, Any]:
    """Spearman's correlation with given scores, and speed."""
    started = time.perf_counter()
    quality = {"spearman": score_pairs(encoder, *zip(*rows, strict=True))}
    return _row(name, encoder, quality, 2 * len(rows) / (time.perf_counter() - started))


def compare_on_questions(
    name: str, encoder: Encoder, rows: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """How well each question finds its answer among all different answers, and speed."""
    positions = {answer: n for n, answer in enumerate(dict.fromkeys(a for _, a in rows))}
    relevant: dict[str, set[int]] = {}
    for question, answer in rows:
        relevant.setdefault(question, set()).add(positions[answer])
    started = time.perf_counter()
    questions, texts = encoder.encode_query(list(relevant)), encoder.encode_document([*positions])
    speed = (len(questions) + len(texts)) / (time.perf_counter() - started)
    kind = encoder.spec.similarity
    quality = score_retrieval(questions, texts, list(relevant.values()), kind)
    return _row(name, encoder, quality, speed)


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
