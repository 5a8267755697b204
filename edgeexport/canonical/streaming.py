"""Run a canonical graph stage by stage in ONNX Runtime, so that only one stage's weights are ever in memory.

Weights enter each stage's graph as inputs: equal stages share one session, and the same graph can be fed with the
checkpoint's weights (is the graph right?) or with an artifact's, read back and dequantised (is the lowering right?).
What the multiplications of a stage are given can be watched on the way, which is what calibration is about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edgeexport.canonical.dialect import constant, linear, stored
from edgeexport.canonical.trace import STAGE
from edgeexport.core import Array, CanonicalModel, Progress, no_progress

Rows = Callable[[str, int, int], Array]
"""(weight name, start, stop) -> float32 rows; of a vector, elements."""

Values = dict[ir.Value, Array]
"""What one call knows at the border between two stages."""

Tap = Callable[[str, Array], None]
"""(weight name, float32 [.., width] that a multiplication by it is given): called once for each call."""

LARGE_BYTES = 16 << 20
"""A weight beyond this is multiplied in row chunks of this size and never held whole. glibc keeps blocks below 32 MB
for the next chunk; larger ones go back to the system, and getting them anew costs as much as filling them."""


@dataclass(frozen=True)
class Trail:
    """What a run left: the outputs of each call by name, and each stage's hidden state float32 [all rows, hidden]."""

    outputs: Sequence[Mapping[str, Array]]
    hidden: Mapping[str, Array]

    @property
    def logits(self) -> Array:
        """A decoder's logits float32 [calls, V]."""
        return np.stack([outputs["logits"].reshape(-1) for outputs in self.outputs])


@dataclass(frozen=True)
class _Segment:
    """Some nodes of one stage as a graph of their own."""

    model: bytes
    activations: tuple[ir.Value, ...]
    weights: tuple[str, ...]
    outputs: tuple[ir.Value, ...]
    tapped: tuple[tuple[ir.Value, tuple[str, ...]], ...]
    """What multiplications are given, and by which weights; those of them that are neither activations nor outputs
    follow the outputs."""

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        return self.activations

    @property
    def makes(self) -> tuple[ir.Value, ...]:
        return self.outputs


@dataclass(frozen=True)
class _Large:
    """A Gather from a weight or a multiplication by a large one, done here in row chunks."""

    node: ir.Node
    weight: str
    input: ir.Value
    output: ir.Value

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        return (self.input,)

    @property
    def makes(self) -> tuple[ir.Value, ...]:
        return (self.output,)


@dataclass(frozen=True)
class _Attend:
    """An attention of every row to all others, done here a chunk of rows at a time: the scores of a large picture
    would take gigabytes."""

    inputs: tuple[ir.Value, ...]
    scale: float
    output: ir.Value

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        return self.inputs

    @property
    def makes(self) -> tuple[ir.Value, ...]:
        return (self.output,)


_Part = _Segment | _Large | _Attend
"""What is run at once: it reads some values of a call, and makes others."""


