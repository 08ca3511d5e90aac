"""LlamaIndex's vector store and embedding over a mapped class; extra ``llamaindex``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sbert_pg.adapters.documents import Documents, Row
from sbert_pg.adapters.running import Lists, Runner, Work, both, then
from sbert_pg.errors import DeclarationError, needing
from sbert_pg.search.filters import SIGNS, combined
from sbert_pg.spec import EncoderSpec, TextEncoder

with needing("llama-index-core", "llamaindex", "offer a table as LlamaIndex's vector store"):
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.schema import BaseNode, MetadataMode, TextNode
    from llama_index.core.vector_stores.types import (
        BasePydanticVectorStore,
        MetadataFilter,
        MetadataFilters,
        VectorStoreQuery,
        VectorStoreQueryMode,
        VectorStoreQueryResult,
    )
    from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

#: What LlamaIndex keeps of a node beside its text and metadata.
_OF_NODE = ("_node_content", "_node_type", "document_id", "doc_id", "ref_doc_id")
_OPERATORS = {**SIGNS, "nin": "$nin"}
_IN_ARRAYS = {"contains": "$all", "any": "$any", "all": "$all"}
_MATCHES = {"text_match": "$like", "text_match_insensitive": "$ilike"}


class SbertEmbedding(BaseEmbedding):
    """An encoder of this library as LlamaIndex's embedding.

    Args:
        encoder: a name or path as ``Encoder.load`` takes it, the spec of a column, or an encoder.
            A name is loaded at the first text.
    """

    _lists: Lists = PrivateAttr()

    def __init__(self, encoder: str | EncoderSpec | TextEncoder) -> None:
        name = encoder if isinstance(encoder, str) else getattr(encoder, "name", "")
        super().__init__(model_name=name or "unknown")
        self._lists = Lists(encoder)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._lists.of_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._lists.of_documents(texts)


#: What rows are found by, of each mode.
_MODES = {
    VectorStoreQueryMode.DEFAULT: "meaning",
    VectorStoreQueryMode.HYBRID: "both",
    VectorStoreQueryMode.TEXT_SEARCH: "words",
    VectorStoreQueryMode.SPARSE: "words",
}


def _how(query: VectorStoreQuery) -> dict[str, Any]:
    """What a query's mode asks for; ``alpha`` is the weight of meaning, 1 being meaning alone."""
    by, limit = _MODES[query.mode], query.similarity_top_k
    if by == "both":
        return {"by": by, "limit": query.hybrid_top_k or limit, "weight": query.alpha}
    return {"by": by, "limit": (by == "words" and query.sparse_top_k) or limit}


