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
from types import MappingProxyType

import numpy as np

from sbert_pg.encoder.description import Description, padding_id
from sbert_pg.encoder.files import Array, Settings, Weights
from sbert_pg.encoder.layers import ACTIVATIONS as LAYER_ACTIVATIONS
from sbert_pg.encoder.layers import MICROSOFT, Activation
from sbert_pg.errors import DamagedEncoderError, UnsupportedEncoderError

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
        scale: by channel.
        bias: by channel.
        epsilon: added to the variance.
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
    types: Array | None = field(default=None, repr=False)

    @property
    def width(self) -> int:
        """Width of a token's vector."""
        return int(self.words.shape[1])


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of tensors; ``{}`` is the layer's number."""

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
_MPNET = _Names(
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

#: DistilBERT's names of settings.
_DISTILBERT_KEYS = MappingProxyType(
    {"hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
     "num_attention_heads": "n_heads", "hidden_act": "activation"}
)  # fmt: skip

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
    model = _READERS[description.architecture](weights, description.config)
    # A padding token in a text has its own row.
    rows = len(model.positions) - (model.padding_id is not None)
    if description.max_seq_length is None or description.max_seq_length > rows:
        raise DamagedEncoderError(
            f"{description.config.path}: the weights have {rows} positions, fewer than "
            f"'max_position_embeddings' and the limit of {description.max_seq_length} tokens say."
        )
    return model


def _bert(weights: Weights, config: Settings) -> Transformer:
    return _bert_like(weights, config, None)


def _roberta(weights: Weights, config: Settings) -> Transformer:
    return _bert_like(weights, config, padding_id(config))


def _bert_like(weights: Weights, config: Settings, padding: int | None) -> Transformer:
    config.only("position_embedding_type", ["absolute"], "absolute")
    config.only("is_decoder", [False], False)
    reader = _Reader(weights, _BERT)
    width = config.integer("hidden_size")
    types = reader.get("embeddings.token_type_embeddings.weight")
    if types.ndim != 2 or types.shape[1] != width or not len(types):
        raise DamagedEncoderError(
            f"{config.path}: the token type embeddings have the shape {types.shape} in a model of "
            f"width {width}."
        )
    model = _transformer(reader, config, padding, _positions(reader, config, width, padding))
    model.types = types
    return model


def _mpnet(weights: Weights, config: Settings) -> Transformer:
    reader = _Reader(weights, _MPNET)
    # The padding index is a constant in transformers, not the configuration's.
    model = _transformer(
        reader, config, 1, _positions(reader, config, config.integer("hidden_size"), 1)
    )
    buckets = reader.get("encoder.relative_attention_bias.weight")
    if buckets.ndim != 2 or buckets.shape[0] < _BUCKETS or buckets.shape[1] != model.heads:
        raise UnsupportedEncoderError(
            f"The model's relative position bias has the shape {buckets.shape}; MPNet has "
            f"({_BUCKETS}, {model.heads})."
        )
    model.relative_bias = _relative_bias(buckets, len(model.positions))
    return model


def _distilbert(weights: Weights, config: Settings) -> Transformer:
    reader = _Reader(weights, _DISTILBERT)
    positions = _positions(reader, config, config.integer("dim"), None)
    return _transformer(reader, config, None, positions, _DISTILBERT_KEYS, 1e-12)


def _transformer(
    reader: _Reader,
    config: Settings,
    padding: int | None,
    positions: Array,
    keys: Mapping[str, str] = MappingProxyType({}),
    epsilon: float | None = None,
) -> Transformer:
    """The parts that all families have.

    Args:
        reader: reads the tensors.
        config: the configuration.
        padding: see ``Transformer.padding_id``.
        positions: see ``Transformer.positions``.
        keys: names of settings where they are not BERT's.
        epsilon: of the normalisations, where it is a constant in transformers.
    """
    width, inner, layers, vocabulary, heads = (
        config.integer(keys.get(key, key))
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size",
                    "num_attention_heads")
    )  # fmt: skip
    if width % heads:
        raise UnsupportedEncoderError(
            f"{config.path}: {heads} attention heads do not divide the width {width}."
        )
    if epsilon is None:
        epsilon = config.number("layer_norm_eps", 1e-12, above=0, below=1)
    return Transformer(
        words=reader.get("embeddings.word_embeddings.weight", (vocabulary, width)),
        positions=positions,
        padding_id=padding,
        norm=reader.norm("embeddings.LayerNorm", width, epsilon),
        blocks=reader.blocks(layers, width, inner, epsilon),
        heads=heads,
        activation=config.only(keys.get("hidden_act", "hidden_act"), ACTIVATIONS, "gelu"),
        relative_bias=None,
    )


_READERS: dict[str, Callable[[Weights, Settings], Transformer]] = {
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

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Array:
        return self._weights.get(name, shape)

    def norm(self, name: str, width: int, epsilon: float) -> Norm:
        # The names of checkpoints older than the rename in transformers.
        old = f"{name}.gamma" in self._weights
        scale, bias = ("gamma", "beta") if old else ("weight", "bias")
        shape = (width,)
        return Norm(self.get(f"{name}.{scale}", shape), self.get(f"{name}.{bias}", shape), epsilon)

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
                    attention_norm=self.norm(at + names.attention_norm, width, epsilon),
                    up=self.linear(at + names.up, width, inner),
                    down=self.linear(at + names.down, inner, width),
                    norm=self.norm(at + names.norm, width, epsilon),
                )
            )
        return blocks


def _positions(reader: _Reader, config: Settings, width: int, padding: int | None) -> Array:
    name = "embeddings.position_embeddings.weight"
    rows = config.integer("max_position_embeddings", None)
    table = reader.get(name) if rows is None else reader.get(name, (rows, width))
    if table.ndim != 2 or table.shape[1] != width:
        raise UnsupportedEncoderError(
            f"Position embeddings of shape {table.shape} in a model of width {width} are not "
            "supported."
        )
    if len(table) <= (padding or 0):
        raise DamagedEncoderError(
            f"The position embeddings have {len(table)} rows; with the padding index {padding} "
            "they are counted from further on."
        )
    # RoBERTa counts from the padding index plus one; a padding token in a text has the padding
    # index itself. Row 0 is then that one's, and row 1 the first position's.
    return table if padding is None else table[padding:]


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
