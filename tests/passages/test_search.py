"""Documents by their passages: each once, and as exactly as by comparing everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from passage_documents import Document, Passage, text, work
from sqlalchemy.orm import Session

from sbert_pg import catalog, nearest
from sbert_pg.errors import DeclarationError, EncoderMismatchError
from sbert_pg.testing import DeterministicEncoder

QUESTION = "sentence topic13 topic26 text"


@pytest.fixture
def filled(session: Session, documents: sa.Engine) -> Session:
    """60 documents of very different lengths."""
    session.add_all(
        [Document(title=f"T{n % 5}", body=" ".join(text(n, 2 + n % 7 * 9))) for n in range(60)]
    )
    session.commit()
    work(documents)
    return session


def expected(
    session: Session, encoder: DeterministicEncoder, score: str, criterion: Any = None
) -> list[tuple[int, float]]:
    """Documents and scores, by comparing everything."""
    query = encoder.encode_query([QUESTION])[0]
    found = []
    for document in session.scalars(sa.select(Document)):
        similarities = [
            float(p.embedding @ query) for p in document.passages if not criterion or criterion(p)
        ]
        if similarities:
            whole = float(document.passages_embedding @ query)
            best = max(similarities)
            found.append((document.id, best if score == "best" else (best + whole) / 2))
    return sorted(found, key=lambda one: (-one[1], one[0]))


def ids(rows: Sequence[Any]) -> list[int]:
    return [row.Document.id for row in rows]


@pytest.mark.parametrize("score", ["best", "sum"])
def test_every_document_once_in_the_right_order(
    filled: Session, encoder: DeterministicEncoder, score: Any
) -> None:
    due = expected(filled, encoder, score)
    for limit in (1, 10, 59, 60, 100, None):
        rows = filled.execute(nearest(Document.passages, QUESTION, limit=limit, score=score)).all()
        assert ids(rows) == [key for key, _ in due][:limit]
        assert np.allclose([row.score for row in rows], [s for _, s in due][:limit], atol=1e-6)


def test_it_goes_on_until_there_are_enough_documents(
    session: Session, documents: sa.Engine, encoder: DeterministicEncoder
) -> None:
    """One long document owns the first hundreds of passages."""
    own = " ".join(f"## Part\n\nTopic13 topic26 of sentence text {n}.\n\n" for n in range(900))
    others = [Document(title=None, body=f"Something about number {n} else.") for n in range(30)]
    session.add_all([Document(title=None, body=own.replace("## Part", "\n\n# Part")), *others])
    session.commit()
    work(documents)
    rows = session.execute(nearest(Document.passages, QUESTION, limit=20, score="best")).all()
    assert len(rows) == 20
    assert rows[0].Document.id == 1
    assert ids(rows) == [key for key, _ in expected(session, encoder, "best")][:20]


def test_pages_neither_repeat_nor_miss(filled: Session) -> None:
    statement = nearest(Document.passages, QUESTION, limit=60)
    whole = ids(filled.execute(statement).all())
    pages = [ids(filled.execute(statement.limit(7).offset(n)).all()) for n in range(0, 63, 7)]
    assert [key for page in pages for key in page] == whole
    assert len(set(whole)) == 60


def test_filters_on_documents_and_on_passages(
    filled: Session, encoder: DeterministicEncoder
) -> None:
    def passes(passage: Any) -> bool:
        return passage.ordinal > 0 and passage.document.title == "T3"

    statement = nearest(
        Document.passages, QUESTION, limit=50, score="best",
        where=[Document.title == "T3", Passage.ordinal > 0],
    )  # fmt: skip
    rows = filled.execute(statement).all()
    assert ids(rows) == [key for key, _ in expected(filled, encoder, "best", passes)]
    assert all(row.DocumentPassage.ordinal > 0 for row in rows)
    again = nearest(Document.passages, QUESTION, limit=50, score="best").where(
        Document.title == "T3", Passage.ordinal > 0
    )
    assert ids(filled.execute(again).all()) == ids(rows)
    assert filled.execute(statement.where(sa.false())).all() == []


def test_joins_that_multiply_rows(filled: Session) -> None:
    tags = sa.table("tag", sa.column("document_id"), sa.column("name"))
    filled.execute(
        sa.text(
            "CREATE TEMP TABLE tag AS SELECT id AS document_id, n AS name "
            "FROM document, generate_series(1, 3) n WHERE id % 2 = 0"
        )
    )
    statement = nearest(Document.passages, QUESTION, limit=12, per_document=2).join(
        tags, tags.c.document_id == Document.id
    )
    rows = filled.execute(statement).all()
    assert len(set(ids(rows))) == 12
    assert all(key % 2 == 0 for key in ids(rows))
    assert len({row.DocumentPassage.id for row in rows}) == len(rows)


def test_several_passages_of_each(filled: Session) -> None:
    rows = filled.execute(nearest(Document.passages, QUESTION, limit=5, per_document=3)).all()
    assert len(set(ids(rows))) == 5
    for key in set(ids(rows)):
        own = [row.similarity for row in rows if row.Document.id == key]
        count = len(filled.get_one(Document, key).passages)
        assert len(own) == min(3, count)
        assert own == sorted(own, reverse=True)


def test_passages_themselves(filled: Session) -> None:
    statement = nearest(
        Document.passages, QUESTION, of="passage", limit=30, where=Document.title == "T2"
    )
    rows = filled.execute(statement).all()
    assert len(rows) == 30
    assert {p.document.title for p, _ in rows} == {"T2"}


@pytest.mark.parametrize("score", ["best", "sum", "auto"])
@pytest.mark.parametrize("limit", [3, 60, None])
def test_many_questions_are_answered_as_one_by_one(
    filled: Session, encoder: DeterministicEncoder, score: Any, limit: int | None
) -> None:
    questions = [QUESTION, "topic7 sentence", "Text 3 says"]

    def ask(question: Any) -> list[Any]:
        statement = nearest(
            Document.passages, question, limit=limit, score=score, per_document=2,
            where=Document.title != "T1",
        )  # fmt: skip
        joined = statement.where(Passage.ordinal != 1)
        return [
            (getattr(row, "query", None), row.Document.id, row.DocumentPassage.id, row.score)
            for row in filled.execute(joined if limit == 3 else statement)
        ]

    one_by_one = [(n, *row[1:]) for n, one in enumerate(questions) for row in ask(one)]
    assert ask(questions) == one_by_one
    assert ask(list(encoder.encode_query(questions))) == one_by_one


def test_least_similarity(filled: Session) -> None:
    rows = filled.execute(nearest(Document.passages, QUESTION, limit=60, min_similarity=0.3)).all()
    assert 0 < len(rows) < 60
    assert min(row.similarity for row in rows) >= 0.3


def test_the_passage_says_where(filled: Session) -> None:
    row = filled.execute(nearest(Document.passages, QUESTION, limit=1)).one()
    document, passage, similarity, score = row
    assert passage.text == document.body[passage.start : passage.stop]
    start, stop, sentence = passage.highlight("topic13")
    assert document.body[start:stop] == sentence
    assert passage.start <= start < stop <= passage.stop
    assert 0 < similarity <= 1
    assert score <= 1


def test_what_cannot_be_asked(filled: Session) -> None:
    with pytest.raises(DeclarationError, match="per_document"):
        nearest(Document.passages, "a", per_document=0)
    with pytest.raises(DeclarationError, match="passages_of"):
        nearest(Document.passages_embedding, "a", of="passage")
    with pytest.raises(DeclarationError, match="subquery"):
        nearest(Document.passages, "a").order_by(Document.id)


def test_passages_of_another_encoder_are_left_out(filled: Session) -> None:
    before = filled.execute(nearest(Document.passages, QUESTION, limit=1)).one()
    key = before.DocumentPassage.id
    for statement in (
        "SET session_replication_role = replica",
        (
            f"UPDATE document_passage SET embedding = (SELECT e.embedding FROM document_passage e "
            f"WHERE e.id <> {key} ORDER BY e.id DESC LIMIT 1) WHERE id = {key}"
        ),
        "SET session_replication_role = origin",
    ):
        filled.execute(sa.text(statement))
    found = filled.execute(nearest(Document.passages, QUESTION, limit=60, per_document=99)).all()
    assert key not in {row.DocumentPassage.id for row in found}
    filled.rollback()


@pytest.mark.parametrize("score", ["best", "sum"])
def test_a_reader_notices_that_passages_changed_hands(
    filled: Session, documents: sa.Engine, score: Any
) -> None:
    """Also one who takes a passage of one encoder beside a document of another."""
    statement = nearest(Document.passages, QUESTION, limit=3, score=score)
    filled.execute(statement)
    filled.commit()
    other = sa.create_engine(documents.url)
    with other.begin() as connection:
        column = Passage.__table__.c.embedding
        catalog.unbind(connection, column)
        binding = catalog.bind(connection, column)
        catalog.hold_encoder(
            connection, binding, DeterministicEncoder(dimensions=32, salt="another")
        )
    other.dispose()
    for _ in range(2):
        with pytest.raises(EncoderMismatchError):
            filled.execute(statement)
        filled.rollback()
