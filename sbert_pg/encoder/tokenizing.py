"""Texts to token ids, truncated as the model asks, with truncation seen.

``tokenizer.json`` as the model's repository has it is not yet the tokenizer that transformers uses:
``tokenizer_config.json`` overrides its casing, and sentence-transformers may put lower-casing in
front. ``tokenizer_content`` settles that once, at conversion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sbert_pg.encoder.description import Description, read_json
from sbert_pg.errors import DamagedEncoderError, EncodingError, MissingExtraError

#: Classes of transformers that rebuild BERT's normaliser from ``tokenizer_config.json`` with these
#: defaults (transformers ``models/bert/tokenization_bert.py``, and the same in DistilBERT, MPNet).
_BERT_LIKE = ("BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer", "ElectraTokenizer")
_BERT_DEFAULTS = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
_BERT_KEYS = {
    "do_lower_case": "lowercase",
    "tokenize_chinese_chars": "handle_chinese_chars",
    "strip_accents": "strip_accents",
}

#: Pre-tokenizers for which the tokens of a word do not depend on words further on.
_LOCAL = frozenset({"BertPreTokenizer", "WhitespaceSplit", "Metaspace", "ByteLevel", "Whitespace"})
#: A place where a long text may be cut: a single blank between plain letters or digits, which no
#: normaliser and no pre-tokenizer of ``_LOCAL`` looks across.
_SEAM = re.compile(r"[A-Za-z0-9] (?=[A-Za-z0-9])")
#: Characters of a long text that are tokenized at first, per token that can be kept, and tokens
#: that must lie beyond the limit for the cut to have had no influence.
_CHARACTERS_PER_TOKEN = 12
_SPARE_TOKENS = 8

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of some texts.

    Attributes:
        ids: token ids of each text, special tokens included.
        truncated: positions of the texts that were longer than the limit.
    """

    ids: list[list[int]]
    truncated: list[int]


class TextTokenizer:
    """A tokenizer with a limit. Safe to share between threads.

    Args:
        content: content of a ``tokenizer.json``.
        max_seq_length: tokens kept of a text, special tokens included; ``None`` for all.
        side: end of the text that is cut, ``"right"`` or ``"left"``.
    """

    def __init__(self, content: str, max_seq_length: int | None, side: str = "right") -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(content)
        # The binding raises bare exceptions for content that it does not understand.
        except Exception as error:
            raise DamagedEncoderError(f"The tokenizer cannot be read: {error}.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._limit = max_seq_length
        self._local = side == "right" and _is_local(json.loads(content).get("pre_tokenizer"))
        self._added = self._tokenizer.num_special_tokens_to_add(False)
        if max_seq_length is not None:
            self._tokenizer.enable_truncation(max_seq_length, direction=side)

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Token ids of texts that ``clean`` has seen."""
        heads = [self._head(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(heads)
        ids, truncated = [], []
        limit = self._limit
        for position, encoding in enumerate(encodings):
            tokens = encoding.ids
            whole = len(heads[position]) == len(texts[position])
            if limit is not None and (not whole or len(tokens) >= limit):
                beyond = sum(len(part) for part in encoding.overflowing)
                if not whole and len(tokens) + beyond < limit + _SPARE_TOKENS:
                    encoding = self._tokenizer.encode_batch_fast([texts[position]])[0]
                    tokens, beyond = encoding.ids, len(encoding.overflowing)
                if beyond:
                    truncated.append(position)
            ids.append(tokens)
        return Tokens(ids, truncated)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text if nothing were cut, special tokens included."""
        counts = []
        for encoding in self._tokenizer.encode_batch_fast(list(texts)):
            beyond = sum(len(part) - self._added for part in encoding.overflowing)
            counts.append(len(encoding) + beyond)
        return counts

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt in front of a text, special tokens before it included."""
        encoding = self._tokenizer.encode_batch_fast([prompt])[0]
        last_is_special = bool(encoding.ids) and bool(encoding.special_tokens_mask[-1])
        return len(encoding.ids) - last_is_special

    def _head(self, text: str) -> str:
        """The beginning of a text that holds more tokens than are kept, where that can be told.

        A megabyte takes a second to tokenize; the tokens that are kept depend on its beginning.
        """
        if self._limit is None or not self._local:
            return text
        enough = self._limit * _CHARACTERS_PER_TOKEN
        if len(text) <= 2 * enough:
            return text
        seam = _SEAM.search(text, enough, 2 * enough)
        return text if seam is None else text[: seam.end() - 1]


def clean(texts: Sequence[object], *, first: int = 0) -> list[str]:
    """Check that every text is one, and make it encodable.

    Args:
        texts: what shall be encoded.
        first: position of ``texts[0]`` in the call, for messages.

    Lone surrogates, which no UTF-8 text can hold, become U+FFFD. Nothing else is changed: empty
    texts, white space and NUL are the tokenizer's to judge.

    Raises:
        EncodingError: something is no text; ``index`` is its position.
    """
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


def tokenizer_content(description: Description) -> dict[str, Any]:
    """The tokenizer that transformers would use, as the content of a ``tokenizer.json``.

    Raises:
        MissingExtraError: there is no ``tokenizer.json``, and making one needs transformers.
        DamagedEncoderError: there are no tokenizer files that can be read.
    """
    directory = description.transformer_path
    config = {}
    if (directory / "tokenizer_config.json").is_file():
        config = read_json(directory / "tokenizer_config.json")
    if (directory / "tokenizer.json").is_file():
        content = _as_configured(read_json(directory / "tokenizer.json"), config)
    else:
        content = _converted_by_transformers(directory)
    content["truncation"] = content["padding"] = None
    if description.do_lower_case:
        content["normalizer"] = _with_lower_case(content.get("normalizer"))
    return content


def truncation_side(description: Description) -> str:
    """Which end of a long text is cut off."""
    path = description.transformer_path / "tokenizer_config.json"
    side = read_json(path).get("truncation_side", "right") if path.is_file() else "right"
    return str(side)


def _as_configured(content: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    normalizer = content.get("normalizer") or {}
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if normalizer.get("type") == "BertNormalizer" and name in _BERT_LIKE:
        changes = {
            key: config.get(setting, _BERT_DEFAULTS[setting]) for setting, key in _BERT_KEYS.items()
        }
        content["normalizer"] = {**normalizer, **changes}
    return content


def _with_lower_case(normalizer: Mapping[str, Any] | None) -> dict[str, Any]:
    """As sentence-transformers does it: before everything else, unless it is there already."""
    if normalizer is None:
        return {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    if normalizer.get("type") == "Lowercase":
        return dict(normalizer)
    parts = list(normalizer["normalizers"]) if normalizer["type"] == "Sequence" else [normalizer]
    if any(part.get("type") == "Lowercase" for part in parts):
        return dict(normalizer)
    return {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *parts]}


def _converted_by_transformers(directory: Path) -> dict[str, Any]:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(
            "transformers", "export", f"make {directory / 'tokenizer.json'} from older files"
        ) from error
    try:
        backend = AutoTokenizer.from_pretrained(str(directory)).backend_tokenizer
        content: dict[str, Any] = json.loads(backend.to_str())
    # transformers raises whatever its many tokenizers raise.
    except Exception as error:
        raise DamagedEncoderError(
            f"{directory} holds no tokenizer.json, and none can be made: {error}."
        ) from error
    return content


def _is_local(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    if pre_tokenizer.get("type") == "Sequence":
        return all(_is_local(part) for part in pre_tokenizer["pretokenizers"])
    return pre_tokenizer.get("type") in _LOCAL
