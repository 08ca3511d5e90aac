"""A table of articles, searched through servers that run in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, embedding_column, refresh, text_column, use_encoder
from sbert_pg.cli.serve import looking
from sbert_pg.serving.exposed import Shown

ARTICLES = [
    ("Refunds", "How to get your money back after a purchase", "en", 2021),
    ("Opening hours", "When the shop is open on Sundays", "en", 2022),
    ("Careers", "Jobs at the company, and how to apply", "en", 2023),
    ("Rückgabe", "So bekommen Sie Ihr Geld zurück", "de", 2021),
]


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "article"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str]
    lang: Mapped[str]
    year: Mapped[int | None]
    secret: Mapped[str] = mapped_column(default="hush")
    embedding = embedding_column("all-MiniLM-L6-v2", source=["title", "body"], nullable=True)
    words = text_column("title", "body", language="english")


@pytest.fixture(scope="session")
def article_template(databases: Any, _minilm: Any) -> str:
    """A database with the table, filled and embedded by the real encoder."""
    if "articles" not in databases.templates:
        url = databases.clone("catalog")
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        use_encoder(_minilm, name="all-MiniLM-L6-v2")
        with engine.begin() as connection:
            create_all(connection, Base.metadata)
        with Session(engine) as session, session.begin():
            for title, body, lang, year in ARTICLES:
                session.add(Article(title=title, body=body, lang=lang, year=year))
        assert refresh(engine).embedded == len(ARTICLES)
        databases.templates["articles"] = url.database
    return "articles"


@pytest.fixture(scope="session")
def article_url(databases: Any, article_template: str) -> Iterator[sa.URL]:
    """A clone for the tests that only read."""
    url = databases.clone(article_template)
    yield url
    databases.drop(url.database)


@pytest.fixture
def articles(article_url: sa.URL, minilm: Any) -> Iterator[sa.Engine]:
    """An engine of the table, the encoder at hand."""
    engine = sa.create_engine(article_url)
    yield engine
    engine.dispose()


@pytest.fixture
def shown(articles: sa.Engine) -> Shown:
    """The articles without their secrets."""
    return Shown(articles, looking(["article:id,title,lang,year"]))


@pytest.fixture
def client() -> Iterator[Any]:
    """Makes clients of a port."""
    made: list[httpx.Client] = []

    def of(port: int, **options: Any) -> httpx.Client:
        made.append(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, **options))
        return made[-1]

    yield of
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    logger = logging.getLogger("sbert_pg")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)
