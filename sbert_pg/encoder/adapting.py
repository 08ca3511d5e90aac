"""Layers for queries alone, folded into the graph of a converted encoder.

The graph gets a second output, the vector of a text as a query; the first one, weights, tokenizer
and probes stay as they are. So documents have the same vectors as before, and a column of the
encoder accepts the new one without an embedding more. Needs the package ``onnx`` and no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sbert_pg.distance import unit
from sbert_pg.encoder import directory as converted
from sbert_pg.encoder.encoder import Encoder
from sbert_pg.encoder.layers import Dense, Layer, Normalize, layer_text
from sbert_pg.encoder.runner import OUTPUT, QUERY_OUTPUT
from sbert_pg.errors import ConversionError, DeclarationError, needing
from sbert_pg.probes import SAMPLE_TEXTS
from sbert_pg.spec import Vectors

#: How far a folded query may be from what the matrix says, as a share of its length.
_ROUNDING = 1e-4


def adapt_queries(
    encoder: Encoder,
    matrix: npt.NDArray[np.floating[Any]],
    place: Path,
    *,
    training: Mapping[str, Any] | None = None,
) -> Encoder:
    """Write an encoder whose queries are multiplied by a matrix; its documents stay as they are.

    The product is divided by its length where the encoder's own vectors have length one. An encoder
    that has layers for queries already gets these after them.

    Args:
        encoder: the encoder, in all its dimensions.
        matrix: shape ``(dimensions, dimensions)``; the vector of a query is ``matrix @ vector``.
        place: the new directory; it must not exist.
        training: how the matrix was made, for the manifest.

    Returns:
        The new encoder, loaded.

    Raises:
        DeclarationError: the encoder is truncated, the matrix is of another shape or not finite, or
            the directory exists.
        MissingExtraError: the package ``onnx`` is missing.
        ConversionError: the new directory does not compute what it should.
    """
    converted.refuse_taken(place)
    manifest, width = encoder.manifest, encoder.dimensions
    if width != manifest.full_dimensions:
        raise DeclarationError(
            f"{encoder!r} is truncated from {manifest.full_dimensions} dimensions. Load it in all "
            "of them to fit layers for its queries."
        )
    weight = np.ascontiguousarray(matrix, dtype=np.float32)
    if weight.shape != (width, width) or not np.isfinite(weight).all():
        raise DeclarationError(
            f"The matrix has shape {weight.shape} or holds values that are not finite; expected "
            f"are finite values of shape {(width, width)}."
        )
    dense = Dense(width, width, "Identity", weight, None)
    layers: list[Layer] = [dense, Normalize()] if manifest.spec.normalized else [dense]
    texts = tuple(map(layer_text, layers))
    spec = replace(
        encoder.spec,
        name=str(place),
        query_layers=(*encoder.spec.query_layers, *texts),
    )

    def write(folder: Path) -> None:
        for name in (converted.TOKENIZER, converted.PROBE_VECTORS):
            shutil.copyfile(encoder.directory / name, folder / name)
        _add_output(encoder.directory / converted.MODEL, layers, folder / converted.MODEL)
        changed = replace(manifest, spec=spec, training=dict(training or {}))
        converted.write_manifest(folder, changed)
        _require_same(encoder, Encoder.open(folder), weight)

    with converted.locked(place):
        converted.publish(place, write)
    return Encoder.open(place)


def _add_output(model: Path, layers: list[Layer], path: Path) -> None:
    """Write a model with one output more: the layers after its vectors of queries."""
    with needing("onnx", "convert", "fold a matrix into an encoder"):
        import onnx
        from onnx import helper

        from sbert_pg.encoder.graph import add_layers
        from sbert_pg.encoder.writer import FLOAT, Writer, save
    loaded = onnx.load(model)
    graph = loaded.graph
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
    writer.nodes.append(
        helper.make_node("Identity", [vector], [QUERY_OUTPUT], name=writer.name("output"))
    )
    graph.node.extend(writer.nodes)
    graph.initializer.extend(writer.initializers)
    shape = [d.dim_param or d.dim_value for d in outputs[OUTPUT].type.tensor_type.shape.dim]
    graph.output.append(helper.make_tensor_value_info(QUERY_OUTPUT, FLOAT, shape))
    save(loaded, path)


def _require_same(before: Encoder, after: Encoder, weight: Vectors) -> None:
    """Hold the folded encoder against the one that it was made from.

    Raises:
        ConversionError: a document has another vector, or a query not the one of the matrix.
    """
    texts = SAMPLE_TEXTS[:20]
    documents = after.encode_document(texts) - before.encode_document(texts)
    expected = before.encode_query(texts) @ weight.T
    if before.spec.normalized:
        expected = unit(expected)
    queries = after.encode_query(texts) - expected
    apart = max(
        float(np.linalg.norm(documents, axis=1).max()),
        float(np.linalg.norm(queries, axis=1).max() / np.linalg.norm(expected, axis=1).max()),
    )
    if not apart <= _ROUNDING:
        raise ConversionError(
            f"Folded into the graph, the matrix gives vectors that differ by {apart:.2g} from what "
            "it should give; nothing was written. Please report this with the encoder's name."
        )
