"""A decoder that is too large for one file, cut into packages that run one after the other.

The cut is between stages. What a later part needs of an earlier one is the residual stream, which becomes an output
here and an input there; masks, positions and rotary angles follow from the inputs alone, and each part computes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgeexport import errors
from edgeexport.canonical.dialect import linear, stored
from edgeexport.core import CanonicalModel, QuantPlan

STAGE = "edgeexport.stage"
ROOM = 0.98
"""Share of the limit that weights may take; the rest is for records, tables and alignment."""


@dataclass(frozen=True)
class Part:
    """Nodes that are computed in one package, and the values it takes from and gives to other parts."""

    nodes: frozenset[ir.Node]
    takes: tuple[ir.Value, ...]
    gives: tuple[ir.Value, ...]


def cut(model: CanonicalModel, plan: QuantPlan, limit: int | None, target: str) -> list[Part]:
    """The parts of a component, each with weights below `limit` bytes; one part where all fits.

    Raises: LoweringError `artifact-too-large` where a single stage does not fit.
    """
    graph: ir.Graph = model.graph.graph
    groups = _groups(graph, model, plan, limit, target)
    owner = {node: place for place, group in enumerate(groups) for node in group}
    cheap = _follow_from_inputs(graph, model)
    crossing: list[dict[ir.Value, None]] = [{} for _ in groups]
    for node in graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if value is None or producer is None or stored(value) is not None or _is_turned_weight(value, model):
                continue
            if owner[producer] != owner[node] and value not in cheap:
                crossing[owner[node]][value] = None
    return [
        Part(
            frozenset(group),
            tuple(crossing[place]),
            tuple(
                output
                for node in group
                for output in node.outputs
                if any(output in later for later in crossing[place + 1 :])
            ),
        )
        for place, group in enumerate(groups)
    ]


def _groups(
    graph: ir.Graph, model: CanonicalModel, plan: QuantPlan, limit: int | None, target: str
) -> list[list[ir.Node]]:
    """The nodes in order, a new group wherever the next stage's weights would be too many."""
    stages: dict[str, list[ir.Node]] = {}
    last = ""
    for node in graph:
        last = node.metadata_props.get(STAGE, last)
        stages.setdefault(last, []).append(node)
    groups: list[list[ir.Node]] = [[]]
    held: dict[str, int] = {}
    most = ROOM * limit if limit is not None else float("inf")
    for nodes in stages.values():
        own = _weights_of(nodes, model, plan)
        if sum(own.values()) > most:
            raise errors.artifact_too_large(target, sum(own.values()), limit or 0)
        if sum({**held, **own}.values()) > most:
            groups.append([])
            held = {}
        held |= own
        groups[-1] += nodes
    return groups


def _weights_of(nodes: list[ir.Node], model: CanonicalModel, plan: QuantPlan) -> dict[str, int]:
    """Bytes of the weights that nodes use, by name. A Cast of a weight uses nothing: it is part of its reading."""
    found = {}
    for node in nodes:
        item = linear(node)
        read = [item.weight] if item is not None else [stored(value) for value in node.inputs]
        for weight in read:
            if weight is not None and weight.name in model.weights and node.op_type != "Cast":
                name = str(weight.name)
                found[name] = plan.formats[name].nbytes(model.weights[name].shape)
    return found


def _is_turned_weight(value: ir.Value, model: CanonicalModel) -> bool:
    producer = value.producer()
    weight = stored(producer.inputs[0]) if producer is not None and producer.op_type == "Transpose" else None
    return weight is not None and weight.name in model.weights


def _follow_from_inputs(graph: ir.Graph, model: CanonicalModel) -> set[ir.Value]:
    """Values made of whole-numbered inputs and constants alone: no weight, no state, no activation is in them."""
    states = {name for pair in model.state for name in pair}
    cheap = {
        value
        for value in graph.inputs
        if value.name not in states and value.dtype is not None and value.dtype.is_integer()
    }
    for node in graph:
        sources = [value for value in node.inputs if value is not None]
        made = all(value in cheap or (value.is_initializer() and value.name not in model.weights) for value in sources)
        if made or node.op_type == "Shape":  # a size is known while the program is written
            cheap |= set(node.outputs)
    return cheap
