"""Damaged and hostile directories: errors of our own, that name the file, in time and memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_model import FILES, TOKENIZER, edit, write_tiny

from sbert_pg.encoder import Encoder
from sbert_pg.errors import EncoderError, EncodingError, SbertPgError

Change = Callable[[Path], None]
#: Seconds after which a directory counts as one that is never done with.
SECONDS = 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def load(path: Path) -> Encoder:
    with tempfile.TemporaryDirectory() as cache:
        return Encoder.load(path, precision="fp32", threads=1, cache_dir=cache)


def in_file(name: str, **values: Any) -> Change:
    return lambda path: edit(path / name, **values)


def written(name: str, content: bytes) -> Change:
    return lambda path: (path / name).write_bytes(content) and None


def both(*changes: Change) -> Change:
    def apply(path: Path) -> None:
        for change in changes:
            change(path)

    return apply


def header(change: Callable[[dict[str, Any]], Any], name: str = "model.safetensors") -> Change:
    def apply(path: Path) -> None:
        data = (path / name).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        content = json.loads(data[8 : 8 + size])
        change(content)
        text = json.dumps(content).encode()
        (path / name).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def in_tokenizer(**values: Any) -> Change:
    return in_file("tokenizer.json", **values)


def at(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[name].__setitem__(key, value)


def instead(name: str, make: Callable[[Path], object]) -> Change:
    def apply(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return apply


def zeros(path: Path) -> None:
    for file in path.rglob("*.safetensors"):
        save_file({name: np.zeros_like(t) for name, t in load_file(file).items()}, file)


VOCABULARY = TOKENIZER["model"]["vocab"]
NORM, BIAS = "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"
TYPES = "embeddings.token_type_embeddings.weight"
CONFIG, GENERAL, LIMITS = (
    "config.json", "config_sentence_transformers.json", "sentence_bert_config.json",
)  # fmt: skip
POOLING, DENSE = "1_Pooling/config.json", "2_Dense/config.json"
REPLACE = {"type": "Replace", "pattern": {"String": "l"}, "content": "ll"}
SLOW = {"type": "Replace", "pattern": {"Regex": r"(a|aa|a\w)+(\s+)+$"}, "content": ""}

#: What is done to the directory, and what the message names.
#: As transformers adds [MASK] behind the last row where a vocabulary has none.
BEYOND = {"id": 9999, "content": "hello", "special": True, **dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False)}  # fmt: skip

CASES: dict[str, tuple[Change, str]] = {
    "deep config": (written(CONFIG, b"[" * 100_000), CONFIG),
    "deep modules": (written("modules.json", b'{"a":' * 50_000), "modules.json"),
    "deep value": (in_file(CONFIG, x=json.loads("[" * 300 + "]" * 300)), CONFIG),
    "not utf-8": (written(CONFIG, b'{"model_type": "\xff"}'), CONFIG),
    "not a number": (written(POOLING, b'{"word_embedding_dimension": NaN}'), "1_Pooling"),
    "a number of a million digits": (written(LIMITS, b'{"max_seq_length": %s}' % (b"9" * 10**6)),
                                     LIMITS),
    "empty file": (written("tokenizer.json", b""), "tokenizer.json"),
    "large file": (written(GENERAL, b" " * 11_000_000 + b"{}"), GENERAL),
    "modules: no list": (written("modules.json", b'{"a": 1}'), "modules.json"),
    "modules: numbers": (written("modules.json", b"[1, 2]"), "modules.json"),
    "modules: path": (written("modules.json", b'[{"type": "sentence_transformers.X", "path": 5}]'),
                      "'path'"),
    "heads 0": (in_file(CONFIG, num_attention_heads=0), "'num_attention_heads'"),
    "heads 3": (in_file(CONFIG, num_attention_heads=3), "3 attention heads"),
    "layers -1": (in_file(CONFIG, num_hidden_layers=-1), "'num_hidden_layers'"),
    "layers huge": (in_file(CONFIG, num_hidden_layers=10**9), "'num_hidden_layers'"),
    "layers many": (in_file(CONFIG, num_hidden_layers=10**6), r"encoder\.layer\.1\."),
    "layers true": (in_file(CONFIG, num_hidden_layers=True), "'num_hidden_layers'"),
    "epsilon text": (in_file(CONFIG, layer_norm_eps="x"), "'layer_norm_eps'"),
    "epsilon negative": (in_file(CONFIG, layer_norm_eps=-1), "'layer_norm_eps'"),
    "epsilon huge": (written(CONFIG, json.dumps(FILES[CONFIG]).replace("1e-12", "1e999").encode()),
                     "'layer_norm_eps'"),
    "width list": (in_file(CONFIG, hidden_size=[8]), "'hidden_size'"),
    "width huge": (in_file(CONFIG, hidden_size=10**30), "'hidden_size'"),
    "width other": (in_file(CONFIG, hidden_size=16), "width"),
    "vocabulary": (in_file(CONFIG, vocab_size=10**7), "word_embeddings"),
    "positions few": (in_file(CONFIG, max_position_embeddings=10**6), "positions"),
    "positions text": (in_file(CONFIG, max_position_embeddings="512"), "'max_position_embeddings'"),
    "model_type path": (in_file(CONFIG, model_type="../../x"), "'model_type'"),
    "model_type number": (in_file(CONFIG, model_type=7), "'model_type'"),
    "model_type missing": (in_file(CONFIG, model_type=...), "'model_type'"),
    "activation": (in_file(CONFIG, hidden_act="__import__"), "'hidden_act'"),
    "auto_map": (in_file(CONFIG, auto_map={"AutoModel": "modeling.Evil"}), "'auto_map'"),
    "auto_map of the tokenizer": (in_file("tokenizer_config.json", auto_map={"A": "b.C"}),
                                  "'auto_map'"),
    "limit 0": (in_file(LIMITS, max_seq_length=0), "'max_seq_length'"),
    "limit text": (in_file(LIMITS, max_seq_length="x"), "'max_seq_length'"),
    "limit 2": (in_file(LIMITS, max_seq_length=2), "'max_seq_length'"),
    "limit of the tokenizer": (both(in_file(LIMITS, max_seq_length=...),
                                    in_file("tokenizer_config.json", model_max_length=-5)),
                               "'model_max_length'"),
    "lower case text": (in_file(LIMITS, do_lower_case="no"), "'do_lower_case'"),
    "arguments": (in_file(LIMITS, model_args=[1]), "'model_args'"),
    "truncate_dim 0": (in_file(GENERAL, truncate_dim=0), "'truncate_dim'"),
    "truncate_dim text": (in_file(GENERAL, truncate_dim="x"), "'truncate_dim'"),
    "prompts list": (in_file(GENERAL, prompts=["a"]), "'prompts'"),
    "prompts number": (in_file(GENERAL, prompts={"query": 5}), "'query'"),
    "default prompt": (in_file(GENERAL, default_prompt_name=5), "'default_prompt_name'"),
    "similarity": (in_file(GENERAL, similarity_fn_name=["cosine"]), "'similarity_fn_name'"),
    "pooling 5": (in_file(POOLING, pooling_mode=5), "'pooling_mode'"),
    "pooling empty": (in_file(POOLING, pooling_mode=[]), "pooling"),
    "pooling nested": (in_file(POOLING, pooling_mode=[["mean"]]), "'pooling_mode'"),
    "pooling flag": (in_file(POOLING, pooling_mode_mean_tokens="yes"), "'pooling_mode_mean"),
    "dense huge": (in_file(DENSE, out_features=10**12), "'out_features'"),
    "dense negative": (in_file(DENSE, in_features=-8), "'in_features'"),
    "dense activation": (in_file(DENSE, activation_function="os.system"), "'activation_function'"),
    "dense bias": (in_file(DENSE, bias=False), "bias"),
    "tensors overlap": (header(lambda h: h[NORM].update(data_offsets=h[BIAS]["data_offsets"])),
                        r"model\.safetensors"),
    "negative shape": (header(lambda h: h[NORM].update(shape=[-1, -8])), r"model\.safetensors"),
    "huge shape": (header(lambda h: h[NORM].update(shape=[2**40, 2**40])), r"model\.safetensors"),
    "shape text": (header(lambda h: h[NORM].update(shape="8")), r"model\.safetensors"),
    "offsets beyond": (header(lambda h: h[NORM].update(data_offsets=[0, 10**15])),
                       r"model\.safetensors"),
    "offsets backwards": (header(lambda h: h[NORM].update(data_offsets=[64, 32])),
                          r"model\.safetensors"),
    "offsets text": (header(lambda h: h[NORM].update(data_offsets=["a", "b"])),
                     r"model\.safetensors"),
    "type": (header(lambda h: h[NORM].update(dtype=["F32"])), r"model\.safetensors"),
    "tensor missing": (header(lambda h: h.pop(TYPES)), r"model\.safetensors"),
    "tensor of one axis": (header(lambda h: h[TYPES].update(shape=[16])), "token_type_embeddings"),
    "weights of a layer": (header(at("linear.bias", "shape", [3, 2]), "2_Dense/model.safetensors"),
                           r"linear\.bias"),
    "header list": (written("model.safetensors", struct.pack("<Q", 2) + b"[]"),
                    r"model\.safetensors"),
    "header huge": (written("model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
                    r"model\.safetensors"),
    "header deep": (written("model.safetensors", struct.pack("<Q", 90_000) + b"[" * 90_000),
                    r"model\.safetensors"),
    "shards": (in_file("model.safetensors.index.json", weight_map=["a"]), "'weight_map'"),
    "shards outside": (in_file("model.safetensors.index.json", weight_map={"a": "/etc/passwd"}),
                       "outside"),
    "doubling": (in_tokenizer(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 25}),
                 "'normalizer'"),
    "growing": (in_tokenizer(normalizer={**REPLACE, "content": "x" * 10_000}), "'normalizer'"),
    "growing from nothing": (
        in_tokenizer(normalizer={**REPLACE, "pattern": {"Regex": ""}, "content": "x" * 500}),
        "'normalizer'"),
    "slow expression": (in_tokenizer(normalizer=SLOW), r"tokenizer\.json"),
    "slow split": (
        in_tokenizer(pre_tokenizer={"type": "Split", "behavior": "Isolated", "invert": False,
                                    "pattern": {"Regex": r"(a+a+)+b|((1|1)*)*2"}}),
        r"tokenizer\.json"),
    "tokenizer model": (in_tokenizer(model={"type": "WordPiece"}), "tokenizer"),
    "tokenizer pieces": (in_tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": 5}),
                         r"tokenizer\.json"),
    "half a character": (in_file(GENERAL, prompts={"document": "\ud800"}), GENERAL),
    "half a character in a name": (in_file(GENERAL, prompts={"\udfff": "x"}), GENERAL),
    "half a character in a word": (
        in_tokenizer(model={**TOKENIZER["model"], "vocab": {"[UNK]": 0, "a\ud83d": 1}}),
        r"tokenizer\.json"),
    "no words": (in_tokenizer(model={**TOKENIZER["model"], "vocab": {}}), "no vocabulary"),
    "words of another model": (
        in_tokenizer(model={**TOKENIZER["model"], "vocab": {**VOCABULARY, "other": 9999}}),
        "the id 9999"),
    "a token of every text, of another model": (
        both(in_tokenizer(added_tokens=[BEYOND], post_processor={
            "type": "BertProcessing", "sep": ["hello", 9999], "cls": ["[CLS]", 2]}),
            in_file("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")),
        "the id 9999"),
    "a token that is not there": (written("special_tokens_map.json", b'{"cls_token": "zq"}'), "zq"),
    "another one": (written("added_tokens.json", b'{"zq": 5}'), "zq"),
    "whether pooling sees the prompt": (in_file(POOLING, include_prompt=None), "'include_prompt'"),
    "token types": (in_file("config.json", type_vocab_size=9), "token_type_embeddings"),
    "a prompt that leaves no room": (in_file(GENERAL, prompts={"document": "the " * 40}),
                                     "every document the same"),
    "a prompt that leaves questions no room": (in_file(GENERAL, prompts={"query": "a" * 10**6}),
                                               "every query the same"),
    "weights of zeros": (zeros, "the same vector"),
    "a directory in a file's place": (instead("tokenizer.json", Path.mkdir), "an ordinary file"),
    "a pipe in a file's place": (instead("modules.json", os.mkfifo), "an ordinary file"),
    "a device in a file's place": (instead(CONFIG, lambda path: path.symlink_to("/dev/zero")),
                                   "an ordinary file"),
    "a link to itself": (instead(CONFIG, lambda path: path.symlink_to(path.name)), CONFIG),
    "truncation side": (in_file("tokenizer_config.json", truncation_side="up"),
                        "'truncation_side'"),
}  # fmt: skip


def test_the_directory_as_it_was_written_is_loaded(tiny: Path) -> None:
    assert load(tiny).encode("hello world").shape == (6,)


@pytest.mark.parametrize("name", CASES)
def test_refused(copy: Path, name: str) -> None:
    change, named = CASES[name]
    change(copy)
    with within(SECONDS), pytest.raises(SbertPgError, match=named):
        load(copy)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """An exception that no code of ours catches, where it takes longer."""

    def late(*_: object) -> None:
        raise SystemExit(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_CHILD = """
