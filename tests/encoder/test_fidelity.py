"""Every vector against sentence-transformers itself (torch, fp32), in the model's own settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_models import TEXTS, Make, Wish, worst

from sbert_pg.encoder import Encoder

MIN_COSINE = 0.99999
MAX_DIFFERENCE = 1e-5
#: A third of the texts with every oddity, for options that act on all texts alike.
FEW = [*TEXTS[:-7:3], *TEXTS[-7:]]
NATIVE = ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet")

Reference = Callable[[Path], Any]


def assert_same(ours: np.ndarray, theirs: np.ndarray, *, unit: bool = True) -> None:
    """Cosine at least .99999 for every text; differences below 1e-5 of the vectors' size."""
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    cosine, difference = worst(ours, theirs)
    size = 1.0 if unit else max(1.0, float(np.abs(theirs).max()))
    assert cosine >= MIN_COSINE
    assert difference <= MAX_DIFFERENCE * size


@pytest.fixture
def both(
    make_model: Make, reference: Reference, encoder_cache: Path
) -> Callable[[Wish], tuple[Encoder, Any]]:
    def load(wish: Wish) -> tuple[Encoder, Any]:
        path = make_model(wish)
        encoder = Encoder.load(path, precision="fp32", cache_dir=encoder_cache)
        return encoder, reference(path)

    return load


Both = Callable[[Wish], tuple[Encoder, Any]]


@pytest.mark.parametrize("architecture", NATIVE)
def test_architectures(both: Both, architecture: str) -> None:
    ours, theirs = both(Wish(architecture))
    assert ours.manifest.exporter == "graph"
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))


@pytest.mark.parametrize("architecture", ["bert", "mpnet", "xlm-roberta"])
def test_plain_operators_for_other_providers(
    make_model: Make, reference: Reference, encoder_cache: Path, architecture: str
) -> None:
    onnx = pytest.importorskip("onnx")
    path = make_model(Wish(architecture))
    ours = Encoder.load(path, precision="fp32-plain", cache_dir=encoder_cache)
    assert_same(ours.encode(FEW), reference(path).encode(FEW))
    model = onnx.load(ours.directory / "model.onnx")
    assert {node.op_type for node in model.graph.node if node.domain} == {"Gelu"}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"hidden_act": "gelu_new"}),
        ("bert", {"layer_norm_eps": 1e-5, "type_vocab_size": 3}),
        ("bert", {"num_hidden_layers": 1, "num_attention_heads": 1}),
        ("distilbert", {"activation": "relu"}),
        ("distilbert", {"sinusoidal_pos_embds": True}),
        ("mpnet", {"relative_attention_num_buckets": 64}),
        ("xlm-roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_settings_of_the_transformer(both: Both, architecture: str, config: dict[str, Any]) -> None:
    wish = Wish(architecture)
    wish.config.update(config)
    ours, theirs = both(wish)
    assert_same(ours.encode(FEW), theirs.encode(FEW))


@pytest.mark.parametrize(
    "pooling",
    [
        "cls",
        "max",
        "mean",
        "mean_sqrt_len_tokens",
        "weightedmean",
        "lasttoken",
        ("cls", "max"),
        ("mean", "mean_sqrt_len_tokens", "lasttoken"),
        ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"),
    ],
    ids=str,
)
def test_pooling(both: Both, pooling: str | tuple[str, ...]) -> None:
    ours, theirs = both(Wish(pooling=pooling, layers=()))
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS), unit=False)
    assert ours.spec.pooling == ("+".join(pooling) if isinstance(pooling, tuple) else pooling)


@pytest.mark.parametrize("architecture", ["mpnet", "roberta"])
@pytest.mark.parametrize("pooling", ["cls", "lasttoken", ("max", "weightedmean")], ids=str)
def test_pooling_elsewhere(both: Both, architecture: str, pooling: str | tuple[str, ...]) -> None:
    ours, theirs = both(Wish(architecture, pooling=pooling, layers=()))
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS), unit=False)


@pytest.mark.parametrize(
    "layers",
    [
        (),
        ((32, "Tanh", True),),
        ((32, "Identity", False), "normalize"),
        ((64, "ReLU", True), (24, "GELU", True), "normalize"),
        ("normalize", (24, "Sigmoid", True)),
        ((24, "SiLU", True), (24, "Mish", False), (24, "ELU", True), (24, "LeakyReLU", True)),
        ((24, "Softplus", True),),
    ],
    ids=str,
)
def test_layers_after_pooling(both: Both, layers: Any) -> None:
    ours, theirs = both(Wish(layers=layers))
    vectors = ours.encode(TEXTS)
    assert_same(vectors, theirs.encode(TEXTS), unit=False)
    assert ours.spec.normalized is (layers[-1:] == ("normalize",))
    if ours.spec.normalized:
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


