"""The op table of Core ML: what each op of the dialect becomes in an ML program of iOS 18, in float16.

    MatMul by a stored weight      ->  linear; int4 and int8 weights through constexpr_blockwise_shift_scale
    Attention                      ->  scaled_dot_product_attention; heads that share a key are folded into its rows
    RMSNormalization               ->  layer_norm of [x, -x], which does not overflow in float16 where x * x does
    TensorScatter into a cache     ->  read_state, slice_update, write_state; the new value is used, never read again
    RotaryEmbedding                ->  x * cos + swapped(x) * sin
    whole numbers (Shape, Range)   ->  computed here where they follow from the shapes

Source: coremltools 9, converters/mil/mil/ops/defs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgeexport.backends.optable import OpTable
from edgeexport.canonical.dialect import attribute, constant, linear, stored
from edgeexport.core import Array

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeexport.backends.coreml_lowering import Input, Lowering, Value

MASKED = 10_000
"""Subtracted from a score that must not count: far from float16's 65504, and exp of it is 0."""

OPS = OpTable("coreml")


def _set(ctx: Lowering, node: ir.Node, *made: Value) -> None:
    for old, new in zip(node.outputs, made, strict=True):
        ctx.values[old] = new


def _label(node: ir.Node) -> str:
    return str(node.outputs[0].name)


def _ints(ctx: Lowering, value: ir.Value | None) -> list[int]:
    """Whole numbers that are known while the program is written."""
    known = ctx.value(value).known
    assert known is not None, "checked by the dialect"
    return [int(each) for each in known.reshape(-1)]


def _vector(values: Sequence[int] | Array) -> Array:
    return np.asarray(values, np.int32)


# element by element


def _elementwise(node: ir.Node, ctx: Lowering, op: str, function: Callable[[Array, Array], Array]) -> None:
    x, y = (ctx.value(each) for each in node.inputs)
    if x.known is not None and y.known is not None:
        _set(ctx, node, ctx.known(function(x.known, y.known)))
        return
    dtype = x.dtype if x.known is None else y.dtype
    inputs: dict[str, Input] = {"x": ctx.materialised(x, dtype), "y": ctx.materialised(y, dtype)}
    _set(ctx, node, ctx.emit(op, inputs, np.broadcast_shapes(x.shape, y.shape), dtype, _label(node)))


@OPS.lower("Add", note="add")
def add(node: ir.Node, ctx: Lowering) -> None:
    _elementwise(node, ctx, "add", np.add)


@OPS.lower("Sub", note="sub")
def sub(node: ir.Node, ctx: Lowering) -> None:
    _elementwise(node, ctx, "sub", np.subtract)


@OPS.lower("Mul", note="mul")
def mul(node: ir.Node, ctx: Lowering) -> None:
    _elementwise(node, ctx, "mul", np.multiply)


@OPS.lower("Sigmoid", note="sigmoid")
def sigmoid(node: ir.Node, ctx: Lowering) -> None:
    x = ctx.value(node.inputs[0])
    _set(ctx, node, ctx.emit("sigmoid", {"x": x}, x.shape, name=_label(node)))


@OPS.lower("Gelu", note="gelu, exact")
def gelu(node: ir.Node, ctx: Lowering) -> None:
    x = ctx.value(node.inputs[0])
    _set(ctx, node, ctx.emit("gelu", {"x": x, "mode": "EXACT"}, x.shape, name=_label(node)))


@OPS.lower("Clip", note="clip")
def clip(node: ir.Node, ctx: Lowering) -> None:
    x = ctx.value(node.inputs[0])
    low, high = (np.array(_bound(node, place, bound), np.float16) for place, bound in ((1, -65504.0), (2, 65504.0)))
    _set(ctx, node, ctx.emit("clip", {"x": x, "alpha": low, "beta": high}, x.shape, name=_label(node)))


def _bound(node: ir.Node, place: int, default: float) -> float:
    held = constant(node.inputs[place]) if place < len(node.inputs) else None
    return default if held is None else float(held.numpy())


