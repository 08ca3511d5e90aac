"""The whole model of a description: transformer, pooling and layers in one graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from sbert_pg.encoder.convert.architectures import (
    ARCHITECTURES,
    TransformerWeights,
    read_transformer,
)
from sbert_pg.encoder.convert.builder import GraphBuilder
from sbert_pg.encoder.convert.linear import Float32, Int8, Linears
from sbert_pg.encoder.convert.pooling import head
from sbert_pg.encoder.convert.transformer import Ranges, transformer
from sbert_pg.encoder.description import Description
from sbert_pg.errors import UnsupportedEncoderError

#: Precisions of the weights, each with its products.
LINEARS: dict[str, type[Linears]] = {"fp32": Float32, "int8": Int8}
PRECISIONS = tuple(LINEARS)

#: Names of the model's inputs and of its output.
TOKEN_IDS = "input_ids"
POOLING_MASK = "pooling_mask"
EMBEDDING = "embedding"

__all__ = ["ARCHITECTURES", "EMBEDDING", "POOLING_MASK", "PRECISIONS", "TOKEN_IDS", "build"]


def build(description: Description, precision: str) -> onnx.ModelProto:
    """The ONNX model of a description in one precision.

    Its input ``input_ids`` is int64 of shape ``(batch, tokens)``, without padding; where pooling
    leaves prompts out, ``pooling_mask`` of the same shape says which tokens count. Its output
    ``embedding`` is float32 of shape ``(batch, dimensions)``.

    Raises:
        UnsupportedEncoderError: the precision or something in the description is not implemented.
        DamagedEncoderError: a tensor is missing.
    """
    if precision not in LINEARS:
        raise UnsupportedEncoderError(
            f"Precision {precision!r} is not implemented; use one of {', '.join(PRECISIONS)}."
        )
    weights = read_transformer(description)
    quantized = precision == "int8"
    ranges = _measure_ranges(description, weights) if quantized else None
    graph = GraphBuilder()
    token_ids = graph.input(TOKEN_IDS, TensorProto.INT64, ["batch", "tokens"])
    mask = None
    if not description.include_prompt:
        mask = graph.input(POOLING_MASK, TensorProto.INT64, ["batch", "tokens"])
    tokens, _ = transformer(
        graph,
        weights,
        LINEARS[precision](),
        token_ids,
        small_embeddings=quantized,
        ranges=ranges,
    )
    vector = head(graph, description, tokens, mask)
    graph.output(EMBEDDING, vector, ["batch", description.dimensions])
    return graph.model()


def _measure_ranges(description: Description, weights: TransformerWeights) -> Ranges:
    """Largest magnitude of every channel of every activation over sample texts, in fp32."""
    from sbert_pg.encoder.convert.calibration import calibration_batches, session_of

    graph = GraphBuilder()
    token_ids = graph.input(TOKEN_IDS, TensorProto.INT64, ["batch", "tokens"])
    _, watched = transformer(
        graph, weights, Float32(), token_ids, small_embeddings=False, watch=True
    )
    for number, value in enumerate(watched.values()):
        graph.output(f"range_{number}", value, ["channels"])
    session = session_of(graph.model())
    ranges: dict[tuple[int, int], npt.NDArray[np.float32]] = {}
    for batch in calibration_batches(description):
        for key, value in zip(watched, session.run(None, {TOKEN_IDS: batch}), strict=True):
            ranges[key] = np.maximum(ranges.get(key, value), value)
    return ranges
