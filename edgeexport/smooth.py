"""Find where outliers of activations can be moved into weights, and how far: the canonical decoder is run over some of
the calibration's texts, one layer at a time. What is moved is quant/smoothing.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeexport.calibrate import tokens_of
from edgeexport.canonical.dialect import Linear, linear, linears, stored
from edgeexport.core import Array, CanonicalModel, Progress, QuantPlan
from edgeexport.quant.smoothing import Fold, Smoothing, choose, readers_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgeexport.canonical.streaming import Rows

TOKENS = 2048
"""Of the calibration's that are fed."""
KEPT = 512
"""Rows of what a multiplication is fed, and of each weight, that a choice is made by."""
RUN = 32
"""Rows of a weight that are read at once."""


@dataclass(frozen=True)
class Site:
    """What one value is made by, and the weights that read it and nothing else."""

    producer: str
    consumers: tuple[str, ...]


def sites(model: CanonicalModel, plan: QuantPlan) -> list[Site]:
    """Where a decoder's outliers can be moved: values that only multiplications by integers read, made by an RMSNorm
    with a weight of its own, or by a product with a multiplication (a gated MLP's)."""
    found: dict[ir.Value, list[Linear]] = {}
    for item in linears(model.graph.graph):
        found.setdefault(item.input, []).append(item)
    made = []
    for value, readers in found.items():
        names = tuple(dict.fromkeys(str(item.weight.name) for item in readers))
        nodes = {item.node for item in readers}
        if value.is_graph_output() or any(user not in nodes for user, _ in value.uses()):
            continue
        if not all(_takes(plan, str(item.weight.name)) and _read_once(item.weight) for item in readers):
            continue
        producer = _producer(value, model, plan)
        if producer is not None:
            made.append(Site(producer, names))
    return made


def _takes(plan: QuantPlan, name: str) -> bool:
    """Whether a weight is one of a decoder's whose input is rounded to int8, in 8 bits or with integers of the
    checkpoint's own. Rounding to 4 bits loses more by moved columns than activations gain (docs/quantisation.md)."""
    fmt = plan.formats[name]
    held = name in plan.carried or fmt.bits == 8
    return plan.classes[name] == "linear" and held and fmt.integer and not fmt.float8 and not fmt.palette


def _producer(value: ir.Value, model: CanonicalModel, plan: QuantPlan) -> str | None:
    """The weight whose elements or rows scale the channels of this value; None where there is none."""
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "RMSNormalization":
        weight = stored(node.inputs[1])
        fits = weight is not None and weight.name in model.weights and _read_once(weight)
        return str(weight.name) if weight is not None and fits and not plan.formats[str(weight.name)].integer else None
    for factor in node.inputs if node.op_type == "Mul" else ():
        maker = factor.producer() if factor is not None else None
        item = linear(maker) if maker is not None else None
        if item is None or len(item.output.uses()) != 1 or item.output.is_graph_output():
            continue
        if plan.classes[str(item.weight.name)] == "linear" and _read_once(item.weight):
            return str(item.weight.name)
    return None


def _read_once(value: ir.Value) -> bool:
    """Whether one node alone reads a weight, perhaps behind a Cast and a Transpose."""
    users = [user for user, _ in value.uses()]
    return len(users) == 1 and (users[0].op_type not in ("Cast", "Transpose") or _read_once(users[0].outputs[0]))


def run(
    model: CanonicalModel,
    plan: QuantPlan,
    calls: Sequence[Mapping[str, Array]],
    rows: Rows,
    progress: Progress,
) -> Smoothing:
    """What to move in a decoder. `calls` are a calibration's, of which every n-th is fed, so that all kinds of text
    are among them; `rows` give the checkpoint's weights by the graph's names.

    Raises: CheckpointError for weights that cannot be stored.
    """
    from edgeexport.canonical.streaming import StreamedGraph

    found = sites(model, plan)
    sizes = list(map(tokens_of, calls))
    fed = calls[:: max(1, sum(sizes) // TOKENS)]
    by_reader = {site.consumers[0]: site for site in found}
    graph = StreamedGraph(model, tapped=True, slots=max(sizes))
    values = graph.begin(fed)
    gathered: dict[str, list[Array]] = {}
    every = max(1, sum(map(tokens_of, fed)) // KEPT)

    def tap(name: str, x: Array) -> None:
        if name in by_reader:  # the first token of a text is one of its kind, and each text has it
            gathered.setdefault(name, []).append(x.reshape(-1, x.shape[-1])[::every].copy())

    chosen: dict[str, Fold] = {}
    for done, stage in enumerate(model.stages[:-1]):  # the last reads one token alone, and a table that is looked up in
        graph.advance(stage, values, rows, tap)
        for name in list(gathered):
            site, seen = by_reader[name], np.concatenate(gathered.pop(name))
            some = {each: (_some(model, rows, each), model.weights[each].shape[0]) for each in site.consumers}
            exponents = choose(seen, readers_of(site.consumers, some, plan))
            if exponents is not None:
                chosen[name] = Fold(site.producer, site.consumers, exponents)
        progress(done + 1, len(model.stages) - 1)
    return Smoothing(list(chosen.values()))


def _some(model: CanonicalModel, rows: Rows, name: str) -> Array:
    """About `KEPT` rows of a weight, in runs spread over all of it."""
    count = model.weights[name].shape[0]
    if count <= KEPT:
        return rows(name, 0, count)
    starts = np.linspace(0, count - RUN, KEPT // RUN).astype(int)
    return np.concatenate([rows(name, int(start), int(start) + RUN) for start in starts])
