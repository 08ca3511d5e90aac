"""NomicBERT and GTE as their first repositories have them: settings of their own, and code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_models import SMALL, TEXTS, Make, Wish, edit, worst, write_cross_encoder

from sbert_pg.encoder import Encoder, Reranker
from sbert_pg.errors import UnsupportedEncoderError

#: Settings of the repositories, beside those that say a size.
NOMIC: dict[str, Any] = {
    "model_type": "nomic_bert", "architectures": ["NomicBertModel"],
    "auto_map": {"AutoConfig": "configuration_hf_nomic_bert.NomicBertConfig",
                 "AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"},
    "activation_function": "swiglu", "attn_pdrop": 0.0, "bos_token_id": None, "causal": False,
    "dense_seq_output": True, "embd_pdrop": 0.0, "eos_token_id": None, "fused_bias_fc": True,
    "fused_dropout_add_ln": True, "initializer_range": 0.02, "layer_norm_epsilon": 1e-12,
    "max_trained_positions": 2048, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
    "n_positions": 8192, "pad_vocab_size_multiple": 64, "parallel_block": False,
    "parallel_block_tied_norm": False, "prenorm": False, "qkv_proj_bias": False,
    "reorder_and_upcast_attn": False, "resid_pdrop": 0.0, "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None, "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True, "summary_activation": None, "summary_first_dropout": 0.0,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "torch_dtype": "float32", "transformers_version": "4.37.2", "type_vocab_size": 2,
    "use_cache": True, "use_flash_attn": True, "use_rms_norm": False, "use_xentropy": True,
}  # fmt: skip
GTE: dict[str, Any] = {
    "model_type": "new", "architectures": ["NewModel"],
    "auto_map": {"AutoConfig": "configuration.NewConfig", "AutoModel": "modeling.NewModel"},
    "attention_probs_dropout_prob": 0.0, "classifier_dropout": None, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
    "initializer_range": 0.02, "layer_norm_eps": 1e-12, "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False, "logn_attention_scale": False, "max_position_embeddings": 8192,
    "pack_qkv": True, "pad_token_id": 0, "position_embedding_type": "rope", "rope_scaling": None,
    "rope_theta": 160000, "torch_dtype": "float32", "transformers_version": "4.39.1",
    "type_vocab_size": 1, "unpad_inputs": False, "use_memory_efficient_attention": False,
}  # fmt: skip
SIZES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_inner": "intermediate_size"}  # fmt: skip
MODELS = {
    "nomic": Wish("nomic_bert", max_seq_length=256),
    "new": Wish("gte", config={**SMALL, "type_vocab_size": 0}, pooling="cls", max_seq_length=256),
    "gte": Wish("gte", max_seq_length=256),
}

Reference = Callable[[Path], Any]


def as_published(source: Path, target: Path, name: str, **changes: Any) -> Path:
    """A copy of a model with the configuration that a repository with code has."""
    path = Path(shutil.copytree(source, target))
    native = json.loads((path / "config.json").read_text())
    if name == "nomic":
        sizes = {old: native[new] for old, new in SIZES.items()}
        config = {**NOMIC, **sizes, "vocab_size": native["vocab_size"]}
    else:
        sizes = {key: native[key] for key in (*SIZES.values(), "vocab_size", "type_vocab_size")}
        config = {**GTE, **sizes, **({"model_type": "gte"} if name == "gte" else {})}
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_those_of_transformers_form(
    make_model: Make, reference: Reference, tmp_path: Path, name: str
) -> None:
    native = make_model(MODELS[name])
    path = as_published(native, tmp_path / "model", name)
    ours = Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
    assert ours.manifest.exporter == "graph"
    assert worst(ours.encode(TEXTS), reference(native).encode(TEXTS))[1] <= 1e-5


def test_a_cross_encoder_of_gte(tmp_path: Path) -> None:
    """As gte-multilingual-reranker-base, whose tensors are called otherwise too."""
    from safetensors.numpy import load_file, save_file
    from sentence_transformers import CrossEncoder

    write_cross_encoder(MODELS["new"], tmp_path / "native")
    kind = ["NewForSequenceClassification"]
    path = as_published(tmp_path / "native", tmp_path / "model", "new", architectures=kind)
    weights = load_file(path / "model.safetensors")
    renamed = {name.replace("gte.", "new."): tensor for name, tensor in weights.items()}
    save_file(renamed, path / "model.safetensors", {"format": "pt"})
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    expected = CrossEncoder(str(tmp_path / "native"), device="cpu").predict(pairs)
    ours = Reranker.load(path, precision="fp32", cache_dir=tmp_path / "cache").score_pairs(pairs)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_the_scaling_of_gte(make_model: Make, reference: Reference, tmp_path: Path) -> None:
    """As in gte-base-en-v1.5; transformers has no such scaling, so its frequencies are replaced."""
    torch = pytest.importorskip("torch")
    native = make_model(MODELS["new"])
    path = as_published(
        native, tmp_path / "model", "new", rope_theta=500000,
        rope_scaling={"type": "ntk", "factor": 2.0},
    )  # fmt: skip
    ours = Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache").encode(TEXTS)
    theirs, width = reference(native), 12
    rotary = theirs[0].auto_model.rotary_emb
    before = rotary.inv_freq.clone()
    assert len(before) == width // 2
    assert worst(ours, theirs.encode(TEXTS))[1] > 1e-3
    steps = torch.arange(0, width, 2).float() / width
    rotary.inv_freq.copy_(1 / (500000 * 2.0) ** steps / 2.0 ** (2 / width))
    try:
        assert worst(ours, theirs.encode(TEXTS))[1] <= 1e-5
    finally:
        rotary.inv_freq.copy_(before)


OTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("nomic", {"qkv_proj_bias": True}),
    "biases by default": ("nomic", {"mlp_fc1_bias": None}),
    "norms first": ("nomic", {"prenorm": True}),
    "part of a head": ("nomic", {"rotary_emb_fraction": 0.5}),
    "a scaling of NomicBERT": ("nomic", {"rotary_scaling_factor": 2}),
    "no gate": ("nomic", {"activation_function": "gelu"}),
    "experts": ("nomic", {"num_experts": 8}),
    "positions in a table": ("new", {"position_embedding_type": "absolute"}),
    "three products": ("new", {"pack_qkv": False}),
    "scaled scores": ("new", {"logn_attention_scale": True}),
    "another norm": ("new", {"layer_norm_type": "rms_norm"}),
    "a mixed scaling": ("new", {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.6}}),
    "another scaling": ("new", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "an unknown key": ("gte", {"sparse": True}),
}


@pytest.mark.parametrize("case", OTHER)
def test_what_computes_something_else_is_refused(
    make_model: Make, tmp_path: Path, case: str
) -> None:
    name, changes = OTHER[case]
    path = as_published(make_model(MODELS[name]), tmp_path / "model", name, **changes)
    with pytest.raises(UnsupportedEncoderError) as caught:
        Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
    assert next(iter(changes)) in str(caught.value) or "rope_scaling" in changes
    assert "config.json" in str(caught.value)


def test_code_that_is_not_known_is_refused(make_model: Make, tmp_path: Path) -> None:
    path = Path(shutil.copytree(make_model(MODELS["gte"]), tmp_path / "model"))
    edit(path / "config.json", auto_map={"AutoModel": "modeling.Other"})
    with pytest.raises(UnsupportedEncoderError, match="auto_map"):
        Encoder.load(path, precision="fp32", cache_dir=tmp_path / "cache")
