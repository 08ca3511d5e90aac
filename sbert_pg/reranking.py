"""The rows that a search has found in a better order: by a cross-encoder, or for diversity.

Both take rows as they came from the database, entities or rows with an entity in them, and ask the
database for nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import sqlalchemy as sa

from sbert_pg.distance import similarity_matrix
from sbert_pg.errors import DeclarationError
from sbert_pg.registry import get_encoder
from sbert_pg.spec import Vectors

T = TypeVar("T")

#: Rows that are scored first where time is short, and at most at once.
_FIRST, _MOST = 8, 64


class Scorer(Protocol):
    """What scores pairs: a ``Reranker``, or an object of the application's own."""

    def score(self, question: str, texts: Sequence[str]) -> Any:
        """A number for each text, larger for better."""
        ...


@dataclass(frozen=True, slots=True)
class Ranked(Generic[T]):
    """A row in its new place.

    Attributes:
        score: its score; ``None`` where it has no text or the time was over before its turn.
        text: the text that has this score: of a row with several passages, the best one.
    """

    row: T
    score: float | None
    text: str | None


def rerank(
    rows: Sequence[T],
    question: str,
    reranker: Scorer,
    *,
    text: Any,
    limit: int | None = None,
    at_most: float | None = None,
) -> list[Ranked[T]]:
    """Rows by how well a cross-encoder says that they answer the question, best first.

    ::

        rows = session.scalars(nearest(Article.embedding, question).limit(100)).all()
        best = rerank(rows, question, reranker, text=Article.body, limit=10, at_most=0.25)

    Args:
        rows: rows in the order in which they were found, with which the time is spent first.
        reranker: scores pairs, see ``sbert_pg.Reranker``.
        text: what a row says: an attribute of its class, or a function of the row. Where it gives
            several texts, or objects with a ``text`` such as ``Document.passages``, the best of
            them counts.
        limit: rows that are returned; all by default.
        at_most: seconds that may be spent. Rows whose turn does not come keep their order behind
            those that were scored. How long the next rows take is estimated by those before, so
            that one batch of them may end later. No limit by default.

    Returns:
        The rows with their scores. Rows without a text stand behind those that were scored, too.

    Raises:
        DeclarationError: ``text`` is not known to the rows or gives something that is not a text,
            the reranker gives several numbers for a text, or NaN, or the limit is below 0.
        EncodingError: a text cannot be encoded.
    """
    texts = _texts(rows, text)
    if limit is not None and limit < 0:
        raise DeclarationError(f"rerank() was given limit={limit!r}; it is 0 or more rows.")
    scored: list[Ranked[T]] = []
    done: set[int] = set()
    with_text = [position for position, some in enumerate(texts) if some]
    for positions in _turns(with_text, at_most):
        best = _best(question, reranker, positions, texts)
        scored += [Ranked(rows[position], *best[position]) for position in positions]
        done.update(positions)
    scored.sort(key=lambda ranked: ranked.score or 0.0, reverse=True)
    rest = [Ranked(row, None, None) for number, row in enumerate(rows) if number not in done]
    return [*scored, *rest][:limit]


async def rerank_async(
    rows: Sequence[T],
    question: str,
    reranker: Scorer,
    *,
    text: Any,
    limit: int | None = None,
    at_most: float | None = None,
) -> list[Ranked[T]]:
    """``rerank`` in a thread, so that an event loop keeps running; texts are read before."""
    read = list(zip(rows, _texts(rows, text), strict=True))
    options: dict[str, Any] = {"text": itemgetter(1), "limit": limit, "at_most": at_most}
    work = partial(rerank, read, question, reranker, **options)
    ranked: list[Ranked[Any]] = await asyncio.to_thread(work)
    return [Ranked(one.row[0], one.score, one.text) for one in ranked]


def _best(
    question: str, reranker: Scorer, positions: Sequence[int], texts: Sequence[list[str]]
) -> dict[int, tuple[float, str]]:
    """The best score of each row, and the text that has it."""
    pairs = [(position, one) for position in positions for one in texts[position]]
    scores = np.asarray(reranker.score(question, [one for _, one in pairs]))
    if scores.shape != (len(pairs),):
        raise DeclarationError(
            f"{reranker!r} gives numbers of shape {scores.shape} for {len(pairs)} texts; a "
            "reranker gives one for each."
        )
    if np.isnan(scores).any():
        raise DeclarationError(
            f"{reranker!r} gives NaN for a text, which has no place in an order."
        )
    best: dict[int, tuple[float, str]] = {}
    for (position, one), score in zip(pairs, scores.tolist(), strict=True):
        if position not in best or score > best[position][0]:
            best[position] = (score, one)
    return best


def _turns(positions: Sequence[int], at_most: float | None) -> Iterator[Sequence[int]]:
    """Rows that are scored at a time, for as long as the time lasts."""
    if at_most is None:
        yield from [positions] if positions else []
        return
    started, done, size = time.monotonic(), 0, _FIRST
    while done < len(positions) and size > 0 and time.monotonic() - started < at_most:
        some = positions[done : done + size]
        yield some
        done += len(some)
        spent = time.monotonic() - started
        left = (at_most - spent) * done / spent if spent > 0 else _MOST
        size = int(min(max(left, 0), _MOST))


