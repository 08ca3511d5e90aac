"""``limits_of``: where an encoder breaks, on texts made for it and on one's own.

Each kind of limit is a set of triples: a text, one that means the same, and one that looks alike
and means something else. The score is the share of triples in which the encoder finds the same
nearer; a perfect encoder reaches 1, a tossed coin .5. Intervals are Wilson's (1927). The triples,
written for this project, and what to do about each kind are in ``limits.txt``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from sbert_pg.catalog import rows as catalog_rows
from sbert_pg.errors import DeclarationError
from sbert_pg.probes import SAMPLE_TEXTS
from sbert_pg.tuning.evaluation import Figure
from sbert_pg.tuning.files import in_columns

if TYPE_CHECKING:
    from sbert_pg.encoder import Encoder

LONG = "long texts"
#: Texts of one's own that are looked at, and fewest that a score is given for.
MOST_TEXTS, LEAST_TEXTS = 500, 10
#: The normal distribution's quantile for intervals of 95 %.
_Z = 1.96
#: Tokens of a long text for an encoder that cuts none.
_LONG_TOKENS = 1024
_SENTENCE = re.compile(r"\s*(.{10,300}?[.!?])(?:\s|$)", re.DOTALL)
_ARTICLE = re.compile(r"\b(?:the|a|an) ", re.IGNORECASE)
_VERB = re.compile(r"\b(is|are|was|were|can|will|has|have|should|must|may)\b(?! not)")
_WORD = re.compile(r"\b[^\W\d_]{4,}\b")
_DIGIT = re.compile(r"[1-9]")


class Triple(NamedTuple):
    """A text, one that means the same, and one that means something else."""

    text: str
    same: str
    other: str


def _kinds() -> Iterator[tuple[str, str, tuple[Triple, ...]]]:
    """Each kind of limit: its name, what to do about it, from the cheapest on, and its triples."""
    content = resources.files("sbert_pg.tuning").joinpath("limits.txt").read_text("utf-8")
    for block in content.removeprefix("# ").split("\n# "):
        head, *lines = block.strip().splitlines()
        name, _, advice = head.partition(": ")
        yield name, advice, tuple(Triple(*line.split(" | ")) for line in lines)


_KINDS = tuple(_kinds())
ADVICE = {name: advice for name, advice, _ in _KINDS}
TRIPLES = {name: triples for name, _, triples in _KINDS}
#: What follows a long beginning, where the cut is: a question, its answer, another one.
AT_THE_END = TRIPLES.pop(LONG)


@dataclass(frozen=True, slots=True)
class Limit:
    """How an encoder does at one kind of difference, in the library's texts or yours."""

    name: str
    of: str
    triples: int
    score: Figure
    failed: tuple[Triple, ...]
    advice: str


@dataclass(frozen=True, slots=True)
class OwnTexts:
    """What an encoder makes of one's own texts.

    Attributes:
        tokens_per_word: words that the tokenizer knows whole have one; 1.2 to 1.4 is usual for an
            encoder's own language, 2 and more says that it spells the words out.
        unknown: share of tokens that it does not know at all, which all look the same to it.
        cut: share of texts that are longer than it reads.
        separated: share of these whose first half is nearest to its own second half among all:
            what the encoder tells apart. The rest lies outside of what it separates.
    """

    texts: int
    tokens_per_word: float
    unknown: float
    cut: float
    halves: int
    separated: Figure


@dataclass(frozen=True, slots=True)
class Limits:
    """Where an encoder breaks, on the library's texts and one's own; printed, a table."""

    encoder: str
    limits: tuple[Limit, ...]
    own: OwnTexts | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        header = ["limit", "texts", "score", "what to do"]
        rows = [
            [limit.name, f"{limit.triples} ({limit.of})", str(limit.score), limit.advice]
            for limit in self.limits
        ]
        head = f"{self.encoder}: share of triples that it gets right; perfect is 1, chance .5"
        lines = [head, *in_columns([header, *rows])]
        if self.own is not None:
            own = self.own
            lines.append(
                f"{own.texts} of your texts: {own.tokens_per_word:.2f} tokens a word, "
                f"{own.unknown:.2%} of tokens unknown, {own.cut:.1%} of texts cut"
            )
            lines.append(
                f"of {own.halves} texts cut into halves, {own.separated} find their own half: the "
                "rest lies outside of what this encoder separates"
                if own.halves >= LEAST_TEXTS
                else f"{own.halves} texts of 8 words and more are too few to say what it separates"
            )
        return "\n".join(lines)


def beside(reports: Sequence[Limits]) -> str:
    """The scores of several encoders on the same texts, side by side."""
    scores: dict[tuple[str, str], dict[str, str]] = {}
    for report in reports:
        for limit in report.limits:
            kind = limit.name, f"{limit.triples} ({limit.of})"
            scores.setdefault(kind, {})[report.encoder] = str(limit.score)
    names = [report.encoder for report in reports]
    rows = [[*kind, *(of.get(name, "") for name in names)] for kind, of in scores.items()]
    own: dict[str, Callable[[Any], str]] = {
        "tokens a word": lambda o: f"{o.tokens_per_word:.2f}",
        "tokens unknown": lambda o: f"{o.unknown:.2%}",
        "texts cut": lambda o: f"{o.cut:.1%}",
        "halves that are told apart": lambda o: str(o.separated),
    }
    if all(report.own is not None for report in reports):
        rows += [[name, "(yours)", *(say(r.own) for r in reports)] for name, say in own.items()]
    return "\n".join(in_columns([["limit", "texts", *names], *rows]))


