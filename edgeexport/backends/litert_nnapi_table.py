"""What Android's NNAPI takes of a .tflite file, as data: one row for each operator that LiteRT's NNAPI delegate maps.

    feature level   1    2    3    4    5    6, 7, 8
    NNAPI           1.0  1.1  1.2  1.3  -    the runtime that is updated apart from Android
    Android API     27   28   29   30   31   31 and newer, by the device

Sources, named in each row: `Validate` in tensorflow/lite/delegates/nnapi/nnapi_delegate.cc (as it is since it knows
feature level 7; the case of the operator's own name), which decides what is offered to the driver; and the limits of
the operation in AOSP's packages/modules/NeuralNetworks (NeuralNetworks.h, and common/operations/*.cpp where a file is
named), by which the runtime judges the offer. A driver may refuse more. Types are those that our writer has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

LEVELS: Mapping[int, str] = {
    1: "Android 8.1 (API 27)",
    2: "Android 9 (API 28)",
    3: "Android 10 (API 29)",
    4: "Android 11 (API 30)",
    5: "Android 12 (API 31)",
    6: "the updatable runtime's feature level 6",
    7: "the updatable runtime's feature level 7",
    8: "the updatable runtime's feature level 8",
}
MAX_RANK = 4
"""Axes of an operand. NeuralNetworks.h: "Supported tensor rank: up to 4" of every operation below."""


@dataclass(frozen=True)
class Operand:
    """A tensor as an operator sees it. `scales` is 0 for one that is not quantised, 1 for one of one scale, else the
    number of its channels."""

    dtype: str
    shape: tuple[int, ...]
    constant: bool
    scales: int = 0
    scale: float = 0.0
    zero_point: int = 0
    axis: int = 0


@dataclass(frozen=True)
class Operation:
    """One operator of a graph; an input that is left out is None. `options` are the numbers of the schema's table."""

    op: str
    version: int
    inputs: tuple[Operand | None, ...]
    outputs: tuple[Operand, ...]
    options: Mapping[str, int] = field(default_factory=dict)


Limit = Callable[[Operation, int], str | None]
"""Given an operation and a feature level, the reason why it is not taken, or None."""


@dataclass(frozen=True)
class Row:
    """One operator. `nnapi` is the operation that it becomes, "" for none; `types` what the `judged` input may be from
    a feature level on, the least of which introduced it; `version` the newest one of the operator that is taken."""

    op: str
    nnapi: str
    version: int
    types: Mapping[int, str]
    source: str
    judged: int = 0
    limits: tuple[Limit, ...] = ()
    why: str = ""
    """Of an operator that never is taken."""

    def types_at(self, level: int) -> frozenset[str]:
        """dtypes that are taken at a feature level."""
        return frozenset(kind for since, kinds in self.types.items() if since <= level for kind in kinds.split())


# limits that several operators have


def _constant(*positions: int) -> Limit:
    def limit(op: Operation, level: int) -> str | None:
        for k in positions:
            found = op.inputs[k] if k < len(op.inputs) else None
            if found is not None and not found.constant:
                return f"input {k} must be a constant"
        return None

    return limit


def _one_scale(*positions: int) -> Limit:
    def limit(op: Operation, level: int) -> str | None:
        for k in positions:
            found = op.inputs[k] if k < len(op.inputs) else None
            if found is not None and found.scales > 1:
                return f"input {k} has a scale per channel"
        return None

    return limit


def _keeps_scale(op: Operation, level: int) -> str | None:
    first, made = _first(op), op.outputs[0]
    same = (first.scale, first.zero_point) == (made.scale, made.zero_point)
    return None if first.dtype != "int8" or same else "the output's scale is not the input's"


def _scale_of_256(op: Operation, level: int) -> str | None:
    made = op.outputs[0]
    good = made.dtype != "int8" or (made.scale, made.zero_point) == (1 / 256, -128)
    return None if good else "the output's scale is not 1/256 with zero point -128"


def _biased(op: Operation, level: int) -> str | None:
    if len(op.inputs) < 3 or op.inputs[2] is None:
        return "it has no bias"
    return None


