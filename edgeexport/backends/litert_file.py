"""The .tflite file as it grows: a flatbuffer of graphs, and behind it the weights, streamed to where it says.

Weights and constants lie behind the flatbuffer, at `Buffer.offset`, so that the file may exceed the flatbuffer's 2 GB
and no weight passes through it. The one exception is the format's own: scales of one per row are a vector inside the
flatbuffer, left empty when it is packed and filled as the rows stream by. Those of a shifted weight's offsets are
streamed as float16 to a place that no buffer names, and widened into their vector from there.

Source: the schema, tflite/schema/schema.fbs of LiteRT 2.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeexport import errors
from edgeexport.backends import storage
from edgeexport.core import Array, Format, Progress, StoredWeight, WeightSource

IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
TYPES: Mapping[str, str] = {
    "float32": "FLOAT32", "float16": "FLOAT16", "int32": "INT32", "int16": "INT16", "int8": "INT8", "int4": "INT4",
    "bool": "BOOL",
}  # fmt: skip
"""dtype to the schema's TensorType."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of one graph: its index there, its shape and its dtype."""

    index: int
    shape: tuple[int, ...]
    dtype: str


Parts = Mapping[str, tuple[int, ...]]
"""Weights of one format and width by name, each with its shape: a stack of rows."""
Buffer = Literal["rows", "scales", "offsets"]
"""What a buffer holds of a weight."""


