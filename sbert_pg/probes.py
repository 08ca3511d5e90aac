"""Probes: a fixed set of texts by which two encoders are distinguished, or recognised as one space.

A fingerprint says what an encoder was made from. What it computes is measured: probe vectors decide
in every case, also where the fingerprints are equal, since a spec can be passed on by an encoder
that computes something else. And two with different fingerprints (int8 and fp32, two exporters) can
be as good as the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from sbert_pg.errors import EncoderMismatchError, VectorError
from sbert_pg.spec import EncoderSpec, TextEncoder, Vectors, vectors_of

#: The order in which the catalog keeps the bytes of vectors, whatever machine reads them.
STORED = np.dtype("<f4")

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

_PROSE = """
The library keeps one table for each collection and joins them at query time. When a book is
lent out, the row stays where it is and only its status changes; a nightly job writes the
reminders. Readers asked for a list of what they had borrowed before, so a history table was
added last spring, with an index on the reader and the day.

Hikers reach the lake by a path of six kilometres from the village. The first half climbs
steadily through beech forest, the second crosses open meadows where cattle graze in summer.
There is no shelter above the tree line, and the weather turns within minutes; carry water, a
map and something warm even on a clear morning. The last bus back leaves at seven.

In the second quarter revenue rose by eleven percent to 48.2 million, mainly because of the new
service contracts in northern Europe. Costs for freight and energy fell slightly. The board
expects the margin to stay between fourteen and fifteen percent for the year and will propose a
dividend of 0.85 per share at the annual meeting in May.

Aspirin reduces fever and inflammation by blocking the enzymes that make prostaglandins. It also
keeps platelets from clumping, which is why small daily doses are given after a heart attack.
Children with a viral infection should not take it, since a rare and dangerous swelling of the
brain and liver has been seen in that group.

Die Werkstatt liegt im Hinterhof eines alten Mietshauses. Seit vierzig Jahren werden hier Geigen
gebaut und repariert, und noch immer riecht es nach Leim, Fichtenholz und Kaffee. Wer ein
Instrument bestellt, wartet etwa zwei Jahre und darf in dieser Zeit so oft zusehen, wie er mag.

La recette demande peu de choses : des tomates bien mûres, un oignon doux, de l'huile d'olive et
du pain de la veille. On laisse reposer le tout une heure au frais avant de servir, et personne
ne s'est jamais plaint qu'il en restât pour le lendemain.

El tren nocturno sale de la estación central a las diez y media y llega a la costa antes del
amanecer. Los viajeros que llevan bicicleta tienen que reservar plaza con dos días de
antelación, porque solo hay un vagón preparado para ellas.
"""
_PARAGRAPHS = tuple(" ".join(paragraph.split()) for paragraph in _PROSE.split("\n\n"))

#: Ordinary texts on which a precision is held against fp32 at conversion. The probes are chosen to
#: distinguish encoders and are odd on purpose; these are what applications store: titles,
#: questions, product texts, paragraphs. Written for this project.
SAMPLE_TEXTS: tuple[str, ...] = (
    "wireless noise cancelling headphones",
    "red running shoes size 42",
    "How can I cancel my subscription?",
    "What is the capital of Australia?",
    "best way to learn to play the guitar as an adult",
    "Why does my card payment keep being declined abroad?",
    "postgres index not used with order by and limit",
    "My order arrived damaged and I would like a refund.",
    "The meeting was moved to Thursday afternoon.",
    "She sells sea shells by the sea shore.",
    "A man is playing a flute on the street.",
    "Someone plays a musical instrument outdoors.",
    "Two dogs run across a field of snow.",
    "The stock market fell sharply after the announcement.",
    "Photosynthesis turns light into chemical energy.",
    "Rust prevents data races at compile time.",
    "import numpy as np; x = np.linspace(0, 1, 50)",
    "ERROR 1045 (28000): Access denied for user 'root'@'localhost'",
    "Breakfast included, free parking, pets welcome.",
    "Vegan lentil soup with coconut milk and lime",
    "The Treaty of Westphalia ended the Thirty Years' War in 1648.",
    "E = mc^2 relates energy to mass.",
    "Apartment for rent: 3 rooms, balcony, 74 m2, 1,150 EUR/month",
    "Patients should fast for eight hours before the test.",
    "thread-safe queue with a bounded size",
    "Is it going to rain in Lisbon this weekend?",
    "Ich hätte gern einen Tisch für vier Personen.",
    "Où se trouve la gare la plus proche ?",
    "¿Cuánto cuesta el billete de ida y vuelta?",
    "Il museo è chiuso il lunedì.",
    "このカメラは夜景も綺麗に撮れます。",
    "Библиотека открыта с девяти до шести.",
    "Kargo ne zaman teslim edilecek?",
    *_PARAGRAPHS,
    " ".join(_PARAGRAPHS[:2]),
    " ".join(_PARAGRAPHS[2:5]),
    " ".join(_PARAGRAPHS),
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How closely two sets of vectors agree; of lengths the largest factor of a pair."""

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
    """Whether two encoders share a vector space, and why; no agreement where the widths differ."""

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

#: What must be equal on the side of documents, with the words that a message uses for it. Name,
#: precision and the prompts of queries may differ.
_DECIDING = {
    "pooling": "pooling",
    "layers": "layers after pooling",
    "normalized": "normalisation",
    "max_seq_length": "max_seq_length",
    "document_prompt": "prompts for documents",
    "include_prompt": "include_prompt",
    "similarity": "similarity function",
}
#: What two precisions of one model have in common.
_ORIGIN = ("weights_digest", "tokenizer_digest", "config_digest")

_measured: WeakKeyDictionary[Any, Vectors] = WeakKeyDictionary()


