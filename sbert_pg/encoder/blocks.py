"""What the graph of a transformer is written from, whatever architecture it was read from.

Sources are named where an architecture is read (``architectures``, ``rotary``, ``rms``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sbert_pg.encoder.files import Array, Settings
from sbert_pg.encoder.layers import ACTIVATIONS as LAYER_ACTIVATIONS
from sbert_pg.encoder.layers import MICROSOFT, Activation
from sbert_pg.errors import UnsupportedEncoderError

#: Activations of the feed-forward part by transformers' name, as in ``layers.ACTIVATIONS``.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": LAYER_ACTIVATIONS["GELU"],
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), ("FastGelu", MICROSOFT, {})),
    "quick_gelu": ("QuickGelu", MICROSOFT, {"alpha": 1.702}),
    "relu": LAYER_ACTIVATIONS["ReLU"],
    **dict.fromkeys(("silu", "swish"), LAYER_ACTIVATIONS["SiLU"]),
    "tanh": LAYER_ACTIVATIONS["Tanh"],
    "sigmoid": LAYER_ACTIVATIONS["Sigmoid"],
}


@dataclass(slots=True)
class Linear:
    """``x @ weight + bias``.

    Attributes:
        weight: ``(in, out)``; safetensors have it the other way round.
        bias: ``(out,)``.
    """

    weight: Array
    bias: Array


@dataclass(slots=True)
class Norm:
    """A layer normalisation.

    Attributes:
        centred: whether the mean is taken off first; without that it is called RMS normalisation.
        smoothing: what ``scale`` and ``bias`` were divided by for quantisation, or ``None``.
    """

    scale: Array
    bias: Array
    epsilon: float
    smoothing: Array | None = None
    centred: bool = True


@dataclass(slots=True)
class Block:
    """One layer of the transformer."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    norm: Norm


@dataclass(slots=True)
class Transformer:
    """What the graph is written from.

    Attributes:
        words: word embeddings, ``(vocabulary, width)``.
        positions: position embeddings, ``(positions, width)``. Row 0 belongs to the first position.
        types: embeddings of the token types, ``(types, width)``, or ``None``; encoders know type 0
            alone.
        padding_id: token that is not counted as a position (RoBERTa and MPNet), or ``None`` where
            every token has the position it stands at.
        activation: one of ``ACTIVATIONS``.
        relative_bias: MPNet's bias by head and relative position, ``(heads, 2 * length - 1)``, the
            middle being distance 0; or ``None``.
        projection: from the width of the embeddings to that of the layers, where they differ
            (ALBERT and ELECTRA); or ``None``.
    """

    words: Array = field(repr=False)
    positions: Array = field(repr=False)
    padding_id: int | None
    norm: Norm
    blocks: list[Block]
    heads: int
    activation: str
    relative_bias: Array | None
    types: Array | None = field(default=None, repr=False)
    projection: Linear | None = None

    @property
    def width(self) -> int:
        """Width of a token's vector."""
        return len(self.blocks[0].output.bias)


#: Settings that say nothing about what is computed, or are about training and other tasks.
_IGNORED = frozenset(
    {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label",
     "_name_or_path", "initializer_range", "initializer_cutoff_factor", "label2id", "num_labels",
     "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "use_cache",
     "tie_word_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob",
     "attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout",
     "classifier_pooling", "classifier_bias", "classifier_activation", "decoder_bias",
     "sparse_prediction", "sparse_pred_ignore_index", "deterministic_flash_attn",
     "reference_compile", "gradient_checkpointing", "problem_type", "repad_logits_with_grad",
     "max_position_embeddings", "sentence_transformers", "sbert_ce_default_activation_function",
     "finetuning_task", "output_past"}
)  # fmt: skip
#: Settings that are read.
_READ = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
     "type_vocab_size"}
)  # fmt: skip


def require_known(config: Settings, more: Sequence[str]) -> None:
    """Refuse settings that neither the tables here nor ``more`` know.

    Raises:
        UnsupportedEncoderError: there are some.
    """
    unknown = set(config) - _IGNORED - _READ - set(more)
    if unknown:
        raise UnsupportedEncoderError(
            f"{config.path}: {', '.join(sorted(unknown))[:300]} in a model of type "
            f"{config['model_type']!r} is not known, and may change what it computes."
        )


def relative_bias(buckets: Array, length: int, count: int = 32, largest: int = 128) -> Array:
    """Bias by head and distance, ``(heads, 2 * length - 1)``, the middle being distance 0.

    ``relative_position_bucket`` of MPNet and of T5's encoder.

    Args:
        buckets: the bias of each bucket, ``(buckets, heads)``.
        length: one more than the largest distance of the result.
        count: buckets that are used, half of them for each direction.
        largest: from this distance on, all fall into one bucket.
    """
    distance = np.arange(1 - length, length)
    n = -distance
    half = count // 2
    exact = half // 2
    bucket = np.where(n < 0, half, 0)
    n = np.abs(n)
    # In float32 and in this order, as transformers does it: a distance at a border between two
    # buckets must fall on the same side.
    ratio = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(exact))
    scaled = ratio / np.float32(np.log(largest / exact)) * np.float32(half - exact)
    large = np.minimum(exact + scaled.astype(np.int64), half - 1)
    bucket = bucket + np.where(n < exact, n, large)
    return np.ascontiguousarray(buckets[bucket].T)
