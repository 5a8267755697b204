"""The op table for NNAPI: LiteRT's, with other rows where the delegate would leave the work to the processor.

TensorScatter   ->  nothing: the new keys and values are an output, and the loader writes them into its cache
Attention       ->  scores of the cache and of the new keys side by side, in one SOFTMAX; the mask by arithmetic
Conv            ->  DEPTHWISE_CONV_2D where every channel is a group of its own: CONV_2D is taken without groups
MatMul          ->  CONV_2D of 1 x 1 by int8 rows, a token a batch: the delegate takes no FULLY_CONNECTED by them
Gather          ->  GATHER of a widened float16 table: EMBEDDING_LOOKUP is taken of float32 alone
Gelu            ->  arithmetic with EXP: NNAPI has neither it nor an error function
all others      ->  as LiteRT's
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeexport.backends import litert_ops
from edgeexport.backends.optable import OpTable
from edgeexport.canonical.dialect import attribute, linear

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeexport.backends.litert_file import Tensor
    from edgeexport.backends.litert_lowering import Lowering

OPS = OpTable("litert-nnapi")
HIDDEN = -30000.0
"""What is added to the score of a key that must not be attended to: exp of it is 0, and it fits float16, in which a
driver may compute."""
ERF_P = 0.3275911
ERF_A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _cached(node: ir.Node) -> str | None:
    """The keys and values of causal attention are a cache that was written just before."""
    if attribute(node, "is_causal", 0) != 1:
        return litert_ops.unmasked(node)
    for k in (1, 2):
        value = node.inputs[k]
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != "TensorScatter":
            return f"input {k} is no cache that TensorScatter wrote"
    return litert_ops.unmasked(node)


def _computed(node: ir.Node) -> str | None:
    new = node.inputs[1]
    return "its update is an input of the graph" if new is None or new.is_graph_input() else None


@OPS.lower("TensorScatter", note="nothing: the update is an output, and the loader writes the cache", limit=_computed)
def tensor_scatter(node: ir.Node, ctx: Lowering) -> None:
    """TensorScatter(past_cache, update, write_indices)"""
    ctx.tensors[node.outputs[0]] = ctx.value(node.inputs[1])


@OPS.lower("Attention", note="BATCH_MATMUL with the cache and with the new keys, one SOFTMAX over both", limit=_cached)
def attention(node: ir.Node, ctx: Lowering) -> None:
    """Attention(Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen)"""
    q = ctx.value(node.inputs[0])
    _, heads, length, width = q.shape
    scale = attribute(node, "scale", None)
    q = ctx.binary("MUL", q, ctx.scalar(width**-0.5 if scale is None else float(scale)))
    if attribute(node, "is_causal", 0) == 1:
        made = _over_cache(node, ctx, q)
    else:
        made = _over_all(ctx, q, ctx.value(node.inputs[1]), ctx.value(node.inputs[2]))
    ctx.tensors[node.outputs[0]] = ctx.reshape(made, (1, heads, length, made.shape[3]))


def _over_cache(node: ir.Node, ctx: Lowering, q: Tensor) -> Tensor:
    """What the last tokens see of the cache, up to the position, and of themselves."""
    writes = [value.producer() for value in node.inputs[1:3] if value is not None]
    past_k, past_v, k, v = (ctx.value(each.inputs[side]) for side in (0, 1) for each in writes if each is not None)
    position = writes[0].inputs[2] if writes[0] is not None else None
    keys, slots, length = k.shape[1], past_k.shape[2], k.shape[2]
    q, rows = _folded(ctx, q, keys)
    before = ctx.binary("ADD", _multiply(ctx, q, past_k, turned=True), _mask(ctx, ctx.value(position), slots))
    new = _multiply(ctx, q, k, turned=True)
    if length > 1:
        later = np.triu(np.full((length, length), HIDDEN, np.float32), 1)
        new = ctx.binary("ADD", new, ctx.graph.constant(np.tile(later, (rows // length, 1))[None, None]))
    weights = _softmax(ctx, ctx.concat([before, new], 3))
    seen = _multiply(ctx, ctx.slice(weights, 3, 0, slots), past_v)
    return ctx.binary("ADD", seen, _multiply(ctx, ctx.slice(weights, 3, slots, slots + length), v))


def _over_all(ctx: Lowering, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token sees every key, those apart that pad them."""
    q, _ = _folded(ctx, q, k.shape[1])
    scores = _multiply(ctx, q, k, turned=True)
    if ctx.count is not None:
        scores = ctx.binary("ADD", scores, _mask(ctx, ctx.count, k.shape[2]))
    return _multiply(ctx, _softmax(ctx, scores), v)


def _folded(ctx: Lowering, q: Tensor, keys: int) -> tuple[Tensor, int]:
    """Heads that share a key as rows of one multiplication, and how many rows there are."""
    _, heads, length, width = q.shape
    rows = heads // keys * length
    return ctx.reshape(q, (1, keys, rows, width)), rows


def _multiply(ctx: Lowering, left: Tensor, right: Tensor, *, turned: bool = False) -> Tensor:
    """left @ right, or with `turned` left @ right^T."""
    sizes = (*left.shape[:3], right.shape[2 if turned else 3])
    return ctx.graph.emit("BATCH_MATMUL", [left, right], sizes, "BatchMatMulOptions", adjY=turned)


