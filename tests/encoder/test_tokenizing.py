"""Token ids as the whole text has them, however long it is, and what was cut is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from sbert_pg.encoder.samples import SAMPLE_TEXTS
from sbert_pg.encoder.tokenizing import TextTokenizer, clean
from sbert_pg.errors import DamagedEncoderError, EncodingError
from sbert_pg.probes import PROBES

LIMIT = 16


def _finished(tokenizer: Tokenizer, trainer: Any) -> str:
    tokenizer.train_from_iterator([*SAMPLE_TEXTS, *PROBES], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    content: str = tokenizer.to_str()
    return content


def wordpiece() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _finished(
        tokenizer,
        trainers.WordPieceTrainer(
            vocab_size=500, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False
        ),
    )


def byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _finished(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )


def unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    return _finished(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=500,
            special_tokens=["<s>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )


CONTENT = {"wordpiece": wordpiece(), "byte level": byte_level(), "unigram": unigram()}

#: Words and separators of which long, awkward texts are made.
PIECES = st.sampled_from(
    ["word", "a", "Überraschung", "e\u0301", "東京", "x" * 150, " ", "  ", "\n", "\t", "'s", ".",
     "-", "🚀", "<s>", "12345", "\u00a0", "ﬁ", "\u0301", "I"]
)  # fmt: skip


@pytest.mark.parametrize("kind", CONTENT)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(st.lists(PIECES, max_size=400).map("".join), min_size=1, max_size=3))
def test_a_long_text_has_the_tokens_of_the_whole(kind: str, texts: list[str]) -> None:
    whole = Tokenizer.from_str(CONTENT[kind])
    whole.enable_truncation(LIMIT)
    tokens = TextTokenizer(CONTENT[kind], LIMIT).encode(texts)
    expected = whole.encode_batch(texts)
    assert tokens.ids == [encoding.ids for encoding in expected]
    assert tokens.truncated == [i for i, e in enumerate(expected) if e.overflowing]


@pytest.mark.parametrize("kind", CONTENT)
def test_only_the_beginning_of_a_megabyte_is_tokenized(kind: str) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 25_000
    tokenizer = TextTokenizer(CONTENT[kind], 256)
    assert len(tokenizer._head(text)) < 20_000
    tokens = tokenizer.encode([text])
    whole = Tokenizer.from_str(CONTENT[kind])
    whole.enable_truncation(256)
    assert tokens.ids == [whole.encode(text).ids]
    assert tokens.truncated == [0]


def test_exactly_the_limit_is_not_truncated() -> None:
    tokenizer = TextTokenizer(CONTENT["wordpiece"], LIMIT)
    for words in range(LIMIT - 4, LIMIT + 2):
        tokens = tokenizer.encode(["a " * words])
        assert len(tokens.ids[0]) == min(words + 2, LIMIT)
        assert tokens.truncated == ([0] if words + 2 > LIMIT else [])


def test_counts_ignore_the_limit() -> None:
    tokenizer = TextTokenizer(CONTENT["wordpiece"], LIMIT)
    assert tokenizer.count(["", "a", "a " * 1000]) == [2, 3, 1002]


def test_the_left_side_is_cut_where_the_model_says_so() -> None:
    text = " ".join(f"{i}" for i in range(100))
    left = TextTokenizer(CONTENT["wordpiece"], LIMIT, "left").encode([text]).ids[0]
    right = TextTokenizer(CONTENT["wordpiece"], LIMIT).encode([text]).ids[0]
    whole = TextTokenizer(CONTENT["wordpiece"], None).encode([text]).ids[0]
    assert right[:-1] == whole[: LIMIT - 1]
    assert left[1:] == whole[-(LIMIT - 1) :]


def test_without_a_limit_nothing_is_cut() -> None:
    tokens = TextTokenizer(CONTENT["byte level"], None).encode(["a " * 5000])
    assert len(tokens.ids[0]) > 5000
    assert tokens.truncated == []


@pytest.mark.parametrize(
    ("bad", "advice"),
    [(None, "Leave missing texts out"), (b"bytes", "decode"), (3, "Convert"), (["x"], "Convert")],
)
def test_what_is_no_text_is_refused_with_its_position(bad: object, advice: str) -> None:
    with pytest.raises(EncodingError, match=advice) as caught:
        clean(["fine", bad])
    assert caught.value.index == 1
    with pytest.raises(EncodingError) as caught:
        clean([bad], first=41)
    assert caught.value.index == 41


def test_only_lone_surrogates_are_changed() -> None:
    texts = ["", " ", "a\x00b", "\U0001f680", "é", "plain"]
    assert clean(texts) == texts
    assert clean(["a\ud800b\udfff"]) == ["a\ufffdb\ufffd"]


def test_content_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedEncoderError):
        TextTokenizer(json.dumps({"model": "nonsense"}), LIMIT)
