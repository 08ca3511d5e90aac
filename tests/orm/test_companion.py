"""The column beside an embedding column: who gets it, where it stands, how quiet it is."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    declarative_base,
    declared_attr,
    mapped_column,
    registry,
)
from write_models import Array, create, embedding, require_true_or_pending

from sbert_pg import Embedding, embed_on_flush
from sbert_pg.catalog.embedding import companion_of
from sbert_pg.source import NIL


def vector(source: str = "title") -> Embedding:
    return Embedding("deterministic", source, dimensions=384)


def table(*columns: Any, name: str = "t", **options: Any) -> sa.Table:
    key, text = sa.Column("id", sa.Integer, primary_key=True), sa.Column("title", sa.Text)
    return sa.Table(name, sa.MetaData(), key, text, *columns, **options)


def require_companion(column: sa.Column[Any]) -> None:
    companion = companion_of(column)
    assert companion is not None
    assert companion.table is column.table
    assert isinstance(companion.type, sa.Uuid)
    assert companion.nullable
    assert companion.server_default.arg == str(NIL)  # type: ignore[union-attr]
    assert not companion.primary_key
    assert list(column.table.c).count(companion) == 1


def test_of_a_table() -> None:
    made = table(sa.Column("e", vector()), sa.Column("views", sa.Integer))
    assert made.c.keys() == ["id", "title", "e_of", "e", "views"]
    require_companion(made.c.e)
    assert companion_of(made.c.title) is None
    ddl = str(sa.schema.CreateTable(made).compile(dialect=pg.dialect()))
    assert f"e_of UUID DEFAULT '{NIL}'" in ddl


def test_of_one_that_is_declared_as_well() -> None:
    """As Alembic writes a table down, column by column."""
    made = table(sa.Column("e_of", sa.Uuid(), server_default=str(NIL)), sa.Column("e", vector()))
    assert made.c.keys() == ["id", "title", "e_of", "e"]


def test_of_copies_and_pickles() -> None:
    made = table(sa.Column("e", vector()), sa.Column("other", vector(), quote=True))
    again = made.to_metadata(sa.MetaData(), schema="elsewhere")
    for copy in (again, again.to_metadata(sa.MetaData()), pickle.loads(pickle.dumps(made))):
        assert copy.c.keys() == ["id", "title", "e_of", "e", "other_of", "other"]
        require_companion(copy.c.e)
        require_companion(copy.c.other)


def test_of_one_type_in_two_tables() -> None:
    shared = vector()
    for name in ("one", "two"):
        require_companion(table(sa.Column("e", shared), name=name).c.e)


def test_of_a_column_that_comes_later() -> None:
    made = table()
    made.append_column(sa.Column("e", vector()))
    require_companion(made.c.e)


def test_of_a_pickled_type() -> None:
    require_companion(table(sa.Column("e", pickle.loads(pickle.dumps(vector())))).c.e)


def test_names() -> None:
    long = "e" * 61
    made = table(sa.Column("Em bedding", vector()), sa.Column(long, vector()))
    assert "Em bedding_of" in made.c
    require_companion(made.c["Em bedding"])
    require_companion(made.c[long])
    assert max(len(column.name) for column in made.c) <= 63


def test_nothing_for_arrays_and_plain_vectors() -> None:
    from sbert_pg import Vector

    made = table(sa.Column("v", Vector(3)), sa.Column("vs", sa.ARRAY(vector(), dimensions=1)))
    assert made.c.keys() == ["id", "title", "v", "vs"]


@pytest.mark.filterwarnings("ignore:Did not recognize type 'vector'")
def test_reflected_columns_are_left_alone(engine: sa.Engine) -> None:
    made = table(sa.Column("e", vector()))
    with engine.begin() as connection:
        made.create(connection)
        metadata = sa.MetaData()
        again = sa.Table("t", metadata, sa.Column("e", vector()), autoload_with=connection)
    assert sorted(again.c.keys()) == ["e", "e_of", "id", "title"]


class TestClasses:
    def attributes(self, class_: Any) -> dict[str, bool]:
        """The mapped columns, and whether they stay in the database."""
        return {attr.key: attr.deferred for attr in sa.inspect(class_).column_attrs}

    def test_plain(self) -> None:
        class Base(DeclarativeBase):
            pass

        class Note(Base):
            __tablename__ = "note"
            id: Mapped[int] = mapped_column(primary_key=True)
            title: Mapped[str]
            vec: Mapped[Array | None] = embedding(name="embedding")

        require_companion(Note.__table__.c.embedding)  # type: ignore[arg-type]
        assert self.attributes(Note)["vec_of"] is True
        assert "embedding" not in str(sa.select(Note))

    def test_mixins_dataclasses_and_functions(self) -> None:
        class Base(MappedAsDataclass, DeclarativeBase):
            pass

        class Embedded(MappedAsDataclass):
            title: Mapped[str]
            embedding: Mapped[Array | None] = embedding()

        class One(Embedded, Base):
            __tablename__ = "one"
            id: Mapped[int] = mapped_column(primary_key=True, init=False)

        class Two(Embedded, Base):
            __tablename__ = "two"
            id: Mapped[int] = mapped_column(primary_key=True, init=False)

            @declared_attr
            def by_title(cls) -> Mapped[Array | None]:
                return embedding(nullable=True)  # type: ignore[no-any-return]

        for class_ in (One, Two):
            require_companion(class_.__table__.c.embedding)  # type: ignore[attr-defined]
            assert self.attributes(class_)["embedding_of"] is True
        require_companion(Two.__table__.c.by_title)  # type: ignore[attr-defined]
        assert "by_title_of" in self.attributes(Two)
        assert repr(One(title="a")).endswith("One(title='a', id=None)")
        with pytest.raises(TypeError):
            One(title="a", embedding_of=NIL)  # type: ignore[call-arg]

    def test_dataclass_by_decorator(self) -> None:
        mapped = registry()

        @mapped.mapped_as_dataclass
        class Note:
            __tablename__ = "note"
            id: Mapped[int] = mapped_column(primary_key=True, init=False)
            embedding: Mapped[Array | None] = embedding(init=True)
            title: Mapped[str]

        assert repr(Note(title="a", embedding=np.ones(384))).endswith("Note(id=None, title='a')")
        require_companion(Note.__table__.c.embedding)  # type: ignore[attr-defined]

    def test_older_declarations(self) -> None:
        Base = declarative_base()

        class Note(Base):  # type: ignore[misc,valid-type]
            __tablename__ = "note"
            id = sa.Column(sa.Integer, primary_key=True)
            title = sa.Column(sa.Text)
            embedding = embedding()
            raw = sa.Column(vector())

        require_companion(Note.__table__.c.embedding)
        require_companion(Note.__table__.c.raw)

    def test_siblings_in_one_table(self, engine: sa.Engine, fake_encoder: Any) -> None:
        """Each subclass declares a column of its own in the parent's table."""

        class Base(DeclarativeBase):
            pass

        class Animal(Base):
            __tablename__ = "animal"
            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str]
            title: Mapped[str]
            __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

        class Dog(Animal):
            bark: Mapped[Array | None] = embedding()
            __mapper_args__ = {"polymorphic_identity": "dog"}

        class Cat(Animal):
            purr: Mapped[Array | None] = embedding()
            __mapper_args__ = {"polymorphic_identity": "cat"}

        create(engine, Base.metadata)
        with Session(engine) as session:
            embed_on_flush(session)
            session.add_all([Dog(title="a"), Cat(title="b"), Animal(title="c")])
            session.commit()
            assert session.scalars(sa.select(Dog.bark_of)).one() not in (None, NIL)  # type: ignore[attr-defined]
        assert require_true_or_pending(engine, fake_encoder, Animal) == (2, 4)

    def test_excluded_from_the_mapping(self, engine: sa.Engine, fake_encoder: Any) -> None:
        """Without its companion a vector proves nothing, so the row is left to a worker."""

        class Base(DeclarativeBase):
            pass

        class Note(Base):
            __table__ = table(sa.Column("e", vector()), name="note")
            __mapper_args__ = {"exclude_properties": ["e_of"]}

        metadata = Note.__table__.metadata  # type: ignore[attr-defined]
        create(engine, metadata)
        with Session(engine) as session:
            embed_on_flush(session)
            session.add(Note(title="a"))
            session.commit()
        assert require_true_or_pending(engine, fake_encoder, Note) == (0, 1)
