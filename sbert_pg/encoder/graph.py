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

from sbert_pg.encoder import architectures, transformer
from sbert_pg.encoder.description import STATIC, Description
from sbert_pg.encoder.files import Array
from sbert_pg.encoder.kinds import SAMPLE_PAIRS, table
from sbert_pg.encoder.layers import (
    DENSE_ACTIVATIONS,
    Layer,
    Norm,
    Normalize,
    PoolingMode,
    Transformer,
)
from sbert_pg.encoder.products import Floats, Int8, Products, Watched, observe, ranges, smooth
from sbert_pg.encoder.runner import (
    ATTENTION_MASK,
    INPUT_IDS,
    OUTPUT,
    POOLING_MASK,
    QUERY_OUTPUT,
    TOKEN_TYPE_IDS,
)
from sbert_pg.encoder.tokenizer_files import tokenizer_content, truncation_side
from sbert_pg.encoder.tokenizing import TextTokenizer
from sbert_pg.encoder.transformer import Attention, fused, fused_by_length, plain
from sbert_pg.encoder.writer import FLOAT, INT32, INT64, Writer, activate, even_blocks
from sbert_pg.probes import PROBES, SAMPLE_TEXTS

#: ``model_type`` of the architectures whose graph is built here.
ARCHITECTURES = architectures.ARCHITECTURES | {STATIC}

#: Tokens that are read of a text to choose ranges by; more say nothing new.
_LONGEST = 256
#: Tokens of a text of a static model whose vectors are held at a time.
_BLOCK = 4096
#: Least divisor of a mean and of a normalisation, as in sentence-transformers and torch.
_LEAST_COUNT, _LEAST_LENGTH = 1e-9, 1e-12

_ATTENTION: dict[str, Attention] = {"fp16": fused_by_length, "fp32-plain": plain, "bf16": plain}


def build(description: Description, precision: str) -> onnx.ModelProto:
    """The model, with pooling and the layers after it.

    Inputs, int64 of shape ``(batch, tokens)``: ``input_ids``, ``attention_mask`` (1 for tokens, 0
    for padding, which is at the right) and, where the description leaves the prompt out of pooling,
    ``pooling_mask``; ``token_type_ids`` where it has token types. Output: ``embedding``, float32
    ``(batch, dimensions)``.
    """
    if description.architecture == STATIC:
        return _static(description, precision)
    model = architectures.read(description)
    attention = _ATTENTION.get(precision, fused)
    return _assembled(description, model, _products(description, model, precision), attention)


def _products(description: Description, model: Transformer, precision: str) -> Products:
    """How ``model`` is multiplied; for int8 it is smoothed, unless its positions are rotary."""
    if precision in ("fp32", "fp32-plain", "bf16"):
        return Floats()
    if precision == "fp16":
        return Floats(np.float16)
    watched = Watched()
    reference = _assembled(description, model, watched, fused)
    seen = observe(reference, watched, *_calibration(description))
    if model.positions is not None:
        smooth(model, seen)
    return Int8(ranges(model, seen))


def _calibration(description: Description) -> tuple[list[list[int]], list[int] | None]:
    """The calibration texts, ordinary ones and the probes, or pairs and where the second begins."""
    limit = min(description.max_seq_length or _LONGEST, _LONGEST)
    content = json.dumps(tokenizer_content(description), ensure_ascii=False)
    tokenizer = TextTokenizer(content, limit, truncation_side(description))
    if description.pairs:
        pairs = tokenizer.encode_pairs(SAMPLE_PAIRS)
        return pairs.ids, pairs.second
    return [ids for ids in tokenizer.encode([*SAMPLE_TEXTS, *PROBES]).ids if ids], None


def _assembled(
    description: Description, model: Transformer, products: Products, attention: Attention
) -> onnx.ModelProto:
    """The graph of a transformer that was read, with one way of multiplying."""
    writer = Writer()
    tokens = transformer.write(writer, model, products, attention, typed=description.token_types)
    return writer.model(*finish(writer, description, tokens), description.architecture)


