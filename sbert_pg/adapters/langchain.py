"""LangChain's ``VectorStore`` and ``Embeddings`` over a mapped class; extra ``langchain``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from sbert_pg.adapters.documents import Documents, Row, Runner, Work
from sbert_pg.errors import DeclarationError, MissingExtraError
from sbert_pg.registry import get_encoder
from sbert_pg.reranking import by_marginal_relevance
from sbert_pg.spec import EncoderSpec, TextEncoder
from sbert_pg.types.encoding import query_vector

try:
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import VectorStore
except ImportError as error:
    raise MissingExtraError(
        "langchain-core", "langchain", "offer a table as LangChain's vector store"
    ) from error


class SbertEmbeddings(Embeddings):
    """An encoder of this library as LangChain's ``Embeddings``.

    Args:
        encoder: a name or path as ``Encoder.load`` takes it, the spec of a column, or an encoder.
            A name is loaded at the first text.
    """

    def __init__(self, encoder: str | EncoderSpec | TextEncoder) -> None:
        self._encoder = encoder

    @property
    def encoder(self) -> TextEncoder:
        """The encoder, loaded."""
        if isinstance(self._encoder, (str, EncoderSpec)):
            return get_encoder(self._encoder)
        return self._encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """The vectors of texts, as documents."""
        vectors: list[list[float]] = np.asarray(self.encoder.encode_document(texts)).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of a text, as a query."""
        vectors: list[list[float]] = np.asarray(self.encoder.encode_query([text])).tolist()
        return vectors[0]


