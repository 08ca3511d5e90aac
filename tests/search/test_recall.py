"""Approximate search against exact search, on real texts with a real encoder."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import bind_all, embedding_column, hnsw_index, ivfflat_index, load, nearest
from tests.conftest import MINILM, Databases
from tests.search.conftest import Corpus

FORMS: dict[str, Any] = {
    "vector": lambda name: hnsw_index(f"{name}_e", "embedding"),
    "halfvec": lambda name: hnsw_index(f"{name}_e", "embedding", form="halfvec"),
    "binary": lambda name: hnsw_index(f"{name}_e", "embedding", form="binary"),
    "ivfflat": lambda name: ivfflat_index(f"{name}_e", "embedding", lists=36),
}
#: A filter that keeps one row in a hundred.
PARTS = 100
FLOOR = 0.98


def documents(form: str) -> Any:
    """A mapped class whose table has one kind of index."""

    class Base(DeclarativeBase):
        pass

    class Document(Base):
        __tablename__ = f"document_{form}"
        __table_args__ = (FORMS[form](form),)
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        part: Mapped[int]
        embedding = embedding_column(MINILM, source="text", nullable=True)

    return Document


def loaded(engine: sa.Engine, form: str, corpus: Corpus) -> Any:
    document = documents(form)
    table = document.__table__
    index = next(iter(table.indexes))
    rows = (
        {"id": n, "text": text, "part": n % PARTS, "embedding": vector}
        for n, (text, vector) in enumerate(zip(corpus.texts, corpus.vectors, strict=True))
    )
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateTable(table))
        bind_all(connection, table.metadata)
        load(connection, document, rows)
        # An index is built in a fraction of the time that filling it takes.
        connection.execute(sa.schema.CreateIndex(index))
        connection.execute(sa.text(f"ANALYZE {table.name}"))
    return document


@pytest.fixture(scope="module")
def standard(databases: Databases, _minilm: Any, corpus: Corpus) -> Iterator[sa.Engine]:
    """A database whose planner takes the index, as it would in a table a hundred times larger."""
    url = databases.clone("catalog")
    engine = sa.create_engine(url, connect_args={"options": "-c enable_seqscan=off"})
    yield engine
    engine.dispose()
    databases.drop(str(url.database))


def recall(session: Session, document: Any, corpus: Corpus, keep: Any, **options: Any) -> float:
    """Mean share of the ten nearest that a search finds; a filter keeps the parts ``keep``."""
    numbers = np.arange(len(corpus.texts)) % PARTS
    mask = None if keep is None else np.isin(numbers, keep)
    shares = []
    for query in corpus.queries:
        statement = nearest(document.embedding, query, **options)
        if keep is not None:
            statement = statement.where(document.part.in_(keep))
        rows = session.execute(statement).all()
        found = [row[0].id for row in rows]
        assert len(found) == len(set(found)) == 10
        similarities = [row.similarity for row in rows]
        assert similarities == sorted(similarities, reverse=True)
        shares.append(len(set(found) & set(corpus.nearest(query, mask))) / 10)
    return float(np.mean(shares))


def assert_pages(session: Session, statement: Any) -> None:
    """Six pages of ten have sixty rows, and those of one page of sixty but for its better recall.

    Under a filter the index gives rows out of order, and each page sees more of them.
    """
    seen = [row[0].id for row in session.execute(statement)]
    for offset in range(10, 60, 10):
        seen += [row[0].id for row in session.execute(statement.offset(offset))]
    assert len(seen) == len(set(seen)) == 60


@pytest.mark.parametrize("form", ["vector", "halfvec", "binary"])
def test_recall_with_the_defaults(
    form: str, standard: sa.Engine, corpus: Corpus, minilm: Any
) -> None:
    document = loaded(standard, form, corpus)
    with Session(standard) as session:
        assert recall(session, document, corpus, None, exact=True) == 1
        assert recall(session, document, corpus, None) >= FLOOR
        assert recall(session, document, corpus, [7]) >= FLOOR
        assert recall(session, document, corpus, list(range(10))) >= FLOOR
        # And the default is what does it.
        assert recall(session, document, corpus, None, ef_search=10, overfetch=1) < FLOOR
        for query in corpus.queries[:8]:
            assert_pages(session, nearest(document.embedding, query))
            assert_pages(session, nearest(document.embedding, query).where(document.part < 5))


def test_words_find_what_they_mean(standard: sa.Engine, corpus: Corpus, minilm: Any) -> None:
    document = loaded(standard, "ivfflat", corpus)
    with Session(standard) as session:
        statement = nearest(document.embedding, "compress a file", limit=5)
        found = " ".join(d.text.lower() for d in session.scalars(statement))
        assert "compress" in found or "zip" in found
        assert recall(session, document, corpus, None, probes=36) == 1
        assert recall(session, document, corpus, [7], probes=36) == 1


@pytest.fixture(scope="module")
def customers(data_dir: Path, _minilm: Any) -> Corpus:
    """Short questions about few topics, which are hard to tell apart."""
    texts: list[str] = []
    for name in ("train.csv", "test.csv"):
        with (data_dir / "banking77" / name).open(encoding="utf-8") as file:
            texts += [row["text"].strip() for row in csv.DictReader(file)]
    chosen = np.random.default_rng(0).permutation(len(texts))[:8060]
    texts = [texts[n] for n in chosen]
    vectors = _minilm.encode_document(texts)
    return Corpus(texts[60:], vectors[60:], vectors[:60])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["vector", "halfvec", "binary"])
def test_recall_on_questions_of_customers(
    form: str, standard: sa.Engine, customers: Corpus, minilm: Any
) -> None:
    with standard.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE IF EXISTS document_{form}"))
    document = loaded(standard, form, customers)
    with Session(standard) as session:
        assert recall(session, document, customers, None) >= FLOOR
        assert recall(session, document, customers, [7]) >= FLOOR
