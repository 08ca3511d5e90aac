"""The tensors and settings of architectures by tables of their names, and what reads them.

Sources: ``modeling_*.py`` of transformers 5.24.

NomicBERT (nomic-embed-text) and GTE (gte-*-v1.5, gte-multilingual, snowflake-arctic-embed-m-v2.0)
were published with Python files and settings of their own; ``without_code`` puts these into
transformers' words. No line of such code is fetched or run: a model is recognised by its
configuration, in which every entry must be known and have a value for which the computation is the
known one. Sources: ``modeling_hf_nomic_bert.py`` of nomic-ai/contrastors and ``modeling.py`` of
Alibaba-NLP/new-impl.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from sbert_pg.encoder.files import Array, Settings, Weights
from sbert_pg.encoder.layers import ACTIVATIONS, Block, Linear, Norm
from sbert_pg.errors import UnsupportedEncoderError

#: Fields of the two parts of a layer.
ATTENTION, FEED_FORWARD = ("query", "key", "value", "output"), ("gate", "up", "down")
#: The tensors of embeddings, in most architectures.
WORDS, TYPES = "embeddings.word_embeddings.weight", "embeddings.token_type_embeddings.weight"
#: Kinds of attention.
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Table:
    """What a family calls its tensors and settings.

    Attributes:
        names: of the tensors of a layer, by the fields of ``Block``. Fields of one name lie in one
            tensor, in their order.
        known: settings that are read, or say nothing about what is computed, besides those of all
            families; ``None`` for a family in which any is taken.
        keys: names of settings where they are not BERT's.
        epsilon: the setting of what normalisations add to a variance, and its default.
        biases: fields of a layer that have a bias, zeros else, where no setting says it.
        centred: whether normalisations take the mean away.
        free: whether heads may be wider or narrower, together, than the model.
        offset: what is added to the scale of a normalisation.
    """

    names: Mapping[str, str]
    known: Collection[str] | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    epsilon: tuple[str, float] = ("layer_norm_eps", 1e-12)
    biases: Collection[str] = (*ATTENTION, *FEED_FORWARD, "norm")
    centred: bool = True
    free: bool = False
    offset: float = 0.0


#: Settings that say nothing about what is computed, are about training and other tasks, or are read
#: in every family.
_KNOWN = frozenset(
    {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label",
     "_name_or_path", "initializer_range", "initializer_cutoff_factor", "label2id", "num_labels",
     "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "use_cache",
     "tie_word_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob",
     "attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout",
     "classifier_pooling", "classifier_bias", "classifier_activation", "decoder_bias",
     "sparse_prediction", "sparse_pred_ignore_index", "deterministic_flash_attn",
     "reference_compile", "gradient_checkpointing", "problem_type", "repad_logits_with_grad",
     "max_position_embeddings", "sentence_transformers", "sbert_ce_default_activation_function",
     "finetuning_task", "output_past", "vocab_size", "hidden_size", "intermediate_size",
     "num_hidden_layers", "num_attention_heads", "type_vocab_size"}
)  # fmt: skip
#: Further ones of ALBERT and ELECTRA that are read, or that transformers does not read either.
_NARROW = ("embedding_size", "hidden_act", "layer_norm_eps", "position_embedding_type",
           "is_decoder", "add_cross_attention", "classifier_dropout_prob")  # fmt: skip
#: Of the families with rotary positions, and of the language models.
_ROTARY = ("rope_parameters", "head_dim")
_DECODERS = (*_ROTARY, "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling",
             "layer_types", "sliding_window", "hidden_act")  # fmt: skip

BERT = Table({
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "output": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm",
})  # fmt: skip
MPNET = Table({
    **BERT.names, "query": "attention.attn.q", "key": "attention.attn.k",
    "value": "attention.attn.v", "output": "attention.attn.o",
    "attention_norm": "attention.LayerNorm",
})  # fmt: skip
DISTILBERT = Table(
    {
        "query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin",
        "output": "attention.out_lin", "attention_norm": "sa_layer_norm",
        "up": "ffn.lin1", "down": "ffn.lin2", "norm": "output_layer_norm",
    },
    keys={"hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
          "num_attention_heads": "n_heads", "hidden_act": "activation"},
    epsilon=("", 1e-12),  # no setting
)  # fmt: skip
ELECTRA = Table(
    BERT.names,
    (*_NARROW, "summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout"),
)
ALBERT = Table(
    {
        "query": "attention.query", "key": "attention.key", "value": "attention.value",
        "output": "attention.dense", "attention_norm": "attention.LayerNorm",
        "up": "ffn", "down": "ffn_output", "norm": "full_layer_layer_norm",
    },
    (*_NARROW, "num_hidden_groups", "inner_group_num", "net_structure_type", "gap_size",
     "down_scale_factor", "num_memory_blocks", "layers_to_keep"),
)  # fmt: skip
MODERNBERT = Table(
    {
        **dict.fromkeys(("query", "key", "value"), "attn.Wqkv"), "output": "attn.Wo",
        "attention_norm": "attn_norm", **dict.fromkeys(("gate", "up"), "mlp.Wi"), "down": "mlp.Wo",
        "norm": "mlp_norm",
    },
    (*_ROTARY, "hidden_activation", "norm_eps", "norm_bias", "attention_bias", "mlp_bias",
     "layer_types", "global_attn_every_n_layers", "local_attention", "global_rope_theta",
     "local_rope_theta", "layer_norm_eps", "position_embedding_type"),
    epsilon=("norm_eps", 1e-5),
)  # fmt: skip
NOMIC = Table(
    {
        **dict.fromkeys(("query", "key", "value"), "attn.Wqkv"), "output": "attn.out_proj",
        "attention_norm": "norm1", "up": "mlp.fc11", "gate": "mlp.fc12", "down": "mlp.fc2",
        "norm": "norm2",
    },
    (*_ROTARY, "hidden_act", "layer_norm_eps"), biases=("norm",),
)  # fmt: skip
GTE = Table(
    {
        **dict.fromkeys(("query", "key", "value"), "attention.qkv_proj"),
        "output": "attention.o_proj", "attention_norm": "attn_ln",
        **dict.fromkeys(("up", "gate"), "mlp.up_gate_proj"), "down": "mlp.down_proj",
        "norm": "mlp_ln",
    },
    (*_ROTARY, "hidden_act", "layer_norm_eps"), biases=(*ATTENTION, "down", "norm"),
)  # fmt: skip
#: What language models have in common: norms without a mean.
_RMS: dict[str, Any] = {
    "epsilon": ("rms_norm_eps", 1e-6), "biases": (), "centred": False, "free": True,
}  # fmt: skip
MISTRAL = Table(
    {
        "attention_norm": "input_layernorm", "query": "self_attn.q_proj", "key": "self_attn.k_proj",
        "value": "self_attn.v_proj", "output": "self_attn.o_proj",
        "norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    _DECODERS, **_RMS,
)  # fmt: skip
QWEN3 = Table(
    {**MISTRAL.names, "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"},
    (*_DECODERS, "attention_bias", "use_sliding_window", "max_window_layers"), **_RMS,
)  # fmt: skip
GEMMA3 = Table(
    {**QWEN3.names, "attention_end": "post_attention_layernorm",
     "norm": "pre_feedforward_layernorm", "end": "post_feedforward_layernorm"},
    (*_DECODERS, "attention_bias", "query_pre_attn_scalar", "final_logit_softcapping",
     "attn_logit_softcapping", "use_bidirectional_attention", "_sliding_window_pattern",
     "sliding_window_pattern", "rope_local_base_freq", "hidden_activation"),
    offset=1.0, **_RMS,
)  # fmt: skip
_T5_KEYS = {
    "hidden_size": "d_model", "intermediate_size": "d_ff", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads", "head_dim": "d_kv",
}  # fmt: skip
_T5_NORMS = {**_RMS, "epsilon": ("layer_norm_epsilon", 1e-6)}
#: Its settings are read, or are about its decoder, generation and training.
T5 = Table(
    {
        "attention_norm": "0.layer_norm", "query": "0.SelfAttention.q", "key": "0.SelfAttention.k",
        "value": "0.SelfAttention.v", "output": "0.SelfAttention.o", "norm": "1.layer_norm",
        "up": "1.DenseReluDense.wi", "down": "1.DenseReluDense.wo",
    },
    (
        *_T5_KEYS.values(), "relative_attention_num_buckets", "relative_attention_max_distance",
        "layer_norm_epsilon", "feed_forward_proj", "dense_act_fn", "is_gated_act", "is_decoder",
        "is_encoder_decoder", "num_decoder_layers", "decoder_start_token_id",
        "scale_decoder_outputs", "dropout_rate", "initializer_factor", "n_positions",
        "task_specific_params",
    ),
    _T5_KEYS, **_T5_NORMS,
)  # fmt: skip
#: T5 1.1.
T5_GATED = Table(
    {**T5.names, "gate": "1.DenseReluDense.wi_0", "up": "1.DenseReluDense.wi_1"}, T5.known,
    _T5_KEYS, **_T5_NORMS,
)  # fmt: skip


def require_known(config: Settings, more: Collection[str]) -> None:
    """Refuse settings that neither the table here nor ``more`` knows."""
    unknown = set(config) - _KNOWN - set(more)
    if unknown:
        raise UnsupportedEncoderError(
            f"{config.path}: {', '.join(sorted(unknown))[:300]} in a model of type "
            f"{config['model_type']!r} is not known, and may change what it computes."
        )


class Reader:
    """Reads the tensors of one family; ``biases`` in place of those of its table."""

    def __init__(
        self,
        weights: Weights,
        config: Settings,
        table: Table,
        biases: Collection[str] | None = None,
    ) -> None:
        self._epsilon = config.number(*table.epsilon, above=0, below=1)
        if table.known is not None:
            require_known(config, table.known)
        self.weights, self.config, self._table = weights, config, table
        self._biases = table.biases if biases is None else biases
        self.width, self.inner, self.count, self.heads = (
            config.integer(self._key(key))
            for key in ("hidden_size", "intermediate_size", "num_hidden_layers",
                        "num_attention_heads")
        )  # fmt: skip
        default = max(self.width // self.heads, 1)
        turned = self._key("head_dim") in (table.known or ())
        self.head = config.integer(self._key("head_dim"), default) if turned else default
        if (turned and self.head % 2) or not (table.free or self.head * self.heads == self.width):
            raise UnsupportedEncoderError(
                f"{config.path}: {self.heads} attention heads of {self.head} do not make the width "
                f"{self.width}."
            )
        self.shared = self.heads

    def _key(self, key: str) -> str:
        return self._table.keys.get(key, key)

    def activation(self, key: str, default: str) -> str:
        """The activation of the feed-forward part."""
        return self.config.only(self._key(key), ACTIVATIONS, default)

    def words(self, name: str, width: int | None = None) -> Array:
        """The word embeddings."""
        return self.weights.get(name, (self.config.integer("vocab_size"), width or self.width))

    def norm(self, name: str, width: int | None = None) -> Norm:
        """A normalisation, by default of the model's width."""
        # The names of checkpoints older than the rename in transformers.
        old = f"{name}.gamma" in self.weights
        scale, bias = ("gamma", "beta") if old else ("weight", "bias")
        shape = (width or self.width,)
        offset = np.zeros(shape, np.float32)
        if "norm" in self._biases:
            offset = self.weights.get(f"{name}.{bias}", shape)
        weight = self.weights.get(f"{name}.{scale}", shape) + np.float32(self._table.offset)
        return Norm(weight, offset, self._epsilon, centred=self._table.centred)

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool = True) -> Linear:
        """A linear layer; without ``bias`` that is zeros."""
        weight = self.weights.get(f"{name}.weight", (outputs, inputs))
        offset = np.zeros(outputs, np.float32)
        if bias:
            offset = self.weights.get(f"{name}.bias", (outputs,))
        return Linear(np.ascontiguousarray(weight.T), offset)

    def block(self, at: str, *, without: Collection[str] = (), **settings: Any) -> Block:
        """The layer whose tensors begin with ``at``; ``settings`` are fields that are none."""
        inside, shared = self.head * self.heads, self.head * self.shared
        sizes = {
            "query": (self.width, inside), "key": (self.width, shared),
            "value": (self.width, shared), "output": (inside, self.width),
            "gate": (self.width, self.inner), "up": (self.width, self.inner),
            "down": (self.inner, self.width),
        }  # fmt: skip
        parts: dict[str, Any] = {}
        names = self._table.names
        for name, group in groupby(names, names.__getitem__):
            own = [field for field in group if field not in without]
            if own and own[0] in sizes:
                outputs = [sizes[field][1] for field in own]
                bias = own[0] in self._biases
                whole = self.linear(f"{at}{name}", sizes[own[0]][0], sum(outputs), bias=bias)
                parts.update(zip(own, _divided(whole, outputs), strict=True))
            elif own:
                head = self.head if own[0] in ("query_norm", "key_norm") else None
                parts[own[0]] = self.norm(f"{at}{name}", head)
        return Block(**parts, **settings)

    def blocks(self, at: str, **settings: Any) -> list[Block]:
        """All layers; ``{}`` in ``at`` is a layer's number."""
        return [self.block(at.format(number), **settings) for number in range(self.count)]


