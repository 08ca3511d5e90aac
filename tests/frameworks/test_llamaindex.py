"""LlamaIndex's vector store over a mapped class: as its stores are used, and through an index."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import IndexNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from sbert_pg import create_all, embedding_column, hnsw_index, registry, text_column
from sbert_pg.adapters.llamaindex import SbertEmbedding, SbertVectorStore
from sbert_pg.errors import DeclarationError
from sbert_pg.testing import DeterministicEncoder


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSONB}


class Note(Base):
    __tablename__ = "note"
    id: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[str]
    topic: Mapped[str | None]
    extra: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    embedding = embedding_column("deterministic", "body", nullable=True, dimensions=384)


class Half(Base):
    """In half precision, with an index and words."""

    __tablename__ = "half"
    __table_args__ = (hnsw_index("half_embedding", "embedding"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[str]
    extra: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    embedding = embedding_column(
        "deterministic", "body", nullable=True, dimensions=384, storage="halfvec"
    )
    words = text_column("body")


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


def node(id_: str, text: str, document: str, **metadata: Any) -> TextNode:
    source = RelatedNodeInfo(node_id=document)
    return TextNode(
        id_=id_, text=text, metadata=metadata, relationships={NodeRelationship.SOURCE: source}
    )


NODES = [
    node("1", "trams at night", "city", topic="traffic", year=2021, tags=["tram", "night"]),
    node("2", "bread at six", "shop", topic="food", year=2022, tags=["bread"]),
    node("3", "100% rye_bread", "shop", topic="food", tags=[]),
]


@pytest.fixture
def store(database: sa.Engine) -> SbertVectorStore:
    with database.begin() as connection:
        connection.execute(sa.text("TRUNCATE note"))
    made = SbertVectorStore(Note.embedding, sessionmaker(database), metadata="extra")
    assert made.add(NODES) == ["1", "2", "3"]
    return made


def filters(*parts: Any, condition: str = "and") -> MetadataFilters:
    """Of ``(key, operator, value)``, or of filters."""
    return MetadataFilters(
        filters=[
            MetadataFilter(key=p[0], operator=FilterOperator(p[1]), value=p[2])
            if isinstance(p, tuple)
            else p
            for p in parts
        ],
        condition=FilterCondition(condition),
    )


def ids(nodes: Any) -> list[str]:
    return [n.node_id for n in nodes]


def test_nodes_come_back_as_they_were(store: SbertVectorStore, database: sa.Engine) -> None:
    for was, read in zip(NODES, store.get_nodes(), strict=True):
        assert (read.node_id, read.get_content(), read.metadata, read.ref_doc_id) == (
            was.node_id, was.text, was.metadata, was.ref_doc_id,
        )  # fmt: skip
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE note SET topic = 'changed' WHERE id = '1'"))
        connection.execute(sa.text("INSERT INTO note (id, body) VALUES ('4', 'by SQL')"))
    first, last = store.get_nodes(["1", "4", "none"])
    assert first.metadata["topic"] == "changed"
    assert (last.get_content(), last.metadata) == ("by SQL", {})


def test_querying(store: SbertVectorStore, encoder: DeterministicEncoder) -> None:
    found = store.query(VectorStoreQuery(query_str="bread at six", similarity_top_k=2))
    assert found.ids is not None
    assert found.similarities is not None
    assert found.ids[0] == "2"
    assert len(found.ids) == 2
    assert found.similarities[0] == pytest.approx(1)
    vector = encoder.encode_document(["trams at night"])[0].tolist()
    found = store.query(VectorStoreQuery(query_embedding=vector, similarity_top_k=1))
    assert found.ids == ["1"]
    for limited in (
        {"doc_ids": ["shop"]},
        {"node_ids": ["2", "3"]},
        {"filters": filters(("topic", "==", "food"))},
    ):
        query = VectorStoreQuery(query_str="trams", similarity_top_k=5, **limited)
        assert sorted(store.query(query).ids or []) == ["2", "3"]
    for refused in (
        VectorStoreQuery(query_str="a", mode=VectorStoreQueryMode.HYBRID),
        VectorStoreQuery(query_str="a", mode=VectorStoreQueryMode.SVM),
        VectorStoreQuery(similarity_top_k=1),
    ):
        with pytest.raises(DeclarationError):
            store.query(refused)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (filters(("topic", "==", "food"), ("year", ">", 2021)), ["2"]),
        (filters(("topic", "==", "traffic"), ("year", ">=", 2022), condition="or"), ["1", "2"]),
        (filters(("topic", "==", "food"), ("year", "==", 2022), condition="not"), ["1", "3"]),
        (filters(filters(("year", "<", 2022)), filters(("topic", "!=", "food"))), ["1"]),
        (filters(("year", "in", [2021, 2022])), ["1", "2"]),
        (filters(("year", "nin", [2021])), ["2", "3"]),
        (filters(("topic", "in", ["traffic"])), ["1"]),
        (filters(("nowhere", "is_empty", None)), ["1", "2", "3"]),
        (filters(("year", "is_empty", None)), ["3"]),
        (filters(("tags", "is_empty", None)), ["3"]),
        (filters(("tags", "contains", "bread")), ["2"]),
        (filters(("tags", "any", ["bread", "night"])), ["1", "2"]),
        (filters(("tags", "any", ["bread", "unknown"])), ["2"]),
        (filters(("tags", "all", ["tram", "night"])), ["1"]),
        (filters(("tags", "all", ["tram", "unknown"])), []),
        (filters(("topic", "text_match", "oo")), ["2", "3"]),
        (filters(("topic", "text_match", "OO")), []),
        (filters(("topic", "text_match_insensitive", "OO")), ["2", "3"]),
        (filters(("topic", "text_match", "%")), []),
        (filters(), ["1", "2", "3"]),
    ],
)
def test_filters(store: SbertVectorStore, wanted: MetadataFilters, found: list[str]) -> None:
    assert ids(store.get_nodes(filters=wanted)) == found


def test_what_no_filter_can_be(store: SbertVectorStore) -> None:
    with pytest.raises(DeclarationError, match="arrays"):
        store.get_nodes(filters=filters(("topic", "contains", "food")))
    newer: Any = Enum("Newer", {"ENDS_WITH": "ends_with"}).ENDS_WITH  # of a later LlamaIndex
    part = MetadataFilter.model_construct(key="tags", operator=newer, value="bread")
    with pytest.raises(DeclarationError, match="no filter 'ends_with'"):
        store.get_nodes(filters=MetadataFilters.model_construct(filters=[part], condition=None))


def test_deleting(store: SbertVectorStore) -> None:
    store.delete_nodes(["1"], filters(("topic", "==", "food")))
    store.delete_nodes([])
    assert ids(store.get_nodes()) == ["1", "2", "3"]
    store.delete_nodes(filters=filters(("year", "==", 2022)))
    assert ids(store.get_nodes()) == ["1", "3"]
    with pytest.raises(DeclarationError, match=r"clear\(\)"):
        store.delete_nodes()
    store.delete("shop")
    assert ids(store.get_nodes()) == ["1"]
    store.clear()
    assert store.get_nodes() == []


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_what_their_tests_of_postgres_ask(
    store: SbertVectorStore, asynchronous: bool
) -> None:
    """The behaviours of LlamaIndex's own tests of a store in Postgres, by both kinds of calls."""

    async def do(name: str, *arguments: Any) -> Any:
        names = {"add": "async_add"}
        if asynchronous:
            return await getattr(store, names.get(name, f"a{name}"))(*arguments)
        return getattr(store, name)(*arguments)

    async def asked(limit: int = 10, **how: Any) -> Any:
        return await do("query", VectorStoreQuery(similarity_top_k=limit, **how))

    # A node that stands for an index comes back as one, and is added a second time in its place.
    reference = IndexNode(id_="4", text="jam and honey", index_id="other", metadata={"topic": "x"})
    assert await do("add", [reference]) == await do("add", [reference]) == ["4"]
    found = await asked(2, query_str="jam and honey")
    assert (found.ids[0], len(found.nodes), len(found.similarities)) == ("4", 2, 2)
    assert isinstance(found.nodes[0], IndexNode)
    assert found.nodes[0].index_id == "other"
    assert type(found.nodes[1]) is TextNode
    # Filters and ids in one question; a filter that nothing passes.
    food = filters(("topic", "==", "food"))
    assert sorted((await asked(query_str="bread", filters=food)).ids) == ["2", "3"]
    assert (await asked(query_str="bread", filters=food, node_ids=["1", "2"])).ids == ["2"]
    nothing = await asked(query_str="bread", filters=filters(("topic", "==", "none")))
    assert (nothing.ids, list(nothing.nodes), nothing.similarities) == ([], [], [])
    read = [(None, food), (["1", "2"], food), (["1"], food), (["3", "none"], None)]
    assert [ids(await do("get_nodes", *these)) for these in read] == [["2", "3"], ["2"], [], ["3"]]
    # Diversity: of rows that say the same, one.
    await do("add", [node(f"j{n}", "jam and honey", "shop") for n in range(3)])
    how: dict[str, Any] = {"query_str": "jam and honey", "mode": VectorStoreQueryMode.MMR}
    texts = [n.get_content() for n in (await asked(2, mmr_threshold=0.3, **how)).nodes]
    assert texts[0] == "jam and honey" != texts[1]
    assert len((await asked(3, mmr_threshold=1, **how)).ids) == 3
    # Deleting: what no row has, what filters and ids have in common, a document, everything.
    await do("delete_nodes", ["none"])
    await do("delete_nodes", ["1", "2"], food)
    assert ids(await do("get_nodes")) == ["1", "3", "4", "j0", "j1", "j2"]
    await do("delete", "shop")
    assert ids(await do("get_nodes", ["3", "4"])) == ["4"]
    await do("clear")
    assert (await asked(query_str="bread")).ids == []


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_sentences_in_half_precision(
    database: sa.Engine, encoder: DeterministicEncoder, asynchronous: bool
) -> None:
    """The same tests' questions in words: whole sentences, with signs, beside a vector."""
    with database.begin() as connection:
        connection.execute(sa.text("TRUNCATE half"))
    sessions = sessionmaker(database)
    store = SbertVectorStore(Half.embedding, sessions, metadata="extra", words="words")
    animals = [
        node("bread", "bread at six", "d"),
        node("jam", "jam and honey", "d", kind="sweet"),
        node("quick", "a quick fox jumps across this lazy dog", "d"),
        node("friends", "one fox, two hounds", "d", kind="wild"),
    ]
    await store.async_add(animals) if asynchronous else store.add(animals)

    async def found(text: str | None, mode: str, **how: Any) -> list[str]:
        vector = encoder.encode_query(["bread at six"])[0].tolist()
        query = VectorStoreQuery(
            query_str=text, query_embedding=vector, mode=VectorStoreQueryMode(mode), **how
        )
        result = await store.aquery(query) if asynchronous else store.query(query)
        return list(result.ids or [])

    for text in ("fox", "who is the fox?", "  who' &..s |   (the): <-> **fox**?!!! "):
        assert set(await found(text, "sparse", sparse_top_k=2)) == {"quick", "friends"}
        both = await found(text, "hybrid", similarity_top_k=4)
        assert set(both[:2]) == {"quick", "friends"}
        assert len(await found(text, "hybrid", similarity_top_k=4, hybrid_top_k=1)) == 1
    wild = filters(("kind", "in", ["wild", "sweet"]))
    assert await found("fox", "hybrid", similarity_top_k=9, filters=wild) == ["friends", "jam"]
    assert await found(None, "default", similarity_top_k=1) == ["bread"]
    for mode in ("hybrid", "sparse"):
        with pytest.raises(DeclarationError, match="words"):
            await found(None, mode)


