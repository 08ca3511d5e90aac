"""From a name to a converted directory, with identity and proof, once on a machine.

The identity is a digest of everything that was read, what is ignored on purpose included. Each
precision is held against the fp32 form of the same model on the probes and on ordinary texts. One
that is below its floor is refused: an encoder that is a little wrong is worse than none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sbert_pg.encoder import directory as converted
from sbert_pg.encoder.description import STATIC, Description
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.engines import (
    CPU,
    ENGINE_VARIABLE,
    ONNXRUNTIME,
    OPENVINO,
    Provider,
    Providers,
    able,
    load_openvino,
)
from sbert_pg.encoder.files import Weights, require_model
from sbert_pg.encoder.hub import ModelFiles, find, home_of, is_path, repository_of
from sbert_pg.encoder.kinds import SAMPLE_PAIRS, describe_encoder, describe_reranker
from sbert_pg.encoder.layers import layer_text
from sbert_pg.encoder.pipeline import Pipeline, agreement_of_scores, measure
from sbert_pg.encoder.tokenizer_files import tokenizer_content, truncation_side
from sbert_pg.errors import ConversionError, DeclarationError, EncoderError, needing
from sbert_pg.probes import PROBES, SAMPLE_TEXTS, Agreement, agreement_of
from sbert_pg.spec import DOCUMENT, PRECISIONS, QUERY, EncoderSpec, Vectors, json_digest

FP32 = "fp32"


class Floor(NamedTuple):
    """Least agreement with fp32: mean of ordinary texts, and of the worst text or probe."""

    mean: float
    worst: float


#: By form; the probes hold texts of one or two tokens, where quantisation shows most. Of a
#: cross-encoder the correlation of its scores counts, which nothing stores: rounding may move them
#: more than it may vectors.
FLOORS = {
    "int8": Floor(mean=0.996, worst=0.98),
    "reranker-int8": Floor(mean=0.99, worst=0.98),
    "reranker-bf16": Floor(mean=0.99, worst=0.98),
}
#: What any other form has to reach: nothing but rounding.
STRICT = Floor(mean=0.9999, worst=0.999)


def prepare(
    name_or_path: str | Path,
    *,
    precision: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    providers: Sequence[Provider] | None = None,
    output: Path | None = None,
    again: bool = False,
    kind: str = "encoder",
) -> Path:
    """The converted directory of a name or path, made now where it is not there yet.

    Processes that ask for the same one at the same time convert it once. Arguments are those of
    ``Encoder.load``, of which the providers decide the usual precision; ``output`` is a place that
    does not exist yet, instead of the cache, and ``kind`` that of ``Manifest``.
    """
    name = str(name_or_path)
    path = home_of(name)
    if converted.is_converted(path):
        own = Manifest.read(path).precision
        if precision not in (None, own):
            raise DeclarationError(
                f"{path} holds an encoder in {own} and cannot be loaded in {precision}. Leave the "
                "precision out, or convert the model again from its own directory or name."
            )
        return path
    precision = precision or Providers.of(providers).precision
    if output is not None:
        converted.refuse_taken(output)
        _convert_to(output, name, revision, precision, kind)
        return output
    place = _slot(name, path, revision, precision, kind, cache_dir)
    if not again and converted.is_converted(place):
        return place
    with converted.locked(place):
        if again or not converted.is_converted(place):
            _convert_to(place, name, revision, precision, kind)
    return place


def _slot(
    name: str, path: Path, revision: str | None, precision: str, kind: str = "encoder",
    cache_dir: str | Path | None = None,
) -> Path:  # fmt: skip
    """The place of a conversion in the cache."""
    root = converted.cache_root(cache_dir)
    if not is_path(name):
        return converted.slot(root, repository_of(name), revision, precision, kind)
    require_model(path)
    return converted.slot(root, path.resolve().name, converted.state_of(path), precision, kind)


def converted_here(name: str) -> Path | None:
    """The directory that an encoder of this name was converted into on this machine, in any form.

    Looks into the cache alone; ``None`` where there is none or no cache.
    """
    path = home_of(name)
    if converted.is_converted(path):
        return path
    try:
        places = [_slot(name, path, None, form) for form in PRECISIONS]
    except EncoderError:
        return None
    return next(filter(converted.is_converted, places), None)


def _convert_to(place: Path, name: str, revision: str | None, precision: str, kind: str) -> None:
    files = find(name, revision=revision)
    try:
        converted.publish(place, lambda folder: convert(folder, files, name, precision, kind))
    except OSError as error:
        raise EncoderError(converted.no_cache(f"{place} cannot be written ({error})")) from error


def convert(
    folder: Path, files: ModelFiles, name: str, precision: str, kind: str = "encoder"
) -> Manifest:
    """Convert a model into the empty ``folder``; precision and kind are those of ``prepare``."""
    if precision not in PRECISIONS:
        raise DeclarationError(
            f"There is no precision {precision!r}; there are {', '.join(PRECISIONS)}."
        )
    engine = able(precision, Providers.of([CPU]))[0]
    if engine == OPENVINO:
        load_openvino()
    description = (describe_encoder if kind == "encoder" else describe_reranker)(files.path)
    content, side = tokenizer_content(description), truncation_side(description)
    (folder / converted.TOKENIZER).write_text(
        json.dumps(content, ensure_ascii=False), encoding="utf-8"
    )
    inputs, exporter = build(description, precision, folder / converted.MODEL)
    manifest = Manifest(
        spec=spec_of(description, content, side, name, precision, files.revision),
        precision=precision,
        full_dimensions=description.full_dimensions,
        inputs=inputs,
        kind=kind,
        truncation_side=side,
        exporter=exporter,
    )
    vectors = _vectors(folder, manifest, engine)
    if precision != FP32:
        with tempfile.TemporaryDirectory(prefix=".reference-", dir=folder) as scratch:
            reference = Path(scratch)
            shutil.copy(folder / converted.TOKENIZER, reference)
            reference_inputs = inputs
            if exporter == "torch":  # it has one graph for all forms, and takes its time
                for file in folder.glob(f"{converted.MODEL}*"):
                    shutil.copy(file, reference)
            else:
                reference_inputs, _ = build(description, FP32, reference / converted.MODEL)
            expected = _vectors(reference, replace(manifest, inputs=reference_inputs), ONNXRUNTIME)
        manifest = replace(manifest, agreement=_agreement(kind, vectors, expected))
        form = precision if kind == "encoder" else f"{kind}-{precision}"
        _require(manifest.agreement, FLOORS.get(form, STRICT), f"{name} in {precision}")
    np.save(folder / converted.PROBE_VECTORS, vectors[: len(PROBES)])
    manifest = converted.write_manifest(folder, manifest)
    if not os.environ.get(ENGINE_VARIABLE):  # else the choice is made
        measure(folder, manifest)
    return manifest


def build(description: Description, precision: str, path: Path) -> tuple[tuple[str, ...], str]:
    """Write the ONNX model of a description; returns its inputs and how it was made.

    The graph gives all dimensions; a caller may ask for more than the model keeps by itself.
    """
    with needing("onnx", "convert", "convert an encoder"):
        import onnx  # noqa: F401  (a missing package is said before anything is read)

        from sbert_pg.encoder import graph
        from sbert_pg.encoder.writer import save
    description = replace(description, truncate_dim=None)
    if description.architecture in graph.ARCHITECTURES:
        model, exporter = graph.build(description, precision), "graph"
    else:
        from sbert_pg.encoder.export import export

        model, exporter = export(description, precision), "torch"
    inputs = tuple(value.name for value in model.graph.input)
    save(model, path)
    return inputs, exporter


#: Parts of a checkpoint that the token embeddings do not depend on.
_UNUSED = ("pooler.", "position_ids", "lm_head", "cls.", "vocab_projector", "vocab_transform",
           "vocab_layer_norm", "qa_outputs", "classifier", "predictions.")  # fmt: skip


def weights_digest(description: Description) -> str:
    """SHA-256 of the transformer's weights, 32 hexadecimal digits.

    Taken over the tensors that the computation uses, as float32 and under names without the
    wrapper's prefix, so that a repository saved twice, sharded or with its unused heads has one.
    """
    digest = hashlib.sha256()
    weights = Weights(description.weights, integers=description.architecture == STATIC)
    for name in sorted(weights.names()):
        if any(part in name for part in _UNUSED):
            continue
        tensor = weights.get(name)
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor, dtype="<f4").tobytes())
    return digest.hexdigest()[:32]


#: Parts of a ``tokenizer.json`` that no token id depends on.
_NO_PART = frozenset({"truncation", "padding", "version", "decoder"})


def tokenizer_digest(tokenizer: Mapping[str, Any], side: str) -> str:
    """SHA-256 of a tokenizer's content and of which end of a text it cuts, 32 digits."""
    content = {key: value for key, value in tokenizer.items() if key not in _NO_PART}
    return json_digest({"tokenizer": content, "truncation_side": side})[:32]


