"""From token vectors to one vector: pooling, dense layers, normalisation, truncation.

Sources: ``Pooling``, ``Dense`` and ``Normalize`` of sentence-transformers, and the definitions of
torch's activations with their default arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from sbert_pg.encoder.convert.builder import GraphBuilder
from sbert_pg.encoder.description import Description, PoolingMode
from sbert_pg.encoder.layers import Dense
from sbert_pg.errors import UnsupportedEncoderError

#: ``torch.clamp(min=...)`` of the mean's divisor, and the ``eps`` of ``functional.normalize``.
_LEAST_COUNT = 1e-9
_LEAST_LENGTH = 1e-12


def head(graph: GraphBuilder, description: Description, tokens: str, mask: str | None) -> str:
    """The vector of each text, float32 of shape ``(batch, dimensions)``.

    Args:
        graph: the graph.
        description: pooling, layers and truncation.
        tokens: token vectors, ``(batch, tokens, hidden)``.
        mask: which tokens pooling sees, int64 of shape ``(batch, tokens)``; all without.
    """
    floats = None
    if mask is not None:
        floats = graph.op("Unsqueeze", graph.op("Cast", mask, to=TensorProto.FLOAT), graph.ints(2))
    single = len(description.pooling) == 1
    normalized_next = bool(description.layers) and not isinstance(description.layers[0], Dense)
    # A mean that is normalised next need not be divided: only its direction is left.
    pooled = [
        pool(graph, mode, tokens, floats, scale_matters=not (single and normalized_next))
        for mode in description.pooling
    ]
    vector = pooled[0] if single else graph.op("Concat", *pooled, axis=-1)
    for layer in description.layers:
        vector = _dense(graph, vector, layer) if isinstance(layer, Dense) else _unit(graph, vector)
    if description.dimensions < description.full_dimensions:
        vector = graph.op(
            "Slice", vector, graph.ints(0), graph.ints(description.dimensions), graph.ints(1)
        )
    return vector


def pool(
    graph: GraphBuilder, mode: PoolingMode, tokens: str, mask: str | None, *, scale_matters: bool
) -> str:
    """One pooling mode.

    Args:
        graph: the graph.
        mode: which.
        tokens: token vectors, ``(batch, tokens, hidden)``.
        mask: float32 of shape ``(batch, tokens, 1)``, or ``None``.
        scale_matters: whether the length of the result matters.

    Raises:
        UnsupportedEncoderError: there is no such mode.
    """
    if mode == "cls":
        return _at(graph, tokens, 0) if mask is None else _first(graph, tokens, mask)
    if mode == "lasttoken":
        # Prompts stand at the beginning, so leaving them out never moves the last token.
        return _at(graph, tokens, -1)
    if mode == "max":
        if mask is not None:
            # What pooling does not see gets a value below every other, as in sentence-transformers.
            seen = graph.op("Greater", mask, graph.scalar(0))
            tokens = graph.op("Where", seen, tokens, graph.scalar(-1e9))
        return graph.op("ReduceMax", tokens, axes=[1], keepdims=0)
    weights = mask
    if mode == "weightedmean":
        weights = _increasing(graph, tokens, mask)
    elif mode not in ("mean", "mean_sqrt_len_tokens"):
        raise UnsupportedEncoderError(f"Pooling mode {mode!r} is not implemented.")
    seen_tokens = tokens if weights is None else graph.op("Mul", tokens, weights)
    total = graph.op("ReduceSum", seen_tokens, graph.ints(1), keepdims=0)
    if not scale_matters:
        return total
    if weights is None:
        ones = graph.op("Slice", tokens, graph.ints(0), graph.ints(1), graph.ints(2))
        weights = graph.op("Add", graph.op("Mul", ones, graph.scalar(0)), graph.scalar(1))
    count = graph.op("ReduceSum", weights, graph.ints(1), keepdims=0)
    count = graph.op("Max", count, graph.scalar(_LEAST_COUNT))
    if mode == "mean_sqrt_len_tokens":
        count = graph.op("Sqrt", count)
    return graph.op("Div", total, count)


def _at(graph: GraphBuilder, tokens: str, position: int) -> str:
    index = graph.constant(np.array(position, dtype=np.int64), "position")
    return graph.op("Gather", tokens, index, axis=1)


def _first(graph: GraphBuilder, tokens: str, mask: str) -> str:
    """The first token that pooling sees."""
    flat = graph.op("Squeeze", mask, graph.ints(2))
    position = graph.op("ArgMax", flat, axis=1, keepdims=1)
    index = graph.op("Unsqueeze", position, graph.ints(2))
    return graph.op("Squeeze", graph.op("GatherND", tokens, index, batch_dims=1), graph.ints(1))


def _increasing(graph: GraphBuilder, tokens: str, mask: str | None) -> str:
    """Weights 1, 2, 3... along the tokens, ``(1, tokens, 1)``, times the mask."""
    zero = graph.constant(np.array(0, dtype=np.int64), "zero")
    one = graph.constant(np.array(1, dtype=np.int64), "one")
    shape = graph.op("Shape", tokens)
    length = graph.op("Gather", shape, one, axis=0)
    steps = graph.op("Add", graph.op("Range", zero, length, one), one)
    weights = graph.op("Unsqueeze", graph.op("Cast", steps, to=TensorProto.FLOAT), graph.ints(0, 2))
    return weights if mask is None else graph.op("Mul", weights, mask)


def _unit(graph: GraphBuilder, vector: str) -> str:
    length = graph.op("ReduceL2", vector, axes=[-1], keepdims=1)
    return graph.op("Div", vector, graph.op("Max", length, graph.scalar(_LEAST_LENGTH)))


def _dense(graph: GraphBuilder, vector: str, layer: Dense) -> str:
    inputs = [vector, graph.constant(layer.weight, "dense")]
    if layer.bias is not None:
        inputs.append(graph.constant(layer.bias, "dense_bias"))
    return _ACTIVATIONS[layer.activation](graph, graph.op("Gemm", *inputs, transB=1))


def _gelu(graph: GraphBuilder, value: str) -> str:
    return graph.micro("Gelu", value)


def _silu(graph: GraphBuilder, value: str) -> str:
    return graph.op("Mul", value, graph.op("Sigmoid", value))


def _mish(graph: GraphBuilder, value: str) -> str:
    return graph.op("Mul", value, graph.op("Tanh", graph.op("Softplus", value)))


_ACTIVATIONS: dict[str, Callable[[GraphBuilder, str], str]] = {
    "Identity": lambda graph, value: value,
    "Tanh": lambda graph, value: graph.op("Tanh", value),
    "ReLU": lambda graph, value: graph.op("Relu", value),
    "GELU": _gelu,
    "Sigmoid": lambda graph, value: graph.op("Sigmoid", value),
    "SiLU": _silu,
    "Mish": _mish,
    "Softplus": lambda graph, value: graph.op("Softplus", value),
    "ELU": lambda graph, value: graph.op("Elu", value),
    "LeakyReLU": lambda graph, value: graph.op("LeakyRelu", value, alpha=0.01),
}
