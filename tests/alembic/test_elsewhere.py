"""Migrations with operations of this library on SQLite, where models are tested."""

from __future__ import annotations

import logging
import runpy
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from sbert_pg import embed_on_flush
from sbert_pg.testing import DeterministicEncoder

ARTICLE = """
class Article(Base):
    __tablename__ = "article"
    __table_args__ = (hnsw_index("ix_e", "embedding"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    embedding = embedding_column("deterministic", source="title", nullable=True, dimensions=384)
"""


def columns(app: Any) -> list[str]:
    return [column["name"] for column in sa.inspect(app.engine).get_columns("article")]


@pytest.fixture
def sqlite(make_app: Any, app: Any, tmp_path: Any, fake_encoder: DeterministicEncoder) -> Any:
    """An application on SQLite with the migrations that autogenerate wrote on PostgreSQL."""
    app.models(ARTICLE)
    app.step("articles")
    other = make_app(sa.make_url(f"sqlite:///{tmp_path / 'app.db'}"), "other")
    other.models(ARTICLE)
    for written in (app.root / "migrations" / "versions").glob("*.py"):
        (other.root / "migrations" / "versions" / written.name).write_text(written.read_text())
    return other


def test_the_same_migrations(sqlite: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sbert_pg.alembic"):
        sqlite.upgrade()
    assert (
        "op.bind_embedding_column: on sqlite columns come and go, and no more." in caplog.messages
    )
    assert columns(sqlite) == ["id", "title", "embedding_of", "embedding"]
    article = runpy.run_path(str(sqlite.root / "models.py"))["Article"]
    with Session(sqlite.engine) as session:
        embed_on_flush(session)
        session.add(article(title="a"))
        session.commit()
        row = session.scalars(sa.select(article)).one()
        assert (row.title, row.embedding.shape) == ("a", (384,))
    sqlite.downgrade("base")
    assert sa.inspect(sqlite.engine).get_table_names() == ["alembic_version"]


def test_each_operation_on_columns(sqlite: Any) -> None:
    sqlite.upgrade()
    declared = "encoder='deterministic', source='title', dimensions=384"
    both = {"third", "third_of"}
    steps = [
        (f"op.add_embedding_column('article', 'second', {declared})", {"second", "second_of"}),
        ("op.rename_bound_column('article', 'second', 'third')", both),
        ("op.unbind_embedding_column('article', 'third')", {"third"}),
        (f"op.bind_embedding_column('article', 'third', {declared})", both),
        ("op.backfill_embeddings('article', 'third')", both),
        ("op.require_backfill('article', 'third')", both),
        ("op.drop_embedding_column('article', 'third')", set()),
    ]
    before = set(columns(sqlite))
    for number, (step, added) in enumerate(steps):
        sqlite.empty_revision(f"step {number}", step)
        sqlite.upgrade()
        assert set(columns(sqlite)) - before == added, step
    assert "ADD COLUMN second" in sqlite.sql()
