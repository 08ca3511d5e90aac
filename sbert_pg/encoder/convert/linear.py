"""Ways of multiplying: fp32 and fp16, int8 by channel, and int8 in blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbert_pg.encoder.convert.activations import activate
from sbert_pg.encoder.convert.architectures import Linear
from sbert_pg.encoder.convert.quantize import Range, integers
from sbert_pg.encoder.convert.weights import Array
from sbert_pg.encoder.convert.writer import FLOAT, MICROSOFT, Writer

#: Columns of the wide layer of a feed-forward part that are computed, activated and rounded at a
#: time. What 512 tokens have there, in float32, then stays in the second-level cache.
PART = 384


class _Plain:
    """A feed-forward part as two products that know nothing of each other."""

    dtype: type[np.floating[Any]] = np.float32

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """See ``Products``."""
        raise NotImplementedError

    def feed_forward(
        self, writer: Writer, x: str, up: Linear, down: Linear, activation: str, name: str
    ) -> str:
        """See ``Products``."""
        (wide,) = self.linear(writer, x, [up], [f"{name}.up"])
        (narrow,) = self.linear(writer, activate(writer, wide, activation), [down],
                                [f"{name}.down"])  # fmt: skip
        return narrow


class Floats(_Plain):
    """The weights as they are, or rounded to half precision."""

    def __init__(self, dtype: type[np.floating[Any]] = np.float32) -> None:
        self.dtype = dtype

    def embed(self, writer: Writer, table: Array, ids: str) -> str:
        """See ``Products``."""
        stored = writer.tensor(table.astype(self.dtype), "words")
        word = writer.node("Gather", [stored, ids], "word")
        return word if self.dtype == np.float32 else writer.node("Cast", [word], "word", to=FLOAT)

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """See ``Products``."""
        return [
            writer.node(
                "Gemm",
                [x, writer.tensor(layer.weight.astype(self.dtype), f"{name}.weight"),
                 writer.tensor(layer.bias.astype(self.dtype), f"{name}.bias")],
                name,
            )
            for layer, name in zip(layers, names, strict=True)
        ]  # fmt: skip


class Int8:
    """int8 with one scale an output channel, and a fixed one for what is multiplied.

    Args:
        ranges: of each product's input.
    """

    dtype: type[np.floating[Any]] = np.float32

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        self._ranges = ranges

    def embed(self, writer: Writer, table: Array, ids: str) -> str:
        """See ``Products``."""
        return embed_rows(writer, table, ids)

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """See ``Products``."""
        scale, zero = self._steps(writer, names[0])
        rounded = writer.node("QuantizeLinear", [x, scale, zero], f"{names[0]}.input")
        return [
            self._product(writer, [rounded, scale, zero], layer, name)
            for layer, name in zip(layers, names, strict=True)
        ]

    def feed_forward(
        self, writer: Writer, x: str, up: Linear, down: Linear, activation: str, name: str
    ) -> str:
        """See ``Products``. The wide layer comes in parts, which are joined when they are small."""
        names = f"{name}.up", f"{name}.down"
        scale, zero = self._steps(writer, names[0])
        rounded = writer.node("QuantizeLinear", [x, scale, zero], f"{names[0]}.input")
        active_scale, active_zero = self._steps(writer, names[1])
        parts = []
        for begin in range(0, len(up.bias), PART):
            part = slice(begin, begin + PART)
            layer = Linear(up.weight[:, part], up.bias[part])
            wide = self._product(writer, [rounded, scale, zero], layer, names[0])
            active = activate(writer, wide, activation)
            parts.append(
                writer.node("QuantizeLinear", [active, active_scale, active_zero],
                            f"{names[1]}.input")
            )  # fmt: skip
        joined = parts[0] if len(parts) == 1 else writer.node("Concat", parts, "active", axis=1)
        return self._product(writer, [joined, active_scale, active_zero], down, names[1])

    def _steps(self, writer: Writer, name: str) -> tuple[str, str]:
        """Scale and zero of a product's input."""
        found = self._ranges[name]
        return (
            writer.tensor(np.array(found.scale, np.float32), f"{name}.input_scale"),
            writer.tensor(np.array(found.zero, np.uint8), f"{name}.input_zero"),
        )

    @staticmethod
    def _product(writer: Writer, x: Sequence[str], layer: Linear, name: str) -> str:
        """A product; ``x`` is what is multiplied, its scale and its zero."""
        rounded, scale, zero = x
        stored, scales = integers(layer.weight, axis=0)
        inputs = [
            rounded,
            writer.tensor(stored, f"{name}.weight"),
            scale,
            writer.tensor(scales, f"{name}.scale"),
            zero,
            "",
            writer.tensor(layer.bias, f"{name}.bias"),
        ]
        return writer.node("MatMulIntegerToFloat", inputs, name, domain=MICROSOFT)


class Blocks8(_Plain):
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
        stored, scales = integers(padded.reshape(-1, self._block), axis=1)
        unsigned = (stored.astype(np.int16) + 128).astype(np.uint8)
        return writer.node(
            "MatMulNBits",
            [
                x,
                writer.tensor(unsigned.reshape(outputs, blocks, self._block), f"{name}.weight"),
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
    stored, scales = integers(table, axis=1)
    row = writer.node("Gather", [writer.tensor(stored, "words"), ids], "word_q")
    scale = writer.node("Gather", [writer.tensor(scales[:, None], "words.scale"), ids])
    return writer.node("Mul", [writer.node("Cast", [row], to=FLOAT), scale], "word")
