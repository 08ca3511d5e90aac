"""Static models against sentence-transformers' ``StaticEmbedding`` and against model2vec."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_models import TEXTS, sentence_transformers_modules, worst

from sbert_pg.encoder import Encoder
from sbert_pg.encoder.runner import Runner
from sbert_pg.errors import (
    DamagedEncoderError,
    EncoderError,
    EncodingError,
    UnsupportedEncoderError,
)
from sbert_pg.probes import compatible
from sbert_pg.tuning.fitting import adapt_queries

WIDTH, TOKENS = 24, 4_000
SOME = [text for text in TEXTS if text.strip()]

Reference = Callable[[Path], Any]
Tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def tokenizer(minilm_path: Path) -> Any:
    """MiniLM's, with every character and its most frequent words, which are its first tokens."""
    content = json.loads((minilm_path / "tokenizer.json").read_text("utf-8"))
    words = content["model"]["vocab"]
    content["model"]["vocab"] = {word: n for word, n in words.items() if n < TOKENS}
    return Tokenizers.Tokenizer.from_str(json.dumps(content))


def rows(tokenizer: Any, seed: int = 0) -> np.ndarray:
    shape = (tokenizer.get_vocab_size(), WIDTH)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of_sentence_transformers(path: Path, tokenizer: Any, *more: Any, **general: Any) -> Path:
    st = pytest.importorskip("sentence_transformers")
    static = sentence_transformers_modules().StaticEmbedding(tokenizer, rows(tokenizer))
    st.SentenceTransformer(modules=[static, *more], device="cpu", **general).save_pretrained(
        str(path), create_model_card=False
    )
    return path


def of_model2vec(path: Path, tokenizer: Any, **settings: Any) -> tuple[Path, Any]:
    """A model as model2vec writes it, and model2vec's own reading."""
    model2vec = pytest.importorskip("model2vec")
    config = {"model_type": "model2vec", "architectures": ["StaticModel"]}
    vectors = settings.pop("vectors", rows(tokenizer))
    model = model2vec.StaticModel(vectors, tokenizer, config=config, **settings)
    model.save_pretrained(path)
    return path, model


@pytest.mark.parametrize("end", ["plain", "normalized", "dense"])
def test_as_sentence_transformers(
    tmp_path: Path, tokenizer: Any, reference: Reference, end: str
) -> None:
    modules = sentence_transformers_modules()
    more = {
        "plain": [],
        "normalized": [modules.Normalize()],
        "dense": [modules.Dense(WIDTH, 10), modules.Normalize()],
    }[end]
    prompts = {"query": "a question: ", "document": "a text: "}
    path = of_sentence_transformers(tmp_path / "model", tokenizer, *more, prompts=prompts)
    theirs = reference(path)
    for precision, least in (("fp32", 0.999999), ("fp16", 0.99999), ("int8", 0.999)):
        ours = Encoder.load(path, precision=precision, cache_dir=tmp_path / "cache")
        assert ours.manifest.exporter == "graph"
        assert worst(ours.encode(SOME), theirs.encode(SOME))[0] >= least
        assert worst(ours.encode_query(SOME), theirs.encode_query(SOME))[0] >= least
        assert compatible(ours, ours), ours
    exact = Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
    assert worst(exact.encode_document(SOME), theirs.encode_document(SOME))[1] < 1e-5
    assert compatible(exact, ours).reason
    short = Encoder.load(path, precision="fp32", dimensions=8, cache_dir=tmp_path / "cache")
    assert worst(short.encode(SOME), theirs.encode(SOME, truncate_dim=8))[1] < 1e-5


def test_the_tokenizer_cuts(tmp_path: Path, tokenizer: Any, reference: Reference) -> None:
    """The limit is that of ``tokenizer.json``, without special tokens; there may be none."""
    tokenizer.no_truncation()
    free = of_sentence_transformers(tmp_path / "free", tokenizer)
    tokenizer.enable_truncation(7, direction="left")
    path = of_sentence_transformers(tmp_path / "model", tokenizer)
    ours = Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
    assert ours.max_seq_length == 7
    assert worst(ours.encode(SOME), reference(path).encode(SOME))[1] < 1e-5
    assert ours.statistics.truncated > 3
    assert Encoder.load(free, cache_dir=tmp_path / "cache").max_seq_length is None