def _bias_type(op: Operation, level: int) -> str | None:
    bias = op.inputs[2] if len(op.inputs) > 2 else None
    wanted = "int32" if _first(op).dtype == "int8" else "float32"
    return None if bias is None or _kind(bias) == wanted else f"its bias is {bias.dtype}, not {wanted}"


def _same_types(op: Operation, level: int) -> str | None:
    found = {_kind(operand) for operand in op.inputs if operand is not None}
    return None if len(found) == 1 else f"its inputs are of several types: {', '.join(sorted(found))}"


def _filter_by_output(axis: int) -> Limit:
    def limit(op: Operation, level: int) -> str | None:
        kernel = op.inputs[1]
        assert kernel is not None
        if kernel.scales > 1 and level < 3:
            return "scales per channel need feature level 3"
        if kernel.scales > 1 and kernel.axis != axis:
            return f"its kernel's scales are not along axis {axis}"
        return None

    return limit


def _kind(operand: Operand) -> str:
    """The type that NNAPI is given: constants of float16 go over as float32."""
    return "float32" if operand.dtype == "float16" and operand.constant else operand.dtype


def _first(op: Operation) -> Operand:
    first = op.inputs[0]
    assert first is not None
    return first


# limits of one operator


def _linear(op: Operation, level: int) -> str | None:
    weight = op.inputs[1]
    assert weight is not None
    if op.options.get("keepNumDims") and level < 4:
        return "more than two axes need feature level 4"
    if weight.scales > 1 and _first(op).dtype == "int8":
        return "its weights have a scale per row, and NNAPI shares scales by channel in convolutions alone"
    if _first(op).dtype == "float32" and weight.dtype == "int8" and level < 3:
        return "int8 weights and float32 activations need feature level 3"
    return None


def _convolution(op: Operation, level: int) -> str | None:
    kernel = op.inputs[1]
    assert kernel is not None
    if level < 3 and _kind(kernel) != _first(op).dtype:
        return "int8 weights and float32 activations need feature level 3"
    if level < 3 and _dilated(op):
        return "dilation needs feature level 3"
    if level < 3 and _first(op).shape[-1] != kernel.shape[-1]:
        return "groups need feature level 3"
    return None


def _depthwise(op: Operation, level: int) -> str | None:
    return "dilation needs feature level 3" if level < 3 and _dilated(op) else None


def _dilated(op: Operation) -> bool:
    return (op.options.get("dilationHFactor", 1), op.options.get("dilationWFactor", 1)) != (1, 1)


def _batches(op: Operation, level: int) -> str | None:
    left, right = _first(op), op.inputs[1]
    assert right is not None
    if min(len(left.shape), len(right.shape)) < 2:
        return "its inputs have less than two axes"
    return None if left.shape[:-2] == right.shape[:-2] else "its inputs' batches differ, and NNAPI broadcasts none"


def _vector(op: Operation, level: int) -> str | None:
    at = op.inputs[1]
    assert at is not None
    return None if at.shape else "its index has no axis"


def _no_scalar(op: Operation, level: int) -> str | None:
    return None if op.outputs[0].shape else "its output has no axis"


def _cast_to(op: Operation, level: int) -> str | None:
    made = op.outputs[0].dtype
    good = made in ("float32", "int32") or (made == "int8" and level >= 4)
    return None if good else f"it makes {made}"


def _softmax(op: Operation, level: int) -> str | None:
    good = level >= 3 or len(_first(op).shape) in (2, 4)
    return None if good else "it has neither two nor four axes, which needs feature level 3"


def _dequantize(op: Operation, level: int) -> str | None:
    symmetric = level > 3 or _first(op).zero_point == 0
    return None if symmetric else "a zero point other than 0 needs feature level 4"


def _quantize(op: Operation, level: int) -> str | None:
    made = op.outputs[0]
    if made.dtype != "int8" or level < 4:
        return f"it makes {made.dtype}" if made.dtype != "int8" else "int8 needs feature level 4"
    return None if made.scale > 0 else "its scale is not above zero"


