"""Ways of multiplying: fp32, and int8 with activations quantised as they come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sbert_pg.encoder.convert.architectures import Linear
from sbert_pg.encoder.convert.weights import Array
from sbert_pg.encoder.convert.writer import FLOAT, MICROSOFT, Writer


class Float32:
    """The weights as they are."""

    def embed(self, writer: Writer, table: Array, ids: str) -> str:
        """See ``Products``."""
        return writer.node("Gather", [writer.tensor(table, "words"), ids], "word")

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """See ``Products``."""
        return [
            writer.node(
                "Gemm",
                [x, writer.tensor(layer.weight, f"{name}.weight"),
                 writer.tensor(layer.bias, f"{name}.bias")],
                name,
            )
            for layer, name in zip(layers, names, strict=True)
        ]  # fmt: skip


def quantize(weight: Array, axis: int) -> tuple[npt.NDArray[np.int8], Array]:
    """A matrix in int8, symmetric, with one scale for each row or column.

    Args:
        weight: the matrix.
        axis: 0 for one scale a column, 1 for one a row.

    Returns:
        the integers, from -127 to 127, and the scales.
    """
    largest = np.abs(weight).max(axis=axis, keepdims=True)
    scale = (np.maximum(largest, 1e-12) / 127).astype(np.float32)
    integers = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    return integers, scale.squeeze(axis)


class Dynamic8:
    """int8: weights by output channel, activations by tensor, with the range they have."""

    def embed(self, writer: Writer, table: Array, ids: str) -> str:
        """See ``Products``."""
        return embed_rows(writer, table, ids)

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """See ``Products``."""
        hints = [f"{names[0]}.input", f"{names[0]}.input_scale", f"{names[0]}.input_zero"]
        x, scale, zero = writer.nodes_of("DynamicQuantizeLinear", [x], hints)
        outputs = []
        for layer, name in zip(layers, names, strict=True):
            integers, scales = quantize(layer.weight, axis=0)
            inputs = [
                x,
                writer.tensor(integers, f"{name}.weight"),
                scale,
                writer.tensor(scales, f"{name}.scale"),
                zero,
                "",
                writer.tensor(layer.bias, f"{name}.bias"),
            ]
            outputs.append(writer.node("MatMulIntegerToFloat", inputs, name, domain=MICROSOFT))
        return outputs


class Blocks8:
    """int8 in blocks of the input's channels, for weights and activations alike.

    Each block of 32 has a scale of its own, for each output channel and for each token: nothing
    outside a text has a say in how it is rounded.
    """

    def __init__(self, block: int = 32) -> None:
        self._block = block

    def embed(self, writer: Writer, table: Array, ids: str) -> str:
        """See ``Products``."""
        return embed_rows(writer, table, ids)

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """See ``Products``."""
        return [
            self._product(writer, x, layer, name) for layer, name in zip(layers, names, strict=True)
        ]

    def _product(self, writer: Writer, x: str, layer: Linear, name: str) -> str:
        inputs, outputs = layer.weight.shape
        blocks = -(-inputs // self._block)
        padded = np.zeros((outputs, blocks * self._block), np.float32)
        padded[:, :inputs] = layer.weight.T
        integers, scales = quantize(padded.reshape(-1, self._block), axis=1)
        stored = (integers.astype(np.int16) + 128).astype(np.uint8)
        return writer.node(
            "MatMulNBits",
            [
                x,
                writer.tensor(stored.reshape(outputs, blocks, self._block), f"{name}.weight"),
                writer.tensor(scales.reshape(outputs, blocks), f"{name}.scale"),
                "",
                "",
                writer.tensor(layer.bias, f"{name}.bias"),
            ],
            name,
            domain=MICROSOFT,
            K=inputs,
            N=outputs,
            bits=8,
            block_size=self._block,
            accuracy_level=4,
        )


def embed_rows(writer: Writer, table: Array, ids: str) -> str:
    """Rows of a table in int8. One scale a row, so a rare word costs no other one its precision."""
    integers, scales = quantize(table, axis=1)
    row = writer.node("Gather", [writer.tensor(integers, "words"), ids], "word_q")
    scale = writer.node("Gather", [writer.tensor(scales[:, None], "words.scale"), ids])
    return writer.node("Mul", [writer.node("Cast", [row], to=FLOAT), scale], "word")
