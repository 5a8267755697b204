"""What Android's NNAPI takes of a .tflite file, as data: one row for each operator that LiteRT's NNAPI delegate maps.

    feature level   1    2    3    4    5    6, 7, 8
    NNAPI           1.0  1.1  1.2  1.3  -    the runtime that is updated apart from Android
    Android API     27   28   29   30   31   31 and newer, by the device

Each row names its sources, in this order:

    Validate        NNAPIDelegateKernel::Validate in LiteRT's tflite/delegates/nnapi/nnapi_delegate.cc, the case of the
                    operator's own name: what is offered to the driver. Other names with no file are of that file, too;
                    AddTensor there says as what an operand goes over.
    header          AOSP's packages/modules/NeuralNetworks/runtime/include/NeuralNetworksTypes.h, the comment of the
                    operation that it becomes
    ...cpp          common/operations/...cpp in the same module, by which the runtime judges the offer; LegacyUtils.cpp
                    is in common

A driver may refuse more. Types are those that our writer has. Below feature level 4 int8 goes over as unsigned, where
the delegate's NeedInt8Conversion names the operator.
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
MOST_AXES = 4
"""Axes of an operand, where the header does not say "from 1", which is any number of them."""
FUSED = 3
"""The header's last FuseCode: none, ReLU, -1 to 1, 0 to 6, numbered as in TFLite's schema."""


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
    a feature level on, the least of which introduced it; `version` the newest one of the operator that is taken; `axes`
    the most that an operand may have, None for any number. An operand has an axis, but for the inputs in `scalars`, and
    int8 has one scale, but for the inputs in `by_channel`."""

    op: str
    nnapi: str
    version: int
    types: Mapping[int, str]
    source: str
    judged: int = 0
    limits: tuple[Limit, ...] = ()
    axes: int | None = MOST_AXES
    scalars: tuple[int, ...] = ()
    by_channel: tuple[int, ...] = ()
    why: str = ""
    """Of an operator that never is taken."""

    def types_at(self, level: int) -> frozenset[str]:
        """dtypes that are taken at a feature level."""
        return frozenset(kind for since, kinds in self.types.items() if since <= level for kind in kinds.split())


# limits that several operators have


def _integers(*positions: int, constant: bool = True) -> Limit:
    """Inputs that say where and how much: int32, and as a rule in the file."""

    def limit(op: Operation, level: int) -> str | None:
        for k in positions:
            found = op.inputs[k] if k < len(op.inputs) else None
            if found is not None and found.dtype != "int32":
                return f"input {k} is {found.dtype}, not int32"
            if found is not None and constant and not found.constant:
                return f"input {k} must be a constant"
        return None

    return limit


def _keeps_scale(source: int = 0) -> Limit:
    def limit(op: Operation, level: int) -> str | None:
        taken = op.inputs[source]
        assert taken is not None
        same = all((taken.scale, taken.zero_point) == (made.scale, made.zero_point) for made in op.outputs)
        return None if taken.dtype != "int8" or same else "the output's scale is not the input's"

    return limit


def _fused(op: Operation, level: int) -> str | None:
    fused = op.options.get("fusedActivationFunction", 0)
    if fused and _first(op).dtype == "int32":
        return "int32 has no fused activation"
    return None if fused <= FUSED else "NNAPI fuses no such activation"


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


def _bias_scale(op: Operation, level: int) -> str | None:
    """By one scale the product to one part in a million; by channel 0, as which several scales of a bias go over.

    Source: the header's inputs of the three operations; common/OperationsUtils.cpp GetQuantizedConvolutionMultipler.
    """
    bias, weight = op.inputs[2] if len(op.inputs) > 2 else None, op.inputs[1]
    assert weight is not None
    if bias is None or _first(op).dtype != "int8":
        return None
    wanted = _first(op).scale * weight.scale if weight.scales == 1 else 0.0
    found = bias.scale if bias.scales == 1 else 0.0
    if bias.zero_point or abs(found - wanted) > 1e-6 * min(found, wanted):
        return "its bias's scale is not the input's times the weights'"
    return None


