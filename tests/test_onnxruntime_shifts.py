"""Blocks of 4-bit integers that are moved off 0, in whole decoders of ONNX Runtime: what is shared, merged, refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from cases.ops import lookup, normal
from graphs import TEXT_FAMILIES, Traced, Zoo, assert_built, compiled, host_target, parsed
from test_backend_ops import build

from edgeexport import backends
from edgeexport.backends.onnxruntime_lowering import Lowering
from edgeexport.backends.onnxruntime_ops import OPS
from edgeexport.backends.storage import Layout
from edgeexport.canonical import dialect
from edgeexport.canonical.weights import ReferenceTensor
from edgeexport.checkpoint import WeightReader
from edgeexport.core import Array, CanonicalModel, Format, QuantPlan, TensorRef
from edgeexport.quant import FORMATS, SCHEMES, plan
from edgeexport.quant.source import PlannedWeights

PLAIN, O8, ZERO, INT8 = (FORMATS[name] for name in ("int4-b32", "int4-b32-o8", "int4-b32-zp", "int8-b32"))


def planned(found: Traced, linear: Format, value: Format | None) -> QuantPlan:
    """The decoder in int4-b32, its multiplications in `linear`, but v_proj, if it is another, in `value`."""
    scheme = replace(SCHEMES["int4-b32"], linear=linear, value=value, embedding=PLAIN, lm_head=PLAIN)
    weights = found.model.weights
    shapes = {name: ref.shape for name, ref in weights.items()}
    return plan(shapes, dialect.classes(found.model.graph, weights, "decoder"), scheme)


def weights_of(found: Traced, quant: QuantPlan) -> dict[str, Array]:
    """Every weight as it is stored, float32."""
    with WeightReader() as reader:
        source = PlannedWeights(reader, found.model.weights, quant)
        return {name: source.stored_rows(name, 0, ref.shape[0]) for name, ref in found.model.weights.items()}


def ops_of(file: Path) -> Counter[str]:
    """Nodes by their op, MatMulNBits with its bits."""
    nodes = onnx.load(file, load_external_data=False).graph.node
    bits = [next((int(a.i) for a in node.attribute if a.name == "bits"), 0) for node in nodes]
    return Counter(
        f"{node.op_type}{count}" if node.op_type == "MatMulNBits" else node.op_type
        for node, count in zip(nodes, bits, strict=True)
    )


@pytest.mark.parametrize("value", [None, INT8], ids=["v alike", "v in int8"])
@pytest.mark.parametrize("linear", [O8, ZERO], ids=str)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_decoders_compute_in_float32_what_the_canonical_graph_computes(
    family: str, linear: Format, value: Format | None, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced(family)
    quant = planned(found, linear, value)
    artifact = compiled(found.model, quant, tmp_path)  # as shipped, at accuracy level 4: the runner makes it exact
    assert ops_of(tmp_path / artifact.files[0])["GroupQueryAttention"] == found.checkpoint.config["num_hidden_layers"]
    assert_built(tmp_path, {"decoder": artifact}, found, weights_of(found, quant))


@pytest.mark.parametrize(
    ("value", "four", "eight", "splits"), [(None, 4, 4, 1), (INT8, 4, 5, 2)], ids=["v alike", "v in int8"]
)
def test_a_layer_adds_offsets_once_for_each_input(
    value: Format | None, four: int, eight: int, splits: int, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced("llama")
    artifact = compiled(found.model, planned(found, O8, value), tmp_path)
    layers = found.checkpoint.config["num_hidden_layers"]
    ops = ops_of(tmp_path / artifact.files[0])
    head = 1
    assert ops["MatMulNBits4"] == layers * four + head
    assert ops["MatMulNBits8"] == layers * eight
    assert ops["ReduceSum"] == layers * 4  # inputs of q, k, v; o; gate, up; down
    assert ops["Split"] == layers * splits  # gate and up; q and k, where v is by itself


def test_groups_of_one_input_share_its_block_sums(tmp_path: Path) -> None:
    """Weights in two formats cannot be one multiplication, but their offsets are of the same sums."""
    values = {name: normal(16, 64, seed=seed) for seed, name in enumerate("abc")}
    weights = {}
    for name, array in values.items():
        (tmp_path / name).write_bytes(array.tobytes())
        weights[name] = TensorRef(name, tmp_path / name, 0, array.nbytes, "F32", array.shape)
    text = "\n".join(f"{each}t = Transpose <perm = [1, 0]> ({each})\n{each}y = MatMul (x, {each}t)" for each in "abc")
    graph = parsed(text, {"x": normal(1, 3, 64)}, ("ay", "by", "cy"), values)
    for name, ref in weights.items():
        graph.graph.initializers[name].const_value = ReferenceTensor(name, ref)
    model = CanonicalModel("decoder", graph, (), (), (), weights, (), "")
    formats = {"a": O8, "b": O8, "c": replace(O8, name="another")}
    quant = QuantPlan("case", dict.fromkeys(formats, "linear"), formats)
    lowering = Lowering(model, quant, Layout("data"), OPS, 4)
    for node in graph.graph:
        if node.op_type == "MatMul":
            OPS.get("MatMul").lower(node, lowering)  # type: ignore[union-attr,misc]
    made = Counter(node.op_type for node in lowering.nodes)
    assert (made["MatMulNBits"], made["ReduceSum"], made["Add"]) == (4, 1, 2)


@pytest.mark.parametrize("name", ["int4-b32-o8", "int4-b32-zp16", "int4-b32-o16"])
def test_a_table_that_no_kernel_reads_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    model, quant = build(lookup("a table", name), tmp_path)
    (finding,) = backends.load("onnxruntime").check(model, host_target(), quant)
    assert finding.code == "op-not-lowered" and name in finding.why
