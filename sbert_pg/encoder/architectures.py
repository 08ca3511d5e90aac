"""Architectures: which tensor is what in the description that a graph is written from.

A table names the tensors of a layer; what else a family has stands in its function. Where a family
is not as old as BERT, a setting that is not known is refused, since it may change what is computed.
Sources: ``modeling_*.py`` of transformers 5.24, by ``model_type``; of T5 its encoder alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from sbert_pg.encoder import tensors
from sbert_pg.encoder.description import Description, padding_id
from sbert_pg.encoder.files import Array, Settings, Weights
from sbert_pg.encoder.layers import ACTIVATIONS, Block, Linear, Norm, Transformer
from sbert_pg.encoder.tensors import FULL, SLIDING, Reader, Table, kinds_of, theta_of
from sbert_pg.errors import DamagedEncoderError, UnsupportedEncoderError

#: Buckets of MPNet's relative positions. transformers does not pass the configuration's, so it is
#: this whatever that says; the same holds for the largest distance.
_BUCKETS = 32


def read(description: Description) -> Transformer:
    """The transformer of a description."""
    model = _READERS[description.architecture](Weights(description.weights), description.config)
    if model.positions is None:
        return model
    # A padding token in a text has its own row.
    rows = len(model.positions) - (model.padding_id is not None)
    if description.max_seq_length is None or description.max_seq_length > rows:
        raise DamagedEncoderError(
            f"{description.config.path}: the weights have {rows} positions, fewer than "
            f"'max_position_embeddings' and the limit of {description.max_seq_length} tokens say."
        )
    return model


def _bert(weights: Weights, config: Settings) -> Transformer:
    return _absolute(Reader(weights, config, tensors.BERT))


def _roberta(weights: Weights, config: Settings) -> Transformer:
    return _absolute(Reader(weights, config, tensors.BERT), padding_id(config))


def _electra(weights: Weights, config: Settings) -> Transformer:
    reader = Reader(weights, config, tensors.ELECTRA)
    config.only("add_cross_attention", [False], False)
    narrow = config.integer("embedding_size", 128)
    model = _absolute(reader, width=narrow)
    if narrow != reader.width:
        model.projection = reader.linear("embeddings_project", narrow, reader.width)
    return model


def _albert(weights: Weights, config: Settings) -> Transformer:
    reader = Reader(weights, config, tensors.ALBERT)
    narrow = config.integer("embedding_size", 128)
    model = _absolute(reader, None, _shared_blocks(reader), width=narrow, activation="gelu_new")
    name = "encoder.embedding_hidden_mapping_in"
    model.projection = reader.linear(name, narrow, reader.width)
    return model


def _mpnet(weights: Weights, config: Settings) -> Transformer:
    reader = Reader(weights, config, tensors.MPNET)
    # The padding index is a constant in transformers, not the configuration's.
    model = _absolute(reader, 1, typed=False)
    buckets = weights.get("encoder.relative_attention_bias.weight")
    if buckets.ndim != 2 or buckets.shape[0] < _BUCKETS or buckets.shape[1] != model.heads:
        raise UnsupportedEncoderError(
            f"The model's relative position bias has the shape {buckets.shape}; MPNet has "
            f"({_BUCKETS}, {model.heads})."
        )
    assert model.positions is not None
    model.bias = _relative_bias(buckets, len(model.positions))
    return model


def _relative_bias(buckets: Array, length: int, count: int = 32, largest: int = 128) -> Array:
    """Bias by head and distance, ``(heads, 2 * length - 1)``, the middle being distance 0.

    ``relative_position_bucket`` of MPNet and of T5's encoder: ``count`` buckets, half of them for
    each direction; from the ``largest`` distance on, all fall into one.
    """
    n = -np.arange(1 - length, length)
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


def _distilbert(weights: Weights, config: Settings) -> Transformer:
    reader = Reader(weights, config, tensors.DISTILBERT)
    return _absolute(reader, None, reader.blocks("transformer.layer.{}."), typed=False)


def _absolute(
    reader: Reader,
    padding: int | None = None,
    blocks: list[Block] | None = None,
    *,
    width: int | None = None,
    activation: str = "gelu",
    typed: bool = True,
) -> Transformer:
    """BERT and its kin; ``width`` is that of the embeddings, where they have one of their own."""
    config, width, types = reader.config, width or reader.width, None
    if typed:
        config.only("position_embedding_type", ["absolute"], "absolute")
        config.only("is_decoder", [False], False)
        types = reader.weights.get(tensors.TYPES, (config.integer("type_vocab_size", 2), width))
    words, norm = reader.words(tensors.WORDS, width), reader.norm("embeddings.LayerNorm", width)
    positions = _positions(reader, width, padding)
    blocks = reader.blocks("encoder.layer.{}.") if blocks is None else blocks
    activation = reader.activation("hidden_act", activation)
    return Transformer(words, blocks, reader.heads, activation, norm, positions, padding, types)


def _shared_blocks(reader: Reader) -> list[Block]:
    """ALBERT: groups of layers, each of which is gone through several times.

    Each time is its own block, since for int8 the channels are evened out by what comes before
    it; the arrays are shared until then, and stored once where they stay equal.
    """
    config, count = reader.config, reader.count
    number_of_groups = config.integer("num_hidden_groups", 1)
    inner = config.integer("inner_group_num", 1, most=100)
    if number_of_groups > count:
        config.refuse("num_hidden_groups", "no more than 'num_hidden_layers'")
    at = "encoder.albert_layer_groups.{}.albert_layers.{}."
    groups = [
        [reader.block(at.format(group, number)) for number in range(inner)]
        for group in range(number_of_groups)
    ]
    # As in transformers, so that a number that does not divide the other is rounded alike.
    order = [int(number / (count / number_of_groups)) for number in range(count)]
    return [_copy(block) for group in order for block in groups[group]]


def _copy(block: Block) -> Block:
    """A block with layers of its own; the arrays stay shared."""
    parts: dict[str, Any] = {part.name: getattr(block, part.name) for part in fields(block)}
    own = {k: replace(v) for k, v in parts.items() if isinstance(v, (Linear, Norm))}
    return Block(**parts | own)


def _positions(reader: Reader, width: int, padding: int | None) -> Array:
    name, config = "embeddings.position_embeddings.weight", reader.config
    rows = config.integer("max_position_embeddings", None)
    table = reader.weights.get(name, None if rows is None else (rows, width))
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


def _thetas(config: Settings, *places: tuple[str, str, float]) -> dict[str, float]:
    """The base of each kind of attention, by its older setting and its default."""
    ropes = config.object("rope_parameters")
    return {
        kind: theta_of(config, ropes.object(kind), config.number(key, base, above=1, below=1e9))
        for kind, key, base in places
    }


def _modernbert(weights: Weights, config: Settings) -> Transformer:
    flags = (
        ("attention_bias", tensors.ATTENTION), ("mlp_bias", tensors.FEED_FORWARD),
        ("norm_bias", ("norm",)),
    )  # fmt: skip
    biases = [part for flag, parts in flags if config.flag(flag, False) for part in parts]
    reader = Reader(weights, config, tensors.MODERNBERT, biases)
    thetas = _thetas(
        config, (FULL, "global_rope_theta", 160_000.0), (SLIDING, "local_rope_theta", 10_000.0)
    )
    windows = {FULL: None, SLIDING: config.integer("local_attention", 128, least=2) // 2}
    every = config.integer("global_attn_every_n_layers", 3)
    kinds = kinds_of(config, [FULL, SLIDING], lambda n: SLIDING if n % every else FULL)
    blocks = []
    for number, kind in enumerate(kinds):
        without = () if number else ("attention_norm",)
        options = {"theta": thetas[kind], "window": windows[kind]}
        blocks.append(reader.block(f"layers.{number}.", without=without, **options))
    words, norm = reader.words("embeddings.tok_embeddings.weight"), reader.norm("embeddings.norm")
    activation = reader.activation("hidden_activation", "gelu")
    model = Transformer(words, blocks, reader.heads, activation, norm, norm_first=True)
    model.final_norm = reader.norm("final_norm")
    return model


def _nomic(weights: Weights, config: Settings) -> Transformer:
    reader = Reader(weights, config, tensors.NOMIC)
    return _norm_last(reader, "emb_ln", "encoder.layers.{}.", 1_000.0, "silu")


def _gte(weights: Weights, config: Settings) -> Transformer:
    reader = Reader(weights, config, tensors.GTE)
    return _norm_last(reader, "embeddings.LayerNorm", "encoder.layer.{}.", 160_000.0, "gelu")


def _norm_last(
    reader: Reader, norm: str, layers: str, theta: float, activation: str
) -> Transformer:
    """NomicBERT and GTE, with transformers' settings and the tensors' names on the hub."""
    config = reader.config
    theta, slower = _scaled(config, config.object("rope_parameters"), theta, reader.head)
    words, types = reader.words(tensors.WORDS), None
    if rows := config.integer("type_vocab_size", 0, least=0):
        types = reader.weights.get(tensors.TYPES, (rows, reader.width))
        words = words + types[0]
    first, blocks = reader.norm(norm), reader.blocks(layers, theta=theta)
    activation = reader.activation("hidden_act", activation)
    return Transformer(words, blocks, reader.heads, activation, first, types=types, slower=slower)


def _scaled(config: Settings, rope: Settings, default: float, head: int) -> tuple[float, float]:
    """Base and divisor of the rotary frequencies, of which GTE's own code knows one scaling."""
    if rope.get("rope_type") != "ntk":
        return theta_of(config, rope, default), 1.0
    factor = rope.number("factor", 1.0, above=1, below=1e4)
    return rope.number("rope_theta", default, above=1, below=1e9) * factor, factor ** (2 / head)


