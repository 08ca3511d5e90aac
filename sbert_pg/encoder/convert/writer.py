"""A small writer of ONNX graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: LayerNormalization came with 17, axes of reductions as an input with 18.
OPSET = 18
IR_VERSION = 9
#: Domain of the operators that only onnxruntime has.
MICROSOFT = "com.microsoft"
FLOAT = TensorProto.FLOAT
FLOAT16 = TensorProto.FLOAT16
INT32 = TensorProto.INT32
INT64 = TensorProto.INT64
BOOL = TensorProto.BOOL


class Writer:
    """Collects nodes and initializers; values are named after what they are."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counts: dict[str, int] = {}

    def name(self, hint: str) -> str:
        """A name that is not taken."""
        count = self._counts.get(hint, 0)
        self._counts[hint] = count + 1
        return f"{hint}_{count}" if count else hint

    def tensor(self, array: Any, hint: str) -> str:
        """An initializer; equal ones are stored once."""
        value = np.asarray(array, order="C")
        key = (value.dtype.str, value.shape, value.tobytes() if value.size < 1 << 16 else b"")
        if key[2] and key in self._constants:
            return self._constants[key]
        name = self.name(hint)
        self._initializers[name] = numpy_helper.from_array(value, name)
        self._constants[key] = name
        return name

    def ints(self, *values: int) -> str:
        """A vector of int64."""
        return self.tensor(np.array(values, np.int64), "ints")

    def scalar(self, value: float) -> str:
        """A float32 without dimensions."""
        return self.tensor(np.array(value, np.float32), "scalar")

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        hint: str = "",
        *,
        domain: str = "",
        **attributes: int | float | str | Sequence[int],
    ) -> str:
        """A node with one output; returns the output's name."""
        return self.nodes_of(op, inputs, [hint or op.lower()], domain=domain, **attributes)[0]

    def nodes_of(
        self,
        op: str,
        inputs: Sequence[str],
        hints: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """A node with several outputs; returns their names."""
        outputs = [self.name(hint) for hint in hints]
        trimmed = list(inputs)
        while trimmed and not trimmed[-1]:
            trimmed.pop()
        self.nodes.append(
            helper.make_node(
                op, trimmed, outputs, name=self.name(f"{op}_{hints[0]}"), domain=domain,
                **attributes,
            )
        )  # fmt: skip
        return outputs

    def branch(self, condition: str, then: Writer, then_out: str, other: Writer, other_out: str,
               hint: str) -> str:  # fmt: skip
        """``If``: the output of one of two writers, which may use any value of this one."""
        graphs: list[Any] = []
        for writer, output in ((then, then_out), (other, other_out)):
            value = helper.make_tensor_value_info(output, FLOAT, None)
            graphs.append(
                helper.make_graph(
                    writer.nodes, f"{hint}_{len(graphs)}", [], [value],
                    list(writer._initializers.values()),
                )
            )  # fmt: skip
        return self.node("If", [condition], hint, then_branch=graphs[0], else_branch=graphs[1])

    def inner(self) -> Writer:
        """A writer for a branch: constants of its own, names that differ from this one's."""
        writer = Writer()
        writer._counts = self._counts
        return writer

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any], name: str) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self.nodes, name, list(inputs), list(outputs), list(self._initializers.values())
        )
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(
            graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="sbert-pg"
        )
