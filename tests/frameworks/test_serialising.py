"""Classes with an embedding where frameworks turn objects into plain data, and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar

import numpy as np
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column
from sqlmodel import Field, SQLModel, select
from sqlmodel import Session as SQLModelSession

from sbert_pg import Embedding, create_all, embed_on_flush, embedding_column, nearest
from sbert_pg.orm import plain_attributes
from sbert_pg.types import VectorValue


def column(**options: Any) -> Any:
    return embedding_column(
        "deterministic", source="title", dimensions=384, nullable=True, **options
    )


class Annotated(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    title: str
    embedding: Any = column()


class AsClassVar(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    title: str
    embedding: ClassVar[Any] = column()


class TitleBase(SQLModel):
    title: str
    embedding: Any = column()


class Inherited(TitleBase, table=True):
    id: int | None = Field(default=None, primary_key=True)


class InheritedToo(TitleBase, table=True):
    id: int | None = Field(default=None, primary_key=True)


class AsField(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    title: str
    embedding: VectorValue | None = Field(
        default=None,
        exclude=True,
        sa_column=sa.Column(Embedding("deterministic", source="title", dimensions=384)),
    )


class AsAny(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    title: str
    embedding: Any = Field(
        default=None,
        sa_column=sa.Column(Embedding("deterministic", source="title", dimensions=384)),
    )


class WithVector(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    title: str
    embedding: VectorValue


SQL_MODELS = [Annotated, AsClassVar, Inherited, InheritedToo, AsField]


@pytest.fixture
def tables(engine: sa.Engine, fake_encoder: Any) -> sa.Engine:
    # Not all that SQLModel knows: pages of the documentation that ran here declare models as well.
    own = sa.MetaData()
    for model in SQL_MODELS:
        model.__table__.to_metadata(own)  # type: ignore[attr-defined]
    with engine.begin() as connection:
        create_all(connection, own)
        create_all(connection, Base.metadata)
    return engine


@pytest.mark.parametrize("model", SQL_MODELS)
def test_sqlmodel(model: Any, tables: sa.Engine, fake_encoder: Any) -> None:
    with SQLModelSession(tables, expire_on_commit=False) as session:
        embed_on_flush(session)
        made = model.model_validate({"title": "first"})
        session.add_all([made, model(title="second")])
        session.commit()
        # After the flush the object holds the vector.
        assert json.loads(made.model_dump_json()) == {"id": 1, "title": "first"}
    with SQLModelSession(tables) as session:
        item = session.exec(select(model).where(model.id == 1)).one()
        assert not {"embedding", "embedding_of"} & set(vars(item))
        assert item.model_dump() == {"id": 1, "title": "first"}
        asked = json.loads(WithVector.model_validate(item).model_dump_json())
        assert np.allclose(asked["embedding"], fake_encoder.encode_document(["first"])[0])
        assert item.model_dump() == {"id": 1, "title": "first"}  # it is loaded by now
        found = session.execute(nearest(model.embedding, "second", limit=1)).one()
        assert found[0].title == "second"
        item.sqlmodel_update({"title": "changed"})
        session.commit()
        assert item.model_validate(item).title == "changed"


@pytest.mark.parametrize("model", SQL_MODELS)
def test_fastapi_routes(model: Any, tables: sa.Engine, fake_encoder: Any) -> None:
    app = FastAPI()

    def first() -> Any:
        with SQLModelSession(tables) as session:
            item = session.exec(select(model)).one()
            assert item.embedding
            return item

    app.get("/plain")(first)
    app.get("/typed", response_model=model)(first)
    app.get("/vector", response_model=WithVector)(first)
    with SQLModelSession(tables) as session:
        embed_on_flush(session)
        session.add(model(title="first"))
        session.commit()
    client = TestClient(app)
    assert client.get("/plain").json() == client.get("/typed").json() == {"id": 1, "title": "first"}
    vector = client.get("/vector").json()["embedding"]
    assert np.allclose(vector, fake_encoder.encode_document(["first"])[0])
    schema = client.get("/openapi.json").json()["components"]["schemas"]["WithVector"]
    assert schema["properties"]["embedding"]["items"] == {"type": "number"}


class Base(MappedAsDataclass, DeclarativeBase):
    pass


class Recipe(Base):
    __tablename__ = "recipe"
    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    title: Mapped[str]
    upper: Mapped[str] = mapped_column(sa.Computed("upper(title)"), init=False)
    embedding: Mapped[Any] = column()


def test_dataclasses(tables: sa.Engine, fake_encoder: Any) -> None:
    with Session(tables) as session:
        embed_on_flush(session)
        session.add(Recipe(title="soup"))
        session.commit()
        recipe = session.scalars(sa.select(Recipe)).one()
        plain = dataclasses.asdict(recipe)
        assert plain["title"] == "soup"
        assert np.allclose(plain["embedding"], fake_encoder.encode_document(["soup"])[0])
        assert recipe == session.get(Recipe, 1)
        assert "embedding" not in repr(recipe)


def test_helpers_that_list_attributes(tables: sa.Engine) -> None:
    assert plain_attributes(Recipe) == ["id", "title"]
    assert plain_attributes(AsField) == plain_attributes(Annotated) == ["id", "title"]


def test_factory_boy(tables: sa.Engine, fake_encoder: Any) -> None:
    factory = pytest.importorskip("factory")
    with Session(tables) as session:
        embed_on_flush(session)
        made = type(
            "AnnotatedFactory",
            (factory.alchemy.SQLAlchemyModelFactory,),
            {
                "Meta": type("Meta", (), {"model": Annotated, "sqlalchemy_session": session}),
                "title": factory.Sequence(lambda n: f"title {n}"),
            },
        )
        items = made.create_batch(3)
        session.commit()
        for item in items:
            assert np.allclose(item.embedding, fake_encoder.encode_document([item.title])[0])


class TestValue:
    value = VectorValue([1, 2.5, -0.1])

    def test_it_is_true_and_what_is_computed_is_plain(self) -> None:
        assert self.value
        assert VectorValue([0, 0])
        for computed in (self.value + 1, self.value == self.value, np.stack([self.value] * 2)):
            assert type(computed) is np.ndarray
            with pytest.raises(ValueError, match="ambiguous"):
                bool(computed)
        assert isinstance(self.value.sum(), np.float32)
        assert isinstance(self.value @ self.value, np.float32)

    def test_pydantic_takes_and_gives_numbers(self) -> None:
        for given in ([1, 2.5], np.array([1, 2.5]), VectorValue([1, 2.5])):
            model = WithVector(title="a", embedding=given)  # type: ignore[arg-type]
            assert model.model_dump()["embedding"] == [1, 2.5]
            assert isinstance(model.embedding, VectorValue)
        for wrong in ("[1]", ["a"], [[1]], [], [float("nan")], [1e300], None):
            with pytest.raises(ValidationError):
                WithVector(title="a", embedding=wrong)  # type: ignore[arg-type]
        untyped = TypeAdapter(dict[str, Any])
        assert json.loads(untyped.dump_json({"v": VectorValue([1, 2.5])})) == {"v": [1, 2.5]}
