"""Every op of the dialect through every backend's table: what the artifact computes is what the op means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
from cases.ops import OPS, SHIFTED, OpCase
from graphs import compiled, filled, host_target, parsed, spec_of

from edgeexport import backends
from edgeexport.canonical import dialect
from edgeexport.canonical.weights import ReferenceTensor
from edgeexport.checkpoint import WeightReader
from edgeexport.core import Array, CanonicalModel, QuantPlan, TensorRef
from edgeexport.quant import FORMATS
from edgeexport.quant.source import PlannedWeights

CASES = {case.op for case in OPS}


def test_every_op_of_the_dialect_has_a_case_and_no_case_is_of_another() -> None:
    assert set(dialect.OPS) == CASES


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_every_table_has_exactly_one_row_per_op_of_the_dialect(name: str) -> None:
    rows = [row.op for row in backends.load(name).OPS]
    assert sorted(rows) == sorted(dialect.OPS)
    for row in backends.load(name).OPS:
        assert (row.lower is not None) == (row.kind == "lower")
        assert bool(row.note) == (row.kind == "lower")
        assert bool(row.why and row.fix) == (row.kind == "reject")


@pytest.mark.parametrize("case", [*OPS, *SHIFTED], ids=str)
def test_the_artifact_computes_what_the_op_means(case: OpCase, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    assert backends.load("onnxruntime").check(model, host_target(), plan) == []

    artifact = compiled(model, plan, tmp_path / "out", accuracy_level=1)

    file = tmp_path / "out" / artifact.files[0]
    expected = oracle(case, model, plan)
    got = run(file, case, model.state)
    for name in case.outputs:
        assert got[name].shape == expected[name].shape
        assert got[name].dtype == expected[name].dtype
        np.testing.assert_allclose(got[name], expected[name], atol=case.tolerance, rtol=1e-5)
    ops = {node.op_type for node in onnx.load(file, load_external_data=False).graph.node}
    assert set(case.becomes) <= ops
    assert not set(case.gone) & ops


@pytest.mark.parametrize("case", [case for case in [*OPS, *SHIFTED] if "MatMulNBits" in case.becomes], ids=str)
def test_the_fast_kernels_differ_by_the_rounding_of_activations_only(case: OpCase, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    artifact = compiled(model, plan, tmp_path / "out", accuracy_level=4)
    expected = oracle(case, model, plan)["y"]
    noise = run(tmp_path / "out" / artifact.files[0], case)["y"] - expected
    assert np.sqrt((noise**2).mean() / (expected**2).mean()) < 0.015  # int8 per block: about 1/127 of the largest


@pytest.mark.parametrize("case", [*OPS, *SHIFTED], ids=str)
def test_every_case_is_in_the_dialect(case: OpCase, tmp_path: Path) -> None:
    dialect.verify(build(case, tmp_path)[0].graph)


def build(case: OpCase, folder: Path) -> tuple[CanonicalModel, QuantPlan]:
    """The case as a canonical model whose weights lie in a file, and its plan."""
    rng = np.random.default_rng(7)
    weights: dict[str, TensorRef] = {}
    stored: dict[str, Array] = {}
    with (folder / "weights.bin").open("wb") as file:
        for name, weight in case.weights.items():
            values = rng.standard_normal(weight.shape, np.float32) / np.float32(np.sqrt(weight.shape[-1]))
            raw, stored[name] = encode(values, weight.encoding)
            weights[name] = TensorRef(
                name, folder / "weights.bin", file.tell(), len(raw), weight.encoding, weight.shape
            )
            file.write(raw)
    graph = parsed(case.text, case.inputs, case.outputs, {**case.constants, **stored})
    for name, ref in weights.items():
        graph.graph.initializers[name].const_value = ReferenceTensor(name, ref)
    model = CanonicalModel(
        component="decoder",
        graph=graph,
        inputs=tuple(spec_of(value) for value in graph.graph.inputs),
        outputs=tuple(spec_of(value) for value in graph.graph.outputs),
        state=tuple((f"past_{kind}", f"present_{kind}") for kind in ("key", "value") if case.attention),
        weights=weights,
        stages=(),
        digest="",
    )
    formats = {name: FORMATS[weight.format] for name, weight in case.weights.items()}
    return model, QuantPlan("case", dialect.classes(graph, weights, "decoder"), formats)


def encode(values: Array, encoding: str) -> tuple[bytes, Array]:
    """The bytes a checkpoint holds, and the array an ONNX file would."""
    import ml_dtypes

    held = values.astype({"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[encoding])
    return held.tobytes(), held


def run(file: Path, case: OpCase, state: Sequence[tuple[str, str]] = ()) -> dict[str, Array]:
    """The artifact in ONNX Runtime. Caches are bound once, as input and output, as the runner does it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in case.inputs.items()}
    for value in session.get_inputs():
        binding.bind_ortvalue_input(value.name, held[value.name])
    in_place = {present: past for past, present in state}
    for name in case.outputs:
        if name in in_place:
            binding.bind_ortvalue_output(name, held[in_place[name]])
        else:
            binding.bind_output(name)
    session.run_with_iobinding(binding)
    return dict(zip(case.outputs, (value.numpy() for value in binding.get_outputs()), strict=True))


def oracle(case: OpCase, model: CanonicalModel, plan: QuantPlan) -> dict[str, Array]:
    """What the case means, with the weights as they are stored: by ONNX's reference, or by torch for attention."""
    if case.attention is not None:
        return torch_attention(case)
    with WeightReader() as reader:
        source = PlannedWeights(reader, model.weights, plan)
        weights = {name: source.stored_rows(name, 0, ref.shape[0]) for name, ref in model.weights.items()}
    reference = onnx.reference.ReferenceEvaluator(onnx.load_from_string(filled(model, weights)))
    return dict(zip(case.outputs, reference.run(list(case.outputs), dict(case.inputs)), strict=True))


def torch_attention(case: OpCase) -> dict[str, Array]:
    """The decoder's attention by torch and by transformers' own rotary functions."""
    import torch
    from transformers.models.glm4 import modeling_glm4
    from transformers.models.llama import modeling_llama

    settings: Any = case.attention
    x = {name: torch.from_numpy(array) for name, array in case.inputs.items()}
    position, length = int(x["position"]), x["q"].shape[1]
    q, k, v = (
        x[name].view(1, length, heads, -1).transpose(1, 2)
        for name, heads in (("q", settings["heads"]), ("k", settings["kv_heads"]), ("v", settings["kv_heads"]))
    )
    rows = x["positions"][0]
    cos, sin = (torch.from_numpy(case.constants[name])[rows].repeat(1, 2)[None] for name in ("cos", "sin"))
    rotary = cos.shape[-1]
    rotate = (modeling_glm4 if settings["interleaved"] else modeling_llama).apply_rotary_pos_emb
    turned = rotate(q[..., :rotary], k[..., :rotary], cos, sin)
    q, k = (torch.cat((new, old[..., rotary:]), -1) for new, old in zip(turned, (q, k), strict=True))
    keys, values = x["past_key"].clone(), x["past_value"].clone()
    keys[:, :, position : position + length] = k
    values[:, :, position : position + length] = v
    mask = torch.arange(keys.shape[2])[None] <= torch.arange(position, position + length)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, scale=settings["scale"], enable_gqa=True
    )
    flat = out.transpose(1, 2).reshape(1, length, -1)
    return {"y": flat.numpy(), "present_key": keys.numpy(), "present_value": values.numpy()}
