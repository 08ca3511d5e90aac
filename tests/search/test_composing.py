"""Searches beside relationships and names of the application's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, contains_eager, mapped_column
from sqlalchemy.orm import relationship as related

from sbert_pg import create_all, embed_on_flush, embedding_column, hnsw_index
from sbert_pg.search import hybrid, matching, nearest
from sbert_pg.testing import DeterministicEncoder
from sbert_pg.types.text import text_column, text_index


class Base(DeclarativeBase):
    pass


labelled = sa.Table(
    "labelled",
    Base.metadata,
    sa.Column("story_id", sa.ForeignKey("story.id"), primary_key=True),
    sa.Column("label_id", sa.ForeignKey("label.id"), primary_key=True),
)


class Label(Base):
    __tablename__ = "label"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Story(Base):
    __tablename__ = "story"
    __table_args__ = (
        hnsw_index("story_embedding", "embedding"),
        text_index("story_words", "words"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    labels: Mapped[list[Label]] = related(secondary=labelled)
    embedding = embedding_column("deterministic", source="title", dimensions=384, nullable=True)
    words = text_column("title")


@pytest.fixture
def session(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> Iterator[Session]:
    """Twelve stories, each with two of three labels."""
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        embed_on_flush(session)
        labels = [Label(id=n, name=f"label {n}") for n in range(3)]
        session.add_all(
            Story(id=n, title=f"story word{n}", labels=[labels[n % 3], labels[(n + 1) % 3]])
            for n in range(12)
        )
        session.commit()
        yield session


def ids(session: Session, statement: Any) -> list[int]:
    return [row[0].id for row in session.execute(statement).unique()]


QUESTION = "story word3"


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"limit": None}])
def test_a_join_to_many_by_a_table_between(session: Session, options: Any) -> None:
    """SQLAlchemy names the table between anew whenever it compiles the statement."""
    every = ids(session, nearest(Story.embedding, QUESTION, limit=None))
    has_one = [n for n in every if 1 in (n % 3, (n + 1) % 3)][: options.get("limit", 10)]
    search, other = nearest(Story.embedding, QUESTION, **options), aliased(Label)
    assert ids(session, search.join(Story.labels).where(Label.id == 1)) == has_one
    assert ids(session, search.join(Story.labels.of_type(other)).where(other.id == 1)) == has_one
    assert ids(session, search.outerjoin(Story.labels).where(Label.id.is_(None))) == []
    eager = search.join(Story.labels).where(Label.id == 1).options(contains_eager(Story.labels))
    assert [[label.id for label in story.labels] for story in session.scalars(eager).unique()] == [
        [1] for _ in has_one
    ]
    # Each row with each of its partners, in the order of these.
    pairs = session.execute(search.limit(4).join(Story.labels).add_columns(Label.id)).all()
    assert [label for *_, label in pairs] == [0, 1, *sorted((every[1] % 3, (every[1] + 1) % 3))]


def test_both_arms_join_to_many(session: Session) -> None:
    search = hybrid(Story.embedding, Story.words, QUESTION).join(Story.labels)
    found = ids(session, search.where(Label.name == "label 1"))
    assert found[0] == 3
    assert all(1 in (n % 3, (n + 1) % 3) for n in found)


def test_names_of_filter_by_are_the_entitys(session: Session) -> None:
    """Parts of a search are of more, in which SQLAlchemy 2.1 finds a name twice."""
    searches = {
        "nearest": nearest(Story.embedding, QUESTION),
        "exact": nearest(Story.embedding, QUESTION, exact=True, limit=None),
        "matching": matching(Story.words, QUESTION),
        "hybrid": hybrid(Story.embedding, Story.words, QUESTION),
    }
    for name, search in searches.items():
        assert ids(session, search.filter_by(title="story word5", id=5)) == [5], name
        assert ids(session, search.filter_by()) == ids(session, search), name
        named = search.join(Story.labels).filter_by(name="label 1")
        assert ids(session, named) == ids(
            session, search.join(Story.labels).where(Label.name == "label 1")
        )
    table = Story.__table__
    core = nearest(table.c.embedding, QUESTION).filter_by(title="story word5")
    assert [row.id for row in session.execute(core)] == [5]
    other = aliased(Story)
    assert ids(session, nearest(other.embedding, QUESTION).filter_by(id=7)) == [7]
