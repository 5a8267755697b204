"""Evaluates a saved ML program on any computer: its functions, states and stored weights, operation by operation.

It is no Core ML: it says what the package means, not how Apple's processors round inside an operation. After each one
the result is rounded to the type that the package declares for it, and must have the declared shape. With `exact`
nothing is rounded and all floating numbers are float32, which tells a wrong program from a coarse one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeexport import errors
from edgeexport.backends import coreml_interpreter_nn
from edgeexport.backends.coreml_interpreter_nn import PLACES, is_product
from edgeexport.backends.coreml_interpreter_ops import ints
from edgeexport.backends.coreml_mil import FLOATS, Malformed, Type, literal, type_of
from edgeexport.backends.coreml_package import Blob, Package
from edgeexport.core import Array

OPS: Mapping[str, Callable[..., Any]] = coreml_interpreter_nn.OPS
STATE_OPS = ("read_state", "write_state")
BY_ROWS = ("const", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense")
"""Constants whose parameters all have the result's first axis, or blocks of it. iOS 16's palettes, which have a shape
of their own, do not."""
LAZY_ELEMENTS = 1 << 16
"""Weights from here on are read when they are first used, and kept while there is room."""
ROOM = 1 << 30
"""Bytes of float32 weights that are kept: with all else a build of a large model stays below 2 GB."""
BLOCK_ELEMENTS = 1 << 22
"""Elements of a weight that is not kept, read at a time."""
MAX_STATE_BYTES = 1 << 36

State = dict[str, Array]
"""The states of one conversation by name; every function of the package that has them may be given them."""


class Weight:
    """A large constant: its rows come out of the file, decompressed, as often as they are needed."""

    def __init__(self, kind: str, inputs: Mapping[str, Any], found: Type, *, rounded: bool) -> None:
        self.shape, self._type = found.sizes, found
        self._kind, self._inputs, self._rounded = kind, inputs, rounded
        counts = {each.shape[0] for each in inputs.values() if isinstance(each, Held) and each.shape}
        blocks = kind in BY_ROWS and bool(self.shape) and "shape" not in inputs
        self._by_rows = blocks and all(count and self.shape[0] % count == 0 for count in counts)
        self._group = math.lcm(*(self.shape[0] // count for count in counts - {1})) if self._by_rows else 1

    def rows(self, start: int, stop: int) -> Array:
        """Rows start..stop. Raises what the file and the operation raise."""
        if not self._by_rows:
            return self._decoded(None)[start:stop]
        first = start // self._group * self._group
        last = min(-(-stop // self._group) * self._group, self.shape[0])
        return self._decoded((first, last))[start - first : stop - first]

    def whole(self) -> Array:
        """All of it."""
        return self._decoded(None)

    def _decoded(self, rows: tuple[int, int] | None) -> Array:
        got = {name: _part(each, rows, self.shape) for name, each in self._inputs.items()}
        made = got["val"] if self._kind == "const" else OPS[self._kind](**got)
        return settled(made, self._type, exact=not self._rounded, rows=rows)


def _part(each: Any, rows: tuple[int, int] | None, shape: tuple[int, ...]) -> Any:
    """What a parameter has for these rows of the result; several may share one of its own."""
    if not isinstance(each, Held):
        return each
    if rows is None or not each.shape or each.shape[0] == 1:
        return each.whole() if isinstance(each, Weight) else widened(each.read()) if isinstance(each, Blob) else each
    start, stop = (place * each.shape[0] // shape[0] for place in rows)
    if isinstance(each, Weight):
        return each.rows(start, stop)
    return widened(each.rows(start, stop)) if isinstance(each, Blob) else each[start:stop]


Held = Blob | np.ndarray | Weight


@dataclass(frozen=True)
class Step:
    """One operation, ready: where its inputs are among the values, and what comes out."""

    kind: str
    name: str
    inputs: Mapping[str, str | list[str]]
    outputs: tuple[str, ...]
    types: tuple[Type, ...]
    dying: tuple[str, ...]
    """Values that nothing reads after it."""


@dataclass(frozen=True)
class Function:
    """One function: its inputs and states by name, and its steps."""

    name: str
    inputs: Mapping[str, Type]
    states: Mapping[str, Type]
    outputs: Mapping[str, Type]
    steps: tuple[Step, ...]
    constants: Mapping[str, Any]


class Interpreter:
    """A package that runs. Weights that fit into `room` bytes are kept once they were read."""

    def __init__(self, path: Path, *, exact: bool = False, room: int = ROOM) -> None:
        self.package = Package(path)
        self._exact = exact
        self._left = room
        self._weights: dict[tuple[Any, ...], Weight] = {}
        self._kept: dict[Weight, Array] = {}
        self._functions: dict[str, Function] = {}

    def function(self, name: str = "") -> Function:
        """A function, its operations checked. Raises: BundleError `mlpackage-damaged`, `mlpackage-op-unknown`."""
        name = name or self.package.default_function
        if name not in self._functions:
            self._functions[name] = self._prepared(name)
        return self._functions[name]

    def new_state(self, name: str = "") -> State:
        """The states of a function, all zero. Raises as `function`."""
        made = {}
        for state, found in self.function(name).states.items():
            count = 1
            for size in found.sizes:
                count *= size
            if not 0 <= count * 4 <= MAX_STATE_BYTES:
                raise self.package.damaged(f"the state {state} of {found} is too large")
            made[state] = np.zeros(found.sizes, np.float32)
        return made

    def run(self, inputs: Mapping[str, Array], state: State | None = None, name: str = "") -> dict[str, Array]:
        """The outputs of a function; `state` is read and changed in place.

        Raises: UsageError `mlpackage-bad-input`; BundleError `mlpackage-op-failed`, and as `function`.
        """
        function = self.function(name)
        held = self.new_state(name) if state is None else state
        values: dict[str, Any] = dict(function.constants)
        for each, found in function.inputs.items():
            values[each] = self._input(each, found, inputs)
        with np.errstate(all="ignore"):  # an overflow is a result, as it is on the device
            for step in function.steps:
                self._evaluate(step, values, held)
                for dead in step.dying:
                    del values[dead]
        return {each: _given(self._value(values[each]), found) for each, found in function.outputs.items()}

    def _evaluate(self, step: Step, values: dict[str, Any], held: State) -> None:
        if step.kind == "read_state":
            values[step.outputs[0]] = held[str(step.inputs["input"])]
            return
        if step.kind == "write_state":
            held[str(step.inputs["input"])] = self._value(values[str(step.inputs["data"])])
            return
        got: dict[str, Any] = {}
        try:
            for parameter, source in step.inputs.items():
                if isinstance(source, list):
                    got[parameter] = [self._value(values[each]) for each in source]
                else:
                    got[parameter] = values[source]
            made = self._apply(step, got)
            results = made if isinstance(made, tuple) else (made,)
            for each, found, result in zip(step.outputs, step.types, results, strict=True):
                values[each] = settled(result, found, exact=self._exact)
        except (
            ValueError,
            TypeError,
            IndexError,
            KeyError,
            OverflowError,
            MemoryError,
            np.exceptions.AxisError,
        ) as bad:
            raise errors.mlpackage_op_failed(self.package.path, step.kind, step.name, str(bad)) from bad

    def _apply(self, step: Step, got: dict[str, Any]) -> Any:
        """The operation itself; products and look-ups take a weight that is not kept piece by piece."""
        weight = {"linear": "weight", "conv": "weight", "gather": "x"}.get(step.kind, "")
        large = got.get(weight)
        if isinstance(large, Weight) and self._keep(large) is None:
            if step.kind == "conv" and is_product(large.shape, **{name: got[name] for name in PLACES & got.keys()}):
                columns = np.moveaxis(got["x"], 1, -1)
                return np.moveaxis(_linear_by_rows(columns, large, got.get("bias")), -1, 1)
            if step.kind == "linear":
                return _linear_by_rows(got["x"], large, got.get("bias"))
            if int(got.get("axis", 0)) == 0 and int(got.get("batch_dims", 0)) == 0:
                return _looked_up(large, got["indices"])
        return OPS[step.kind](**{name: self._value(each) for name, each in got.items()})

    def _value(self, value: Any) -> Any:
        if not isinstance(value, Weight):
            return value
        kept = self._keep(value)
        return value.whole() if kept is None else kept

    def _keep(self, weight: Weight) -> Array | None:
        """The weight's array, if there is room for it."""
        if weight not in self._kept:
            nbytes = 4 * int(np.prod(weight.shape, dtype=np.int64))
            if nbytes > self._left:
                return None
            self._kept[weight] = weight.whole()
            self._left -= nbytes
        return self._kept[weight]

    def _input(self, name: str, found: Type, inputs: Mapping[str, Array]) -> Array:
        if name not in inputs:
            raise errors.mlpackage_bad_input(self.package.path, name, f"{found} is needed, none was given")
        array = np.asarray(inputs[name])
        same = (array.dtype.kind == "f") == (found.element.name in FLOATS)
        if not same or not found.takes(array.shape):
            problem = f"{found} is needed, {array.dtype}{list(array.shape)} was given"
            raise errors.mlpackage_bad_input(self.package.path, name, problem)
        return settled(array, found, exact=self._exact)

    # making a function ready

    def _prepared(self, name: str) -> Function:
        block = self.package.block(name)
        unknown = {each.type for each in block.operations} - OPS.keys() - {"const", *STATE_OPS}
        if unknown:
            raise errors.mlpackage_op_unknown(self.package.path, unknown, len(OPS))
        try:
            found = {each.name: type_of(each.type) for each in self.package.functions[name].inputs}
            inputs = {each: kind for each, kind in found.items() if not kind.state}
            states = {each: kind for each, kind in found.items() if kind.state}
            constants, steps = self._steps(block)
        except Malformed as problem:
            raise self.package.damaged(f"function {name!r}: {problem}") from problem
        types = {
            **inputs,
            **{each: kind for step in steps for each, kind in zip(step.outputs, step.types, strict=True)},
        }
        self._check_names(name, steps, {*found, *constants}, block.outputs)
        outputs = {each: types[each] for each in block.outputs if each in types}
        return Function(name, inputs, states, outputs, _with_ends(steps, set(block.outputs)), constants)

    def _check_names(self, function: str, steps: Sequence[Step], known: set[str], outputs: Sequence[str]) -> None:
        known = set(known)
        for step in steps:
            for each in _names(step):
                if each not in known:
                    raise self.package.damaged(f"function {function!r}: {step.name} reads {each!r} before it is made")
            known |= set(step.outputs)
        for each in outputs:
            if each not in known:
                raise self.package.damaged(f"function {function!r} gives {each!r}, which nothing makes")

    def _steps(self, block: Any) -> tuple[dict[str, Any], list[Step]]:
        constants: dict[str, Any] = {}
        steps = []
        for each in block.operations:
            types = tuple(type_of(output.type) for output in each.outputs)
            names = tuple(str(output.name) for output in each.outputs)
            label = literal(each.attributes["name"]) if "name" in each.attributes else ",".join(names)
            if each.type == "const" or each.type.startswith("constexpr_"):
                if len(names) != 1:
                    raise Malformed(f"the constant {label} has {len(names)} outputs")
                constants[names[0]] = self._constant(each, types[0], constants)
                continue
            if each.blocks:
                raise Malformed(f"{label} has blocks of its own, which are not supported")
            inputs: dict[str, str | list[str]] = {}
            for parameter, argument in each.inputs.items():
                sources = [self._source(binding, constants) for binding in argument.arguments]
                several = parameter in ("values", "ref_tensors") or len(sources) != 1
                inputs[parameter] = sources if several else sources[0]
            steps.append(Step(each.type, str(label), inputs, names, types, ()))
        return constants, steps

    def _source(self, binding: Any, constants: dict[str, Any]) -> str:
        """The name of a value; one that is written into the operation itself gets a name."""
        if binding.WhichOneof("binding") == "name":
            return str(binding.name)
        name = f"@{len(constants)}"
        constants[name] = self._literal(binding.value)
        return name

    def _literal(self, value: Any) -> Any:
        if value.WhichOneof("value") == "blobFileValue":
            return self.package.blob(value)
        return widened(literal(value))

    def _constant(self, operation: Any, found: Type, constants: Mapping[str, Any]) -> Any:
        """A small constant as it is, a large one as a Weight, which two functions share."""
        inputs = {name: self._literal(each) for name, each in operation.attributes.items() if name != "name"}
        for parameter, argument in operation.inputs.items():
            (binding,) = argument.arguments
            if binding.WhichOneof("binding") == "value":
                inputs[parameter] = self._literal(binding.value)
            elif binding.name in constants:
                inputs[parameter] = constants[binding.name]
            else:
                raise Malformed(f"a constant is made of {binding.name!r}, which is none")
        if operation.type == "const" and not isinstance(inputs.get("val"), Blob | np.ndarray):
            if "val" not in inputs:
                raise Malformed("a constant has no value")
            return inputs["val"]
        key = (operation.type, str(found), *sorted((name, _identity(each)) for name, each in inputs.items()))
        if key not in self._weights:
            self._weights[key] = Weight(operation.type, inputs, found, rounded=not self._exact)
        weight = self._weights[key]
        if int(np.prod(weight.shape, dtype=np.int64)) >= LAZY_ELEMENTS:
            return weight
        try:
            return weight.whole()
        except (ValueError, TypeError, IndexError, KeyError) as problem:
            raise Malformed(f"the constant {operation.outputs[0].name}: {problem}") from problem