def _softmax(ctx: Lowering, scores: Tensor) -> Tensor:
    return ctx.graph.emit("SOFTMAX", [scores], scores.shape, "SoftmaxOptions", beta=1.0)


def _mask(ctx: Lowering, filled: Tensor, slots: int) -> Tensor:
    """0 for the first `filled` (int32 [1]) slots, HIDDEN for the others: float32 [1,1,1,slots], made once.

    The delegate has neither SELECT_V2 nor a clamp to 0 and 1: slot + 1 - filled is below 1 for the first alone.
    """

    def make() -> Tensor:
        count = ctx.graph.emit("CAST", [filled], filled.shape, "CastOptions")
        slot = ctx.graph.constant(np.arange(1, slots + 1, dtype=np.float32)[None, None, None])
        behind = ctx.binary("SUB", slot, ctx.reshape(count, (1, 1, 1, 1)))
        behind = ctx.graph.emit("RELU", [behind], behind.shape)
        behind = ctx.binary("MINIMUM", behind, ctx.graph.constant(np.ones((1, 1, 1, 1), np.float32)))
        return ctx.binary("MUL", behind, ctx.scalar(HIDDEN))

    return ctx.once(("mask", filled, slots), make)


@OPS.lower("MatMul", note="CONV_2D by int8 rows, FULLY_CONNECTED by other weights, BATCH_MATMUL of two activations")
def matmul(node: ir.Node, ctx: Lowering) -> None:
    """MatMul(A, B)

    Kernels round activations to int8 with one scale for a batch, so each token is one.
    """
    found = linear(node)
    fmt = ctx.format_of(str(found.weight.name)) if found is not None else None
    if found is None or fmt is None or not fmt.integer or fmt.bits != 8:
        litert_ops.matmul(node, ctx)
        return
    x, kernel = ctx.value(found.input), ctx.row_kernel(str(found.weight.name))
    count = int(np.prod(x.shape[:-1], dtype=np.int64))
    bias, output = litert_ops.bias_of(found.output, ctx)
    outputs, width = kernel.shape[0], kernel.shape[3]
    added = bias or ctx.graph.constant(np.zeros(outputs, np.float32))
    made = ctx.graph.emit(
        "CONV_2D", [ctx.reshape(x, (count, 1, 1, width)), kernel, added],
        (count, 1, 1, outputs), "Conv2DOptions", version=5, padding=ctx.graph.file.schema.Padding.VALID,
        strideH=1, strideW=1, dilationHFactor=1, dilationWFactor=1,
    )  # fmt: skip
    ctx.tensors[found.output] = ctx.tensors[output] = ctx.reshape(made, (*x.shape[:-1], outputs))


@OPS.lower("Gelu", note="ABS, MUL, ADD, DIV and EXP: the error function to 1.5e-7")
def gelu(node: ir.Node, ctx: Lowering) -> None:
    """Gelu(X) = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2

    Source of the error function: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    x = ctx.value(node.inputs[0])
    size = ctx.graph.emit("ABS", [x], x.shape, "AbsOptions")
    below = ctx.binary("ADD", ctx.binary("MUL", size, ctx.scalar(ERF_P / 2**0.5)), ctx.scalar(1.0))
    t = ctx.graph.emit("DIV", [ctx.scalar(1.0), below], x.shape, "DivOptions")
    power = ctx.scalar(ERF_A[-1])
    for factor in ERF_A[-2::-1]:
        power = ctx.binary("ADD", ctx.binary("MUL", t, power), ctx.scalar(factor))
    square = ctx.binary("MUL", ctx.binary("MUL", size, size), ctx.scalar(-0.5))
    tail = ctx.binary("MUL", ctx.binary("MUL", t, power), ctx.graph.emit("EXP", [square], x.shape, "ExpOptions"))
    half = ctx.binary("MUL", ctx.binary("MUL", size, ctx.scalar(0.5)), tail)
    positive = ctx.graph.emit("RELU", [x], x.shape)
    ctx.tensors[node.outputs[0]] = ctx.binary("SUB", positive, half)


@OPS.lower("Conv", note="CONV_2D, or DEPTHWISE_CONV_2D, between two TRANSPOSEs", limit=litert_ops.weighted)
def conv(node: ir.Node, ctx: Lowering) -> None:
    """Conv(X, W, B)"""
    litert_ops.convolve(node, ctx, depthwise=True)


@OPS.lower("Gather", note="EMBEDDING_LOOKUP from a weight, GATHER from one of float16 as it is widened; else GATHER")
def gather(node: ir.Node, ctx: Lowering) -> None:
    """Gather(data, indices)"""
    name = ctx.weight_of(node.inputs[0])
    if name is None or ctx.format_of(name).integer or ctx.format_of(name).bits == 32:
        litert_ops.gather(node, ctx)
        return
    table, indices = ctx.float_weight(name), ctx.value(node.inputs[1])
    flat = ctx.reshape(indices, (int(np.prod(indices.shape, dtype=np.int64)),))
    rows = ctx.graph.emit("GATHER", [table, flat], (*flat.shape, *table.shape[1:]), "GatherOptions", axis=0)
    ctx.tensors[node.outputs[0]] = ctx.reshape(rows, (*indices.shape, *table.shape[1:]))


OPS.include(row for row in litert_ops.OPS if OPS.get(row.op) is None)
