"""What comes into each product, seen by running the fp32 form on texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper

from sbert_pg.encoder.batches import plan
from sbert_pg.encoder.convert.architectures import Linear
from sbert_pg.encoder.convert.linear import Floats
from sbert_pg.encoder.convert.quantize import Seen
from sbert_pg.encoder.convert.writer import FLOAT, Writer
from sbert_pg.encoder.description import Description
from sbert_pg.encoder.samples import SAMPLE_TEXTS
from sbert_pg.encoder.saving import session as open_session
from sbert_pg.encoder.tokenizing import TextTokenizer, tokenizer_content, truncation_side
from sbert_pg.errors import ConversionError
from sbert_pg.probes import PROBES

#: Rows kept of each product's input, over all texts. Four times as many change no range by more
#: than rounding, and make a conversion three times as long.
_ROWS = 1024
#: Tokens that are read of a text; more say nothing new about ranges.
_LONGEST = 256
#: Tokens in a batch. Every intermediate value leaves the session, so it is small.
_BUDGET = 512


class Watched(Floats):
    """The fp32 form, remembering the names of what comes into its products."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, str] = {}

    def linear(
        self, writer: Writer, x: str, layers: Sequence[Linear], names: Sequence[str]
    ) -> list[str]:
        """See ``Products``."""
        self.inputs[names[0]] = x
        return super().linear(writer, x, layers, names)


def token_ids(description: Description) -> list[list[int]]:
    """The calibration texts: ordinary ones and the probes."""
    limit = min(description.max_seq_length or _LONGEST, _LONGEST)
    content = json.dumps(tokenizer_content(description), ensure_ascii=False)
    tokenizer = TextTokenizer(content, limit, truncation_side(description))
    return tokenizer.encode([*SAMPLE_TEXTS, *PROBES]).ids


def observe(
    model: onnx.ModelProto, watched: Watched, texts: Sequence[Sequence[int]]
) -> dict[str, Seen]:
    """Run texts and look at what comes into each product.

    Args:
        model: the fp32 form, made with ``watched``.
        watched: names what to look at.
        texts: token ids of each text.
    """
    model.graph.output.extend(
        helper.make_tensor_value_info(name, FLOAT, None) for name in watched.inputs.values()
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = open_session(model, options)
    total = sum(map(len, texts))
    seen: dict[str, Seen] = {}
    for feeds, real in _batches(texts, {value.name for value in session.get_inputs()}):
        outputs = session.run(list(watched.inputs.values()), feeds)
        for name, values in zip(watched.inputs, outputs, strict=True):
            flat = values.reshape(-1, values.shape[-1])[real]
            if not np.isfinite(flat).all():
                raise ConversionError(f"The input of {name} is not finite on a calibration text.")
            _add(seen, name, flat, _ROWS / total)
    return seen


def _batches(
    texts: Sequence[Sequence[int]], inputs: set[str]
) -> Iterator[tuple[dict[str, Any], npt.NDArray[np.bool_]]]:
    """Feeds, and which tokens of the flattened batch are no padding."""
    for positions in plan([len(ids) for ids in texts], _BUDGET):
        longest = max(len(texts[position]) for position in positions)
        ids = np.zeros((len(positions), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, position in enumerate(positions):
            ids[row, : len(texts[position])] = texts[position]
            mask[row, : len(texts[position])] = 1
        yield {name: ids if name == "input_ids" else mask for name in inputs}, mask.ravel() > 0


def _add(seen: dict[str, Seen], name: str, values: Any, part: float) -> None:
    step = max(1, int(1 / part))
    lowest = np.minimum(values.min(axis=0), 0)
    highest = np.maximum(values.max(axis=0), 0)
    rows = values[::step].copy()
    if name in seen:
        before = seen[name]
        lowest = np.minimum(lowest, before.lowest)
        highest = np.maximum(highest, before.highest)
        rows = np.concatenate([before.rows, rows])
    seen[name] = Seen(lowest, highest, rows)
