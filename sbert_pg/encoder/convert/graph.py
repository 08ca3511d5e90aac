"""The ONNX model of a description."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from sbert_pg.encoder.convert import architectures, transformer
from sbert_pg.encoder.convert.architectures import ARCHITECTURES
from sbert_pg.encoder.convert.attention import Attention, Fused, FusedByLength, Plain
from sbert_pg.encoder.convert.calibrate import Watched, observe, token_ids
from sbert_pg.encoder.convert.linear import Blocks8, Floats, Int8
from sbert_pg.encoder.convert.pooling import Pooled, finish, pool
from sbert_pg.encoder.convert.quantize import ranges, smooth
from sbert_pg.encoder.convert.transformer import Products
from sbert_pg.encoder.convert.writer import FLOAT, INT64, Writer
from sbert_pg.encoder.description import Description
from sbert_pg.encoder.layers import Normalize
from sbert_pg.errors import DeclarationError, UnsupportedEncoderError

__all__ = ["ARCHITECTURES", "PRECISIONS", "build"]

#: Numeric forms that can be built.
PRECISIONS = ("fp32", "int8", "int8-blocks", "fp16", "fp32-plain")

_ATTENTION: dict[str, type[Attention]] = {"fp16": FusedByLength, "fp32-plain": Plain}

#: Names of the inputs, all int64 of shape ``(batch, tokens)``, and of the output.
INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POOLING_MASK = "pooling_mask"
OUTPUT = "embedding"


def build(description: Description, precision: str) -> onnx.ModelProto:
    """The model, with pooling and the layers after it.

    Inputs, int64 of shape ``(batch, tokens)``: ``input_ids``, ``attention_mask`` (1 for tokens, 0
    for padding, which is at the right) and, where the description leaves the prompt out of pooling,
    ``pooling_mask``. Output: ``embedding``, float32 ``(batch, dimensions)``.

    Args:
        description: what is built.
        precision: one of ``PRECISIONS``.

    Raises:
        UnsupportedEncoderError: the description asks for something that is not implemented.
        DamagedEncoderError: weights are missing or do not fit.
        DeclarationError: there is no such precision.
    """
    if description.architecture not in ARCHITECTURES:
        raise UnsupportedEncoderError(
            f"No graph is built for architecture {description.architecture!r}; built are "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    if precision not in PRECISIONS:
        raise DeclarationError(
            f"There is no precision {precision!r}; there are {', '.join(PRECISIONS)}."
        )
    model = architectures.read(description)
    attention = _ATTENTION.get(precision, Fused)
    return assemble(description, model, _products(description, model, precision), attention)


def _products(
    description: Description, model: architectures.Transformer, precision: str
) -> Products:
    """How ``model`` is multiplied; for int8 it is smoothed."""
    if precision in ("fp32", "fp32-plain"):
        return Floats()
    if precision == "fp16":
        return Floats(np.float16)
    if precision == "int8-blocks":
        return Blocks8()
    watched = Watched()
    reference = assemble(description, model, watched)
    seen = observe(reference, watched, token_ids(description))
    smooth(model, seen)
    return Int8(ranges(model, seen))


def assemble(
    description: Description,
    model: architectures.Transformer,
    products: Products,
    attention: type[Attention] = Fused,
) -> onnx.ModelProto:
    """The graph of a transformer that was read, with one way of multiplying."""
    writer = Writer()
    tokens = transformer.write(writer, model, products, INPUT_IDS, ATTENTION_MASK, attention)
    inputs = [INPUT_IDS, ATTENTION_MASK]
    mask = ATTENTION_MASK
    if not description.include_prompt:
        inputs.append(POOLING_MASK)
        mask = POOLING_MASK
    layers = description.layers
    values = Pooled(tokens, mask, prompt_excluded=not description.include_prompt)
    normalized = bool(layers) and isinstance(layers[0], Normalize)
    vector = finish(writer, pool(writer, values, description.pooling, normalized), layers)
    if description.dimensions < description.full_dimensions:
        ends = writer.ints(description.dimensions)
        vector = writer.node("Slice", [vector, writer.ints(0), ends, writer.ints(1)], "truncated")
    writer.nodes.append(helper.make_node("Identity", [vector], [OUTPUT]))
    width = description.dimensions
    return writer.model(
        [helper.make_tensor_value_info(name, INT64, ["batch", "tokens"]) for name in inputs],
        [helper.make_tensor_value_info(OUTPUT, FLOAT, ["batch", width])],
        f"sbert-pg-{description.architecture}",
    )
