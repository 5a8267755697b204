"""How much of a .tflite file NNAPI would take: every operator judged by litert_nnapi_table.py. Nothing is run."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeexport.backends.litert_file import TYPES
from edgeexport.backends.litert_nnapi_table import Operand, Operation, is_widened, refusal


@dataclass(frozen=True)
class Share:
    """One signature at one feature level: its operators and multiply-accumulates, and those that NNAPI would take.
    `runs` counts the pieces that follow each other without leaving NNAPI; `refused` the operators that stay on the
    processor, by (operator, reason)."""

    signature: str
    level: int
    operators: int
    taken: int
    macs: int
    taken_macs: int
    runs: int
    refused: Mapping[tuple[str, str], int]

    @property
    def of_operators(self) -> float:
        """0 to 1; 1 where there is none."""
        return self.taken / self.operators if self.operators else 1.0

    @property
    def of_macs(self) -> float:
        """0 to 1; 1 where there is none."""
        return self.taken_macs / self.macs if self.macs else 1.0


def lint(path: Path, level: int) -> list[Share]:
    """Every signature of a file at a feature level, 1 to 8, in the file's order."""
    return [_share(name, operations, level) for name, operations in read(path)]


def read(path: Path) -> list[tuple[str, list[Operation]]]:
    """Every signature's operators in the order in which they run. No weight is read."""
    from ai_edge_litert import schema_py_generated as schema

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        model = schema.ModelT.InitFromPackedBuf(held)
        signatures = [(_text(each.signatureKey), int(each.subgraphIndex)) for each in model.signatureDefs or []]
        found = [(name, list(_operations(model, model.subgraphs[index], schema))) for name, index in signatures]
        del model  # its arrays are views of what closes here
    return found


def macs(op: Operation) -> int:
    """Multiply-accumulates of an operator: of convolutions and of multiplications of matrices; 0 of all others."""
    made = int(np.prod(op.outputs[0].shape, dtype=np.int64))
    left, right = op.inputs[0], op.inputs[1] if len(op.inputs) > 1 else None
    if left is None or right is None:
        return 0
    if op.op == "CONV_2D":
        return made * int(np.prod(right.shape[1:], dtype=np.int64))
    if op.op == "DEPTHWISE_CONV_2D":
        return made * right.shape[1] * right.shape[2]
    if op.op == "FULLY_CONNECTED":
        return made * right.shape[-1]
    if op.op == "BATCH_MATMUL":
        return made * left.shape[-2 if op.options.get("adjX") else -1]
    return 0


def _share(signature: str, operations: list[Operation], level: int) -> Share:
    reasons = [refusal(op, level) for op in operations]
    work = [macs(op) for op in operations]
    taken = [reason is None for reason in reasons]
    refused = Counter(
        (op.op, reason) for op, reason in zip(operations, reasons, strict=True) if reason is not None
    )  # fmt: skip
    return Share(
        signature, level, len(operations), sum(taken), sum(work), sum(np.array(work, object)[taken]),
        sum(now and not before for before, now in zip([False, *taken], taken, strict=False)), dict(refused),
    )  # fmt: skip


def _operations(model: Any, graph: Any, schema: Any) -> Iterator[Operation]:
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    dtypes = {getattr(schema.TensorType, name): dtype for dtype, name in TYPES.items()}
    operands = [_operand(tensor, model, dtypes) for tensor in graph.tensors]
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        found = Operation(
            names[code.builtinCode],
            int(code.version),
            tuple(operands[index] if index >= 0 else None for index in operator.inputs),
            tuple(operands[index] for index in operator.outputs),
            _numbers(operator.builtinOptions),
        )
        yield found
        if is_widened(found):  # whoever reads it is judged as if it read the constant
            operands[operator.outputs[0]] = replace(found.outputs[0], dtype="float16", constant=True)


def _numbers(options: Any) -> dict[str, int]:
    found = vars(options) if options is not None else {}
    return {key: int(value) for key, value in found.items() if isinstance(value, int)}


def _operand(tensor: Any, model: Any, dtypes: Mapping[int, str]) -> Operand:
    buffer = model.buffers[tensor.buffer]
    shape = tuple(int(size) for size in tensor.shape) if tensor.shape is not None else ()
    found = tensor.quantization
    scales = [] if found is None or found.scale is None else list(found.scale)
    zeros = [] if found is None or found.zeroPoint is None else list(found.zeroPoint)
    blocks = found is not None and found.details is not None
    return Operand(
        dtypes.get(tensor.type, f"type {tensor.type}"),
        shape,
        constant=bool(buffer.offset) or buffer.data is not None,
        scales=max(len(scales), 2 * blocks),
        scale=float(scales[0]) if scales else 0.0,
        zero_point=int(zeros[0]) if zeros else 0,
        axis=int(found.quantizedDimension) if found is not None else 0,
    )


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
