"""``/v1/embeddings`` and ``/v1/models`` for OpenAI's clients, ``/rerank`` for Cohere's and Jina's.

The request and its answer are those of OpenAI's API reference for embeddings: ``input`` is a text
or up to 2,048 of them, none empty; ``encoding_format`` is ``float`` or ``base64`` (little-endian
float32); ``dimensions`` cuts the vectors of models that were trained for it, and makes their length
one again. Token numbers are refused: they are of OpenAI's tokenizer, and mean other words here.

``/rerank`` takes a question and up to 2,048 documents, and has them by their scores, best first.
Pairs wait in the queue of one thread together with the texts of ``/v1/embeddings``.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from sbert_pg.distance import unit
from sbert_pg.errors import DeclarationError, EncodingError
from sbert_pg.serving.batching import Batcher, OnBatch, require_room
from sbert_pg.serving.http import RefusedError, json_bytes, only_known, wrong
from sbert_pg.spec import DOCUMENT, QUERY, TextEncoder, Vectors, known_encoder, same_encoder_name
from sbert_pg.types.wire import Array, to_text

#: Texts of a request, as in OpenAI's API.
MOST_TEXTS = 2_048
#: Characters for each token that the encoder reads, beyond which a text's tokens are not counted:
#: it is cut long before.
_CHARACTERS_A_TOKEN = 16
#: Characters of a request whose tokens are counted, and whose vectors are written down, faster than
#: another thread is woken.
_COUNTED_AT_ONCE = 2_000
_FIELDS = ("input", "model", "encoding_format", "dimensions", "user", "input_type")
_RERANK_FIELDS = ("model", "query", "documents", "top_n", "return_documents")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that makes sense."""

    texts: list[str]
    model: Any
    kind: str
    as_floats: bool
    dimensions: int | None

    @classmethod
    def read(cls, body: dict[str, Any]) -> _Asked:
        only_known(body, _FIELDS)
        # Null is what some clients send for what they leave out.
        body = {name: value for name, value in body.items() if value is not None}
        format_ = body.get("encoding_format", "float")
        if format_ not in ("float", "base64"):
            raise wrong("encoding_format", "is 'float' or 'base64'.")
        dimensions = _whole(body, "dimensions")
        kind = body.get("input_type", DOCUMENT)
        if kind not in (QUERY, DOCUMENT):
            raise wrong("input_type", f"is {QUERY!r} or {DOCUMENT!r}.")
        return cls(
            _texts(body.get("input")), body.get("model"), kind, format_ == "float", dimensions
        )


def _whole(body: dict[str, Any], field: str) -> int | None:
    number = body.get(field)
    if number is not None and (type(number) is not int or number < 1):
        raise wrong(field, "has to be a whole number from 1 on.")
    return number


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise wrong("input", "has to be a text, or a list of at least one text.")
    if len(texts) > MOST_TEXTS:
        raise wrong("input", f"has {len(texts):,} texts; send at most {MOST_TEXTS:,} at once.")
    for number, text in enumerate(texts):
        if isinstance(text, (int, list)) and not isinstance(text, bool):
            raise wrong(
                "input",
                "holds token numbers, which are another tokenizer's and mean other words here; "
                "send texts (in LangChain: check_embedding_ctx_length=False).",
                "tokens_not_supported",
            )
        if not isinstance(text, str):
            raise wrong("input", f"has to hold texts alone; [{number}] is none.")
        if not text:
            raise wrong("input", f"must not hold empty texts; [{number}] is one.")
    return texts


class Embeddings:
    """Encoders, loaded already, by the names under which clients ask for them.

    The executor has one thread; a batch takes all cores, and two at once take longer than in turn.
    """

    def __init__(
        self, encoders: Mapping[str, TextEncoder], executor: Executor, on_batch: OnBatch
    ) -> None:
        self._encoders = encoders
        self._batchers = {
            (name, kind): Batcher(encode, executor, on_batch)
            for name, encoder in encoders.items()
            for kind, encode in (
                (QUERY, encoder.encode_query), (DOCUMENT, encoder.encode_document),
            )
        }  # fmt: skip

    def models(self) -> tuple[int, bytes, str]:
        """The answer of ``/v1/models``: status, body, content type."""
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "sbert-pg"}
            for name in self._encoders
        ]
        return 200, json_bytes({"object": "list", "data": data}), "application/json"

    async def answer(self, body: dict[str, Any]) -> bytes:
        """The answer of ``/v1/embeddings``."""
        asked = _Asked.read(body)
        name = by_name(self._encoders, asked.model)
        encoder = self._encoders[name]
        _require_width(encoder, asked.dimensions)
        require_room(sum(b.waiting for b in self._batchers.values()) + len(asked.texts))
        encoding = _naming("input", self._batchers[name, asked.kind].encode(asked.texts))
        if sum(map(len, asked.texts)) > _COUNTED_AT_ONCE:
            counting = asyncio.to_thread(_count_tokens, encoder, asked.texts)
            vectors, tokens = await asyncio.gather(encoding, _naming("input", counting))
        else:
            vectors, tokens = await encoding, _count_tokens(encoder, asked.texts)
        if len(vectors) == 1 or not asked.as_floats:
            return _rendered(name, vectors, tokens, asked)
        return await asyncio.to_thread(_rendered, name, vectors, tokens, asked)


