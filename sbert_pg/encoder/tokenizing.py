"""Texts to token ids, truncated as the model asks, with truncation seen."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sbert_pg.errors import DamagedEncoderError, EncoderError, EncodingError

#: Pre-tokenizers for which the tokens of a word do not depend on words further on.
_LOCAL = frozenset({"BertPreTokenizer", "WhitespaceSplit", "Metaspace", "ByteLevel", "Whitespace"})
#: A place where a long text may be cut: a single blank between plain letters or digits, which no
#: normaliser and no pre-tokenizer of ``_LOCAL`` looks across.
_SEAM = re.compile(r"[A-Za-z0-9] (?=[A-Za-z0-9])")
#: Characters of a long text that are tokenized at first, per token that can be kept, and tokens
#: that must lie beyond the limit for the cut to have had no influence.
_CHARACTERS_PER_TOKEN = 12
_SPARE_TOKENS = 8
#: Characters that are read at most, per token that can be kept and in all. A megabyte without a
#: blank can be a single token; what follows it is then not read.
_MOST_PER_TOKEN = 1000
_MOST_CHARACTERS = 1_000_000
#: Characters that are tokenized at a time where all tokens are counted.
_PART = 100_000
#: Such texts, or parts of them, that are counted by one call.
_COUNTED = 64
#: An entry of ``tokenizer.json`` of our own, for what model2vec does besides: of a text so many
#: ``characters`` are read, and the token ``dropped`` is left out.
MODEL2VEC = "sbert_pg.model2vec"
#: How much longer the replacements of a normaliser may make a text.
_MOST_GROWTH = 100

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of some texts, special ones included, and which were not read to their end."""

    ids: list[list[int]]
    truncated: list[int]


@dataclass(frozen=True, slots=True)
class Pairs(Tokens):
    """Token ids of pairs of texts, as of one text each, and where the second of each begins."""

    second: list[int]


class TextTokenizer:
    """A tokenizer, and how many tokens it keeps of which end. Safe to share between threads."""

    def __init__(self, content: str, max_seq_length: int | None, side: str = "right") -> None:
        from tokenizers import Tokenizer

        with own_errors(DamagedEncoderError, "tokenizer.json cannot be read"):
            parts = json.loads(content)
            self._model2vec = parts.pop(MODEL2VEC, None)
            self._tokenizer = Tokenizer.from_str(json.dumps(parts) if self._model2vec else content)
        require_bounded(parts)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._limit = max_seq_length
        self._from_right = side == "left"
        cut = list(parts_of(parts.get("pre_tokenizer")))
        local = bool(cut) and all(part.get("type") in _LOCAL for part in cut)
        self._local = side == "right" and local
        self._added = self._tokenizer.num_special_tokens_to_add(False)
        _require_room(max_seq_length, self._added)
        if max_seq_length is not None:
            self._tokenizer.enable_truncation(max_seq_length, direction=side)

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Token ids of texts that ``clean`` has seen."""
        if not self._model2vec:
            return self._encode(texts)
        most, dropped = self._model2vec["characters"], self._model2vec["dropped"]
        tokens = self._encode([text[:most] for text in texts])
        cut = {position for position, text in enumerate(texts) if len(text) > (most or len(text))}
        ids = [[token for token in one if token != dropped] for one in tokens.ids]
        return Tokens(ids, sorted(cut.union(tokens.truncated)))

    def _encode(self, texts: Sequence[str]) -> Tokens:
        heads = [self._head(text) for text in texts]
        ids, truncated = [], []
        for position, encoding in enumerate(self._batch(heads)):
            tokens, is_cut = self._kept(texts[position], heads[position], encoding)
            ids.append(tokens)
            if is_cut:
                truncated.append(position)
        return Tokens(ids, truncated)

    def _kept(self, text: str, head: str, encoding: Any) -> tuple[list[int], bool]:
        """Tokens that are kept of a text, of which ``head`` was encoded; whether it is cut."""
        whole = len(head) == len(text)
        if self._limit is None or (whole and len(encoding.ids) < self._limit):
            return encoding.ids, False
        beyond = sum(len(part) for part in encoding.overflowing)
        if not whole and len(encoding.ids) + beyond < self._limit + _SPARE_TOKENS:
            longer = self._longest(text)
            if len(longer) > len(head):
                encoding = self._batch([longer])[0]
            beyond, whole = len(encoding.overflowing), len(longer) == len(text)
        return encoding.ids, bool(beyond) or not whole

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> Pairs:
        """Token ids of pairs that ``clean`` has seen; of the longer text more is cut."""
        _require_room(self._limit, self._tokenizer.num_special_tokens_to_add(True))
        heads = [(self._head(first), self._head(second)) for first, second in pairs]
        encodings = self._batch(heads)
        ids, truncated, begins = [], [], []
        for position, encoding in enumerate(encodings):
            whole = heads[position] == tuple(pairs[position])
            if not whole and (not encoding.overflowing or _is_halved(encoding)):
                first, second = pairs[position]
                (encoding,) = self._batch([(self._longest(first), self._longest(second))])
            if not encoding.ids:
                raise EncodingError(f"Pair {position} has no tokens.", index=position)
            if encoding.overflowing or not whole:
                truncated.append(position)
            ids.append(encoding.ids)
            types = encoding.type_ids
            begins.append(types.index(1) if 1 in types else len(types))
        return Pairs(ids, truncated, begins)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text if nothing were cut, special tokens included.

        A text of more than 100,000 characters is counted in parts, cut at a blank where there is
        one; without any, a token may be counted as two at each cut.
        """
        counts = [self._added] * len(texts)
        parts = ((number, part) for number, text in enumerate(texts) for part in _parts(text))
        while some := list(islice(parts, _COUNTED)):
            encodings = self._batch([part for _, part in some])
            for (number, _), encoding in zip(some, encodings, strict=True):
                beyond = sum(len(piece) - self._added for piece in encoding.overflowing)
                counts[number] += len(encoding) - self._added + beyond
        return counts

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt in front of a text, special tokens before it included."""
        encoding = self._batch([prompt])[0]
        last_is_special = bool(encoding.ids) and bool(encoding.special_tokens_mask[-1])
        return len(encoding.ids) - last_is_special

    def _batch(self, texts: Sequence[str | tuple[str, str]]) -> Any:
        with own_errors(EncodingError, "The tokenizer fails on a text"):
            return self._tokenizer.encode_batch_fast(list(texts))

    def _head(self, text: str) -> str:
        """The beginning of a text that holds more tokens than are kept, where that can be known.

        A megabyte takes a second to tokenize; the tokens that are kept depend on its beginning.
        """
        if self._limit is None:
            return text
        enough = self._limit * _CHARACTERS_PER_TOKEN
        if len(text) <= 2 * enough:
            return text
        seam = _SEAM.search(text, enough, 2 * enough) if self._local else None
        return self._longest(text) if seam is None else text[: seam.end() - 1]

    def _longest(self, text: str) -> str:
        """As much of a text as is tokenized at most."""
        if self._limit is None:
            return text
        most = max(min(self._limit * _MOST_PER_TOKEN, _MOST_CHARACTERS),
                   2 * self._limit * _CHARACTERS_PER_TOKEN)  # fmt: skip
        return text[-most:] if self._from_right else text[:most]


def _is_halved(encoding: Any) -> bool:
    """Whether both texts of a pair are cut, and the longer one keeps a token more."""
    kept: list[int] = [encoding.sequence_ids.count(number) for number in (0, 1)]
    return abs(kept[0] - kept[1]) == 1


def _require_room(limit: int | None, added: int) -> None:
    if limit is not None and limit <= added:
        raise DamagedEncoderError(
            f"'max_seq_length' is {limit}, and the tokenizer adds {added} special tokens, so that "
            "nothing of a text would be read."
        )


@contextmanager
def own_errors(kind: type[EncoderError], what: str) -> Iterator[None]:
    """The binding's bare exceptions as one of ours; its panics are ``BaseException`` alone."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, EncoderError):
        raise
    except BaseException as error:
        raise kind(f"{what}: {error}.") from error


