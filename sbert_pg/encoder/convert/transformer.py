"""A BERT-like transformer as a graph, and what smoothing does to its weights.

No mask is needed anywhere: texts of one batch have one length (see ``sbert_pg.encoder.runner``).
That saves the padding, lets onnxruntime use its blocked attention, and makes a text's vector
independent of its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from sbert_pg.encoder.convert.architectures import (
    LayerWeights,
    Linear,
    Norm,
    TransformerWeights,
)
from sbert_pg.encoder.convert.builder import GraphBuilder
from sbert_pg.encoder.convert.linear import Linears, quantized_rows, smoothing_factors

Array = npt.NDArray[np.float32]

#: The four activations of a layer that are quantised, in the order in which they are computed.
ATTENTION_INPUT, CONTEXT, FEED_FORWARD_INPUT, ACTIVATED = range(4)
#: Largest magnitudes over sample texts, by layer and activation; each of shape ``(channels,)``.
Ranges = Mapping[tuple[int, int], Array]


@dataclass(frozen=True, slots=True)
class Smooth:
    """Factors by which two activations of a layer are divided before they are quantised."""

    attention_input: Array | None = None
    feed_forward_input: Array | None = None
    activated: Array | None = None


def transformer(
    graph: GraphBuilder,
    weights: TransformerWeights,
    linears: Linears,
    token_ids: str,
    *,
    small_embeddings: bool,
    ranges: Ranges | None = None,
    watch: bool = False,
) -> tuple[str, dict[tuple[int, int], str]]:
    """Token vectors of a batch.

    Args:
        graph: the graph.
        weights: the transformer.
        linears: how products are computed.
        token_ids: int64 of shape ``(batch, tokens)``.
        small_embeddings: whether word embeddings are stored in 8 bits.
        ranges: ranges of the activations, for smoothing; none without.
        watch: whether to compute those ranges.

    Returns:
        Token vectors, float32 of shape ``(batch, tokens, hidden)``, and with ``watch`` the largest
        magnitude of each channel of each activation.
    """
    hidden = _embeddings(graph, weights, token_ids, small_embeddings)
    bias = _relative_bias(graph, weights, token_ids)
    watched: dict[tuple[int, int], str] = {}
    for number, layer in enumerate(weights.layers):
        smooth = Smooth()
        if ranges is not None:
            layer, smooth = smoothed(layer, ranges, number)
        values = _layer(graph, weights, layer, smooth, linears, hidden, bias)
        hidden = values[-1]
        if watch:
            for position, value in enumerate(values[:-1]):
                magnitude = graph.op("Abs", value)
                watched[number, position] = graph.op(
                    "ReduceMax", magnitude, axes=[0, 1], keepdims=0
                )
    return hidden, watched


def smoothed(layer: LayerWeights, ranges: Ranges, number: int) -> tuple[LayerWeights, Smooth]:
    """A layer's weights with outliers moved into them, and what is left to do at run time.

    The context of attention is a mixture of values, channel by channel, so its factors fold into
    the value projection and cost nothing. The others are one multiplication of the activation.
    """
    attention = smoothing_factors(
        ranges[number, ATTENTION_INPUT],
        layer.query.weight,
        layer.key.weight,
        layer.value.weight,
    )
    context = smoothing_factors(ranges[number, CONTEXT], layer.attention_output.weight)
    feed_forward = smoothing_factors(ranges[number, FEED_FORWARD_INPUT], layer.intermediate.weight)
    activated = smoothing_factors(ranges[number, ACTIVATED], layer.output.weight)
    value = Linear(layer.value.weight / context, layer.value.bias / context)
    changed = replace(
        layer,
        query=_times(layer.query, attention),
        key=_times(layer.key, attention),
        value=_times(value, attention),
        attention_output=_times(layer.attention_output, context),
        intermediate=_times(layer.intermediate, feed_forward),
        output=_times(layer.output, activated),
    )
    return changed, Smooth(attention, feed_forward, activated)


def _times(linear: Linear, factors: Array) -> Linear:
    return Linear(linear.weight * factors[:, None], linear.bias)


def _layer(
    graph: GraphBuilder,
    weights: TransformerWeights,
    layer: LayerWeights,
    smooth: Smooth,
    linears: Linears,
    hidden: str,
    bias: str,
) -> tuple[str, str, str, str, str]:
    """One layer: the four activations that enter products, and the layer's result."""
    shared = linears.prepare(graph, _divided(graph, hidden, smooth.attention_input))
    query, key, value = (
        linears.apply(graph, shared, linear) for linear in (layer.query, layer.key, layer.value)
    )
    context = graph.micro(
        "MultiHeadAttention", query, key, value, "", "", bias, num_heads=weights.heads
    )
    attended = linears.apply(graph, linears.prepare(graph, context), layer.attention_output)
    middle = _add_norm(graph, attended, hidden, layer.attention_norm, weights.epsilon)
    inner = linears.apply(
        graph,
        linears.prepare(graph, _divided(graph, middle, smooth.feed_forward_input)),
        layer.intermediate,
    )
    activated = _activated(graph, weights, inner)
    outer = linears.apply(
        graph, linears.prepare(graph, _divided(graph, activated, smooth.activated)), layer.output
    )
    result = _add_norm(graph, outer, middle, layer.output_norm, weights.epsilon)
    return hidden, context, middle, activated, result