import resource, sys
from sbert_pg import Encoder
from sbert_pg.errors import SbertPgError
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Encoder.load(sys.argv[1], precision="fp32", threads=1, cache_dir=sys.argv[2])
except SbertPgError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["layers many", "vocabulary", "huge shape", "header huge",
                                  "large file", "doubling"])  # fmt: skip
def test_memory_is_bounded(copy: Path, tmp_path: Path, name: str) -> None:
    CASES[name][0](copy)
    command = [sys.executable, "-c", _CHILD, str(copy), str(tmp_path / "cache")]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(output.stdout) < 300_000, "kilobytes"


#: What stands in place of an entry.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, -0.0]),
    st.sampled_from(["", "x", "../../etc", "\0", "a" * 10_000, "bert", "mpnet", "mean", "💥"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
    st.just(json.loads("[" * 150 + "]" * 150)),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every entry of a JSON value."""
    if not isinstance(value, (dict, list)) or len(path) > 4:
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [way for key, inner in items for way in ((*path, key), *places(inner, (*path, key)))]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """One to three changes of a directory, in its JSON, its headers or its bytes."""

    def one() -> Change:
        kind = draw(st.sampled_from(["entry", "entry", "entry", "removed", "header", "bytes"]))
        if kind in ("entry", "removed"):
            name = draw(st.sampled_from(sorted(FILES)))
            way = draw(st.sampled_from(places(FILES[name]) or [()]))
            value = draw(VALUES)
            return lambda path: replaced(path / name, way, value, kind == "removed")
        file = draw(st.sampled_from(["model.safetensors", "2_Dense/model.safetensors"]))
        if kind == "header":
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            number, value = draw(st.integers(0, 20)), draw(VALUES)
            return header(lambda h: h[sorted(h)[number % len(h)]].update({key: value}), file)
        file = draw(st.sampled_from([*sorted(FILES), file]))
        cut, position, byte = (
            draw(st.booleans()),
            draw(st.integers(0, 3000)),
            draw(st.integers(0, 255)),
        )
        return lambda path: damaged(path / file, cut, position, byte)

    made = [one() for _ in range(draw(st.integers(1, 3)))]

    def apply(path: Path) -> None:
        for change in made:
            # A change may have made the next one impossible.
            try:
                change(path)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
                continue

    return apply


def replaced(path: Path, way: tuple[Any, ...], value: Any, remove: bool) -> None:
    content = json.loads(path.read_text())
    if not way:
        path.write_text(json.dumps(value))
        return
    place = content
    for key in way[:-1]:
        place = place[key]
    if remove:
        del place[way[-1]]
    else:
        place[way[-1]] = value
    path.write_text(json.dumps(content))


def damaged(path: Path, cut: bool, position: int, byte: int) -> None:
    data = bytearray(path.read_bytes())
    position %= max(1, len(data))
    if cut:
        del data[position:]
    else:
        data[position] = byte
    path.write_bytes(bytes(data))


def own_error_or_vectors(tiny: Path, change: Change) -> None:
    """A directory is refused by an error of our tree, or gives finite vectors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(tiny, Path(folder) / "model"))
        change(path)
        with within(SECONDS):
            try:
                encoder = load(path)
                vectors = encoder.encode(["hello world", "the quick brown fox", "a" * 300])
            except SbertPgError:
                return
        assert np.isfinite(vectors).all()


FUZZ = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@settings(FUZZ, max_examples=60)
@given(change=changes())
def test_whatever_is_changed(tiny: Path, change: Change) -> None:
    own_error_or_vectors(tiny, change)


@pytest.mark.slow
@settings(FUZZ, max_examples=1000)
@given(change=changes())
def test_a_thousand_changes(tiny: Path, change: Change) -> None:
    own_error_or_vectors(tiny, change)


@settings(FUZZ, max_examples=100)
@given(name=st.text(max_size=300))
@example(name="a" * 300)
@example(name="\u0335" * 140)
@example(name="a/" * 3000)
def test_whatever_the_name_is(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """A name is found or refused by an error of ours; nothing is made of it outside the cache."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.raises(EncoderError):
        Encoder.load(f"./{name}", precision="fp32", cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_an_added_token_without_a_vector_is_read_as_words(copy: Path) -> None:
    before = load(copy).encode("hello world")
    in_tokenizer(added_tokens=[*TOKENIZER["added_tokens"], BEYOND])(copy)
    np.testing.assert_array_equal(load(copy).encode("hello world"), before)


def test_a_text_without_tokens_is_named(copy: Path) -> None:
    edit(copy / "tokenizer.json", post_processor=None)
    edit(copy / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    encoder = load(copy)
    for texts in (["hello", ""], ["hello", "hello", "", "world"], ["", " "]):
        with pytest.raises(EncodingError, match="no tokens") as caught:
            encoder.encode(texts)
        assert caught.value.index == texts.index("")
    with pytest.raises(EncodingError) as caught:
        list(encoder.encode_stream(["a"] * 70 + [""], chunk_size=16))
    assert caught.value.index == 70
    np.testing.assert_allclose(
        encoder.encode(["hello", "a"])[0], encoder.encode("hello"), atol=1e-5
    )
    assert not encoder.probe_vectors[0].any(), "the empty probe has a row of zeros"
    np.testing.assert_allclose(encoder.recomputed_probes(), encoder.probe_vectors, atol=1e-5)
