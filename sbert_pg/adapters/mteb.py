"""MTEB's ``SearchProtocol`` over a mapped class: the database is what is benchmarked.

The protocol is one of names, so that mteb is needed by who runs it and not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from sbert_pg.adapters.documents import Documents, Row
from sbert_pg.adapters.running import Runner
from sbert_pg.errors import DeclarationError

#: Documents that are embedded and written in one transaction.
BLOCK = 1_000


class SbertSearch:
    """Writes the corpus of a retrieval task into a table, and answers its queries by ``nearest``.

    ::

        search = SbertSearch(Document.embedding, sessionmaker(engine), model_meta=meta)
        mteb.evaluate(search, mteb.get_tasks(tasks=["SciFact"]))

    The table belongs to the benchmark alone: each corpus takes the place of the one before, and a
    table that holds rows of someone else is refused.

    Args:
        column: the embedding column of a class whose key is a text.
        sessions: a ``sessionmaker``.
        content: name of the attribute that is the text; the embedding's source by default.
        model_meta: MTEB's ``ModelMeta`` of the column's encoder, which its results are filed by.
        how: further arguments of ``sbert_pg.nearest`` for every query, such as ``ef_search``.

    Raises:
        DeclarationError: what the class declares cannot be used so.
    """

    def __init__(
        self,
        column: Any,
        sessions: Any,
        *,
        content: str | None = None,
        model_meta: Any = None,
        how: Mapping[str, Any] | None = None,
    ) -> None:
        self.documents = Documents(column, content=content)
        self.run = Runner(sessions).run
        self.mteb_model_meta = model_meta
        self._how = dict(how or {})
        self._is_mine = False

    def index(self, corpus: Iterable[Mapping[str, Any]], **_: Any) -> None:
        """Write a corpus: mappings with ``id``, ``text`` and perhaps ``title``.

        Raises:
            DeclarationError: the table holds rows that this object has not written, or a document
                is not a text.
        """
        if not self._is_mine and self.run(self.documents.count()):
            raise DeclarationError(
                f"The table of {self.documents.class_.__name__} holds rows already, and a corpus "
                "would take their place. Give a class whose table is empty."
            )
        self._is_mine = True
        self.run(self.documents.remove())
        rows = (Row(str(one["id"]), _text(one)) for one in corpus)
        while block := list(islice(rows, BLOCK)):
            self.run(self.documents.upsert(block))

    def search(
        self,
        queries: Iterable[Mapping[str, Any]],
        *,
        top_k: int,
        top_ranked: Mapping[str, list[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Similarities of the documents nearest to each query, by the ids of both.

        Args:
            queries: mappings with ``id`` and ``text``.
            top_k: documents of an answer.
            top_ranked: ids of the documents that each query may be answered with; all by default.

        Raises:
            DeclarationError: a query is not a text.
        """
        scores = {}
        for query in queries:
            key = str(query["id"])
            allowed = None if top_ranked is None else self.documents.has_id(top_ranked[key])
            rows = self.run(self.documents.search(_text(query), top_k, allowed, **self._how))
            scores[key] = {row.id or "": row.similarity or 0.0 for row in rows}
        return scores


def _text(one: Mapping[str, Any]) -> str:
    """Title and text, joined as MTEB joins them."""
    parts = [one.get("title") or "", one["text"]]
    if not all(isinstance(part, str) for part in parts):
        raise DeclarationError(f"{one['id']!r} is no text; searches here are of texts alone.")
    return " ".join(parts).strip()


__all__ = ["SbertSearch"]