_ARITHMETIC = {1: "float32 int8", 4: "int32"}

_ROWS = (
    Row("ADD", "ADD", 2, _ARITHMETIC, "Validate; NeuralNetworks.h ADD", limits=(_same_types,)),
    Row("MUL", "MUL", 2, _ARITHMETIC, "Validate (version 3 with a named accelerator alone); NeuralNetworks.h MUL",
        limits=(_same_types,)),
    Row("SUB", "SUB", 3, {2: "float32", 3: "int8", 4: "int32"}, "Validate; NeuralNetworks.h SUB",
        limits=(_same_types,)),
    Row("MAXIMUM", "MAXIMUM", 3, {3: "float32 int8 int32"}, "Validate; NeuralNetworks.h MAXIMUM",
        limits=(_same_types,)),
    Row("MINIMUM", "MINIMUM", 3, {3: "float32 int8 int32"}, "Validate; NeuralNetworks.h MINIMUM",
        limits=(_same_types,)),
    Row("LESS", "LESS", 2, {3: "float32 int8 int32 bool"}, "Validate; NeuralNetworks.h LESS"),
    Row("CAST", "CAST", 1, {3: "float32 int32", 4: "int8"}, "Validate; NeuralNetworks.h CAST", limits=(_cast_to,)),
    Row("RELU", "RELU", 2, {1: "float32 int8"}, "Validate; NeuralNetworks.h RELU", limits=(_keeps_scale,)),
    Row("RELU6", "RELU6", 2, {1: "float32 int8"}, "Validate; NeuralNetworks.h RELU6", limits=(_keeps_scale,)),
    Row("LOGISTIC", "LOGISTIC", 2, {1: "float32 int8"}, "Validate; NeuralNetworks.h LOGISTIC",
        limits=(_scale_of_256,)),
    Row("ABS", "ABS", 1, {3: "float32"}, "Validate; NeuralNetworks.h ABS"),
    Row("EXP", "EXP", 1, {3: "float32"}, "Validate; NeuralNetworks.h EXP"),
    Row("DIV", "DIV", 1, {2: "float32"}, "Validate; NeuralNetworks.h DIV", limits=(_same_types,)),
    Row("RSQRT", "RSQRT", 1, {3: "float32"}, "Validate; NeuralNetworks.h RSQRT"),
    Row("MEAN", "MEAN", 2, {2: "float32", 3: "int8"}, "Validate; NeuralNetworks.h MEAN",
        limits=(_constant(1), _no_scalar)),
    Row("SOFTMAX", "SOFTMAX", 2, {1: "float32 int8"}, "Validate; NeuralNetworks.h SOFTMAX",
        limits=(_softmax, _scale_of_256)),
    Row("RESHAPE", "RESHAPE", 1, {1: "float32 int8", 6: "int32"}, "Validate; NeuralNetworks.h RESHAPE",
        limits=(_constant(1), _keeps_scale)),
    Row("TRANSPOSE", "TRANSPOSE", 2, {2: "float32", 3: "int8 float16"}, "Validate; NeuralNetworks.h TRANSPOSE",
        limits=(_constant(1), _keeps_scale)),
    Row("CONCATENATION", "CONCATENATION", 2, {1: "float32", 3: "int8 float16"},
        "Validate; NeuralNetworks.h CONCATENATION", limits=(_same_types,)),
    Row("SPLIT", "SPLIT", 3, {3: "float32 int32", 4: "int8"}, "Validate; NeuralNetworks.h SPLIT", judged=1,
        limits=(_constant(0),)),
    Row("SLICE", "SLICE", 2, {3: "float32 int8 int32"}, "Validate; NeuralNetworks.h SLICE", limits=(_keeps_scale,)),
    Row("STRIDED_SLICE", "STRIDED_SLICE", 2, {2: "float32", 3: "int8"}, "Validate; NeuralNetworks.h STRIDED_SLICE",
        limits=(_constant(1, 2, 3), _keeps_scale)),
    Row("PAD", "PAD", 2, {2: "float32", 3: "int8"}, "Validate; NeuralNetworks.h PAD",
        limits=(_constant(1), _keeps_scale)),
    Row("GATHER", "GATHER", 2, {3: "float32 int8 int32 float16"}, "Validate; NeuralNetworks.h GATHER",
        limits=(_vector, _keeps_scale)),
    Row("EMBEDDING_LOOKUP", "EMBEDDING_LOOKUP", 1, {1: "float32"}, "Validate; NeuralNetworks.h EMBEDDING_LOOKUP",
        judged=1),
    Row("FULLY_CONNECTED", "FULLY_CONNECTED", 5, {1: "float32 int8"},
        "Validate, AddDequantizeOperatorsWhereNeeded; FullyConnected.cpp", limits=(_linear, _bias_type)),
    Row("CONV_2D", "CONV_2D", 5, {1: "float32 int8"}, "Validate; Conv2D.cpp",
        limits=(_biased, _bias_type, _convolution, _filter_by_output(0))),
    Row("DEPTHWISE_CONV_2D", "DEPTHWISE_CONV_2D", 3, {1: "float32 int8"}, "Validate; DepthwiseConv2D.cpp",
        limits=(_biased, _bias_type, _depthwise, _filter_by_output(3))),
    Row("BATCH_MATMUL", "BATCH_MATMUL", 2, {6: "float32 int8 int32"},
        "Validate, IsBroadcastBatchMatMul; BatchMatmul.cpp", limits=(_same_types, _one_scale(0, 1), _batches)),
    Row("QUANTIZE", "QUANTIZE", 2, {3: "float32 int8"}, "Validate; NeuralNetworks.h QUANTIZE", limits=(_quantize,)),
    Row("DEQUANTIZE", "DEQUANTIZE", 2, {3: "int8"}, "Validate; NeuralNetworks.h DEQUANTIZE",
        limits=(_one_scale(0), _dequantize)),
    Row("DYNAMIC_UPDATE_SLICE", "", 0, {}, "Validate, default", why="NNAPI writes into no tensor that it is given"),
    Row("GELU", "", 0, {}, "Validate, default", why="NNAPI has no Gelu and no error function"),
    Row("RELU_0_TO_1", "", 0, {}, "Validate, default", why="NNAPI has no clamp to 0 and 1"),
    Row("SELECT_V2", "", 0, {}, "Validate, default", why="the delegate maps SELECT alone, of equal shapes"),
)  # fmt: skip

