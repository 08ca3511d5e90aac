"""Well-known encoders, so that a class can be mapped with nothing but a name.

The figures are those of the models' own cards and configuration files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownEncoder:
    """Published facts of one model.

    Attributes:
        name: hub name.
        dimensions: width of its vectors.
        max_seq_length: tokens it reads.
        similarity: similarity function it was trained for.
        normalized: whether its vectors have length one.
        parameters: size in millions of parameters.
        languages: ``"en"``, or how many.
        good_for: one line for a reader who is choosing.
        matryoshka: whether vectors may be truncated.
    """

    name: str
    dimensions: int
    max_seq_length: int
    similarity: str
    normalized: bool
    parameters: int
    languages: str
    good_for: str
    matryoshka: bool = False


KNOWN_ENCODERS: tuple[KnownEncoder, ...] = (
    KnownEncoder(
        "sentence-transformers/all-MiniLM-L6-v2",
        384, 256, "cosine", True, 23, "en",
        "general English at the best ratio of quality to speed",
    ),
    KnownEncoder(
        "sentence-transformers/all-MiniLM-L12-v2",
        384, 128, "cosine", True, 33, "en",
        "general English, a little better and half as fast as L6",
    ),
    KnownEncoder(
        "sentence-transformers/all-mpnet-base-v2",
        768, 384, "cosine", True, 109, "en",
        "general English where quality matters more than speed",
    ),
    KnownEncoder(
        "sentence-transformers/multi-qa-MiniLM-L6-cos-v1",
        384, 512, "cosine", True, 23, "en",
        "questions against passages, small",
    ),
    KnownEncoder(
        "sentence-transformers/multi-qa-mpnet-base-dot-v1",
        768, 512, "dot", False, 109, "en",
        "questions against passages",
    ),
    KnownEncoder(
        "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        384, 128, "cosine", False, 118, "50+",
        "short texts in many languages",
    ),
    KnownEncoder(
        "sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
        768, 128, "cosine", False, 278, "50+",
        "short texts in many languages, better and slower",
    ),
    KnownEncoder(
        "sentence-transformers/distiluse-base-multilingual-cased-v2",
        512, 128, "cosine", False, 135, "50+",
        "short texts in many languages, DistilBERT with a Dense layer",
    ),
)  # fmt: skip

_BY_NAME = {e.name.lower(): e for e in KNOWN_ENCODERS} | {
    e.name.rpartition("/")[2].lower(): e for e in KNOWN_ENCODERS
}


def known_encoder(name: str) -> KnownEncoder | None:
    """The published facts of a hub name, with or without its organisation; else ``None``."""
    return _BY_NAME.get(name.lower())
