"""Rows in a better order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, undefer

from sbert_pg import diverse, nearest, rerank, rerank_async
from sbert_pg.errors import DeclarationError
from tests.search.conftest import Shop


class Words:
    """Scores by the words that question and text share, and counts what it is asked."""

    def __init__(self, clock: list[float] | None = None, seconds: float = 0) -> None:
        self.asked: list[int] = []
        self._clock, self._seconds = clock, seconds

    def score(self, question: str, texts: Sequence[str]) -> Any:
        self.asked.append(len(texts))
        if self._clock is not None:
            self._clock[0] += self._seconds * len(texts)
        wanted = set(question.split())
        return np.array([len(wanted & set(text.split())) for text in texts], np.float32)


class Row(NamedTuple):
    text: Any
    number: int = 0


def by_text(row: Row) -> Any:
    return row.text


ROWS = [Row("one"), Row(None), Row("one two"), Row("none"), Row("one two three"), Row("")]


def test_rows_are_ordered_by_score_and_those_without_a_text_are_last() -> None:
    ranked = rerank(ROWS, "one two three", Words(), text=by_text)
    assert [r.row.text for r in ranked] == ["one two three", "one two", "one", "none", None, ""]
    assert [r.score for r in ranked] == [3, 2, 1, 0, None, None]
    assert rerank(ROWS, "one two three", Words(), text=by_text, limit=2) == ranked[:2]
    assert rerank([], "one", Words(), text=by_text) == []


def test_equal_scores_keep_their_order() -> None:
    rows = [Row("a", n) for n in range(100)]
    assert [r.row.number for r in rerank(rows, "b", Words(), text=by_text)] == list(range(100))


def test_of_several_texts_the_best_counts() -> None:
    rows = [Row(["one", "x"]), Row([Row("x"), Row("one two"), Row("one")]), Row([])]
    ranked = rerank(rows, "one two", Words(), text=by_text)
    assert [(r.score, r.text) for r in ranked] == [(2, "one two"), (1, "one"), (None, None)]


@pytest.mark.parametrize("text", [3, [b"x"], [3]])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(DeclarationError, match="row 0"):
        rerank([Row(text)], "one", Words(), text=by_text)
    with pytest.raises(DeclarationError):
        rerank(ROWS, "one", Words(), text="text")


def test_a_classifier_of_pairs_is_no_reranker() -> None:
    class Labels:
        def score(self, question: str, texts: Sequence[str]) -> Any:
            return np.zeros((len(texts), 3))

    with pytest.raises(DeclarationError, match="one for each"):
        rerank(ROWS, "one", Labels(), text=by_text)


def test_a_score_that_is_no_number_is_refused() -> None:
    class Failing:
        def score(self, question: str, texts: Sequence[str]) -> Any:
            return [float("nan"), *range(1, len(texts))]

    with pytest.raises(DeclarationError, match="NaN"):
        rerank(ROWS, "one", Failing(), text=by_text)


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(DeclarationError, match="limit=-1"):
        rerank(ROWS, "one", Words(), text=by_text, limit=-1)
    assert rerank(ROWS, "one", Words(), text=by_text, limit=0) == []


def test_time_is_spent_on_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second a text by a clock of the test's own: what is left keeps its order behind."""
    clock = [0.0]
    monkeypatch.setattr("sbert_pg.reranking.time.monotonic", lambda: clock[0])
    rows = [Row("one" if n % 2 else "two", n) for n in range(100)]
    words = Words(clock, 1.0)
    ranked = rerank(rows, "one", words, text=by_text, at_most=20)
    assert sum(words.asked) == 20
    assert [r.row.number for r in ranked] == [
        *range(1, 20, 2), *range(0, 20, 2), *range(20, 100)
    ]  # fmt: skip
    assert {r.score for r in ranked[20:]} == {None}
    assert sum(words.asked) == 20
    unhurried = rerank(rows, "one", Words(clock, 0.001), text=by_text, at_most=20)
    assert unhurried == rerank(rows, "one", Words(), text=by_text)
    nothing = rerank(rows, "one", Words(), text=by_text, at_most=0)
    assert [r.row.number for r in nothing] == list(range(100))


def test_in_an_event_loop() -> None:
    ranked = asyncio.run(rerank_async(ROWS, "one two three", Words(), text=by_text, limit=1))
    assert ranked[0].row.text == "one two three"


def test_rows_of_a_search(shop: Shop, session: Session) -> None:
    Article = shop.Article
    entities = session.scalars(nearest(Article.embedding, "refund returns").limit(20)).all()
    options: dict[str, Any] = {"text": Article.title, "limit": 1}
    assert rerank(entities, "refund now", Words(), **options)[0].text == "refund now"
    rows = session.execute(sa.select(Article, sa.literal(1))).all()
    best = rerank(rows, "shipping gift", Words(), **options)[0]
    assert best.row[0].title == best.text == "shipping gift"
    pairs = session.execute(sa.select(Article.id, Article.title)).all()
    assert rerank(pairs, "shipping gift", Words(), **options)[0].text == "shipping gift"
    with pytest.raises(DeclarationError, match="no "):
        rerank(session.execute(sa.select(Article.id)).all(), "x", Words(), **options)


def test_diverse_rows_do_not_repeat_each_other(shop: Shop, session: Session) -> None:
    Article = shop.Article
    found = nearest(Article.embedding, "refund returns").limit(20)
    options: dict[str, Any] = {"vector": Article.embedding, "question": "refund returns"}
    with pytest.raises(DeclarationError, match="undefer"):
        diverse(session.scalars(found).all(), 3, **options)
    loading = found.options(undefer(Article.embedding)).execution_options(populate_existing=True)
    rows = session.scalars(loading).all()
    alike = [row.title for row in diverse(rows, 3, trade=1, **options)]
    assert alike == ["refund returns"] * 3
    apart = [row.title for row in diverse(rows, 3, trade=0.5, **options)]
    assert apart[0] == "refund returns"
    assert len(set(apart)) == 3
    assert len(diverse(rows, 99, **options)) == len(rows)
    assert diverse(rows, 0, **options) == []
    for trade in (7, -1):
        with pytest.raises(DeclarationError, match="between 0 and 1"):
            diverse(rows, 3, trade=trade, **options)


def test_diverse_is_maximal_marginal_relevance() -> None:
    """Against the definition, row by row."""
    random = np.random.default_rng(1)
    matrix = random.normal(size=(40, 8)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    question = matrix[0] + 0.1
    rows = [Row(vector, number) for number, vector in enumerate(matrix)]
    unit = question / np.linalg.norm(question)
    for trade in (0.0, 0.3, 0.7, 1.0):
        chosen: list[int] = []
        while len(chosen) < 15:
            gains = [
                -np.inf if n in chosen
                else trade * matrix[n] @ unit
                - ((1 - trade) * max(matrix[n] @ matrix[c] for c in chosen) if chosen else 0)
                for n in range(40)
            ]  # fmt: skip
            chosen.append(int(np.argmax(gains)))
        ours = diverse(rows, 15, vector=by_text, question=question, trade=trade)
        assert [row.number for row in ours] == chosen
    with pytest.raises(DeclarationError, match="encoder"):
        diverse(rows, 3, vector=by_text, question="a text")
    # A matrix of one row, as encode_query gives it, is compared with nothing by numpy's rules.
    for other in (question[None], question[:3]):
        with pytest.raises(DeclarationError, match="question is of shape"):
            diverse(rows, 3, vector=by_text, question=other)
