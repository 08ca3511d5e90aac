"""Passages and words in one answer."""

from __future__ import annotations

import sqlalchemy as sa
from passage_documents import text, work
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, hybrid, passages_of, text_column, text_index
from sbert_pg.passages import SentenceChunker
from sbert_pg.testing import DeterministicEncoder


class Base(DeclarativeBase):
    """Base of the books."""


class Book(Base):
    """A book."""

    __tablename__ = "book"
    __table_args__ = (text_index("book_words", "words"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    passages = passages_of(
        "deterministic", source="body", dimensions=32, chunker=SentenceChunker(20, 60)
    )
    words = text_column("body")


def test_hybrid(engine: sa.Engine, encoder: DeterministicEncoder) -> None:
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        session.add_all(Book(body=" ".join(text(n, 20))) for n in range(40))
        session.add(Book(body="The number XK-4711 stands here alone."))
        session.commit()
        work(engine, Base)
        rows = session.execute(hybrid(Book.passages, Book.words, "sentence XK-4711")).all()
        assert len(rows) == 10
        assert rows[0].Book.id == 41
        assert len({row.Book.id for row in rows}) == 10
        filtered = hybrid(Book.passages, Book.words, "sentence topic13", where=Book.id < 5)
        assert {row.Book.id for row in session.execute(filtered)} == {1, 2, 3, 4}
        questions = ["sentence XK-4711", "topic13", "the of and"]
        together = session.execute(hybrid(Book.passages, Book.words, questions, limit=4))
        assert [(row.query, row.Book.id, row.score) for row in together] == [
            (number, row.Book.id, row.score)
            for number, one in enumerate(questions)
            for row in session.execute(hybrid(Book.passages, Book.words, one, limit=4))
        ]