@OPS.lower("Cast", note="cast; a weight's own cast is part of its reading")
def cast(node: ir.Node, ctx: Lowering) -> None:
    """Floats are float16, whole numbers int32."""
    weight = stored(node.outputs[0])
    if weight is not None and weight.name in ctx.model.weights:
        return  # whoever uses it asks for the weight itself
    x = ctx.value(node.inputs[0])
    to = int(attribute(node, "to"))
    dtype = {1: "float16", 10: "float16", 6: "int32", 7: "int32", 9: "bool"}[to]
    if x.known is not None:
        kind = {"float16": np.float32, "int32": np.int64, "bool": np.bool_}[dtype]
        _set(ctx, node, ctx.known(x.known.astype(kind)))
    elif x.dtype == dtype:
        _set(ctx, node, x)
    else:
        name = {"float16": "fp16"}.get(dtype, dtype)
        _set(ctx, node, ctx.emit("cast", {"x": x, "dtype": name}, x.shape, dtype, _label(node)))


# products


@OPS.lower("MatMul", note="linear by a stored weight, matmul of two activations")
def matmul(node: ir.Node, ctx: Lowering) -> None:
    found = linear(node)
    if found is None:
        x, y = (ctx.materialised(ctx.value(each)) for each in node.inputs)
        lead = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        _set(ctx, node, ctx.emit("matmul", {"x": x, "y": y}, (*lead, x.shape[-2], y.shape[-1]), name=_label(node)))
        return
    x, name = ctx.materialised(ctx.value(found.input)), str(found.weight.name)
    weight = ctx.weight(name)
    shape = (*x.shape[:-1], weight.shape[0])
    if ctx.is_constant_expression(name):
        made = ctx.emit("linear", {"x": x, "weight": weight}, shape, name=_label(node))
    else:
        made = ctx.emit("matmul", {"x": x, "y": weight, "transpose_y": True}, shape, name=_label(node))
    _set(ctx, node, made)


@OPS.lower("Conv", note="conv")
def conv(node: ir.Node, ctx: Lowering) -> None:
    x, weight = (ctx.materialised(ctx.value(each)) for each in node.inputs[:2])
    rank = len(x.shape) - 2
    strides = [int(each) for each in attribute(node, "strides") or [1] * rank]
    dilations = [int(each) for each in attribute(node, "dilations") or [1] * rank]
    pads = [int(each) for each in attribute(node, "pads") or [0] * (2 * rank)]
    sides = [each for pair in zip(pads[:rank], pads[rank:], strict=True) for each in pair]  # ONNX: all befores first
    out = [
        (size + pads[i] + pads[rank + i] - dilations[i] * (weight.shape[2 + i] - 1) - 1) // strides[i] + 1
        for i, size in enumerate(x.shape[2:])
    ]
    inputs: dict[str, Input] = {
        "x": x,
        "weight": weight,
        "strides": _vector(strides),
        "pad_type": "custom",
        "pad": _vector(sides),
        "dilations": _vector(dilations),
        "groups": int(attribute(node, "group", 1)),
    }
    made = ctx.emit("conv", inputs, (x.shape[0], weight.shape[0], *out), name=_label(node))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _per_channel(ctx, node.inputs[2], len(made.shape))
        made = ctx.emit("add", {"x": made, "y": bias}, made.shape, name=f"{_label(node)}_biased")
    _set(ctx, node, made)


def _per_channel(ctx: Lowering, vector: ir.Value | None, rank: int) -> Value:
    """A vector over the second axis."""
    held = ctx.materialised(ctx.value(vector))
    shape = (1, held.shape[0], *[1] * (rank - 2))
    return ctx.emit("reshape", {"x": held, "shape": _vector(shape)}, shape, name=f"{held.name}_channels")


# norms


