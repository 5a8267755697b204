"""The kit for a Jetson: made without TensorRT, built by its own one file, and what the device measured read back.

No Jetson is here: TensorRT-RTX stands in for its builder, and ONNX Runtime for its engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import with_tokenizer
from graphs import Zoo, positive, write_checkpoint, written
from test_coreml_pipeline import small

from edgeexport import backends, build, cli_import, families, open_bundle, targets
from edgeexport.backends import (
    tensorrt_device,
    tensorrt_engine,
    tensorrt_kit,
    tensorrt_kit_runner,
    tensorrt_runner,
)
from edgeexport.bundle.verify import verify
from edgeexport.core import Verdict, worst

MODULE = "tensorrt_rtx_bindings"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a tiny llama, built where no TensorRT can be imported."""
    root = tmp_path_factory.mktemp("kit")
    checkpoint = with_tokenizer(write_checkpoint(root / "llama", families.find("llama").tiny))
    with pytest.MonkeyPatch.context() as patch:
        for module in tensorrt_engine.MODULES:
            patch.setitem(sys.modules, module, None)
        made = build(str(checkpoint), small("jetson-trt", 32, root), root / "out", quant="fp16", context=96)
    assert [finding.code for finding in made.findings if finding.severity == "warning"] == ["engine-to-build"]
    return made.bundle


def builder(bundle: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The one file, run as on a device: outside of this package."""
    command = [sys.executable, "-I", "engine_builder.pyz", *map(str, arguments)]
    return subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)


def test_the_bundle_says_that_no_engine_has_run(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.parity == {"L1": "PASS", "L2": "PASS", "L3": "PASS", "L4": "NOT_RUN", "L5": "NOT_RUN"}
    assert {"decoder.onnx", "decoder.onnx.data", "decoder.build_plan.json", "engine_builder.pyz"} <= set(manifest.files)
    assert not any("tensorrt" in tool for tool in manifest.tools)
    assert verify(bundle).ok


def test_the_one_file_builds_and_keeps_what_it_built(bundle: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "engines", tmp_path / "cache"
    given = ("build", "--module", MODULE, "--out", out, "--cache", cache)
    done = builder(bundle, *given)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((out / "decoder.engine.json").read_bytes())["runtime"] == "tensorrt_rtx"
    (kept,) = cache.glob("*.engine")
    kept.write_bytes(b"kept")
    assert builder(bundle, *given).returncode == 0
    assert (out / "decoder.engine").read_bytes() == b"kept"
    assert verify(bundle).ok  # nothing was written into the bundle


def test_the_key_of_an_engine_changes_with_whatever_it_depends_on(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = tensorrt_engine.load(MODULE)
    (plan,) = json.loads((bundle / "decoder.build_plan.json").read_bytes())["graphs"]
    graph, data = bundle / "decoder.onnx", bundle / "decoder.onnx.data"
    keys = [tensorrt_engine.cache_key(trt, plan, [], [graph, data])]
    keys.append(tensorrt_engine.cache_key(trt, plan, [89], [graph, data]))
    keys.append(tensorrt_engine.cache_key(trt, {**plan, "profile": {}}, [], [graph, data]))
    keys.append(tensorrt_engine.cache_key(trt, plan, [], [data, data]))
    monkeypatch.setattr(tensorrt_engine, "gpu_name", lambda: "NVIDIA Jetson AGX Orin Developer Kit")
    keys.append(tensorrt_engine.cache_key(trt, plan, [], [graph, data]))
    monkeypatch.setattr(trt, "__version__", "10.13.3")
    keys.append(tensorrt_engine.cache_key(trt, plan, [], [graph, data]))
    assert len(set(keys)) == len(keys)


def test_without_tensorrt_the_one_file_says_so(bundle: Path, tmp_path: Path) -> None:
    done = builder(bundle, "build", "--module", "no_such_tensorrt", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "none of no_such_tensorrt can be imported\n"
    assert "usage" in builder(bundle).stderr


def test_what_a_device_measures_is_judged_by_the_bundles_gates(bundle: Path, tmp_path: Path) -> None:
    component = open_bundle(bundle).component("decoder")
    golden = tensorrt_device.read_golden(bundle / tensorrt_device.GOLDEN)

    def merged(scale: float) -> list[Verdict]:
        decoder = tensorrt_kit_runner.open_decoder(bundle, component, threads=1)
        rows = tensorrt_device.measure(lambda tokens, at: scale * decoder.step(tokens, at), golden)
        decoder.close()
        report = tmp_path / f"{scale}.json"
        report.write_text(json.dumps(tensorrt_device.report(bundle, rows, "ONNX Runtime", "standing in for an engine")))
        results = cli_import.merge(bundle, [report], tmp_path / f"merged-{scale}")
        assert worst(results) is (Verdict.PASS if scale == 1 else Verdict.FAIL)
        return [row.verdict for row in results if "standing in" in row.note]

    assert merged(1.0) == [Verdict.PASS] * 3
    assert merged(1.5) == [Verdict.PASS, Verdict.FAIL, Verdict.FAIL]


def test_golden_vectors_are_read_as_safetensors_reads_them(bundle: Path) -> None:
    from safetensors.numpy import load_file

    path = bundle / tensorrt_device.GOLDEN
    wanted, found = load_file(path), tensorrt_device.read_golden(path)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


@pytest.mark.parametrize(("floor", "opset", "command"), [("10.3", 17, True), ("10.15", 24, False)])
def test_the_floor_chooses_the_dialect(floor: str, opset: int, command: bool, zoo: Zoo, tmp_path: Path) -> None:
    import onnx

    found = zoo.traced("llama")
    target = replace(targets.load("jetson-trt"), options={"floor": floor, "prefill": 32})
    written(backends.load("tensorrt-kit"), [found.model], target, positive(found.plan("fp16")), tmp_path)
    model = onnx.load(tmp_path / "decoder.onnx", load_external_data=False)
    assert model.opset_import[0].version == opset
    plan = json.loads((tmp_path / "decoder.build_plan.json").read_bytes())
    (line,) = plan["trtexec"]
    assert line.startswith("trtexec --onnx=decoder.onnx --saveEngine=decoder.engine --stronglyTyped") is command
    assert ("--maxShapes=input_ids:1x32 " in line) is command


def test_primitives_over_float8_become_an_engine(zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced("llama")
    target = replace(targets.load("jetson-trt"), options={"floor": "10.13", "prefill": 32})
    written(backends.load("tensorrt-kit"), [found.model], target, positive(found.plan("fp8")), tmp_path)
    (plan,) = json.loads((tmp_path / "decoder.build_plan.json").read_bytes())["graphs"]
    engine = tmp_path / "decoder.engine"
    tensorrt_engine.build(tensorrt_engine.load(MODULE), tmp_path / "decoder.onnx", engine, plan, [89, 120])
    tensorrt_runner.check_engine(engine)


@pytest.mark.parametrize("options", [{"floor": "8.6"}, {"floor": "ten"}, {"prefill": 0}])
def test_an_option_out_of_its_range_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"floor is|is no version|prefill is"):
        tensorrt_kit.Options(**options)  # type: ignore[arg-type]
