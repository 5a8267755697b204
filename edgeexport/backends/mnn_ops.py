"""The op table of MNN: the dialect in opset 17's words, and MNN's own ops where it has better ones.

Attention + TensorScatter over a cache  ->  Attention with MNN's own cache
MatMul by a weight                      ->  Convolution of one pixel, which holds the weight in its format
RMSNormalization, LayerNormalization    ->  LayerNorm
RotaryEmbedding                         ->  products with cos and sin, gathered once for all layers
Gather of token ids                     ->  MNN-LLM's lookup, outside the graph
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeexport.backends.mnn_patterns import match_heads
from edgeexport.backends.mnn_rewrite import MnnOp
from edgeexport.backends.optable import OpTable
from edgeexport.canonical.dialect import attribute, constant, linear, stored

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeexport.backends.mnn_lowering import Lowering

OPS = OpTable("mnn")
OPS.native(
    "Add", "Cast", "Clip", "Concat", "Mul", "Range", "Reshape", "Sigmoid", "Squeeze", "Sub", "Transpose",
    "Unsqueeze",
)  # fmt: skip
END = 2**31 - 1


def _attention_limit(node: ir.Node) -> str | None:
    if attribute(node, "is_causal", 0) == 1:
        return None if match_heads(node) is not None else "it is causal, and not over a cache that the graph keeps"
    if any(value is not None for value in node.inputs[3:]):
        return "it takes a mask, or a number of keys"
    return None


def _scatter_limit(node: ir.Node) -> str | None:
    readers = [user for user, _ in node.outputs[0].uses()]
    if any(match_heads(user) is not None for user in readers):
        return None
    return "MNN keeps the cache itself, and only for an attention that is causal"


@OPS.lower("TensorScatter", note="MNN's own cache", limit=_scatter_limit)
def scatter(node: ir.Node, ctx: Lowering) -> None:
    """TensorScatter(past, new, position): nothing is left of it, its attention takes it over."""


@OPS.lower(
    "Attention", note="Attention over MNN's own cache; MatMul and Softmax where it has none", limit=_attention_limit
)
def attention(node: ir.Node, ctx: Lowering) -> None:
    """Attention(Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen)"""
    found = ctx.attentions.get(node)
    if found is None:
        _plain_attention(node, ctx)
        return
    assert found.q.shape is not None
    width = found.q.shape[3]
    assert isinstance(width, int), "heads have a fixed width"
    scale = attribute(node, "scale", 1 / math.sqrt(width)) * math.sqrt(width)  # MNN divides by the root itself
    q, k, v = (ctx.tokens_first(value) for value in (found.q, found.k, found.v))
    if not math.isclose(scale, 1, rel_tol=1e-6):
        q = ctx.graph.emit("Mul", [q, ctx.graph.number(scale)])
    op = MnnOp("Attention", ("in0", "in1", "in2", "in3"), "out", {"kv_cache": True}, "AttentionParam")
    ctx.values[found.output] = ctx.graph.place("attention", [q, k, v, ctx.mask], op)


def _plain_attention(node: ir.Node, ctx: Lowering) -> None:
    """softmax(Q K^T scale) V for [1,heads,T,head_dim]; a key serves as many heads of Q as there are for it, as if
    they were further tokens."""
    q, k, v = (ctx.value(value) for value in node.inputs[:3])
    sizes = [value.shape for value in node.inputs[:2] if value is not None and value.shape is not None]
    heads, kv_heads, width = sizes[0][1], sizes[1][1], sizes[0][3]
    assert isinstance(width, int) and isinstance(heads, int) and isinstance(kv_heads, int), "heads are static"
    graph, scale = ctx.graph, attribute(node, "scale", 1 / math.sqrt(width))
    if heads != kv_heads:
        q = graph.emit("Reshape", [q, graph.ints(1, kv_heads, -1, width)])
    scores = graph.emit("MatMul", [q, graph.emit("Transpose", [k], {"perm": [0, 1, 3, 2]})])
    shares = graph.emit("Softmax", [graph.emit("Mul", [scores, graph.number(scale)])], {"axis": -1})
    out = graph.emit("MatMul", [shares, v])
    if heads != kv_heads:
        out = graph.emit("Reshape", [out, graph.ints(1, heads, -1, width)])
    ctx.values[node.outputs[0]] = out


def _conv_limit(node: ir.Node) -> str | None:
    return None if stored(node.inputs[1]) is not None else "its kernel is computed"


@OPS.lower("Conv", note="Convolution, in two dimensions where it has one", limit=_conv_limit)
def conv(node: ir.Node, ctx: Lowering) -> None:
    """Conv(X, W, B)"""
    given, kernel = node.inputs[0], stored(node.inputs[1])
    assert given is not None and given.shape is not None and kernel is not None, "a kernel is a weight"
    name, graph, flat = str(kernel.name), ctx.graph, len(given.shape) == 3
    outputs, inputs, *sizes = ctx.model.weights[name].shape
    strides, dilations = (list(attribute(node, key, [1] * len(sizes))) for key in ("strides", "dilations"))
    pads, group = list(attribute(node, "pads", [0] * 2 * len(sizes))), attribute(node, "group", 1)
    x = ctx.value(given)
    if flat:
        x, sizes, strides, dilations = (
            graph.emit("Unsqueeze", [x, graph.ints(2)]),
            [1, *sizes],
            [1, *strides],
            [1, *dilations],
        )
        pads = [0, pads[0], 0, pads[1]]
    settings = {
        "kernelY": sizes[0], "kernelX": sizes[1], "strideY": strides[0], "strideX": strides[1],
        "dilateY": dilations[0], "dilateX": dilations[1], "pads": pads, "group": group, "inputCount": inputs * group,
    }  # fmt: skip
    alone = group == outputs and inputs == 1
    out = graph.place(
        name, [x],
        MnnOp("ConvertTensor", ("in0",), "packed", {"source": "NCHW", "dest": "NC4HW4"}, "TensorConvertInfo"),
        MnnOp(
            "ConvolutionDepthwise" if alone else "Convolution", ("packed",), "product",
            ctx.convolution(name, settings), "Convolution2D",
        ),
        MnnOp("ConvertTensor", ("product",), "out", {"source": "NC4HW4", "dest": "NCHW"}, "TensorConvertInfo"),
    )  # fmt: skip
    for bias in node.inputs[2:]:
        column = graph.emit("Reshape", [ctx.value(bias), graph.ints(1, outputs, 1, 1)])
        out = graph.emit("Add", [out, column])
    ctx.values[node.outputs[0]] = graph.emit("Squeeze", [out, graph.ints(2)]) if flat else out


@OPS.lower("BatchNormalization", note="a product and a sum for each channel")
def batch_norm(node: ir.Node, ctx: Lowering) -> None:
    """BatchNormalization(X, scale, shift, mean, variance) = (X - mean) / sqrt(variance + epsilon) * scale + shift"""
    graph, given = ctx.graph, node.inputs[0]
    assert given is not None and given.shape is not None
    to = graph.ints(1, -1, *[1] * (len(given.shape) - 2))
    scale, shift, mean, variance = (graph.emit("Reshape", [ctx.value(value), to]) for value in node.inputs[1:5])
    spread = graph.emit("Sqrt", [graph.emit("Add", [variance, graph.number(attribute(node, "epsilon", 1e-5))])])
    centred = graph.emit("Sub", [ctx.value(given), mean])
    scaled = graph.emit("Mul", [centred, graph.emit("Div", [scale, spread])])
    ctx.values[node.outputs[0]] = graph.emit("Add", [scaled, shift])


@OPS.lower("RotaryEmbedding", note="products with cos and sin")
def rotary(node: ir.Node, ctx: Lowering) -> None:
    """RotaryEmbedding(X [1,heads,T,head_dim], cos, sin, positions)"""
    x = node.inputs[0]
    assert x is not None and x.shape is not None
    width, heads = x.shape[3], x.shape[1]
    assert isinstance(width, int) and isinstance(heads, int)
    turned = attribute(node, "rotary_embedding_dim", 0) or width
    cos, sin = _angles(node, ctx)
    graph, given = ctx.graph, ctx.tokens_first(x)
    part = given if turned == width else _slice(ctx, given, 0, turned)
    if attribute(node, "interleaved", 0):
        pairs = graph.emit("Reshape", [part, graph.ints(1, -1, heads * turned // 2, 2)])
        first, second = (
            graph.emit("Reshape", [_slice(ctx, pairs, k, k + 1), graph.ints(1, -1, heads, turned // 2)]) for k in (0, 1)
        )
    else:
        first, second = _slice(ctx, part, 0, turned // 2), _slice(ctx, part, turned // 2, turned)
    left = graph.emit("Sub", [graph.emit("Mul", [first, cos]), graph.emit("Mul", [second, sin])])
    right = graph.emit("Add", [graph.emit("Mul", [second, cos]), graph.emit("Mul", [first, sin])])
    if attribute(node, "interleaved", 0):
        columns = [graph.emit("Reshape", [half, graph.ints(1, -1, heads * turned // 2, 1)]) for half in (left, right)]
        both = graph.emit("Concat", columns, {"axis": 3})
        done = graph.emit("Reshape", [both, graph.ints(1, -1, heads, turned)])
    else:
        done = graph.emit("Concat", [left, right], {"axis": 3})
    if turned != width:
        done = graph.emit("Concat", [done, _slice(ctx, given, turned, width)], {"axis": 3})
    ctx.values[node.outputs[0]] = graph.emit("Transpose", [done], {"perm": [0, 2, 1, 3]})


def _angles(node: ir.Node, ctx: Lowering) -> tuple[ir.Value, ir.Value]:
    """cos and sin [1,T,1,rotary_dim/2], made once."""
    key = tuple(value for value in node.inputs[1:] if value is not None)
    if key not in ctx.turns:
        made = []
        for table in key[:2]:
            rows = ctx.value(table)
            if len(key) == 3:
                rows = _looked_up(ctx, rows, ctx.value(key[2]))
            made.append(ctx.graph.emit("Unsqueeze", [rows, ctx.graph.ints(2)]))
        ctx.turns[key] = (made[0], made[1])
    return ctx.turns[key]


def _looked_up(ctx: Lowering, table: ir.Value, rows: ir.Value) -> ir.Value:
    """Rows of a table, by indices that are never negative: MNN's converter would add a dozen ops for those that are."""
    return ctx.graph.place("gather", [table, rows], MnnOp("GatherV2", ("in0", "in1"), "out", {}))


