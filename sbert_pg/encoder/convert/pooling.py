"""From token vectors to one vector a text, inside the graph.

Source: ``sentence_transformer/modules/pooling.py`` of sentence-transformers, for padding at the
right. Pooling inside the graph means that no matrix of tokens ever crosses to Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sbert_pg.encoder.convert.activations import activate
from sbert_pg.encoder.convert.writer import FLOAT, INT32, Writer
from sbert_pg.encoder.description import PoolingMode
from sbert_pg.encoder.layers import Layer, Normalize

#: Least divisor of a mean and of a normalisation, as in sentence-transformers and torch.
_LEAST_COUNT = 1e-9
_LEAST_LENGTH = 1e-12


@dataclass(frozen=True, slots=True)
class Pooled:
    """Values that pooling works on.

    Attributes:
        tokens: token vectors, float32 ``(batch, tokens, width)``.
        mask: 1 for tokens that are pooled, int64 ``(batch, tokens)``.
        prompt_excluded: whether ``mask`` may begin with zeros.
    """

    tokens: str
    mask: str
    prompt_excluded: bool


def pool(writer: Writer, values: Pooled, modes: Sequence[PoolingMode], normalized: bool) -> str:
    """The pooled vector, ``(batch, len(modes) * width)``.

    Args:
        writer: receives the nodes.
        values: what is pooled.
        modes: in the order of concatenation.
        normalized: whether the next layer is ``Normalize``; a lone mean is then a sum.
    """
    if tuple(modes) == ("mean",) and normalized:
        return _sum(writer, values, writer.node("Cast", [values.mask], "mask_f", to=FLOAT))
    vectors = [_MODES[mode](writer, values) for mode in modes]
    return vectors[0] if len(vectors) == 1 else writer.node("Concat", vectors, "pooled", axis=1)


def finish(writer: Writer, vector: str, layers: Sequence[Layer]) -> str:
    """The layers after pooling."""
    for layer in layers:
        if isinstance(layer, Normalize):
            length = writer.node("ReduceL2", [vector, writer.ints(1)], "length", keepdims=1)
            bounded = writer.node("Max", [length, writer.scalar(_LEAST_LENGTH)], "length")
            vector = writer.node("Div", [vector, bounded], "normalized")
        else:
            inputs = [vector, writer.tensor(layer.weight, "dense.weight")]
            if layer.bias is not None:
                inputs.append(writer.tensor(layer.bias, "dense.bias"))
            vector = activate(writer, writer.node("Gemm", inputs, "dense", transB=1),
                              layer.activation)  # fmt: skip
    return vector


def _sum(writer: Writer, values: Pooled, weights: str) -> str:
    """Sum of the token vectors by weights, float32 ``(batch, tokens)``."""
    row = writer.node("Unsqueeze", [weights, writer.ints(1)], "weights")
    total = writer.node("MatMul", [row, values.tokens], "sum")
    return writer.node("Squeeze", [total, writer.ints(1)], "sum")


def _count(writer: Writer, weights: str) -> str:
    total = writer.node("ReduceSum", [weights, writer.ints(1)], "count", keepdims=1)
    return writer.node("Max", [total, writer.scalar(_LEAST_COUNT)], "count")


def _mean(writer: Writer, values: Pooled) -> str:
    weights = writer.node("Cast", [values.mask], "mask_f", to=FLOAT)
    return writer.node("Div", [_sum(writer, values, weights), _count(writer, weights)], "mean")


def _mean_sqrt(writer: Writer, values: Pooled) -> str:
    weights = writer.node("Cast", [values.mask], "mask_f", to=FLOAT)
    root = writer.node("Sqrt", [_count(writer, weights)])
    return writer.node("Div", [_sum(writer, values, weights), root], "mean_sqrt")


def _weighted_mean(writer: Writer, values: Pooled) -> str:
    # Positions are counted from the first token of the text, prompt or not.
    mask = writer.node("Cast", [values.mask], "mask_f", to=FLOAT)
    positions = writer.node("Cast", [_positions(writer, values)], "positions_f", to=FLOAT)
    weights = writer.node("Mul", [mask, positions], "weights")
    return writer.node("Div", [_sum(writer, values, weights), _count(writer, weights)], "weighted")


def _positions(writer: Writer, values: Pooled) -> str:
    """1, 2, 3... for each token, int64 ``(tokens,)``."""
    shape = writer.node("Shape", [values.mask])
    length = writer.node("Gather", [shape, writer.tensor(np.array(1, np.int64), "one")], axis=0)
    one = writer.tensor(np.array(1, np.int64), "one")
    return writer.node("Range", [one, writer.node("Add", [length, one]), one], "positions")


def _at(writer: Writer, values: Pooled, index: str) -> str:
    """The token at an index for each text, int64 ``(batch, 1)``."""
    return writer.node("GatherND", [values.tokens, index], "token", batch_dims=1)


def _first(writer: Writer, values: Pooled) -> str:
    if not values.prompt_excluded:
        zero = writer.tensor(np.array(0, np.int64), "zero")
        return writer.node("Gather", [values.tokens, zero], "cls", axis=1)
    mask = writer.node("Cast", [values.mask], "mask_i", to=INT32)
    index = writer.node("ArgMax", [mask], "first", axis=1, keepdims=1)
    return _at(writer, values, index)


def _last(writer: Writer, values: Pooled) -> str:
    marked = writer.node("Mul", [values.mask, _positions(writer, values)], "marked")
    marked = writer.node("Cast", [marked], "marked", to=INT32)
    index = writer.node("ArgMax", [marked], "last", axis=1, keepdims=1)
    any_left = writer.node("ReduceMax", [values.mask, writer.ints(1)], "any", keepdims=1)
    weight = writer.node("Cast", [any_left], "any_f", to=FLOAT)
    return writer.node("Mul", [_at(writer, values, index), weight], "lasttoken")


def _max(writer: Writer, values: Pooled) -> str:
    column = writer.node("Unsqueeze", [values.mask, writer.ints(2)], "mask_column")
    kept = writer.node("Equal", [column, writer.tensor(np.array(1, np.int64), "one")])
    nothing = writer.scalar(-np.inf)
    tokens = writer.node("Where", [kept, values.tokens, nothing], "kept")
    return writer.node("ReduceMax", [tokens, writer.ints(1)], "max", keepdims=0)


_MODES = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