def _parts(text: str) -> Iterator[str]:
    begin = 0
    while len(text) - begin > _PART:
        seam = _SEAM.search(text, begin + _PART // 2, begin + _PART)
        end = begin + _PART if seam is None else seam.end() - 1
        yield text[begin:end]
        begin = end
    yield text[begin:]


def clean(texts: Sequence[object], *, first: int = 0) -> list[str]:
    """Check that every text is one; lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    cleaned = []
    for position, text in enumerate(texts, first):
        if not isinstance(text, str):
            kind = "None" if text is None else f"an object of type {type(text).__name__}"
            advice = {
                "NoneType": "Leave missing texts out, or encode an empty string.",
                "bytes": "Decode it first: text.decode('utf-8').",
            }.get(type(text).__name__, "Convert it to a string first.")
            raise EncodingError(f"Text {position} is {kind}. {advice}", index=position)
        if not text.isascii() and _SURROGATES.search(text):
            text = _SURROGATES.sub("\ufffd", text)
        cleaned.append(text)
    return cleaned


def clean_chunks(texts: Iterable[object], size: int) -> Iterator[list[str]]:
    """``clean`` for any iterable, in lists of ``size``."""
    iterator = iter(texts)
    begin = 0
    while chunk := list(islice(iterator, size)):
        yield clean(chunk, first=begin)
        begin += len(chunk)


def parts_of(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normaliser or pre-tokenizer, or all that a sequence of such consists of."""
    if component and component.get("type") == "Sequence":
        key = "normalizers" if "normalizers" in component else "pretokenizers"
        for part in component[key]:
            yield from parts_of(part)
    elif component:
        yield component


def require_bounded(content: Mapping[str, Any]) -> None:
    """Refuse a tokenizer whose replacements make a text many times as long."""
    growth = math.prod(map(_growth, parts_of(content.get("normalizer"))))
    if growth > _MOST_GROWTH:
        raise DamagedEncoderError(
            f"tokenizer.json: 'normalizer' can make a text {growth:.3g} times as long; no more "
            f"than {_MOST_GROWTH} times is accepted."
        )


def _growth(part: Mapping[str, Any]) -> float:
    """How many times as long a part of a normaliser can make a text."""
    if part.get("type") != "Replace":
        return 1.0
    content = len(part["content"])
    pattern = part["pattern"].get("String")
    return max(1.0, content / len(pattern)) if pattern else 1.0 + content
