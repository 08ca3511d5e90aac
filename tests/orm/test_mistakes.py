"""What is given in the place of something else is refused in a sentence that says what to give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import (
    bind,
    create_all,
    embed_rows,
    embedding_column,
    explain_search,
    explain_words,
    hnsw_index,
    hybrid,
    indexes_per,
    load,
    matching,
    nearest,
    require_ready,
    text_column,
    use_encoder,
)
from sbert_pg.clustering import KMeans, assign, cluster, clusters_of, drift
from sbert_pg.errors import DeclarationError, NotBoundError, SourceError
from sbert_pg.freshness import status
from sbert_pg.tuning import evaluate


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "mistaken_article"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    embedding = embedding_column("all-MiniLM-L6-v2", source="title", nullable=True)
    words = text_column("title")


topics = clusters_of(Article.embedding)
#: Nothing connects: each is refused before.
engine = sa.create_engine("postgresql+psycopg://nobody@localhost:1/nowhere")
asynchronous = create_async_engine("postgresql+asyncpg://nobody@localhost:1/nowhere")

BY_CONNECTION: dict[str, Callable[[Any], object]] = {
    "load": lambda given: load(given, Article, []),
    "create_all": lambda given: create_all(given, Base.metadata),
    "bind": lambda given: bind(given, Article.__table__.c.embedding),
    "status": status,
    "explain_search": lambda given: explain_search(given, nearest(Article.embedding, [1.0] * 384)),
    "explain_words": lambda given: explain_words(given, matching(Article.words, "hours")),
    "assign": lambda given: assign(given, topics),
    "drift": lambda given: drift(given, topics),
}


@pytest.fixture
def connection() -> Iterator[sa.Connection]:
    with sa.create_engine("sqlite://").connect() as opened:
        yield opened


@pytest.mark.parametrize("name", BY_CONNECTION)
@pytest.mark.parametrize("given", [engine, asynchronous, asynchronous.connect()])
def test_an_engine_is_no_connection(name: str, given: Any) -> None:
    with pytest.raises(DeclarationError, match=rf"^{name}\(\) takes a connection, .*run_sync"):
        BY_CONNECTION[name](given)


def test_a_connection_is_no_engine(connection: sa.Connection) -> None:
    for given in (connection, asynchronous):
        with pytest.raises(DeclarationError, match=r"^cluster\(\) needs a synchronous engine"):
            cluster(given, topics, KMeans(2))  # type: ignore[arg-type]
        with pytest.raises(DeclarationError, match="needs a synchronous engine, and got"):
            evaluate(given, {}, [("a question", 1)])  # type: ignore[arg-type]


def test_a_class_is_not_its_metadata(connection: sa.Connection) -> None:
    with pytest.raises(DeclarationError, match=r"Give Base\.metadata\."):
        create_all(connection, Base)  # type: ignore[arg-type]


def test_the_check_at_the_start_says_what_it_takes() -> None:
    with pytest.raises(DeclarationError, match=r"run_sync\(require_ready"):
        require_ready(asynchronous, Base)  # type: ignore[arg-type]
    with pytest.raises(NotBoundError, match="'shop' declares no embedding column"):
        require_ready(engine, "shop")


def test_a_text_is_no_criterion() -> None:
    for search in (
        lambda where: nearest(Article.embedding, [1.0] * 384, where=where),
        lambda where: matching(Article.words, "hours", where=where),
        lambda where: hybrid(Article.embedding, Article.words, "hours", where=where),
    ):
        with pytest.raises(DeclarationError, match=r"where=text\('id > 1'\)"):
            search("id > 1")


def test_a_column_of_another_kind_is_named() -> None:
    with pytest.raises(DeclarationError, match=r"given Article\.title, which is no vector"):
        nearest(Article.title, "hours")
    with pytest.raises(DeclarationError, match=r"given Article\.embedding, which is no text"):
        matching(Article.embedding, "hours")


def test_one_is_no_list() -> None:
    with pytest.raises(DeclarationError, match="takes a list of rows"):
        embed_rows(Article, {"title": "Jobs"})  # type: ignore[arg-type]
    (index,) = indexes_per("lang", "en", hnsw_index, "article_embedding", "embedding")
    assert index.name == "article_embedding_en"


def test_a_name_is_no_encoder() -> None:
    with pytest.raises(DeclarationError, match=r"use_encoder\(Encoder\.load\('all-MiniLM-L6-v2'"):
        use_encoder("all-MiniLM-L6-v2")  # type: ignore[arg-type]


def test_a_statement_is_no_search_to_be_evaluated() -> None:
    search: Any = nearest(Article.embedding, [1.0] * 384)
    with pytest.raises(DeclarationError, match="'meaning' is a statement; give a function"):
        evaluate(engine, {"meaning": search}, [("a question", 1)])


def test_a_function_is_no_source() -> None:
    with pytest.raises(SourceError, match="at least one column"):
        embedding_column("all-MiniLM-L6-v2", source=None)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="neither a trigger nor another process"):
        embedding_column("all-MiniLM-L6-v2", source=lambda row: row.title)  # type: ignore[arg-type]


def test_a_number_of_clusters_is_shown_as_it_was_given() -> None:
    with pytest.raises(DeclarationError, match="n_clusters is 'many'"):
        KMeans("many")  # type: ignore[arg-type]
    assert KMeans([3, 2]).n_clusters == (2, 3)
