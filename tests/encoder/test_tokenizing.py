"""Token ids as the whole text has them, however long it is, and what was cut is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from sbert_pg.encoder.files import read_json
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


CLASSES = [
    ("byte level", "RobertaTokenizer"), ("byte level", "GPT2Tokenizer"),
    ("byte level", "PreTrainedTokenizerFast"), ("unigram", "XLMRobertaTokenizer"),
    ("unigram", "CamembertTokenizer"), ("unigram", "PreTrainedTokenizerFast"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), CLASSES)
@pytest.mark.parametrize("asked", [True, False, None])
@pytest.mark.parametrize("stored", [True, False])
def test_a_leading_blank_is_put_where_transformers_puts_it(
    tmp_path: Path, kind: str, name: str, asked: bool | None, stored: bool
) -> None:
    transformers = pytest.importorskip("transformers", reason="it is what is followed")
    if not hasattr(transformers, "TokenizersBackend"):
        pytest.skip("transformers 4 takes more from tokenizer.json")
    content = json.loads(CONTENT[kind])
    part = content["pre_tokenizer"]
    if kind == "byte level":
        part["add_prefix_space"] = stored
    else:
        part["pretokenizers"][1]["prepend_scheme"] = "always" if stored else "never"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    special = dict.fromkeys(("bos_token", "cls_token", "unk_token", "pad_token"), "<s>")
    config = {"tokenizer_class": name, **special, "eos_token": "</s>", "sep_token": "</s>"}
    if asked is not None:
        config["add_prefix_space"] = asked
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    followed = getattr(transformers, name).from_pretrained(str(tmp_path))
    ours = _as_configured(content, name.removesuffix("Fast"), config, tmp_path / "tokenizer.json")
    tokenizer = TextTokenizer(json.dumps(ours), None)
    for text in ("Apple pie", "hello world", " fox"):
        theirs = followed.backend_tokenizer.encode(text, add_special_tokens=False).ids
        mine = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
        assert mine == theirs


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


@pytest.mark.parametrize(
    ("architecture", "kind", "named"),
    [
        ("bert", "wordpiece", {}), ("electra", "wordpiece", {}), ("nomic_bert", "wordpiece", {}),
        ("distilbert", "wordpiece", {}), ("mpnet", "wordpiece", {}), ("roberta", "byte level", {}),
        ("xlm-roberta", "unigram", {}), ("gte", "unigram", {}), ("camembert", "unigram", {}),
        ("modernbert", "byte level", {}), ("bert", "byte level", {"config": "RobertaTokenizer"}),
        ("squeezebert", "wordpiece", {"tokenizer": "SqueezeBertTokenizer"}),
        ("longformer", "byte level", {"tokenizer": "LongformerTokenizer"}),
        ("bert", "wordpiece", {"tokenizer": "PreTrainedTokenizerFast", "config": "BertTokenizer"}),
    ],
)  # fmt: skip
def test_the_class_is_the_one_that_transformers_takes(
    tmp_path: Path, architecture: str, kind: str, named: dict[str, str]
) -> None:
    """Where no file names one, that of the architecture; it decides what of a file is followed."""
    transformers = pytest.importorskip("transformers", reason="it is what is followed")
    if not hasattr(transformers, "TokenizersBackend"):
        pytest.skip("transformers 4 takes more from tokenizer.json")
    content = contradicted(kind)
    unknown = "<unk>" if kind == "wordpiece" else "<s>"
    special = dict.fromkeys(("bos_token", "cls_token", "unk_token", "pad_token"), unknown)
    files: dict[str, dict[str, Any]] = {
        "tokenizer.json": content, "config.json": {"model_type": architecture},
        "tokenizer_config.json": {**special, "eos_token": unknown, "sep_token": unknown},
    }  # fmt: skip
    for file, name in named.items():
        key = "config.json" if file == "config" else "tokenizer_config.json"
        files[key]["tokenizer_class"] = name
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    followed = transformers.AutoTokenizer.from_pretrained(str(tmp_path)).backend_tokenizer
    config, tokenizer = (
        read_json(tmp_path / name) for name in ("config.json", "tokenizer_config.json")
    )
    kind_of = tokenizer_class(tokenizer, config)
    ours = _as_configured(dict(content), kind_of, tokenizer, tmp_path / "tokenizer.json")
    mine = TextTokenizer(json.dumps(ours), None)._tokenizer
    for text in ("Apple  pie ", " The Fox", "hello world"):
        theirs = followed.encode(text, add_special_tokens=False).ids
        assert mine.encode(text, add_special_tokens=False).ids == theirs


@pytest.mark.parametrize("name", ["XLMRobertaTokenizer", "CamembertTokenizer", "T5Tokenizer"])
def test_sentencepiece_is_what_transformers_5_makes_of_it(tmp_path: Path, name: str) -> None:
    """transformers 4 wrote another normaliser and pre-tokenizer; version 5 reads neither."""
    transformers = pytest.importorskip("transformers", reason="it is what is followed")
    if not hasattr(transformers, "TokenizersBackend"):
        pytest.skip("transformers 4 takes more from tokenizer.json")
    content = json.loads(CONTENT["unigram"])
    # As transformers 4.57 saves it, with a pass over the text that tells the two from each other.
    blanks = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, blanks]}
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581",
                                "prepend_scheme": "always", "split": True}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    special = dict.fromkeys(("bos_token", "cls_token", "unk_token", "pad_token"), "<s>")
    config = {"tokenizer_class": name, **special, "eos_token": "</s>", "sep_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    followed = getattr(transformers, name).from_pretrained(str(tmp_path))
    ours = _as_configured(dict(content), name, config, tmp_path / "tokenizer.json")
    as_stored, as_built = (TextTokenizer(json.dumps(c), None)._tokenizer for c in (content, ours))
    differ = 0
    for text in ("Apple  pie ", " the fox", "a\tb\nc", "The fox", "plain words"):
        theirs = followed.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert as_built.encode(text, add_special_tokens=False).ids == theirs
        differ += as_stored.encode(text, add_special_tokens=False).ids != theirs
    assert differ, "the file as it is would be another tokenizer"


def test_a_contradiction_that_nobody_is_known_to_settle_is_refused(tmp_path: Path) -> None:
    content = json.loads(CONTENT["byte level"])
    config = {"add_prefix_space": True}
    with pytest.raises(UnsupportedEncoderError, match=r"'add_prefix_space'.*CohereTokenizer"):
        _as_configured(content, "CohereTokenizer", config, tmp_path / "tokenizer.json")
