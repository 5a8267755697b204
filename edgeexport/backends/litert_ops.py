"""The op table of LiteRT: the dialect as TensorFlow Lite's built-in operators, float32 and int32, at most four axes.

    MatMul by a weight              ->  FULLY_CONNECTED, int4 and int8 weights as they are (dynamic range)
    ... whose blocks have offsets   ->  another one, of the sums of the input's blocks by the offsets, and ADD
    Gather from a weight            ->  EMBEDDING_LOOKUP on the same bytes: a tied table is stored once
    Attention                       ->  heads that share a key become rows of one BATCH_MATMUL; one mask for all layers
    TensorScatter                   ->  DYNAMIC_UPDATE_SLICE, in place where the caller binds one buffer to both sides
    RotaryEmbedding                 ->  one lookup of the tables for all layers, then MUL and ADD

Source of versions and limits: LiteRT 2.3, op_version.cc and the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexport.backends.optable import OpTable
from edgeexport.canonical.dialect import Linear, attribute, constant, linear, stored

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeexport.backends.litert_file import Tensor
    from edgeexport.backends.litert_lowering import Lowering
    from edgeexport.core import Array, Format

OPS = OpTable("litert")
INT8_VERSION = 12
"""Of FULLY_CONNECTED by int8 with a scale per row."""
HIDDEN = -1e9
"""What is added to the score of a key that must not be attended to: exp of it is 0 in float32, and no infinity that
would make NaN of a row."""


def _forward(node: ir.Node) -> str | None:
    steps = constant(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    backward = steps is not None and (np.asarray(steps.numpy()) < 1).any()
    return "a step is negative" if backward else None


def _fixed(node: ir.Node) -> str | None:
    """Sizes may come from constants and shapes, which are all known."""
    waiting = [value for value in node.inputs if value is not None]
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if producer is None and constant(value) is None:
            return f"its length depends on {value.name}, an input, and shapes are fixed"
        if producer is not None and producer.op_type != "Shape":
            waiting += [each for each in producer.inputs if each is not None]
    return None


def weighted(node: ir.Node) -> str | None:
    """A convolution's kernel is a weight."""
    return None if stored(node.inputs[1]) is not None else "its kernel is no weight"


def unmasked(node: ir.Node) -> str | None:
    """Attention takes no mask of its own here, and no cache but the one that TensorScatter wrote."""
    taken = [k for k in (3, 4, 5) if k < len(node.inputs) and node.inputs[k] is not None]
    return f"input {taken[0]} is given: masks and caches of its own are not taken" if taken else None


# arithmetic


@OPS.lower("Add", note="ADD")
def add(node: ir.Node, ctx: Lowering) -> None:
    """Add(A, B)"""
    if node.outputs[0] not in ctx.tensors:  # else a bias that its multiplication took in
        ctx.tensors[node.outputs[0]] = ctx.binary("ADD", ctx.value(node.inputs[0]), ctx.value(node.inputs[1]))


@OPS.lower("Sub", note="SUB")
def sub(node: ir.Node, ctx: Lowering) -> None:
    """Sub(A, B)"""
    ctx.tensors[node.outputs[0]] = ctx.binary("SUB", ctx.value(node.inputs[0]), ctx.value(node.inputs[1]))


@OPS.lower("Mul", note="MUL")
def mul(node: ir.Node, ctx: Lowering) -> None:
    """Mul(A, B)"""
    ctx.tensors[node.outputs[0]] = ctx.binary("MUL", ctx.value(node.inputs[0]), ctx.value(node.inputs[1]))


@OPS.lower("Sigmoid", note="LOGISTIC")
def sigmoid(node: ir.Node, ctx: Lowering) -> None:
    """Sigmoid(X)"""
    x = ctx.value(node.inputs[0])
    ctx.tensors[node.outputs[0]] = ctx.graph.emit("LOGISTIC", [x], x.shape)


@OPS.lower("Gelu", note="GELU")
def gelu(node: ir.Node, ctx: Lowering) -> None:
    """Gelu(X)"""
    x = ctx.value(node.inputs[0])
    ctx.tensors[node.outputs[0]] = ctx.graph.emit("GELU", [x], x.shape, "GeluOptions", approximate=False)


