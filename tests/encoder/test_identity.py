"""Which encoders share a vector space: every case that the specs and the probes have to decide."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sbert_pg.encoder import Encoder, conversion
from sbert_pg.probes import (
    EXPORT_MIN_COSINE,
    PRECISION_MEAN_COSINE,
    PRECISION_MIN_COSINE,
    agreement_of,
    compatible,
    compatible_specs,
)
from sbert_pg.spec import EncoderSpec

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def base(fp32: Encoder) -> Encoder:
    return fp32


@pytest.fixture
def changed(minilm_path: Path, tmp_path: Path) -> Callable[[Change], Encoder]:
    """The real model with something changed in its files."""

    def make(change: Change) -> Encoder:
        path = tmp_path / "changed"
        shutil.copytree(minilm_path, path)
        change(path)
        return Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")

    return make


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def anonymous(spec: EncoderSpec) -> EncoderSpec:
    """A spec of which only what an application declares is known."""
    return EncoderSpec(name=spec.name, dimensions=spec.dimensions, similarity=spec.similarity)


def test_itself(base: Encoder) -> None:
    verdict = compatible(base, Encoder.open(base.directory, threads=1))
    assert verdict
    assert "equal" in verdict.reason


def test_int8_and_fp32(base: Encoder, int8: Encoder) -> None:
    assert int8.spec.fingerprint != base.spec.fingerprint
    verdict = compatible(base, int8)
    assert verdict, verdict.reason
    assert verdict.agreement is not None
    # Room on both sides: what int8 reaches, and what the thresholds ask for.
    assert verdict.agreement.min_cosine > PRECISION_MIN_COSINE + 0.01
    assert verdict.agreement.mean_cosine > PRECISION_MEAN_COSINE + 0.005


@pytest.mark.slow
def test_another_exporter(
    base: Encoder, minilm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("torch", "sentence_transformers", "onnxscript"):
        pytest.importorskip(package, reason="the other exporter is torch's")
    from sbert_pg.encoder.convert import graph

    monkeypatch.setattr(graph, "ARCHITECTURES", ())
    other = Encoder.load(minilm_path, precision="fp32", cache_dir=tmp_path)
    assert other.manifest.exporter == "torch"
    # It computes the same, so it is the same encoder by its fingerprint already.
    assert compatible(base, other)
    agreement = agreement_of(base.probe_vectors, other.probe_vectors)
    assert agreement.min_cosine > 0.999999
    # And it is recognised by its probes where the digests are not known.
    unknown = replace(other.spec, weights_digest=None, tokenizer_digest=None)
    verdict = compatible_specs(base.spec, base.probe_vectors, unknown, other.probe_vectors)
    assert verdict, verdict.reason


def test_another_batch_shape_and_thread_count(base: Encoder) -> None:
    from sbert_pg.probes import PROBES

    other = Encoder.open(base.directory, threads=2)
    alone = np.stack([other.encode(text, prompt="") for text in PROBES])
    agreement = agreement_of(alone, base.probe_vectors)
    assert agreement.min_cosine > EXPORT_MIN_COSINE


def pooling(path: Path) -> None:
    edit(
        path / "1_Pooling" / "config.json",
        pooling_mode_cls_token=True,
        pooling_mode_mean_tokens=False,
    )


def no_normalisation(path: Path) -> None:
    modules = json.loads((path / "modules.json").read_text())
    (path / "modules.json").write_text(json.dumps(modules[:-1]))


def prompt(path: Path) -> None:
    edit(path / "config_sentence_transformers.json", prompts={"query": "query: "})


def shorter(path: Path) -> None:
    edit(path / "sentence_bert_config.json", max_seq_length=128)


def cased(path: Path) -> None:
    edit(path / "tokenizer_config.json", do_lower_case=False, tokenizer_class="BertTokenizer")


def similarity(path: Path) -> None:
    edit(path / "config_sentence_transformers.json", similarity_fn_name="euclidean")


def fine_tuned(path: Path) -> None:
    """As little as a short fine-tuning changes: one percent of each weight matrix."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    random = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "layer" in name:
            noise = random.standard_normal(tensor.shape).astype(np.float32)
            tensors[name] = tensor + 0.02 * tensor.std() * noise
    file.unlink()
    save_file(tensors, file)


#: The change, what the message says, and whether the probes alone see it.
CASES: list[tuple[Change, str, bool]] = [
    (pooling, "pooling", True),
    (no_normalisation, "normalisation", True),
    (prompt, "prompts", False),
    (shorter, "max_seq_length", True),
    (cased, "another tokenizer", True),
    (similarity, "similarity function", True),
    (fine_tuned, "not known to be the same", True),
]


@pytest.mark.parametrize(
    ("change", "reason", "seen"), CASES, ids=[change.__name__ for change, _, _ in CASES]
)
def test_told_apart(
    base: Encoder,
    changed: Callable[[Change], Encoder],
    change: Change,
    reason: str,
    seen: bool,
) -> None:
    other = changed(change)
    assert other.spec.fingerprint != base.spec.fingerprint
    verdict = compatible(base, other)
    assert not verdict
    assert reason in verdict.reason
    assert not compatible(other, base)
    # The probes alone, as where nothing but their vectors is known of the other side.
    alone = compatible_specs(
        anonymous(base.spec), base.probe_vectors, anonymous(other.spec), other.probe_vectors
    )
    assert bool(alone) is not seen, alone.reason


def test_truncated_vectors(base: Encoder) -> None:
    short = Encoder.open(base.directory, dimensions=128)
    verdict = compatible(base, short)
    assert not verdict
    assert "384 dimensions against 128" in verdict.reason
    assert compatible(short, Encoder.open(base.directory, dimensions=128))


def test_below_its_floor_a_precision_is_refused(
    minilm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sbert_pg.errors import ConversionError

    floor = conversion.Floor(mean=0.99999, worst=0.99999)
    monkeypatch.setitem(conversion.FLOORS, "int8-blocks", floor)
    with pytest.raises(ConversionError, match=r"0\.99999.*precision='fp32'"):
        Encoder.load(minilm_path, precision="int8-blocks", cache_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.name == "model.onnx"]
