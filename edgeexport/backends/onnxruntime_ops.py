"""The op table of ONNX Runtime: the dialect as it is, with attention, weights and norms as its contrib ops.

    Attention + TensorScatter + RotaryEmbedding  ->  GroupQueryAttention, cache updated in place
    MatMul by an int4 or int8 weight             ->  MatMulNBits
    MatMul by a float weight                     ->  FusedMatMul (transB), so that no weight is transposed
    Gather from an integer table                 ->  GatherBlockQuantized
    Add, RMSNormalization                        ->  SkipSimplifiedLayerNormalization

Source of the contrib ops' contracts: onnxruntime docs/ContribOperators.md, version 1.31.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeexport.backends.optable import OpTable
from edgeexport.backends.storage import Layout
from edgeexport.canonical.dialect import attribute, constant, linear, stored
from edgeexport.core import CanonicalModel, Dim, Format, QuantPlan

MS = "com.microsoft"
BLOCK_SIZES = (128, 64, 32, 16)
"""What MatMulNBits is given for one scale per row: the largest of these that divides the width; the scale is
repeated for each block when the session is created, never on disk."""

OPS = OpTable("onnxruntime")
OPS.native(
    "Add", "Cast", "Mul", "Range", "Reshape", "Shape", "Sigmoid", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"
)


@dataclass(frozen=True)
class Heads:
    """One attention with everything that GroupQueryAttention takes over."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: int
    heads: int
    kv_heads: int
    output: ir.Value
    absorbed: tuple[ir.Node, ...]


