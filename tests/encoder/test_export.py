"""Architectures that go through torch give the same kind of directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encoder_models import SMALL, TEXTS, Make, Wish, worst

from sbert_pg.encoder import Encoder
from sbert_pg.errors import UnsupportedEncoderError

#: Not all the same road through transformers: shared layers, factorised embeddings, no LayerNorm.
WISHES = {
    "albert": Wish("albert", config={**SMALL, "embedding_size": 16}),
    "electra": Wish("electra", config={**SMALL, "embedding_size": 16}, pooling=("cls", "mean")),
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


def test_torch_has_fp32_only(make_model: Make, encoder_cache: Path) -> None:
    path = make_model(WISHES["albert"])
    with pytest.raises(UnsupportedEncoderError, match="precision='fp32'"):
        Encoder.load(path, precision="int8", cache_dir=encoder_cache)


def test_prompts_left_out_of_pooling_through_torch(
    make_model: Make, reference: Callable[[Path], Any], encoder_cache: Path
) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
    wish = Wish(
        "electra",
        config={**SMALL, "embedding_size": 16},
        include_prompt=False,
        pooling=("weightedmean", "max", "lasttoken", "cls"),
        general={"prompts": {"query": "find this: "}},
    )
    path = make_model(wish)
    ours = Encoder.load(path, precision="fp32", cache_dir=encoder_cache)
    cosine, difference = worst(ours.encode_query(TEXTS), reference(path).encode_query(TEXTS))
    assert cosine >= 0.99999
    assert difference <= 1e-5
