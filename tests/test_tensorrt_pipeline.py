"""The whole walk to TensorRT engines on tiny random models, and what a bundle says of engines that nothing has run."""

from __future__ import annotations

import json
from pathlib import Path

from factories import with_tokenizer
from graphs import write_checkpoint
from test_coreml_pipeline import small

from edgeexport import build, families, open_bundle
from edgeexport.bundle.verify import verify
from edgeexport.core import ParityResult, Verdict, worst
from edgeexport.parity.report import read_results

CONTEXT = 96


def test_no_row_about_the_engine_is_green_where_no_gpu_ran_it() -> None:
    def row(level: str, verdict: Verdict, *, stand_in: bool = False) -> ParityResult:
        return ParityResult("decoder", level, "logits", {}, {}, verdict, "", stand_in)

    below = [row(level, Verdict.PASS) for level in ("L1", "L2", "L3")]
    graph = [row("L4", Verdict.PASS, stand_in=True), row("L5", Verdict.PASS, stand_in=True)]
    engine = [row("L4", Verdict.NOT_RUN), row("L5", Verdict.NOT_RUN)]
    assert worst(below) is Verdict.PASS
    assert worst([*below, *graph, *engine]) is Verdict.NOT_RUN
    assert worst([*below, *graph, row("L4", Verdict.FAIL, stand_in=True)]) is Verdict.FAIL
    assert worst([*below, *graph, *engine, row("L4", Verdict.PASS), row("L5", Verdict.PASS)]) is Verdict.PASS


def test_a_model_walks_to_engines_and_the_bundle_says_what_ran(tmp_path: Path) -> None:
    """It sees, hears and takes embeddings: every kind of component, in float16 and in int4."""
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "phone", families.find("autoglm_phone").tiny))
    made = build(str(checkpoint), small("rtx-trt", 32, tmp_path), tmp_path / "out", quant="int4-b32", context=CONTEXT)
    manifest = open_bundle(made.bundle).manifest
    parts = [component.name for component in manifest.components]
    assert {"engine-not-run"} == {finding.code for finding in made.findings if finding.severity == "warning"}
    assert manifest.parity == {"L1": "PASS", "L2": "PASS", "L3": "PASS", "L4": "NOT_RUN", "L5": "NOT_RUN"}
    assert manifest.tools["tensorrt-rtx-cu13-bindings"]
    for component in manifest.components:
        assert all(signature.file.endswith(".engine") for signature in component.signatures)
    ran = [row for row in made.results if row.level in ("L4", "L5")]
    assert {row.verdict for row in ran if row.stand_in} <= {Verdict.PASS, Verdict.AMBIGUOUS}
    assert all("not the engine" in row.note for row in ran if row.stand_in)
    silent = [row for row in ran if not row.stand_in and "GPU" in row.note]
    assert [(row.level, row.component) for row in silent] == [(level, part) for level in ("L4", "L5") for part in parts]
    report = json.loads((made.bundle / "parity.json").read_bytes())
    assert report["verdict"] == "NOT_RUN"
    assert read_results(report) == made.results
    checked = verify(made.bundle)
    assert checked.ok
    assert "not by the engine" in checked.note
    with (made.bundle / "decoder.engine").open("r+b") as file:
        file.seek(5000)
        held = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([held ^ 1]))
    assert [finding.code for finding in verify(made.bundle).findings] == ["bundle-file-changed"]


def test_the_android_bundle_runs_in_litert_and_says_that_its_engines_do_not(tmp_path: Path) -> None:
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "llama", families.find("llama").tiny))
    target = small("android-trt", 32, tmp_path)
    made = build(str(checkpoint), target, tmp_path / "out", quant="int4-b32", context=CONTEXT)
    assert "engine-without-runtime" in {finding.code for finding in made.findings}
    bundle = open_bundle(made.bundle)
    assert "no phone has" in bundle.manifest.target.title
    assert bundle.manifest.parity["L4"] == bundle.manifest.parity["L5"] == "NOT_RUN"
    assert {row.verdict for row in made.results if row.stand_in} <= {Verdict.PASS, Verdict.AMBIGUOUS}
    component = bundle.component("decoder")
    assert component.backend == "litert"  # which the Android loader knows
    assert component.files == ("decoder.tflite", "engines/decoder.engine", "engines/decoder.json")
    choice = json.loads((made.bundle / "engines" / "decoder.json").read_bytes())
    assert [each["file"] for each in choice["engines"]] == ["decoder.engine"]
    assert choice["otherwise"] == {"backend": "litert", "files": ["decoder.tflite"]}
    assert "Android" in choice["why_otherwise"]
    assert not list((made.bundle / "engines").glob("*.onnx*"))
    with bundle.session(threads=1) as session:
        assert session.prefill([1, 2, 3]).shape == (320,)
    assert verify(made.bundle).ok