def _decoder(weights: Weights, config: Settings, table: Table, biased: bool = False) -> Reader:
    """What reads a language model, in which several heads share keys."""
    config.only("rope_scaling", [{}], {})
    reader = Reader(weights, config, table, tensors.ATTENTION if biased else ())
    reader.shared = config.integer("num_key_value_heads")
    if reader.heads % reader.shared:
        config.refuse("num_key_value_heads", f"a divisor of the {reader.heads} heads")
    return reader


def _causal(reader: Reader, blocks: list[Block], activation: str) -> Transformer:
    """A language model, whose token vectors are pooled: a token sees those before it alone."""
    words, norm = reader.words("embed_tokens.weight"), reader.norm("norm")
    model = Transformer(words, blocks, reader.heads, activation, norm_first=True, final_norm=norm)
    model.causal = model.blocked = True
    return model


def _uniform(reader: Reader, window: int | None) -> Transformer:
    config = reader.config
    theta = config.number("rope_theta", 10_000.0, above=1, below=1e9)
    theta = theta_of(config, config.object("rope_parameters"), theta)
    blocks = reader.blocks("layers.{}.", theta=theta, window=window)
    return _causal(reader, blocks, reader.activation("hidden_act", "silu"))


def _qwen3(weights: Weights, config: Settings) -> Transformer:
    config.only("use_sliding_window", [False], False)
    kinds_of(config, [FULL], lambda number: FULL)
    config.integer("head_dim")  # transformers' default is not the width divided by the heads
    biased = config.flag("attention_bias", False)
    return _uniform(_decoder(weights, config, tensors.QWEN3, biased), None)


