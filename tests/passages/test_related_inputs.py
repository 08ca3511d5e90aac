"""Texts and classes that somebody has and nobody thinks of: offsets, searches and time hold."""

from __future__ import annotations

import time
import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from passage_documents import CHUNKER, Document, require_whole, text, work
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, hnsw_index, hybrid, nearest, passages_of, text_column
from sbert_pg.passages import FixedChunker, PassageView
from sbert_pg.passages.cutting import cut
from sbert_pg.passages.structure import units
from sbert_pg.testing import DeterministicEncoder

BODIES = {
    "equal": "The same sentence stands here again and again. " * 200,
    "empty": "",
    "blank": " \n\t ",
    "one word": "x" * 100_000,
    "no blanks": "日本語の文章です" * 4_000,
    "sentences of Chinese": "这是一句话。那也是！" * 900,
    "emoji": "👩\u200d👩\u200d👧\u200d👦🏽 family. " * 500,
    "combining": "e\u0301a\u0308o\u0302 " * 2_000,
    "right to left": "هذه جملة قصيرة. וזה משפט. " * 200,
    "invisible": "\u200b\u200d\ufeff " * 2_000,
    "line ends": "One line.\r\n\r\n# Part\r\n\r\nAnother\u2028line.\r\n" * 80,
    "full stops": "." * 5_000 + " ... " * 200,
    "table": "| name | number |\n|---|---|\n" + "| row | 4711 |\n" * 400,
    "code": "# Code\n\n```python\n" + "call(1, 2)  # a comment.\n" * 300 + "```\n\nBehind it.",
    "fence without an end": "Before.\n\n```\n" + "code = 1\n" * 300,
    "html": "<h1>A &amp; B</h1><table>" + "<tr><td>1</td></tr>" * 300 + "</table><p>End.</p>",
    "tags without an end": "<ul><table><pre>" * 200,
    "headings alone": "# A\n\n## B\n\n### C\n\n# D\n",
    "long heading": "# " + "heading " * 300 + "\n\nText under it.",
    "quotes": 'It\'s 100% \\ "quoted" {braces} $1 %s :name. ' * 60,
}


def test_offsets_are_those_of_the_text_in_python_and_in_the_database(
    session: Session, documents: sa.Engine, encoder: DeterministicEncoder
) -> None:
    session.add_all(Document(title=name, body=body) for name, body in BODIES.items())
    session.commit()
    work(documents)
    require_whole(documents, encoder)
    session.execute(PassageView(Document.passages))
    read = session.execute(sa.text("SELECT id, text FROM document_passage_text"))
    in_database = {row.id: row.text for row in read}
    for document in session.scalars(sa.select(Document)):
        for passage in document.passages:
            part = document.body[passage.start : passage.stop]
            assert in_database[passage.id] == passage.text == part, document.title
            start, stop, sentence = passage.highlight("another sentence")
            assert document.body[start:stop] == sentence, document.title
            assert passage.start <= start <= stop <= passage.stop, document.title
    # Swapped among each other, all of them are cut as they are now.
    session.execute(
        sa.text(
            "UPDATE document SET body = (SELECT o.body FROM document o "
            "WHERE o.id = document.id % (SELECT count(*) FROM document) + 1)"
        )
    )
    session.commit()
    work(documents)
    require_whole(documents, encoder)


def test_each_of_them_is_found_once(session: Session, documents: sa.Engine) -> None:
    session.add_all(Document(title=name, body=body) for name, body in BODIES.items())
    session.commit()
    work(documents)
    for options in ({}, {"score": "best"}, {"per_document": 3}, {"exact": True}):
        statement: Any = nearest(Document.passages, "The same sentence", limit=50, **options)
        rows = session.execute(statement).all()
        assert {row.Document.title for row in rows} == set(BODIES), options
        assert len({row.DocumentPassage.id for row in rows}) == len(rows), options
    pages = [
        [row.Document.id for row in session.execute(statement.limit(3).offset(n))]
        for n in range(0, 24, 3)
    ]
    found = [key for page in pages for key in page]
    assert len(found) == len(set(found)) == len(BODIES)


@pytest.mark.parametrize("body", [
    "." * 200_000 + "x", "<ul>\n" * 40_000, "```a\n" * 40_000, "# a" + " " * 200_000 + "b",
    "\u200b\n\n" * 60_000, "<pre " * 40_000, "- a\n  - b\n" * 20_000, "1" * 200_000,
], ids=["stops", "lists", "fences", "blanks", "invisible", "tags", "items", "digits"])  # fmt: skip
def test_no_text_takes_the_square_of_its_length(body: str) -> None:
    """Of processor time, and against sentences of the same length: other work does not count."""

    def spent(read: str) -> float:
        started = time.process_time()
        for _ in units(read):
            pass
        return time.process_time() - started

    usual = spent("Some words of a sentence. " * (len(body) // 26))
    # Looked at from each place to the end it would be some thousand times as much.
    assert spent(body) < 50 * usual + 2


def test_a_sentence_nobody_sees_counts(encoder: DeterministicEncoder) -> None:
    for chunker in (CHUNKER, FixedChunker(30, 0)):
        passages = list(cut((), "\u200b\n\n" * 400, chunker, encoder))
        assert len(passages) > 5, chunker


class Base(DeclarativeBase):
    """Base of the reports."""


class Report(Base):
    """A key of two parts, and columns with the names of what a search gives."""

    __tablename__ = "report"
    tenant: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    score: Mapped[str | None]
    similarity: Mapped[int]
    query: Mapped[str] = mapped_column(default="none")
    start: Mapped[int] = mapped_column(default=7)
    body: Mapped[str]
    passages = passages_of(
        "deterministic", source="body", heading="score", dimensions=32, chunker=CHUNKER,
        table_args=[hnsw_index("report_passage_hnsw", "embedding")],
    )  # fmt: skip
    words = text_column("body")


def test_names_and_keys_of_the_application_are_its_own(
    engine: sa.Engine, encoder: DeterministicEncoder
) -> None:
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        for n in range(24):
            session.add(Report(
                tenant="ab"[n % 2], number=uuid.UUID(int=n), score=f"title {n}", similarity=n,
                body=" ".join(text(n, 12 + n)),
            ))  # fmt: skip
        session.commit()
        work(engine, Base)
        passage: Any = Report.passages.property.mapper.class_
        where = [Report.tenant == "a", passage.ordinal > 0, Report.similarity < 20]
        rows = session.execute(nearest(Report.passages, "topic13", limit=30, where=where)).all()
        assert {row.Report.similarity for row in rows} == set(range(0, 20, 2))
        assert all(row.ReportPassage.ordinal > 0 for row in rows)
        parts = nearest(Report.passages, "topic13", of="passage", limit=400, where=where)
        found = session.execute(parts).all()
        assert len(found) == session.scalar(
            sa.select(sa.func.count()).select_from(passage).join(passage.document).where(*where)
        )
        questions = ["topic13", "sentence 4"]
        for fusion in ("relative", "rrf"):
            for question in (questions[0], questions):
                options: Any = {"limit": 5, "fusion": fusion}
                both = hybrid(Report.passages, Report.words, question, **options)
                both = both.where(Report.tenant == "b")
                rows = session.execute(both).all()
                assert len(rows) == 5 * (len(questions) if question is questions else 1)
                assert {row.Report.tenant for row in rows} == {"b"}
                assert all(isinstance(row.hybrid_score, float) for row in rows)
        many = session.execute(nearest(Report.passages, questions, limit=4)).all()
        assert [row[-1] for row in many] == [0] * 4 + [1] * 4
