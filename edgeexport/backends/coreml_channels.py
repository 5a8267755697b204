"""The Neural Engine's layout: activations [1, C, 1, T], multiplications by weights as convolutions of 1 x 1.

Source: Apple, "Deploying Transformers on the Apple Neural Engine" (2022): the engine takes 4 axes, of which the last is
contiguous and padded to 64 bytes; tokens there and channels on the second axis need no copies.

An op in RULES whose input is held so gives its result so. The same value as the canonical graph has it is made beside
it, for whatever op comes next; where nothing reads it, it is left out of the program. Attention keeps [1, H, T, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgeexport.canonical.dialect import attribute, linear

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeexport.backends.coreml_lowering import Input, Lowering, Value

MULTIPLE = 32
"""Sizes of axes that the engine takes without padding, in float16: 64 bytes."""

Rule = Callable[["ir.Node", "Lowering"], bool]


def lower(node: ir.Node, ctx: Lowering) -> bool:
    """Lower a node in this layout; False where it has to be lowered as the table says."""
    rule = RULES.get(node.op_type)
    return rule is not None and rule(node, ctx)


def _name(node: ir.Node) -> str:
    return str(node.outputs[0].name)


def _vector(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def has_form(shape: tuple[int, ...]) -> bool:
    """Whether values of this shape, [1, T, C] or [T, C], can be held so."""
    return len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)


def form_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that they are held in."""
    return (1, shape[-1], 1, shape[-2])


def held(ctx: Lowering, old: ir.Value | None) -> Value | None:
    """A value [1, C, 1, T], if it has been made so."""
    return ctx.channels.get(old) if old is not None else None


def turned(ctx: Lowering, old: ir.Value | None) -> Value:
    """A value [1, T, C] or [T, C] as [1, C, 1, T], made once."""
    assert old is not None, "an input that the dialect requires"
    if old not in ctx.channels:
        x = ctx.materialised(ctx.value(old))
        perm = (1, 0) if len(x.shape) == 2 else (0, 2, 1)
        axes = (0, 2) if len(x.shape) == 2 else (2,)
        flat = tuple(x.shape[axis] for axis in perm)
        made = ctx.emit("transpose", {"x": x, "perm": _vector(*perm)}, flat, name=f"{old.name}_turned")
        shape = form_of(x.shape)
        ctx.channels[old] = ctx.emit(
            "expand_dims", {"x": made, "axes": _vector(*axes)}, shape, name=f"{old.name}_channels"
        )
    return ctx.channels[old]


def give(ctx: Lowering, old: ir.Value, made: Value, rank: int) -> None:
    """Set a result, and the same as the canonical graph has it."""
    ctx.channels[old] = made
    _, channels, _, count = made.shape
    axes, flat = ((0, 2), (channels, count)) if rank == 2 else ((2,), (1, channels, count))
    thin = ctx.emit("squeeze", {"x": made, "axes": _vector(*axes)}, flat, name=f"{old.name}_thin")
    perm = (1, 0) if rank == 2 else (0, 2, 1)
    shape = tuple(flat[axis] for axis in perm)
    ctx.values[old] = ctx.emit("transpose", {"x": thin, "perm": _vector(*perm)}, shape, name=f"{old.name}_tokens")


def _rank(ctx: Lowering, old: ir.Value | None) -> int:
    return len(ctx.value(old).shape)


def _matmul(node: ir.Node, ctx: Lowering) -> bool:
    found = linear(node)
    if found is None or not ctx.is_constant_expression(str(found.weight.name)):
        return False
    if not has_form(ctx.value(found.input).shape):
        return False
    x, kernel = turned(ctx, found.input), ctx.kernel(str(found.weight.name))
    inputs: dict[str, Input] = {
        "x": x,
        "weight": kernel,
        "strides": _vector(1, 1),
        "pad_type": "valid",
        "pad": _vector(0, 0, 0, 0),
        "dilations": _vector(1, 1),
        "groups": 1,
    }
    made = ctx.emit("conv", inputs, (1, kernel.shape[0], 1, x.shape[3]), name=_name(node))
    give(ctx, node.outputs[0], made, _rank(ctx, found.input))
    return True


