"""The canonical graph on its way to MNN: values, weights in the file, and the patterns that span nodes.

What each op becomes is in mnn_ops.py; this room needs onnx-ir, that one does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgeexport.backends.mnn_file import WeightFile, external, parameters
from edgeexport.backends.mnn_graph import DTYPES, Graph
from edgeexport.backends.mnn_names import EMBEDS, LAST, LOGITS, MASK, POSITIONS
from edgeexport.backends.mnn_patterns import match_heads
from edgeexport.backends.mnn_rewrite import Held, MnnOp
from edgeexport.backends.optable import OpTable
from edgeexport.canonical.dialect import attribute, constant, stored
from edgeexport.core import Array, CanonicalModel, Dim, QuantPlan, TensorSpec

SMALL = 1024
"""Bytes of a constant that stays in the graph."""


def engine_inputs(graph: Graph, hidden: int, rows: int) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """What MNN-LLM feeds a graph: embeddings, here as [1,T,hidden], mask, `rows` of positions, and where logits
    begin."""
    given = graph.input(EMBEDS, ir.DataType.FLOAT, ["T", 1, hidden])
    mask = graph.input(MASK, ir.DataType.FLOAT, [1, 1, "T", "S"])
    positions = graph.input(POSITIONS, ir.DataType.INT32, [rows, "T"])
    last = graph.input(LAST, ir.DataType.INT32, [1])
    return graph.emit("Reshape", [given, graph.ints(1, -1, hidden)]), mask, positions, last


def echo(hidden: int) -> tuple[bytes, Graph]:
    """A graph that gives back the embeddings that MNN-LLM has looked up: what is left of a component that is a table,
    as the converter takes it."""
    graph = Graph()
    embeds, *_ = engine_inputs(graph, hidden, 1)
    return graph.onnx([(TensorSpec(LOGITS, "float32", (1, hidden)), embeds)]), graph


class Lowering:
    """The new graph as it grows: old value -> new value, and where each weight will lie."""

    def __init__(self, model: CanonicalModel, plan: QuantPlan, file: WeightFile, table: OpTable) -> None:
        self.model, self.plan, self.file, self.table = model, plan, file, table
        self.graph = Graph()
        self.values: dict[ir.Value, ir.Value] = {}
        self.turns: dict[tuple[ir.Value, ...], tuple[ir.Value, ir.Value]] = {}
        """cos and sin [1,T,1,rotary_dim/2], which all layers share, by the values that they came from."""
        self.embedding = ""
        """The weight that token ids are looked up in before the graph begins."""
        graph: ir.Graph = model.graph.graph
        found = {node: heads for node in graph if (heads := match_heads(node)) is not None}
        self.attentions = found
        self.absorbed = {node for heads in found.values() for node in heads.absorbed}
        if model.state:
            self._decoder_inputs(graph)
        else:
            for value, spec in zip(graph.inputs, model.inputs, strict=True):
                sizes = [size.name if isinstance(size, Dim) else size for size in spec.shape]
                self.values[value] = self.graph.input(spec.name, DTYPES[spec.dtype], sizes)

    def run(self) -> bytes:
        """Lower every node in order; the graph as the converter takes it."""
        graph: ir.Graph = self.model.graph.graph
        for node in graph:
            row = self.table.get(node.op_type)
            if node in self.absorbed or self._is_reading(node) or all(value in self.values for value in node.outputs):
                continue
            if row is not None and row.lower is not None:
                row.lower(node, self)
            else:
                self.keep(node)
        caches = {present for _, present in self.model.state}
        outputs = zip(graph.outputs, self.model.outputs, strict=True)
        return self.graph.onnx([(spec, self.value(old)) for old, spec in outputs if spec.name not in caches])

    def value(self, old: ir.Value | None) -> ir.Value:
        """The new value that stands for `old`; a weight enters the file when it is first asked for."""
        assert old is not None, "an input that the dialect requires"
        if old not in self.values:
            weight = stored(old)
            if weight is not None and weight.name in self.model.weights:
                return self.weight(str(weight.name))
            tensor = constant(old)
            assert tensor is not None, f"{old.name} is used before it is made"
            self.values[old] = self.constant(str(old.name), tensor.numpy())
        return self.values[old]

    def weight(self, name: str) -> ir.Value:
        """A weight that is read as a value."""
        shape, fmt = self.model.weights[name].shape, self.plan.formats[name]
        return self.graph.held(name, Held(self.file.value(name, shape, fmt), shape, fmt.bits))

    def constant(self, name: str, array: Array) -> ir.Value:
        """A constant of the graph: into the file when it is a table, into the graph when it is small."""
        if array.nbytes <= SMALL or array.dtype != np.float32:
            return self.graph.constant(name, array)
        return self.graph.held(name, Held(self.file.table(name, array), array.shape))

    def linear(self, x: ir.Value, name: str, rank: int) -> ir.Value:
        """x [..., width] times the transposed weight [rows, width]: a convolution of one pixel, as MNN keeps it."""
        rows, width = self.model.weights[name].shape
        sizes = [1] * (rank - 2) + [-1, rows]
        return self.graph.place(
            name, [x],
            MnnOp("Reshape", ("in0",), "columns", {"dims": [-1, width, 1, 1], "dimType": "NCHW"}),
            MnnOp("ConvertTensor", ("columns",), "packed", {"source": "NCHW", "dest": "NC4HW4"}, "TensorConvertInfo"),
            MnnOp("Convolution", ("packed",), "product", self.convolution(name, {}), "Convolution2D"),
            MnnOp("ConvertTensor", ("product",), "plain", {"source": "NC4HW4", "dest": "NCHW"}, "TensorConvertInfo"),
            MnnOp("Reshape", ("plain",), "out", {"dims": sizes, "dimType": "NCHW"}),
        )  # fmt: skip

    def convolution(self, name: str, settings: Mapping[str, object]) -> dict[str, object]:
        """A convolution over the kernel `name`, a matrix or [outputs, inputs, height, width], and no bias; of one
        pixel but for what `settings` say."""
        shape, fmt = self.model.weights[name].shape, self.plan.formats[name]
        rows, width = shape[0], int(np.prod(shape[1:], dtype=np.int64))
        common = {
            "dilateX": 1, "dilateY": 1, "strideX": 1, "strideY": 1, "kernelX": 1, "kernelY": 1, "padX": 0, "padY": 0,
            "group": 1, "outputCount": rows, "relu": False, "padMode": "CAFFE", "relu6": False, "inputCount": shape[1],
            "hasOutputShape": False, **settings,
        }  # fmt: skip
        quan = parameters(fmt, rows, width)
        place = external(self.file.matrix(name, shape, fmt))
        if quan is None:
            return {"common": common, "external": [place[0], place[1], 4 * rows]}
        return {"common": common, "quanParameter": quan, "external": place}

    def keep(self, node: ir.Node) -> None:
        """The node as it is."""
        inputs = [self.value(value) if value is not None else None for value in node.inputs]
        attributes = {name: each.value for name, each in node.attributes.items()}
        first = self.graph.emit(node.op_type, inputs, attributes, outputs=len(node.outputs))
        producer = first.producer()
        assert producer is not None
        self.values.update(zip(node.outputs, producer.outputs, strict=True))

    def tokens_first(self, value: ir.Value) -> ir.Value:
        """[1,heads,T,head_dim] as MNN's attention takes it, [1,T,heads,head_dim]: what was turned, before it was."""
        turn = value.producer()
        if turn is not None and turn.op_type == "Transpose" and list(attribute(turn, "perm")) == [0, 2, 1, 3]:
            return self.value(turn.inputs[0])
        return self.graph.emit("Transpose", [self.value(value)], {"perm": [0, 2, 1, 3]})

    def _decoder_inputs(self, graph: ir.Graph) -> None:
        """MNN-LLM's four inputs in the place of the canonical ones."""
        values = {str(value.name): value for value in graph.inputs}
        hidden = self.model.inputs[0].shape[-1]
        lookup = next((node for node in graph if node.op_type == "Gather" and node.inputs[1] is graph.inputs[0]), None)
        if lookup is not None:
            table = stored(lookup.inputs[0])
            assert table is not None and table.name in self.model.weights, "token ids are looked up in a weight"
            self.embedding = str(table.name)
            shape = self.model.weights[self.embedding].shape
            self.file.matrix(self.embedding, shape, self.plan.formats[self.embedding])
            hidden = shape[1]
        assert isinstance(hidden, int), "embeddings have a fixed width"
        turned = "rope_positions" in values
        embeds, self.mask, positions, self.last = engine_inputs(self.graph, hidden, 3 if turned else 1)
        self.values[lookup.outputs[0] if lookup is not None else values["inputs_embeds"]] = embeds
        if turned:
            self.values[values["rope_positions"]] = self.graph.emit("Unsqueeze", [positions, self.graph.ints(1)])
        for node in graph:
            if node.op_type == "RotaryEmbedding" and len(node.inputs) == 4 and node.inputs[3] is not None:
                self.values[node.inputs[3]] = positions
        for name, value in values.items():  # what only served the canonical cache is read by nothing that is kept
            if value not in self.values:
                self.values[value] = self.graph.constant(f"unread.{name}", np.zeros(1, np.int64))

    def _is_reading(self, node: ir.Node) -> bool:
        """Whether the node is a part of a weight's reading: whoever uses it asks for the weight itself."""
        weight = stored(node.inputs[0]) if node.op_type in ("Cast", "Transpose") else None
        return weight is not None and weight.name in self.model.weights
