"""Token ids as the whole text has them, however long it is, and what was cut is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from sbert_pg.encoder.files import Settings, read_json
from sbert_pg.encoder.tokenizer_files import _as_configured, tokenizer_class
from sbert_pg.encoder.tokenizing import TextTokenizer, clean
from sbert_pg.errors import DamagedEncoderError, EncodingError, UnsupportedEncoderError
from sbert_pg.probes import PROBES, SAMPLE_TEXTS

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


#: Texts of some megabytes without a blank to cut at, and what stands after them.
HUGE = {"a word": "a", "base64": "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo", "blank": " ", "signs": "!?",
        "東京": "東京", "lines": "a\n", "accents": "e\u0301"}  # fmt: skip


@pytest.mark.parametrize("kind", [*CONTENT, "no pre-tokenizer"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("unit", HUGE.values(), ids=HUGE)
def test_a_huge_text_is_cut_by_characters_first(kind: str, side: str, unit: str) -> None:
    content = CONTENT.get(kind) or json.dumps(
        {**json.loads(CONTENT["unigram"]), "pre_tokenizer": None}
    )
    tokenizer = TextTokenizer(content, LIMIT, side)
    seen: list[int] = []
    batch = tokenizer._batch
    tokenizer._batch = lambda texts: seen.extend(map(len, texts)) or batch(texts)  # type: ignore[method-assign]
    text, half = (unit * (size // len(unit)) for size in (3_000_000, 1_500_000))
    tokens = tokenizer.encode([text, "short"])
    assert sum(seen) <= 2 * LIMIT * 1000 + 10 * LIMIT * 12
    assert tokens.truncated == [0]
    assert 2 <= len(tokens.ids[0]) <= LIMIT
    assert tokens.ids == tokenizer.encode([half, "short"]).ids


def test_all_tokens_of_a_huge_text_are_counted_in_parts() -> None:
    tokenizer = TextTokenizer(CONTENT["wordpiece"], LIMIT)
    seen: list[int] = []
    batch = tokenizer._batch
    tokenizer._batch = lambda texts: seen.extend(map(len, texts)) or batch(texts)  # type: ignore[method-assign]
    assert tokenizer.count(["the fox " * 100_000]) == [
        2 + 100_000 * (tokenizer.count(["the fox"])[0] - 2)
    ]
    assert max(seen) <= 100_000
    assert tokenizer.count(["x" * 1_000_000])[0] <= 2 + 20


@pytest.mark.parametrize("limit", [1, 2])
def test_a_limit_that_leaves_no_room_is_refused(limit: int) -> None:
    with pytest.raises(DamagedEncoderError, match=f"'max_seq_length' is {limit}"):
        TextTokenizer(CONTENT["wordpiece"], limit)


def test_a_panic_of_the_binding_is_an_error_of_ours() -> None:
    content = json.loads(CONTENT["wordpiece"])
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(b+b+)+c"}, "content": ""}
    tokenizer = TextTokenizer(json.dumps(content), LIMIT)
    with pytest.raises(EncodingError, match="fails on a text"):
        tokenizer.encode(["b" * 10_000])


def contradicted(kind: str) -> dict[str, Any]:
    """A ``tokenizer.json`` of which the class that belongs to it takes another part."""
    content: dict[str, Any] = json.loads(CONTENT[kind])
    if kind == "wordpiece":
        content["normalizer"]["lowercase"] = not content["normalizer"]["lowercase"]
    elif kind == "byte level":
        content["pre_tokenizer"]["add_prefix_space"] = True
    else:
        content["normalizer"] = {"type": "Lowercase"}
    return content


#: Settings that are followed, or that change nothing.
FOLLOWED: list[dict[str, Any]] = [
    {}, {"do_lower_case": True}, {"do_lower_case": False},
    {"strip_accents": True}, {"strip_accents": False}, {"tokenize_chinese_chars": False},
    {"keep_accents": True}, {"keep_accents": False}, {"remove_space": False}, {"legacy": False},
    {"add_prefix_space": True}, {"add_prefix_space": False}, {"split_by_punct": True},
    {"mask_token": {"content": "<s>", "lstrip": True, "__type": "AddedToken"}},
]  # fmt: skip
#: Tokens that ``tokenizer.json`` does not have, or otherwise.
REFUSED: list[dict[str, Any]] = [
    {"unk_token": "zq"}, {"additional_special_tokens": ["zq"]}, {"extra_special_tokens": ["zq"]},
    {"extra_special_tokens": {"a": "zq"}}, {"split_special_tokens": True},
    {"added_tokens_decoder": {"1": {"content": "</s>", "lstrip": True}}},
    {"added_tokens_decoder": {"900": {"content": "zq"}}},
]  # fmt: skip
MADE = [
    ("bert", "wordpiece", {}), ("electra", "wordpiece", {}), ("nomic_bert", "wordpiece", {}),
    ("distilbert", "wordpiece", {}), ("mpnet", "wordpiece", {}), ("roberta", "byte level", {}),
    ("xlm-roberta", "unigram", {}), ("gte", "unigram", {}), ("camembert", "unigram", {}),
    ("albert", "unigram", {}), ("t5", "unigram", {}), ("deberta-v2", "unigram", {}),
    ("t5", "unigram", {"tokenizer": "PreTrainedTokenizerFast"}), ("modernbert", "byte level", {}),
    ("modernbert", "byte level", {"tokenizer": "RobertaTokenizer"}),
    ("bert", "byte level", {"config": "RobertaTokenizer"}), ("mistral", "unigram", {}),
    ("bert", "byte level", {"tokenizer": "GPT2Tokenizer"}),
    ("qwen3", "byte level", {"tokenizer": "PreTrainedTokenizerFast"}),
    ("squeezebert", "wordpiece", {"tokenizer": "SqueezeBertTokenizer"}),
    ("longformer", "byte level", {"tokenizer": "LongformerTokenizer"}),
    ("bert", "wordpiece", {"tokenizer": "PreTrainedTokenizerFast", "config": "BertTokenizer"}),
]  # fmt: skip
ODD = ["Apple  pie ", " The Fox", "a\tb\nc", "", " ", "Caf\u00e9 \u4eca\u5929", "``so'' it's, ok",
       "<s> a </s>b zq", "\ufb01 \uff21 e\u0301", "\u2581x"]  # fmt: skip


@pytest.mark.parametrize(("architecture", "kind", "named"), MADE)
def test_tokens_are_those_of_transformers(
    tmp_path: Path, architecture: str, kind: str, named: dict[str, str]
) -> None:
    """Classes build parts again from ``tokenizer_config.json``, whatever ``tokenizer.json`` says.

    The class is the architecture's where no file names one.
    """
    transformers = pytest.importorskip("transformers", reason="it is what is followed")
    if not hasattr(transformers, "TokenizersBackend"):
        pytest.skip("transformers 4 takes more from tokenizer.json")
    written = {"model_type": architecture}
    special = {**dict.fromkeys(("bos_token", "cls_token", "pad_token", "mask_token"), "<s>"),
               **dict.fromkeys(("eos_token", "sep_token"), "</s>")}  # fmt: skip
    special["unk_token"] = "<s>" if kind == "byte level" else "<unk>"
    if "config" in named:
        written["tokenizer_class"] = named["config"]
    if "tokenizer" in named:
        special["tokenizer_class"] = named["tokenizer"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = read_json(tmp_path / "config.json")
    path = tmp_path / "tokenizer.json"
    for content in (json.loads(CONTENT[kind]), contradicted(kind)):
        if architecture == "t5":
            content["post_processor"]["single"] = content["post_processor"]["single"][1:]
        path.write_text(json.dumps(content))
        for extra in (*FOLLOWED, *REFUSED):
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({**special, **extra}))
            tokenizer = read_json(tmp_path / "tokenizer_config.json")
            name = tokenizer_class(tokenizer, config)
            if extra in REFUSED:
                with pytest.raises(UnsupportedEncoderError, match=r"tokenizer_config\.json"):
                    _as_configured(dict(content), name, tokenizer, path)
                continue
            ours = _as_configured(json.loads(json.dumps(content)), name, tokenizer, path)
            theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
            mine = TextTokenizer(json.dumps(ours), None).encode(ODD).ids
            assert mine == [theirs(text)["input_ids"] for text in ODD], extra


@pytest.mark.parametrize(
    ("name", "kind", "extra"),
    [("BertTokenizer", "wordpiece", {"cls_token": "</s>"}), ("T5Tokenizer", "unigram", {}),
     ("XLMRobertaTokenizer", "unigram", {"eos_token": "<s>"}),
     ("Qwen2Tokenizer", "byte level", {}), ("GemmaTokenizer", "byte level", {})],
)  # fmt: skip
def test_what_a_class_builds_otherwise_is_refused(
    tmp_path: Path, name: str, kind: str, extra: dict[str, Any]
) -> None:
    """Tokens around a text, and normalisers."""
    config = {"cls_token": "<s>", "sep_token": "</s>", **extra}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_json(tmp_path / "tokenizer_config.json")
    with pytest.raises(UnsupportedEncoderError, match=r"tokenizer\.json"):
        _as_configured(json.loads(CONTENT[kind]), name, tokenizer, tmp_path / "tokenizer.json")


def test_a_contradiction_that_nobody_is_known_to_settle_is_refused(tmp_path: Path) -> None:
    content = json.loads(CONTENT["byte level"])
    config = Settings({"add_prefix_space": True}, tmp_path / "tokenizer_config.json")
    with pytest.raises(UnsupportedEncoderError, match=r"'add_prefix_space'.*CohereTokenizer"):
        _as_configured(content, "CohereTokenizer", config, tmp_path / "tokenizer.json")
