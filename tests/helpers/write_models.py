"""Mapped classes for the tests of writing, and what has to hold of every row after any write."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sbert_pg import Source, catalog, create_all, embedding_column
from sbert_pg.spec import Vectors
from sbert_pg.testing import DeterministicEncoder

Array = np.ndarray[Any, Any]


def embedding(source: Any = "title", **options: Any) -> Any:
    return embedding_column("deterministic", source=source, dimensions=384, **options)


class RecordingEncoder(DeterministicEncoder):
    """Remembers its batches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batches: list[list[str]] = []

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        self.batches.append(list(texts))
        return super().encode_document(texts)


class Base(DeclarativeBase):
    pass


class Article(Base):
    """One text, one vector."""

    __tablename__ = "article"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    views: Mapped[int] = mapped_column(default=0)
    embedding: Mapped[Array | None] = embedding()


class Page(Base):
    """Two vectors, one of them of two columns."""

    __tablename__ = "page"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    body: Mapped[str | None]
    views: Mapped[int] = mapped_column(default=0)
    by_title: Mapped[Array | None] = embedding()
    by_all: Mapped[Array | None] = embedding(["title", "body"], storage="halfvec")


class Line(Base):
    """A key of two columns, a template, names of attributes apart from the columns'."""

    __tablename__ = "line"
    order: Mapped[uuid.UUID] = mapped_column("order_id", primary_key=True, default=uuid.uuid4)
    number: Mapped[int] = mapped_column(primary_key=True)
    heading: Mapped[str] = mapped_column("title")
    note: Mapped[str | None]
    vector: Mapped[Array | None] = embedding(Source.template("{title}: {note}"), name="embedding")


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    title: Mapped[str]
    embedding: Mapped[Array | None] = embedding()
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}


class Book(Item):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(sa.ForeignKey("item.id"), primary_key=True)
    blurb: Mapped[str | None]
    note: Mapped[str | None]
    blurb_embedding: Mapped[Array | None] = embedding(["blurb", "note"])
    __mapper_args__ = {"polymorphic_identity": "book"}


class Strict(Base):
    """A vector that has to be there."""

    __tablename__ = "strict"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    embedding: Mapped[Array] = embedding()


def create(engine: sa.Engine, metadata: sa.MetaData = Base.metadata) -> None:
    with engine.begin() as connection:
        create_all(connection, metadata)


def pending(engine: sa.Engine) -> set[tuple[str, str]]:
    """Table and column, and key, of every row that waits for a vector."""
    waiting = set()
    with engine.connect() as connection:
        for binding in catalog.all_bindings(connection):
            table = binding.clause()
            statement = sa.select(*_key(table, binding)).where(binding.is_stale(table))
            for row in connection.execute(statement):
                waiting.add((f"{binding.table}.{binding.column}", _shown(row)))
    return waiting


def _key(table: Any, binding: catalog.Binding) -> list[Any]:
    return [sa.cast(table.c[name], sa.Text) for name in binding.key_columns]


def _shown(key: Sequence[str]) -> str:
    return ",".join(key)


def require_true_or_pending(
    engine: sa.Engine, encoder: DeterministicEncoder, *classes: Any
) -> tuple[int, int]:
    """Every row has the vector of the text it has, or is visible as pending.

    Returns:
        The number of vectors that are true, and of rows that are pending.
    """
    right = waiting = 0
    marked = pending(engine)
    for class_ in classes:
        table: sa.Table = class_.__table__
        for column in table.columns:
            if getattr(column.type, "encoder", None) is None:
                continue
            source: Source = column.type.source  # type: ignore[attr-defined]
            for key, vector, *values in _rows(engine, column, source):
                if (f"{table.name}.{column.name}", key) in marked:
                    waiting += 1
                    continue
                where = f"{column} of {key}: {values}"
                if column.nullable and all(value is None for value in values):
                    assert vector is None, where
                    continue
                assert vector is not None, where
                expected = encoder._vector(source.joiner()(values))
                assert np.allclose(vector, expected, atol=2e-3), where
                right += 1
    return right, waiting


def _rows(engine: sa.Engine, column: sa.Column[Any], source: Source) -> Sequence[Any]:
    """Key as text, vector, and source values of every row."""
    with engine.connect() as connection:
        key = _key(column.table, catalog.require_binding(connection, column))
        statement = sa.select(*key, column, *source.resolve(column.table))
        rows = connection.execute(statement).all()
    return [(_shown(row[: len(key)]), *row[len(key) :]) for row in rows]