def _elementwise(op: str) -> Rule:
    def rule(node: ir.Node, ctx: Lowering) -> bool:
        known = [old for old in node.inputs if held(ctx, old) is not None]
        if not known:
            return False
        like = ctx.value(known[0]).shape
        parts = [_beside(ctx, old, like) for old in node.inputs]
        if any(part is None for part in parts):
            return False
        inputs: dict[str, Input] = {key: part for key, part in zip("xy", parts, strict=True) if part is not None}
        made = ctx.emit(op, inputs, turned(ctx, known[0]).shape, name=_name(node))
        give(ctx, node.outputs[0], made, len(like))
        return True

    return rule


def _beside(ctx: Lowering, old: ir.Value | None, like: tuple[int, ...]) -> Value | None:
    """An operand for a value that is `like` this in the canonical graph, or None where there is no such form."""
    value = ctx.value(old)
    if value.shape == like:
        return turned(ctx, old)
    if int(np.prod(value.shape, dtype=np.int64)) == 1 and value.known is not None:
        return ctx.materialised(ctx.known(value.known.reshape(())), "float16")
    return _per_channel(ctx, old) if value.shape == like[-1:] else None


def _per_channel(ctx: Lowering, old: ir.Value | None) -> Value:
    """A vector [C] as [1, C, 1, 1], made once."""
    key = ("channel vector", old)
    if key not in ctx.memo:
        vector = ctx.materialised(ctx.value(old), "float16")
        shape = (1, vector.shape[0], 1, 1)
        ctx.memo[key] = ctx.emit(
            "reshape", {"x": vector, "shape": _vector(*shape)}, shape, name=f"{vector.name}_channels"
        )
    return ctx.memo[key]


def _activation(op: str, **parameters: str) -> Rule:
    def rule(node: ir.Node, ctx: Lowering) -> bool:
        x = held(ctx, node.inputs[0])
        if x is None:
            return False
        made = ctx.emit(op, {"x": x, **parameters}, x.shape, name=_name(node))
        give(ctx, node.outputs[0], made, _rank(ctx, node.inputs[0]))
        return True

    return rule


def _rms_norm(node: ir.Node, ctx: Lowering) -> bool:
    """As the table's: layer_norm of [x, -x], here over the second axis."""
    x, name = held(ctx, node.inputs[0]), _name(node)
    if x is None:
        return False
    wide = (1, 2 * x.shape[1], *x.shape[2:])
    negative = ctx.emit("mul", {"x": x, "y": np.array(-1, np.float16)}, x.shape, name=f"{name}_negative")
    both = ctx.emit("concat", {"values": [x, negative], "axis": 1, "interleave": False}, wide, name=f"{name}_both")
    normed = _normed(node, ctx, both)
    sizes: dict[str, Input] = {"x": normed, "begin": _vector(0, 0, 0, 0), "size": _vector(*x.shape)}
    half = ctx.emit("slice_by_size", sizes, x.shape, name=f"{name}_half")
    made = ctx.emit("mul", {"x": half, "y": _per_channel(ctx, node.inputs[1])}, x.shape, name=name)
    give(ctx, node.outputs[0], made, _rank(ctx, node.inputs[0]))
    return True


def _layer_norm(node: ir.Node, ctx: Lowering) -> bool:
    x, name = held(ctx, node.inputs[0]), _name(node)
    if x is None:
        return False
    made = _normed(node, ctx, x)
    for op, each in zip(("mul", "add"), node.inputs[1:], strict=False):
        if each is not None:
            made = ctx.emit(op, {"x": made, "y": _per_channel(ctx, each)}, x.shape, name=f"{name}_{op}")
    give(ctx, node.outputs[0], made, _rank(ctx, node.inputs[0]))
    return True


def _normed(node: ir.Node, ctx: Lowering, x: Value) -> Value:
    epsilon = np.array(attribute(node, "epsilon", 1e-5), np.float16)
    inputs: dict[str, Input] = {"x": x, "axes": _vector(1), "epsilon": epsilon}
    return ctx.emit("layer_norm", inputs, x.shape, name=f"{_name(node)}_normed")