def measured(encoder: TextEncoder) -> Vectors:
    """The probe vectors of an encoder, as it computes them: what to store and to compare.

    ``probe_vectors`` of an application's encoder may be passed on from another one, as its spec may
    be, so the probes are encoded here, once for each encoder. Classes whose ``probe_vectors`` are
    certainly their own say so by the attribute ``measures_its_probes`` of the class itself; it is
    not inherited, nor seen through a wrapper.
    """
    own = vars(type(encoder)).get("measures_its_probes", False)
    if own and "encode_document" not in getattr(encoder, "__dict__", {}):
        return encoder.probe_vectors
    try:
        vectors = _measured.get(encoder)
    except TypeError:  # not hashable, or without weak references
        return _encoded(encoder)
    if vectors is None:
        vectors = _measured[encoder] = _encoded(encoder)
    return vectors


def _encoded(encoder: TextEncoder) -> Vectors:
    try:
        return vectors_of(encoder.spec, encoder.encode_document(PROBES), len(PROBES), finite=True)
    except VectorError as error:
        raise EncoderMismatchError(f"The probes cannot be compared: {error}") from error


def agreement_of(a: Vectors, b: Vectors) -> Agreement:
    """Agreement of two arrays of shape ``(n, dimensions)``; see ``agreement_by_row``."""
    cosines, ratios = agreement_by_row(a, b)
    return Agreement(float(cosines.mean()), float(cosines.min()), float(ratios.max()))


def agreement_by_row(
    a: Vectors, b: Vectors
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Cosines of the rows of two arrays of one shape, and by how much one is longer.

    Two zeros agree.
    """
    length_a = np.linalg.norm(a.astype(np.float64), axis=1)
    length_b = np.linalg.norm(b.astype(np.float64), axis=1)
    cosine = (a.astype(np.float64) * b).sum(1) / np.maximum(length_a * length_b, 1e-12)
    cosine[np.maximum(length_a, length_b) < 1e-12] = 1.0
    ratio = np.maximum(length_a, 1e-12) / np.maximum(length_b, 1e-12)
    return cosine, np.maximum(ratio, 1 / ratio)


def differences(a: EncoderSpec, b: EncoderSpec) -> list[str]:
    """What the two specs say differently of documents, in words; what either lacks is skipped."""
    different = []
    tokenizers = {a.tokenizer_digest, b.tokenizer_digest} - {None}
    if len(tokenizers) > 1:
        different.append("another tokenizer")
    for field, words in _DECIDING.items():
        left, right = getattr(a, field), getattr(b, field)
        if left is not None and right is not None and left != right:
            different.append(f"{words} {left!r} against {right!r}")
    return different


def compatible_specs(
    a: EncoderSpec, a_probes: Vectors, b: EncoderSpec, b_probes: Vectors
) -> Compatibility:
    """Decide whether two encoders share a column's vectors, from specs and probe vectors.

    Every fact that decides the vectors of documents has to be equal, and the probe vectors have to
    agree: within the error of quantisation where both were made from the same weights, tokenizer
    and configuration, within rounding otherwise. Equal fingerprints spare no measurement.
    """
    if a.dimensions != b.dimensions:
        return Compatibility(False, f"{a.dimensions} dimensions against {b.dimensions}")
    if a_probes.shape != b_probes.shape:
        return Compatibility(
            False, f"{len(a_probes)} probe vectors against {len(b_probes)}: made by other versions"
        )
    agreement = agreement_of(a_probes, b_probes)
    different = differences(a, b)
    if different:
        return Compatibility(False, "; ".join(different), agreement)
    same_origin = a.weights_digest is not None and all(
        getattr(a, field) == getattr(b, field) for field in _ORIGIN
    )
    least, mean = _least(a, b) if same_origin else (EXPORT_MIN_COSINE, -1.0)
    close = (
        agreement.min_cosine >= least
        and agreement.mean_cosine >= mean
        and agreement.max_length_ratio <= MAX_LENGTH_RATIO
    )
    verdict = "agree" if close else "do not agree"
    return Compatibility(
        close, f"{_kind(a, b, same_origin)}, and the probes {verdict}: {agreement}", agreement
    )


def _least(a: EncoderSpec, b: EncoderSpec) -> tuple[float, float]:
    """Least and mean cosine of encoders that were made from the same weights."""
    if a.precision == b.precision and not (a.precision or "").startswith(("int8", "bf16")):
        return EXPORT_MIN_COSINE, -1.0
    return PRECISION_MIN_COSINE, PRECISION_MEAN_COSINE


def _kind(a: EncoderSpec, b: EncoderSpec, same_origin: bool) -> str:
    """What the specs say of the two, for a message."""
    if a.fingerprint is not None and a.fingerprint == b.fingerprint:
        return "the fingerprints are equal"
    if same_origin and a.precision == b.precision:
        return "equal for documents"
    if same_origin:
        return "the same weights in another precision"
    return "weights or configurations that are not known to be the same"


def compatible(a: TextEncoder, b: TextEncoder) -> Compatibility:
    """Decide whether two encoders share a column's vectors; see ``compatible_specs``."""
    return compatible_specs(a.spec, measured(a), b.spec, measured(b))


def to_bytes(vectors: Vectors) -> bytes:
    """Vectors as the catalog keeps them."""
    return np.ascontiguousarray(vectors, dtype=STORED).tobytes()


def from_bytes(stored: bytes, dimensions: int) -> Vectors:
    """The vectors that ``to_bytes`` was given, of shape ``(vectors, dimensions)``, as float32."""
    return np.frombuffer(stored, dtype=STORED).reshape(-1, dimensions).astype(np.float32)