def _weight_type(op: Operation, level: int) -> str | None:
    """The input's own type; of float32 int8, too, which the delegate has dequantised as a QUANT8_SYMM."""
    weight, wanted = op.inputs[1], _first(op).dtype
    assert weight is not None
    if _kind(weight) == wanted:
        return None
    if (weight.dtype, wanted) != ("int8", "float32") or op.op == "DEPTHWISE_CONV_2D":
        return f"its weights are {weight.dtype}, not {wanted}"
    if level < 3:
        return "int8 weights and float32 activations need feature level 3"
    return None if weight.zero_point == 0 else "its weights' zero point is not 0"


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
    if len(_first(op).shape) < 2:
        return "its input has less than two axes"
    if weight.scales > 1 and _first(op).dtype == "int8":
        return "its weights have a scale per row, and NNAPI shares scales by channel in convolutions alone"
    return None


def _convolution(op: Operation, level: int) -> str | None:
    kernel = op.inputs[1]
    assert kernel is not None
    if _first(op).shape[-1] != kernel.shape[-1]:
        return "it has groups, and the delegate leaves out an operand that GROUPED_CONV_2D must have"
    return "dilation needs feature level 3" if level < 3 and _dilated(op) else None


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


def _product(op: Operation, level: int) -> str | None:
    left, right, made = _first(op), op.inputs[1], op.outputs[0]
    assert right is not None
    good = made.dtype != "int8" or made.scale > left.scale * right.scale
    return None if good else "the output's scale is not above the product of the inputs'"


def _constant_scalars(op: Operation, level: int) -> str | None:
    computed = any(each is not None and not each.shape and not each.constant for each in op.inputs)
    return "an input without axis must be a constant" if computed else None


def _joined(op: Operation, level: int) -> str | None:
    if op.options.get("fusedActivationFunction", 0):
        return "it has a fused activation"
    scales = {(each.scale, each.zero_point) for each in (*op.inputs, *op.outputs) if each is not None}
    good = level >= 3 or _first(op).dtype != "int8" or len(scales) == 1
    return None if good else "inputs of other scales than the output's need feature level 3"


def _masks(op: Operation, level: int) -> str | None:
    lost = op.options.get("ellipsisMask", 0) or op.options.get("newAxisMask", 0)
    return "the delegate hands over neither its ellipsis nor its new axes" if lost else None