TABLE: Mapping[str, Row] = {row.op: row for row in _ROWS}
"""Operator to its row. What has none is not taken."""


def refusal(op: Operation, level: int) -> str | None:
    """Why an operation stays on the processor at a feature level; None where NNAPI takes it.

    Constants of float16 that are only widened are free: the delegate drops their DEQUANTIZE, judges whoever reads them
    by float16, and hands them over as float32 (`IsDequantizeConstFloat16`, `FP16GraphPartitionHelper`).
    """
    row = TABLE.get(op.op)
    if row is None:
        return "the delegate does not know it"
    if not row.nnapi:
        return row.why
    if is_widened(op):
        return None
    judged = op.inputs[row.judged]
    if judged is None or judged.dtype not in row.types_at(level):
        return _untyped(row, "nothing" if judged is None else judged.dtype, level)
    if op.version > row.version:
        return f"version {op.version}, and the delegate takes {row.version} and older"
    operands = [operand for operand in (*op.inputs, *op.outputs) if operand is not None]
    if any(len(operand.shape) > MAX_RANK for operand in operands):
        return f"more than {MAX_RANK} axes"
    return next((reason for limit in row.limits if (reason := limit(op, level)) is not None), None)


def _untyped(row: Row, dtype: str, level: int) -> str:
    later = [since for since, kinds in row.types.items() if since > level and dtype in kinds.split()]
    return f"{dtype} needs feature level {min(later)}" if later else f"it is not for {dtype}"


def is_widened(op: Operation) -> bool:
    """Whether an operation makes float32 of a constant of float16."""
    first = op.inputs[0]
    return op.op == "DEQUANTIZE" and first is not None and first.dtype == "float16" and first.constant