@OPS.lower("Clip", note="RELU, RELU6 where the bounds are theirs, else MAXIMUM and MINIMUM")
def clip(node: ir.Node, ctx: Lowering) -> None:
    """Clip(input, min, max)"""
    x = ctx.value(node.inputs[0])
    bounds = [
        None if (found := ctx.known(value)) is None else float(found) for value in (*node.inputs[1:], None, None)[:2]
    ]
    named = {(0.0, 6.0): "RELU6", (0.0, 1.0): "RELU_0_TO_1"}.get((bounds[0] or 0.0, bounds[1] or 0.0))
    if bounds == [0.0, None]:
        x = ctx.graph.emit("RELU", [x], x.shape)
    elif bounds[0] == 0.0 and named is not None:
        x = ctx.graph.emit(named, [x], x.shape)
    else:
        x = x if bounds[0] is None else ctx.binary("MAXIMUM", x, ctx.scalar(bounds[0]))
        x = x if bounds[1] is None else ctx.binary("MINIMUM", x, ctx.scalar(bounds[1]))
    ctx.tensors[node.outputs[0]] = x


@OPS.lower("Cast", note="CAST; nothing for a weight or an int64 that is an int32 here")
def cast(node: ir.Node, ctx: Lowering) -> None:
    """Cast(input)"""
    if ctx.weight_of(node.outputs[0]) is not None:
        return  # whoever reads the weight asks for it itself
    x = ctx.value(node.inputs[0])
    dtype = {1: "float32", 6: "int32", 7: "int32", 9: "bool"}[int(attribute(node, "to", 1))]
    ctx.tensors[node.outputs[0]] = (
        x if x.dtype == dtype else ctx.graph.emit("CAST", [x], x.shape, "CastOptions", dtype=dtype)
    )


# norms


def _mean(ctx: Lowering, x: Tensor) -> Tensor:
    """Over the last axis, kept."""
    last = ctx.integers(len(x.shape) - 1)
    return ctx.graph.emit("MEAN", [x, last], (*x.shape[:-1], 1), "ReducerOptions", keepDims=True)