def _divided(linear: Linear, sizes: Sequence[int]) -> list[Linear]:
    """The layers that lie in one, side by side."""
    if len(sizes) == 1:
        return [linear]
    ends = np.cumsum(sizes)
    places = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return [Linear(np.ascontiguousarray(linear.weight[:, p]), linear.bias[p]) for p in places]


def theta_of(config: Settings, rope: Settings, default: float) -> float:
    """The base of rotary frequencies; no scaling of them is implemented."""
    rope.only("rope_type", ["default"], "default")
    unknown = set(rope) - {"rope_type", "rope_theta"}
    if unknown:
        raise UnsupportedEncoderError(
            f"{config.path}: rotary positions with {', '.join(sorted(unknown))} are not supported."
        )
    return rope.number("rope_theta", default, above=1, below=1e9)


def kinds_of(
    config: Settings, known: Sequence[str], default: Callable[[int], str]
) -> Sequence[str]:
    """The kind of attention of each layer; ``default`` gives it by the layer's number."""
    count, kinds = config.integer("num_hidden_layers"), config.get("layer_types")
    if kinds is None:
        return [default(number) for number in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or set(map(str, kinds)) - set(known):
        config.refuse("layer_types", f"a list of {count} of {', '.join(known)}")
    return kinds


#: What a value has to be; ``None`` beside others where the entry may be left out.
_Only = Mapping[str, tuple[Any, ...]]

_NOMIC_NAMES = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_inner": "intermediate_size", "layer_norm_epsilon": "layer_norm_eps"
}  # fmt: skip
_NOMIC_ONLY: _Only = {
    "activation_function": ("swiglu",), "rotary_emb_fraction": (1.0,), "qkv_proj_bias": (False,),
    "mlp_fc1_bias": (False,), "mlp_fc2_bias": (False,), "rotary_emb_interleaved": (False, None),
    "rotary_emb_scale_base": (None,), "rotary_scaling_factor": (None,), "prenorm": (False, None),
    "parallel_block": (False, None), "parallel_block_tied_norm": (False, None),
    "use_rms_norm": (False, None), "causal": (False, None), "scale_attn_weights": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None), "add_cross_attention": (False, None)
}  # fmt: skip
#: Of training, of speed, or of other tasks.
_NOMIC_IGNORED = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "dense_seq_output", "fused_bias_fc",
    "fused_dropout_add_ln", "max_trained_positions", "n_positions", "pad_vocab_size_multiple",
    "reorder_and_upcast_attn", "use_flash_attn", "use_xentropy", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
)  # fmt: skip
_GTE_ONLY: _Only = {
    "pack_qkv": (True,), "position_embedding_type": ("rope", None),
    "layer_norm_type": ("layer_norm", None), "logn_attention_scale": (False, None)
}  # fmt: skip
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
    theta = config.number("rotary_emb_base", 10_000, above=1, below=1e9)
    more = {new: config.get(old) for old, new in _NOMIC_NAMES.items()}
    more |= {"hidden_act": "silu", "rope_parameters": {"rope_theta": theta},
             "type_vocab_size": config.integer("type_vocab_size", 2, least=0)}  # fmt: skip
    read = (*_NOMIC_NAMES, *_NOMIC_IGNORED, "rotary_emb_base")
    return _translated(config, "nomic_bert", _NOMIC_ONLY, read, more)


