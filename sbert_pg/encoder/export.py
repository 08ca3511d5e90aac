"""Architectures that are not built from their weights: through torch.

The transformer is loaded by sentence-transformers from safetensors, without code from the
repository, and exported by ``torch.onnx.export``. Pooling and the layers after it follow as in
every other model here. The result is in fp32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import compose, helper

from sbert_pg.encoder import graph
from sbert_pg.encoder.description import Description
from sbert_pg.encoder.files import Weights
from sbert_pg.encoder.layers import MICROSOFT
from sbert_pg.encoder.runner import ATTENTION_MASK, INPUT_IDS
from sbert_pg.encoder.writer import OPSET, Writer
from sbert_pg.errors import (
    ConversionError,
    DamagedEncoderError,
    UnsupportedEncoderError,
    needing,
)

#: Bounds of what a configuration may ask transformers for.
_LARGEST = 10_000_000
_MOST_LAYERS = 500
#: Part by which the parameters may exceed what is stored; some are made of others.
_MOST_MADE_UP = 1.02


def export(description: Description, precision: str) -> onnx.ModelProto:
    """The ONNX model of a description, by torch."""
    if precision not in ("fp32", "fp32-plain", "bf16"):  # torch writes plain operators in any case
        raise UnsupportedEncoderError(
            f"{description.config.path}: architecture {description.architecture!r} is exported by "
            "torch, in fp32 only; "
            f"{precision!r} is for the architectures that are built from their weights. "
            "Load it with precision='fp32'."
        )
    with needing(None, "export", f"convert the architecture {description.architecture!r}"):
        import onnxscript  # noqa: F401  (torch.onnx.export needs it)
        import torch
        from sentence_transformers import SentenceTransformer
    with _quiet():
        _require_weights(torch, description)
        try:
            model = SentenceTransformer(
                str(description.path),
                device="cpu",
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"attn_implementation": "eager", "use_safetensors": True},
            )
        # transformers raises whatever its many models raise.
        except Exception as error:
            raise ConversionError(
                f"sentence-transformers cannot load {description.path}: {type(error).__name__}: "
                f"{str(error)[:500]}"
            ) from error
        transformer = next(iter(model)).auto_model
        _require_loaded(transformer, description)
        body = _exported(torch, transformer.float().eval(), description)
    return _finished(body, description)


def _require_weights(torch: Any, description: Description) -> None:
    """Refuse a configuration that the weights do not fill.

    transformers would make up what is missing, from random numbers and whatever its size. So the
    model is built without memory first, and its parameters are looked up in the files.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    config = description.config
    if description.architecture not in CONFIG_MAPPING:
        # transformers would advise to run the repository's code, which nothing here does.
        raise UnsupportedEncoderError(
            f"{config.path}: 'model_type' is {description.architecture!r}, which is not built here "
            f"and which transformers {transformers.__version__} does not have either: it is code "
            "of a model repository, which is never run, or of a newer transformers. Take a model "
            "of another architecture, or a newer transformers."
        )
    asked = _parameters(torch, description)
    weights = Weights(description.weights)
    stored = sum(weights.size(name) for name in weights.names())
    if asked > stored * _MOST_MADE_UP:
        raise DamagedEncoderError(
            f"{config.path} describes a model of {asked:,} parameters; its weights have {stored:,}."
        )


def _parameters(torch: Any, description: Description) -> int:
    """How many numbers the model of a configuration has, but for the pooler."""
    from transformers import AutoConfig, AutoModel

    config = description.config
    for key, value in config.items():
        most = _MOST_LAYERS if "layers" in key else _LARGEST
        if isinstance(value, int) and not -1 <= value <= most and "token_id" not in key:
            config.refuse(key, f"a number up to {most:,}")
    try:
        settings = AutoConfig.from_pretrained(
            str(description.transformer_path), trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            needed = dict(AutoModel.from_config(settings).named_parameters())
    # transformers raises whatever its many models raise.
    except Exception as error:
        raise UnsupportedEncoderError(
            f"{config.path}: transformers cannot build architecture "
            f"{description.architecture!r}: {type(error).__name__}: {str(error)[:500]}"
        ) from error
    return sum(parameter.numel() for name, parameter in needed.items() if "pooler" not in name)


def _require_loaded(transformer: Any, description: Description) -> None:
    """Refuse weights under other names than the architecture's, for which random ones stand in."""
    _, found = type(transformer).from_pretrained(
        str(description.transformer_path), local_files_only=True, use_safetensors=True,
        output_loading_info=True,
    )  # fmt: skip
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:
        files = ", ".join(map(str, description.weights))
        raise DamagedEncoderError(
            f"{files} lacks {len(missing)} tensors that a model of type "
            f"{description.architecture!r} needs, such as {missing[0]!r}: the weights are of "
            "another architecture, or not all of them are there."
        )


def _exported(torch: Any, transformer: Any, description: Description) -> onnx.ModelProto:
    """The transformer alone; its output are the token vectors."""

    class Tokens(torch.nn.Module):  # type: ignore[misc]  # torch is not type-checked here
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.transformer(input_ids=input_ids, attention_mask=attention_mask)[0]

    ids = torch.randint(5, 20, (3, 7), dtype=torch.int64)
    mask = torch.ones_like(ids)
    # Not all alike, so that nothing about the mask is folded into a constant.
    mask[1, 5:] = 0
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=2, max=8192)
    try:
        program = torch.onnx.export(
            Tokens().eval(),
            (ids, mask),
            dynamo=True,
            input_names=[INPUT_IDS, ATTENTION_MASK],
            opset_version=OPSET,
            dynamic_shapes=({0: batch, 1: tokens},) * 2,
            verbose=False,
        )
    # The exporter raises whatever the traced code, torch.export or onnxscript raises.
    except Exception as error:
        raise ConversionError(
            f"torch cannot export the architecture {description.architecture!r} of "
            f"{description.path}: {type(error).__name__}: {error}"
        ) from error
    model: onnx.ModelProto = program.model_proto
    return model


def _finished(body: onnx.ModelProto, description: Description) -> onnx.ModelProto:
    """The model with pooling and the layers after it."""
    # Values of the body get names of their own; its inputs are those of the whole.
    model = compose.add_prefix(body, "body.", rename_inputs=False)
    writer = Writer()
    inputs, output = graph.finish(writer, description, model.graph.output[0].name)
    model.graph.node.extend(writer.nodes)
    model.graph.initializer.extend(writer.initializers)
    del model.graph.input[:], model.graph.output[:]
    model.graph.input.extend(inputs)
    model.graph.output.append(output)
    if MICROSOFT not in {imported.domain for imported in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress on the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