@OPS.lower("RMSNormalization", note="layer_norm of [x, -x], times the weight")
def rms_norm(node: ir.Node, ctx: Lowering) -> None:
    """The mean of [x, -x] is 0 and its variance the mean square of x; no square is ever a value of the program."""
    x, weight = (ctx.materialised(ctx.value(each)) for each in node.inputs)
    name, wide = _label(node), (*x.shape[:-1], 2 * x.shape[-1])
    negative = ctx.emit("mul", {"x": x, "y": np.array(-1, np.float16)}, x.shape, name=f"{name}_negative")
    both = ctx.emit("concat", {"values": [x, negative], "axis": -1, "interleave": False}, wide)
    epsilon = np.array(attribute(node, "epsilon", 1e-5), np.float16)
    inputs: dict[str, Input] = {"x": both, "axes": _vector([-1]), "epsilon": epsilon}
    normed = ctx.emit("layer_norm", inputs, wide, name=f"{name}_normed")
    half = _first(ctx, normed, x.shape[-1])
    _set(ctx, node, ctx.emit("mul", {"x": half, "y": weight}, x.shape, name=name))


@OPS.lower("LayerNormalization", note="layer_norm, times the weight, plus the bias")
def layer_norm(node: ir.Node, ctx: Lowering) -> None:
    x, name = ctx.materialised(ctx.value(node.inputs[0])), _label(node)
    epsilon = np.array(attribute(node, "epsilon", 1e-5), np.float16)
    made = ctx.emit("layer_norm", {"x": x, "axes": _vector([-1]), "epsilon": epsilon}, x.shape, name=f"{name}_normed")
    for op, each in zip(("mul", "add"), node.inputs[1:], strict=False):
        if each is not None:
            made = ctx.emit(op, {"x": made, "y": ctx.value(each)}, x.shape, name=f"{name}_{op}")
    _set(ctx, node, made)


@OPS.lower("BatchNormalization", note="(x - mean) * scale + bias, the scale computed in float32")
def batch_norm(node: ir.Node, ctx: Lowering) -> None:
    """The mean goes first: x * scale + shift would lose to cancellation in float16 what x has beyond its mean."""
    x, name = ctx.materialised(ctx.value(node.inputs[0])), _label(node)
    gamma, beta, mean, variance = (ctx.single(each) for each in node.inputs[1:5])
    epsilon = np.array(attribute(node, "epsilon", 1e-5), np.float32)
    spread = ctx.emit("rsqrt", {"x": variance, "epsilon": epsilon}, variance.shape, "float32", f"{name}_spread")
    scale = ctx.emit("mul", {"x": gamma, "y": spread}, gamma.shape, "float32", f"{name}_scale")
    shape = (1, gamma.shape[0], *[1] * (len(x.shape) - 2))
    for op, vector in (("sub", mean), ("mul", scale), ("add", beta)):
        half = ctx.emit("cast", {"x": vector, "dtype": "fp16"}, vector.shape, name=f"{name}_{op}_fp16")
        half = ctx.emit("reshape", {"x": half, "shape": _vector(shape)}, shape, name=f"{name}_{op}_channels")
        x = ctx.emit(op, {"x": x, "y": half}, x.shape, name=f"{name}_{op}")
    _set(ctx, node, x)


# attention


@OPS.lower("RotaryEmbedding", note="x * cos + swapped(x) * sin, with tables of the right width and signs")
def rotary(node: ir.Node, ctx: Lowering) -> None:
    """RotaryEmbedding(x [1,H,T,D], cos, sin, positions), or with cos and sin [1,T,rotary / 2] of their own."""
    x, name = ctx.materialised(ctx.value(node.inputs[0])), _label(node)
    pairs = attribute(node, "interleaved", 0) == 1
    cos, sin = _angles(node, ctx, pairs)
    width = cos.shape[-1]
    head = x if width == x.shape[-1] else _first(ctx, x, width)
    swapped = _swapped(ctx, head, pairs)
    one = ctx.emit("mul", {"x": head, "y": cos}, head.shape, name=f"{name}_cos")
    other = ctx.emit("mul", {"x": swapped, "y": sin}, head.shape, name=f"{name}_sin")
    turned = ctx.emit("add", {"x": one, "y": other}, head.shape, name=f"{name}_turned")
    if head is not x:
        rest = _cut(ctx, x, len(x.shape) - 1, width, x.shape[-1])
        inputs: dict[str, Input] = {"values": [turned, rest], "axis": -1, "interleave": False}
        turned = ctx.emit("concat", inputs, x.shape, name=name)
    _set(ctx, node, turned)


