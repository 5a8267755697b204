"""The op table of ONNX Runtime: the dialect as it is, with attention, weights and norms as its contrib ops.

    Attention + TensorScatter + RotaryEmbedding  ->  GroupQueryAttention, cache updated in place
    MatMul by int4 or int8 weights               ->  MatMulNBits, one for all that share an input
    MatMul by int4 weights with int8 offsets     ->  the same, and one of 8 bits over the input's block sums
    MatMul by a float weight                     ->  FusedMatMul (transB), so that no weight is transposed
    Gather from an integer table                 ->  GatherBlockQuantized
    Add, RMSNormalization                        ->  SkipSimplifiedLayerNormalization

Source of the contrib ops' contracts: onnxruntime docs/ContribOperators.md, version 1.31.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from edgeexport import errors
from edgeexport.backends.optable import OpTable
from edgeexport.canonical.dialect import attribute, linear, stored
from edgeexport.core import Finding, Format, QuantPlan, Shift

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeexport.backends.onnxruntime_lowering import Lowering

MS = "com.microsoft"
BLOCK_SIZES = (128, 64, 32, 16)
"""What MatMulNBits is given for one scale per row: the largest of these that divides the width; the scale is
repeated for each block when the session is created, never on disk."""

SHIFTS: dict[str, tuple[Shift, ...]] = {"MatMul": ("", "int8", "zero"), "Gather": ("", "zero")}
"""What the blocks of a weight may have beside a scale, by the op that reads it."""

OPS = OpTable("onnxruntime")
OPS.native(
    "Add", "BatchNormalization", "Cast", "Clip", "Concat", "Conv", "Gelu", "LayerNormalization", "Mul", "Range",
    "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "Slice", "Split", "Squeeze", "Sub", "TensorScatter", "Transpose",
    "Unsqueeze",
)  # fmt: skip


@OPS.lower("Attention", note="GroupQueryAttention where it is causal over a cache and rotated by tables")
def attention(node: ir.Node, ctx: Lowering) -> None:
    """Attention(Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen)"""
    found = ctx.attentions.get(node)
    if found is None:
        ctx.keep(node)
        return
    last, total = _lengths(ctx, ctx.value(node.inputs[6]))
    packed = ctx.packed.get((found.q, found.k, found.v))
    if packed is not None:
        qkv = [packed, None, None]
    else:
        qkv = [_flattened(ctx, v, turned=found.cos is None and v is not found.v) for v in (found.q, found.k, found.v)]
    out = ctx.emit(
        "GroupQueryAttention",
        [
            *qkv,
            ctx.value(found.past_key),
            ctx.value(found.past_value),
            last,
            total,
            *([ctx.value(found.cos), ctx.value(found.sin)] if found.cos is not None else []),
        ],
        {
            "num_heads": found.heads,
            "kv_num_heads": found.kv_heads,
            "do_rotary": int(found.cos is not None),
            "rotary_interleaved": found.interleaved,
            "scale": attribute(node, "scale"),
        },
        MS,
        outputs=3,
        name=node.name or "",
    )
    producer = out.producer()
    assert producer is not None
    ctx.values[found.output] = out
    for cache, new in zip(node.inputs[1:3], producer.outputs[1:], strict=True):
        if cache is not None:
            ctx.values[cache] = new


def _flattened(ctx: Lowering, value: ir.Value, *, turned: bool) -> ir.Value:
    """[1,T,heads,head_dim], or where `turned` [1,heads,T,head_dim], as [1,T,heads * head_dim], which is what
    GroupQueryAttention takes."""
    new = ctx.value(value)
    sizes = list(value.shape) if value.shape is not None else []
    if len(sizes) != 4:
        return new
    heads, width = (sizes[1], sizes[3]) if turned else (sizes[2], sizes[3])
    assert isinstance(heads, int) and isinstance(width, int), "heads are static"
    if turned:
        new = ctx.emit("Transpose", [new], {"perm": [0, 2, 1, 3]})
    return ctx.emit("Reshape", [new, ctx.small(f"{value.name}/flat", [0, 0, heads * width])])


def _lengths(ctx: Lowering, length: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(seqlens_k int32 [1] = length - 1, total_sequence_length int32 scalar), made once for all layers."""
    made = {node.name: node.outputs[0] for node in ctx.nodes if node.name in ("gqa.last", "gqa.total")}
    if not made:
        before = ctx.emit("Sub", [length, ctx.small("gqa.one", [1])], name="gqa.before")
        made["gqa.last"] = ctx.cast(before, "int32", "gqa.last")
        made["gqa.total"] = ctx.cast(ctx.emit("Squeeze", [length], name="gqa.scalar"), "int32", "gqa.total")
    return made["gqa.last"], made["gqa.total"]


