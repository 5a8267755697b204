"""The lowered graph of ONNX Runtime as it grows: values, weights in the file, and the patterns that span nodes.

What each op becomes is in onnxruntime_ops.py; this room needs onnx-ir, that one does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeexport.backends.optable import OpTable
from edgeexport.backends.storage import Layout
from edgeexport.canonical.dialect import Linear, attribute, constant, linears, stored
from edgeexport.core import CanonicalModel, Dim, Format, QuantPlan

MS = "com.microsoft"
OFFSET_BLOCK = 32
"""Offsets that share a scale where they are a weight of 8 bits, as MatMulNBits wants it. One scale for all would do,
but rows are padded to whole blocks: 18 offsets of a row of 576 weights take 32 bytes, and fewer scales than in 16s."""


@dataclass(frozen=True)
class Heads:
    """One attention with everything that GroupQueryAttention takes over. q, k and v are [1,T,heads * head_dim], or,
    where a norm works on each head first, [1,T,heads,head_dim]."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    cos: ir.Value | None
    sin: ir.Value | None
    interleaved: int
    heads: int
    kv_heads: int
    output: ir.Value
    absorbed: tuple[ir.Node, ...]


class Lowering:
    """The new graph as it grows: old value -> new value, and where each weight will lie."""

    def __init__(
        self, model: CanonicalModel, plan: QuantPlan, layout: Layout, table: OpTable, accuracy_level: int
    ) -> None:
        self.model, self.plan, self.layout, self.table = model, plan, layout, table
        self.accuracy_level = accuracy_level
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.values: dict[ir.Value, ir.Value] = {}
        self.packed: dict[tuple[ir.Value, ...], ir.Value] = {}
        """Outputs of multiplications that were merged, and the one value that holds them side by side."""
        self._wide: dict[str, ir.Value] = {}
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}
        graph: ir.Graph = model.graph.graph
        self.inputs = [self._copy(value) for value in graph.inputs]
        self.siblings = merge_groups(graph, plan)
        self.attentions = {node: found for node in graph if (found := match_heads(node)) is not None}
        self.absorbed = {node for found in self.attentions.values() for node in found.absorbed}

    def run(self) -> ir.Model:
        """Lower every node in order; what nothing reads any more is dropped."""
        graph: ir.Graph = self.model.graph.graph
        for node in graph:
            row = self.table.get(node.op_type)
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

    def value(self, old: ir.Value | None) -> ir.Value:
        """The new value that stands for `old`; a weight enters the layout when it is first asked for."""
        assert old is not None, "an input that the dialect requires"
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
        key = f"{name}.scales"
        if key not in self._wide:
            held = self.external(key, at, (rows, width // fmt.block if fmt.block else 1), ir.DataType.FLOAT16)
            wide = self.emit("Cast", [held], {"to": ir.DataType.FLOAT})
            if not fmt.block:
                shape = ir.tensor(np.array([rows, width // block], np.int64), name=f"{key}.shape")
                wide = self.emit("Expand", [wide, self._initializer(f"{key}.shape", shape)])
            self._wide[key] = wide
        return self._wide[key]

    def zero_points(self, name: str, rows: int, blocks: int) -> list[ir.Value]:
        """Where the format has them, the file's zero points, two a byte and each row in whole bytes: uint8 [rows,
        bytes]. In this form they cost no time; as floats they would make the kernel unpack the whole weight first."""
        held = self.layout.weights[name]
        if held.format.shift != "zero":
            return []
        return [self.packed_rows(f"{name}.zero_points", held.shift_offset, (rows, -(-blocks // 2)))]

    def times_offsets(self, x: ir.Value, name: str, rows: int, blocks: int, block: int) -> ir.Value:
        """[1,T,rows]: sums of x over blocks, times a weight's int8 offsets, which are 8-bit weights of their own.

        Measured on one thread with AVX2, against the weight without offsets: for 2048 x 8192, one token takes 1.07
        times as long, with float32 offsets 1.14 to 1.33 times, which are also four times as large; 64 tokens take 1.15
        times as long with either. The small matrices of SmolLM2 take 1.2 times as long with either, since four nodes
        cost about as much as what they compute. A lower accuracy level unpacks the offsets in each step: 1.8 times.
        """
        inputs = [self._block_sums(x, blocks, block), *self._offsets(name, rows, blocks)]
        settings = {"K": blocks, "N": rows, "bits": 8, "block_size": OFFSET_BLOCK}
        return self.emit("MatMulNBits", inputs, {**settings, "accuracy_level": self.accuracy_level}, MS)

    def _offsets(self, name: str, rows: int, blocks: int) -> tuple[ir.Value, ir.Value]:
        """The file's int8 offsets and their float16 scales as uint8 [rows, n, OFFSET_BLOCK] and float32 [rows, n]; made
        once, at session creation."""
        at, key, count = self.layout.weights[name], f"{name}.offsets", -(-blocks // OFFSET_BLOCK)
        zero = self._initializer("offsets.zero", ir.tensor(np.array(128, np.uint8), name="offsets.zero"))
        held = self.packed_rows(key, at.shift_offset, (rows, blocks))
        values = self.emit("BitwiseXor", [held, zero])  # int8 to value + 128
        if spare := count * OFFSET_BLOCK - blocks:
            values = self.emit("Pad", [values, self.small(f"offsets.pad.{spare}", [0, 0, 0, spare]), zero])
        values = self.emit("Reshape", [values, self.small(f"offsets.rows.{count}", [-1, count, OFFSET_BLOCK])])
        scales = self.external(f"{key}.scales", at.shift_scales_offset, (rows, 1), ir.DataType.FLOAT16)
        wide = self.emit("Expand", [self.cast(scales, "float32"), self.small(f"offsets.scales.{count}", [1, count])])
        return values, wide

    def _block_sums(self, x: ir.Value, blocks: int, block: int) -> ir.Value:
        """[1,T,blocks]: the sums of each block of x, which all multiplications of x share. AveragePool and a MatMul by
        ones are a single node, and slower than these two, for one token as for many."""
        if (x, block) not in self._sums:
            cut = self.emit("Reshape", [x, self.small(f"blocks.{blocks}x{block}", [0, 0, blocks, block])])
            self._sums[x, block] = self.emit("ReduceSum", [cut, self.small("blocks.axis", [-1])], {"keepdims": 0})
        return self._sums[x, block]

    def packed_rows(self, name: str, offset: int, shape: Iterable[int]) -> ir.Value:
        """Packed integers of the file as uint8 of this shape."""
        return self.external(name, offset, shape, ir.DataType.UINT8)

    def small(self, name: str, values: Sequence[int]) -> ir.Value:
        """A few int64 numbers inside the graph."""
        return self._initializer(name, ir.tensor(np.array(values, np.int64), name=name))

    def cast(self, value: ir.Value, dtype: str, name: str = "") -> ir.Value:
        """`value` as "float32" or "int32"."""
        return self.emit(
            "Cast", [value], {"to": {"float32": ir.DataType.FLOAT, "int32": ir.DataType.INT32}[dtype]}, name=name
        )

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
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        outputs: int = 1,
        name: str = "",
    ) -> ir.Value:
        """Append a node; returns its first output (the others hang on its producer)."""
        label = name or f"{op}.{len(self.nodes)}"
        node = ir.node(op, inputs, dict(attributes or {}), domain=domain, num_outputs=outputs, name=label)
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
        """The initializer of this name: whoever asks for it again means the same."""
        if name in self.initializers:
            return self.initializers[name]
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(int(str(dim)) for dim in tensor.shape),
            const_value=tensor,
        )
        self.initializers[name] = value
        return value


HEAD_MULTIPLE = 8
"""GroupQueryAttention takes no heads of another width.
Source: onnxruntime contrib_ops/cpu/bert/group_query_attention_helper.h."""

ROTARY_MULTIPLE = 16
"""It turns no other number of a head's channels; of the whole head, where it turns a part. Source: the same."""


def match_heads(attention: ir.Node) -> Heads | None:
    """The pattern GroupQueryAttention replaces, or None: that runtime's own Attention runs then, which takes any width
    and copies the cache.

    q, k = RotaryEmbedding(Transpose(...), tables, positions);  v = Transpose(...)
    Reshape(Transpose(Attention(q, TensorScatter(k), TensorScatter(v))))
    """
    if attention.op_type != "Attention" or attribute(attention, "is_causal") != 1:
        return None
    scatter_k, scatter_v = (_made_by(attention.inputs[i], "TensorScatter") for i in (1, 2))
    rope_q = _made_by(attention.inputs[0], "RotaryEmbedding")
    rope_k = _made_by(scatter_k.inputs[1], "RotaryEmbedding") if scatter_k else None
    if not (scatter_k and scatter_v and rope_q and rope_k):
        return None
    width, turns = _last(scatter_k.inputs[0]), 2 * _last(rope_q.inputs[1])
    if not width or width % HEAD_MULTIPLE:
        return None
    if len(rope_q.inputs) < 4 or width % ROTARY_MULTIPLE or not turns or turns % ROTARY_MULTIPLE:
        return _match_turned(attention, scatter_k, scatter_v, rope_q, rope_k)
    turned = [_made_by(value, "Transpose") for value in (rope_q.inputs[0], rope_k.inputs[0], scatter_v.inputs[1])]
    after = _only_user(attention.outputs[0], "Transpose")
    flat = _only_user(after.outputs[0], "Reshape") if after else None
    if not all(turned) or after is None or flat is None:
        return None
    q, k, v = (_flat(node.inputs[0]) for node in turned if node)
    cos, sin = rope_q.inputs[1:3]
    values = [value for value in (q, k, v, *scatter_k.inputs[:1], *scatter_v.inputs[:1], cos, sin) if value is not None]
    counts = [value.shape[1] for value in (rope_q.outputs[0], rope_k.outputs[0]) if value.shape is not None]
    known = [count for count in counts if isinstance(count, int)]
    if len(values) != 7 or len(known) != 2 or rope_q.inputs[1:4] != rope_k.inputs[1:4]:
        return None
    absorbed = (scatter_k, scatter_v, rope_q, rope_k, after, flat)
    interleaved = 1 if attribute(rope_q, "interleaved", 0) == 1 else 0
    return Heads(
        q=values[0],
        k=values[1],
        v=values[2],
        past_key=values[3],
        past_value=values[4],
        cos=values[5],
        sin=values[6],
        interleaved=interleaved,
        heads=known[0],
        kv_heads=known[1],
        output=flat.outputs[0],
        absorbed=absorbed,
    )


def _match_turned(
    attention: ir.Node, scatter_k: ir.Node, scatter_v: ir.Node, rope_q: ir.Node, rope_k: ir.Node
) -> Heads | None:
    """The same where each token brings its own angles (M-RoPE), or heads have a width that GroupQueryAttention does not
    turn: q and k come out of RotaryEmbedding as [1,heads,T,head_dim], and only the cache and the attention are
    absorbed."""
    turned = _made_by(scatter_v.inputs[1], "Transpose")
    after = _only_user(attention.outputs[0], "Transpose")
    flat = _only_user(after.outputs[0], "Reshape") if after else None
    q, k = rope_q.outputs[0], rope_k.outputs[0]
    v = _flat(turned.inputs[0]) if turned is not None else None
    past_key, past_value = scatter_k.inputs[0], scatter_v.inputs[0]
    if v is None or past_key is None or past_value is None or after is None or flat is None:
        return None
    if q.shape is None or k.shape is None or not (isinstance(q.shape[1], int) and isinstance(k.shape[1], int)):
        return None
    return Heads(
        q, k, v, past_key, past_value, None, None, 0, q.shape[1], k.shape[1], flat.outputs[0],
        (scatter_k, scatter_v, after, flat),
    )  # fmt: skip


def merge_groups(graph: ir.Graph, plan: QuantPlan) -> dict[ir.Node, tuple[Linear, ...]]:
    """Multiplications of one input by integer weights of one format: they become a single MatMulNBits.

    Its kernel quantises the input and wakes the threads once instead of two or three times.
    """
    found: dict[tuple[ir.Value, Format], list[Linear]] = {}
    for item in linears(graph):
        fmt = plan.formats[str(item.weight.name)]
        if fmt.integer:
            found.setdefault((item.input, fmt), []).append(item)
    return {item.node: tuple(items) for items in found.values() if len(items) > 1 for item in items}


def _last(value: ir.Value | None) -> int:
    """The size of the last axis; 0 where it is not known."""
    size = value.shape[-1] if value is not None and value.shape is not None else 0
    return size if isinstance(size, int) else 0


def _flat(value: ir.Value | None) -> ir.Value | None:
    """What was reshaped into heads, or, where it was not a Reshape that made them, the heads themselves."""
    made = _made_by(value, "Reshape")
    return made.inputs[0] if made is not None else value


def _made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None


def _only_user(value: ir.Value, op: str) -> ir.Node | None:
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op else None