def _cast_to(op: Operation, level: int) -> str | None:
    taken, made = _first(op).dtype, op.outputs[0].dtype
    good = taken == made if "int8" in (taken, made) else made in ("float32", "int32")
    return None if good else f"it makes {made} of {taken}"


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
    Row("ADD", "ADD", 2, _ARITHMETIC, "Validate; header ADD; BroadcastValidation.cpp",
        limits=(_same_types, _fused), scalars=(0, 1)),
    Row("MUL", "MUL", 2, _ARITHMETIC,
        "Validate (version 3 with a named accelerator alone); header MUL; BroadcastValidation.cpp",
        limits=(_same_types, _fused, _product), scalars=(0, 1)),
    Row("SUB", "SUB", 3, {2: "float32", 3: "int8", 4: "int32"}, "Validate; header SUB; BroadcastValidation.cpp",
        limits=(_same_types, _fused), scalars=(0, 1)),
    Row("DIV", "DIV", 1, {2: "float32"}, "Validate; header DIV; BroadcastValidation.cpp",
        limits=(_same_types, _fused), scalars=(0, 1)),
    Row("MAXIMUM", "MAXIMUM", 3, {3: "float32 int8 int32"}, "Validate; header MAXIMUM; MaximumMinimumValidation.cpp",
        limits=(_same_types, _constant_scalars), axes=None, scalars=(0, 1)),
    Row("MINIMUM", "MINIMUM", 3, {3: "float32 int8 int32"}, "Validate; header MINIMUM; MaximumMinimumValidation.cpp",
        limits=(_same_types, _constant_scalars), axes=None, scalars=(0, 1)),
    Row("LESS", "LESS", 2, {3: "float32 int8 int32 bool"}, "Validate; header LESS; ComparisonsValidation.cpp",
        limits=(_same_types,), axes=None, scalars=(0, 1)),
    Row("CAST", "CAST", 1, {3: "float32 int32", 4: "int8"}, "Validate; header CAST; CastValidation.cpp",
        limits=(_cast_to,), axes=None),
    Row("RELU", "RELU", 2, {1: "float32 int8"}, "Validate; header RELU; ActivationValidation.cpp",
        limits=(_keeps_scale(),)),
    Row("RELU6", "RELU6", 2, {1: "float32 int8"}, "Validate; header RELU6; ActivationValidation.cpp",
        limits=(_keeps_scale(),)),
    Row("LOGISTIC", "LOGISTIC", 2, {1: "float32 int8"}, "Validate; header LOGISTIC; ActivationValidation.cpp",
        limits=(_scale_of_256,)),
    Row("ABS", "ABS", 1, {3: "float32"}, "Validate; header ABS; ElementwiseValidation.cpp validateAbs", axes=None),
    Row("EXP", "EXP", 1, {3: "float32"}, "Validate; header EXP; ElementwiseValidation.cpp validate", axes=None),
    Row("RSQRT", "RSQRT", 2, {3: "float32", 7: "int8"},
        "Validate; header RSQRT; ElementwiseValidation.cpp validateRsqrt", axes=None),
    Row("MEAN", "MEAN", 2, {2: "float32", 3: "int8"},
        "Validate, AddOpsAndTensors (another scale of the output: by an ADD); header MEAN; LegacyUtils.cpp",
        limits=(_integers(1),), scalars=(1,)),
    Row("SUM", "REDUCE_SUM", 1, {3: "float32"}, "Validate; header REDUCE_SUM; ReduceValidation.cpp",
        limits=(_integers(1, constant=False),)),
    Row("SOFTMAX", "SOFTMAX", 2, {1: "float32 int8"}, "Validate; header SOFTMAX; SoftmaxValidation.cpp",
        limits=(_softmax, _scale_of_256)),
    Row("RESHAPE", "RESHAPE", 1, {1: "float32 int8", 6: "int32"}, "Validate; header RESHAPE; LegacyUtils.cpp",
        limits=(_integers(1), _keeps_scale())),
    Row("TRANSPOSE", "TRANSPOSE", 2, {2: "float32 int8", 3: "float16"},
        "Validate (no type); header TRANSPOSE; TransposeValidation.cpp", limits=(_integers(1), _keeps_scale())),
    Row("CONCATENATION", "CONCATENATION", 2, {1: "float32 int8", 3: "float16"},
        "Validate; header CONCATENATION; ConcatenationValidation.cpp", limits=(_same_types, _joined)),
    Row("SPLIT", "SPLIT", 3, {3: "float32 int32", 4: "int8"}, "Validate; header SPLIT; LegacyUtils.cpp", judged=1,
        limits=(_integers(0), _keeps_scale(1)), axes=None, scalars=(0,)),
    Row("SLICE", "SLICE", 2, {3: "float32 int8 int32"}, "Validate; header SLICE; SliceValidation.cpp",
        limits=(_integers(1, 2, constant=False), _keeps_scale()), axes=None),
    Row("STRIDED_SLICE", "STRIDED_SLICE", 2, {2: "float32 int8"},
        "Validate, Map; header STRIDED_SLICE; StridedSliceValidation.cpp",
        limits=(_integers(1, 2, 3), _masks, _keeps_scale())),
    Row("PAD", "PAD", 2, {2: "float32", 3: "int8"}, "Validate; header PAD; LegacyUtils.cpp",
        limits=(_integers(1), _keeps_scale())),
    Row("GATHER", "GATHER", 2, {3: "float32 int8 int32 float16"}, "Validate; header GATHER; GatherValidation.cpp",
        limits=(_integers(1, constant=False), _keeps_scale()), axes=None),
    Row("EMBEDDING_LOOKUP", "EMBEDDING_LOOKUP", 1, {1: "float32"}, "Validate; header EMBEDDING_LOOKUP; LegacyUtils.cpp",
        judged=1, limits=(_integers(0, constant=False),), axes=None),
    Row("FULLY_CONNECTED", "FULLY_CONNECTED", 5, {1: "float32", 3: "int8"},
        "Validate, AddDequantizeOperatorsWhereNeeded; header FULLY_CONNECTED; FullyConnectedValidation.cpp",
        limits=(_linear, _fused, _weight_type, _bias_type, _bias_scale), by_channel=(1,)),
    Row("CONV_2D", "CONV_2D", 5, {1: "float32", 3: "int8"},
        "Validate, Map, AddDequantizeOperatorsWhereNeeded; header CONV_2D, GROUPED_CONV_2D; Conv2DValidation.cpp, "
        "GroupedConv2DValidation.cpp",
        limits=(_biased, _fused, _weight_type, _bias_type, _convolution, _filter_by_output(0), _bias_scale),
        by_channel=(1,)),
    Row("DEPTHWISE_CONV_2D", "DEPTHWISE_CONV_2D", 3, {1: "float32", 3: "int8"},
        "Validate; header DEPTHWISE_CONV_2D; DepthwiseConv2DValidation.cpp",
        limits=(_biased, _fused, _weight_type, _bias_type, _depthwise, _filter_by_output(3), _bias_scale),
        by_channel=(1,)),
    Row("BATCH_MATMUL", "BATCH_MATMUL", 2, {6: "float32 int8 int32"},
        "Validate, IsBroadcastBatchMatMul; header BATCH_MATMUL; BatchMatmulValidation.cpp",
        limits=(_same_types, _batches)),
    Row("QUANTIZE", "QUANTIZE", 2, {3: "float32 int8"},
        "Validate, Map (int8 by a DEQUANTIZE before it); header QUANTIZE; QuantizeValidation.cpp", limits=(_quantize,),
        axes=None),
    Row("DEQUANTIZE", "DEQUANTIZE", 2, {3: "int8"},
        "Validate, AddOpsAndTensors (it skips float16); header DEQUANTIZE; DequantizeValidation.cpp",
        limits=(_dequantize,), by_channel=(0,)),
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
    kind = "nothing" if judged is None else judged.dtype
    if judged is not None and "float16" in row.types_at(max(LEVELS)):
        kind = _kind(judged)
    if kind not in row.types_at(level):
        return _untyped(row, kind, level)
    if op.version > row.version:
        return f"version {op.version}, and the delegate takes {row.version} and older"
    return next((reason for limit in (_operands(row), *row.limits) if (reason := limit(op, level)) is not None), None)


def _operands(row: Row) -> Limit:
    """What the header's OperandCode and the row say of every operand."""

    def limit(op: Operation, level: int) -> str | None:
        taken = [(k, operand) for k, operand in enumerate(op.inputs) if operand is not None]
        sizes = [len(operand.shape) for operand in (*(operand for _, operand in taken), *op.outputs)]
        if row.axes is not None and max(sizes) > row.axes:
            return f"more than {row.axes} axes"
        for k, operand in taken:
            if not operand.shape and k not in row.scalars:
                return f"input {k} has no axis"
            if operand.dtype == "int8" and operand.scales > 1 and k not in row.by_channel:
                return f"input {k} has a scale per channel"
        return "its output has no axis" if any(not made.shape for made in op.outputs) else None

    return limit


def _untyped(row: Row, dtype: str, level: int) -> str:
    later = [since for since, kinds in row.types.items() if since > level and dtype in kinds.split()]
    return f"{dtype} needs feature level {min(later)}" if later else f"it is not for {dtype}"


def is_widened(op: Operation) -> bool:
    """Whether an operation makes float32 of a constant of float16."""
    first = op.inputs[0]
    return op.op == "DEQUANTIZE" and first is not None and first.dtype == "float16" and first.constant
