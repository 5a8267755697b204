"""The LiteRT backend: every op in the runtime, every family and scheme, the file's layout, and what is refused."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.ops import OPS, OpCase, Weight, linear, lookup
from cases.ops import normal as order_one
from graphs import (
    FAMILIES,
    TOKENS,
    Decoder,
    Traced,
    Zoo,
    assert_built,
    normal,
    positive,
    stored_weights,
    traced,
    write_checkpoint,
    written,
)
from test_backend_ops import build, oracle

from edgeexport import errors, families, targets
from edgeexport.backends import litert, litert_runner, storage
from edgeexport.checkpoint import WeightReader
from edgeexport.core import Array, Artifact, CanonicalModel, Dim, QuantPlan, Target
from edgeexport.quant import FORMATS, SCHEMES
from edgeexport.quant.source import PlannedWeights


@pytest.fixture(autouse=True)
def narrow_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 2 and 8 slots, where the cache has 32."""
    monkeypatch.setattr(litert, "LEAST_WINDOW", 2)


def target(**options: Any) -> Target:
    """android-tflite with short pieces of prompts."""
    found = targets.load("android-tflite")
    return replace(found, options={"prefill": 8, "prefill_short": 4, **options})


def compiled(models: list[CanonicalModel], plan: QuantPlan, folder: Path, **options: Any) -> Artifact:
    """What the backend writes of one component into `folder`, which is made."""
    return written(litert, models, target(**options), plan, folder)


def run(artifact: Artifact, folder: Path, inputs: Mapping[str, Array], *, exact: bool = True) -> dict[str, Array]:
    """A graph of fixed shapes in the runtime."""
    graph = litert_runner.open_graph(folder, artifact, threads=1, exact=exact)
    try:
        return graph.run(inputs)
    finally:
        graph.close()


# ops


def is_refused(case: OpCase) -> bool:
    """Blocks of int8, and lengths that depend on an input's numbers."""
    return case.op == "Range" or any(weight.format.startswith("int8-b") for weight in case.weights.values())


