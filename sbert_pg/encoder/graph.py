"""The ONNX model of a description: a transformer, pooling and the layers after it.

Pooling is as in ``sentence_transformer/modules/pooling.py`` of sentence-transformers, for padding
at the right. Inside the graph it means that no matrix of tokens ever crosses to Python.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from sbert_pg.encoder import architectures, rms, rotary, transformer
from sbert_pg.encoder.architectures import ARCHITECTURES as ABSOLUTE
from sbert_pg.encoder.classification import SAMPLE_PAIRS
from sbert_pg.encoder.description import STATIC, Description
from sbert_pg.encoder.files import Array, Weights
from sbert_pg.encoder.layers import DENSE_ACTIVATIONS, Layer, Normalize, PoolingMode, Transformer
from sbert_pg.encoder.products import (
    Floats,
    Int8,
    Products,
    Watched,
    observe,
    ranges,
    smooth,
)
from sbert_pg.encoder.runner import (
    ATTENTION_MASK,
    INPUT_IDS,
    OUTPUT,
    POOLING_MASK,
    TOKEN_TYPE_IDS,
)
from sbert_pg.encoder.static import table
from sbert_pg.encoder.tokenizer_files import tokenizer_content, truncation_side
from sbert_pg.encoder.tokenizing import TextTokenizer
from sbert_pg.encoder.transformer import Attention, Fused, FusedByLength, Plain
from sbert_pg.encoder.writer import FLOAT, INT32, INT64, Writer, activate, even_blocks
from sbert_pg.probes import PROBES, SAMPLE_TEXTS

_ROTARY = {**rotary.READERS, **rms.READERS}
#: ``model_type`` of the architectures whose graph is built here.
ARCHITECTURES = ABSOLUTE | _ROTARY.keys() | {STATIC}

#: A transformer that was read.
Model = Transformer | rotary.Rotary

#: Tokens that are read of a text; more say nothing new about ranges.
_LONGEST = 256

_ATTENTION: dict[str, type[Attention]] = {"fp16": FusedByLength, "fp32-plain": Plain, "bf16": Plain}


def build(description: Description, precision: str) -> onnx.ModelProto:
    """The model, with pooling and the layers after it.

    Inputs, int64 of shape ``(batch, tokens)``: ``input_ids``, ``attention_mask`` (1 for tokens, 0
    for padding, which is at the right) and, where the description leaves the prompt out of pooling,
    ``pooling_mask``; ``token_type_ids`` where it has token types. Output: ``embedding``, float32
    ``(batch, dimensions)``.

    Args:
        description: what is built, of one of ``ARCHITECTURES``.
        precision: one of ``conversion.PRECISIONS``.

    Raises:
        UnsupportedEncoderError: the description asks for something that is not implemented.
        DamagedEncoderError: weights are missing or do not fit.
    """
    model: Model
    if description.architecture == STATIC:
        return _static(description, precision)
    if description.architecture in _ROTARY:
        read = _ROTARY[description.architecture]
        model = read(Weights(description.weights), description.config)
    else:
        model = architectures.read(description)
    attention = _ATTENTION.get(precision, Fused)
    return assemble(description, model, _products(description, model, precision), attention)


def _products(description: Description, model: Model, precision: str) -> Products:
    """How ``model`` is multiplied; for int8 it is smoothed."""
    if precision in ("fp32", "fp32-plain", "bf16"):
        return Floats()
    if precision == "fp16":
        return Floats(np.float16)
    watched = Watched()
    reference = assemble(description, model, watched)
    seen = observe(reference, watched, *calibration(description))
    if isinstance(model, rotary.Rotary):
        return Int8(rotary.ranges(model, seen))
    smooth(model, seen)
    return Int8(ranges(model, seen))


def calibration(description: Description) -> tuple[list[list[int]], list[int] | None]:
    """The calibration texts, ordinary ones and the probes, or pairs and where the second begins."""
    limit = min(description.max_seq_length or _LONGEST, _LONGEST)
    content = json.dumps(tokenizer_content(description), ensure_ascii=False)
    tokenizer = TextTokenizer(content, limit, truncation_side(description))
    if description.pairs:
        pairs = tokenizer.encode_pairs(SAMPLE_PAIRS)
        return pairs.ids, pairs.second
    return [ids for ids in tokenizer.encode([*SAMPLE_TEXTS, *PROBES]).ids if ids], None


def assemble(
    description: Description,
    model: Model,
    products: Products,
    attention: type[Attention] = Fused,
) -> onnx.ModelProto:
    """The graph of a transformer that was read, with one way of multiplying."""
    writer = Writer()
    types = TOKEN_TYPE_IDS if description.token_types else None
    if isinstance(model, rotary.Rotary):
        tokens = rotary.write(writer, model, products, INPUT_IDS, ATTENTION_MASK, attention)
    else:
        tokens = transformer.write(
            writer, model, products, INPUT_IDS, ATTENTION_MASK, attention, types
        )
    inputs, output = finish(writer, description, tokens)
    return writer.model(inputs, [output], f"sbert-pg-{description.architecture}")


#: Tokens of a text of a static model whose vectors are held at a time.
_BLOCK = 4096


def _static(description: Description, precision: str) -> onnx.ModelProto:
    """A static model: rows of its table, summed in blocks, so that no text needs much memory."""
    writer = Writer()
    forms: dict[str, Products] = {"fp16": Floats(np.float16), "int8": Int8({})}
    vector = _summed(writer, table(description.weights), forms.get(precision, Floats()))
    layers = description.layers
    if not (layers and isinstance(layers[0], Normalize)):
        weights = writer.node("Cast", [ATTENTION_MASK], "mask_f", to=FLOAT)
        vector = writer.node("Div", [vector, _count(writer, weights)], "mean")
    inputs, output = _close(writer, description, vector)
    return writer.model(inputs, [output], "sbert-pg-static")


def _summed(writer: Writer, rows: Array, products: Products) -> str:
    """The sum of the rows of each text, float32 ``(batch, width)``."""
    zero, one = writer.ints(0), writer.ints(1)
    shape = writer.node("Shape", [INPUT_IDS])
    length = writer.node("Slice", [shape, one, writer.ints(2)], "length")
    count, size, rest = even_blocks(writer, length, _BLOCK)
    pads = writer.node("Concat", [zero, zero, zero, rest], "pads", axis=0)
    blocks = writer.node("Concat", [zero, count, size], "block_shape", axis=0)
    parts = [
        writer.node("Reshape", [writer.node("Pad", [value, pads]), blocks], "parts")
        for value in (INPUT_IDS, ATTENTION_MASK)
    ]
    batch = writer.node("Slice", [shape, zero, one], "batch")
    sums = writer.node("Concat", [batch, writer.ints(rows.shape[1])], "sums", axis=0)
    body = writer.inner()
    state, ids, mask = (body.name(hint) for hint in ("state", "ids", "mask"))
    weights = body.node("Cast", [mask], "weights", to=FLOAT)
    tokens = Pooled(products.embed(body, rows, ids), mask, prompt_excluded=False)
    total = body.node("Add", [state, _sum(body, tokens, weights)], "total")
    start = writer.node("ConstantOfShape", [sums], "start")
    inputs = [(start, FLOAT), *((part, INT64) for part in parts)]
    return writer.scan(inputs, body, [state, ids, mask], total, "sum", state=True)


def finish(writer: Writer, description: Description, tokens: str) -> tuple[list[Any], Any]:
    """Pooling and the layers after it; returns the inputs and the output of the whole model.

    Args:
        writer: receives the nodes.
        description: what is built.
        tokens: token vectors, float32 ``(batch, tokens, width)``.
    """
    mask = ATTENTION_MASK if description.include_prompt else POOLING_MASK
    layers = description.layers
    values = Pooled(tokens, mask, prompt_excluded=not description.include_prompt)
    normalized = bool(layers) and isinstance(layers[0], Normalize)
    return _close(writer, description, pool(writer, values, description.pooling, normalized))


def _close(writer: Writer, description: Description, vector: str) -> tuple[list[Any], Any]:
    """The layers after pooling; as ``finish``."""
    mask = ATTENTION_MASK if description.include_prompt else POOLING_MASK
    types = (TOKEN_TYPE_IDS,) if description.token_types else ()
    names = dict.fromkeys((INPUT_IDS, ATTENTION_MASK, mask, *types))
    vector = add_layers(writer, vector, description.layers)
    writer.nodes.append(helper.make_node("Identity", [vector], [OUTPUT]))
    return (
        [helper.make_tensor_value_info(name, INT64, ["batch", "tokens"]) for name in names],
        helper.make_tensor_value_info(OUTPUT, FLOAT, ["batch", description.full_dimensions]),
    )


#: Least divisor of a mean and of a normalisation, as in sentence-transformers and torch.
_LEAST_COUNT = 1e-9
_LEAST_LENGTH = 1e-12


@dataclass(frozen=True, slots=True)
class Pooled:
    """Values that pooling works on.

    Attributes:
        tokens: token vectors, float32 ``(batch, tokens, width)``.
        mask: 1 for tokens that are pooled, int64 ``(batch, tokens)``.
        prompt_excluded: whether ``mask`` may begin with zeros.
    """

    tokens: str
    mask: str
    prompt_excluded: bool


def pool(writer: Writer, values: Pooled, modes: Sequence[PoolingMode], normalized: bool) -> str:
    """The pooled vector, ``(batch, len(modes) * width)``.

    Args:
        normalized: whether the next layer is ``Normalize``; a lone mean is then a sum.
    """
    if tuple(modes) == ("mean",) and normalized:
        return _sum(writer, values, writer.node("Cast", [values.mask], "mask_f", to=FLOAT))
    vectors = [_MODES[mode](writer, values) for mode in modes]
    return vectors[0] if len(vectors) == 1 else writer.node("Concat", vectors, "pooled", axis=1)


def add_layers(writer: Writer, vector: str, layers: Sequence[Layer]) -> str:
    """The output of some layers, one after the other, for an input ``(batch, width)``."""
    for layer in layers:
        if isinstance(layer, Normalize):
            length = writer.node("ReduceL2", [vector, writer.ints(1)], "length", keepdims=1)
            bounded = writer.node("Max", [length, writer.scalar(_LEAST_LENGTH)], "length")
            vector = writer.node("Div", [vector, bounded], "normalized")
        else:
            inputs = [vector, writer.tensor(layer.weight, "dense.weight")]
            if layer.bias is not None:
                inputs.append(writer.tensor(layer.bias, "dense.bias"))
            dense = writer.node("Gemm", inputs, "dense", transB=1)
            vector = activate(writer, dense, DENSE_ACTIVATIONS[layer.activation])
    return vector


def _sum(writer: Writer, values: Pooled, weights: str) -> str:
    """Sum of the token vectors by weights, float32 ``(batch, tokens)``."""
    row = writer.node("Unsqueeze", [weights, writer.ints(1)], "weights")
    total = writer.node("MatMul", [row, values.tokens], "sum")
    return writer.node("Squeeze", [total, writer.ints(1)], "sum")


def _count(writer: Writer, weights: str) -> str:
    total = writer.node("ReduceSum", [weights, writer.ints(1)], "count", keepdims=1)
    return writer.node("Max", [total, writer.scalar(_LEAST_COUNT)], "count")


def _mean(writer: Writer, values: Pooled) -> str:
    weights = writer.node("Cast", [values.mask], "mask_f", to=FLOAT)
    return writer.node("Div", [_sum(writer, values, weights), _count(writer, weights)], "mean")


def _mean_sqrt(writer: Writer, values: Pooled) -> str:
    weights = writer.node("Cast", [values.mask], "mask_f", to=FLOAT)
    root = writer.node("Sqrt", [_count(writer, weights)])
    return writer.node("Div", [_sum(writer, values, weights), root], "mean_sqrt")


def _weighted_mean(writer: Writer, values: Pooled) -> str:
    # Positions are counted from the first token of the text, prompt or not.
    mask = writer.node("Cast", [values.mask], "mask_f", to=FLOAT)
    positions = writer.node("Cast", [_positions(writer, values)], "positions_f", to=FLOAT)
    weights = writer.node("Mul", [mask, positions], "weights")
    return writer.node("Div", [_sum(writer, values, weights), _count(writer, weights)], "weighted")


def _positions(writer: Writer, values: Pooled) -> str:
    """1, 2, 3... for each token, int64 ``(tokens,)``."""
    shape = writer.node("Shape", [values.mask])
    length = writer.node("Gather", [shape, writer.tensor(np.array(1, np.int64), "one")], axis=0)
    one = writer.tensor(np.array(1, np.int64), "one")
    return writer.node("Range", [one, writer.node("Add", [length, one]), one], "positions")


def _at(writer: Writer, values: Pooled, index: str) -> str:
    """The token at an index for each text, int64 ``(batch, 1)``."""
    return writer.node("GatherND", [values.tokens, index], "token", batch_dims=1)


def _first(writer: Writer, values: Pooled) -> str:
    if not values.prompt_excluded:
        zero = writer.tensor(np.array(0, np.int64), "zero")
        return writer.node("Gather", [values.tokens, zero], "cls", axis=1)
    mask = writer.node("Cast", [values.mask], "mask_i", to=INT32)
    index = writer.node("ArgMax", [mask], "first", axis=1, keepdims=1)
    return _at(writer, values, index)


def _last(writer: Writer, values: Pooled) -> str:
    marked = writer.node("Mul", [values.mask, _positions(writer, values)], "marked")
    marked = writer.node("Cast", [marked], "marked", to=INT32)
    index = writer.node("ArgMax", [marked], "last", axis=1, keepdims=1)
    any_left = writer.node("ReduceMax", [values.mask, writer.ints(1)], "any", keepdims=1)
    weight = writer.node("Cast", [any_left], "any_f", to=FLOAT)
    return writer.node("Mul", [_at(writer, values, index), weight], "lasttoken")


def _max(writer: Writer, values: Pooled) -> str:
    column = writer.node("Unsqueeze", [values.mask, writer.ints(2)], "mask_column")
    kept = writer.node("Equal", [column, writer.tensor(np.array(1, np.int64), "one")])
    nothing = writer.scalar(-np.inf)
    tokens = writer.node("Where", [kept, values.tokens, nothing], "kept")
    return writer.node("ReduceMax", [tokens, writer.ints(1)], "max", keepdims=0)


_MODES = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
