"""The op table of TensorRT, in two dialects: fused ops for the versions that have them, primitives for older ones.

    TensorScatter      ->  IKVCacheUpdateLayer, or ScatterElements at the slots position..
    Attention          ->  IAttention (repaired after parsing, see tensorrt_engine.py), or MatMul, Softmax and an
                           explicit mask
    RMSNormalization   ->  in float32, between two Casts; as multiplications and a mean where there is no such op
    MatMul by a weight ->  DequantizeLinear of its integers, Transpose, MatMul; where its blocks have offsets, the same
                           of these by the sums of the input's blocks, and Add

Source: the operator tables of onnx-tensorrt (docs/operators.md) and TensorRT's support matrix.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgeexport.backends.optable import OpTable
from edgeexport.canonical.dialect import attribute, linear

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeexport.backends.tensorrt_lowering import Lowering

HEAD_SIZES = range(16, 257, 8)
"""Head sizes that IAttention takes in float16; others are made of primitives. The manual names the ends alone, but of
26, 52 and 100 TensorRT-RTX's compiler makes no kernel."""
OPSET_18 = 18
"""From this one on, ReduceMean takes its axes as an input, and Split must be told the number of its outputs."""
MASKED = -65504.0
"""The least float16: what a key that may not be seen adds. Minus infinity would make a NaN of an all-masked row."""

OPS = OpTable("tensorrt")
OPS.native(
    "Add", "Clip", "Concat", "Gather", "Mul", "Range", "Reshape", "Shape", "Sigmoid", "Slice", "Squeeze", "Sub",
    "Transpose", "Unsqueeze",
)  # fmt: skip


def _attention_limit(node: ir.Node) -> str | None:
    if attribute(node, "softcap", 0.0):
        return "softcap is not part of TensorRT's attention"
    if any(value is not None for value in node.inputs[3:6]):
        return "masks and caches as inputs of Attention are not lowered"
    return None


@OPS.lower(
    "Attention", note="IAttention with the lengths of the cache; MatMul, mask, Softmax in old versions",
    limit=_attention_limit,
)  # fmt: skip
def attention(node: ir.Node, ctx: Lowering) -> None:
    """Attention(Q, K, V, , , , nonpad_kv_seqlen)"""
    query, key, value = node.inputs[:3]
    assert query is not None and key is not None and query.shape is not None and key.shape is not None
    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
    assert isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(width, int), "heads are static"
    if ctx.fused and width in HEAD_SIZES:
        ctx.keep(node)
        return
    scale = attribute(node, "scale") or 1 / math.sqrt(width)
    # The scale goes into the query, which keeps the sums within float16; heads that share keys are rows of one matrix.
    scaled = ctx.emit("Mul", [ctx.value(query), ctx.half(scale)])
    grouped = ctx.emit("Reshape", [scaled, ctx.whole(1, kv_heads, -1, width)])
    turned = ctx.emit("Transpose", [ctx.value(key)], {"perm": [0, 1, 3, 2]})
    scores = ctx.emit("MatMul", [grouped, turned])
    if attribute(node, "is_causal") == 1:
        slots = key.shape[2]
        assert isinstance(slots, int), "a cache has a fixed number of slots"
        by_head = ctx.emit("Reshape", [scores, ctx.whole(1, heads, -1, slots)])
        seen = ctx.emit("Where", [_visible(node, ctx, slots), by_head, ctx.half(MASKED)])
        scores = ctx.emit("Reshape", [seen, ctx.whole(1, kv_heads, -1, slots)])
    shares = ctx.narrowed(ctx.emit("Softmax", [ctx.widened(scores)], {"axis": -1}))
    mixed = ctx.emit("MatMul", [shares, ctx.value(value)])
    ctx.values[node.outputs[0]] = ctx.emit("Reshape", [mixed, ctx.whole(1, heads, -1, width)], name=node.name or "")


def _visible(node: ir.Node, ctx: Lowering, slots: int) -> ir.Value:
    """bool [1,1,T,slots]: a token sees the keys up to its own; made once for all layers."""
    length = ctx.value(node.inputs[6])
    size = ctx.once(("count", length), "Shape", [ctx.value(node.inputs[0])], start=2, end=3)
    first = ctx.once(("first", length), "Sub", [length, size])
    rows = _counting(ctx, first, ctx.once(("scalar", length), "Squeeze", [size, ctx.whole(0)]), length)
    row = ctx.once(("row", length), "Reshape", [rows, ctx.whole(1, 1, -1, 1)])
    column = ctx.constant(f"slots.{slots}", np.arange(slots, dtype=np.int64).reshape(1, 1, 1, slots))
    return ctx.once(("visible", length, slots), "LessOrEqual", [column, row])


def _counting(ctx: Lowering, first: ir.Value, count: ir.Value, key: object) -> ir.Value:
    """int64 [count]: first, first + 1, ..."""
    steps = ctx.once(("steps", key), "Range", [ctx.scalar(0), count, ctx.scalar(1)])
    return ctx.once(("counting", key), "Add", [steps, first])


