"""What decides a vector space: the encoder spec, its fingerprint, names, the encoder protocol.

The facts of well-known encoders are those of the models' own cards and configuration files; with
them a class can be mapped with nothing but a name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from sbert_pg.distance import MAX_DIMENSIONS, METRICS, Similarity, metric_of
from sbert_pg.errors import DeclarationError, DimensionError, NonFiniteError, VectorError

Vectors = npt.NDArray[np.float32]

#: Fields that say where an encoder came from and not what it computes.
_NOT_IN_FINGERPRINT = frozenset({"name", "revision"})
#: Of the others, those that have no part in the vectors of documents; of the prompts, only the
#: documents' own has one.
_QUERY_SIDE = frozenset({"prompts", "default_prompt_name", "query_layers"})

#: Numeric forms that an encoder can be converted to.
PRECISIONS = ("fp32", "int8", "bf16", "fp16", "fp32-plain")

#: Names of the prompts of search queries and of texts to be found, as in sentence-transformers.
QUERY = "query"
DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class KnownEncoder:
    """Published facts of one model.

    Attributes:
        normalized: whether its vectors have length one; ``None`` where no source was found.
        good_for: one line for a reader who is choosing.
        retrieval: mean nDCG@10 of MTEB's ten English retrieval tasks, in percent, from its result
            files; ``None`` where they have none.
        cost: multiplications a token beside all-MiniLM-L6-v2's, from the sizes of the layers;
            attention between tokens comes on top, for all alike.
    """

    name: str
    dimensions: int
    max_seq_length: int | None
    similarity: str
    normalized: bool | None
    parameters: int
    languages: str
    good_for: str
    matryoshka: bool = False
    licence: str = "Apache-2.0"
    retrieval: float | None = None
    cost: float = 1.0

    def gives(self, dimensions: int | None) -> bool:
        """Whether its vectors have, or can be truncated to, so many dimensions."""
        if dimensions in (None, self.dimensions):
            return True
        return self.matryoshka and dimensions is not None and dimensions < self.dimensions


KNOWN_ENCODERS: tuple[KnownEncoder, ...] = (
    KnownEncoder("sentence-transformers/all-MiniLM-L6-v2", 384, 256, "cosine", True, 23, "en",
                 "general English, small", retrieval=42.9),
    KnownEncoder("Snowflake/snowflake-arctic-embed-xs", 384, 512, "cosine", True, 22, "en",
                 "questions against texts, as small as all-MiniLM-L6-v2", retrieval=52.7),
    KnownEncoder("BAAI/bge-small-en-v1.5", 384, 512, "cosine", True, 33, "en",
                 "questions against texts, small", licence="MIT", retrieval=53.9, cost=2.0),
    KnownEncoder("ibm-granite/granite-embedding-small-english-r2", 384, 8192, "cosine", None, 47,
                 "en", "questions against long texts, small", retrieval=53.9, cost=2.7),
    KnownEncoder("ibm-granite/granite-embedding-english-r2", 768, 8192, "cosine", None, 149, "en",
                 "questions against long texts", retrieval=56.4, cost=10.4),
    KnownEncoder("google/embeddinggemma-300m", 768, 2048, "cosine", True, 308, "100+",
                 "many languages; its terms have to be accepted on the hub", matryoshka=True,
                 licence="Gemma", retrieval=55.7, cost=9.6),
    KnownEncoder("Qwen/Qwen3-Embedding-0.6B", 1024, 32_768, "cosine", True, 596, "100+",
                 "the best of these, where a GPU or time is at hand", matryoshka=True,
                 retrieval=61.8, cost=41.5),
    KnownEncoder("sentence-transformers/static-retrieval-mrl-en-v1", 1024, None, "cosine", False,
                 31, "en", "no transformer, only a table of tokens; ranks worst of these",
                 matryoshka=True, retrieval=35, cost=0.0),
    KnownEncoder("sentence-transformers/all-MiniLM-L12-v2", 384, 128, "cosine", True, 33, "en",
                 "general English, a little better and half as fast as L6", cost=2.0),
    KnownEncoder("sentence-transformers/all-mpnet-base-v2", 768, 384, "cosine", True, 109, "en",
                 "general English", retrieval=44.5, cost=8.0),
    KnownEncoder("sentence-transformers/multi-qa-MiniLM-L6-cos-v1", 384, 512, "cosine", True, 23,
                 "en", "questions against passages, small"),
    KnownEncoder("sentence-transformers/multi-qa-mpnet-base-dot-v1", 768, 512, "dot", False, 109,
                 "en", "questions against passages", cost=8.0),
    KnownEncoder("sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2", 384, 128, "cosine",
                 False, 118, "50+", "short texts in many languages", cost=2.0),
    KnownEncoder("sentence-transformers/paraphrase-multilingual-mpnet-base-v2", 768, 128, "cosine",
                 False, 278, "50+", "short texts in many languages, better and slower", cost=8.0),
    KnownEncoder("sentence-transformers/distiluse-base-multilingual-cased-v2", 512, 128, "cosine",
                 False, 135, "50+", "short texts in many languages, DistilBERT with a Dense layer",
                 cost=4.0),
)  # fmt: skip

_BY_NAME = {e.name.lower(): e for e in KNOWN_ENCODERS} | {
    e.name.rpartition("/")[2].lower(): e for e in KNOWN_ENCODERS
}


def known_encoder(name: str) -> KnownEncoder | None:
    """The published facts of a hub name, with or without its organisation; else ``None``."""
    return _BY_NAME.get(name.lower())


@cache
def canonical_name(name: str) -> str:
    """One spelling for all the names that certainly mean one encoder.

    The hub name of a well-known encoder, however it is spelled. Any other name is compared whole:
    of a path only doubled and closing separators and ``.`` parts are dropped, since everything else
    (``..``, links, letter case, the last part alone) may lead to another directory.
    """
    known = known_encoder(name)
    if known is not None:
        return known.name
    first, *others = name.split("/")
    return "/".join([first, *(part for part in others if part not in ("", "."))])


def same_encoder_name(a: str, b: str) -> bool:
    """Whether two names mean one encoder: the one rule for declarations, catalog and migrations.

    ``all-MiniLM-L6-v2`` and ``sentence-transformers/all-MiniLM-L6-v2`` do, since both are known;
    ``/models/v1/encoder`` and ``/models/v2/encoder`` do not, nor do ``acme/base`` and
    ``other/base``.
    """
    return canonical_name(a) == canonical_name(b)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """What is known of an encoder without having it at hand.

    A declaration on a mapped class needs ``name``, ``dimensions`` and ``similarity`` only; an
    encoder that has been loaded knows every field, and with the two digests the spec has a
    ``fingerprint``.

    Attributes:
        name: hub name, short name or path, as ``Encoder.load`` takes it.
        dimensions: width of a vector.
        similarity: similarity function that the model was trained for.
        normalized: whether vectors have length one; ``None`` where unknown.
        max_seq_length: tokens that are read of a text, special tokens included.
        pooling: pooling mode or modes, in the order of concatenation (``"mean"``, ``"cls+max"``).
        layers: the modules after pooling, in order, each as text with a digest of its weights.
        query_layers: modules that only queries go through, after ``layers``; in the same form.
        prompts: ``(name, text)`` pairs, sorted by name.
        default_prompt_name: prompt put before texts when none is asked for.
        include_prompt: whether pooling sees the tokens of the prompt.
        precision: numeric form of the weights (``"fp32"``, ``"int8"``...).
        weights_digest: digest of the source weights, independent of file layout and precision.
        tokenizer_digest: digest of the tokenizer, casing and truncation side included.
        config_digest: digest of the configuration files in canonical form, entries that conversion
            ignores included.
        revision: revision of the hub repository.
    """

    name: str
    dimensions: int
    similarity: Similarity = "cosine"
    normalized: bool | None = None
    max_seq_length: int | None = None
    pooling: str | None = None
    layers: tuple[str, ...] = ()
    query_layers: tuple[str, ...] = ()
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt_name: str | None = None
    include_prompt: bool = True
    precision: str | None = None
    weights_digest: str | None = None
    tokenizer_digest: str | None = None
    config_digest: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise DeclarationError("An encoder needs a name; got an empty string.")
        if not 1 <= self.dimensions <= MAX_DIMENSIONS:
            raise DeclarationError(
                f"Encoder {self.name!r} cannot have {self.dimensions} dimensions; "
                f"pgvector stores 1 to {MAX_DIMENSIONS}."
            )
        if self.similarity not in METRICS:
            metric_of(self.similarity)

    @classmethod
    def of(
        cls,
        encoder: str | EncoderSpec,
        *,
        dimensions: int | None = None,
        similarity: Similarity | None = None,
        precision: str | None = None,
    ) -> EncoderSpec:
        """The spec of a name, path or spec, without touching the disk.

        The names in ``KNOWN_ENCODERS`` bring their dimensions with them. For a known Matryoshka
        model a smaller ``dimensions`` means truncated vectors.

        Raises:
            DeclarationError: the name is not a known one and ``dimensions`` is missing,
                ``dimensions`` or ``precision`` contradicts what is known, or there is no such
                precision.
        """
        if precision is not None:
            spec = cls.of(encoder, dimensions=dimensions, similarity=similarity)
            return _in_precision(spec, precision)
        if isinstance(encoder, EncoderSpec):
            return encoder._confirmed(dimensions, similarity)
        known = known_encoder(encoder)
        if known is None:
            if dimensions is None:
                raise DeclarationError(
                    f"The dimensions of encoder {encoder!r} are not known to this library. Give "
                    "them in the declaration, as in embedding_column("
                    f"{encoder!r}, dimensions=384, ...); 'sbert-pg encoder show NAME' prints them."
                )
            return cls(name=encoder, dimensions=dimensions, similarity=similarity or "cosine")
        if not known.gives(dimensions):
            raise DeclarationError(
                f"Encoder {encoder!r} gives {known.dimensions} dimensions and cannot give "
                f"{dimensions}."
            )
        return cls(
            name=encoder,
            dimensions=dimensions or known.dimensions,
            similarity=similarity or cast(Similarity, known.similarity),
            normalized=known.normalized,
            max_seq_length=known.max_seq_length,
        )

    def _confirmed(self, dimensions: int | None, similarity: Similarity | None) -> EncoderSpec:
        if dimensions not in (None, self.dimensions):
            raise DeclarationError(
                f"The spec of {self.name!r} says {self.dimensions} dimensions and the "
                f"declaration says {dimensions}; leave one of them out."
            )
        return self if similarity is None else replace(self, similarity=similarity)

    @property
    def fingerprint(self) -> str | None:
        """Digest of all that decides the vectors, or ``None`` while the digests are unknown.

        It covers every field but ``name`` and ``revision``: one model under two names has one
        fingerprint, its int8 and fp32 forms have two (and are compatible by their probes).
        """
        return self._digest(_NOT_IN_FINGERPRINT)

    @property
    def document_fingerprint(self) -> str | None:
        """Digest of what decides the vectors of documents, or ``None`` as for ``fingerprint``.

        Encoders for which it is equal share a column's vectors, also where they encode queries
        differently (another query prompt, layers for queries alone).
        """
        return self._digest(_NOT_IN_FINGERPRINT | _QUERY_SIDE, document=self.document_prompt)

    @property
    def document_prompt(self) -> str:
        """The text that ``encode_document`` puts before a text, empty for none."""
        return dict(self.prompts).get(DOCUMENT, "")

    def _digest(self, without: frozenset[str], **more: str) -> str | None:
        if self.weights_digest is None or self.tokenizer_digest is None:
            return None
        content = {k: v for k, v in self.to_json().items() if k not in without} | more
        # An encoder without them has the fingerprint that it had before there were any.
        if not self.query_layers:
            content.pop("query_layers", None)
        return json_digest(content)[:32]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a JSON file or a ``jsonb`` column; ``from_json`` reads it back."""
        data = asdict(self)
        data["layers"], data["query_layers"] = list(self.layers), list(self.query_layers)
        data["prompts"] = dict(self.prompts)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EncoderSpec:
        """The inverse of ``to_json``; unknown keys are ignored, so older code reads newer data."""
        names = {field.name for field in fields(cls)}
        values = {key: value for key, value in data.items() if key in names}
        for name in ("layers", "query_layers"):
            values[name] = tuple(values.get(name) or ())
        values["prompts"] = tuple(sorted((values.get("prompts") or {}).items()))
        return cls(**values)


