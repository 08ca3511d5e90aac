"""Ways of multiplying: fp32, fp16 and int8, and what int8 rounds to what.

Weights are symmetric with one scale an output channel. What is multiplied with them is rounded
with one fixed scale a product, found at conversion: nothing is measured while encoding, and how a
text is rounded does not depend on the texts beside it.

Two things make one scale for all channels good enough. A few channels are ten times larger than the
rest, so every channel is divided by a factor and the weights multiplied by it (SmoothQuant, Xiao et
al. 2022); the division is folded into the layer normalisation before the product, or into the value
projection. And of what comes out of the activation the largest values, which are rare, are clipped
where that makes the error smaller. Clipping the other inputs made the agreement worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from sbert_pg.encoder.engines import load_onnxruntime
from sbert_pg.encoder.files import Array
from sbert_pg.encoder.layers import ACTIVATIONS, MICROSOFT, Linear, Transformer
from sbert_pg.encoder.runner import ATTENTION_MASK, feeds_of, plan
from sbert_pg.encoder.writer import FLOAT, Writer, activate, open_session
from sbert_pg.errors import ConversionError

#: Columns of the wide layer of a feed-forward part that are computed, activated and rounded at a
#: time. What 512 tokens have there, in float32, then stays in the second-level cache.
PART = 384
#: Rows kept of each product's input, over all texts. Four times as many change no range by more
#: than rounding, and make a conversion three times as long.
_ROWS = 1024
#: Tokens in a batch. Every intermediate value leaves the session, so it is small.
_BUDGET = 512
#: Exponent of SmoothQuant: how much of a channel's size goes over to the weights. Measured on
#: all-MiniLM-L6-v2: .5 is worse, .65 to .8 are alike.
ALPHA = 0.75
#: Room left in a range for texts with larger values than the calibration texts have.
MARGIN = 1.15
#: Parts of the largest values at which the range of a product is tried to be cut.
_CUTS = np.linspace(0.25, 1.0, 16)
_LEVELS = 255


@dataclass(slots=True)
class Seen:
    """What came into one product while calibrating: extremes by channel and some rows."""

    lowest: Array
    highest: Array
    rows: Array


@dataclass(frozen=True, slots=True)
class Range:
    """Values that the 256 steps of a uint8 cover: the scale between two, and the step of 0."""

    scale: np.float32
    zero: np.uint8

    @classmethod
    def of(cls, lowest: float, highest: float) -> Range:
        """The range from ``lowest`` to ``highest``, with 0 among its steps."""
        scale = np.float32(max(highest - lowest, 1e-6) / _LEVELS)
        return cls(scale, np.uint8(np.clip(round(-lowest / float(scale)), 0, _LEVELS)))

    def round(self, values: Array) -> Array:
        """Values as they are after quantising."""
        zero = float(self.zero)
        steps = np.clip(np.rint(values / self.scale) + zero, 0, _LEVELS)
        return np.asarray((steps - zero) * self.scale, np.float32)


def integers(weight: Array, axis: int) -> tuple[npt.NDArray[np.int8], Array]:
    """A matrix in int8, -127 to 127, and its scales: one a column for axis 0, one a row for 1."""
    largest = np.abs(weight).max(axis=axis, keepdims=True)
    scale = (np.maximum(largest, 1e-12) / 127).astype(np.float32)
    rounded = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    return rounded, scale.squeeze(axis)


class Products:
    """How matrices are multiplied; ``dtype``, "real" below, is what goes from layer to layer."""

    dtype: type[np.floating[Any]] = np.float32

    def embed(self, writer: Writer, table: Array, ids: str) -> str:
        """Rows of a table by ids, float32 ``(*ids, width)``."""
        raise NotImplementedError

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """``x``, real ``(tokens, in)``, through some layers; the first name is the input's."""
        raise NotImplementedError

    def feed_forward(
        self, writer: Writer, x: str, up: Linear, down: Linear, activation: str, name: str
    ) -> str:
        """``x``, real ``(tokens, width)``, through two layers with an activation between them."""
        (wide,) = self.linear(writer, x, [up], [f"{name}.up"])
        active = activate(writer, wide, ACTIVATIONS[activation])
        return self.linear(writer, active, [down], [f"{name}.down"])[0]


