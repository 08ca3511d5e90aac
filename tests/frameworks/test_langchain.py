"""LangChain's own suites, and what they do not ask: filters, scores, diversity, other keys."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from langchain_core.documents import Document
from langchain_tests.integration_tests import (
    EmbeddingsIntegrationTests,
    VectorStoreIntegrationTests,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from sbert_pg import create_all, embed_on_flush, embedding_column, hnsw_index, registry
from sbert_pg.adapters.langchain import SbertEmbeddings, SbertVectorStore
from sbert_pg.errors import DeclarationError
from sbert_pg.testing import DeterministicEncoder


def column(source: Any = "body") -> Any:
    return embedding_column("deterministic", source=source, nullable=True, dimensions=384)


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSONB}


class Note(Base):
    __tablename__ = "note"
    __table_args__ = (hnsw_index("note_embedding", "embedding"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[str]
    topic: Mapped[str | None]
    year: Mapped[int | None]
    day: Mapped[dt.date | None]
    tags: Mapped[list[str] | None] = mapped_column(ARRAY(sa.Text))
    extra: Mapped[dict[str, Any]] = mapped_column("extra data", default=dict)
    embedding = column()


class Numbered(Base):
    __tablename__ = "numbered"
    number: Mapped[int] = mapped_column("no", primary_key=True)
    title: Mapped[str] = mapped_column("the title")
    topic: Mapped[str | None]
    embedding = column("the title")


class ByUuid(Base):
    __tablename__ = "by_uuid"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    body: Mapped[str]
    embedding = column()


class TwoColumns(Base):
    __tablename__ = "two_columns"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    body: Mapped[str]
    embedding = column(["title", "body"])


@pytest.fixture(autouse=True)
def encoder(fake_encoder: DeterministicEncoder) -> DeterministicEncoder:
    return fake_encoder


@pytest.fixture(scope="module")
def database(databases: Any) -> Iterator[sa.Engine]:
    """One for all tests of this module: its tables are emptied, which is far faster."""
    engine = sa.create_engine(databases.clone("catalog"))
    registry.use_encoder(DeterministicEncoder())
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    yield engine
    engine.dispose()
    databases.discard(str(engine.url.database))


@pytest.fixture
def tables(database: sa.Engine) -> sa.Engine:
    with database.begin() as connection:
        connection.execute(
            sa.text("TRUNCATE note, numbered, by_uuid, two_columns RESTART IDENTITY")
        )
    return database


@pytest.fixture
def store(tables: sa.Engine) -> SbertVectorStore:
    return SbertVectorStore(Note.embedding, sessionmaker(tables), metadata="extra")


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, store: SbertVectorStore) -> Any:
        return store


class TestAsyncVectorStore(VectorStoreIntegrationTests):
    """Over asyncpg, as FastAPI's applications have it."""

    has_sync = False

    @pytest.fixture
    async def vectorstore(self, tables: sa.Engine) -> Any:
        url = tables.url.set(drivername="postgresql+asyncpg")
        engine = create_async_engine(url)
        yield SbertVectorStore(Note.embedding, async_sessionmaker(engine), metadata="extra")
        await engine.dispose()


class TestEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> Any:
        return SbertEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"encoder": "deterministic"}