def _static(description: Description, precision: str) -> onnx.ModelProto:
    """A static model: rows of its table, summed in blocks, so that no text needs much memory."""
    writer = Writer()
    forms: dict[str, Products] = {"fp16": Floats(np.float16), "int8": Int8({})}
    vector = _summed(writer, table(description.weights), forms.get(precision, Floats()))
    layers = description.layers
    if not (layers and isinstance(layers[0], Normalize)):
        weights = writer.node("Cast", ATTENTION_MASK, to=FLOAT)
        vector = writer.node("Div", vector, _count(writer, weights))
    return writer.model(*_close(writer, description, vector), "static")


def _summed(writer: Writer, rows: Array, products: Products) -> str:
    """The sum of the rows of each text, float32 ``(batch, width)``."""
    shape = writer.node("Shape", INPUT_IDS)
    length = writer.node("Slice", shape, [1], [2])
    count, size, rest = even_blocks(writer, length, _BLOCK)
    pads = writer.node("Concat", [0, 0, 0], rest, axis=0)
    blocks = writer.node("Concat", [0], count, size, axis=0)
    parts = [
        writer.node("Reshape", writer.node("Pad", value, pads), blocks)
        for value in (INPUT_IDS, ATTENTION_MASK)
    ]
    batch = writer.node("Slice", shape, [0], [1])
    sums = writer.node("Concat", batch, [rows.shape[1]], axis=0)
    body = writer.inner()
    state, ids, mask = (body.name(hint) for hint in ("state", "ids", "mask"))
    weights = body.node("Cast", mask, to=FLOAT)
    total = body.node("Add", state, _sum(body, products.embed(body, rows, ids), weights))
    inputs = [(writer.node("ConstantOfShape", sums), FLOAT), *((part, INT64) for part in parts)]
    return writer.scan(inputs, body, [state, ids, mask], total, state=True)


def finish(writer: Writer, description: Description, tokens: str) -> tuple[list[Any], Any]:
    """Pooling and the layers after token vectors, ``(batch, tokens, width)``: all inputs, the
    output.
    """
    values = Pooled(tokens, _pooled_mask(description))
    normalized = isinstance(next(iter(description.layers), None), Normalize)
    return _close(writer, description, pool(writer, values, description.pooling, normalized))


def _pooled_mask(description: Description) -> str:
    return ATTENTION_MASK if description.include_prompt else POOLING_MASK


def _close(writer: Writer, description: Description, vector: str) -> tuple[list[Any], Any]:
    """The layers after pooling; as ``finish``."""
    types = (TOKEN_TYPE_IDS,) if description.token_types else ()
    names = dict.fromkeys((INPUT_IDS, ATTENTION_MASK, _pooled_mask(description), *types))
    vector = add_layers(writer, vector, description.layers)
    writer.nodes.append(helper.make_node("Identity", [vector], [OUTPUT]))
    return (
        [helper.make_tensor_value_info(name, INT64, ["batch", "tokens"]) for name in names],
        helper.make_tensor_value_info(OUTPUT, FLOAT, ["batch", description.full_dimensions]),
    )


@dataclass(frozen=True, slots=True)
class Pooled:
    """Token vectors, ``(batch, tokens, width)``, and 1 for those pooled, ``(batch, tokens)``."""

    tokens: str
    mask: str


def pool(writer: Writer, values: Pooled, modes: Sequence[PoolingMode], normalized: bool) -> str:
    """The pooled vector, ``(batch, len(modes) * width)``; a lone mean to be normalised is a sum."""
    if tuple(modes) == ("mean",) and normalized:
        return _sum(writer, values.tokens, _weights(writer, values))
    vectors = [_MODES[mode](writer, values) for mode in modes]
    return vectors[0] if len(vectors) == 1 else writer.node("Concat", *vectors, axis=1)


def add_layers(writer: Writer, vector: str, layers: Sequence[Layer]) -> str:
    """The output of some layers, one after the other, for an input ``(batch, width)``."""
    for layer in layers:
        if isinstance(layer, Normalize):
            length = writer.node("ReduceL2", vector, [1], keepdims=1)
            vector = writer.node("Div", vector, writer.node("Max", length, _LEAST_LENGTH))
        elif isinstance(layer, Norm):
            vector = transformer.write_norm(writer, vector, layer)
        else:
            bias = () if layer.bias is None else (layer.bias,)
            dense = writer.node("Gemm", vector, layer.weight, *bias, transB=1)
            vector = activate(writer, dense, DENSE_ACTIVATIONS[layer.activation])
    return vector


