"""A function of an ML program as it grows: values with their types, constants, weights in the file, states.

What each op becomes is in coreml_ops.py. The protobuf is written directly, so that no pass of coremltools touches it:
one of them, common::remove_redundant_ops, joins two reads of a state around a write and returns stale data.
A function has static shapes: the symbolic number of tokens is given, and everything that follows from it alone is
computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeexport.backends import coreml_channels
from edgeexport.backends import coreml_mil as mil
from edgeexport.backends.coreml import FLOAT, HOST_TYPES, LAST, TOKENS, added_inputs, count_of, sized
from edgeexport.backends.coreml_mil import identifier
from edgeexport.backends.coreml_package import WEIGHTS_IN_PROGRAM, BlobLayout, offset_element, record_of
from edgeexport.backends.coreml_parts import Part
from edgeexport.backends.optable import OpTable
from edgeexport.canonical.dialect import constant, stored
from edgeexport.core import PALETTE, Array, CanonicalModel, Dim, QuantPlan, TensorSpec

SMALL_BYTES = 256
"""Constants up to here are written into the program, larger ones into the weight file."""


@dataclass(frozen=True)
class Value:
    """A value of the program; `known` where it is computed here already (and not yet written into the program)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    known: Array | None = None


Input = Value | Array | str | bool | int | Sequence[Value]
"""What an operation's parameter may be given: a value, a constant, a text, or several values."""


