"""The canonical dialect: the closed list of ops a component's graph may use, and what each may look like.

ONNX opset 24, domain ai.onnx only, float32 activations, batch 1. Small on purpose: every op here costs a row in
every backend. `verify` refuses anything else; `linears` finds the weight multiplications that quantisation, sizes
and lowerings are about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeexport import errors
from edgeexport.core import Finding, TensorClass, TensorRef

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 24
IR_VERSION = 11
MAX_RANK = 4

Limit = Callable[["ir.Node"], "str | None"]
"""Gives the reason why a node is outside the dialect, or None."""


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's value, of the type that the op's schema gives it, or `default`."""
    found = node.attributes.get(name)
    return found.value if found is not None else default


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind a value that is an initializer (references included), else None."""
    return value.const_value if value is not None and value.is_initializer() else None


def _has(**wanted: object) -> Limit:
    def limit(node: ir.Node) -> str | None:
        for name, value in wanted.items():
            if attribute(node, name) != value:
                return f"{name} is {attribute(node, name)}; the dialect has {name}={value}"
        return None

    return limit


def _constant_input(*positions: int) -> Limit:
    def limit(node: ir.Node) -> str | None:
        for i in positions:
            if i < len(node.inputs) and node.inputs[i] is not None and constant(node.inputs[i]) is None:
                return f"input {i} must be a constant"
        return None

    return limit


def _cache_in_place(node: ir.Node) -> str | None:
    """The cache is a graph input, written once, and the result is a graph output: runtimes alias the two."""
    if attribute(node, "axis") != -2 or attribute(node, "mode", "linear") != "linear":
        return "the dialect has TensorScatter with axis=-2, mode=linear"
    past = node.inputs[0]
    if past is None or not past.is_graph_input() or not node.outputs[0].is_graph_output():
        return "a cache must go from a graph input through one TensorScatter to a graph output"
    return None


def _attention(node: ir.Node) -> str | None:
    if attribute(node, "is_causal") == 1 and (len(node.inputs) < 7 or node.inputs[6] is None):
        return "causal attention without nonpad_kv_seqlen (input 6) would attend to empty cache slots"
    return None


OPS: dict[str, Limit | None] = {
    "Add": None,
    "Attention": _attention,
    "BatchNormalization": _has(training_mode=None),
    "Cast": None,
    "Clip": _constant_input(1, 2),
    "Concat": None,
    "Conv": _has(auto_pad="NOTSET"),
    "Gather": None,
    "Gelu": _has(approximate="none"),
    "LayerNormalization": _has(axis=-1),
    "MatMul": None,
    "Mul": None,
    "RMSNormalization": _has(axis=-1),
    "Range": None,
    "Reshape": _constant_input(1),
    "RotaryEmbedding": None,
    "Shape": None,
    "Sigmoid": None,
    "Slice": _constant_input(1, 2, 3, 4),
    "Split": _constant_input(1),
    "Squeeze": _constant_input(1),
    "Sub": None,
    "TensorScatter": _cache_in_place,
    "Transpose": None,
    "Unsqueeze": _constant_input(1),
}
"""Op name to its limit. Adding a row here means adding one to every backend's table."""


@dataclass(frozen=True)
class Linear:
    """`output = input @ weight.T`: a MatMul whose right side is a transposed weight [N, K], perhaps behind a Cast."""

    node: ir.Node
    input: ir.Value
    weight: ir.Value
    output: ir.Value


def linears(graph: ir.Graph) -> Iterator[Linear]:
    """Every multiplication by a weight, in graph order."""
    for node in graph:
        if (found := linear(node)) is not None:
            yield found


def linear(node: ir.Node) -> Linear | None:
    """The Linear that `node` is, or None: MatMul(x, Transpose(weight)) or MatMul(x, Transpose(Cast(weight)))."""
    if node.op_type != "MatMul":
        return None
    x, right = node.inputs
    transpose = right.producer() if right is not None else None
    if x is None or transpose is None or transpose.op_type != "Transpose":
        return None
    weight = stored(transpose.inputs[0])
    if weight is None or weight.shape is None or len(weight.shape) != 2:
        return None
    return Linear(node, x, weight, node.outputs[0])


def stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer a value is, looking through the Cast of a weight stored in another dtype; else None."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return value if value is not None and value.is_initializer() else None


def verify(model: ir.Model) -> None:
    """Check that the graph is in the dialect.

    Raises: ExportError with one `not-in-dialect` finding per node that is not.
    """
    problems = [problem for node in model.graph if (problem := _problem(node)) is not None]
    if problems:
        raise errors.ExportError(*problems)


def _problem(node: ir.Node) -> Finding | None:
    where = f"{node.name} ({node.metadata_props.get('edgeexport.module', 'no module path')})"
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPS:
        return errors.not_in_dialect(node.op_type, where, f"the dialect's ops are {', '.join(sorted(OPS))}")
    limit = OPS[node.op_type]
    reason = limit(node) if limit else None
    if reason is None:
        for value in node.outputs:
            if value.shape is not None and len(value.shape) > MAX_RANK:
                reason = f"{value.name} has rank {len(value.shape)}; tensors have at most {MAX_RANK} dimensions"
    return errors.not_in_dialect(node.op_type, where, reason) if reason else None


MULTIPLIED: frozenset[TensorClass] = frozenset({"linear", "encoder", "lm_head"})
"""Classes of weights that are multiplied by and never looked up: blocks of others have no offsets, which a lookup would
have to add."""


def classes(model: ir.Model, weights: Mapping[str, TensorRef], component: str) -> dict[str, TensorClass]:
    """What each weight is for, by its use in the graph: a looked-up table is an embedding (also when it is the tied
    head), a multiplication whose result is the logits is the lm_head, any other is linear, or, outside the decoder,
    an encoder's; a kernel is a convolution's."""
    found: dict[str, TensorClass] = dict.fromkeys(weights, "other")
    for item in linears(model.graph):
        if component != "decoder":
            found[str(item.weight.name)] = "encoder"
        else:
            found[str(item.weight.name)] = "lm_head" if item.output.is_graph_output() else "linear"
    for node in model.graph:
        table = stored(node.inputs[0]) if node.op_type == "Gather" else None
        if table is not None and table.name in weights:
            found[str(table.name)] = "embedding"
        kernel = stored(node.inputs[1]) if node.op_type == "Conv" else None
        if kernel is not None and kernel.name in weights:
            found[str(kernel.name)] = "convolution"
    return found
