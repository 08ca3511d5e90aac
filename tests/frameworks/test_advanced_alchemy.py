"""Repositories of advanced-alchemy that search by meaning, asynchronous and not."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sbert_pg import create_all, embed_on_flush, embedding_column
from sbert_pg.adapters.advanced_alchemy import SbertRepository
from sbert_pg.errors import DeclarationError

repositories = pytest.importorskip("advanced_alchemy.repository")
filters = pytest.importorskip("advanced_alchemy.filters")


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    lang: Mapped[str]
    embedding = embedding_column("deterministic", source="title", nullable=True, dimensions=384)


class Two(Base):
    __tablename__ = "two"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    one = embedding_column("deterministic", source="title", nullable=True, dimensions=384)
    other = embedding_column("deterministic", source="title", nullable=True, dimensions=384)


class Notes(SbertRepository, repositories.SQLAlchemySyncRepository[Note]):
    model_type = Note


class AsyncNotes(SbertRepository, repositories.SQLAlchemyAsyncRepository[Note]):
    model_type = Note


class Twos(SbertRepository, repositories.SQLAlchemySyncRepository[Two]):
    model_type = Two


@pytest.fixture
def notes(engine: sa.Engine, fake_encoder: Any) -> sa.Engine:
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        embed_on_flush(session)
        rows = [Note(title=f"train {n}", lang="en" if n % 2 else "de") for n in range(20)]
        session.add_all([*rows, Note(title="bread", lang="en"), Two(title="bread")])
        session.commit()
    return engine


def test_nearest_with_the_filters_of_the_repository(notes: sa.Engine) -> None:
    with Session(notes) as session:
        repository = Notes(session=session)
        row, similarity = repository.nearest("train 4", limit=1).one()
        assert (row.title, similarity) == ("train 4", pytest.approx(1.0))
        english = repository.nearest("train 4", Note.lang == "en", limit=20).all()
        assert len(english) == 11
        chosen = filters.CollectionFilter(field_name="title", values=["bread", "train 7"])
        titles = [row.title for row, _ in repository.nearest("train 4", chosen)]
        assert titles == ["train 7", "bread"]
        whole = [row.id for row, _ in repository.nearest("train 4", limit=10)]
        page = repository.nearest("train 4", filters.LimitOffset(limit=3, offset=2))
        assert [row.id for row, _ in page] == whole[2:5]


async def test_nearest_of_an_asynchronous_repository(notes: sa.Engine) -> None:
    engine = create_async_engine(notes.url)
    async with AsyncSession(engine) as session:
        rows = (await AsyncNotes(session=session).nearest("bread", limit=1)).all()
    await engine.dispose()
    assert [row.title for row, _ in rows] == ["bread"]


def test_which_embedding_is_meant(notes: sa.Engine) -> None:
    with Session(notes) as session:
        with pytest.raises(DeclarationError, match="one, other; give one of them as column="):
            Twos(session=session).nearest("bread")
        assert Twos(session=session).nearest("bread", column="other").one()[0].title == "bread"