class SbertVectorStore(BasePydanticVectorStore):
    """The rows of a mapped class as LlamaIndex's vector store.

    Ids of nodes are the primary key as text. Vectors are made by the column's own encoder, of nodes
    as well as of questions; those that an index brings are not stored. Each call is a transaction
    of its own.

    Arguments and errors are those of ``documents.Store``; ``metadata`` is needed, for what
    LlamaIndex keeps of a node. The modes ``hybrid``, ``text_search`` and ``sparse`` need ``words``.
    """

    stores_text: bool = True
    is_embedding_query: bool = False

    _documents: Documents = PrivateAttr()
    _runner: Runner = PrivateAttr()

    def __init__(
        self,
        column: Any,
        sessions: Any,
        *,
        metadata: str,
        content: str | None = None,
        words: str | None = None,
    ) -> None:
        super().__init__(stores_text=True)
        self._documents = Documents(column, content=content, metadata=metadata, words=words)
        self._runner = Runner(sessions)

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex knows it."""
        return "SbertVectorStore"

    @property
    def client(self) -> Any:
        """The mapped class."""
        return self._documents.class_

    def _add(self, /, nodes: Sequence[BaseNode], **kwargs: Any) -> Work[list[str]]:
        """Embed and write nodes; one with the id of a row is written in its place."""
        return self._documents.upsert(_rows(nodes))

    add, async_add = both(_add)

    def _get(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> Work[list[BaseNode]]:
        """The nodes of some ids that pass filters, by their ids."""
        return then(self._documents.matching(_filters(filters), node_ids), _nodes)

    get_nodes, aget_nodes = both(_get)

    def _delete(self, /, ref_doc_id: str, **delete_kwargs: Any) -> Work[None]:
        """Delete the nodes of a document."""
        return then(self._documents.remove({"ref_doc_id": ref_doc_id}), lambda _: None)

    delete, adelete = both(_delete)

    def _delete_nodes(
        self,
        /,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> Work[None]:
        """Delete the nodes of some ids that pass filters.

        Raises:
            DeclarationError: neither is given, which would be every row; ``clear`` deletes those.
        """
        where = None if filters is None else _filters(filters)
        return then(self._documents.delete(node_ids, where), lambda _: None)

    delete_nodes, adelete_nodes = both(_delete_nodes)

    def _clear(self) -> Work[None]:
        """Delete every row of the table."""
        return then(self._documents.remove(), lambda _: None)

    clear, aclear = both(_clear)

    def _query(self, /, query: VectorStoreQuery, **kwargs: Any) -> Work[VectorStoreQueryResult]:
        """The nodes nearest to a question, nearest first; in the mode ``mmr`` diverse ones.

        Raises:
            DeclarationError: a mode that this store has not, or no question.
        """
        question = query.query_str or query.query_embedding
        if question is None:
            raise DeclarationError("A query has query_str or query_embedding.")
        filters = [_filters(query.filters)]
        if query.doc_ids:
            filters.append({"ref_doc_id": {"$in": query.doc_ids}})
        where = self._documents.where(
            {"$and": filters}, query.node_ids or None
        )  # an index gives []
        if query.mode == VectorStoreQueryMode.MMR:
            limit, trade = query.similarity_top_k, kwargs.get("mmr_threshold", query.mmr_threshold)
            rows = self._documents.diverse(
                question,
                limit,
                where,
                out_of=kwargs.get("mmr_prefetch_k") or 4 * limit,
                trade=0.5 if trade is None else trade,
                by="meaning",
            )
        elif query.mode in _MODES:
            rows = self._documents.search(question, conditions=where, **_how(query))
        else:
            modes = ", ".join(mode.value for mode in (*_MODES, VectorStoreQueryMode.MMR))
            raise DeclarationError(f"This store has no mode {query.mode.value!r}; it has {modes}.")
        return then(rows, _result)

    query, aquery = both(_query)


def _filters(filters: MetadataFilters | None) -> dict[str, Any]:
    """LlamaIndex's filters in the form that ``filters.condition`` takes."""
    if filters is None:
        return {}
    parts = [
        _filters(part) if isinstance(part, MetadataFilters) else {part.key: _comparison(part)}
        for part in filters.filters
    ]
    return combined("and" if filters.condition is None else filters.condition.value, parts)


def _comparison(part: MetadataFilter) -> dict[str, Any]:
    operator, value = part.operator.value, part.value
    if operator in _OPERATORS:
        return {_OPERATORS[operator]: value}
    if operator in _IN_ARRAYS:
        return {_IN_ARRAYS[operator]: value if isinstance(value, list) else [value]}
    if operator in _MATCHES:
        escaped = str(value).replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
        return {_MATCHES[operator]: f"%{escaped}%"}
    if operator == "is_empty":
        return {"$empty": True}
    raise DeclarationError(f"This store has no filter {operator!r}.")


def _rows(nodes: Sequence[BaseNode]) -> list[Row]:
    return [
        Row(
            node.node_id,
            node.get_content(metadata_mode=MetadataMode.NONE),
            node_to_metadata_dict(node, remove_text=True),
        )
        for node in nodes
    ]


def _nodes(rows: Sequence[Row]) -> list[BaseNode]:
    nodes: list[BaseNode] = []
    for row in rows:
        plain = {name: value for name, value in row.metadata.items() if name not in _OF_NODE}
        if "_node_content" in row.metadata:
            node = metadata_dict_to_node(row.metadata, text=row.text)
            node.metadata = plain  # as the row has it now
        else:
            node = TextNode(id_=row.id or "", text=row.text, metadata=plain)
        nodes.append(node)
    return nodes


def _result(rows: list[Row]) -> VectorStoreQueryResult:
    return VectorStoreQueryResult(
        nodes=_nodes(rows),
        similarities=[row.similarity or 0.0 for row in rows],
        ids=[row.id or "" for row in rows],
    )


__all__ = ["SbertEmbedding", "SbertVectorStore"]