DOCUMENTS = [
    Document(page_content="apples", id="a", metadata={"topic": "fruit", "year": 1, "stars": 5}),
    Document(page_content="pears", id="b", metadata={"topic": "fruit", "year": 2, "stars": "5"}),
    Document(page_content="nails", id="c", metadata={"topic": "tools", "new": True, "tags": []}),
    Document(
        page_content="odd",
        id="d",
        metadata={"k'\"]": None, "list": [1, "x"], "stars": 4.5, "tags": ["a", "b"]},
    ),
]


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        ({}, "abcd"),
        (None, "abcd"),
        ({"topic": "fruit"}, "ab"),
        ({"topic": "fruit", "year": 2}, "b"),
        ({"topic": None}, "d"),
        ({"topic": {"$ne": "fruit"}}, "cd"),
        ({"year": {"$gte": 1, "$lt": 2}}, "a"),
        ({"year": {"$between": [1, 2]}}, "ab"),
        ({"topic": {"$in": ["tools", "toys"]}}, "c"),
        ({"topic": {"$in": []}}, ""),
        ({"topic": {"$nin": ["tools"]}}, "abd"),
        ({"topic": {"$nin": []}}, "abcd"),
        ({"topic": {"$exists": False}}, "d"),
        ({"topic": {"$like": "fr%"}}, "ab"),
        # Within JSON, where types differ from row to row.
        ({"stars": 5}, "a"),
        ({"stars": "5"}, "b"),
        ({"stars": {"$gt": 4}}, "ad"),
        ({"stars": {"$lt": "6"}}, "b"),
        ({"stars": {"$ne": 5}}, "bcd"),
        ({"stars": {"$in": [5, "5"]}}, "ab"),
        ({"stars": {"$exists": True}}, "abd"),
        ({"new": True}, "c"),
        ({"new": {"$ne": True}}, "abd"),
        ({"list": [1, "x"]}, "d"),
        # Arrays, in columns of their own as within JSON.
        ({"tags": {"$any": ["b", "c"]}}, "d"),
        ({"tags": {"$all": ["b", "c"]}}, ""),
        ({"tags": {"$all": ["b", "a"]}}, "d"),
        ({"tags": {"$any": []}}, ""),
        ({"tags": {"$empty": True}}, "abc"),
        ({"tags": {"$empty": False}}, "d"),
        ({"list": {"$any": ["x", 2]}}, "d"),
        ({"list": {"$all": ["1"]}}, ""),
        ({"list": {"$empty": True}}, "abc"),
        ({"topic": {"$empty": False}}, "abc"),
        ({"k'\"]": {"$exists": True}}, ""),  # JSON's null is no value
        ({"stars": {"$ilike": "5%"}}, "ab"),
        ({"$or": [{"topic": "tools"}, {"stars": {"$lt": 5}}]}, "cd"),
        ({"$and": [{"topic": "fruit"}, {"$not": {"stars": 5}}]}, "b"),
        ({"$not": {"year": {"$gt": 1}}}, "acd"),
        (Note.year > 1, "b"),
        # Values of other types than the column's.
        ({"year": "2"}, "b"),
        ({"year": {"$in": ["1", 1.5, 2**40, 2**70, None]}}, "acd"),
        ({"year": {"$lt": 2**40}}, "ab"),
        ({"year": 1.5}, ""),
        ({"day": "2026-01-03"}, "a"),
        ({"day": {"$in": ["2026-01-03"]}}, "a"),
        ({"day": {"$gt": dt.date(2026, 1, 2)}}, "a"),
        ({"tags": ["a", "b"]}, "d"),
    ],
)
def test_filters(store: SbertVectorStore, conditions: Any, found: str) -> None:
    store.add_documents(DOCUMENTS)
    store.add_texts(["apples"], [DOCUMENTS[0].metadata | {"day": dt.date(2026, 1, 3)}], ids=["a"])
    documents = store.similarity_search("apples", k=10, filter=conditions)
    assert sorted(document.id or "" for document in documents) == list(found)


@pytest.mark.parametrize(
    ("conditions", "says"),
    [
        ({"topic": {"$near": 1}}, "no operator '\\$near'"),
        ({"$xor": []}, "no operator '\\$xor'"),
        ({"$or": []}, "list of filters"),
        ({"topic": {"$in": "fruit"}}, "takes a list"),
        ({"tags": {"$any": "a"}}, "takes a list"),
        ({"topic": {"$any": ["fruit"]}}, "looks into arrays"),
        ({"year": {"$between": [1]}}, "two values"),
        ({"year": {"$gt": None}}, "None"),
        ({"stars": {"$gt": [1]}}, "no order"),
        ({"year": "two"}, r"Note.year is of Integer\(\) and .* type"),
        ({"year": True}, "of that type"),
        ({"day": {"$in": ["3 January"]}}, "ISO 8601; this is '3 January'"),
        ({"day": 3}, "ISO 8601"),
        ({"tags": "a"}, r"a list, or look into it by \$any"),
        ({"topic": ["fruit", "tools"]}, r"several by \$in"),
        ({"stars": {1, 2}}, "within JSON"),
        ({"stars": float("nan")}, "within JSON"),
        ("topic", "a mapping"),
    ],
)
def test_filters_that_make_no_sense(store: SbertVectorStore, conditions: Any, says: str) -> None:
    with pytest.raises(DeclarationError, match=says):
        store.similarity_search("apples", filter=conditions)


