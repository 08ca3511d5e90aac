"""Passages in an application's history: written by autogenerate, quiet after, and immutable."""

from __future__ import annotations

import pytest
from alembic.util import CommandError

MODEL = """
from sbert_pg import passages_of
from sbert_pg.passages import SentenceChunker

class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    body: Mapped[str | None]
"""
PASSAGES = """    passages = passages_of(
        ENCODER, source="body", heading="title", chunker=SentenceChunker({least}, 60),
        table_args=[hnsw_index("document_passage_hnsw", "embedding")],
    )
"""


def test_a_table_with_documents_gets_passages(app) -> None:
    app.models(MODEL)
    app.step()
    with app.engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO document (body) VALUES ('A text. It is there.')")
    app.models(MODEL + PASSAGES.format(least=20))
    text = app.step()
    assert "'document_passage'" in text
    assert app.check() == ""
    bound = "SELECT string_agg(column_name, ' ' ORDER BY column_name) FROM sbert.binding"
    assert app.scalar(bound) == "embedding passages_embedding"
    # What was there before is a backfill's.
    assert app.scalar("SELECT count(*) FROM document WHERE passages_embedding_of IS NULL") == 1
    app.models(MODEL + PASSAGES.format(least=21))
    with pytest.raises(CommandError, match="passages_of"):
        app.step()
