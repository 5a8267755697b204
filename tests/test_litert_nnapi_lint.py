"""NNAPI's limits, row by row: what is taken at which feature level, and why the rest is not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgeexport.backends.litert_nnapi_lint import macs
from edgeexport.backends.litert_nnapi_table import LEVELS, TABLE, Operand, Operation, Row, refusal

BACKENDS = Path(__file__).parent.parent / "edgeexport" / "backends"


def operand(dtype: str = "float32", *shape: int, constant: bool = False, scales: int = 0) -> Operand:
    """A tensor of one row unless a shape is given; int8 has a scale."""
    scales = scales or int(dtype == "int8")
    sizes = shape or (1, 4)
    return Operand(dtype, sizes, constant, scales, 1 / 256 if scales else 0.0, -128 if scales == 1 else 0)


def weights(dtype: str, *shape: int, scales: int = 0) -> Operand:
    """A constant tensor around zero."""
    return replace(operand(dtype, *shape, constant=True, scales=scales), zero_point=0)


def matrix(dtype: str, *, scales: int = 0) -> Operand:
    return weights(dtype, 8, 4, scales=scales)


def kernel(dtype: str, *, scales: int = 0) -> Operand:
    return weights(dtype, 8, 3, 3, 4, scales=scales)


def bias(dtype: str) -> Operand:
    """Of int8 the scale is the input's times the weights'."""
    quantised = Operand("int32", (8,), constant=True, scales=1, scale=1 / 256 / 256)
    return quantised if dtype == "int8" else Operand("float32", (8,), constant=True)


def product(*scales: float) -> Operation:
    """A MUL of int8 by the scales of its inputs and of its output."""
    left, right, made = (replace(operand("int8"), scale=scale) for scale in scales)
    return Operation("MUL", 2, (left, right), (made,))


SCALAR = Operand("float32", (), constant=True)


def example(op: str, dtype: str) -> Operation:
    """An operation that is within every limit but that of its type."""
    version, x, index = 1, operand(dtype), operand("int32", 1, constant=True)
    made = operand(dtype)
    if op in ("ADD", "MUL", "SUB", "DIV", "MAXIMUM", "MINIMUM", "CONCATENATION"):
        inputs: tuple[Operand | None, ...] = x, x
    elif op == "LESS":
        inputs, made = (x, x), operand("bool")
    elif op == "CAST":
        inputs, made = (x,), operand("int8" if dtype == "int8" else "float32")
    elif op in ("MEAN", "SUM", "RESHAPE", "TRANSPOSE", "PAD", "GATHER"):
        inputs = x, index
    elif op == "SPLIT":
        inputs = index, x
    elif op == "SLICE":
        inputs = x, index, index
    elif op == "STRIDED_SLICE":
        inputs = x, index, index, index
    elif op == "EMBEDDING_LOOKUP":
        inputs = index, operand(dtype, 8, 4, constant=True)
    elif op == "FULLY_CONNECTED":
        inputs = x, matrix(dtype), bias(dtype)
    elif op == "CONV_2D":
        inputs, made = (operand(dtype, 1, 6, 6, 4), kernel(dtype), bias(dtype)), operand(dtype, 1, 4, 4, 8)
    elif op == "DEPTHWISE_CONV_2D":
        inputs = operand(dtype, 1, 6, 6, 4), weights(dtype, 1, 3, 3, 4), bias(dtype)
        made = operand(dtype, 1, 4, 4, 4)
    elif op == "BATCH_MATMUL":
        inputs, made = (operand(dtype, 1, 2, 3, 4), operand(dtype, 1, 2, 4, 5)), operand(dtype, 1, 2, 3, 5)
    elif op == "QUANTIZE":
        inputs, made = (x,), operand("int8")
    elif op == "DEQUANTIZE":
        inputs, made = (replace(x, zero_point=0),), operand("float32")
    else:
        inputs = (x,)
    return Operation(op, version, inputs, (made,))


ANY_AXES = {
    "MAXIMUM", "MINIMUM", "LESS", "CAST", "ABS", "EXP", "RSQRT", "SPLIT", "SLICE", "GATHER", "EMBEDDING_LOOKUP",
    "QUANTIZE",
}  # fmt: skip
"""Operations of "supported tensor rank: from 1" (or 2) in NeuralNetworksTypes.h."""
TAKEN = [row for row in TABLE.values() if row.nnapi]
TYPES = [(row, dtype, since) for row in TAKEN for since, kinds in row.types.items() for dtype in kinds.split()]


@pytest.mark.parametrize(("row", "dtype", "since"), TYPES, ids=lambda value: getattr(value, "op", value))
def test_an_operator_is_taken_from_its_types_feature_level_on(row: Row, dtype: str, since: int) -> None:
    made = example(row.op, dtype)
    since = max(since, 4) if row.op == "QUANTIZE" else since  # to int8
    for level in LEVELS:
        reason = refusal(made, level)
        assert (reason is None) == (level >= since), (level, reason)
        if reason is not None:
            assert f"feature level {3 if row.op == 'QUANTIZE' and level < 3 else since}" in reason


INT8 = {
    "ADD": 1, "MUL": 1, "SUB": 3, "MAXIMUM": 3, "MINIMUM": 3, "LESS": 3, "CAST": 4, "RELU": 1, "RELU6": 1,
    "LOGISTIC": 1, "RSQRT": 7, "MEAN": 3, "SOFTMAX": 1, "RESHAPE": 1, "TRANSPOSE": 2, "CONCATENATION": 1, "SPLIT": 4,
    "SLICE": 3, "STRIDED_SLICE": 2, "PAD": 3, "GATHER": 3, "FULLY_CONNECTED": 3, "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3,
    "BATCH_MATMUL": 6, "QUANTIZE": 4, "DEQUANTIZE": 3,
}  # fmt: skip
"""The least feature level at which `Validate` offers int8 and the header has it, signed or unsigned."""


def test_int8_is_taken_from_the_level_of_the_delegate_on_and_versions_are_the_delegates() -> None:
    found = {
        row.op: next(level for level in LEVELS if refusal(example(row.op, "int8"), level) is None)
        for row in TAKEN if "int8" in row.types_at(8)
    }  # fmt: skip
    assert found == INT8
    newest = {version: {row.op for row in TAKEN if row.version == version} for version in (1, 3, 5)}
    assert newest == {
        1: {"DIV", "CAST", "ABS", "EXP", "RESHAPE", "SUM", "EMBEDDING_LOOKUP"},
        3: {"SUB", "MAXIMUM", "MINIMUM", "SPLIT", "DEPTHWISE_CONV_2D"},
        5: {"FULLY_CONNECTED", "CONV_2D"},
    }
    assert {row.version for row in TAKEN} == {1, 2, 3, 5}


@pytest.mark.parametrize("row", TAKEN, ids=lambda row: row.op)
def test_a_newer_version_another_type_and_a_fifth_axis_are_refused(row: Row) -> None:
    dtype = next(iter(row.types.values())).split()[0]
    made = example(row.op, dtype)
    assert "and older" in str(refusal(replace(made, version=row.version + 1), 8))
    deep = replace(made, outputs=(replace(made.outputs[0], shape=(1, 1, 1, 1, 4)),))
    assert refusal(deep, 8) == (None if row.op in ANY_AXES else "more than 4 axes")
    judged = made.inputs[row.judged]
    assert judged is not None
    other = [replace(judged, dtype="float64") if k == row.judged else each for k, each in enumerate(made.inputs)]
    assert refusal(replace(made, inputs=tuple(other)), 8) == "it is not for float64"


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: row.op)
def test_every_row_names_its_source_and_what_is_never_taken_says_why(row: Row) -> None:
    assert row.source.startswith("Validate")
    assert bool(row.why) != bool(row.nnapi)
    if not row.nnapi:
        assert refusal(Operation(row.op, 1, (operand(),), (operand(),)), 8) == row.why
    assert set(row.types) <= set(LEVELS)


REFUSED = {
    "weights per row": (
        Operation("FULLY_CONNECTED", 5, (operand("int8"), matrix("int8", scales=8), bias("int8")), (operand("int8"),)),
        8, "a scale per row",
    ),
    "hybrid at level 2": (
        Operation("FULLY_CONNECTED", 3, (operand(), matrix("int8"), None), (operand(),)), 2, "feature level 3",
    ),
    "axes kept at level 3": (
        Operation("FULLY_CONNECTED", 5, (operand(), matrix("float32"), None), (operand(),), {"keepNumDims": 1}),
        3, "feature level 4",
    ),
    "groups": (
        replace(example("CONV_2D", "float32"), inputs=(operand("float32", 1, 6, 6, 8), kernel("float32"), bias(""))),
        8, "an operand that GROUPED_CONV_2D must have",
    ),
    "a bias around another zero": (
        Operation("FULLY_CONNECTED", 4, (operand("int8"), matrix("int8"), replace(bias("int8"), zero_point=1)),
                  (operand("int8"),)),
        8, "its bias's scale",
    ),
    "a bias of one scale by channel": (
        replace(
            example("CONV_2D", "int8"), inputs=(operand("int8", 1, 6, 6, 4), kernel("int8", scales=8), bias("int8")),
        ),
        8, "its bias's scale",
    ),
    "a vector by a matrix": (
        Operation("FULLY_CONNECTED", 1, (operand("float32", 4), matrix("float32"), None), (operand(),)), 8,
        "less than two axes",
    ),
    "int4 weights": (
        Operation("FULLY_CONNECTED", 5, (operand(), replace(matrix("float32"), dtype="int4"), None), (operand(),)),
        8, "its weights are int4",
    ),
    "int8 weights around another zero": (
        Operation("FULLY_CONNECTED", 3, (operand(), replace(matrix("int8"), zero_point=1), None), (operand(),)),
        8, "zero point is not 0",
    ),
    "an int8 kernel at level 2": (
        replace(example("CONV_2D", "float32"), inputs=(operand("float32", 1, 6, 6, 4), kernel("int8"), bias(""))),
        2, "feature level 3",
    ),
    "an int8 kernel of every channel": (
        replace(
            example("DEPTHWISE_CONV_2D", "float32"),
            inputs=(operand("float32", 1, 6, 6, 4), weights("int8", 1, 3, 3, 4), bias("")),
        ),
        8, "its weights are int8",
    ),
    "a product of a small scale": (product(1 / 256, 1 / 256, 1 / 65536), 8, "not above the product"),
    "a fused activation of int32": (
        replace(example("ADD", "int32"), options={"fusedActivationFunction": 1}), 8, "no fused activation",
    ),
    "a fused activation of what is joined": (
        replace(example("CONCATENATION", "float32"), options={"fusedActivationFunction": 1}), 8, "fused activation",
    ),
    "scales that are joined at level 2": (
        replace(example("CONCATENATION", "int8"), outputs=(replace(operand("int8"), scale=0.5),)), 2,
        "feature level 3",
    ),
    "new axes of a slice": (
        replace(example("STRIDED_SLICE", "float32"), options={"newAxisMask": 1}), 8, "neither its ellipsis nor",
    ),
    "an ellipsis of a slice": (
        replace(example("STRIDED_SLICE", "float32"), options={"ellipsisMask": 1}), 8, "neither its ellipsis nor",
    ),
    "a table by rows that is gathered": (
        Operation("GATHER", 2, (matrix("int8", scales=8), operand("int32", 1)), (operand("int8"),)), 8,
        "input 0 has a scale per channel",
    ),
    "a number alone": (Operation("RSQRT", 1, (SCALAR,), (operand(),)), 8, "input 0 has no axis"),
    "a number made": (
        Operation("ADD", 1, (SCALAR, SCALAR), (replace(SCALAR, constant=False),)), 8, "its output has no axis",
    ),
    "dilation at level 2": (
        replace(example("CONV_2D", "float32"), options={"dilationHFactor": 2, "dilationWFactor": 1}),
        2, "dilation needs feature level 3",
    ),
    "dilation of every channel at level 2": (
        replace(example("DEPTHWISE_CONV_2D", "float32"), options={"dilationHFactor": 2, "dilationWFactor": 1}),
        2, "dilation needs feature level 3",
    ),
    "batches that broadcast": (
        Operation("BATCH_MATMUL", 1, (operand("float32", 1, 4, 3, 4), operand("float32", 1, 2, 4, 5)), (operand(),)),
        8, "broadcasts none",
    ),
    "vectors": (
        Operation("BATCH_MATMUL", 1, (operand("float32", 3), operand("float32", 3)), (operand(),)), 8, "two axes",
    ),
    "an index without axis": (
        Operation("GATHER", 1, (operand(), Operand("int32", (), constant=False)), (operand(),)), 8,
        "input 1 has no axis",
    ),
    "a mean of everything": (
        replace(example("MEAN", "float32"), outputs=(Operand("float32", (), constant=False),)), 8, "its output has no",
    ),
    "a softmax of three axes at level 2": (
        Operation("SOFTMAX", 1, (operand("float32", 1, 2, 3),), (operand("float32", 1, 2, 3),)), 2, "feature level 3",
    ),
    "a cast to bool": (Operation("CAST", 1, (operand(),), (operand("bool"),)), 8, "it makes bool"),
    "a cast to int8": (Operation("CAST", 1, (operand(),), (operand("int8"),)), 8, "it makes int8 of float32"),
    "a cast of int8": (Operation("CAST", 1, (operand("int8"),), (operand(),)), 8, "it makes float32 of int8"),
    "int8 around another zero at level 3": (
        Operation("DEQUANTIZE", 2, (operand("int8"),), (operand(),)), 3, "feature level 4",
    ),
    "float16 that is computed": (Operation("DEQUANTIZE", 3, (operand("float16"),), (operand(),)), 8, "not for float16"),
    "an int8 table": (
        Operation("EMBEDDING_LOOKUP", 4, (operand("int32", 1), matrix("int8", scales=8)), (operand(),)),
        8, "not for int8",
    ),
    "an operator of no row": (Operation("CUMSUM", 1, (operand(),), (operand(),)), 8, "does not know it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_limit_is_named(name: str) -> None:
    made, level, reason = REFUSED[name]
    assert reason in str(refusal(made, level))


def changed(op: str, dtype: str, position: int, /, **fields: object) -> Operation:
    """An example with another input."""
    made = example(op, dtype)
    spoilt = made.inputs[position]
    assert spoilt is not None
    inputs = [replace(spoilt, **fields) if k == position else each for k, each in enumerate(made.inputs)]  # type: ignore[arg-type]
    return replace(made, inputs=tuple(inputs))


NUMBERS = {
    "MEAN": (1,), "RESHAPE": (1,), "TRANSPOSE": (1,), "PAD": (1,), "SPLIT": (0,), "STRIDED_SLICE": (1, 2, 3),
    "SLICE": (1, 2), "GATHER": (1,), "EMBEDDING_LOOKUP": (0,),
}  # fmt: skip
"""Inputs that say where and how much."""
COMPUTED = ("SLICE", "GATHER", "EMBEDDING_LOOKUP")
CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")
BIASED = ("FULLY_CONNECTED", *CONVOLUTIONS)
OF_ONE_TYPE = ("ADD", "MUL", "SUB", "DIV", "MAXIMUM", "MINIMUM", "LESS", "CONCATENATION", "BATCH_MATMUL")
OF_ONE_SCALE = ("RELU", "RELU6", "RESHAPE", "TRANSPOSE", "SLICE", "STRIDED_SLICE", "PAD", "GATHER", "SPLIT")
OTHER = (replace(operand("int8"), scale=0.5),)
SHARED = [
    *((changed(op, "float32", 1, dtype="bool"), "several types") for op in OF_ONE_TYPE),
    *(
        (replace(example(op, "float32"), options={"fusedActivationFunction": 4}), "fuses no such")
        for op in ("ADD", "MUL", "SUB", "DIV", *BIASED)
    ),
    *(
        (replace(example(op, "int32"), options={"fusedActivationFunction": 1}), "no fused activation")
        for op in ("ADD", "MUL", "SUB")
    ),
    *((replace(example(op, "int8"), outputs=OTHER), "not the input's") for op in OF_ONE_SCALE),
    *((replace(example(op, "int8"), outputs=OTHER), "not 1/256") for op in ("SOFTMAX", "LOGISTIC")),
    *(
        (changed(op, "float32", k, dtype="int16"), f"input {k} is int16, not int32")
        for op, positions in NUMBERS.items() for k in positions
    ),
    *(
        (changed(op, "float32", k, constant=False), f"input {k} must be a constant")
        for op, positions in NUMBERS.items() for k in positions if op not in COMPUTED
    ),
    *((changed(op, "float32", 1, shape=(), constant=False), "must be a constant") for op in ("MAXIMUM", "MINIMUM")),
    *((replace(example(op, "float32"), inputs=example(op, "float32").inputs[:2]), "no bias") for op in CONVOLUTIONS),
    *((changed(op, "int8", 2, dtype="float32"), "its bias is float32, not int32") for op in BIASED),
    *((changed(op, "float32", 2, dtype="int32"), "its bias is int32, not float32") for op in BIASED),
    *((changed(op, "int8", 2, scale=1 / 256), "its bias's scale") for op in BIASED),
    *(
        (changed(op, "int8", 1, scales=8, axis=3 - axis), f"not along axis {axis}")
        for op, axis in zip(CONVOLUTIONS, (0, 3), strict=True)
    ),
]  # fmt: skip


@pytest.mark.parametrize(("made", "reason"), SHARED, ids=lambda value: getattr(value, "op", None))
def test_a_limit_is_named_that_operators_share(made: Operation, reason: str) -> None:
    assert reason in str(refusal(made, 8))


def test_numbers_without_axis_and_scales_by_channel_are_taken_where_the_header_allows_them() -> None:
    for op in ("ADD", "MUL", "SUB", "DIV", "MAXIMUM", "MINIMUM", "LESS"):
        for k in (0, 1):
            assert refusal(changed(op, "float32", k, shape=(), constant=True), 3) is None, (op, k)
    for op, k in (("MEAN", 1), ("SPLIT", 0)):
        assert refusal(changed(op, "float32", k, shape=()), 3) is None, op
    for op in COMPUTED:
        assert refusal(changed(op, "float32", NUMBERS[op][0], constant=False), 3) is None, op
    for op, axis in zip(CONVOLUTIONS, (0, 3), strict=True):
        by_channel = changed(op, "int8", 1, scales=8, axis=axis)
        image, kernels, _ = by_channel.inputs
        assert refusal(replace(by_channel, inputs=(image, kernels, replace(bias("int8"), scales=8))), 3) is None, op
    table = Operation("DEQUANTIZE", 2, (matrix("int8", scales=8),), (operand("float32", 8, 4),))
    assert (refusal(table, 2), refusal(table, 3)) == ("int8 needs feature level 3", None)
    averaged = replace(example("MEAN", "int8"), outputs=OTHER)
    assert refusal(averaged, 3) is None


def test_what_is_within_the_limits_of_a_higher_level_is_taken_there() -> None:
    for name, (made, _, reason) in REFUSED.items():
        if "feature level" in reason:
            assert refusal(made, 8) is None, name
    widened = Operation("DEQUANTIZE", 3, (operand("float16", constant=True),), (operand(),))
    assert refusal(widened, 1) is None
    hybrid = Operation("FULLY_CONNECTED", 3, (operand(), matrix("int8"), None), (operand(),))
    assert refusal(hybrid, 3) is None
    by_row = replace(hybrid, inputs=(operand(), matrix("int8", scales=8), None))
    assert refusal(by_row, 3) is None


def test_whoever_reads_a_widened_constant_is_judged_by_float16() -> None:
    half = operand("float16", 8, 4, constant=True)
    taken = (
        Operation("FULLY_CONNECTED", 1, (operand(), half, None), (operand(),)),
        Operation("GATHER", 1, (half, operand("int32", 1)), (operand(),)),
        Operation("MUL", 1, (operand(), half), (operand(),)),
    )
    assert [refusal(op, 4) for op in taken] == [None] * 3
    turned = Operation("TRANSPOSE", 1, (half, operand("int32", 2, constant=True)), (operand(),))
    joined = Operation("CONCATENATION", 1, (half, half), (operand(),))
    assert (refusal(turned, 2), refusal(joined, 1)) == (None, None)
    assert refusal(replace(turned, inputs=(operand("float16"), turned.inputs[1])), 2) is not None
    assert refusal(Operation("MUL", 1, (half, operand()), (operand(),)), 4) == "it is not for float16"
    lookup = Operation("EMBEDDING_LOOKUP", 1, (operand("int32", 1), half), (operand(),))
    assert refusal(lookup, 8) == "it is not for float16"


def test_multiply_accumulates_are_counted_as_they_are_done() -> None:
    turned = Operation(
        "BATCH_MATMUL", 1, (operand("float32", 1, 2, 4, 3), operand("float32", 1, 2, 4, 5)),
        (operand("float32", 1, 2, 3, 5),), {"adjX": 1},
    )  # fmt: skip
    counts = {
        "FULLY_CONNECTED": 4 * 4,
        "CONV_2D": 4 * 4 * 8 * (3 * 3 * 4),
        "DEPTHWISE_CONV_2D": 4 * 4 * 4 * (3 * 3),
        "BATCH_MATMUL": 2 * 3 * 5 * 4,
        "ADD": 0,
        "RELU": 0,
    }
    assert {op: macs(example(op, "float32")) for op in counts} == counts
    assert macs(turned) == 2 * 3 * 5 * 4


def test_every_operator_that_we_write_has_a_row() -> None:
    text = "".join(
        (BACKENDS / f"{name}.py").read_text() for name in ("litert_ops", "litert_lowering", "litert_nnapi_ops")
    )
    written = set(re.findall(r'(?:emit|emit_many|binary)\(\s*"([A-Z0-9_]+)"', text))
    assert {"FULLY_CONNECTED", "SPLIT", "ADD", "DEPTHWISE_CONV_2D"} <= written
    assert written <= set(TABLE)