def _slice(ctx: Lowering, value: ir.Value, start: int, stop: int) -> ir.Value:
    """Part of the last of four axes."""
    return ctx.graph.emit("Slice", [value, ctx.graph.ints(start), ctx.graph.ints(stop), ctx.graph.ints(3)])


@OPS.lower("MatMul", note="Convolution of one pixel for a weight, MatMul for two activations")
def matmul(node: ir.Node, ctx: Lowering) -> None:
    """MatMul(A, B)"""
    found = linear(node)
    if found is None:
        ctx.keep(node)
        return
    rank = len(found.input.shape) if found.input.shape is not None else 3
    ctx.values[found.output] = ctx.linear(ctx.value(found.input), str(found.weight.name), rank)


@OPS.lower("Gather", note="MNN-LLM's lookup for token ids, GatherV2 for other tables, a Slice for one row")
def gather(node: ir.Node, ctx: Lowering) -> None:
    """Gather(data, indices)"""
    graph, axis, row = ctx.graph, attribute(node, "axis", 0), constant(node.inputs[1])
    if axis == 0 and constant(node.inputs[0]) is not None:
        ctx.values[node.outputs[0]] = _looked_up(ctx, ctx.value(node.inputs[0]), ctx.value(node.inputs[1]))
    elif row is not None and row.shape.rank() == 0:  # MNN's Gather would keep the axis
        start = int(row.numpy())
        bounds = [graph.ints(start), graph.ints(start + 1 or END), graph.ints(axis)]
        part = graph.emit("Slice", [ctx.value(node.inputs[0]), *bounds])
        ctx.values[node.outputs[0]] = graph.emit("Squeeze", [part, graph.ints(axis)])
    else:
        ctx.keep(node)


