"""A graph on its way into MNN's converter: ONNX nodes, and placeholders that become MNN's own ops afterwards.

The converter sees no weight. A weight that an op holds (a convolution's kernel, a norm's scale) hangs on a placeholder;
one that is read as a value is an input of the graph. Both name a place in the weight file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from edgeexport.backends.mnn_rewrite import PLACEHOLDER, Held, MnnOp, Placeholders
from edgeexport.core import Array, TensorSpec

DTYPES = {
    "int64": ir.DataType.INT32,
    "int32": ir.DataType.INT32,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT,
}
"""What MNN computes a dtype in: it has no int64."""

DOMAIN = "edgeexport"
OPSET = 17
"""The newest whose ops the converter takes without a change of meaning."""


class Graph:
    """The ONNX graph as it grows."""

    def __init__(self) -> None:
        self.placeholders = Placeholders()
        self.nodes: list[ir.Node] = []
        self.inputs: dict[str, ir.Value] = {}
        self.initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A value that the runtime gives."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
        self.inputs[name] = value
        return value

    def held(self, name: str, place: Held) -> ir.Value:
        """A tensor of the weight file, read as a value."""
        if name not in self.inputs:
            self.input(name, ir.DataType.FLOAT, place.shape)
            self.placeholders.values[name] = place
        return self.inputs[name]

    def constant(self, name: str, array: Array) -> ir.Value:
        """A few numbers inside the graph."""
        if name not in self.initializers:
            tensor = ir.tensor(np.ascontiguousarray(array), name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            self.initializers[name] = value
        return self.initializers[name]

    def ints(self, *numbers: int) -> ir.Value:
        """An int64 vector."""
        return self.constant("ints." + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.constant(f"number.{value!r}", np.array(value, np.float32))

    def emit(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Value:
        """Append a node; returns its first output (the others hang on its producer)."""
        name = f"{op}.{len(self.nodes)}"
        node = ir.node(op, inputs, dict(attributes or {}), domain=domain, num_outputs=outputs, name=name)
        for k, value in enumerate(node.outputs):
            value.name = name if k == 0 else f"{name}.{k}"
        self.nodes.append(node)
        return node.outputs[0]

    def place(self, name: str, inputs: Sequence[ir.Value], *ops: MnnOp) -> ir.Value:
        """A placeholder that becomes these ops; `name` and a number tell it from others."""
        key = f"{name}.{len(self.placeholders.ops)}"
        self.placeholders.ops[key] = ops
        return self.emit(PLACEHOLDER, inputs, {"name": key}, domain=DOMAIN)

    def onnx(self, outputs: Sequence[tuple[TensorSpec, ir.Value]]) -> bytes:
        """The graph as an ONNX file, without the nodes that nothing reads."""
        results = []
        for spec, value in outputs:
            result = value if value.producer() is not None else self.emit("Identity", [value])
            result.name, result.type = spec.name, ir.TensorType(DTYPES[spec.dtype])
            results.append(result)
        graph = ir.Graph(
            list(self.inputs.values()),
            results,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, DOMAIN: 1},
            name="edgeexport",
        )
        model = ir.Model(graph, ir_version=8, producer_name="edgeexport")
        common.RemoveUnusedNodesPass()(model)
        data: bytes = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        return data
