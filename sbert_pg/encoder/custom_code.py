"""Models whose repositories bring their own code, and whose computation transformers has by now.

NomicBERT (nomic-embed-text) and GTE (gte-*-v1.5, gte-multilingual, snowflake-arctic-embed-m-v2.0)
were published with Python files and settings of their own. The weights have the names that
``tensors`` has; the settings are put here into transformers' words. No line of such code is
fetched or run: a model is recognised by its configuration, in which every entry must be known and
have a value for which the computation is the known one. Sources: ``modeling_hf_nomic_bert.py`` of
nomic-ai/contrastors and ``modeling.py`` of Alibaba-NLP/new-impl.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from sbert_pg.encoder.files import Settings
from sbert_pg.encoder.tensors import require_known

#: What a value has to be; ``None`` beside others where the entry may be left out.
_Only = Mapping[str, tuple[Any, ...]]

_NOMIC_NAMES = MappingProxyType(
    {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
     "n_inner": "intermediate_size", "layer_norm_epsilon": "layer_norm_eps"}
)  # fmt: skip
_NOMIC_ONLY: _Only = MappingProxyType(
    {"activation_function": ("swiglu",), "rotary_emb_fraction": (1.0,), "qkv_proj_bias": (False,),
     "mlp_fc1_bias": (False,), "mlp_fc2_bias": (False,), "rotary_emb_interleaved": (False, None),
     "rotary_emb_scale_base": (None,), "rotary_scaling_factor": (None,), "prenorm": (False, None),
     "parallel_block": (False, None), "parallel_block_tied_norm": (False, None),
     "use_rms_norm": (False, None), "causal": (False, None), "scale_attn_weights": (True, None),
     "scale_attn_by_inverse_layer_idx": (False, None), "add_cross_attention": (False, None)}
)  # fmt: skip
#: Of training, of speed, or of other tasks.
_NOMIC_IGNORED = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "dense_seq_output", "fused_bias_fc",
    "fused_dropout_add_ln", "max_trained_positions", "n_positions", "pad_vocab_size_multiple",
    "reorder_and_upcast_attn", "use_flash_attn", "use_xentropy", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
)  # fmt: skip
_GTE_ONLY: _Only = MappingProxyType(
    {"pack_qkv": (True,), "position_embedding_type": ("rope", None),
     "layer_norm_type": ("layer_norm", None), "logn_attention_scale": (False, None)}
)  # fmt: skip
_GTE_IGNORED = ("logn_attention_clip1", "unpad_inputs", "use_memory_efficient_attention")


def without_code(config: Settings) -> Settings:
    """A configuration in transformers' words where its model is known from code; else as it is."""
    kind = config.get("model_type")
    if kind == "nomic_bert" and "n_embd" in config:
        return _nomic(config)
    if kind in ("new", "gte") and "pack_qkv" in config:
        return _gte(config)
    config.refuse_code()
    return config


def _nomic(config: Settings) -> Settings:
    _require(config, _NOMIC_ONLY, [*_NOMIC_NAMES, *_NOMIC_IGNORED, "rotary_emb_base"])
    kept = {new: config.get(old) for old, new in _NOMIC_NAMES.items()}
    theta = config.number("rotary_emb_base", 10_000, above=1, below=1e9)
    return _translated(
        config, "nomic_bert", {*_NOMIC_NAMES, *_NOMIC_ONLY, *_NOMIC_IGNORED, "rotary_emb_base"},
        {**kept, "hidden_act": "silu", "rope_parameters": {"rope_theta": theta},
         "type_vocab_size": config.integer("type_vocab_size", 2, least=0)},
    )  # fmt: skip


def _gte(config: Settings) -> Settings:
    further = ("rope_theta", "rope_scaling", "hidden_act", "layer_norm_eps")
    _require(config, _GTE_ONLY, [*_GTE_IGNORED, *further])
    rope: dict[str, Any] = {"rope_theta": config.number("rope_theta", 10_000, above=1, below=1e9)}
    scaling = config.object("rope_scaling")
    if scaling:
        scaling.only("type", ["ntk"])
        scaling.only("mixed_b", [None])
        rope |= {"rope_type": "ntk", "factor": scaling.number("factor", 1, above=1, below=1e4)}
    return _translated(
        config, "gte", {*_GTE_ONLY, *_GTE_IGNORED, "rope_theta", "rope_scaling"},
        {"rope_parameters": rope, "type_vocab_size": config.integer("type_vocab_size", 1, least=0)},
    )  # fmt: skip


def _require(config: Settings, only: _Only, more: Collection[str]) -> None:
    """Refuse entries that are not known, and values that change the computation."""
    require_known(config, ["auto_map", *only, *more])
    for key, values in only.items():
        config.only(key, values)


def _translated(
    config: Settings, kind: str, without: Collection[str], more: Mapping[str, Any]
) -> Settings:
    kept = {key: config[key] for key in config if key not in without and key != "auto_map"}
    return Settings({**kept, "model_type": kind, **more}, config.path)