@pytest.mark.parametrize("case", [case for case in OPS if is_refused(case)], ids=str)
def test_what_the_runtime_does_not_take_is_refused_before_a_weight_is_read(case: OpCase, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    (finding,) = litert.check(model, target(), positive(plan))
    assert finding.code == "op-not-lowered"
    assert ("shapes are fixed" if case.op == "Range" else "blocks of int4") in finding.why


@pytest.mark.parametrize("case", [case for case in OPS if not is_refused(case)], ids=str)
def test_every_op_computes_what_it_means(case: OpCase, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    plan = positive(plan)
    artifact = compiled([model], plan, tmp_path / "out")
    expected = oracle(case, model, plan)
    got = run(artifact, tmp_path / "out", case.inputs)
    assert got.keys() == set(case.outputs)
    for name in case.outputs:
        assert got[name].shape == expected[name].shape
        np.testing.assert_allclose(got[name], expected[name], atol=case.tolerance, rtol=1e-5)
        assert got[name].dtype == (np.int32 if expected[name].dtype == np.int64 else expected[name].dtype)


# weights whose blocks have offsets


def with_bias(case: OpCase) -> OpCase:
    """The same, and a bias behind it."""
    rows = case.weights["w"].shape[0]
    text = case.text.replace("y = MatMul", "h = MatMul") + "\ny = Add (h, b)"
    return replace(case, note=f"{case.note}, with a bias", text=text, weights={**case.weights, "b": Weight((rows,))})


def products(note: str, formats: Sequence[str], *, bias: str = "", length: int = 5) -> OpCase:
    """One input [1,T,256] times several weights of 24, 32, ... rows; those named in `bias` have one."""
    text, weights = "", {}
    for k, (fmt, name) in enumerate(zip(formats, "abcd", strict=False)):
        weights[f"w{name}"] = Weight((24 + 8 * k, 256), fmt)
        text += f"t{name} = Transpose <perm = [1, 0]> (w{name})\n"
        text += f"{'h' if name in bias else 'y'}{name} = MatMul (x, t{name})\n"
        if name in bias:
            weights[f"b{name}"] = Weight((24 + 8 * k,))
            text += f"y{name} = Add (h{name}, b{name})\n"
    outputs = tuple(f"y{name}" for _, name in zip(formats, "abcd", strict=False))
    return OpCase("MatMul", note, text, {"x": order_one(1, length, 256)}, outputs, weights, tolerance=1e-4)


SHIFTED = [
    case
    for fmt, width in (("int4-b32-o8", 256), ("int4-b32-o8", 576), ("int4-b64-o8", 576), ("int4-b128-o8", 256))
    for length in (1, 5)
    for plain in (linear(f"{fmt} of width {width} by {length}", fmt, width=width, length=length, rows=30),)
    for case in (plain, with_bias(plain))
]
TWICE = [
    products("two of one input", ["int4-b32-o8"] * 2),
    products("two of one input, one token", ["int4-b32-o8"] * 2, length=1),
    products("three of one input with biases", ["int4-b32-o8"] * 3, bias="abc"),
]
"""One operator for all of them."""
APART = [
    products("two of one input in other formats", ["int4-b32-o8", "int8-channel"]),
    products("two of one input, one with a bias", ["int4-b32-o8"] * 2, bias="b"),
    OpCase(
        "MatMul", "one weight of two inputs", "t = Transpose <perm = [1, 0]> (w)\ny = MatMul (x, t)\n"
        "s = Transpose <perm = [1, 0]> (v)\nz = MatMul (x, s)\nxx = Add (x, x)\nu = MatMul (xx, t)",
        {"x": order_one(1, 3, 256)}, ("y", "z", "u"),
        {"w": Weight((24, 256), "int4-b32-o8"), "v": Weight((32, 256), "int4-b32-o8")}, tolerance=1e-4,
    ),
]  # fmt: skip


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "shipped"])
@pytest.mark.parametrize("case", [*SHIFTED, *TWICE, *APART], ids=str)
def test_blocks_with_offsets_are_multiplied_as_they_are_stored(case: OpCase, exact: bool, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    plan = positive(plan)
    artifact = compiled([model], plan, tmp_path / "out")
    expected, got = oracle(case, model, plan), run(artifact, tmp_path / "out", case.inputs, exact=exact)
    for name in case.outputs:
        assert got[name].shape == expected[name].shape
        if exact:
            np.testing.assert_allclose(got[name], expected[name], atol=case.tolerance, rtol=1e-5)
        noise = got[name] - expected[name]
        assert np.sqrt(np.mean(noise**2)) < 0.015 * np.sqrt(np.mean(expected[name] ** 2))
    for name, weight in artifact.weights.items():
        with WeightReader() as reader:
            rows = PlannedWeights(reader, model.weights, plan).stored_rows(name, 0, weight.shape[0])
        held = storage.read_rows(tmp_path / "out", weight, 0, weight.shape[0])
        np.testing.assert_array_equal(held, rows.reshape(held.shape))


def operators(artifact: Artifact, folder: Path) -> dict[str, int]:
    """How many operators of each kind the first graph has."""
    from ai_edge_litert.schema_py_generated import BuiltinOperator

    names = {code: name for name, code in vars(BuiltinOperator).items() if not name.startswith("_")}
    model = opened_model(artifact, folder)
    return Counter(names[model.operatorCodes[each.opcodeIndex].builtinCode] for each in model.subgraphs[0].operators)


@pytest.mark.parametrize("case", [*TWICE, *APART], ids=str)
def test_products_of_one_input_share_its_block_sums_and_where_they_can_one_operator(
    case: OpCase, tmp_path: Path
) -> None:
    model, plan = build(case, tmp_path)
    found = operators(compiled([model], positive(plan), tmp_path / "out"), tmp_path / "out")
    by_input = 2 if "two inputs" in case.note else 1
    assert found["SUM"] == by_input
    shifted = [weight for weight in case.weights.values() if weight.format.endswith("-o8")]
    together = 1 if case in TWICE else len(shifted) + (by_input - 1)
    assert found["ADD"] == together + (by_input - 1)
    assert found["FULLY_CONNECTED"] == 2 * together + ("other formats" in case.note)


REFUSED = [
    *(linear(f"{fmt} as a multiplication", fmt) for fmt in ("int4-b32-zp", "int4-b32-zp16", "int4-b32-o16")),
    lookup("offsets in a table", "int4-b32-o8"),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_other_shifts_and_tables_with_offsets_are_refused(case: OpCase, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    (finding,) = litert.check(model, target(), positive(plan))
    assert (finding.code, finding.where) == ("op-not-lowered", "w")
    assert "int8 offsets" in finding.why


def shifted(plan: QuantPlan) -> QuantPlan:
    """The plan as this backend gets it, all multiplications in blocks of int4 with offsets."""
    plan = positive(plan)
    formats = {
        name: replace(FORMATS[f"{fmt.name}-o8"], positive=True)
        if plan.classes[name] == "linear" and fmt.bits == 4 and fmt.block
        else fmt
        for name, fmt in plan.formats.items()
    }
    return replace(plan, formats=formats)


@pytest.mark.parametrize("name", ["llama", "qwen2", "glm4"])  # qwen2 has biases
def test_a_decoder_computes_with_offsets_what_the_canonical_graph_computes(name: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced(name)
    weights = stored_weights(found, "int4-b32", shifted)
    artifacts = {}
    for component in found.components():
        plan = shifted(found.plan("int4-b32", component))
        artifacts[component] = compiled(found.variants(component), plan, tmp_path)
    assert any(weight.format.shift for weight in artifacts["decoder"].weights.values())
    assert_built(tmp_path, artifacts, found, weights)


# families


def planned(found: Traced, scheme: str, component: str) -> QuantPlan:
    """A component's plan as this backend gets it."""
    return positive(found.plan(scheme, component))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_and_scheme_computes_what_the_canonical_graph_computes(
    name: str, scheme: str, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced(name)
    weights = stored_weights(found, scheme, positive)
    artifacts = {
        component: compiled(found.variants(component), planned(found, scheme, component), tmp_path)
        for component in found.components()
    }
    assert_built(tmp_path, artifacts, found, weights)


def test_the_last_slots_are_filled_token_by_token(zoo: Zoo, tmp_path: Path) -> None:
    # The runtime would move a padded piece that ends behind the cache to the front, over what is there.
    found = zoo.traced("llama")
    artifact = compiled([found.model], planned(found, "fp32", "decoder"), tmp_path)
    weights = stored_weights(found, "fp32", positive)
    decoder, expected = litert_runner.open_decoder(tmp_path, artifact, threads=1), Decoder(found, weights)
    for start, stop in ((0, 29), (29, 32)):
        got = decoder.step(TOKENS[start:stop], start)
        np.testing.assert_allclose(got, expected.step(TOKENS[start:stop], start), atol=1e-5)
    decoder.close()


@pytest.mark.parametrize("name", ["llama", "glm4v"])
def test_the_runtime_sees_the_signatures_that_the_canonical_graphs_promise(name: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced(name)
    for (component, variant), model in found.parts.items():
        artifact = compiled(found.variants(component), planned(found, "fp32", component), tmp_path)
        seen = litert_runner.read_signature(tmp_path, artifact, variant)
        assert seen.keys() == {spec.name for spec in (*model.inputs, *model.outputs)}
        for spec in (*model.inputs, *model.outputs):
            assert seen[spec.name].dtype == spec.dtype
            pairs = zip(seen[spec.name].shape, spec.shape, strict=True)
            assert all(isinstance(a, Dim) or a == b for a, b in pairs)
        lying = replace(artifact, signatures=tuple(replace(each, inputs=()) for each in artifact.signatures))
        assert litert_runner.read_signature(tmp_path, lying, variant).keys() > seen.keys()


# the file


def opened_model(artifact: Artifact, folder: Path) -> Any:
    """The flatbuffer as objects."""
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf((folder / artifact.files[0]).read_bytes())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_signatures_share_every_weight_and_nothing_has_more_than_four_axes(
    scheme: str, zoo: Zoo, tmp_path: Path
) -> None:
    from ai_edge_litert.schema_py_generated import BuiltinOperator, TensorType

    found = zoo.traced("llama")
    assert found.checkpoint.config["tie_word_embeddings"]
    whole = compiled([found.model], planned(found, scheme, "decoder"), tmp_path / "whole", windows=False)
    assert [signature.name for signature in whole.signatures] == ["decode", "prefill_4", "prefill_8"]
    artifact = compiled([found.model], planned(found, scheme, "decoder"), tmp_path)
    names = ["window_2_decode", "window_8_decode", "window_8_prefill_4", "window_8_prefill_8"]
    assert [signature.name for signature in artifact.signatures][3:] == names
    for each in artifact.signatures:
        assert each.inputs[0].name == "tokens"
        assert any(spec.name == "logits" for spec in each.outputs) == each.name.endswith("decode")
    model = opened_model(artifact, tmp_path)
    kinds = {
        TensorType.FLOAT32,
        TensorType.FLOAT16,
        TensorType.INT32,
        TensorType.BOOL,
        TensorType.INT8,
        TensorType.INT4,
    }
    names: list[bytes] = []
    for graph in model.subgraphs:
        names += [tensor.name for tensor in graph.tensors]
        for tensor in graph.tensors:
            assert len(tensor.shape if tensor.shape is not None else ()) <= 4
            assert tensor.type in kinds
        made = [code.builtinCode for code in (model.operatorCodes[each.opcodeIndex] for each in graph.operators)]
        assert made.count(BuiltinOperator.LESS) == 1  # one mask for all layers
        assert made.count(BuiltinOperator.DYNAMIC_UPDATE_SLICE) == 2 * found.checkpoint.config["num_hidden_layers"]
        assert BuiltinOperator.TILE not in made
    assert len(set(names)) == len(names)
    places = [(buffer.offset, buffer.offset + buffer.size) for buffer in model.buffers if buffer.size]
    assert all(end <= start for (_, end), (start, _) in zip(sorted(places), sorted(places)[1:], strict=False))
    ideal = planned(found, scheme, "decoder").ideal_bytes({n: r.shape for n, r in found.model.weights.items()})
    assert sum(end - start for start, end in places) < 1.05 * ideal + 60_000  # tables of angles, shapes, no second copy


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4-b32"])
def test_two_builds_in_two_folders_have_the_same_bytes(scheme: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("glm4")
    plan = planned(found, scheme, "decoder")
    one, two = (compiled([found.model], plan, tmp_path / name) for name in ("one", "two"))
    assert one == two
    data = (tmp_path / "one" / "decoder.tflite").read_bytes()
    assert data == (tmp_path / "two" / "decoder.tflite").read_bytes()
    assert str(tmp_path).encode() not in data


@pytest.mark.parametrize("scheme", ["int8", "int4-b32"])
def test_the_fast_kernels_differ_by_the_rounding_of_activations_only(scheme: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("qwen3")
    artifact = compiled([found.model], planned(found, scheme, "decoder"), tmp_path)
    shipped, exact = (litert_runner.open_decoder(tmp_path, artifact, threads=1, exact=exact) for exact in (False, True))
    noise = []
    for position in range(0, 24, 6):
        want = exact.step(TOKENS[position : position + 6], position)
        noise.append(float(np.sqrt(np.mean((shipped.step(TOKENS[position : position + 6], position) - want) ** 2))))
        assert 0 < noise[-1] < 0.05 * np.sqrt(np.mean(want**2))
    shipped.close()
    exact.close()


def test_blocks_of_zeros_and_of_one_sign_get_scales_that_the_runtime_takes(tmp_path: Path) -> None:
    from edgeexport.quant.weights import dequantize_rows, quantize_rows

    rows = np.random.default_rng(3).standard_normal((6, 64), np.float32)
    rows[0], rows[1], rows[2] = 0, abs(rows[1]), -abs(rows[2])
    for name in ("int8-channel", "int4-b32"):
        fmt = replace(FORMATS[name], positive=True)
        values, scales = quantize_rows(rows, fmt)
        assert (scales > 0).all()
        assert values.min() >= -8 or fmt.bits == 8
        step = np.repeat(scales.astype(np.float32), 64 // scales.shape[1], axis=1)
        assert (abs(dequantize_rows(values, scales, fmt) - rows) <= 0.502 * step).all()


@pytest.mark.parametrize("damage", ["cut", "not a flatbuffer", "missing"])
def test_a_damaged_file_does_not_open(damage: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("llama")
    artifact = compiled([found.model], planned(found, "fp16", "decoder"), tmp_path)
    file = tmp_path / "decoder.tflite"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:3000])
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"PK" * 4000)
    with pytest.raises(errors.BundleError, match="artifact-does-not-open"):
        litert_runner.open_decoder(tmp_path, artifact)


def test_packed_weights_of_another_model_are_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_cache = tmp_path / "cache"
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(own_cache))
    bundle, first = shipped_llama(tmp_path / "a", seed=1)
    other, second = shipped_llama(tmp_path / "b", seed=2)
    assert (answer(bundle, first), answer(bundle, first)) == (answer(bundle, first),) * 2  # packed, then as kept
    whole, known = (bundle / "decoder.tflite").read_bytes(), answer(bundle, first)
    (kept,) = (path.stem for path in (own_cache / "xnnpack").glob("*.sha256"))
    packed = own_cache / "xnnpack" / kept
    data = packed.read_bytes()
    for at in np.random.default_rng(2).integers(0, 8 * len(data), 20).tolist():  # one bit turns, wherever
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        packed.write_bytes(flipped)
        assert answer(bundle, first) == known

    moved = (other / "decoder.tflite").read_bytes()
    (bundle / "decoder.tflite").write_bytes(moved)  # the same shapes, and a manifest that does not know
    want = answer(other, second)
    assert answer(bundle, second) == want
    (bundle / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    assert answer(bundle, second) == want
    (bundle / "decoder.tflite").write_bytes(whole)  # and what that one left behind poisons nothing
    assert answer(bundle, first) == known
    (bundle / "decoder.tflite").write_bytes(moved)

    from edgeexport.backends import litert_cache

    stale = own_cache / "xnnpack" / kept
    monkeypatch.setattr(litert_cache, "_kept", lambda model: stale)
    assert answer(bundle, second) != want, "the runtime notices now: the names of kept files may be simpler"


def shipped_llama(folder: Path, seed: int) -> tuple[Path, Artifact]:
    """A folder as a bundle's, with a tiny decoder and a manifest that names its digest."""
    found = traced(write_checkpoint(folder / "model", families.find("llama").tiny, seed=seed))
    artifact = compiled([found.model], planned(found, "int8", "decoder"), folder)
    digest = hashlib.sha256((folder / "decoder.tflite").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"files": {"decoder.tflite": {"sha256": digest}}}))
    return folder, artifact


def answer(folder: Path, artifact: Artifact, *, exact: bool = False) -> list[float]:
    """Logits after a few tokens."""
    decoder = litert_runner.open_decoder(folder, artifact, threads=1, exact=exact)
    logits = decoder.step(TOKENS[:6], 0).tolist()
    decoder.close()
    return list(logits)


@pytest.mark.parametrize("scheme", ["int4-b32", "fp16"])
def test_what_the_gpu_delegate_does_not_take_is_refused(scheme: str, zoo: Zoo) -> None:
    found = zoo.traced("llama")
    (finding,) = litert.check(found.model, target(gpu=True), planned(found, scheme, "decoder"))
    assert (finding.code, "--quant int8" in finding.fix) == ("op-not-lowered", True)
    for taken in ("fp32", "int8", "int4"):
        assert litert.check(found.model, target(gpu=True), planned(found, taken, "decoder")) == []


def test_more_features_than_were_built_for_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("autoglm_phone")
    (model,) = found.variants("fusion")
    artifact = compiled([model], planned(found, "fp32", "fusion"), tmp_path, features=5)
    given = {spec.name: normal(spec.shape) for spec in model.inputs}
    with pytest.raises(errors.UsageError, match="too-many-features"):
        run(artifact, tmp_path, given)


def test_a_runtime_that_is_not_installed_is_named_with_its_extra(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = zoo.traced("llama")
    artifact = compiled([found.model], planned(found, "fp32", "decoder"), tmp_path)
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    for open_it in (litert_runner.open_decoder, litert_runner.read_signature):
        with pytest.raises(errors.ToolError, match="missing-package") as caught:
            open_it(tmp_path, artifact)
        assert "edgeexport[tflite]" in caught.value.findings[0].fix
