"""Haystack's own suites, and what they do not ask: searches, pipelines, other keys, asynchrony."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

from haystack import Document, Pipeline
from haystack.document_stores.errors import DuplicateDocumentError
from haystack.document_stores.types import DuplicatePolicy
from haystack.testing.document_store import DocumentStoreBaseExtendedTests
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from sbert_pg import create_all, embedding_column, registry
from sbert_pg.adapters.haystack import SbertDocumentStore, SbertRetriever
from sbert_pg.errors import DeclarationError
from sbert_pg.testing import DeterministicEncoder


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSONB}


class Note(Base):
    __tablename__ = "note"
    id: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[str]
    topic: Mapped[str | None]
    extra: Mapped[dict[str, Any]] = mapped_column(default=dict)
    embedding = embedding_column("deterministic", "body", nullable=True, dimensions=384)


@pytest.fixture(autouse=True)
def encoder(fake_encoder: DeterministicEncoder) -> DeterministicEncoder:
    return fake_encoder


@pytest.fixture(scope="module")
def database(databases: Any) -> Iterator[sa.Engine]:
    """One for all tests of this module: its table is emptied, which is far faster."""
    engine = sa.create_engine(databases.clone("catalog"))
    registry.use_encoder(DeterministicEncoder())
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    yield engine
    engine.dispose()
    databases.drop(str(engine.url.database))


@pytest.fixture
def document_store(database: sa.Engine) -> SbertDocumentStore:
    with database.begin() as connection:
        connection.execute(sa.text("TRUNCATE note"))
    return SbertDocumentStore(Note.embedding, sessionmaker(database), metadata="extra")


class TestDocumentStore(DocumentStoreBaseExtendedTests):
    @pytest.fixture
    def document_store(self, document_store: SbertDocumentStore) -> SbertDocumentStore:  # type: ignore[override]
        return document_store

    def assert_documents_are_equal(  # type: ignore[override]
        self, received: list[Document], expected: list[Document]
    ) -> None:
        """By ids, and without vectors, which the column's own encoder makes."""
        plain = [Document(id=d.id, content=d.content, meta=d.meta) for d in expected]
        assert received == sorted(plain, key=lambda d: d.id)

    def test_write_documents(self, document_store: SbertDocumentStore) -> None:
        document = Document(content="test doc", meta={"topic": "a", "pages": 3})
        assert document_store.write_documents([document]) == 1
        assert document_store.filter_documents() == [document]
        with pytest.raises(DuplicateDocumentError, match="1 of 2"):
            document_store.write_documents([Document(content="new"), document])
        assert document_store.count_documents() == 1


DOCUMENTS = [
    Document(id="1", content="trams at night", meta={"topic": "traffic", "year": 2021}),
    Document(id="2", content="bread at six", meta={"topic": "food", "year": 2022}),
    Document(id="3", content="bread at noon", meta={"topic": "food", "year": 2023}),
]


def test_searching_in_a_pipeline(document_store: SbertDocumentStore) -> None:
    document_store.write_documents(DOCUMENTS)
    pipeline = Pipeline()
    pipeline.add_component("retriever", SbertRetriever(document_store, top_k=2))
    found = pipeline.run({"retriever": {"query": "bread at noon"}})["retriever"]["documents"]
    assert found[0].id == "3"
    assert len(found) == 2
    assert found[0].meta == DOCUMENTS[2].meta
    assert found[0].score == pytest.approx(1)
    filters = {"field": "meta.year", "operator": "<", "value": 2023}
    wanted = {"query": "bread at noon", "top_k": 5, "filters": filters}
    found = pipeline.run({"retriever": wanted})["retriever"]["documents"]
    assert {d.id for d in found} == {"1", "2"}


def test_filters_on_id_and_content(document_store: SbertDocumentStore) -> None:
    document_store.write_documents(DOCUMENTS)
    for field, value in (("id", "2"), ("content", "bread at six"), ("topic", "food")):
        found = document_store.filter_documents({"field": field, "operator": "==", "value": value})
        assert "2" in [d.id for d in found]
        assert "1" not in [d.id for d in found]


def test_filters_on_what_an_object_of_the_metadata_holds(
    document_store: SbertDocumentStore,
) -> None:
    meta: dict[str, Any] = {"person": {"name": "Ada", "born": {"year": 1815}}, "a.b": 1}
    document_store.write_documents([Document(id="1", content="a", meta=meta), *DOCUMENTS[1:]])
    for field, value in (("person.name", "Ada"), ("person.born.year", 1815), ("a.b", 1)):
        equal = {"field": f"meta.{field}", "operator": "==", "value": value}
        assert [d.id for d in document_store.filter_documents(equal)] == ["1"]


def test_attributes_are_updated_as_json_is(document_store: SbertDocumentStore) -> None:
    document_store.write_documents(DOCUMENTS)
    food = {"field": "meta.topic", "operator": "==", "value": "food"}
    assert document_store.update_by_filter(food, {"topic": "meals", "stars": 4}) == 2
    [first, *_] = document_store.filter_documents({**food, "value": "meals"})
    assert first.meta == {"topic": "meals", "year": 2022, "stars": 4}


def test_it_is_not_saved(document_store: SbertDocumentStore) -> None:
    pipeline = Pipeline()
    pipeline.add_component("retriever", SbertRetriever(document_store))
    with pytest.raises(DeclarationError, match="in Python"):
        pipeline.dumps()
    with pytest.raises(DeclarationError, match="in Python"):
        SbertDocumentStore.from_dict({})


async def test_over_asyncpg(database: sa.Engine, document_store: Any) -> None:
    engine = create_async_engine(database.url.set(drivername="postgresql+asyncpg"))
    store = SbertDocumentStore(Note.embedding, async_sessionmaker(engine), metadata="extra")
    assert await store.write_documents_async(DOCUMENTS) == 3
    skipped = [Document(id="3", content="other"), Document(id="4", content="new")]
    assert await store.write_documents_async(skipped, DuplicatePolicy.SKIP) == 1
    assert await store.write_documents_async(skipped[:1], DuplicatePolicy.OVERWRITE) == 1
    await store.delete_documents_async(["4", "none"])
    food = {"field": "meta.topic", "operator": "==", "value": "food"}
    assert [d.id for d in await store.filter_documents_async(food)] == ["2", "3"]
    assert await store.update_by_filter_async(food, {"stars": 1}) == 2
    found = await SbertRetriever(store, top_k=1).run_async("other")
    assert [d.id for d in found["documents"]] == ["3"]
    assert await store.delete_by_filter_async(food) == 2
    assert await store.count_documents_async() == 1
    await store.delete_all_documents_async()
    assert await store.count_documents_async() == 0
    with pytest.raises(DeclarationError, match="asynchronous"):
        store.count_documents()
    await engine.dispose()
