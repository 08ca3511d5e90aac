"""The transformer as ONNX nodes, in the form that onnxruntime runs fastest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sbert_pg.encoder.convert.architectures import Block, Linear, Norm, Transformer
from sbert_pg.encoder.convert.attention import Attention, Batch, Fused
from sbert_pg.encoder.convert.weights import Array
from sbert_pg.encoder.convert.writer import FLOAT, FLOAT16, INT64, Writer


class Products(Protocol):
    """How matrices are stored and multiplied: in fp32, fp16 or int8.

    Attributes:
        dtype: what goes from layer to layer, numpy's float32 or float16; "real" below.
    """

    dtype: type[np.floating[Any]]

    def embed(self, writer: Writer, table: Array, ids: str) -> str:
        """Rows of a table by ids, float32 ``(*ids, width)``."""

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """``x``, real ``(tokens, in)``, through each of some layers.

        Args:
            writer: receives the nodes.
            x: the input that the layers share.
            layers: the layers.
            names: a name for each; the first one names the input.
        """

    def feed_forward(
        self, writer: Writer, x: str, up: Linear, down: Linear, activation: str, name: str
    ) -> str:
        """``x``, real ``(tokens, width)``, through two layers with an activation between them.

        Args:
            writer: receives the nodes.
            x: the input.
            up: the first layer.
            down: the second layer.
            activation: applied to what comes out of the first.
            name: the block's; the layers are its ``up`` and ``down``.
        """


def write(
    writer: Writer,
    model: Transformer,
    products: Products,
    ids: str,
    mask: str,
    attention: type[Attention] = Fused,
) -> str:
    """Token vectors, float32 ``(batch, tokens, width)``.

    Args:
        writer: receives the nodes.
        model: what is written.
        products: how matrices are multiplied.
        ids: token ids, int64 ``(batch, tokens)``.
        mask: 1 for tokens and 0 for padding, int64 ``(batch, tokens)``.
        attention: how attention is written.
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
    summed = writer.node("Add", [words, _positions(writer, model, ids, length)], "embedded")
    # From here on a batch is one matrix of tokens: a product with a bias is then one node.
    x = writer.node("Reshape", [_norm(writer, summed, model.norm), writer.ints(-1, model.width)])
    half = products.dtype == np.float16
    if half:
        x = writer.node("Cast", [x], "half", to=FLOAT16)
    before = model.norm
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
    before: Norm,
    name: str,
) -> str:
    names = [f"{name}.query", f"{name}.key", f"{name}.value"]
    qkv = products.linear(writer, x, [block.query, block.key, block.value], names)
    flat = writer.node("Reshape", [attend.apply(qkv), writer.ints(-1, model.width)], "context")
    (output,) = products.linear(writer, flat, [block.output], [f"{name}.output"])
    dtype = products.dtype
    x = _norm(writer, _residual(writer, output, x, before), block.attention_norm, dtype)
    down = products.feed_forward(writer, x, block.up, block.down, model.activation, name)
    return _norm(writer, _residual(writer, down, x, block.attention_norm), block.norm, dtype)


def _norm(writer: Writer, x: str, norm: Norm, dtype: type[np.floating[Any]] = np.float32) -> str:
    scale = writer.tensor(norm.scale.astype(dtype), "norm.scale")
    bias = writer.tensor(norm.bias.astype(dtype), "norm.bias")
    return writer.node(
        "LayerNormalization", [x, scale, bias], "norm", axis=-1, epsilon=norm.epsilon
    )


def _residual(writer: Writer, x: str, skip: str, norm: Norm) -> str:
    """``x`` plus what came out of ``norm``, unsmoothed."""
    if norm.smoothing is not None:
        skip = writer.node("Mul", [skip, writer.tensor(norm.smoothing, "smoothing")], "skip")
    return writer.node("Add", [x, skip], "residual")


def _positions(writer: Writer, model: Transformer, ids: str, length: str) -> str:
    table = writer.tensor(model.positions, "positions")
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
