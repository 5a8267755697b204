"""What every backend promises: a module that fits `Backend`, a pure check, and an artifact that is right and small."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import inspect
import os
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import (
    FAMILIES,
    TOKENS,
    Traced,
    Zoo,
    assert_built,
    compiled,
    host_target,
    opened,
    parsed,
    stored_weights,
    traced,
    write_checkpoint,
)

from edgeexport import backends, errors, families
from edgeexport.backends import onnxruntime as ort_backend
from edgeexport.backends import onnxruntime_runner as ort_runner
from edgeexport.backends.optable import OpTable
from edgeexport.core import Artifact, CanonicalModel, QuantPlan, Traits
from edgeexport.quant import SCHEMES

LARGER = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 64,
    "vocab_size": 2000,
}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """A model whose weights outweigh its graph: 3.1 million parameters."""
    config = {**families.find("llama").tiny, **LARGER}
    return traced(write_checkpoint(tmp_path_factory.mktemp("larger") / "model", config, "bfloat16"))


# the contract


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_a_backend_fits_the_protocol(name: str) -> None:
    backend = backends.load(name)
    assert backend.NAME == backend.OPS.backend == name
    assert isinstance(backend.OPS, OpTable)
    assert isinstance(backend.TRAITS, Traits)
    assert dataclasses.is_dataclass(backend.OPTIONS)
    assert all(value.default is not dataclasses.MISSING for value in dataclasses.fields(backend.OPTIONS))
    for function in ("versions", "check", "compile"):
        wanted = list(inspect.signature(getattr(backends.Backend, function)).parameters)[1:]
        assert list(inspect.signature(getattr(backend, function)).parameters) == wanted
    assert all(isinstance(version, str) for version in backend.versions().values())
    runner = backends.load_runner(name)
    assert list(inspect.signature(runner.open_decoder).parameters)[:2] == ["folder", "component"]


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    for load in (backends.load, backends.load_runner):
        with pytest.raises(errors.UsageError, match="unknown-backend") as caught:
            load("onnxruntme")
        assert "onnxruntime" in caught.value.findings[0].why + caught.value.findings[0].fix


def test_a_package_adds_a_backend_but_replaces_none(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("mine", "edgeexport.backends.onnxruntime", "edgeexport.backends")]
    monkeypatch.setattr(backends, "entry_points", lambda group: [p for p in points if p.group == group])
    assert backends.load("mine").NAME == "onnxruntime"
    points.append(EntryPoint("onnxruntime", "elsewhere", "edgeexport.backends"))
    with pytest.raises(errors.ToolError, match="duplicate-plugin"):
        backends.load("mine")


def test_an_op_has_one_row() -> None:
    table = OpTable("mine")
    table.native("Add")
    with pytest.raises(AssertionError, match="Add has two rows"):
        table.reject("Add", why="no", fix="none")


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_check_is_pure_and_needs_no_sdk(name: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    found = zoo.traced("llama")
    plan, backend = found.plan("int4-b32"), backends.load(name)
    target = dataclasses.replace(host_target(), precision="float16", options={})  # those of another backend

    def closed(*_: Any, **__: Any) -> Any:
        raise AssertionError("check opened a file")

    for sdk in ("onnx", "onnxruntime", "torch", "transformers"):
        monkeypatch.setitem(sys.modules, sdk, None)
    for room, function in ((builtins, "open"), (os, "open"), (os, "pread"), (Path, "open")):
        monkeypatch.setattr(room, function, closed)
    findings = backend.check(found.model, target, plan)
    monkeypatch.undo()
    assert findings == []


def test_check_names_every_node_that_is_refused(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    table = OpTable("onnxruntime")
    table.native("Mul", limit=lambda node: "only on Sundays")
    table.reject("Tanh", why="it has no such kernel", fix="use Sigmoid")
    monkeypatch.setattr(ort_backend, "OPS", table)
    graph = parsed("a = Tanh (x)\nb = Mul (a, x)\ny = Softmax (b)", {"x": np.zeros(3, np.float32)}, ("y",), {})
    model = dataclasses.replace(zoo.traced("llama").model, graph=graph)
    findings = ort_backend.check(model, host_target(), QuantPlan("none", {}, {}))
    assert [finding.code for finding in findings] == ["op-not-lowered"] * 3
    assert [finding.why for finding in findings][:2] == ["it has no such kernel", "only on Sundays"]
    assert findings[0].fix == "use Sigmoid"
    assert "Softmax" in findings[2].what


# the artifact


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_and_scheme_computes_what_the_canonical_graph_computes(
    name: str, scheme: str, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced(name)
    weights = stored_weights(found, scheme)
    artifacts = {
        component: compiled(found.variants(component), found.plan(scheme, component), tmp_path, accuracy_level=1)
        for component in found.components()
    }
    assert_built(tmp_path, artifacts, found, weights, exact=False)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_and_one_prompt_lead_to_the_same_tokens(scheme: str, larger: Traced, tmp_path: Path) -> None:
    # In float32: with activations rounded to int8, a last bit of difference may become a whole step.
    artifact = compiled(larger.model, larger.plan(scheme), tmp_path, accuracy_level=1)
    whole, chunks = opened(artifact, tmp_path), opened(artifact, tmp_path)
    first = whole.step(TOKENS[:20], 0).copy()
    for start, stop in ((0, 9), (9, 10), (10, 20)):
        last = chunks.step(TOKENS[start:stop], start)
    np.testing.assert_allclose(last, first, atol=1e-4)
    for position in range(20, 28):
        token = TOKENS[position : position + 1]
        np.testing.assert_allclose(chunks.step(token, position), whole.step(token, position), atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_files_have_the_size_that_the_plan_says(scheme: str, larger: Traced, tmp_path: Path) -> None:
    plan = larger.plan(scheme)
    artifact = compiled(larger.model, plan, tmp_path)
    ideal = plan.ideal_bytes({name: ref.shape for name, ref in larger.model.weights.items()})
    sizes = {name: (tmp_path / name).stat().st_size for name in artifact.files}
    assert sorted(sizes) == sorted(path.name for path in tmp_path.iterdir())
    assert ideal <= sizes["decoder.onnx.data"] < 1.01 * ideal
    assert sizes["decoder.onnx"] < 64_000  # a graph of four layers, with no weight in it


@pytest.mark.parametrize("scheme", ["fp16", "int4-b32"])
def test_two_builds_in_two_folders_have_the_same_bytes(scheme: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("glm4")
    one = compiled(found.model, found.plan(scheme), tmp_path / "one")
    two = compiled(found.model, found.plan(scheme), tmp_path / "another" / "folder")
    assert one == two
    for name in one.files:
        data = (tmp_path / "one" / name).read_bytes()
        assert data == (tmp_path / "another" / "folder" / name).read_bytes()
        assert str(tmp_path).encode() not in data


def test_signatures_and_state_are_those_of_the_file(zoo: Zoo, tmp_path: Path) -> None:
    import onnxruntime as ort

    found = zoo.traced("qwen3")
    artifact = compiled(found.model, found.plan("int8"), tmp_path)
    session = ort.InferenceSession(str(tmp_path / "decoder.onnx"), providers=["CPUExecutionProvider"])
    (signature,) = artifact.signatures
    for specs, values in ((signature.inputs, session.get_inputs()), (signature.outputs, session.get_outputs())):
        assert [spec.name for spec in specs] == [value.name for value in values]
        for spec, value in zip(specs, values, strict=True):
            assert value.type == {"int64": "tensor(int64)", "float32": "tensor(float)"}[spec.dtype]
            assert value.shape == [size if isinstance(size, int) else size.name for size in spec.shape]
    assert artifact.state == found.model.state


@pytest.mark.parametrize("scheme", ["fp32", "int4-b32"])
def test_the_ort_file_computes_the_same_on_its_own(scheme: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("llama")
    artifact = compiled(found.model, found.plan(scheme), tmp_path / "out", ort_format=True)
    assert artifact.files == ("decoder.onnx", "decoder.onnx.data", "decoder.ort")
    expected = opened(artifact, tmp_path / "out")
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "out" / "decoder.ort").rename(alone / "decoder.ort")
    got = opened(artifact, alone, ".ort")
    for tokens, position in ((TOKENS[:9], 0), (TOKENS[9:10], 9), (TOKENS[10:11], 10)):
        np.testing.assert_allclose(got.step(tokens, position), expected.step(tokens, position), atol=1e-5)


def test_an_ort_file_beyond_two_gigabytes_is_refused(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = zoo.traced("llama")
    real = ort_backend.storage.write

    def huge(folder: Path, layout: Any, *rest: Any) -> None:
        real(folder, layout, *rest)
        os.truncate(folder / layout.file, 2**31)  # sparse: it takes no room

    monkeypatch.setattr(ort_backend.storage, "write", huge)
    with pytest.raises(errors.LoweringError):
        compiled(found.model, found.plan("fp16"), tmp_path, ort_format=True)


def test_a_full_disk_is_the_users_error(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(errors.UsageError, match="output-not-writable"):
        compile_llama(zoo, tmp_path)


def test_a_graph_file_that_cannot_be_written_is_the_users_error(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "decoder.onnx").mkdir()
    with pytest.raises(errors.UsageError, match="output-not-writable"):
        compile_llama(zoo, tmp_path)


def compile_llama(zoo: Zoo, folder: Path) -> Artifact:
    found = zoo.traced("llama")
    return compiled(found.model, found.plan("fp16"), folder)


def test_compiling_leaves_the_canonical_graph_as_it_was(zoo: Zoo, tmp_path: Path) -> None:
    from edgeexport.canonical.trace import digest

    model: CanonicalModel = zoo.traced("llama").model
    before = digest(model.graph, model.weights)
    compile_llama(zoo, tmp_path)
    assert digest(model.graph, model.weights) == before


def test_a_damaged_artifact_does_not_open(zoo: Zoo, tmp_path: Path) -> None:
    artifact = compile_llama(zoo, tmp_path)
    os.truncate(tmp_path / "decoder.onnx.data", 1000)
    with pytest.raises(errors.BundleError, match="artifact-does-not-open"):
        opened(artifact, tmp_path)


def test_features_do_not_keep_the_runtimes_memory(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("glm4v")
    (model,) = found.variants("embed")
    artifact = compiled(model, found.plan("fp32", "embed"), tmp_path)
    graph = ort_runner.open_graph(tmp_path, artifact, threads=1)
    (made,) = graph.run({"input_ids": TOKENS[None]}).values()
    assert made.flags.owndata