def _in_precision(spec: EncoderSpec, precision: str) -> EncoderSpec:
    if precision == spec.precision:
        return spec
    if precision not in PRECISIONS:
        raise DeclarationError(
            f"There is no precision {precision!r} for encoder {spec.name!r}; there are "
            f"{', '.join(PRECISIONS)}."
        )
    if spec.precision is not None:
        raise DeclarationError(
            f"The spec of {spec.name!r} says {spec.precision} and the declaration says "
            f"{precision}; leave one of them out."
        )
    return replace(spec, precision=precision)


def json_digest(data: Any) -> str:
    """SHA-256 of plain data in canonical form, 64 hexadecimal digits."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@runtime_checkable
class TextEncoder(Protocol):
    """What the database side asks of an encoder; ``sbert_pg.encoder.Encoder`` is one.

    Implementations are safe to share between threads.
    """

    @property
    def spec(self) -> EncoderSpec:
        """What decides the encoder's vector space."""
        ...

    @property
    def probe_vectors(self) -> Vectors:
        """What ``encode_document`` gives for ``sbert_pg.probes.PROBES``, a row for each."""
        ...

    def encode_query(self, texts: Sequence[str]) -> Vectors:
        """Vectors of search queries, float32 of shape ``(len(texts), dimensions)``."""
        ...

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts to be found, float32 of shape ``(len(texts), dimensions)``."""
        ...


def vectors_of(spec: EncoderSpec, output: Any, texts: int, *, finite: bool = False) -> Vectors:
    """What an encoder gave for some texts, as float32 of shape ``(texts, dimensions)``."""
    try:
        vectors = np.asarray(output, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise VectorError(f"Encoder {spec.name!r} gave no array of numbers: {error}") from error
    if vectors.shape != (shape := (texts, spec.dimensions)):
        raise DimensionError(
            f"Encoder {spec.name!r} gave vectors of shape {vectors.shape} for {texts} texts, where "
            f"{shape} is expected. Declare its dimensions, and have it give a vector a text."
        )
    if finite and not np.isfinite(vectors).all():
        raise NonFiniteError(f"Encoder {spec.name!r} gave numbers that are not finite.")
    return vectors
