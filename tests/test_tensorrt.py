"""TensorRT: what the graphs compute in ONNX Runtime, in both dialects, and that engines are built of them."""

from __future__ import annotations

import json
import mmap
import shutil
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.ops import OPS, OpCase, linear
from graphs import (
    FAMILIES,
    TOKENS,
    Traced,
    Zoo,
    assert_built,
    call_of,
    host_target,
    parsed,
    positive,
    stored_weights,
    written,
)
from test_backend_ops import build, oracle
from test_litert import APART, SHIFTED, TWICE, shifted
from test_litert import REFUSED as UNSHIFTABLE

from edgeexport import backends, errors
from edgeexport.backends import storage, tensorrt, tensorrt_engine, tensorrt_kit, tensorrt_runner
from edgeexport.backends.onnx_file import stem_of
from edgeexport.backends.storage import Layout
from edgeexport.backends.tensorrt_lowering import write
from edgeexport.bundle.artifacts import OpenArtifacts
from edgeexport.checkpoint import WeightReader
from edgeexport.core import Artifact, CanonicalModel, Format, QuantPlan, Signature, Target, no_progress
from edgeexport.quant import FORMATS
from edgeexport.quant.schemes import FLOAT8_CHANNEL, FP16, INT8_CHANNEL
from edgeexport.quant.source import PlannedWeights
from edgeexport.session.inputs import Inputs

DIALECTS = ("fused", "primitives")


def target(**options: Any) -> Target:
    """rtx-trt, in pieces as short as the tiny models' cache."""
    return replace(host_target(), name="rtx-trt", precision="float16", options={"prefill": 32, **options})


def graphs_of(models: list[CanonicalModel], plan: QuantPlan, folder: Path, dialect: str) -> Artifact:
    """The ONNX files of a component alone, as an artifact whose signatures are in them."""
    folder.mkdir(parents=True, exist_ok=True)
    with WeightReader() as reader:
        source = PlannedWeights(reader, models[0].weights, plan)
        fused = dialect == "fused"
        layout: Layout = write(models, plan, source, folder, tensorrt.OPS, fused=fused, progress=no_progress)
    files = [f"{stem_of(model)}.onnx" for model in models]
    signatures = tuple(
        Signature(model.variant or "step", model.inputs, model.outputs, file)
        for model, file in zip(models, files, strict=True)
    )
    component = models[0].component
    return Artifact(component, "tensorrt", (*files, layout.file), signatures, models[0].state, layout.weights, {})


def artifacts_of(found: Traced, scheme: str, folder: Path, dialect: str) -> dict[str, Artifact]:
    return {
        component: graphs_of(found.variants(component), positive(found.plan(scheme, component)), folder, dialect)
        for component in found.components()
    }


def opened(folder: Path, artifacts: dict[str, Artifact], *, exact: bool) -> OpenArtifacts:
    """The graphs in ONNX Runtime."""

    return OpenArtifacts(lambda component: (folder, artifacts[component]), 1, exact=exact)


# what the graphs compute


BUILT = [
    *((name, "fp16", dialect) for name in FAMILIES for dialect in DIALECTS),
    *((name, "int4-b32", "fused") for name in FAMILIES),
    *(("llama", scheme, dialect) for scheme in ("int8", "int4-b128", "fp8") for dialect in DIALECTS),
]
"""How a weight is stored has to do with no family and no dialect, so that not all are multiplied by all."""


