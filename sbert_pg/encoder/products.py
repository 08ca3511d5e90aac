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
from sbert_pg.encoder.layers import ACTIVATIONS, MICROSOFT, Block, Linear, Norm, Transformer
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
    """What came into one product while calibrating.

    Attributes:
        lowest: by channel, never above 0.
        highest: by channel, never below 0.
        rows: some of the inputs, ``(rows, channels)``.
    """

    lowest: Array
    highest: Array
    rows: Array

    def divide(self, by: Array) -> None:
        """Divide every channel."""
        self.lowest, self.highest = self.lowest / by, self.highest / by
        self.rows = self.rows / by


@dataclass(frozen=True, slots=True)
class Range:
    """Values that the 256 steps of a uint8 cover.

    Attributes:
        scale: between two steps.
        zero: the step of 0.
    """

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
    """A matrix in int8, symmetric.

    Args:
        axis: 0 for one scale a column, 1 for one a row.

    Returns:
        the integers, from -127 to 127, and the scales.
    """
    largest = np.abs(weight).max(axis=axis, keepdims=True)
    scale = (np.maximum(largest, 1e-12) / 127).astype(np.float32)
    rounded = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    return rounded, scale.squeeze(axis)


class Products:
    """How matrices are stored and multiplied: in fp32, fp16 or int8.

    Attributes:
        dtype: what goes from layer to layer, numpy's float32 or float16; "real" below.
    """

    dtype: type[np.floating[Any]] = np.float32

    def embed(self, writer: Writer, table: Array, ids: str) -> str:
        """Rows of a table by ids, float32 ``(*ids, width)``."""
        raise NotImplementedError

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """``x``, real ``(tokens, in)``, through each of some layers.

        Args:
            x: the input that the layers share.
            names: a name for each; the first one names the input.
        """
        raise NotImplementedError

    def feed_forward(
        self, writer: Writer, x: str, up: Linear, down: Linear, activation: str, name: str
    ) -> str:
        """``x``, real ``(tokens, width)``, through two layers with an activation between them.

        Args:
            up: the first layer.
            down: the second layer.
            activation: applied to what comes out of the first.
            name: the block's; the layers are its ``up`` and ``down``.
        """
        (wide,) = self.linear(writer, x, [up], [f"{name}.up"])
        active = activate(writer, wide, ACTIVATIONS[activation])
        return self.linear(writer, active, [down], [f"{name}.down"])[0]


class Floats(Products):
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


class Int8(Products):
    """int8 with one scale an output channel, and a fixed one for what is multiplied.

    Args:
        ranges: of each product's input.
    """

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        self._ranges = ranges

    def embed(self, writer: Writer, table: Array, ids: str) -> str:
        """See ``Products``. One scale a row, so a rare word costs no other one its precision."""
        stored, scales = integers(table, axis=1)
        row = writer.node("Gather", [writer.tensor(stored, "words"), ids], "word_q")
        scale = writer.node("Gather", [writer.tensor(scales[:, None], "words.scale"), ids])
        return writer.node("Mul", [writer.node("Cast", [row], to=FLOAT), scale], "word")

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
            active = activate(writer, wide, ACTIVATIONS[activation])
            parts.append(
                writer.node("QuantizeLinear", [active, active_scale, active_zero],
                            f"{names[1]}.input")
            )  # fmt: skip
        joined = parts[0] if len(parts) == 1 else writer.node("Concat", parts, "active", axis=1)
        return self._product(writer, [joined, active_scale, active_zero], down, names[1])

    def _steps(self, writer: Writer, name: str) -> tuple[str, str]:
        """Scale and zero of a product's input."""
        steps = self._ranges[name]
        return (
            writer.tensor(np.array(steps.scale, np.float32), f"{name}.input_scale"),
            writer.tensor(np.array(steps.zero, np.uint8), f"{name}.input_zero"),
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
    """Run texts and look at what comes into each product.

    Args:
        model: the fp32 form, made with ``watched``.
        texts: token ids of each text.
        second: where the second text of each pair begins.
    """
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

    Nothing linear stands before what comes out of the activation. There the division would be
    another product, which costs a tenth of the speed and gains .0004 of the mean cosine, so it is
    left out.
    """
    # A projection stands between the normalisation and the layers.
    before = None if model.projection else model.norm
    for number, block in enumerate(model.blocks):
        at = f"layer{number}"
        if before is not None:
            _smooth_norm(before, [block.query, block.key, block.value], seen[f"{at}.query"])
        _smooth_norm(block.attention_norm, [block.up], seen[f"{at}.up"])
        _smooth_value(block, seen[f"{at}.output"])
        before = block.norm


def ranges(model: Transformer, seen: dict[str, Seen]) -> dict[str, Range]:
    """The range of each product."""
    chosen = {key: whole_range(seen[key]) for key in ("projection",) if key in seen}
    for number, block in enumerate(model.blocks):
        for name in ("query", "output", "up"):
            key = f"layer{number}.{name}"
            chosen[key] = whole_range(seen[key])
        key = f"layer{number}.down"
        chosen[key] = best_range(seen[key], (block.down.weight**2).sum(axis=1))
    return chosen


def whole_range(seen: Seen) -> Range:
    """All that was seen and a margin: nothing of these inputs is clipped lightly."""
    return Range.of(float(seen.lowest.min()) * MARGIN, float(seen.highest.max()) * MARGIN)


def best_range(seen: Seen, importance: Array) -> Range:
    """The range with the least relative squared error of the product.

    The error of each token is taken relative to the size of its product, since a layer
    normalisation follows: the few tokens with huge values may lose more than the others.

    Args:
        importance: by channel, the squared length of its weights.
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
    channels = np.maximum(np.maximum(-seen.lowest, seen.highest), 1e-5)
    weights = np.maximum(np.max([np.abs(layer.weight).max(axis=1) for layer in layers], 0), 1e-5)
    logarithm = ALPHA * np.log(channels) - (1 - ALPHA) * np.log(weights)
    return np.asarray(np.exp(logarithm - logarithm.mean()), np.float32)


def _smooth_norm(norm: Norm, layers: Sequence[Linear], seen: Seen) -> None:
    factors = _factors(seen, layers)
    norm.scale, norm.bias = norm.scale / factors, norm.bias / factors
    norm.smoothing = factors
    for layer in layers:
        layer.weight = layer.weight * factors[:, None]
    seen.divide(factors)


def _smooth_value(block: Block, seen: Seen) -> None:
    """Attention mixes tokens and never channels, so what it does to values it does to factors."""
    factors = _factors(seen, [block.output])
    block.value = Linear(block.value.weight / factors, block.value.bias / factors)
    block.output = Linear(block.output.weight * factors[:, None], block.output.bias)
    seen.divide(factors)
