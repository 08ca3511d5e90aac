"""The transformer as ONNX nodes, in the form that onnxruntime runs fastest.

Attention is onnxruntime's own for its CPU and for CUDA, plain for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbert_pg.encoder.files import Array
from sbert_pg.encoder.layers import MICROSOFT, Block, Norm, Transformer
from sbert_pg.encoder.products import Products
from sbert_pg.encoder.writer import FLOAT, FLOAT16, INT32, INT64, Writer

#: Added to the scores of padding; its exponential is 0 in float32 and half precision alike.
_NOTHING = -60_000.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Values that all layers share.

    Attributes:
        shape: int64 ``(batch, tokens, width)`` as a vector.
        mask: 1 for tokens and 0 for padding, int64 ``(batch, tokens)``.
        bias: attention bias of MPNet, ``(1, heads, tokens, tokens)``, or ``""``.
    """

    shape: str
    mask: str
    bias: str


class Fused:
    """onnxruntime's own operator, as its CPU has it.

    Without padding no mask is applied; onnxruntime then has a form that never writes the scores of
    a whole text to memory.
    """

    def __init__(self, writer: Writer, batch: Batch, heads: int, width: int) -> None:
        self._writer, self._batch, self._heads = writer, batch, heads
        least = writer.node("ReduceMin", [batch.mask], "least", keepdims=0)
        zero = writer.tensor(np.array(0, np.int64), "zero")
        self._padded = writer.node("Equal", [least, zero], "padded")
        self._mask = writer.node("Cast", [batch.mask], "mask_i", to=INT32)

    def apply(self, qkv: Sequence[str]) -> str:
        """Attention of all heads; all values are float32 ``(batch * tokens, width)``."""
        writer, batch = self._writer, self._batch
        split = [writer.node("Reshape", [value, batch.shape], "heads") for value in qkv]
        then, other = writer.inner(), writer.inner()
        padded = then.node(
            "MultiHeadAttention", [*split, "", self._mask, batch.bias], "masked",
            domain=MICROSOFT, num_heads=self._heads,
        )  # fmt: skip
        whole = other.node(
            "MultiHeadAttention", [*split, "", "", batch.bias], "whole", domain=MICROSOFT,
            num_heads=self._heads,
        )  # fmt: skip
        return writer.branch(self._padded, then, padded, other, whole, "attention")


class FusedByLength:
    """onnxruntime's own operator, as CUDA has it.

    Padding is said by the length of each text, which its fastest kernels take, and nothing is
    decided by what a value is, which would have to be fetched from the GPU first.
    """

    def __init__(self, writer: Writer, batch: Batch, heads: int, width: int) -> None:
        self._writer, self._batch, self._heads = writer, batch, heads
        lengths = writer.node("ReduceSum", [batch.mask, writer.ints(1)], "lengths", keepdims=0)
        self._lengths = writer.node("Cast", [lengths], "lengths_i", to=INT32)

    def apply(self, qkv: Sequence[str]) -> str:
        """Attention of all heads; all values are of one type, ``(batch * tokens, width)``."""
        writer, batch = self._writer, self._batch
        split = [writer.node("Reshape", [value, batch.shape], "heads") for value in qkv]
        return writer.node(
            "MultiHeadAttention", [*split, "", self._lengths, batch.bias], "attention",
            domain=MICROSOFT, num_heads=self._heads,
        )  # fmt: skip