@pytest.mark.parametrize(("name", "scheme", "dialect"), BUILT)
def test_every_family_and_scheme_computes_what_the_canonical_graph_computes(
    name: str, scheme: str, dialect: str, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced(name)
    weights = stored_weights(found, scheme, positive)
    artifacts = artifacts_of(found, scheme, tmp_path, dialect)
    assert_built(tmp_path, artifacts, found, weights)


@pytest.mark.parametrize("name", ["llama", "glm4v"])
def test_rounding_to_float16_moves_the_logits_by_little(name: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced(name)
    given = {}
    for dialect in DIALECTS:
        artifacts = artifacts_of(found, "fp16", tmp_path / dialect, dialect)
        shipped, exact = (opened(tmp_path / dialect, artifacts, exact=exact) for exact in (False, True))
        given[dialect] = [answers(each, found) for each in (shipped, exact)]
        noise = given[dialect][0] - given[dialect][1]
        assert 0 < np.sqrt(np.mean(noise**2)) < 0.01 * np.sqrt(np.mean(given[dialect][1] ** 2))
    fused, primitives = (given[dialect][1] for dialect in DIALECTS)
    np.testing.assert_allclose(primitives, fused, atol=1e-5)
    assert (given["fused"][0].argmax(-1) == given["primitives"][0].argmax(-1)).all()


def answers(each: OpenArtifacts, found: Traced) -> Any:
    """Logits [steps, V] of a text in a prompt, a second piece and single tokens."""
    inputs = Inputs(found.contract, each.run) if found.contract else None
    rows = []
    for start, stop in ((0, 7), (7, 12), *((k, k + 1) for k in range(12, 32))):
        call = call_of(inputs, TOKENS[start:stop], start)
        rows.append(each.decoder.step(call.fed, call.position, call.rope).copy())
    return np.stack(rows)


REFUSED = ("int8-b", "int4-b16")
"""Formats that TensorRT would unpack, or does not take."""


def is_refused(case: OpCase) -> bool:
    return any(weight.format.startswith(REFUSED) for weight in case.weights.values())


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", [case for case in OPS if not is_refused(case)], ids=str)
def test_every_op_computes_what_it_means(case: OpCase, dialect: str, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    assert tensorrt.check(model, target(), plan) == []
    artifact = graphs_of([model], plan, tmp_path / "out", dialect)
    graph = tensorrt_runner.open_graph(tmp_path / "out", artifact, threads=1, exact=True)
    expected, got = oracle(case, model, plan), graph.run(case.inputs)
    for name in case.outputs:
        assert got[name].dtype == expected[name].dtype
        np.testing.assert_allclose(got[name], expected[name], atol=max(case.tolerance, 1e-4), rtol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", [*SHIFTED, *TWICE, *APART], ids=str)
def test_blocks_with_offsets_are_multiplied_as_they_are_stored(case: OpCase, dialect: str, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    plan = positive(plan)
    assert tensorrt.check(model, target(), plan) == []
    artifact = graphs_of([model], plan, tmp_path / "out", dialect)
    expected = oracle(case, model, plan)
    for exact, most in ((True, 1e-5), (False, 2e-3)):
        graph = tensorrt_runner.open_graph(tmp_path / "out", artifact, threads=1, exact=exact)
        got = graph.run(case.inputs)
        for name in case.outputs:
            np.testing.assert_allclose(got[name], expected[name], atol=most * abs(expected[name]).max(), rtol=0)
    for name, weight in artifact.weights.items():
        with WeightReader() as reader:
            rows = PlannedWeights(reader, model.weights, plan).stored_rows(name, 0, weight.shape[0])
        held = storage.read_rows(tmp_path / "out", weight, 0, weight.shape[0])
        np.testing.assert_array_equal(held, rows.reshape(held.shape))


@pytest.mark.parametrize("case", [*TWICE, *APART], ids=str)
def test_products_of_one_input_share_its_block_sums(case: OpCase, tmp_path: Path) -> None:
    import onnx

    model, plan = build(case, tmp_path)
    graphs_of([model], positive(plan), tmp_path / "out", "fused")
    graph = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("ReduceSum") == (2 if "two inputs" in case.note else 1)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_decoder_computes_with_offsets_what_the_canonical_graph_computes(
    dialect: str, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced("qwen2")  # has biases
    artifact = graphs_of([found.model], shifted(found.plan("int4-b32")), tmp_path, dialect)
    assert_built(tmp_path, {"decoder": artifact}, found, stored_weights(found, "int4-b32", shifted))


def test_an_old_parser_gets_no_op_that_it_does_not_know(zoo: Zoo, tmp_path: Path) -> None:
    import onnx

    found = zoo.traced("autoglm_phone")
    for scheme, opset in (("fp16", 17), ("int4-b32", 21)):
        artifacts = artifacts_of(found, scheme, tmp_path / scheme, "primitives")
        model = onnx.load(tmp_path / scheme / "decoder.onnx", load_external_data=False)
        assert [each.version for each in model.opset_import] == [opset]
        since = {
            onnx.defs.get_schema(node.op_type, opset).name  # raises where that opset has no such op
            for artifact in artifacts.values()
            for node in onnx.load(tmp_path / scheme / artifact.files[0], load_external_data=False).graph.node
        }
        assert not since & {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "Gelu"}


# what is refused


@pytest.mark.parametrize("case", [case for case in OPS if is_refused(case)], ids=str)
def test_formats_that_it_would_unpack_are_refused_before_a_weight_is_read(case: OpCase, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    (finding,) = tensorrt.check(model, target(), plan)
    assert finding.code == "op-not-lowered"
    assert "w" in finding.where and "--quant int4-b128" in finding.fix


@pytest.mark.parametrize("case", UNSHIFTABLE, ids=str)
def test_other_shifts_and_tables_with_offsets_are_refused(case: OpCase, tmp_path: Path) -> None:
    model, plan = build(case, tmp_path)
    (finding,) = tensorrt.check(model, target(), plan)
    assert (finding.code, finding.where) == ("op-not-lowered", "w")
    assert "no zero points" in finding.why


def test_attention_in_float32_and_one_scale_per_row_of_int4_are_refused(zoo: Zoo) -> None:
    found = zoo.traced("llama")
    (finding,) = tensorrt.check(found.model, replace(target(), precision="float32"), found.plan("fp16"))
    assert "float16" in finding.fix
    (finding,) = tensorrt.check(found.model, target(), found.plan("int4"))
    assert "int4 needs one scale" in finding.why
    assert "17 more" in finding.where


def test_int4_is_refused_for_the_capability_that_has_none(zoo: Zoo) -> None:
    found = zoo.traced("llama")
    (finding,) = tensorrt.check(found.model, target(sm="75 89"), found.plan("int4-b32"))
    assert "take 75 out" in finding.fix
    assert tensorrt.check(found.model, target(sm="75 89"), found.plan("int8")) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [("softcap = 30.0", "softcap"), ("is_causal = 0", "masks and caches")],
)
def test_attention_that_it_has_not_is_refused(change: str, why: str, zoo: Zoo) -> None:
    inputs = {name: np.zeros((1, 2, 3, 16), np.float32) for name in "qkv"}
    mask = ", mask" if "masks" in why else ""
    given = {**inputs, "mask": np.zeros((3, 3), np.float32)} if mask else inputs
    graph = parsed(f"y = Attention <{change}> (q, k, v{mask})", given, ("y",), {})
    model = replace(zoo.traced("llama").model, graph=graph, weights={})
    (finding,) = tensorrt.check(model, target(), QuantPlan("none", {}, {}))
    assert why in finding.why


def test_float8_is_refused_for_every_capability_that_has_none(zoo: Zoo) -> None:
    found = zoo.traced("llama")
    (finding,) = tensorrt.check(found.model, target(), found.plan("fp8"))
    assert finding.where.endswith("proj.weight")
    assert "8.0, 8.6 have no float8" in finding.why
    assert "sm to some of 89 120 121" in finding.fix
    assert tensorrt.check(found.model, target(sm="89 120"), found.plan("fp8")) == []
    kit = replace(target(), options={"floor": "10.3"})
    (finding,) = tensorrt_kit.check(found.model, kit, found.plan("fp8"))
    assert 'floor = "10.13"' in finding.fix
    assert tensorrt_kit.check(found.model, replace(kit, options={"floor": "10.13"}), found.plan("fp8")) == []


# engines


def compiled(found: Traced, scheme: str, component: str, folder: Path, **options: Any) -> Artifact:
    models = found.variants(component)
    return written(
        backends.load("tensorrt"), models, target(**options), positive(found.plan(scheme, component)), folder
    )


@pytest.fixture(scope="module")
def built(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    """A decoder in float16 with its engine, to be looked at."""
    folder = tmp_path_factory.mktemp("built")
    return compiled(zoo.traced("llama"), "fp16", "decoder", folder), folder


@pytest.fixture
def mine(built: tuple[Artifact, Path], tmp_path: Path) -> Path:
    """A copy of those files, to be damaged."""
    return Path(shutil.copytree(built[1], tmp_path / "mine"))


@pytest.mark.parametrize(("name", "scheme"), [("llama", "int4-b32"), ("autoglm_phone", "fp16")])
def test_every_component_becomes_an_engine(name: str, scheme: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced(name)
    for component in found.components():
        artifact = compiled(found, scheme, component, tmp_path)
        assert set(artifact.files) == {path.name for path in tmp_path.iterdir() if path.name.startswith(component)}
        for model, signature in zip(found.variants(component), artifact.signatures, strict=True):
            assert signature.file == f"{stem_of(model)}.engine"
            seen = tensorrt_runner.read_signature(tmp_path, artifact, model.variant)
            assert seen.keys() == {spec.name for spec in (*model.inputs, *model.outputs)}
            caches = {value for pair in model.state for value in pair}
            for spec, wanted in zip(
                (*signature.inputs, *signature.outputs), (*model.inputs, *model.outputs), strict=True
            ):
                assert (spec.name, spec.shape) == (wanted.name, wanted.shape)
                assert spec.dtype == ("float16" if spec.name in caches else wanted.dtype)
    described = json.loads((tmp_path / "decoder.engine.json").read_bytes())
    assert described["runtime"] == "tensorrt_rtx"
    assert described["compute_capabilities"] == ["8.0", "8.6", "8.9", "12.0"]
    assert [tuple(pair) for pair in described["aliases"]] == list(found.model.state)


@pytest.mark.parametrize("fmt", [FP16, INT8_CHANNEL, FORMATS["int4-b128"], FLOAT8_CHANNEL], ids=lambda fmt: fmt.name)
def test_an_engine_keeps_a_weight_as_small_as_it_is_stored(fmt: Format, tmp_path: Path) -> None:
    model, plan = build(linear("large", "fp16", rows=1024, width=1024), tmp_path)
    written(
        backends.load("tensorrt"), [model], target(sm="89 120"), replace(plan, formats={"w": fmt}), tmp_path / "out"
    )
    beside = (tmp_path / "out" / "decoder.engine").stat().st_size - fmt.nbytes((1024, 1024))
    assert 0 < beside < 400_000  # kernels: unpacked to the next larger format, it would be 500,000 more


def test_an_engine_keeps_offsets_as_small_as_they_are_stored(tmp_path: Path) -> None:
    fmt, beside = FORMATS["int4-b32-o8"], []
    for width in (1024, 2048):
        folder = tmp_path / str(width)
        folder.mkdir()
        model, plan = build(linear("large", fmt.name, rows=1024, width=width), folder)
        written(backends.load("tensorrt"), [model], target(sm="89 120"), positive(plan), folder / "out")
        beside.append((folder / "out" / "decoder.engine").stat().st_size - fmt.nbytes((1024, width)))
    assert abs(beside[1] - beside[0]) < 4_000  # offsets in float16 would be 32,768 more


def test_the_oldest_capability_has_a_file_of_its_own(zoo: Zoo, tmp_path: Path) -> None:
    artifact = compiled(zoo.traced("llama"), "int8", "decoder", tmp_path, sm="75 89")
    assert {name for name in artifact.files if name.endswith(".engine")} == {"decoder.engine", "decoder.sm75.engine"}
    told = [json.loads((tmp_path / f"decoder{each}.engine.json").read_bytes()) for each in ("", ".sm75")]
    assert [each["compute_capabilities"] for each in told] == [["8.9"], ["7.5"]]
    for name in ("decoder.engine", "decoder.sm75.engine"):
        tensorrt_runner.check_engine(tmp_path / name)


def test_two_builds_differ_in_the_engine_alone(built: tuple[Artifact, Path], zoo: Zoo, tmp_path: Path) -> None:
    one, folder = built
    assert compiled(zoo.traced("llama"), "fp16", "decoder", tmp_path) == one
    same = {name: (folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in one.files}
    assert {name for name, equal in same.items() if not equal} <= {"decoder.engine"}
    assert not any(str(tmp_path).encode() in (tmp_path / name).read_bytes() for name in one.files)


@pytest.mark.parametrize("damage", ["magic", "short", "other"])
def test_a_damaged_engine_does_not_open(damage: str, built: tuple[Artifact, Path], mine: Path) -> None:
    file = mine / "decoder.engine"
    if damage == "magic":
        file.write_bytes(b"vtrs" + file.read_bytes()[4:])
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        described = mine / "decoder.engine.json"
        described.write_text(described.read_text().replace('"past_key.0"', '"past_key.9"'))
    with pytest.raises(errors.BundleError, match="artifact-does-not-open"):
        tensorrt_runner.read_signature(mine, built[0])


def parsed_network(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(the API, the network as the parser leaves it, its build plan); what they hang on is kept with the plan."""
    trt = tensorrt_engine.load(tensorrt.MODULE)
    plan = json.loads((folder / "decoder.build_plan.json").read_bytes())["graphs"][0]
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(folder / "decoder.onnx"))
    return trt, network, {**plan, "kept": (logger, builder, parser)}


def test_attention_as_the_parser_leaves_it_is_refused(built: tuple[Artifact, Path], zoo: Zoo) -> None:
    trt, network, plan = parsed_network(built[1])
    layers = zoo.traced("llama").checkpoint.config["num_hidden_layers"]
    wrong = [*tensorrt_engine.lint(trt, network, plan)]
    assert len(wrong) == layers
    assert all("upper left" in each for each in wrong)
    assert tensorrt_engine.repair(trt, network, plan["lengths"]) == layers
    assert [*tensorrt_engine.lint(trt, network, plan)] == []
    first = next(iter(tensorrt_engine._attentions(trt, network)))
    assert first.causal_kind == trt.CausalMaskKind.LOWER_RIGHT
    assert first.key_value_lengths.dtype == trt.DataType.INT32
    first.causal_kind = trt.CausalMaskKind.NONE
    (left,) = tensorrt_engine.lint(trt, network, plan)
    assert "empty slots" in left


def test_a_build_without_the_repair_ends_before_an_engine_is_written(
    built: tuple[Artifact, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt, _, plan = parsed_network(built[1])
    monkeypatch.setattr(tensorrt_engine, "repair", lambda *_: 0)
    with pytest.raises(tensorrt_engine.EngineError, match="upper left"):
        tensorrt_engine.build(trt, built[1] / "decoder.onnx", tmp_path / "new.engine", plan, [89])
    assert not (tmp_path / "new.engine").exists()


def test_a_cache_that_is_cast_before_it_is_written_is_refused(built: tuple[Artifact, Path]) -> None:
    trt, network, plan = parsed_network(built[1])
    tensorrt_engine.repair(trt, network, plan["lengths"])
    wrong = [*tensorrt_engine.lint(trt, network, {**plan, "state": [["past_key.0/cast", "present_key.0"]]})]
    assert any("no input whose update" in each for each in wrong)


def test_the_builder_lets_go_of_the_weights_that_it_has_mapped(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Linux's own count of a mapping's resident pages; and what they hold is read again from the file."""
    file = mine / "decoder.onnx.data"
    held = file.read_bytes()
    with file.open("rb") as opened_file, mmap.mmap(opened_file.fileno(), 0, prot=mmap.PROT_READ) as mapped:

        def resident() -> int:
            blocks = Path("/proc/self/smaps").read_text().split(f"{file}\n")[1:]
            return sum(int(block.split("Rss:")[1].split()[0]) for block in blocks)

        assert mapped[:] == held
        assert resident() > 0
        assert tensorrt_engine.release(file) >= len(held)
        assert resident() == 0
        assert mapped[:] == held
    assert tensorrt_engine.release(file) == 0
    released: list[Path] = []
    monkeypatch.setattr(tensorrt_engine, "release", released.append)
    (plan,) = json.loads((mine / "decoder.build_plan.json").read_bytes())["graphs"]
    trt = tensorrt_engine.load(tensorrt.MODULE)
    tensorrt_engine.build(trt, mine / "decoder.onnx", mine / "decoder.engine", plan, [89])
    assert set(released) == {file}
    tensorrt_runner.check_engine(mine / "decoder.engine")


def test_what_tensorrt_says_is_what_the_user_reads(mine: Path) -> None:
    (mine / "decoder.onnx").write_bytes(b"no graph")
    plan = json.loads((mine / "decoder.build_plan.json").read_bytes())
    with pytest.raises(errors.LoweringError, match="engine-not-built") as caught:
        tensorrt.build_engines(plan, mine, "decoder")
    assert "parse" in caught.value.findings[0].why.lower()


def test_without_tensorrt_check_works_and_compile_says_how_to_install_it(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("edgeexport.backends.tools.version", version)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    found = zoo.traced("llama")
    assert tensorrt.check(found.model, target(), found.plan("fp16")) == []
    with pytest.raises(errors.ToolError, match="missing-package") as caught:
        compiled(found, "fp16", "decoder", tmp_path)
    assert "pip install 'edgeexport[tensorrt]'" in caught.value.findings[0].fix


@pytest.mark.parametrize("options", [{"sm": "87"}, {"sm": ""}, {"sm": "80 80"}, {"prefill": 0}])
def test_an_option_out_of_its_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sm is|prefill is"):
        tensorrt.Options(**options)