def _split(node: ir.Node, ctx: Lowering) -> bool:
    x, rank = held(ctx, node.inputs[0]), _rank(ctx, node.inputs[0])
    if x is None or int(attribute(node, "axis", 0)) % rank != rank - 1:
        return False
    count = len(node.outputs)
    size = -(-x.shape[1] // count)
    given = ctx.value(node.inputs[1]).known if len(node.inputs) > 1 and node.inputs[1] is not None else None
    parts = [min(size, x.shape[1] - place * size) for place in range(count)] if given is None else list(given)
    inputs: dict[str, Input] = {"x": x, "split_sizes": _vector(*parts), "axis": 1}
    made = ctx.emit_many("split", inputs, [(1, int(part), *x.shape[2:]) for part in parts], name=_name(node))
    for old, new in zip(node.outputs, made, strict=True):
        give(ctx, old, new, rank)
    return True


def _last_token(node: ir.Node, ctx: Lowering) -> bool:
    """The last valid token of a padded prompt."""
    from edgeexport.backends.coreml_ops import takes_last_token

    x = held(ctx, node.inputs[0])
    if x is None or not takes_last_token(node, ctx):
        return False
    made = x
    if ctx.last is not None:
        inputs: dict[str, Input] = {
            "x": x, "indices": ctx.last, "axis": 3, "batch_dims": 0, "validate_indices": False,
        }  # fmt: skip
        made = ctx.emit("gather", inputs, (*x.shape[:3], 1), name=_name(node))
    give(ctx, node.outputs[0], made, 3)
    return True


def _to_heads(node: ir.Node, ctx: Lowering) -> bool:
    """Transpose(Reshape(x [1,T,H*D])) to [1,H,T,D]: the channels become heads, then tokens change places with D."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is None or producer.op_type != "Reshape" or list(attribute(node, "perm") or []) != [0, 2, 1, 3]:
        return False
    x, shape = held(ctx, producer.inputs[0]), ctx.value(node.inputs[0]).shape
    if x is None or shape[:2] != (1, x.shape[3]):
        return False
    _, count, heads, width = shape
    parts, name = (1, heads, width, count), _name(node)
    made = ctx.emit("reshape", {"x": x, "shape": _vector(*parts)}, parts, name=f"{name}_heads")
    ctx.values[node.outputs[0]] = ctx.emit(
        "transpose", {"x": made, "perm": _vector(0, 1, 3, 2)}, (1, heads, count, width), name=name
    )
    return True


def _from_heads(node: ir.Node, ctx: Lowering) -> bool:
    """Reshape(Transpose(x [1,H,T,D])) to [1,T,H*D]: the inverse."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is None or producer.op_type != "Transpose" or list(attribute(producer, "perm") or []) != [0, 2, 1, 3]:
        return False
    x, wanted = ctx.value(producer.inputs[0]), ctx.value(node.inputs[1]).known
    if wanted is None or len(wanted) != 3 or len(x.shape) != 4 or x.shape[0] != 1:
        return False
    _, heads, count, width = x.shape
    if int(wanted[2]) not in (heads * width, -1) or int(wanted[1]) not in (count, 0, -1):
        return False
    name, shape = _name(node), (1, heads * width, 1, count)
    made = ctx.emit("transpose", {"x": x, "perm": _vector(0, 1, 3, 2)}, (1, heads, width, count), name=f"{name}_back")
    give(ctx, node.outputs[0], ctx.emit("reshape", {"x": made, "shape": _vector(*shape)}, shape, name=name), 3)
    return True


RULES: Mapping[str, Rule] = {
    "MatMul": _matmul,
    "Add": _elementwise("add"),
    "Sub": _elementwise("sub"),
    "Mul": _elementwise("mul"),
    "Sigmoid": _activation("sigmoid"),
    "Gelu": _activation("gelu", mode="EXACT"),
    "RMSNormalization": _rms_norm,
    "LayerNormalization": _layer_norm,
    "Split": _split,
    "Slice": _last_token,
    "Transpose": _to_heads,
    "Reshape": _from_heads,
}
