"""A .tflite file that multiplies the same weights by float32 activations: what tells a mistake from the rounding of
activations that the fast kernels do.

Every integer weight of a FULLY_CONNECTED or a CONV_2D is looked up as float32 rows first, all of them, at each run.
Where activations are int8 they are float32 here, QUANTIZE and DEQUANTIZE between them are gone, and biases are the
float32 numbers that their integers stand for.
"""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 64
LOOKUP = "EMBEDDING_LOOKUP", 4
FLOAT_VERSIONS = {"FULLY_CONNECTED": 5, "CONV_2D": 1}
"""What multiplies by weights, and its version for float32."""


def write_exact(path: Path, out: Path) -> None:
    """Write the file `out`: the graphs of `path` with their multiplications in float32, and its weights as they are."""
    from ai_edge_litert import schema_py_generated as schema

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        model = schema.ModelT.InitFromPackedBuf(held)
        start = min((buffer.offset for buffer in model.buffers if buffer.offset), default=len(held))
        _unquantise(model, schema, held)
        _widen(model, schema)
        moved = -(-(len(_packed(model)) - start) // ALIGNMENT) * ALIGNMENT
        for buffer in model.buffers:
            if buffer.offset:
                buffer.offset += moved
        head = _packed(model)
        with out.open("wb") as copy:
            copy.write(head.ljust(start + moved, b"\0"))
            file.seek(start)
            shutil.copyfileobj(file, copy, 1 << 24)
        del model  # its arrays are views of what closes here


def _packed(model: Any) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _unquantise(model: Any, schema: Any, data: mmap.mmap) -> None:
    """Let int8 activations be float32, with what multiplies them."""
    quantize, dequantize = (getattr(schema.BuiltinOperator, op) for op in ("QUANTIZE", "DEQUANTIZE"))
    for number, graph in enumerate(model.subgraphs):
        made = {int(index) for operator in graph.operators for index in operator.outputs}
        ints = {index for index in made if graph.tensors[index].type == schema.TensorType.INT8}
        same: dict[int, int] = {}
        """A tensor that only was another one in another type, to that one."""
        operators = []
        for operator in graph.operators:
            operator.inputs = [same.get(int(index), int(index)) for index in operator.inputs]
            code = model.operatorCodes[operator.opcodeIndex].builtinCode
            if code == quantize or (code == dequantize and operator.inputs[0] in ints):
                same[int(operator.outputs[0])] = operator.inputs[0]
                continue
            operators += [*_floats(model, schema, graph, operator, ints, data), operator]
        graph.operators = operators
        graph.outputs = [same.get(int(index), int(index)) for index in graph.outputs]
        for signature in model.signatureDefs:
            if signature.subgraphIndex == number:
                for pair in signature.outputs:
                    pair.tensorIndex = same.get(int(pair.tensorIndex), int(pair.tensorIndex))
        for index in ints:
            graph.tensors[index].type, graph.tensors[index].quantization = schema.TensorType.FLOAT32, None


def _floats(model: Any, schema: Any, graph: Any, operator: Any, ints: set[int], data: mmap.mmap) -> list[Any]:
    """Give an operator over int8 activations its kernel and bias in float32; returns what must come before it."""
    if len(operator.inputs) < 3 or operator.outputs[0] not in ints:
        return []
    kernel, bias = (graph.tensors[index] for index in operator.inputs[1:3])
    if bias.type != schema.TensorType.INT32 or bias.quantization is None:
        return []
    buffer = model.buffers[bias.buffer]
    units = np.frombuffer(data[buffer.offset : buffer.offset + buffer.size], np.int32)
    numbers = units.astype(np.float32) * np.asarray(bias.quantization.scale, np.float32)
    model.buffers.append(schema.BufferT(data=numbers.view(np.uint8)))
    floats = _tensor(graph, schema, bias.shape, schema.TensorType.FLOAT32, len(model.buffers) - 1)
    wide = _tensor(graph, schema, kernel.shape, schema.TensorType.FLOAT32, 0)
    code = _code(model, schema, "DEQUANTIZE", 5)
    widen = schema.OperatorT(
        opcodeIndex=code, inputs=[operator.inputs[1]], outputs=[wide],
        builtinOptionsType=schema.BuiltinOptions.DequantizeOptions, builtinOptions=schema.DequantizeOptionsT(),
    )  # fmt: skip
    operator.inputs = [operator.inputs[0], wide, floats]
    return [widen]


def _widen(model: Any, schema: Any) -> None:
    """Put a lookup of all rows in front of every multiplication by integers."""
    names = {getattr(schema.BuiltinOperator, op): op for op in FLOAT_VERSIONS}
    integers = (schema.TensorType.INT8, schema.TensorType.INT4)
    rows: dict[int, int] = {}
    for graph in model.subgraphs:
        operators = []
        for operator in graph.operators:
            op = names.get(model.operatorCodes[operator.opcodeIndex].builtinCode)
            weight = graph.tensors[operator.inputs[1]] if op is not None else None
            if op is not None and weight is not None and weight.type in integers:
                count = int(weight.shape[0])
                if count not in rows:
                    rows[count] = len(model.buffers)
                    model.buffers.append(schema.BufferT(data=np.arange(count, dtype=np.int32).view(np.uint8)))
                all_rows = _tensor(graph, schema, [count], schema.TensorType.INT32, rows[count])
                wide = _tensor(graph, schema, weight.shape, schema.TensorType.FLOAT32, 0)
                operators.append(
                    schema.OperatorT(
                        opcodeIndex=_code(model, schema, *LOOKUP), inputs=[all_rows, operator.inputs[1]], outputs=[wide]
                    )
                )
                operator.opcodeIndex = _code(model, schema, op, FLOAT_VERSIONS[op])
                operator.inputs = [operator.inputs[0], wide, *operator.inputs[2:]]
            operators.append(operator)
        graph.operators = operators


def _tensor(graph: Any, schema: Any, shape: Any, kind: int, buffer: int) -> int:
    """Index of a new tensor."""
    name = f"{_text(graph.name)}/exact.{len(graph.tensors)}"
    sizes = [int(size) for size in shape]
    graph.tensors.append(schema.TensorT(shape=sizes, type=kind, buffer=buffer, name=name, hasRank=True))
    return len(graph.tensors) - 1


def _code(model: Any, schema: Any, op: str, version: int) -> int:
    """Index of an operator's code, entered where it is new."""
    wanted = getattr(schema.BuiltinOperator, op)
    for index, code in enumerate(model.operatorCodes):
        if code.builtinCode == wanted and code.version == version:
            return index
    model.operatorCodes.append(schema.OperatorCodeT(deprecatedBuiltinCode=wanted, builtinCode=wanted, version=version))
    return len(model.operatorCodes) - 1


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
