"""Texts to vectors in bulk, where one bad text must not cost the others theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sbert_pg.errors import DimensionError, EncoderError, EncodingError
from sbert_pg.pending.rows import Row, Rows
from sbert_pg.spec import TextEncoder, Vectors


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vectors of a batch of rows.

    Attributes:
        vectors: vectors in pgvector's binary format by the row's key; ``None`` where the row has no
            text.
        failures: why a row has no vector, by its key.
        texts: number of texts that were encoded; a text that several rows share counts once.
    """

    vectors: dict[str, bytes | None] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    texts: int = 0


def embed(rows: Rows, encoder: TextEncoder, batch: Sequence[Row]) -> Embedded:
    """Encode the texts of rows, each different text once.

    Raises:
        EncoderError: the encoder fails whatever the text, so the texts are not to blame.
        DimensionError: its vectors do not have the column's width.
    """
    keys_of: dict[str, list[str]] = {}
    result = Embedded()
    for row in batch:
        if row.text is None:
            result.vectors[row.key] = None
        else:
            keys_of.setdefault(row.text, []).append(row.key)
    texts = list(keys_of)
    vectors, faults = encode_each(encoder, texts)
    width = rows.binding.dimensions
    if vectors.shape[1] != width:
        raise DimensionError(
            f"Encoder {encoder.spec.name!r} gave vectors of {vectors.shape[1]} dimensions where "
            f"column {rows.binding} has {width}. Use the encoder that the column was declared for."
        )
    payloads = rows.payloads(vectors)
    faults = rows.faults_of(vectors) | faults
    for position, keys in enumerate(keys_of.values()):
        fault = faults.get(position)
        for key in keys:
            if fault is None:
                result.vectors[key] = payloads[position]
            else:
                result.failures[key] = fault
    return Embedded(result.vectors, result.failures, len(texts))


def encode_each(encoder: TextEncoder, texts: Sequence[str]) -> tuple[Vectors, dict[int, str]]:
    """Encode all texts that can be encoded.

    An encoder that says which text it refuses is asked again without it; else the batch is halved
    until the bad ones stand alone.

    Returns:
        float32 array of shape ``(len(texts), dimensions)``, and reasons by position for the rows of
        it that mean nothing.

    Raises:
        EncoderError: it fails whatever the text.
    """
    vectors: Vectors = np.zeros((len(texts), encoder.spec.dimensions), dtype=np.float32)
    faults: dict[int, str] = {}
    if not texts:
        return vectors, faults
    last: Exception | None = None
    spans = [list(range(len(texts)))]
    while spans:
        span = spans.pop()
        try:
            encoded = np.asarray(encoder.encode_document([texts[i] for i in span]), np.float32)
        except Exception as error:  # Whatever an encoder raises, one text may be the reason for it.
            if isinstance(error, EncoderError) and not isinstance(error, EncodingError):
                raise
            last = error
            spans += _without(span, error, faults)
            continue
        if encoded.shape[1:] != vectors.shape[1:] or encoded.shape[0] != len(span):
            raise DimensionError(
                f"Encoder {encoder.spec.name!r} gave an array of shape {encoded.shape} for "
                f"{len(span)} texts of {vectors.shape[1]} dimensions. The encoder is at fault."
            )
        vectors[span] = encoded
    if last is not None and not isinstance(last, EncodingError) and 1 < len(texts) == len(faults):
        raise EncoderError(
            f"Encoder {encoder.spec.name!r} fails for every text: {reason_of(last)}"
        ) from last
    return vectors, faults


def _without(span: list[int], error: Exception, faults: dict[int, str]) -> list[list[int]]:
    """What is left to try of a span that failed."""
    index = error.index if isinstance(error, EncodingError) else None
    if len(span) == 1:
        index = 0
    if index is not None and 0 <= index < len(span):
        faults[span[index]] = reason_of(error)
        rest = span[:index] + span[index + 1 :]
        return [rest] if rest else []
    middle = len(span) // 2
    return [span[middle:], span[:middle]]


def reason_of(error: BaseException) -> str:
    """An error in one line, for people."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


__all__ = ["Embedded", "embed", "encode_each", "reason_of"]
