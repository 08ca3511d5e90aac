"""Haystack's ``DocumentStore`` and a retriever over a mapped class; extra ``haystack``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from sbert_pg.adapters.documents import Row, Store
from sbert_pg.adapters.running import Work, both, then
from sbert_pg.errors import DeclarationError, needing
from sbert_pg.search.filters import SIGNS, Condition, combined, condition

with needing("haystack-ai", "haystack", "offer a table as Haystack's document store"):
    from haystack import Document, component
    from haystack.document_stores.errors import DuplicateDocumentError
    from haystack.document_stores.types import DuplicatePolicy
    from haystack.errors import FilterError

_OPERATORS = {**SIGNS, "not in": "$nin"}


class SbertDocumentStore(Store):
    """The rows of a mapped class as Haystack's ``DocumentStore``.

    Ids are the primary key as text; ``meta`` is what the row's other attributes hold. Vectors are
    made by the column's own encoder, so an ``embedding`` that a document brings is not stored. Each
    call is its own transaction. Functions ending in ``_async`` are for pipelines that run so.

    Arguments and errors are those of ``documents.Store``.
    """

    def _find(
        self, query: str, top_k: int, filters: dict[str, Any] | None, by: str
    ) -> Work[dict[str, list[Document]]]:
        """What a retriever answers."""
        rows = self.documents.search(query, top_k, self.translated(filters), by=by)
        return then(rows, lambda rows: {"documents": _documents(rows)})

    find, find_async = both(_find)

    def to_dict(self) -> dict[str, Any]:
        """Refused with a ``DeclarationError``, as ``from_dict`` is."""
        raise DeclarationError(
            "A store holds the application's class and sessions, which cannot be saved with a "
            "pipeline. Build the part of the pipeline that uses it in Python."
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SbertDocumentStore:
        """Refused, as ``to_dict`` is."""
        raise DeclarationError("A store is not read with a pipeline: build it in Python.")

    def _count(self) -> Work[int]:
        """How many there are."""
        return self.documents.count()

    count_documents, count_documents_async = both(_count)

    def _filter(self, filters: dict[str, Any] | None = None) -> Work[list[Document]]:
        """The documents that pass filters, by their ids."""
        return then(self.documents.matching(self.translated(filters)), _documents)

    filter_documents, filter_documents_async = both(_filter)

    def _write(
        self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE
    ) -> Work[int]:
        """Embed and write documents; how many were written.

        Raises:
            DuplicateDocumentError: a row has the id of one; by default, as by ``FAIL``. None is
                written then.
        """
        if not isinstance(documents, list) or any(not isinstance(d, Document) for d in documents):
            raise ValueError("write_documents() takes a list of documents.")
        rows = [Row(d.id, d.content or "", d.meta) for d in documents]
        if policy == DuplicatePolicy.OVERWRITE:
            return then(self.documents.upsert(rows), len)

        def checked(written: int) -> int:
            if written < len(rows) and policy != DuplicatePolicy.SKIP:
                raise DuplicateDocumentError(
                    f"{len(rows) - written} of {len(rows)} documents have the id of a row, or of "
                    "each other. Write them with DuplicatePolicy.OVERWRITE or SKIP."
                )
            return written

        return then(self.documents.add(rows), checked)

    write_documents, write_documents_async = both(_write)

    def _delete(self, document_ids: list[str]) -> Work[None]:
        """Delete documents by their ids; those that no row has are passed over."""
        return then(self.documents.delete(document_ids), lambda _: None)

    delete_documents, delete_documents_async = both(_delete)

    def _delete_all(self) -> Work[None]:
        """Delete every row of the table."""
        return then(self.documents.remove(), lambda _: None)

    delete_all_documents, delete_all_documents_async = both(_delete_all)

    def _delete_by_filter(self, filters: dict[str, Any]) -> Work[int]:
        """Delete the documents that pass filters; how many those were."""
        return self.documents.remove(self.translated(filters))

    delete_by_filter, delete_by_filter_async = both(_delete_by_filter)

    def _update_by_filter(self, filters: dict[str, Any], meta: dict[str, Any]) -> Work[int]:
        """Set fields of ``meta`` of the documents that pass filters; how many those are."""
        return self.documents.update(self.translated(filters), meta)

    update_by_filter, update_by_filter_async = both(_update_by_filter)

    def translated(self, filters: dict[str, Any] | None) -> Condition | None:
        """Haystack's filters as SQL; ``None`` for none."""
        return condition(_translated(filters), self._field) if filters else None

    def _field(self, name: str) -> sa.ColumnElement[Any]:
        own = {"id": self.documents.key, "content": self.documents.content}
        if name in own:
            column: sa.ColumnElement[Any] = getattr(self.documents.class_, own[name])
            return column
        return self.documents.field(name.removeprefix("meta."))


@component
class SbertRetriever:
    """Finds the documents that answer a question.

    Args:
        document_store: the store.
        top_k: how many to find.
        filters: conditions for every search; those of a call are taken in their place.
        by: ``"meaning"``, ``"words"`` or ``"both"``.
    """

    def __init__(
        self,
        document_store: SbertDocumentStore,
        top_k: int = 10,
        filters: dict[str, Any] | None = None,
        by: str = "meaning",
    ) -> None:
        self.document_store = document_store
        self.by = by
        self.top_k = top_k
        self.filters = filters

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, top_k: int | None = None, filters: dict[str, Any] | None = None
    ) -> dict[str, list[Document]]:
        """The documents nearest to a text, nearest first; ``score`` is their similarity."""
        asked = (query, top_k or self.top_k, filters or self.filters, self.by)
        return self.document_store.find(*asked)

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, top_k: int | None = None, filters: dict[str, Any] | None = None
    ) -> dict[str, list[Document]]:
        """As ``run``."""
        asked = (query, top_k or self.top_k, filters or self.filters, self.by)
        return await self.document_store.find_async(*asked)


def _documents(rows: Sequence[Row]) -> list[Document]:
    return [
        Document(id=row.id or "", content=row.text, meta=row.metadata, score=row.similarity)
        for row in rows
    ]


def _translated(filters: Any) -> dict[str, Any]:
    """Haystack's filters in the form that ``filters.condition`` takes."""
    if not isinstance(filters, dict) or "operator" not in filters:
        raise FilterError(f"A filter is a dictionary with an 'operator', and not {filters!r}.")
    operator = filters["operator"]
    if "field" in filters:
        return {filters["field"]: _comparison(operator, filters)}
    if operator not in ("AND", "OR", "NOT") or not filters.get("conditions"):
        raise FilterError(
            f"{filters!r} has neither 'field' and 'value', nor 'conditions' with AND, OR or NOT."
        )
    parts = [_translated(part) for part in filters["conditions"]]
    return combined(operator.lower(), parts)


def _comparison(operator: Any, filters: dict[str, Any]) -> dict[str, Any]:
    if operator not in _OPERATORS or "value" not in filters:
        raise FilterError(f"{filters!r} lacks a 'value', or has an operator that does not exist.")
    value = filters["value"]
    if operator in ("in", "not in") and not isinstance(value, list):
        raise FilterError(f"'{operator}' takes a list, and was given {value!r}.")
    if operator in (">", ">=", "<", "<="):
        if value is None:
            return {"$in": []}  # Nothing is more or less than None.
        if isinstance(value, list) or (isinstance(value, str) and not _is_date(value)):
            raise FilterError(
                f"'{operator}' takes a number or a date in the form of ISO 8601, not {value!r}."
            )
    return {_OPERATORS[operator]: value}


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


__all__ = ["SbertDocumentStore", "SbertRetriever"]
