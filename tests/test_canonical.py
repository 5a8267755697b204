"""The canonical graph: what the passes do, what the dialect refuses, and that the numbers are transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import (
    CONTEXT,
    FAMILIES,
    TEXT_FAMILIES,
    Decoder,
    Traced,
    Zoo,
    checkpoint_weights,
    parsed,
    reference_logits,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexport import errors, families
from edgeexport.canonical import dialect, passes
from edgeexport.canonical import trace as room
from edgeexport.canonical.trace import MODULE, STAGE, digest, trace
from edgeexport.canonical.weights import ReferenceTensor
from edgeexport.checkpoint import open_checkpoint
from edgeexport.core import Component, Dim, Stage, TensorRef, TensorSpec

X = {"x": np.zeros((1, 6, 8), np.float32)}
ONE = np.array([1], np.int64)
TOKENS = np.random.default_rng(0).integers(3, 320, CONTEXT)

MIXED = (("use_sliding_window", True), ("sliding_window", CONTEXT), ("max_window_layers", 1))
"""Qwen2 whose second layer has a window, as long as the context: two kinds of layers."""


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# passes


def test_a_computed_shape_becomes_a_constant_with_one_free_size() -> None:
    model = parsed(
        "s = Shape <start = 1, end = 2> (x)\nto = Concat <axis = 0> (one, s, rest)\n"
        "y = Reshape <allowzero = 1> (x, to)",
        X,
        ("y",),
        {"one": ONE, "rest": np.array([2, 4])},
    )
    model.graph.outputs[0].shape = ir.Shape([1, "T", 2, 4])
    passes.simplify(model)
    assert ops(model) == ["Reshape"]
    (node,) = model.graph
    assert node.inputs[1].const_value.numpy().tolist() == [1, -1, 2, 4]
    assert "allowzero" not in node.attributes


@pytest.mark.parametrize("shape", [["A", "B", 8], [0, "T", 8]], ids=["two free sizes", "a size of zero"])
def test_a_computed_shape_that_no_constant_expresses_stays(shape: list[Any]) -> None:
    text = "s = Shape (x)\ny = Reshape (x, s)"
    model = parsed(text, X, ("y",), {})
    model.graph.outputs[0].shape = ir.Shape(shape)
    passes.fix_reshapes(model)
    assert model.graph[1].inputs[1] is model.graph[0].outputs[0]


def test_simplify_folds_constants_and_drops_what_does_nothing() -> None:
    text = "a = Add (one, one)\nb = Cast <to = 1> (a)\nc = Identity (x)\ny = Mul (c, b)\nz = Sigmoid (x)"
    model = parsed(text, X, ("y",), {"one": ONE})
    passes.simplify(model)
    assert ops(model) == ["Mul"]
    (two,) = model.graph.initializers.values()
    assert two.const_value.numpy().tolist() == [2.0]


def test_simplify_makes_a_split_of_a_sequence() -> None:
    text = (
        "parts = SplitToSequence <axis = -1> (x, sizes)\n"
        "a = SequenceAt (parts, zero)\nb = SequenceAt (parts, one)\ny = Mul (a, b)"
    )
    constants = {"sizes": np.array([4, 4]), "zero": np.array(0), "one": np.array(1)}
    model = parsed(text, X, ("y",), constants)
    passes.simplify(model)
    assert ops(model) == ["Split", "Mul"]
    dialect.verify(model)


def test_finish_keeps_one_transpose_of_a_weight_used_twice() -> None:
    text = (
        "a = Transpose <perm = [1, 0]> (w)\nb = Transpose <perm = [1, 0]> (w)\n"
        "c = MatMul (x, a)\nd = MatMul (x, b)\ny = Add (c, d)\nunused = Sigmoid (x)"
    )
    model = parsed(text, X, ("y",), {"w": np.zeros((8, 8), np.float32)})
    passes.finish(model)
    assert ops(model) == ["Transpose", "MatMul", "Add"]


# the dialect


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("y = Softmax (x)", "the dialect's ops are"),
        ("y = RMSNormalization <axis = 1> (x, w)", "axis is 1"),
        ("y = RMSNormalization <axis = 2> (x, row)", "axis is 2"),
        ("s = Shape (x)\ny = Reshape (x, s)", "input 1 must be a constant"),
        ("y = Slice (x, at, two)", "input 1 must be a constant"),
        ("y = Squeeze (x, at)", "input 1 must be a constant"),
        ("y = Unsqueeze (x, at)", "input 1 must be a constant"),
        ("a, y = Split (x, sizes)", "input 1 must be a constant"),
        ('y = TensorScatter <axis = 1, mode = "linear"> (x, x, at)', "axis=-2, mode=linear"),
        ('y = TensorScatter <axis = -2, mode = "circular"> (x, x, at)', "axis=-2, mode=linear"),
        ("h = Sigmoid (x)\ny = TensorScatter <axis = -2> (h, x, at)", "from a graph input"),
        ("h = TensorScatter <axis = -2> (x, x, at)\ny = Sigmoid (h)", "to a graph output"),
        ("y = Attention <is_causal = 1> (q, q, q)", "empty cache slots"),
        ("y = Unsqueeze (q, two)", "rank 5"),
    ],
)
def test_the_dialect_refuses(text: str, why: str) -> None:
    inputs = {**X, "at": ONE, "sizes": np.array([3, 3]), "q": np.zeros((1, 2, 6, 8), np.float32)}
    constants = {"w": np.zeros((6, 8), np.float32), "row": np.zeros(8, np.float32), "two": np.array([2])}
    model = parsed(text, inputs, ("y",), constants)
    with pytest.raises(errors.ExportError) as caught:
        dialect.verify(model)
    (finding,) = caught.value.findings
    assert finding.code == "not-in-dialect"
    assert why in finding.why


def test_the_dialect_refuses_another_domain() -> None:
    model = parsed("y = Sigmoid (x)", X, ("y",), {})
    model.graph[0].domain = "com.microsoft"
    with pytest.raises(errors.ExportError, match="not-in-dialect"):
        dialect.verify(model)


def test_the_dialect_names_every_node_and_its_module() -> None:
    model = parsed("a = Softmax (x)\nb = Sigmoid (a)\ny = Tanh (b)", X, ("y",), {})
    model.graph[0].metadata_props[MODULE] = "model.layers.3.mlp"
    with pytest.raises(errors.ExportError) as caught:
        dialect.verify(model)
    assert ["Softmax" in f.what or "Tanh" in f.what for f in caught.value.findings] == [True, True]
    assert "model.layers.3.mlp" in caught.value.findings[0].where


def test_linears_and_classes_follow_the_use_of_a_weight() -> None:
    shapes = {"table": (8, 8), "proj": (8, 8), "head": (8, 8), "bias": (8,), "half": (8, 8)}
    text = (
        "h = Gather <axis = 0> (table, ids)\n"
        "pt = Transpose <perm = [1, 0]> (proj)\np = MatMul (h, pt)\nb = Add (p, bias)\n"
        "c = Cast <to = 1> (half)\nct = Transpose <perm = [1, 0]> (c)\nq = MatMul (b, ct)\n"
        "bt = Transpose <perm = [0, 2, 1]> (b)\ns = MatMul (q, bt)\nm = MatMul (s, b)\n"
        "tt = Transpose <perm = [1, 0]> (table)\nt = MatMul (m, tt)\n"
        "ht = Transpose <perm = [1, 0]> (head)\ny = MatMul (t, ht)"
    )
    held = {name: np.zeros(shape, np.float16 if name == "half" else np.float32) for name, shape in shapes.items()}
    model = parsed(text, {"ids": np.array([[1, 2]])}, ("y",), held)
    refs = {name: TensorRef(name, Path("none"), 0, 0, "F32", shape) for name, shape in shapes.items()}
    assert [str(item.weight.name) for item in dialect.linears(model.graph)] == ["proj", "half", "table", "head"]
    assert dialect.classes(model, refs, "decoder") == {
        "table": "embedding",
        "proj": "linear",
        "half": "linear",
        "head": "lm_head",
        "bias": "other",
    }


def test_a_reference_refuses_to_be_read(tmp_path: Path) -> None:
    tensor = ReferenceTensor("w", TensorRef("w", tmp_path / "weights", 0, 8, "BF16", (2, 2)))
    assert (tensor.dtype, tuple(tensor.shape)) == (ir.DataType.BFLOAT16, (2, 2))
    with pytest.raises(TypeError, match="reference into weights"):
        tensor.numpy()


# tracing


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trace_uses_exactly_the_ops_that_its_family_declares(name: str, zoo: Zoo) -> None:
    models = zoo.traced(name).parts.values()
    assert {op for model in models for op in ops(model.graph)} == families.find(name).ops
    for model in models:
        dialect.verify(model.graph)


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_outputs_and_state_are_the_contracts(name: str, zoo: Zoo) -> None:
    found = zoo.traced(name).model
    graph = found.graph.graph
    family = families.find(name)
    layers = family.geometry(family.tiny).layers
    past = [f"past_{kind}.{i}" for i in range(layers) for kind in ("key", "value")]
    present = [text.replace("past", "present") for text in past]
    tokens = ["input_ids"] if name in TEXT_FAMILIES else ["inputs_embeds"]
    rope = ["rope_positions"] if name in ("glm4v", "glm46v") else []
    assert [value.name for value in graph.inputs] == [*tokens, "position", *rope, *past]
    assert [value.name for value in graph.outputs] == ["logits", *present]
    assert found.state == tuple(zip(past, present, strict=True))
    first = "embed" if name in TEXT_FAMILIES else "positions"
    assert found.stages == (first, *(f"layers.{i}" for i in range(layers)), "head")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_node_names_its_stage_but_the_casts_of_weights(name: str, zoo: Zoo) -> None:
    for found in zoo.traced(name).parts.values():
        stages = dict.fromkeys(found.stages, 0)
        for node in found.graph.graph:
            if STAGE in node.metadata_props:
                stages[node.metadata_props[STAGE]] += 1
            else:
                assert node.op_type == "Cast"
                assert node.inputs[0].name in found.weights
        assert all(stages.values())


def test_tied_weights_are_one_initializer(zoo: Zoo) -> None:
    tied, untied = zoo.traced("llama").model, zoo.traced("glm4").model
    assert "lm_head.weight" not in tied.weights
    assert "lm_head.weight" in untied.weights
    (table,) = (value for name, value in tied.graph.graph.initializers.items() if "embed" in name)
    cast = next(node for node, _ in table.uses())
    assert sorted(node.op_type for node, _ in cast.outputs[0].uses()) == ["Gather", "Transpose"]


def test_weights_are_references_and_all_else_is_small(zoo: Zoo) -> None:
    found = zoo.traced("qwen3").model
    for name, value in found.graph.graph.initializers.items():
        if name in found.weights:
            assert isinstance(value.const_value, ReferenceTensor)
            assert value.const_value.ref is found.weights[name]
        else:
            assert name.startswith(("const.", "rope."))
            assert value.const_value.nbytes <= 4 * CONTEXT * 32


def test_no_weight_is_read_each_kind_is_traced_once_and_the_digest_is_stable(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = zoo.traced("llama").model
    traced_stages: list[str] = []
    real: Callable[..., ir.Model] = room.trace_stage

    def counted(stage: Stage, *rest: Any) -> ir.Model:
        traced_stages.append(stage.name)
        return real(stage, *rest)

    monkeypatch.setattr(room, "trace_stage", counted)
    steps: list[tuple[int, int]] = []
    folder = write_checkpoint(tmp_path / "model", families.find("llama").tiny, "bfloat16", seed=1)
    checkpoint = open_checkpoint(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (component,) = families.find("llama").components(checkpoint, CONTEXT, {})
    found = room.trace(component, checkpoint.tensors, lambda done, total: steps.append((done, total)))
    assert traced_stages == ["embed", "layers.0", "head"]
    assert steps == [(k, 5) for k in range(1, 6)]
    assert found.digest == first.digest
    assert found.digest == digest(found.graph, found.weights)


def test_the_digest_tells_graphs_constants_and_weights_apart(zoo: Zoo) -> None:
    """Of a graph as it was traced: how one that was read back is written is no part of its digest."""
    checkpoint = zoo.traced("llama").checkpoint
    (component,) = families.find("llama").components(checkpoint, CONTEXT, {})
    found = trace(component, checkpoint.tensors)
    names = dict(found.weights)
    first = next(iter(names))
    graph = found.graph.clone()
    seen = {found.digest, digest(graph, {**names, first: replace(names[first], name="another")})}
    assert digest(graph, {**names, first: replace(names[first], offset=7, file=Path("moved"))}) == found.digest
    norm = next(node for node in graph.graph if node.op_type == "RMSNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
    seen.add(digest(graph, names))
    table = graph.graph.initializers["rope.cos"]
    table.const_value = ir.tensor(table.const_value.numpy() * 2, name="rope.cos")
    seen.add(digest(graph, names))
    assert len(seen) == 4


def test_layers_of_the_same_kind_are_those_with_equal_settings_and_shapes(zoo: Zoo) -> None:
    checkpoint = zoo.traced("qwen2").checkpoint
    deep = {**checkpoint.config, "num_hidden_layers": 6, **dict(MIXED), "max_window_layers": 4}
    tensors = {
        name.replace("layers.0", f"layers.{i}"): ref for name, ref in checkpoint.tensors.items() for i in range(6)
    }
    changed = replace(checkpoint, config=deep, tensors=tensors)
    (component,) = families.find("qwen2").components(changed, CONTEXT, {})
    kinds = [stage.kind for stage in component.stages()]
    assert [kinds.index(kind) for kind in kinds] == [0, 1, 1, 1, 1, 5, 5, 7]


def test_a_module_that_cannot_be_traced_is_named_with_its_stage() -> None:
    import torch

    class Choosing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    spec = TensorSpec("x", "float32", (1, Dim("T", 1, 8)))
    component = Component(
        "decoder", (spec,), (replace(spec, name="y"),), (),
        lambda: [Stage("layers.7", "a", Choosing(), ("x",), ("y",), {})], {"x": spec},
    )  # fmt: skip
    with pytest.raises(errors.ExportError) as caught:
        trace(component, {})
    (finding,) = caught.value.findings
    assert finding.code == "trace-failed"
    assert "layers.7" in finding.what + finding.where
    assert "Choosing" in finding.what + finding.where + finding.why


# numbers


MODELS: list[tuple[Any, ...]] = [*((name,) for name in FAMILIES), ("qwen2", "float32", MIXED)]
CALLS = {
    "one prompt": [CONTEXT],
    "a prompt and steps to the last slot": [7, *[1] * (CONTEXT - 7)],
    "chunks and steps": [5, 6, 4, *[1] * 8, 2],
    "steps alone": [1] * 9,
}


def difference(decoder: Decoder, tokens: np.ndarray, expected: np.ndarray, calls: list[int], start: int = 0) -> float:
    """Largest difference of logits over these calls."""
    worst, position = 0.0, start
    for count in calls:
        logits = decoder.step(tokens[position : position + count], position)
        position += count
        worst = max(worst, float(np.abs(logits - expected[position - 1]).max()))
    return worst


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model[:2])))
def test_the_graph_computes_what_transformers_computes(model: tuple[Any, ...], calls: list[int], zoo: Zoo) -> None:
    found = zoo.traced(*model)
    expected = reference_logits(zoo.oracle(*model), TOKENS)
    assert np.abs(expected).max() > 0.5  # else any graph would do
    assert difference(Decoder(found, checkpoint_weights(found)), TOKENS, expected, calls) < 1e-5


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 20))
def test_the_cache_may_be_rewound_and_overwritten(zoo: Zoo, calls: list[int], back: int) -> None:
    found: Traced = zoo.traced("llama")
    calls = [count for k, count in enumerate(calls) if sum(calls[: k + 1]) <= CONTEXT]
    back = min(back, sum(calls))
    decoder = Decoder(found, checkpoint_weights(found))
    model = zoo.oracle("llama")
    assert difference(decoder, TOKENS, reference_logits(model, TOKENS), calls) < 1e-5
    changed = np.concatenate((TOKENS[:back], TOKENS[back:][::-1]))
    rest = [min(3, CONTEXT - back - k) for k in range(0, CONTEXT - back, 3)]
    assert difference(decoder, changed, reference_logits(model, changed), rest, back) < 1e-5