def _angles(node: ir.Node, ctx: Lowering, pairs: bool) -> tuple[Value, Value]:
    """cos and sin [1,1,T,rotary], made once for all layers."""
    key = ("angles", *node.inputs[1:4], pairs)
    if (*key, "cos") not in ctx.memo:
        for kind, old in (("cos", node.inputs[1]), ("sin", node.inputs[2])):
            table = ctx.value(old)
            wide = _widened(ctx, table, kind, pairs)
            if len(node.inputs) > 3 and node.inputs[3] is not None:
                positions = ctx.materialised(ctx.value(node.inputs[3]))
                wide = _looked_up(ctx, ctx.materialised(wide, "float32"), positions, 0, f"rope_{kind}_fp32")
                wide = ctx.emit("cast", {"x": wide, "dtype": "fp16"}, wide.shape, name=f"rope_{kind}")
            elif wide.known is not None:
                wide = ctx.materialised(wide)
            shape = (wide.shape[0], 1, *wide.shape[1:])
            ctx.memo[*key, kind] = ctx.emit(
                "expand_dims", {"x": wide, "axes": _vector([1])}, shape, name=f"rope_{kind}"
            )
    return ctx.memo[*key, "cos"], ctx.memo[*key, "sin"]


def _widened(ctx: Lowering, half: Value, kind: str, pairs: bool) -> Value:
    """[..., r / 2] to [..., r]: each angle for both numbers that it turns; the sine of the first is negative."""
    first = -1 if kind == "sin" else 1
    width = half.shape[-1]
    if half.known is not None:
        parts = [first * half.known, half.known]
        wide = np.stack(parts, -1).reshape(*half.shape[:-1], 2 * width) if pairs else np.concatenate(parts, -1)
        return ctx.known(wide)
    shape = (*half.shape[:-1], 2 * width)
    spread = np.zeros((width, 2 * width), np.float16)
    for i in range(width):
        one, other = (2 * i, 2 * i + 1) if pairs else (i, width + i)
        spread[i, one], spread[i, other] = first, 1
    return ctx.emit("matmul", {"x": half, "y": spread}, shape, name=f"rope_{kind}_wide")


