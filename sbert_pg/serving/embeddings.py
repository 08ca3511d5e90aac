"""``/v1/embeddings`` and ``/v1/models``, as OpenAI's clients send and read them.

The request and its answer are those of OpenAI's API reference for embeddings: ``input`` is a text
or up to 2,048 of them, none empty; ``encoding_format`` is ``float`` or ``base64`` (little-endian
float32); ``dimensions`` cuts the vectors of models that were trained for it, and makes their length
one again. Token numbers are refused: they are of OpenAI's tokenizer, and mean other words here.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbert_pg.errors import EncodingError
from sbert_pg.serving.batching import MOST_WAITING, Batcher, QueueFullError
from sbert_pg.serving.http import RefusedError, busy, json_bytes, only_known, wrong
from sbert_pg.serving.metrics import ServerMetrics
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
        dimensions = body.get("dimensions")
        if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
            raise wrong("dimensions", "has to be a whole number from 1 on.")
        kind = body.get("input_type", DOCUMENT)
        if kind not in (QUERY, DOCUMENT):
            raise wrong("input_type", f"is {QUERY!r} or {DOCUMENT!r}.")
        return cls(
            _texts(body.get("input")), body.get("model"), kind, format_ == "float", dimensions
        )


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
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
    """Encoders, by the names under which clients ask for them.

    Args:
        encoders: by name; the encoders are loaded already.
        executor: one thread; a batch takes all cores, and two at once take longer than in turn.
    """

    def __init__(
        self, encoders: Mapping[str, TextEncoder], executor: Executor, metrics: ServerMetrics
    ) -> None:
        self._encoders = encoders
        self._batchers = {
            (name, kind): Batcher(encode, executor, metrics.count_batch)
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
        """The answer of ``/v1/embeddings``.

        Raises:
            RefusedError: the request makes no sense, or too much waits.
            EncodingError: a text cannot be encoded.
        """
        asked = _Asked.read(body)
        name = by_name(self._encoders, asked.model)
        encoder = self._encoders[name]
        _require_width(encoder, asked.dimensions)
        if sum(b.waiting for b in self._batchers.values()) + len(asked.texts) > MOST_WAITING:
            raise busy("Too many texts wait to be encoded")
        try:
            encoding = self._batchers[name, asked.kind].encode(asked.texts)
            if sum(map(len, asked.texts)) > _COUNTED_AT_ONCE:
                counting = asyncio.to_thread(_count_tokens, encoder, asked.texts)
                vectors, tokens = await asyncio.gather(encoding, counting)
            else:
                vectors, tokens = await encoding, _count_tokens(encoder, asked.texts)
        except QueueFullError as error:
            raise busy("Too many texts wait to be encoded") from error
        except EncodingError as error:
            place = "" if error.index is None else f"[{error.index}]"
            raise wrong("input", f"{place} cannot be encoded: {error}") from error
        if len(vectors) == 1 or not asked.as_floats:
            return _rendered(name, vectors, tokens, asked)
        return await asyncio.to_thread(_rendered, name, vectors, tokens, asked)


def by_name(served: Iterable[str], asked: Any) -> str:
    """The name of what is asked for, or of which it is the last part, where that is one's only.

    Raises:
        RefusedError: nothing that is served is called that.
    """
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
        vectors = vectors[:, : asked.dimensions]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
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