@OPS.lower("MatMul", note="MatMulNBits for an integer weight, FusedMatMul for a float one")
def matmul(node: ir.Node, ctx: Lowering) -> None:
    """MatMul(A, B)"""
    found = linear(node)
    if found is None:
        ctx.keep(node)
        return
    if found.output in ctx.values:
        return  # made with its siblings
    x = ctx.value(found.input)
    name = str(found.weight.name)
    if not ctx.plan.formats[name].integer:
        weight = ctx.float_weight(found.weight)
        ctx.values[found.output] = ctx.emit("FusedMatMul", [x, weight], {"transB": 1}, MS, name=node.name or "")
        return
    members = ctx.siblings.get(node, (found,))
    names = [str(member.weight.name) for member in members]
    at, scales_at, rows, fmt = ctx.integer_weights(names)
    width = ctx.model.weights[name].shape[1]
    block = _block(fmt, width)
    packed = ctx.packed_rows(f"{name}.packed", at, (rows, width // block, block * fmt.bits // 8))
    scales = ctx.scales(name, scales_at, rows, width, fmt, block)
    settings = {"K": width, "N": rows, "bits": fmt.bits, "block_size": block, "accuracy_level": ctx.accuracy_level}
    zeros = ctx.zero_points(name, rows, width // block)
    out = ctx.emit("MatMulNBits", [x, packed, scales, *zeros], settings, MS, name=node.name or "")
    if fmt.shift == "int8":
        out = ctx.emit("Add", [out, ctx.times_offsets(x, name, rows, width // block, block)])
    if len(members) == 1:
        ctx.values[found.output] = out
        return
    ctx.packed[tuple(member.output for member in members)] = out
    sizes = ctx.small(f"{name}.sizes", [ctx.model.weights[each].shape[0] for each in names])
    parts = ctx.emit("Split", [out, sizes], {"axis": -1}, outputs=len(members)).producer()
    assert parts is not None
    ctx.values.update({member.output: part for member, part in zip(members, parts.outputs, strict=True)})


def _block(fmt: Format, width: int) -> int:
    return fmt.block or next(size for size in BLOCK_SIZES if width % size == 0)


@OPS.lower("Gather", note="GatherBlockQuantized from an integer table")
def gather(node: ir.Node, ctx: Lowering) -> None:
    """Gather(data, indices)"""
    table = stored(node.inputs[0])
    if table is None or str(table.name) not in ctx.model.weights or not ctx.plan.formats[str(table.name)].integer:
        ctx.keep(node)
        return
    name = str(table.name)
    at, scales_at, rows, fmt = ctx.integer_weights([name])
    width = ctx.model.weights[name].shape[1]
    block = _block(fmt, width)
    data = ctx.packed_rows(f"{name}.rows", at, (rows, width * fmt.bits // 8))
    scales = ctx.scales(name, scales_at, rows, width, fmt, block)
    settings = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": fmt.bits}
    indices = ctx.value(node.inputs[1])
    zeros = ctx.zero_points(name, rows, width // block)
    ctx.values[node.outputs[0]] = ctx.emit("GatherBlockQuantized", [data, indices, scales, *zeros], settings, MS)


def refuse_shifts(nodes: Iterable[ir.Node], plan: QuantPlan) -> list[Finding]:
    """One finding for each weight whose blocks have zero points or offsets that the op which reads it cannot add."""
    findings = []
    for node in nodes:
        item = linear(node)
        weight = item.weight if item is not None else stored(node.inputs[0]) if node.op_type == "Gather" else None
        fmt = plan.formats.get(str(weight.name)) if weight is not None else None
        if fmt is not None and fmt.shift not in SHIFTS[node.op_type]:
            why = f"no kernel of {node.op_type} reads {fmt.name}"
            fix = "plan another format for this weight: see `SHIFTS` in onnxruntime_ops.py"
            findings.append(errors.op_not_lowered(OPS.backend, node.op_type, node.name or "", why, fix))
    return findings


@OPS.lower("RMSNormalization", note="SkipSimplifiedLayerNormalization where a residual is added just before")
def rms_norm(node: ir.Node, ctx: Lowering) -> None:
    """RMSNormalization(X, scale)"""
    x, scale = node.inputs
    assert x is not None and scale is not None
    epsilon = {"epsilon": attribute(node, "epsilon", 1e-5)}
    weight = ctx.value(scale)
    add = x.producer()
    residual = ctx.values[x].producer() if add is not None and add.op_type == "Add" and x in ctx.values else None
    unread = residual is not None and not residual.outputs[0].uses()
    if residual is not None and unread and residual.op_type == "Add" and add is not None and _is_residual(add):
        ctx.nodes.remove(residual)
        fused = ctx.emit(
            "SkipSimplifiedLayerNormalization", [*residual.inputs, weight], epsilon, MS, outputs=4, name=node.name or ""
        )
        producer = fused.producer()
        assert producer is not None
        ctx.values[node.outputs[0]] = fused
        ctx.values[x] = producer.outputs[3]
        return
    ctx.values[node.outputs[0]] = ctx.emit(
        "SimplifiedLayerNormalization", [ctx.value(x), weight], {**epsilon, "axis": -1}, name=node.name or ""
    )


def _is_residual(add: ir.Node) -> bool:
    """Whether the Add joins two activations of the same shape, so that the fused op may take it over.

    A symbolic size is the number of tokens; its name differs from stage to stage.
    """
    shapes = [value.shape for value in add.inputs if value is not None and stored(value) is None]
    if len(shapes) != 2 or shapes[0] is None or shapes[1] is None or not len(shapes[0]) == len(shapes[1]) == 3:
        return False
    pairs = zip(shapes[0], shapes[1], strict=True)
    return all(a == b or not (isinstance(a, int) or isinstance(b, int)) for a, b in pairs)
