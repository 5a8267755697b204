"""The graph that TensorRT parses as it grows: strongly typed, float16 but where a sum needs more, weights in the file.

What each op becomes is in tensorrt_ops.py; this room needs onnx-ir, that one does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeexport.backends import onnx_file
from edgeexport.backends.optable import OpTable
from edgeexport.backends.storage import Layout
from edgeexport.canonical.dialect import constant, stored
from edgeexport.core import CanonicalModel, Dim, Progress, QuantPlan, WeightSource

FUSED_OPSET, PRIMITIVE_OPSET, INTEGER_OPSET = 24, 17, 21
"""Of the fused dialect; of primitives; and of primitives over integer weights: DequantizeLinear takes float16 scales
from opset 19 on, and blocks and int4 from 21 on."""
IR_VERSIONS = {FUSED_OPSET: 11, PRIMITIVE_OPSET: 8, INTEGER_OPSET: 10}
"""The IR version that came with each opset: an old parser refuses a newer one."""
HALF, WIDE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def write(
    models: Sequence[CanonicalModel], plan: QuantPlan, source: WeightSource, work: Path, table: OpTable,
    *, fused: bool, progress: Progress,
) -> Layout:  # fmt: skip
    """Write each variant's ONNX file into `work`, and the one file of the weights that all read; returns its layout.

    Raises: UsageError `output-not-writable`; CheckpointError for weights that cannot be stored.
    """
    layout = Layout(f"{models[0].component}.onnx.data", signed=True)
    graphs = {
        f"{onnx_file.stem_of(model)}.onnx": Lowering(model, plan, layout, table, fused=fused).run() for model in models
    }
    onnx_file.write(graphs, layout, work, source, progress)
    return layout


class Lowering:
    """Every float value of the old graph has a float16 one in the new graph (`value`), a float32 one where it was made
    or is asked for (`wide`), or both."""

    def __init__(self, model: CanonicalModel, plan: QuantPlan, layout: Layout, table: OpTable, *, fused: bool) -> None:
        self.model, self.plan, self.layout, self.table, self.fused = model, plan, layout, table, fused
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.values: dict[ir.Value, ir.Value] = {}
        self.wides: dict[ir.Value, ir.Value] = {}
        self._integer: dict[str, ir.Value] = {}
        self._made: dict[tuple[Any, ...], ir.Value] = {}
        caches = dict(model.state)
        self.inputs = [self._input(value, cache=value.name in caches) for value in model.graph.graph.inputs]

    def run(self) -> ir.Model:
        """Lower every node in order; what nothing reads any more is left for the caller to drop."""
        graph: ir.Graph = self.model.graph.graph
        for node in graph:
            if self._reads_a_weight(node):
                continue  # whoever uses the weight asks for it itself
            row = self.table.get(node.op_type)
            if row is not None and row.lower is not None:
                row.lower(node, self)
            else:
                self.keep(node)
        caches = {present for _, present in self.model.state}
        outputs = []
        for old, spec in zip(graph.outputs, self.model.outputs, strict=True):
            new = self.value(old) if spec.name in caches or not self.is_float(old) else self.wide(old)
            if new in outputs or new.producer() is None:
                new = self.emit("Identity", [new])
            new.name = spec.name
            new.shape = ir.Shape([size.name if isinstance(size, Dim) else size for size in spec.shape])
            new.type = ir.TensorType(HALF) if spec.name in caches else old.type
            outputs.append(new)
        lowered = ir.Graph(
            self.inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": self.opset},
            name=graph.name,
        )
        return ir.Model(lowered, ir_version=IR_VERSIONS[self.opset], producer_name="edgeexport")

    @property
    def opset(self) -> int:
        """The least opset that has every op of the dialect and of the weights' formats."""
        if self.fused:
            return FUSED_OPSET
        return INTEGER_OPSET if any(fmt.integer for fmt in self.plan.formats.values()) else PRIMITIVE_OPSET

    def value(self, old: ir.Value | None) -> ir.Value:
        """What stands for `old`: float16 where it is a float. A weight enters the file when it is first asked for."""
        assert old is not None, "an input that the dialect requires"
        if old not in self.values:
            if old in self.wides:
                self.values[old] = self.narrowed(self.wides[old])
            elif (weight := self._weight(old)) is not None:
                self.values[old] = self.weight(weight)
            else:
                tensor = constant(old)
                assert tensor is not None, f"{old.name} is used before it is made"
                held = self.constant(str(old.name), tensor.numpy())
                self.values[old] = self.narrowed(held) if self.is_float(old) else held
        return self.values[old]

    def wide(self, old: ir.Value | None) -> ir.Value:
        """What stands for the float `old`, in float32: not rounded to float16 where it never was."""
        assert old is not None, "an input that the dialect requires"
        if old not in self.wides:
            weight, tensor = self._weight(old), constant(old)
            if weight is not None and self._held_wide(weight):
                self.wides[old] = self._float_weight(str(weight.name), WIDE)
            elif weight is None and tensor is not None:
                self.wides[old] = self.constant(str(old.name), tensor.numpy())
            else:
                self.wides[old] = self.widened(self.value(old))
        return self.wides[old]

    def weight(self, weight: ir.Value) -> ir.Value:
        """A weight in float16: as it is stored, or dequantised, which TensorRT fuses into the multiplication."""
        name = str(weight.name)
        if self.plan.formats[name].integer:
            return self.dequantized(name)
        if self._held_wide(weight):
            return self.narrowed(self._float_weight(name, WIDE))
        return self._float_weight(name, HALF)

    def dequantized(self, name: str) -> ir.Value:
        """DequantizeLinear over a weight [rows, width] of integers; one for all who read it."""
        if name not in self._integer:
            values, scales = self.integer_weight(name)
            fmt = self.plan.formats[name]
            how = {"axis": 1, "block_size": fmt.block} if fmt.block else {"axis": 0}
            self._integer[name] = self.emit("DequantizeLinear", [values, scales], how, name=f"{name}/dequantized")
        return self._integer[name]

    def offsets(self, name: str) -> ir.Value:
        """What is added to the blocks of a shifted weight, dequantised: [rows, blocks]."""
        rows, width = self.model.weights[name].shape
        self._laid_out(name)
        at = self.layout.weights[name]
        held = self._external(f"{name}/offsets", at.shift_offset, (rows, width // at.format.block), ir.DataType.INT8)
        scales = self._external(f"{name}/offset_scales", at.shift_scales_offset, (rows,), HALF)
        return self.once(("offsets", name), "DequantizeLinear", [held, scales], axis=0)

    def block_sums(self, old: ir.Value, block: int) -> ir.Value:
        """The sums of the last axis' blocks, added up in float32; made once for all who ask."""
        assert old.shape is not None and isinstance(old.shape[-1], int), "what a weight multiplies has its width"
        wide, axes = self.wide(old), len(old.shape)
        blocks = self.whole(*[0] * (axes - 1), old.shape[-1] // block, block)
        parts = self.once(("blocks", wide, block), "Reshape", [wide, blocks])
        sums = self.once(("sums", wide, block), "ReduceSum", [parts, self.whole(axes)], keepdims=0)
        return self.once(("block sums", wide, block), "Cast", [sums], to=HALF)

    def integer_weight(self, name: str) -> tuple[ir.Value, ir.Value]:
        """(integers or float8s [rows, width], float16 scales [rows] or [rows, blocks]) as they lie in the file."""
        shape, fmt = self.model.weights[name].shape, self.plan.formats[name]
        self._laid_out(name)
        at = self.layout.weights[name]
        scales = (shape[0], shape[1] // fmt.block) if fmt.block else (shape[0],)
        integer = ir.DataType.INT4 if fmt.bits == 4 else ir.DataType.INT8
        return (
            self._external(name, at.offset, shape, ir.DataType.FLOAT8E4M3FN if fmt.float8 else integer),
            self._external(f"{name}/scales", at.scales_offset, scales, HALF),
        )

    def constant(self, name: str, array: Any) -> ir.Value:
        """A constant of the graph: into the file when it is a table, into the graph when it is small."""
        if name in self.initializers:
            return self.initializers[name]
        if array.nbytes <= 1024:
            return self._initializer(name, ir.tensor(array, name=name))
        dtype = ir.DataType.from_numpy(array.dtype)
        return self._external(name, self.layout.add_constant(name, array), array.shape, dtype)

    def whole(self, *numbers: int) -> ir.Value:
        """An int64 vector inside the graph."""
        return self.constant(f"int64.{'_'.join(map(str, numbers))}", np.array(numbers, np.int64))

    def scalar(self, number: int) -> ir.Value:
        """An int64 number inside the graph."""
        return self.constant(f"int64.scalar.{number}", np.array(number, np.int64))

    def half(self, number: float) -> ir.Value:
        """A float16 number, rounded when the engine is built."""
        return self.once(("half", number), "Cast", [self.single(number)], to=HALF)

    def single(self, number: float) -> ir.Value:
        """A float32 number inside the graph."""
        return self.constant(f"float32.{number!r}", np.array(number, np.float32))

    def widened(self, value: ir.Value) -> ir.Value:
        """`value` as float32."""
        return self.emit("Cast", [value], {"to": WIDE})

    def narrowed(self, value: ir.Value) -> ir.Value:
        """`value` as float16."""
        return self.emit("Cast", [value], {"to": HALF})

    def once(self, key: tuple[Any, ...], op: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """A node that all layers share: made when it is first asked for under this key."""
        if key not in self._made:
            self._made[key] = self.emit(op, inputs, attributes)
        return self._made[key]

    def emit(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: int = 1,
        name: str = "",
    ) -> ir.Value:
        """Append a node; returns its first output (the others hang on its producer)."""
        label = name or f"{op}.{len(self.nodes)}"
        node = ir.node(op, inputs, dict(attributes or {}), num_outputs=outputs, name=label)
        for k, value in enumerate(node.outputs):
            value.name = label if k == 0 else f"{label}.{k}"
        self.nodes.append(node)
        return node.outputs[0]

    def keep(self, node: ir.Node, *, without: Sequence[str] = ()) -> None:
        """The node as it is, in float16; `without` these attributes."""
        inputs = [self.value(value) if value is not None else None for value in node.inputs]
        attributes = [held for name, held in node.attributes.items() if name not in without]
        copy = ir.Node("", node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=node.name)
        self.nodes.append(copy)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            # an output's own name is for what is given out, perhaps a Cast of this
            new.name = f"{old.name}/kept" if old.is_graph_output() else old.name
            self.values[old] = new

    def _reads_a_weight(self, node: ir.Node) -> bool:
        """Whether the node is part of a weight's reading: its Cast or Transpose."""
        return node.op_type in ("Cast", "Transpose") and self._weight(node.inputs[0]) is not None

    def _weight(self, value: ir.Value | None) -> ir.Value | None:
        weight = stored(value)
        return weight if weight is not None and weight.name in self.model.weights else None

    def _held_wide(self, weight: ir.Value) -> bool:
        return self.plan.formats[str(weight.name)].bits == 32

    def _float_weight(self, name: str, dtype: ir.DataType) -> ir.Value:
        self._laid_out(name)
        return self._external(name, self.layout.weights[name].offset, self.model.weights[name].shape, dtype)

    def _laid_out(self, name: str) -> None:
        if name not in self.layout.weights:
            self.layout.add([name], [self.model.weights[name].shape], self.plan.formats[name])

    def _external(self, name: str, offset: int, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
        if name in self.initializers:
            return self.initializers[name]
        length = -(-int(np.prod(shape, dtype=np.int64)) * dtype.bitwidth // 8)
        tensor = ir.ExternalTensor(self.layout.file, offset, length, dtype, shape=ir.Shape(shape), name=name)
        return self._initializer(name, tensor)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(int(str(size)) for size in tensor.shape)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.initializers[name] = value
        return value

    def _input(self, old: ir.Value, *, cache: bool) -> ir.Value:
        """A cache is float16 in the network's own interface, since it must be the scatter's input as it is; other
        floats are float32 there, as in every other runtime, and cast inside."""
        new = ir.Value(name=old.name, type=ir.TensorType(HALF) if cache else old.type, shape=old.shape)
        if self.is_float(old) and not cache:
            self.wides[old] = new
        else:
            self.values[old] = new
        return new

    @staticmethod
    def is_float(value: ir.Value) -> bool:
        """Whether a value of the canonical graph is a float there."""
        return value.dtype == WIDE
