"""``/rerank``, as clients of Cohere and Jina send and read it.

A question and up to 2,048 documents; the answer has them by their scores, best first. Pairs wait in
the queue of one thread together with the texts of ``/v1/embeddings``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sbert_pg.errors import DeclarationError, EncodingError
from sbert_pg.serving.batching import Batcher, QueueFullError
from sbert_pg.serving.embeddings import MOST_TEXTS, by_name
from sbert_pg.serving.http import busy, json_bytes, only_known, wrong
from sbert_pg.serving.metrics import ServerMetrics
from sbert_pg.spec import Vectors

_FIELDS = ("model", "query", "documents", "top_n", "return_documents")


class Reranks(Protocol):
    """What scores pairs, a ``Reranker``."""

    @property
    def labels(self) -> int:
        """Scores of a pair."""
        ...

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> Any:
        """A number for each pair, larger for better."""
        ...


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that makes sense."""

    query: str
    documents: list[str]
    top_n: int
    with_documents: bool

    @classmethod
    def read(cls, body: dict[str, Any]) -> _Asked:
        only_known(body, _FIELDS)
        query = body.get("query")
        if not isinstance(query, str) or not query:
            raise wrong("query", "has to be a text that is not empty.")
        documents = _documents(body.get("documents"))
        top_n = body.get("top_n")
        if top_n is not None and (type(top_n) is not int or top_n < 1):
            raise wrong("top_n", "has to be a whole number from 1 on.")
        with_documents = body.get("return_documents", False)
        if not isinstance(with_documents, bool):
            raise wrong("return_documents", "is true or false.")
        return cls(query, documents, top_n or len(documents), with_documents)


def _documents(given: Any) -> list[str]:
    if not isinstance(given, list) or not given:
        raise wrong("documents", "has to be a list of at least one document.")
    if len(given) > MOST_TEXTS:
        raise wrong("documents", f"has {len(given):,}; send at most {MOST_TEXTS:,} at once.")
    texts: list[Any] = [one.get("text") if isinstance(one, dict) else one for one in given]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise wrong(
                "documents", f"has to hold texts, or objects with a 'text'; [{number}] is neither."
            )
    return texts


class Reranking:
    """Rerankers, by the names under which clients ask for them.

    Args:
        rerankers: by name, at least one, with one score of a pair each.

    Raises:
        DeclarationError: one gives several scores of a pair.
    """

    def __init__(
        self, rerankers: Mapping[str, Reranks], executor: Executor, metrics: ServerMetrics
    ) -> None:
        for name, reranker in rerankers.items():
            if reranker.labels != 1:
                raise DeclarationError(
                    f"{name!r} is a classifier with {reranker.labels} scores of a pair, and a "
                    "reranker has one."
                )
        self._batchers = {
            name: Batcher(_scoring(reranker), executor, metrics.count_batch)
            for name, reranker in rerankers.items()
        }

    async def answer(self, body: dict[str, Any]) -> bytes:
        """The answer of ``/rerank``.

        Raises:
            RefusedError: the request makes no sense, or too much waits.
        """
        asked = _Asked.read(body)
        # With one reranker there is no doubt which is meant.
        name = (
            next(iter(self._batchers))
            if "model" not in body and len(self._batchers) == 1
            else (by_name(self._batchers, body.get("model")))
        )
        pairs = [(asked.query, document) for document in asked.documents]
        try:
            scores = (await self._batchers[name].encode(pairs))[:, 0]
        except QueueFullError as error:
            raise busy("Too many texts wait to be encoded") from error
        except EncodingError as error:
            place = "" if error.index is None else f"[{error.index}]"
            raise wrong("documents", f"{place} cannot be scored: {error}") from error
        best = np.argsort(-scores, kind="stable")[: asked.top_n]
        results = [
            {"index": int(index), "relevance_score": float(scores[index])}
            | ({"document": {"text": asked.documents[index]}} if asked.with_documents else {})
            for index in best
        ]
        return json_bytes({"model": name, "results": results})


def _scoring(reranker: Reranks) -> Any:
    def score(pairs: Sequence[tuple[str, str]]) -> Vectors:
        scores: Vectors = np.asarray(reranker.score_pairs(pairs), dtype=np.float32)[:, np.newaxis]
        return scores

    return score
