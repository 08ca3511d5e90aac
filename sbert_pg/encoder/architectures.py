"""BERT, DistilBERT, RoBERTa, XLM-RoBERTa, CamemBERT, MPNet, ALBERT and ELECTRA in one form.

All are the same transformer: embeddings with a layer normalisation, then layers of attention and
of a feed-forward part, each followed by an addition and a layer normalisation. They differ in the
names of their tensors, in how positions are counted, in MPNet's relative position bias, and in
ALBERT and ELECTRA, whose embeddings may be narrower than their layers; ALBERT's layers share their
weights. Of these two a setting that is not known is refused, since it may change what is computed.
Sources: ``modeling_bert.py``, ``modeling_distilbert.py``, ``modeling_roberta.py``,
``modeling_xlm_roberta.py``, ``modeling_mpnet.py``, ``modeling_albert.py`` and
``modeling_electra.py`` of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

from sbert_pg.encoder.description import Description, padding_id
from sbert_pg.encoder.files import Array, Settings, Weights
from sbert_pg.encoder.layers import (
    ACTIVATIONS,
    Block,
    Linear,
    Norm,
    Transformer,
    relative_bias,
    require_known,
)
from sbert_pg.errors import DamagedEncoderError, UnsupportedEncoderError


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
    "encoder.layer.{}.", "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense",
    "output.LayerNorm",
)  # fmt: skip
_MPNET = replace(
    _BERT, query="attention.attn.q", key="attention.attn.k", value="attention.attn.v",
    output="attention.attn.o", attention_norm="attention.LayerNorm",
)  # fmt: skip
_DISTILBERT = _Names(
    "transformer.layer.{}.", "attention.q_lin", "attention.k_lin", "attention.v_lin",
    "attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm",
)  # fmt: skip
_ALBERT = _Names(
    "encoder.albert_layer_groups.{}.", "attention.query", "attention.key", "attention.value",
    "attention.dense", "attention.LayerNorm", "ffn", "ffn_output", "full_layer_layer_norm",
)  # fmt: skip

#: Settings of ALBERT and ELECTRA that are read, or that transformers does not read either.
_NARROW = ("embedding_size", "hidden_act", "layer_norm_eps", "position_embedding_type",
           "is_decoder", "add_cross_attention", "classifier_dropout_prob")  # fmt: skip
_OF_ALBERT = ("num_hidden_groups", "inner_group_num", "net_structure_type", "gap_size",
              "down_scale_factor", "num_memory_blocks", "layers_to_keep")  # fmt: skip
_OF_ELECTRA = ("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")

#: DistilBERT's names of settings.
_DISTILBERT_KEYS = MappingProxyType(
    {"hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
     "num_attention_heads": "n_heads", "hidden_act": "activation"}
)  # fmt: skip

#: Number of buckets and largest distance of MPNet's relative positions. transformers passes neither
#: from the configuration, so these hold whatever it says.
_BUCKETS = 32


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
    return _bert_like(_Reader(weights, _BERT), config, None)


def _roberta(weights: Weights, config: Settings) -> Transformer:
    return _bert_like(_Reader(weights, _BERT), config, padding_id(config))


def _electra(weights: Weights, config: Settings) -> Transformer:
    require_known(config, [*_NARROW, *_OF_ELECTRA])
    config.only("add_cross_attention", [False], False)
    narrow, reader = config.integer("embedding_size", 128), _Reader(weights, _BERT)
    model = _bert_like(reader, config, None, narrow)
    if narrow != model.width:
        model.projection = reader.linear("embeddings_project", narrow, model.width)
    return model


def _albert(weights: Weights, config: Settings) -> Transformer:
    require_known(config, [*_NARROW, *_OF_ALBERT])
    narrow = config.integer("embedding_size", 128)
    reader = _Shared(weights, config)
    model = _bert_like(reader, config, None, narrow, "gelu_new")
    model.projection = reader.linear("encoder.embedding_hidden_mapping_in", narrow, model.width)
    return model


def _bert_like(
    reader: _Reader,
    config: Settings,
    padding: int | None,
    width: int | None = None,
    activation: str = "gelu",
) -> Transformer:
    """BERT and its kin; ``width`` is that of the embeddings where they have one of their own."""
    config.only("position_embedding_type", ["absolute"], "absolute")
    config.only("is_decoder", [False], False)
    width = config.integer("hidden_size") if width is None else width
    types = reader.get("embeddings.token_type_embeddings.weight")
    if types.ndim != 2 or types.shape[1] != width or not len(types):
        raise DamagedEncoderError(
            f"{config.path}: the token type embeddings have the shape {types.shape} in a model of "
            f"width {width}."
        )
    positions = _positions(reader, config, width, padding)
    model = _transformer(reader, config, padding, positions, activation=activation)
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
    model.relative_bias = relative_bias(buckets, len(model.positions))
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
    activation: str = "gelu",
) -> Transformer:
    """The parts that all families have.

    Args:
        padding: see ``Transformer.padding_id``.
        positions: see ``Transformer.positions``.
        keys: names of settings where they are not BERT's.
        epsilon: of the normalisations, where it is a constant in transformers.
        activation: where the configuration names none.
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
    embedded = positions.shape[1]
    return Transformer(
        words=reader.get("embeddings.word_embeddings.weight", (vocabulary, embedded)),
        positions=positions,
        padding_id=padding,
        norm=reader.norm("embeddings.LayerNorm", embedded, epsilon),
        blocks=reader.blocks(layers, width, inner, epsilon),
        heads=heads,
        activation=config.only(keys.get("hidden_act", "hidden_act"), ACTIVATIONS, activation),
        relative_bias=None,
    )


