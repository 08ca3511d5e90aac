"""Meaning and words in one answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import embed_on_flush, embedding_column
from sbert_pg.errors import DeclarationError
from sbert_pg.search import hybrid, matching, nearest
from sbert_pg.search.fusion import weight_of
from sbert_pg.types.text import text_column

TITLES = [
    "Refunds and returns", "When we are open", "Jobs and careers", "Track a parcel",
    "Wrap it as a gift", "Reset your password", "Pay by card or invoice", "Model XJ-4711 manual",
    "Model XJ-4712 manual", "Change your address",
]  # fmt: skip


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "page"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    lang: Mapped[str] = mapped_column(default="en")
    embedding = embedding_column("all-MiniLM-L6-v2", source="title", nullable=True)
    search = text_column("title")


@pytest.fixture
def session(bare_database_url: sa.URL, minilm: Any) -> Any:
    from sbert_pg import use_encoder

    use_encoder(minilm, name="all-MiniLM-L6-v2")
    engine = sa.create_engine(bare_database_url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        embed_on_flush(session)
        session.add_all(
            Page(id=n, title=title, lang="de" if n % 2 else "en") for n, title in enumerate(TITLES)
        )
        session.commit()
        yield session
    engine.dispose()


def titles(session: Session, statement: Any) -> list[str]:
    return [row[0].title for row in session.execute(statement)]


@pytest.mark.parametrize("fusion", ["relative", "rrf"])
def test_both_arms_bring_what_they_know(session: Session, fusion: Any) -> None:
    meaning = hybrid(Page.embedding, Page.search, "get my money back", fusion=fusion, limit=3)
    assert titles(session, meaning)[0] == "Refunds and returns"
    identifier = hybrid(Page.embedding, Page.search, "XJ-4712", fusion=fusion, limit=3)
    assert titles(session, identifier)[0] == "Model XJ-4712 manual"
    row = session.execute(identifier).first()
    assert row is not None
    assert row.words_rank == 1
    assert row.similarity is not None
    assert row.score > 0


def test_an_arm_that_finds_nothing_takes_nothing_away(session: Session) -> None:
    question = "get my money back"
    assert session.execute(matching(Page.search, question)).all() == []
    both = titles(session, hybrid(Page.embedding, Page.search, question, limit=10))
    assert both == titles(session, nearest(Page.embedding, question, limit=10))
    session.execute(sa.update(Page).values(embedding=None))
    only_words = titles(session, hybrid(Page.embedding, Page.search, "manual", limit=10))
    assert only_words == titles(session, matching(Page.search, "manual"))


def test_filters_reach_both_arms_and_pages_follow_each_other(session: Session) -> None:
    statement = hybrid(Page.embedding, Page.search, "model manual", limit=4).where(
        Page.lang == "en"
    )
    rows = session.execute(statement).all()
    assert len(rows) == 4
    assert {row[0].lang for row in rows} == {"en"}
    same = hybrid(Page.embedding, Page.search, "model manual", limit=4, where=Page.lang == "en")
    assert titles(session, same) == [row[0].title for row in rows]
    pages = [
        title
        for offset in (0, 3, 6, 9)
        for title in titles(
            session, hybrid(Page.embedding, Page.search, "your manual", limit=3, offset=offset)
        )
    ]
    assert sorted(pages) == sorted(TITLES)


@pytest.mark.parametrize("options", [{}, {"fusion": "rrf"}, {"weight": 0.5}])
def test_pages_far_behind_what_is_fused_follow_each_other(session: Session, options: Any) -> None:
    """260 rows, of which 100 of each arm are fused; half of them have no word of the question."""
    random = np.random.default_rng(15)
    vectors = random.normal(size=(250, 384)).astype(np.float32)
    session.execute(
        sa.insert(Page),
        [
            {"id": 100 + n, "title": "model " * (n % 3) + f"page {n}", "embedding": vector}
            for n, vector in enumerate(vectors)
        ],
    )
    found: list[int] = []
    ranks = []
    for offset in range(0, 270, 30):
        both = hybrid(
            Page.embedding, Page.search, "model manual", limit=30, offset=offset, **options
        )
        rows = session.execute(both).all()
        found += [row[0].id for row in rows]
        if offset == 210:
            ranks = [min(r for r in (row.meaning_rank, row.words_rank) if r) for row in rows]
    assert len(found) == len(set(found)) == 260
    # What an arm alone finds late comes late, and not in the order of the keys.
    assert ranks == sorted(ranks)
    assert min(ranks) > 60


@pytest.mark.parametrize("options", [{}, {"fusion": "rrf"}, {"weight": 0.4}, {"offset": 1}])
def test_many_questions_are_answered_as_one_by_one(session: Session, options: Any) -> None:
    questions = ["XJ-4712", "get my money back", "your manual", "model manual"]
    for criterion in (sa.true(), Page.id != 8, sa.false()):
        found = hybrid(Page.embedding, Page.search, questions, limit=4, where=criterion, **options)
        single = [
            (number, row[0].id, row.score)
            for number, question in enumerate(questions)
            for row in session.execute(
                hybrid(Page.embedding, Page.search, question, limit=4, where=criterion, **options)
            )
        ]
        many = session.execute(found).all()
        assert [row.query for row in many] == [row[0] for row in single]
        assert [row[0].id for row in many] == [row[1] for row in single]
        assert [row.score for row in many] == pytest.approx([row[2] for row in single])


def test_equal_scores_divide_by_nothing(session: Session) -> None:
    """Two rows that are the same to both arms: no range, and the order of their keys."""
    session.execute(sa.delete(Page))
    session.add_all(Page(id=n, title="the same title") for n in (2, 1))
    session.commit()
    rows = session.execute(hybrid(Page.embedding, Page.search, "title")).all()
    assert [row[0].id for row in rows] == [1, 2]
    assert rows[0].score == rows[1].score == pytest.approx(1)


@pytest.mark.parametrize("limit", [2, 150])
def test_words_weigh_more_where_meaning_does_not_find_them(
    session: Session, minilm: Any, limit: int
) -> None:
    """The nearest row has none of the words, or is the one that they know; the same on any page."""
    vector = minilm.encode_query("XJ-4712")
    for row, weight in ((0, 0.2), (8, 0.7)):
        session.execute(sa.update(Page).values(embedding=-vector))
        session.execute(sa.update(Page).where(Page.id == row).values(embedding=vector))
        for offset in (0, 3 * limit):
            both: Any = hybrid(Page.embedding, Page.search, "XJ-4712", limit=limit, offset=offset)
            assert session.execute(weight_of(both.search)).scalar() == pytest.approx(weight)


def test_what_is_asked_wrongly(session: Session) -> None:
    with pytest.raises(DeclarationError, match=r"hybrid\(...\)\.group_by\(\).*subquery"):
        hybrid(Page.embedding, Page.search, "word").group_by(Page.id)
    for options in (
        {"fusion": "sum"},
        {"weight": 1.5},
        {"limit": None},
        {"offset": -1},
        {"depth": 0},
    ):
        with pytest.raises(DeclarationError):
            hybrid(Page.embedding, Page.search, "x", **options)  # type: ignore[arg-type]
    with pytest.raises(DeclarationError, match=r"hybrid\(\) takes .* the other way round"):
        hybrid(Page.search, Page.embedding, "q")
    with pytest.raises(DeclarationError, match=r"hybrid\(\) takes .* and Page.title\."):
        hybrid(Page.embedding, Page.title, "q")
    with pytest.raises(DeclarationError, match="one class"):
        hybrid(Page.__table__.c.embedding, Page.search, "x")