def limits_of(encoder: Encoder, texts: Sequence[str] = ()) -> Limits:
    """Measure where an encoder breaks.

    Args:
        encoder: a converted encoder.
        texts: one's own texts; the first 500 that say something are looked at. From their first
            sentences triples are made: without articles the same, with a negation, two words
            exchanged, or another number not. These changes are English; other languages give fewer
            triples.

    Raises:
        DeclarationError: all texts are empty.
    """
    own = list(dict.fromkeys(filter(str.strip, texts)))[:MOST_TEXTS]
    if texts and not own:
        raise DeclarationError(f"limits_of() was given {len(texts)} texts, and all are empty.")
    limits = [_limit(encoder, name, "library", triples) for name, triples in TRIPLES.items()]
    limits.append(_limit(encoder, LONG, "library", _long(encoder)))
    for name, change in _CHANGES.items():
        triples = [triple for text in own if (triple := _changed(text, change)) is not None]
        if len(triples) >= LEAST_TEXTS:
            limits.append(_limit(encoder, name, "yours", triples))
    return Limits(encoder.spec.name, tuple(limits), _own(encoder, own) if own else None)


def own_texts(connection: sa.Connection, column: Any) -> list[str]:
    """Random texts of an embedding column's rows, as they are embedded; at most 500."""
    table, keys = column.table, [key.name for key in column.table.primary_key]
    text = column.type.source.expression(table)
    filled = [sa.func.btrim(text) != ""]
    drawn = catalog_rows.sample(
        connection, table, keys, [text], where=filled, size=MOST_TEXTS, seed=0
    )
    return [row[0] for row in drawn]


def share(right: int, count: int) -> Figure:
    """A share with Wilson's interval of 95 %."""
    value = right / count
    middle = (value + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * (value * (1 - value) / count + _Z**2 / (4 * count**2)) ** 0.5
    half /= 1 + _Z**2 / count
    return Figure(value, max(0.0, middle - half), min(1.0, middle + half))


def _limit(encoder: Encoder, name: str, of: str, triples: Sequence[Triple]) -> Limit:
    asked = encoder.encode_query([t.text for t in triples])
    same = encoder.encode_document([t.same for t in triples])
    other = encoder.encode_document([t.other for t in triples])
    # Each text with its own two. Equal ones are wrong: the encoder does not see the difference.
    near = [
        encoder.similarity(query, np.stack(both))[0]
        for query, *both in zip(asked, same, other, strict=True)
    ]
    right = [bool(a > b + 1e-6) for a, b in near]
    failed = tuple(t for t, good in zip(triples, right, strict=True) if not good)[:3]
    return Limit(name, of, len(triples), share(sum(right), len(triples)), failed, ADVICE[name])


def _long(encoder: Encoder) -> list[Triple]:
    """Triples that differ behind the end of what the encoder reads."""
    beginning = SAMPLE_TEXTS[-1]
    limit = encoder.max_seq_length or _LONG_TOKENS
    times = limit // max(encoder.count_tokens([beginning])[0], 1) + 1
    before = " ".join([beginning] * times)
    return [Triple(t.text, f"{before} {t.same}", f"{before} {t.other}") for t in AT_THE_END]


def _swapped(text: str) -> str:
    """The first and the last longer word exchanged."""
    words = list(_WORD.finditer(text))
    if len(words) < 3:
        return text
    a, b = words[0], words[-1]
    return text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]


_CHANGES: dict[str, Callable[[str], str]] = {
    "negation": lambda text: _VERB.sub(r"\1 not", text, count=1),
    "word order": _swapped,
    "numbers and units": lambda text: _DIGIT.sub(
        lambda digit: str((int(digit[0]) + 3) % 9 + 1), text, count=1
    ),
}


def _changed(text: str, change: Callable[[str], str]) -> Triple | None:
    """A triple of a text's first sentence; ``None`` where that cannot be changed so."""
    sentence = _SENTENCE.match(text)
    if sentence is None:
        return None
    first = " ".join(sentence[1].split())
    same, other = _ARTICLE.sub("", first), change(first)
    return None if first in (same, other) else Triple(first, same, other)


def _separated(encoder: Encoder, texts: Sequence[str]) -> tuple[int, int]:
    """Of the texts with 8 words and more, those whose halves are nearest to each other; and all."""
    split = [(w[: len(w) // 2], w[len(w) // 2 :]) for w in map(str.split, texts) if len(w) >= 8]
    if not split:
        return 0, 0
    first, second = (encoder.encode_document([" ".join(pair[n]) for pair in split]) for n in (0, 1))
    near = encoder.similarity(first, second)
    return int((near.argmax(axis=1) == np.arange(len(split))).sum()), len(split)


def _own(encoder: Encoder, texts: Sequence[str]) -> OwnTexts:
    from tokenizers import Tokenizer

    path = encoder.directory / "tokenizer.json"
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    unknown = model.get("unk_token")
    if unknown is None and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokens = [e.tokens for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    count = max(sum(map(len, tokens)), 1)
    limit = encoder.max_seq_length
    lengths = encoder.count_tokens(texts)
    words = max(sum(len(text.split()) for text in texts), 1)
    right, halves = _separated(encoder, texts)
    return OwnTexts(
        texts=len(texts),
        tokens_per_word=count / words,
        unknown=sum(part.count(unknown) for part in tokens) / count if unknown else 0.0,
        cut=sum(limit is not None and n > limit for n in lengths) / len(texts),
        halves=halves,
        separated=share(right, halves) if halves else Figure(0.0, 0.0, 1.0),
    )
