"""LangChain's ``VectorStore`` and ``Embeddings`` over a mapped class; extra ``langchain``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sbert_pg.adapters.documents import Row, Store
from sbert_pg.adapters.running import Lists, Work, both, then
from sbert_pg.errors import DeclarationError, needing

with needing("langchain-core", "langchain", "offer a table as LangChain's vector store"):
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import VectorStore


class SbertEmbeddings(Lists, Embeddings):
    """An encoder of this library as LangChain's ``Embeddings``.

    Args:
        encoder: a name or path as ``Encoder.load`` takes it, the spec of a column, or an encoder.
            A name is loaded at the first text.
    """

    embed_documents = Lists.of_documents
    embed_query = Lists.of_query


class SbertVectorStore(Store, VectorStore):
    """The rows of a mapped class as LangChain's ``VectorStore``.

    Scores are similarities, larger for nearer. Ids are the primary key as text. Metadata is what
    the row's other attributes hold; filters are as ``search.filters.condition`` takes them. Each
    call is a transaction of its own.

    Arguments and errors are those of ``documents.Store``.
    """

    @property
    def embeddings(self) -> Embeddings:
        """The column's encoder."""
        return SbertEmbeddings(self.documents.encoder)

    def _add_texts(
        self,
        /,
        texts: Iterable[str],
        metadatas: list[dict[Any, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Work[list[str]]:
        """Embed and write texts; one with the id of an existing row takes its place.

        Attributes that its metadata does not name stay; the JSON attribute is written whole.
        """
        return self.documents.upsert(_rows(texts, metadatas, ids))

    add_texts, aadd_texts = both(_add_texts)

    def _delete(self, /, ids: list[str] | None = None, **kwargs: Any) -> Work[bool]:
        """Delete rows by their ids; those that no row has are passed over.

        Raises:
            DeclarationError: no ids, which would be every row of the application's table.
        """
        return then(self.documents.delete(ids), lambda _: True)

    delete, adelete = both(_delete)

    def _get(self, ids: Sequence[str], /) -> Work[list[Document]]:
        """The documents of some ids; those that no row has are left out."""
        return then(self.documents.get(ids), _documents)

    get_by_ids, aget_by_ids = both(_get)

    def _search(
        self, /, query: str, k: int = 4, filter: Any = None, by: str = "meaning", **kwargs: Any
    ) -> Work[list[Document]]:
        """The documents nearest to a question, nearest first."""
        return then(self.documents.search(query, k, filter, by=by), _documents)

    similarity_search, asimilarity_search = both(_search)

    def _search_scored(
        self, /, query: Any, k: int = 4, filter: Any = None, by: str = "meaning", **kwargs: Any
    ) -> Work[list[tuple[Document, float]]]:
        """As ``similarity_search``, each with its similarity or score."""
        return then(self.documents.search(query, k, filter, by=by), _scored)

    similarity_search_with_score, asimilarity_search_with_score = both(_search_scored)

    def _search_by_vector(
        self, /, embedding: list[float], k: int = 4, filter: Any = None, **kwargs: Any
    ) -> Work[list[Document]]:
        """The documents nearest to a vector."""
        return then(self.documents.search(embedding, k, filter), _documents)

    similarity_search_by_vector, asimilarity_search_by_vector = both(_search_by_vector)

    def _diverse(
        self,
        /,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Any = None,
        by: str = "meaning",
        **kwargs: Any,
    ) -> Work[list[Document]]:
        """Documents near to a question that differ from each other, of the ``fetch_k`` nearest.

        ``lambda_mult`` is 1 for the nearest ones, and 0 for those that differ most.
        """
        work = self.documents.diverse(query, k, filter, out_of=fetch_k, trade=lambda_mult, by=by)
        return then(work, _documents)

    max_marginal_relevance_search, amax_marginal_relevance_search = both(_diverse)

    def _diverse_by_vector(
        self,
        /,
        embedding: Any,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Any = None,
        **kwargs: Any,
    ) -> Work[list[Document]]:
        """As ``max_marginal_relevance_search``, of a vector."""
        return self._diverse(embedding, k, fetch_k, lambda_mult, filter)

    max_marginal_relevance_search_by_vector, amax_marginal_relevance_search_by_vector = both(
        _diverse_by_vector
    )

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
        """A store, with texts added to it; ``afrom_texts`` is its twin.

        Args:
            texts, metadatas, ids: as for ``add_texts``.
            embedding: ignored, since the column decides its encoder.
            **kwargs: the arguments of the class: ``column`` and ``sessions`` at least.
        """
        store = cls(**_of_store(kwargs))
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
        store = cls(**_of_store(kwargs))
        await store.aadd_texts(texts, metadatas, ids=ids)
        return store


def _of_store(options: dict[str, Any]) -> dict[str, Any]:
    if not options.keys() >= {"column", "sessions"}:
        raise DeclarationError(
            "A store of texts is rows of a mapped class: give its embedding column and sessions as "
            "well, as in from_texts(texts, column=Note.embedding, sessions=sessionmaker(engine))."
        )
    return options


def _rows(
    texts: Iterable[str], metadatas: list[dict[Any, Any]] | None, ids: Sequence[str | None] | None
) -> list[Row]:
    texts = list(texts)
    metadatas, ids = metadatas or [{} for _ in texts], ids or [None for _ in texts]
    if not len(texts) == len(metadatas) == len(ids):
        raise DeclarationError(
            f"{len(texts)} texts were given with {len(metadatas)} metadatas and {len(ids)} ids; "
            "give one of each for each text."
        )
    return [Row(*row) for row in zip(ids, texts, metadatas, strict=True)]


def _document(row: Row) -> Document:
    return Document(page_content=row.text, metadata=row.metadata, id=row.id)


def _documents(rows: Iterable[Row]) -> list[Document]:
    return [_document(row) for row in rows]


def _scored(rows: Iterable[Row]) -> list[tuple[Document, float]]:
    return [(_document(row), row.similarity or 0.0) for row in rows]


__all__ = ["SbertEmbeddings", "SbertVectorStore"]