def _mistral(weights: Weights, config: Settings) -> Transformer:
    config.only("layer_types", [], None)
    # A token sees as many tokens, itself included; null is all.
    limited = config.get("sliding_window", 0) is not None
    window = config.integer("sliding_window", 4096) - 1 if limited else None
    return _uniform(_decoder(weights, config, tensors.MISTRAL), window)


def _gemma3(weights: Weights, config: Settings) -> Transformer:
    config.only("attn_logit_softcapping", [], None)
    config.integer("head_dim")
    biased = config.flag("attention_bias", False)
    reader = _decoder(weights, config, tensors.GEMMA3, biased)
    every = config.integer("sliding_window_pattern", 0, least=0)
    every = every or config.integer("_sliding_window_pattern", 6)
    kinds = kinds_of(config, [FULL, SLIDING], lambda n: SLIDING if (n + 1) % every else FULL)
    thetas = _thetas(
        config, (FULL, "rope_theta", 1_000_000.0), (SLIDING, "rope_local_base_freq", 10_000.0)
    )
    both = config.flag("use_bidirectional_attention", False)
    window = config.integer("sliding_window", 4096)
    windows = {FULL: None, SLIDING: window // 2 if both else window - 1}
    # Scores are divided by the root of this, and not of the width of a head.
    scalar = config.number("query_pre_attn_scalar", 256, above=0, below=1e6)
    factor = np.float32((reader.head / scalar) ** 0.5)
    blocks = []
    for number, kind in enumerate(kinds):
        block = reader.block(f"layers.{number}.", theta=thetas[kind], window=windows[kind])
        assert block.query_norm is not None
        block.query_norm.scale = block.query_norm.scale * factor
        blocks.append(block)
    model = _causal(reader, blocks, reader.activation("hidden_activation", "gelu_pytorch_tanh"))
    model.words = model.words * np.float32(reader.width**0.5)
    model.causal = not both
    return model


def _t5(weights: Weights, config: Settings) -> Transformer:
    """T5 (sentence-t5, gtr-t5): no biases, and one of distances, which all layers add to scores."""
    config.only("is_decoder", [False], False)
    gated, activation = _feed_forward(config)
    reader = Reader(weights, config, tensors.T5_GATED if gated else tensors.T5)
    blocks = reader.blocks("encoder.block.{}.layer.")
    for block in blocks:
        # Scores are not scaled here, and divided by the root of this in every graph.
        block.query.weight = block.query.weight * np.float32(reader.head**0.5)
    count = config.integer("relative_attention_num_buckets", 32, least=4, most=10_000)
    most = config.integer("relative_attention_max_distance", 128, most=100_000)
    if count % 4 or most <= count // 4:
        config.refuse(
            "relative_attention_num_buckets",
            "a multiple of four, less than four times 'relative_attention_max_distance'",
        )
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    # sentence-transformers saves the one, and T5 with its decoder has both.
    names = ("shared.weight", "encoder.embed_tokens.weight")
    words = reader.words(next((name for name in names if name in weights), names[0]))
    norm = reader.norm("encoder.final_layer_norm")
    bias = _relative_bias(weights.get(name, (count, reader.heads)), most + 1, count, most)
    model = Transformer(words, blocks, reader.heads, activation, norm_first=True, final_norm=norm)
    model.bias, model.blocked = bias, True
    return model


def _feed_forward(config: Settings) -> tuple[bool, str]:
    """Whether T5's feed-forward part has a gate, and its activation."""
    kinds = {
        **{name: (False, name) for name in ACTIVATIONS},
        **{f"gated-{name}": (True, name) for name in ACTIVATIONS},
        "gated-gelu": (True, "gelu_new"),
    }
    gated, activation = kinds[config.only("feed_forward_proj", kinds, "relu")]
    # transformers writes both beside it.
    config.only("is_gated_act", [gated], gated)
    config.only("dense_act_fn", [activation], activation)
    return gated, activation


_READERS: dict[str, Callable[[Weights, Settings], Transformer]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "mpnet": _mpnet,
    "albert": _albert,
    "electra": _electra,
    "modernbert": _modernbert,
    "nomic_bert": _nomic,
    "gte": _gte,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma3_text": _gemma3,
    "t5": _t5,
}
#: ``model_type`` of the architectures that are read here.
ARCHITECTURES = frozenset(_READERS)
