"""The well-known models at their true sizes, with random weights and made-up vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encoder_models import TEXTS, Make, Wish, worst

from sbert_pg.encoder import Encoder

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
}


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