class Floats(Products):
    """The weights as they are, or rounded to half precision."""

    def __init__(self, dtype: type[np.floating[Any]] = np.float32) -> None:
        self.dtype = dtype

    def embed(self, writer: Writer, table: Array, ids: str) -> str:
        """See ``Products``."""
        word = writer.node("Gather", table.astype(self.dtype), ids)
        return word if self.dtype == np.float32 else writer.node("Cast", word, to=FLOAT)

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """See ``Products``."""
        pairs = ((each.weight.astype(self.dtype), each.bias.astype(self.dtype)) for each in layers)
        return [
            writer.node("Gemm", x, *pair, hint=name)
            for pair, name in zip(pairs, names, strict=True)
        ]


class Int8(Products):
    """int8 with one scale an output channel, and a fixed range for what each product takes."""

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        self._ranges = ranges

    def embed(self, writer: Writer, table: Array, ids: str) -> str:
        """See ``Products``. One scale a row, so a rare word costs no other one its precision."""
        stored, scales = integers(table, axis=1)
        row = writer.node("Cast", writer.node("Gather", stored, ids), to=FLOAT)
        return writer.node("Mul", row, writer.node("Gather", scales[:, None], ids))

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """See ``Products``."""
        rounded = self._rounded(writer, x, names[0])
        return [
            self._product(writer, rounded, layer, names[0], name)
            for layer, name in zip(layers, names, strict=True)
        ]

    def feed_forward(
        self, writer: Writer, x: str, up: Linear, down: Linear, activation: str, name: str
    ) -> str:
        """See ``Products``. The wide layer comes in parts, which are joined when they are small."""
        first, second = f"{name}.up", f"{name}.down"
        rounded = self._rounded(writer, x, first)
        parts = []
        for begin in range(0, len(up.bias), PART):
            part = slice(begin, begin + PART)
            layer = Linear(up.weight[:, part], up.bias[part])
            wide = self._product(writer, rounded, layer, first, first)
            active = activate(writer, wide, ACTIVATIONS[activation])
            parts.append(self._rounded(writer, active, second))
        joined = parts[0] if len(parts) == 1 else writer.node("Concat", *parts, axis=1)
        return self._product(writer, joined, down, second, second)

    def _rounded(self, writer: Writer, x: str, name: str) -> str:
        """The input of a product in uint8."""
        steps = self._ranges[name]
        return writer.node("QuantizeLinear", x, np.array(steps.scale), np.array(steps.zero))

    def _product(self, writer: Writer, rounded: str, layer: Linear, input_: str, name: str) -> str:
        """A product with an input in uint8, whose range has a name."""
        stored, scales = integers(layer.weight, axis=0)
        steps = self._ranges[input_]
        return writer.node(
            "MatMulIntegerToFloat", rounded, stored, np.array(steps.scale), scales,
            np.array(steps.zero), "", layer.bias, hint=name, domain=MICROSOFT,
        )  # fmt: skip


