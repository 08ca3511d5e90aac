"""ModernBERT, NomicBERT and GTE against sentence-transformers (torch, fp32)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_models import SMALL, TEXTS, Make, Wish, edit, worst

from sbert_pg.encoder import Encoder
from sbert_pg.errors import EncoderError, UnsupportedEncoderError

MODERN = {**SMALL, "num_hidden_layers": 4, "local_attention": 16}
MODELS = {
    "modernbert": Wish("modernbert", config=MODERN, max_seq_length=256),
    "modernbert, biases": Wish(
        "modernbert",
        config={**MODERN, "norm_bias": True, "attention_bias": True, "mlp_bias": True,
                "global_attn_every_n_layers": 2, "local_attention": 6},
        max_seq_length=100,
        pooling="cls",
    ),
    "nomic_bert": Wish("nomic_bert", max_seq_length=256),
    "gte": Wish("gte", max_seq_length=256, pooling=("cls", "lasttoken")),
    "gte, no token types": Wish("gte", config={**SMALL, "type_vocab_size": 0}),
}  # fmt: skip

Reference = Callable[[Path], Any]


@pytest.mark.parametrize("name", MODELS)
def test_vectors(make_model: Make, reference: Reference, encoder_cache: Path, name: str) -> None:
    path = make_model(MODELS[name])
    expected = reference(path).encode(TEXTS)
    for precision, least, room in (
        ("fp32", 0.99999, 1e-5), ("fp32-plain", 0.99999, 1e-5), ("fp16", 0.9999, 1e-2)
    ):  # fmt: skip
        ours = Encoder.load(path, precision=precision, cache_dir=encoder_cache)
        assert ours.manifest.exporter == "graph"
        assert ours.max_seq_length == MODELS[name].max_seq_length
        cosine, difference = worst(ours.encode(TEXTS), expected)
        assert cosine >= least
        assert difference <= room


@pytest.mark.parametrize("name", ["modernbert", "gte"])
def test_int8(make_model: Make, reference: Reference, encoder_cache: Path, name: str) -> None:
    path = make_model(MODELS[name])
    ours = Encoder.load(path, precision="int8", cache_dir=encoder_cache)
    cosines = [worst(a[None], b[None])[0] for a, b in zip(
        ours.encode(TEXTS), reference(path).encode(TEXTS), strict=True)]  # fmt: skip
    assert np.mean(cosines) > 0.99


def test_a_window_is_no_square(make_model: Make, encoder_cache: Path) -> None:
    """What a text of many tokens needs of a windowed layer grows with its length alone."""
    onnx = pytest.importorskip("onnx")
    path = make_model(MODELS["modernbert"])
    ours = Encoder.load(path, precision="fp32", cache_dir=encoder_cache)
    model = onnx.load(ours.directory / "model.onnx")
    windowed = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert len(windowed) == 2, "layers 1 and 2 of 4"
    from sbert_pg.encoder.runner import Runner

    runner = Runner(ours.directory / "model.onnx", ours.manifest.inputs, threads=1)
    ids = [5 + n % 500 for n in range(3000)]
    (long,) = runner.run([ids])
    assert np.isfinite(long).all()


HOSTILE: dict[str, dict[str, Any]] = {
    "an unknown key": {"attention_sink": 4},
    "another rotation": {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
    "a scaling": {"rope_parameters": {"sliding_attention": {"factor": 2.0}}},
    "no heads": {"num_attention_heads": 0},
    "heads that do not fit": {"num_attention_heads": 5},
    "layers that are missing": {"num_hidden_layers": 9, "layer_types": None},
    "kinds of layers": {"layer_types": ["full_attention"]},
    "kinds that are none": {"layer_types": 3},
    "a window of none": {"local_attention": 0},
    "another width": {"hidden_size": 64},
    "an activation": {"hidden_activation": "laplace"},
    "a base": {"rope_parameters": {"full_attention": {"rope_theta": "x"}}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_understood_is_refused(make_model: Make, tmp_path: Path, case: str) -> None:
    path = Path(shutil.copytree(make_model(MODELS["modernbert"]), tmp_path / "model"))
    edit(path / "config.json", **HOSTILE[case])
    with pytest.raises(EncoderError) as caught:
        Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
    if case == "an unknown key":
        assert isinstance(caught.value, UnsupportedEncoderError)
        assert "attention_sink" in str(caught.value)