def _swapped(ctx: Lowering, x: Value, pairs: bool) -> Value:
    """The other number of each pair: halves change places, or neighbours, by a product with a permutation, as a tensor
    of rank 5 would leave the Neural Engine."""
    width = x.shape[-1]
    if pairs:
        swap = np.zeros((width, width), np.float16)
        swap[np.arange(width), np.arange(width) ^ 1] = 1
        return ctx.emit("matmul", {"x": x, "y": swap}, x.shape, name="swapped")
    half = (*x.shape[:-1], width // 2)
    one, other = ctx.emit_many("split", {"x": x, "num_splits": 2, "axis": -1}, [half] * 2)
    inputs: dict[str, Input] = {"values": [other, one], "axis": -1, "interleave": False}
    return ctx.emit("concat", inputs, x.shape, name="swapped")


@OPS.lower("TensorScatter", note="slice_update; of a cache, between read_state and write_state")
def scatter(node: ir.Node, ctx: Lowering) -> None:
    """TensorScatter(past, update, position) along axis -2."""
    past, position = node.inputs[0], ctx.value(node.inputs[2])
    assert past is not None, "an input that the dialect requires"
    update = ctx.materialised(ctx.value(node.inputs[1]))
    state = ctx.states.get(past)
    held = (
        ctx.emit("read_state", {"input": state}, state.shape, name=f"{state.name}_read") if state else ctx.value(past)
    )
    rank = len(held.shape)
    begin = _place(ctx, position, rank)
    key = ("end", begin.name, update.shape[-2])
    if key not in ctx.memo:
        length = _vector([0] * (rank - 2) + [update.shape[-2], 0])
        ctx.memo[key] = ctx.emit("add", {"x": begin, "y": length}, (rank,), "int32", "cache_end")
    whole = np.array([axis != rank - 2 for axis in range(rank)])
    inputs: dict[str, Input] = {
        "x": held,
        "update": update,
        "begin": begin,
        "end": ctx.memo[key],
        "begin_mask": whole,
        "end_mask": whole,
    }
    new = ctx.emit("slice_update", inputs, held.shape, name=_label(node))
    if state:
        ctx.write_state(state, new)
    _set(ctx, node, new)


def _place(ctx: Lowering, position: Value, rank: int) -> Value:
    """Where a cache is written: the position on the axis before the last, 0 on all others."""
    key = ("begin", position.name, rank)
    if key not in ctx.memo:
        inputs: dict[str, Input] = {
            "values": [ctx.known(np.zeros(rank - 2, np.int32)), position, ctx.known(np.zeros(1, np.int32))],
            "axis": 0,
            "interleave": False,
        }
        ctx.memo[key] = ctx.emit("concat", inputs, (rank,), "int32", "cache_begin")
    return ctx.memo[key]


@OPS.lower("Attention", note="scaled_dot_product_attention; rows of heads that share a key stand one below the other")
def attention(node: ir.Node, ctx: Lowering) -> None:
    """Attention(Q [1,H,T,D], K [1,KV,S,D], V, attn_mask, past_key, past_value, nonpad_kv_seqlen)."""
    query, key, value = (ctx.materialised(ctx.value(each)) for each in node.inputs[:3])
    name, (batch, heads, count, width) = _label(node), query.shape
    kv_heads, slots = key.shape[1:3]
    group = heads // kv_heads
    scale = attribute(node, "scale")
    factor = 1.0 if scale is None else float(scale) * math.sqrt(width)
    if abs(factor - 1) > 1e-6:
        query = ctx.emit("mul", {"x": query, "y": np.array(factor, np.float16)}, query.shape, name=f"{name}_scaled")
    folded = (batch, kv_heads, group * count, width)
    if group > 1:
        query = ctx.emit("reshape", {"x": query, "shape": _vector(folded)}, folded, name=f"{name}_folded")
    inputs: dict[str, Input] = {"query": query, "key": key, "value": value}
    mask = _mask(node, ctx, count, slots, group)
    if mask is not None:
        inputs["attn_mask"] = mask
    shape = (*folded[:-1], value.shape[-1])
    made = ctx.emit("scaled_dot_product_attention", inputs, shape, name=name)
    if group > 1:
        shape = (batch, heads, count, value.shape[-1])
        made = ctx.emit("reshape", {"x": made, "shape": _vector(shape)}, shape, name=f"{name}_heads")
    _set(ctx, node, made)


def _mask(node: ir.Node, ctx: Lowering, count: int, slots: int, group: int) -> Value | None:
    """What is added to the scores, [1,1,group * T,S]: a causal mask over the filled slots, a given one, or nothing."""
    given = node.inputs[3] if len(node.inputs) > 3 else None
    if given is not None:
        return _repeated(ctx, ctx.materialised(ctx.value(given)), group)
    if attribute(node, "is_causal", 0) != 1:
        return _valid(ctx, slots) if slots in ctx.counts else None
    filled = ctx.value(node.inputs[6])
    key = ("mask", filled.name, count, slots, group)
    if key not in ctx.memo:
        ends = ctx.emit("reshape", {"x": filled, "shape": _vector([1, 1])}, (1, 1), "int32", "filled")
        rows = (np.arange(count, dtype=np.int32) - count)[:, None]
        own = ctx.emit("add", {"x": ends, "y": rows}, (count, 1), "int32", "own_slot")
        columns = np.arange(slots, dtype=np.int32)[None]
        seen = ctx.emit("less_equal", {"x": columns, "y": own}, (count, slots), "bool", "seen")
        ctx.memo[key] = _repeated(ctx, _additive(ctx, seen), group)
    return ctx.memo[key]


def _valid(ctx: Lowering, slots: int) -> Value:
    """A mask over a padded dimension, [1,1,1,S]."""
    key = ("valid", slots)
    if key not in ctx.memo:
        columns = np.arange(slots, dtype=np.int32)[None]
        seen = ctx.emit("less", {"x": columns, "y": ctx.counts[slots]}, (1, slots), "bool", "valid")
        ctx.memo[key] = _additive(ctx, seen)
    return ctx.memo[key]


def _additive(ctx: Lowering, seen: Value) -> Value:
    """0 where a bool [T,S] says so, far below 0 elsewhere, [1,1,T,S]."""
    ones = ctx.emit("cast", {"x": seen, "dtype": "fp16"}, seen.shape, name="seen_fp16")
    less = ctx.emit("sub", {"x": ones, "y": np.array(1, np.float16)}, seen.shape, name="unseen")
    mask = ctx.emit("mul", {"x": less, "y": np.array(MASKED, np.float16)}, seen.shape, name="mask")
    return ctx.emit("expand_dims", {"x": mask, "axes": _vector([0, 1])}, (1, 1, *seen.shape), name="mask")


def _repeated(ctx: Lowering, mask: Value, group: int) -> Value:
    """A mask for rows of `group` heads one below the other."""
    if group == 1 or mask.shape[-2] == 1:
        return mask
    reps = [1] * len(mask.shape)
    reps[-2] = group
    shape = [size * rep for size, rep in zip(mask.shape, reps, strict=True)]
    return ctx.emit("tile", {"x": mask, "reps": _vector(reps)}, shape, name="mask_of_groups")


# shapes and places


@OPS.lower("Gather", note="gather")
def gather(node: ir.Node, ctx: Lowering) -> None:
    x, indices = (ctx.value(each) for each in node.inputs)
    axis = int(attribute(node, "axis", 0)) % len(x.shape)
    if x.known is not None and indices.known is not None:
        _set(ctx, node, ctx.known(np.take(x.known, indices.known, axis=axis)))
        return
    if indices.known is not None:  # no index of Core ML's gather is negative
        indices = ctx.known(np.where(indices.known < 0, indices.known + x.shape[axis], indices.known))
    if indices.known is not None and not indices.shape:
        _set(ctx, node, _one_of(ctx, x, int(indices.known), axis, _label(node)))
        return
    _set(ctx, node, _looked_up(ctx, x, ctx.materialised(indices), axis, _label(node)))


def _one_of(ctx: Lowering, x: Value, index: int, axis: int, name: str) -> Value:
    """One place of an axis, which goes."""
    own = np.arange(len(x.shape)) == axis
    sizes = [size for i, size in enumerate(x.shape) if i != axis]
    inputs: dict[str, Input] = {
        "x": x,
        "begin": _vector(np.where(own, index, 0)),
        "end": _vector(np.where(own, index + 1, x.shape)),
        "squeeze_mask": own,
    }
    return ctx.emit("slice_by_index", inputs, sizes, x.dtype, name)


def _looked_up(ctx: Lowering, x: Value, indices: Value, axis: int, name: str) -> Value:
    inputs: dict[str, Input] = {
        "x": x,
        "indices": indices,
        "axis": axis,
        "batch_dims": 0,
        "validate_indices": False,
    }
    return ctx.emit("gather", inputs, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), x.dtype, name)


