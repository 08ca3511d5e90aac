"""BERT, DistilBERT, RoBERTa, XLM-RoBERTa, CamemBERT and MPNet in one form.

All are the same transformer: embeddings with a layer normalisation, then layers of attention and
of a feed-forward part, each followed by an addition and a layer normalisation. They differ in the
names of their tensors, in how positions are counted and in MPNet's relative position bias. Sources:
``modeling_bert.py``, ``modeling_distilbert.py``, ``modeling_roberta.py``,
``modeling_xlm_roberta.py``, ``modeling_mpnet.py`` of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sbert_pg.encoder.convert.weights import Array, Weights
from sbert_pg.encoder.description import Description
from sbert_pg.errors import UnsupportedEncoderError

#: Activations of the feed-forward part, by transformers' name.
ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "swish", "tanh",
    "sigmoid", "quick_gelu",
)  # fmt: skip


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
        scale: by channel.
        bias: by channel.
        epsilon: added to the variance.
        smoothing: what ``scale`` and ``bias`` were divided by for quantisation, or ``None``.
    """

    scale: Array
    bias: Array
    epsilon: float
    smoothing: Array | None = None


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
        positions: position embeddings with the token type's row added, ``(positions, width)``.
            Row 0 belongs to the first position.
        padding_id: token that is not counted as a position (RoBERTa and MPNet), or ``None`` where
            every token has the position it stands at.
        norm: normalisation of the embeddings.
        blocks: the layers.
        heads: attention heads.
        activation: one of ``ACTIVATIONS``.
        relative_bias: MPNet's bias by head and relative position, ``(heads, 2 * length - 1)``, the
            middle being distance 0; or ``None``.
    """

    words: Array = field(repr=False)
    positions: Array = field(repr=False)
    padding_id: int | None
    norm: Norm
    blocks: list[Block]
    heads: int
    activation: str
    relative_bias: Array | None

    @property
    def width(self) -> int:
        """Width of a token's vector."""
        return int(self.words.shape[1])


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of tensors (``{}`` is the layer's number) and of settings."""

    prefix: str
    block: str
    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    up: str
    down: str
    norm: str


_BERT = _Names(
    "bert.",
    "encoder.layer.{}.",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_ROBERTA = _Names("roberta.", *(getattr(_BERT, name) for name in _Names.__slots__[1:]))
_MPNET = _Names(
    "mpnet.",
    "encoder.layer.{}.",
    "attention.attn.q",
    "attention.attn.k",
    "attention.attn.v",
    "attention.attn.o",
    "attention.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_DISTILBERT = _Names(
    "distilbert.",
    "transformer.layer.{}.",
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)

#: Number of buckets and largest distance of MPNet's relative positions. transformers passes neither
#: from the configuration, so these hold whatever it says.
_BUCKETS, _MAX_DISTANCE = 32, 128


def read(description: Description) -> Transformer:
    """The transformer of a description.

    Raises:
        UnsupportedEncoderError: its configuration asks for something that is not implemented.
        DamagedEncoderError: its weights are missing or do not fit the configuration.
    """
    weights = Weights(description.weights)
    return _READERS[description.architecture](weights, description.config)


def _bert(weights: Weights, config: Mapping[str, Any]) -> Transformer:
    return _bert_like(weights, config, _BERT, padding_id=None)


def _roberta(weights: Weights, config: Mapping[str, Any]) -> Transformer:
    padding = config.get("pad_token_id", 1)
    return _bert_like(weights, config, _ROBERTA, padding_id=1 if padding is None else int(padding))


def _bert_like(
    weights: Weights, config: Mapping[str, Any], names: _Names, padding_id: int | None
) -> Transformer:
    _refuse(config, "position_embedding_type", ("absolute", None))
    _refuse(config, "is_decoder", (False, None))
    reader = _Reader(weights, names)
    width = int(config["hidden_size"])
    types = reader.get("embeddings.token_type_embeddings.weight")
    return Transformer(
        words=reader.get("embeddings.word_embeddings.weight", (int(config["vocab_size"]), width)),
        positions=_positions(reader, width, padding_id) + types[0],
        padding_id=padding_id,
        norm=reader.norm("embeddings.LayerNorm", _epsilon(config)),
        blocks=reader.blocks(
            int(config["num_hidden_layers"]), width, int(config["intermediate_size"]),
            _epsilon(config),
        ),
        heads=_heads(config, "num_attention_heads", width),
        activation=_activation(config, "hidden_act"),
        relative_bias=None,
    )  # fmt: skip


def _mpnet(weights: Weights, config: Mapping[str, Any]) -> Transformer:
    reader = _Reader(weights, _MPNET)
    width = int(config["hidden_size"])
    heads = _heads(config, "num_attention_heads", width)
    buckets = reader.get("encoder.relative_attention_bias.weight")
    if buckets.shape[0] < _BUCKETS or buckets.shape[1] != heads:
        raise UnsupportedEncoderError(
            f"The model's relative position bias has the shape {buckets.shape}; MPNet has "
            f"({_BUCKETS}, {heads})."
        )
    # The padding index is a constant in transformers, not the configuration's.
    positions = _positions(reader, width, 1)
    return Transformer(
        words=reader.get("embeddings.word_embeddings.weight", (int(config["vocab_size"]), width)),
        positions=positions,
        padding_id=1,
        norm=reader.norm("embeddings.LayerNorm", _epsilon(config)),
        blocks=reader.blocks(
            int(config["num_hidden_layers"]), width, int(config["intermediate_size"]),
            _epsilon(config),
        ),
        heads=heads,
        activation=_activation(config, "hidden_act"),
        relative_bias=_relative_bias(buckets, len(positions)),
    )  # fmt: skip


def _distilbert(weights: Weights, config: Mapping[str, Any]) -> Transformer:
    reader = _Reader(weights, _DISTILBERT)
    width = int(config["dim"])
    epsilon = 1e-12  # a constant in transformers
    return Transformer(
        words=reader.get("embeddings.word_embeddings.weight", (int(config["vocab_size"]), width)),
        positions=_positions(reader, width, None),
        padding_id=None,
        norm=reader.norm("embeddings.LayerNorm", epsilon),
        blocks=reader.blocks(int(config["n_layers"]), width, int(config["hidden_dim"]), epsilon),
        heads=_heads(config, "n_heads", width),
        activation=_activation(config, "activation"),
        relative_bias=None,
    )


_READERS: dict[str, Callable[[Weights, Mapping[str, Any]], Transformer]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "mpnet": _mpnet,
}
#: ``model_type`` of the architectures whose graph is built here.
ARCHITECTURES = frozenset(_READERS)


class _Reader:
    """Reads tensors by the names of one family."""

    def __init__(self, weights: Weights, names: _Names) -> None:
        self._weights = weights
        self._names = names
        # A checkpoint that was saved with a head has the body under a prefix.
        bare = "embeddings.word_embeddings.weight"
        self._prefix = "" if bare in weights else names.prefix

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Array:
        return self._weights.get(self._prefix + name, shape)

    def norm(self, name: str, epsilon: float) -> Norm:
        # The names of checkpoints older than the rename in transformers.
        if f"{self._prefix}{name}.gamma" in self._weights:
            return Norm(self.get(f"{name}.gamma"), self.get(f"{name}.beta"), epsilon)
        return Norm(self.get(f"{name}.weight"), self.get(f"{name}.bias"), epsilon)

    def linear(self, name: str, inputs: int, outputs: int) -> Linear:
        weight = self.get(f"{name}.weight", (outputs, inputs))
        return Linear(np.ascontiguousarray(weight.T), self.get(f"{name}.bias", (outputs,)))

    def blocks(self, count: int, width: int, inner: int, epsilon: float) -> list[Block]:
        names, blocks = self._names, []
        for number in range(count):
            at = names.block.format(number)
            blocks.append(
                Block(
                    query=self.linear(at + names.query, width, width),
                    key=self.linear(at + names.key, width, width),
                    value=self.linear(at + names.value, width, width),
                    output=self.linear(at + names.output, width, width),
                    attention_norm=self.norm(at + names.attention_norm, epsilon),
                    up=self.linear(at + names.up, width, inner),
                    down=self.linear(at + names.down, inner, width),
                    norm=self.norm(at + names.norm, epsilon),
                )
            )
        return blocks


def _positions(reader: _Reader, width: int, padding_id: int | None) -> Array:
    table = reader.get("embeddings.position_embeddings.weight")
    if table.shape[1] != width:
        raise UnsupportedEncoderError(
            f"Position embeddings of width {table.shape[1]} in a model of width {width} are not "
            "supported."
        )
    # RoBERTa counts from the padding index plus one; a padding token in a text has the padding
    # index itself. Row 0 is then that one's, and row 1 the first position's.
    return table if padding_id is None else table[padding_id:]


def _relative_bias(buckets: Array, length: int) -> Array:
    """Bias by head and distance; ``MPNetEncoder.relative_position_bucket``."""
    distance = np.arange(1 - length, length)
    n = -distance
    half = _BUCKETS // 2
    exact = half // 2
    bucket = np.where(n < 0, half, 0)
    n = np.abs(n)
    # In float32 and in this order, as transformers does it: a distance at a border between two
    # buckets must fall on the same side.
    ratio = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(exact))
    scaled = ratio / np.float32(np.log(_MAX_DISTANCE / exact)) * np.float32(half - exact)
    large = np.minimum(exact + scaled.astype(np.int64), half - 1)
    bucket = bucket + np.where(n < exact, n, large)
    return np.ascontiguousarray(buckets[bucket].T)


def _epsilon(config: Mapping[str, Any]) -> float:
    return float(config.get("layer_norm_eps", 1e-12))


def _heads(config: Mapping[str, Any], key: str, width: int) -> int:
    heads = int(config[key])
    if width % heads:
        raise UnsupportedEncoderError(f"{heads} attention heads do not divide the width {width}.")
    return heads


def _activation(config: Mapping[str, Any], key: str) -> str:
    name = config.get(key, "gelu")
    if name not in ACTIVATIONS:
        raise UnsupportedEncoderError(
            f"The activation {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}."
        )
    return str(name)


def _refuse(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    if config.get(key) not in allowed:
        raise UnsupportedEncoderError(
            f"The configuration sets {key!r} to {config[key]!r}, which is not supported."
        )
