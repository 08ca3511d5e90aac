"""Sample texts on their way through a model, to learn the ranges of its activations."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from sbert_pg.encoder.description import Description
from sbert_pg.encoder.samples import SAMPLE_TEXTS
from sbert_pg.encoder.tokenizing import TextTokenizer, tokenizer_content, truncation_side
from sbert_pg.probes import PROBES


def calibration_batches(description: Description) -> Iterator[npt.NDArray[np.int64]]:
    """Token numbers of the sample texts and the probes, one text a batch."""
    content = json.dumps(tokenizer_content(description), ensure_ascii=False)
    tokenizer = TextTokenizer(content, description.max_seq_length, truncation_side(description))
    for ids in tokenizer.encode([*SAMPLE_TEXTS, *PROBES]).ids:
        yield np.array([ids], dtype=np.int64)


def session_of(model: onnx.ModelProto) -> Any:
    """An onnxruntime session of a model that may be larger than a protobuf message."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="sbert-pg-calibration-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save_model(model, path)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
