"""Models as files, also those that are too large for one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

#: Bytes of weights from which they lie in a file of their own; a protobuf message ends at 2 GiB.
EXTERNAL_FROM = 1_500_000_000
#: Name of that file, beside the model.
WEIGHTS = "model.onnx.data"


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, its weights in ``model.onnx.data`` beside it where they are large."""
    import onnx

    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size < EXTERNAL_FROM:
        onnx.save_model(model, path)
        return
    onnx.save_model(
        model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=WEIGHTS
    )


def session(model: onnx.ModelProto, options: Any) -> Any:
    """A session of a model in memory, through a file since it may be too large for a message."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="sbert-pg-") as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