class Lowering:
    """The new graph as it grows: old value -> new value, and where each weight will lie."""

    def __init__(self, model: CanonicalModel, plan: QuantPlan, layout: Layout, accuracy_level: int) -> None:
        self.model, self.plan, self.layout, self.accuracy_level = model, plan, layout, accuracy_level
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.values: dict[ir.Value, ir.Value] = {}
        graph: ir.Graph = model.graph.graph
        self.inputs = [self._copy(value) for value in graph.inputs]
        self.attentions = {node: found for node in graph if (found := match_heads(node)) is not None}
        self.absorbed = {node for found in self.attentions.values() for node in found.absorbed}

    def run(self) -> ir.Model:
        """Lower every node in order; what nothing reads any more is dropped."""
        graph: ir.Graph = self.model.graph.graph
        for node in graph:
            row = OPS.get(node.op_type)
            if node in self.absorbed:
                continue
            if row is not None and row.lower is not None:
                row.lower(node, self)
            else:
                self.keep(node)
        outputs = [self.values[value] for value in graph.outputs]
        for old, new, spec in zip(graph.outputs, outputs, self.model.outputs, strict=True):
            new.name, new.type = spec.name, old.type
            new.shape = ir.Shape([size.name if isinstance(size, Dim) else size for size in spec.shape])
        lowered = ir.Graph(
            self.inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={**graph.opset_imports, MS: 1},
            name=graph.name,
        )
        return ir.Model(lowered, ir_version=10, producer_name="edgeexport")

    def value(self, old: ir.Value) -> ir.Value:
        """The new value that stands for `old`; a weight enters the layout when it is first asked for."""
        if old not in self.values:
            weight = stored(old)
            if weight is not None and weight.name in self.model.weights:
                self.values[old] = self.float_weight(weight)
            else:
                tensor = constant(old)
                assert tensor is not None, f"{old.name} is used before it is made"
                self.values[old] = self.add_constant(str(old.name), tensor)
        return self.values[old]

    def add_constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A constant of the graph: into the file when it is a table, into the graph when it is small."""
        array = tensor.numpy()
        if array.nbytes <= 1024:
            return self._initializer(name, ir.tensor(array, name=name))
        return self.external(name, self.layout.add_constant(name, array), array.shape, ir.DataType(tensor.dtype))

    def float_weight(self, weight: ir.Value) -> ir.Value:
        """A weight stored as float: float32, or float16 behind a Cast that is folded when the session is created."""
        name = str(weight.name)
        shape, fmt = self.model.weights[name].shape, self.plan.formats[name]
        if name not in self.layout.weights:
            self.layout.add([name], [shape], fmt)
        at = self.layout.weights[name].offset
        dtype = ir.DataType.FLOAT if fmt.bits == 32 else ir.DataType.FLOAT16
        held = self.initializers.get(name) or self.external(name, at, shape, dtype)
        return held if dtype == ir.DataType.FLOAT else self.emit("Cast", [held], {"to": ir.DataType.FLOAT})

    def integer_weights(self, names: Sequence[str]) -> tuple[int, int, int, Format]:
        """Weights stored as one run of integer rows: (data offset, scales offset, rows, format)."""
        fmt = self.plan.formats[names[0]]
        shapes = [self.model.weights[name].shape for name in names]
        if names[0] not in self.layout.weights:
            self.layout.add(names, shapes, fmt)
        first = self.layout.weights[names[0]]
        return first.offset, first.scales_offset, sum(shape[0] for shape in shapes), fmt

    def scales(self, name: str, at: int, rows: int, width: int, fmt: Format, block: int) -> ir.Value:
        """float32 scales [rows, width / block] out of the file's float16 ones; computed once, at session creation."""
        per_row = width // fmt.block if fmt.block else 1
        key = f"{name}.scales"
        held = self.initializers.get(key) or self.external(key, at, (rows, per_row), ir.DataType.FLOAT16)
        wide = self.emit("Cast", [held], {"to": ir.DataType.FLOAT})
        if not fmt.block:
            shape = ir.tensor(np.array([rows, width // block], np.int64), name=f"{key}.shape")
            wide = self.emit("Expand", [wide, self._initializer(f"{key}.shape", shape)])
        return wide

    def external(self, name: str, offset: int, shape: Iterable[int], dtype: ir.DataType) -> ir.Value:
        """An initializer that lies in the weight file."""
        sizes = tuple(shape)
        length = int(np.prod(sizes, dtype=np.int64)) * dtype.bitwidth // 8
        tensor = ir.ExternalTensor(self.layout.file, offset, length, dtype, shape=ir.Shape(sizes), name=name)
        return self._initializer(name, tensor)

    def emit(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, object] | None = None,
        domain: str = "",
        outputs: int = 1,
        name: str = "",
    ) -> ir.Value:
        """Append a node; returns its first output (the others hang on its producer)."""
        label = name or f"{op}.{len(self.nodes)}"
        node = ir.node(op, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=label)
        for k, value in enumerate(node.outputs):
            value.name = label if k == 0 else f"{label}.{k}"
        self.nodes.append(node)
        return node.outputs[0]

    def keep(self, node: ir.Node) -> None:
        """The node as it is."""
        if node.op_type in ("Cast", "Transpose") and stored(node.inputs[0]) is not None:
            weight = stored(node.inputs[0])
            if weight is not None and weight.name in self.model.weights:
                return  # part of a weight's reading: whoever uses it asks for the weight itself
        inputs = [self.value(value) if value is not None else None for value in node.inputs]
        copy = ir.Node(
            node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs), name=node.name
        )
        self.nodes.append(copy)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = old.name
            self.values[old] = new

    def _copy(self, value: ir.Value) -> ir.Value:
        new = self.values[value] = ir.Value(name=value.name, type=value.type, shape=value.shape)
        return new

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.initializers[name] = value
        return value


def match_heads(attention: ir.Node) -> Heads | None:
    """The pattern GroupQueryAttention replaces, or None.

    q, k = RotaryEmbedding(Transpose(Reshape(...)), tables, positions);  v = Transpose(Reshape(...))
    Reshape(Transpose(Attention(q, TensorScatter(k), TensorScatter(v))))
    """
    if attention.op_type != "Attention" or attribute(attention, "is_causal") != 1:
        return None
    scatter_k, scatter_v = (_made_by(attention.inputs[i], "TensorScatter") for i in (1, 2))
    rope_q = _made_by(attention.inputs[0], "RotaryEmbedding")
    rope_k = _made_by(scatter_k.inputs[1], "RotaryEmbedding") if scatter_k else None
    if not (scatter_k and scatter_v and rope_q and rope_k) or len(rope_q.inputs) < 4:
        return None
    turned = [_made_by(value, "Transpose") for value in (rope_q.inputs[0], rope_k.inputs[0], scatter_v.inputs[1])]
    after = _only_user(attention.outputs[0], "Transpose")
    flat = _only_user(after.outputs[0], "Reshape") if after else None
    if not all(turned) or after is None or flat is None:
        return None
    split = [_made_by(node.inputs[0], "Reshape") for node in turned if node]
    if not all(split):
        return None
    q, k, v = (node.inputs[0] for node in split if node)
    heads, kv_heads = (value.shape[1] for value in (rope_q.outputs[0], rope_k.outputs[0]) if value.shape)
    needed = (q, k, v, scatter_k.inputs[0], scatter_v.inputs[0], rope_q.inputs[1], rope_q.inputs[2])
    if any(value is None for value in needed) or rope_q.inputs[1:4] != rope_k.inputs[1:4]:
        return None
    absorbed = (scatter_k, scatter_v, rope_q, rope_k, after, flat)
    return Heads(
        *needed, int(attribute(rope_q, "interleaved", 0)), int(heads), int(kv_heads), flat.outputs[0], absorbed
    )  # type: ignore[arg-type, call-overload]


@OPS.lower("Attention", note="GroupQueryAttention where it is causal over a cache and rotated by tables")
def attention(node: ir.Node, ctx: Lowering) -> None:
    """Attention(Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen)"""
    found = ctx.attentions.get(node)
    if found is None:
        ctx.keep(node)
        return
    length = ctx.value(node.inputs[6])  # type: ignore[arg-type]
    last, total = _lengths(ctx, length)
    out = ctx.emit(
        "GroupQueryAttention",
        [
            *(ctx.value(value) for value in (found.q, found.k, found.v, found.past_key, found.past_value)),
            last,
            total,
            ctx.value(found.cos),
            ctx.value(found.sin),
        ],
        {
            "num_heads": found.heads,
            "kv_num_heads": found.kv_heads,
            "do_rotary": 1,
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
    for cache, new in zip((node.inputs[1], node.inputs[2]), producer.outputs[1:], strict=True):
        ctx.values[cache] = new  # type: ignore[index]


def _lengths(ctx: Lowering, length: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(seqlens_k int32 [1] = length - 1, total_sequence_length int32 scalar), made once for all layers."""
    made = {node.name: node.outputs[0] for node in ctx.nodes if node.name in ("gqa.last", "gqa.total")}
    if not made:
        one = ctx.add_constant("gqa.one", ir.tensor(np.array([1], np.int64)))
        before = ctx.emit("Sub", [length, one], name="gqa.before")
        made["gqa.last"] = ctx.emit("Cast", [before], {"to": ir.DataType.INT32}, name="gqa.last")
        scalar = ctx.emit("Squeeze", [length], name="gqa.scalar")
        made["gqa.total"] = ctx.emit("Cast", [scalar], {"to": ir.DataType.INT32}, name="gqa.total")
    return made["gqa.last"], made["gqa.total"]


OPS.native("RotaryEmbedding", "TensorScatter")


@OPS.lower("MatMul", note="MatMulNBits for an integer weight, FusedMatMul for a float one")
def matmul(node: ir.Node, ctx: Lowering) -> None:
    """MatMul(A, B)"""
    found = linear(node)
    if found is None:
        ctx.keep(node)
        return
    name = str(found.weight.name)
    x = ctx.value(found.input)
    if not ctx.plan.formats[name].integer:
        weight = ctx.float_weight(found.weight)
        ctx.values[found.output] = ctx.emit("FusedMatMul", [x, weight], {"transB": 1}, MS, name=node.name or "")
        return
    at, scales_at, rows, fmt = ctx.integer_weights([name])
    width = ctx.model.weights[name].shape[1]
    block = fmt.block or next(size for size in BLOCK_SIZES if width % size == 0)
    packed = ctx.external(f"{name}.packed", at, (rows, width // block, block * fmt.bits // 8), ir.DataType.UINT8)
    scales = ctx.scales(name, scales_at, rows, width, fmt, block)
    settings = {
        "K": width,
        "N": rows,
        "bits": fmt.bits,
        "block_size": block,
        "accuracy_level": ctx.accuracy_level,
    }
    ctx.values[found.output] = ctx.emit("MatMulNBits", [x, packed, scales], settings, MS, name=node.name or "")


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
    block = fmt.block or next(size for size in BLOCK_SIZES if width % size == 0)
    data = ctx.external(f"{name}.rows", at, (rows, width * fmt.bits // 8), ir.DataType.UINT8)
    scales = ctx.scales(name, scales_at, rows, width, fmt, block)
    settings = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": fmt.bits}
    indices = ctx.value(node.inputs[1])  # type: ignore[arg-type]
    ctx.values[node.outputs[0]] = ctx.emit("GatherBlockQuantized", [data, indices, scales], settings, MS)


@OPS.lower("RMSNormalization", note="SkipSimplifiedLayerNormalization where a residual is added just before")
def rms_norm(node: ir.Node, ctx: Lowering) -> None:
    """RMSNormalization(X, scale)"""
    x, scale = node.inputs
    assert x is not None and scale is not None
    epsilon = {"epsilon": attribute(node, "epsilon", 1e-5)}
    weight = ctx.value(scale)
    add = x.producer()
    residual = ctx.values[x].producer() if add is not None and x in ctx.values else None
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


def _made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None


def _only_user(value: ir.Value, op: str) -> ir.Node | None:
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op else None
