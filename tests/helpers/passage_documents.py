"""Documents with passages, an encoder without a model, and what has to hold of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, hnsw_index, use_encoder
from sbert_pg.freshness import backfill
from sbert_pg.passages import SentenceChunker, passages_of
from sbert_pg.passages.cutting import cut, embedded_text
from sbert_pg.testing import DeterministicEncoder

CHUNKER = SentenceChunker(least=20, most=60)


class Base(DeclarativeBase):
    """Base of the documents of these tests."""


class Document(Base):
    """A document."""

    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    body: Mapped[str | None]
    passages = passages_of(
        "deterministic",
        source="body",
        heading="title",
        dimensions=32,
        chunker=CHUNKER,
        table_args=[hnsw_index("document_passage_hnsw", "embedding")],
    )


Passage: Any = Document.passages.property.mapper.class_


def text(number: int, sentences: int = 30) -> list[str]:
    """Sentences that no other text has."""
    return [
        f"Text {number} says in sentence {i} something of topic{(number * 7 + i * 13) % 101}."
        for i in range(sentences)
    ]


@pytest.fixture
def encoder() -> DeterministicEncoder:
    made = DeterministicEncoder(dimensions=32)
    use_encoder(made)
    return made


@pytest.fixture
def documents(engine: sa.Engine, encoder: DeterministicEncoder) -> sa.Engine:
    """The tables, bound."""
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    return engine


@pytest.fixture
def session(documents: sa.Engine) -> Iterator[Session]:
    with Session(documents) as made:
        yield made


@pytest.fixture
def plain(documents: sa.Engine) -> Iterator[psycopg.Connection]:
    """A writer that knows nothing of this library."""
    url = documents.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def work(engine: sa.Engine, base: type[DeclarativeBase] = Base) -> int:
    """Have everything cut and embedded that is not; the number of texts that were encoded."""
    return sum(
        backfill(engine, column).texts
        for table in base.metadata.sorted_tables
        for column in table.c
        if getattr(column.type, "encoder", None) is not None
    )


def require_whole(
    engine: sa.Engine, encoder: DeterministicEncoder, cls: type[Any] = Document
) -> None:
    """Every document has the passages of its text as it is, each with the vector of its part."""
    with Session(engine) as session:
        for document in session.scalars(sa.select(cls)):
            if document.title is None and document.body is None:
                assert not document.passages, document.id
                continue
            due = list(cut([document.title], document.body or "", CHUNKER, encoder))
            stored = document.passages
            assert [tuple(p) for p in due] == [
                (p.start, p.stop, p.heading, p.digest) for p in stored
            ], document.id
            assert [p.ordinal for p in stored] == list(range(len(due)))
            texts = [embedded_text(p.heading, p.text) for p in stored]
            for passage, vector in zip(stored, encoder.encode_document(texts), strict=True):
                assert abs(passage.embedding - vector).max() < 1e-6