PROMPTS = {
    "query": "Represent this query: ",
    "document": "text for retrieval: ",
    "topic": "Topic: ",
}


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({}, None),
        (PROMPTS, None),
        (PROMPTS, "topic"),
        (PROMPTS, "query"),
        ({"query": "q: ", "passage": "p: "}, "query"),
        ({"query": "", "document": "d: "}, None),
    ],
    ids=str,
)
def test_prompts(both: Both, prompts: dict[str, str], default: str | None) -> None:
    general = {"prompts": prompts, "default_prompt_name": default}
    ours, theirs = both(Wish(general=general))
    assert_same(ours.encode(FEW), theirs.encode(FEW))
    assert_same(ours.encode_query(FEW), theirs.encode_query(FEW))
    assert_same(ours.encode_document(FEW), theirs.encode_document(FEW))
    assert_same(ours.encode(FEW, prompt="any: "), theirs.encode(FEW, prompt="any: "))
    for name in prompts:
        assert_same(ours.encode(FEW, prompt_name=name), theirs.encode(FEW, prompt_name=name))
    if prompts.get("query"):
        plain = ours.encode(FEW, prompt="")
        assert worst(plain, ours.encode_query(FEW))[0] < 0.999


@pytest.mark.parametrize("architecture", ["bert", "mpnet", "xlm-roberta"])
@pytest.mark.parametrize(
    "pooling", ["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"]
)
def test_prompts_left_out_of_pooling(both: Both, architecture: str, pooling: str) -> None:
    wish = Wish(
        architecture,
        pooling=pooling,
        include_prompt=False,
        layers=(),
        general={"prompts": PROMPTS},
    )
    ours, theirs = both(wish)
    # A text longer than the limit and a prompt are cut together.
    assert_same(ours.encode_query(FEW), theirs.encode_query(FEW), unit=False)
    assert_same(ours.encode(FEW), theirs.encode(FEW), unit=False)


@pytest.mark.parametrize("limit", [8, 33, 512])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "mpnet"])
def test_max_seq_length(both: Both, architecture: str, limit: int) -> None:
    ours, theirs = both(Wish(architecture, max_seq_length=limit))
    assert ours.max_seq_length == limit
    assert_same(ours.encode(FEW), theirs.encode(FEW))


def test_limit_of_the_tokenizer(both: Both) -> None:
    wish = Wish(max_seq_length=None, config={**Wish().config, "max_position_embeddings": 96})
    ours, theirs = both(wish)
    assert ours.max_seq_length == theirs.max_seq_length == 96
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("lower", [False, True])
def test_casing(both: Both, architecture: str, lower: bool) -> None:
    ours, theirs = both(Wish(architecture, cased=True, do_lower_case=lower))
    assert_same(ours.encode(FEW), theirs.encode(FEW))
    pair = ours.encode(["Apple PIE", "apple pie"])
    assert bool(np.allclose(pair[0], pair[1], atol=1e-6)) is lower


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(both: Both, similarity: str) -> None:
    ours, theirs = both(Wish(layers=(), general={"similarity_fn_name": similarity}))
    assert ours.spec.similarity == similarity
    vectors = ours.encode(TEXTS[:20])
    expected = np.asarray(theirs.similarity(vectors, vectors))
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(ours.similarity(vectors, vectors), expected, atol=1e-4 * scale)


def test_truncated_dimensions(both: Both, encoder_cache: Path, make_model: Make) -> None:
    ours, theirs = both(Wish(general={"truncate_dim": 16}))
    assert ours.dimensions == 16
    assert ours.spec.normalized is False
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))
    path = make_model(Wish())
    cut = Encoder.load(path, precision="fp32", dimensions=20, cache_dir=encoder_cache)
    whole, theirs = both(Wish())
    assert_same(cut.encode(TEXTS), theirs.encode(TEXTS, truncate_dim=20))
    assert_same(
        cut.encode(TEXTS, normalize=True),
        theirs.encode(TEXTS, truncate_dim=20, normalize_embeddings=True),
    )
    assert cut.probe_vectors.shape == (whole.probe_vectors.shape[0], 20)


def test_one_text_gives_one_vector(both: Both) -> None:
    ours, theirs = both(Wish())
    assert_same(ours.encode("one text")[None], theirs.encode("one text")[None])
    assert ours.encode([]).shape == (0, ours.dimensions)


def test_a_transformer_alone_is_pooled_by_mean(
    make_model: Make, reference: Reference, encoder_cache: Path
) -> None:
    path = make_model(Wish()).parent / "transformer"
    ours = Encoder.load(path, precision="fp32", cache_dir=encoder_cache)
    assert_same(ours.encode(TEXTS), reference(path).encode(TEXTS), unit=False)


def test_the_real_minilm(minilm_path: Path, reference: Reference, fp32: Encoder) -> None:
    assert_same(fp32.encode(TEXTS), reference(minilm_path).encode(TEXTS))
