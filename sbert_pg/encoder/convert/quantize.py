"""The int8 form: what is rounded to what.

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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sbert_pg.encoder.convert.architectures import Block, Linear, Norm, Transformer
from sbert_pg.encoder.convert.weights import Array

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
        weight: the matrix.
        axis: 0 for one scale a column, 1 for one a row.

    Returns:
        the integers, from -127 to 127, and the scales.
    """
    largest = np.abs(weight).max(axis=axis, keepdims=True)
    scale = (np.maximum(largest, 1e-12) / 127).astype(np.float32)
    rounded = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    return rounded, scale.squeeze(axis)


def smooth(model: Transformer, seen: dict[str, Seen], alpha: float = ALPHA) -> None:
    """Even out the channels before each product, in ``model`` and in ``seen``.

    Nothing linear stands before what comes out of the activation. There the division would be a
    product of its own, which costs a tenth of the speed and gains .0004 of the mean cosine, so it
    is left out.
    """
    before = model.norm
    for number, block in enumerate(model.blocks):
        at = f"layer{number}"
        qkv = [block.query, block.key, block.value]
        _smooth_norm(before, qkv, seen[f"{at}.query"], alpha)
        _smooth_norm(block.attention_norm, [block.up], seen[f"{at}.up"], alpha)
        _smooth_value(block, seen[f"{at}.output"], alpha)
        before = block.norm


def ranges(model: Transformer, seen: dict[str, Seen]) -> dict[str, Range]:
    """The range of each product."""
    found = {}
    for number, block in enumerate(model.blocks):
        for name in ("query", "output", "up"):
            key = f"layer{number}.{name}"
            found[key] = whole_range(seen[key])
        key = f"layer{number}.down"
        found[key] = best_range(seen[key], (block.down.weight**2).sum(axis=1))
    return found


def whole_range(seen: Seen) -> Range:
    """All that was seen and a margin: nothing of these inputs is clipped lightly."""
    return Range.of(float(seen.lowest.min()) * MARGIN, float(seen.highest.max()) * MARGIN)


def best_range(seen: Seen, importance: Array) -> Range:
    """The range with the least relative squared error of the product.

    The error of each token is taken relative to the size of its product, since a layer
    normalisation follows: the few tokens with huge values may lose more than the others.

    Args:
        seen: what is rounded.
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


def _factors(seen: Seen, layers: Sequence[Linear], alpha: float) -> Array:
    channels = np.maximum(np.maximum(-seen.lowest, seen.highest), 1e-5)
    weights = np.maximum(np.max([np.abs(layer.weight).max(axis=1) for layer in layers], 0), 1e-5)
    logarithm = alpha * np.log(channels) - (1 - alpha) * np.log(weights)
    return np.asarray(np.exp(logarithm - logarithm.mean()), np.float32)


def _smooth_norm(norm: Norm, layers: Sequence[Linear], seen: Seen, alpha: float) -> None:
    factors = _factors(seen, layers, alpha)
    norm.scale, norm.bias = norm.scale / factors, norm.bias / factors
    norm.smoothing = factors
    for layer in layers:
        layer.weight = layer.weight * factors[:, None]
    seen.divide(factors)


def _smooth_value(block: Block, seen: Seen, alpha: float) -> None:
    """Attention mixes tokens and never channels, so what it does to values it does to factors."""
    factors = _factors(seen, [block.output], alpha)
    block.value = Linear(block.value.weight / factors, block.value.bias / factors)
    block.output = Linear(block.output.weight * factors[:, None], block.output.bias)
    seen.divide(factors)