class SbertVectorStore(VectorStore):
    """The rows of a mapped class as LangChain's ``VectorStore``.

    Scores are similarities, larger for nearer. Ids are the primary key as text. Metadata is what
    the row's other attributes hold; filters are as ``search.filters.condition`` takes them. Each
    call is a transaction of its own.

    Args:
        column: the embedding column, as in ``Article.embedding``.
        sessions: a ``sessionmaker``, for both synchronous calls and asynchronous ones, which run in
            a thread; or an ``async_sessionmaker``, for asynchronous calls alone.
        content: name of the attribute that is the text; the embedding's source by default.
        metadata: name of a JSON attribute for metadata that has no attribute of its own.
        words: name of a text column's attribute, for searches with ``by="words"`` or ``"both"``.

    Raises:
        DeclarationError: what the class declares cannot be used so.
    """

    def __init__(
        self,
        column: Any,
        sessions: Any,
        *,
        content: str | None = None,
        metadata: str | None = None,
        words: str | None = None,
    ) -> None:
        self.documents = Documents(column, content=content, metadata=metadata, words=words)
        runner = Runner(sessions)
        self._run, self._arun = runner.run, runner.arun

    @property
    def embeddings(self) -> Embeddings:
        """The column's encoder."""
        return SbertEmbeddings(self.documents.encoder)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[Any, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Embed and write texts; one with the id of an existing row takes its place."""
        return self._run(self.documents.upsert(_rows(texts, metadatas, ids)))

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[Any, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """As ``add_texts``."""
        return await self._arun(self.documents.upsert(_rows(texts, metadatas, ids)))

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete rows by their ids; those that no row has are passed over.

        Raises:
            DeclarationError: no ids, which would be every row of the application's table.
        """
        self._run(self.documents.delete(_some(ids)))
        return True

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """As ``delete``."""
        await self._arun(self.documents.delete(_some(ids)))
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of some ids; those that no row has are left out."""
        return _documents(self._run(self.documents.get(ids)))

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """As ``get_by_ids``."""
        return _documents(await self._arun(self.documents.get(ids)))

    def similarity_search(
        self, query: str, k: int = 4, filter: Any = None, by: str = "meaning", **kwargs: Any
    ) -> list[Document]:
        """The documents nearest to a question, nearest first."""
        return _documents(self._run(self.documents.search(query, k, filter, by=by)))

    async def asimilarity_search(
        self, query: str, k: int = 4, filter: Any = None, by: str = "meaning", **kwargs: Any
    ) -> list[Document]:
        """As ``similarity_search``."""
        return _documents(await self._arun(self.documents.search(query, k, filter, by=by)))

    def similarity_search_with_score(
        self, query: Any, k: int = 4, filter: Any = None, by: str = "meaning", **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As ``similarity_search``, each with its similarity or score."""
        return _scored(self._run(self.documents.search(query, k, filter, by=by)))

    async def asimilarity_search_with_score(
        self, query: Any, k: int = 4, filter: Any = None, by: str = "meaning", **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """As ``similarity_search_with_score``."""
        return _scored(await self._arun(self.documents.search(query, k, filter, by=by)))

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, filter: Any = None, **kwargs: Any
    ) -> list[Document]:
        """The documents nearest to a vector."""
        return _documents(self._run(self.documents.search(embedding, k, filter)))

    async def asimilarity_search_by_vector(
        self, embedding: list[float], k: int = 4, filter: Any = None, **kwargs: Any
    ) -> list[Document]:
        """As ``similarity_search_by_vector``."""
        return _documents(await self._arun(self.documents.search(embedding, k, filter)))

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: Any,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Any = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Documents near to a vector that differ from each other, out of the ``fetch_k`` nearest.

        Args:
            embedding: the vector.
            k: documents to return.
            fetch_k: documents to choose from.
            lambda_mult: 1 for the nearest ones, 0 for those that differ most.
            filter: as in ``similarity_search``.
            **kwargs: ignored.
        """
        return self._run(self._diverse(embedding, k, fetch_k, lambda_mult, filter))

    async def amax_marginal_relevance_search_by_vector(
        self,
        embedding: Any,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Any = None,
        **kwargs: Any,
    ) -> list[Document]:
        """As ``max_marginal_relevance_search_by_vector``."""
        return await self._arun(self._diverse(embedding, k, fetch_k, lambda_mult, filter))

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search_by_vector``, of a question."""
        return self.max_marginal_relevance_search_by_vector(
            query, k, fetch_k, lambda_mult, **kwargs
        )

    async def amax_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """As ``max_marginal_relevance_search``."""
        return await self.amax_marginal_relevance_search_by_vector(
            query, k, fetch_k, lambda_mult, **kwargs
        )

    def _diverse(
        self, query: Any, k: int, fetch_k: int, lambda_mult: float, conditions: Any
    ) -> Work[list[Document]]:
        search = self.documents.search(query, fetch_k, conditions, vectors=True)

        def work(session: Session) -> list[Document]:
            rows = search(session)
            text = isinstance(query, str)
            vector = query_vector(self.documents.encoder, query) if text else query
            if not rows:
                return []
            vectors = np.asarray([row.vector for row in rows], dtype=np.float32)
            asked = np.asarray(vector, dtype=np.float32)
            chosen = by_marginal_relevance(vectors, asked, k, lambda_mult)
            return _documents([rows[position] for position in chosen])

        return work

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        if self.documents.encoder.similarity in ("euclidean", "manhattan"):
            return lambda similarity: 1 / (1 - similarity)  # the similarity is -distance
        return lambda similarity: min(1.0, max(0.0, similarity))

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[Any, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> SbertVectorStore:
        """A store, with texts added to it.

        Args:
            texts: the texts.
            embedding: ignored, since the column decides its encoder.
            metadatas: one for each text.
            ids: one for each text.
            **kwargs: the arguments of the class: ``column`` and ``sessions`` at least.
        """
        store = cls(**kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    @classmethod
    async def afrom_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[Any, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> SbertVectorStore:
        """As ``from_texts``."""
        store = cls(**kwargs)
        await store.aadd_texts(texts, metadatas, ids=ids)
        return store


def _rows(
    texts: Iterable[str], metadatas: list[dict[Any, Any]] | None, ids: Sequence[str | None] | None
) -> list[Row]:
    texts = list(texts)
    try:
        return [
            Row(id_, text, metadata)
            for text, metadata, id_ in zip(
                texts, metadatas or [{} for _ in texts], ids or [None] * len(texts), strict=True
            )
        ]
    except ValueError as error:
        raise DeclarationError(
            f"{len(texts)} texts were given with {len(metadatas or texts)} metadatas and "
            f"{len(ids or texts)} ids; give one of each for each text."
        ) from error


def _some(ids: list[str] | None) -> list[str]:
    if ids is None:
        raise DeclarationError(
            "delete() was given no ids, which is every row of the table; delete those in SQL."
        )
    return ids


def _documents(rows: Iterable[Row]) -> list[Document]:
    return [Document(page_content=row.text, metadata=row.metadata, id=row.id) for row in rows]


def _scored(rows: Iterable[Row]) -> list[tuple[Document, float]]:
    return [
        (document, row.similarity or 0.0)
        for document, row in zip(_documents(rows), rows, strict=True)
    ]


__all__ = ["SbertEmbeddings", "SbertVectorStore"]