def test_an_index_of_it(store: SbertVectorStore) -> None:
    index = VectorStoreIndex.from_vector_store(store, embed_model=SbertEmbedding("deterministic"))
    index.insert_nodes([node("4", "jam and honey", "shop", topic="food")])
    found = index.as_retriever(similarity_top_k=2).retrieve("jam and honey")
    assert found[0].node.node_id == "4"
    assert found[0].score == pytest.approx(1)
    # How much they differ comes by the framework's own way, which sets nothing in the query.
    index.insert_nodes([node(f"j{n}", "jam and honey", "shop") for n in range(3)])
    for threshold, same in ((1.0, {"jam and honey"}), (0.3, None)):
        diverse = index.as_retriever(
            similarity_top_k=2,
            vector_store_query_mode="mmr",
            vector_store_kwargs={"mmr_threshold": threshold, "mmr_prefetch_k": None},
        ).retrieve("jam and honey")
        contents = {one.get_content() for one in diverse}
        assert contents == same if same else len(contents) == 2
    assert len(found) == 2


def test_embedding(encoder: DeterministicEncoder) -> None:
    for given in ("deterministic", encoder, encoder.spec):
        embedding = SbertEmbedding(given)
        texts = embedding.get_text_embedding_batch(["a", "b"])
        assert np.allclose(texts, encoder.encode_document(["a", "b"]))
        assert np.allclose(embedding.get_query_embedding("a"), encoder.encode_query(["a"])[0])


async def test_over_asyncpg(database: sa.Engine, store: SbertVectorStore) -> None:
    engine = create_async_engine(database.url.set(drivername="postgresql+asyncpg"))
    other = SbertVectorStore(Note.embedding, async_sessionmaker(engine), metadata="extra")
    await other.async_add([node("4", "jam", "shop", topic="food")])
    query = VectorStoreQuery(query_str="jam", similarity_top_k=1)
    assert (await other.aquery(query)).ids == ["4"]
    await other.adelete_nodes(["4"])
    await other.adelete("city")
    assert ids(await other.aget_nodes()) == ["2", "3"]
    await other.aclear()
    assert await other.aget_nodes() == []
    with pytest.raises(DeclarationError, match="asynchronous"):
        other.clear()
    await engine.dispose()