def test_metadata_comes_back(store: SbertVectorStore, tables: sa.Engine) -> None:
    assert store.add_documents(DOCUMENTS) == ["a", "b", "c", "d"]
    for given, got in zip(DOCUMENTS, store.get_by_ids(["a", "b", "c", "d"]), strict=True):
        assert got == given
    assert [d.id for d in store.get_by_ids(["c", "none", "a"])] == ["c", "a"]
    with tables.connect() as connection:
        assert connection.execute(sa.select(Note.topic).where(Note.id == "a")).scalar() == "fruit"
        pending = (
            "SELECT count(*) FROM note WHERE embedding_of = '00000000-0000-0000-0000-000000000000'"
        )
        assert connection.execute(sa.text(pending)).scalar() == 0


def test_a_document_takes_anothers_place_whole(store: SbertVectorStore) -> None:
    store.add_documents(DOCUMENTS)
    store.add_documents(
        [Document(page_content="first", id="a"), Document(page_content="plums", id="a")]
    )
    (document,) = store.similarity_search("plums", k=1)
    assert (document.page_content, document.metadata) == ("plums", {"topic": "fruit", "year": 1})
    assert len(store.similarity_search("apples", k=10)) == 4


def test_scores_are_similarities(store: SbertVectorStore, encoder: DeterministicEncoder) -> None:
    store.add_documents(DOCUMENTS)
    scored = store.similarity_search_with_score("pears", k=4)
    scores = [score for _, score in scored]
    assert scored[0][0].id == "b"
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(1, abs=1e-3)
    vector = encoder.encode_query(["pears"])[0].tolist()
    assert store.similarity_search_by_vector(vector, k=1)[0].id == "b"
    relevant = store.similarity_search_with_relevance_scores("pears", score_threshold=0.9)
    assert [document.id for document, _ in relevant] == ["b"]
    retriever = store.as_retriever(search_kwargs={"k": 1, "filter": {"topic": "tools"}})
    assert retriever.invoke("pears")[0].id == "c"


def test_diversity(store: SbertVectorStore, encoder: DeterministicEncoder) -> None:
    store.add_texts(["apples", "apples", "apples", "nails"], ids=["1", "2", "3", "4"])
    nearest = store.similarity_search("apples", k=2)
    diverse = store.max_marginal_relevance_search(query="apples", k=2, fetch_k=4, lambda_mult=0.3)
    assert {document.page_content for document in nearest} == {"apples"}
    assert {document.page_content for document in diverse} == {"apples", "nails"}
    vector = encoder.encode_query(["apples"])[0].tolist()
    same = store.max_marginal_relevance_search_by_vector(vector, k=2, fetch_k=4, lambda_mult=0.3)
    assert [d.page_content for d in same] == [d.page_content for d in diverse]
    again = asyncio.run(
        store.amax_marginal_relevance_search("apples", k=2, fetch_k=4, lambda_mult=0.3)
    )
    assert [d.page_content for d in again] == [d.page_content for d in diverse]
    with pytest.raises(DeclarationError, match="words="):  # which it hears, as the other searches
        store.max_marginal_relevance_search("apples", k=2, by="words")


def test_other_keys(tables: sa.Engine) -> None:
    numbered = SbertVectorStore(Numbered.embedding, sessionmaker(tables))
    ids = numbered.add_texts(["a", "b"], [{"topic": "x"}, {}])
    assert ids == ["1", "2"]
    numbered.add_texts(["c"], ids=["2"])
    assert [d.page_content for d in numbered.get_by_ids(["2", "x", "1"])] == ["c", "a"]
    numbered.delete(["x", "1"])
    assert [d.id for d in numbered.similarity_search("a")] == ["2"]
    with pytest.raises(DeclarationError, match="'x' is no int"):
        numbered.add_texts(["d"], ids=["x"])
    with pytest.raises(DeclarationError, match=r"no attribute 'color'.*topic.*metadata="):
        numbered.add_texts(["d"], [{"color": "red"}])
    with pytest.raises(DeclarationError, match="no ids"):
        numbered.delete()
    store = SbertVectorStore(ByUuid.embedding, sessionmaker(tables))
    (made,) = store.add_texts(["a"])
    assert store.get_by_ids([made])[0].page_content == "a"
    assert uuid.UUID(made)


