"""Every way to map a class with an embedding column, written and searched on a real server."""

from __future__ import annotations

import subprocess
import sys
import uuid
from typing import Any, ClassVar

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    declared_attr,
    mapped_column,
    registry,
    sessionmaker,
)

from sbert_pg import Source, create_all, embed_on_flush, embedding_column, hnsw_index, nearest
from sbert_pg.catalog.embedding import Embedding
from sbert_pg.errors import DeclarationError, SourceError
from sbert_pg.testing import DeterministicEncoder

pytestmark = pytest.mark.usefixtures("fake_encoder")

Vector = np.ndarray[Any, Any]


def embedding(source: Any = "title", **options: Any) -> Any:
    return embedding_column("deterministic", source=source, dimensions=384, **options)


def create(engine: sa.Engine, metadata: sa.MetaData) -> None:
    with engine.begin() as connection:
        create_all(connection, metadata)


def save(engine: sa.Engine, *objects: object) -> None:
    with Session(engine) as session:
        embed_on_flush(session)
        session.add_all(objects)
        session.commit()


def first(engine: sa.Engine, column: Any, query: Any) -> Any:
    with Session(engine) as session:
        return session.execute(nearest(column, query, limit=1)).one()[0]


def test_mapping_needs_no_encoder_and_no_onnxruntime() -> None:
    """In a process of its own, since this one has them."""
    code = """
import sys
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sbert_pg import embedding_column, hnsw_index
class Base(DeclarativeBase): pass
class A(Base):
    __tablename__ = "a"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    embedding = embedding_column("all-MiniLM-L6-v2", source="title")
    __table_args__ = (hnsw_index("i", "embedding"),)
assert A.__table__.c.embedding.type.dimensions == 384
for name in ("onnxruntime", "tokenizers", "torch", "sbert_pg.encoder"):
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_dataclass(engine: sa.Engine) -> None:
    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        # Before a field without default, which a default of its own would forbid.
        embedding: Mapped[Vector | None] = embedding()
        title: Mapped[str]

    create(engine, Base.metadata)
    save(engine, Note("apple pie"), Note("blue whale"), Note("kept", embedding=np.ones(384)))
    found = first(engine, Note.embedding, "whale")
    assert found.title == "blue whale"
    # repr would fetch the vector, == would raise on arrays.
    assert repr(found).endswith("Note(id=2, title='blue whale')")
    with Session(engine) as session:
        one, two = session.get_one(Note, 1), session.get_one(Note, 2)
        assert one.embedding is not None
        assert one != two
        assert session.get_one(Note, 3).embedding.tolist() == [1.0] * 384  # type: ignore[union-attr]


def test_mixin_on_two_classes(engine: sa.Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Embedded:
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        embedding: Mapped[Vector | None] = embedding()

        @declared_attr.directive
        def __table_args__(cls) -> Any:
            return (hnsw_index(None, "embedding"),)

    class One(Embedded, Base):
        __tablename__ = "one"

    class Two(Embedded, Base):
        __tablename__ = "two"

    Base.metadata.naming_convention = {"ix": "ix_%(table_name)s_%(column_0_name)s"}
    create(engine, Base.metadata)
    save(engine, One(title="red fox"), One(title="green frog"), Two(title="red rose"))
    assert first(engine, One.embedding, "fox").title == "red fox"
    assert first(engine, Two.embedding, "fox").title == "red rose"


def test_joined_inheritance(engine: sa.Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        title: Mapped[str]
        embedding: Mapped[Vector | None] = embedding()
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}

    class Book(Item):
        __tablename__ = "book"
        id: Mapped[int] = mapped_column(sa.ForeignKey("item.id"), primary_key=True)
        blurb: Mapped[str | None]
        note: Mapped[str | None]
        blurb_embedding: Mapped[Vector | None] = embedding(source=["blurb", "note"])
        __mapper_args__ = {"polymorphic_identity": "book"}

    create(engine, Base.metadata)
    save(
        engine,
        Item(title="plain thing"),
        Book(title="sea story", blurb="a whale hunt", note="long"),
        Book(title="city story", blurb="a train ride", note="short"),
    )
    assert first(engine, Item.embedding, "sea").title == "sea story"
    assert isinstance(first(engine, Item.embedding, "sea"), Book)
    assert first(engine, Book.blurb_embedding, "whale hunt").title == "sea story"
    with Session(engine) as session:
        embed_on_flush(session)
        book = session.scalars(sa.select(Book).where(Book.title == "city story")).one()
        book.blurb = "a whale hunt too"
        session.commit()
        assert book.blurb_embedding is not None
    assert first(engine, Book.blurb_embedding, "a whale hunt too short").title == "city story"


def test_source_in_the_parents_table_is_refused(engine: sa.Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]

    class Book(Item):
        __tablename__ = "book"
        id: Mapped[int] = mapped_column(sa.ForeignKey("item.id"), primary_key=True)
        embedding: Mapped[Vector | None] = embedding()

    Base.metadata.create_all(engine)
    with pytest.raises(SourceError, match=r"'title'.*'book'"):
        save(engine, Book(title="x"))


def test_single_table_inheritance(engine: sa.Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Animal(Base):
        __tablename__ = "animal"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        title: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

    class Dog(Animal):
        trick: Mapped[str | None]
        embedding: Mapped[Vector | None] = embedding(source=["title", "trick"])
        __mapper_args__ = {"polymorphic_identity": "dog"}

    class Cat(Animal):
        __mapper_args__ = {"polymorphic_identity": "cat"}

    create(engine, Base.metadata)
    save(
        engine, Dog(title="Rex", trick="rolls over"), Dog(title="Lux", trick="sits"), Cat(title="C")
    )
    assert first(engine, Dog.embedding, "rolls").title == "Rex"


def test_several_columns_and_a_template(engine: sa.Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Article(Base):
        __tablename__ = "article"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        body: Mapped[str | None]
        by_title: Mapped[Vector | None] = embedding()
        by_all: Mapped[Vector | None] = embedding(
            Source.template("{title}: {body}"), storage="halfvec", name="all of it"
        )
        __table_args__ = (hnsw_index("t", "by_title"), hnsw_index("a", "all of it"))

    create(engine, Base.metadata)
    save(engine, Article(title="red", body="sea"), Article(title="sea", body="green"))
    assert first(engine, Article.by_title, "sea").title == "sea"
    assert first(engine, Article.by_all, "red sea").title == "red"


def test_composite_and_uuid_keys(engine: sa.Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Line(Base):
        __tablename__ = "line"
        order: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
        number: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        note: Mapped[str | None]
        embedding: Mapped[Vector | None] = embedding(source=["title", "note"])
        __table_args__ = (hnsw_index("line_binary", "embedding", form="binary"),)

    create(engine, Base.metadata)
    lines = [Line(number=n, title=f"word{n}", note="x") for n in range(30)]
    save(engine, *lines)
    # Two stages join by the whole key.
    assert first(engine, Line.embedding, "word7 x").number == 7
    with Session(engine) as session:
        embed_on_flush(session)
        one = session.scalars(sa.select(Line).where(Line.number == 7)).one()
        one.title = "changed"
        session.commit()
        more = session.execute(nearest(Line.embedding, one, limit=3)).all()
        assert len(more) == 3
        assert one not in [line for line, _ in more]
    assert first(engine, Line.embedding, "changed x").number == 7


def test_other_schema_and_quoted_names(engine: sa.Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Odd(Base):
        __tablename__ = 'Odd "Table"'
        key: Mapped[int] = mapped_column("the Key", primary_key=True)
        title: Mapped[str] = mapped_column("Title %")
        embedding: Mapped[Vector | None] = embedding("Title %", name="Em bedding")
        __table_args__ = (hnsw_index("Odd index", "Em bedding"), {"schema": "My Schema"})

    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("My Schema"))
    create(engine, Base.metadata)
    save(engine, Odd(title="red fox"), Odd(title="blue whale"))
    assert first(engine, Odd.embedding, "whale").title == "blue whale"
    with Session(engine) as session:
        embed_on_flush(session)
        session.scalars(sa.select(Odd).where(Odd.key == 1)).one().title = "grey whale calf"
        session.commit()
    assert first(engine, Odd.embedding, "grey calf").key == 1


def test_core_table_and_imperative_mapping(engine: sa.Engine) -> None:
    metadata = sa.MetaData()
    table = sa.Table(
        "core",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("title", sa.Text),
        sa.Column("embedding", Embedding("deterministic", "title", dimensions=384)),
        hnsw_index("core_i", "embedding"),
    )
    create(engine, metadata)

    class Thing:
        def __init__(self, title: str) -> None:
            self.title = title

    registry().map_imperatively(Thing, table)
    save(engine, Thing("red fox"), Thing("blue whale"))
    assert first(engine, Thing.embedding, "whale").title == "blue whale"  # type: ignore[attr-defined]
    with engine.connect() as connection:
        row = connection.execute(nearest(table.c.embedding, "whale", limit=1)).one()
        assert row._fields == ("id", "title", "similarity")
        assert row.title == "blue whale"


def test_attribute_names_apart_from_column_names(engine: sa.Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Doc(Base):
        __tablename__ = "doc"
        id: Mapped[int] = mapped_column(primary_key=True)
        headline: Mapped[str] = mapped_column("title")
        vec: Mapped[Vector | None] = embedding(name="embedding")

    create(engine, Base.metadata)
    save(engine, Doc(headline="red fox"), Doc(headline="blue whale"))
    assert first(engine, Doc.vec, "whale").headline == "blue whale"


def test_sqlmodel(engine: sa.Engine) -> None:
    sqlmodel = pytest.importorskip("sqlmodel")

    class Dish(sqlmodel.SQLModel, table=True):  # type: ignore[name-defined,misc,call-arg]
        __table_args__ = (hnsw_index("dish_i", "embedding"),)
        id: int | None = sqlmodel.Field(default=None, primary_key=True)
        title: str
        embedding: Any = sqlmodel.Field(
            default=None,
            sa_column=sa.Column(Embedding("deterministic", "title", dimensions=384)),
        )

    create(engine, sqlmodel.SQLModel.metadata)
    with sqlmodel.Session(engine) as session:
        embed_on_flush(session)
        session.add_all([Dish(title="red soup"), Dish(title="apple pie")])
        session.commit()
        found = session.exec(nearest(Dish.embedding, "apple", limit=1)).one()
        assert found[0].title == "apple pie"
    sqlmodel.SQLModel.metadata.remove(Dish.__table__)


def test_sqlmodel_without_a_field(engine: sa.Engine) -> None:
    """A column of the table that is no field: deferred, and left out where it is serialised."""
    sqlmodel = pytest.importorskip("sqlmodel")

    class Meal(sqlmodel.SQLModel, table=True):  # type: ignore[name-defined,misc,call-arg]
        id: int | None = sqlmodel.Field(default=None, primary_key=True)
        title: str
        embedding: ClassVar[Any] = embedding(nullable=True)

    try:
        create(engine, sqlmodel.SQLModel.metadata)
        with sqlmodel.Session(engine) as session:
            embed_on_flush(session)
            session.add_all([Meal(title="red soup"), Meal(title="apple pie")])
            session.commit()
            meal = session.exec(nearest(Meal.embedding, "apple", limit=1)).one()[0]
            assert {"embedding", "embedding_of"} <= sa.inspect(meal).unloaded
            assert meal.model_dump() == {"id": 2, "title": "apple pie"}
            assert Meal.model_validate(meal.model_dump()).title == "apple pie"
            meal.title = "plum pie"
            session.commit()
            assert session.exec(nearest(Meal.embedding, "plum", limit=1)).one()[0] is meal
    finally:
        sqlmodel.SQLModel.metadata.remove(Meal.__table__)


def test_flask_sqlalchemy(database_url: sa.URL) -> None:
    flask = pytest.importorskip("flask")
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")

    class Base(DeclarativeBase):
        pass

    db = flask_sqlalchemy.SQLAlchemy(model_class=Base)

    class Ticket(db.Model):  # type: ignore[name-defined,misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        embedding = embedding()

    app = flask.Flask("test")
    app.config["SQLALCHEMY_DATABASE_URI"] = database_url.render_as_string(hide_password=False)
    db.init_app(app)
    embed_on_flush(db.session)
    with app.app_context():
        with db.engine.begin() as connection:
            create_all(connection, db.metadata)
        db.session.add_all([Ticket(title="red screen"), Ticket(title="lost key")])
        db.session.commit()
        found = db.session.execute(nearest(Ticket.embedding, "key", limit=1)).one()
        assert found[0].title == "lost key"
        db.session.remove()
        db.engine.dispose()


def test_nullable() -> None:
    class Base(DeclarativeBase):
        pass

    class Strict(Base):
        __tablename__ = "strict"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        a: Mapped[Vector] = embedding()
        b: Mapped[Vector | None] = embedding()
        c = embedding(nullable=False)

    columns = Strict.__table__.c
    assert [columns[k].nullable for k in "abc"] == [False, True, False]


def test_embed_on_flush_refuses_anything_else() -> None:
    with pytest.raises(DeclarationError, match="session"):
        embed_on_flush(42)  # type: ignore[arg-type]


def test_every_new_factory_embeds(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> None:
    """Factories come and go, and a new one may stand where an old one stood in memory."""

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        embedding: Mapped[Vector | None] = embedding()

    create(engine, Base.metadata)
    for number in range(30):
        factory = sessionmaker(engine)
        with factory() as session:
            embed_on_flush(factory if number % 2 else session)
            note = Note(title=f"t{number}")
            session.add(note)
            session.flush()
            assert note.embedding is not None, number
        del factory, session


def test_deferred_by_default(engine: sa.Engine, fake_encoder: DeterministicEncoder) -> None:
    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]
        embedding: Mapped[Vector | None] = embedding()

    create(engine, Base.metadata)
    save(engine, Note(title="a"))
    with Session(engine) as session:
        note = session.scalars(sa.select(Note)).one()
        assert "embedding" in sa.inspect(note).unloaded
        assert np.allclose(note.embedding, fake_encoder.encode_document(["a"])[0])  # type: ignore[arg-type]