@OPS.lower("Shape", note="a constant: shapes are static")
def shape(node: ir.Node, ctx: Lowering) -> None:
    sizes = ctx.value(node.inputs[0]).shape
    start, end = (int(attribute(node, name, bound)) for name, bound in (("start", 0), ("end", len(sizes))))
    _set(ctx, node, ctx.known(np.array(sizes[start:end], np.int64)))


def _follows_from_shapes(node: ir.Node) -> str | None:
    """Whether all inputs of a node are constants, or made of shapes alone."""
    pending = [value for value in node.inputs if value is not None]
    while pending:
        value = pending.pop()
        producer = value.producer()
        if value.is_graph_input():
            return f"it depends on the input {value.name}, and shapes of an ML program are static here"
        if producer is not None and producer.op_type != "Shape":
            pending += [each for each in producer.inputs if each is not None]
    return None


@OPS.lower("Range", note="a constant: lengths are static", limit=_follows_from_shapes)
def range_(node: ir.Node, ctx: Lowering) -> None:
    start, stop, step = (_ints(ctx, each)[0] for each in node.inputs)
    _set(ctx, node, ctx.known(np.arange(start, stop, step, dtype=np.int64)))


@OPS.lower("Reshape", note="reshape")
def reshape(node: ir.Node, ctx: Lowering) -> None:
    x, wanted = ctx.value(node.inputs[0]), _ints(ctx, node.inputs[1])
    keeps = attribute(node, "allowzero", 0) != 1
    sizes = [x.shape[i] if size == 0 and keeps else size for i, size in enumerate(wanted)]
    if -1 in sizes:
        count = math.prod(x.shape)
        sizes[sizes.index(-1)] = count // math.prod(size for size in sizes if size != -1)
    _reshaped(node, ctx, x, "reshape", {"shape": _vector(sizes)}, sizes)


