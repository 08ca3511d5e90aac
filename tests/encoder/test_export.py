"""Architectures that go through torch give the same kind of directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encoder_models import SMALL, TEXTS, Make, Wish, worst
from tiny_model import edit, write_tiny

from sbert_pg.encoder import Encoder
from sbert_pg.errors import DamagedEncoderError, EncoderError, UnsupportedEncoderError

#: Not all the same road through transformers: attention by distance, norms first.
WISHES = {
    "deberta-v2": Wish("deberta-v2", config={**SMALL, "relative_attention": True}),
    "megatron-bert": Wish("megatron-bert", config=SMALL, pooling=("cls", "mean")),
}


@pytest.mark.parametrize("name", WISHES)
def test_exported_by_torch(
    make_model: Make, reference: Callable[[Path], Any], encoder_cache: Path, name: str
) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
    path = make_model(WISHES[name])
    ours = Encoder.load(path, precision="fp32", cache_dir=encoder_cache)
    assert ours.manifest.exporter == "torch"
    cosine, difference = worst(ours.encode(TEXTS), reference(path).encode(TEXTS))
    assert cosine >= 0.99999
    assert difference <= 1e-5


def test_weights_of_another_architecture_are_refused(make_model: Make, tmp_path: Path) -> None:
    """transformers takes random numbers for what has another name, and as many there are."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
    path = Path(shutil.copytree(make_model(Wish("bert")), tmp_path / "model"))
    edit(path / "config.json", model_type="deberta-v2")
    with pytest.raises(
        DamagedEncoderError, match="tensors that a model of type 'deberta-v2' needs"
    ):
        Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")


def test_torch_has_fp32_only(make_model: Make, encoder_cache: Path) -> None:
    path = make_model(WISHES["megatron-bert"])
    with pytest.raises(UnsupportedEncoderError, match="precision='fp32'"):
        Encoder.load(path, precision="int8", cache_dir=encoder_cache)


def test_prompts_left_out_of_pooling_through_torch(
    make_model: Make, reference: Callable[[Path], Any], encoder_cache: Path
) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
    wish = Wish(
        "megatron-bert",
        config=SMALL,
        include_prompt=False,
        pooling=("weightedmean", "max", "lasttoken", "cls"),
        general={"prompts": {"query": "find this: "}},
    )
    path = make_model(wish)
    ours = Encoder.load(path, precision="fp32", cache_dir=encoder_cache)
    cosine, difference = worst(ours.encode_query(TEXTS), reference(path).encode_query(TEXTS))
    assert cosine >= 0.99999
    assert difference <= 1e-5


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "no-such-architecture"}, "no-such-architecture.*never run"),
        ({"model_type": "megatron-bert", "num_hidden_layers": 100_000}, "'num_hidden_layers'"),
        ({"model_type": "megatron-bert", "intermediate_size": 10**8}, "'intermediate_size'"),
        ({"model_type": "megatron-bert", "vocab_size": 9_000_000}, "parameters"),
        ({"model_type": "megatron-bert", "num_hidden_layers": 400}, "parameters"),
        ({"model_type": "megatron-bert", "num_attention_heads": 0}, "megatron-bert"),
        ({"model_type": "megatron-bert", "num_attention_heads": "x"}, "megatron-bert"),
        ({"model_type": "megatron-bert", "type_vocab_size": -5}, "'type_vocab_size'"),
    ],
)
def test_a_configuration_that_the_weights_do_not_fill_is_refused(
    tmp_path: Path, values: dict[str, Any], named: str
) -> None:
    """Before transformers makes up what is missing, whatever its size."""
    for package in ("torch", "transformers", "sentence_transformers", "onnxscript"):
        pytest.importorskip(package)
    model = write_tiny(tmp_path / "model")
    edit(model / "config.json", **values)
    with pytest.raises(EncoderError, match=named) as caught:
        Encoder.load(model, precision="fp32", cache_dir=tmp_path / "cache")
    assert str(model / "config.json") in str(caught.value)