@dataclass
class Weights:
    """What the functions of one package share: the weight file's layout, and where each constant in it lies."""

    layout: BlobLayout
    constants: dict[tuple[str, tuple[int, ...], bytes], int] = field(default_factory=dict)

    def place(self, array: Array) -> int:
        """Offset of the record of an array, which is stored once."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = record_of(self.layout.add_constant(f"constant {len(self.constants)}", array))
        return self.constants[key]


class Lowering:
    """One function of a component, or of one part of it, in which symbolic dimensions have these sizes."""

    def __init__(
        self,
        model: CanonicalModel,
        plan: QuantPlan,
        weights: Weights,
        table: OpTable,
        name: str,
        sizes: Mapping[str, int],
        part: Part | None = None,
        layout: str = "tokens",
    ) -> None:
        self.model, self.plan, self.table = model, plan, table
        self.name, self.tokens = name, sizes.get(TOKENS, 0)
        self.memo: dict[tuple[Any, ...], Value] = {}
        """Values that several nodes share: masks, rotary tables."""
        self.values: dict[ir.Value, Value] = {}
        self.channels: dict[ir.Value, Value] = {}
        """Those of `values` that are also in the layout of coreml_channels.py."""
        self.states: dict[ir.Value, Value] = {}
        self.last: Value | None = None
        """Which token of a padded prompt is the last valid one, int32 [1]."""
        self.counts: dict[int, Value] = {}
        """By size of a padded dimension: how much of it is valid, int32 [1]."""
        self._sizes = sizes
        self._part = part
        self._in_channels = layout == "channels"
        self._placeholders: dict[ir.Value, Value] = {}
        self._weights = weights
        self._operations: list[Any] = []
        self._names: set[str] = set()
        self._constants: dict[tuple[Any, ...], str] = {}
        self._read: dict[str, Value] = {}
        self._stored: dict[str, Value] = {}

    def run(self) -> tuple[Any, Any]:
        """(Function, FunctionDescription) of the component."""
        graph: ir.Graph = self.model.graph.graph
        inputs = self._inputs(graph)
        for node in graph:
            if self._is_here(node):
                self._lower(node)
        replaced = {present for _, present in self.model.state}
        outputs = [
            self._output(self.value(value), spec)
            for value, spec in zip(graph.outputs, self.model.outputs, strict=True)
            if spec.name not in replaced and self._is_here(value.producer())
        ]
        outputs += [self._given(value) for value in (self._part.gives if self._part else ())]
        self._operations = _needed(self._operations, {value.name for value in outputs})
        read = {binding.name for each in self._operations for a in each.inputs.values() for binding in a.arguments}
        inputs = [value for value in inputs if value.name in read]
        self.states = {old: value for old, value in self.states.items() if value.name in read}
        mil_pb2 = mil.protobuf().mil
        function = mil_pb2.Function(opset=mil.OPSET)
        for value in (*inputs, *self.states.values()):
            kind = mil.value_type(value.dtype, value.shape, state=value in self.states.values())
            function.inputs.add(name=value.name, type=kind)
        block = function.block_specializations[mil.OPSET]
        block.operations.extend(self._operations)
        block.outputs.extend(value.name for value in outputs)
        return function, self._description(inputs, outputs)

    # values

    def value(self, old: ir.Value | None) -> Value:
        """What stands for a value of the model: a result, a weight as float16, a constant."""
        assert old is not None, "an input that the dialect requires"
        if old in self._placeholders and old not in self.values:
            self.values[old] = self._narrowed(self._placeholders[old])
        producer = old.producer()
        weight = stored(old)
        if old not in self.values and producer is not None and weight is None:
            self._lower(producer)  # of another part, and made of whole-numbered inputs alone
        if old not in self.values:
            if weight is not None and weight.name in self.model.weights:
                self.values[old] = self.weight(str(weight.name))
            else:
                tensor = constant(old)
                assert tensor is not None, f"{old.name} is used before it is made"
                self.values[old] = self.known(tensor.numpy())
        return self.values[old]

    def known(self, array: Array) -> Value:
        """A value that is known while the program is written: int32 for whole numbers, float16 for others."""
        dtype = {"f": FLOAT, "b": "bool"}.get(array.dtype.kind, "int32")
        if dtype == "int32" and array.size:
            limits = np.iinfo(np.int32)
            array = np.clip(array, limits.min, limits.max)  # "to the end" is 2**63 - 1 in ONNX
        return Value("", array.shape, dtype, array)

    def weight(self, name: str) -> Value:
        """A weight of the model as float16, however it is stored; read once for each function."""
        if name in self._read:
            return self._read[name]
        ref, fmt, layout = self.model.weights[name], self.plan.formats[name], self._weights.layout
        if name not in layout.weights:
            layout.add([name], [ref.shape], fmt)
        if fmt.integer:
            made = self._unpacked(name, ref.shape)
        else:
            element = f"float{fmt.bits}"
            made = self._const(name, self._in_file(layout.weights[name].offset, element, ref.shape), ref.shape, element)
            if element != FLOAT:
                self._stored[name] = made
                made = self.emit("cast", {"x": made, "dtype": "fp16"}, ref.shape, name=f"{name}_fp16")
        self._read[name] = made
        return made

    def kernel(self, name: str) -> Value:
        """A weight [O, I] that is a constant, as the kernel [O, I, 1, 1] of a convolution: the same bytes."""
        key, fmt = ("kernel", name), self.plan.formats[name]
        if key not in self.memo:
            self.weight(name)
            shape = (*self.model.weights[name].shape, 1, 1)
            if fmt.integer:
                self.memo[key] = self._unpacked(name, shape)
            else:
                at = self._weights.layout.weights[name].offset
                self.memo[key] = self._const(name, self._in_file(at, FLOAT, shape), shape, FLOAT)
        return self.memo[key]

    def _unpacked(self, name: str, shape: tuple[int, ...]) -> Value:
        """A weight of integers, whose shape may have more axes of size 1 at the end than its own."""
        fmt, held, own = self.plan.formats[name], self._weights.layout.weights[name], self.model.weights[name].shape
        ones = (1,) * (len(shape) - len(own))
        if fmt.palette:
            palettes = (own[0] // PALETTE, 1, *ones, PALETTE, 1)
            inputs = {
                "indices": [self._in_file(held.offset, "uint4", shape)],
                "lut": [self._in_file(held.palettes_offset, FLOAT, palettes)],
            }
            data: Any = self._append("constexpr_lut_to_dense", f"{name}_palettes", inputs, [(shape, FLOAT)])[0].name
        else:
            data = self._in_file(held.offset, f"int{fmt.bits}", shape)
        groups = own[-1] // fmt.block if fmt.block else 1
        by_block = (*own[:-1], groups, *ones)
        inputs = {"data": [data], "scale": [self._in_file(held.scales_offset, FLOAT, by_block)]}
        if fmt.shift:
            inputs["offset"] = [self._in_file(held.shift_offset, offset_element(fmt), by_block)]
        return self._append("constexpr_blockwise_shift_scale", name, inputs, [(shape, FLOAT)])[0]

    def _in_file(self, offset: int, element: str, shape: Sequence[int]) -> Any:
        return mil.in_file(WEIGHTS_IN_PROGRAM, record_of(offset), element, shape)

    def single(self, old: ir.Value | None) -> Value:
        """A weight or a constant as float32, as precise as it is stored: for numbers that are combined before use."""
        weight, found = stored(old), self.value(old)
        if weight is not None and weight.name in self._stored:
            return self._stored[str(weight.name)]
        if found.known is not None:
            return self.materialised(found, "float32")
        return self.emit("cast", {"x": found, "dtype": "fp32"}, found.shape, "float32", name=f"{found.name}_fp32")

    def is_constant_expression(self, name: str) -> bool:
        """Whether a weight reaches operations as a constant, which some of their parameters must be."""
        fmt = self.plan.formats[name]
        return fmt.integer or fmt.bits == 16

    # operations

    def emit(
        self, op: str, inputs: Mapping[str, Input], shape: Sequence[int], dtype: str = FLOAT, name: str = ""
    ) -> Value:
        """Append an operation with one output."""
        return self.emit_many(op, inputs, [tuple(shape)], dtype, name)[0]

    def emit_many(
        self, op: str, inputs: Mapping[str, Input], shapes: Sequence[Sequence[int]], dtype: str = FLOAT, name: str = ""
    ) -> list[Value]:
        """Append an operation with outputs of these shapes."""
        bound: dict[str, list[Any]] = {}
        for parameter, given in inputs.items():
            label = f"{name or op}_{parameter}"
            several = isinstance(given, Sequence) and not isinstance(given, str)
            bound[parameter] = [self._bound(each, label) for each in (given if several else [given])]  # type: ignore[union-attr]
        return self._append(op, name or op, bound, [(tuple(shape), dtype) for shape in shapes])

    def write_state(self, state: Value, data: Value) -> None:
        """Give a state a new value. Whoever needs that value uses `data`: a state is never read after it is written."""
        label = self._unique(f"{state.name}_write")
        self._operations.append(mil.operation("write_state", label, {"input": [state.name], "data": [data.name]}, []))

    def materialised(self, value: Value, dtype: str = "", name: str = "constant") -> Value:
        """A value that is in the program, one that was only known included."""
        if value.known is None:
            return value
        element = dtype or value.dtype
        return Value(self._literal(value.known.astype(element), name), value.shape, element)

    def _bound(self, given: Any, label: str) -> str:
        if isinstance(given, Value):
            return self.materialised(given, name=label).name
        if isinstance(given, bool | int):
            given = np.array(given, np.bool_ if isinstance(given, bool) else np.int32)
        return self._literal(given, label)

    def _literal(self, given: Array | str, label: str) -> str:
        """The name of a constant; equal ones are written once."""
        if isinstance(given, str):
            key: tuple[Any, ...] = (given,)
            value, shape, element = mil.text(given), (), "string"
        else:
            array = np.ascontiguousarray(given)
            key, shape, element = (str(array.dtype), given.shape, array.tobytes()), given.shape, str(array.dtype)
            large = array.nbytes > SMALL_BYTES and mil.BY_NAME[element].blob
            value = (
                mil.in_file(WEIGHTS_IN_PROGRAM, self._weights.place(array.reshape(shape)), element, shape)
                if large
                else mil.small(array.reshape(shape))
            )
        if key not in self._constants:
            self._constants[key] = self._const(label, value, shape, element).name
        return self._constants[key]

    def _const(self, label: str, value: Any, shape: Sequence[int], element: str) -> Value:
        name = self._unique(label)
        operation = mil.operation("const", name, {}, [(name, mil.value_type(element, shape))])
        operation.attributes["val"].CopyFrom(value)
        self._operations.append(operation)
        return Value(name, tuple(shape), element)

    def _append(
        self, op: str, label: str, inputs: dict[str, list[Any]], outputs: Sequence[tuple[tuple[int, ...], str]]
    ) -> list[Value]:
        made = [Value(self._unique(label), shape, dtype) for shape, dtype in outputs]
        kinds = [(value.name, mil.value_type(value.dtype, value.shape)) for value in made]
        self._operations.append(mil.operation(op, made[0].name, inputs, kinds))
        return made

    def _unique(self, label: str) -> str:
        """An identifier of MIL that nothing else in the function has."""
        base = identifier(label)
        name, count = base, 1
        while name in self._names:
            name, count = f"{base}_{count}", count + 1
        self._names.add(name)
        return name

    # the border

    def _inputs(self, graph: ir.Graph) -> list[Value]:
        """Placeholders of inputs and states; the names of inputs and outputs are taken first."""
        self._names |= {identifier(spec.name) for spec in self.model.outputs}
        pasts = {past for past, _ in self.model.state}
        made = []
        for old, spec in zip(graph.inputs, self.model.inputs, strict=True):
            shape = sized(spec, self._sizes)
            if spec.name in pasts:
                self.states[old] = Value(self._unique(spec.name), shape, FLOAT)
                continue
            value = Value(self._unique(spec.name), shape, HOST_TYPES[spec.dtype])
            made.append(value)
            self._placeholders[old] = value
        for old in self._part.takes if self._part else ():
            shape = self._shape(old)
            if self._in_channels and coreml_channels.has_form(shape):
                made.append(Value(self._unique(_passed(old)), coreml_channels.form_of(shape), FLOAT))
                coreml_channels.give(self, old, made[-1], len(shape))
                continue
            made.append(Value(self._unique(str(old.name)), shape, FLOAT))
            self._placeholders[old] = made[-1]
        for name in added_inputs(self.model, self._sizes):
            value = Value(self._unique(name), (1,), "int32")
            made.append(value)
            if name == LAST:
                self.last = value
        for spec in self.model.inputs:
            for size in spec.shape:
                if isinstance(size, Dim) and size.name != TOKENS:
                    count = identifier(count_of(spec.name))
                    self.counts[self._sizes[size.name]] = next(value for value in made if value.name == count)
        return made

    def _given(self, old: ir.Value) -> Value:
        """What the next part takes, by the name that it has there."""
        found = self.materialised(self.value(old))
        if not self._in_channels or not coreml_channels.has_form(found.shape):
            return found
        made = coreml_channels.turned(self, old)
        return self.emit("identity", {"x": made}, made.shape, name=_passed(old))

    def _is_here(self, node: ir.Node | None) -> bool:
        return self._part is None or node in self._part.nodes

    def _lower(self, node: ir.Node) -> None:
        if self._in_channels and coreml_channels.lower(node, self):
            return
        row = self.table.get(node.op_type)
        assert row is not None and row.lower is not None, "checked before"
        row.lower(node, self)

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        """The shape of an activation: what is symbolic is the number of tokens."""
        assert value.shape is not None, f"{value.name} has a shape"
        return tuple(size if isinstance(size, int) else self.tokens for size in value.shape)

    def _narrowed(self, value: Value) -> Value:
        if value.dtype != "float32":
            return value
        return self.emit("cast", {"x": value, "dtype": "fp16"}, value.shape, name=f"{value.name}_fp16")

    def _output(self, value: Value, spec: TensorSpec) -> Value:
        name = identifier(spec.name)
        self._names.discard(name)
        held = self.materialised(value)
        if held.dtype == FLOAT:
            return self.emit("cast", {"x": held, "dtype": "fp32"}, held.shape, "float32", name=name)
        return self.emit("identity", {"x": held}, held.shape, held.dtype, name=name)

    def _description(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> Any:
        made = mil.protobuf().model.FunctionDescription(name=self.name)
        for values, held in ((inputs, made.input), (outputs, made.output)):
            for value in values:
                _describe(held.add(name=value.name).type.multiArrayType, value)
        for value in self.states.values():
            _describe(made.state.add(name=value.name).type.stateType.arrayType, value)
        return made


def _passed(value: ir.Value) -> str:
    return f"{value.name}_passed"


def _needed(operations: Sequence[Any], outputs: set[str]) -> list[Any]:
    """The operations that outputs and states depend on."""
    wanted, found = set(outputs), []
    for each in reversed(operations):
        if each.type == "write_state" or wanted & {output.name for output in each.outputs}:
            wanted |= {binding.name for argument in each.inputs.values() for binding in argument.arguments}
            found.append(each)
    return found[::-1]


def _describe(array: Any, value: Value) -> None:
    array.shape.extend(value.shape)
    array.dataType = mil.protobuf().features.ArrayFeatureType.ArrayDataType.Value(value.dtype.upper())


def program(functions: Sequence[tuple[Any, Any]]) -> Any:
    """A Model of these (Function, FunctionDescription); the first is what runs when none is named."""
    made = mil.protobuf().model.Model(specificationVersion=mil.SPECIFICATION)
    made.mlProgram.version = 1
    for function, description in functions:
        made.mlProgram.functions[description.name].CopyFrom(function)
        made.description.functions.append(description)
    made.description.defaultFunctionName = functions[0][1].name
    return made
