"""Patterns of the canonical graph that one op of MNN's takes over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeexport.canonical.dialect import attribute, stored
from edgeexport.core import CanonicalModel

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Heads:
    """One attention over MNN's own cache: q, k and v are [1,heads,T,head_dim]; `output` is [1,T,heads * head_dim]."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    output: ir.Value
    absorbed: tuple[ir.Node, ...]


def match_heads(attention: ir.Node) -> Heads | None:
    """The pattern that MNN's attention replaces, or None.

    Reshape(Transpose(Attention(q, TensorScatter(k), TensorScatter(v))))
    """
    if attention.op_type != "Attention" or attribute(attention, "is_causal") != 1:
        return None
    scatters = [value.producer() if value is not None else None for value in attention.inputs[1:3]]
    turned = _only_user(attention.outputs[0], "Transpose")
    flat = _only_user(turned.outputs[0], "Reshape") if turned is not None else None
    if turned is None or flat is None or any(node is None or node.op_type != "TensorScatter" for node in scatters):
        return None
    nodes = [node for node in scatters if node is not None]
    q, k, v = attention.inputs[0], nodes[0].inputs[1], nodes[1].inputs[1]
    assert q is not None and k is not None and v is not None, "inputs that the dialect requires"
    return Heads(q, k, v, flat.outputs[0], (*nodes, turned, flat))


def _only_user(value: ir.Value, op: str) -> ir.Node | None:
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op else None


def lookup_of(model: CanonicalModel) -> str | None:
    """The weight that a component looks token ids up in, where that is all it does."""
    graph: ir.Graph = model.graph.graph
    nodes = [node for node in graph if node.op_type != "Cast"]
    if [value.name for value in graph.inputs] != ["input_ids"] or [node.op_type for node in nodes] != ["Gather"]:
        return None
    table = stored(nodes[0].inputs[0])
    return str(table.name) if table is not None and table.name in model.weights else None