def spec_of(
    description: Description,
    tokenizer: Mapping[str, Any],
    side: str,
    name: str,
    precision: str,
    revision: str | None,
) -> EncoderSpec:
    """The spec of a model in one precision."""
    # sentence-transformers writes these two for every model, empty where it has none.
    given = description.prompts.items()
    prompts = {key: text for key, text in given if text or key not in (QUERY, DOCUMENT)}
    default = description.default_prompt_name
    return EncoderSpec(
        name=name,
        dimensions=description.dimensions,
        similarity=description.similarity,
        normalized=description.normalized,
        max_seq_length=description.max_seq_length,
        pooling="+".join(description.pooling),
        layers=tuple(layer_text(layer) for layer in description.layers),
        prompts=tuple(sorted(prompts.items())),
        default_prompt_name=default if default in prompts else None,
        include_prompt=description.include_prompt,
        precision=precision,
        weights_digest=weights_digest(description),
        tokenizer_digest=tokenizer_digest(tokenizer, side),
        config_digest=json_digest(description.configuration)[:32],
        revision=revision,
    )


def _agreement(kind: str, vectors: Vectors, reference: Vectors) -> Mapping[str, Agreement]:
    """Agreement on the probes and on the sample texts, whose vectors follow each other.

    Of a cross-encoder that of the scores of the sample pairs, the worst label's.
    """
    if kind != "encoder":
        return {"samples": agreement_of_scores(vectors, reference)}
    n = len(PROBES)
    return {
        "probes": agreement_of(vectors[:n], reference[:n]),
        "samples": agreement_of(vectors[n:], reference[n:]),
    }


