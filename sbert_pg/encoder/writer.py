"""A small writer of ONNX graphs and their files."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from sbert_pg.encoder.engines import CPU, load_onnxruntime
from sbert_pg.encoder.layers import MICROSOFT, Activation

#: LayerNormalization came with 17, axes of reductions as an input with 18.
OPSET = 18
IR_VERSION = 9
FLOAT = TensorProto.FLOAT
FLOAT16 = TensorProto.FLOAT16
INT32 = TensorProto.INT32
INT64 = TensorProto.INT64
BOOL = TensorProto.BOOL

#: Bytes of weights from which they lie in a file of their own; a protobuf message ends at 2 GiB.
EXTERNAL_FROM = 1_500_000_000
#: Name of that file, beside the model.
WEIGHTS = "model.onnx.data"

#: An input of a node: the name of a value, or a constant: an int64 alone or a vector of them, a
#: float32, or an array as it is.
Value = str | int | float | list[int] | npt.NDArray[Any]


class Writer:
    """Collects nodes and initializers, equal ones once; a prefix begins all names."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self.nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._outputs: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    @property
    def initializers(self) -> list[Any]:
        """The constants and weights, once each."""
        return list(self._initializers.values())

    def name(self, hint: str) -> str:
        """A name that is not taken."""
        hint = self._prefix + hint
        count = self._counts.get(hint, 0)
        self._counts[hint] = count + 1
        return f"{hint}_{count}" if count else hint

    def tensor(self, array: Any, hint: str = "constant") -> str:
        """An initializer; equal ones are stored once.

        But for weights in int8: where two products share one, onnxruntime turns it into uint8 twice
        and fails at the second time.
        """
        value = np.asarray(array, order="C")
        key = (value.dtype.str, value.shape, hashlib.blake2b(value.data).digest())
        if key in self._constants and value.dtype != np.int8:
            return self._constants[key]
        name = self.name(hint)
        self._initializers[name] = numpy_helper.from_array(value, name)
        self._constants[key] = name
        return name

    def _named(self, value: Value) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, np.ndarray):
            return self.tensor(value)
        return self.tensor(np.array(value, np.float32 if isinstance(value, float) else np.int64))

    def node(
        self, op: str, *inputs: Value, hint: str = "", domain: str = "", **attributes: Any
    ) -> str:
        """A node with one output; returns the output's name, ``hint`` or the operator's."""
        names = [self._named(value) for value in inputs]
        while names and not names[-1]:
            names.pop()
        key = repr((op, names, domain, sorted(attributes.items())))
        if key in self._outputs:
            return self._outputs[key]
        output = self.name(hint or op.lower())
        if not any(isinstance(value, onnx.GraphProto) for value in attributes.values()):
            self._outputs[key] = output
        name = self.name(f"{op}_{output}")
        self.nodes.append(
            helper.make_node(op, names, [output], name=name, domain=domain, **attributes)
        )
        return output

    def graph(
        self, outputs: Sequence[Any], inputs: Sequence[Any] = (), name: str = "inner"
    ) -> onnx.GraphProto:
        """The nodes as a graph; of a writer from ``inner``, it may use any value of the outer."""
        return helper.make_graph(self.nodes, name, list(inputs), list(outputs), self.initializers)

    def scan(
        self,
        inputs: Sequence[tuple[str, int]],
        body: Writer,
        names: Sequence[str],
        out: str,
        *,
        state: bool,
    ) -> str:
        """``Scan`` over axis 1 of some values with their types, the state of the beginning first.

        The result has the first one's type: the last state, or all parts ``out`` of ``body`` along
        axis 1.
        """
        values = [
            helper.make_tensor_value_info(name, kind, None)
            for name, (_, kind) in zip(names, inputs, strict=True)
        ]
        result = helper.make_tensor_value_info(out, inputs[0][1], None)
        axes: dict[str, Any] = {} if state else {"scan_output_axes": [1]}
        through = len(inputs) - state
        return self.node(
            "Scan", *(name for name, _ in inputs), body=body.graph([result], values),
            num_scan_inputs=through, scan_input_axes=[1] * through, **axes,
        )  # fmt: skip

    def inner(self) -> Writer:
        """A writer for a branch: its own constants, names that differ from this one's."""
        writer = Writer(self._prefix)
        writer._counts = self._counts
        return writer

    def model(self, inputs: Sequence[Any], output: Any, name: str) -> onnx.ModelProto:
        """The finished model."""
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(
            self.graph([output], inputs, f"sbert-pg-{name}"),
            opset_imports=imports, ir_version=IR_VERSION, producer_name="sbert-pg",
        )  # fmt: skip


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, its weights in ``model.onnx.data`` beside it where they are large."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size < EXTERNAL_FROM:
        onnx.save_model(model, path)
        return
    onnx.save_model(
        model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=WEIGHTS
    )


def open_session(model: onnx.ModelProto, options: Any) -> Any:
    """A session of a model in memory, through a file since it may be too large for a message."""
    with tempfile.TemporaryDirectory(prefix="sbert-pg-") as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        return load_onnxruntime().InferenceSession(str(path), options, providers=[CPU])


def even_blocks(writer: Writer, length: str, most: int) -> tuple[str, str, str]:
    """Blocks of one size for a length, an int64 vector of one: how many, their size, what is left.

    No block is larger than ``most`` or than it must be.
    """
    count = writer.node("Div", writer.node("Add", length, [most - 1]), [most])
    size = writer.node("Sub", writer.node("Add", length, count), [1])
    size = writer.node("Div", size, count)
    return count, size, writer.node("Sub", writer.node("Mul", count, size), length)


def activate(writer: Writer, x: str, activation: Activation) -> str:
    """An activation, as the tables in ``layers`` have it, of ``x``."""
    op, domain, attributes = activation
    return x if op == "Identity" else writer.node(op, x, domain=domain, **attributes)