@OPS.lower("TensorScatter", note="IKVCacheUpdateLayer from a network input to an output; ScatterElements in old ones")
def tensor_scatter(node: ir.Node, ctx: Lowering) -> None:
    """TensorScatter(past, update, position)"""
    if ctx.fused:
        ctx.keep(node)
        return
    past, update, position = node.inputs
    assert past is not None and past.shape is not None
    new, at = ctx.value(update), ctx.value(position)
    size = ctx.emit("Shape", [new], {"start": 2, "end": 3})
    count = ctx.emit("Squeeze", [size, ctx.whole(0)])
    steps = ctx.emit("Range", [ctx.scalar(0), count, ctx.scalar(1)])
    slots = ctx.emit("Reshape", [ctx.emit("Add", [steps, at]), ctx.whole(1, 1, -1, 1)])
    places = ctx.emit("Expand", [slots, ctx.emit("Shape", [new])])
    ctx.values[node.outputs[0]] = ctx.emit(
        "ScatterElements", [ctx.value(past), places, new], {"axis": 2}, name=node.name or ""
    )


@OPS.lower("RotaryEmbedding", note="IRotaryEmbeddingLayer; slices, products and a sum in old versions")
def rotary_embedding(node: ir.Node, ctx: Lowering) -> None:
    """RotaryEmbedding(X [1,heads,T,width], cos, sin, positions)"""
    if ctx.fused:
        ctx.keep(node)
        return
    x = node.inputs[0]
    assert x is not None and x.shape is not None and isinstance(x.shape[3], int), "heads have a fixed width"
    width = x.shape[3]
    turned = attribute(node, "rotary_embedding_dim", 0) or width
    cos, sin = (_angles(ctx, node, k) for k in (1, 2))
    new = ctx.value(x)
    rest = _columns(ctx, new, turned, width) if turned < width else None
    part = _columns(ctx, new, 0, turned) if turned < width else new
    if attribute(node, "interleaved", 0):
        left, right = _columns(ctx, part, 0, turned, 2), _columns(ctx, part, 1, turned, 2)
    else:
        left, right = _columns(ctx, part, 0, turned // 2), _columns(ctx, part, turned // 2, turned)
    real = ctx.emit("Sub", [ctx.emit("Mul", [left, cos]), ctx.emit("Mul", [right, sin])])
    imaginary = ctx.emit("Add", [ctx.emit("Mul", [right, cos]), ctx.emit("Mul", [left, sin])])
    if attribute(node, "interleaved", 0):
        pairs = [ctx.emit("Unsqueeze", [half, ctx.whole(4)]) for half in (real, imaginary)]
        joined = ctx.emit("Concat", pairs, {"axis": 4})
        heads = x.shape[1]
        assert isinstance(heads, int), "heads are static"
        done = ctx.emit("Reshape", [joined, ctx.whole(1, heads, -1, turned)])
    else:
        done = ctx.emit("Concat", [real, imaginary], {"axis": -1})
    if rest is not None:
        done = ctx.emit("Concat", [done, rest], {"axis": -1})
    ctx.values[node.outputs[0]] = done


def _angles(ctx: Lowering, node: ir.Node, which: int) -> ir.Value:
    """cos or sin as [1,1,T,pairs]: rows of a table by the tokens' positions, or already one row for each token."""
    table = ctx.value(node.inputs[which])
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        table = ctx.once(("angles", table), "Gather", [table, ctx.value(node.inputs[3])], axis=0)
    return ctx.once(("row of angles", table), "Unsqueeze", [table, ctx.whole(1)])


def _columns(ctx: Lowering, value: ir.Value, start: int, stop: int, step: int = 1) -> ir.Value:
    """Columns start..stop of the last of four axes."""
    return ctx.emit("Slice", [value, *(ctx.whole(number) for number in (start, stop, 3, step))])


@OPS.lower("RMSNormalization", note="in float32 between two Casts; a mean and products in old versions")
def rms_norm(node: ir.Node, ctx: Lowering) -> None:
    """RMSNormalization(X, scale)"""
    x, scale = ctx.wide(node.inputs[0]), ctx.wide(node.inputs[1])
    epsilon = attribute(node, "epsilon", 1e-5)
    if ctx.fused:
        done = ctx.emit("RMSNormalization", [x, scale], {"axis": -1, "epsilon": epsilon}, name=node.name or "")
    else:
        squares = ctx.emit("Mul", [x, x])
        if ctx.opset < OPSET_18:
            mean = ctx.emit("ReduceMean", [squares], {"axes": [-1], "keepdims": 1})
        else:
            mean = ctx.emit("ReduceMean", [squares, ctx.whole(-1)], {"keepdims": 1})
        root = ctx.emit("Sqrt", [ctx.emit("Add", [mean, ctx.single(epsilon)])])
        done = ctx.emit("Mul", [ctx.emit("Div", [x, root]), scale], name=node.name or "")
    ctx.wides[node.outputs[0]] = done


@OPS.lower("LayerNormalization", note="in float32 between two Casts")
def layer_norm(node: ir.Node, ctx: Lowering) -> None:
    """LayerNormalization(X, scale, bias)"""
    inputs = [ctx.wide(value) for value in node.inputs if value is not None]
    how = {"axis": -1, "epsilon": attribute(node, "epsilon", 1e-5)}
    ctx.wides[node.outputs[0]] = ctx.emit("LayerNormalization", inputs, how, name=node.name or "")


@OPS.lower("Gelu", note="Gelu; the error function in old versions")
def gelu(node: ir.Node, ctx: Lowering) -> None:
    """Gelu(X), exact"""
    if ctx.fused:
        ctx.keep(node)
        return
    x = ctx.value(node.inputs[0])
    grown = ctx.emit("Add", [ctx.emit("Erf", [ctx.emit("Mul", [x, ctx.half(math.sqrt(0.5))])]), ctx.half(1.0)])
    ctx.values[node.outputs[0]] = ctx.emit("Mul", [ctx.emit("Mul", [x, ctx.half(0.5)]), grown], name=node.name or "")


@OPS.lower("BatchNormalization", note="a product and a sum in float32 between two Casts")
def batch_norm(node: ir.Node, ctx: Lowering) -> None:
    """BatchNormalization(X, scale, bias, mean, variance). As an op of its own it leaves float32 weights behind in a
    strongly typed network, which TensorRT refuses."""
    x = node.inputs[0]
    assert x is not None and x.shape is not None
    scale, bias, mean, variance = (ctx.wide(value) for value in node.inputs[1:5])
    spread = ctx.emit("Sqrt", [ctx.emit("Add", [variance, ctx.single(attribute(node, "epsilon", 1e-5))])])
    factor = ctx.emit("Div", [scale, spread])
    offset = ctx.emit("Sub", [bias, ctx.emit("Mul", [mean, factor])])
    ending = [1] * (len(x.shape) - 2)
    factor, offset = (ctx.emit("Reshape", [each, ctx.whole(1, -1, *ending)]) for each in (factor, offset))
    product = ctx.emit("Mul", [ctx.wide(x), factor])
    ctx.wides[node.outputs[0]] = ctx.emit("Add", [product, offset], name=node.name or "")


@OPS.lower("Conv", note="with its bias as a sum of its own")
def conv(node: ir.Node, ctx: Lowering) -> None:
    """Conv(X, W, B)"""
    x = node.inputs[0]
    assert x is not None and x.shape is not None
    attributes = {name: held.value for name, held in node.attributes.items()}
    done = ctx.emit("Conv", [ctx.value(value) for value in node.inputs[:2]], attributes, name=node.name or "")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        ending = [1] * (len(x.shape) - 2)
        bias = ctx.emit("Reshape", [ctx.value(node.inputs[2]), ctx.whole(1, -1, *ending)])
        done = ctx.emit("Add", [done, bias])
    ctx.values[node.outputs[0]] = done


@OPS.lower("MatMul", note="by DequantizeLinear of a weight's integers, and of its blocks' offsets, transposed")
def matmul(node: ir.Node, ctx: Lowering) -> None:
    """MatMul(A, B)"""
    found = linear(node)
    if found is None:
        ctx.keep(node)
        return
    weight = ctx.weight(found.weight)
    turned = ctx.once(("turned", weight), "Transpose", [weight], perm=[1, 0])
    fmt, product = ctx.plan.formats[str(found.weight.name)], [ctx.value(found.input), turned]
    if not fmt.shift:
        ctx.values[found.output] = ctx.emit("MatMul", product, name=node.name or "")
        return
    offsets = ctx.offsets(str(found.weight.name))
    moved = [ctx.block_sums(found.input, fmt.block), ctx.once(("turned", offsets), "Transpose", [offsets], perm=[1, 0])]
    both = [ctx.emit("MatMul", product), ctx.emit("MatMul", moved)]
    ctx.values[found.output] = ctx.emit("Add", both, name=node.name or "")


@OPS.lower("Split", note="without num_outputs in old versions")
def split(node: ir.Node, ctx: Lowering) -> None:
    """Split(input, split)"""
    ctx.keep(node, without=("num_outputs",) if ctx.opset < OPSET_18 else ())


@OPS.lower("Cast", note="to float32 stays; it is rounded to float16 where it is used")
def cast(node: ir.Node, ctx: Lowering) -> None:
    """Cast(input)"""
    old = node.inputs[0]
    assert old is not None
    if ctx.is_float(node.outputs[0]):
        ctx.wides[node.outputs[0]] = ctx.wide(old) if ctx.is_float(old) else ctx.widened(ctx.value(old))
        return
    made = ctx.emit("Cast", [ctx.wide(old) if ctx.is_float(old) else ctx.value(old)], {"to": attribute(node, "to")})
    ctx.values[node.outputs[0]] = made