def diverse(
    rows: Sequence[T], limit: int, *, vector: Any, question: Any, trade: float = 0.7
) -> list[T]:
    """Rows that answer the question and do not repeat each other (maximal marginal relevance).

    Each next row is the one with the largest ``trade`` times its similarity to the question less
    ``1 - trade`` times its similarity to the most similar row that was taken before (Carbonell and
    Goldstein 1998).

    It needs the vectors of all rows, which a search does not load by itself:
    ``nearest(...).options(undefer(Article.embedding))``. With 100 rows of 384 dimensions that is
    some 150 kB more from the server, and the choice itself takes less than a millisecond.

    Args:
        rows: what was found, in any order; several times as many as are wanted.
        limit: rows that are returned at most.
        vector: the embedding's attribute, or a function of the row. Rows without one are left out.
        question: a text, which the attribute's encoder encodes as a query, or a vector.
        trade: 1 for similarity to the question alone, 0 for diversity alone.

    Raises:
        DeclarationError: ``trade`` is outside of 0 to 1, ``vector`` is not known to the rows or not
            loaded, a text is given with a function, or the question is not a vector of this width.
        EncoderError: the attribute's encoder cannot be loaded.
    """
    if not 0 <= trade <= 1:
        raise DeclarationError(f"diverse: trade is {trade}; it lies between 0 and 1.")
    values = [_value(row, vector, loaded=True) for row in rows]
    kept = [number for number, value in enumerate(values) if value is not None]
    if not kept or limit < 1:
        return []
    matrix = np.asarray([values[number] for number in kept], np.float32)
    asked = _question(question, vector)
    if asked.shape != matrix.shape[1:]:
        raise DeclarationError(
            f"diverse: the question is of shape {asked.shape} and the rows' vectors of "
            f"{matrix.shape[1:]}. Of the matrix that encode_query gives take a row."
        )
    chosen = by_marginal_relevance(matrix, asked, limit, trade)
    return [rows[kept[number]] for number in chosen]


def by_marginal_relevance(
    vectors: Vectors, question: Vectors, limit: int, trade: float
) -> list[int]:
    """Numbers of the vectors that ``diverse`` takes, in the order in which it takes them.

    ``vectors`` are of shape ``(n, dimensions)`` and ``question`` of ``(dimensions,)``.
    """
    gain = trade * similarity_matrix(question[None], vectors, "cosine")[0]
    similarity = similarity_matrix(vectors, vectors, "cosine")
    nearest = np.full(len(vectors), -np.inf, np.float32)
    chosen: list[int] = []
    while len(chosen) < min(limit, len(vectors)):
        penalty = (1 - trade) * nearest if chosen else 0
        best = int(np.argmax(gain - penalty))
        chosen.append(best)
        gain[best] = -np.inf
        nearest = np.maximum(nearest, similarity[best])
    return chosen


def _question(question: Any, vector: Any) -> Vectors:
    if not isinstance(question, str):
        return np.asarray(question, np.float32)
    encoder = getattr(getattr(vector, "type", None), "encoder", None)
    if encoder is None:
        raise DeclarationError(
            "diverse: a question that is a text is encoded by the encoder of an embedding column. "
            "Give vector=Article.embedding, or the question's own vector."
        )
    return np.asarray(get_encoder(encoder).encode_query([question])[0])


def _texts(rows: Sequence[Any], text: Any) -> list[list[str]]:
    """The texts of each row."""
    return [_some(_value(row, text), number) for number, row in enumerate(rows)]


def _some(value: Any, number: int) -> list[str]:
    if value is None:
        return []
    parts = [value] if isinstance(value, str) else value
    try:
        texts = [getattr(part, "text", part) for part in parts]
    except TypeError:
        texts = [value]
    wrong = [part for part in texts if not isinstance(part, (str, type(None)))]
    if wrong:
        raise DeclarationError(
            f"The text of row {number} is {type(wrong[0]).__name__} and not a text, nor something "
            "with one."
        )
    return [part for part in texts if part]


def _value(row: Any, of: Any, *, loaded: bool = False) -> Any:
    """An attribute of a row, or of the entity in it; or what a function makes of it."""
    key = getattr(of, "key", None)
    if key is None:
        if isinstance(of, Callable):  # type: ignore[arg-type]
            return of(row)
        raise DeclarationError(f"{of!r} is neither an attribute of a class nor a function.")
    owner = getattr(of, "class_", None)
    for place in (row, *(row if isinstance(row, sa.Row) else ())):
        if hasattr(place, key) if owner is None else isinstance(place, owner):
            if loaded:
                _require_loaded(place, of)
            return getattr(place, key)
    if not (isinstance(row, sa.Row) and hasattr(row, key)):
        raise DeclarationError(f"The rows have no {of}; a row is {type(row).__name__}.")
    return getattr(row, key)


def _require_loaded(entity: Any, attribute: Any) -> None:
    state = sa.inspect(entity, raiseerr=False)
    if attribute.key in getattr(state, "unloaded", ()):
        raise DeclarationError(
            f"{attribute} is not loaded, and reading it would ask the database for each row. "
            f"Load it with the rows: select.options(undefer({attribute}))."
        )