def _scaled(ctx: Lowering, x: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon)"""
    power = ctx.binary("ADD", _mean(ctx, ctx.binary("MUL", x, x)), ctx.scalar(epsilon))
    return ctx.binary("MUL", x, ctx.graph.emit("RSQRT", [power], power.shape))


@OPS.lower("RMSNormalization", note="MUL, MEAN, ADD, RSQRT, MUL, MUL")
def rms_norm(node: ir.Node, ctx: Lowering) -> None:
    """RMSNormalization(X, scale)"""
    normal = _scaled(ctx, ctx.value(node.inputs[0]), attribute(node, "epsilon", 1e-5))
    ctx.tensors[node.outputs[0]] = ctx.binary("MUL", normal, ctx.value(node.inputs[1]))


@OPS.lower("LayerNormalization", note="MEAN, SUB, then as RMSNormalization, and ADD")
def layer_norm(node: ir.Node, ctx: Lowering) -> None:
    """LayerNormalization(X, Scale, B)"""
    x = ctx.value(node.inputs[0])
    normal = _scaled(ctx, ctx.binary("SUB", x, _mean(ctx, x)), attribute(node, "epsilon", 1e-5))
    made = ctx.binary("MUL", normal, ctx.value(node.inputs[1]))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        made = ctx.binary("ADD", made, ctx.value(node.inputs[2]))
    ctx.tensors[node.outputs[0]] = made


@OPS.lower("BatchNormalization", note="MUL and ADD by vectors of the channels")
def batch_norm(node: ir.Node, ctx: Lowering) -> None:
    """BatchNormalization(X, scale, B, input_mean, input_var)"""
    x, scale, bias, mean, variance = (ctx.value(value) for value in node.inputs)
    power = ctx.binary("ADD", variance, ctx.scalar(attribute(node, "epsilon", 1e-5)))
    factor = ctx.binary("MUL", scale, ctx.graph.emit("RSQRT", [power], power.shape))
    rest = ctx.binary("SUB", bias, ctx.binary("MUL", mean, factor))
    shape = (1, x.shape[1], *[1] * (len(x.shape) - 2))
    scaled = ctx.binary("MUL", x, ctx.reshape(factor, shape))
    ctx.tensors[node.outputs[0]] = ctx.binary("ADD", scaled, ctx.reshape(rest, shape))


# shapes


@OPS.lower("Shape", note="known: shapes are fixed")
def shape(node: ir.Node, ctx: Lowering) -> None:
    """Shape(data)"""
    sizes = ctx.value(node.inputs[0]).shape
    start, end = int(attribute(node, "start", 0)), attribute(node, "end", None)
    ctx.learn(node.outputs[0], np.array(sizes[start : None if end is None else int(end)], np.int64))


@OPS.lower("Range", note="known: shapes are fixed", limit=_fixed)
def range_(node: ir.Node, ctx: Lowering) -> None:
    """Range(start, limit, delta)"""
    start, limit, delta = (ctx.numbers(node, k)[0] for k in range(3))
    ctx.learn(node.outputs[0], np.arange(start, limit, delta, dtype=np.int64))


@OPS.lower("Reshape", note="RESHAPE")
def reshape(node: ir.Node, ctx: Lowering) -> None:
    """Reshape(data, shape)"""
    x, wanted = ctx.value(node.inputs[0]), ctx.numbers(node, 1)
    if not attribute(node, "allowzero", 0):
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    if -1 in wanted:
        rest = int(np.prod([size for size in wanted if size != -1], dtype=np.int64))
        wanted[wanted.index(-1)] = int(np.prod(x.shape, dtype=np.int64)) // rest
    ctx.tensors[node.outputs[0]] = ctx.reshape(x, wanted)


@OPS.lower("Squeeze", note="RESHAPE")
def squeeze(node: ir.Node, ctx: Lowering) -> None:
    """Squeeze(data, axes)"""
    x = ctx.value(node.inputs[0])
    given = len(node.inputs) > 1 and node.inputs[1] is not None
    axes = [axis % len(x.shape) for axis in ctx.numbers(node, 1)] if given else None
    kept = [size for axis, size in enumerate(x.shape) if (axis not in axes if axes is not None else size != 1)]
    ctx.tensors[node.outputs[0]] = ctx.reshape(x, kept)


@OPS.lower("Unsqueeze", note="RESHAPE")
def unsqueeze(node: ir.Node, ctx: Lowering) -> None:
    """Unsqueeze(data, axes)"""
    x, axes = ctx.value(node.inputs[0]), ctx.numbers(node, 1)
    sizes = list(x.shape)
    for axis in sorted(axis % (len(sizes) + len(axes)) for axis in axes):
        sizes.insert(axis, 1)
    ctx.tensors[node.outputs[0]] = ctx.reshape(x, sizes)


@OPS.lower("Transpose", note="TRANSPOSE, or RESHAPE where only axes of size 1 move")
def transpose(node: ir.Node, ctx: Lowering) -> None:
    """Transpose(data)"""
    if ctx.weight_of(node.inputs[0]) is not None:
        return  # a multiplication takes its weight in rows, as it is stored
    x = ctx.value(node.inputs[0])
    ctx.tensors[node.outputs[0]] = ctx.transpose(x, attribute(node, "perm", range(len(x.shape))[::-1]))


@OPS.lower("Concat", note="CONCATENATION")
def concat(node: ir.Node, ctx: Lowering) -> None:
    """Concat(inputs...)"""
    parts = [ctx.value(value) for value in node.inputs]
    ctx.tensors[node.outputs[0]] = ctx.concat(parts, int(attribute(node, "axis", 0)) % len(parts[0].shape))


@OPS.lower("Split", note="SPLIT into equal parts, else one SLICE each")
def split(node: ir.Node, ctx: Lowering) -> None:
    """Split(input, split)"""
    x = ctx.value(node.inputs[0])
    axis = int(attribute(node, "axis", 0)) % len(x.shape)
    parts = len(node.outputs)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        sizes = ctx.numbers(node, 1)
    else:
        most = -(-x.shape[axis] // parts)
        sizes = [min(most, x.shape[axis] - most * k) for k in range(parts)]
    if len(set(sizes)) == 1:
        shape = [sizes[0] if k == axis else size for k, size in enumerate(x.shape)]
        made = ctx.graph.emit_many(
            "SPLIT", [ctx.graph.constant(np.array(axis, np.int32)), x], [shape] * parts, "SplitOptions",
            dtype=x.dtype, numSplits=parts,
        )  # fmt: skip
        ctx.tensors.update(zip(node.outputs, made, strict=True))
        return
    start = 0
    for output, size in zip(node.outputs, sizes, strict=True):
        ctx.tensors[output] = ctx.slice(x, axis, start, start + size)
        start += size


@OPS.lower("Slice", note="SLICE, or STRIDED_SLICE where steps are larger", limit=_forward)
def slice_(node: ir.Node, ctx: Lowering) -> None:
    """Slice(data, starts, ends, axes, steps)"""
    x = ctx.value(node.inputs[0])
    starts, ends = ctx.numbers(node, 1), ctx.numbers(node, 2)
    axes = ctx.numbers(node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else range(len(starts))
    steps = ctx.numbers(node, 4) if len(node.inputs) > 4 and node.inputs[4] is not None else [1] * len(starts)
    ranges = [range(size) for size in x.shape]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        ranges[axis] = range(x.shape[axis])[start:end:step]
    sizes = [len(each) for each in ranges]
    if sizes == list(x.shape) and all(each.step == 1 for each in ranges):
        ctx.tensors[node.outputs[0]] = x
        return
    begin = ctx.integers(*(each.start for each in ranges))
    if all(each.step == 1 for each in ranges):
        made = ctx.graph.emit("SLICE", [x, begin, ctx.integers(*sizes)], sizes, "SliceOptions", dtype=x.dtype)
    else:
        stop = ctx.integers(*(each.stop for each in ranges))
        made = ctx.graph.emit(
            "STRIDED_SLICE", [x, begin, stop, ctx.integers(*(each.step for each in ranges))], sizes,
            "StridedSliceOptions", dtype=x.dtype,
        )  # fmt: skip
    ctx.tensors[node.outputs[0]] = made


# weights


@OPS.lower("MatMul", note="FULLY_CONNECTED by a weight and by its blocks' offsets, BATCH_MATMUL of two activations")
def matmul(node: ir.Node, ctx: Lowering) -> None:
    """MatMul(A, B)"""
    found = linear(node)
    if found is None:
        x, y = ctx.value(node.inputs[0]), ctx.value(node.inputs[1])
        batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        sizes = (*batch, x.shape[-2], y.shape[-1])
        ctx.tensors[node.outputs[0]] = ctx.graph.emit("BATCH_MATMUL", [x, y], sizes, "BatchMatMulOptions")
        return
    if found.output in ctx.tensors:
        return  # made with its siblings
    members = _siblings(found, ctx)
    names = [str(member.weight.name) for member in members]
    x, fmt = ctx.value(found.input), ctx.format_of(names[0])
    weight = ctx.stack(names) if fmt.integer else ctx.float_weight(*names)
    biases = [bias_behind(member.output, ctx) for member in members]
    added = [name for name, _ in biases if name is not None]
    made = _multiplied(ctx, x, weight, ctx.float_weight(*added) if added else None, _linear_version(fmt))
    if fmt.shift:
        sums, offsets = ctx.block_sums(x, fmt.block), ctx.offsets(names)
        made = ctx.binary("ADD", made, _multiplied(ctx, sums, offsets, None, INT8_VERSION))
    start = 0
    for member, (_, output) in zip(members, biases, strict=True):
        rows = ctx.model.weights[str(member.weight.name)].shape[0]
        ctx.tensors[member.output] = ctx.tensors[output] = ctx.slice(made, len(made.shape) - 1, start, start + rows)
        start += rows


def _multiplied(ctx: Lowering, x: Tensor, weight: Tensor, bias: Tensor | None, version: int) -> Tensor:
    """x times the rows of a weight, and a bias."""
    return ctx.graph.emit(
        "FULLY_CONNECTED", [x, weight, bias], (*x.shape[:-1], weight.shape[0]), "FullyConnectedOptions",
        version=version, keepNumDims=True, asymmetricQuantizeInputs=False,
    )  # fmt: skip


def _siblings(found: Linear, ctx: Lowering) -> list[Linear]:
    """A multiplication by a shifted weight, and all others of the same input by weights of its format: one operator
    for all of them. Each one wakes the threads, and there are two where blocks have offsets."""

    def kind(each: Linear) -> tuple[Format, Format | None]:
        bias, _ = bias_behind(each.output, ctx)
        return ctx.format_of(str(each.weight.name)), None if bias is None else ctx.format_of(bias)

    def is_apart(each: Linear) -> bool:
        bias, _ = bias_behind(each.output, ctx)
        held = ctx.model.graph.graph.initializers
        return _read_once(each.weight) and (bias is None or _read_once(held[bias]))

    wanted = kind(found)
    if not wanted[0].shift or not is_apart(found):
        return [found]
    others = [linear(user) for user, _ in found.input.uses()]
    return [each for each in others if each is not None and kind(each) == wanted and is_apart(each)]


def _read_once(weight: ir.Value) -> bool:
    """Whether nothing else reads a weight, nor what it is cast or transposed to."""
    users = [user for user, _ in weight.uses()]
    read = len(users) == 1
    return read and (users[0].op_type not in ("Cast", "Transpose") or _read_once(users[0].outputs[0]))


def _linear_version(fmt: Format) -> int:
    """The least version of FULLY_CONNECTED, with the axes of its input kept, that takes this weight."""
    if not fmt.integer:
        return 5
    return 13 if fmt.block else INT8_VERSION if fmt.bits == 8 else 10


def bias_of(output: ir.Value, ctx: Lowering) -> tuple[Tensor | None, ir.Value]:
    """The bias that is added to a multiplication and to nothing else, and the sum; or None and the output itself."""
    name, added = bias_behind(output, ctx)
    return None if name is None else ctx.float_weight(name), added


def bias_behind(output: ir.Value, ctx: Lowering) -> tuple[str | None, ir.Value]:
    """As `bias_of`, the bias by its name."""
    users = [user for user, _ in output.uses()]
    if len(users) == 1 and users[0].op_type == "Add" and not output.is_graph_output():
        other = next((value for value in users[0].inputs if value is not output), None)
        name = ctx.weight_of(other)
        if name is not None and len(ctx.model.weights[name].shape) == 1 and not ctx.format_of(name).integer:
            return name, users[0].outputs[0]
    return None, output


@OPS.lower("Gather", note="EMBEDDING_LOOKUP from a weight, else GATHER")
def gather(node: ir.Node, ctx: Lowering) -> None:
    """Gather(data, indices)"""
    name = ctx.weight_of(node.inputs[0])
    indices = ctx.value(node.inputs[1])
    if name is None:
        x = ctx.value(node.inputs[0])
        axis = int(attribute(node, "axis", 0)) % len(x.shape)
        made = _pick(ctx, x, axis, indices, ctx.known(node.inputs[1]))
    else:
        made = _look_up(ctx, name, indices)
    ctx.tensors[node.outputs[0]] = made


def _pick(ctx: Lowering, x: Tensor, axis: int, indices: Tensor, known: Array | None) -> Tensor:
    """Slices of an activation along an axis: a SLICE for one that is known; GATHER takes a vector of them, for the GPU
    delegate knows no other."""
    sizes = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    if known is not None:  # ONNX counts from the end, too
        known = known % x.shape[axis]
        if known.size == 1:
            at = int(known.reshape(()))
            return ctx.reshape(ctx.slice(x, axis, at, at + 1), sizes)
        indices = ctx.graph.constant(known.astype(np.int32))
    count = int(np.prod(indices.shape, dtype=np.int64))
    flat = ctx.reshape(indices, (count,))
    picked = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    return ctx.reshape(ctx.graph.emit("GATHER", [x, flat], picked, "GatherOptions", dtype=x.dtype, axis=axis), sizes)


def _look_up(ctx: Lowering, name: str, indices: Tensor) -> Tensor:
    """Rows of a weight as float32."""
    table, fmt = ctx.weight(name), ctx.format_of(name)
    count = int(np.prod(indices.shape, dtype=np.int64))
    flat = ctx.reshape(indices, (count,))
    if fmt.integer:
        rows = ctx.graph.emit("EMBEDDING_LOOKUP", [flat, table], (count, *table.shape[1:]), version=4)
    elif fmt.bits == 32:
        rows = ctx.graph.emit("EMBEDDING_LOOKUP", [flat, table], (count, *table.shape[1:]))
    else:
        half = ctx.graph.emit(
            "GATHER", [table, flat], (count, *table.shape[1:]), "GatherOptions", dtype="float16", axis=0
        )
        rows = ctx.widened(half)
    return ctx.reshape(rows, (*indices.shape, *table.shape[1:]))


@OPS.lower("Conv", note="CONV_2D between two TRANSPOSEs, the kernel stored as it wants it", limit=weighted)
def conv(node: ir.Node, ctx: Lowering) -> None:
    """Conv(X, W, B)"""
    convolve(node, ctx, depthwise=False)


@dataclass(frozen=True)
class Sliding:
    """How a convolution's window goes over [batch, height, width, channels], of height 1 where it goes over time."""

    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]
    """Above, left, below, right."""

    @classmethod
    def of(cls, node: ir.Node, axes: int) -> Sliding:
        """As a Conv over one or two axes of places says."""
        strides, dilations, pads = (
            list(attribute(node, key, [fill] * count)) for key, fill, count in
            (("strides", 1, axes), ("dilations", 1, axes), ("pads", 0, 2 * axes))
        )  # fmt: skip
        if axes == 1:
            strides, dilations, pads = [1, *strides], [1, *dilations], [0, pads[0], 0, pads[1]]
        return cls((strides[0], strides[1]), (dilations[0], dilations[1]), (pads[0], pads[1], pads[2], pads[3]))

    def padded(self, x: Tensor, ctx: Lowering) -> Tensor:
        """A picture with what is around it."""
        if not any(self.pads):
            return x
        above, left, below, right = self.pads
        around = np.array([[0, 0], [above, below], [left, right], [0, 0]], np.int32)
        sizes = [size + int(extra) for size, extra in zip(x.shape, around.sum(1), strict=True)]
        return ctx.graph.emit("PAD", [x, ctx.graph.constant(around)], sizes, "PadOptions", dtype=x.dtype)

    def places(self, x: Tensor, window: Sequence[int]) -> list[int]:
        """Height and width of what comes out of a padded picture."""
        return [
            (x.shape[k + 1] - self.dilations[k] * (size - 1) - 1) // self.strides[k] + 1
            for k, size in enumerate(window)
        ]

    def settings(self, ctx: Lowering) -> dict[str, Any]:
        """The fields that both operators' options have."""
        return {
            "padding": ctx.graph.file.schema.Padding.VALID, "strideH": self.strides[0], "strideW": self.strides[1],
            "dilationHFactor": self.dilations[0], "dilationWFactor": self.dilations[1],
        }  # fmt: skip


