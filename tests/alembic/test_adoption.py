"""An application with a history of its own adopts an embedding column."""

from __future__ import annotations

BEFORE = """
class Article(Base):
    __tablename__ = "article"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str | None]
"""
AFTER = """
class Article(Base):
    __tablename__ = "article"
    __table_args__ = (hnsw_index("article_embedding", "embedding"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str | None]
    embedding = embedding_column(ENCODER, source=["title", "body"], nullable=True)
"""


def test_adopt(app) -> None:
    app.models(BEFORE)
    app.step("articles")
    app.execute("INSERT INTO article (title) SELECT 'text ' || i FROM generate_series(1, 50) i")
    app.models(AFTER)
    text = app.step("embedding")
    assert "op.add_embedding_column(" in text
    assert app.pending() == 50
    assert app.scalar("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'sbert%'") >= 3
    assert app.scalar("SELECT count(*) FROM pg_indexes WHERE indexname = 'article_embedding'") == 1
    app.execute("INSERT INTO article (title) VALUES ('a new one')")
    assert app.pending() == 51
    app.downgrade("-1")
    assert app.scalar("SELECT to_regnamespace('sbert') IS NULL")
    assert app.scalar("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal") == 0
    assert app.scalar("SELECT count(*) FROM article") == 51
    app.upgrade()
    assert app.check() == ""
    assert app.pending() == 51