@OPS.lower("RMSNormalization", "LayerNormalization", note="LayerNorm")
def norm(node: ir.Node, ctx: Lowering) -> None:
    """RMSNormalization(X, scale), LayerNormalization(X, scale, shift)"""
    plain = node.op_type == "LayerNormalization"
    main = {"axis": [-1], "epsilon": attribute(node, "epsilon", 1e-5), "useRMSNorm": not plain}
    weights = [stored(value) for value in node.inputs[1:] if value is not None]
    names = [str(weight.name) for weight in weights if weight is not None and weight.name in ctx.model.weights]
    if len(names) == len(weights):
        width = ctx.model.weights[names[0]].shape[0]
        main["external"] = [ctx.file.norm(names, width), 4 * width, 4 * width]
    out = ctx.graph.place("norm", [ctx.value(node.inputs[0])], MnnOp("LayerNorm", ("in0",), "out", main))
    if len(names) != len(weights):
        out = ctx.graph.emit("Mul", [out, ctx.value(node.inputs[1])])
        out = ctx.graph.emit("Add", [out, ctx.value(node.inputs[2])]) if plain and len(node.inputs) > 2 else out
    ctx.values[node.outputs[0]] = out


@OPS.lower("Slice", note="Slice, whose start is MNN-LLM's where it takes the last token")
def slice_(node: ir.Node, ctx: Lowering) -> None:
    """Slice(data, starts, ends, axes, steps)"""
    starts, axes = (constant(node.inputs[k]) for k in (1, 3))
    last = starts is not None and axes is not None and list(starts.numpy()) == [-1] and list(axes.numpy()) == [1]
    if not (ctx.model.state and last):
        ctx.keep(node)
        return
    graph = ctx.graph
    sliced = graph.emit("Slice", [ctx.value(node.inputs[0]), ctx.last, graph.ints(END), graph.ints(1)])
    ctx.values[node.outputs[0]] = sliced