def _gte(config: Settings) -> Settings:
    rope: dict[str, Any] = {"rope_theta": config.number("rope_theta", 10_000, above=1, below=1e9)}
    scaling = config.object("rope_scaling")
    if scaling:
        scaling.only("type", ["ntk"])
        scaling.only("mixed_b", [None])
        rope |= {"rope_type": "ntk", "factor": scaling.number("factor", 1, above=1, below=1e4)}
    kept = {key: config.get(key) for key in ("hidden_act", "layer_norm_eps")}
    types = config.integer("type_vocab_size", 1, least=0)
    more = {**kept, "rope_parameters": rope, "type_vocab_size": types}
    read = (*_GTE_IGNORED, *kept, "rope_theta", "rope_scaling")
    return _translated(config, "gte", _GTE_ONLY, read, more)


def _translated(
    config: Settings, kind: str, only: _Only, read: Collection[str], more: Mapping[str, Any]
) -> Settings:
    """The entries that are transformers' own, and ``more``.

    Refused are entries that are not known, and values that change the computation.
    """
    other = ["auto_map", *only, *read]
    require_known(config, other)
    for key, values in only.items():
        config.only(key, values)
    kept = {key: value for key, value in config.items() if key not in other}
    return Settings({**kept, "model_type": kind, **more}, config.path)
