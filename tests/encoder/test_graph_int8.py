"""The int8 form against fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sbert_pg.encoder.encoder import Encoder
from sbert_pg.encoder.files import Weights
from sbert_pg.encoder.products import Range, Seen, best_range, integers
from sbert_pg.errors import DamagedEncoderError, DeclarationError


def test_agreement_of_the_real_minilm(fp32: Encoder, int8: Encoder) -> None:
    texts = [f"Package number {n} draws {word} on a map" for n in range(20) for word in
             ("rivers", "Straßen", "clouds and rain", "1,204 mountains")]  # fmt: skip
    cosine = (fp32.encode(texts) * int8.encode(texts)).sum(1)
    assert cosine.mean() >= 0.997
    assert int8.directory.joinpath("model.onnx").stat().st_size < 26e6


def test_integers_are_within_half_a_step() -> None:
    weight = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float32)
    stored, scales = integers(weight, axis=0)
    assert np.abs(stored * scales - weight).max() <= scales.max() / 2 + 1e-6


def test_a_range_is_cut_where_one_token_alone_is_huge() -> None:
    rows = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    rows[0, 0] = 60
    seen = Seen(np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0), rows)
    found = best_range(seen, np.ones(16, np.float32))
    whole = Range.of(float(seen.lowest.min()), float(seen.highest.max()))
    assert found.scale < whole.scale / 2


def test_an_unknown_precision_is_named(minilm_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match=r"int7.*fp32-plain"):
        Encoder.load(minilm_path, precision="int7", cache_dir=tmp_path)


def test_weights_come_in_half_precision_too(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = torch.tensor([[1.5, -2.0], [0.25, 3.0]])
    path = tmp_path / "model.safetensors"
    save_file({"b": values.bfloat16(), "h": values.half()}, path)
    weights = Weights([path])
    for name in ("b", "h"):
        np.testing.assert_array_equal(weights.get(name, (2, 2)), values.numpy())
    with pytest.raises(DamagedEncoderError, match="shape"):
        weights.get("b", (3, 2))
    with pytest.raises(DamagedEncoderError, match="nothing"):
        weights.get("nothing")


Damage = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:60], lambda data: data[:-4], lambda data: b"\xff" * 8 + data[8:]],
    ids=["header", "data", "length"],
)
def test_damaged_weights_are_refused(tmp_path: Path, damage: Damage) -> None:
    from safetensors.numpy import save

    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(save({"a": np.zeros(8, np.float32)})))
    with pytest.raises(DamagedEncoderError, match=r"model\.safetensors"):
        Weights([path])