def add_query_output(model: onnx.ModelProto, layers: Sequence[Layer]) -> None:
    """Give a model one output more: some layers after its vectors of queries."""
    graph = model.graph
    outputs = {value.name: value for value in graph.output}
    count = sum(node.name.startswith("query") for node in graph.node)
    writer = Writer(f"query{count}.")
    source = OUTPUT
    if QUERY_OUTPUT in outputs:
        # What ends in this output now continues instead.
        graph.output.remove(outputs[QUERY_OUTPUT])
        (last,) = (node for node in graph.node if QUERY_OUTPUT in node.output)
        source = last.output[0] = writer.name("vector")
    vector = add_layers(writer, source, layers)
    name = writer.name("output")
    writer.nodes.append(helper.make_node("Identity", [vector], [QUERY_OUTPUT], name=name))
    graph.node.extend(writer.nodes)
    graph.initializer.extend(writer.initializers)
    shape = [d.dim_param or d.dim_value for d in outputs[OUTPUT].type.tensor_type.shape.dim]
    graph.output.append(helper.make_tensor_value_info(QUERY_OUTPUT, FLOAT, shape))


def _sum(writer: Writer, tokens: str, weights: str) -> str:
    """Sum of token vectors by weights, float32 ``(batch, tokens)``."""
    total = writer.node("MatMul", writer.node("Unsqueeze", weights, [1]), tokens)
    return writer.node("Squeeze", total, [1])


def _weights(writer: Writer, values: Pooled) -> str:
    return writer.node("Cast", values.mask, to=FLOAT)


def _count(writer: Writer, weights: str) -> str:
    return writer.node("Max", writer.node("ReduceSum", weights, [1], keepdims=1), _LEAST_COUNT)


def _mean(writer: Writer, values: Pooled) -> str:
    return _weighted_mean(writer, values, _weights(writer, values))


def _weighted_mean(writer: Writer, values: Pooled, weights: str) -> str:
    return writer.node("Div", _sum(writer, values.tokens, weights), _count(writer, weights))


def _mean_sqrt(writer: Writer, values: Pooled) -> str:
    weights = _weights(writer, values)
    root = writer.node("Sqrt", _count(writer, weights))
    return writer.node("Div", _sum(writer, values.tokens, weights), root)


def _mean_by_position(writer: Writer, values: Pooled) -> str:
    # Positions are counted from the first token of the text, prompt or not.
    mask = _weights(writer, values)
    weights = writer.node("Mul", mask, writer.node("Cast", _positions(writer, values), to=FLOAT))
    return _weighted_mean(writer, values, weights)


def _positions(writer: Writer, values: Pooled) -> str:
    """1, 2, 3... for each token, int64 ``(tokens,)``."""
    length = writer.node("Gather", writer.node("Shape", values.mask), 1, axis=0)
    return writer.node("Range", 1, writer.node("Add", length, 1), 1)


def _at(writer: Writer, values: Pooled, ranked: str) -> str:
    """The token of each text whose value, int64 ``(batch, tokens)``, is the first largest."""
    index = writer.node("ArgMax", writer.node("Cast", ranked, to=INT32), axis=1, keepdims=1)
    return writer.node("GatherND", values.tokens, index, batch_dims=1)


def _first(writer: Writer, values: Pooled) -> str:
    if values.mask == ATTENTION_MASK:
        return writer.node("Gather", values.tokens, 0, axis=1)
    return _at(writer, values, values.mask)


def _last(writer: Writer, values: Pooled) -> str:
    token = _at(writer, values, writer.node("Mul", values.mask, _positions(writer, values)))
    any_left = writer.node("ReduceMax", values.mask, [1], keepdims=1)
    return writer.node("Mul", token, writer.node("Cast", any_left, to=FLOAT))


def _max(writer: Writer, values: Pooled) -> str:
    kept = writer.node("Equal", writer.node("Unsqueeze", values.mask, [2]), 1)
    tokens = writer.node("Where", kept, values.tokens, -np.inf)
    return writer.node("ReduceMax", tokens, [1], keepdims=0)


_MODES = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _mean_by_position,
    "lasttoken": _last,
}
