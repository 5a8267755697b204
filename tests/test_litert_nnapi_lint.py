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


def matrix(dtype: str, *, scales: int = 0) -> Operand:
    return operand(dtype, 8, 4, constant=True, scales=scales)


def kernel(dtype: str, depth: int = 4, *, scales: int = 0) -> Operand:
    return operand(dtype, 8, 3, 3, depth, constant=True, scales=scales)


def bias(dtype: str) -> Operand:
    return Operand("int32" if dtype == "int8" else "float32", (8,), constant=True)


def example(op: str, dtype: str) -> Operation:
    """An operation that is within every limit but that of its type."""
    version, x, index = 1, operand(dtype), operand("int32", 1, constant=True)
    made = operand(dtype)
    if op in ("ADD", "MUL", "SUB", "DIV", "MAXIMUM", "MINIMUM", "CONCATENATION"):
        inputs: tuple[Operand | None, ...] = x, x
    elif op == "LESS":
        inputs, made = (x, x), operand("bool")
    elif op == "CAST":
        inputs, made = (x,), operand("float32")
    elif op in ("MEAN", "RESHAPE", "TRANSPOSE", "PAD", "GATHER"):
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
        inputs = operand(dtype, 1, 6, 6, 4), operand(dtype, 1, 3, 3, 4, constant=True), bias(dtype)
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


@pytest.mark.parametrize("row", TAKEN, ids=lambda row: row.op)
def test_a_newer_version_another_type_and_a_fifth_axis_are_refused(row: Row) -> None:
    dtype = next(iter(row.types.values())).split()[0]
    made = example(row.op, dtype)
    assert "and older" in str(refusal(replace(made, version=row.version + 1), 8))
    deep = replace(made.outputs[0], shape=(1, 1, 1, 1, 4))
    assert refusal(replace(made, outputs=(deep,)), 8) == "more than 4 axes"
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
    "a bias of another type": (
        Operation("FULLY_CONNECTED", 4, (operand("int8"), matrix("int8"), bias("float32")), (operand("int8"),)),
        8, "not int32",
    ),
    "a convolution without bias": (
        Operation("CONV_2D", 1, (operand("float32", 1, 6, 6, 4), kernel("float32")), (operand(),)), 8, "no bias",
    ),
    "a kernel per channel of another axis": (
        replace(
            example("CONV_2D", "int8"),
            inputs=(operand("int8", 1, 6, 6, 4), replace(kernel("int8", scales=4), axis=3), bias("int8")),
        ),
        8, "not along axis 0",
    ),
    "groups at level 2": (
        replace(example("CONV_2D", "float32"), inputs=(operand("float32", 1, 6, 6, 8), kernel("float32"), bias(""))),
        2, "groups need feature level 3",
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
    "a hybrid of two activations": (
        Operation("BATCH_MATMUL", 1, (operand("float32", 2, 3), operand("int8", 3, 2)), (operand(),)),
        8, "several types",
    ),
    "vectors": (
        Operation("BATCH_MATMUL", 1, (operand("float32", 3), operand("float32", 3)), (operand(),)), 8, "two axes",
    ),
    "a shape that is computed": (
        Operation("RESHAPE", 1, (operand(), operand("int32", 1)), (operand(),)), 8, "must be a constant",
    ),
    "an order that is computed": (
        Operation("TRANSPOSE", 1, (operand(), operand("int32", 1)), (operand(),)), 8, "must be a constant",
    ),
    "an index without axis": (
        Operation("GATHER", 1, (operand(), Operand("int32", (), constant=False)), (operand(),)), 8, "no axis",
    ),
    "a mean of everything": (
        replace(example("MEAN", "float32"), outputs=(Operand("float32", (), constant=False),)), 8, "its output has no",
    ),
    "another scale after a reshape": (
        replace(example("RESHAPE", "int8"), outputs=(replace(operand("int8"), scale=0.5),)), 8, "not the input's",
    ),
    "a softmax of another scale": (
        replace(example("SOFTMAX", "int8"), outputs=(replace(operand("int8"), scale=0.5),)), 8, "not 1/256",
    ),
    "a softmax of three axes at level 2": (
        Operation("SOFTMAX", 1, (operand("float32", 1, 2, 3),), (operand("float32", 1, 2, 3),)), 2, "feature level 3",
    ),
    "a cast to bool": (Operation("CAST", 1, (operand(),), (operand("bool"),)), 8, "it makes bool"),
    "a cast to int8 at level 3": (Operation("CAST", 1, (operand(),), (operand("int8"),)), 3, "it makes int8"),
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


def test_what_is_within_the_limits_of_a_higher_level_is_taken_there() -> None:
    for name, (made, _, reason) in REFUSED.items():
        if "feature level" in reason or "int8 at level" in name:
            assert refusal(made, 8) is None, name
    widened = Operation("DEQUANTIZE", 3, (operand("float16", constant=True),), (operand(),))
    assert refusal(widened, 1) is None
    hybrid = Operation("FULLY_CONNECTED", 3, (operand(), matrix("int8"), None), (operand(),))
    assert refusal(hybrid, 3) is None


def test_whoever_reads_a_widened_constant_is_judged_by_float16() -> None:
    half = operand("float16", 8, 4, constant=True)
    taken = (
        Operation("FULLY_CONNECTED", 1, (operand(), half, None), (operand(),)),
        Operation("GATHER", 1, (half, operand("int32", 1)), (operand(),)),
        Operation("MUL", 1, (operand(), half), (operand(),)),
    )
    assert [refusal(op, 4) for op in taken] == [None] * 3
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