@OPS.lower("Squeeze", note="squeeze")
def squeeze(node: ir.Node, ctx: Lowering) -> None:
    x = ctx.value(node.inputs[0])
    given = _ints(ctx, node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    axes = [i for i, size in enumerate(x.shape) if size == 1] if given is None else [i % len(x.shape) for i in given]
    sizes = [size for i, size in enumerate(x.shape) if i not in axes]
    if sizes or x.known is not None:
        _reshaped(node, ctx, x, "squeeze", {"axes": _vector(axes)}, sizes)
    else:  # a scalar is a tensor of one element in ML programs
        _set(ctx, node, ctx.emit("squeeze", {"x": x, "axes": _vector(axes)}, (), x.dtype, _label(node)))


@OPS.lower("Unsqueeze", note="expand_dims")
def unsqueeze(node: ir.Node, ctx: Lowering) -> None:
    x, axes = ctx.value(node.inputs[0]), _ints(ctx, node.inputs[1])
    sizes = np.expand_dims(np.empty(x.shape, np.bool_), tuple(axes)).shape
    _reshaped(node, ctx, x, "expand_dims", {"axes": _vector(axes)}, sizes)


def _reshaped(
    node: ir.Node, ctx: Lowering, x: Value, op: str, parameters: dict[str, Array], sizes: Sequence[int]
) -> None:
    if x.known is not None:
        _set(ctx, node, ctx.known(x.known.reshape(tuple(sizes))))
        return
    _set(ctx, node, ctx.emit(op, {"x": x, **parameters}, sizes, x.dtype, _label(node)))


@OPS.lower("Transpose", note="transpose; of a weight, part of the multiplication by it")
def transpose(node: ir.Node, ctx: Lowering) -> None:
    weight = stored(node.inputs[0])
    users = [use for use, _ in node.outputs[0].uses()]
    if weight is not None and weight.name in ctx.model.weights and all(linear(use) for use in users):
        return
    x = ctx.value(node.inputs[0])
    perm = [int(each) for each in attribute(node, "perm") or range(len(x.shape))[::-1]]
    if x.known is not None:
        _set(ctx, node, ctx.known(x.known.transpose(perm)))
        return
    sizes = [x.shape[axis] for axis in perm]
    _set(ctx, node, ctx.emit("transpose", {"x": x, "perm": _vector(perm)}, sizes, x.dtype, _label(node)))


@OPS.lower("Concat", note="concat")
def concat(node: ir.Node, ctx: Lowering) -> None:
    values = [ctx.value(each) for each in node.inputs]
    axis = int(attribute(node, "axis")) % len(values[0].shape)
    known = [value.known for value in values if value.known is not None]
    if len(known) == len(values):
        _set(ctx, node, ctx.known(np.concatenate(known, axis=axis)))
        return
    dtype = next(value.dtype for value in values if value.known is None)
    sizes = list(values[0].shape)
    sizes[axis] = sum(value.shape[axis] for value in values)
    inputs: dict[str, Input] = {
        "values": [ctx.materialised(value, dtype) for value in values],
        "axis": axis,
        "interleave": False,
    }
    _set(ctx, node, ctx.emit("concat", inputs, sizes, dtype, _label(node)))


@OPS.lower("Split", note="split")
def split(node: ir.Node, ctx: Lowering) -> None:
    x = ctx.value(node.inputs[0])
    axis = int(attribute(node, "axis", 0)) % len(x.shape)
    given = _ints(ctx, node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    count = len(node.outputs)
    size = -(-x.shape[axis] // count)
    parts = given or [min(size, x.shape[axis] - i * size) for i in range(count)]
    if x.known is not None:
        _set(ctx, node, *(ctx.known(each) for each in np.split(x.known, np.cumsum(parts)[:-1], axis=axis)))
        return
    shapes = [(*x.shape[:axis], part, *x.shape[axis + 1 :]) for part in parts]
    inputs: dict[str, Input] = {"x": x, "split_sizes": _vector(parts), "axis": axis}
    _set(ctx, node, *ctx.emit_many("split", inputs, shapes, x.dtype, _label(node)))


@OPS.lower("Slice", note="slice_by_index; of the last token of a padded prompt, gather")
def slice_(node: ir.Node, ctx: Lowering) -> None:
    x = ctx.value(node.inputs[0])
    cut = _cuts(node, ctx, len(x.shape))
    if x.known is not None:
        _set(ctx, node, ctx.known(x.known[tuple(cut)]))
        return
    if ctx.last is not None and _is_last_token(x, cut, ctx.tokens):
        _set(ctx, node, _looked_up(ctx, x, ctx.last, 1, _label(node)))
        return
    bounds = [each.indices(count) for each, count in zip(cut, x.shape, strict=True)]
    sizes = [len(range(*each)) for each in bounds]
    begins, stops, strides = (_vector([each[i] for each in bounds]) for i in range(3))
    to_start = stops < 0  # downwards past 0, which no index says
    inputs: dict[str, Input] = {
        "x": x,
        "begin": begins,
        "end": np.maximum(stops, 0),
        "stride": strides,
        "end_mask": to_start,
    }
    _set(ctx, node, ctx.emit("slice_by_index", inputs, sizes, x.dtype, _label(node)))


def _cuts(node: ir.Node, ctx: Lowering, rank: int) -> list[slice]:
    """What a Slice takes of each axis."""
    starts, ends = (_ints(ctx, each) for each in node.inputs[1:3])
    optional = [_ints(ctx, each) if each is not None else None for each in node.inputs[3:5]]
    axes = (optional[0] if optional and optional[0] else None) or list(range(len(starts)))
    steps = (optional[1] if len(optional) > 1 and optional[1] else None) or [1] * len(starts)
    cut = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut[axis % rank] = slice(start, end, step)
    return cut


def takes_last_token(node: ir.Node, ctx: Lowering) -> bool:
    """Whether a Slice of [1,T,D] takes the last of all tokens."""
    x = ctx.value(node.inputs[0])
    return _is_last_token(x, _cuts(node, ctx, len(x.shape)), ctx.tokens)


def _is_last_token(x: Value, cut: list[slice], tokens: int) -> bool:
    """Whether the last of all tokens of [1,T,D] is taken."""
    return len(x.shape) == 3 and x.shape[1] == tokens and cut[1].start == -1 and cut[0] == cut[2] == slice(None)


def _first(ctx: Lowering, x: Value, count: int) -> Value:
    """The first `count` of the last axis."""
    return _cut(ctx, x, len(x.shape) - 1, 0, count)


def _cut(ctx: Lowering, x: Value, axis: int, start: int, stop: int) -> Value:
    sizes = [stop - start if i == axis else size for i, size in enumerate(x.shape)]
    begin = [start if i == axis else 0 for i in range(len(x.shape))]
    return ctx.emit("slice_by_size", {"x": x, "begin": _vector(begin), "size": _vector(sizes)}, sizes, x.dtype, "part")
