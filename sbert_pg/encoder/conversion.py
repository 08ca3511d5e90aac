"""From a sentence-transformers directory to a converted one, with proof.

Each precision is held against the fp32 form of the same model on the probes and on ordinary texts.
One that is below its floor is refused: an encoder that is a little wrong is worse than none.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sbert_pg.encoder import directory as converted
from sbert_pg.encoder.description import Description, describe
from sbert_pg.encoder.directory import Manifest
from sbert_pg.encoder.hub import Found
from sbert_pg.encoder.identity import layer_text, tokenizer_digest, weights_digest
from sbert_pg.encoder.providers import CPU
from sbert_pg.encoder.runner import Runner
from sbert_pg.encoder.samples import SAMPLE_TEXTS
from sbert_pg.encoder.saving import save
from sbert_pg.encoder.tokenizing import TextTokenizer, tokenizer_content, truncation_side
from sbert_pg.errors import ConversionError, MissingExtraError
from sbert_pg.probes import PROBES, Agreement, agreement_of
from sbert_pg.spec import EncoderSpec, Vectors

FP32 = "fp32"


@dataclass(frozen=True, slots=True)
class Floor:
    """Least agreement with fp32 that a precision may have, on ordinary texts and on the probes.

    Attributes:
        mean: mean cosine of the sample texts.
        worst: cosine of the worst text, probes included.
    """

    mean: float
    worst: float


#: The probes hold texts of one or two tokens, where quantisation shows most.
FLOORS: dict[str, Floor] = {
    "int8": Floor(mean=0.996, worst=0.98),
    "int8-blocks": Floor(mean=0.998, worst=0.98),
}
#: What any other form has to reach: nothing but rounding.
STRICT = Floor(mean=0.9999, worst=0.999)


def convert(made: Path, found: Found, name: str, precision: str) -> Manifest:
    """Convert a model into the empty directory ``made``.

    Args:
        made: receives the files.
        found: the model's files.
        name: name for the spec.
        precision: ``"fp32"`` or one of the quantised forms.

    Raises:
        UnsupportedEncoderError: the model asks for something that is not implemented.
        MissingExtraError: a package of the extra ``convert`` or ``export`` is needed.
        ConversionError: the result disagrees with the fp32 reference by more than its floor.
    """
    description = describe(found.path)
    # The graph gives all dimensions; a caller may ask for more than the model keeps by itself.
    full = replace(description, truncate_dim=None)
    content = tokenizer_content(description)
    side = truncation_side(description)
    text = json.dumps(content, ensure_ascii=False)
    tokenizer = TextTokenizer(text, description.max_seq_length, side)
    tokens = tokenizer.encode([*PROBES, *SAMPLE_TEXTS]).ids
    model_path = made / converted.MODEL
    inputs, exporter = build(full, precision, model_path)
    vectors = _vectors(model_path, inputs, tokens)
    agreement = {}
    if precision != FP32:
        with tempfile.TemporaryDirectory(prefix=".reference-", dir=made.parent) as scratch:
            reference_path = Path(scratch) / converted.MODEL
            reference_inputs, _ = build(full, FP32, reference_path)
            reference = _vectors(reference_path, reference_inputs, tokens)
        agreement = measure(vectors, reference)
        require(agreement, FLOORS.get(precision, STRICT), f"{name} in {precision}")
    (made / converted.TOKENIZER).write_text(text, encoding="utf-8")
    np.save(made / converted.PROBE_VECTORS, vectors[: len(PROBES)])
    manifest = Manifest(
        spec=spec_of(description, content, name, precision, found.revision),
        precision=precision,
        full_dimensions=description.full_dimensions,
        inputs=inputs,
        truncation_side=side,
        exporter=exporter,
        agreement=agreement,
    )
    return converted.write_manifest(made, manifest)


def build(description: Description, precision: str, path: Path) -> tuple[tuple[str, ...], str]:
    """Write the ONNX model of a description; returns its inputs and how it was made."""
    try:
        import onnx  # noqa: F401  (a missing package is said before anything is read)

        from sbert_pg.encoder.convert import graph
    except ImportError as error:
        if (error.name or "").startswith("sbert_pg"):
            raise
        raise MissingExtraError("onnx", "convert", "convert an encoder") from error
    if description.architecture in graph.ARCHITECTURES:
        model, exporter = graph.build(description, precision), "graph"
    else:
        from sbert_pg.encoder.export import export

        model, exporter = export(description, precision), "torch"
    inputs = tuple(value.name for value in model.graph.input)
    save(model, path)
    return inputs, exporter


def spec_of(
    description: Description,
    tokenizer: dict[str, Any],
    name: str,
    precision: str,
    revision: str | None,
) -> EncoderSpec:
    """The spec of a model in one precision."""
    prompts = {key: text for key, text in description.prompts.items() if text}
    default = description.default_prompt_name
    return EncoderSpec(
        name=name,
        dimensions=description.dimensions,
        similarity=description.similarity,
        normalized=description.normalized,
        max_seq_length=description.max_seq_length,
        pooling="+".join(description.pooling),
        layers=tuple(layer_text(layer) for layer in description.layers),
        # An empty prompt is none: sentence-transformers writes them for every model.
        prompts=tuple(sorted(prompts.items())),
        default_prompt_name=default if default in prompts else None,
        include_prompt=description.include_prompt,
        precision=precision,
        weights_digest=weights_digest(description),
        tokenizer_digest=tokenizer_digest(tokenizer),
        revision=revision,
    )


def measure(vectors: Vectors, reference: Vectors) -> dict[str, Agreement]:
    """Agreement on the probes and on the sample texts, whose vectors follow each other."""
    n = len(PROBES)
    return {
        "probes": agreement_of(vectors[:n], reference[:n]),
        "samples": agreement_of(vectors[n:], reference[n:]),
    }


def require(agreement: dict[str, Agreement], floor: Floor, what: str) -> None:
    """Refuse a conversion that is below its floor.

    Raises:
        ConversionError: it is.
    """
    mean = agreement["samples"].mean_cosine
    worst = min(value.min_cosine for value in agreement.values())
    if not (mean >= floor.mean and worst >= floor.worst):
        raise ConversionError(
            f"{what} agrees with fp32 by cosine {mean:.5f} in the mean and {worst:.5f} for the "
            f"worst text; the floor is {floor.mean} and {floor.worst}. Use precision='fp32'."
        )


def _vectors(path: Path, inputs: tuple[str, ...], tokens: Sequence[Sequence[int]]) -> Vectors:
    # On the CPU wherever it will run, so that the probes are the same from every machine.
    vectors: Vectors = Runner(path, inputs, providers=[CPU]).run(tokens)
    if not np.isfinite(vectors).all():
        raise ConversionError(f"{path.name} gives values that are not finite; it is not usable.")
    return vectors
