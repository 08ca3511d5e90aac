"""Probes: a fixed set of texts by which two encoders are told apart, or recognised as one space.

A fingerprint proves that two encoders are the same; it cannot say that two with different
fingerprints (int8 and fp32, two exporters) are as good as the same. Probe vectors can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors

_LONG = (
    "The committee met on the first Monday of the month to discuss the drainage of the lower "
    "fields, the price of winter feed, and a complaint about the bell. "
)

#: The texts. Appending is a new version of every stored probe set; changing one breaks them.
PROBES: tuple[str, ...] = (
    "",
    "a",
    "apple",
    "Apple",
    "The quick brown fox jumps over the lazy dog.",
    "the dog does not jump over the fox",
    "How do I reset my password?",
    "Résumé déjà vu: naïve façade, Straße, smørrebrød",
    "Sie reisen morgen früh mit dem Zug nach München.",
    "¿Dónde está la biblioteca más cercana?",
    "Москва является столицей России.",
    "今天的天气很好，我们去公园散步吧。",
    "مرحبا بالعالم",
    "Order 66127 shipped on 2024-02-29 for $1,249.50 (3 items).",
    "def parse_date(text: str) -> datetime.date: ...",
    "🚀 launch day!!! 🎉",
    "NASA AND ESA SIGN AGREEMENT",
    "line one\nline two\ttabbed",
    _LONG * 2,
    _LONG * 5,
    _LONG * 5 + "At the end, the reader is asked to remember a purple elephant. " * 4,
    _LONG * 30,
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How closely two sets of vectors of the same texts agree.

    Attributes:
        mean_cosine: mean cosine of the pairs.
        min_cosine: worst cosine of a pair.
        max_length_ratio: largest factor between the two lengths of a pair, at least 1.
    """

    mean_cosine: float
    min_cosine: float
    max_length_ratio: float

    def __str__(self) -> str:
        return (
            f"cosine mean {self.mean_cosine:.5f}, min {self.min_cosine:.5f}, "
            f"length ratio up to {self.max_length_ratio:.3f}"
        )


@dataclass(frozen=True, slots=True)
class Compatibility:
    """Whether two encoders share a vector space, and why.

    Attributes:
        compatible: the verdict; the object is truthy accordingly.
        reason: one sentence naming what decided.
        agreement: measured on the probes, ``None`` where the widths differ.
    """

    compatible: bool
    reason: str
    agreement: Agreement | None = None

    def __bool__(self) -> bool:
        return self.compatible


#: Least agreement of the probes between two precisions of one model. int8 per output channel gives
#: a minimum near .985 on the probes, other pooling or prompts of one model stay well below .95.
PRECISION_MIN_COSINE = 0.97
PRECISION_MEAN_COSINE = 0.99
#: Between two exports whose weights cannot be proven equal only rounding is allowed, since a
#: fine-tuned copy of a model can be this close and no closer.
EXPORT_MIN_COSINE = 0.9999
#: Vectors that are not normalised also have to agree in length.
MAX_LENGTH_RATIO = 1.1

#: What must be equal, with the words that a message uses for it. Name and precision may differ.
_DECIDING = {
    "tokenizer_digest": "tokenizer",
    "pooling": "pooling",
    "layers": "layers after pooling",
    "normalized": "normalisation",
    "max_seq_length": "max_seq_length",
    "prompts": "prompts",
    "default_prompt_name": "default prompt",
    "include_prompt": "include_prompt",
    "similarity": "similarity function",
}


def agreement_of(a: Vectors, b: Vectors) -> Agreement:
    """Agreement of two arrays of shape ``(n, dimensions)``, row by row."""
    length_a = np.linalg.norm(a.astype(np.float64), axis=1)
    length_b = np.linalg.norm(b.astype(np.float64), axis=1)
    cosine = (a.astype(np.float64) * b).sum(1) / np.maximum(length_a * length_b, 1e-12)
    ratio = np.maximum(length_a, 1e-12) / np.maximum(length_b, 1e-12)
    return Agreement(
        mean_cosine=float(cosine.mean()),
        min_cosine=float(cosine.min()),
        max_length_ratio=float(np.maximum(ratio, 1 / ratio).max()),
    )


def differences(a: EncoderSpec, b: EncoderSpec) -> list[str]:
    """What the two specs say differently, in words; facts that either does not know are skipped."""
    found = []
    for field, words in _DECIDING.items():
        left, right = getattr(a, field), getattr(b, field)
        if left is None or right is None or left == right:
            continue
        if field == "tokenizer_digest":
            found.append("another tokenizer")
        else:
            found.append(f"{words} {left!r} against {right!r}")
    return found


def compatible_specs(
    a: EncoderSpec, a_probes: Vectors, b: EncoderSpec, b_probes: Vectors
) -> Compatibility:
    """Decide whether two encoders share a vector space, from their specs and probe vectors.

    Equal fingerprints are the same encoder. Otherwise every fact that decides the space has to be
    equal and the probe vectors have to agree: within the error of quantisation where both were made
    from the same weights, within rounding where that cannot be shown.

    Args:
        a: spec of one encoder, with its probe vectors of shape ``(len(PROBES), dimensions)``.
        a_probes: see ``a``.
        b: spec of the other.
        b_probes: see ``b``.
    """
    if a.dimensions != b.dimensions:
        return Compatibility(False, f"{a.dimensions} dimensions against {b.dimensions}")
    if a.fingerprint is not None and a.fingerprint == b.fingerprint:
        return Compatibility(True, "the fingerprints are equal", Agreement(1.0, 1.0, 1.0))
    if a_probes.shape != b_probes.shape:
        return Compatibility(
            False, f"{len(a_probes)} probe vectors against {len(b_probes)}: made by other versions"
        )
    agreement = agreement_of(a_probes, b_probes)
    different = differences(a, b)
    if different:
        return Compatibility(False, "; ".join(different), agreement)
    same_weights = a.weights_digest is not None and a.weights_digest == b.weights_digest
    if same_weights:
        close = (
            agreement.min_cosine >= PRECISION_MIN_COSINE
            and agreement.mean_cosine >= PRECISION_MEAN_COSINE
        )
        kind = "the same weights in another precision"
    else:
        close = agreement.min_cosine >= EXPORT_MIN_COSINE
        kind = "weights that are not known to be the same"
    close = close and agreement.max_length_ratio <= MAX_LENGTH_RATIO
    verdict = "agree" if close else "do not agree"
    return Compatibility(close, f"{kind}, and the probes {verdict}: {agreement}", agreement)


def compatible(a: TextEncoder, b: TextEncoder) -> Compatibility:
    """Decide whether two encoders share a vector space; see ``compatible_specs``."""
    return compatible_specs(a.spec, a.probe_vectors, b.spec, b.probe_vectors)
