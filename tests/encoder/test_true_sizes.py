"""The well-known models at their true sizes, with random weights and made-up vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_models import TEXTS, Make, Wish, worst, write_cross_encoder

from sbert_pg.encoder import Encoder, Reranker

BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
MODELS = {
    "all-MiniLM-L6-v2": Wish(
        "bert",
        config={**BASE, "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
        vocabulary=30_522,
        max_seq_length=256,
        scale=0.03,
    ),
    "all-mpnet-base-v2": Wish(
        "mpnet", config=dict(BASE), vocabulary=30_527, max_seq_length=384, scale=0.03
    ),
    "multi-qa-mpnet-base-dot-v1": Wish(
        "mpnet",
        config=dict(BASE),
        vocabulary=30_527,
        pooling="cls",
        layers=(),
        max_seq_length=512,
        general={"similarity_fn_name": "dot"},
        scale=0.03,
        seed=1,
    ),
    "paraphrase-multilingual-mpnet-base-v2": Wish(
        "xlm-roberta",
        config=dict(BASE),
        vocabulary=250_002,
        layers=(),
        max_seq_length=128,
        scale=0.03,
    ),
    "sentence-camembert-base": Wish(
        "camembert",
        config=dict(BASE),
        layers=(),
        vocabulary=32_005,
        max_seq_length=128,
        scale=0.03,
    ),
    "embeddinggemma-300m": Wish(
        "gemma3_text",
        config={"hidden_size": 768, "num_hidden_layers": 24, "num_attention_heads": 3,
                "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 1152,
                "sliding_window": 512, "use_bidirectional_attention": True,
                "query_pre_attn_scalar": 256, "max_position_embeddings": 2048},
        vocabulary=20_000,
        layers=((3072, "Identity", False), (768, "Identity", False), "normalize"),
        max_seq_length=1024,
        scale=0.03,
    ),
    # A quarter of its 28 layers.
    "Qwen3-Embedding-0.6B": Wish(
        "qwen3",
        config={"hidden_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 16,
                "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "max_position_embeddings": 32_768},
        vocabulary=20_000,
        pooling="lasttoken",
        max_seq_length=1024,
        scale=0.03,
    ),
}  # fmt: skip

RERANKERS = {
    "bge-reranker-base": Wish(
        "xlm-roberta", config=dict(BASE), vocabulary=250_002, max_seq_length=512, scale=0.03
    ),
    "crossencoder-camembert-base": Wish(
        "camembert", config=dict(BASE), vocabulary=32_005, max_seq_length=128, scale=0.03
    ),
    "gte-reranker-modernbert-base": Wish(
        "modernbert",
        config={**BASE, "num_hidden_layers": 22, "intermediate_size": 1152,
                "classifier_pooling": "mean"},
        vocabulary=50_368,
        max_seq_length=512,
        scale=0.03,
    ),
    "gte-multilingual-reranker-base": Wish(
        "gte", config={**BASE, "type_vocab_size": 1}, vocabulary=250_048, max_seq_length=512,
        scale=0.03,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_true_sizes(
    make_model: Make, reference: Callable[[Path], Any], encoder_cache: Path, name: str
) -> None:
    wish = MODELS[name]
    path = make_model(wish)
    ours = Encoder.load(path, precision="fp32", cache_dir=encoder_cache)
    assert ours.max_seq_length == wish.max_seq_length
    texts = TEXTS[::2]
    theirs = reference(path).encode(texts)
    cosine, difference = worst(ours.encode(texts), theirs)
    assert cosine >= 0.99999
    assert difference <= 1e-5 * max(1.0, float(abs(theirs).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", RERANKERS)
def test_true_sizes_of_rerankers(tmp_path: Path, encoder_cache: Path, name: str) -> None:
    cross_encoders = pytest.importorskip("sentence_transformers")
    write_cross_encoder(RERANKERS[name], tmp_path / "model")
    ours = Reranker.load(tmp_path / "model", precision="fp32", cache_dir=encoder_cache)
    pairs = list(zip(TEXTS[::3], TEXTS[1::3], strict=False))
    theirs = np.asarray(
        cross_encoders.CrossEncoder(str(tmp_path / "model"), device="cpu").predict(pairs)
    )
    assert np.ptp(theirs) > 1e-3, "scores that differ"
    np.testing.assert_allclose(ours.score_pairs(pairs), theirs, atol=1e-5)
