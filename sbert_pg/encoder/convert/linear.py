"""Fully connected layers in each precision.

``fp32`` is a plain product. ``int8`` quantises weights once, symmetrically and per output channel,
and activations at run time, asymmetrically and per tensor, as onnxruntime's dynamic quantisation
does; the product runs on the processor's 8-bit instructions. An input that several layers share is
quantised once.

Smoothing moves outliers of an activation's channels into the weights before quantisation, where
they do less harm: Xiao et al. 2022, "SmoothQuant", equation 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from sbert_pg.encoder.convert.architectures import Linear
from sbert_pg.encoder.convert.builder import GraphBuilder

Array = npt.NDArray[np.float32]

#: Balance between activations and weights in smoothing. The paper takes 0.5 for most models and more
#: where activations have the larger outliers, as they do behind a GELU: on all-MiniLM-L6-v2 the mean
#: cosine with fp32 is .988 at 0.5, .9979 at 0.7, .9978 at 0.8, and .993 without smoothing.
ALPHA = 0.7


class Linears(Protocol):
    """How a precision computes ``x @ weight + bias``."""

    def prepare(self, graph: GraphBuilder, value: str) -> Prepared:
        """Make an activation ready for one or several products."""
        ...

    def apply(self, graph: GraphBuilder, value: Prepared, linear: Linear) -> str:
        """The product with its bias."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """An activation, ready for products: its value, and its scale and zero point if quantised."""

    value: str
    scale: str = ""
    zero: str = ""


class Float32:
    """Products in float32."""

    def prepare(self, graph: GraphBuilder, value: str) -> Prepared:
        """Nothing is to be done."""
        return Prepared(value)

    def apply(self, graph: GraphBuilder, value: Prepared, linear: Linear) -> str:
        """A product and a sum, which onnxruntime runs over all tokens at once."""
        product = graph.op("MatMul", value.value, graph.constant(linear.weight, "weight"))
        return graph.op("Add", product, graph.constant(linear.bias, "bias"))


class Int8:
    """Products of 8-bit integers."""

    def prepare(self, graph: GraphBuilder, value: str) -> Prepared:
        """Quantise to unsigned 8-bit integers with the range of this very tensor."""
        return Prepared(*graph.ops("DynamicQuantizeLinear", value, outputs=3))

    def apply(self, graph: GraphBuilder, value: Prepared, linear: Linear) -> str:
        """An integer product that is scaled, and its bias added, as it is written out."""
        quantized, scale = quantize_columns(linear.weight)
        return graph.micro(
            "MatMulIntegerToFloat",
            value.value,
            graph.constant(quantized, "weight"),
            value.scale,
            graph.constant(scale, "scale"),
            value.zero,
            "",
            graph.constant(linear.bias, "bias"),
        )


def quantize_columns(weight: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """Symmetric 8-bit integers of a weight with one scale for each column.

    Args:
        weight: float32 of shape ``(inputs, outputs)``.

    Returns:
        int8 of the same shape, and float32 scales of shape ``(outputs,)``.
    """
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, largest / 127.0, 1.0).astype(np.float32)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


def quantized_rows(graph: GraphBuilder, table: Array, rows: str) -> str:
    """Rows of an embedding table that is stored in 8 bits with one scale for each row.

    Args:
        graph: the graph.
        table: float32 of shape ``(entries, width)``.
        rows: which rows, int64 of any shape.

    Returns:
        The rows in float32, with one axis more than ``rows``.
    """
    transposed, scale = quantize_columns(np.ascontiguousarray(table.T))
    gathered = graph.op("Gather", graph.constant(transposed.T, "table"), rows, axis=0)
    floats = graph.op("Cast", gathered, to=TensorProto.FLOAT)
    scales = graph.op("Gather", graph.constant(scale[:, None], "row_scale"), rows, axis=0)
    return graph.op("Mul", floats, scales)


def smoothing_factors(largest: Array, *weights: Array) -> Array:
    """Factors that an activation's channels are divided by, and the weights' rows multiplied by.

    Args:
        largest: largest magnitude of each channel over sample texts, shape ``(inputs,)``.
        weights: the weights that take the activation, each of shape ``(inputs, outputs)``.

    Returns:
        float32 of shape ``(inputs,)``, with a geometric mean of one.
    """
    rows = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    factors = np.maximum(largest, 1e-5) ** ALPHA / np.maximum(rows, 1e-5) ** (1 - ALPHA)
    factors = factors / np.exp(np.log(factors).mean())
    clipped: Array = np.clip(factors, 1e-2, 1e2).astype(np.float32)
    return clipped