async def _naming(field: str, work: Awaitable[T], verb: str = "encoded") -> T:
    """What some work gives; a text that cannot be encoded is said by its place in a field."""
    try:
        return await work
    except EncodingError as error:
        place = "" if error.index is None else f"[{error.index}]"
        raise wrong(field, f"{place} cannot be {verb}: {error}") from error


def by_name(served: Iterable[str], asked: Any) -> str:
    """The name of what is asked for, or of which it is the last part, where that is one's only."""
    if not isinstance(asked, str):
        raise wrong("model", "has to be the name of a model, a text.")
    for name in served:
        if same_encoder_name(name, asked):
            return name
    ending = [n for n in served if n.rstrip("/").rpartition("/")[2] == asked]
    if len(ending) == 1:
        return ending[0]
    raise RefusedError(
        404,
        f"The model {asked[:200]!r} is not served here; there are "
        f"{', '.join(map(repr, served))}. What two models say cannot be compared, so none stands "
        "for another.",
        "model_not_found",
        param="model",
    )


def _require_width(encoder: TextEncoder, dimensions: int | None) -> None:
    full = encoder.spec.dimensions
    if dimensions is None or dimensions == full:
        return
    known = known_encoder(encoder.spec.name)
    if known is None or not known.matryoshka:
        raise wrong(
            "dimensions",
            f"is {dimensions}, and this model has {full}: it was not trained for vectors that are "
            "cut (Matryoshka). Leave it out.",
        )
    if dimensions > full:
        raise wrong("dimensions", f"is {dimensions}, and this model has {full}.")


def _count_tokens(encoder: TextEncoder, texts: Sequence[str]) -> int:
    """Tokens that the encoder reads of texts; words, of an encoder that cannot count tokens."""
    count = getattr(encoder, "count_tokens", None)
    if count is None:
        return sum(len(text.split()) for text in texts)
    most = encoder.spec.max_seq_length
    if most is None:
        return sum(count(texts))
    bounded = [text[: most * _CHARACTERS_A_TOKEN] for text in texts]
    return sum(min(tokens, most) for tokens in count(bounded))


def _rendered(name: str, vectors: Vectors, tokens: int, asked: _Asked) -> bytes:
    if asked.dimensions is not None and asked.dimensions < vectors.shape[1]:
        vectors = unit(vectors[:, : asked.dimensions])
    exact = vectors.astype("<f4")
    # Written by hand: the JSON of a list of floats takes longer than all else of a small request.
    data = ",".join(
        f'{{"object":"embedding","index":{index},"embedding":{form(vector)}}}'
        for form in [to_text if asked.as_floats else _base64]
        for index, vector in enumerate(exact)
    )
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    rest = json_bytes({"model": name, "usage": usage})
    return b'{"object":"list","data":[%b],%b' % (data.encode(), rest[1:])


def _base64(vector: Array) -> str:
    return f'"{base64.b64encode(vector.tobytes()).decode()}"'


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
class _Ranking:
    """A request that makes sense."""

    query: str
    documents: list[str]
    top_n: int
    with_documents: bool

    @classmethod
    def read(cls, body: dict[str, Any]) -> _Ranking:
        only_known(body, _RERANK_FIELDS)
        query = body.get("query")
        if not isinstance(query, str) or not query:
            raise wrong("query", "has to be a text that is not empty.")
        documents = _documents(body.get("documents"))
        top_n = _whole(body, "top_n")
        with_documents = body.get("return_documents", False)
        if not isinstance(with_documents, bool):
            raise wrong("return_documents", "is true or false.")
        return cls(query, documents, top_n or len(documents), with_documents)


def _documents(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise wrong("documents", "has to be a list of at least one document.")
    if len(value) > MOST_TEXTS:
        raise wrong("documents", f"has {len(value):,}; send at most {MOST_TEXTS:,} at once.")
    texts: list[Any] = [one.get("text") if isinstance(one, dict) else one for one in value]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise wrong(
                "documents", f"has to hold texts, or objects with a 'text'; [{number}] is neither."
            )
    return texts


class Reranking:
    """Rerankers with one score of a pair each, by the names under which clients ask for them."""

    def __init__(
        self, rerankers: Mapping[str, Reranks], executor: Executor, on_batch: OnBatch
    ) -> None:
        for name, reranker in rerankers.items():
            if reranker.labels != 1:
                raise DeclarationError(
                    f"{name!r} is a classifier with {reranker.labels} scores of a pair, and a "
                    "reranker has one."
                )
        self._batchers = {
            name: Batcher(partial(_score, reranker), executor, on_batch)
            for name, reranker in rerankers.items()
        }

    async def answer(self, body: dict[str, Any]) -> bytes:
        """The answer of ``/rerank``."""
        asked = _Ranking.read(body)
        # With one reranker there is no doubt which is meant.
        name = (
            next(iter(self._batchers))
            if "model" not in body and len(self._batchers) == 1
            else by_name(self._batchers, body.get("model"))
        )
        pairs = [(asked.query, document) for document in asked.documents]
        scores = (await _naming("documents", self._batchers[name].encode(pairs), "scored"))[:, 0]
        best = np.argsort(-scores, kind="stable")[: asked.top_n]
        results = [
            {"index": int(index), "relevance_score": float(scores[index])}
            | ({"document": {"text": asked.documents[index]}} if asked.with_documents else {})
            for index in best
        ]
        return json_bytes({"model": name, "results": results})


def _score(reranker: Reranks, pairs: Sequence[tuple[str, str]]) -> Vectors:
    scores: Vectors = np.asarray(reranker.score_pairs(pairs), dtype=np.float32)[:, np.newaxis]
    return scores
