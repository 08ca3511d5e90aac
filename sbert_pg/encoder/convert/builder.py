"""A thin layer over ``onnx.helper``: named nodes, shared constants, one graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
#: onnxruntime's own operators, which every build of it has.
MICROSOFT = "com.microsoft"
#: Newest file format that onnxruntime 1.20, the oldest supported, reads.
IR_VERSION = 9


class GraphBuilder:
    """Collects nodes and constants; a value is known by its name."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._number = 0
        self._domains: set[str] = set()

    def input(self, name: str, type_: int, shape: Sequence[str | int]) -> str:
        """Declare an input of the model."""
        self._inputs.append(helper.make_tensor_value_info(name, type_, list(shape)))
        return name

    def output(self, name: str, value: str, shape: Sequence[str | int]) -> None:
        """Make a value an output of the model under a name of its own."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"out_{name}"))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def constant(self, array: npt.NDArray[Any], name: str = "constant") -> str:
        """A constant; its name is made unique."""
        self._number += 1
        unique = f"{name}_{self._number}"
        self._constants[unique] = numpy_helper.from_array(np.ascontiguousarray(array), unique)
        return unique

    def ints(self, *values: int) -> str:
        """A constant of int64, one axis."""
        return self.constant(np.array(values, dtype=np.int64), "ints")

    def scalar(self, value: float) -> str:
        """A constant of float32 without axes."""
        return self.constant(np.array(value, dtype=np.float32), "scalar")

    def op(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return that."""
        return self.ops(operator, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, operator: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs."""
        self._number += 1
        name = f"{operator.lower()}_{self._number}"
        made = [f"{name}_{position}" for position in range(outputs)]
        self._nodes.append(
            helper.make_node(operator, list(inputs), made, name=name, domain=domain, **attributes)
        )
        self._domains.add(domain)
        return made

    def micro(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add one of onnxruntime's own operators."""
        return self.op(operator, *inputs, domain=MICROSOFT, **attributes)

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self._nodes, "encoder", self._inputs, self._outputs, list(self._constants.values())
        )
        imports = [helper.make_opsetid("", OPSET)]
        if MICROSOFT in self._domains:
            imports.append(helper.make_opsetid(MICROSOFT, 1))
        return helper.make_model(
            graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="sbert-pg"
        )