@pytest.mark.parametrize("kind", ["plain", "half", "8 bits", "quantised"])
@pytest.mark.parametrize("listed", [True, False], ids=["modules.json", "model2vec alone"])
def test_as_model2vec(tmp_path: Path, tokenizer: Any, kind: str, listed: bool) -> None:
    """With a vocabulary of clusters, weights of tokens and all types of vectors."""
    vectors, size = rows(tokenizer), tokenizer.get_vocab_size()
    settings: dict[str, Any] = {"vectors": vectors}
    if kind == "half":
        settings = {"vectors": vectors.astype(np.float16)}
    elif kind == "8 bits":
        settings = {"vectors": np.rint(vectors * 30).astype(np.int8)}
    elif kind == "quantised":
        random = np.random.default_rng(1)
        settings = {
            "vectors": vectors[:500],
            "token_mapping": random.integers(0, 500, size),
            "weights": random.random(size).astype(np.float32),
        }
    path, theirs = of_model2vec(tmp_path / "model", tokenizer, normalize=True, **settings)
    if not listed:
        (path / "modules.json").unlink()
    ours = Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
    assert ours.spec.normalized
    # Without an unknown token and within the limit the two readings are one.
    unknown = tokenizer.token_to_id("[UNK]")
    texts = [
        text for text in SOME if len(text) < 1000 and unknown not in tokenizer.encode(text).ids
    ]
    assert len(texts) > 40
    assert worst(ours.encode(texts), theirs.encode(texts))[1] < (1e-3 if kind == "half" else 1e-5)


def test_what_model2vec_does_besides(tmp_path: Path, tokenizer: Any) -> None:
    """Unknown tokens are left out, and of a text so many characters are read."""
    path, theirs = of_model2vec(tmp_path / "model", tokenizer, max_length=5)
    (path / "modules.json").unlink()
    ours = Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
    assert ours.max_seq_length == 5
    texts = ["one two three four five six seven", "a 🚀 b 🎉 c", "x" * 400 + " end", "word " * 90]
    np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), atol=1e-5)
    assert ours.statistics.truncated == 3
    with pytest.raises(EncodingError, match=r"Text 1.* has no tokens"):
        ours.encode(["fine", "🚀 🎉"])


def test_texts_without_a_token(tmp_path: Path, tokenizer: Any) -> None:
    """sentence-transformers gives zeros, which have no direction."""
    path = of_sentence_transformers(tmp_path / "model", tokenizer)
    ours = Encoder.load(path, cache_dir=tmp_path / "cache")
    with pytest.raises(EncodingError, match="Text 0, '', has no tokens"):
        ours.encode([""])
    assert not ours.probe_vectors[0].any()
    np.testing.assert_allclose(ours.recomputed_probes(), ours.probe_vectors, atol=1e-5)


def test_long_texts_go_through_in_blocks(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.no_truncation()
    path = of_sentence_transformers(tmp_path / "model", tokenizer)
    ours = Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
    runner = Runner(ours.directory / "model.onnx", ours.manifest.inputs, threads=1)
    table = rows(tokenizer)
    texts = [[(7 * n) % len(table) for n in range(size)] for size in (4095, 4096, 4097, 30_000)]
    for vector, ids in zip(runner.run(texts), texts, strict=True):
        np.testing.assert_allclose(vector, table[ids].mean(axis=0), atol=1e-5)


def test_queries_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    path = of_sentence_transformers(tmp_path / "model", tokenizer)
    ours = Encoder.load(path, cache_dir=tmp_path / "cache")
    fitted = adapt_queries(ours, 2 * np.eye(WIDTH), tmp_path / "fitted")
    assert worst(fitted.encode_query(SOME), 2 * ours.encode_query(SOME))[1] < 1e-5


HOSTILE: dict[str, dict[str, np.ndarray]] = {
    "no tensor": {"other": np.zeros((3, 3), np.float32)},
    "no table": {"embeddings": np.zeros(TOKENS, np.float32)},
    "an empty table": {"embeddings": np.zeros((0, 4), np.float32)},
    "a mapping beyond the table": {
        "embeddings": np.ones((5, 4), np.float32), "mapping": np.full(TOKENS, 5),
    },
    "a negative mapping": {
        "embeddings": np.ones((5, 4), np.float32), "mapping": np.full(TOKENS, -1),
    },
    "weights that do not fit": {
        "embeddings": np.ones((TOKENS, 4), np.float32), "weights": np.ones(3, np.float32),
    },
    "too few rows": {"embeddings": np.ones((20, 4), np.float32)},
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_does_not_fit_is_refused(tmp_path: Path, tokenizer: Any, case: str) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    save_file(HOSTILE[case], tmp_path / "model.safetensors")
    module = {
        "idx": 0,
        "name": "0",
        "path": "",
        "type": "sentence_transformers.models.StaticEmbedding",
    }
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(DamagedEncoderError, match=r"model\.safetensors"):
        Encoder.load(tmp_path, cache_dir=tmp_path / "cache")


def test_pickles_and_other_modules_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = of_sentence_transformers(tmp_path / "model", tokenizer)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UnsupportedEncoderError, match="pickle"):
        Encoder.load(path, cache_dir=tmp_path / "cache")
    modules = json.loads((path / "modules.json").read_text())
    modules.append(
        {"idx": 1, "name": "1", "path": "1", "type": "sentence_transformers.models.LSTM"}
    )
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "pytorch_model.bin").rename(path / "model.safetensors")
    with pytest.raises(EncoderError, match="LSTM"):
        Encoder.load(path, cache_dir=tmp_path / "cache")