def _require(agreement: Mapping[str, Agreement], floor: Floor, what: str) -> None:
    """Refuse a conversion that is below its floor."""
    mean = agreement["samples"].mean_cosine
    worst = min(value.min_cosine for value in agreement.values())
    if not (mean >= floor.mean and worst >= floor.worst):
        raise ConversionError(
            f"{what} agrees with fp32 by {mean:.5f} in the mean and {worst:.5f} for the worst text "
            f"(cosine of vectors, correlation of scores); the floor is {floor.mean} and "
            f"{floor.worst}. Use precision='fp32'."
        )


def _vectors(directory: Path, manifest: Manifest, engine: str) -> Vectors:
    """Vectors of the probes and of the sample texts, as documents and in all dimensions."""
    # On the CPU wherever it will run, so that the probes are the same from every machine.
    pipeline = Pipeline(directory, manifest, None, [CPU], engine)
    if manifest.kind == "encoder":
        vectors = pipeline.run_any([*PROBES, *SAMPLE_TEXTS], manifest.spec.document_prompt)
    else:
        vectors, _ = pipeline.scores_any(SAMPLE_PAIRS)
    if not np.isfinite(vectors).all():
        raise ConversionError(
            f"{manifest.spec.name} in {manifest.precision} gives values that are not finite; its "
            "weights cannot be used."
        )
    if manifest.kind == "encoder":
        queries = pipeline.run_any(PROBES[:4], dict(manifest.spec.prompts).get(QUERY, ""))
        for side, each in (("document", vectors), ("query", queries)):
            if not np.ptp(each, axis=0).any():
                raise ConversionError(
                    f"{manifest.spec.name} in {manifest.precision} gives every {side} the same "
                    "vector: its weights are empty, or the prompt is longer than the "
                    f"{manifest.spec.max_seq_length} tokens that it reads."
                )
    return vectors
