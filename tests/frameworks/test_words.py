"""The stores of other libraries: what they lack, and searches by words and by both."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from sbert_pg import create_all, embed_on_flush, embedding_column, text_column
from sbert_pg.errors import DeclarationError

pytest.importorskip("langchain_core")
pytest.importorskip("haystack")
pytest.importorskip("llama_index.core")


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSONB}


class Note(Base):
    __tablename__ = "note"
    id: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str]
    body: Mapped[str]
    extra: Mapped[dict[str, Any] | None]
    embedding = embedding_column("deterministic", "body", nullable=True, dimensions=384)
    words = text_column("title")


@pytest.fixture
def tables(engine: sa.Engine, fake_encoder: Any) -> None:
    with engine.begin() as connection:
        create_all(connection, Base.metadata)
    with Session(engine) as session:
        embed_on_flush(session)
        # Of each question's word one row has the title, and another the body.
        session.add(Note(id="title", title="refunds", body="how money is sent back"))
        session.add(Note(id="body", title="shop", body="refunds"))
        session.add(Note(id="neither", title="hours", body="when we are open"))
        session.commit()


def langchain(engine: sa.Engine, words: str | None) -> Any:
    from sbert_pg.adapters.langchain import SbertVectorStore

    store = SbertVectorStore(Note.embedding, sessionmaker(engine), metadata="extra", words=words)

    def ids(by: str) -> list[Any]:
        found = store.as_retriever(search_kwargs={"k": 2, "by": by}).invoke("refunds")
        scored = store.similarity_search_with_score("refunds", 2, by=by)
        assert [document.id for document, _ in scored] == [document.id for document in found]
        return [document.id for document in found]

    return ids


def haystack(engine: sa.Engine, words: str | None) -> Any:
    from sbert_pg.adapters.haystack import SbertDocumentStore, SbertRetriever

    store = SbertDocumentStore(Note.embedding, sessionmaker(engine), metadata="extra", words=words)

    def ids(by: str) -> list[Any]:
        found = SbertRetriever(store, top_k=2, by=by).run("refunds")
        return [document.id for document in found["documents"]]

    return ids


def llamaindex(engine: sa.Engine, words: str | None) -> Any:
    from llama_index.core import VectorStoreIndex

    from sbert_pg.adapters.llamaindex import SbertEmbedding, SbertVectorStore

    store = SbertVectorStore(Note.embedding, sessionmaker(engine), metadata="extra", words=words)
    index = VectorStoreIndex.from_vector_store(store, embed_model=SbertEmbedding("deterministic"))
    modes = {"meaning": "default", "words": "text_search", "both": "hybrid"}

    def ids(by: str, **more: Any) -> list[Any]:
        retriever = index.as_retriever(
            similarity_top_k=2, sparse_top_k=2, vector_store_query_mode=modes[by], **more
        )
        return [one.node.node_id for one in retriever.retrieve("refunds")]

    return ids


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("library", [langchain, haystack, llamaindex])
def test_stores_are_searched_by_words_too(engine: sa.Engine, library: Any) -> None:
    ids = library(engine, "words")
    assert ids("meaning")[0] == "body"
    assert ids("words") == ["title"]
    assert set(ids("both")) == {"title", "body"}
    with pytest.raises(DeclarationError, match="words="):
        library(engine, None)("both")
    with pytest.raises(DeclarationError, match="no attribute"):
        library(engine, "nothing")


@pytest.mark.usefixtures("tables")
def test_llamaindex_weighs_meaning_by_alpha(engine: sa.Engine) -> None:
    ids = llamaindex(engine, "words")
    assert [ids("both", alpha=alpha)[0] for alpha in (0.0, 1.0)] == ["title", "body"]


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("langchain", "langchain_core", "langchain"),
        ("haystack", "haystack", "haystack"),
        ("llamaindex", "llama_index", "llamaindex"),
        ("ray_data", "ray", "ray"),
    ],
)
def test_a_missing_package_is_said(module: str, package: str, extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import sbert_pg.adapters.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert " is needed to " in done.stderr
    assert f"pip install 'sbert-pg[{extra}]'" in done.stderr