class StreamedGraph:
    """A component's canonical graph, to be run with weights from anywhere."""

    def __init__(self, model: CanonicalModel, threads: int = 0, *, tapped: bool = False, slots: int = 0) -> None:
        """`threads` that multiply; 0 leaves it to ONNX Runtime: one for each core. `tapped`: `advance` may be asked to
        show what multiplications are given. `slots` of the cache where calls need fewer than the graph has: attention
        works through all of them."""
        self._model = model
        self._threads = threads
        self._tapped = tapped
        self._slots = slots
        self._graph: ir.Graph = model.graph.graph
        self._inputs = {str(value.name): value for value in self._graph.inputs}
        self._plan = {stage: self._cut(stage) for stage in model.stages}
        self._sessions: dict[bytes, ort.InferenceSession] = {}
        last: dict[ir.Value, _Part] = {}
        for part in (part for stage in model.stages for part in self._plan[stage]):
            last.update(dict.fromkeys((*part.reads, *part.makes), part))
        self._done_with: dict[int, list[ir.Value]] = {}
        """The values that nothing needs once a part has run, by its id."""
        for value, part in last.items():
            if not (value.is_graph_output() or value.is_graph_input()):
                self._done_with.setdefault(id(part), []).append(value)

    def run(self, calls: Sequence[Mapping[str, Array]], rows: Rows, progress: Progress = no_progress) -> Trail:
        """Make all calls, one after the other in each stage, before the next stage's weights are read.

        A call names its inputs, a cache apart: that goes from each call to the next.
        """
        values = self.begin(calls)
        hidden: dict[str, Array] = {}
        for done, stage in enumerate(self._model.stages):
            crossing = self.advance(stage, values, rows)
            for value in crossing:
                hidden[stage] = np.concatenate([_matrix(known[value]) for known in values])
            progress(done + 1, len(self._plan))
        kept = {str(value.name): value for value in self._graph.outputs}
        replaced = set(dict(self._model.state).values())
        return Trail(
            [{name: known[value] for name, value in kept.items() if name not in replaced} for known in values], hidden
        )

    def begin(self, calls: Sequence[Mapping[str, Array]]) -> list[Values]:
        """The values of calls before the first stage."""
        return [{self._inputs[name]: call[name] for name in call} for call in calls]

    def advance(self, stage: str, values: list[Values], rows: Rows, tap: Tap | None = None) -> list[ir.Value]:
        """Take these calls through one stage, in place; a value that nothing later reads is dropped at once. Returns
        the hidden states among those that are left."""
        for part in self._plan[stage]:
            if isinstance(part, _Large):
                self._run_large(part, values, rows, tap)
            elif isinstance(part, _Attend):
                for known in values:
                    _run_attend(part, known)
                    self._drop(part, known)
            else:
                self._run_segment(part, values, rows, tap)
        return [value for value in self._crossing(stage) if values and value in values[0]]

    def _drop(self, part: _Part, known: Values) -> None:
        """Forget what only this part still read of a call."""
        for value in self._done_with.get(id(part), ()):
            known.pop(value, None)

    def _run_segment(self, part: _Segment, values: list[Values], rows: Rows, tap: Tap | None) -> None:
        session = self._session(part.model)
        refs = self._model.weights
        weights = {
            f"w{k}": rows(name, 0, refs[name].shape[0]).reshape(refs[name].shape) for k, name in enumerate(part.weights)
        }
        replaced = dict(self._model.state)
        names = [each.name for each in session.get_outputs()][: len(part.outputs)]
        between = [value for value, _ in part.tapped if value not in {*part.activations, *part.outputs}]
        cache: dict[ir.Value, Array] = {}
        for known in values:
            feeds = dict(weights)
            for k, value in enumerate(part.activations):
                if str(value.name) in replaced:
                    feeds[f"a{k}"] = cache[value] if value in cache else self._empty(value)
                else:
                    feeds[f"a{k}"] = known[value]
            arrays = session.run(None if tap is not None else names, feeds)
            results = dict(zip(part.outputs, arrays, strict=False))
            if tap is not None:
                watched = known | results | dict(zip(between, arrays[len(part.outputs) :], strict=True))
                for value, readers in part.tapped:
                    for name in readers:
                        tap(name, watched[value])
            by_name = {str(value.name): array for value, array in results.items()}
            for past, present in replaced.items():
                if present in by_name:
                    cache[self._inputs[past]] = by_name[present]
            known.update({value: array for value, array in results.items() if value.name not in replaced.values()})
            self._drop(part, known)

    def _empty(self, past: ir.Value) -> Array:
        """A cache [1,kv_heads,S,head_dim] that holds nothing."""
        sizes = [size for size in past.shape or () if isinstance(size, int)]
        if self._slots:
            sizes[2] = self._slots
        return np.zeros(sizes, np.float32)

    def _run_large(self, part: _Large, values: list[Values], rows: Rows, tap: Tap | None) -> None:
        count, width = self._model.weights[part.weight].shape
        if part.node.op_type == "Gather":
            for known in values:
                ids = known[part.input]
                looked_up = [rows(part.weight, int(i), int(i) + 1) for i in ids.reshape(-1)]
                known[part.output] = np.concatenate(looked_up)[None]
                self._drop(part, known)
            return
        if tap is not None:
            for known in values:
                tap(part.weight, known[part.input])
            if part.output.is_graph_output():
                return  # logits of what was watched are for nobody
        step = max(1, LARGE_BYTES // (4 * width))
        session = self._session(_multiplication())
        x = np.concatenate([_matrix(known[part.input]) for known in values])  # each chunk is read once for all calls
        products = [np.empty((*known[part.input].shape[:-1], count), np.float32) for known in values]
        for known, product in zip(values, products, strict=True):  # each call's own, which goes when it is done
            known[part.output] = product
            self._drop(part, known)
        ends = np.cumsum([len(_matrix(product)) for product in products])[:-1]
        for start in range(0, count, step):
            chunk = rows(part.weight, start, min(count, start + step))
            pieces = np.split(session.run(None, {"x": x, "w": chunk})[0], ends)
            for product, piece in zip(products, pieces, strict=True):
                _matrix(product)[:, start : start + len(chunk)] = piece

    def _session(self, model: bytes) -> ort.InferenceSession:
        if model not in self._sessions:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = self._threads
            options.enable_cpu_mem_arena = False  # an arena would keep the largest stage's memory
            options.enable_mem_pattern = False
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the other core has work, too
            self._sessions[model] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return self._sessions[model]

    def _cut(self, stage: str) -> list[_Part]:
        """The stage's nodes in order, cut where a weight is looked up in or too large to be held, and at attentions
        without a cache."""
        parts: list[_Part] = []
        open_nodes: list[ir.Node] = []

        def close() -> None:
            if open_nodes:
                parts.append(self._segment(open_nodes))
                open_nodes.clear()

        for node in self._graph:
            if node.metadata_props.get(STAGE) != stage or self._reads_weight(node):
                continue
            large = self._large(node) or _attend(node)
            if large is None:
                open_nodes.append(node)
            else:
                close()
                parts.append(large)
        close()
        return parts

    def _reads_weight(self, node: ir.Node) -> bool:
        """A Transpose of a weight belongs to the multiplication that uses it, wherever that is."""
        return node.op_type == "Transpose" and self._weight(node.inputs[0]) is not None

    def _weight(self, value: ir.Value | None) -> str | None:
        held = stored(value)
        return held.name if held is not None and held.name in self._model.weights else None

    def _large(self, node: ir.Node) -> _Large | None:
        if node.op_type == "Gather" and (name := self._weight(node.inputs[0])) is not None:
            indices = node.inputs[1]
            assert indices is not None
            return _Large(node, name, indices, node.outputs[0])
        found = linear(node)
        if found is None:
            return None
        name = str(found.weight.name)
        if 4 * self._model.weights[name].elements <= LARGE_BYTES:
            return None
        return _Large(node, name, found.input, found.output)

    def _segment(self, nodes: Sequence[ir.Node]) -> _Segment:
        """A graph of these nodes; names are positions, so that equal stages give equal bytes."""
        inside: dict[ir.Value, ir.Value] = {}
        activations: list[ir.Value] = []
        weights: list[str] = []
        inputs: list[ir.Value] = []
        initializers: list[ir.Value] = []
        copies: list[ir.Node] = []

        def new_input(name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> ir.Value:
            value = ir.Value(name=name, type=ir.TensorType(dtype or ir.DataType.FLOAT), shape=shape)
            inputs.append(value)
            return value

        def value(old: ir.Value) -> ir.Value:
            if old in inside:
                return inside[old]
            producer = old.producer()
            name = self._weight(old)
            if name is not None:
                inside[old] = new_input(f"w{len(weights)}", None, ir.Shape(self._model.weights[name].shape))
                weights.append(name)
            elif producer is not None and self._reads_weight(producer):
                inside[old] = copy(producer)
            elif (tensor := constant(old)) is not None:
                held = ir.tensor(tensor.numpy(), name=f"c{len(initializers)}")
                inside[old] = ir.Value(
                    name=held.name,
                    type=ir.TensorType(held.dtype),
                    shape=ir.Shape(int(str(dim)) for dim in held.shape),
                    const_value=held,
                )
                initializers.append(inside[old])
            else:
                inside[old] = new_input(f"a{len(activations)}", old.dtype, None)
                activations.append(old)
            return inside[old]

        def copy(node: ir.Node) -> ir.Value:
            held = [value(item) if item is not None else None for item in node.inputs]
            new = ir.Node(node.domain, node.op_type, held, node.attributes.values(), num_outputs=len(node.outputs))
            new.name = f"n{len(copies)}"
            copies.append(new)
            for k, (old, made) in enumerate(zip(node.outputs, new.outputs, strict=True)):
                made.name = f"{new.name}.{k}"
                inside[old] = made
            return new.outputs[0]

        for node in nodes:
            copy(node)
        members = set(nodes)
        outputs = [
            item
            for node in nodes
            for item in node.outputs
            if item.is_graph_output() or any(user not in members for user, _ in item.uses())
        ]
        tapped: dict[ir.Value, list[str]] = {}
        for node in nodes if self._tapped else ():
            if (found := linear(node)) is not None:
                tapped.setdefault(found.input, []).append(str(found.weight.name))
        shown = [*outputs, *(value for value in tapped if value not in {*activations, *outputs})]
        for item in shown:
            inside[item].type = ir.TensorType(item.dtype or ir.DataType.FLOAT)
        graph = ir.Graph(
            inputs,
            [inside[item] for item in shown],
            nodes=copies,
            initializers=initializers,
            opset_imports=dict(self._graph.opset_imports),
            name="stage",
        )
        proto: Any = ir.serde.serialize_model(ir.Model(graph, ir_version=self._model.graph.ir_version))
        return _Segment(
            proto.SerializeToString(deterministic=True),
            tuple(activations),
            tuple(weights),
            tuple(outputs),
            tuple((value, tuple(names)) for value, names in tapped.items()),
        )

    def _crossing(self, stage: str) -> list[ir.Value]:
        """The stage's hidden state: the one float value of rank 3 that later stages read."""
        found = []
        for node in self._graph:
            if node.metadata_props.get(STAGE) != stage:
                continue
            for value in node.outputs:
                users = {user.metadata_props.get(STAGE) for user, _ in value.uses()}
                if value.dtype == ir.DataType.FLOAT and _is_hidden(value) and users - {stage}:
                    found.append(value)
        return found


def _multiplication() -> bytes:
    """The model x [rows, width], w [count, width] -> x w^T [rows, count]."""
    x, w = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, None])) for name in ("x", "w")
    )
    turned = ir.Node("", "Transpose", [w], [ir.AttrInt64s("perm", [1, 0])])
    product = ir.Node("", "MatMul", [x, turned.outputs[0]])
    product.outputs[0].name = "product"
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    turned.outputs[0].name = "turned"
    graph = ir.Graph([x, w], [product.outputs[0]], nodes=[turned, product], opset_imports={"": 21}, name="product")
    proto: Any = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    return bytes(proto.SerializeToString(deterministic=True))


