"""One graph of a .tflite file as it is lowered: canonical values to tensors of fixed shapes, weights as stored.

What each op becomes is in litert_ops.py; this room needs onnx-ir, that one does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeexport import errors
from edgeexport.backends.litert_file import Graph, ModelFile, Tensor
from edgeexport.backends.optable import OpTable
from edgeexport.canonical.dialect import constant, stored
from edgeexport.core import Array, CanonicalModel, Format, QuantPlan


class Lowering:
    """The graph as it grows. Shapes are all fixed, so that what is computed from them is known here (`known`), and only
    what depends on the inputs becomes an operator."""

    def __init__(self, model: CanonicalModel, plan: QuantPlan, table: OpTable, file: ModelFile, name: str) -> None:
        self.model, self.plan, self.table = model, plan, table
        self.graph: Graph = file.graph(name)
        self.count: Tensor | None = None
        """int32 [1]: how many keys there are where attention has keys of a free number."""
        self.window = 0
        """Slots of the cache that are attended to; 0 for all."""
        self.tensors: dict[ir.Value, Tensor] = {}
        self._known: dict[ir.Value, Array] = {}

    def bind(self, name: str, tensor: Tensor) -> None:
        """Let this tensor stand for the canonical graph's input of that name."""
        self.tensors[next(value for value in self.model.graph.graph.inputs if value.name == name)] = tensor

    def run(self) -> dict[str, Tensor]:
        """Lower every node in order; returns the outputs by their canonical names.

        Raises: LoweringError `op-not-lowered` for a shape that depends on the inputs' numbers.
        """
        for node in self.model.graph.graph:
            inputs = [self.known(value) for value in node.inputs if value is not None]
            if inputs and all(array is not None for array in inputs):
                self._fold(node)
                continue
            row = self.table.get(node.op_type)
            assert row is not None and row.lower is not None, "check has refused it"
            row.lower(node, self)
        return {str(value.name): self.value(value) for value in self.model.graph.graph.outputs}

    def known(self, value: ir.Value | None) -> Array | None:
        """The numbers of a value that does not depend on the graph's inputs, weights apart; else None."""
        if value is None or value in self.tensors:
            return None
        if value in self._known:
            return self._known[value]
        tensor = constant(value)
        if tensor is None or str(value.name) in self.model.weights:
            return None
        return np.asarray(tensor.numpy())

    def learn(self, value: ir.Value, array: Array) -> None:
        """Enter a value that is known."""
        self._known[value] = array

    def numbers(self, node: ir.Node, position: int) -> list[int]:
        """An input that must be known: sizes, axes. Raises: LoweringError `op-not-lowered`."""
        found = self.known(node.inputs[position])
        if found is None:
            why = f"input {position} depends on the graph's inputs, and shapes are fixed"
            finding = errors.op_not_lowered(
                self.table.backend, node.op_type, node.name or "", why, "make it a constant"
            )
            raise errors.LoweringError(finding)
        return [int(number) for number in found.reshape(-1)]

    def value(self, value: ir.Value | None) -> Tensor:
        """The tensor that stands for a value: computed, constant, or a weight as float32."""
        assert value is not None, "an input that the dialect requires"
        if value in self.tensors:
            return self.tensors[value]
        known = self.known(value)
        if known is not None:
            return self.graph.constant(narrow(known))
        weight = self.weight_of(value)
        assert weight is not None, f"{value.name} is used before it is made"
        return self.float_weight(weight)

    def weight_of(self, value: ir.Value | None) -> str | None:
        """The weight that a value is, perhaps behind a Cast; None where it is something else."""
        held = stored(value)
        return str(held.name) if held is not None and str(held.name) in self.model.weights else None

    def format_of(self, weight: str) -> Format:
        """How a weight is stored."""
        return self.plan.formats[weight]

    def weight(self, name: str) -> Tensor:
        """A weight as it is stored."""
        return self.graph.weight(name, self.model.weights[name].shape, self.plan.formats[name])

    def stack(self, names: Sequence[str]) -> Tensor:
        """Weights of one format as they are stored, their rows one after the other."""
        return self.graph.stack(self._parts(names), self.plan.formats[names[0]])

    def offsets(self, names: Sequence[str]) -> Tensor:
        """What is added to the blocks of such a stack, of a shifted format: int8 [rows, blocks], as stored."""
        return self.graph.offsets(self._parts(names), self.plan.formats[names[0]])

    def _parts(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        return {name: self.model.weights[name].shape for name in names}

    def row_kernel(self, name: str) -> Tensor:
        """A matrix as it is stored, as the kernel of a convolution of 1 x 1: [outputs, 1, 1, inputs]."""
        shape = self.model.weights[name].shape
        return self.graph.weight(name, shape, self.plan.formats[name], (), (shape[0], 1, 1, shape[1]))

    def float_weight(self, *names: str) -> Tensor:
        """A weight as float32, or a stack of them: as stored, or widened when the runtime reads it (float16 once, when
        it opens the file; integers each time)."""
        held = self.stack(names)
        if held.dtype == "float32":
            return held
        widen = self.dequantised if self.plan.formats[names[0]].integer else self.widened
        return self.once(("wide", names), lambda: widen(held))

    def kernel(self, name: str) -> Tensor:
        """A convolution's kernel as float32 [outputs, height, width, inputs], as it is stored; of height 1 for one
        over time."""
        shape = self.model.weights[name].shape
        order = (0, *range(2, len(shape)), 1)
        seen = (shape[0], *([1] if len(shape) == 3 else []), *shape[2:], shape[1])
        held = self.graph.weight(name, shape, self.plan.formats[name], order, seen)
        return held if held.dtype == "float32" else self.once(("wide", name), lambda: self.widened(held))

    def widened(self, half: Tensor) -> Tensor:
        """A float16 tensor as float32."""
        return self.graph.emit("DEQUANTIZE", [half], half.shape, "DequantizeOptions", version=3)

    def dequantised(self, held: Tensor) -> Tensor:
        """All rows of an integer matrix as float32. A lookup takes every format; DEQUANTIZE gives zeros for blocks."""
        rows = self.graph.constant(np.arange(held.shape[0], dtype=np.int32))
        return self.graph.emit("EMBEDDING_LOOKUP", [rows, held], held.shape, version=LOOKUP_VERSION)

    def binary(self, op: str, left: Tensor, right: Tensor) -> Tensor:
        """ADD, SUB or MUL, MAXIMUM or MINIMUM of two tensors that broadcast."""
        shape = np.broadcast_shapes(left.shape, right.shape)
        options = {"ADD": "AddOptions", "SUB": "SubOptions", "MUL": "MulOptions"}.get(op, "MaximumMinimumOptions")
        return self.graph.emit(op, [left, right], shape, options, dtype=left.dtype)

    def scalar(self, number: float) -> Tensor:
        """A float32 number."""
        return self.graph.constant(np.array(number, np.float32))

    def integers(self, *numbers: int) -> Tensor:
        """An int32 vector."""
        return self.graph.constant(np.array(numbers, np.int32))

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same numbers in another shape: an operator only where they are computed."""
        sizes = [int(size) for size in shape]
        if list(x.shape) == sizes:
            return x
        if self.graph.is_stored(x):
            return self.once(("reshaped", x, tuple(sizes)), lambda: self.graph.reshaped(x, sizes))
        return self.graph.emit(
            "RESHAPE", [x, self.integers(*sizes)], sizes, "ReshapeOptions", dtype=x.dtype, newShape=sizes
        )

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """The axes in another order: a RESHAPE where only axes of size 1 move."""
        shape = [x.shape[axis] for axis in order]
        moving = [axis for axis in order if x.shape[axis] != 1]
        if moving == sorted(moving):
            return self.reshape(x, shape)
        return self.graph.emit("TRANSPOSE", [x, self.integers(*order)], shape, "TransposeOptions", dtype=x.dtype)

    def slice(self, x: Tensor, axis: int, start: int, stop: int) -> Tensor:
        """start..stop of one axis."""
        begin, size = [0] * len(x.shape), list(x.shape)
        begin[axis], size[axis] = start, stop - start
        if size == list(x.shape):
            return x
        return self.graph.emit(
            "SLICE", [x, self.integers(*begin), self.integers(*size)], size, "SliceOptions", dtype=x.dtype
        )

    def block_sums(self, x: Tensor, block: int) -> Tensor:
        """The sum of each block of the last axis, made once for all who ask."""
        rows, count = x.shape[:-1], x.shape[-1] // block

        def make() -> Tensor:
            flat = rows if len(rows) < MOST_AXES - 1 else (int(np.prod(rows, dtype=np.int64)),)
            parts, last = self.reshape(x, (*flat, count, block)), self.integers(len(flat) + 1)
            made = self.graph.emit("SUM", [parts, last], (*flat, count), "ReducerOptions", keepDims=False)
            return self.reshape(made, (*rows, count))

        return self.once(("block sums", x, block), make)

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Parts one after the other along an axis."""
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.graph.emit("CONCATENATION", parts, shape, "ConcatenationOptions", dtype=parts[0].dtype, axis=axis)

    def once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes, made once in this graph for equal keys."""
        if key not in self.graph.shared:
            self.graph.shared[key] = make()
        return self.graph.shared[key]

    def _fold(self, node: ir.Node) -> None:
        """Compute a node whose inputs are all known, by ONNX's reference."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        feeds = {str(value.name): self.known(value) for value in node.inputs if value is not None}
        kind = onnx.helper.np_dtype_to_tensor_dtype
        graph = onnx.helper.make_graph(
            [ir.serde.serialize_node(node)],
            "fold",
            [
                onnx.helper.make_tensor_value_info(name, kind(a.dtype), a.shape)
                for name, a in feeds.items()
                if a is not None
            ],
            [onnx.helper.make_tensor_value_info(str(value.name), 0, None) for value in node.outputs],
        )
        versions = self.model.graph.graph.opset_imports.items()
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(*each) for each in versions])
        for value, array in zip(node.outputs, ReferenceEvaluator(model).run(None, feeds), strict=True):
            self.learn(value, np.asarray(array))


MOST_AXES = 4
"""Of any tensor: the GPU delegate takes no more."""
LOOKUP_VERSION = 4
"""EMBEDDING_LOOKUP of integer rows. Source: LiteRT's op_version.cc."""


def narrow(array: Array) -> Array:
    """The same numbers as the runtime takes them: int32 for int64, beyond which no index goes."""
    if array.dtype != np.int64:
        return array
    limits = np.iinfo(np.int32)
    return np.clip(array, limits.min, limits.max).astype(np.int32)
