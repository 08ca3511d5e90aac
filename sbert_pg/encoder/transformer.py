"""The transformer as ONNX nodes, in the form that onnxruntime runs fastest.

Attention is onnxruntime's own for its CPU and for CUDA, plain for all others; windows, and what
onnxruntime's operator has no form of that holds no square, go through the queries in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from sbert_pg.encoder.files import Array
from sbert_pg.encoder.layers import ACTIVATIONS, MICROSOFT, Block, Norm, Transformer
from sbert_pg.encoder.products import Products
from sbert_pg.encoder.runner import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from sbert_pg.encoder.writer import (
    BOOL,
    FLOAT,
    FLOAT16,
    INT32,
    INT64,
    Value,
    Writer,
    activate,
    even_blocks,
)

#: Added to the scores of padding; its exponential is 0 in float32 and half precision alike.
_NOTHING = -60_000.0
#: Queries whose scores are held at a time where attention goes through them in blocks.
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Batch:
    """Values that all layers share: the batch's shape as a vector, MPNet's bias or ``""``."""

    shape: str
    bias: str
    heads: int
    head: int


#: Attention of all heads, from queries, keys and values of ``(batch * tokens, width)`` or in heads.
Attention = Callable[[Writer, Batch, Sequence[str]], str]


def fused(writer: Writer, batch: Batch, qkv: Sequence[str]) -> str:
    """The operator of onnxruntime, as its CPU has it, in float32.

    Without padding no mask is applied; onnxruntime then has a form that never writes the scores of
    a whole text to memory.
    """
    padded = writer.node("Equal", writer.node("ReduceMin", ATTENTION_MASK, keepdims=0), 0)
    mask = writer.node("Cast", ATTENTION_MASK, to=INT32)
    split = [writer.node("Reshape", value, batch.shape) for value in qkv]
    branches = []
    for masked in (mask, ""):
        branch = writer.inner()
        out = branch.node("MultiHeadAttention", *split, "", masked, batch.bias, domain=MICROSOFT,
                          num_heads=batch.heads)  # fmt: skip
        branches.append(branch.graph([helper.make_tensor_value_info(out, FLOAT, None)]))
    return writer.node("If", padded, then_branch=branches[0], else_branch=branches[1])


def fused_by_length(writer: Writer, batch: Batch, qkv: Sequence[str]) -> str:
    """The operator of onnxruntime, as CUDA has it.

    Padding is said by the length of each text, which its fastest kernels take, and nothing is
    decided by what a value is, which would have to be fetched from the GPU first.
    """
    lengths = writer.node("ReduceSum", ATTENTION_MASK, [1], keepdims=0)
    lengths = writer.node("Cast", lengths, to=INT32)
    split = [writer.node("Reshape", value, batch.shape) for value in qkv]
    return writer.node(
        "MultiHeadAttention", *split, "", lengths, batch.bias, domain=MICROSOFT,
        num_heads=batch.heads,
    )  # fmt: skip


def plain(writer: Writer, batch: Batch, qkv: Sequence[str]) -> str:
    """Products and a softmax, which every execution provider has, in float32."""
    mask = writer.node("Cast", ATTENTION_MASK, to=FLOAT)
    added = writer.node("Mul", writer.node("Sub", 1.0, mask), _NOTHING)
    added = writer.node("Unsqueeze", added, [1, 2])
    if batch.bias:
        added = writer.node("Add", added, batch.bias)
    query, key, value = (in_heads(writer, batch, part) for part in qkv)
    query = writer.node("Transpose", query, perm=[0, 2, 1, 3])
    key = writer.node("Transpose", key, perm=[0, 2, 3, 1])
    value = writer.node("Transpose", value, perm=[0, 2, 1, 3])
    scores = writer.node("Mul", writer.node("MatMul", query, key), batch.head**-0.5)
    weights = writer.node("Softmax", writer.node("Add", scores, added), axis=-1)
    context = writer.node("MatMul", weights, value)
    return writer.node("Transpose", context, perm=[0, 2, 1, 3])


def in_heads(writer: Writer, batch: Batch, x: str) -> str:
    """A value as ``(batch, tokens, heads, width of a head)``; keys may have fewer heads."""
    sizes = writer.node("Slice", batch.shape, [0], [2])
    return writer.node("Reshape", x, writer.node("Concat", sizes, [-1, batch.head], axis=0))


def write(
    writer: Writer, model: Transformer, products: Products, attention: Attention, *, typed: bool
) -> str:
    """Token vectors, float32 ``(batch, tokens, width)``, from the inputs; ``typed`` with token
    types.
    """
    sizes = writer.node("Shape", INPUT_IDS)
    shape = writer.node("Concat", sizes, [model.width], axis=0)
    length = writer.node("Slice", sizes, [1], [2])
    bias = ""
    if model.bias is not None and not model.blocked:
        bias = _bias(writer, writer, model.bias, _range(writer, length), length, products)
        bias = writer.node("Unsqueeze", bias, [0])
    batch = Batch(shape, bias, model.heads, model.head)
    x = products.embed(writer, model.words, INPUT_IDS)
    if model.positions is not None:
        x = _placed(writer, model, model.positions, x, length, typed)
    elif model.types is not None and typed:
        types = writer.node("Gather", model.types - model.types[0], TOKEN_TYPE_IDS)
        x = writer.node("Add", x, types)
    # From here on a batch is one matrix of tokens: a product with a bias is then one node.
    x = writer.node("Reshape", write_norm(writer, x, model.norm), [-1, model.words.shape[1]])
    half = products.dtype == np.float16
    if half:
        x = writer.node("Cast", x, to=FLOAT16)
    before = model.norm
    if model.projection is not None:
        (x,), before = products.linear(writer, x, [model.projection], ["projection"]), None
    layers = _Layers(writer, model, products, attention, batch, length)
    for number, block in enumerate(model.blocks):
        x = layers.layer(x, block, before, f"layer{number}")
        before = block.norm
    if half:
        # Sums over the tokens of a text are too long for half precision.
        x = writer.node("Cast", x, to=FLOAT)
    return writer.node("Reshape", write_norm(writer, x, model.final_norm), shape)


def _placed(
    writer: Writer, model: Transformer, table: Array, x: str, length: str, typed: bool
) -> str:
    """Word embeddings with those of their positions and of the token types."""
    if model.types is not None and not typed:
        table = table + model.types[0]
    if model.padding_id is None:
        position = writer.node("Slice", table, [0], length, [0])
    else:
        is_padding = writer.node("Equal", INPUT_IDS, model.padding_id)
        counted = writer.node("Cast", writer.node("Not", is_padding), to=INT64)
        running = writer.node("CumSum", counted, 1)
        position = writer.node("Gather", table, writer.node("Mul", running, counted))
    x = writer.node("Add", x, position)
    if model.types is not None and typed:
        x = writer.node("Add", x, writer.node("Gather", model.types, TOKEN_TYPE_IDS))
    return x


def write_norm(
    writer: Writer, x: str, norm: Norm | None, dtype: type[np.floating[Any]] = np.float32
) -> str:
    """A layer normalisation of ``x``, with its parameters in ``dtype``; ``None`` for none."""
    if norm is None:
        return x
    if norm.centred:
        scale, bias = norm.scale.astype(dtype), norm.bias.astype(dtype)
        return writer.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=norm.epsilon)
    # In float32, since the squares are too large for half precision.
    half = dtype == np.float16
    x = writer.node("Cast", x, to=FLOAT) if half else x
    mean = writer.node("ReduceMean", writer.node("Mul", x, x), [-1], keepdims=1)
    root = writer.node("Sqrt", writer.node("Add", mean, norm.epsilon))
    x = writer.node("Mul", writer.node("Div", x, root), norm.scale)
    return writer.node("Cast", x, to=FLOAT16) if half else x


def _range(writer: Writer, end: str) -> str:
    """0, 1, 2... before ``end``, a vector of one."""
    return writer.node("Range", 0, writer.node("Squeeze", end, [0]), 1)


def _bias(
    writer: Writer, body: Writer, table: Array, at: str, length: str, products: Products
) -> str:
    """The bias of the queries at ``at`` by head and distance, ``(heads, queries, tokens)``."""
    most = table.shape[1] // 2
    column = body.node("Reshape", at, [-1, 1])
    distance = body.node("Sub", _range(writer, length), column)
    place = body.node("Add", body.node("Clip", distance, -most, most), most)
    rows = writer.tensor(table.astype(products.dtype), "bias")
    return body.node("Gather", rows, place, axis=1)


class _Layers:
    """Writes the layers of a transformer."""

    def __init__(
        self,
        writer: Writer,
        model: Transformer,
        products: Products,
        attention: Attention,
        batch: Batch,
        length: str,
    ) -> None:
        self._writer, self._model, self._products = writer, model, products
        self._attention, self._batch, self._length = attention, batch, length
        self._real, self._head = products.dtype, model.head

    def layer(self, x: str, block: Block, before: Norm | None, name: str) -> str:
        """``x``, real ``(batch * tokens, width)`` and out of ``before``, through a layer."""
        writer, products, first = self._writer, self._products, self._model.norm_first
        inner = self._normed(x, block.attention_norm) if first else x
        names = [f"{name}.query", f"{name}.key", f"{name}.value"]
        qkv = products.linear(writer, inner, [block.query, block.key, block.value], names)
        context = writer.node("Reshape", self._context(qkv, block), [-1, len(block.query.bias)])
        (output,) = products.linear(writer, context, [block.output], [f"{name}.output"])
        x = self._added(x, before, self._normed(output, block.attention_end))
        x = x if first else self._normed(x, block.attention_norm)
        down = self._feed_forward(self._normed(x, block.norm) if first else x, block, name)
        x = self._added(x, block.attention_norm, self._normed(down, block.end))
        return x if first else self._normed(x, block.norm)

    def _added(self, x: str, norm: Norm | None, more: str) -> str:
        """``more`` plus ``x``, which came out of ``norm``, unsmoothed."""
        if norm is not None and norm.smoothing is not None:
            x = self._writer.node("Mul", x, norm.smoothing)
        return self._writer.node("Add", more, x)

    def _feed_forward(self, x: str, block: Block, name: str) -> str:
        writer, products, activation = self._writer, self._products, self._model.activation
        if block.gate is None:
            return products.feed_forward(writer, x, block.up, block.down, activation, name)
        names = [f"{name}.gate", f"{name}.up"]
        gate, up = products.linear(writer, x, [block.gate, block.up], names)
        wide = writer.node("Mul", activate(writer, gate, ACTIVATIONS[activation]), up)
        return products.linear(writer, wide, [block.down], [f"{name}.down"])[0]

    def _normed(self, x: str, norm: Norm | None) -> str:
        return write_norm(self._writer, x, norm, self._real)

    def _context(self, qkv: Sequence[str], block: Block) -> str:
        model = self._model
        window = None if model.causal else block.window
        if block.theta or window is not None or model.blocked:
            query, key, value = (in_heads(self._writer, self._batch, part) for part in qkv)
            query, key = self._normed(query, block.query_norm), self._normed(key, block.key_norm)
            if block.theta is not None:
                query, key = self._turned(query, block.theta), self._turned(key, block.theta)
            qkv = [query, self._for_all(key), self._for_all(value)]
        if window is not None:
            return self._windowed(qkv, window)
        if model.blocked:
            return self._blocked(qkv, block.window)
        return self._attention(self._writer, self._batch, qkv)

    def _for_all(self, x: str) -> str:
        """Keys or values, once for each head that shares them."""
        writer, shared = self._writer, self._model.shared
        if shared == 1:
            return x
        wide = writer.node("Expand", writer.node("Unsqueeze", x, [3]), [1, 1, 1, shared, 1])
        return in_heads(writer, self._batch, wide)

    def _blocked(self, qkv: Sequence[str], window: int | None) -> str:
        """Attention that goes through the queries in blocks; each sees all keys that it may.

        All values are ``(batch, tokens, heads, width of a head)``. Blocks are of one size and no
        longer than they must be; what is held grows with the length of a text.
        """
        writer, real, model = self._writer, self._real, self._model
        kind = FLOAT16 if real == np.float16 else FLOAT
        key = writer.node("Transpose", qkv[1], perm=[0, 2, 3, 1])
        value = writer.node("Transpose", qkv[2], perm=[0, 2, 1, 3])
        count, size, rest = even_blocks(writer, self._length, _BLOCK)
        query = writer.node("Pad", qkv[0], self._joined([0, 0, 0, 0, 0], rest, [0, 0]))
        query = writer.node("Reshape", query, self._joined([0], count, size, [-1, self._head]))
        query = writer.node("Mul", query, np.array(self._head**-0.5, real))
        numbers = _range(writer, writer.node("Add", self._length, rest))
        numbers = writer.node("Reshape", numbers, self._joined([1], count, size))
        body = writer.inner()
        some, at = body.name("queries"), body.name("at")
        scores = body.node("MatMul", body.node("Transpose", some, perm=[0, 2, 1, 3]), key)
        if model.bias is not None:
            bias = _bias(writer, body, model.bias, at, self._length, self._products)
            scores = body.node("Add", scores, bias)
        seen = self._seen(body, at, window)
        scores = body.node("Where", seen, scores, np.array(_NOTHING, real))
        context = body.node("MatMul", body.node("Softmax", scores, axis=-1), value)
        out = body.node("Transpose", context, perm=[0, 2, 1, 3])
        parts = writer.scan([(query, kind), (numbers, INT64)], body, [some, at], out, state=False)
        joined = writer.node("Reshape", parts, [0, -1, model.heads, self._head])
        return writer.node("Slice", joined, [0], self._length, [1])

    def _seen(self, body: Writer, at: str, window: int | None) -> str:
        """Which keys the queries at ``at``, ``(1, queries)``, see; true or false."""
        if not self._model.causal:
            return body.node("Unsqueeze", body.node("Cast", ATTENTION_MASK, to=BOOL), [1, 2])
        # What stands before a token is not padding.
        column = body.node("Unsqueeze", at, [2])
        distance = body.node("Sub", column, _range(self._writer, self._length))
        seen = body.node("GreaterOrEqual", distance, [0])
        if window is None:
            return seen
        return body.node("And", seen, body.node("LessOrEqual", distance, [window]))

    def _turned(self, x: str, theta: float) -> str:
        """Rotary positions on ``(batch, tokens, heads, width of a head)``."""
        writer, head = self._writer, self._head
        exponents = np.arange(0, head, 2, dtype=np.float32) / np.float32(head)
        frequencies = np.float32(1) / np.float32(theta) ** exponents
        frequencies = (frequencies / np.float32(self._model.slower)).astype(np.float32)
        positions = writer.node("Cast", _range(writer, self._length), to=FLOAT)
        column = writer.node("Unsqueeze", positions, [0, 2, 3])
        angles = writer.node("Mul", column, np.concatenate([frequencies, frequencies]))
        cosine, sine = (writer.node(op, angles) for op in ("Cos", "Sin"))
        if self._real == np.float16:
            cosine, sine = (writer.node("Cast", turn, to=FLOAT16) for turn in (cosine, sine))
        left = writer.node("Slice", x, [0], [head // 2], [3])
        right = writer.node("Slice", x, [head // 2], [head], [3])
        other = writer.node("Concat", writer.node("Neg", right), left, axis=3)
        return writer.node("Add", writer.node("Mul", x, cosine), writer.node("Mul", other, sine))

    def _windowed(self, qkv: Sequence[str], window: int) -> str:
        """Attention within a window, in blocks of its size: each sees itself and its neighbours.

        So no square of the whole length is ever held. All values are ``(batch, tokens, heads,
        width of a head)``.
        """
        writer, heads, head, real = self._writer, self._model.heads, self._head, self._real
        # Tokens that fill the last block, and a block at each end for the keys.
        rest = writer.node("Mod", writer.node("Neg", self._length), [window])
        padded = writer.node("Add", self._length, rest)
        end = writer.node("Add", rest, [window])
        blocks = [0, -1, window, heads, head]
        query = writer.node("Pad", qkv[0], self._joined([0, 0, 0, 0, 0], rest, [0, 0]))
        query = writer.node("Reshape", query, blocks)
        query = writer.node("Transpose", query, perm=[0, 3, 1, 2, 4])
        key_pads = self._joined([0, window, 0, 0, 0], end, [0, 0])
        key, value = (
            self._neighbours(writer.node("Pad", part, key_pads), padded, window, blocks)
            for part in qkv[1:]
        )
        key = writer.node("Transpose", key, perm=[0, 3, 1, 4, 2])
        value = writer.node("Transpose", value, perm=[0, 3, 1, 2, 4])
        scores = writer.node("MatMul", query, key)
        scores = writer.node("Mul", scores, np.array(head**-0.5, real))
        distance = np.arange(3 * window)[None, :] - window - np.arange(window)[:, None]
        band = np.where(np.abs(distance) <= window, 0, _NOTHING).astype(real)
        scores = writer.node("Add", scores, band)
        # The mask of the keys, in the same blocks.
        mask = writer.node("Pad", ATTENTION_MASK, self._joined([0, window, 0], end))
        seen = self._neighbours(mask, padded, window, [0, -1, window])
        absent = writer.node("Not", writer.node("Cast", seen, to=BOOL))
        absent = writer.node("Unsqueeze", absent, [1, 3])
        scores = writer.node("Where", absent, np.array(_NOTHING, real), scores)
        context = writer.node("MatMul", writer.node("Softmax", scores, axis=-1), value)
        context = writer.node("Transpose", context, perm=[0, 2, 3, 1, 4])
        context = writer.node("Reshape", context, [0, -1, heads, head])
        return writer.node("Slice", context, [0], self._length, [1])

    def _joined(self, *parts: Value) -> str:
        return self._writer.node("Concat", *parts, axis=0)

    def _neighbours(self, x: str, length: str, window: int, blocks: list[int]) -> str:
        """Blocks of ``x``, each with the one before it and the one after it, on axis 2."""
        writer, parts = self._writer, []
        for begin in (0, window, 2 * window):
            end = writer.node("Add", length, [begin])
            part = writer.node("Slice", x, [begin], end, [1])
            parts.append(writer.node("Reshape", part, blocks))
        return writer.node("Concat", *parts, axis=2)