def _is_hidden(value: ir.Value) -> bool:
    """[1,T,hidden], or a picture's [N,hidden]; a weight's Cast has no stage, and angles go to no residual."""
    rank = len(value.shape) if value.shape is not None else 0
    return rank in (2, 3) and not value.is_graph_input()


def _matrix(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])


def _attend(node: ir.Node) -> _Attend | None:
    """Attention(Q, K, V) of rank 4 without mask, cache or lengths."""
    if node.op_type != "Attention" or len([value for value in node.inputs if value is not None]) != 3:
        return None
    query = node.inputs[0]
    scale = node.attributes["scale"].value if "scale" in node.attributes else None
    if query is None or query.shape is None or len(query.shape) != 4 or not isinstance(scale, float):
        return None
    return _Attend(tuple(value for value in node.inputs if value is not None), scale, node.outputs[0])


def _run_attend(part: _Attend, known: Values) -> None:
    """softmax(Q K^T * scale) V for float32 [1,H,N,D], in chunks of rows of Q."""
    query, key, value = (known[item][0] for item in part.inputs)
    out = np.empty((*query.shape[:2], value.shape[-1]), np.float32)
    step = max(1, LARGE_BYTES // (4 * key.shape[1]))
    turned = np.ascontiguousarray(key.transpose(0, 2, 1))
    for head in range(len(query)):
        for start in range(0, query.shape[1], step):
            scores = query[head, start : start + step] @ turned[head]
            scores *= part.scale
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            np.matmul(scores, value[head], out=out[head, start : start + step])
    known[part.output] = out[None]
