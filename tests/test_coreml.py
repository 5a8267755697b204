"""Core ML: what is written is what the canonical graph means, by the interpreter; and by coremltools, well formed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases.ops import OPS, OpCase, linear, lookup
from graphs import CONTEXT, FAMILIES, Decoder, Graph, Traced, Zoo, call_of, written
from mlpackages import builder, coremltools
from test_backend_ops import build as built_case
from test_backend_ops import oracle

from edgeexport import errors, targets
from edgeexport.backends import coreml, coreml_lints, coreml_lowering, coreml_ops, coreml_runner
from edgeexport.backends.coreml_interpreter import Interpreter
from edgeexport.backends.coreml_mil import identifier
from edgeexport.backends.coreml_package import MODEL, WEIGHTS, Package
from edgeexport.backends.storage import read_rows
from edgeexport.checkpoint import WeightReader
from edgeexport.core import Array, Artifact, CanonicalModel, Dim, QuantPlan, Target, TensorSpec
from edgeexport.quant import FORMATS, SCHEMES
from edgeexport.quant import plan as planned
from edgeexport.quant.source import PlannedWeights

pytest.importorskip("coremltools")

TOKENS = np.random.default_rng(1).integers(3, 320, CONTEXT)
PIECES = (7, 5, *[1] * 8, 3, *[1] * 9)
"""Tokens of each call, up to the last slot: with pieces of 8, one padded, one whole, some alone."""
SNR_DB = 55.0
"""Of tiny random models in float16; measured 57.9 to 64.7."""
assert sum(PIECES) == CONTEXT


def target(**options: Any) -> Target:
    """ios-coreml for tiny models: prompts in pieces of 8."""
    return replace(targets.load("ios-coreml"), options={"prefill": 8, "features": 24, **options})


def compiled(models: list[CanonicalModel], plan: QuantPlan, folder: Path, **options: Any) -> Artifact:
    """What the backend writes of one component into `folder`, which is made."""
    return written(coreml, models, target(**options), plan, folder)


def stored(models: list[CanonicalModel], plan: QuantPlan) -> dict[str, Array]:
    """Every weight as the plan rounds it."""
    with WeightReader() as reader:
        source = PlannedWeights(reader, models[0].weights, plan)
        return {name: source.stored_rows(name, 0, ref.shape[0]) for name, ref in models[0].weights.items()}


def snr(wanted: Array, got: Array) -> float:
    return float(10 * np.log10((wanted**2).sum() / max(((wanted - got) ** 2).sum(), 1e-30)))


def moved(quant: QuantPlan, suffix: str) -> QuantPlan:
    """The plan with a zero point for each block of 4-bit integers, those of the embedding too."""
    formats = {
        name: FORMATS[f"{fmt.name}-{suffix}"] if fmt.bits == 4 and fmt.block else fmt
        for name, fmt in quant.formats.items()
    }
    return replace(quant, formats=formats)


# single ops


OWN = [
    *(linear(f"a weight in {name}", name) for name in ("int4-b16-zp", "int4-b32-zp", "int4-b32-zp16", "int8-b16")),
    *(linear(f"rows of three blocks in {name}", name, width=96) for name in ("int4-b32-zp", "int4-b32-zp16")),
    *(lookup(f"from a table in {name}", name, width=96) for name in ("int4-b32-zp", "int4-b32-zp16")),
]


@pytest.mark.parametrize("case", [case for case in OPS + OWN if case.op != "Range"], ids=str)
def test_an_op_computes_what_it_means(case: OpCase, tmp_path: Path) -> None:
    model, plan = built_case(case, tmp_path)
    assert coreml.check(model, target(), plan) == []
    compiled([model], plan, tmp_path)
    expected = oracle(case, model, plan)
    for exact, tolerance in ((True, 2.5e-4), (False, 4e-3)):  # q's own scale is a float16 even where it is exact
        got = interpreted(case, tmp_path / "decoder.mlpackage", exact=exact)
        for name in case.outputs:
            assert got[name].shape == expected[name].shape
            if case.op == "Cast" and not exact:
                continue  # of 70000, beyond float16
            scale = max(1.0, float(np.abs(expected[name]).max()))
            np.testing.assert_allclose(got[name], expected[name], atol=tolerance * scale, rtol=0)


def interpreted(case: OpCase, package: Path, *, exact: bool) -> dict[str, Array]:
    program = Interpreter(package, exact=exact)
    state = program.new_state("step")
    for name in state:
        state[name] = case.inputs[name].astype(np.float32 if exact else np.float16).astype(np.float32)
    feeds = {
        name: array.astype(np.int32) if array.dtype == np.int64 else array
        for name, array in case.inputs.items()
        if name not in state
    }
    found = program.run(feeds, state, "step")
    return found | {name.replace("past", "present"): array for name, array in state.items()}


def test_a_length_that_an_input_says_is_refused(tmp_path: Path) -> None:
    (case,) = (case for case in OPS if case.op == "Range")
    model, plan = built_case(case, tmp_path)
    (finding,) = coreml.check(model, target(), plan)
    assert finding.code == "op-not-lowered" and "the input n" in finding.why


# whole components


LAYOUTS = [(scheme, "tokens") for scheme in ("fp32", "fp16", "int8", "int4-b32")] + [
    (scheme, "channels") for scheme in ("fp16", "int4-b32", "palette4")
]


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pieces of 8 be whole ones in the layout of the Neural Engine too."""
    monkeypatch.setattr(coreml, "MULTIPLE", 8)


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("scheme", "layout"), LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_computes_what_the_canonical_graph_computes(
    name: str, scheme: str, layout: str, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced(name)
    embedding = stored(found.variants("embed"), found.plan(scheme, "embed")) if "embed" in found.components() else {}
    computes(found, found.plan(scheme), tmp_path, embedding, layout=layout)


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("layout", ["tokens", "channels"])
@pytest.mark.parametrize("suffix", ["zp", "zp16"])
def test_blocks_with_zero_points_compute_what_the_canonical_graph_computes(
    suffix: str, layout: str, zoo: Zoo, tmp_path: Path
) -> None:
    found, plan = zoo.traced("llama"), moved(zoo.traced("llama").plan("int4-b32"), suffix)
    computes(found, plan, tmp_path, {}, layout=layout)
    wanted = stored([found.model], plan)
    program = types_are_right(tmp_path / "decoder.mlpackage")
    made = {each.name.removesuffix("_1"): each for each in program.functions["prefill"].operations}
    for name in (name for name, fmt in plan.formats.items() if fmt.shift):
        value = made[identifier(name)].materialized_val_inference()  # in float16
        np.testing.assert_allclose(value.reshape(wanted[name].shape), wanted[name], atol=2e-3)


def computes(found: Traced, plan: QuantPlan, tmp_path: Path, embedding: dict[str, Array], **options: Any) -> None:
    """A decoder's package holds the plan's weights, and computes what the canonical graph does with them."""
    models = found.variants("decoder")
    artifact = compiled(models, plan, tmp_path, **options)
    weights = stored(models, plan)
    for key, weight in artifact.weights.items():
        rows = read_rows(tmp_path, weight, 0, weight.shape[0])
        np.testing.assert_array_equal(rows.reshape(weight.shape), weights[key].reshape(weight.shape))
    weights |= embedding
    wanted = list(stepped(Decoder(found, weights)))
    for exact in (True, False):
        runner = coreml_runner.open_decoder(tmp_path, artifact, exact=exact)
        assert (runner.context, runner.vocab) == (CONTEXT, wanted[0].size)
        got = np.stack(list(stepped(runner, Decoder(found, weights))))
        if exact:
            np.testing.assert_allclose(got, wanted, atol=2e-4)
        else:
            assert snr(np.stack(wanted), got) > SNR_DB


def stepped(decoder: Any, inputs: Decoder | None = None) -> Iterator[Array]:
    """The logits of every call; a runner is fed what the canonical embedding makes."""
    position = 0
    for count in PIECES:
        tokens = TOKENS[position : position + count]
        if inputs is None:
            yield decoder.step(tokens, position)
        else:
            call = call_of(inputs._inputs, tokens, position)
            yield decoder.step(call.fed, call.position, call.rope).copy()
        position += count


WITHOUT_STATE = [("glm4v", "vision"), ("glm4v", "embed")] + [
    ("autoglm_phone", component) for component in ("vision", "audio", "embed", "fusion")
]


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("scheme", "layout"), [("fp32", "tokens"), ("int8", "tokens"), ("int8", "channels")])
@pytest.mark.parametrize(("name", "component"), WITHOUT_STATE)
def test_a_component_without_state_computes_the_same(
    name: str, component: str, scheme: str, layout: str, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced(name)
    models, plan = found.variants(component), found.plan(scheme, component)
    artifact = compiled(models, plan, tmp_path, layout=layout)
    rng = np.random.default_rng(3)
    for model in models:
        inputs = {spec.name: some(spec, rng) for spec in model.inputs}
        wanted = Graph(model, stored(models, plan)).run(inputs)
        for exact in (True, False):
            got = coreml_runner.open_graph(tmp_path, artifact, model.variant, exact=exact).run(inputs)
            for key, each in wanted.items():
                assert got[key].shape == each.shape
                assert snr(each, got[key]) > (95 if exact else SNR_DB)


def some(spec: TensorSpec, rng: np.random.Generator) -> Array:
    """A random value of this shape; 11 where it is symbolic, which is no whole number of pieces."""
    shape = [11 if isinstance(size, Dim) else size for size in spec.shape]
    return rng.integers(0, 50, shape) if spec.dtype == "int64" else rng.standard_normal(shape, np.float32)


def test_more_features_than_the_package_takes_are_the_users_error(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("autoglm_phone")
    models = found.variants("fusion")
    artifact = compiled(models, found.plan("fp16", "fusion"), tmp_path)
    inputs = {spec.name: some(spec, np.random.default_rng(0)) for spec in models[0].inputs}
    inputs["features"] = np.repeat(inputs["features"], 3, axis=1)
    with pytest.raises(errors.UsageError, match="mlpackage-bad-input"):
        coreml_runner.open_graph(tmp_path, artifact).run(inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_signatures_are_those_of_the_canonical_graph(name: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced(name)
    for component in found.components():
        models = found.variants(component)
        artifact = compiled(models, found.plan("fp16", component), tmp_path / component)
        for model in models:
            read = coreml_runner.read_signature(tmp_path / component, artifact, model.variant)
            promised = {spec.name: spec for spec in (*model.inputs, *model.outputs)}
            assert read.keys() == promised.keys()
            for key, spec in promised.items():
                assert (read[key].dtype, len(read[key].shape)) == (spec.dtype, len(spec.shape))
                pairs = zip(read[key].shape, spec.shape, strict=True)
                assert all(isinstance(b, Dim) or a == b for a, b in pairs)


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("scheme", "layout"), [(scheme, "tokens") for scheme in SCHEMES] + [("int8", "channels"), ("palette4", "channels")]
)
@pytest.mark.parametrize("name", ["glm4", "glm4v", "autoglm_phone", "qwen2"])
def test_coremltools_finds_the_same_types(name: str, scheme: str, layout: str, zoo: Zoo, tmp_path: Path) -> None:
    """Its loader builds every operation again, infers its type and compares it with the one that is declared."""
    found = zoo.traced(name)
    for component in found.components():
        compiled(found.variants(component), found.plan(scheme, component), tmp_path, layout=layout)
        types_are_right(tmp_path / f"{component}.mlpackage")
        shutil.rmtree(tmp_path / f"{component}.mlpackage")


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [("Q4_1", "int4-b32-zp16"), ("Q4_0", "int4-b32"), ("Q6_K", "int8-b16"), ("F16", "int4-b32-zp")],
)
def test_a_plan_for_core_ml_carries_over_what_it_can(encoding: str, wanted: str) -> None:
    plan = planned({"w": (64, 256)}, {"w": "linear"}, "int4-b32", coreml.TRAITS, {"w": encoding})
    assert (plan.formats["w"].name, "w" in plan.carried) == (wanted, encoding != "F16")


def types_are_right(package: Path) -> Any:
    """The program as coremltools has loaded it."""
    ct = coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = ct.proto.Model_pb2.Model.FromString((package / MODEL).read_bytes())
    program = load(spec, 9, str((package / WEIGHTS).parent))
    assert set(program.functions) == {each.name for each in spec.description.functions}
    ct.models.MLModel(str(package), skip_model_load=True)
    return program


def test_two_functions_share_all_weights(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("llama")
    plan = found.plan("int8")
    compiled([found.model], plan, tmp_path)
    size = (tmp_path / "decoder.mlpackage" / WEIGHTS).stat().st_size
    ideal = plan.ideal_bytes({name: ref.shape for name, ref in found.model.weights.items()})
    tables = 2 * CONTEXT * 16 * 4
    records = 128 * (2 * len(plan.formats) + 4)
    assert ideal < size < ideal + tables + records + 1024


@pytest.mark.parametrize("scheme", ["fp16", "int4-b32"])
def test_two_builds_have_the_same_bytes(scheme: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("glm4")
    one = compiled([found.model], found.plan(scheme), tmp_path / "one")
    two = compiled([found.model], found.plan(scheme), tmp_path / "another" / "folder")
    assert one == two
    for name in one.files:
        data = (tmp_path / "one" / name).read_bytes()
        assert data == (tmp_path / "another" / "folder" / name).read_bytes()
        assert str(tmp_path).encode() not in data


def test_a_package_without_coremltools_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeexport.backends import coreml_mil

    monkeypatch.setattr(coreml_mil, "PathFinder", SimpleNamespace(find_spec=lambda name: None))
    with pytest.raises(errors.ToolError, match="missing-package"):
        coreml_mil.protobuf.__wrapped__()


# the layout of the Neural Engine


@pytest.mark.usefixtures("eight")
def test_every_multiplication_is_a_convolution_and_tokens_stay_last(zoo: Zoo, tmp_path: Path) -> None:
    """Between attention and attention no activation is turned: three transposes lead into each layer's attention, one
    out of it, and one value, the embedding, comes in."""
    found = zoo.traced("llama")
    compiled([found.model], found.plan("palette4"), tmp_path, layout="channels")
    layers = len(found.model.state) // 2
    for name in ("decode", "prefill"):
        steps = Interpreter(tmp_path / "decoder.mlpackage").function(name).steps
        kinds = [step.kind for step in steps]
        assert "linear" not in kinds and "matmul" not in kinds
        assert kinds.count("conv") == 7 * layers + 1
        assert kinds.count("transpose") <= 4 * layers + 4
        shapes = [step.types[0].shape for step in steps if step.kind in ("conv", "layer_norm", "sigmoid")]
        count = {"decode": 1, "prefill": 8}[name]
        inner = [shape for shape in shapes if len(shape) == 4]
        assert len(inner) >= len(shapes) - 1  # the first norm, of the embedding
        assert {(shape[0], shape[2]) for shape in inner} == {(1, 1)}
        assert {shape[3] for shape in inner} <= {1, count}


@pytest.mark.parametrize(("prefill", "layout"), [(8, "channels"), (0, "tokens")])
def test_sizes_that_no_function_can_have_are_refused(prefill: int, layout: Any) -> None:
    with pytest.raises(ValueError, match="prefill"):
        coreml.Options(prefill=prefill, layout=layout)


# the two miscompilations, and others like them


def llama(zoo: Zoo) -> Traced:
    return zoo.traced("llama")


def refused(zoo: Zoo, folder: Path) -> list[str]:
    """Why the program of a tiny Llama is refused."""
    with pytest.raises(errors.LoweringError) as caught:
        compiled([llama(zoo).model], llama(zoo).plan("fp16"), folder)
    assert {finding.code for finding in caught.value.findings} == {"coreml-unsafe-program"}
    return [finding.why for finding in caught.value.findings]


def test_a_state_read_after_it_is_written_is_refused(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_again(node: Any, ctx: Any) -> None:
        coreml_ops.scatter(node, ctx)
        state = ctx.states[node.inputs[0]]
        ctx.values[node.outputs[0]] = ctx.emit("read_state", {"input": state}, state.shape)

    use(monkeypatch, "TensorScatter", read_again)
    assert "the state past_key_0 is read after it is written" in refused(zoo, tmp_path)


def stale(node: Any, ctx: Any) -> None:
    """The cache as it was before this token: what remove_redundant_ops makes of a second read."""
    coreml_ops.scatter(node, ctx)
    state = ctx.states[node.inputs[0]]
    ctx.values[node.outputs[0]] = coreml_lowering.Value(f"{state.name}_read", state.shape, state.dtype)


def test_the_old_value_of_a_state_is_refused(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "TensorScatter", stale)
    assert "it uses what the state past_key_0 was before it is written" in refused(zoo, tmp_path)


def plain_norm(node: Any, ctx: Any) -> None:
    """x * rsqrt(mean(x * x) + epsilon) * weight, whose squares are infinite in float16 from 256 on."""
    x, weight = (ctx.materialised(ctx.value(each)) for each in node.inputs)
    squares = ctx.emit("mul", {"x": x, "y": x}, x.shape)
    one = (*x.shape[:-1], 1)
    mean = ctx.emit("reduce_mean", {"x": squares, "axes": np.array([-1], np.int32), "keep_dims": True}, one)
    factor = ctx.emit("rsqrt", {"x": mean, "epsilon": np.array(1e-5, np.float16)}, one)
    normed = ctx.emit("mul", {"x": x, "y": factor}, x.shape)
    ctx.values[node.outputs[0]] = ctx.emit("mul", {"x": normed, "y": weight}, x.shape)


def test_a_sum_of_squares_is_refused(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "RMSNormalization", plain_norm)
    assert "it sums squares in float16, which overflow from 256 on" in refused(zoo, tmp_path)


def use(monkeypatch: pytest.MonkeyPatch, op: str, lower: Any) -> None:
    """Another lowering of one op."""
    row = coreml_ops.OPS.get(op)
    assert row is not None
    monkeypatch.setitem(coreml_ops.OPS._rows, op, replace(row, lower=lower))


def test_an_output_that_is_a_state_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    compiled([llama(zoo).model], llama(zoo).plan("fp16"), tmp_path)
    model = Package(tmp_path / "decoder.mlpackage").model
    function = model.mlProgram.functions["decode"]
    block = function.block_specializations[function.opset]
    written = next(each for each in block.operations if each.type == "write_state")
    block.outputs.append(written.inputs["data"].arguments[0].name)
    (finding,) = coreml_lints.unsafe(model)
    assert "the output is the value of the state past_key_0" in finding.why


@pytest.mark.parametrize("spike", [1.0, 3000.0])
def test_a_norm_of_large_numbers_keeps_its_precision(spike: float, tmp_path: Path) -> None:
    (case,) = (case for case in OPS if str(case) == "RMSNormalization:_alone")
    x = case.inputs["x"].copy()
    x[..., 5] = spike
    large = replace(case, inputs={"x": x})
    model, plan = built_case(large, tmp_path)
    compiled([model], plan, tmp_path)
    got = interpreted(large, tmp_path / "decoder.mlpackage", exact=False)["y"]
    np.testing.assert_allclose(got, oracle(large, model, plan)["y"], rtol=2e-3, atol=1e-4)


def test_the_pass_that_returns_stale_states_is_caught(tmp_path: Path) -> None:
    """coremltools' own default passes over a program that reads, writes and reads: the package is wrong, silently, and
    both the interpreter and the lint see it."""
    ct, mb = coremltools(), builder()
    from coremltools.converters.mil.mil import Function, Program, types

    made = Program()
    inputs = {"x": mb.placeholder((1, 4), dtype=types.fp16), "s": mb.state_tensor_placeholder((1, 4), types.fp16)}
    with Function(inputs, opset_version=ct.target.iOS18) as function:
        before = mb.read_state(input=function.inputs["s"])
        mb.coreml_update_state(state=function.inputs["s"], value=mb.add(x=before, y=function.inputs["x"]))
        after = mb.read_state(input=function.inputs["s"])
        function.set_outputs([mb.mul(x=after, y=np.float16(2), name="y")])
    made.add_function("main", function)
    package = ct.convert(
        made, source="milinternal", convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32, skip_model_load=True,
    )  # fmt: skip
    package.save(str(tmp_path / "stale.mlpackage"))
    program = Interpreter(tmp_path / "stale.mlpackage")
    ones = np.ones((1, 4), np.float16)
    assert coreml_lints.unsafe(program.package.model)
    assert (
        program.run({"x": ones}, program.new_state())["y"][0, 0] == 0
    )  # 2, if the state had been read after the write


# a model that is too large for one file


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("name", "layout"), [("llama", "tokens"), ("llama", "channels"), ("glm4v", "tokens"), ("autoglm_phone", "tokens")]
)
def test_a_decoder_in_several_packages_computes_the_same(name: str, layout: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced(name)
    models, plan = found.variants("decoder"), found.plan("fp16")
    whole = compiled(models, plan, tmp_path / "whole", layout=layout)
    size = (tmp_path / "whole" / "decoder.mlpackage" / WEIGHTS).stat().st_size
    small = replace(target(layout=layout), limits={"max_file_bytes": int(0.6 * size)})
    with WeightReader() as reader:
        source = PlannedWeights(reader, models[0].weights, plan)
        cut = coreml.compile(models, small, plan, source, tmp_path)
    packages = sorted({file.split("/")[0] for file in cut.files})
    assert len(packages) >= 2 and packages == [f"decoder.{i + 1}.mlpackage" for i in range(len(packages))]
    assert all((tmp_path / package / WEIGHTS).stat().st_size <= small.limits["max_file_bytes"] for package in packages)
    assert cut.weights.keys() == whole.weights.keys()
    for package in packages:
        types_are_right(tmp_path / package)
    first, second = (
        coreml_runner.open_decoder(folder, artifact)
        for folder, artifact in ((tmp_path / "whole", whole), (tmp_path, cut))
    )
    inputs = Decoder(found, stored(models, plan) | embedding(found))
    for one, other in zip(stepped(first, inputs), stepped(second, inputs), strict=True):
        np.testing.assert_array_equal(one, other)
    assert coreml_runner.read_signature(tmp_path, cut) == coreml_runner.read_signature(tmp_path / "whole", whole)


def embedding(found: Traced) -> dict[str, Array]:
    if "embed" not in found.components():
        return {}
    return stored(found.variants("embed"), found.plan("fp16", "embed"))


def test_a_stage_that_fits_no_file_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("llama")
    plan = found.plan("fp16")
    small = replace(target(), limits={"max_file_bytes": 20_000})
    with WeightReader() as reader, pytest.raises(errors.LoweringError, match="artifact-too-large"):
        coreml.compile([found.model], small, plan, PlannedWeights(reader, found.model.weights, plan), tmp_path)
