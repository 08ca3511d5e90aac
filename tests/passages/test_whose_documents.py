"""Criteria on documents reach every search over their passages, whichever way they are given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from passage_documents import CHUNKER, text, work
from sqlalchemy import event
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    aliased,
    mapped_column,
    relationship,
    with_loader_criteria,
)

from sbert_pg import (
    create_all,
    explain_search,
    hnsw_index,
    hybrid,
    nearest,
    passages_of,
    text_column,
)
from sbert_pg.errors import DeclarationError
from sbert_pg.testing import DeterministicEncoder

QUESTION = "sentence topic13 topic26 text"
SEVERAL = [QUESTION, "topic7 sentence"]


class Base(DeclarativeBase):
    """Base of the files."""


class Owner(Base):
    """Who has files."""

    __tablename__ = "owner"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class File(Base):
    """A file of a tenant; its key has two parts."""

    __tablename__ = "file"
    part: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True)
    org: Mapped[int] = mapped_column(sa.ForeignKey("owner.id"))
    kind: Mapped[str]
    body: Mapped[str]
    score: Mapped[int] = mapped_column(default=-1)
    owner: Mapped[Owner] = relationship()
    passages = passages_of(
        "deterministic", source="body", dimensions=32, chunker=CHUNKER,
        table_args=[hnsw_index("file_passage_hnsw", "embedding")],
    )  # fmt: skip
    words = text_column("body")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "file"}


class Letter(File):
    """A file with a table of its own beside."""

    __tablename__ = "letter"
    part: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True)
    seal: Mapped[str]
    __table_args__ = (sa.ForeignKeyConstraint(["part", "id"], ["file.part", "file.id"]),)
    __mapper_args__ = {"polymorphic_identity": "letter"}


class Note(File):
    """A file without one."""

    __mapper_args__ = {"polymorphic_identity": "note"}


Part: Any = File.passages.property.mapper.class_
CLASSES: Any = (File, Letter, Note)


@pytest.fixture
def session(engine: sa.Engine, encoder: DeterministicEncoder) -> Iterator[Session]:
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as made:
        made.add_all([Owner(id=n, name=f"owner {n}") for n in (1, 2, 3)])
        made.flush()
        for n in range(60):
            class_ = CLASSES[n % 5 % 3]
            more = {"seal": "red"} if class_ is Letter else {}
            own = {"part": "ab"[n % 2], "id": n, "org": 1 + n % 3, **more}
            made.add(class_(body=" ".join(text(n, 20)), **own))
        made.commit()
        work(engine, Base)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("ANALYZE"))
        yield made


def orgs(session: Session, statement: Any) -> list[tuple[int, int]]:
    """Query and organization of each row."""
    rows = session.execute(statement).all()
    files = [getattr(row[0], "document", row[0]) for row in rows]
    return [(getattr(row, "query", 0), file.org) for row, file in zip(rows, files, strict=True)]


def passages_by_comparing(session: Session, criterion: Any, limit: int) -> list[int]:
    distance = Part.embedding.cosine_distance(QUESTION)
    statement = sa.select(Part.id).join(Part.document).where(criterion)
    return list(session.scalars(statement.order_by(distance, Part.id).limit(limit)))


@pytest.mark.parametrize("of", ["passage", "document"])
def test_criteria_on_documents_hold_however_they_are_given(session: Session, of: Any) -> None:
    other = aliased(File)
    for query, different in itertools.product(
        (QUESTION, SEVERAL), ({}, {"exact": True}, {"limit": 9_999}, {"offset": 7})
    ):
        options: dict[str, Any] = {"limit": 12, "of": of, **different}
        search = nearest(File.passages, query, **options)
        argument = nearest(File.passages, query, **options, where=File.org == 2)
        of_alias = nearest(other.passages, query, **options)
        due = orgs(session, argument)
        assert len(due) >= 12 * (2 if query is SEVERAL else 1)
        assert {org for _, org in due} == {2}
        for statement in (
            search.where(File.org == 2),
            search.filter_by(org=2),
            search.where(Part.ordinal >= 0).where(File.owner.has(name="owner 2")),
            search.options(with_loader_criteria(File, File.org == 2)),
            search.options(with_loader_criteria(File, lambda cls: cls.org == 2)),
            of_alias.where(other.org == 2),
            nearest(other.passages, query, where=other.org == 2, **options),
        ):
            assert orgs(session, statement) == due
            if of == "passage":
                keys = [row[0] for row in session.execute(statement)]
                assert keys == [row[0] for row in session.execute(argument)]


def test_names_beside_those_of_documents_and_passages(session: Session) -> None:
    search = nearest(File.passages, QUESTION, limit=12)
    row = session.execute(search).first()
    assert row is not None
    assert row._fields[2:] == ("similarity", "nearest_score")
    assert row.File.score == -1
    assert row.nearest_score == pytest.approx(row.similarity, abs=0.5)
    best = sa.select(sa.func.max(search.subquery().c.nearest_score))
    assert session.scalar(best) == row.nearest_score
    # Both have an id.
    for named, criterion in (({"id": 7}, File.id == 7), ({"ordinal": 1}, Part.ordinal == 1)):
        rows = session.execute(search.filter_by(**named)).all()
        assert rows == session.execute(search.where(criterion)).all() != []


def test_they_are_the_nearest_of_those_that_pass(session: Session) -> None:
    for criterion in (File.org == 2, sa.and_(File.org == 2, Part.ordinal > 1)):
        due = passages_by_comparing(session, criterion, 15)
        search = nearest(File.passages, QUESTION, of="passage", limit=15).where(criterion)
        assert [part.id for part, _ in session.execute(search)] == due
        pages = [session.execute(search.limit(5).offset(n)).all() for n in (0, 5, 10)]
        assert [row[0].id for page in pages for row in page] == due
        assert "no vector index" not in explain_search(session, search).reason


def test_joins_of_the_caller(session: Session) -> None:
    search = nearest(File.passages, QUESTION, of="passage", limit=12)
    due = passages_by_comparing(session, File.org == 2, 12)
    same = sa.and_(File.part == Part.file_part, File.id == Part.file_id)
    other = aliased(File)
    for statement in (
        search.join(Part.document).where(File.org == 2),
        search.where(File.org == 2).join(Part.document),
        search.join(File, same).where(File.org == 2),
        search.join_from(Part, File, same).where(File.org == 2),
        search.join(File.owner).where(Owner.name == "owner 2"),
        search.join(Part.document.of_type(other)).where(other.org == 2),
        search.outerjoin(Part.document).where(File.org == 2),
    ):
        assert [row[0].id for row in session.execute(statement)] == due


def test_criteria_of_every_statement_of_a_session(session: Session) -> None:
    """As applications have them for tenants and for rows that are deleted only in name."""

    def hook(state: Any) -> None:
        if state.is_select:
            state.statement = state.statement.options(
                with_loader_criteria(File, lambda cls: cls.org == 2, include_aliases=True)
            )

    event.listen(session, "do_orm_execute", hook)
    other = aliased(File)
    for query in (QUESTION, SEVERAL):
        wanted = 12 * (2 if query is SEVERAL else 1)
        for passages, words, entity in (
            (File.passages, File.words, File),
            (other.passages, other.words, other),
        ):
            for statement in (
                nearest(passages, query, of="passage", limit=12),
                nearest(passages, query, of="passage", limit=12, where=entity.org < 3),
                nearest(passages, query, limit=12),
                nearest(passages, query, limit=12, score="best"),
                hybrid(passages, words, query, limit=12),
            ):
                assert [org for _, org in orgs(session, statement)] == [2] * wanted
    unheard = hybrid(File.passages, File.words, "unheard", limit=20)
    assert [org for _, org in orgs(session, unheard)] == [2] * 20
    # Around a search nobody tells it of them; nothing of others comes out all the same.
    part = nearest(File.passages, QUESTION, of="passage", limit=30).subquery()
    inner = aliased(Part, part)
    for document in session.scalars(sa.select(inner)).all():
        assert document.document.org == 2
    whole = nearest(File.passages, QUESTION, of="passage", limit=9_999)
    count = session.scalar(sa.select(sa.func.count()).select_from(whole.subquery()))
    of_two = sa.select(sa.func.count()).select_from(Part).join(Part.document)
    assert count == session.scalar(of_two)


@pytest.mark.parametrize("query", [QUESTION, SEVERAL], ids=["one", "several"])
def test_words_and_passages_of_an_alias(session: Session, query: Any) -> None:
    other = aliased(File)
    plain = hybrid(File.passages, File.words, query, limit=8).where(File.org == 2)
    same = hybrid(other.passages, other.words, query, limit=8).where(other.org == 2)
    due = [(row[0], *row[1:]) for row in session.execute(plain)]
    assert len(due) == 8 * (2 if query is SEVERAL else 1)
    assert [(row[0], *row[1:]) for row in session.execute(same)] == due
    with pytest.raises(DeclarationError, match="one class"):
        hybrid(other.passages, File.words, query)


@pytest.mark.parametrize("class_", [Letter, Note])
@pytest.mark.parametrize("of", ["passage", "document"])
def test_passages_of_a_subclass_are_those_of_its_rows(
    session: Session, class_: Any, of: Any
) -> None:
    due = passages_by_comparing(session, File.kind == class_.__name__.lower(), 12)
    some = aliased(File, sa.select(File).where(File.kind == class_.__name__.lower()).subquery())
    for entity in (class_, aliased(class_), some):
        for query in (QUESTION, SEVERAL):
            rows = session.execute(nearest(entity.passages, query, of=of, limit=12)).all()
            assert len(rows) == 12 * (2 if query is SEVERAL else 1)
            assert all(isinstance(getattr(r[0], "document", r[0]), class_) for r in rows)
            if of == "passage":
                assert [row[0].id for row in rows[:12]] == due
    if class_ is Letter:
        search = nearest(Letter.passages, QUESTION, of=of, limit=5).where(Letter.seal == "blue")
        assert session.execute(search).all() == []


def test_the_passages_near_each_document(session: Session) -> None:
    near = nearest(File.passages, File.passages_embedding, of="passage", limit=2).lateral()
    statement = sa.select(File.id, near.c.id).join(near, sa.true())
    assert len(session.execute(statement).all()) == 2 * 60


def test_objects_as_questions(session: Session) -> None:
    file = session.scalars(sa.select(File).limit(1)).one()
    part = file.passages[0]
    with pytest.raises(DeclarationError, match=r"nearest\(File\.passages_embedding, \.\.\.\)"):
        nearest(File.passages, file)
    for wrong in (session.get(Owner, 1), [part, part]):
        with pytest.raises(DeclarationError, match="FilePassage"):
            nearest(File.passages, wrong)
    with pytest.raises(DeclarationError, match=r"given Owner .* \(File\)"):
        nearest(File.passages_embedding, session.get(Owner, 1))
    like = nearest(File.passages, part, of="passage", limit=3, where=File.org == file.org)
    found = [row[0] for row in session.execute(like)]
    assert len(found) == 3
    assert part not in found
    assert session.execute(nearest(File.passages, part, limit=1)).one()[0] is file
    assert file not in session.scalars(nearest(File.passages_embedding, file)).all()


def test_it_is_said_that_an_object_has_no_vector_yet(session: Session) -> None:
    session.add(File(part="a", id=99, org=1, kind="file", body="Not embedded yet."))
    session.flush()
    search = nearest(File.passages_embedding, session.get_one(File, ("a", 99)))
    assert session.execute(search).all() == []
    assert "has no vector" in explain_search(session, search).reason
