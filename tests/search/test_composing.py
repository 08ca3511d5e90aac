"""Searches beside relationships and names of the application's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    contains_eager,
    mapped_column,
    undefer,
)
from sqlalchemy.orm import relationship as related

from sbert_pg import (
    create_all,
    embed_on_flush,
    embedding_column,
    evaluate,
    explain_search,
    hnsw_index,
)
from sbert_pg.errors import DeclarationError, VectorError
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


class Named(Base):
    """Columns with the names of what a search gives."""

    __tablename__ = "named"
    __table_args__ = (hnsw_index("named_vectors", "embedding"), text_index("named_words", "words"))
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    score: Mapped[int] = mapped_column(default=-1)
    similarity: Mapped[int] = mapped_column(default=-1)
    query: Mapped[int] = mapped_column(default=-1)
    words_rank: Mapped[int] = mapped_column(default=-1)
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
        session.add_all(Named(id=n, title=f"named {n}") for n in range(12))
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


def test_an_object_that_is_known_to_have_no_vector(session: Session) -> None:
    session.execute(sa.update(Story).where(Story.id == 3).values(embedding=None))
    story = session.get_one(Story, 3, options=[undefer(Story.embedding)], populate_existing=True)
    with pytest.raises(VectorError, match="waits to be embedded"):
        nearest(Story.embedding, story)
    session.expire(story)
    search = nearest(Story.embedding, story)
    assert session.execute(search).all() == []
    assert "has no vector yet" in explain_search(session, search).reason


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


def test_what_is_counted_is_a_subquery(session: Session) -> None:
    searches = (
        nearest(Story.embedding, QUESTION),
        matching(Story.words, QUESTION),
        hybrid(Story.embedding, Story.words, QUESTION),
    )
    for search in searches:
        for count in (sa.func.count(), 1 + sa.func.max(Story.id)):
            for name in ("add_columns", "with_only_columns"):
                with pytest.raises(
                    DeclarationError, match=rf"{name}\(\) would work .*\.subquery\("
                ):
                    getattr(search, name)(count)
        of_labels = sa.select(sa.func.count()).where(labelled.c.story_id == Story.id)
        place = sa.func.count().over()
        rows = session.execute(search.add_columns(of_labels.scalar_subquery(), place)).all()
        assert {row[-2:] for row in rows} == {(2, len(rows))}
        counted = sa.select(sa.func.count()).select_from(search.subquery())
        assert session.scalar(counted) == len(rows)


@pytest.mark.parametrize(
    "options",
    [{"min_similarity": "0.9"}, {"max_distance": float("nan")}, {"min_similarity": float("nan")},
     {"ef_search": "x"}, {"probes": 1.5}, {"overfetch": "9"}, {"where": 5}],
)  # fmt: skip
def test_no_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(DeclarationError, match=f"{next(iter(options))}"):
        nearest(Story.embedding, QUESTION, **options)


def test_no_criterion(session: Session) -> None:
    none: Any = None
    assert len(ids(session, nearest(Story.embedding, QUESTION, where=none))) == 10
    text: Any = "1"
    with pytest.raises(DeclarationError, match="weight='1'"):
        hybrid(Story.embedding, Story.words, QUESTION, weight=text)


def test_own_names_beside_columns_of_the_same(session: Session) -> None:
    """By its name each value is one thing, in rows and in subqueries."""
    names = ("score", "similarity", "query", "words_rank")
    for columns in (Named, Named.__table__.c):
        for question in ("named 3", ["named 3", "named 5"]):
            for search, own in (
                (nearest(columns.embedding, question, limit=3), ["nearest_similarity"]),
                (matching(columns.words, question, limit=3), ["matching_score"]),
                (
                    hybrid(columns.embedding, columns.words, question, limit=3),
                    ["hybrid_score", "hybrid_similarity", "meaning_rank", "words_score",
                     "hybrid_words_rank"],
                ),
            ):  # fmt: skip
                many = [] if isinstance(question, str) else [f"{own[0].partition('_')[0]}_query"]
                found = search.subquery()
                keys = found.c.keys()
                assert keys[2:6] == [*names]
                assert keys[-len(own) - len(many) :] == [*own, *many]
                best = sa.select(found.c.title, found.c.score, found.c[own[0]])
                rows = session.execute(best.order_by(found.c[own[0]].desc())).all()
                assert rows[0][0] in ("named 3", "named 5")
                assert {row[1] for row in rows} == {-1}
                row = session.execute(search).first()
                assert row is not None
                assert all(hasattr(row, name) for name in [*own, *many])
    assert nearest(Story.embedding, QUESTION).subquery().c.keys()[-1] == "similarity"


def test_evaluating_goes_by_the_searchs_own_score(session: Session) -> None:
    searches = {
        "nearest": lambda questions: nearest(Named.embedding, questions),
        "matching": lambda questions: matching(Named.words, questions),
        "hybrid": lambda questions: hybrid(Named.embedding, Named.words, questions),
    }
    engine: Any = session.get_bind()
    report = evaluate(engine, searches, [("named 3", 3), ("named 5", 5)])
    assert [score.ndcg.value for score in report.scores] == [1, 1, 1]


@pytest.mark.parametrize(
    "search",
    [
        lambda question: nearest(Story.embedding, question, limit=2),
        lambda question: matching(Story.words, question, limit=2),
        lambda question: hybrid(Story.embedding, Story.words, question, limit=2),
    ],
    ids=["nearest", "matching", "hybrid"],
)
def test_two_searches_of_one_statement(session: Session, search: Any) -> None:
    """Each has its own parts, whose names are the same."""
    first, second = search("story word3"), search("story word7")
    one, two = ids(session, first), ids(session, second)
    assert one != two
    both = sa.select(Story).from_statement(sa.union_all(first, second))
    assert [row.id for row in session.scalars(both)] == [*one, *two]
    wrapped = (sa.select(found.c.id) for found in (first.subquery(), second.subquery()))
    assert session.scalars(sa.union_all(*wrapped)).all() == [*one, *two]
    a, b = first.cte("a"), second.subquery("b")
    assert len(session.execute(sa.select(a.c.id, b.c.id).join(b, sa.true())).all()) == 4
    within = search("story word3").where(Story.id.in_(second.with_only_columns(Story.id)))
    assert set(ids(session, within)) <= set(two)