def _identity(each: Any) -> Any:
    """What tells two constants apart: the place of one in a file, the bytes of one that is not."""
    if isinstance(each, Blob):
        return str(each.path), each.offset, each.shape
    if isinstance(each, Weight):
        return id(each)
    return (each.tobytes(), each.shape) if isinstance(each, np.ndarray) else each


def _names(step: Step) -> list[str]:
    """The values that a step reads, and the states."""
    return [name for each in step.inputs.values() for name in (each if isinstance(each, list) else [each])]


def _with_ends(steps: Sequence[Step], outputs: set[str]) -> tuple[Step, ...]:
    """The steps, each with the values that die with it. What is no step's result is kept for the next run."""
    made = {name for step in steps for name in step.outputs}
    alive = set(outputs)
    found = []
    for step in reversed(steps):
        touched = {*_names(step), *step.outputs} & made
        found.append(Step(step.kind, step.name, step.inputs, step.outputs, step.types, tuple(sorted(touched - alive))))
        alive |= touched
    return tuple(reversed(found))


def widened(value: Any) -> Any:
    """float16 and float64 as float32, in which everything is computed."""
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def settled(result: Any, found: Type, *, exact: bool, rows: tuple[int, int] | None = None) -> Array:
    """A result as the declared type holds it: rounded to float16, but carried in float32. `rows` are those it has.

    Raises ValueError where the shape is not the declared one.
    """
    array = np.asarray(result)
    shape = found.shape if rows is None else (rows[1] - rows[0], *found.shape[1:])
    if array.shape != shape and not replace(found, shape=shape).takes(array.shape):
        raise ValueError(f"the result has the shape {list(array.shape)}, the package declares {found}")
    element = found.element
    if element.name == "float16" and not exact:
        return array.astype(np.float16).astype(np.float32)
    if element.name in FLOATS:
        return array.astype(np.float32, copy=False)
    return array.astype(element.numpy, copy=False)


def _given(array: Array, found: Type) -> Array:
    return array if found.element.name in FLOATS else array.astype(found.element.numpy, copy=False)


def _linear_by_rows(x: Array, weight: Weight, bias: Array | None) -> Array:
    rows, width = weight.shape[:2]
    flat = x.reshape(-1, width)
    made = np.empty((flat.shape[0], rows), np.float32)
    step = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        np.matmul(flat, weight.rows(start, stop).reshape(-1, width).T, out=made[:, start:stop])
    found = made.reshape(*x.shape[:-1], rows)
    return found if bias is None else found + bias


def _looked_up(table: Weight, indices: Array) -> Array:
    """Rows of a table by indices, each read once."""
    wanted = ints(indices)
    if wanted and not 0 <= min(wanted) <= max(wanted) < table.shape[0]:
        raise ValueError(f"an index from {min(wanted)} to {max(wanted)} is outside an axis of {table.shape[0]}")
    rows = {index: table.rows(index, index + 1)[0] for index in set(wanted)}
    return np.stack([rows[index] for index in wanted]).reshape(*indices.shape, *table.shape[1:])