@dataclass(eq=False)
class _Weight:
    """One weight of the file, or several in one stack: the buffers of the rows and, where blocks have them, of
    their scales and offsets."""

    parts: Parts
    shape: tuple[int, ...]
    """Of the whole stack."""
    format: Format
    order: tuple[int, ...]
    rows: int
    scales: int = 0
    per_row: _PerRow | None = None
    offsets: int = 0
    offset_scales: _PerRow | None = None
    turned: Array | None = None
    """Rows that are stored with the other sign, and so are their scales."""

    @property
    def count(self) -> int:
        """Its rows."""
        return self.shape[0] if self.shape else 1

    def starts(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Name, shape and first row of each weight."""
        start = 0
        for name, shape in self.parts.items():
            yield name, shape, start
            start += shape[0] if shape else 1


class _PerRow:
    """Scales of one per row, packed once for all graphs that read the weight; rows of equal number share their zero
    points, too. `at` is where the vector's floats begin, counted from the end of the flatbuffer."""

    def __init__(self, count: int, zeros: dict[int, tuple[Any, int]]) -> None:
        self.count = count
        self.at = 0
        self._zeros = zeros
        self._packed: tuple[Any, int] = (None, 0)

    def Pack(self, builder: Any) -> int:  # the schema's object API calls it so
        from ai_edge_litert import schema_py_generated as schema

        if self._packed[0] is not builder:
            scales = builder.CreateNumpyVector(np.zeros(self.count, np.float32))
            self.at = scales - 4  # behind the vector's length
            if self._zeros.get(self.count, (None, 0))[0] is not builder:
                self._zeros[self.count] = builder, builder.CreateNumpyVector(np.zeros(self.count, np.int64))
            schema.QuantizationParametersStart(builder)
            schema.QuantizationParametersAddScale(builder, scales)
            schema.QuantizationParametersAddZeroPoint(builder, self._zeros[self.count][1])
            schema.QuantizationParametersAddQuantizedDimension(builder, 0)
            self._packed = builder, schema.QuantizationParametersEnd(builder)
        return self._packed[1]


class ModelFile:
    """One file with several graphs (signatures) over the same weights. Buffers lie in the order of their first use."""

    def __init__(self, name: str) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.name = name
        self.schema = schema
        self.buffers: list[Array | tuple[_Weight, Buffer] | None] = [None]
        """By index: a constant, or a part of a weight. The first is empty by convention."""
        self._constants: dict[tuple[str, bytes], int] = {}
        self._weights: dict[tuple[str, ...], _Weight] = {}
        self._zeros: dict[int, tuple[Any, int]] = {}
        self._codes: dict[tuple[str, int], int] = {}
        self._graphs: list[Any] = []
        self._signatures: list[Any] = []

    def graph(self, name: str) -> Graph:
        """A new graph, to be closed by `sign`."""
        return Graph(self, name)

    def constant(self, array: Array) -> int:
        """The buffer that holds these numbers; equal ones are held once."""
        key = array.dtype.str, array.tobytes()
        if key not in self._constants:
            self._constants[key] = len(self.buffers)
            self.buffers.append(np.ascontiguousarray(array).reshape(-1))
        return self._constants[key]

    def weight(
        self, name: str, shape: tuple[int, ...], fmt: Format, order: tuple[int, ...] = (), turned: Array | None = None
    ) -> _Weight:
        """The weight of this name, entered when it is first asked for, its axes in the file in this order. With
        `turned`, which rows of int8 are stored with the other sign, its scales have a buffer of their own: what the
        graph multiplies by is then up to the caller."""
        return self.stack({name: shape}, fmt, order, turned)

    def stack(self, parts: Parts, fmt: Format, order: tuple[int, ...] = (), turned: Array | None = None) -> _Weight:
        """As `weight`, of several whose rows lie one after the other; a weight lies in one stack alone."""
        key, shapes = tuple(parts), list(parts.values())
        if key not in self._weights:
            assert not any(set(key).intersection(known) for known in self._weights), "a weight lies in one stack"
            shape = shapes[0] if len(parts) == 1 else (sum(each[0] for each in shapes), *shapes[0][1:])
            weight = self._weights[key] = _Weight(parts, shape, fmt, order, len(self.buffers))
            self.buffers.append((weight, "rows"))
            if fmt.integer and (fmt.block or turned is not None):
                weight.turned = turned
                weight.scales = len(self.buffers)
                self.buffers.append((weight, "scales"))
            elif fmt.integer:
                weight.per_row = _PerRow(shape[0], self._zeros)
            if fmt.shift:
                weight.offsets, weight.offset_scales = len(self.buffers), _PerRow(shape[0], self._zeros)
                self.buffers.append((weight, "offsets"))
        return self._weights[key]

    def code(self, op: str, version: int) -> int:
        """Index of an operator of this version; one op may be there in several."""
        return self._codes.setdefault((op, version), len(self._codes))

    def sign(self, graph: Graph, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Close a graph: it is a signature with these inputs and outputs, and what they do not need is dropped."""
        wanted = [tensor.index for tensor in outputs.values()]
        live, kept = set(wanted), []
        for operator in reversed(graph.operators):
            if live.intersection(operator.outputs):
                live.update(operator.inputs)
                kept.append(operator)
        made = self.schema.SubGraphT(
            name=graph.name,
            tensors=graph.tensors,
            operators=kept[::-1],
            inputs=[tensor.index for tensor in inputs.values()],
            outputs=wanted,
        )
        pairs = [
            [self.schema.TensorMapT(name=name, tensorIndex=tensor.index) for name, tensor in side.items()]
            for side in (inputs, outputs)
        ]
        self._signatures.append(
            self.schema.SignatureDefT(
                signatureKey=graph.name, subgraphIndex=len(self._graphs), inputs=pairs[0], outputs=pairs[1]
            )
        )
        self._graphs.append(made)

    def write(self, folder: Path, source: WeightSource, progress: Progress) -> dict[str, StoredWeight]:
        """Write the file; returns where each weight lies.

        Raises: UsageError `output-not-writable`; what `source` raises.
        """
        head = len(self._pack([(1, 1) if _size(held) else (0, 0) for held in self.buffers]))
        layout, places = self._layout(head)
        data = self._pack(places)
        assert len(data) == head, "offsets have a fixed width"
        for weight in self._weights.values():
            if weight.per_row is not None:
                for name, _, start in weight.starts():
                    at = head - weight.per_row.at + 4 * start
                    layout.weights[name] = replace(layout.weights[name], scales_offset=at)
        layout.constants[""] = 0, np.frombuffer(data, np.uint8)
        storage.write(folder, layout, source, progress)
        self._widen_offset_scales(folder, layout, head)
        return layout.weights

    def _widen_offset_scales(self, folder: Path, layout: storage.Layout, head: int) -> None:
        """Fill the flatbuffer's vectors for offsets with the float16 scales that lie in the file by now."""
        try:
            with (folder / self.name).open("r+b") as file:
                for weight in self._weights.values():
                    if weight.offset_scales is None:
                        continue
                    file.seek(layout.weights[next(iter(weight.parts))].shift_scales_offset)
                    scales = np.frombuffer(file.read(2 * weight.shape[0]), np.float16)
                    file.seek(head - weight.offset_scales.at)
                    file.write(scales.astype(np.float32).tobytes())
        except OSError as problem:
            raise errors.output_not_writable(folder, str(problem)) from problem

    def _layout(self, head: int) -> tuple[storage.Layout, list[tuple[int, int]]]:
        """Where everything will lie behind a flatbuffer of `head` bytes, and (offset, size) of every buffer."""
        layout = storage.Layout(self.name, head)
        places: list[tuple[int, int]] = []
        # What no buffer names comes first: a runtime notices that a file was cut only by the buffers that are missing.
        halves: dict[int, int] = {}
        for weight in self._weights.values():
            halves[id(weight)] = layout.size
            layout.size += 2 * weight.shape[0] if weight.format.shift else 0
        for held in self.buffers:
            size = _size(held)
            if not size:
                places.append((0, 0))
                continue
            offset = -(-layout.size // storage.ALIGNMENT) * storage.ALIGNMENT
            layout.size = offset + size
            places.append((offset, size))
            if isinstance(held, np.ndarray):
                layout.constants[f"buffer.{len(places) - 1}"] = offset, held
        for weight in self._weights.values():
            self._place(weight, layout, places, halves[id(weight)])
        return layout, places

    def _place(self, weight: _Weight, layout: storage.Layout, places: Sequence[tuple[int, int]], halves: int) -> None:
        """Enter the weights of a stack, whose buffers are at these places, and the float16 scales of its offsets at
        `halves`."""
        fmt = weight.format

        def at(buffer: int, row: int) -> int:
            return places[buffer][0] + row * places[buffer][1] // weight.count if buffer else -1

        for name, shape, start in weight.starts():
            layout.weights[name] = StoredWeight(
                self.name, at(weight.rows, start), at(weight.scales, start), fmt, shape, signed=True,
                scale_bits=32 if weight.per_row else 16, order=weight.order, shift_offset=at(weight.offsets, start),
                shift_scales_offset=halves + 2 * start if fmt.shift else -1,
            )  # fmt: skip
            if weight.turned is not None:
                layout.turned[name] = weight.turned

    def _pack(self, places: Sequence[tuple[int, int]]) -> bytes:
        import flatbuffers

        schema = self.schema
        codes = []
        for op, version in self._codes:
            code = getattr(schema.BuiltinOperator, op)
            codes.append(schema.OperatorCodeT(deprecatedBuiltinCode=min(code, 127), builtinCode=code, version=version))
        model = schema.ModelT(
            version=SCHEMA_VERSION,
            operatorCodes=codes,
            subgraphs=self._graphs,
            description=b"edgeexport",
            buffers=[schema.BufferT(offset=offset, size=size) for offset, size in places],
            signatureDefs=self._signatures,
        )
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())


def _size(held: Array | tuple[_Weight, Buffer] | None) -> int:
    """Bytes of a buffer."""
    if held is None:
        return 0
    if isinstance(held, np.ndarray):
        return held.nbytes
    weight, kind = held
    rows = weight.count
    width, fmt = int(np.prod(weight.shape[1:], dtype=np.int64)), weight.format
    if kind == "rows":
        return rows * storage.row_bytes(width, fmt)
    return rows * (2 * storage.blocks(width, fmt) if kind == "scales" else storage.row_shift_bytes(width, fmt))


@dataclass(eq=False)
class Graph:
    """One graph as it grows. Tensors are named `<graph>/<number>`, or as they are asked to be: names are unique in the
    whole file, as delegates want them."""

    file: ModelFile
    name: str
    tensors: list[Any] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)
    shared: dict[Any, Tensor] = field(default_factory=dict)
    """What was made once and may be read again, by what it is."""

    def tensor(
        self, shape: Sequence[int], dtype: str, name: str = "", buffer: int = 0, quantization: Any = None
    ) -> Tensor:
        """A new tensor; `buffer` is 0 for one that is computed."""
        schema = self.file.schema
        index = len(self.tensors)
        self.tensors.append(
            schema.TensorT(
                shape=[int(size) for size in shape],
                type=getattr(schema.TensorType, TYPES[dtype]),
                buffer=buffer,
                name=f"{self.name}/{name or index}",
                quantization=quantization,
                hasRank=True,
            )
        )
        return Tensor(index, tuple(int(size) for size in shape), dtype)

    def constant(self, array: Array) -> Tensor:
        """A constant tensor, one for equal numbers of equal shape."""
        key = "constant", str(array.dtype), array.shape, array.tobytes()
        if key not in self.shared:
            self.shared[key] = self.tensor(array.shape, str(array.dtype), buffer=self.file.constant(array))
        return self.shared[key]

    def emit(
        self,
        op: str,
        inputs: Sequence[Tensor | None],
        shape: Sequence[int],
        options: str = "",
        *,
        dtype: str = "float32",
        version: int = 1,
        **settings: Any,
    ) -> Tensor:
        """Append an operator with one output. `options` names the schema's table of options, without its T."""
        return self.emit_many(op, inputs, [shape], options, dtype=dtype, version=version, **settings)[0]

    def emit_many(
        self,
        op: str,
        inputs: Sequence[Tensor | None],
        shapes: Sequence[Sequence[int]],
        options: str = "",
        *,
        dtype: str = "float32",
        version: int = 1,
        **settings: Any,
    ) -> list[Tensor]:
        """Append an operator with one output of each shape."""
        schema = self.file.schema
        outputs = [self.tensor(shape, dtype) for shape in shapes]
        self.operators.append(
            schema.OperatorT(
                opcodeIndex=self.file.code(op, version),
                inputs=[-1 if tensor is None else tensor.index for tensor in inputs],
                outputs=[tensor.index for tensor in outputs],
                builtinOptionsType=getattr(schema.BuiltinOptions, options) if options else 0,
                builtinOptions=getattr(schema, f"{options}T")(**settings) if options else None,
            )
        )
        return outputs

    def weight(
        self, name: str, shape: tuple[int, ...], fmt: Format, order: tuple[int, ...] = (), seen: tuple[int, ...] = ()
    ) -> Tensor:
        """A weight of the file as a tensor of this graph, with its quantisation; its axes in this order, and of the
        shape `seen` where that is not the one they have then. One seen in two shapes is two tensors of one buffer."""
        return self.stack({name: shape}, fmt, order, seen)

    def stack(self, parts: Parts, fmt: Format, order: tuple[int, ...] = (), seen: tuple[int, ...] = ()) -> Tensor:
        """As `weight`, of several whose rows lie one after the other: one matrix, or one vector."""
        name, held = "+".join(parts), self.file.stack(parts, fmt, order)
        key = "weight", name, seen or held.shape
        if key not in self.shared:
            called = f"{name}.{len(seen)}" if any(known[:2] == key[:2] for known in self.shared) else name
            schema, shape = self.file.schema, seen or held.shape
            assert held.order == order, "one kernel has one use"
            quantization: Any = held.per_row
            if held.scales:
                scales = self.tensor(
                    (*shape[:-1], shape[-1] // fmt.block), "float16", f"{called}.scales", buffer=held.scales
                )
                quantization = schema.QuantizationParametersT(
                    detailsType=schema.QuantizationDetails.BlockwiseQuantization,
                    details=schema.BlockwiseQuantizationT(scales=scales.index, zeroPoints=-1, blockSize=fmt.block),
                )
            dtype = f"int{fmt.bits}" if fmt.integer else f"float{fmt.bits}"
            self.shared[key] = self.tensor(shape, dtype, called, held.rows, quantization)
        return self.shared[key]

    def offsets(self, parts: Parts, fmt: Format) -> Tensor:
        """What is added to the blocks of a stack in a format that has offsets: int8 [rows, blocks], as stored."""
        name, held = "+".join(parts), self.file.stack(parts, fmt)
        key = "offsets", name
        if key not in self.shared:
            shape = held.shape[0], storage.blocks(held.shape[1], fmt)
            self.shared[key] = self.tensor(shape, "int8", f"{name}.offsets", held.offsets, held.offset_scales)
        return self.shared[key]

    def is_stored(self, tensor: Tensor) -> bool:
        """Whether a tensor is a buffer of the file that means the same in any shape: a constant, or a float weight."""
        found = self.tensors[tensor.index]
        return found.buffer != 0 and found.quantization is None

    def reshaped(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A stored tensor's buffer as a tensor of another shape."""
        return self.tensor(shape, tensor.dtype, buffer=self.tensors[tensor.index].buffer)
