"""What decides a vector space: the encoder spec, its fingerprint, and the encoder protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from sbert_pg.distance import MAX_DIMENSIONS, Similarity, metric_of
from sbert_pg.errors import DeclarationError
from sbert_pg.known import known_encoder

Vectors = npt.NDArray[np.float32]

#: Fields that say where an encoder came from and not what it computes.
_NOT_IN_FINGERPRINT = frozenset({"name", "revision"})


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
        prompts: ``(name, text)`` pairs, sorted by name.
        default_prompt_name: prompt put before texts when none is asked for.
        include_prompt: whether pooling sees the tokens of the prompt.
        precision: numeric form of the weights (``"fp32"``, ``"int8"``...).
        weights_digest: digest of the source weights, independent of file layout and precision.
        tokenizer_digest: digest of the tokenizer, casing included.
        revision: revision of the hub repository.
    """

    name: str
    dimensions: int
    similarity: Similarity = "cosine"
    normalized: bool | None = None
    max_seq_length: int | None = None
    pooling: str | None = None
    layers: tuple[str, ...] = ()
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt_name: str | None = None
    include_prompt: bool = True
    precision: str | None = None
    weights_digest: str | None = None
    tokenizer_digest: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise DeclarationError("An encoder needs a name; got an empty string.")
        if not 1 <= self.dimensions <= MAX_DIMENSIONS:
            raise DeclarationError(
                f"Encoder {self.name!r} cannot have {self.dimensions} dimensions; "
                f"pgvector stores 1 to {MAX_DIMENSIONS}."
            )
        metric_of(self.similarity)

    @classmethod
    def of(
        cls,
        encoder: str | EncoderSpec,
        *,
        dimensions: int | None = None,
        similarity: Similarity | None = None,
    ) -> EncoderSpec:
        """The spec of a name, path or spec, without touching the disk.

        The names in ``sbert_pg.known`` bring their dimensions with them. For a known Matryoshka
        model a smaller ``dimensions`` means truncated vectors.

        Raises:
            DeclarationError: the name is not a known one and ``dimensions`` is missing, or
                ``dimensions`` contradicts what is known.
        """
        if isinstance(encoder, EncoderSpec):
            changes: dict[str, Any] = {}
            if dimensions is not None and dimensions != encoder.dimensions:
                raise DeclarationError(
                    f"The spec of {encoder.name!r} says {encoder.dimensions} dimensions and the "
                    f"declaration says {dimensions}; leave one of them out."
                )
            if similarity is not None:
                changes["similarity"] = similarity
            return replace(encoder, **changes) if changes else encoder
        known = known_encoder(encoder)
        if known is None:
            if dimensions is None:
                raise DeclarationError(
                    f"The dimensions of encoder {encoder!r} are not known to this library. Give "
                    "them in the declaration, as in embedding_column("
                    f"{encoder!r}, dimensions=384, ...); 'sbert-pg encoder show' prints them."
                )
            return cls(name=encoder, dimensions=dimensions, similarity=similarity or "cosine")
        possible = dimensions in (None, known.dimensions) or (
            known.matryoshka and dimensions is not None and dimensions < known.dimensions
        )
        if not possible:
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

    @property
    def short_name(self) -> str:
        """The name without its organisation or directory, in lower case."""
        return self.name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()

    @property
    def fingerprint(self) -> str | None:
        """Digest of all that decides the vectors, or ``None`` while the digests are unknown.

        It covers every field but ``name`` and ``revision``: one model under two names has one
        fingerprint, its int8 and fp32 forms have two (and are compatible by their probes).
        """
        if self.weights_digest is None or self.tokenizer_digest is None:
            return None
        content = {k: v for k, v in self.to_json().items() if k not in _NOT_IN_FINGERPRINT}
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a JSON file or a ``jsonb`` column; ``from_json`` reads it back."""
        data = asdict(self)
        data["layers"] = list(self.layers)
        data["prompts"] = dict(self.prompts)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EncoderSpec:
        """The inverse of ``to_json``; unknown keys are ignored, so older code reads newer data."""
        names = {field.name for field in fields(cls)}
        values = {key: value for key, value in data.items() if key in names}
        values["layers"] = tuple(values.get("layers") or ())
        values["prompts"] = tuple(sorted((values.get("prompts") or {}).items()))
        return cls(**values)


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
        """Vectors of ``sbert_pg.probes.PROBES``, shape ``(len(PROBES), dimensions)``."""
        ...

    def encode_query(self, texts: Sequence[str]) -> Vectors:
        """Vectors of search queries, float32 of shape ``(len(texts), dimensions)``."""
        ...

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts to be found, float32 of shape ``(len(texts), dimensions)``."""
        ...