def convolve(node: ir.Node, ctx: Lowering, *, depthwise: bool) -> None:
    """A convolution; with `depthwise` one with a group for each channel by the operator that is made for it, which
    wants its kernel with the channels last."""
    x, name = ctx.value(node.inputs[0]), ctx.weight_of(node.inputs[1])
    assert name is not None, "check has refused a kernel that is no weight"
    kernel = ctx.kernel(name)
    axes = len(x.shape) - 2
    if axes == 1:
        x = ctx.reshape(x, (*x.shape[:2], 1, x.shape[2]))
    x = ctx.transpose(x, (0, 2, 3, 1))
    sliding = Sliding.of(node, axes)
    x = sliding.padded(x, ctx)
    outputs, height, width, depth = kernel.shape
    bias = len(node.inputs) > 2 and node.inputs[2] is not None
    added = ctx.value(node.inputs[2]) if bias else ctx.graph.constant(np.zeros(outputs, np.float32))
    settings = sliding.settings(ctx)
    shape = (x.shape[0], *sliding.places(x, (height, width)), outputs)
    if depthwise and depth == 1 and x.shape[3] > 1 and int(attribute(node, "group", 1)) == x.shape[3]:
        turned = ctx.transpose(kernel, (3, 1, 2, 0))
        made = ctx.graph.emit(
            "DEPTHWISE_CONV_2D", [x, turned, added], shape, "DepthwiseConv2DOptions",
            version=1 if sliding.dilations == (1, 1) else 2, depthMultiplier=outputs // x.shape[3], **settings,
        )  # fmt: skip
    else:
        version = 6 if depth != x.shape[3] else 1
        made = ctx.graph.emit("CONV_2D", [x, kernel, added], shape, "Conv2DOptions", version=version, **settings)
    made = ctx.transpose(made, (0, 3, 1, 2))
    ctx.tensors[node.outputs[0]] = ctx.reshape(made, (*made.shape[:2], *made.shape[4 - axes :]))


