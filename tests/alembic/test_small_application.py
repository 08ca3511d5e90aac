"""For small applications: ``alembic upgrade head`` does all of it, with the real encoder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from sbert_pg import registry

BEFORE = """
class Article(Base):
    __tablename__ = "article"
    {arguments}
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    {column}
"""
AFTER = BEFORE.format(
    arguments='__table_args__ = (hnsw_index("ix_e", "embedding"),)',
    column='embedding = embedding_column("all-MiniLM-L6-v2", source="title", nullable=True)',
)
TITLES = [
    "How to get your money back",
    "Opening hours over Christmas",
    "We are hiring engineers",
    "Caring for leather boots",
    "Delivery to islands takes longer",
]
FILL = "op.backfill_embeddings('article', 'embedding')\nop.require_backfill('article', 'embedding')"


@pytest.fixture
def small(app: Any, minilm: Any) -> Any:
    # A table as a worker finds it, whatever name it is declared under.
    registry.use_encoder(minilm, name="all-MiniLM-L6-v2")
    app.models(BEFORE.format(arguments="", column=""))
    app.step("articles")
    for title in TITLES * 8:
        app.execute("INSERT INTO article (title) VALUES (:title)", title=title)
    app.models(AFTER)
    return app


def nearest(app: Any, minilm: Any, question: str) -> str:
    vector = "[" + ",".join(map(str, minilm.encode_query([question])[0].tolist())) + "]"
    return str(
        app.scalar(
            "SELECT title FROM article ORDER BY embedding <=> CAST(:v AS vector) LIMIT 1", v=vector
        )
    )


def test_upgrade_does_all_of_it(
    small: Any,
    minilm: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Column, vectors and index in one command, on a terminal with a bar."""
    app = small
    app.revision("embedding")
    (path,) = (app.root / "migrations" / "versions").glob("*_embedding.py")
    text = path.read_text()
    assert "op.require_backfill('article', 'embedding', max_missing=10000)" in text
    path.write_text(
        text.replace(
            "op.require_backfill('article', 'embedding', max_missing=10000)",
            "op.backfill_embeddings('article', 'embedding')",
        )
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    app.upgrade()
    shown = capfd.readouterr().err
    assert "embedding public.article.embedding" in shown
    assert "40/40" in shown
    assert app.check() == ""
    assert app.scalar("SELECT count(*) FROM article WHERE embedding IS NULL") == 0
    assert app.pending() == 0
    assert nearest(app, minilm, "refund") == "How to get your money back"
    assert nearest(app, minilm, "jobs") == "We are hiring engineers"
    # Down and up again, as on the next machine.
    app.downgrade("-1")
    app.upgrade()
    assert nearest(app, minilm, "shoes") == "Caring for leather boots"


@pytest.mark.slow
def test_no_bar_where_nobody_looks(small: Any, capfd: pytest.CaptureFixture[str]) -> None:
    app = small
    app.revision("embedding")
    app.empty_revision("fill", FILL)
    app.upgrade()
    assert "40/40" not in capfd.readouterr().err


def test_not_null_after_the_fill(small: Any) -> None:
    """A column declared ``nullable=False`` becomes so with the next autogenerate."""
    app = small
    app.models(AFTER.replace("nullable=True", "nullable=False"))
    app.revision("embedding")
    app.empty_revision("fill", FILL)
    app.upgrade()
    text = app.revision("not null")
    assert "nullable=False" in text
    assert text.index("op.require_backfill(") < text.index("op.alter_column(")
    app.upgrade()
    assert app.check() == ""
    with pytest.raises(sa.exc.IntegrityError):
        app.execute("INSERT INTO article (title) VALUES ('without a vector')")


def test_encoder_that_cannot_be_loaded(app: Any, make_app: Callable[..., Any]) -> None:
    """The message names it, the column stays, and the same command goes on later."""
    from sbert_pg.errors import EncoderError

    registry.forget_encoders()
    app.models(BEFORE.format(arguments="", column=""))
    app.step("articles")
    app.execute("INSERT INTO article (title) VALUES ('a')")
    app.models(
        BEFORE.format(
            arguments="",
            column='embedding = embedding_column(EncoderSpec(name="/nowhere/at-all", '
            'dimensions=384), source="title", nullable=True)',
        )
    )
    app.revision("embedding")
    app.empty_revision("fill", FILL)
    with pytest.raises(EncoderError, match="/nowhere/at-all"):
        app.upgrade()
    from sbert_pg.testing import DeterministicEncoder

    registry.use_encoder(DeterministicEncoder("/nowhere/at-all"))
    app.upgrade()
    assert app.check() == ""


def test_text_columns_are_written_compared_and_made_again(app: Any) -> None:
    declared = """
from sbert_pg import text_column, text_index
class Article(Base):
    __tablename__ = "article"
    __table_args__ = (text_index("article_search", "search"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(sa.String(80))
    body: Mapped[str]
    search = text_column({})
"""
    app.models(declared.format("'title'"))
    app.step("words")
    with app.engine.begin() as connection:
        connection.execute(
            sa.text("INSERT INTO article (title, body) VALUES ('The houses', 'A garden')")
        )
    app.models(declared.format("'title', 'body', language='simple', weights={'title': 2}"))
    app.step("more words")
    assert "garden" in app.scalar("SELECT search::text FROM article")
    app.downgrade("-1")
    assert app.scalar("SELECT search::text FROM article") == "'hous':2"
    assert app.scalar("SELECT count(*) FROM pg_indexes WHERE indexname = 'article_search'") == 1


@pytest.mark.filterwarnings("error:Computed default")
def test_text_columns_settle_whatever_their_sources_are(app: Any) -> None:
    """PostgreSQL writes a cast back only where the column is not ``text`` already."""
    app.execute("CREATE SCHEMA shop")
    app.options("include_schemas=True,")
    app.models("""
from sqlalchemy.dialects.postgresql import REGCONFIG
from sbert_pg import text_column, text_index
class Article(Base):
    __tablename__ = "article"
    __table_args__ = (text_index("article_words", "words"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str] = mapped_column(sa.Text)
    words = text_column("body")
class Thing(Base):
    __tablename__ = "My things"
    __table_args__ = (*(text_index(f"thing_{n}", n) for n in "pqrs"), {"schema": "shop"})
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column("Its: name", sa.Text)
    order: Mapped[str] = mapped_column(sa.String(80))
    code: Mapped[str] = mapped_column(sa.String)
    short: Mapped[str] = mapped_column(sa.CHAR(4))
    language: Mapped[str] = mapped_column(REGCONFIG)
    p = text_column("Its: name", "order", "code", "short", weights={"code": 3, "order": 2})
    q = text_column("code", "Its: name", language="simple")
    r = text_column("Its: name", language_column="language")
    s = text_column("order", "Its: name", weights={"Its: name": .5})
""")
    app.step("words")
    assert app.check() == ""
