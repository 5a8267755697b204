"""The vocabulary of ML programs: their protobuf classes, element types, and values read from and written to protobuf.

Source: MIL.proto, Model.proto and MILBlob/Blob/StorageFormat.hpp of coremltools 9.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np

from edgeexport import errors
from edgeexport.core import Array

OPSET = "CoreML8"
"""The op set of iOS 18: int4 blocks, states, scaled_dot_product_attention."""
SPECIFICATION = 9
"""Specification version of iOS 18."""


@dataclass(frozen=True)
class Element:
    """One element type. `code` is MIL.proto's, `blob` the weight file's (0: it cannot lie there); `numpy` is what a
    decoded array has, which for fewer than 8 bits is the next whole byte."""

    name: str
    code: int
    blob: int
    bits: int
    numpy: str
    signed: bool = True

    def nbytes(self, count: int) -> int:
        """Bytes of `count` elements, packed."""
        return -(-count * self.bits // 8)


ELEMENTS = (
    Element("bool", 1, 0, 8, "bool"),
    Element("string", 2, 0, 0, "object"),
    Element("float16", 10, 1, 16, "float16"),
    Element("float32", 11, 2, 32, "float32"),
    Element("float64", 12, 0, 64, "float64"),
    Element("int8", 21, 4, 8, "int8"),
    Element("int16", 22, 6, 16, "int16"),
    Element("int32", 23, 14, 32, "int32"),
    Element("int64", 24, 0, 64, "int64"),
    Element("int4", 25, 8, 4, "int8"),
    Element("uint8", 31, 3, 8, "uint8", signed=False),
    Element("uint16", 32, 7, 16, "uint16", signed=False),
    Element("uint32", 33, 15, 32, "uint32", signed=False),
    Element("uint64", 34, 0, 64, "uint64", signed=False),
    Element("uint4", 35, 11, 4, "uint8", signed=False),
    Element("uint2", 36, 10, 2, "uint8", signed=False),
    Element("uint1", 37, 9, 1, "uint8", signed=False),
    Element("uint6", 38, 13, 6, "uint8", signed=False),
    Element("uint3", 39, 12, 3, "uint8", signed=False),
)
BY_CODE = {element.code: element for element in ELEMENTS}
BY_NAME = {element.name: element for element in ELEMENTS}

FLOATS = ("float16", "float32", "float64")


class Malformed(ValueError):
    """A piece of protobuf that means nothing; whoever knows the file says where."""


@dataclass(frozen=True)
class Type:
    """Element type and shape of a value; a size is None where it is known only when the program runs."""

    element: Element
    shape: tuple[int | None, ...]
    state: bool = False
    """Whether it is a state that holds a tensor of this type."""

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape is of this type."""
        pairs = zip(self.shape, shape, strict=False)
        return len(shape) == len(self.shape) and all(want is None or want == got for want, got in pairs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape, all of it known. Raises Malformed where it is not."""
        if None in self.shape:
            raise Malformed("its size is not fixed")
        return tuple(size for size in self.shape if size is not None)

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.element.name}[{sizes}]"


@dataclass(frozen=True)
class Protobuf:
    """The generated modules, loaded as siblings."""

    model: Any
    mil: Any
    features: Any


@functools.cache
def protobuf() -> Protobuf:
    """coremltools' protobuf classes, without coremltools: importing the whole of it loads torch and scikit-learn
    where they are installed, four seconds and 385 MB for nothing that is needed here.

    Raises: ToolError `missing-package`.
    """
    found = PathFinder.find_spec("coremltools")
    if found is None or found.origin is None or importlib.util.find_spec("google.protobuf") is None:
        raise errors.missing_package("coremltools", "coreml")
    folder = Path(found.origin).parent / "proto"
    name = "_edgeexport_coreml_protobuf"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise errors.missing_package("coremltools", "coreml")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return Protobuf(*(importlib.import_module(f"{name}.{each}_pb2") for each in ("Model", "MIL", "FeatureTypes")))


def identifier(name: str) -> str:
    """A name as MIL allows it: letters, digits and _, no digit first."""
    made = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"_{made}" if made[:1].isdigit() else made


# reading


def type_of(value_type: Any) -> Type:
    """What a ValueType says. Raises Malformed for what is neither a tensor nor a state of one."""
    kind = value_type.WhichOneof("type")
    if kind == "stateType":
        inner = type_of(value_type.stateType.wrappedType)
        return Type(inner.element, inner.shape, state=True)
    if kind != "tensorType":
        raise Malformed(f"its type is {kind}, which is not supported")
    tensor = value_type.tensorType
    if tensor.dataType not in BY_CODE:
        raise Malformed(f"its element type has the unknown code {tensor.dataType}")
    sizes = [
        int(size.constant.size) if size.WhichOneof("dimension") == "constant" else None for size in tensor.dimensions
    ]
    return Type(BY_CODE[tensor.dataType], tuple(sizes))


def literal(value: Any) -> Any:
    """An immediate value: an array, a text, or a list of these. Raises Malformed when it does not fit its type."""
    kind = value.immediateValue.WhichOneof("value")
    if kind == "list":
        return [literal(each) for each in value.immediateValue.list.values]
    if kind == "tuple":
        return [literal(each) for each in value.immediateValue.tuple.values]
    if kind != "tensor":
        raise Malformed(f"an immediate value of kind {kind} is not supported")
    found = type_of(value.type)
    shape, element = found.sizes, found.element
    tensor = value.immediateValue.tensor
    field = tensor.WhichOneof("value")
    if field is None:
        return _shaped(np.zeros(0, element.numpy), shape)
    held = getattr(tensor, field).values
    if field == "bytes":
        return _shaped(unpack(np.frombuffer(held, np.uint8), element, _count(shape)), shape)
    if element.name == "string":
        return str(held[0]) if not shape and len(held) == 1 else [str(each) for each in held]
    try:
        return _shaped(np.array(held, element.numpy), shape)
    except OverflowError as problem:
        raise Malformed(f"a number does not fit {element.name}") from problem


def unpack(raw: Array, element: Element, count: int) -> Array:
    """`count` elements out of packed bytes (uint8), the first in the lowest bits.

    Raises Malformed when the bytes are not as many as that takes.
    """
    if element.bits == 0 or raw.size != element.nbytes(count):
        raise Malformed(f"{raw.size} bytes cannot hold {count} elements of {element.name}")
    if element.bits >= 8:
        return raw.view(element.numpy)
    if element.bits == 4:
        pairs = np.empty((raw.size, 2), np.uint8)
        np.bitwise_and(raw, np.uint8(15), out=pairs[:, 0])
        np.right_shift(raw, np.uint8(4), out=pairs[:, 1])
        values = pairs.reshape(-1)[:count]
    else:
        bits = np.unpackbits(raw, bitorder="little")[: count * element.bits].reshape(count, element.bits)
        values = (bits << np.arange(element.bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if element.signed:
        half = np.uint8(1 << (element.bits - 1))
        return ((values ^ half) - half).view(np.int8)
    return values


def _shaped(array: Array, shape: tuple[int, ...]) -> Array:
    if array.size != _count(shape):
        raise Malformed(f"{array.size} values cannot fill the shape {list(shape)}")
    return array.reshape(shape)


def _count(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:  # Python's integers do not overflow, numpy's would
        count *= size
    return count


# writing


def value_type(element: str, shape: Sequence[int], *, state: bool = False) -> Any:
    """A ValueType of a tensor, or of a state that holds it."""
    made = protobuf().mil.ValueType()
    tensor = made.stateType.wrappedType.tensorType if state else made.tensorType
    tensor.dataType, tensor.rank = BY_NAME[element].code, len(shape)
    for size in shape:
        tensor.dimensions.add().constant.size = size
    return made


def text(value: str) -> Any:
    """A Value that holds a text."""
    made = protobuf().mil.Value(type=value_type("string", ()))
    made.immediateValue.tensor.strings.values.append(value)
    return made


def small(array: Array) -> Any:
    """A Value that holds an array itself. float16, int32, float32, bool and int8 are what programs need."""
    element = str(array.dtype)
    made = protobuf().mil.Value(type=value_type(element, array.shape))
    tensor = made.immediateValue.tensor
    if element in ("float16", "int8", "uint8"):
        tensor.bytes.values = array.tobytes()
        return made
    field = {"bool": tensor.bools, "int32": tensor.ints, "float32": tensor.floats}[element]
    if array.size:
        field.values.extend(array.reshape(-1).tolist())
    else:
        field.SetInParent()
    return made


def in_file(file: str, offset: int, element: str, shape: Sequence[int]) -> Any:
    """A Value that lies in a weight file; `offset` is that of its record, not of its data."""
    made = protobuf().mil.Value(type=value_type(element, shape))
    made.blobFileValue.fileName, made.blobFileValue.offset = file, offset
    return made


def operation(kind: str, name: str, inputs: dict[str, list[Any]], outputs: Sequence[tuple[str, Any]]) -> Any:
    """An Operation. An input is a list of names (texts) and Values; `outputs` are (name, ValueType)."""
    made = protobuf().mil.Operation(type=kind)
    made.attributes["name"].CopyFrom(text(name))
    for parameter, bindings in inputs.items():
        for each in bindings:
            binding = made.inputs[parameter].arguments.add()
            if isinstance(each, str):
                binding.name = each
            else:
                binding.value.CopyFrom(each)
    for output, kind_of in outputs:
        made.outputs.add(name=output, type=kind_of)
    return made