class Watched(Floats):
    """The fp32 form, remembering the names of what comes into its products."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, str] = {}

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """See ``Products``."""
        self.inputs[names[0]] = x
        return super().linear(writer, x, layers, names)


def observe(
    model: onnx.ModelProto,
    watched: Watched,
    texts: Sequence[Sequence[int]],
    second: Sequence[int] | None = None,
) -> dict[str, Seen]:
    """What comes into each product of the fp32 form for some texts or pairs."""
    model.graph.output.extend(
        helper.make_tensor_value_info(name, FLOAT, None) for name in watched.inputs.values()
    )
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = open_session(model, options)
    total = sum(map(len, texts))
    seen: dict[str, Seen] = {}
    inputs = [value.name for value in session.get_inputs()]
    for batch in plan([len(ids) for ids in texts], _BUDGET):
        begins = None if second is None else [second[position] for position in batch]
        feeds = feeds_of([texts[position] for position in batch], inputs, begins)
        real = feeds[ATTENTION_MASK].ravel() > 0
        outputs = session.run(list(watched.inputs.values()), feeds)
        for name, values in zip(watched.inputs, outputs, strict=True):
            flat = values.reshape(-1, values.shape[-1])[real]
            if not np.isfinite(flat).all():
                raise ConversionError(f"The input of {name} is not finite on a calibration text.")
            _add(seen, name, flat, _ROWS / total)
    return seen


def _add(seen: dict[str, Seen], name: str, values: Any, part: float) -> None:
    step = max(1, int(1 / part))
    lowest = np.minimum(values.min(axis=0), 0)
    highest = np.maximum(values.max(axis=0), 0)
    rows = values[::step].copy()
    if name in seen:
        before = seen[name]
        lowest = np.minimum(lowest, before.lowest)
        highest = np.maximum(highest, before.highest)
        rows = np.concatenate([before.rows, rows])
    seen[name] = Seen(lowest, highest, rows)


def smooth(model: Transformer, seen: dict[str, Seen]) -> None:
    """Even out the channels before each product, in ``model`` and in ``seen``.

    Not what comes out of the activation: no linear layer is before it, and a product more costs a
    tenth of the speed for .0004 of the mean cosine.
    """
    # A projection stands between the normalisation and the layers.
    before = None if model.projection else model.norm
    for number, block in enumerate(model.blocks):
        parts = [block.query, block.key, block.value]
        for norm, layers, name in (
            (before, parts, "query"),
            (block.attention_norm, [block.up], "up"),
        ):
            if norm is not None:
                norm.smoothing = _factors(seen[f"layer{number}.{name}"], layers)
                norm.scale, norm.bias = norm.scale / norm.smoothing, norm.bias / norm.smoothing
        # Attention mixes tokens and never channels, so what it does to values it does to factors.
        factors = _factors(seen[f"layer{number}.output"], [block.output])
        block.value = Linear(block.value.weight / factors, block.value.bias / factors)
        before = block.norm


def ranges(model: Transformer, seen: Mapping[str, Seen]) -> dict[str, Range]:
    """The range of each product: of what comes out of an activation the best one.

    Of the others all that was seen and a margin: nothing of these inputs is clipped lightly.
    """
    chosen = {
        name: Range.of(float(each.lowest.min()) * MARGIN, float(each.highest.max()) * MARGIN)
        for name, each in seen.items()
    }
    for number, block in enumerate(model.blocks):
        name = f"layer{number}.down"
        chosen[name] = best_range(seen[name], (block.down.weight**2).sum(axis=1))
    return chosen


def best_range(seen: Seen, importance: Array) -> Range:
    """The range with the least squared error of the product, relative to the size of each token's.

    The few tokens with huge values may lose more, since a normalisation follows. ``importance`` is
    the squared length of a channel's weights.
    """
    lowest, highest = float(seen.lowest.min()), float(seen.highest.max())
    sizes = np.asarray((seen.rows**2) @ importance)
    weights = np.asarray(1 / np.maximum(sizes, 1e-3 * float(sizes.mean())), np.float32)
    best = Range.of(lowest, highest)
    least = _error(best, seen.rows, importance, weights)
    # Both ends at once, then each alone: what comes out of GELU has one end that matters.
    for cut_low, cut_high in ((True, True), (False, True), (True, False)):
        for cut in _CUTS:
            tried = Range.of(
                lowest * float(cut) if cut_low else lowest,
                highest * float(cut) if cut_high else highest,
            )
            error = _error(tried, seen.rows, importance, weights)
            if error < least:
                best, least = tried, error
    return best


def _error(tried: Range, rows: Array, importance: Array, weights: Array) -> float:
    return float((((tried.round(rows) - rows) ** 2) @ importance) @ weights)


def _factors(seen: Seen, layers: Sequence[Linear]) -> Array:
    """What each channel is divided by before some layers, and in ``seen``."""
    channels = np.maximum(np.maximum(-seen.lowest, seen.highest), 1e-5)
    weights = np.maximum(np.max([np.abs(layer.weight).max(axis=1) for layer in layers], 0), 1e-5)
    logarithm = ALPHA * np.log(channels) - (1 - ALPHA) * np.log(weights)
    factors = np.asarray(np.exp(logarithm - logarithm.mean()), np.float32)
    for layer in layers:
        layer.weight = layer.weight * factors[:, None]
    seen.lowest, seen.highest = seen.lowest / factors, seen.highest / factors
    seen.rows = seen.rows / factors
    return factors
