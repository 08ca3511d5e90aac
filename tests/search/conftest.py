"""A small shop of articles, and a corpus of real texts that every machine has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

import sbert_pg
from sbert_pg import embedding_column, hnsw_index, ivfflat_index
from sbert_pg.cli.demo_data import standard_library
from sbert_pg.testing import DeterministicEncoder
from tests.conftest import Databases


class Shop(NamedTuple):
    """Mapped classes of a fresh metadata."""

    Base: Any
    Author: Any
    Article: Any
    Tag: Any


def make_shop(*indexes: sa.Index, **column: Any) -> Shop:
    """Articles with an author and tags; the indexes are on the articles."""

    class Base(DeclarativeBase):
        pass

    class Author(Base):
        __tablename__ = "author"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        articles: Mapped[list[Article]] = relationship(back_populates="author")

    class Article(Base):
        __tablename__ = "article"
        __table_args__ = indexes
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str | None]
        lang: Mapped[str] = mapped_column(default="en")
        author_id: Mapped[int | None] = mapped_column(sa.ForeignKey("author.id"))
        embedding = embedding_column(
            "deterministic", source="title", dimensions=384, nullable=True, **column
        )
        author: Mapped[Author | None] = relationship(back_populates="articles")
        tags: Mapped[list[Tag]] = relationship(back_populates="article")

    class Tag(Base):
        __tablename__ = "tag"
        id: Mapped[int] = mapped_column(primary_key=True)
        article_id: Mapped[int] = mapped_column(sa.ForeignKey("article.id"))
        name: Mapped[str]
        article: Mapped[Article] = relationship(back_populates="tags")

    # Annotations of local classes are looked up in the registry of the base.
    return Shop(Base, Author, Article, Tag)


def hnsw(form: Any = "column", **options: Any) -> sa.Index:
    return hnsw_index("article_embedding", "embedding", form=form, **options)


FORMS: dict[str, Callable[[], tuple[sa.Index, ...]]] = {
    "none": lambda: (),
    "hnsw": lambda: (hnsw(),),
    "halfvec": lambda: (hnsw("halfvec"),),
    "binary": lambda: (hnsw("binary"),),
    "ivfflat": lambda: (ivfflat_index("article_embedding", "embedding", lists=1),),
}


@pytest.fixture
def database_url(request: pytest.FixtureRequest, databases: Databases) -> Iterator[sa.URL]:
    """A fresh database, which has its articles where a test has ``shop`` or ``indexed``."""
    if {"shop", "indexed"}.isdisjoint(request.fixturenames):
        url = databases.clone("catalog")
    else:
        request.getfixturevalue("fake_encoder")
        form = request.getfixturevalue("form") if "indexed" in request.fixturenames else "hnsw"
        url = databases.prepared(
            f"shop_{form}", lambda engine: fill(engine, make_shop(*FORMS[form]()))
        )
    yield url
    databases.discard(str(url.database))


@pytest.fixture
def shop(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> Shop:
    """Forty articles in the database, some of them with equal texts, and one without a text."""
    return make_shop(hnsw())


def titles() -> list[str | None]:
    words = ["refund", "returns", "opening", "hours", "careers", "privacy", "shipping", "gift"]
    made: list[str | None] = [
        f"{a} {b}" for n, a in enumerate(words) for b in [*words[n + 1 :], "now"]
    ]
    return [
        *made[:35],
        "refund returns",
        "refund returns",
        "refund returns",
        "refund returns",
        None,
    ]


def fill(engine: sa.Engine, shop: Shop) -> None:
    with engine.begin() as connection:
        sbert_pg.create_all(connection, shop.Base.metadata)
    with Session(engine) as session:
        sbert_pg.embed_on_flush(session)
        authors = [shop.Author(id=n, name=f"author {n}") for n in range(4)]
        articles = [
            shop.Article(
                id=n,
                title=title,
                lang="de" if n % 3 == 0 else "en",
                author=authors[n % 4],
                tags=[shop.Tag(name=f"tag {m}") for m in range(n % 3)],
            )
            for n, title in enumerate(titles(), 1)
        ]
        session.add_all(articles)
        session.commit()


@pytest.fixture
def session(engine: sa.Engine) -> Iterator[Session]:
    with Session(engine) as made:
        yield made


@pytest.fixture
def statements(engine: sa.Engine) -> list[str]:
    """Every statement of the engine that reads articles, as it is sent."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "FROM article" in statement:
            sent.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    return sent


Plan = Callable[[Session, Any], str]


@pytest.fixture
def plan(engine: sa.Engine) -> Plan:
    """The plan that the server makes for a statement, parameters and all."""

    def explain(session: Session, statement: Any) -> str:
        sent: list[Any] = []

        def note(_c: Any, _cursor: Any, text: str, parameters: Any, *_rest: Any) -> None:
            sent.append((text, parameters))

        session.execute(statement).all()
        sa.event.listen(engine, "before_cursor_execute", note)
        session.execute(statement).all()
        sa.event.remove(engine, "before_cursor_execute", note)
        text, parameters = sent[-1]
        driver: Any = session.connection().connection.driver_connection
        rows = driver.execute("EXPLAIN " + text, parameters).fetchall()
        return "\n".join(row[0] for row in rows)

    return explain


class Corpus(NamedTuple):
    """Real texts with their vectors, and queries in words with theirs.

    ``kinds`` are the texts' own: the package that a docstring is of, the intent of a question.
    """

    texts: list[str]
    vectors: npt.NDArray[np.float32]
    queries: npt.NDArray[np.float32]
    kinds: list[str]

    def nearest(self, query: Any, keep: Any = None, limit: int = 10) -> list[int]:
        """Numbers of the rows nearest by exact search in numpy."""
        similarity = self.vectors @ (query / np.linalg.norm(query))
        if keep is not None:
            similarity = np.where(keep, similarity, -np.inf)
        return [int(n) for n in np.argsort(-similarity, kind="stable")[:limit]]


QUESTIONS = """
parse a date from text | compare two files line by line | send an e-mail with attachment |
compress a file | run a command and read its output | wait for several threads to finish |
read a configuration file | generate a random number | split a string on white space |
open a network connection | convert a number to hexadecimal | sort a list by a key |
remove a directory with everything in it | log messages to a file | parse command line arguments |
read rows of a spreadsheet | encode binary data as text | time how long code takes |
mock an object in a test | draw a window with a button | walk over a tree of nodes |
copy an object deeply | escape special characters in html | lock a shared resource |
store objects on disk | format a paragraph to a width | check that a certificate is valid |
find the median of numbers | iterate over pairs of items | schedule a call for later |
trace where memory was allocated | download a page from the web | compute a checksum |
cancel a task that runs | look up the address of a host | cache the results of a function
"""


@pytest.fixture(scope="session")
def corpus(_minilm: Any) -> Corpus:
    """Paragraphs of the docstrings of the standard library."""
    seen: dict[str, str] = {}
    for entry in standard_library():
        for paragraph in entry.docstring.split("\n\n"):
            text = " ".join(paragraph.split())
            if 20 <= len(text) <= 400:
                seen[text] = entry.module.partition(".")[0]
    texts = list(seen)[:6000]
    return Corpus(
        texts,
        _minilm.encode_document(texts),
        _minilm.encode_query([question.strip() for question in QUESTIONS.split("|")]),
        list(seen.values())[:6000],
    )