@OPS.lower("Split", note="Slices")
def split(node: ir.Node, ctx: Lowering) -> None:
    """Split(input, split)"""
    axis = attribute(node, "axis", 0)
    sizes = []
    for out in node.outputs:
        assert out.shape is not None and isinstance(out.shape[axis], int), "a split's sizes are fixed"
        sizes.append(int(str(out.shape[axis])))
    given, graph, at = ctx.value(node.inputs[0]), ctx.graph, 0
    for out, size in zip(node.outputs, sizes, strict=True):
        ctx.values[out] = graph.emit("Slice", [given, graph.ints(at), graph.ints(at + size), graph.ints(axis)])
        at += size


@OPS.lower("Shape", note="Shape, and a Slice of it")
def shape(node: ir.Node, ctx: Lowering) -> None:
    """Shape(data), of the axes start..end"""
    graph, given = ctx.graph, node.inputs[0]
    assert given is not None and given.shape is not None
    start, end = attribute(node, "start", 0), attribute(node, "end", len(given.shape))
    sizes = graph.emit("Shape", [ctx.value(given)])
    ctx.values[node.outputs[0]] = graph.emit("Slice", [sizes, graph.ints(start), graph.ints(end), graph.ints(0)])


@OPS.lower("Gelu", note="Erf and products")
def gelu(node: ir.Node, ctx: Lowering) -> None:
    """Gelu(X) = X (1 + erf(X / sqrt 2)) / 2"""
    graph, x = ctx.graph, ctx.value(node.inputs[0])
    erf = graph.emit("Erf", [graph.emit("Mul", [x, graph.number(math.sqrt(0.5))])])
    half = graph.emit("Mul", [x, graph.number(0.5)])
    ctx.values[node.outputs[0]] = graph.emit("Mul", [half, graph.emit("Add", [erf, graph.number(1.0)])])