# attention


@OPS.lower("TensorScatter", note="DYNAMIC_UPDATE_SLICE")
def tensor_scatter(node: ir.Node, ctx: Lowering) -> None:
    """TensorScatter(past_cache, update, write_indices)"""
    past, new, position = (ctx.value(value) for value in node.inputs)
    axis = int(attribute(node, "axis", -2)) % len(past.shape)

    def place() -> Tensor:
        zeros = [ctx.integers(*[0] * count) if count else None for count in (axis, len(past.shape) - axis - 1)]
        parts = [zeros[0], ctx.reshape(position, (1,)), zeros[1]]
        return ctx.concat([part for part in parts if part is not None], 0)

    where = ctx.once(("place", position, axis, len(past.shape)), place)
    ctx.tensors[node.outputs[0]] = ctx.graph.emit(
        "DYNAMIC_UPDATE_SLICE", [past, new, where], past.shape, "DynamicUpdateSliceOptions"
    )


@OPS.lower("RotaryEmbedding", note="GATHER of the tables once, then SLICE, CONCATENATION, MUL, ADD")
def rotary(node: ir.Node, ctx: Lowering) -> None:
    """RotaryEmbedding(X, cos_cache, sin_cache, position_ids)"""
    x = ctx.value(node.inputs[0])
    _, heads, length, width = x.shape
    turned = int(attribute(node, "rotary_embedding_dim", 0)) or width
    pairs = attribute(node, "interleaved", 0) == 1
    cos, sin = (_angles(node, ctx, k, pairs=pairs) for k in (1, 2))
    head = ctx.slice(x, 3, 0, turned)
    if pairs:  # neighbours become the last axis of two; the batch, always 1, makes room for it
        head = ctx.reshape(head, (heads, length, turned // 2, 2))
    half = head.shape[3] // 2
    swapped = ctx.concat([ctx.slice(head, 3, half, 2 * half), ctx.slice(head, 3, 0, half)], 3)
    made = ctx.binary("ADD", ctx.binary("MUL", head, cos), ctx.binary("MUL", swapped, sin))
    made = ctx.reshape(made, (1, heads, length, turned))
    ctx.tensors[node.outputs[0]] = made if turned == width else ctx.concat([made, ctx.slice(x, 3, turned, width)], 3)


def _angles(node: ir.Node, ctx: Lowering, position: int, *, pairs: bool) -> Tensor:
    """cos or sin of each token for both numbers of each pair, the sine of the first negated; made once for all layers.

    The first number turns into a cos - b sin, the second into b cos + a sin: with the pair swapped, one sum each.
    """
    table = node.inputs[position]
    rows = node.inputs[3] if len(node.inputs) > 3 else None

    def make() -> Tensor:
        known = ctx.known(table)
        if rows is None and known is not None:  # a picture's grid: no operator computes what is known
            turned = np.stack([-known if position == 2 else known, known], -1 if pairs else -2)
            length, width = known.shape[-2:]
            return ctx.graph.constant(turned.reshape((1, length, width, 2) if pairs else (1, 1, length, 2 * width)))
        found = ctx.value(table)
        if rows is not None:
            at = ctx.value(rows)
            length = int(np.prod(at.shape, dtype=np.int64))
            flat = ctx.reshape(at, (length,))
            found = ctx.graph.emit("GATHER", [found, flat], (length, found.shape[1]), "GatherOptions", axis=0)
        length, width = found.shape[-2:]
        found = ctx.reshape(found, (1, length, width, 1) if pairs else (1, 1, length, width))
        first = found
        if position == 2:
            first = ctx.binary("MUL", found, ctx.scalar(-1))
        return ctx.concat([first, found], 3)

    return ctx.once(("angles", table, rows, position, pairs), make)


@OPS.lower("Attention", note="BATCH_MATMUL, ADD of a mask, SOFTMAX, BATCH_MATMUL; no key is repeated", limit=unmasked)
def attention(node: ir.Node, ctx: Lowering) -> None:
    """Attention(Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen)"""
    q, k, v = (ctx.value(value) for value in node.inputs[:3])
    causal = attribute(node, "is_causal", 0) == 1
    if causal and ctx.window:
        k, v = (ctx.slice(cache, 2, 0, ctx.window) for cache in (k, v))
    _, heads, length, width = q.shape
    keys, slots = k.shape[1], k.shape[2]
    shared = heads // keys
    scale = attribute(node, "scale", None)
    q = ctx.binary("MUL", q, ctx.scalar(width**-0.5 if scale is None else float(scale)))
    q = ctx.reshape(q, (1, keys, shared * length, width))
    scores = ctx.graph.emit("BATCH_MATMUL", [q, k], (1, keys, shared * length, slots), "BatchMatMulOptions", adjY=True)
    if causal:
        scores = ctx.binary("ADD", scores, _causal_mask(ctx, node.inputs[6], length, slots, shared))
    elif ctx.count is not None:
        scores = ctx.binary("ADD", scores, _count_mask(ctx, ctx.count, slots))
    weights = ctx.graph.emit("SOFTMAX", [scores], scores.shape, "SoftmaxOptions", beta=1.0)
    made = ctx.graph.emit("BATCH_MATMUL", [weights, v], (1, keys, shared * length, v.shape[3]), "BatchMatMulOptions")
    ctx.tensors[node.outputs[0]] = ctx.reshape(made, (1, heads, length, v.shape[3]))


def _causal_mask(ctx: Lowering, filled: ir.Value | None, length: int, slots: int, shared: int) -> Tensor:
    """0 where token i of the `length` last ones sees a slot (those up to its own), HIDDEN elsewhere: float32
    [1,1,shared * length,slots], made once for all layers."""

    def make() -> Tensor:
        before = ctx.graph.constant(np.arange(1 - length, 1, dtype=np.int32)[:, None])
        mask = _mask(ctx, ctx.binary("ADD", ctx.reshape(ctx.value(filled), (1, 1)), before), slots)
        return ctx.concat([mask] * (shared if length > 1 else 1), 2)

    return ctx.once(("mask", filled, length, slots, shared), make)


def _count_mask(ctx: Lowering, count: Tensor, slots: int) -> Tensor:
    """0 for the first `count` keys, HIDDEN for those that pad them: float32 [1,1,1,slots]."""
    return ctx.once(("mask", slots), lambda: _mask(ctx, ctx.reshape(count, (1, 1)), slots))


def _mask(ctx: Lowering, ends: Tensor, slots: int) -> Tensor:
    """0 where a slot is below its row's end, int32 [rows,1], HIDDEN elsewhere: float32 [1,1,rows,slots]."""
    sizes = (ends.shape[0], slots)
    slot = ctx.graph.constant(np.arange(slots, dtype=np.int32)[None])
    seen = ctx.graph.emit("LESS", [slot, ends], sizes, "LessOptions", dtype="bool")
    mask = ctx.graph.emit("SELECT_V2", [seen, ctx.scalar(0), ctx.scalar(HIDDEN)], sizes, "SelectV2Options")
    return ctx.reshape(mask, (1, 1, *sizes))
