"""The road for architectures that are not built from their weights: through torch.

The transformer is loaded by sentence-transformers from safetensors, without code from the
repository, and exported by ``torch.onnx.export`` together with pooling and the layers after it. The
result is an ONNX model like any other here, in fp32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sbert_pg.encoder.description import Description, PoolingMode
from sbert_pg.errors import ConversionError, MissingExtraError, UnsupportedEncoderError

if TYPE_CHECKING:
    import onnx

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POOLING_MASK = "pooling_mask"
OUTPUT = "embedding"
OPSET = 18
#: Name of the output while it is traced, which no module of transformers has.
_TRACED_OUTPUT = "sbert_pg_output"


def export(description: Description, precision: str) -> onnx.ModelProto:
    """The ONNX model of a description, by torch.

    Raises:
        MissingExtraError: torch or sentence-transformers is not installed.
        UnsupportedEncoderError: a precision that this road does not have.
        ConversionError: torch cannot export the architecture.
    """
    if precision not in ("fp32", "fp32-plain"):  # torch writes plain operators in any case
        raise UnsupportedEncoderError(
            f"Architecture {description.architecture!r} is exported by torch, in fp32 only; "
            f"{precision!r} is for the architectures that are built from their weights. "
            "Load it with precision='fp32'."
        )
    try:
        import onnxscript  # noqa: F401  (torch.onnx.export needs it)
        import torch
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError(
            error.name or "sentence-transformers",
            "export",
            f"convert the architecture {description.architecture!r}",
        ) from error
    with _quiet():
        model = SentenceTransformer(
            str(description.path),
            device="cpu",
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"attn_implementation": "eager", "use_safetensors": True},
        )
        module = _pipeline(model, description.pooling)
        return _exported(torch, module, description)


def _pipeline(model: Any, modes: Sequence[PoolingMode]) -> Any:
    """Transformer, pooling and layers as one torch module on tensors."""
    import torch

    class Pipeline(torch.nn.Module):  # type: ignore[misc]  # torch is not type-checked here
        def __init__(self) -> None:
            super().__init__()
            modules = list(model)
            self.transformer = modules[0].auto_model.float().eval()
            self.rest = torch.nn.ModuleList(modules[2:]).float().eval()

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            pooling_mask: torch.Tensor | None = None,
        ) -> torch.Tensor:
            tokens = self.transformer(input_ids=input_ids, attention_mask=attention_mask)[0]
            mask = attention_mask if pooling_mask is None else pooling_mask
            features = {"sentence_embedding": _pooled(tokens, mask, modes)}
            for layer in self.rest:
                features = layer(features)
            vector: torch.Tensor = features["sentence_embedding"]
            return vector

    return Pipeline().eval()


def _pooled(tokens: Any, mask: Any, modes: Sequence[PoolingMode]) -> Any:
    """Pooling as sentence-transformers' ``Pooling`` does it, where padding is to the right.

    Args:
        tokens: token embeddings, ``(batch, tokens, width)``.
        mask: 1 for the tokens that are pooled, ``(batch, tokens)``.
        modes: pooling modes in the order of concatenation.
    """
    import torch

    weights = mask.unsqueeze(-1).to(tokens.dtype)
    positions = torch.arange(1, tokens.shape[1] + 1, dtype=tokens.dtype)
    rows = torch.arange(tokens.shape[0])
    pooled = []
    for mode in modes:
        if mode == "cls":
            pooled.append(tokens[rows, mask.to(torch.int32).argmax(dim=1)])
        elif mode == "max":
            pooled.append(tokens.masked_fill(weights == 0, -torch.inf).amax(dim=1))
        elif mode == "lasttoken":
            last = (mask * positions.to(mask.dtype)).argmax(dim=1)
            pooled.append(tokens[rows, last] * weights[rows, last])
        else:
            # Positions are counted from the first token of the text, prompt or not.
            by = weights * positions.view(1, -1, 1) if mode == "weightedmean" else weights
            total = by.sum(dim=1).clamp(min=1e-9)
            if mode == "mean_sqrt_len_tokens":
                total = total.sqrt()
            pooled.append((tokens * by).sum(dim=1) / total)
    return torch.cat(pooled, dim=1)


def _exported(torch: Any, module: Any, description: Description) -> onnx.ModelProto:
    names = [INPUT_IDS, ATTENTION_MASK]
    if not description.include_prompt:
        names.append(POOLING_MASK)
    ids = torch.randint(5, 20, (3, 7), dtype=torch.int64)
    mask = torch.ones_like(ids)
    # Not all alike, so that nothing about the mask is folded into a constant.
    mask[1, 5:] = 0
    arguments = (ids, mask, mask.clone())[: len(names)]
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=2, max=8192)
    try:
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            input_names=names,
            output_names=[_TRACED_OUTPUT],
            opset_version=OPSET,
            dynamic_shapes=tuple({0: batch, 1: tokens} for _ in names),
            verbose=False,
        )
    # The exporter raises whatever the traced code, torch.export or onnxscript raises.
    except Exception as error:
        raise ConversionError(
            f"torch cannot export the architecture {description.architecture!r} of "
            f"{description.path}: {type(error).__name__}: {error}"
        ) from error
    model: onnx.ModelProto = program.model_proto
    _rename(model, {OUTPUT: f"{OUTPUT}_inner", _TRACED_OUTPUT: OUTPUT})
    return model


def _rename(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Rename values; transformers has inner values of the name that the output shall have."""
    graph = model.graph
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)


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