_READERS: dict[str, Callable[[Weights, Settings], Transformer]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "mpnet": _mpnet,
    "albert": _albert,
    "electra": _electra,
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
        return Linear.read(self._weights, name, inputs, outputs)

    def blocks(self, count: int, width: int, inner: int, epsilon: float) -> list[Block]:
        at = self._names.block.format
        return [self.block(at(number), width, inner, epsilon) for number in range(count)]

    def block(self, at: str, width: int, inner: int, epsilon: float) -> Block:
        names = self._names
        return Block(
            query=self.linear(at + names.query, width, width),
            key=self.linear(at + names.key, width, width),
            value=self.linear(at + names.value, width, width),
            output=self.linear(at + names.output, width, width),
            attention_norm=self.norm(at + names.attention_norm, width, epsilon),
            up=self.linear(at + names.up, width, inner),
            down=self.linear(at + names.down, inner, width),
            norm=self.norm(at + names.norm, width, epsilon),
        )


class _Shared(_Reader):
    """ALBERT: groups of layers, each of which is gone through several times.

    Each time is its own block, since for int8 the channels are evened out by what comes before
    it; the arrays are shared until then, and stored once where they stay equal.
    """

    def __init__(self, weights: Weights, config: Settings) -> None:
        super().__init__(weights, _ALBERT)
        self._groups = config.integer("num_hidden_groups", 1)
        self._inner = config.integer("inner_group_num", 1, most=100)
        if self._groups > config.integer("num_hidden_layers"):
            config.refuse("num_hidden_groups", "no more than 'num_hidden_layers'")

    def blocks(self, count: int, width: int, inner: int, epsilon: float) -> list[Block]:
        groups = [
            [
                self.block(f"{self._names.block.format(group)}albert_layers.{number}.",
                           width, inner, epsilon)
                for number in range(self._inner)
            ]
            for group in range(self._groups)
        ]  # fmt: skip
        # As in transformers, so that a number that does not divide the other is rounded alike.
        order = [int(number / (count / self._groups)) for number in range(count)]
        return [_copy(block) for group in order for block in groups[group]]


def _copy(block: Block) -> Block:
    """A block with layers of its own; the arrays stay shared."""
    return Block(**{part.name: replace(getattr(block, part.name)) for part in fields(block)})


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
