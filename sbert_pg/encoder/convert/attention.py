"""Attention as ONNX nodes: onnxruntime's own for its CPU and for CUDA, plain for all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sbert_pg.encoder.convert.writer import FLOAT, INT32, MICROSOFT, Writer

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