def _divided(graph: GraphBuilder, value: str, factors: Array | None) -> str:
    if factors is None:
        return value
    return graph.op("Mul", value, graph.constant((1 / factors).astype(np.float32), "smooth"))


def _add_norm(graph: GraphBuilder, value: str, skip: str, norm: Norm, epsilon: float) -> str:
    return graph.micro(
        "SkipLayerNormalization",
        value,
        skip,
        graph.constant(norm.gamma, "gamma"),
        graph.constant(norm.beta, "beta"),
        epsilon=epsilon,
    )


def _activated(graph: GraphBuilder, weights: TransformerWeights, value: str) -> str:
    if weights.activation == "gelu":
        return graph.micro("Gelu", value)
    if weights.activation == "gelu_tanh":
        return graph.micro("FastGelu", value)
    if weights.activation == "relu":
        return graph.op("Relu", value)
    return graph.op("Mul", value, graph.op("Sigmoid", value))


def _embeddings(
    graph: GraphBuilder, weights: TransformerWeights, token_ids: str, small: bool
) -> str:
    if small:
        words = quantized_rows(graph, weights.words, token_ids)
    else:
        words = graph.op("Gather", graph.constant(weights.words, "words"), token_ids, axis=0)
    table = graph.constant(weights.positions, "positions")
    if weights.padding is None:
        # Position k of every text is row k: one slice for the whole batch.
        positions = graph.op("Slice", table, graph.ints(0), _length(graph, token_ids))
    else:
        positions = graph.op(
            "Gather", table, _counted_positions(graph, token_ids, weights.padding), axis=0
        )
    total = graph.op("Add", words, positions)
    return graph.op(
        "LayerNormalization",
        total,
        graph.constant(weights.embedding_norm.gamma, "gamma"),
        graph.constant(weights.embedding_norm.beta, "beta"),
        axis=-1,
        epsilon=weights.epsilon,
    )


def _length(graph: GraphBuilder, token_ids: str) -> str:
    """Number of tokens of each text, int64 of one axis with one element."""
    return graph.op("Gather", graph.op("Shape", token_ids), graph.ints(1), axis=0)


def _counted_positions(graph: GraphBuilder, token_ids: str, padding: int) -> str:
    """Fairseq's positions: tokens that are no padding are counted, from ``padding + 1`` on.

    A text can hold the padding token in writing; it stays at position ``padding``.
    """
    number = graph.constant(np.array(padding, dtype=np.int64), "padding")
    real = graph.op(
        "Cast",
        graph.op("Not", graph.op("Equal", token_ids, number)),
        to=TensorProto.INT64,
    )
    axis = graph.constant(np.array(1, dtype=np.int64), "axis")
    counted = graph.op("Mul", graph.op("CumSum", real, axis), real)
    return graph.op("Add", counted, number)


def _relative_bias(graph: GraphBuilder, weights: TransformerWeights, token_ids: str) -> str:
    """MPNet's bias of attention, ``(1, heads, tokens, tokens)``, computed once for all layers."""
    if weights.relative_bias is None:
        return ""
    middle = (weights.relative_bias.shape[0] - 1) // 2
    zero = graph.constant(np.array(0, dtype=np.int64), "zero")
    one = graph.constant(np.array(1, dtype=np.int64), "one")
    length = graph.op("Squeeze", _length(graph, token_ids), graph.ints(0))
    steps = graph.op("Range", zero, length, one)
    columns = graph.op("Unsqueeze", steps, graph.ints(0))
    rows = graph.op("Unsqueeze", steps, graph.ints(1))
    relative = graph.op("Add", graph.op("Sub", columns, rows), graph.ints(middle))
    table = graph.constant(weights.relative_bias, "relative_bias")
    bias = graph.op("Transpose", graph.op("Gather", table, relative, axis=0), perm=[2, 0, 1])
    return graph.op("Unsqueeze", bias, graph.ints(0))