def test_declarations_that_cannot_be_used(tables: sa.Engine) -> None:
    sessions = sessionmaker(tables)
    with pytest.raises(DeclarationError, match="content="):
        SbertVectorStore(TwoColumns.embedding, sessions)
    for wrong in (Note.body, Note.__table__.c.embedding, "embedding"):
        with pytest.raises(DeclarationError, match="no embedding column of a mapped class"):
            SbertVectorStore(wrong, sessions)
    with pytest.raises(DeclarationError, match="'nothing'"):
        SbertVectorStore(Note.embedding, sessions, metadata="nothing")
    store = SbertVectorStore(TwoColumns.embedding, sessions, content="body")
    store.add_texts(["a"], [{"title": "t"}])
    assert store.similarity_search("a")[0].metadata == {"title": "t"}
    with pytest.raises(DeclarationError, match="one of each"):
        store.add_texts(["a"], [{}, {}])


def test_sessions_that_encode_as_well(tables: sa.Engine, encoder: DeterministicEncoder) -> None:
    sessions = sessionmaker(tables)
    embed_on_flush(sessions)
    store = SbertVectorStore(Note.embedding, sessions, metadata="extra")
    encoder.encoded.clear()
    store.add_documents(DOCUMENTS)
    store.add_documents([DOCUMENTS[0].model_copy(update={"page_content": "plums"})])
    assert encoder.encoded == ["apples", "pears", "nails", "odd", "plums"]
    assert store.similarity_search("plums", k=1)[0].id == "a"


def test_from_texts(tables: sa.Engine) -> None:
    options = {"column": Note.embedding, "sessions": sessionmaker(tables), "metadata": "extra"}
    store = SbertVectorStore.from_texts(["a", "b"], **options)
    assert isinstance(store.embeddings, SbertEmbeddings)
    assert len(store.embeddings.embed_query("a")) == 384
    for wrong in ({}, {"column": Note.embedding}):
        with pytest.raises(DeclarationError, match="its embedding column and sessions as well"):
            SbertVectorStore.from_texts(["a"], SbertEmbeddings("deterministic"), **wrong)
    more = asyncio.run(SbertVectorStore.afrom_texts(["c"], **options))
    assert more.similarity_search("c", k=1)[0].page_content == "c"


def test_an_async_store_refuses_synchronous_calls(tables: sa.Engine) -> None:
    engine = create_async_engine(tables.url)
    store = SbertVectorStore(Note.embedding, async_sessionmaker(engine))
    with pytest.raises(DeclarationError, match="asynchronous"):
        store.similarity_search("a")


def test_new_rows_are_written_together(tables: sa.Engine) -> None:
    """A database that is a millisecond away would add one for each row else."""
    store = SbertVectorStore(Numbered.embedding, sessionmaker(tables))
    statements: list[str] = []

    def count(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    texts = [f"text {n}" for n in range(60)]
    metadatas: list[dict[str, Any]] = [{"topic": "odd"} if n % 2 else {} for n in range(60)]
    sa.event.listen(tables, "before_cursor_execute", count)
    try:
        ids = store.add_texts(texts, metadatas)
    finally:
        sa.event.remove(tables, "before_cursor_execute", count)
    assert len([s for s in statements if s.startswith("INSERT")]) <= 2
    read = store.get_by_ids(ids)
    assert [document.page_content for document in read] == texts
    assert [document.metadata for document in read] == metadatas


@pytest.mark.parametrize("class_", [Note, Numbered, ByUuid])
async def test_more_ids_than_a_statement_has_parameters(tables: sa.Engine, class_: Any) -> None:
    many = [str(uuid.UUID(int=n)) if class_ is ByUuid else str(n) for n in range(1, 70_001)]
    store = SbertVectorStore(class_.embedding, sessionmaker(tables))
    store.add_texts(["first", "other"], ids=[many[0], many[-1]])
    assert [document.page_content for document in store.get_by_ids(many)] == ["first", "other"]
    engine = create_async_engine(tables.url.set(drivername="postgresql+asyncpg"))
    over_asyncpg = SbertVectorStore(class_.embedding, async_sessionmaker(engine))
    assert len(await over_asyncpg.aget_by_ids(many)) == 2
    await over_asyncpg.adelete(many[:-1])
    assert [document.id for document in store.get_by_ids(many)] == many[-1:]
    store.delete(many)
    assert store.get_by_ids(many) == []
    await engine.dispose()