class Plain:
    """Products and a softmax, which every execution provider has."""

    def __init__(self, writer: Writer, batch: Batch, heads: int, width: int) -> None:
        self._writer = writer
        per_head = writer.ints(heads, width // heads)
        two = writer.node("Slice", [batch.shape, writer.ints(0), writer.ints(2)], "two")
        self._shape = writer.node("Concat", [two, per_head], "head_shape", axis=0)
        self._scale = writer.scalar((width // heads) ** -0.5)
        mask = writer.node("Cast", [batch.mask], "mask_f", to=FLOAT)
        absent = writer.node("Sub", [writer.scalar(1.0), mask], "absent")
        added = writer.node("Mul", [absent, writer.scalar(_NOTHING)], "mask_added")
        self._added = writer.node("Unsqueeze", [added, writer.ints(1, 2)], "mask_added")
        if batch.bias:
            self._added = writer.node("Add", [self._added, batch.bias], "mask_added")

    def apply(self, qkv: Sequence[str]) -> str:
        """Attention of all heads; all values are float32 ``(batch * tokens, width)``."""
        writer = self._writer
        query, key, value = (writer.node("Reshape", [part, self._shape], "heads") for part in qkv)
        query = writer.node("Transpose", [query], "query", perm=[0, 2, 1, 3])
        key = writer.node("Transpose", [key], "key", perm=[0, 2, 3, 1])
        value = writer.node("Transpose", [value], "value", perm=[0, 2, 1, 3])
        scores = writer.node("MatMul", [query, key], "scores")
        scores = writer.node("Mul", [scores, self._scale], "scores")
        scores = writer.node("Add", [scores, self._added], "scores")
        weights = writer.node("Softmax", [scores], "weights", axis=-1)
        context = writer.node("MatMul", [weights, value], "context")
        return writer.node("Transpose", [context], "context", perm=[0, 2, 1, 3])


Attention = Fused | FusedByLength | Plain


def write(
    writer: Writer,
    model: Transformer,
    products: Products,
    ids: str,
    mask: str,
    attention: type[Attention] = Fused,
    types: str | None = None,
) -> str:
    """Token vectors, float32 ``(batch, tokens, width)``.

    Args:
        ids: token ids, int64 ``(batch, tokens)``.
        mask: 1 for tokens and 0 for padding, int64 ``(batch, tokens)``.
        types: token types, int64 ``(batch, tokens)``; ``None`` for type 0 everywhere.
    """
    sizes = writer.node("Shape", [ids], "sizes")
    width = writer.ints(model.width)
    length = writer.node(
        "Gather", [sizes, writer.tensor(np.array(1, np.int64), "one")], "length", axis=0
    )
    shape = writer.node("Concat", [sizes, width], "shape", axis=0)
    batch = Batch(shape, mask, _relative(writer, model, length, products.dtype))
    attend = attention(writer, batch, model.heads, model.width)
    words = products.embed(writer, model.words, ids)
    table = model.positions
    if model.types is not None and types is None:
        table = table + model.types[0]
    summed = writer.node("Add", [words, _positions(writer, model, table, ids, length)], "embedded")
    if model.types is not None and types is not None:
        type_ = writer.node("Gather", [writer.tensor(model.types, "types"), types], "type")
        summed = writer.node("Add", [summed, type_], "embedded")
    # From here on a batch is one matrix of tokens: a product with a bias is then one node.
    x = writer.node(
        "Reshape", [write_norm(writer, summed, model.norm), writer.ints(-1, model.words.shape[1])]
    )
    half = products.dtype == np.float16
    if half:
        x = writer.node("Cast", [x], "half", to=FLOAT16)
    before: Norm | None = model.norm
    if model.projection is not None:
        (x,), before = products.linear(writer, x, [model.projection], ["projection"]), None
    for number, block in enumerate(model.blocks):
        x = _block(writer, model, block, products, attend, x, before, f"layer{number}")
        before = block.norm
    if half:
        # Sums over the tokens of a text are too long for half precision.
        x = writer.node("Cast", [x], "single", to=FLOAT)
    return writer.node("Reshape", [x, shape], "tokens")


def _block(
    writer: Writer,
    model: Transformer,
    block: Block,
    products: Products,
    attend: Attention,
    x: str,
    before: Norm | None,
    name: str,
) -> str:
    names = [f"{name}.query", f"{name}.key", f"{name}.value"]
    qkv = products.linear(writer, x, [block.query, block.key, block.value], names)
    flat = writer.node("Reshape", [attend.apply(qkv), writer.ints(-1, model.width)], "context")
    (output,) = products.linear(writer, flat, [block.output], [f"{name}.output"])
    dtype = products.dtype
    x = write_norm(writer, _residual(writer, output, x, before), block.attention_norm, dtype)
    down = products.feed_forward(writer, x, block.up, block.down, model.activation, name)
    return write_norm(writer, _residual(writer, down, x, block.attention_norm), block.norm, dtype)


def write_norm(
    writer: Writer, x: str, norm: Norm, dtype: type[np.floating[Any]] = np.float32
) -> str:
    """A layer normalisation of ``x``, with its parameters in ``dtype``."""
    if not norm.centred:
        return _write_rms(writer, x, norm, dtype)
    scale = writer.tensor(norm.scale.astype(dtype), "norm.scale")
    bias = writer.tensor(norm.bias.astype(dtype), "norm.bias")
    return writer.node(
        "LayerNormalization", [x, scale, bias], "norm", axis=-1, epsilon=norm.epsilon
    )


def _write_rms(writer: Writer, x: str, norm: Norm, dtype: type[np.floating[Any]]) -> str:
    """In float32, since the squares are too large for half precision."""
    half = dtype == np.float16
    x = writer.node("Cast", [x], "single", to=FLOAT) if half else x
    square = writer.node("Mul", [x, x], "square")
    mean = writer.node("ReduceMean", [square, writer.ints(-1)], "mean", keepdims=1)
    bounded = writer.node("Add", [mean, writer.scalar(norm.epsilon)], "mean")
    x = writer.node("Div", [x, writer.node("Sqrt", [bounded], "rms")], "norm")
    x = writer.node("Mul", [x, writer.tensor(norm.scale, "norm.scale")], "norm")
    return writer.node("Cast", [x], "norm", to=FLOAT16) if half else x


def _residual(writer: Writer, x: str, skip: str, norm: Norm | None) -> str:
    """``x`` plus what came out of ``norm``, unsmoothed."""
    if norm is not None and norm.smoothing is not None:
        skip = writer.node("Mul", [skip, writer.tensor(norm.smoothing, "smoothing")], "skip")
    return writer.node("Add", [x, skip], "residual")


def _positions(writer: Writer, model: Transformer, rows: Array, ids: str, length: str) -> str:
    table = writer.tensor(rows, "positions")
    if model.padding_id is None:
        end = writer.node("Unsqueeze", [length, writer.ints(0)], "end")
        return writer.node("Slice", [table, writer.ints(0), end, writer.ints(0)], "position")
    padding = writer.tensor(np.array(model.padding_id, np.int64), "padding_id")
    is_padding = writer.node("Equal", [ids, padding], "is_padding")
    counted = writer.node("Cast", [writer.node("Not", [is_padding])], "counted", to=INT64)
    running = writer.node("CumSum", [counted, writer.tensor(np.array(1, np.int64), "one")])
    return writer.node("Gather", [table, writer.node("Mul", [running, counted])], "position")


def _relative(
    writer: Writer, model: Transformer, length: str, dtype: type[np.floating[Any]]
) -> str:
    """MPNet's bias for a batch: a table by distance, looked up at all pairs of positions."""
    if model.relative_bias is None:
        return ""
    zero = writer.tensor(np.array(0, np.int64), "zero")
    one = writer.tensor(np.array(1, np.int64), "one")
    middle = writer.tensor(np.array(model.relative_bias.shape[1] // 2, np.int64), "middle")
    positions = writer.node("Range", [zero, length, one], "range")
    column = writer.node("Unsqueeze", [positions, writer.ints(1)], "column")
    distance = writer.node("Sub", [positions, column], "distance")
    index = writer.node("Add", [distance, middle], "distance_index")
    table = writer.tensor(model.relative_bias.astype(dtype), "relative_bias")
    bias = writer.node("Gather", [table, index], "bias", axis=1)
    return writer.node("Unsqueeze", [bias, writer.ints(0)], "attention_bias")
